"""The language model of navigation: it walks over a graph in its prompt, proposes moves, and says how a state
stands."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.lessons import Part, Row, row, stream
from stepmark.backbones.reasoners import Reasoner, built, decode, encode

if TYPE_CHECKING:
    from stepmark.datasets.navigation import Question

LEVELS = ((1, 0), (2, 1), (3, 3), (4, 5), (5, 6))  # (longest way, most edges beside it)
REACHED = (0.08, 0.16, 0.26, 0.38)  # shares of the training from which on each of the further ones is drawn
FORMS = {"<cot>": 0.64, "<propose>": 0.16, "<value>": 0.2}


def copied(rng: random.Random) -> Row:
    """As `deducers.copied`."""
    from stepmark.backbones import deducers

    ids, weights = deducers.copied(rng)
    return ids, [weight > 0 for weight in weights]


def recalled(rng: random.Random, most: int) -> Row:
    """Edges, then all of them in another order, each from the place that it leads from: where it leads to counts. Edges
    that lead both ways are told from either side."""
    from stepmark.datasets.navigation import CONCEPTS

    count, sign = rng.randint(3, most), rng.choice(("->", "-"))
    words = rng.sample(CONCEPTS, 2 * count)
    edges = [(words[2 * i], words[2 * i + 1]) for i in range(count)]
    parts: list[Part] = [(" ".join(f"{a} {sign} {b}" for a, b in edges), False), ("?", False)]
    for a, b in rng.sample(edges, count):
        one, other = (b, a) if sign == "-" and rng.random() < 0.5 else (a, b)
        parts += [(f"{one} {sign}", False), (f"{other} .", True)]
    return row(parts)


def walked(rng: random.Random, level: int) -> Row:
    """One to three questions of a format about one graph, the later ones from and to any of its places; completions
    count."""
    from stepmark.datasets import navigation

    longest, dead = LEVELS[level]
    length = longest if level < len(LEVELS) - 1 and rng.random() < 0.5 else rng.randint(1, longest)
    asked = navigation.question(rng, length, rng.randint(0, dead), directed=level == 0 or rng.random() < 0.5)
    form = rng.choices(list(FORMS), list(FORMS.values()))[0]
    if form != "<cot>":
        asked = state(rng, asked, rng.choice(navigation.VALUES) if form == "<value>" else None)
    parts: list[Part] = [(navigation.told(asked).rpartition("?")[0], False)]
    for number in range(rng.choices((1, 2, 3), (0.5, 0.3, 0.2))[0]):
        if number:
            asked = elsewhere(rng, asked, longest if form == "<cot>" else None)
        parts += [
            (f"? {asked.start} {asked.sign} {asked.goal} {form}", False),
            (completion(rng, asked, form), True),
        ]
    return row([*parts, ("<eos>", True)])


def state(rng: random.Random, asked: Question, wanted: str | None) -> Question:
    """A state on a random way from a question's start: one that stands as wanted, if there is one among eight."""
    from stepmark.datasets import navigation

    found = [navigation.somewhere(rng, asked) for _ in range(8 if wanted else 1)]
    return next((each for each in found if navigation.value(each) == wanted), found[0])


def elsewhere(rng: random.Random, asked: Question, longest: int | None) -> Question:
    """Another question about the same edges: of `longest` moves at most, or whether there is a way or not."""
    from stepmark.datasets import navigation

    places = sorted({place for edge in asked.edges for place in edge})
    for _ in range(8 if len(places) > 1 else 0):
        start, goal = rng.sample(places, 2)
        other = navigation.Question(asked.edges, asked.directed, start, goal)
        moves = navigation.distance(other)
        if longest is None or (moves is not None and moves <= longest):
            return other
    return asked


def completion(rng: random.Random, asked: Question, form: str) -> str:
    """What is right in a format."""
    from stepmark.datasets import navigation

    if form == "<value>":
        return navigation.value(asked)
    return navigation.solution(asked, rng) if form == "<cot>" else navigation.proposal(asked, rng)


def drawn(rng: random.Random, done: float) -> Row:
    """A text, as hard as the share of the training that is done allows. Copying and recalling help at first."""
    level = sum(done >= share for share in REACHED)
    aid, kind = 0.33 if level == 0 else 0.08, rng.random()
    if kind < aid:
        return copied(rng)
    return recalled(rng, 7 + 2 * level) if kind < 2 * aid else walked(rng, level)


@torch.no_grad()
def measure(network: nn.Module, count: int = 60) -> dict[str, float]:
    """Shares of greedy walks that arrive and of those that are shortest, by length and edges beside it; of eight at
    temperature 1, how many arrive and whether any does; of proposed moves, how many are allowed; of states, how many
    are called what they are."""
    from stepmark.backbones.chains import Chains
    from stepmark.datasets import navigation

    found: dict[str, float] = {}
    draw = torch.Generator().manual_seed(0)
    for length in navigation.LENGTHS["paths"]:
        for dead in navigation.DEAD["paths"]:
            rng, cell = random.Random(f"navigators measure {length} {dead}"), f"{length}_dead{dead}"
            asked = [navigation.question(rng, length, dead, directed=bool(i % 2)) for i in range(count)]
            prompts = [encode(f"{navigation.told(each)} <cot>") for each in asked]
            first = Chains(network, prompts)  # type: ignore[arg-type]
            first.read()
            walks = []
            for temperature in (0.0, *[1.0] * 8):
                chains = first.take(range(count))
                chains.write(limit=40, temperature=temperature, generator=draw)
                walks.append([navigation.check(each, decode(chains.written(i))) for i, each in enumerate(asked)])
            arrived = [[walk.arrives for walk in each] for each in walks]
            found[f"arrives_{cell}"] = sum(arrived[0]) / count
            found[f"shortest_{cell}"] = sum(walk.shortest for walk in walks[0]) / count
            found[f"sampled_{cell}"] = sum(map(sum, arrived[1:])) / (8 * count)
            found[f"pass_8_{cell}"] = sum(map(any, zip(*arrived[1:], strict=True))) / count
    rng = random.Random("navigators measure states")
    for word in navigation.VALUES:
        states = [
            state(rng, navigation.question(rng, rng.randint(2, 5), 6, directed=bool(i % 2)), word) for i in range(count)
        ]
        states = [each for each in states if navigation.value(each) == word]
        prompts = [encode(f"{navigation.told(each)} <value>") for each in states]
        said = Chains(network, prompts)  # type: ignore[arg-type]
        said.write(limit=1)
        found[f"value_{word}"] = sum(decode(said.written(i)) == word for i in range(len(states))) / len(states)
        prompts = [encode(f"{navigation.told(each)} <propose>") for each in states]
        moves = Chains(network, prompts)  # type: ignore[arg-type]
        moves.write(limit=5, temperature=1.0, generator=draw)
        allowed = [
            any(navigation.check(each, decode(moves.written(i))).moves[:1]) or not navigation.neighbours(each)
            for i, each in enumerate(states)
        ]
        found[f"proposed_{word}"] = sum(allowed) / len(states)
    return found


def train_navigator(
    network: nn.Module, progress: Progress, steps: int, seed: int, lr: float = 3e-3
) -> dict[str, float]:
    """About 3 000 tokens an update. The report holds what `measure` finds."""
    from stepmark.backbones.lm import fit
    from stepmark.backbones.reasoners import looking_back

    assert isinstance(network, Reasoner)
    looking_back(network)
    found = fit(network.llama, progress, steps=steps, lr=lr, seed=seed, stream=stream(drawn, steps, 3_000, seed))
    return found | measure(network)


RECIPES: dict[str, Recipe] = {
    "navigator": Recipe(
        partial(built, Reasoner, 128, 4, 57), partial(train_navigator, steps=2_200, seed=57),
        "Llama, width 128, 4 layers, walks over graphs in the prompt, moves and judgements of states",
    ),
}  # fmt: skip
