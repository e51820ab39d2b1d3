from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import Schedule, uniform_times
from stepmark.tracks.image.solvers import Denoiser, best_grids, ddim_step


def exponential_weights(schedule: Schedule, times: Sequence[float], s: float) -> list[float]:
    """Weight of the noise predicted at each of `times` (the latest last) in a DEIS step to s > 0 (Zhang and Chen 2023,
    equation 15).

    integral of l_i(log rho) d rho from the latest time to s, rho = sigma / alpha, l_i the Lagrange basis on the nodes
    log rho(times): exact by Gauss-Legendre quadrature, as the integrand is a polynomial times an exponential.
    """
    nodes = [-schedule.log_snr(t) for t in times]
    start, end = nodes[-1], -schedule.log_snr(s)
    place, weight = np.polynomial.legendre.leggauss(16)
    at = 0.5 * (end - start) * place + 0.5 * (end + start)
    found = []
    for i, node in enumerate(nodes):
        basis = np.prod([(at - other) / (node - other) for j, other in enumerate(nodes) if j != i], axis=0)
        found.append(float((0.5 * (end - start) * weight * basis * np.exp(at)).sum()))
    return found


class DEIS(Method):
    """DEIS: Adams-Bashforth for the predicted noise, with the schedule's part of the ODE integrated exactly.

    In y = x / alpha and rho = sigma / alpha the probability-flow ODE is dy / d rho = eps(x, t) (proposition 3). The
    noise between t and s is extrapolated by the polynomial through the last r + 1 predictions, and the integral of that
    polynomial is taken in closed form (equation 15):

        y_s = y_t + sum_i C_i eps_i,   C_i = integral of l_i d rho from t to s

    Here the polynomial is in log rho and of degree 2 (order 3); the first two steps have fewer predictions, and the
    last step, on which log rho has no end, is DDIM's, which is degree 0. Times are equally spaced. The paper also fits
    polynomials in t and in rho.

    `deis_best_grid` takes, for every step count, that of six common grids on which this solver ends nearest to the
    exact solution of the teacher's ODE (`best_grids`).
    """

    paper = Paper(
        id="deis",
        title="Fast Sampling of Diffusion Models with Exponential Integrator",
        authors="Zhang, Chen",
        year=2023,
        arxiv="2204.13902",
        code="qsh-zh/deis",
    )
    tasks = ("class_to_image/digits_eps", "class_to_image/digits_eps_b", "sampling/mixtures_eps")
    baselines = ("ddim",)
    claims = (Claim("fd[deis,10] < fd[ddim,10]", says="better samples than DDIM at 10 evaluations"),)

    order = 3
    grid = "uniform"  # "best": the one that prepare finds
    variants = (
        Variant(
            "deis_best_grid",
            says="DEIS of order 3 on the grid that suits it best",
            grid="best",
            baselines=("deis", "ddim"),
            claims=(Claim("fd[deis_best_grid,8] < fd[deis,8]", says="the grid improves DEIS at eight evaluations"),),
        ),
    )

    def prepare(self, session: Session) -> dict[str, Tensor] | None:
        return best_grids(session, self.solve) if self.grid == "best" else None

    def solve(self, denoise: Denoiser, x: Tensor, times: list[float]) -> Tensor:
        """Samples [B, ...] from noise x on a grid of times; the step to the data is DDIM's."""
        schedule = denoise.schedule
        past: list[tuple[float, Tensor]] = []
        for t, s in pairwise(times):
            x0, eps = denoise(x, t)
            if s == 0:
                return ddim_step(schedule, x0, eps, s)
            past = [*past, (t, eps)][-self.order :]
            weights = exponential_weights(schedule, [u for u, _ in past], s)
            step = torch.stack([w * e for w, (_, e) in zip(weights, past, strict=True)]).sum(0)
            x = schedule.alpha(s) * (x / schedule.alpha(t) + step)
        return x

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        times = session.state[f"times_{rung}"].tolist() if self.grid == "best" else uniform_times(rung)
        return self.solve(denoise, batch["noise"], times)
