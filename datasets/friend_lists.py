"""Lists of questions about facts of the prompt, which several workers can answer side by side.

Prompt ``friend alma otto zeno . friend dora ines . ... ? 1 dora 2 alma ... <dir>``: who is a friend of whom, one to three
names each and nobody twice, in the words of `needles`. A solution ``2 alma otto zeno .`` gives the number of a question,
its name and all friends of it. Solutions are of unequal length, so that a list cannot be shared out evenly without
looking at them.

`transcripts` writes the texts of workers who go through a list together: whoever is free takes the first question that
nobody has begun, and stops when there is none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from typing import Any

from stepmark.datasets.needles import ANSWERS, ASKABLE

from stepmark.task import Dataset

DATASET = Dataset(
    id="friend_lists",
    version=1,
    summary="Lists of 8 questions about 10 facts of the prompt",
    licence="CC0-1.0",
    digests={
        "train": "feda1d58d2f7bd7269bb0a8a42121e663831b0c4289d41ce07313e5daa6f43a8",
        "test": "2d561a6e3ffcbabdb3f1ca99dc342b54073a232792ce9a23c8faf2f122ee0ca7",
    },
)
SIZES = {"train": 4_000, "test": 500}
FACTS, QUESTIONS = 10, 8
WORKERS = ("tom", "anna")  # the name that a worker's text begins with
Fact = tuple[str, tuple[str, ...]]


def example(rng: random.Random, questions: int) -> tuple[str, list[Fact]]:
    """A prompt, and the facts that it asks for, in their order."""
    friends = iter(rng.sample(ANSWERS, len(ANSWERS)))
    facts = [(person, tuple(islice(friends, rng.randint(1, 3)))) for person in rng.sample(ASKABLE, FACTS)]
    asked = rng.sample(facts, questions)
    told = [f"friend {person} {' '.join(names)} ." for person, names in facts]
    return " ".join([*told, "?", *(f"{i} {person}" for i, (person, _) in enumerate(asked, 1)), "<dir>"]), asked


def transcripts(asked: Sequence[Fact], workers: int) -> list[list[str]]:
    """What each worker writes where all write one word at a time, at once; the first of several free ones goes first."""
    texts: list[list[str]] = [[] for _ in range(workers)]
    for number, (person, friends) in enumerate(asked, start=1):
        min(texts, key=len).extend([str(number), person, *friends, "."])
    return texts


def split(name: str) -> dict[str, Any]:
    """Lists of the split ``train`` or ``test``.

    Returns a dict of equally long lists: ``prompt`` (ends with ``<dir>``), ``target`` (the text of a single worker),
    ``answer`` (the friends of each name asked for, separated by commas) and ``level`` (questions). Raises KeyError for
    any other name.
    """
    size, rng = SIZES[name], random.Random(f"friend_lists {name}")
    rows: dict[str, list[Any]] = {"prompt": [], "target": [], "answer": [], "level": []}
    for _ in range(size):
        prompt, asked = example(rng, QUESTIONS)
        rows["prompt"].append(prompt)
        rows["target"].append(" ".join(transcripts(asked, 1)[0]))
        rows["answer"].append(" , ".join(" ".join(friends) for _, friends in asked))
        rows["level"].append(QUESTIONS)
    return rows
