from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.depth import sample_pairs


class D4DRGBD(Method):
    """Diffusion4D: a diffusion model draws colour and depth together, and a depth network learns from what it draws.

    Pairs of colour and depth are dear, a graphics engine's do not look like the real ones. So a model of images becomes one
    of pairs: depth, scaled to the range of the colours, is a fourth channel, only the first and the last convolution change,
    and it is trained on the few real pairs by the usual loss

        |eps_theta(sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, t) - eps|^2,   x0 = (red, green, blue, depth).

    Drawn from noise, the four channels belong together. The depth network then learns from real and drawn pairs mixed, with
    its usual losses; at inference it is unchanged. The model is `scenes16_rgbd` in `bench/stepmark/backbones/rgbd.py`; `run`
    draws pairs in as many equal DDIM steps as the rung allows, one evaluation each; the judge of the task mixes them.

    Differs from the paper: pictures of 16x16 of rendered rooms, a model of less than a million weights that has seen a
    hundred pairs and their mirror images, and DDIM, so that a pair is drawn in a few steps.

    A hundred rooms are little to draw others from, and the network knows them nearly by heart (its loss on them and on
    others is in the report of the backbone): what drawn pairs add lies between the real ones. Of engine pairs a thousand
    different ones are mixed in, of drawn ones as many.
    """

    paper = Paper(
        id="d4d_rgbd",
        title="D4D: An RGBD diffusion model to boost monocular depth estimation",
        authors="Papa, Russo, Amerini",
        year=2024,
        arxiv="2403.07516",
    )
    tasks = ("training_pairs/scenes16",)
    baselines = ("real_pairs_only", "engine_pairs", "augmented_pairs")
    claims = (
        Claim(
            "rmse[d4d_rgbd,50] < rmse[real_pairs_only,50]",
            says="with drawn pairs the depth error is smaller than with the real ones alone",
        ),
        Claim(
            "rmse[d4d_rgbd,50] < rmse[engine_pairs,50]",
            says="and smaller than with pairs of a graphics engine",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        return sample_pairs(session.networks["teacher"], batch["noise"], batch["condition"], rung)
