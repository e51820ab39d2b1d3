"""Language models of procedures and programs: three sizes, one mixture, up to 10 steps and 12 lines."""

from __future__ import annotations

import random
import zlib
from functools import partial

import torch
from torch import nn

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.lessons import Part, Row, row, stream
from stepmark.backbones.reasoners import Reasoner, built, decode, encode


LEVELS = (0.08, 0.16, 0.24)  # shares of the training from which on texts are as long as half, three quarters and all of them
AGAIN = 0.12  # share of it in which words are said again, from somewhere on, until looking back is learnt


def longest(most: int, done: float) -> int:
    """Steps or lines of the texts that are drawn when a share of the training is done."""
    return max(2, most * (1 + sum(done >= share for share in LEVELS)) // (1 + len(LEVELS)))


def again(rng: random.Random) -> Row:
    """Letters, then the same from one of them on, in a circle: each is told by the two before it, but for a few."""
    words = [rng.choice("abcdefghij0123456789") for _ in range(rng.randint(5, 14))]
    start = rng.randrange(len(words))
    turned = words[start:] + words[:start]
    return row([(" ".join([*words, ";", *turned[:2]]), False), (" ".join([*turned[2:], "<eos>"]), True)])


def example(rng: random.Random, programs: bool, done: float) -> tuple[str, str]:
    """A prompt and its completion. What belongs to the splits that test is drawn again."""
    from stepmark.datasets import procedures, traces

    at_once = rng.random() < 0.15
    while True:
        if programs:
            source, form = traces.program(rng, rng.randint(traces.TRAINED[0], longest(traces.TRAINED[-1], done))), "<last>" if at_once else "<trace>"
            if zlib.crc32(source.encode()) % 10:
                name = rng.choice(sorted(traces.run(source)[1]))
                return f"{source} ? {name} {form}", traces.solution(source, name, form)
        else:
            kind, form = rng.choice(procedures.KINDS), "<last>" if at_once else "<states>"
            most = longest(procedures.TRAINED[-1], done)
            asked = begun(rng, kind) if most == procedures.TRAINED[-1] and kind != "count" and rng.random() < 0.2 else None
            asked = asked or procedures.prompt(rng, kind, rng.randint(1, most))
            if zlib.crc32(asked.encode()) % 10:
                return f"{asked} {form}", procedures.solution(asked, form)


def begun(rng: random.Random, kind: str) -> str:
    """A procedure of which some is done, so that ten steps are left at most and the state is as long as it then is; in one of
    four nothing is left."""
    from stepmark.datasets import procedures

    steps = rng.randint(1, procedures.LONG[-1])
    left = 0 if rng.random() < 0.25 else rng.randint(1, min(steps, procedures.TRAINED[-1]))
    asked = procedures.prompt(rng, kind, steps)
    for state in procedures.states(asked)[: steps - left]:
        following = procedures.onward(asked, state)
        assert following is not None
        asked = following
    return asked


def drawn(rng: random.Random, done: float) -> Row:
    """One to three problems of a kind with their answers, each a target, and the end behind the last."""
    if done < AGAIN and rng.random() < 0.5:
        return again(rng)
    programs, count = rng.random() < 0.45, rng.choices((1, 2, 3), (0.6, 0.25, 0.15))[0]
    parts: list[Part] = []
    for number in range(count):
        asked, text = example(rng, programs, done)
        parts += [(asked, False), (text, True), ("<eos>", True) if number == count - 1 else ("|", False)]
    return row(parts)


@torch.no_grad()
def measure(network: nn.Module, count: int = 48) -> dict[str, float]:
    """Greedy: share of leading states or lines that are right, and of texts all of which is, by number of steps or
    lines."""
    from stepmark.backbones.chains import Chains
    from stepmark.datasets import procedures, traces

    found: dict[str, float] = {}
    for name, steps in (("short", procedures.SHORT), ("medium", procedures.MEDIUM)):
        rng = random.Random(f"proceduralists measure {name}")
        kinds = [procedures.KINDS[i % len(procedures.KINDS)] for i in range(count)]
        asked = [procedures.prompt(rng, kind, rng.choice(steps)) for kind in kinds]
        chains = Chains(network, [encode(f"{each} <states>") for each in asked])  # type: ignore[arg-type]
        chains.write(limit=360)
        seen = [procedures.prefix(each, decode(chains.written(i))) for i, each in enumerate(asked)]
        found[f"states_{name}"] = sum(right / max(said, gold) for right, said, gold in seen) / count
        found[f"whole_{name}"] = sum(right == said == gold for right, said, gold in seen) / count
    for name, lines in (("trained", traces.TRAINED), ("longer", traces.LONGER)):
        rng = random.Random(f"proceduralists measure {name}")
        sources = [traces.program(rng, rng.choice(lines)) for _ in range(count)]
        asked = [f"{source} ? {rng.choice(sorted(traces.run(source)[1]))}" for source in sources]
        chains = Chains(network, [encode(f"{each} <trace>") for each in asked])  # type: ignore[arg-type]
        chains.write(limit=200)
        traced = [traces.check(each, decode(chains.written(i))) for i, each in enumerate(asked)]
        found[f"lines_{name}"] = sum(right / gold for right, gold, _ in traced) / count
        found[f"traces_{name}"] = sum(whole for _, _, whole in traced) / count
    return found


def train_proceduralist(
    network: nn.Module, progress: Progress, steps: int, seed: int, lr: float = 3e-3
) -> dict[str, float]:
    """About 3 000 tokens an update. The report holds what `measure` finds."""
    from stepmark.backbones.lm import fit
    from stepmark.backbones.reasoners import looking_back

    assert isinstance(network, Reasoner)
    looking_back(network, (1, 2, 3))
    found = fit(network.llama, progress, steps=steps, lr=lr, seed=seed, stream=stream(drawn, steps, 3_000, seed))
    return found | measure(network)


RECIPES: dict[str, Recipe] = {
    "proceduralist_small": Recipe(
        partial(built, Reasoner, 96, 3, 51), partial(train_proceduralist, steps=1_800, seed=51),
        "Llama, width 96, 3 layers, eight procedures and programs, step by step",
    ),
    "proceduralist": Recipe(
        partial(built, Reasoner, 128, 4, 52), partial(train_proceduralist, steps=1_800, seed=52),
        "Llama, width 128, 4 layers, the same data",
    ),
    "proceduralist_large": Recipe(
        partial(built, Reasoner, 192, 6, 53), partial(train_proceduralist, steps=1_800, seed=53, lr=2e-3),
        "Llama, width 192, 6 layers, the same data",
    ),
}  # fmt: skip
