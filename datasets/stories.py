"""Short stories with a refrain, drawn from a small grammar whose later sentences copy words of the earlier ones.

Prompt ``anna the fox lives in the forest . <story>``; the completion opens, tells 2 or 3 events, each followed by
the refrain ``oh my , what a red kite , said anna the fox .``, and closes.  Choices are free (adjective, object,
verb, place), copies are not, so the text has uncertain and certain stretches: what speculation feeds on.
`valid` decides whether a text belongs to the grammar.
"""

from __future__ import annotations

import random
import re
import zlib
from typing import Any

from stepmark.task import Dataset

DATASET = Dataset(
    id="stories",
    version=1,
    summary="Template stories with a refrain, from a small grammar",
    licence="CC0-1.0",
    digests={
        "train": "a96ed7334660e453bbaeefcafbd2700513dac091582451ffb519635694100f07",
        "test": "cb528ae8345dd51a3097becb4699f457d617d7eba8932fd42a9e4fa6d3b75a39",
    },
)
SIZES = {"train": 16_000, "test": 500}
HEROES = ("tom", "anna", "ben", "sue", "max", "lily", "sam", "rosa")
ANIMALS = ("fox", "bear", "cat", "dog", "owl", "mouse", "frog", "duck", "goat", "hare")
HOMES = ("forest", "valley", "village", "castle", "barn", "cave")
PLACES = ("river", "market", "hill", "lake", "garden", "beach", "bridge", "tower")
COLOURS = ("red", "blue", "green", "golden", "silver", "tiny", "old", "shiny")
THINGS = ("kite", "drum", "boat", "hat", "key", "lamp", "bell", "ring", "book", "ball")
DAYS = ("one day", "early one morning", "late one evening")
VERBS = ("saw", "found", "met with", "dreamt of", "tripped over")
_PROMPT = "{hero} the {animal} lives in the {home} ."


def _refrain(colour: str, thing: str, hero: str, animal: str) -> str:
    return f"oh my , what a {colour} {thing} , said {hero} the {animal} ."


def story(rng: random.Random) -> tuple[str, str]:
    """One (opening, completion)."""
    hero, animal, home = rng.choice(HEROES), rng.choice(ANIMALS), rng.choice(HOMES)
    place = rng.choice(PLACES)
    parts = [f"{rng.choice(DAYS)} {hero} the {animal} went to the {place} ."]
    for event in range(3 if rng.random() < 0.7 else 2):
        colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
        where = f"near the {place}" if event == 0 else f"behind the {rng.choice(PLACES)}"
        parts.append(f"{where} {hero} {rng.choice(VERBS)} a {colour} {thing} .")
        parts.append(_refrain(colour, thing, hero, animal))
    parts.append(f"then {hero} the {animal} went home to the {home} . the end")
    return _PROMPT.format(hero=hero, animal=animal, home=home), " ".join(parts)


def valid(prompt: str, text: str) -> bool:
    """Whether `text` (without the end-of-sequence token) is a complete story of the grammar for `prompt`.

    Both are space-separated words; `prompt` may still carry its closing ``<story>``.
    """
    names = re.fullmatch(r"(\w+) the (\w+) lives in the (\w+) \.(?: <story>)?", prompt)
    if names is None:
        return False
    hero, animal, home = names.groups()

    def one_of(choices: tuple[str, ...], group: str = "") -> str:
        return f"(?{f'P<{group}>' if group else ':'}{'|'.join(choices)})"

    events = ""
    for number in range(3):
        where = r"near the (?P=place)" if number == 0 else f"behind the {one_of(PLACES)}"
        event = (
            f"{where} {hero} {one_of(VERBS)} a {one_of(COLOURS, f'colour{number}')} {one_of(THINGS, f'thing{number}')}"
            rf" \. oh my , what a (?P=colour{number}) (?P=thing{number}) , said {hero} the {animal} \. "
        )
        events += event if number < 2 else f"(?:{event})?"
    pattern = (
        rf"{one_of(DAYS)} {hero} the {animal} went to the {one_of(PLACES, 'place')} \. {events}"
        rf"then {hero} the {animal} went home to the {home} \. the end"
    )
    return re.fullmatch(pattern, text) is not None


def split(name: str) -> dict[str, Any]:
    """Stories of the split ``train`` or ``test``; one opening in ten is kept for the test.

    Returns a dict of equally long lists: ``prompt`` (ends with ``<story>``), ``target``, ``answer`` (empty) and
    ``level`` (number of events).  Raises KeyError for any other name.
    """
    size, rng = SIZES[name], random.Random(f"stories {name}")
    rows: dict[str, list[Any]] = {"prompt": [], "target": [], "answer": [], "level": []}
    while len(rows["prompt"]) < size:
        opening, text = story(rng)
        if (zlib.crc32(opening.encode()) % 10 == 0) != (name == "test"):
            continue
        rows["prompt"].append(opening + " <story>")
        rows["target"].append(text)
        rows["answer"].append("")
        rows["level"].append(text.count("oh my"))
    return rows
