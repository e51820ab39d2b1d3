"""D4D: a diffusion model that draws colour and depth together makes the pairs from which a depth network learns."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step


@torch.no_grad()
def sample_pairs(network: nn.Module, noise: Tensor, condition: Tensor, steps: int) -> Tensor:
    """Pairs [B, 4, H, W] from noise in equal DDIM steps, colour and depth together; one evaluation each.

    Predictions are kept to the range of the data at every step (Ho et al. 2020): close to pure noise a small error of the
    predicted noise is a large one of the pair.
    """
    denoise, x = Denoiser(network, condition), noise
    schedule = denoise.schedule
    for t, s in pairwise(uniform_times(steps)):
        x0 = denoise(x, t)[0].clamp(-1, 1)
        x = ddim_step(schedule, x0, (x - schedule.alpha(t) * x0) / schedule.sigma(t), s)
    return x


def picked(pairs: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """n of the pairs, at random and with repetition."""
    return pairs[torch.randint(len(pairs), (n,), generator=rng, device=pairs.device)]


def mirrored(pairs: Tensor, rng: torch.Generator) -> Tensor:
    """Each pair [n, 4, H, W] mirrored by half the chance."""
    turn = torch.randint(2, (len(pairs), 1, 1, 1), generator=rng, device=pairs.device, dtype=torch.bool)
    return torch.where(turn, pairs.flip(3), pairs)


def augmented(pairs: Tensor, rng: torch.Generator, least: int = 12) -> Tensor:
    """Each pair [n, 4, H, W] cut to a random window of at least so many pixels, enlarged to H x W again, and mirrored by
    half the chance. Depth is kept as it is, though a window enlarged is a nearer view: dividing depth by the enlargement
    did no better.
    """
    size, device = pairs.shape[-1], pairs.device
    n = len(pairs)
    share = (least + (size - least) * torch.rand(n, generator=rng, device=device)) / size
    away = (1 - share)[:, None] * (2 * torch.rand(n, 2, generator=rng, device=device) - 1)
    mirror = 1 - 2 * torch.randint(2, (n,), generator=rng, device=device)
    window = torch.zeros(n, 2, 3, device=device)
    window[:, 0, 0], window[:, 1, 1], window[:, :, 2] = share * mirror, share, away
    grid = affine_grid(window, list(pairs.shape), align_corners=False)
    colour = grid_sample(pairs[:, :3], grid, padding_mode="border", align_corners=False)
    depth = grid_sample(pairs[:, 3:], grid, mode="nearest", padding_mode="border", align_corners=False)
    return torch.cat([colour, depth], 1)


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
    hundred pairs and their mirror images where the paper's saw tens of thousands, and DDIM with predictions kept to the
    range of the data, so that a pair is drawn in a few steps; one depth network instead of four.

    A hundred rooms are little to draw others from, and the network knows them nearly by heart (its loss on them and on
    others is in the report of the backbone): what drawn pairs add lies between the real ones. That blends of two real
    pairs would do as well is not ruled out. A thousand pairs are drawn, no two the same; engine pairs are picked a
    thousand times from a thousand, with repetition, so that about 630 different ones are mixed in.

    The claims span 10 to 50 steps: pairs for training are drawn once, so that few steps are no aim. With two the pairs
    are blurred.

    The variants draw nothing: every item is one at random of the real pairs once more, of the same mirrored by half the
    chance or cut and mirrored, or of those of a graphics engine, which have exact depth and are as many as wanted, but of
    another style than the real ones. No network is evaluated, and all their rungs are the same. `mirrored_pairs` is what
    the diffusion model was trained on: only what drawn pairs are better than these is owed to drawing.
    """

    paper = Paper(
        id="d4d_rgbd",
        title="D4D: An RGBD diffusion model to boost monocular depth estimation",
        authors="Papa, Russo, Amerini",
        year=2024,
        arxiv="2403.07516",
    )
    tasks = ("training_pairs/scenes16",)
    baselines = ("mirrored_pairs", "engine_pairs", "real_pairs_only", "augmented_pairs")
    claims = (
        Claim(
            "rmse[d4d_rgbd,10..50] < min(rmse[mirrored_pairs,10..50], rmse[engine_pairs,10..50])",
            says="with drawn pairs the depth error is smaller than with the real ones and their mirror images alone, and than "
            "with those of a graphics engine",
            headline=True,
            setting="the model has seen a hundred pairs and knows them nearly by heart, the paper's tens of thousands",
        ),
        Claim(
            "rmse[d4d_rgbd,10..50] < min(rmse[real_pairs_only,10..50], rmse[augmented_pairs,10..50])",
            says="and than with the real ones as they are, and than with the same cut and mirrored",
        ),
        Claim(
            "delta[d4d_rgbd,10..50] > max(delta[mirrored_pairs,10..50], delta[engine_pairs,10..50])",
            says="more pixels are within a quarter of their depth",
            setting="the model has seen a hundred pairs and knows them nearly by heart, the paper's tens of thousands",
        ),
    )

    source: str | None = None  # the training pairs that are handed on, instead of drawn ones
    mirror, augment = False, False
    variants = (
        Variant(
            "real_pairs_only",
            says="the real pairs themselves, once more: a depth network that learns from nothing else",
            source="x0",
            baselines=(),
        ),
        Variant(
            "mirrored_pairs",
            says="the real pairs and their mirror images: what the diffusion model was trained on",
            source="x0",
            mirror=True,
            baselines=(),
        ),
        Variant(
            "engine_pairs",
            says="pairs rendered by a graphics engine: exact depth, but of another style than the real ones",
            source="engine",
            baselines=(),
        ),
        Variant(
            "augmented_pairs",
            says="the real pairs, cut to a random window and mirrored by half the chance: the usual augmentation",
            source="x0",
            augment=True,
            baselines=(),
        ),
    )

    def prepare(self, session: Session) -> dict[str, Tensor]:
        return {} if self.source is None else {"pairs": session.train[self.source]}

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if self.source is None:
            return sample_pairs(session.networks["teacher"], batch["noise"], batch["condition"], rung)
        pairs = picked(session.state["pairs"], len(batch["noise"]), session.rng)
        if self.mirror:
            return mirrored(pairs, session.rng)
        return augmented(pairs, session.rng) if self.augment else pairs
