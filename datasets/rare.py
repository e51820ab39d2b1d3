"""Points of the plane of which two in a hundred are rare: eight Gaussians with known density.

Four common components lie far from each other around the origin. Beside each, nearer to it than to anything else, is a
rare one of weight 1/200: one lies further out than its common neighbour, one further in, two to the side, so that no
one direction leads to all of them. `condition` is 0 throughout: there is one mixture and nothing to ask for.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stepmark.task import Dataset

DATASET = Dataset(
    id="rare",
    version=2,
    summary="one Gaussian mixture in 2-D with four common components and four that hold 2 % together",
    licence="Apache-2.0",
    digests={
        "train": "9545ccdac5ea2a425d9155952411eb4cdb3803904cf2c3e637ca941c979b03c7",
        "test": "9e5238b16515c0602bea05b4955ecfbbdb4f62502ed90ebcb37ced5fd3f1aa81",
    },
)
COMMON = RARE = 4
SHARE = 0.02  # of the rare components together
COUNTS = {"train": 20000, "test": 8000}
SEEDS = {"train": 41, "test": 42}

_ANGLE = math.pi / 2 * torch.arange(4, dtype=torch.float64)
_AWAY = _ANGLE + math.pi * torch.tensor(
    [0, 1, 0.5, 1.5], dtype=torch.float64
)  # from the common one to its rare neighbour
_COMMON = 4.0 * torch.stack([_ANGLE.cos(), _ANGLE.sin()], 1)
SPREAD = torch.tensor([0.3] * COMMON + [0.2] * RARE, dtype=torch.float64)  # standard deviation of each component
WEIGHTS = torch.tensor([(1 - SHARE) / COMMON] * COMMON + [SHARE / RARE] * RARE, dtype=torch.float64)[None]
MEANS = torch.cat([_COMMON, _COMMON + 1.5 * torch.stack([_AWAY.cos(), _AWAY.sin()], 1)])[None]
COVARIANCES = (SPREAD.square()[:, None, None] * torch.eye(2, dtype=torch.float64))[None]


def split(name: str) -> dict[str, Tensor]:
    """``x0`` [N, 2] and ``condition`` [N] (all 0) of ``train`` (20 000) or ``test`` (8 000).

    Raises KeyError for another name.
    """
    rng = np.random.default_rng(SEEDS[name])
    component = (rng.random(COUNTS[name])[:, None] > WEIGHTS[0].numpy().cumsum()[:-1]).sum(1)
    normal = rng.standard_normal((COUNTS[name], 2))
    points = MEANS[0].numpy()[component] + SPREAD.numpy()[component][:, None] * normal
    return {"x0": torch.from_numpy(points.astype(np.float32)), "condition": torch.zeros(COUNTS[name], dtype=torch.long)}


def distances(x: Tensor) -> Tensor:
    """Distance of points [N, 2] to the centre of each component in units of its spread, float64 [N, 8]."""
    return torch.cdist(x.double(), MEANS[0]) / SPREAD


def component_of(x: Tensor) -> Tensor:
    """The component to which a point belongs most likely, int64 [N]: 0..3 common, 4..7 rare."""
    return (WEIGHTS[0].log() - 2 * SPREAD.log() - distances(x).square() / 2).argmax(1)
