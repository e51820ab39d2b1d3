from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import karras_times, uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step, heun_step


class Heun(Method):
    """Heun's second-order sampler: a trial Euler step, then the average of the slopes at both ends.

    Algorithm 1 of the paper without added noise. With slope d of the ODE in the variable it is straightest in (v over
    t for flows, eps = d(x / alpha) / d(sigma / alpha) for noise prediction):

        x' = x_t + h d(x_t, t)
        x_s = x_t + h (d(x_t, t) + d(x', s)) / 2                              two evaluations

    The last step, to t = 0, is an Euler step. So an odd budget of 2m - 1 evaluations buys m steps; an even one spends
    the evaluation left over on an Euler step at the start, where the path is nearly straight. Times are equally spaced.

    `edm_heun` takes the grid that the authors recommend: the noise level sigma / alpha is equally spaced after the 1/7-th
    power (equation 5, rho = 7), with short steps near the data, where the path bends. It starts at t = 0.999, as a flow's
    noise level is infinite at 1, and ends at t = 0.001 before the data.
    """

    paper = Paper(
        id="heun",
        title="Elucidating the Design Space of Diffusion-Based Generative Models",
        authors="Karras, Aittala, Aila, Laine",
        year=2022,
        arxiv="2206.00364",
        code="NVlabs/edm",
    )
    tasks = (
        "class_to_image/digits_flow",
        "class_to_image/digits_flow_b",
        "class_to_image/digits_eps",
        "class_to_image/digits_eps_b",
        "attributes_to_image/shapes16",
        "sampling/mixtures_flow",
        "sampling/mixtures_eps",
    )
    baselines = ("ddim", "euler")
    claims = (
        Claim(
            "endpoint_error[heun,64] < endpoint_error[euler,64]",
            says="at enough evaluations the second-order solver is closer to the exact solution than Euler's",
            task="sampling/mixtures_flow",
        ),
    )

    grid = "uniform"  # or "karras"
    variants = (
        Variant(
            "edm_heun",
            says="EDM's deterministic sampler: Heun's method on the grid that its authors recommend",
            grid="karras",
            tasks=(
                "class_to_image/digits_eps",
                "class_to_image/digits_eps_b",
                "class_to_image/digits_flow",
                "class_to_image/digits_flow_b",
                "sampling/mixtures_eps",
                "sampling/mixtures_flow",
            ),
            baselines=("heun", "ddim", "euler"),
            claims=(
                Claim(
                    "endpoint_error[edm_heun,64] < endpoint_error[heun,64]",
                    says="with many evaluations the grid brings Heun's method closer to the exact solution than equal steps "
                    "do",
                    task="sampling/mixtures_eps",
                ),
            ),
        ),
    )

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        x = batch["noise"]
        single = 1 if rung == 1 else 2 - rung % 2  # steps of one evaluation: the last, and the first of an even budget
        steps = single + (rung - single) // 2
        times = karras_times(denoise.schedule, steps) if self.grid == "karras" else uniform_times(steps)
        for i, (t, s) in enumerate(pairwise(times)):
            if s == 0 or (i == 0 and single == 2):
                x = ddim_step(denoise.schedule, *denoise(x, t), s)
            else:
                x = heun_step(denoise, x, t, s)
        return x
