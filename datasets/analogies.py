"""Analogies: a rule is to be found from pairs and carried out on something else, over letters or over people.

``a c d : d c a , b e f g : g f e b ; c h a ?``: what goes with c h a as the second of each pair goes with the first? A
rule is one to three operations in their order. Over letters (a to j) they change a string; over people they are
relations of a fixed world, ``alma : carlo , ... ; dora ?``, which is known or not. No rule here does what a shorter one
does, and the pairs of a question leave one answer. Some questions have four answers to choose from: ``... ? h a c | a h
c | b i d | c a h``.

Formats, chosen by the last word of the prompt:

    <dir>     the answer at once: ``ans a h c``
    <rules>   a rule, what each of its operations gives, the answer: ``turn up : a h c . b i d . ans b i d``. Rules that
              have failed may stand before, ``no turn .``, and after the format a rule that is given. Without pairs,
              ``c h a ? <rules> turn up :``, it is only carried out.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

from stepmark.datasets.deduction import NAMES

from stepmark.task import Dataset

DATASET = Dataset(
    id="analogies",
    version=1,
    summary="Rules of one to three operations to be found from pairs, over letters and over people",
    licence="CC0-1.0",
    digests={
        "train": "a29b76e9128ddf7d096d6aa099fa08fe645d478e8c8c1c4719895f1116b3610b",
        "test": "9c9681ab9848e86bac04b911fc0174bbb4c1677e9814f86fd33c7a9ea9341f37",
    },
)
ASKED = {"infer/analogies": "test"}  # task -> split
SIZES = {"train": 3_000, "test": 600}
KINDS = ("letters", "people")
LETTERS = "abcdefghij"
OPERATIONS = {
    "letters": ("turn", "up", "rotate", "swap", "double", "drop"),
    "people": ("boss", "friend", "teacher", "doctor", "rival", "cousin"),
}
PAIRS = {"letters": 2, "people": 3}
DEPTHS = (1, 2, 3)
Thing = tuple[str, ...]
Rule = tuple[str, ...]


@lru_cache(maxsize=1)
def facts() -> dict[tuple[str, str], str]:
    """The fixed world: (person, relation) -> person."""
    rng = random.Random("analogies facts")
    return {(name, relation): rng.choice(NAMES) for relation in OPERATIONS["people"] for name in NAMES}


def applied(thing: Thing, operation: str) -> Thing:
    """What one operation gives."""
    if operation in OPERATIONS["people"]:
        return (facts()[thing[0], operation],)
    if operation == "turn":
        return thing[::-1]
    if operation == "up":
        return tuple(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in thing)
    if operation == "rotate":
        return thing[1:] + thing[:1]
    if operation == "swap":
        return thing[1::-1] + thing[2:]
    return thing + thing[-1:] if operation == "double" else thing[:-1]


def states(thing: Thing, rule: Rule) -> list[Thing]:
    """What each operation of a rule gives, one after the other."""
    found = []
    for operation in rule:
        thing = applied(thing, operation)
        found.append(thing)
    return found


@lru_cache(maxsize=2)
def rules(kind: str) -> tuple[Rule, ...]:
    """All rules of a kind, the shorter ones first, none of which does what another before it does."""
    things = [tuple("acegi"), tuple("bfjhd")] if kind == "letters" else [(name,) for name in NAMES]
    found: dict[tuple[Thing, ...], Rule] = {tuple(things): ()}
    for depth in DEPTHS:
        for rule in permutations(OPERATIONS[kind], depth):
            found.setdefault(tuple(states(thing, rule)[-1] for thing in things), rule)
    return tuple(rule for rule in found.values() if rule)


# -- reading and checking ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Pairs, what is asked about, and what may be chosen from, if anything."""

    pairs: tuple[tuple[Thing, Thing], ...]
    thing: Thing
    options: tuple[Thing, ...] = ()

    @property
    def kind(self) -> str:
        """letters or people."""
        return "people" if self.thing[0] in NAMES else "letters"


def told(asked: Question) -> str:
    """The text of a question, without a format."""
    pairs = " , ".join(f"{' '.join(one)} : {' '.join(other)}" for one, other in asked.pairs)
    text = f"{pairs} ; {' '.join(asked.thing)} ?" if pairs else f"{' '.join(asked.thing)} ?"
    return f"{text} {' | '.join(map(' '.join, asked.options))}" if asked.options else text


def read(text: str) -> Question:
    """A question from its text.

    Raises:
        ValueError: not a question of this language.
    """
    front, there, options = text.partition(" ?")
    pairs, _, thing = front.rpartition(" ; ")
    sides = [tuple(tuple(side.split()) for side in pair.split(" : ")) for pair in pairs.split(" , ")] if pairs else []
    chosen = [tuple(option.split()) for option in options.split(" | ")] if options.strip() else []
    things = [tuple(thing.split()), *(side for pair in sides for side in pair), *chosen]
    letters = all(each and all(word in LETTERS and len(word) == 1 for word in each) for each in things)
    names = all(len(each) == 1 and each[0] in NAMES for each in things)
    if not there or not (letters or names) or any(len(pair) != 2 for pair in sides):
        raise ValueError(f"not a question of analogies: {text[:80]!r}")
    return Question(tuple((one, other) for one, other in sides), things[0], tuple(chosen))


def fits(rule: Rule, pairs: Sequence[tuple[Thing, Thing]]) -> bool:
    """Whether a rule leads from the first to the second of each pair."""
    return bool(rule) and all(states(one, rule)[-1] == other for one, other in pairs)


@lru_cache(maxsize=2_000)
def rule_of(question: str) -> Rule:
    """The shortest rule that fits the pairs of a question.

    Raises:
        ValueError: there is none.
    """
    asked = read(question)
    for rule in rules(asked.kind):
        if fits(rule, asked.pairs):
            return rule
    raise ValueError(f"no rule fits: {question[:80]!r}")


def answer(question: str) -> Thing:
    """What a question asks for."""
    return states(read(question).thing, rule_of(question))[-1]


@dataclass(frozen=True)
class Checked:
    """Of a text whether it ends with the right answer, whether the rule that it settles on fits the pairs, and whether
    what it writes behind that rule is what the rule gives."""

    right: bool
    fits: bool
    carried: bool


def answer_of(text: str) -> Thing | None:
    """What stands behind the last ``ans``, None where there is nothing, or something else than letters or a name."""
    _, there, ending = text.rpartition("ans ")
    found = tuple(ending.split())
    fine = all(word in LETTERS and len(word) == 1 for word in found) or (len(found) == 1 and found[0] in NAMES)
    return found if there and found and fine else None


def named(text: str) -> Rule | None:
    """The rule that a text settles on: what stands before its colon, behind those that it turns down."""
    front, there, _ = text.partition(" :")
    rule = tuple(front.rpartition(" . ")[2].split())
    known = {*OPERATIONS["letters"], *OPERATIONS["people"]}
    return rule if there and rule and all(word in known for word in rule) else None


def check(question: str, text: str) -> Checked:
    """Hold a text against its question."""
    asked, rule = read(question), named(text)
    if rule is not None and any(word not in OPERATIONS[asked.kind] for word in rule):
        rule = None
    right = answer_of(text) == answer(question)
    if rule is None:
        return Checked(right, False, False)
    worked = states(asked.thing, rule)
    body = text.partition(" :")[2].rpartition("ans ")[0]
    said = [tuple(part.split()) for part in body.split(" .") if part.strip()]
    return Checked(right, fits(rule, asked.pairs), said == worked and answer_of(text) == worked[-1])


def judged(asked: str, text: str) -> dict[str, float]:
    """What a text is worth as an answer to a question, by metric; NaN where a metric is of other questions only."""
    question, seen = read(asked), check(asked, text)
    right, depth, none = float(seen.right), len(rule_of(asked)), float("nan")
    cells = {f"{kind}_{name}": (kind, count) for kind in KINDS for name, count in (("easy", 1), ("hard", 3))}
    return {
        "accuracy": right,
        "answered": float(answer_of(text) is not None),
        "fits": float(seen.fits),
        **{name: right if cell == (question.kind, depth) else none for name, cell in cells.items()},
        "free": none if question.options else right,
        "choice": right if question.options else none,
    }


# -- writing -------------------------------------------------------------------------------------------------------


def thing(rng: random.Random, kind: str) -> Thing:
    """Three to five letters, or somebody."""
    return (rng.choice(NAMES),) if kind == "people" else tuple(rng.choices(LETTERS, k=rng.randint(3, 5)))


def question(rng: random.Random, kind: str, depth: int, choice: bool) -> Question:
    """A question whose rule has so many operations, and whose pairs leave one answer."""
    hidden = rng.choice([rule for rule in rules(kind) if len(rule) == depth])
    while True:
        first = [thing(rng, kind) for _ in range(PAIRS[kind] + 1)]
        ends = [states(each, hidden)[-1] for each in first]
        pairs = tuple(zip(first[:-1], ends[:-1], strict=True))
        others = [rule for rule in rules(kind) if rule != hidden]
        alike = [rule for rule in others if fits(rule, pairs)]
        fine = all(len(rule) > depth for rule in alike) and len(set(first)) == len(first) and all(ends)
        if not fine or any(states(first[-1], rule)[-1] != ends[-1] for rule in alike):
            continue
        if not choice:
            return Question(pairs, first[-1])
        wrong = {states(first[-1], rule)[-1] for rule in rng.sample(others, 12)} - {ends[-1], ()}
        if len(wrong) >= 3:
            options = [ends[-1], *rng.sample(sorted(wrong), 3)]
            return Question(pairs, first[-1], tuple(rng.sample(options, 4)))


def solution(asked: Question, rule: Rule, form: str) -> str:
    """The completion of a question by a rule, in the format <dir> or <rules>."""
    found = states(asked.thing, rule)
    ending = f"ans {' '.join(found[-1])}"
    if form == "<dir>":
        return ending
    return " ".join([*rule, ":", *(f"{' '.join(each)} ." for each in found), ending])


def split(name: str) -> dict[str, Any]:
    """Questions of ``train`` or ``test``: kinds, numbers of operations, free and with a choice in turn.

    Returns a dict of equally long lists: ``question``, ``prompt`` (the question and ``<rules>``), ``target``,
    ``answer``, ``level`` (operations), ``kind`` and ``choice``. Raises KeyError for any other name.
    """
    size, rng = SIZES[name], random.Random(f"analogies {name}")
    columns = ("question", "prompt", "target", "answer", "level", "kind", "choice")
    rows: dict[str, list[Any]] = {column: [] for column in columns}
    while len(rows["prompt"]) < size:
        number = len(rows["prompt"])
        kind, depth = KINDS[number % 2], DEPTHS[number // 2 % 3]
        choice = bool(number // 6 % 2)
        asked = question(rng, kind, depth, choice)
        text = told(asked)
        if (zlib.crc32(text.encode()) % 10 == 0) == (name == "train"):
            continue
        rule = rule_of(text)
        row = (text, f"{text} <rules>", solution(asked, rule, "<rules>"), " ".join(answer(text)), depth, kind, choice)
        for column, value in zip(columns, row, strict=True):
            rows[column].append(value)
    return rows
