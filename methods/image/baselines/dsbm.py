from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import bridge_step
from stepmark.tracks.image.training import PointField, fit


def transport(
    network: nn.Module, x: Tensor, condition: Tensor, steps: int, epsilon: float, rng: torch.Generator
) -> Tensor:
    """Carry x from time 1 to 0 along the learnt diffusion, with x0 = x - t v held fixed over a step."""
    for t, s in pairwise(uniform_times(steps)):
        now, then = (torch.full((len(x),), time, dtype=x.dtype, device=x.device) for time in (t, s))
        x = bridge_step(x - t * network(x, now, condition), x, now, then, epsilon, rng)
    return x


class DSBM(Method):
    """Diffusion Schroedinger bridge matching: a diffusion from noise to data, fitted to bridges again and again.

    A coupling of data x_0 and noise x_1 is filled in with Brownian bridges of variance e; the diffusion with the same
    drift at every point and time,

        dx = -v(x, t) dt + sqrt(e) dw backwards in t,   v(x, t) = E[(x_t - x_0) / t | x_t = x]

    is learnt by regression (equation 8) and simulated to give a new coupling, for which the opposite direction is
    learnt (algorithm 1). The first coupling is independent; forward and backward alternate. Transitions are Gaussian, so
    sampling needs many small steps. A step draws from the bridge between x_t and the predicted x_0 = x_t - t v, which is
    the exact solution for a prediction that stays the same, one evaluation each.

    The baseline of `asbm`: the same coupling, variance, networks and rounds of training.
    """

    paper = Paper(
        id="dsbm",
        title="Diffusion Schrödinger Bridge Matching",
        authors="Shi, De Bortoli, Campbell, Doucet",
        year=2023,
        arxiv="2303.16852",
        code="yuyang-shi/dsbm-pytorch",
    )
    tasks = ("sampling/mixtures_flow",)
    unclaimed = "a reference point: what other methods are compared with"

    epsilon, simulated = 1.0, 30
    rounds = (4000, 3000, 2000)  # updates: forward, backward, forward, ...
    batch, rate = 256, 2e-3

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"drift": PointField(1 + int(session.train["condition"].max()))}

    def prepare(self, session: Session) -> None:
        rng, device = session.rng, session.device
        data, label = (session.train[key].to(device) for key in ("x0", "condition"))
        sides = (session.networks["drift"], PointField(1 + int(label.max())).to(device))
        starts, size = data, session.scale(self.batch, 32)
        ends = torch.randn(data.shape, generator=rng, device=device)

        def loss(network: nn.Module) -> Tensor:
            pick = torch.randint(len(starts), (size,), generator=rng, device=device)
            t = torch.rand(size, generator=rng, device=device).clamp(min=1e-3)
            x = bridge_step(starts[pick], ends[pick], torch.ones_like(t), t, self.epsilon, rng)
            miss = network(x, t, label[pick]) - (x - starts[pick]) / t[:, None]
            return (t[:, None] * miss.square()).mean()  # the target's variance grows as 1 / t

        rounds, simulated = session.scale((self.rounds, self.simulated), ((2, 2, 2), 2))
        for k, count in enumerate(rounds):
            network = sides[k % 2]
            fit(session, network, lambda network=network: loss(network), count, self.rate, ema=0.995)
            source = torch.randn(data.shape, generator=rng, device=device) if k % 2 == 0 else data
            with torch.no_grad():
                made = transport(network, source, label, simulated, self.epsilon, rng)
            starts, ends = source, made

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        drift = session.networks["drift"]
        return transport(drift, batch["noise"], batch["condition"], rung, self.epsilon, session.rng)
