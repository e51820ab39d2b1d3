from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import leading_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step


class DDIMLeading(Method):
    """DDIM on the "leading" timesteps: the grid of the original paper and of many pipelines since.

    Timesteps are (n - 1) k, ..., k, 0 with k = N // n, so that sampling begins below the last timestep with what is pure
    noise only there (Lin et al. 2024, section 3.3). The fewer the steps, the lower it begins. Steps are DDIM's, one
    evaluation each; `ddim` is the same on the "trailing" grid, which always begins at the last timestep.
    """

    paper = Paper(
        id="zero_terminal_snr",
        title="Common Diffusion Noise Schedules and Sample Steps are Flawed",
        authors="Lin, Liu, Li, Yang",
        year=2023,
        arxiv="2305.08891",
    )
    tasks = ("class_to_image/shades",)
    baselines = ("ddim",)
    claims = (
        Claim("fd[ddim,5] < fd[ddim_leading,5]", says="at five steps the trailing grid is better than the leading one"),
    )

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise, x = Denoiser(session.networks["teacher"], batch["condition"]), batch["noise"]
        for t, s in pairwise(leading_times(rung, denoise.schedule.steps)):
            x0, eps = denoise(x, t)
            x = ddim_step(denoise.schedule, x0, eps, s)
        return x
