from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, best_grids, dpm_solver_pp_step


class DPMSolverPP(Method):
    """DPM-Solver++ 2M: second order from one evaluation a step, by reusing the previous prediction of x0.

    With lambda = log(alpha / sigma), h = lambda_s - lambda_t and r = (lambda_t - lambda_u) / h for the time u before t,

        D   = x0(x_t, t) + (x0(x_t, t) - x0(x_u, u)) / (2 r)
        x_s = (sigma_s / sigma_t) x_t - alpha_s (e^-h - 1) D                 (algorithm 2)

    The first step, and the last one to t = 0, are of first order (D = x0). Times are equally spaced in t. On a flow
    log-SNR starts at minus infinity, where the formula has a finite limit: the second step is of first order too.

    `dpm_solver_pp_best_grid` takes, for every step count, that of six common grids on which this solver ends nearest to
    the exact solution of the teacher's ODE (`best_grids`).
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
        "class_to_image/digits_eps_b",
        "class_to_image/digits_flow",
        "class_to_image/digits_flow_b",
        "attributes_to_image/shapes16",
        "sampling/mixtures_eps",
        "sampling/mixtures_flow",
    )
    baselines = ("ddim", "euler")
    claims = (
        Claim(
            "fd[dpm_solver_pp,10] < fd[ddim,10]",
            says="better samples than DDIM at 10 evaluations",
            task="class_to_image/digits_eps",
        ),
    )

    grid = "uniform"  # "best": the one that prepare finds
    variants = (
        Variant(
            "dpm_solver_pp_best_grid",
            says="DPM-Solver++ 2M on the grid that suits it best",
            grid="best",
            tasks=(
                "class_to_image/digits_eps",
                "class_to_image/digits_flow",
                "sampling/mixtures_eps",
                "sampling/mixtures_flow",
            ),
            baselines=("dpm_solver_pp", "ddim", "euler"),
            claims=(
                Claim(
                    "fd[dpm_solver_pp_best_grid,8] < fd[dpm_solver_pp,8]",
                    says="the grid improves DPM-Solver++ at eight evaluations",
                ),
            ),
        ),
    )

    def prepare(self, session: Session) -> dict[str, Tensor] | None:
        return best_grids(session, self.solve) if self.grid == "best" else None

    @staticmethod
    def solve(denoise: Denoiser, x: Tensor, times: list[float]) -> Tensor:
        """Samples [B, ...] from noise x on a grid of times."""
        past: list[tuple[float, Tensor]] = []
        for t, s in pairwise(times):
            past = [*past[-1:], (t, denoise(x, t)[0])]
            x = dpm_solver_pp_step(denoise.schedule, x, past, s, order=2)
        return x

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        times = session.state[f"times_{rung}"].tolist() if self.grid == "best" else uniform_times(rung)
        return self.solve(denoise, batch["noise"], times)
