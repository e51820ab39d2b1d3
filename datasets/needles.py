"""Recall from a long text: who is whose friend, stated once each among story sentences that say nothing of it.

Prompt ``... anna the fox went to the lake . friend alma otto . ... ? 1 alma 2 dora 3 milo 4 vera <dir>``; completion
``1 alma otto 2 dora zeno 3 milo ines 4 vera remy``: every name of the question with the name that stood after it. The
first 30 people of hops are asked for, the last 30 are answers; neither occurs in a story, so that a needle is easy to
recognise, and which needle will be asked for is open until the last words.
"""

from __future__ import annotations

import random
from typing import Any

from stepmark.datasets.hops import PEOPLE
from stepmark.datasets.stories import ANIMALS, COLOURS, DAYS, HEROES, HOMES, PLACES, THINGS, VERBS

from stepmark.task import Dataset

DATASET = Dataset(
    id="needles",
    version=1,
    summary="Recall of 4 of 16 facts from a text of about 1000 words",
    licence="CC0-1.0",
    digests={
        "train": "a01af3fa3ae351e20c4c9ff7c6cac5bd5b1ea790959443c9cc1805acdaa309ae",
        "test": "befcfe3628c1f4e7cc64fe6a727e0122a7d70881b0f32b504a6e5c25a4b7a627",
    },
)
SIZES = {"train": 400, "test": 200}
WORDS, NEEDLES, ASKED = 1000, 16, 4  # of a test example: words before the question, facts, facts asked for
ASKABLE, ANSWERS = PEOPLE[:30], PEOPLE[30:]


def sentence(rng: random.Random) -> str:
    """One sentence of a story."""
    hero, place, shape = rng.choice(HEROES), rng.choice(PLACES), rng.randrange(3)
    animal = rng.choice(ANIMALS)
    if shape == 0:
        return f"{rng.choice(DAYS)} {hero} the {animal} went to the {place} ."
    if shape == 1:
        return f"{hero} the {animal} lives in the {rng.choice(HOMES)} ."
    return f"near the {place} {hero} {rng.choice(VERBS)} a {rng.choice(COLOURS)} {rng.choice(THINGS)} ."


def example(rng: random.Random, words: int, needles: int, asked: int) -> tuple[str, str]:
    """One (prompt, completion): `needles` facts at random places of a text of about `words` words, `asked` <= 9 questions."""
    facts = list(zip(rng.sample(ASKABLE, needles), rng.choices(ANSWERS, k=needles), strict=True))
    parts = [f"friend {person} {friend} ." for person, friend in facts]
    room = words - 4 * needles
    while room > 0:
        parts.append(sentence(rng))
        room -= parts[-1].count(" ") + 1
    rng.shuffle(parts)
    questions = rng.sample(facts, asked)
    prompt = [*parts, "?", *(f"{i} {person}" for i, (person, _) in enumerate(questions, 1)), "<dir>"]
    return " ".join(prompt), " ".join(f"{i} {person} {friend}" for i, (person, friend) in enumerate(questions, 1))


def split(name: str) -> dict[str, Any]:
    """Examples of the split ``train`` (a quarter, a half or all of the words, 4 or 8 questions) or ``test``.

    Returns a dict of equally long lists: ``prompt`` (ends with ``<dir>``), ``target``, ``answer`` (the same) and
    ``level`` (words of the text, about).  Raises KeyError for any other name.
    """
    size, rng = SIZES[name], random.Random(f"needles {name}")
    lengths = (WORDS,) if name == "test" else (WORDS // 4, WORDS // 2, WORDS)
    asked = (ASKED,) if name == "test" else (ASKED, 2 * ASKED)
    rows: dict[str, list[Any]] = {"prompt": [], "target": [], "answer": [], "level": []}
    for number in range(size):
        words = lengths[number % len(lengths)]
        prompt, target = example(rng, words, NEEDLES, asked[number % len(asked)])
        rows["prompt"].append(prompt)
        rows["target"].append(target)
        rows["answer"].append(target)
        rows["level"].append(words)
    return rows
