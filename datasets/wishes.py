"""Stories whose prompt may wish for a colour, which the text then has a little more often than by chance.

Prompt ``anna the fox lives in the forest . let golden <story>``; the completion is a story of `stories` in which each
event takes the wished colour with probability 1/4, else any of the eight. So a model of these texts follows a wish
weakly: 11 events in 32 have its colour, against 4 in 32 without. How well a text follows the wish is counted exactly.
"""

from __future__ import annotations

import random
from typing import Any

from stepmark.datasets import stories

from stepmark.task import Dataset

DATASET = Dataset(
    id="wishes",
    version=1,
    summary="Template stories, some of which are wished to be of one colour",
    licence="CC0-1.0",
    digests={
        "train": "818e905a2c66d3e359e75b697db4828b8acbc140b331955a51b734c556547a27",
        "test": "72be5c80590e0b8477b3ed9c0b09d2199e10fb3b21cfcf5e9eb6fe53d2b283a8",
    },
)
WEAKLY = 0.25


def coloured(text: str, colour: str, rng: random.Random) -> str:
    """A story in which every event has become of this colour with probability `WEAKLY`."""
    words = text.split()
    places = [i + 1 for i, word in enumerate(words) if word == "a"]
    for first, again in zip(places[::2], places[1::2], strict=True):
        if rng.random() < WEAKLY:
            words[first] = words[again] = colour
    return " ".join(words)


def split(name: str) -> dict[str, Any]:
    """Stories of the split ``train`` or ``test``. Every test prompt has a wish, every other one of the train split.

    Returns a dict of equally long lists: ``prompt`` (with the wish), ``plain`` (without it), ``target``, ``answer``
    (empty) and ``level`` (number of events). Raises KeyError for any other name.
    """
    data, rng = stories.split(name), random.Random(f"wishes {name}")
    rows: dict[str, list[Any]] = {"prompt": [], "plain": data["prompt"], "target": [], "answer": [], "level": []}
    for i, (plain, text) in enumerate(zip(data["prompt"], data["target"], strict=True)):
        colour = rng.choice(stories.COLOURS)
        wished = name == "test" or i % 2 == 0
        rows["prompt"].append(plain.replace("<story>", f"let {colour} <story>") if wished else plain)
        rows["target"].append(coloured(text, colour, rng) if wished else text)
        rows["answer"].append("")
        rows["level"].append(data["level"][i])
    return rows
