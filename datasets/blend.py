"""Column additions, word problems, multi-hop answers and stories in turn: what the language models were trained on.

Rows are those of `sums`, `words`, `hops` and `stories`, as many of each. A model that gives up neurons may keep those that
one of the four needs; all four together take more of them.
"""

from __future__ import annotations

import itertools
from typing import Any

from stepmark.datasets import hops, stories, sums, words

from stepmark.task import Dataset

DATASET = Dataset(
    id="blend",
    version=1,
    summary="Rows of sums, words, hops and stories in turn",
    licence="CC0-1.0",
    digests={
        "train": "900a5aeea6b367cc76ca40c83c38df3658614a549307af23576b377d05d0918d",
        "test": "e67365c8d32d2e87f166c0ffe4a22c1e1e6e030831e17681bf441f11da2cc02e",
    },
)
KINDS = {"sums": sums, "words": words, "hops": hops, "stories": stories}
SIZES = {"train": 4_000, "test": 250}  # of each kind


def split(name: str) -> dict[str, Any]:
    """The split ``train`` or ``test``: lists ``kind``, ``prompt`` and ``target``. KeyError for any other name."""
    parts = {kind: module.split(name) for kind, module in KINDS.items()}
    rows = itertools.product(range(SIZES[name]), parts)
    found: dict[str, list[Any]] = {"kind": [], "prompt": [], "target": []}
    for i, kind in rows:
        found["kind"].append(kind)
        for key in ("prompt", "target"):
            found[key].append(parts[kind][key][i])
    return found
