"""Instructions to edit a scene, with the exact result: "turn the red circle into a square", "make the background black".

Eight kinds of edit of scenes of one to three objects (`KINDS`, in turn). Source and target are drawn by the same renderer and
differ in one attribute, one object or the background; ``mask`` is where the edited thing shows in either of them, and no
pixel outside it differs. Objects are called by their colour and shape, which no other object of the scene shares.

The form is that of `scenes32` for the target (``x0``, ``text`` ...), with ``source`` float32 [N, 3, 32, 32], ``source_text``,
``source_tokens``, ``source_objects``, ``source_geometry``; ``instruction``, ``instruction_tokens``; ``mask`` bool [N, 32, 32],
``kind`` int64 [N], and ``which`` int64 [N], the number of the edited object.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stepmark.datasets.scenes32 import EXTENT, MOST, SEEN, describe, draw, packed, settle

from stepmark.task import Dataset
from stepmark.tracks.scenes.captions import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Caption,
    tokens,
    write,
)
from stepmark.tracks.scenes.drawing import RADII, SIZE, Integers, Scenes, area, masks, open_ground, render

DATASET = Dataset(
    id="edits32",
    version=1,
    summary="32x32 RGB scenes before and after an edit by instruction, with the mask of what may change",
    licence="Apache-2.0",
    digests={
        "train": "02abee252aba5e994acda26afe8ac49adf0d66901fb228505acf4f337ac3290b",
        "test": "ff9100ebf227bbb2a4b3230ee5d5e84cfd4a1f8eb5446d9a3f9e5054991a1c5a",
    },
)
KINDS = ("colour", "shape", "size", "texture", "add", "remove", "move", "background")
COUNTS = {"train": 8_000, "test": 800}
SEEDS = {"train": 347, "test": 348}


def _other(value: Integers, kinds: int, rng: np.random.Generator) -> Integers:
    return (value + rng.integers(1, kinds, value.shape)) % kinds


def _unused(used: Integers, kinds: int, rng: np.random.Generator) -> Integers:
    """One of so many kinds, int64 [n], that is none of those used [n, k]."""
    order = rng.random((len(used), kinds)).argsort(1, kind="stable")
    free = ~(order[:, :, None] == used[:, None]).any(2)
    return order[np.arange(len(used)), free.argmax(1)]


def edit(kind: str, rng: np.random.Generator, n: int) -> tuple[Scenes, Scenes, Integers]:
    """n scenes before and after an edit of that kind, and which object [n] it is of; not all of them need be sound."""
    more = kind in ("add", "remove")
    count = rng.integers(2, MOST + 1, n) if more else rng.integers(1, MOST, n)
    source = draw(count, rng)
    which = count - 1 if kind == "add" else (rng.random(n) * count).astype(np.int64)
    if kind == "add":
        return source.without(which), source, which
    if kind == "remove":
        return source, source.without(which), which
    if kind == "background":
        return source, replace(source, background=_other(source.background, len(BACKGROUNDS), rng)), which
    own = np.arange(MOST) == which[:, None]
    shape, size, at, radius = source.shape, source.size, source.at, source.radius
    if kind == "colour":
        new = _unused(np.where(source.there, source.colour, -1), len(COLOURS), rng)
        return source, replace(source, colour=np.where(own, new[:, None], source.colour)), which
    if kind == "texture":
        return (
            source,
            replace(source, texture=np.where(own, _other(source.texture, len(TEXTURES), rng), source.texture)),
            which,
        )
    if kind == "shape":
        return source, replace(source, shape=np.where(own, _other(shape, len(SHAPES), rng), shape)), which
    if kind == "size":
        scale = np.take(RADII, _other(size, len(SIZES), rng)) / np.take(RADII, size)
        return source, replace(source, radius=np.where(own, radius * scale, radius).astype(np.float32)), which
    place = _unused(np.where(source.there, source.place, -1), len(PLACES), rng)
    moved = settle(np.repeat(place[:, None], MOST, 1), np.maximum(shape, 0), radius, rng)
    return source, replace(source, at=np.where(own[:, :, None], moved, at)), which


def sound(scenes: Scenes) -> NDArray[np.bool_]:
    """Scenes [n] whose objects lie wholly in the picture and are seen as well as those of `scenes32`."""
    up, down, aside = np.moveaxis(EXTENT[np.maximum(scenes.shape, 0)], -1, 0) * scenes.radius
    row, column = np.moveaxis(scenes.at, -1, 0)
    ends = np.stack([row - up, SIZE - row - down, column - aside, SIZE - column - aside])
    inside = (ends > -0.1).all(0)  # pixels: less than shows
    seen = area(masks(scenes)) >= np.float32(SEEN) * 4 * scenes.radius**2
    return ((inside & seen) | ~scenes.there).all(1)


def changed(source: Scenes, target: Scenes, which: Integers, background: bool) -> NDArray[np.bool_]:
    """Where the edited object, or the background, shows before or after the edit, bool [n, 32, 32]."""
    if background:
        return open_ground(source) > 0
    each = np.arange(len(source))
    return (masks(source)[each, which] > 0) | (masks(target)[each, which] > 0)


def instruct(kind: str, before: Caption, after: Caption, which: int) -> str:
    """The words of an edit of the object of that number between two full captions."""
    if kind == "background":
        return f"make the background {BACKGROUNDS[after.background or 0]}"
    if kind == "add":
        return f"add {write(Caption((after.objects[which],)))}"
    old = before.objects[which]
    name = f"the {COLOURS[old.colour or 0]} {SHAPES[old.shape or 0]}"
    if kind == "remove":
        return f"remove {name}"
    new = after.objects[which]
    if kind == "shape":
        return f"turn {name} into a {SHAPES[new.shape or 0]}"
    if kind == "move":
        return f"move {name} to {PLACES[new.place or 0]}"
    words = {"colour": COLOURS, "size": SIZES, "texture": TEXTURES}[kind]
    return f"make {name} {words[getattr(new, kind)]}"


def split(name: str) -> dict[str, Any]:
    """``train`` (8 000) or ``test`` (800), the kinds one after the other. Raises KeyError for another name."""
    rng, n = np.random.default_rng(SEEDS[name]), COUNTS[name] // len(KINDS)
    befores, afters, numbers, places, instructions = [], [], [], [], []
    for kind in KINDS:
        source, target, which = edit(kind, rng, 3 * n)
        good = np.flatnonzero(sound(source) & sound(target))[:n]
        source, target, which = source[good], target[good], which[good]
        befores.append(source)
        afters.append(target)
        numbers.append(which)
        places.append(changed(source, target, which, kind == "background"))
        # Objects keep their numbers; a caption without one names those that follow it one earlier.
        pairs = zip(describe(source), describe(target), which.tolist(), strict=True)
        instructions += [instruct(kind, before, after, number) for before, after, number in pairs]
    source, target = (
        Scenes(**{field: np.concatenate([getattr(each, field) for each in group]) for field in vars(group[0])})
        for group in (befores, afters)
    )
    text = [write(caption) for caption in describe(source)]
    return packed(target, describe(target)) | {
        "source": render(source),
        "source_text": text,
        "source_tokens": tokens(text),
        "source_objects": torch.from_numpy(np.stack([source.attribute(name) for name in ATTRIBUTES], 2)),
        "source_geometry": torch.from_numpy(np.concatenate([source.at, source.radius[..., None]], 2)),
        "which": torch.from_numpy(np.concatenate(numbers)),
        "instruction": instructions,
        "instruction_tokens": tokens(instructions),
        "mask": torch.from_numpy(np.concatenate(places)),
        "kind": torch.arange(len(KINDS)).repeat_interleave(n),
    }
