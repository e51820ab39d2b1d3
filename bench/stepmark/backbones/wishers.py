"""The language model of wishes: `demonstrator`, taught further to find out what sets liked answers apart from others.

Behind questions it had learnt to answer as a named wish has it, but not to name the wish: one word in a text of a hundred
tells it. So in the first half of this training that word alone counts, behind answers with one trait, then behind pairs
that differ in one, then behind as many answers with as many traits as are asked about. Answers come back behind them.
"""

from __future__ import annotations

import random
from functools import partial

from torch import nn

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.demonstrators import LAST, aid, lesson, measure, opinions, wished
from stepmark.backbones.lessons import Part, Row, row, stream
from stepmark.backbones.reasoners import Reasoner, built

ALONE = 0.45  # share of the training in which names alone count
# By share of that from which on they hold, shares of answers alone, of pairs that differ in a trait, and of any.
GROWING = ((0.0, (1.0, 0.0, 0.0)), (0.15, (0.3, 0.7, 0.0)), (0.45, (0.1, 0.3, 0.6)), (0.7, (0.0, 0.15, 0.85)))


def named(rng: random.Random, level: int) -> Row:
    """Opinions on answers, then what their person wants: that counts. Levels: an answer that has nothing else, a liked one
    and another that differ in it, any one to three pairs."""
    from stepmark.datasets import demonstrations

    who = demonstrations.person(rng, rng.choice(demonstrations.NAMES))
    parts: list[Part] = [(text, False) for text, _ in opinions(rng, who, ("good", "bad"), rng.randint(1, 3))]
    if level < 2:
        told = [("good", (who.wish,))] if level == 0 else [("good", (who.wish, who.beside)), ("bad", (who.beside,))]
        parts = []
        for mark, traits in rng.sample(told, len(told)):
            asked = demonstrations.question(rng, who, rng.randint(1, 3), 1.0)
            text = demonstrations.solution(asked, who.readings, "single", traits)
            parts.append((f"{demonstrations.told(asked)} <cot> {mark} {text} |", False))
    return row([*parts, ("<wish>", False), (who.wish, True)])


def drawn(rng: random.Random, done: float) -> Row:
    """A text, as hard as the share of the training that is done allows."""
    if done < ALONE:
        shares = [shares for start, shares in GROWING if done >= start * ALONE][-1]
        return named(rng, rng.choices(range(3), shares)[0])
    kind = rng.random()
    if kind < 0.35:
        return named(rng, 2)
    if kind < 0.65:
        return wished(rng)
    return lesson(rng, LAST) if kind < 0.92 else aid(rng, 1.0, 2)


def train_wisher(network: nn.Module, progress: Progress, steps: int, seed: int) -> dict[str, float]:
    """Start as `demonstrator`; about 6 000 tokens an update. The report holds what `demonstrators.measure` finds."""
    from stepmark.backbones import load
    from stepmark.backbones.lm import fit

    assert isinstance(network, Reasoner)
    network.load_state_dict(load("demonstrator").state_dict())
    found = fit(network.llama, progress, steps=steps, lr=1.5e-3, seed=seed, stream=stream(drawn, steps, 6_000, seed))
    return found | measure(network)


RECIPES: dict[str, Recipe] = {
    "wisher": Recipe(
        partial(built, Reasoner, 128, 5, 43), partial(train_wisher, steps=440, seed=43),
        "demonstrator, taught further to name what liked answers have and others lack",
    ),
}  # fmt: skip
