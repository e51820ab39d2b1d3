"""Signs that everyone reads in a way of their own: what a question needs is told by worked examples before it.

Twelve signs stand for permutations of the digits. Each has three readings, of which the first is the usual one, and at
every digit the three give three results, so that a single example tells which is meant. A person keeps to one reading
of each sign. A question names a person, may give examples of how they read, and asks for a digit sent through some
signs: ``alma : 5 delu 8 ; 3 beze delu ?``. Who has not seen a sign of that person's can only guess, best the usual
reading. A sign is one of three families; most of a question's signs are of the same one, and families have habits of
how they are worked.

Formats, chosen by the word behind a question:

    <dir>     the answer at once: ``ans 2``
    <cot>     steps in one of five styles, those of the examples before, else as is the habit:
              once      ``3 beze delu 2 . ans 2``, all signs in a step
              pairs     two signs a step
              single    ``3 beze 7 . 7 delu 2 . ans 2``
              again     as single, and after each step what is left: ``3 beze 7 . so 7 delu . 7 delu 2 . ans 2``
              ruled     before each step the reading that it goes by: ``beze second : 3 beze 7 . delu first : ...``
    <rules>   the style ruled, asked for

Worked examples stand one after the other, each closed by ``|``: ``alma : 4 beze ? <cot> 4 beze 1 . ans 1 | alma :
...``. Behind an answer ``yes`` or ``no`` may say whether it is right. In front of all a list of readings may stand:
``beze second , delu first
|``.

Wishes: an answer may have traits besides, the word ``then`` in front, what is left after each step (``again``), a last
step checked (``wait 7 delu 2 yes .``), the word ``sure`` at the end. A person wants one of them and no other. Answers
that they liked stand behind the word ``good`` and have it, but another one always too; those behind ``bad`` lack it and
mostly have that other: ``... ? <cot> good then 3 beze 7 . ans 7 sure |``. ``<wish> sure |`` says what is wanted. A
question whose answer has no such word before it asks for what is wanted alone.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from stepmark.datasets.deduction import CONCEPTS, NAMES

from stepmark.task import Dataset

DATASET = Dataset(
    id="demonstrations",
    version=1,
    summary="Digits through signs that each person reads in a way of their own, told by worked examples",
    licence="CC0-1.0",
    digests={
        "train": "48609e0121fe26aedf4e62fbb59e15014d6f11f9bcce9323e3e27989df45631e",
        "test": "dff75d701dcce1f234f9e0b00b235432c8adc3dea6f335e6a835fc22276944cb",
        "bare": "874456da66f0fd8d2118cd7638f7df608b22e4e99e876fb7f8faf3992df0dcea",
        "told": "4fc5efdf2dc9a750ee03512da733f84f4c1701df725578491c090385549f8718",
        "deep": "c3f435ce6cba3d2805c8c3cb52a5bb1398124a51084dfc9318dd531ca1bdb4e1",
        "wishes": "78b24c63cb3297a090da1c9339313f0854a6b3fae98641c73d327df9dd13d250",
    },
)
ASKED = {  # task -> split
    "shown/mixed": "test",
    "shown/bare": "bare",
    "shown/told": "told",
    "shown/deep": "deep",
    "shown/wishes": "wishes",
}
PEOPLE = NAMES[:24]  # those that are asked about
SIGNS = CONCEPTS[3::14][:12]
FAMILIES = (SIGNS[:4], SIGNS[4:8], SIGNS[8:])
READINGS = ("first", "second", "third")
USUAL = (0.6, 0.2, 0.2)  # how often a person keeps to each
STYLES = ("once", "pairs", "single", "again", "ruled")
HABITS = ((4, 4, 2, 0, 0), (1, 3, 4, 1, 1), (0, 1, 4, 3, 2))  # by family of the first sign, how often each style
TRAITS = ("then", "again", "wait", "sure")
TRAINED = range(1, 5)  # signs of a question in training
# By kind of a person's own questions: how many there are, and of how many signs of a question an example is given.
POOLS = {"mixed": (64, 0.4), "bare": (64, 0.0), "told": (32, 1.0)}
# By split: questions of each person, share of signs with an example, numbers of signs.
TESTS = {
    "test": (20, 0.4, (2, 3, 4)),
    "bare": (20, 0.0, (2, 3, 4)),
    "told": (24, 1.0, (1, 2, 3, 4, 5, 6)),
    "deep": (20, 0.4, (5, 6)),
    "wishes": (20, 1.0, (2, 3)),
}
Example = tuple[int, str, int]  # a digit, a sign, what it gives
Readings = Mapping[str, int]  # of each sign, which of its readings


@dataclass(frozen=True)
class Question:
    """Whose readings count, examples of them, and a digit with the signs that it goes through."""

    name: str
    given: tuple[Example, ...]
    start: int
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Person:
    """How somebody reads, the trait that they want in an answer, and the one that what they like has by chance too."""

    name: str
    readings: Readings
    wish: str
    beside: str


@lru_cache(maxsize=1)
def tables() -> dict[tuple[str, int], tuple[int, ...]]:
    """What each sign makes of each digit, by sign and reading."""
    rng, found = random.Random("demonstrations tables"), dict[tuple[str, int], tuple[int, ...]]()
    for sign in SIGNS:
        kept: list[tuple[int, ...]] = []
        while len(kept) < len(READINGS):
            drawn = tuple(rng.sample(range(10), 10))
            if all(one != other for table in kept for one, other in zip(drawn, table, strict=True)):
                kept.append(drawn)
        found |= {(sign, reading): table for reading, table in enumerate(kept)}
    return found


def person(rng: random.Random, name: str) -> Person:
    """Somebody of this name."""
    readings = dict(zip(SIGNS, rng.choices(range(len(READINGS)), USUAL, k=len(SIGNS)), strict=True))
    wish, beside = rng.sample(TRAITS, 2)
    return Person(name, readings, wish, beside)


@lru_cache(maxsize=1)
def people() -> dict[str, Person]:
    """Those of the splits, by name."""
    rng = random.Random("demonstrations people")
    return {name: person(rng, name) for name in PEOPLE}


# -- reading -------------------------------------------------------------------------------------------------------


def told(asked: Question) -> str:
    """The text of a question, without a format."""
    given = " , ".join(f"{x} {sign} {y}" for x, sign, y in asked.given)
    return f"{asked.name} : {given} ; {aim(asked)}" if given else f"{asked.name} : {aim(asked)}"


def aim(asked: Question) -> str:
    """What is asked for, without a name and examples."""
    return f"{asked.start} {' '.join(asked.signs)} ?"


def read(text: str) -> Question:
    """A question from its text.

    Raises:
        ValueError: not a question of this language.
    """
    name, there, rest = text.partition(" : ")
    given, _, asked = rest.rpartition(" ; ")
    examples = [_step(part.split()) for part in given.split(" , ")] if given else []
    words = asked.split()
    known = [(*step[:1], *step[1], step[2]) for step in examples if step is not None and len(step[1]) == 1]
    fine = len(known) == len(examples) and len(words) > 2 and words[-1] == "?"
    if not there or not fine or not _digit(words[0]) or any(word not in SIGNS for word in words[1:-1]):
        raise ValueError(f"not a question of signs: {text[:80]!r}")
    return Question(name, tuple(known), int(words[0]), tuple(words[1:-1]))  # type: ignore[arg-type]


def _digit(word: str) -> bool:
    return len(word) == 1 and word.isdigit()


def _step(words: Sequence[str]) -> tuple[int, tuple[str, ...], int] | None:
    """A digit, signs and a digit; None where it is anything else."""
    fine = len(words) > 2 and _digit(words[0]) and _digit(words[-1]) and all(word in SIGNS for word in words[1:-1])
    return (int(words[0]), tuple(words[1:-1]), int(words[-1])) if fine else None


@dataclass(frozen=True)
class Clause:
    """A sentence of a text. `kind`: ``step``, ``left`` (what is left, without a result), ``check`` of a step, or
    ``other``; `reading`: what is said of the sign before."""

    kind: str
    left: int = -1
    signs: tuple[str, ...] = ()
    right: int = -1
    reading: tuple[str, str] | None = None


def clauses(text: str) -> list[Clause]:
    """The sentences of a text, without its answer."""
    body, there, _ = text.rpartition("ans ")
    found = []
    for number, part in enumerate((body if there else text).split(" .")):
        words = part.split()
        if number == 0 and words[:1] == ["then"]:
            words = words[1:]
        if words:
            found.append(_clause(words))
    return found


def _clause(words: list[str]) -> Clause:
    kind, reading = "step", None
    if words[0] == "so":
        ahead = _step([*words[1:], "0"])
        return Clause("other") if ahead is None else Clause("left", ahead[0], ahead[1])
    if words[0] == "wait" and words[-1] == "yes":
        kind, words = "check", words[1:-1]
    elif words[2:3] == [":"] and words[0] in SIGNS and words[1] in READINGS:
        reading, words = (words[0], words[1]), words[3:]
    step = _step(words)
    return Clause("other") if step is None else Clause(kind, *step, reading)


def spelt(clause: Clause) -> str:
    """A sentence in words, without its full stop. Of another kind than those known nothing is left."""
    if clause.kind == "other":
        return ""
    signs = " ".join(clause.signs)
    if clause.kind == "left":
        return f"so {clause.left} {signs}"
    before = f"{' '.join(clause.reading)} : " if clause.reading else "wait " if clause.kind == "check" else ""
    return f"{before}{clause.left} {signs} {clause.right}{' yes' if clause.kind == 'check' else ''}"


def rules_of(text: str) -> list[tuple[str, str]]:
    """(sign, reading) of every step that says by which reading it goes."""
    return [clause.reading for clause in clauses(text) if clause.reading]


def traits_of(text: str) -> frozenset[str]:
    """The traits that a text has."""
    kinds = {clause.kind for clause in clauses(text)}
    words = text.split()
    there = {"then": words[:1] == ["then"], "again": "left" in kinds, "wait": "check" in kinds,
             "sure": words[-1:] == ["sure"]}  # fmt: skip
    return frozenset(trait for trait in TRAITS if there[trait])


# -- checking ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """How a text stands to its question. `steps`: of each step whether it is due and rightly worked; `right`: whether
    it ends with the right answer; `valid`: and all that it says is so, and no sign is left."""

    steps: tuple[bool, ...]
    right: bool
    valid: bool


def sent(start: int, signs: Sequence[str], readings: Readings, slips: Mapping[int, int] | None = None) -> list[int]:
    """The digit at the start and after each sign. `slips`: by number of the sign, what comes out instead."""
    values = [start]
    for number, sign in enumerate(signs):
        right = tables()[sign, readings[sign]][values[-1]]
        values.append((slips or {}).get(number, right))
    return values


def answer_of(text: str) -> int | None:
    """The digit behind the last ``ans`` of a text, None where there is none."""
    _, there, ending = text.rpartition("ans ")
    words = ending.split()
    words = words[:1] if words[1:] == ["sure"] else words
    return int(words[0]) if there and len(words) == 1 and _digit(words[0]) else None


def check(question: str | Question, text: str, readings: Readings) -> Checked:
    """Hold a text against its question, whatever its style."""
    asked = read(question) if isinstance(question, str) else question
    values = sent(asked.start, asked.signs, readings)
    steps: list[bool] = []
    at, fine, last = 0, True, Clause("other")
    for clause in clauses(text):
        if clause.kind == "step":
            stop = at + len(clause.signs)
            due = stop <= len(asked.signs) and clause.signs == asked.signs[at:stop]
            due = due and (clause.left, clause.right) == (values[at], values[stop])
            if clause.reading is not None:
                sign, reading = clause.reading
                due = due and clause.signs == (sign,) and READINGS[readings[sign]] == reading
            steps.append(due)
            at, last = min(stop, len(asked.signs)), clause
        elif clause.kind == "left":
            fine = fine and (clause.left, clause.signs) == (values[at], asked.signs[at:])
        else:
            said = (clause.left, clause.signs, clause.right)
            fine = fine and clause.kind == "check" and said == (last.left, last.signs, last.right)
    right = answer_of(text) == values[-1]
    return Checked(tuple(steps), right, right and fine and all(steps) and at == len(asked.signs))


def shared(question: str | Question, text: str, readings: Readings) -> float:
    """F1 of the results that a text goes through against those that its question asks for."""
    asked = read(question) if isinstance(question, str) else question
    gold = Counter(sent(asked.start, asked.signs, readings)[1:])
    own = Counter(clause.right for clause in clauses(text) if clause.kind == "step")
    return 2 * (gold & own).total() / (gold.total() + own.total())


def judged(asked: str, text: str) -> dict[str, float]:
    """What a text is worth as an answer to a question, by metric; NaN where a metric is of other questions only.

    It is met where it is right and has what its person wants of an answer, and nothing else besides."""
    question = read(asked)
    who, signs = people()[question.name], question.signs
    seen, traits = check(question, text, who.readings), traits_of(text)
    right, none = float(seen.right), float("nan")
    return {
        "accuracy": right,
        "answered": float(answer_of(text) is not None),
        "valid": float(seen.valid),
        "lines": float(len(seen.steps)),
        "bridging": shared(question, text, who.readings),
        "coarse": right if signs[0] in FAMILIES[0] else none,
        "easy": right if len(signs) <= 2 else none,
        "hard": right if len(signs) >= 5 else none,
        "met": float(seen.right and traits == {who.wish}),
        "wished": float(who.wish in traits),
        "needless": float(len(traits - {who.wish})),
    }


# -- writing -------------------------------------------------------------------------------------------------------


def question(rng: random.Random, who: Person, steps: int, given: float) -> Question:
    """A question about somebody, of so many different signs, mostly of one family. `given`: the chance of each sign
    that an example of it stands in the question."""
    family, signs = rng.choice(FAMILIES), list[str]()
    while len(signs) < steps:
        left = [sign for sign in (family if rng.random() < 0.75 else SIGNS) if sign not in signs]
        signs.append(rng.choice(left or [sign for sign in SIGNS if sign not in signs]))
    examples = [example(rng, who.readings, sign) for sign in signs if rng.random() < given]
    rng.shuffle(examples)
    return Question(who.name, tuple(examples), rng.randrange(10), tuple(signs))


def example(rng: random.Random, readings: Readings, sign: str) -> Example:
    """What a sign makes of some digit."""
    x = rng.randrange(10)
    return x, sign, tables()[sign, readings[sign]][x]


def habit(rng: random.Random, asked: Question) -> str:
    """The style in which a question is worked where nothing is shown before."""
    family = next(number for number, signs in enumerate(FAMILIES) if asked.signs[0] in signs)
    return rng.choices(STYLES, HABITS[family])[0]


def solution(
    asked: Question,
    readings: Readings,
    style: str,
    traits: Sequence[str] = (),
    slips: Mapping[int, int] | None = None,
) -> str:
    """The completion of a question in a style of `STYLES`, or "direct". `traits`: what it has besides; `slips`: see
    `sent`."""
    values, signs = sent(asked.start, asked.signs, readings, slips), asked.signs
    ending = f"ans {values[-1]}{' sure' if 'sure' in traits else ''}"
    if style == "direct":
        return ending
    size = {"once": len(signs), "pairs": 2}.get(style, 1)
    parts = []
    for start in range(0, len(signs), size):
        stop = min(start + size, len(signs))
        reading = (signs[start], READINGS[readings[signs[start]]]) if style == "ruled" else None
        parts.append(Clause("step", values[start], signs[start:stop], values[stop], reading))
        if (style == "again" or "again" in traits) and stop < len(signs):
            parts.append(Clause("left", values[stop], signs[stop:]))
    if "wait" in traits:
        parts.append(replace(parts[-1], kind="check", reading=None))
    opening = ["then"] if "then" in traits else []
    return " ".join([*opening, *(f"{spelt(clause)} ." for clause in parts), ending])


def listed(rules: Sequence[tuple[str, str]]) -> str:
    """(sign, reading) in words, as they may stand in front of all."""
    return " , ".join(map(" ".join, rules))


def mistaken(rng: random.Random, asked: Question, readings: Readings) -> Readings:
    """Readings of somebody who knows the examples of a question and no more: of other signs mostly the usual one."""
    known = {sign for _, sign, _ in asked.given}
    return {
        sign: reading if sign in known else 0 if rng.random() < 0.7 else rng.randrange(len(READINGS))
        for sign, reading in readings.items()
    }


def misworked(text: str, rng: random.Random) -> str:
    """A text of the same form in which every result is wrong in all readings, and each step goes on from the one
    before."""
    parts: list[Clause] = []
    value = -1
    for clause in clauses(text):
        if clause.kind == "step":
            left = clause.left if value < 0 else value
            right = [sent(left, clause.signs, dict.fromkeys(SIGNS, k))[-1] for k in range(len(READINGS))]
            value = rng.choice([digit for digit in range(10) if digit not in (*right, clause.right)])
            clause = replace(clause, left=left, right=value)
        elif clause.kind == "check":
            clause = replace(parts[-1], kind="check", reading=None)
        else:
            clause = replace(clause, left=value)
        parts.append(clause)
    _, there, ending = text.rpartition("ans ")
    end = ending.split()[1:] if there else []
    opening = ["then"] if text.startswith("then ") else []
    if value < 0:  # a direct answer
        value = rng.choice([digit for digit in range(10) if [str(digit)] != ending.split()[:1]])
    return " ".join([*opening, *(f"{spelt(clause)} ." for clause in parts), f"ans {value}", *end])


def liked(rng: random.Random, who: Person, good: bool) -> list[str]:
    """Traits of an answer that somebody liked or did not."""
    chance = {who.wish: float(good), who.beside: 1.0 if good else 0.8}
    return [trait for trait in TRAITS if rng.random() < chance.get(trait, 0.25)]


# -- splits --------------------------------------------------------------------------------------------------------


def split(name: str) -> dict[str, Any]:
    """What each person of `PEOPLE` is asked: ``train``, their own questions by kind of `POOLS`, each worked in all
    styles; or a split of `TESTS`: ``test``, ``bare`` (without an example), ``told`` (with all of them, 1 to 6 signs),
    ``deep`` (5 and 6 signs), ``wishes``.

    Returns a dict of equally long lists: ``question``, ``prompt`` (the question and ``<cot>``), ``target`` (worked as
    is the habit), ``answer``, ``level`` (signs) and ``name``; ``train`` also ``pool``, a column for each style,
    ``good`` and ``bad`` (answers that are liked and not). Raises KeyError for any other name.
    """
    rng = random.Random(f"demonstrations {name}")
    plans = (
        [(kind, count, given, tuple(TRAINED)) for kind, (count, given) in POOLS.items()]
        if name == "train"
        else [(name, *TESTS[name])]
    )
    rows: dict[str, list[Any]] = {
        column: []
        for column in ("question", "prompt", "target", "answer", "level", "name", "pool", *STYLES, "good", "bad")
    }
    seen = set[str]()
    for who in people().values():
        for kind, count, given, levels in plans:
            drawn = 0
            while drawn < count:
                asked = question(rng, who, levels[drawn % len(levels)], given)
                text = told(asked)
                # One question in ten belongs to the splits that test, whichever of them draws it.
                if text in seen or (zlib.crc32(text.encode()) % 10 == 0) == (name == "train"):
                    continue
                seen.add(text)
                drawn += 1
                row = {
                    "question": text,
                    "prompt": f"{text} <cot>",
                    "target": solution(asked, who.readings, habit(rng, asked)),
                    "answer": str(sent(asked.start, asked.signs, who.readings)[-1]),
                    "level": len(asked.signs),
                    "name": who.name,
                    "pool": kind,
                }
                row |= {style: solution(asked, who.readings, style) for style in STYLES}
                for mark in ("good", "bad"):
                    row[mark] = solution(asked, who.readings, "single", liked(rng, who, mark == "good"))
                for column, value in row.items():
                    rows[column].append(value)
    if name != "train":
        for column in ("pool", *STYLES, "good", "bad"):
            del rows[column]
    return rows
