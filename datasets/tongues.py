"""Texts in sixteen made-up tongues of the same words: what may follow a word hangs on the tongue, and must be learnt by heart.

The first word of a text names its tongue. Then words follow each other in a Markov chain: in every tongue each of 60 words
has four successors of its own, drawn at random when the tongue was made up, with probabilities .4, .3, .2 and .1. There is
no rule behind the 16 x 60 rows, so that a model must hold them, and what it knows grows with its parameters. `following`
gives the row, the distribution that no model can do better than.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

from stepmark.datasets.hops import PEOPLE
from stepmark.datasets.stories import COLOURS, HEROES

from stepmark.task import Dataset

DATASET = Dataset(
    id="tongues",
    version=1,
    summary="Sixteen random Markov chains over the same sixty words, each text of one of them",
    licence="CC0-1.0",
    digests={
        "train": "6540961fac00959d5d523eac60ddd751aa0722848c01d6d71e31ce034165e1fa",
        "test": "486f56ae18268064bcd44d86e76e22479b1088961bc649e22796558dd2ca58c2",
    },
)
SIZES = {"train": 25_600, "test": 1_000}
LENGTH = 24  # words of a text, the name of its tongue included
TONGUES, WORDS = (*HEROES, *COLOURS), PEOPLE
SHARES = (0.4, 0.3, 0.2, 0.1)  # of the successors of a word


@lru_cache(maxsize=1)
def rows() -> dict[tuple[str, str], tuple[str, ...]]:
    """(tongue, word) -> its successors, the likeliest first."""
    rng = random.Random("tongues rows")
    return {(tongue, word): tuple(rng.sample(WORDS, len(SHARES))) for tongue in TONGUES for word in WORDS}


def following(tongue: str, word: str) -> dict[str, float]:
    """What may come after a word, with its probability."""
    return dict(zip(rows()[tongue, word], SHARES, strict=True))


def split(name: str) -> dict[str, Any]:
    """The split ``train`` or ``test``: a list ``text`` of space-separated words. KeyError for any other name."""
    size, rng, table = SIZES[name], random.Random(f"tongues {name}"), rows()
    texts = []
    for _ in range(size):
        words = [rng.choice(TONGUES), rng.choice(WORDS)]
        for rank in rng.choices(range(len(SHARES)), SHARES, k=LENGTH - 2):
            words.append(table[words[0], words[-1]][rank])
        texts.append(" ".join(words))
    return {"text": texts}
