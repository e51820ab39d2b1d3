"""Arithmetic word problems of 1 to 4 steps, with numbers below 100 and sometimes an irrelevant sentence.

Prompt ``tom has 1 2 pears . tom finds 5 pears . how many pears does tom have ? <cot>``; completion
``1 2 + 5 = 1 7 . ans 1 7``: one clause per step.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

from stepmark.task import Dataset

DATASET = Dataset(
    id="words",
    version=1,
    summary="Arithmetic word problems of 1 to 4 steps",
    licence="CC0-1.0",
    digests={
        "train": "1d3db8cb3162b077e14cf14a861ba170d045e8d2a89d1492e94c2d470d0a2d30",
        "test": "2899f650e9e885e8211aa174162d626f8134177d2c1117b032a4ea812ecb298b",
    },
)
SIZES = {"train": 48_000, "test": 500}
PEOPLE = ("tom", "anna", "ben", "sue", "max", "lily", "sam", "rosa")
ITEMS = ("pears", "coins", "shells", "cards", "stamps", "nuts")
GAIN, LOSS = ("finds", "buys", "wins"), ("loses", "sells", "eats")


def _digits(number: int) -> str:
    return " ".join(str(number))


def problem(rng: random.Random, steps: int) -> tuple[str, str, str]:
    """One problem of `steps` steps: (question, completion, answer)."""
    person, other = rng.sample(PEOPLE, 2)
    item = rng.choice(ITEMS)
    total = rng.randint(2, 20)
    sentences, clauses = [f"{person} has {_digits(total)} {item} ."], []
    if rng.random() < 0.3:
        sentences.append(f"{other} has {_digits(rng.randint(2, 20))} {item} .")
    for _ in range(steps):
        kinds = ["gain"] + (["loss"] if total > 2 else []) + (["double"] if total <= 25 else [])
        kind = rng.choice(kinds)
        if kind == "double":
            sentences.append(f"then the {item} double .")
            clauses.append(f"{_digits(total)} * 2 = {_digits(2 * total)} .")
            total *= 2
            continue
        amount = rng.randint(2, 9) if kind == "gain" else rng.randint(2, min(9, total))
        after = total + amount if kind == "gain" else total - amount
        verb, sign = (rng.choice(GAIN), "+") if kind == "gain" else (rng.choice(LOSS), "-")
        sentences.append(f"{person} {verb} {_digits(amount)} {item} .")
        clauses.append(f"{_digits(total)} {sign} {_digits(amount)} = {_digits(after)} .")
        total = after
    question = " ".join(sentences) + f" how many {item} does {person} have ?"
    return question, " ".join(clauses) + f" ans {_digits(total)}", _digits(total)


def split(name: str) -> dict[str, Any]:
    """Examples of the split ``train`` or ``test``, levels (steps) in turn; the two share no question.

    Returns a dict of equally long lists: ``prompt`` (ends with ``<cot>``), ``target``, ``answer`` (space
    separated digits) and ``level``.  Raises KeyError for any other name.
    """
    size, rng = SIZES[name], random.Random(f"words {name}")
    rows: dict[str, list[Any]] = {"prompt": [], "target": [], "answer": [], "level": []}
    while len(rows["prompt"]) < size:
        steps = 1 + len(rows["prompt"]) % 4
        question, target, answer = problem(rng, steps)
        # One question in ten belongs to the test split, whichever seed draws it.
        if (zlib.crc32(question.encode()) % 10 == 0) != (name == "test"):
            continue
        rows["prompt"].append(question + " <cot>")
        rows["target"].append(target)
        rows["answer"].append(answer)
        rows["level"].append(steps)
    return rows
