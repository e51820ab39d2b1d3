from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import Schedule, uniform_times
from stepmark.tracks.image.solvers import Denoiser, best_grids


def unipc_step(
    schedule: Schedule,
    x: Tensor,
    past: Sequence[tuple[float, Tensor]],
    s: float,
    order: int = 2,
    ahead: Tensor | None = None,
) -> Tensor:
    """From x at the time of `past[-1]` to time s: the predictor UniP, or with `ahead` the corrector UniC (Zhao et al.
    2023, equations 3 and 8, predicted data, B(h) = e^h - 1).

    past: (time, prediction of x0) of the evaluations so far, the latest last; `order` of them are used, and the order
    falls to the number there is. ahead: prediction of x0 at the predicted point at s. A step of infinite length in
    log-SNR, from pure noise of a flow or to the data, is of first order and has no corrector.
    """
    t, x0 = past[-1]
    now = schedule.log_snr(t)
    h = schedule.log_snr(s) - now
    alpha, phi = schedule.alpha(s), math.expm1(-h)  # phi_1 of the paper times -h, and B(h) of its variant bh2
    base = (schedule.sigma(s) / schedule.sigma(t)) * x - alpha * phi * x0
    if math.isinf(h):
        return base
    known = [(schedule.log_snr(u), m) for u, m in past[-order:-1] if math.isfinite(schedule.log_snr(u))]
    points = [((at - now) / h, m) for at, m in reversed(known)] + ([] if ahead is None else [(1.0, ahead)])
    if not points:
        return base
    moments, term = [], phi / -h - 1
    for k in range(1, len(points) + 1):
        moments.append(term * math.factorial(k) / phi)
        term = term / -h - 1 / math.factorial(k + 1)
    powers = np.vander([r for r, _ in points], increasing=True).T
    weights = [0.5] if len(points) == 1 else np.linalg.solve(powers, moments).tolist()
    slopes = [w / r * (m - x0) for w, (r, m) in zip(weights, points, strict=True)]
    return base - alpha * phi * torch.stack(slopes).sum(0)


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
        """Samples [B, ...] from noise x on a grid of times: every evaluation corrects the step that led to it, then
        predicts the next (algorithm 1).
        """
        past: list[tuple[float, Tensor]] = []
        before = x
        for t, s in pairwise(times):
            x0 = denoise(x, t)[0]
            if past:
                x = unipc_step(denoise.schedule, before, past, t, self.order, ahead=x0)
            past = [*past, (t, x0)][-self.order :]
            before, x = x, unipc_step(denoise.schedule, x, past, s, self.order)
        return x

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        times = session.state[f"times_{rung}"].tolist() if self.grid == "best" else uniform_times(rung)
        return self.solve(denoise, batch["noise"], times)
