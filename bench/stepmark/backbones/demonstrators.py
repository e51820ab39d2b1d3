"""The language model of worked examples: how somebody reads signs, in which style answers are written and what is
wanted of them, all of it is learnt in its context.

Texts are rows of questions about one person, each with its answer, so that every answer is a target behind those before
it. Three heads of the first layer begin by looking one, two and three words back (see `deducers`). At first there are no
questions, for what they need does not form beneath them: words said again and words behind signs found again (looking up
forms within a million tokens), lists of what signs give and of readings by examples, and then readings found again behind
examples of several signs, which takes another million. Questions grow; lists of readings and wishes come when they have
three signs, and last wrong answers among the examples, which are no targets.

What somebody wants is told by single words in long answers. The mark stands before an answer, so that all its words can
be seen as liked or not, and marked answers are targets as well: what a person's liked answers share, and the others
lack, is then asked for at every word that may show it, and not in the last answer alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.lessons import Part, Row, row, stream
from stepmark.backbones.reasoners import Reasoner, built, decode, encode

# Shares of the training from which on there are questions, these have 2, 3 and 4 signs, and all comes in.
LEVELS = (0.26, 0.33, 0.41, 0.5, 0.6)
EARLY = 0.11  # up to here looking up is to form, then what is looked up
AIDS = (  # by kind of text that helps: shares early, then, and beside questions
    ("again", (0.35, 0.06, 0.05)),
    ("copied", (0.2, 0.1, 0.05)),
    ("readings", (0.15, 0.17, 0.2)),
    ("results", (0.1, 0.12, 0.2)),
    ("recalled", (0.2, 0.55, 0.5)),
)
BESIDE = 0.12  # share of such texts beside questions
LAST = len(LEVELS) - 1  # of a lesson, whose levels begin where there are questions
WISHES = (0.0, 0.0, 0.0, 0.12, 0.12, 0.2)  # share of the texts that are about wishes, by level
# What is measured at the end of the training: by name, how a question and the examples before it are made (`prompt`).
STYLED = ("once", "pairs", "single", "again", "ruled")
PLANS: dict[str, dict[str, Any]] = {
    **{f"shown_{count}": {"shown": count} for count in (0, 1, 2, 4, 8)},
    "bare_0": {"shown": 0, "given": 0.0},
    "bare_8": {"given": 0.0},
    "simple_4": {"shown": 4, "steps": (1, 1)},
    "complex_4": {"shown": 4, "steps": (4, 4)},
    "wrong_8": {"wrong": 1.0},
    "direct_8": {"style": "direct", "form": "<dir>"},
    "rules_0": {"shown": 0, "form": "<rules>"},
    "rules_8": {"style": "ruled", "form": "<rules>"},
    "library": {"shown": 0, "library": True, "form": "<rules>"},
    "deep_8": {"signs": 6},
    **{f"told_{style}": {"shown": 4, "style": style, "given": 1.0} for style in STYLED},
    **{f"told_deep_{style}": {"shown": 4, "style": style, "given": 1.0, "signs": 6} for style in STYLED},
}


def drawn(rng: random.Random, done: float) -> Row:
    """A text, as hard as the share of the training that is done allows."""
    level = sum(done >= share for share in LEVELS)
    kind = rng.random()
    if level == 0 or kind < BESIDE:
        return aid(rng, done, 2 if level else int(done >= EARLY))
    return wished(rng) if kind > 1 - WISHES[level] else lesson(rng, level - 1)


def aid(rng: random.Random, done: float, phase: int) -> Row:
    """A text that helps, drawn by `AIDS`; lists grow from two signs to nine."""
    name = rng.choices([name for name, _ in AIDS], [shares[phase] for _, shares in AIDS])[0]
    most = 2 + int(10 * done / LEVELS[0]) if phase < 2 else 9
    if name in ("copied", "recalled"):
        return (copied if name == "copied" else recalled)(rng, min(9, most))
    return {"again": again, "readings": readings, "results": results}[name](rng)


def again(rng: random.Random) -> Row:
    """Random words, then the same from a random place on: all of the second round but the first word count."""
    from stepmark.datasets.demonstrations import PEOPLE, READINGS, SIGNS

    words = rng.choices([*SIGNS, *READINGS, *PEOPLE, *map(str, range(10))], k=rng.randint(6, 13))
    start = rng.randrange(len(words))
    turned = words[start:] + words[:start]
    return row([(" ".join(words), False), (turned[0], False), (" ".join(turned[1:]), True)])


def copied(rng: random.Random, most: int) -> Row:
    """Signs between random digits, then the signs in another order with the digit behind them: that counts."""
    from stepmark.datasets.demonstrations import SIGNS

    behind = {sign: str(rng.randrange(10)) for sign in rng.sample(SIGNS, rng.randint(2, most))}
    parts: list[Part] = [(" , ".join(f"{rng.randrange(10)} {sign} {y}" for sign, y in behind.items()) + " ;", False)]
    for sign in rng.sample(list(behind), len(behind)):
        parts += [(sign, False), (behind[sign], True), (".", False)]
    return row(parts)


def results(rng: random.Random) -> Row:
    """What signs make of digits in readings that are named: the results count."""
    from stepmark.datasets.demonstrations import READINGS, SIGNS, tables

    parts: list[Part] = []
    for _ in range(12):
        sign, reading, x = rng.choice(SIGNS), rng.randrange(len(READINGS)), rng.randrange(10)
        parts += [(f"{sign} {READINGS[reading]} : {x} {sign}", False)]
        parts += [(str(tables()[sign, reading][x]), True), (".", False)]
    return row(parts)


def readings(rng: random.Random) -> Row:
    """Examples and the reading that each of them tells: the readings count."""
    from stepmark.datasets.demonstrations import READINGS, SIGNS, tables

    parts: list[Part] = [("<infer>", False)]
    for _ in range(16):
        sign, reading, x = rng.choice(SIGNS), rng.randrange(len(READINGS)), rng.randrange(10)
        parts += [(f"{x} {sign} {tables()[sign, reading][x]}", False), (READINGS[reading], True), (".", False)]
    return row(parts)


def recalled(rng: random.Random, most: int) -> Row:
    """Examples of several signs, then the signs in another order with the reading that their example tells: that
    counts."""
    from stepmark.datasets import demonstrations

    who = demonstrations.person(rng, rng.choice(demonstrations.NAMES))
    signs = rng.sample(demonstrations.SIGNS, rng.randint(2, most))
    examples = [demonstrations.example(rng, who.readings, sign) for sign in signs]
    parts: list[Part] = [(" , ".join(f"{x} {sign} {y}" for x, sign, y in examples) + " ;", False)]
    for sign in rng.sample(signs, len(signs)):
        parts += [(sign, False), (demonstrations.READINGS[who.readings[sign]], True), (".", False)]
    return row(parts)


def lesson(rng: random.Random, level: int) -> Row:
    """Questions about one person with their answers; all answers that are right count, and the end behind the last one.

    Styles are those of the answers before, or that of the first of them throughout; the first is a habit. At the last
    level two texts in five hold wrong answers, with ``yes`` and ``no`` behind all answers in some of these.
    """
    from stepmark.datasets import demonstrations

    who = demonstrations.person(rng, rng.choice(demonstrations.NAMES))
    given = rng.choice((0.4, 1.0)) if level == 0 else rng.choice((0.0, 0.4, 0.4, 1.0))
    count = 1 if rng.random() < 0.12 else rng.randint(2, 6 if given == 1 else 10)
    noise = rng.uniform(0.0, 0.5) if level == LAST and rng.random() < 0.4 else 0.0
    marked, alike = noise > 0 and rng.random() < 0.3, rng.random() < 0.6
    parts: list[Part] = []
    if level > 1 and rng.random() < 0.12:
        known = rng.sample(demonstrations.SIGNS, rng.randint(1, len(demonstrations.SIGNS)))
        parts.append((f"{library(who.readings, known)} |", False))
    styles: list[str] = []
    for number in range(count):
        asked = demonstrations.question(rng, who, rng.randint(1, min(level + 1, 4)), given)
        form = rng.choices(("<cot>", "<rules>", "<dir>"), (0.78, 0.14, 0.08))[0]
        if form == "<cot>":
            if styles and (alike or rng.random() < 0.8):
                style = styles[0] if alike else rng.choice(styles)
            else:
                style = demonstrations.habit(rng, asked) if level > 2 else rng.choice(("single", "ruled"))
            styles.append(style)
        else:
            style = "ruled" if form == "<rules>" else "direct"
        last = number == count - 1
        text = answered(rng, asked, who.readings, style, wrong=not last and rng.random() < noise)
        seen = demonstrations.check(asked, text, who.readings)
        right = seen.right and all(seen.steps)
        parts += [(f"{demonstrations.told(asked)} {form}", False), (text, right)]
        if marked and not last:
            parts.append(("yes" if right else "no", False))
        parts.append(("<eos>", True) if last else ("|", False))
    return row(parts)


def answered(rng: random.Random, asked: Any, theirs: Mapping[str, int], style: str, wrong: bool) -> str:
    """A text in a style; a wrong one as somebody writes it who does not know the readings, or with one slip."""
    from stepmark.datasets import demonstrations

    slips = None
    if wrong and rng.random() < 0.7:
        theirs = demonstrations.mistaken(rng, asked, theirs)
    elif wrong:
        place = rng.randrange(len(asked.signs))
        due = demonstrations.sent(asked.start, asked.signs, theirs)[place + 1]
        slips = {place: (due + rng.randint(1, 9)) % 10}
    return demonstrations.solution(asked, theirs, style, slips=slips)


def library(theirs: Mapping[str, int], known: Sequence[str]) -> str:
    """A list of readings."""
    from stepmark.datasets import demonstrations

    return demonstrations.listed([(sign, demonstrations.READINGS[theirs[sign]]) for sign in known])


def opinions(rng: random.Random, who: Any, marks: Sequence[str], count: int) -> list[Part]:
    """So many questions, each with an answer for each mark, in any order; the answers count."""
    from stepmark.datasets import demonstrations

    parts: list[Part] = []
    for _ in range(count):
        asked = demonstrations.question(rng, who, rng.randint(2, 3), 1.0)
        for mark in rng.sample(marks, len(marks)):
            traits = demonstrations.liked(rng, who, mark == "good")
            parts.append((f"{demonstrations.told(asked)} <cot> {mark}", False))
            parts += [(demonstrations.solution(asked, who.readings, "single", traits), True), ("|", False)]
    return parts


def wished(rng: random.Random) -> Row:
    """Answers that somebody liked or not, in half of the texts what they want, and a question answered as they want it.
    One text in seven holds no answers but what is wanted."""
    from stepmark.datasets import demonstrations

    who = demonstrations.person(rng, rng.choice(demonstrations.NAMES))
    alone = rng.random() < 1 / 7
    marks = ("good",) if rng.random() < 0.25 else ("good", "bad")
    parts = [] if alone else opinions(rng, who, marks, rng.randint(1, 3 if len(marks) == 2 else 5))
    if alone or rng.random() < 0.5:
        parts += [("<wish>", False), (who.wish, not alone), ("|", False)]
    asked = demonstrations.question(rng, who, rng.randint(2, 3), 1.0)
    text = demonstrations.solution(asked, who.readings, "single", (who.wish,))
    return row([*parts, (f"{demonstrations.told(asked)} <cot>", False), (text, True), ("<eos>", True)])


# -- what it can do ------------------------------------------------------------------------------------------------


def prompt(
    rng: random.Random,
    who: Any,
    asked: Any,
    shown: int = 8,
    steps: tuple[int, int] = (1, 4),
    given: float = 0.4,
    style: str = "single",
    form: str = "<cot>",
    wrong: float = 0.0,
    library: bool = False,
) -> str:
    """A question behind so many worked examples of `steps` signs. `wrong`: the share of them that are worked by
    somebody who does not know the readings; `library`: all readings stand in front."""
    from stepmark.datasets import demonstrations

    everything = [(sign, demonstrations.READINGS[reading]) for sign, reading in who.readings.items()]
    parts = [f"{demonstrations.listed(everything)} |"] if library else []
    for _ in range(shown):
        other = demonstrations.question(rng, who, rng.randint(*steps), given)
        theirs = demonstrations.mistaken(rng, other, who.readings) if rng.random() < wrong else who.readings
        parts.append(f"{demonstrations.told(other)} {form} {demonstrations.solution(other, theirs, style)} |")
    return " ".join([*parts, demonstrations.told(asked), form])


@torch.no_grad()
def measure(network: nn.Module, count: int = 100) -> dict[str, float]:
    """Shares of right answers to questions of three signs, about people that no split holds: greedy by number and kind
    of examples (`PLANS`), at temperature 0.7 behind eight of them (one text, any of eight), and of wishes that were
    met: behind two pairs of answers, four that were liked, none but the wish in words; and how often two pairs tell the
    model to name it."""
    from stepmark.backbones.chains import Chains
    from stepmark.datasets import demonstrations

    def people(name: str) -> tuple[random.Random, list[Any]]:
        rng = random.Random(f"demonstrators measure {name}")
        return rng, [demonstrations.person(rng, rng.choice(demonstrations.NAMES)) for _ in range(count)]

    def written(prompts: Sequence[str]) -> list[str]:
        chains = Chains(network, [encode(text) for text in prompts])  # type: ignore[arg-type]
        chains.write(limit=80)
        return [decode(chains.written(i)) for i in range(len(chains))]

    def right(asked: Sequence[Any], texts: Sequence[str], whose: Sequence[Any]) -> list[bool]:
        return [
            demonstrations.check(each, text, who.readings).right
            for each, text, who in zip(asked, texts, whose, strict=True)
        ]

    found: dict[str, float] = {}
    for name, plan in PLANS.items():
        rng, whose = people(name)
        signs, rest = plan.get("signs", 3), {key: value for key, value in plan.items() if key != "signs"}
        asked = [demonstrations.question(rng, who, signs, plan.get("given", 0.4)) for who in whose]
        prompts = [prompt(rng, who, each, **rest) for who, each in zip(whose, asked, strict=True)]
        found[name] = sum(right(asked, written(prompts), whose)) / count
    rng, whose = people("sampled")
    draw = torch.Generator().manual_seed(0)
    asked = [demonstrations.question(rng, who, 3, 0.4) for who in whose]
    shown = [encode(prompt(rng, who, each)) for who, each in zip(whose, asked, strict=True)]
    first = Chains(network, shown)  # type: ignore[arg-type]
    first.read()
    each_time = []
    for _ in range(8):
        chains = first.take(range(count))
        chains.write(limit=80, temperature=0.7, generator=draw)
        each_time.append(right(asked, [decode(chains.written(i)) for i in range(count)], whose))
    found["sampled_8"] = sum(map(sum, each_time)) / (8 * count)
    found["pass_8"] = sum(map(any, zip(*each_time, strict=True))) / count
    for name, marks, count_shown in (
        ("wish_pairs", ("good", "bad"), 2),
        ("wish_good", ("good",), 4),
        ("wish_told", ("good",), 0),
    ):
        rng, whose = people(name)
        asked = [demonstrations.question(rng, who, 2, 1.0) for who in whose]
        before = [" ".join(text for text, _ in opinions(rng, who, marks, count_shown)) for who in whose]
        if name == "wish_pairs":
            named = Chains(network, [encode(f"{text} <wish>") for text in before])  # type: ignore[arg-type]
            named.write(limit=1)
            found["wish_named"] = sum(decode(named.written(i)) == who.wish for i, who in enumerate(whose)) / count
        if name == "wish_told":
            before = [f"<wish> {who.wish} |" for who in whose]
        texts = written([f"{text} {demonstrations.told(each)} <cot>" for text, each in zip(before, asked, strict=True)])
        met = [demonstrations.traits_of(text) == {who.wish} for text, who in zip(texts, whose, strict=True)]
        found[name] = sum(met) / count
        found[f"{name}_right"] = sum(right(asked, texts, whose)) / count
    return found


def train_demonstrator(
    network: nn.Module, progress: Progress, steps: int, seed: int, lr: float = 3e-3
) -> dict[str, float]:
    """About 6 000 tokens an update. The report holds what `measure` finds."""
    from stepmark.backbones.lm import fit
    from stepmark.backbones.reasoners import looking_back

    assert isinstance(network, Reasoner)
    looking_back(network, (1, 2, 3))
    found = fit(network.llama, progress, steps=steps, lr=lr, seed=seed, stream=stream(drawn, steps, 6_000, seed))
    return found | measure(network)


RECIPES: dict[str, Recipe] = {
    "demonstrator": Recipe(
        partial(built, Reasoner, 128, 5, 41), partial(train_demonstrator, steps=2_200, seed=41),
        "Llama, width 128, 5 layers, questions about signs behind worked examples, lists of readings and opinions",
    ),
}  # fmt: skip
