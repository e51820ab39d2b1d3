"""Networks that jump along straight paths of points of the plane."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stepmark.tracks.image.schedules import quadratic_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step, heun_step
from stepmark.tracks.image.training import fit

if TYPE_CHECKING:
    from stepmark.session import Session


class JumpMLP(nn.Module):
    """Mean velocity from time t to s < t at points of the plane: x_s = x_t - (t - s) u(x_t, t, s).

    aware: whether it is told s. Without it, u is one direction for every s: the mean of the exact ones over s, as they are met.
    """

    def __init__(self, kinds: int, aware: bool, width: int = 128) -> None:
        super().__init__()
        self.aware = aware
        self.table = nn.Embedding(kinds, 16)
        sizes = (2 + 64 + 16, width, width, width)
        hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.body = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Tensor) -> Tensor:
        """u [B, 2] at x [B, 2], t and s float [B], condition int64 [B]."""
        times = torch.stack([t, s if self.aware else torch.zeros_like(s)], 1)
        angle = times[:, :, None] * torch.logspace(0, 2, 16, device=x.device, dtype=x.dtype)
        waves = torch.cat([angle.sin(), angle.cos()], 2).flatten(1)
        return self.body(torch.cat([x, waves, self.table(condition)], 1))


@torch.no_grad()
def flow_paths(denoise: Denoiser, noise: Tensor, times: Sequence[float]) -> Tensor:
    """States [len(times), B, ...] of the exact ODE of a flow at each of `times`, by Heun's method, the last step DDIM's."""
    states = [noise]
    for t, s in pairwise(times):
        x = states[-1]
        states.append(heun_step(denoise, x, t, s) if s > 0 else ddim_step(denoise.schedule, *denoise(x, t), s))
    return torch.stack(states)


def fit_jumps(session: Session, network: nn.Module, steps: int = 6000, batch: int = 1024) -> None:
    """Regress u on the mean velocity (x_t - x_s) / (t - s) between random times of the teacher's own trajectories."""
    rng, device, labels = session.rng, session.device, session.train["condition"].to(session.device)
    n = session.scale(8000, 64)
    condition = labels[torch.randint(len(labels), (n,), generator=rng, device=device)]
    noise = torch.randn(n, 2, generator=rng, device=device)
    grid = quadratic_times(session.scale(96, 8))
    paths = flow_paths(Denoiser(session.networks["teacher"], condition), noise.double(), grid).float()
    times = torch.tensor(grid, dtype=torch.float32, device=device)

    def loss() -> Tensor:
        item = torch.randint(n, (batch,), generator=rng, device=device)
        first, second = torch.randint(len(times) - 1, (2, batch), generator=rng, device=device)
        early, late = torch.minimum(first, second), torch.maximum(first, second) + 1
        t, s, x = times[early], times[late], paths[early, item]
        target = (x - paths[late, item]) / (t - s)[:, None]
        return (network(x, t, s, condition[item]) - target).square().mean()

    fit(session, network, loss, session.scale(steps, 4), rate=2e-3, ema=0.997)


@torch.no_grad()
def take_jumps(network: nn.Module, x: Tensor, condition: Tensor, times: Sequence[float]) -> Tensor:
    """From noise through `times`, one evaluation of u for each jump."""
    for t, s in pairwise(times):
        now, then = (torch.full((len(x),), time, dtype=x.dtype, device=x.device) for time in (t, s))
        x = x - (t - s) * network(x, now, then, condition)
    return x
