"""Consistency distillation of a guided latent teacher (Luo et al. 2023, algorithm 1) and its sampler: what the consistency papers
of the track share, and what each of them changes.

A student predicts, from x at a time of a coarse grid, where the guided ODE of its teacher ends. It is told the guidance scale
(`Painter.forward(..., guidance)`), so that it takes one evaluation a step where the teacher takes two. Scales are those of
null + w (conditional - null), here as everywhere; the paper's are less by one.

`fold` and `follow` are the control of all of them: a student of the same kind that takes guidance in and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from stepmark.session import Session
from stepmark.tracks.image.fusing import guided_rows
from stepmark.tracks.image.schedules import Schedule, add_noise, schedule_of, to_x0_eps, uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step
from stepmark.tracks.scenes.captions import read, tokens, write
from stepmark.tracks.text_to_image import LATENT
from stepmark.tracks.text_to_image.latent import Latents
from stepmark.tracks.text_to_image.sampling import column, ddim, noise_like, noised

GRID = 50  # times of the coarse grid: every 20th of the 1000 that the teacher was trained at
SIGMA_DATA, SCALING = 0.5, 10.0  # of the boundary condition, as in the authors' code
HUBER = 0.001  # of the loss sqrt(d^2 + c^2) - c, as in the authors' code


# predictions ------------------------------------------------------------------------------------


def grid_times(schedule: Schedule, n: int = GRID) -> Tensor:
    """The n times k/n, k = 1 .. n, float64 [n]: timesteps 19, 39, ..., 999 for n = 50 of a teacher of 1000."""
    return torch.arange(1, n + 1, dtype=torch.float64) / n


def first_time(schedule: Schedule) -> float:
    """Where paths end, and what the boundary condition holds at: timestep 0, which of a flow is the data itself."""
    return 0.0 if schedule.flow else 1 / schedule.steps


def boundary(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out [B] at times t [B] (Luo et al. 2023, section 4.1, and their code): 1 and 0 at `first_time`."""
    scaled = SCALING * schedule.steps * (t - first_time(schedule)).clamp(min=0)
    square = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / square, scaled / square.sqrt()


def predict(
    network: nn.Module,
    x: Tensor,
    t: Tensor,
    states: Tensor,
    guidance: Tensor | None,
    schedule: Schedule,
    outside: float = 1.0,
) -> Tensor:
    """f(x, w, c, t) = c_skip x + c_out x0 [B, 4, 8, 8] of a network of noise or of velocity, at times t [B].

    guidance: the scales [B] that the network is told, or None. outside: a scale of classifier-free guidance by a second
    evaluation, of a network that is told none; 1 is one evaluation.
    """
    time = schedule.network_time(t).to(x.dtype)
    if outside != 1.0:
        output = guided_rows(network, x, time, states, torch.full_like(time, outside))
    else:
        output = network(x, time, states, *(() if guidance is None else (guidance,)))
    x0 = to_x0_eps(schedule.prediction, output, x, column(schedule.alpha(t)), column(schedule.sigma(t)))[0]
    skip, out = boundary(schedule, t)
    return column(skip) * x + column(out) * x0


def huber(a: Tensor, b: Tensor) -> Tensor:
    """Mean pseudo-Huber distance of two predictions."""
    return ((a - b).square() + HUBER**2).sqrt().mean() - HUBER


def ddim_ahead(
    teacher: nn.Module, x: Tensor, t: Tensor, s: Tensor, states: Tensor, guidance: Tensor, schedule: Schedule
) -> Tensor:
    """One guided DDIM step of the teacher from times t to times s [B], of a flow Euler's: two evaluations a row."""
    output = guided_rows(teacher, x, schedule.network_time(t).to(x.dtype), states, guidance)
    x0, eps = to_x0_eps(schedule.prediction, output, x, column(schedule.alpha(t)), column(schedule.sigma(t)))
    return column(schedule.alpha(s)) * x0 + column(schedule.sigma(s)) * eps


# training ---------------------------------------------------------------------------------------


class Batches(Protocol):
    """Where batches come from: `Latents`, or `Drawn`."""

    def batch(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, captions and their states of n random pictures."""


class Drawn:
    """Pictures that a network drew itself, by guided DDIM, for captions of the train split: what stands for its training data
    where the task has those of another style. Captions are the usual ones, without what names the style.

    Args:
        role: the network. n: pictures. steps: of each, two evaluations a step. scale: of guidance.
    """

    @torch.no_grad()
    def __init__(self, session: Session, role: str, n: int, steps: int, scale: float) -> None:
        network, self._rng = session.networks[role], session.rng
        said = [write(replace(read(text), pastel=False)) for text in session.train["text"][:n]]
        self.tokens = tokens(said).to(session.device)
        self.states = network.words(self.tokens)
        noise = torch.randn(len(said), *LATENT, generator=self._rng, device=session.device, dtype=session.dtype)
        parts, times = zip(noise.split(100), self.states.split(100), strict=True), uniform_times(steps)
        self.x0 = torch.cat([ddim(Denoiser(network, states, scale), x, times) for x, states in parts])

    def batch(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, captions and their states of n random pictures."""
        rows = torch.randint(len(self.x0), (n,), generator=self._rng, device=self.x0.device)
        return self.x0[rows], self.tokens[rows], self.states[rows]


@dataclass(frozen=True)
class Pair:
    """One batch of a distillation: x at times t [B], the point `ahead` on its path at times s [B] < t, what was asked (`states`
    [B, 32, 64], `tokens` [B, 32]) and the guidance scale [B]. x is alpha x0 + sigma eps. `target`: the average's prediction from
    `ahead`, once it is there."""

    x: Tensor
    t: Tensor
    ahead: Tensor
    s: Tensor
    states: Tensor
    tokens: Tensor
    guidance: Tensor
    x0: Tensor
    eps: Tensor
    target: Tensor | None = None


def distil(
    session: Session,
    student: nn.Module,
    updates: int,
    *,
    rate: float = 5e-4,
    batch: int = 32,
    scales: tuple[float, float] = (2.0, 5.0),
    decay: float = 0.95,
    ahead: Callable[..., Tensor] | None = ddim_ahead,
    extra: Callable[[Tensor, Pair], Tensor] | None = None,
    after: Callable[[Tensor, Pair], None] | None = None,
    told: bool = True,
    role: str = "teacher",
    data: Batches | None = None,
    grid: int = GRID,
) -> None:
    """Train a student in place by latent consistency distillation (algorithm 1): pairs of neighbouring times of the grid, the
    teacher's step `ahead` from one to the other under a guidance scale drawn from `scales`, and the student's prediction at the
    first drawn to that of its average at the second.

    Args:
        decay: of the average; 0 is the student itself.
        ahead: the teacher's step; None has no teacher, but takes the same noise to the second time, which is consistency
            fine-tuning (algorithm 4).
        extra: extra(prediction, pair) is added to the loss. after: after(prediction, pair) follows the update, the prediction
            without its gradient, to train what `extra` asks.
        told: the student is told the scale.
        role: the teacher. data: what is noised; default: the train split.
        grid: number of its times, of which the teacher takes one step to the next.

    The learning rate warms up over a twentieth and falls along a cosine; gradients are no longer than 1; no weight decay. At the
    end the student holds its own weights, not the average.
    """
    teacher, data = session.networks[role], data or Latents(session)
    schedule = schedule_of(teacher)
    target = deepcopy(student).requires_grad_(False)
    learned = {name: p for name, p in student.named_parameters() if p.requires_grad}
    shadows = [p for name, p in target.named_parameters() if name in learned]
    times = grid_times(schedule, grid)
    for step in descend(session, list(learned.values()), updates, rate):
        pair = draw(session, data, teacher, schedule, times, session.scale(batch, 4), scales, ahead)
        guidance = pair.guidance if told else None
        with torch.no_grad():
            pair = replace(pair, target=predict(target, pair.ahead, pair.s, pair.states, guidance, schedule))
        found = predict(student, pair.x, pair.t, pair.states, guidance, schedule)
        assert pair.target is not None
        loss = huber(found, pair.target)
        step(loss if extra is None else loss + extra(found, pair))
        with torch.no_grad():
            torch._foreach_lerp_(shadows, list(learned.values()), 1 - decay)
        if after is not None:
            after(found.detach(), pair)


def draw(
    session: Session,
    data: Batches,
    teacher: nn.Module,
    schedule: Schedule,
    times: Tensor,
    batch: int,
    scales: tuple[float, float],
    ahead: Callable[..., Tensor] | None = ddim_ahead,
) -> Pair:
    """A batch of neighbouring times on the teacher's path, for the losses of consistency; below the least is `first_time`."""
    x0, tokens, states = data.batch(batch)
    rng, device = session.rng, x0.device
    index = torch.randint(len(times), (batch,), generator=rng, device=device)
    grid = torch.cat([times.new_full((1,), first_time(schedule)), times]).to(device, x0.dtype)
    t, s = grid[index + 1], grid[index]
    eps = noise_like(x0, rng)
    x = add_noise(schedule, x0, eps, t)
    guidance = drawn_scales(session, batch, scales)
    if ahead is None:
        point = add_noise(schedule, x0, eps, s)
    else:
        with torch.no_grad():
            point = ahead(teacher, x, t, s, states, guidance, schedule)
    return Pair(x, t, point, s, states, tokens, guidance, x0, eps)


def drawn_scales(session: Session, n: int, scales: tuple[float, float]) -> Tensor:
    """Guidance scales [n], uniform between two."""
    low, high = scales
    drawn = torch.rand(n, generator=session.rng, device=session.device, dtype=session.dtype)
    return low + (high - low) * drawn


def descend(
    session: Session, parameters: Sequence[nn.Parameter], updates: int, rate: float
) -> Iterator[Callable[[Tensor], None]]:
    """Gives, for every update, a function that takes a loss and makes the step: AdamW without decay of the weights, gradients no
    longer than 1, `warm_cosine`."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

    def step(loss: Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()

    for number in session.progress(range(updates), "consistency"):
        for group in optimiser.param_groups:
            group["lr"] = rate * warm_cosine(number, updates)
        yield step


def warm_cosine(number: int, updates: int) -> float:
    """Factor of a learning rate: up over a twentieth of the updates, then down along a cosine to a fiftieth."""
    warm = max(updates // 20, 1)
    return min((number + 1) / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * number / updates)))


# sampling ---------------------------------------------------------------------------------------


def sample_times(steps: int) -> list[float]:
    """Times of so many steps, from the noisiest down: floor(i GRID / steps) of the grid, as the authors' scheduler has them."""
    return [(GRID - i * GRID // steps) / GRID for i in range(steps)]


@torch.no_grad()
def sample(
    network: nn.Module,
    batch: Mapping[str, Tensor],
    steps: int,
    rng: torch.Generator,
    guidance: float | None,
    schedule: Schedule,
    outside: float = 1.0,
) -> Tensor:
    """Multistep sampling (Luo et al. 2023, algorithm 3): predict the end, add fresh noise up to the next time, and so on, in as
    many steps as are asked for or the grid has. guidance: the scale that the network is told, or None. One evaluation a step,
    two with guidance from `outside`."""
    x, states = batch["noise"], network.words(batch["condition"])
    scale = None if guidance is None else torch.full_like(x[:, 0, 0, 0], guidance)
    for number, time in enumerate(sample_times(min(steps, GRID))):
        if number > 0:
            x = schedule.alpha(time) * x + schedule.sigma(time) * noise_like(x, rng)
        x = predict(network, x, torch.full_like(x[:, 0, 0, 0], time), states, scale, schedule, outside)
    return x


# the control ------------------------------------------------------------------------------------


def fold(
    session: Session,
    student: nn.Module,
    updates: int,
    *,
    rate: float = 5e-4,
    batch: int = 32,
    scales: tuple[float, float] = (2.0, 5.0),
    told: bool = True,
) -> None:
    """Train a student in place to give in one evaluation what its guided teacher gives in two, at any time (Meng et al. 2023,
    stage 1): the same data, scales and optimiser as those of `distil`, and nothing of consistency."""
    teacher, data = session.networks["teacher"], Latents(session)
    schedule = schedule_of(teacher)
    for step in descend(session, [p for p in student.parameters() if p.requires_grad], updates, rate):
        x0, _, states = data.batch(session.scale(batch, 4))
        x, t, _ = noised(session, schedule, x0)
        guidance, time = drawn_scales(session, len(x0), scales), schedule.network_time(t)
        with torch.no_grad():
            wanted = guided_rows(teacher, x, time, states, guidance)
        step((student(x, time, states, *((guidance,) if told else ())) - wanted).square().mean())


@torch.no_grad()
def follow(
    network: nn.Module, batch: Mapping[str, Tensor], steps: int, guidance: float | None, schedule: Schedule
) -> Tensor:
    """DDIM on evenly spaced times by a network that is told its scale, or none: one evaluation a step."""
    x, states = batch["noise"], network.words(batch["condition"])
    scale = () if guidance is None else (torch.full_like(x[:, 0, 0, 0], guidance),)
    for t, s in pairwise(uniform_times(steps)):
        output = network(x, torch.full_like(x[:, 0, 0, 0], schedule.network_time(t)), states, *scale)
        x = ddim_step(schedule, *to_x0_eps(schedule.prediction, output, x, schedule.alpha(t), schedule.sigma(t)), s)
    return x
