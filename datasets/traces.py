"""Small programs and what they do, line by line: assignments, lists, conditions and loops, with an exact interpreter.

A program is a text of statements between ``;``: ``x = 3 ; y = x + 4 ; while x < 7 do x = x + 2 done ; l = 2 , 5 ; push
l y``. Its trace says after each statement that was carried out which variable has changed and to what: ``x 3 ; y 7 ; x
5 ; x 7 ; l 2 , 5 ; l 2 , 5 , 7 ; end``. Nothing else is asked: one wrong line spoils all that hangs on it.

Formats, chosen by the last word of the prompt: <trace> (all lines, then what is asked for) and <last> (that at once).
What is asked for is the value of a variable at the end: ``... ? y <trace>``.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

from stepmark.task import Dataset

DATASET = Dataset(
    id="traces",
    version=1,
    summary="Programs of assignments, lists, conditions and loops, traced line by line",
    licence="CC0-1.0",
    digests={
        "train": "2ff93b71551563d4da7566f41c3786cb154fed7f87203b74f9158e612ff8913b",
        "test": "a8d8702411a192909a1635d7e4864f32ebbafd82a6dd05ad77f0204c0da3789f",
    },
)
ASKED = {"carry/traces": "test"}  # task -> split
SIZES = {"train": 6_000, "test": 600}
NUMBERS, LISTS = "xyz", "lm"
TRAINED, LONGER = range(2, 13), range(13, 25)  # lines of the trace
FEW = 6  # lines of a trace, half of the most that a model is trained on
MOST, STEPS = 99, 60
Value = int | list[int]


class Stuck(Exception):
    """A program that cannot go on: a value out of range, an empty list, a name without a value, too many lines."""


def spaced(number: int) -> str:
    """A number, a word for each digit."""
    return " ".join(str(number))


def shown(value: Value) -> str:
    """A value in words."""
    return " , ".join(map(spaced, value)) or "none" if isinstance(value, list) else spaced(value)


def run(program: str) -> tuple[list[str], dict[str, Value]]:
    """(lines of the trace, values at the end) of a program.

    Raises:
        Stuck: it cannot be carried out to its end.
        ValueError: not a program.
    """
    values: dict[str, Value] = {}
    lines: list[str] = []
    for statement in program.split(" ; "):
        _carry_out(statement.split(), values, lines)
    return lines, values


def _carry_out(words: list[str], values: dict[str, Value], lines: list[str]) -> None:
    if words[0] in ("while", "if"):
        place = words.index("do")
        test, body = words[1:place], words[place + 1 : -1]
        while _holds(test, values):
            _carry_out(body, values, lines)
            if words[0] == "if":
                break
        return
    if words[0] in ("push", "pop"):
        name = words[1]
        held = values.get(name)
        if not isinstance(held, list) or (words[0] == "pop" and not held):
            raise Stuck(f"{name} holds nothing to {words[0]}")
        values[name] = [*held, _number(words[2:], values)] if words[0] == "push" else held[:-1]
    elif words[1] != "=":
        raise ValueError(f"not a statement: {' '.join(words)!r}")
    else:
        name = words[0]
        rest = " ".join(words[2:])
        if name in LISTS:
            values[name] = [int(part.replace(" ", "")) for part in rest.split(" , ")]
        else:
            values[name] = _worked(words[2:], values)
    lines.append(f"{name} {shown(values[name])}")
    if len(lines) > STEPS:
        raise Stuck("too many lines")


def _number(words: list[str], values: dict[str, Value]) -> int:
    """A number, or the number of a name; of a list at a place, ``l at 2``, counted from 1."""
    if words[0].isdigit():
        return int("".join(words))
    value = values.get(words[0])
    if isinstance(value, list) and len(words) == 3:
        place = int(words[2])
        if not 1 <= place <= len(value):
            raise Stuck(f"{words[0]} has no place {place}")
        return value[place - 1]
    if not isinstance(value, int):
        raise Stuck(f"{words[0]} has no number")
    return value


def _worked(words: list[str], values: dict[str, Value]) -> int:
    sign = next((i for i, word in enumerate(words) if word in "+-"), None)
    if sign is None:
        return _number(words, values)
    left, right = _number(words[:sign], values), _number(words[sign + 1 :], values)
    found = left + right if words[sign] == "+" else left - right
    if not 0 <= found <= MOST:
        raise Stuck(f"{found} is out of range")
    return found


def _holds(words: list[str], values: dict[str, Value]) -> bool:
    sign = next(i for i, word in enumerate(words) if word in "<>")
    left, right = _number(words[:sign], values), _number(words[sign + 1 :], values)
    return left < right if words[sign] == "<" else left > right


# -- writing -------------------------------------------------------------------------------------------------------


def program(rng: random.Random, lines: int) -> str:
    """A program whose trace has so many lines."""
    statements = [f"{rng.choice(NUMBERS)} = {spaced(rng.randint(1, 20))}"]
    shown_so_far, values = run(statements[0])
    count = len(shown_so_far)
    while count < lines:
        statement, after, new = _statement(rng, values, lines - count), dict(values), list[str]()
        try:
            _carry_out(statement.split(), after, new)
        except Stuck:
            continue
        if count + len(new) <= lines:
            statements.append(statement)
            values, count = after, count + len(new)
    return " ; ".join(statements)


def _statement(rng: random.Random, values: dict[str, Value], room: int) -> str:
    numbers, lists = [n for n in values if n in NUMBERS], [n for n in values if n in LISTS and values[n]]
    kind = rng.choices(
        ("set", "work", "list", "push", "pop", "at", "if", "while"),
        (2, 4, 1, 2 * bool(lists), bool(lists), 1.5 * bool(lists), 1.5, 1.5 * (room > 2)),
    )[0]
    name, other = rng.choice(NUMBERS), rng.choice(numbers)
    amount = rng.choice([spaced(rng.randint(1, 9)), rng.choice(numbers)])
    if kind == "set":
        return f"{name} = {spaced(rng.randint(1, 20))}"
    if kind == "work":
        return f"{name} = {other} {rng.choice('+-')} {amount}"
    if kind == "list":
        return f"{rng.choice(LISTS)} = {' , '.join(spaced(rng.randint(1, 9)) for _ in range(rng.randint(1, 3)))}"
    if kind in ("push", "pop"):
        return f"push {rng.choice(lists)} {amount}" if kind == "push" else f"pop {rng.choice(lists)}"
    if kind == "at":
        chosen = rng.choice(lists)
        held = values[chosen]
        assert isinstance(held, list)
        return f"{name} = {chosen} at {rng.randint(1, len(held))}"
    value = values[other]
    assert isinstance(value, int)
    if kind == "if":
        bound = max(0, value + rng.choice([-5, -2, 2, 5]))
        test = f"{other} {rng.choice('<>')} {spaced(bound)}"
        return f"if {test} do {name} = {other} {rng.choice('+-')} {rng.randint(1, 9)} done"
    step, times = rng.randint(2, 6), rng.randint(2, min(5, room))
    bound = min(MOST - 9, value + step * times - rng.randint(0, step - 1))
    return f"while {other} < {spaced(bound)} do {other} = {other} + {step} done"


def solution(text: str, name: str, form: str) -> str:
    """The completion of a program and the name that is asked for, in the format <trace> or <last>."""
    lines, values = run(text)
    ending = f"ans {shown(values[name])}"
    return " ; ".join([*lines, ending]) if form == "<trace>" else ending


def check(question: str, text: str) -> tuple[int, int, bool]:
    """(leading lines that are right, lines that there are, whether all is right and the answer too) of a <trace>."""
    source, _, name = question.partition(" ? ")
    gold = solution(source, name, "<trace>").split(" ; ")
    said = text.split(" ; ")
    right = 0
    for one, other in zip(said, gold, strict=False):
        if one.strip() != other:
            break
        right += 1
    return min(right, len(gold) - 1), len(gold) - 1, said == gold


def judged(asked: str, text: str) -> dict[str, float]:
    """What a trace is worth, by metric; NaN where a metric is of traces of other lengths only."""
    right, gold, whole = check(asked, text)
    source, _, name = asked.partition(" ? ")
    valid, none = float(whole), float("nan")
    return {
        "accuracy": float(text.split(" ; ")[-1] == solution(source, name, "<last>")),
        "answered": float("ans " in text),
        "valid": valid,
        "prefix": right / gold,
        "valid_trained": valid if gold in TRAINED else none,
        "valid_longer": valid if gold in LONGER else none,
        "valid_few": valid if gold <= FEW else none,
        "valid_many": valid if gold > FEW and gold in TRAINED else none,
    }


def split(name: str) -> dict[str, Any]:
    """Programs of ``train`` (traces of 2 to 12 lines) or ``test`` (2 to 24, half of them longer than any in training).

    Returns a dict of equally long lists: ``question`` (program and name), ``prompt`` (with <trace>), ``target``,
    ``answer`` and ``level`` (lines). Raises KeyError for any other name.
    """
    size, rng = SIZES[name], random.Random(f"traces {name}")
    rows: dict[str, list[Any]] = {"question": [], "prompt": [], "target": [], "answer": [], "level": []}
    while len(rows["prompt"]) < size:
        lines = rng.choice(LONGER if name == "test" and len(rows["prompt"]) % 2 else TRAINED)
        source = program(rng, lines)
        if (zlib.crc32(source.encode()) % 10 == 0) == (name == "train"):
            continue
        values = run(source)[1]
        asked = rng.choice(sorted(values))
        rows["question"].append(f"{source} ? {asked}")
        rows["prompt"].append(f"{source} ? {asked} <trace>")
        rows["target"].append(solution(source, asked, "<trace>"))
        rows["answer"].append(shown(values[asked]))
        rows["level"].append(lines)
    return rows
