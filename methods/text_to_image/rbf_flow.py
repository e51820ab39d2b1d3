"""Rollover budget forcing: a flow made stochastic, whose next states are drawn until the reward rises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.sampling import column, noise_like
from stepmark.tracks.text_to_image.search import JUDGED, ROOM, candidates, judged, taken

BETA = (0.1, 20.0)  # of the variance-preserving path
NOISE = 3.0  # g(s) = NOISE s^2


def interpolant(path: str, s: float) -> tuple[float, float]:
    """alpha and sigma of a path at time s in [0, 1]: "linear", that of the flow, or "vp"."""
    if path == "linear":
        return 1 - s, s
    integral = 0.5 * s**2 * (BETA[1] - BETA[0]) + s * BETA[0]
    return math.exp(-0.5 * integral), math.sqrt(-math.expm1(-integral))


def converted(path: str, s: float) -> tuple[float, float]:
    """Where a point of a path at time s lies on the flow's own: time t_s of the same signal-to-noise ratio, and the scale c_s
    by which the point is larger there than on the flow."""
    alpha, sigma = interpolant(path, s)
    return sigma / (alpha + sigma), alpha + sigma


def kept(path: str, s: float, r: float, parts: int = 200) -> float:
    """Share of the noise at time s that is still there at r < s: exp(-1/2 int_r^s g^2 / sigma^2), by the midpoint rule."""
    times = [r + (s - r) * (i + 0.5) / parts for i in range(parts)]
    rates = [(NOISE * u**2 / interpolant(path, u)[1]) ** 2 for u in times]
    return math.exp(-0.5 * sum(rates) * (s - r) / parts)


class Walk:
    """A guided flow on a path of S + 1 times from 1 to 0, in which every item is at a time of its own.

    Args:
        network: the flow. states: of the captions [B, 32, 64].
    """

    def __init__(self, network: nn.Module, states: Tensor, path: str, steps: int) -> None:
        self.network, self.states = network, torch.stack([network.null_condition(states), states])
        times = uniform_times(steps)
        shares = [*(kept(path, s, r) for s, r in pairwise(times)), 1.0]
        table = [(*interpolant(path, s), *converted(path, s), share) for s, share in zip(times, shares, strict=True)]
        self.alpha, self.sigma, self.time, self.scale, self.kept = (
            torch.tensor(values, device=states.device, dtype=states.dtype) for values in zip(*table, strict=True)
        )

    def predict(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and eps predicted from x [n B, ...] at times of numbers `at` int64 [n B]. Two evaluations."""
        t, x = self.time[at], x / column(self.scale[at])
        asked = self.states.repeat(1, len(x) // self.states.shape[1], 1, 1).flatten(0, 1)
        null, conditional = self.network(torch.cat([x, x]), torch.cat([t, t]), asked).chunk(2)
        v = torch.lerp(null, conditional, GUIDANCE)
        return x - column(t) * v, x + column(1 - t) * v

    def step(self, x0: Tensor, eps: Tensor, at: Tensor, noise: Tensor | None = None) -> Tensor:
        """x at the time after that of number `at` [B]: the SDE with x0 held fixed, or the ODE where there is no `noise`."""
        if noise is not None:
            share = column(self.kept[at])
            eps = share * eps + (1 - share**2).sqrt() * noise
        return column(self.alpha[at + 1]) * x0 + column(self.sigma[at + 1]) * eps


def chosen(where: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """[B, ...]: the one where `where` [B], else the other."""
    return torch.where(where.view(-1, *[1] * (one.dim() - 1)), one, other)


class RolloverBudgetForcing(Method):
    """Rollover budget forcing: a flow turned into an SDE on another path, and next states drawn until the reward rises.

    A flow's ODE leaves nothing to search once the noise is drawn. So it is run as an SDE with the same marginals,

        dx = (u(x, s) - g^2 / 2 grad log p_s(x)) ds + g dw,   g = 3 s^2

    backwards in time, and on the variance-preserving path (beta from 0.1 to 20) in the place of the straight one:

        t_s = sigma / (alpha + sigma),   c_s = alpha + sigma           of the same signal-to-noise ratio
        u(x, s) = (c_s' / c_s) x + c_s t_s' v(x / c_s, t_s)

    on which, the authors find, states spread further in as many steps. The search: some noises are drawn, and the one goes on
    whose predicted x0 has the highest reward, which is the record. Then every step has a quota of candidates for its next
    state. As soon as one beats the record, the item goes on from it and takes what is left of the quota along to the next
    step; when the quota is used up, it goes on from the best candidate of this step. The last step uses what there is.

    The reward is the log-probability that the reward network gives to the caption. A candidate costs four evaluations, two
    of the guided flow and two to be judged. Of six steps, the first m = rung / 16 are searched and the others are the ODE's,
    two evaluations each: 64 evaluations are 15 candidates, a quota of three for the noises and for each of four steps, 32
    are six, two for the noises and for each of two steps. Below 32 there is nothing to roll over.

    Differs from the paper: 15 candidates at most, not 250, and six steps, not ten. The model there was distilled to few
    steps, so that the authors' last state, whose signal-to-noise ratio is 0.4, shows a finished picture, and its prediction
    is returned; here the states that are judged last are less noisy, and the ODE leads on from the best. Times are equal
    steps of s and not crowded at the noise. The steps are longer than the authors' Euler steps of the SDE, which would be
    unstable. x0 is held fixed in a step instead, and the rest of the SDE is solved exactly:

        x_r = alpha_r x0 + sigma_r (k eps + sqrt(1 - k^2) z),   k = exp(-1/2 int_r^s g^2 / sigma^2)

    which is Euler's step for a short one, and DDIM's where g = 0.

    What limits it here: a handful of candidates; at the first times, where g lets them differ most, what is predicted is
    blurred. The decoder takes seven times the operations of the flow: for as many evaluations, more of which are judgings,
    it costs more operations than `best_of_n`.
    """

    paper = Paper(
        id="rbf_flow",
        title="Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing",
        authors="Kim, Yoon, Hwang, Sung",
        year=2025,
        arxiv="2503.19385",
        code="KAIST-Visual-AI-Group/Flow-Inference-Time-Scaling",
    )
    tasks = ("text_to_image/scenes_flow",)
    baselines = ("best_of_n", "ddim_guided", "random_of_n")
    claims = (
        Claim(
            "caption[rbf_flow,32..64] > max(caption[best_of_n,32..64], caption[rbf_flow_linear,32..64], "
            "caption[rbf_flow_uniform,32..64], caption[rbf_flow_by_lot,32..64])"
            " and fd[rbf_flow,32..64] <= 1.1 * fd[best_of_n,32..64]",
            says="captions are followed better than by the best of n pictures of the ODE, by the straight path, by equal "
            "quotas and by lots, for as many evaluations, and the pictures stay as good",
            headline=True,
            setting="6 and 15 candidates, not 250, of a model that was not distilled to few steps",
        ),
        Claim(
            "caption[rbf_flow,32..64] > caption[rbf_flow_linear,32..64]",
            says="the variance-preserving path leaves more to search than the straight one",
            setting="six steps of a model that was not distilled to few steps",
        ),
        Claim(
            "caption[rbf_flow,64] > caption[rbf_flow_uniform,64]",
            says="quotas that roll over are better than equal ones, where there are three candidates to a step",
            setting="15 candidates, not 250",
        ),
        Claim(
            "caption[rbf_flow,32..64] > max(caption[ddim_guided,32..64], caption[random_of_n,32..64])",
            says="candidates are a better use of evaluations than more steps",
        ),
    )

    path, rollover, blind = "vp", True, False
    path_steps = 6
    variants = (
        Variant("rbf_flow_linear", says="the SDE of the flow's own straight path", path="linear"),
        Variant("rbf_flow_uniform", says="equal quotas, all used: no budget is rolled over", rollover=False),
        Variant("rbf_flow_by_lot", says="control: as many candidates, and lots in the place of the reward", blind=True),
    )

    def value(self, session: Session, x0: Tensor, condition: Tensor) -> Tensor:
        """Rewards [n, B] of predictions of x0 [n B, ...], or lots."""
        if self.blind:
            return torch.rand(len(x0) // len(condition), len(condition), generator=session.rng, device=x0.device)
        return judged(session, x0, condition)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < 2 * ROOM:
            skip("two candidates for two steps and for the noise, and the steps that are left, take 32 evaluations")
        condition, items, device = batch["condition"], len(batch["noise"]), batch["noise"].device
        network, searched = session.networks["teacher"], rung // ROOM
        walk = Walk(network, network.words(condition), self.path, self.path_steps)
        total = (rung - 2 * (self.path_steps - 1 - searched)) // (2 + JUDGED)
        quota = total // (searched + 1)

        noises = candidates(batch["noise"], quota, session.rng)
        x0, eps = walk.predict(noises, torch.zeros(len(noises), dtype=torch.int64, device=device))
        values = self.value(session, x0, condition)
        record, best = values.amax(0), values.argmax(0, keepdim=True)
        here = taken(x0, best), taken(eps, best)  # predictions at the state from which candidates are drawn

        at, drawn = (torch.zeros(items, dtype=torch.int64, device=device) for _ in range(2))
        room = torch.full_like(drawn, quota)
        liked, top = torch.full_like(record, -torch.inf), here  # the best candidate of the step
        for _ in range(total - quota):
            found = walk.predict(walk.step(*here, at, noise_like(here[0], session.rng)), at + 1)
            value = self.value(session, found[0], condition)[0]
            better, beats = value > liked, value > record
            top = chosen(better, found[0], top[0]), chosen(better, found[1], top[1])
            liked, record, drawn = torch.maximum(liked, value), torch.maximum(record, value), drawn + 1
            early = beats & self.rollover
            moves = (early | (drawn == room)) & (at < searched - 1)
            room = torch.where(moves, quota + torch.where(early, room - drawn, 0), room)
            here = chosen(moves, top[0], here[0]), chosen(moves, top[1], here[1])
            drawn, at = torch.where(moves, 0, drawn), at + moves.long()
            liked = torch.where(moves, -torch.inf, liked)

        for number in range(searched, self.path_steps - 1):
            step = torch.full_like(at, number)
            top = walk.predict(walk.step(*top, step), step + 1)
        return top[0]
