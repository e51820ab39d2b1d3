"""Clips of eight frames in which two objects move on straight lines, one of which can be taken away.

Objects are those of `scenes32`; they start in one place and end in another, at even speed, and may pass each other. The
background has lines, so that what was behind an object must be guessed and not only filled.

``x0`` float32 [N, 8, 3, 32, 32] in [-1, 1]: the clip. ``without``: the same clip without one object, the truth of its removal.
``mask`` bool [N, 8, 32, 32]: pixels that show some of that object; none outside it differs. ``text`` and ``tokens`` describe
the first frame, ``removed`` int64 [N] is the number of the object, ``objects`` int64 [N, 3, 5] (places of the first frame)
and ``background`` int64 [N] as in `scenes32`, ``path`` float32 [N, 8, 3, 2] row and column of every object in every frame.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from stepmark.datasets.scenes32 import apart, describe, draw, packed, settle

from stepmark.task import Dataset
from stepmark.tracks.scenes.captions import PLACES
from stepmark.tracks.scenes.drawing import Array, Look, Scenes, masks, render

DATASET = Dataset(
    id="clips32",
    version=1,
    summary="clips of 8 frames, 32x32 RGB, of two moving objects, with the clip without one of them and its masks",
    licence="Apache-2.0",
    digests={
        "train": "7a0289cd1f49299db78050cc7b8a37d852d39a5e80cfe51cd91ff59ba9640586",
        "test": "54ff49b4dd3a4fd8ce5bc9b9afce32f229bafb86d34902e2d87985dfec2efb45",
    },
)
FRAMES = 8
LINED = Look(lines=0.1)
COUNTS = {"train": 1_000, "test": 100}
SEEDS = {"train": 351, "test": 352}


def frames(scenes: Scenes, path: Array) -> Scenes:
    """Every frame as a scene of its own, 8 n of them, with the objects where path [n, 8, k, 2] says."""
    some = scenes[np.repeat(np.arange(len(scenes)), FRAMES)]
    return replace(some, at=path.reshape(-1, *path.shape[2:]))


def split(name: str) -> dict[str, Any]:
    """``train`` (1 000) or ``test`` (100). Raises KeyError for another name."""
    rng, n = np.random.default_rng(SEEDS[name]), COUNTS[name]
    start = draw(np.full(n, 2), rng)
    end = settle(apart(len(PLACES), None, n, rng), np.maximum(start.shape, 0), start.radius, rng)
    time = (np.arange(FRAMES, dtype=np.float32) / (FRAMES - 1))[None, :, None, None]
    path = start.at[:, None] + time * (end - start.at)[:, None]
    removed = rng.integers(0, 2, n)
    whole = frames(start, path)
    which = np.repeat(removed, FRAMES)
    seen = masks(whole)[np.arange(len(whole)), which] > 0
    first = packed(start, describe(start), LINED)
    return {
        "x0": render(whole, LINED).unflatten(0, (n, FRAMES)),
        "without": render(whole.without(which), LINED).unflatten(0, (n, FRAMES)),
        "mask": torch.from_numpy(seen).unflatten(0, (n, FRAMES)),
        **{key: first[key] for key in ("text", "tokens", "objects", "background")},
        "removed": torch.from_numpy(removed),
        "path": torch.from_numpy(path),
    }
