"""Short stories in a language of few texts, of which the tokenizer of the language models knows the letters only.

The stories have the grammar of `stories`, with one event each, under a bijective cipher of its words. The language has
ten letters, written with the ten tokens ``0`` to ``9``: a word begins with one of 0 to 4 and goes on with 5 to 9, so that
a text needs no spaces. Frequent words are shorter. Two things differ from English besides: the article *the* is a suffix
of its noun, and a colour stands behind its thing. Full stops, commas and ``<story>`` are those of English.

A prompt tells the story up to its event; the completion, the refrain and the way home, follows from it:
``oh my , what a kite red , said anna fox-the . then anna fox-the went home to forest-the . end-the`` in English words.
"""

from __future__ import annotations

import itertools
import random
from functools import lru_cache
from typing import Any

from stepmark.datasets.stories import ANIMALS, COLOURS, DAYS, HEROES, HOMES, PLACES, THINGS, VERBS

from stepmark.task import Dataset

DATASET = Dataset(
    id="bilingual",
    version=1,
    summary="Stories of one event in a second language that is spelled letter by letter, with completions that follow",
    licence="CC0-1.0",
    digests={
        "train": "4b8914ed9432dbd9069ee24a59aae68f5da1836393228551f99a5456fb9202c4",
        "test": "d5ecbded5d74a2ae7da655ab118e211fde20d9993c2c3885cb2066d2abd5adee",
    },
)
SIZES = {"train": 2_560, "test": 300}
FUNCTION_WORDS = ("in", "lives", "went", "to", "near", "a", "oh", "my", "what", "said", "then", "home", "end")
SUFFIX = "5 8"  # the article
UNTOUCHED = (".", ",", "<story>")


@lru_cache(maxsize=1)
def dictionary() -> dict[str, str]:
    """English word -> its letters: 2 of a word that every story has, 3 or 4 of the others."""
    phrases = itertools.chain(DAYS, HEROES, ANIMALS, HOMES, PLACES, VERBS, COLOURS, THINGS)
    content = list(dict.fromkeys(word for phrase in phrases for word in phrase.split() if word not in FUNCTION_WORDS))
    rng = random.Random("bilingual dictionary")
    spelled: dict[str, str] = {}
    for word in (*FUNCTION_WORDS, *content):
        letters = 1 if word in FUNCTION_WORDS else rng.choice((2, 3))
        while word not in spelled:
            found = " ".join([str(rng.randint(0, 4)), *(str(rng.randint(5, 9)) for _ in range(letters))])
            # A stem that another one or its suffixed form begins with would leave two readings.
            if not any(found.startswith(other) or other.startswith(found) for other in spelled.values()):
                spelled[word] = found
    return spelled


def translate(english: str) -> str:
    """The letters of an English text of the grammar, space-separated."""
    words, found = english.split(), []
    while words:
        word = words.pop(0)
        if word in COLOURS and words and words[0] in THINGS:
            found += [dictionary()[words.pop(0)], dictionary()[word]]
        elif word == "the":
            found.append(f"{dictionary()[words.pop(0)]} {SUFFIX}")
        else:
            found.append(word if word in UNTOUCHED else dictionary()[word])
    return " ".join(found)


def example(rng: random.Random) -> tuple[str, str]:
    """One (prompt, completion) in English words."""
    hero, animal, home = rng.choice(HEROES), rng.choice(ANIMALS), rng.choice(HOMES)
    day, place, verb = rng.choice(DAYS), rng.choice(PLACES), rng.choice(VERBS)
    found = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    prompt = f"{hero} the {animal} lives in the {home} . <story> {day} {hero} the {animal} went to the {place} . "
    prompt += f"near the {place} {hero} {verb} a {found} ."
    completion = f"oh my , what a {found} , said {hero} the {animal} . "
    return prompt, completion + f"then {hero} the {animal} went home to the {home} . the end"


def split(name: str) -> dict[str, Any]:
    """The split ``train`` or ``test``: lists ``prompt`` and ``target``, distinct prompts. KeyError for any other name."""
    rng, english = random.Random(f"bilingual {name}"), dict[str, str]()
    while len(english) < SIZES[name]:
        prompt, completion = example(rng)
        english[prompt] = completion
    return {"prompt": [translate(text) for text in english], "target": [translate(t) for t in english.values()]}
