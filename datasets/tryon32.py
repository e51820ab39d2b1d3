"""Figures and garments: what a figure looks like in a garment that is shown flat beside it. For try-on.

A figure has a head, two legs and a garment of one of three cuts (a shirt, a dress, a top with sleeves). The garment has two
of eight colours in one of four patterns, which hang on its centre, so that the flat picture shows exactly what the worn one
has. Figures vary in place, size, skin and background, flat garments lie in the middle of a white picture.

``x0`` float32 [N, 3, 32, 32] in [-1, 1]: the figure in the garment, the truth. ``person``: the same figure in another garment
of the same cut; ``agnostic``: with the garment blanked (0); ``garment``: the flat one. ``mask`` bool [N, 32, 32]: pixels that
show some of the garment; none outside it differs between ``x0`` and ``person``. ``attributes`` int64 [N, 4]: cut, pattern
and the two colours of the garment. ``figure`` float32 [N, 3]: row, column and size (pixels) of the worn one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stepmark.datasets.scenes32 import between

from stepmark.task import Dataset
from stepmark.tracks.scenes.captions import BACKGROUNDS, COLOURS, SHAPES
from stepmark.tracks.scenes.drawing import GROUND, PALETTE, SIZE, Array, Integers, coverage, over, paint, pixels

DATASET = Dataset(
    id="tryon32",
    version=1,
    summary="32x32 RGB figures, flat garments, and the figures in them, with masks",
    licence="Apache-2.0",
    digests={
        "train": "445c8296d02889ada315c71e5a6f697e7f41a495e718e4f924a3e67ebfcd1f84",
        "test": "5e478e468f6b27dd6a80afd16d0587152dfc695b4e4041a85a5be38a72ea6942",
    },
)
CUTS = ("square", "triangle", "cross")  # shapes of a shirt, a dress and a top with sleeves
PATTERNS = 4  # plain, striped, dotted, halves
SKIN = np.array([[90, 60, 45], [150, 105, 80], [200, 155, 125], [235, 200, 175]], dtype=np.float32) / np.float32(255)
HEAD = (-1.8, 0.0, 0.6)  # row and column from the middle of the garment, and radius, all in those of the garment
LEGS = ((1.3, -0.5, 0.35), (1.3, 0.5, 0.35), (1.9, -0.5, 0.35), (1.9, 0.5, 0.35))
FLAT = 5.5  # radius of a flat garment, pixels
COUNTS = {"train": 4_000, "test": 500}
SEEDS = {"train": 349, "test": 350}


def dressed(background: Integers, skin: Integers, figure: Array, attributes: Integers) -> tuple[Array, Array]:
    """Figures [n] in garments, float32 [n, 3, 32, 32] in [0, 1], and what of every pixel shows the garment [n, 32, 32].

    figure float32 [n, 3], attributes int64 [n, 4] as at the top of this file; indices of background and skin [n].
    """
    picture = np.repeat(np.repeat(GROUND[background][:, :, None, None], SIZE, 2), SIZE, 3)
    at, radius = figure[:, :2], figure[:, 2]
    tone = SKIN[skin][:, :, None, None]
    for place in LEGS:
        cover = _limb("square", at, radius, *place)
        picture = over(picture, cover, tone)
    cover, cloth = _garment(at, radius, attributes)
    picture = over(picture, cover, cloth)
    head = _limb("circle", at, radius, *HEAD)
    return over(picture, head, tone), cover * (1 - head)


def _limb(shape: str, at: Array, radius: Array, row: float, column: float, size: float) -> Array:
    where = at + radius[:, None] * np.array([row, column], np.float32)
    return coverage(np.full(len(at), SHAPES.index(shape)), where, radius * np.float32(size))


def _garment(at: Array, radius: Array, attributes: Integers) -> tuple[Array, Array]:
    shape = np.array([SHAPES.index(cut) for cut in CUTS])[attributes[:, 0]]
    first, second = (PALETTE[attributes[:, i]] for i in (2, 3))
    return paint(shape, at, radius, attributes[:, 1], first, second)


def flat(attributes: Integers) -> Array:
    """Garments [n] as they lie on white, float32 [n, 3, 32, 32] in [0, 1]."""
    n = len(attributes)
    cover, cloth = _garment(np.full((n, 2), SIZE / 2, np.float32), np.full(n, FLAT, np.float32), attributes)
    return over(np.ones_like(cloth), cover, cloth)


def _attributes(n: int, rng: np.random.Generator) -> Integers:
    first = rng.integers(0, len(COLOURS), n)
    second = (first + rng.integers(1, len(COLOURS), n)) % len(COLOURS)
    return np.stack([rng.integers(0, len(CUTS), n), rng.integers(0, PATTERNS, n), first, second], 1)


def split(name: str) -> dict[str, Any]:
    """``train`` (4 000) or ``test`` (500). Raises KeyError for another name."""
    rng, n = np.random.default_rng(SEEDS[name]), COUNTS[name]
    worn, other = _attributes(n, rng), _attributes(n, rng)
    other[:, 0] = worn[:, 0]
    background, skin = rng.integers(0, len(BACKGROUNDS), n), rng.integers(0, len(SKIN), n)
    places = [between(rng, low, high, n) for low, high in ((14, 19), (11, 21), (3.75, 5))]
    figure = np.stack(places, 1)
    after, cover = dressed(background, skin, figure, worn)
    before, _ = dressed(background, skin, figure, other)
    truth, mask = pixels(after), torch.from_numpy(cover > 0)
    return {
        "x0": truth,
        "person": pixels(before),
        "agnostic": torch.where(mask[:, None], torch.zeros(()), truth),
        "garment": pixels(flat(worn)),
        "mask": mask,
        "attributes": torch.from_numpy(worn),
        "figure": torch.from_numpy(figure),
    }
