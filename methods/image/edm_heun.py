from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import karras_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step, heun_step


class EDMHeun(Method):
    """EDM's deterministic sampler: Heun's method on the grid that its authors recommend.

    Algorithm 1 with times whose noise level sigma / alpha is equally spaced after the 1/7-th power (equation 5, rho = 7):
    short steps near the data, where the path bends. Steps are those of Heun: a trial Euler step and the average of the
    slopes at both ends, two evaluations; the last one, to the data, is an Euler step. An odd rung of 2 m - 1 evaluations
    buys m steps; an even one spends what is left over on an Euler step at the start. Sampling starts at t = 0.999, as a
    flow's noise level is infinite at 1, and the grid ends at t = 0.001 before the data.
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
        "class_to_image/digits_eps",
        "class_to_image/digits_eps_b",
        "class_to_image/digits_flow",
        "class_to_image/digits_flow_b",
        "sampling/mixtures_eps",
        "sampling/mixtures_flow",
    )
    baselines = ("heun", "ddim", "euler")
    claims = (
        Claim(
            "endpoint_error[edm_heun,64] < endpoint_error[heun,64]",
            says="with many evaluations the grid brings Heun's method closer to the exact solution than equal steps do",
            task="sampling/mixtures_eps",
        ),
    )

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise, x = Denoiser(session.networks["teacher"], batch["condition"]), batch["noise"]
        single = 1 if rung == 1 else 2 - rung % 2  # steps of one evaluation: the last, and the first of an even rung
        times = karras_times(denoise.schedule, single + (rung - single) // 2)
        for i, (t, s) in enumerate(pairwise(times)):
            if s == 0 or (i == 0 and single == 2):
                x = ddim_step(denoise.schedule, *denoise(x, t), s)
            else:
                x = heun_step(denoise, x, t, s)
        return x
