"""Captioned scenes of one to three objects, 32x32 RGB, with everything about them known exactly.

An object has one of six shapes, eight colours, three sizes, three textures and nine places (a third of the height and of
the width each); the first of a scene lies in front of the others. The background is one of five greys from black to white
or of three dark colours, so that the brightness of a picture is free where a caption does not name it. All attributes are
equally likely; the objects of a scene differ in colour and in place, and at least 0.6 of each is seen.

Sizes vary by 5 % and positions by 2.5 pixels, so that two pictures of a full caption differ. They are drawn, and their
masks, layouts, depths and edges given, by `stepmark.tracks.scenes.drawing`.

``x0`` is float32 [N, 3, 32, 32] in [-1, 1]; ``text`` are the captions (`stepmark.tracks.scenes.captions`), ``tokens``
their ids int64 [N, 32]; ``objects`` int64 [N, 3, 5] (shape, colour, size, texture, place; -1: no such object) and
``background`` int64 [N] are the whole truth, whatever the caption leaves out, and ``geometry`` float32 [N, 3, 3] (row and
column of the centre of mass, radius; pixels) is what else it takes to draw the picture again (`scenes_of`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stepmark.task import Dataset
from stepmark.tracks.scenes.captions import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    Caption,
    Thing,
    swapped,
    tokens,
    write,
)
from stepmark.tracks.scenes.drawing import (
    RADII,
    SIZE,
    USUAL,
    Array,
    Integers,
    Look,
    Scenes,
    area,
    masks,
    related,
    render,
)

DATASET = Dataset(
    id="scenes32",
    version=1,
    summary="32x32 RGB scenes of one to three objects with captions, masks, layouts, depth and edges, from a seed",
    licence="Apache-2.0",
    digests={
        "train": "496dead9bf1652b4756038339304903daeade812ab741a3e648a5f1d2b019fe2",
        "test": "005cd18847479f048d728ce934751b3214e8085b8119c9eff21177c202b8483c",
        "one": "7a1d1793a51b6f069367d0462aa9da38ffe53b18b621a36e80d53b300fb5c9bf",
        "two": "c48af000f4bfd5823b7a19234d077219ea642e930d72f1f19bd2d68acff27ca3",
        "three": "fc98b79ad01fdb8e8f6fbe3b936c1707433626e3a3e115c2d51477a3192ba2b2",
        "free": "121931700851ffd1406d16b773373cd0c942362dd55a7b7bc8c598945652a97c",
        "negative": "9c925f6dd24843db909ad669cc57e005610c56266a9cf1a355b53fb8c7dea74f",
        "protected": "15727016b3edf559bcbfe2d7fa015181956a81a7f7cd00a02cd1bd0ec0bd79ea",
    },
)
MOST = 3  # objects of a scene
MIDDLES = (9.0, 16.0, 23.0)  # pixels: of the thirds of the picture
WANDER = 2.5  # pixels: how far from the middle of its place an object may lie
SEEN = 0.6  # least share of an object that no other hides
COUNTS = {"train": 20_000, "test": 2_000, "one": 1_000, "two": 1_000, "three": 500, "free": 1_000, "negative": 1_000}
COUNTS |= {"protected": 64}
FREE = 50  # captions of the split of that name
PROTECTED = Caption((Thing(5, 3, 2, 1, 3), Thing(4, 2, 1, 0, 4)), background=7)  # of the split of that name
SEEDS = {name: 320 + i for i, name in enumerate(COUNTS)}


def between(rng: np.random.Generator, low: Array | float, high: Array | float, *shape: int) -> Array:
    """Numbers of that shape between two others, in multiples of 1/1024: exact in single precision."""
    return (np.floor((low + (np.asarray(high) - low) * rng.random(shape)) * 1024) / 1024).astype(np.float32)


# How far a shape of radius 1 extends up, down and sideways from its centre of mass.
EXTENT = np.array(
    [[1.128, 1.128, 1.128], [1, 1, 1], [1.886, 0.943, 1.415], [1.302, 1.302, 1.302], [1.352, 1.352, 1.352], [1.739, 1.407, 1.71]]
)  # fmt: skip


def settle(place: Integers, shape: Integers, radius: Array, rng: np.random.Generator) -> Array:
    """Centres of mass float32 [..., 2] in the places, near their middles and with the whole of the object in the picture."""
    middle = np.stack([np.take(MIDDLES, place // 3), np.take(MIDDLES, place % 3)], -1)
    up, down, aside = np.moveaxis(EXTENT[shape], -1, 0) * radius
    low = np.maximum(middle - WANDER, np.stack([up, aside], -1))
    high = np.minimum(middle + WANDER, SIZE - np.stack([down, aside], -1))
    return between(rng, low, np.maximum(low, high), *middle.shape)


def draw(count: Integers, rng: np.random.Generator, **fixed: Integers) -> Scenes:
    """Scenes with so many objects each, count [n], attributes uniform but for those given: `shape`, `colour`, `size`,
    `texture`, `place` int64 [n, 3] or `background` [n], where -1 leaves one free.

    Scenes that hide too much of an object are drawn again.
    """
    scenes = _draw(count, rng, fixed)
    whole = np.where(scenes.there, 4 * scenes.radius**2, 0)
    crowded = (area(masks(scenes)) < np.float32(SEEN) * whole).any(1)
    if crowded.any():
        again = draw(count[crowded], rng, **{name: value[crowded] for name, value in fixed.items()})
        for name, value in vars(scenes).items():
            value[crowded] = getattr(again, name)
    return scenes


def apart(kinds: int, fixed: Integers | None, n: int, rng: np.random.Generator) -> Integers:
    """Three different ones of so many kinds, int64 [n, 3]; those that `fixed` [n, 3] names stay."""
    order = rng.random((n, kinds)).argsort(1, kind="stable")
    if fixed is None:
        return order[:, :MOST]
    taken = (order[:, :, None] == fixed[:, None]).any(2)
    order = np.take_along_axis(order, taken.argsort(1, kind="stable"), 1)[:, :MOST]
    return np.where(fixed >= 0, fixed, order)


def _draw(count: Integers, rng: np.random.Generator, fixed: dict[str, Integers]) -> Scenes:
    n = len(count)

    def chosen(name: str, kinds: int, *shape: int) -> Integers:
        drawn = rng.integers(0, kinds, (n, *shape))
        return np.where(fixed[name] >= 0, fixed[name], drawn) if name in fixed else drawn

    shape, size, texture = (chosen(name, len(ATTRIBUTES[name]), MOST) for name in ("shape", "size", "texture"))
    colour = apart(len(COLOURS), fixed.get("colour"), n, rng)
    place = apart(len(PLACES), fixed.get("place"), n, rng)
    radius = (np.take(RADII, size) * between(rng, 0.95, 1.05, n, MOST)).astype(np.float32)
    at = settle(place, shape, radius, rng)
    shape = np.where(np.arange(MOST) < count[:, None], shape, -1)
    background = chosen("background", len(BACKGROUNDS))
    return Scenes(shape, colour, texture, np.full_like(shape, -1), at, radius, background)


def describe(scenes: Scenes) -> list[Caption]:
    """Full captions: all attributes of all objects, and which of the first two is in front where one hides the other."""
    attributes = np.stack([scenes.attribute(name) for name in ATTRIBUTES], 2)
    front = related(scenes)[:, RELATIONS.index("in front of")]
    found = []
    for i in range(len(scenes)):
        things = tuple(Thing(*values) for values in attributes[i].tolist() if values[0] >= 0)
        relation = RELATIONS.index("in front of") if front[i] else None
        found.append(Caption(things, relation, int(scenes.background[i])))
    return found


def loosen(caption: Caption, relations: NDArray[np.bool_], rng: np.random.Generator) -> Caption:
    """An under-specified caption of the same scene: every attribute is left out with probability a half (the shape, one in
    five), and where two objects are related, as `relations` [6] says, that may be named instead of their places.
    """
    holding = np.flatnonzero(relations)
    relation = int(holding[rng.integers(len(holding))]) if len(holding) and rng.random() < 0.6 else None
    things = []
    for i, thing in enumerate(caption.objects):
        kept = rng.random(5) < (0.8, 0.5, 0.5, 0.5, 0.5 if relation is None or i > 1 else 0.0)
        values = [getattr(thing, name) if keep else None for name, keep in zip(ATTRIBUTES, kept, strict=True)]
        things.append(Thing(*values))
    background = caption.background if rng.random() < 0.5 else None
    return Caption(tuple(things), relation, background)


def forbid(caption: Caption, truth: Caption, rng: np.random.Generator) -> Caption:
    """The caption with a clause of something that is not there and might well be: one of its objects with a colour, size or
    texture that the caption leaves open and the scene `truth` does not have. Where none is open, a colour of none of them.
    """
    i = int(rng.integers(len(caption.objects)))
    said, true = caption.objects[i], truth.objects[i]
    left = [name for name in ("colour", "size", "texture") if getattr(said, name) is None]
    name = left[int(rng.integers(len(left)))] if left else "colour"
    others = {getattr(thing, name) for thing in (truth.objects if name == "colour" else (true,))}
    values = [value for value in range(len(ATTRIBUTES[name])) if value not in others]
    absent = Thing(shape=said.shape, **{name: values[int(rng.integers(len(values)))]})
    if any(absent.named().items() <= thing.named().items() for thing in truth.objects):
        return forbid(caption, truth, rng)
    return replace(caption, absent=absent)


def scenes_of(data: Mapping[str, Any]) -> Scenes:
    """The scenes of a split, exactly as they were drawn."""
    shape, colour, _, texture, _ = np.moveaxis(data["objects"].numpy(), 2, 0)
    geometry = data["geometry"].numpy()
    lower = data["lower"].numpy() if "lower" in data else np.full_like(shape, -1)
    return Scenes(shape, colour, texture, lower, geometry[..., :2], geometry[..., 2], data["background"].numpy())


def packed(scenes: Scenes, captions: Sequence[Caption], look: Look = USUAL) -> dict[str, Any]:
    """Scenes and what is said of them in the form of a split, as at the top of this file."""
    text = [write(caption) for caption in captions]
    return {
        "x0": render(scenes, look),
        "text": text,
        "tokens": tokens(text),
        "objects": torch.from_numpy(np.stack([scenes.attribute(name) for name in ATTRIBUTES], 2)),
        "geometry": torch.from_numpy(np.concatenate([scenes.at, scenes.radius[..., None]], 2)),
        "background": torch.from_numpy(scenes.background),
    }


def captioned(scenes: Scenes, rng: np.random.Generator) -> list[Caption]:
    """Captions of all kinds: 45 % full, the others under-specified, and of these one in five or so with a clause of what is
    not there (none of three objects, which would be too long). Every other one names the second object first.
    """
    found, relations = [], related(scenes)
    for i, full in enumerate(describe(scenes)):
        kind = rng.random()
        caption = full if kind < 0.45 else loosen(full, relations[i], rng)
        caption = swapped(caption) if rng.random() < 0.5 else caption
        found.append(forbid(caption, full, rng) if kind > 0.9 and len(full.objects) < MOST else caption)
    return found


def protected(n: int, rng: np.random.Generator) -> Scenes:
    """n pictures of the one composition of `PROTECTED`, which differ as two pictures of one caption do."""
    fixed = {name: np.full((n, MOST), -1) for name in ATTRIBUTES}
    for i, thing in enumerate(PROTECTED.objects):
        for name, value in thing.named().items():
            fixed[name][:, i] = value
    background = np.full(n, PROTECTED.background)
    return draw(np.full(n, len(PROTECTED.objects)), rng, background=background, **fixed)


def split(name: str) -> dict[str, Any]:
    """A split as at the top of this file. Raises KeyError for another name.

    ``train`` (20 000) and ``test`` (2 000): one, two or three objects (40, 40 and 20 %), captions of all kinds.
    ``one``, ``two`` (1 000 each) and ``three`` (500): so many objects, full captions.
    ``free``: 50 captions that name the shape and the colour of one object, with 20 pictures each that differ in all else;
    ``group`` int64 [1000] is the number of the caption.
    ``negative`` (1 000): one or two objects, under-specified captions with a clause of what must not be there.
    ``protected`` (64): one composition of two objects that no other split holds.
    """
    rng, n = np.random.default_rng(SEEDS[name]), COUNTS[name]
    if name == "protected":
        return packed(scenes := protected(n, rng), describe(scenes))
    if name == "free":
        group = np.repeat(np.arange(FREE), n // FREE)
        shape, colour = rng.integers(0, len(SHAPES), FREE)[group], rng.integers(0, len(COLOURS), FREE)[group]
        fixed = {"shape": np.tile(shape[:, None], MOST), "colour": np.where(np.arange(MOST) == 0, colour[:, None], -1)}
        scenes = draw(np.ones(n, np.int64), rng, **fixed)
        captions = [Caption((Thing(s, c),)) for s, c in zip(shape.tolist(), colour.tolist(), strict=True)]
        return packed(scenes, captions) | {"group": torch.from_numpy(group)}
    if name in ("one", "two", "three"):
        scenes = draw(np.full(n, ("one", "two", "three").index(name) + 1), rng)
        return packed(scenes, describe(scenes))
    if name == "negative":
        scenes = draw(rng.integers(1, 3, n), rng)
        relations = related(scenes)
        loose = [(loosen(full, relations[i], rng), full) for i, full in enumerate(describe(scenes))]
        return packed(scenes, [forbid(caption, full, rng) for caption, full in loose])
    scenes = draw(1 + (rng.random(n)[:, None] > np.array([0.4, 0.8])).sum(1), rng)
    return packed(scenes, captioned(scenes, rng))
