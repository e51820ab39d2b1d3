"""The first 64 words of a short story, opening included, with the exact likelihood of the grammar.

Every story of `stories` (opening and completion) has more than 64 words, so that no text is padded. Choices are
uniform and copies are certain: hero, animal and home come back several times, colour and thing of an event once. Days
of two or three words and verbs of one or two shift what follows, so that where a copy stands hangs on the text.

`log_likelihood` marginalises over all choices exactly, also through a channel that replaces each word with some
probability by a uniform one: that gives texts outside the grammar a finite figure, the worse the more words are wrong.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from stepmark.datasets.stories import ANIMALS, COLOURS, DAYS, HEROES, HOMES, PLACES, THINGS, VERBS, story
from torch import Tensor

from stepmark.task import Dataset

DATASET = Dataset(
    id="stories64",
    version=1,
    summary="First 64 words of template stories, with the exact likelihood of their grammar",
    licence="CC0-1.0",
    digests={
        "train": "82038cc0bca2de7bac12433085a4a4c9cf6438f248100d66b91aacf927afb294",
        "test": "73b37a8c12e10e83077af6fe0c9da70fdcd2556b79eca3c83f9444f94b3119be",
    },
)
SIZES = {"train": 40_000, "test": 1_000}
LENGTH = 64
OPENING = 8  # words of the sentence that introduces hero, animal and home
MORE = 0.7  # probability of a third event
CHOICES: dict[str, tuple[str, ...]] = {
    "hero": HEROES,
    "animal": ANIMALS,
    "home": HOMES,
    "place": PLACES,
    "elsewhere": PLACES,
    "colour": COLOURS,
    "thing": THINGS,
}


def _by_length(phrases: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
    lengths = sorted({len(phrase.split()) for phrase in phrases})
    return {n: tuple(phrase for phrase in phrases if len(phrase.split()) == n) for n in lengths}


# A slot is one word of a text: (name of a choice, which word of the chosen phrase), or ("", the word itself).
Slot = tuple[str, int | str]
# (log probability, the 64 slots, phrases by name of the choice)
Skeleton = tuple[float, tuple[Slot, ...], dict[str, tuple[str, ...]]]


@lru_cache(maxsize=1)
def skeletons() -> tuple[Skeleton, ...]:
    """Every way in which the lengths of phrases and the number of events can fall; within one, choices are independent."""
    return tuple(_skeletons())


def _skeletons() -> Iterator[Skeleton]:
    days, verbs = _by_length(DAYS), _by_length(VERBS)
    for day, first, second, third in itertools.product(days, verbs, verbs, (True, False)):
        text = "[hero] the [animal] lives in the [home] ."
        text += " [day]" * day + " [hero] the [animal] went to the [place] ."
        for number, verb in enumerate((first, second)):
            where = "near the [place]" if number == 0 else "behind the [elsewhere]"
            text += f" {where} [hero]" + f" [verb{number}]" * verb + f" a [colour{number}] [thing{number}] ."
            text += f" oh my , what a [colour{number}] [thing{number}] , said [hero] the [animal] ."
        text += " behind the" if third else " then [hero]"
        phrases = {"day": days[day], "verb0": verbs[first], "verb1": verbs[second]}
        probability = math.prod(
            len(phrases[n]) / len(a) for n, a in (("day", DAYS), ("verb0", VERBS), ("verb1", VERBS))
        )
        slots: list[Slot] = []
        before: dict[str, int] = {}
        for word in text.split()[:LENGTH]:
            name = word.strip("[]")
            if name == word:
                slots.append(("", word))
                continue
            if name not in phrases:
                phrases[name] = CHOICES[name.rstrip("01")]
            part = before[name] = before.get(name, -1) + 1
            slots.append((name, part if len(phrases[name][0].split()) > 1 else 0))
        yield math.log(probability * (MORE if third else 1 - MORE)), tuple(slots), phrases


def log_likelihood(ids: Tensor, vocabulary: Sequence[str], noise: float = 0.0) -> Tensor:
    """Exact log probability, float64 [B], of texts of token ids [B, 64]; -inf for what cannot be written.

    Args:
        noise: probability with which each word of a story is replaced by one drawn uniformly from `vocabulary`.
    """
    number = {word: i for i, word in enumerate(vocabulary)}
    ids = ids.cpu()
    right = torch.tensor(1 - noise + noise / len(vocabulary), dtype=torch.float64).log()
    wrong = torch.tensor(noise / len(vocabulary), dtype=torch.float64).log()

    def channel(matches: Tensor, total: int) -> Tensor:
        misses = total - matches
        # 0 x -inf is 0 here: no word is wrong, whatever a wrong word would cost.
        return matches * right + torch.where(misses > 0, misses * wrong, torch.zeros((), dtype=torch.float64))

    ways = []
    for log_probability, slots, phrases in skeletons():
        fixed = [(i, number[str(word)]) for i, (name, word) in enumerate(slots) if not name]
        where, words = (torch.tensor(column) for column in zip(*fixed, strict=True))
        total = log_probability + channel((ids[:, where] == words).sum(1).double(), len(fixed))
        for name, values in phrases.items():
            own = [(i, int(part)) for i, (other, part) in enumerate(slots) if other == name]
            places = torch.tensor([i for i, _ in own])
            wanted = torch.tensor([[number[value.split()[part]] for _, part in own] for value in values])
            matches = (ids[:, None, places] == wanted).sum(2).double()
            total = total + channel(matches, len(own)).logsumexp(1) - math.log(len(values))
        ways.append(total)
    return torch.stack(ways).logsumexp(0)


def entropy() -> float:
    """Exact entropy of a text in nats: the least that any model can need on average."""
    visible: dict[tuple[Slot, ...], float] = {}
    within: dict[tuple[Slot, ...], float] = {}
    for log_probability, slots, phrases in skeletons():
        visible[slots] = visible.get(slots, 0.0) + math.exp(log_probability)
        within[slots] = sum(math.log(len(values)) for values in phrases.values())
    return sum(p * (within[slots] - math.log(p)) for slots, p in visible.items())


def split(name: str) -> dict[str, Any]:
    """Texts of the split ``train`` or ``test``: ``text``, a list of strings of 64 words. KeyError for any other name."""
    rng, texts = random.Random(f"stories64 {name}"), []
    for _ in range(SIZES[name]):
        opening, rest = story(rng)
        texts.append(" ".join(f"{opening} {rest}".split()[:LENGTH]))
    return {"text": texts}
