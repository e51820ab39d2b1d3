from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, dpm_solver_pp_step


class DPMSolverPP(Method):
    """DPM-Solver++ 2M: second order from one evaluation a step, by reusing the previous prediction of x0.

    With lambda = log(alpha / sigma), h = lambda_s - lambda_t and r = (lambda_t - lambda_u) / h for the time u before t,

        D   = x0(x_t, t) + (x0(x_t, t) - x0(x_u, u)) / (2 r)
        x_s = (sigma_s / sigma_t) x_t - alpha_s (e^-h - 1) D                 (algorithm 2)

    The first step, and the last one to t = 0, are of first order (D = x0). Times are equally spaced in t. On a flow
    log-SNR starts at minus infinity, where the formula has a finite limit: the second step is of first order too.
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

    @torch.no_grad()
    def run(self, session: Session, batch: dict[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        x, past = batch["noise"], []
        for t, s in pairwise(uniform_times(rung)):
            past = [*past[-1:], (t, denoise(x, t)[0])]
            x = dpm_solver_pp_step(denoise.schedule, x, past, s, order=2)
        return x
