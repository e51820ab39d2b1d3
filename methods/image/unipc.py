from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, unipc_sample


class UniPC(Method):
    """UniPC-2: a multistep predictor and, from the same evaluations, a corrector.

    With lambda = log(alpha / sigma), h = lambda_s - lambda_t, r_m = (lambda_m - lambda_t) / h for earlier times and
    D_m = x0_m - x0_t, the predictor of order p (UniP, equation 8 for predicted data, B(h) = e^-h - 1) is

        x_s = (sigma_s / sigma_t) x_t - alpha_s (e^-h - 1) x0_t - alpha_s B(h) sum_m (a_m / r_m) D_m

    with a solving R a = b of theorem 3.1; a_1 = 1/2 where there is one difference. The network is evaluated at the
    predicted x_s, as it would be for the next step anyway; that value joins the differences with r = 1 (UniC, equation
    3), and the next step starts from the corrected x_s without a new evaluation (algorithm 1). The corrector raises the
    order by one: three for the default p = 2. The last step, to the data, is of first order. Times are equally spaced.
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

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        return unipc_sample(denoise, batch["noise"], uniform_times(rung), self.order)
