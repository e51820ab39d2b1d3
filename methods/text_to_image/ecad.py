"""ECAD: a genetic algorithm finds which parts of a diffusion transformer may be reused from earlier steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import ddim_step
from stepmark.tracks.scenes.captions import LENGTH
from stepmark.tracks.text_to_image import GUIDANCE, LATENT
from stepmark.tracks.text_to_image.sampling import GuidedByCaption
from stepmark.tracks.text_to_image.search import judged

PARTS = ("attn1", "attn2", "ff")  # of a block: attention to the picture, to the caption, feed-forward
SEARCHED = (8, 16)  # numbers of steps that are searched


# -- schedules --------------------------------------------------------------------------------------------------------


class Cache:
    """The outputs of the parts of a transformer's blocks, kept from step to step. `plan`: bool [blocks, 3], what the next call
    of the network computes; the rest is what it was when it was last computed."""

    def __init__(self, network: Any) -> None:
        self.parts = [[getattr(block, name) for name in PARTS] for block in network.transformer.transformer_blocks]
        self.plan = torch.ones(len(self.parts), len(PARTS), dtype=torch.bool)
        self.kept: dict[tuple[int, int], Tensor] = {}

    def stand_in(self, place: tuple[int, int], computed: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What is called instead of a part."""

        def forward(*given: Any, **named: Any) -> Tensor:
            if self.plan[place]:
                self.kept[place] = computed(*given, **named)
            return self.kept[place]

        return forward


@contextmanager
def caching(network: Any) -> Iterator[Cache]:
    """Inside, the blocks of a network compute what the cache's plan says; afterwards everything, as before."""
    cache = Cache(network)
    try:
        for i, block in enumerate(cache.parts):
            for j, part in enumerate(block):
                part.forward = cache.stand_in((i, j), part.forward)
        yield cache
    finally:
        for block in cache.parts:
            for part in block:
                part.__dict__.pop("forward", None)


def cost(plan: Tensor, width: int, pixels: int = 16, words: int = LENGTH) -> Tensor:
    """Multiplications of a schedule bool [.., steps, blocks, 3], counted by hand, as a share of those of computing all parts of
    all blocks: [..]."""
    attention = 4 * pixels * width**2 + 2 * pixels**2 * width
    reading = 2 * (pixels + words) * width**2 + 2 * pixels * words * width
    each = torch.tensor([attention, reading, 8 * pixels * width**2], dtype=torch.float64)
    return (plan * each).sum((-3, -2, -1)) / (each.sum() * plan.shape[-3] * plan.shape[-2])


def every(steps: int, blocks: int, interval: int) -> Tensor:
    """The schedule of FORA: everything in every so many-th step, nothing between."""
    plan = torch.zeros(steps, blocks, len(PARTS), dtype=torch.bool)
    plan[::interval] = True
    return plan


def heuristics(steps: int, blocks: int, first: int) -> list[Tensor]:
    """Schedules that people think of, that with the interval `first` before the others: everything; every 2nd, 3rd or 4th step;
    captions read in the first half alone.
    """
    found = [every(steps, blocks, interval) for interval in dict.fromkeys((first, 1, 2, 3, 4))]
    for interval in (1, 2):
        gated = every(steps, blocks, interval)
        gated[steps // 2 :, :, PARTS.index("attn2")] = False
        found.append(gated)
    return found


@torch.no_grad()
def sample(network: Any, batch: Mapping[str, Tensor], plan: Tensor) -> Tensor:
    """Latents [B, 4, 8, 8] by guided Euler steps, as many as the plan bool [steps, blocks, 3] has; two rows a step."""
    denoise, x = GuidedByCaption(network, batch, GUIDANCE), batch["noise"]
    with caching(network) as cache:
        for line, (t, s) in zip(plan, pairwise(uniform_times(len(plan))), strict=True):
            cache.plan = line
            x = ddim_step(denoise.schedule, *denoise(x, t), s)
    return x


# -- NSGA-II ----------------------------------------------------------------------------------------------------------


def ranks(scores: Tensor) -> Tensor:
    """The front int64 [N] that each of N points [N, objectives] (less is better) belongs to: 0 is dominated by nobody, 1 by
    those of 0 alone, and so on."""
    no_worse = (scores[:, None] <= scores).all(2)
    dominates = no_worse & ~no_worse.t()
    rank, left = torch.zeros(len(scores), dtype=torch.int64), torch.ones(len(scores), dtype=torch.bool)
    front = 0
    while left.any():
        best = left & ~(dominates & left[:, None]).any(0)
        rank[best], front = front, front + 1
        left &= ~best
    return rank


def crowding(scores: Tensor) -> Tensor:
    """Crowding distance [N] of the points [N, objectives] of one front: infinite at its ends."""
    distance = torch.zeros(len(scores), dtype=scores.dtype)
    for column in scores.t():
        order = column.argsort(stable=True)
        ends = column[order]
        distance[order[[0, -1]]] = torch.inf
        if len(order) > 2 and ends[-1] > ends[0]:
            distance[order[1:-1]] += (ends[2:] - ends[:-2]) / (ends[-1] - ends[0])
    return distance


def fitness_order(scores: Tensor) -> Tensor:
    """Places int64 [N], the fittest first: by front, and in a front those with more room around them."""
    rank, room = ranks(scores), torch.zeros(len(scores), dtype=scores.dtype)
    for front in rank.unique():
        room[rank == front] = crowding(scores[rank == front])
    by_room = room.argsort(descending=True, stable=True)
    return by_room[rank[by_room].argsort(stable=True)]


def children(parents: Tensor, count: int, rate: float, draw: torch.Generator) -> Tensor:
    """Genomes bool [count, L] of parents [N, L], the fittest first: two by two the better of two drawn, crossed between two
    points, bits flipped at a rate."""
    entrants = torch.randint(len(parents), (2, count, 2), generator=draw)
    mother, father = parents[entrants.amin(2)]  # of two the fitter stands nearer to the front
    cuts = torch.randint(parents.shape[1] + 1, (count, 2), generator=draw).sort(1).values
    place = torch.arange(parents.shape[1])
    child = torch.where((place >= cuts[:, :1]) & (place < cuts[:, 1:]), father, mother)
    return child ^ (torch.rand(child.shape, generator=draw) < rate)


def evolve(
    evaluate: Callable[[Tensor], Tensor], start: Tensor, generations: int, rate: float, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """NSGA-II (Deb et al. 2002): all genomes bool [N, L] that were ever looked at, and their scores [N, objectives].

    evaluate: scores [n, objectives] of genomes [n, L], less is better. start: the first population.
    """
    seen, scores = start, evaluate(start)
    people, found = seen, scores
    for _ in range(generations):
        young = children(people[fitness_order(found)], len(start), rate, draw)
        new = evaluate(young)
        seen, scores = torch.cat([seen, young]), torch.cat([scores, new])
        people, found = torch.cat([people, young]), torch.cat([found, new])
        stay = fitness_order(found)[: len(start)]
        people, found = people[stay], found[stay]
    return seen, scores


class ECAD(Method):
    """ECAD: which outputs of which parts of a diffusion transformer are reused at which step is searched, not thought out.

    A schedule is a binary tensor [steps, blocks, 3]: of every block, attention to the picture, attention to the caption and
    feed-forward are computed (1), or what they gave when they were last computed is taken once more (0); norms and gates of the
    new time are applied to it. The first step computes everything. NSGA-II looks for schedules by two objectives,

        multiplications, counted from the shapes,   and   -mean log p(caption | picture)

    by a reader of pictures on 24 captions of the train split with fixed noises; no reference picture is needed. It begins with
    20 schedules, of which some are those that people think of (everything in every 2nd, 3rd or 4th step, captions in the first
    half alone) and the rest random, and goes on for 6 generations: binary tournament, crossover between two points, each bit
    flipped at a rate of 0.02. Of all that was ever looked at, the one with the best reward among those no dearer than FORA with
    an interval of 3 is taken. It is used in guided Euler steps, two evaluations each.

    The search is made at 8 and at 16 steps; 32 steps take the schedule of 16, each line twice. Evaluations stay as they are: what
    is saved shows in the NFE-equivalent and in time.

    Differs from the paper: 140 schedules instead of tens of thousands for each number of steps, 20 at a time, not 72; the
    reader is in the place of ImageReward; one budget; two cuts in a crossover and the rate of mutation are choices made here, as
    of the authors' code only its description could be had.

    Controls with the same budget: `ecad_fora` computes everything in every third step (Selvaraju et al. 2024);
    `ecad_fewer_steps` makes fewer steps, of which each is whole; `ecad_random_search` looks at as many schedules as the genetic
    algorithm, all of them random.

    What limits it here: a reward of 24 captions is noisy, and the best of 140 is partly luck. With six blocks and up to 32 steps
    a whole step is a great part of the budget.
    """

    paper = Paper(
        id="ecad",
        title="Evolutionary Caching to Accelerate Your Off-the-Shelf Diffusion Model",
        authors="Aggarwal, Shrivastava, Gwilliam",
        year=2025,
        arxiv="2506.15682",
        code="aniaggarwal/ecad",
    )
    tasks = ("text_to_image/scenes_flow",)
    baselines = ("ddim_guided", "ecad_fora", "ecad_fewer_steps", "ecad_random_search")
    trainings = 3
    claims = (
        Claim(
            "fd[ecad,16..32] < fd[ecad_fora,16..32] and fd[ecad,16..32] < fd[ecad_fewer_steps,16..32] "
            "and fd[ecad,16..32] < fd[ecad_random_search,16..32] "
            "and caption[ecad,16..32] >= caption[ecad_fora,16..32] "
            "and nfe_equivalent[ecad,16..32] <= nfe_equivalent[ecad_fora,16..32]",
            says="pictures are better than with the usual rule for what to reuse, with fewer whole steps, or with the best of as "
            "many random schedules, at no greater cost",
            headline=True,
            setting="140 schedules are looked at, where the paper looks at tens of thousands",
        ),
        Claim(
            "fd[ecad,16..64] <= 1.1 * fd[ddim_guided,16..64] and caption[ecad,16..64] >= caption[ddim_guided,16..64] - 0.03 "
            "and 2.35 * nfe_equivalent[ecad,16..64] <= nfe_equivalent[ddim_guided,16..64]",
            says="they are nearly those of the whole network, at less than half of its cost",
        ),
        Claim(
            "speedup[ecad,16..64] >= 2",
            says="and take half the time",
            setting="in a transformer of width 96 norms, gates and calls take much of the time, and these are not reused",
        ),
    )

    plan = "evolved"  # or "chance": the best of random ones; "interval"; "fewer": whole steps
    interval, prompts, people, generations, rate = 3, 24, 20, 6, 0.02
    variants = (
        Variant(
            "ecad_fora",
            says="FORA: everything is computed in every third step, and reused between",
            plan="interval",
            baselines=("ddim_guided",),
        ),
        Variant(
            "ecad_fewer_steps",
            says="fewer steps for the same cost, each of them whole",
            plan="fewer",
            baselines=("ddim_guided",),
        ),
        Variant(
            "ecad_random_search",
            says="the best of as many random schedules of the same cost",
            plan="chance",
            baselines=("ddim_guided", "ecad_fora"),
        ),
    )

    def prepare(self, session: Session) -> dict[str, Tensor] | None:
        """{"plan_<steps>": bool [steps, blocks, 3]} for the numbers of steps that are searched."""
        if self.plan not in ("evolved", "chance"):
            return None
        return {f"plan_{steps}": self.search(session, steps) for steps in session.scale(SEARCHED, SEARCHED[1:])}

    def search(self, session: Session, steps: int) -> Tensor:
        """The schedule bool [steps, blocks, 3] that is best by the reward of those that cost no more than FORA's."""
        teacher: Any = session.networks["teacher"]
        blocks, width = len(teacher.transformer.transformer_blocks), width_of(teacher)
        shape = (steps, blocks, len(PARTS))
        budget = float(cost(every(steps, blocks, self.interval), width))
        count, generations = session.scale((self.people, self.generations), (2, 1))
        draw = torch.Generator().manual_seed(session.seed)  # on the CPU, wherever the networks are
        measure = self.reward(session)

        def evaluate(genomes: Tensor) -> Tensor:
            plans = genomes.unflatten(1, (steps - 1, *shape[1:]))
            plans = torch.cat([torch.ones(len(plans), 1, *shape[1:], dtype=torch.bool), plans], 1)
            rewards = [measure(plan) for plan in session.progress(plans, "schedules")]
            return torch.stack([cost(plans, width), -torch.tensor(rewards, dtype=torch.float64)], 1)

        def chance(number: int, most: float) -> Tensor:
            """Random genomes of random densities; no dearer than `most`."""
            found: list[Tensor] = []
            while len(found) < number:
                plan = torch.rand(shape, generator=draw) < torch.rand(1, generator=draw)
                plan[0] = True
                if cost(plan, width) <= most:
                    found.append(plan[1:].flatten())
            return torch.stack(found)

        if self.plan == "chance":
            seen = chance(count * (generations + 1), budget)
            scores = evaluate(seen)
        else:
            thought_out = [plan[1:].flatten() for plan in heuristics(steps, blocks, self.interval)]
            start = torch.cat([torch.stack(thought_out), chance(count, 1.0)])[:count]
            seen, scores = evolve(evaluate, start, generations, self.rate, draw)
        scores[:, 1] = torch.where(scores[:, 0] <= budget + 1e-9, scores[:, 1], torch.inf)
        best = seen[scores[:, 1].argmin()].unflatten(0, (steps - 1, *shape[1:]))
        return torch.cat([torch.ones(1, *shape[1:], dtype=torch.bool), best])

    def reward(self, session: Session) -> Callable[[Tensor], float]:
        """Mean log-probability of captions by the reader, of pictures that are sampled with a schedule; always the same ones."""
        count, device = session.scale(self.prompts, 2), session.device
        ids = session.train["tokens"]
        rows = torch.randint(len(ids), (count,), generator=session.rng, device=device)
        noise = torch.randn(count, *LATENT, generator=session.rng, device=device, dtype=session.dtype)
        batch = {"noise": noise, "condition": ids.to(device)[rows]}

        @torch.no_grad()
        def measure(plan: Tensor) -> float:
            return float(judged(session, sample(session.networks["teacher"], batch, plan), batch["condition"]).mean())

        return measure

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        teacher: Any = session.networks["teacher"]
        steps = rung // 2
        if steps < SEARCHED[0]:
            skip("fewer than eight guided steps leave little to reuse")
        blocks = len(teacher.transformer.transformer_blocks)
        fora = every(steps, blocks, self.interval)
        if self.plan == "fewer":
            return sample(teacher, batch, every(int(fora[:, 0, 0].sum()), blocks, 1))
        return sample(teacher, batch, fora if self.plan == "interval" else stretched(session.state, steps))


def width_of(network: Any) -> int:
    """Channels of the transformer."""
    return network.transformer.transformer_blocks[0].attn1.to_q.in_features


def stretched(state: Mapping[str, Tensor], steps: int) -> Tensor:
    """The schedule for a number of steps: the one that was searched for it, or the next shorter with lines repeated."""
    known = sorted(int(name.removeprefix("plan_")) for name in state)
    length = max((n for n in known if n <= steps), default=known[0])
    return state[f"plan_{length}"].cpu().bool()[[i * length // steps for i in range(steps)]]
