from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import quadratic_times, snap_times, uniform_times
from stepmark.tracks.image.solvers import Denoiser, best_grids, ddim_step


class DDIM(Method):
    """DDIM: deterministic sampling of a diffusion model on a short grid of timesteps.

    With a prediction of noise eps at x_t = alpha_t x0 + sigma_t eps, a step from t to s is

        x0  = (x_t - sigma_t eps) / alpha_t
        x_s = alpha_s x0 + sigma_s eps                                       (equation 12 with sigma = 0)

    which is the Euler step of the probability-flow ODE in the variables x / alpha and sigma / alpha, and on a flow that
    of its velocity. One evaluation a step. Timesteps are equally spaced from the last one down ("trailing"), so that
    sampling starts from the pure noise the model was trained on; the paper's own "leading" grid starts below it and
    gives worse images with four to eight steps. No clipping.

    `ddim_quadratic` is the second of the two grids that the paper tries (appendix D.2: tau_i = floor(c i^2)), started at
    the last timestep too. `ddim_best_grid` takes, for every step count, that of six common grids on which DDIM ends
    nearest to the exact solution of the teacher's ODE (`best_grids`).
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

    grid = "uniform"  # or "quadratic"; "best": the one that prepare finds
    variants = (
        Variant(
            "ddim_quadratic",
            says="DDIM on quadratic timesteps: t proportional to the square of equal steps, dense near the data",
            grid="quadratic",
            tasks=("class_to_image/digits_eps", "class_to_image/digits_eps_b", "sampling/mixtures_eps"),
        ),
        Variant(
            "ddim_best_grid",
            says="DDIM (for flows Euler) on the grid that suits it best",
            grid="best",
            tasks=(
                "class_to_image/digits_eps",
                "class_to_image/digits_flow",
                "sampling/mixtures_eps",
                "sampling/mixtures_flow",
            ),
            baselines=("ddim", "euler"),
            claims=(
                Claim("fd[ddim_best_grid,10] < fd[ddim,10]", says="the grid alone improves DDIM at ten evaluations"),
            ),
        ),
    )

    def prepare(self, session: Session) -> dict[str, Tensor] | None:
        return best_grids(session, self.solve) if self.grid == "best" else None

    @staticmethod
    def solve(denoise: Denoiser, x: Tensor, times: list[float]) -> Tensor:
        """Samples [B, ...] from noise x on a grid of times."""
        for t, s in pairwise(times):
            x = ddim_step(denoise.schedule, *denoise(x, t), s)
        return x

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        if self.grid == "best":
            times = session.state[f"times_{rung}"].tolist()
        elif self.grid == "quadratic":
            times = snap_times(denoise.schedule, quadratic_times(rung))
        else:
            times = uniform_times(rung)
        return self.solve(denoise, batch["noise"], times)
