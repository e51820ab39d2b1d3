"""Arithmetic word problems of 1 to 5 steps, written, read back, solved in several formats, and checked step by step.

A problem tells what happens to the things of one person, with numbers below 100 and sentences that do not matter:
``tom has 3 boxes of 4 pears . ben finds 7 pears . tom eats 5 pears . how many pears does tom have ?``. `read` follows the
sentences of such a text and gives the steps that lead to the answer, so that a text needs no record to be checked against.
Of every number that matters the rest of the problem and the answer tell what it is (`backward`). What is gained and lost may
be added up in any order, but not across a multiplication (`reordered`): there are many right chains to one question.

Formats, chosen by the last word of the prompt:

    <dir>     the answer at once: ``ans 7``
    <cot>     a clause per step: ``3 * 4 = 1 2 . 1 2 - 5 = 7 . ans 7``
    <prose>   the same in sentences: ``tom has 3 boxes of 4 pears so 3 * 4 = 1 2 pears . tom eats 5 pears so ...``
    <table>   the same in rows of step, kind, process and result: ``| 1 | boxes | 3 * 4 | 1 2 | 2 | eats | 1 2 - 5 | 7 ans 7``
    <think>   thinking that checks itself: ``3 * 4 = 1 2 . wait 3 * 4 = 1 2 yes . 1 2 - 5 = 8 . no 1 2 - 5 = 7 . so 7 .
              wait ... </think> ans 7``: steps are checked again at random, before and after the answer is there, some of
              them are wrong at first, and the last word on a step is right
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stepmark.task import Dataset

DATASET = Dataset(
    id="problems",
    version=1,
    summary="Arithmetic word problems of 1 to 5 steps with exact checks of every step",
    licence="CC0-1.0",
    digests={
        "train": "1317640f17fbd1fba688d1c343419cf8143e4e72757e635b25831e55b832ffa9",
        "test": "eb913f8ae80d5b6c5b8a18afafd98f354425726de6056e1a7524ed60f6822b2a",
    },
)
ASKED = {"solve/problems": "test", "solve/sizes": "test"}  # task -> split; sizes: of several models, a task to come
SIZES = {"train": 8_000, "test": 1_000}
LEVELS = {"train": (1, 2, 3, 4, 5), "test": (2, 3, 4, 5)}
DEEPEST = 5  # most steps of a question that a model has seen
PEOPLE = ("tom", "anna", "ben", "sue", "max", "lily", "sam", "rosa")
ITEMS = ("pears", "coins", "shells", "cards", "stamps", "nuts")
GAIN, LOSS = ("finds", "buys", "wins"), ("loses", "sells", "eats")
FORMATS = ("<dir>", "<cot>", "<prose>", "<table>", "<think>")
MOST = 99  # no number is greater


@dataclass(frozen=True)
class Step:
    """left sign right = result. `at`: which number of the question `right` is (None: it is not told, as in doubling);
    `told`: the sentence that asks for the step; `kind`: its verb."""

    left: int
    sign: str
    right: int
    result: int
    at: int | None
    kind: str
    told: str

    @property
    def clause(self) -> str:
        """The step as a clause without its full stop."""
        return f"{spaced(self.left)} {self.sign} {spaced(self.right)} = {spaced(self.result)}"


@dataclass(frozen=True)
class Problem:
    """The steps that a question asks for, in their order. `start`: which number of the question they begin with."""

    steps: tuple[Step, ...]
    answer: int
    start: int


def spaced(number: int) -> str:
    """A number, a word for each digit."""
    return " ".join(str(number))


def worked(left: int, sign: str, right: int) -> int | None:
    """left sign right; None where it is no whole number from 0 to 99."""
    if sign == "/":
        return left // right if right and left % right == 0 else None
    found = {"+": left + right, "-": left - right, "*": left * right}[sign]
    return found if 0 <= found <= MOST else None


# -- reading -------------------------------------------------------------------------------------------------------


def read(question: str) -> Problem:
    """What a question asks for.

    Raises:
        ValueError: not a question of this language, or one without an answer.
    """
    owned: dict[tuple[str, str], tuple[int, tuple[Step, ...], int]] = {}  # value, steps, start
    numbers = 0
    *told, asked = [part.split() for part in question.removesuffix(" ?").split(" . ")]
    for words in told:
        sentence, values = " ".join(words), _numbers(words)
        plain = [w for w in words if not w.isdigit()]
        first = numbers
        numbers += len(values)
        match plain:
            case [who, "has", "boxes", "of", item]:
                count, each = values
                result = _sure(worked(count, "*", each), sentence)
                step = Step(count, "*", each, result, first + 1, "boxes", sentence)
                owned[who, item] = result, (step,), first
            case [who, "has", ("more" | "fewer") as way, item, "than", other]:
                sign = "+" if way == "more" else "-"
                value, steps, start = _of(owned, other, item, sentence)
                result = _sure(worked(value, sign, values[0]), sentence)
                owned[who, item] = result, (*steps, Step(value, sign, values[0], result, first, way, sentence)), start
            case [who, "has", item]:
                owned[who, item] = values[0], (), first
            case ["then", "the", item, "of", who, "double"]:
                value, steps, start = _of(owned, who, item, sentence)
                result = _sure(worked(value, "*", 2), sentence)
                owned[who, item] = result, (*steps, Step(value, "*", 2, result, None, "double", sentence)), start
            case [giver, "gives", taker, item]:
                for who, sign in ((giver, "-"), (taker, "+")):
                    if (who, item) in owned:
                        value, steps, start = owned[who, item]
                        result = _sure(worked(value, sign, values[0]), sentence)
                        step = Step(value, sign, values[0], result, first, "gives", sentence)
                        owned[who, item] = result, (*steps, step), start
            case [who, verb, item] if verb in GAIN + LOSS:
                value, steps, start = _of(owned, who, item, sentence)
                sign = "+" if verb in GAIN else "-"
                result = _sure(worked(value, sign, values[0]), sentence)
                owned[who, item] = result, (*steps, Step(value, sign, values[0], result, first, verb, sentence)), start
            case _:
                raise ValueError(f"not a sentence of these problems: {sentence!r}")
    match asked:
        case ["how", "many", item, "does", who, "have"]:
            value, steps, start = _of(owned, who, item, " ".join(asked))
            return Problem(steps, value, start)
    raise ValueError(f"not a question of these problems: {' '.join(asked)!r}")


def _numbers(words: Sequence[str]) -> list[int]:
    found, digits = [], ""
    for word in [*words, ""]:
        if word.isdigit():
            digits += word
        elif digits:
            found.append(int(digits))
            digits = ""
    return found


def _sure(value: int | None, sentence: str) -> int:
    if value is None:
        raise ValueError(f"leaves the numbers from 0 to {MOST}: {sentence!r}")
    return value


def _of(owned: dict[tuple[str, str], Any], who: str, item: str, sentence: str) -> Any:
    if (who, item) not in owned:
        raise ValueError(f"nobody said what {who} has: {sentence!r}")
    return owned[who, item]


# -- checking ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """How a text stands to its question. `steps`: of each clause, whether it is a step that was due and rightly worked;
    `right`: whether it ends with the right answer; `valid`: and every step is there, right, and where it may be."""

    steps: tuple[bool, ...]
    right: bool
    valid: bool


def due(steps: Sequence[Step]) -> Sequence[Step]:
    """Those of the steps that are left which may come next: gains and losses up to the next multiplication, or that one."""
    count = next((i for i, step in enumerate(steps) if step.sign == "*"), len(steps))
    return steps[: max(count, 1)]


def reordered(problem: Problem, rng: random.Random) -> list[Step]:
    """The steps in an order that is drawn anew, on which no number leaves the range from 0 to 99."""
    left, found = list(problem.steps), list[Step]()
    value = left[0].left if left else problem.answer
    while left:
        options = [step for step in due(left) if worked(value, step.sign, step.right) is not None]
        if not options:  # this order leads out of the range
            return reordered(problem, rng)
        step = rng.choice(options)
        left.remove(step)
        result = worked(value, step.sign, step.right)
        assert result is not None
        found.append(replace(step, left=value, result=result))
        value = result
    return found


def clauses(text: str) -> list[tuple[int, str, int, int]]:
    """(left, sign, right, result) of every clause ``left sign right = result`` of a text, whatever stands around them."""
    words, found = text.split(), []
    for i, word in enumerate(words):
        if word != "=":
            continue
        start = i
        while start and (words[start - 1].isdigit() or words[start - 1] in "+-*/"):
            start -= 1
        stop = i + 1
        while stop < len(words) and words[stop].isdigit():
            stop += 1
        before = words[start:i]
        signs = [k for k, w in enumerate(before) if w in "+-*/"]
        # In a table the last cell is the result: no clause stands there.
        sides = (before[: signs[0]], before[signs[0] + 1 :], words[i + 1 : stop]) if len(signs) == 1 else ()
        if sides and all(sides):
            left, right, result = (int("".join(side)) for side in sides)
            found.append((left, before[signs[0]], right, result))
    return found


def answer_of(text: str) -> int | None:
    """The number after the last ``ans``, None where there is none."""
    _, there, last = text.rpartition("ans ")
    digits = last.replace(" ", "")
    return int(digits) if there and digits.isdigit() and len(digits) < 5 else None


def check(question: str, text: str) -> Checked:
    """Hold a text of clauses (formats <cot> and <prose>, a table after `as_clauses`) against its question."""
    problem = read(question)
    left, steps = list(problem.steps), list[bool]()
    value = left[0].left if left else problem.answer
    for number, sign, amount, result in clauses(text):
        options = due(left)
        # What is asked for wrongly stands in the place of the step that it is likest to.
        step = next((s for s in options if (s.sign, s.right) == (sign, amount)), options[0] if options else None)
        steps.append(
            step is not None
            and (number, sign, amount) == (value, step.sign, step.right)
            and result == worked(number, sign, amount)
        )
        if step is not None:
            left.remove(step)
            value = worked(value, step.sign, step.right) or 0
    right = answer_of(text) == problem.answer
    return Checked(tuple(steps), right, right and not left and all(steps))


def as_clauses(table: str) -> str:
    """A table as a text of clauses: ``process | result`` becomes ``process = result .``; the answer stays."""
    body, there, answer = table.partition(" ans ")
    cells = [cell.strip() for cell in body.split("|")[1:]]
    rows = [f"{cells[i + 2]} = {cells[i + 3]} ." for i in range(0, len(cells) - 3, 4)]
    return " ".join(rows) + (f" ans {answer}" if there else "")


def judged(question: str, text: str) -> dict[str, float]:
    """What a text in any of the formats is worth as an answer to a question, by metric; NaN where a metric is of other
    questions only."""
    seen = check(question, as_clauses(text) if text.startswith("|") else text)
    right = float(seen.right)
    return {
        "accuracy": right,
        "answered": float(answer_of(text) is not None),
        "valid": float(seen.valid),
        "deep": right if len(read(question).steps) == DEEPEST else float("nan"),
    }


# -- writing -------------------------------------------------------------------------------------------------------


def problem(rng: random.Random, steps: int) -> str:
    """A question of so many steps. What does not matter: another person's things, or other things of the same person."""
    while True:
        question = _attempt(rng, steps)
        try:
            if len(read(question).steps) == steps:
                return question
        except ValueError:  # a number left its range
            continue


def _attempt(rng: random.Random, steps: int) -> str:
    who, *others = rng.sample(PEOPLE, 4)
    item, beside = rng.sample(ITEMS, 2)
    value = rng.randint(2, 20)
    if boxes := steps and rng.random() < 0.25:
        count, each = rng.randint(2, 9), rng.randint(2, 9)
        value, told = count * each, [f"{who} has {count} boxes of {each} {item} ."]
    else:
        told = [f"{who} has {spaced(value)} {item} ."]
    if rng.random() < 0.4:  # what somebody else has, or what else there is
        owner, thing = (others[0], item) if rng.random() < 0.5 else (who, beside)
        told.append(f"{owner} has {spaced(rng.randint(2, 20))} {thing} .")
        strays = [(owner, thing)]
    else:
        strays = []
    for _ in range(steps - bool(boxes)):
        if strays and rng.random() < 0.25:
            owner, thing = strays[0]
            told.append(f"{owner} {rng.choice(GAIN)} {rng.randint(2, 9)} {thing} .")
        kind = rng.choices(("gain", "loss", "give", "take", "double", "than"), (3, 3, 2, 2, 1.5, 1.5))[0]
        low = min(9, value)
        amount = rng.randint(2, 9) if kind in ("gain", "take") or low < 2 else rng.randint(2, low)
        if kind == "double":
            told.append(f"then the {item} of {who} double .")
            value *= 2
        elif kind == "than":
            way = "more" if value < 10 or rng.random() < 0.5 else "fewer"
            told.append(f"{others[1]} has {amount} {way} {item} than {who} .")
            value += amount if way == "more" else -amount
            who, others = others[1], [others[0], who, *others[2:]]
        elif kind in ("gain", "take"):
            told.append(f"{who} {rng.choice(GAIN)} {amount} {item} ." if kind == "gain"
                        else f"{others[2]} gives {who} {amount} {item} .")  # fmt: skip
            value += amount
        else:
            told.append(f"{who} {rng.choice(LOSS)} {amount} {item} ." if kind == "loss"
                        else f"{who} gives {others[2]} {amount} {item} .")  # fmt: skip
            value -= amount
    return " ".join([*told, f"how many {item} does {who} have ?"])


def solution(question: str, form: str, rng: random.Random | None = None) -> str:
    """The completion of a question in a format of `FORMATS`: steps in the order of the text, or in one that `rng` draws, as
    it does what <think> checks again."""
    found = read(question)
    if rng is not None:
        found = replace(found, steps=tuple(reordered(found, rng)))
    answer = f"ans {spaced(found.answer)}"
    if form == "<dir>":
        return answer
    if form == "<cot>":
        return " ".join([*(f"{step.clause} ." for step in found.steps), answer])
    if form == "<prose>":
        item = question.split()[-5]
        return " ".join([*(f"{step.told} so {step.clause} {item} ." for step in found.steps), answer])
    if form == "<table>":
        rows = [
            f"| {i} | {s.kind} | {spaced(s.left)} {s.sign} {spaced(s.right)} | {spaced(s.result)}"
            for i, s in enumerate(found.steps, 1)
        ]
        return " ".join([*rows, answer])
    return thought(found, rng or random.Random(question))


def thought(found: Problem, rng: random.Random) -> str:
    """A completion in the format <think>: how often steps are checked again is drawn anew for each text."""
    again, slips = rng.random() * 0.6, rng.random() * 0.3
    parts = []
    for i, step in enumerate(found.steps):
        if rng.random() < slips:
            parts += [f"{slip(step, rng).clause} .", f"no {step.clause} ."]
        else:
            parts.append(f"{step.clause} .")
        if rng.random() < again:
            before = found.steps[rng.randrange(i + 1)]
            parts.append(f"wait {before.clause} yes .")
    parts.append(f"so {spaced(found.answer)} .")
    while found.steps and rng.random() < again + 0.2:
        parts.append(f"wait {rng.choice(found.steps).clause} yes .")
        if rng.random() < 0.4:
            parts.append(f"so {spaced(found.answer)} .")
    return " ".join([*parts, f"</think> ans {spaced(found.answer)}"])


# -- wrong steps, and steps backwards ------------------------------------------------------------------------------


def slip(step: Step, rng: random.Random) -> Step:
    """The step with its result wrongly worked."""
    wrong = [r for r in (step.result + d for d in (-10, -2, -1, 1, 2, 10)) if 0 <= r <= MOST]
    return Step(step.left, step.sign, step.right, rng.choice(wrong), step.at, step.kind, step.told)


def misread(question: str, left: Sequence[Step], rng: random.Random) -> Step | None:
    """A step that is rightly worked but none that is due, in the place of the first of those that are left: with another
    sign, another number of the question, or a later step. None where none of them stays among the numbers from 0 to 99."""
    first, allowed = left[0], [(step.sign, step.right) for step in due(left)]
    options = [(sign, first.right) for sign in "+-*"]
    options += [(first.sign, number) for number in _numbers(question.split())]
    options += [(step.sign, step.right) for step in left[1:]]
    rng.shuffle(options)
    for sign, number in options:
        result = worked(first.left, sign, number)
        if (sign, number) not in allowed and result is not None:
            return Step(first.left, sign, number, result, None, first.kind, first.told)
    return None


def places(question: str) -> list[tuple[int, int]]:
    """(first word, number of words) of every number of a question, in their order."""
    words, found = question.split(), []
    for i, word in enumerate(words):
        if word.isdigit() and (i == 0 or not words[i - 1].isdigit()):
            length = 1
            while words[i + length].isdigit():
                length += 1
            found.append((i, length))
    return found


def masked(question: str, number: int) -> str:
    """The question with its `number`-th number hidden: ``X`` in its place."""
    words, (start, length) = question.split(), places(question)[number]
    return " ".join([*words[:start], "X", *words[start + length :]])


def asked_back(question: str, number: int, answer: int) -> str:
    """The prompt that tells an answer and asks for a number of the question: ``... does tom have ? ans 7 <find>``."""
    return f"{masked(question, number)} ans {spaced(answer)} <find>"


def backward(question: str, number: int) -> str | None:
    """The completion of `asked_back` with the right answer: steps forward to where the number is missing, steps back from
    the answer, and the number as what lies between. None where the number does not matter for the answer."""
    found = read(question)
    at = -1 if number == found.start else next((i for i, s in enumerate(found.steps) if s.at == number), None)
    if at is None:
        return None
    parts = [f"{step.clause} ." for step in found.steps[: max(at, 0)]]
    for step in reversed(found.steps[at + 1 :]):
        sign = {"+": "-", "-": "+", "*": "/"}[step.sign]
        parts.append(f"{spaced(step.result)} {sign} {spaced(step.right)} = {spaced(step.left)} .")
    if at < 0:
        value = found.steps[0].left if found.steps else found.answer
        return " ".join([*parts, f"ans {spaced(value)}"])
    step = found.steps[at]
    big, sign, small = {
        "+": (step.result, "-", step.left),
        "-": (step.left, "-", step.result),
        "*": (step.result, "/", step.left),
    }[step.sign]
    parts.append(f"{spaced(big)} {sign} {spaced(small)} = {spaced(step.right)} .")
    return " ".join([*parts, f"ans {spaced(step.right)}"])


# -- splits --------------------------------------------------------------------------------------------------------


def split(name: str) -> dict[str, Any]:
    """Questions of ``train`` (1 to 5 steps) or ``test`` (2 to 5), levels in turn; the splits share none.

    Returns a dict of equally long lists: ``question``, ``prompt`` (the question and ``<cot>``), ``target``, ``answer``
    (space separated digits) and ``level`` (steps). Raises KeyError for any other name.
    """
    size, rng, levels = SIZES[name], random.Random(f"problems {name}"), LEVELS[name]
    rows: dict[str, list[Any]] = {"question": [], "prompt": [], "target": [], "answer": [], "level": []}
    while len(rows["prompt"]) < size:
        steps = levels[len(rows["prompt"]) % len(levels)]
        question = problem(rng, steps)
        # One question in ten belongs to the splits that test, whichever seed draws it.
        if (zlib.crc32(question.encode()) % 10 == 0) == (name == "train"):
            continue
        rows["question"].append(question)
        rows["prompt"].append(f"{question} <cot>")
        rows["target"].append(solution(question, "<cot>"))
        rows["answer"].append(spaced(read(question).answer))
        rows["level"].append(steps)
    return rows
