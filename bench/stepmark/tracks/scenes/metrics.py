"""What is counted with the eye: whether pictures show what their captions say, and how much varies that captions leave free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from stepmark.tracks.scenes.captions import ATTRIBUTES, BACKGROUNDS, RELATIONS, REVERSE, Caption, Thing
from stepmark.tracks.scenes.drawing import APART, HIDES, Scenes, related
from stepmark.tracks.scenes.parser import Reading

PARTS = (*ATTRIBUTES, "lower")  # what a caption can say of an object
FRONT = RELATIONS.index("in front of")

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def wanted(things: Sequence[Sequence[Thing]]) -> Integers:
    """What captions say of their objects, int64 [n, most, 6] in the order of PARTS; -1 where nothing is said."""
    most = max((len(each) for each in things), default=0)
    found = np.full((len(things), most, len(PARTS)), -1)
    for i, each in enumerate(things):
        for j, thing in enumerate(each):
            for name, value in thing.named().items():
                found[i, j, PARTS.index(name)] = value
    return found


def seen(scenes: Scenes) -> Integers:
    """The same of scenes, int64 [n, k, 6]; -1 where there is no object."""
    return np.stack([scenes.attribute(name) for name in PARTS], 2)


def relations(scenes: Scenes, first: Integers, second: Integers, strict: bool = True) -> NDArray[np.bool_]:
    """Which of RELATIONS objects of those numbers [n] have to each other in each scene, [n, 6].

    strict: as captions are written; else half as far apart, or half as much hidden, will do, as when a picture is judged.
    """
    swap = first > second  # `related` wants the one in front first
    ends = np.stack([np.where(swap, second, first), np.where(swap, first, second)], 1)
    pair = Scenes(
        **{
            name: value if name == "background" else value[np.arange(len(scenes))[:, None], ends]
            for name, value in vars(scenes).items()
        }
    )
    found = related(pair, *(limit if strict else limit / 2 for limit in (APART, HIDES)))
    return np.where(swap[:, None], found[:, REVERSE], found)


def caption_accuracy(captions: Sequence[Caption], reading: Reading) -> dict[str, Floats]:
    """How much of its caption each of n pictures shows, float64 [n] by name; nan where the caption does not say it.

    ``shape`` ``colour`` ``size`` ``texture`` ``place`` ``lower``: share of the objects named with one that have it. The
    objects of a caption are assigned to those that were read so that most is right; an object that is not sure has nothing
    right. ``count``: there are as many objects as the caption names. ``relation`` ``background``. ``absent``: the picture is
    legible and nothing in it fits what must not be there. ``whole``: the picture is legible and everything is right.
    """
    n, most = reading.sure.shape
    says = wanted([caption.objects for caption in captions])
    k = says.shape[1]
    named = says >= 0
    right = (says[:, :, None] == seen(reading.scenes)[:, None]) & named[:, :, None] & reading.sure[:, None, :, None]
    relation = np.array([-1 if caption.relation is None else caption.relation for caption in captions])
    pairs = _pairs(reading, relation, most)
    ways = np.array(list(permutations(range(most), k)))  # [ways, k]
    each = np.arange(k)
    scores = np.stack([right[:, each, way].sum((1, 2)) + 0.5 * _held(pairs, way) for way in ways], 1)
    way = ways[scores.argmax(1)]  # [n, k]
    rows = np.arange(n)
    right = right[rows[:, None], each, way]  # [n, k, 6]
    found: dict[str, Floats] = {}
    for i, name in enumerate(PARTS):
        number = named[:, :, i].sum(1)
        found[name] = np.where(number > 0, right[:, :, i].sum(1) / np.maximum(number, 1), np.nan)
    objects = np.array([len(caption.objects) for caption in captions])
    found["count"] = np.where(objects > 0, reading.scenes.there.sum(1) == objects, np.nan)
    held = pairs[rows, way[:, 0], way[:, 1]] if k > 1 else np.zeros(n, bool)
    found["relation"] = np.where(relation >= 0, held, np.nan)
    background = np.array([-1 if caption.background is None else caption.background for caption in captions])
    found["background"] = np.where(background >= 0, reading.scenes.background == background, np.nan)
    found["absent"] = _absent(captions, reading)
    said = np.stack(list(found.values()))
    found["whole"] = (np.where(np.isnan(said), 1, said) == 1).all(0) * reading.legible.astype(np.float64)
    return found


def _pairs(reading: Reading, relation: Integers, most: int) -> NDArray[np.bool_]:
    """Whether the relation that is asked for holds between any two objects that are sure, [n, most, most]."""
    found = np.zeros((len(relation), most, most), bool)
    asked = np.flatnonzero(relation >= 0)
    scenes, sure = reading.scenes[asked], reading.sure[asked]
    for one, two in permutations(range(most), 2):
        ends = (np.full(len(asked), end) for end in (one, two))
        held = relations(scenes, *ends, strict=False)[np.arange(len(asked)), relation[asked]]
        found[asked, one, two] = held & sure[:, one] & sure[:, two]
    return found


def _held(pairs: NDArray[np.bool_], way: Integers) -> NDArray[np.bool_]:
    return pairs[:, way[0], way[1]] if len(way) > 1 else np.zeros(len(pairs), bool)


def _absent(captions: Sequence[Caption], reading: Reading) -> Floats:
    says = wanted([() if caption.absent is None else (caption.absent,) for caption in captions])
    if not says.shape[1]:
        return np.full(len(captions), np.nan)
    fits = ((says == seen(reading.scenes)) | (says < 0)).all(2) & reading.scenes.there
    asked = (says >= 0).any((1, 2))
    return np.where(asked, reading.legible & ~fits.any(1), np.nan)


def entropy(values: Integers, kinds: int) -> float:
    """Entropy in bits of whole numbers 0 .. kinds - 1, corrected for how few they are (Miller 1955), at most log2 kinds."""
    counts = np.bincount(values, minlength=kinds)
    share = counts[counts > 0] / max(len(values), 1)
    plain = -(share * np.log2(share)).sum()
    return float(min(plain + max(len(share) - 1, 0) / (2 * max(len(values), 1) * math.log(2)), math.log2(kinds)))


def diversity(reading: Reading, group: Integers) -> dict[str, float]:
    """How much varies among pictures of one caption: entropy of what is read, as a share of the most it can be.

    group int64 [n]: which caption a picture is of. The mean over captions, of the attributes of the objects that are sure and
    of the ``background`` of legible pictures; what a caption names has no entropy in pictures that show it.
    """
    found = {}
    for name, words in {**ATTRIBUTES, "background": BACKGROUNDS}.items():
        background = name == "background"
        values = reading.scenes.background[:, None] if background else reading.scenes.attribute(name)
        good = (reading.legible[:, None] if background else reading.sure) & (values >= 0) & (values < len(words))
        each = [entropy(values[group == g][good[group == g]], len(words)) for g in np.unique(group)]
        found[name] = float(np.mean(each)) / math.log2(len(words))
    return found
