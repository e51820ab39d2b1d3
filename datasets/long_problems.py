"""Word problems of 3 to 5 steps, of the language and with the checks of `problems`: what a verifier is of use for.

A sampled chain goes wrong in one of many steps, so that choosing among chains, and among steps, has room.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

from stepmark.datasets import problems
from stepmark.datasets.problems import judged as judged

from stepmark.task import Dataset

DATASET = Dataset(
    id="long_problems",
    version=1,
    summary="Arithmetic word problems of 3 to 5 steps with exact checks of every step",
    licence="CC0-1.0",
    digests={
        "train": "8231d2f2a754f694aec6d9c994ca7f6814e9ec9d23e7c9dfdb7ef69674178573",
        "test": "b3bbf4d8ff992d8cf8dba6326bb9be12ae41cbdfe42a63e40067f597b5dcfcb5",
    },
)
ASKED = {"solve/judged": "test"}  # task -> split
SIZES = {"train": 3_000, "test": 900}
LEVELS = (3, 4, 5)


def split(name: str) -> dict[str, Any]:
    """Questions of ``train`` or ``test``, levels in turn, columns as of `problems.split`; the splits share none, here and there.
    Raises KeyError for any other name."""
    size, rng = SIZES[name], random.Random(f"long problems {name}")
    rows: dict[str, list[Any]] = {"question": [], "prompt": [], "target": [], "answer": [], "level": []}
    while len(rows["prompt"]) < size:
        steps = LEVELS[len(rows["prompt"]) % len(LEVELS)]
        question = problems.problem(rng, steps)
        # One question in ten belongs to the splits that test, as there.
        if (zlib.crc32(question.encode()) % 10 == 0) == (name == "train"):
            continue
        rows["question"].append(question)
        rows["prompt"].append(f"{question} <cot>")
        rows["target"].append(problems.solution(question, "<cot>"))
        rows["answer"].append(problems.spaced(problems.read(question).answer))
        rows["level"].append(steps)
    return rows
