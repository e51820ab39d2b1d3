"""A geography of attributes: what objects look like in four regions, with modes from common to rare known exactly.

The caption names the region, and the shape of the one object in every other picture: "a circle in the north". In a region
the colour of the object and the background come in eight pairs, its modes, with the probabilities of `SHARES`: the commonest
in four pictures of ten, the rarest in one of a hundred. No pair is a mode of two regions. All else is uniform as in
`scenes32`, whose format this has, with ``region`` and ``mode`` int64 [N].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stepmark.datasets.scenes32 import MOST, draw, packed

from stepmark.task import Dataset
from stepmark.tracks.scenes.captions import BACKGROUNDS, COLOURS, REGIONS, Caption, Thing

DATASET = Dataset(
    id="regions32",
    version=1,
    summary="32x32 RGB scenes of one object whose colour and background hang on a named region, common and rare",
    licence="Apache-2.0",
    digests={
        "train": "8eacef4acfd64a302c988488ad53af4d4f80f66e55ff50e7099fa48bde88031b",
        "test": "bee55851cb81625f4bd84ce2a29193ed8bc577cf5aeb6f5c7bdb0fa18d88523c",
    },
)
COUNTS = {"train": 8_000, "test": 4_000}
SEEDS = {"train": 343, "test": 344}
SHARES = np.array([0.40, 0.25, 0.14, 0.08, 0.06, 0.04, 0.02, 0.01])  # of the modes of every region


def modes() -> NDArray[np.int64]:
    """Colour and background of every mode, int64 [4, 8, 2], the commonest first."""
    region, mode = np.meshgrid(np.arange(len(REGIONS)), np.arange(len(SHARES)), indexing="ij")
    return np.stack([(mode + 2 * region) % len(COLOURS), (3 * mode + 5 * region) % len(BACKGROUNDS)], 2)


def probabilities() -> NDArray[np.float64]:
    """How likely a colour and a background are in a region, float64 [4, 8, 8]; all of a region sum to 1."""
    found = np.zeros((len(REGIONS), len(COLOURS), len(BACKGROUNDS)))
    for region, pairs in enumerate(modes()):
        found[region, pairs[:, 0], pairs[:, 1]] = SHARES
    return found


def mode_of(region: NDArray[np.int64], colour: NDArray[np.int64], background: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which mode of its region a pair is, int64 [n]; -1 for one that does not occur there."""
    pairs = modes()[region]
    fits = (pairs[..., 0] == colour[:, None]) & (pairs[..., 1] == background[:, None])
    return np.where(fits.any(1), fits.argmax(1), -1)


def split(name: str) -> dict[str, Any]:
    """``train`` (8 000) or ``test`` (4 000). Raises KeyError for another name."""
    rng, n = np.random.default_rng(SEEDS[name]), COUNTS[name]
    region = rng.integers(0, len(REGIONS), n)
    mode = (rng.random(n)[:, None] > SHARES.cumsum()[:-1]).sum(1)
    pair = modes()[region, mode]
    colour = np.where(np.arange(MOST) == 0, pair[:, :1], -1)
    scenes = draw(np.ones(n, np.int64), rng, colour=colour, background=pair[:, 1])
    named = rng.random(n) < 0.5
    captions = [
        Caption((Thing(shape if said else None),), region=where)
        for shape, said, where in zip(scenes.shape[:, 0].tolist(), named.tolist(), region.tolist(), strict=True)
    ]
    return packed(scenes, captions) | {"region": torch.from_numpy(region), "mode": torch.from_numpy(mode)}
