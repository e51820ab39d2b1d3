"""The scenes of `shapes16` at twice the resolution, 32x32 RGB, and few of them: for models that learned the smaller ones.

``condition`` is int64 [N, 2] as there. Sizes and positions are distributed as there and drawn twice as large, so that the
mean over 2x2 pixels is an image of `shapes16`. ``misfit`` and ``objects`` judge an image by rules, with no network.
"""

from __future__ import annotations

import numpy as np
import torch
from stepmark.datasets import shapes16
from torch import Tensor

from stepmark.task import Dataset

DATASET = Dataset(
    id="shapes32",
    version=1,
    summary="32x32 RGB images of one coloured shape at a free position and size, few for training",
    licence="Apache-2.0",
    digests={
        "train": "64ac06508b88196934b31cefba922e1135684bff98f05fb175d3164bfa13fb6b",
        "test": "79f09828e80839d757535567b62a1500d272140469fad282a5f274b43038235f",
    },
)
SIZE, FACTOR = 32, 2
COUNTS = {"train": 1000, "test": 500}
SEEDS = {"train": 61, "test": 62}


def coverage(shape: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Share of every pixel that a shape covers, float32 [N, 32, 32]; arguments as of `shapes16.coverage`, in pixels."""
    quarter = shapes16.SIZE
    rows = []
    for top in range(0, SIZE, quarter):
        corners = [centre.double() - torch.tensor([top, left]) for left in range(0, SIZE, quarter)]
        rows.append(torch.cat([shapes16.coverage(shape, corner, radius) for corner in corners], 2))
    return torch.cat(rows, 1)


def split(name: str) -> dict[str, Tensor]:
    """``x0`` float32 [N, 3, 32, 32] in [-1, 1] and ``condition`` of ``train`` (1 000) or ``test`` (500).

    Raises KeyError for another name.
    """
    rng, count = np.random.default_rng(SEEDS[name]), COUNTS[name]
    condition = shapes16.draw_conditions(count, rng)
    radius = rng.integers(int(shapes16.RADIUS[0] * 64), int(shapes16.RADIUS[1] * 64) + 1, count) / 64
    low = np.ceil(radius * shapes16.REACH * 64)[:, None] / 64
    centre = low + np.round((shapes16.SIZE - 2 * low) * rng.random((count, 2)) * 64) / 64
    cover = coverage(condition[:, 0], torch.from_numpy(FACTOR * centre), torch.from_numpy(FACTOR * radius))
    colour = shapes16.RGB[condition[:, 1] - len(shapes16.SHAPES)]
    return {"x0": cover[:, None] * colour[:, :, None, None] * 2 - 1, "condition": condition}


def misfit(images: Tensor, condition: Tensor) -> Tensor:
    """How far images are from a sharp one of the shape and colour named, float [N], 0 to 1.

    The shape is redrawn with the area and the centroid of what has the colour; the misfit is the difference of the two
    pictures, other colours counted in, as a share of the area.
    """
    images = ((images.detach().cpu().float() + 1) / 2).clamp(0, 1)
    colour = shapes16.RGB[condition[:, 1].cpu() - len(shapes16.SHAPES)]
    cover = torch.einsum("nchw,nc->nhw", images, colour) / colour.sum(1)[:, None, None]
    cover = torch.where(cover < 0.08, 0.0, cover)  # a faint haze is no part of an object
    area = cover.sum((1, 2)).clamp(min=1e-6)
    axis = torch.arange(SIZE) + 0.5
    centre = torch.stack([(cover.sum(2) * axis).sum(1), (cover.sum(1) * axis).sum(1)], 1) / area[:, None]
    redrawn = coverage(condition[:, 0].cpu(), centre, area.sqrt() / 2)
    stray = (images * (1 - colour)[:, :, None, None]).amax(1)
    stray = torch.where(stray < 0.08, 0.0, stray)
    return (((cover - redrawn).abs() + stray).sum((1, 2)) / area).clamp(max=1)


def objects(images: Tensor) -> Tensor:
    """How many separate objects there are in each image, int64 [N]: patches of pixels that are more than half bright."""
    from scipy.ndimage import label

    bright = (images.detach().cpu().float().amax(1) > 0).numpy()
    return torch.tensor([label(image)[1] for image in bright])
