from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Method, Paper, Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step


class DDIM(Method):
    """DDIM: deterministic sampling of a diffusion model on a short grid of timesteps.

    With a prediction of noise eps at x_t = alpha_t x0 + sigma_t eps, a step from t to s is

        x0  = (x_t - sigma_t eps) / alpha_t
        x_s = alpha_s x0 + sigma_s eps                                       (equation 12 with sigma = 0)

    which is the Euler step of the probability-flow ODE in the variables x / alpha and sigma / alpha. One evaluation a
    step. Timesteps are equally spaced from the last one down ("trailing"), so that sampling starts from the pure noise
    the model was trained on; the paper's own "leading" grid starts below it and is worse at few steps. No clipping.
    """

    paper = Paper(
        id="ddim",
        title="Denoising Diffusion Implicit Models",
        authors="Song, Meng, Ermon",
        year=2021,
        arxiv="2010.02502",
        code="ermongroup/ddim",
    )
    tasks = (
        "class_to_image/digits_eps",
        "class_to_image/digits_eps_b",
        "sampling/mixtures_eps",
        "minority/rare_eps",
        "class_to_image/shades",
    )

    @torch.no_grad()
    def run(self, session: Session, batch: dict[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        x = batch["noise"]
        for t, s in pairwise(uniform_times(rung)):
            x0, eps = denoise(x, t)
            x = ddim_step(denoise.schedule, x0, eps, s)
        return x
