"""Training of students and of small networks: the loop, pairs of a teacher, losses; flow matching on points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stepmark.tracks.image.schedules import add_noise, schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser, heun_step

if TYPE_CHECKING:
    from stepmark.session import Session


def fit(
    session: Session,
    network: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    rate: float = 1e-3,
    ema: float = 0.99,
    clip: float | None = None,
) -> list[float]:
    """Minimise `loss()`, which draws its own batch, over the parameters of a student; returns the losses.

    AdamW with 20 warm-up steps and a cosine down to 2 % of the rate. The network is left in eval mode holding the
    exponential moving average of its weights.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min((k + 1) / 20, 0.02 + 0.49 * (1 + math.cos(math.pi * k / steps)))
    )
    average = [p.detach().clone() for p in parameters]
    losses: list[float] = []
    network.train()
    for step in session.progress(range(steps), "train"):
        value = loss()
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimiser.step()
        schedule.step()
        losses.append(value.item())
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(ema, (step + 1) / (step + 10)))
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    network.eval()
    return losses


def sinusoids(values: Tensor, width: int = 32, top: float = 1000.0) -> Tensor:
    """Sines and cosines [B, width] of values [B], at width / 2 frequencies from 1 to `top`."""
    frequency = torch.logspace(0, math.log10(top), width // 2, device=values.device, dtype=values.dtype)
    angle = values[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def pseudo_huber(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over items [B, ...] of sqrt(|a - b|^2 + c^2) - c, c = 0.00054 sqrt(d) (Song and Dhariwal 2024)."""
    c = 0.00054 * math.sqrt(prediction[0].numel())
    return (((prediction - target).flatten(1).square().sum(1) + c**2).sqrt() - c).mean()


@torch.no_grad()
def teacher_pairs(session: Session, n: int, steps: int) -> dict[str, Tensor]:
    """n noises "eps", the samples "x0" to which so many Heun steps of the teacher take them, and the "condition" of each.

    For `session.once`: students of one teacher share their pairs, so that none of them learns from a better solver.
    Conditions are drawn from the labels of the training data; no image is looked at. Two evaluations a step.
    """
    label, shape = session.train["condition"].to(session.device), session.train["x0"].shape[1:]
    condition = label[torch.randint(len(label), (n,), generator=session.rng, device=session.device)]
    eps = torch.randn(n, *shape, generator=session.rng, device=session.device)
    samples = []
    for x, part in zip(session.progress(eps.split(200), "pairs"), condition.split(200), strict=True):
        denoise = Denoiser(session.networks["teacher"], part)
        samples.append(follow(denoise, x, uniform_times(steps)))
    return {"eps": eps, "x0": torch.cat(samples), "condition": condition}


def follow(denoise: Denoiser, x: Tensor, times: Sequence[float]) -> Tensor:
    """x [B, ...] at times[0] of a flow taken along it to times[-1], which may lie before or behind, by Heun steps."""
    for t, s in pairwise(times):
        x = heun_step(denoise, x, t, s)
    return x


class PointField(nn.Module):
    """An untrained perceptron for points of the plane, called like the networks of images: a velocity [B, 2].

    kinds: number of conditions. extra: further numbers [B, extra] that are appended to x, such as a latent.
    """

    prediction = "flow"

    def __init__(self, kinds: int, width: int = 128, extra: int = 0, outputs: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(kinds, 16)
        sizes = (2 + extra + 32 + 16, width, width, width)
        hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.body = nn.Sequential(*hidden, nn.Linear(width, outputs))

    def null_condition(self, condition: Tensor) -> Tensor:
        """Points have no unconditional branch."""
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.body(torch.cat([x, sinusoids(t, top=100.0), self.table(condition)], 1))


def fit_coupled(
    session: Session,
    network: nn.Module,
    couple: Callable[[Tensor, Tensor, Tensor], Tensor],
    steps: int,
    batch: int = 256,
    pool: int = 1024,
    rate: float = 2e-3,
) -> None:
    """Flow matching from scratch with paired noise: |v(x_t, t) - (eps - x0)|^2, x_t = (1 - t) x0 + t eps, t uniform.

    couple(eps, x0, condition) gives, for a pool of data [pool, ...], the index [pool] of the noise of each; a pool
    serves pool / batch updates, so that a coupling may look at more items than an update needs (Cheng and Schwing
    2025, section 3.3).
    """
    rng, device = session.rng, session.device
    data, label = (session.train[key].to(device) for key in ("x0", "condition"))
    schedule = schedule_of(network)
    waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def loss() -> Tensor:
        if not waiting:
            pick = torch.randint(len(data), (pool,), generator=rng, device=device)
            noise = torch.randn(data[pick].shape, generator=rng, device=device)
            chosen = couple(noise, data[pick], label[pick])
            waiting.extend(zip(*(part.split(batch) for part in (data[pick], noise[chosen], label[pick])), strict=True))
        x0, eps, condition = waiting.pop()
        t = torch.rand(len(x0), generator=rng, device=device)
        v = network(add_noise(schedule, x0, eps, t), t, condition)
        return (v - (eps - x0)).square().mean()

    fit(session, network, loss, steps, rate, ema=0.997)
