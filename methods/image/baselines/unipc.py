from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, best_grids, unipc_sample


class UniPC(Method):
    """UniPC-2: a multistep predictor and, from the same evaluations, a corrector.

    With lambda = log(alpha / sigma), h = lambda_s - lambda_t, r_m = (lambda_m - lambda_t) / h for earlier times and
    D_m = x0_m - x0_t, the predictor of order p (UniP, equation 8 for predicted data, B(h) = e^-h - 1) is

        x_s = (sigma_s / sigma_t) x_t - alpha_s (e^-h - 1) x0_t - alpha_s B(h) sum_m (a_m / r_m) D_m

    with a solving R a = b of theorem 3.1; a_1 = 1/2 where there is one difference. The network is evaluated at the
    predicted x_s, as it would be for the next step anyway; that value joins the differences with r = 1 (UniC, equation
    3), and the next step starts from the corrected x_s without a new evaluation (algorithm 1). The corrector raises the
    order by one: three for the default p = 2. The last step, to the data, is of first order. Times are equally spaced.

    `unipc_best_grid` takes, for every step count, that of six common grids on which this solver ends nearest to the
    exact solution of the teacher's ODE (`best_grids`).
    """

    paper = Paper(
        id="unipc",
        title="UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
        authors="Zhao, Bai, Rao, Zhou, Lu",
        year=2023,
        arxiv="2302.04867",
        code="wl-zhao/UniPC",
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
    baselines = ("dpm_solver_pp", "ddim", "euler")
    claims = (
        Claim(
            "fd[unipc,8] < fd[dpm_solver_pp,8]",
            says="better samples than DPM-Solver++ 2M at 8 evaluations",
            task="class_to_image/digits_eps",
        ),
        Claim(
            "endpoint_error[unipc,16] < endpoint_error[dpm_solver_pp,16]",
            says="closer to the exact solution than DPM-Solver++ 2M at 16 evaluations",
            task="sampling/mixtures_eps",
        ),
    )

    order = 2
    grid = "uniform"  # "best": the one that prepare finds
    variants = (
        Variant(
            "unipc_best_grid",
            says="UniPC-2 on the grid that suits it best",
            grid="best",
            tasks=(
                "class_to_image/digits_eps",
                "class_to_image/digits_flow",
                "sampling/mixtures_eps",
                "sampling/mixtures_flow",
            ),
            baselines=("unipc", "ddim", "euler"),
            claims=(Claim("fd[unipc_best_grid,8] < fd[unipc,8]", says="the grid improves UniPC at eight evaluations"),),
        ),
    )

    def prepare(self, session: Session) -> dict[str, Tensor] | None:
        return best_grids(session, self.solve) if self.grid == "best" else None

    def solve(self, denoise: Denoiser, x: Tensor, times: list[float]) -> Tensor:
        """Samples [B, ...] from noise x on a grid of times."""
        return unipc_sample(denoise, x, times, self.order)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        times = session.state[f"times_{rung}"].tolist() if self.grid == "best" else uniform_times(rung)
        return self.solve(denoise, batch["noise"], times)
