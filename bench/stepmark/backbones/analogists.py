"""The language model of analogies: it answers at once, or finds a rule and carries it out, over letters and over
people."""

from __future__ import annotations

import random
from functools import partial

import torch
from torch import nn

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.lessons import Part, Row, row, stream
from stepmark.backbones.reasoners import Reasoner, built, decode, encode

LEVELS = (0.15, 0.3)  # shares of the training from which on rules have two and three operations


def drawn(rng: random.Random, done: float) -> Row:
    """A text, with rules as long as the share of the training that is done allows."""
    from stepmark.datasets import analogies

    kind, depth = rng.choice(analogies.KINDS), rng.randint(1, 1 + sum(done >= share for share in LEVELS))
    if rng.random() < 0.25:  # a rule alone is carried out
        rule = rng.choice([each for each in analogies.rules(kind) if len(each) == depth])
        asked = analogies.Question((), analogies.thing(rng, kind))
        text = analogies.solution(asked, rule, "<rules>").partition(": ")[2]
        return row([(f"{analogies.told(asked)} <rules> {' '.join(rule)} :", False), (f"{text} <eos>", True)])
    asked = analogies.question(rng, kind, depth, rng.random() < 0.4)
    told = analogies.told(asked)
    rule, form = analogies.rule_of(told), "<dir>" if rng.random() < 0.3 else "<rules>"
    parts: list[Part] = [(f"{told} {form}", False)]
    if form == "<rules>" and rng.random() < 0.25:  # others have failed
        others = [each for each in analogies.rules(kind) if not analogies.fits(each, asked.pairs)]
        parts += [(f"no {' '.join(other)} .", False) for other in rng.sample(others, rng.randint(1, 3))]
    return row([*parts, (f"{analogies.solution(asked, rule, form)} <eos>", True)])


@torch.no_grad()
def measure(network: nn.Module, count: int = 60) -> dict[str, float]:
    """Shares of right answers to free questions by kind and number of operations, at once and by a rule, greedy; of
    rules drawn at temperature 1, one and any of eight, how many fit; and of rules that are given, how many are carried
    out."""
    from stepmark.backbones.chains import Chains
    from stepmark.datasets import analogies

    found: dict[str, float] = {}
    draw = torch.Generator().manual_seed(0)
    for kind in analogies.KINDS:
        for depth in analogies.DEPTHS:
            rng, cell = random.Random(f"analogists measure {kind} {depth}"), f"{kind}_{depth}"
            asked = [analogies.told(analogies.question(rng, kind, depth, False)) for _ in range(count)]
            given = [analogies.read(each) for each in asked]
            for name, form in (("direct", "<dir>"), ("rules", "<rules>"), ("carried", "<rules>")):
                alone = [
                    f"{analogies.told(analogies.Question((), each.thing))} <rules> "
                    f"{' '.join(analogies.rule_of(text))} :"
                    for text, each in zip(asked, given, strict=True)
                ]
                prompts = alone if name == "carried" else [f"{each} {form}" for each in asked]
                chains = Chains(network, [encode(text) for text in prompts])  # type: ignore[arg-type]
                chains.write(limit=60)
                texts = [decode(chains.written(i)) for i in range(count)]
                right = [
                    analogies.answer_of(text) == analogies.answer(each) for text, each in zip(texts, asked, strict=True)
                ]
                found[f"{name}_{cell}"] = sum(right) / count
            fit_each_time = []
            for _ in range(8):
                chains = Chains(network, [encode(f"{each} <rules>") for each in asked])  # type: ignore[arg-type]
                chains.write(stop=encode(":"), limit=12, temperature=1.0, generator=draw)
                rules = [analogies.named(f"{decode(chains.written(i))} .") for i in range(count)]
                known = analogies.OPERATIONS[kind]
                fit_each_time.append(
                    [
                        rule is not None and all(word in known for word in rule) and analogies.fits(rule, each.pairs)
                        for rule, each in zip(rules, given, strict=True)
                    ]
                )
            found[f"fits_{cell}"] = sum(map(sum, fit_each_time)) / (8 * count)
            found[f"fits_any_{cell}"] = sum(map(any, zip(*fit_each_time, strict=True))) / count
    return found


def train_analogist(
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
    "analogist": Recipe(
        partial(built, Reasoner, 128, 4, 45), partial(train_analogist, steps=1_800, seed=45),
        "Llama, width 128, 4 layers, analogies over letters and over people, at once and by rules",
    ),
}  # fmt: skip
