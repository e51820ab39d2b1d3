from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.solvers import Denoiser, best_grids, dpm_solver_pp_step


class DPMSolverPPBestGrid(Method):
    """DPM-Solver++ 2M on the grid that suits it best.

    Of six common grids (equal steps in t, in its square root, in log-SNR, those of Karras et al., and equal steps shifted
    towards the noise and towards the data) the one is taken, for every step count, on which this solver ends nearest to the
    exact solution of the teacher's ODE. At few steps the grid moves a sampler more than its order does, so that samplers
    should be compared each on a grid that suits it.
    """

    paper = Paper(
        id="dpm_solver_pp",
        title="DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
        authors="Lu, Zhou, Bao, Chen, Li, Zhu",
        year=2022,
        arxiv="2211.01095",
        code="LuChengTHU/dpm-solver",
    )
    tasks = (
        "class_to_image/digits_eps",
        "class_to_image/digits_flow",
        "sampling/mixtures_eps",
        "sampling/mixtures_flow",
    )
    baselines = ("dpm_solver_pp", "ddim", "euler")
    claims = (
        Claim(
            "fd[dpm_solver_pp_best_grid,8] < fd[dpm_solver_pp,8]",
            says="the grid improves DPM-Solver++ at eight evaluations",
        ),
    )

    def prepare(self, session: Session) -> dict[str, Tensor]:
        return best_grids(session, self.solve)

    @staticmethod
    def solve(denoise: Denoiser, x: Tensor, times: list[float]) -> Tensor:
        """Samples [B, ...] from noise x on a grid of times."""
        past: list[tuple[float, Tensor]] = []
        for t, s in pairwise(times):
            past = [*past[-1:], (t, denoise(x, t)[0])]
            x = dpm_solver_pp_step(denoise.schedule, x, past, s)
        return x

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        return self.solve(denoise, batch["noise"], session.state[f"times_{rung}"].tolist())
