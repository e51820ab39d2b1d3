"""One coloured shape on black, 16x16 RGB. The condition names its shape and its colour; size and position are free, so
that a generator has something left to draw at random.

``condition`` is int64 [N, 2]: the shape (0 disc, 1 square, 2 triangle) and the colour (3 red, 4 green, 5 blue,
6 yellow), numbered through as rows of one table. Images are rendered with 4x4 samples per pixel and positions are
multiples of 1/64 pixel, so that every value is a multiple of 1/8 and the data are the same on every machine.

``read_attributes`` is the exact verifier: it reads shape and colour off an image by rules (measure colour, area and
centroid, redraw each shape with them, compare), with no network.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from stepmark.task import Dataset

DATASET = Dataset(
    id="shapes16",
    version=1,
    summary="16x16 RGB images of one coloured shape at a free position and size, rendered from a seed",
    licence="Apache-2.0",
    digests={
        "train": "8f66a24109e9481c19fd54c031719b828846cf53824a9849c55c562bced03a63",
        "test": "7b1cbfefe2e4825feb2ddd2094076ab4fce43fef9733047826b346cfa3e3b806",
        "reference": "ed9d18df2c5d28698e72fdb6585f7487b9f1b1d3a6ddeea3973afad7a6c4aaf0",
    },
)
SHAPE = (3, 16, 16)
SIZE = 16
SHAPES = ("disc", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
RGB = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
ATTRIBUTES = len(SHAPES) + len(COLOURS)
COUNTS = {"train": 20000, "test": 2000, "reference": 10000}
SEEDS = {"train": 11, "test": 12, "reference": 13}
RADIUS = (2.25, 3.5)  # half the side of the square with the shape's area, in pixels
REACH = 1.9  # no shape extends further from its centroid than this times its radius
SUPERSAMPLING = 4
TOLERANCE = 0.25  # largest misfit of a redrawn shape, as a share of its area, that still counts as that shape

_POINTS = (torch.arange(SUPERSAMPLING * SIZE, dtype=torch.float64) + 0.5) / SUPERSAMPLING  # sample points, in pixels


def coverage(shape: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Share of every pixel that a shape covers, float32 [N, 16, 16].

    ``shape`` int64 [N] (index in SHAPES), ``centre`` [N, 2] = (row, column) of the centroid, ``radius`` [N] = half the
    side of the square of the same area, all in pixels: all three shapes have area 4 radius^2.
    """
    centre, radius = centre.double(), radius.double()[:, None]
    rows = _POINTS - centre[:, :1]  # [N, 64]
    columns = _POINTS - centre[:, 1:]
    inside = torch.empty(len(shape), len(_POINTS), len(_POINTS), dtype=torch.bool)
    of = [(shape == i).nonzero().flatten() for i in range(3)]
    a, b, r = rows[of[0]], columns[of[0]], radius[of[0], :, None]
    inside[of[0]] = (a**2)[:, :, None] + (b**2)[:, None, :] <= (4 / np.pi) * r**2
    a, b, r = rows[of[1]], columns[of[1]], radius[of[1]]
    inside[of[1]] = (a.abs() <= r)[:, :, None] & (b.abs() <= r)[:, None, :]
    a, b, height = rows[of[2]], columns[of[2]], radius[of[2]] * 8**0.5  # apex up, base = height
    depth = a + height * (2 / 3)  # 0 at the apex; the centroid lies at two thirds of the height
    half = torch.where((depth >= 0) & (depth <= height), depth / 2, -1.0)
    inside[of[2]] = b.abs()[:, None, :] <= half[:, :, None]
    return avg_pool2d(inside.float(), SUPERSAMPLING)


def draw_images(condition: Tensor, rng: np.random.Generator) -> Tensor:
    """Images float32 [N, 3, 16, 16] in [-1, 1] for conditions [N, 2], with free sizes and positions."""
    count = len(condition)
    radius = rng.integers(int(RADIUS[0] * 64), int(RADIUS[1] * 64) + 1, count) / 64
    low = np.ceil(radius * REACH * 64)[:, None] / 64
    centre = low + np.round((SIZE - 2 * low) * rng.random((count, 2)) * 64) / 64
    cover = coverage(condition[:, 0], torch.from_numpy(centre), torch.from_numpy(radius))
    colour = RGB[condition[:, 1] - len(SHAPES)]
    return cover[:, None] * colour[:, :, None, None] * 2 - 1


def draw_conditions(count: int, rng: np.random.Generator) -> Tensor:
    """Conditions int64 [count, 2], all twelve kinds equally likely."""
    shape, colour = rng.integers(0, len(SHAPES), count), rng.integers(0, len(COLOURS), count)
    return torch.from_numpy(np.stack([shape, colour + len(SHAPES)], 1))


def split(name: str) -> dict[str, Tensor]:
    """``x0`` and ``condition`` of ``train`` (20 000), ``test`` (2 000) or ``reference`` (10 000, for Frechet).

    Raises KeyError for another name.
    """
    rng = np.random.default_rng(SEEDS[name])
    condition = draw_conditions(COUNTS[name], rng)
    return {"x0": draw_images(condition, rng), "condition": condition}


def read_attributes(images: Tensor) -> Tensor:
    """Shape and colour of the object in every image, int64 [N, 2] as in ``condition``; -1 where none can be read.

    Rules: pixels are brightness times a colour; the colour is the one of the four that explains the image best, and
    must leave little unexplained; the coverage map it gives has an area and a centroid; every shape is redrawn with
    these and the best fit names the shape, if it misses less than TOLERANCE of the area.
    """
    images = ((images.detach().cpu().float() + 1) / 2).clamp(0, 1)
    unit = RGB / RGB.norm(dim=1, keepdim=True)
    along = torch.einsum("nchw,kc->nkhw", images, unit)
    energy = along.square().sum(dim=(2, 3))
    colour = energy.argmax(1)
    explained = energy.max(1).values / images.square().sum(dim=(1, 2, 3)).clamp(min=1e-6)
    cover = along[torch.arange(len(images)), colour] / RGB.norm(dim=1)[colour][:, None, None]
    cover = torch.where(cover < 0.08, 0.0, cover.clamp(max=1))  # a faint haze is no part of an object
    area = cover.sum(dim=(1, 2))
    axis = torch.arange(SIZE) + 0.5
    mass = area.clamp(min=1e-6)[:, None]
    centre = torch.stack([(cover.sum(2) * axis).sum(1), (cover.sum(1) * axis).sum(1)], 1) / mass
    radius = area.sqrt() / 2
    redrawn = [coverage(torch.full_like(colour, shape), centre, radius) for shape in range(len(SHAPES))]
    misfit = torch.stack([(image - cover).abs().sum(dim=(1, 2)) for image in redrawn], 1) / mass
    best, shape = misfit.min(1)
    found = torch.stack([shape, colour + len(SHAPES)], 1)
    legible = (explained > 0.9) & (area > 3 * RADIUS[0] ** 2) & (best < TOLERANCE)
    return torch.where(legible[:, None], found, -1)
