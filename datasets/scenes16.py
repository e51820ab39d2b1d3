"""Rooms with a few objects, 16x16 RGB and depth: few "real" pairs, and many of a graphics engine of another style.

A pair is float32 [4, 16, 16]: red, green, blue and depth, each in [-1, 1]. Depth is that of the middle of the pixel in
metres, 0 at -1 and ``FAR`` at 1, linear. The camera looks along a floor at a back wall; boxes, balls and pillars stand on
the floor, the nearest surface of every ray is what is seen, and at twice the distance an object is half as large.

``real``: muted colours, checked floors and objects, light from anywhere, haze, exposure and sensor noise. ``engine``: pure
colours, no texture, one fixed light, no haze, no noise, and rooms of its own: deeper, with more and larger objects.
Pictures are rendered with 3x3 rays per pixel. Nothing but sums, products, quotients and roots is used, and every ray's
colour is rounded to 8 bits, so that the data are the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepmark.task import Dataset

DATASET = Dataset(
    id="scenes16",
    version=1,
    summary="16x16 RGB pictures of rooms with exact depth: few of a real style, many of an engine's",
    licence="Apache-2.0",
    digests={
        "train": "a67db57ec52f7f5b31a4a33772bf5d5b06734d508e1ed6deef5adefbbf865fc5",
        "test": "01f0c573a1116fc19a3c9ef44feadc56d2395b9543c1bf74b8f6529fb2b5f650",
    },
)
SIZE = 16
FAR = 8.0  # metres: the depth that 1 stands for
RAYS = 3  # per pixel and axis
EYE = 1.25  # height of the camera above the floor, metres
HORIZON = 0.375  # its row, as a share of the height of the picture
FIELD = 0.6  # half the width of the picture at a distance of 1
REAL, ENGINE, TEST = 100, 1000, 1000
SEEDS = {"train": 71, "engine": 72, "test": 73}
PURE = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=np.float64)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Rooms:
    """n rooms with at most k objects each: geometry and looks, lengths in metres.

    wall [n]: distance of the back wall. kind int [n, k]: 0 box,
    1 ball, 2 pillar. place [n, k, 2]: sideways and distance of the front; an object at infinity is not there. extent
    [n, k, 2]: half the width, and the height. albedo [n, k + 2, 3]: of floor, wall and objects. check [n, k + 2, 2]:
    contrast and period of the texture. light [n, 3]: unit vector to the light (right, up, towards the camera). ambient,
    exposure [n]. haze [n]: distance at which half of what is seen is haze; infinite for none. noise: amplitude.
    """

    wall: Array
    kind: NDArray[np.int64]
    place: Array
    extent: Array
    albedo: Array
    check: Array
    light: Array
    ambient: Array
    exposure: Array
    haze: Array
    noise: float


def _between(rng: np.random.Generator, low: float, high: float, *shape: int) -> Array:
    return low + (high - low) * rng.random(shape)


def _placed(rng: np.random.Generator, wall: Array, count: NDArray[np.int64], most: int) -> Array:
    """Places [n, most, 2] in view, in front of the wall; those beyond `count` at infinity."""
    n = len(wall)
    distance = 1.4 + (wall[:, None] - 1.9) * rng.random((n, most))
    sideways = FIELD * distance * _between(rng, -0.85, 0.85, n, most)
    distance[np.arange(most) >= count[:, None]] = np.inf
    return np.stack([sideways, distance], 2)


def real_rooms(n: int, rng: np.random.Generator) -> Rooms:
    """n rooms of the real style."""
    most = 3
    wall = _between(rng, 2.5, 7.0, n)
    light = np.stack([_between(rng, -1, 1, n), _between(rng, 0.3, 1, n), _between(rng, 0.1, 1, n)], 1)
    albedo = 0.35 + 0.5 * rng.random((n, most + 2, 3)) - 0.25 * rng.random((n, most + 2, 1))
    check = np.stack([_between(rng, 0, 0.5, n, most + 2), _between(rng, 0.25, 0.8, n, most + 2)], 2)
    check[:, 1, 0] *= 0.4  # walls are plainer
    return Rooms(
        wall=wall,
        kind=rng.integers(0, 3, (n, most)),
        place=_placed(rng, wall, rng.integers(1, most + 1, n), most),
        extent=np.stack([_between(rng, 0.2, 0.5, n, most), _between(rng, 0.4, 1.6, n, most)], 2),
        albedo=albedo,
        check=check,
        light=light / np.sqrt((light**2).sum(1, keepdims=True)),
        ambient=_between(rng, 0.3, 0.6, n),
        exposure=_between(rng, 0.7, 1.2, n),
        haze=_between(rng, 6, 20, n),
        noise=0.02,
    )


def engine_rooms(n: int, rng: np.random.Generator) -> Rooms:
    """n rooms of the engine's style."""
    most = 5
    wall = _between(rng, 4.0, 7.0, n)
    return Rooms(
        wall=wall,
        kind=rng.integers(0, 3, (n, most)),
        place=_placed(rng, wall, rng.integers(2, most + 1, n), most),
        extent=np.stack([_between(rng, 0.3, 0.6, n, most), _between(rng, 0.6, 1.8, n, most)], 2),
        albedo=PURE[rng.integers(0, len(PURE), (n, most + 2))],
        check=np.tile([0.0, 1.0], (n, most + 2, 1)),
        light=np.tile([0.48, 0.8, 0.36], (n, 1)),
        ambient=np.full(n, 0.4),
        exposure=np.ones(n),
        haze=np.full(n, np.inf),
        noise=0.0,
    )


def _seen(rooms: Rooms, u: Array, v: Array) -> tuple[Array, NDArray[np.int64], Array, Array]:
    """What each ray (u right, v down, 1 ahead; [1, 1, W] and [1, H, 1]) meets first.

    Returns depth [n, H, W] in metres, which surface [n, H, W] (0 floor, 1 wall, 2 and on the objects), its normal [n, H, W,
    3] (right, up, towards the camera) and the coordinates of its texture [n, H, W, 2] in metres.
    """
    u, v = np.broadcast_arrays(u, v)
    depth = np.tile(rooms.wall[:, None, None], (1, *u.shape[1:]))
    which = np.ones(depth.shape, dtype=np.int64)
    normal = np.tile([0.0, 0.0, 1.0], (*depth.shape, 1))
    texture = np.stack([u, v], -1) * depth[..., None]

    def draw(surface: int, distance: Array, towards: Array, print_: Array) -> None:
        nearer = distance < depth
        depth[nearer], which[nearer] = distance[nearer], surface
        normal[nearer], texture[nearer] = np.broadcast_to(towards, normal.shape)[nearer], print_[nearer]

    floor = np.broadcast_to(EYE / np.where(v > 0, v, 1e-9), depth.shape)
    draw(0, floor, np.array([0.0, 1.0, 0.0]), np.stack([u * floor, floor], -1))
    for i in range(rooms.kind.shape[1]):
        x, z = (rooms.place[:, i, axis, None, None] for axis in (0, 1))
        there = np.isfinite(z)
        z = np.where(there, z, 1.0)
        wide, high = (rooms.extent[:, i, axis, None, None] for axis in (0, 1))
        kind = rooms.kind[:, i, None, None]
        right, up = u * z - x, EYE - v * z  # of the point at the object's distance, from its foot
        across, rise = right / wide, np.where(kind == 1, up / wide - 1, 0.0)
        outside = across**2 + rise**2
        bend = np.sqrt((1 - outside).clip(0, 1))
        inside = np.where(kind == 1, outside <= 1, (abs(across) <= 1) & (up >= 0) & (up <= high)) & there
        flat = kind == 0
        distance = np.where(inside, z + np.where(flat, 0.0, wide * (1 - bend)), np.inf)  # the rim lies further back
        towards = np.where(flat[..., None], [0.0, 0.0, 1.0], np.stack([across, rise, bend], -1))
        draw(i + 2, distance, towards, np.stack([right, up], -1))
    return depth, which, normal, texture


def _rays(per_pixel: int) -> tuple[Array, Array]:
    """u [1, 1, W] and v [1, H, 1] of the rays through the middles of so many parts of every pixel."""
    place = (np.arange(SIZE * per_pixel) + 0.5) / (SIZE * per_pixel)
    return FIELD * (2 * place - 1)[None, None, :], 2 * FIELD * (place[None, :, None] - HORIZON)


def depth_of(rooms: Rooms) -> Array:
    """Depth of the nearest surface in the middle of every pixel, metres [n, 16, 16]."""
    return _seen(rooms, *_rays(1))[0]


def colour_of(rooms: Rooms, rng: np.random.Generator) -> Array:
    """Pictures [n, 3, 16, 16] in [0, 1]."""
    depth, which, normal, texture = _seen(rooms, *_rays(RAYS))
    of = np.arange(len(depth))[:, None, None]
    albedo, check = rooms.albedo[of, which], rooms.check[of, which]
    odd = np.floor(texture / check[..., 1:]).sum(-1) % 2
    facing = (normal * rooms.light[:, None, None]).sum(-1).clip(min=0)
    ambient = rooms.ambient[:, None, None]
    shade = (ambient + (1 - ambient) * facing) * (1 - check[..., 0] * odd)
    colour = albedo * shade[..., None]
    clear = np.where(np.isinf(rooms.haze), 1.0, rooms.haze)[:, None, None]
    share = np.where(np.isinf(rooms.haze)[:, None, None], 0.0, depth / (depth + clear))[..., None]
    colour = ((1 - share) * colour + share * np.array([0.75, 0.8, 0.85])) * rooms.exposure[:, None, None, None]
    bits = np.round(255 * colour.clip(0, 1))
    pixels = bits.reshape(len(bits), SIZE, RAYS, SIZE, RAYS, 3).sum((2, 4)) / RAYS**2
    noise = rooms.noise * 255 * (2 * rng.random(pixels.shape) - 1)
    return (np.round(pixels + noise).clip(0, 255) / 255).transpose(0, 3, 1, 2)


def render(rooms: Rooms, rng: np.random.Generator) -> Tensor:
    """Pairs float32 [n, 4, 16, 16] in [-1, 1], a hundred rooms at a time."""
    n = len(rooms.wall)
    parts = []
    for start in range(0, n, 100):
        some = Rooms(
            **{
                name: value[start : start + 100] if isinstance(value, np.ndarray) else value
                for name, value in vars(rooms).items()
            }
        )
        depth = np.round(256 * depth_of(some)) / 256 / FAR
        parts.append(np.concatenate([colour_of(some, rng), depth[:, None]], 1))
    return torch.from_numpy(np.concatenate(parts) * 2 - 1).float()


def metres(depth: Tensor) -> Tensor:
    """Depth in metres of depth in [-1, 1], at least a tenth."""
    return ((depth + 1) / 2 * FAR).clamp(min=0.1)


def split(name: str) -> dict[str, Tensor]:
    """``train``: ``x0`` (100 real pairs), their ``condition`` (0: nothing is named) and ``engine`` (1 000 pairs of the
    engine). ``test``: 1 000 real pairs ``x0``. Raises KeyError for another name.
    """
    rng = np.random.default_rng(SEEDS[name])
    if name == "test":
        return {"x0": render(real_rooms(TEST, rng), rng)}
    real = render(real_rooms(REAL, rng), rng)
    rng = np.random.default_rng(SEEDS["engine"])
    condition = torch.zeros(REAL, dtype=torch.int64)
    return {"x0": real, "condition": condition, "engine": render(engine_rooms(ENGINE, rng), rng)}
