from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import quadratic_times, schedule_of, snap_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step


class DDIMQuadratic(Method):
    """DDIM on quadratic timesteps: t proportional to the square of equal steps, dense near the data.

    The second of the two grids that the DDIM paper tries (appendix D.2: tau_i = floor(c i^2)), here started at the last
    timestep like the uniform grid of `ddim`. The step itself is equation 12 with sigma = 0.
    """

    paper = Paper(
        id="ddim",
        title="Denoising Diffusion Implicit Models",
        authors="Song, Meng, Ermon",
        year=2021,
        arxiv="2010.02502",
        code="ermongroup/ddim",
    )
    tasks = ("class_to_image/digits_eps", "class_to_image/digits_eps_b", "sampling/mixtures_eps")

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        x = batch["noise"]
        for t, s in pairwise(snap_times(schedule_of(denoise.network), quadratic_times(rung))):
            x0, eps = denoise(x, t)
            x = ddim_step(denoise.schedule, x0, eps, s)
        return x
