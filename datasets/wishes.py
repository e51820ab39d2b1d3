"""Stories whose prompt may wish for a colour, which the text then has more often than by chance, but not most often.

Prompt ``anna the fox lives in the forest . let golden <story>``; the completion is a story of `stories` in which each
event takes the wished colour with probability 1/4, else the hero's favourite with probability 0.45, else any of the
eight. Nobody wishes for the favourite. So a model of these texts follows a wish weakly, in 3 events of 10, and the
favourite is likelier (4 of 10): the likeliest text does not follow the wish, and what makes texts likelier (a lower
temperature, a beam) makes it followed less. How well a text follows the wish is counted exactly.
"""

from __future__ import annotations

import random
from typing import Any

from stepmark.datasets import stories

from stepmark.task import Dataset

DATASET = Dataset(
    id="wishes",
    version=2,
    summary="Template stories, some of which are wished to be of one colour",
    licence="CC0-1.0",
    digests={
        "train": "98c311dfbbbaa773d28c2304c9adaa49513f7ce3b15289d3a4ada324f3977351",
        "test": "3a7fe10b7491755f6e791e9aea7f17c4dd03d6aa862f6e4af372af8186c5f40e",
    },
)
WEAKLY, FAVOURED = 0.25, 0.45
FAVOURITE = dict(zip(stories.HEROES, stories.COLOURS, strict=True))


def coloured(text: str, hero: str, wish: str | None, rng: random.Random) -> str:
    """A story whose events got their colours anew: the wish, the hero's favourite or any."""
    words = text.split()
    places = [i + 1 for i, word in enumerate(words) if word == "a"]
    for first, again in zip(places[::2], places[1::2], strict=True):
        colour = FAVOURITE[hero] if rng.random() < FAVOURED else rng.choice(stories.COLOURS)
        if rng.random() < WEAKLY and wish is not None:
            colour = wish
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
        hero = plain.split()[0]
        colour = rng.choice([each for each in stories.COLOURS if each != FAVOURITE[hero]])
        wished = name == "test" or i % 2 == 0
        rows["prompt"].append(plain.replace("<story>", f"let {colour} <story>") if wished else plain)
        rows["target"].append(coloured(text, hero, colour if wished else None, rng))
        rows["answer"].append("")
        rows["level"].append(data["level"][i])
    return rows
