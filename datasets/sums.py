"""Column addition of two numbers with 2 to 6 digits, one token per digit, with the carries written out.

Prompt ``4 7 + 3 8 = <cot>``; completion ``7 + 8 + 0 = 1 5 ; 4 + 3 + 1 = 0 8 ; ans 8 5``: one clause per column
from the right, ``a + b + carry = carry' digit``.  A completion of d digits has 9 d + 2 to 9 d + 3 + d tokens.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

from stepmark.task import Dataset

DATASET = Dataset(
    id="sums",
    version=1,
    summary="Addition of two numbers of 2 to 6 digits with every carry written out",
    licence="CC0-1.0",
    digests={
        "train": "8645eb7f9e6026c6581404285c69c9cc560d7001d51392d6789858115ca192b9",
        "test": "5f97937bf3c4ef0a32f3453ddc161ec7c2b5f7e6a86c505e14748a74b99f5dc3",
    },
)
SIZES = {"train": 40_000, "test": 500}
DIGITS = (2, 3, 4, 5, 6)


def solve(a: int, b: int) -> str:
    """The completion for ``a + b``: one clause per column, least significant first, then the answer."""
    clauses, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    for x, y in zip(reversed(str(a).zfill(width)), reversed(str(b).zfill(width)), strict=True):
        total = int(x) + int(y) + carry
        clauses.append(f"{x} + {y} + {carry} = {total // 10} {total % 10} ;")
        carry = total // 10
    return " ".join(clauses) + " ans " + " ".join(str(a + b))


def split(name: str) -> dict[str, Any]:
    """Examples of the split ``train`` or ``test``, levels (digits) in turn; the two share no question.

    Returns a dict of equally long lists: ``prompt`` (ends with ``<cot>``), ``target``, ``answer`` (space
    separated digits) and ``level``.  Raises KeyError for any other name.
    """
    size, rng = SIZES[name], random.Random(f"sums {name}")
    rows: dict[str, list[Any]] = {"prompt": [], "target": [], "answer": [], "level": []}
    while len(rows["prompt"]) < size:
        digits = DIGITS[len(rows["prompt"]) % len(DIGITS)]
        low, high = 10 ** (digits - 1), 10**digits - 1
        a, b = rng.randint(low, high), rng.randint(low, high)
        question = f"{' '.join(str(a))} + {' '.join(str(b))} ="
        # One question in ten belongs to the test split, whichever seed draws it.
        if (zlib.crc32(question.encode()) % 10 == 0) != (name == "test"):
            continue
        rows["prompt"].append(question + " <cot>")
        rows["target"].append(solve(a, b))
        rows["answer"].append(" ".join(str(a + b)))
        rows["level"].append(digits)
    return rows
