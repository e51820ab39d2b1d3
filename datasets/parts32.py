"""Objects of two parts: "a large star with red top and blue bottom at left on black". For edits of one part.

One object whose upper and lower halves, above and below its centre of mass, differ in colour. In the form of `scenes32`,
with ``lower`` int64 [N, 3], the colour of the lower half, and ``masks`` float32 [N, 2, 32, 32]: how much of every pixel the
upper and the lower half cover. `parse(images, parts=True)` reads them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from stepmark.datasets.scenes32 import describe, draw, packed

from stepmark.task import Dataset
from stepmark.tracks.scenes.captions import COLOURS, Caption
from stepmark.tracks.scenes.drawing import HALVES, Array, Scenes, masks, pattern

DATASET = Dataset(
    id="parts32",
    version=1,
    summary="32x32 RGB scenes of one object with an upper and a lower half of two colours, with the masks of both",
    licence="Apache-2.0",
    digests={
        "train": "81d52a358954d56aaa305a97f6baf36a8ca5eb935ce02de351ff5346d6c7be13",
        "test": "94006c6bca6c00a0ea30012f9a4b17cb40b38914875aff43bd7bf88f76206817",
    },
)
COUNTS = {"train": 4_000, "test": 1_000}
SEEDS = {"train": 345, "test": 346}


def halves(scenes: Scenes) -> Array:
    """How much of every pixel the two halves of the first object cover, float32 [n, 2, 32, 32]: upper, lower."""
    low = pattern(np.full(len(scenes), HALVES), scenes.at[:, 0])
    return masks(scenes)[:, :1] * np.stack([1 - low, low], 1)


def split(name: str) -> dict[str, Any]:
    """``train`` (4 000) or ``test`` (1 000). Raises KeyError for another name."""
    rng, n = np.random.default_rng(SEEDS[name]), COUNTS[name]
    scenes = draw(np.ones(n, np.int64), rng)
    lower = (scenes.colour + rng.integers(1, len(COLOURS), scenes.colour.shape)) % len(COLOURS)
    scenes = replace(scenes, lower=lower, texture=np.full_like(lower, HALVES))
    captions = []
    for full, colour in zip(describe(scenes), lower[:, 0].tolist(), strict=True):
        thing = replace(full.objects[0], texture=None, lower=colour)
        captions.append(Caption((thing,), background=full.background))
    more = {"lower": torch.from_numpy(lower), "masks": torch.from_numpy(halves(scenes))}
    return packed(scenes, captions) | more
