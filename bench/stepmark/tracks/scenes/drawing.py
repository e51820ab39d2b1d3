"""Scenes of a few objects, and everything that their pictures show: colours, masks, layouts, depth, edges, relations.

An object is drawn with the area 4 r^2 that its radius r gives it, whatever its shape. How much of a pixel it covers is exact
along rows, of which there are four per pixel; objects are laid over each other, the farthest first. Nothing but sums,
products, quotients and roots is used, and pictures are rounded to 8 bits, so that they are the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepmark.tracks.scenes.captions import SHAPES

SIZE = 32  # pixels, of pictures
PALETTE = np.array(
    [[220, 30, 30], [30, 165, 50], [40, 70, 235], [240, 220, 30], [30, 210, 220], [240, 40, 200], [250, 140, 20], [120, 0, 160]],
    dtype=np.float32,
) / np.float32(255)  # fmt: skip
GROUND = np.array(
    [[0, 0, 0], [64, 64, 64], [128, 128, 128], [191, 191, 191], [255, 255, 255], [20, 25, 80], [15, 60, 30], [80, 15, 35]],
    dtype=np.float32,
) / np.float32(255)  # fmt: skip
RADII = (3.0, 4.0, 5.25)  # pixels, of SIZES
BETWEEN_SIZES = (3.46, 4.58)  # radii that part two sizes
BETWEEN_PLACES = (12.5, 19.5)  # pixels: what parts the thirds of the picture
HIDES = 4.0  # pixels of the other one that an object hides if it is said to be in front of it
APART = 4.0  # pixels between the middles of two objects of which one is said to be left of or above the other
LIGHT = 0.5  # stripes and dots are so far from the object's colour to white
PERIOD, DOT = 4.0, 1.2  # pixels: of stripes and dots, and the radius of a dot
PLAIN, STRIPED, DOTTED, HALVES = range(4)  # TEXTURES, and an object of two parts
ROWS = 4  # per pixel
CHUNK, OBJECTS = 256, 64  # scenes and objects that are drawn at a time, which keeps them in the cache

Array = NDArray[np.float32]
Integers = NDArray[np.int64]
_HEIGHTS: Array = (np.arange(SIZE * ROWS, dtype=np.float32) + np.float32(0.5)) / ROWS  # of rows, pixels


@dataclass(frozen=True)
class Scenes:
    """n scenes with at most k objects each, every one in front of those that follow.

    shape, colour, texture int64 [n, k]: indices, shape -1 where there is no object. lower int64 [n, k]: colour of the lower
    part of an object whose texture is HALVES, else -1. at float32 [n, k, 2]: row and column of the centre of mass, radius
    float32 [n, k]: half the side of the square of the same area, all in pixels. background int64 [n].
    """

    shape: Integers
    colour: Integers
    texture: Integers
    lower: Integers
    at: Array
    radius: Array
    background: Integers

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, which: Any) -> Scenes:
        """Some of the scenes: a slice, a mask or indices."""
        return Scenes(**{name: value[which] for name, value in vars(self).items()})

    @property
    def there(self) -> NDArray[np.bool_]:
        """Which objects there are, [n, k]."""
        return self.shape >= 0

    @property
    def size(self) -> Integers:
        """Index in SIZES, [n, k]."""
        return np.digitize(self.radius, BETWEEN_SIZES)

    @property
    def place(self) -> Integers:
        """Index in PLACES, [n, k]."""
        row, column = np.moveaxis(np.digitize(self.at, BETWEEN_PLACES), -1, 0)
        return 3 * row + column

    def attribute(self, name: str) -> Integers:
        """An attribute by its name in `ATTRIBUTES`, [n, k]; -1 where there is no object."""
        return np.where(self.there, getattr(self, name), -1)

    def without(self, which: Integers) -> Scenes:
        """The scenes, each without its object of that number [n]."""
        gone = np.arange(self.shape.shape[1]) == which[:, None]
        return replace(self, shape=np.where(gone, -1, self.shape))


@dataclass(frozen=True)
class Look:
    """How scenes are drawn. pale: how far the colours of objects are from their own to white. lines: how much every other
    pair of columns of the background is darker (of bright ones) or lighter (of dark ones), of a range of 1.
    """

    pale: float = 0.0
    lines: float = 0.0

    def palette(self) -> Array:
        """Colours of objects, float32 [8, 3] in [0, 1]."""
        return PALETTE + np.float32(self.pale) * (1 - PALETTE)


USUAL, PASTEL = Look(), Look(pale=0.45, lines=0.1)


def _reach(shape: Integers, t: Array) -> tuple[Array, Array]:
    """Half the width of shapes [m] at heights t [m, h] below the centre, and of the hole in the middle, in radii: [m, h].

    All have area 4: a disc, a square, a triangle with its tip up and as wide as high, a plus, a ring with a hole of 0.55 of
    its radius, and a star of five rays whose inner corners lie at 0.45 of its radius.
    """
    half, hole = np.zeros_like(t), np.zeros_like(t)
    for i in range(len(SHAPES)):
        of = shape == i
        if not of.any():
            continue
        y = t[of]
        if SHAPES[i] == "circle":
            half[of] = np.sqrt(np.maximum(np.float32(1.2732395) - y * y, 0))
        elif SHAPES[i] == "square":
            half[of] = np.abs(y) <= 1
        elif SHAPES[i] == "triangle":
            down = y + np.float32(1.8856181)
            half[of] = np.where((down >= 0) & (down <= np.float32(2.8284271)), down / 2, 0)
        elif SHAPES[i] == "cross":
            arm, beam = np.float32(1.3014), np.float32(0.4685)
            half[of] = np.where(np.abs(y) <= beam, arm, np.where(np.abs(y) <= arm, beam, 0))
        elif SHAPES[i] == "ring":
            half[of] = np.sqrt(np.maximum(np.float32(1.8255) - y * y, 0))
            hole[of] = np.sqrt(np.maximum(np.float32(0.5522) - y * y, 0))
        else:
            y = y / np.float32(1.739)
            tip, arms = (y + 1) * np.float32(0.4159), np.float32(0.951) - (y + np.float32(0.309)) * np.float32(1.1674)
            legs = np.float32(0.428) + (y - np.float32(0.139)) * np.float32(0.2388)
            width = np.where(y < np.float32(-0.3365), tip, np.where(y < np.float32(0.139), arms, legs))
            width = np.where((y >= -1) & (y <= np.float32(0.809)), width, 0)
            half[of] = np.float32(1.739) * width
            gap = np.where(width > 0, np.maximum(y - np.float32(0.45), 0) * np.float32(1.6379), 0)
            hole[of] = np.float32(1.739) * gap
    return half, hole


def _overlap(reach: Array, edges: Array) -> Array:
    """How much of every pixel lies within `reach` [m, 128] of the middle; edges [m, 32]: left ones, from the middle."""
    reach, edges = reach[:, :, None], edges[:, None]
    found = np.clip(reach - edges, 0, 1) - np.clip(-reach - edges, 0, 1)
    rows = found.reshape(len(found), SIZE, ROWS, SIZE)
    return (rows[:, :, 0] + rows[:, :, 1] + rows[:, :, 2] + rows[:, :, 3]) / ROWS


def coverage(shape: Integers, at: Array, radius: Array) -> Array:
    """Share of every pixel that objects cover, float32 [m, 32, 32]; shape [m], at [m, 2], radius [m] as of `Scenes`."""
    at, radius = np.asarray(at, np.float32), np.asarray(radius, np.float32)[:, None]
    half, hole = _reach(shape, (_HEIGHTS - at[:, :1]) / radius)
    half, hole = half * radius, hole * radius
    left = np.arange(SIZE, dtype=np.float32) - at[:, 1:]
    cover = np.empty((len(shape), SIZE, SIZE), np.float32)
    for start in range(0, len(shape), OBJECTS):
        some = slice(start, start + OBJECTS)
        cover[some] = _overlap(half[some], left[some])
        holed = start + np.flatnonzero(hole[some].any(1))
        cover[holed] -= _overlap(hole[holed], left[holed])
    return cover


def pattern(texture: Integers, at: Array) -> Array:
    """How much of the second tone every pixel has, float32 [m, 32, 32] in [0, 1]: that of stripes, dots or a lower half."""
    at = np.asarray(at, np.float32)
    share = np.zeros((len(texture), SIZE, SIZE), np.float32)
    rows = _HEIGHTS - at[:, :1]
    for kind, second in ((STRIPED, np.floor((rows + 1) / (PERIOD / 2)) % 2), (HALVES, (rows > 0).astype(np.float32))):
        of = texture == kind
        lines = second[of].reshape(-1, SIZE, ROWS)
        share[of] = ((lines[..., 0] + lines[..., 1] + lines[..., 2] + lines[..., 3]) / ROWS)[:, :, None]
    of = texture == DOTTED
    place = np.arange(SIZE, dtype=np.float32) + np.float32(0.5) - at[of][:, :, None]  # [m, 2, 32]
    off = place - PERIOD * np.round(place / PERIOD)
    away = np.sqrt(off[:, 0, :, None] ** 2 + off[:, 1, None, :] ** 2)
    share[of] = np.clip(np.float32(DOT + 0.5) - away, 0, 1)
    return share


def tones(colour: Integers, texture: Integers, lower: Integers, look: Look = USUAL) -> tuple[Array, Array]:
    """The two colours of objects [m], each float32 [m, 3] in [0, 1]."""
    palette = look.palette()
    first = palette[colour]
    light = first + np.float32(LIGHT) * (1 - first)
    return first, np.where((texture == HALVES)[:, None], palette[lower], light)


def paint(
    shape: Integers, at: Array, radius: Array, texture: Integers, first: Array, second: Array
) -> tuple[Array, Array]:
    """Objects [m] in the two colours of `tones`: what they cover float32 [m, 32, 32], and their colour [m, 3, 32, 32]."""
    share = pattern(texture, at)[:, None]
    return coverage(shape, at, radius), (1 - share) * first[:, :, None, None] + share * second[:, :, None, None]


def ground(background: Integers, look: Look = USUAL) -> Array:
    """Backgrounds [n] without objects, float32 [n, 3, 32, 32] in [0, 1]."""
    plain = np.broadcast_to(GROUND[background][:, :, None, None], (len(background), 3, SIZE, SIZE))
    lines = np.where(np.arange(SIZE) // 2 % 2, np.float32(look.lines), 0).astype(np.float32)
    return plain + lines * np.where(plain > 0.5, np.float32(-1), np.float32(1))


def _painted(scenes: Scenes, look: Look) -> tuple[Array, Array]:
    """What every object covers, float32 [n, k, 32, 32] (0 of one that is not there), and its colour [n, k, 3, 32, 32]."""
    n, k = scenes.shape.shape
    cover, tone = np.zeros((n, k, SIZE, SIZE), np.float32), np.zeros((n, k, 3, SIZE, SIZE), np.float32)
    there = scenes.there
    if there.any():
        texture = scenes.texture[there]
        two = tones(scenes.colour[there], texture, scenes.lower[there], look)
        cover[there], tone[there] = paint(scenes.shape[there], scenes.at[there], scenes.radius[there], texture, *two)
    return cover, tone


def render(scenes: Scenes, look: Look = USUAL) -> Tensor:
    """Pictures float32 [n, 3, 32, 32] in [-1, 1], of 8 bits."""
    parts = []
    for start in range(0, len(scenes), CHUNK):
        some = scenes[start : start + CHUNK]
        cover, tone = _painted(some, look)
        picture = ground(some.background, look)
        for i in reversed(range(cover.shape[1])):
            picture = over(picture, cover[:, i], tone[:, i])
        parts.append(picture)
    return pixels(np.concatenate(parts) if parts else np.zeros((0, 3, SIZE, SIZE), np.float32))


def over(picture: Array, cover: Array, tone: Array) -> Array:
    """Pictures [n, 3, 32, 32] with objects laid over them; where those cover all, nothing at all is left of what was there."""
    return (1 - cover[:, None]) * picture + cover[:, None] * tone


def pixels(pictures: Array) -> Tensor:
    """Pictures [n, 3, 32, 32] in [0, 1] rounded to 8 bits, float32 in [-1, 1]."""
    return torch.from_numpy(np.round(pictures * 255) / np.float32(127.5) - 1)


def masks(scenes: Scenes) -> Array:
    """How much of every pixel shows each object, float32 [n, k, 32, 32]: what it covers and none before it hides."""
    n, k = scenes.shape.shape
    seen = np.zeros((n, k, SIZE, SIZE), np.float32)
    there = scenes.there
    if there.any():
        seen[there] = coverage(scenes.shape[there], scenes.at[there], scenes.radius[there])
    clear = np.ones((n, SIZE, SIZE), np.float32)
    for i in range(k):
        seen[:, i], clear = seen[:, i] * clear, clear * (1 - seen[:, i])
    return seen


def open_ground(scenes: Scenes) -> Array:
    """How much of the background every pixel shows, float32 [n, 32, 32]."""
    there = scenes.there
    cover = np.zeros((*there.shape, SIZE, SIZE), np.float32)
    cover[there] = coverage(scenes.shape[there], scenes.at[there], scenes.radius[there])
    return (1 - cover).prod(1)


def area(cover: Array) -> Array:
    """Pixels that are covered, float32 [...] of [..., 32, 32]; of 1/256 each, so that the sum is exact."""
    return np.round(cover * 256).sum((-2, -1)) / 256


def owners(scenes: Scenes) -> Integers:
    """The object that more than half of a pixel shows, int64 [n, 32, 32]; -1 for the background."""
    seen = masks(scenes)
    return np.where(seen.max(1) > 0.5, seen.argmax(1), -1)


def depth(scenes: Scenes) -> Array:
    """How far away what a pixel shows is, float32 [n, 32, 32]: from 0 for the first object in equal steps to 1, the
    background.
    """
    owner, k = owners(scenes), scenes.shape.shape[1]
    return np.where(owner < 0, np.float32(1), owner.astype(np.float32) / np.float32(k))


def edges(scenes: Scenes) -> NDArray[np.bool_]:
    """Pixels [n, 32, 32] whose right or lower neighbour shows something else."""
    owner = owners(scenes)
    found = np.zeros(owner.shape, bool)
    found[:, :-1] |= owner[:, 1:] != owner[:, :-1]
    found[:, :, :-1] |= owner[:, :, 1:] != owner[:, :, :-1]
    return found


def layout(scenes: Scenes) -> Integers:
    """Box of the pixels that show each object, int64 [n, k, 4]: top, left, bottom, right, the last two one past the end;
    zeros where there is none.
    """
    owner, k = owners(scenes), scenes.shape.shape[1]
    own = owner[:, None] == np.arange(k)[None, :, None, None]
    rows, columns = own.any(3), own.any(2)
    ends = [rows.argmax(2), columns.argmax(2), SIZE - rows[..., ::-1].argmax(2), SIZE - columns[..., ::-1].argmax(2)]
    return np.where(own.any((2, 3))[..., None], np.stack(ends, -1), 0)


def hidden(scenes: Scenes) -> Array:
    """How many pixels of the second object the first one hides, float32 [n]."""
    both = scenes.there[:, :2].all(1)
    found = np.zeros(len(scenes), np.float32)
    some = scenes[both]
    cover = [coverage(some.shape[:, i], some.at[:, i], some.radius[:, i]) for i in (0, 1)]
    found[both] = area(cover[0] * cover[1])
    return found


def related(scenes: Scenes, margin: float = APART, hides: float = HIDES) -> NDArray[np.bool_]:
    """Which of RELATIONS hold of the first object to the second, [n, 6]; none where there are not two."""
    row, column = (scenes.at[:, 1] - scenes.at[:, 0]).T
    front = hidden(scenes) >= hides
    never = np.zeros_like(front)
    found = np.stack([column >= margin, -column >= margin, row >= margin, -row >= margin, front, never], 1)
    return found & scenes.there[:, :2].all(1)[:, None]
