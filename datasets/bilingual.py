"""Short stories in a language of few texts, whose long words the tokenizer of the language models splits in stems.

The stories have the grammar of `stories`, with one event each. The language is agglutinative: a word is one or two stems
and what they are in the sentence, and the stems are words that the model knows, as those of a related language are in part.
``anna fox 0`` is *anna the fox* who does something, ``anna fox 1`` the one who speaks or sees, ``kite red 2 found`` *found a
red kite*, ``kite red 3 what`` *what a red kite*, ``river to went`` *went to the river*, ``river near`` *near the river*.
So a colour stands behind its thing, and behind a noun all that English has in front of it. Words are many and each is
rare: 80 pairs of stems for who, 80 for what, in two cases each.

A prompt tells the story up to its event; the completion, the refrain and the way home, follows from it, but what was found
stands in another case there: who reads such a word as one thing must have met its other case to know it.
"""

from __future__ import annotations

import random
from typing import Any

from stepmark.datasets.stories import ANIMALS, COLOURS, DAYS, HEROES, HOMES, PLACES, THINGS, VERBS

from stepmark.task import Dataset

DATASET = Dataset(
    id="bilingual",
    version=2,
    summary="Stories of one event in an agglutinative language whose stems are known words, with completions that follow",
    licence="CC0-1.0",
    digests={
        "train": "6fc50c153dc07acf3257fd86040b0f9da61c7d65f655c3e388157dba235ace9c",
        "test": "d0cfb40d2dbbbd2c101617ef9eb169a9bbc4c72b3f04aa6881e45f00cbe7e701",
    },
)
SIZES = {"train": 2_560, "test": 300}
STEMS = frozenset((*HEROES, *ANIMALS, *HOMES, *PLACES, *COLOURS, *THINGS))
ALONE = frozenset((".", ",", "<story>", "<eos>"))  # what no word goes on with


def example(rng: random.Random) -> tuple[str, str]:
    """One (prompt, completion)."""
    who, home = f"{rng.choice(HEROES)} {rng.choice(ANIMALS)}", rng.choice(HOMES)
    day, place, verb = rng.choice(DAYS), rng.choice(PLACES), rng.choice(VERBS)
    found = f"{rng.choice(THINGS)} {rng.choice(COLOURS)}"
    prompt = f"{who} 0 {home} in lives . <story> {day} {who} 0 {place} to went . "
    prompt += f"{place} near {who} 1 {found} 2 {verb} ."
    return prompt, f"oh my , {found} 3 what , {who} 1 said . then {who} 0 {home} to went . end"


def split(name: str) -> dict[str, Any]:
    """The split ``train`` or ``test``: lists ``prompt`` and ``target``, distinct prompts. KeyError for any other name."""
    size, rng, rows = SIZES[name], random.Random(f"bilingual {name}"), dict[str, str]()
    while len(rows) < size:
        prompt, completion = example(rng)
        rows[prompt] = completion
    return {"prompt": list(rows), "target": list(rows.values())}
