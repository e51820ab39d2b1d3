from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, euler_step


class Euler(Method):
    """Euler steps along the velocity field of a rectified-flow model.

    The network predicts v = eps - x0 on straight paths x_t = (1 - t) x0 + t eps; the ODE dx/dt = v(x, t) is followed
    from noise at t = 1 to data at t = 0 in equal steps, one evaluation each:

        x_s = x_t + (s - t) v(x_t, t).
    """

    paper = Paper(
        id="euler",
        title="Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
        authors="Liu, Gong, Liu",
        year=2023,
        arxiv="2209.03003",
        code="gnobitab/RectifiedFlow",
    )
    tasks = (
        "class_to_image/digits_flow",
        "class_to_image/digits_flow_b",
        "class_to_image/digits_dit",
        "attributes_to_image/shapes16",
        "attributes_to_image/shapes32",
        "sampling/mixtures_flow",
        "search/digits",
        "guided/digits_flow",
        "captions/shapes16",
    )

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        x = batch["noise"]
        for t, s in pairwise(uniform_times(rung)):
            x = euler_step(x, denoise.output(x, t), t, s)
        return x
