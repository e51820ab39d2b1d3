from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, deis_sample


class DEIS(Method):
    """DEIS: Adams-Bashforth for the predicted noise, with the schedule's part of the ODE integrated exactly.

    In y = x / alpha and rho = sigma / alpha the probability-flow ODE is dy / d rho = eps(x, t) (proposition 3). The
    noise between t and s is extrapolated by the polynomial through the last r + 1 predictions, and the integral of that
    polynomial is taken in closed form (equation 15):

        y_s = y_t + sum_i C_i eps_i,   C_i = integral of l_i d rho from t to s

    Here the polynomial is in log rho and of degree 2 (order 3); the first two steps have fewer predictions, and the
    last step, on which log rho has no end, is DDIM's, which is degree 0. Times are equally spaced. The paper also fits
    polynomials in t and in rho.
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

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        return deis_sample(denoise, batch["noise"], uniform_times(rung), self.order)
