from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, euler_step
from stepmark.tracks.image.training import PointField, fit_coupled


class FlowMatchingPoints(Method):
    """Flow matching from scratch on points, noise and data paired at random.

    A small perceptron learns the velocity of straight paths between independent ends,

        x_t = (1 - t) x0 + t eps,   loss = |v(x_t, t, c) - (eps - x0)|^2,   t uniform

    and is followed from noise to data by Euler steps. Paths cross, so the learnt flow is curved and few steps of it are
    inaccurate. It is what pairings of noise and data are compared with: `ot_cfm` and `c2ot` share all but the pairing.
    """

    paper = Paper(
        id="flow_matching",
        title="Flow Matching for Generative Modeling",
        authors="Lipman, Chen, Ben-Hamu, Nickel, Le",
        year=2023,
        arxiv="2210.02747",
    )
    tasks = ("sampling/mixtures_flow",)
    unclaimed = "a reference point: what other methods are compared with"

    steps = 4000

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"field": PointField(1 + int(session.train["condition"].max()))}

    def prepare(self, session: Session) -> None:
        def couple(eps: Tensor, x0: Tensor, condition: Tensor) -> Tensor:
            return torch.arange(len(eps), device=eps.device)

        fit_coupled(session, session.networks["field"], couple, session.scale(self.steps, 8))

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise, x = Denoiser(session.networks["field"], batch["condition"]), batch["noise"]
        for t, s in pairwise(uniform_times(rung)):
            x = euler_step(x, denoise.output(x, t), t, s)
        return x
