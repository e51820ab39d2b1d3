"""Scenes of `scenes32` in another look, for tuning to a style: pastel objects on paper with lines, few of them.

One or two objects, captions of all kinds that end in "as pastel". `parse(images, PASTEL)` reads them; the eye of the usual
look refuses nearly all of them, and that of this look all of the usual ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from stepmark.datasets.scenes32 import captioned, draw, packed

from stepmark.task import Dataset
from stepmark.tracks.scenes.drawing import PASTEL

DATASET = Dataset(
    id="pastel32",
    version=1,
    summary="32x32 RGB scenes with captions, all in one other style: pastel colours on lined paper",
    licence="Apache-2.0",
    digests={
        "train": "674a55e15440cd97eb31ccb64809d20bdba62ac23966e26dd866a352cc7c0c55",
        "test": "49a0c1c199e03f58569ff2bca3164fd53b1d9cce1a3f02c16180448515cf6c22",
    },
)
COUNTS = {"train": 2_000, "test": 1_000}
SEEDS = {"train": 341, "test": 342}


def split(name: str) -> dict[str, Any]:
    """``train`` (2 000) or ``test`` (1 000) in the form of `scenes32`. Raises KeyError for another name."""
    rng, n = np.random.default_rng(SEEDS[name]), COUNTS[name]
    scenes = draw(rng.integers(1, 3, n), rng)
    return packed(scenes, [replace(caption, pastel=True) for caption in captioned(scenes, rng)], PASTEL)
