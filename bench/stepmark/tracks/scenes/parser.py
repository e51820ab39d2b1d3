"""The eye: reads scenes back from pictures by drawing them again, with no network.

Objects are found one at a time, the one that explains most of the picture first. A bank of shapes in all sizes and places is
laid over what is not yet explained, in the colours that occur there, before and behind what was found (matching pursuit);
the best three shapes are moved and scaled until the drawn picture fits best (Gauss-Newton), colour and texture are chosen,
and the shape that fits best stays. At the end every object is fitted again beside the others, what is not needed is taken
away, and the order in which they hide each other is chosen.

What was found counts as an object only if it looks like one. ``sharpness`` is how much of the drawn contrast between
neighbouring pixels the picture has (1 for a render; white noise leaves it where it is, blur does not). ``misfit`` is what
the drawing leaves unexplained, noise subtracted, as a share of what the object changes in the picture. ``opacity`` is how
far the picture goes from what lies under the object to its colour. A blurred, transparent or broken object is found but not
``sure``. A picture is ``legible`` if everything found in it is sure and nothing else is there.

What it reads in 400 pictures a line (200 means and nearest training pictures, 378 and 359 with one object more), in per
cent: single objects by attribute, then full captions of one, two and three objects that are wholly right. Noise and shifts
of the colours are in units of pictures, whose range is 2, and pictures are cut off at its ends; blurs are in pixels::

                                      shape   col  size  text place     one   two three
    render                            100.0 100.0 100.0 100.0 100.0   100.0  99.5  98.8
    noise 0.05                        100.0 100.0 100.0 100.0 100.0   100.0  99.2  97.2
    noise 0.1                         100.0 100.0 100.0 100.0 100.0   100.0  97.2  93.0
    noise 0.2                          99.8 100.0 100.0 100.0 100.0    98.8  97.5  91.2
    noise 0.4                          83.8  84.2  84.2  84.2  84.2    11.0  13.0  11.8
    Gaussian blur 0.4                 100.0 100.0 100.0 100.0 100.0   100.0  99.2  98.5
    Gaussian blur 0.5                 100.0 100.0 100.0 100.0 100.0   100.0  99.2  98.0
    Gaussian blur 0.6                  67.5  67.5  67.5  67.5  67.5    67.5  46.2  31.8
    Gaussian blur 0.75                  8.8   9.0   9.0   8.5   9.0     8.2   0.0   0.2
    Gaussian blur 1.0                   0.0   0.0   0.0   0.0   0.0     0.0   0.0   0.0
    Gaussian blur 1.5                   0.0   0.0   0.0   0.0   0.0     0.0   0.0   0.0
    box blur 2                         68.0  68.2  68.2  68.2  68.2    68.0  47.0  32.2
    box blur 3                          0.0   0.2   0.2   0.0   0.2     0.0   0.0   0.0
    colour shift 0.1                  100.0 100.0 100.0 100.0 100.0   100.0  99.5  96.8
    colour shift 0.2                   75.2  74.8  75.2  75.0  75.2    11.5   9.8   9.8
    mean of 64 renders of the caption   0.0   0.0   0.0   0.0   0.0     0.0   0.0   0.0
    objects of opacity 0.85           100.0 100.0 100.0 100.0 100.0    99.8  98.8  94.5
    objects of opacity 0.7              6.8   3.8   6.8   3.5   6.8     0.0   0.0   0.0
    objects of opacity 0.5              0.0   0.0   0.0   0.0   0.0     0.0   0.0   0.0
    half of one beside half of another  4.8   5.0   3.0   4.0   5.5     0.2   0.5   0.5
    halves of two shapes, one colour    9.0  13.0  11.2  12.2  13.0     5.5   2.5   2.0
    one object more                    98.7  99.2  98.9  99.2  98.9     0.0   0.0
    nothing but noise                   4.2   3.0  10.0   7.0   2.5     0.0   0.0   0.0
    no object                           0.0   0.0   0.0   0.0   0.0     0.0   0.0   0.0
    nearest training picture           86.5  82.0  95.0  94.5  84.0    29.0   0.0   0.0

A nearest training picture is right where the training set has the very caption, as 29 % do of those of one object. Two
halves of one colour pass where both shapes fit what is left of them. That sharpness parts soft from blurred pictures between
blurs of 0.5 and 0.75 is a choice: an autoencoder may soften edges by half a pixel, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter, uniform_filter
from torch import Tensor

from stepmark.tracks.scenes.captions import COLOURS, SHAPES
from stepmark.tracks.scenes.drawing import (
    DOTTED,
    GROUND,
    HALVES,
    LIGHT,
    PLAIN,
    RADII,
    SIZE,
    STRIPED,
    USUAL,
    Look,
    Scenes,
    coverage,
    ground,
    paint,
    pattern,
)

MOST = 4  # objects that are looked for: one more than a scene may have
STRIDE = 2  # pixels between the places where the bank has its shapes
TONES = 5  # colours that are tried at once: those that occur most
GAIN = 1.2  # least of what an object must explain, in squared contrast times pixels
EXPLAINS = 0.3  # and its share of what it would explain if it were there to the full
SHARP = 0.65  # least sharpness
MISFIT = 0.07  # largest misfit, beside two standard deviations of what noise adds to it
OPAQUE = (0.8, 1.2)  # least and largest opacity
NOISE = 0.15  # largest standard deviation of noise, of a range of 1
OFF = 0.14  # largest distance of the background from its colour, of a range of 1
STRAY = 8  # pixels outside all objects that may differ from the background
CHUNK = 50  # pictures that are read at a time
ODD = 0.1  # how far they must differ, in means over 3x3 pixels, of a range of 1
AREA = 8.0  # pixels of an object that must be seen
TRIED = 3  # shapes of which a new object is fitted
FITS = 0.02  # misfit below which no other shape is tried
SPARE = 4.0  # most of what an object may explain, in squared contrast times pixels, that might not be needed
DELTA = 0.4  # pixels: of the differences that stand for slopes
READ = ("shape", "colour", "texture", "lower", "at", "radius")
_AXES = np.eye(3, dtype=np.float32)

Array = NDArray[np.float32]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Reading:
    """What was read from n pictures.

    scenes: k = 4 objects each, every one in front of those that follow; background -1 where it is none of the known ones.
    sure bool [n, 4]: objects that look like one. sharpness, misfit, opacity float32 [n, 4]; 0 where nothing was found.
    noise float32 [n]: standard deviation of the noise, of a range of 1. stray float32 [n]: pixels of the background that
    differ from it. legible bool [n]: everything found is sure and nothing else is there.
    """

    scenes: Scenes
    sure: Flags
    sharpness: Array
    misfit: Array
    opacity: Array
    noise: Array
    stray: Array
    legible: Flags

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, which: slice | Integers | Flags) -> Reading:
        """The readings of some of the pictures."""
        return Reading(**{name: value[which] for name, value in vars(self).items()})


@dataclass
class _Fit:
    """One hypothesis a row: an object of m pictures."""

    shape: Integers
    at: Array
    radius: Array
    texture: Integers
    first: Array
    second: Array
    colour: Integers
    lower: Integers

    def painted(self, shift: Array | None = None) -> tuple[Array, Array]:
        """As `paint`; shift [3]: added to row, column and radius."""
        move = np.zeros(3, np.float32) if shift is None else shift
        return paint(self.shape, self.at + move[:2], self.radius + move[2], self.texture, self.first, self.second)

    def take(self, which: Integers | Flags) -> _Fit:
        return _Fit(**{name: value[which] for name, value in vars(self).items()})

    def put(self, which: Integers | Flags, other: _Fit) -> None:
        for name, value in vars(self).items():
            value[which] = getattr(other, name)


@dataclass
class _Place:
    """Where an object goes in m pictures: picture = rest + share cover (tone - under), all [m, c, 32, 32]."""

    picture: Array
    rest: Array
    share: Array
    under: Array

    def take(self, which: Integers | Flags) -> _Place:
        return _Place(**{name: value[which] for name, value in vars(self).items()})

    def put(self, which: Integers | Flags, other: _Place) -> None:
        for name, value in vars(self).items():
            value[which] = getattr(other, name)

    def drawn(self, fit: _Fit, shift: Array | None = None) -> Array:
        cover, tone = fit.painted(shift)
        return self.rest + (self.share * cover)[:, None] * (tone - self.under)

    def errors(self, fit: _Fit) -> Array:
        return _energy(self.picture - self.drawn(fit))


def _energy(x: Array) -> Array:
    flat = x.reshape(len(x), int(np.prod(x.shape[1:])))
    return np.einsum("np,np->n", flat, flat)


@lru_cache(maxsize=1)
def _bank() -> tuple[Integers, Array, Array, Array]:
    """Shapes in all sizes and places: shape [t], at [t, 2], radius [t] and coverage of every 2x2 pixels [t, 256]."""
    middles = np.arange(5, SIZE - 4, STRIDE, dtype=np.float32)
    shape, radius, row, column = (
        each.ravel() for each in np.meshgrid(np.arange(len(SHAPES)), RADII, middles, middles, indexing="ij")
    )
    at = np.stack([row, column], 1)
    radius = radius.astype(np.float32)
    return shape, at, radius, _coarse(coverage(shape, at, radius)).reshape(len(shape), -1)


def _coarse(x: Array) -> Array:
    """Means over 2x2 pixels of [..., 32, 32]."""
    return x.reshape(*x.shape[:-2], SIZE // 2, 2, SIZE // 2, 2).mean((-3, -1))


def _proposals(place: list[_Place], look: Look, parts: bool) -> tuple[_Fit, Integers, Flags]:
    """The best object of each of three shapes of the bank for m pictures, in or behind what was found.

    place: where it goes if it is before and if it is behind the others. Returns 3 m hypotheses, which of the two places each
    has, and whether the picture [m] has anything to explain.
    """
    m = len(place[0].picture)
    palette = look.palette()
    tones = palette if parts else np.concatenate([palette, palette + np.float32(LIGHT / 2) * (1 - palette)])
    shape, at, radius, cover = _bank()
    halves = [cover] if not parts else _halved()
    gains, kinds = [], []
    for where in place:
        share, under, left = (_coarse(each) for each in (where.share, where.under, where.picture - where.rest))
        change = share[:, None, None] * (tones[None, :, :, None, None] - under[:, None])
        change = change.reshape(m, len(tones), 3, -1) * np.float32(2)  # of four pixels
        left = left.reshape(m, 1, 3, -1) * np.float32(2)
        along, full = (change * left).sum(2), (change * change).sum(2)  # [m, tones, 256]
        often = np.maximum(2 * along - full, 0).sum(2).argsort(1)[:, -TONES:]
        along, full = (np.take_along_axis(each, often[:, :, None], 1) for each in (along, full))
        total, ideal, kind = np.float32(0), np.float32(0), []
        for half in halves:
            cost = full @ (half * half).T
            gain = 2 * (along @ half.T) - cost  # [m, TONES, t]
            best = gain.argmax(1)[:, None]
            kind.append(np.take_along_axis(often, best[:, 0], 1))
            total = total + np.take_along_axis(gain, best, 1)[:, 0]
            ideal = ideal + np.take_along_axis(cost, best, 1)[:, 0]
        gains.append(np.where((total > GAIN) & (total > EXPLAINS * ideal), total, -np.inf))
        kinds.append(kind)
    gain = np.stack(gains, 2).reshape(m, len(SHAPES), -1)  # of every shape: in all sizes and places, before and behind
    best = gain.argmax(2)
    gain = np.take_along_axis(gain, best[:, :, None], 2)[:, :, 0]
    some = gain.max(1) > 0
    shapes = gain.argsort(1)[:, -TRIED:]
    best = np.take_along_axis(best, shapes, 1)
    row, which = best // len(place), best % len(place)
    row = row + shapes * (len(shape) // len(SHAPES))
    tone = [
        np.stack([kind[i] for kind in kinds], 2)[np.arange(m)[:, None], row, which].ravel() for i in range(len(halves))
    ]
    row = row.ravel()
    n = len(row)
    colour = tone[0] % len(COLOURS)
    texture, lower = (np.full(n, HALVES), tone[1]) if parts else (np.full(n, PLAIN), np.full(n, -1))
    fit = _Fit(shape[row], at[row], radius[row], texture, tones[tone[0]], tones[tone[-1]], colour, lower)
    return fit, which.ravel(), some


@lru_cache(maxsize=1)
def _halved() -> list[Array]:
    """The upper and the lower halves of the bank."""
    _, at, _, cover = _bank()
    low = _coarse(pattern(np.full(len(at), HALVES), at)).reshape(cover.shape)
    return [cover * (1 - low), cover * low]


def _move(fit: _Fit, place: _Place, times: int) -> Array:
    """Move and scale objects so that the pictures fit better, by so many steps of Gauss-Newton. Returns the errors [m]."""
    drawn = place.drawn(fit)
    error = _energy(place.picture - drawn)
    for i in range(times):
        # A rim on the edge of a pixel shows in one direction only, so that the two take turns.
        delta = np.float32(-DELTA if i % 2 else DELTA)
        slopes = [place.drawn(fit, delta * axis) - drawn for axis in _AXES]
        slope = np.stack(slopes, 1).reshape(len(error), 3, -1) / delta
        left = (place.picture - drawn).reshape(len(error), -1)
        square = np.matmul(slope, slope.transpose(0, 2, 1)) + np.float32(0.05) * np.eye(3, dtype=np.float32)
        step = np.linalg.solve(square, np.matmul(slope, left[:, :, None]))[:, :, 0]
        step = np.clip(step, (-1.5, -1.5, -0.6), (1.5, 1.5, 0.6)).astype(np.float32)
        new = fit.take(np.arange(len(error)))
        new.at = np.clip(fit.at + step[:, :2], 1, SIZE - 1)
        new.radius = np.clip(fit.radius + step[:, 2], 2.2, 6.8)
        other = place.drawn(new)
        after = _energy(place.picture - other)
        better = after < error
        fit.put(better, new.take(better))
        drawn[better], error = other[better], np.where(better, after, error)
    return error


def _colour(fit: _Fit, place: _Place, look: Look, parts: bool) -> None:
    """Give objects the colour and the texture that fit best."""
    m = len(fit.shape)
    share = place.share * coverage(fit.shape, fit.at, fit.radius)
    wanted = (place.picture - place.rest + share[:, None] * place.under).reshape(
        m, 3, -1
    )  # what share times tone should be
    weight = share.reshape(m, -1)
    palette = look.palette()
    kinds = len(palette)
    light = np.float32(LIGHT) * (1 - palette)
    errors, options = [], []
    for texture in (PLAIN, STRIPED, DOTTED, HALVES)[: 4 if parts else 3]:
        second = pattern(np.full(m, texture), fit.at).reshape(m, -1) * weight
        one, two = (np.einsum("ncp,np->nc", wanted, each) for each in (weight, second))
        squares = [
            np.einsum("np,np->n", a, b)[:, None] for a, b in ((weight, weight), (weight, second), (second, second))
        ]
        ups, downs = np.arange(kinds), np.full(kinds, -1)
        if texture == HALVES:
            ups, downs = (each.ravel() for each in np.meshgrid(ups, ups, indexing="ij"))
        first = palette[ups]
        more = palette[downs] - first if texture == HALVES else light[ups]
        fits = one @ first.T + two @ more.T
        norms = [(first * first).sum(1), (first * more).sum(1), (more * more).sum(1)]
        errors.append(squares[0] * norms[0] + 2 * squares[1] * norms[1] + squares[2] * norms[2] - 2 * fits)
        options += [(up, texture, down) for up, down in zip(ups, downs, strict=True)]
    best = np.array(options)[np.concatenate(errors, 1).argmin(1)]
    fit.colour, fit.texture, fit.lower = best.T
    fit.first = palette[fit.colour]
    fit.second = np.where((fit.texture == HALVES)[:, None], palette[fit.lower], fit.first + light[fit.colour])


def _sharpness(picture: Array, drawn: Array, region: Flags) -> Array:
    """How much of the differences between drawn neighbours in a region [m, 32, 32] the picture has, float32 [m]."""
    along = square = np.zeros(len(picture), np.float32)
    for axis in (2, 3):
        both = np.take(region, range(1, SIZE), axis - 1) & np.take(region, range(SIZE - 1), axis - 1)
        steps = np.diff(drawn, axis=axis) * both[:, None]
        along = along + np.einsum("nchw,nchw->n", steps, np.diff(picture, axis=axis))
        square = square + _energy(steps)
    return (along / np.maximum(square, 1e-6)).astype(np.float32)


def _best(fit: _Fit, errors: Array, of: int) -> tuple[_Fit, Integers]:
    """The best of every so many hypotheses, and its number."""
    m = len(errors) // of
    which = errors.reshape(m, of).argmin(1)
    return fit.take(np.arange(m) * of + which), which


class _Drawing:
    """What was found in m pictures: MOST slots, in `order` [m, MOST] from the front to the back."""

    def __init__(self, picture: Array, look: Look, parts: bool) -> None:
        self.picture, self.look, self.parts = picture, look, parts
        m = len(picture)
        bare = ground(np.zeros(1, np.int64), look)[0, 0, 0] == 0  # columns that have no lines
        sides = [picture[..., column] for column in (0, SIZE - 1) if bare[column]]
        base = np.median(np.concatenate([picture[:, :, 0, bare], picture[:, :, -1, bare], *sides], 2), 2)
        away = np.sqrt(((base[:, None] - GROUND) ** 2).sum(2))
        nearest = away.argmin(1)
        self.background = np.where(away.min(1) < OFF, nearest, -1)
        self.ground = ground(nearest, look) + (base - GROUND[nearest])[:, :, None, None]
        across = np.abs(picture[..., 1:] - picture[..., :-1]).reshape(m, -1)
        self.noise = np.quantile(across, 0.683, 1).astype(np.float32) * np.float32(2**-0.5)
        self.order = np.tile(np.arange(MOST), (m, 1))
        self.there = np.zeros((m, MOST), bool)
        self.cover = np.zeros((m, MOST, SIZE, SIZE), np.float32)
        self.tone = np.zeros((m, MOST, 3, SIZE, SIZE), np.float32)
        none, zeros = np.zeros(m, np.int64), np.zeros((m, 3), np.float32)
        self.fits = [
            _Fit(none + 0, zeros[:, :2] + 0, zeros[:, 0] + 3, none + 0, zeros + 0, zeros + 0, none + 0, none - 1)
            for _ in range(MOST)
        ]

    def composed(self, rows: Integers, order: Integers) -> Array:
        """The pictures of some rows, with their objects in that order."""
        picture, each = self.ground[rows], np.arange(len(rows))
        cover, tone = self.cover[rows], self.tone[rows]
        for i in reversed(range(MOST)):
            slot = order[:, i]
            picture = picture + cover[each, slot][:, None] * (tone[each, slot] - picture)
        return picture

    def place(self, rows: Integers, slot: int) -> _Place:
        """Where the object of a slot goes in some rows."""
        each, cover, tone = np.arange(len(rows)), self.cover[rows], self.tone[rows]
        under, share, over = self.ground[rows], np.ones((len(rows), SIZE, SIZE), np.float32), np.zeros(len(rows), bool)
        rest = under
        for i in reversed(range(MOST)):
            other = self.order[rows, i]
            own = other == slot
            over |= own
            shown = cover[each, other] * ~own[:, None, None]
            rest = rest + shown[:, None] * (tone[each, other] - rest)
            under = np.where(over[:, None, None, None], under, rest)
            share = np.where(over[:, None, None], share * (1 - shown), share)
        return _Place(self.picture[rows], rest, share, under)

    def put(self, rows: Integers, slot: int, fit: _Fit) -> None:
        """An object of that slot in some rows."""
        self.fits[slot].put(rows, fit)
        self.there[rows, slot] = True
        self.cover[rows, slot], self.tone[rows, slot] = fit.painted()

    def find(self, slot: int, rows: Integers) -> Integers:
        """Look for one more object in some rows. Returns those in which there is one."""
        rows = rows[_energy(self.picture[rows] - self.composed(rows, self.order[rows])) > GAIN]
        if not len(rows):
            return rows
        picture, rest = self.picture[rows], self.composed(rows, self.order[rows])
        clear = (1 - self.cover[rows]).prod(1)
        places = [_Place(picture, rest, np.ones_like(clear), rest), _Place(picture, rest, clear, self.ground[rows])]
        fit, which, some = _proposals(places if slot else places[:1], self.look, self.parts)
        if not some.any():
            return rows[:0]
        keep, source = np.repeat(some, TRIED), np.repeat(np.flatnonzero(some), TRIED)
        fit, which, place = fit.take(keep), which[keep], places[0].take(source)
        place.put(which == 1, places[1].take(source[which == 1]))
        _move(fit, place, 3)
        _colour(fit, place, self.look, self.parts)
        best, number = _best(fit, _move(fit, place, 1), TRIED)
        rows, behind = rows[some], which[np.arange(some.sum()) * TRIED + number] == 1
        self.put(rows, slot, best)
        for row, last in zip(rows, behind, strict=True):
            found = [other for other in self.order[row] if other < slot]
            self.order[row, : slot + 1] = [*found, slot] if last else [slot, *found]
            self.order[row, slot + 1 :] = range(slot + 1, MOST)  # slots that are empty yet
        return rows

    def arrange(self, slots: int) -> None:
        """The order in which the objects of the first slots hide each other best; as found, if none hides another."""
        rows = np.flatnonzero(self.there.sum(1) > 1)
        if not len(rows):
            return
        orders = [np.array([*order, *range(slots, MOST)]) for order in permutations(range(slots))]
        now = _energy(self.picture[rows] - self.composed(rows, self.order[rows]))
        tried = np.stack([
            _energy(self.picture[rows] - self.composed(rows, np.tile(order, (len(rows), 1)))) for order in orders
        ])  # fmt: skip
        better = tried.min(0) < now - 1e-3
        self.order[rows[better]] = np.array(orders)[tried.argmin(0)[better]]

    def polish(self, slot: int, rows: Integers) -> None:
        """Fit the object of a slot again beside the others in some rows; in every shape, where it does not fit well."""
        rows = rows[self.there[rows, slot]]
        if not len(rows):
            return
        place, fit = self.place(rows, slot), self.fits[slot].take(rows)
        _move(fit, place, 2)
        left = place.errors(fit) - self.expected(rows)
        shown = place.share * self.cover[rows, slot]
        poor = left > FITS * _energy(shown[:, None] * (self.tone[rows, slot] - place.under))
        if poor.any():
            kinds = len(SHAPES)
            source = np.repeat(np.flatnonzero(poor), kinds)
            places, tried = place.take(source), fit.take(source)
            tried.shape = np.tile(np.arange(kinds), poor.sum())
            _move(tried, places, 2)
            _colour(tried, places, self.look, self.parts)
            best, _ = _best(tried, places.errors(tried), kinds)
            _move(best, place.take(poor), 2)
            fit.put(poor, best)
        self.put(rows, slot, fit)

    def expected(self, rows: Integers) -> Array:
        """What noise alone leaves unexplained in the pictures of some rows."""
        return self.noise[rows] ** 2 * (3 * SIZE * SIZE)

    def prune(self, slots: int) -> None:
        """Take away what need not be there: the object that explains least, if the others explain nearly as much alone."""
        rows = np.flatnonzero(self.there.sum(1) > 1)
        if not len(rows):
            return
        now = _energy(self.picture[rows] - self.composed(rows, self.order[rows]))
        costs = np.full((slots, len(rows)), np.inf, np.float32)
        for slot in range(slots):
            own = self.there[rows, slot]
            costs[slot, own] = _energy(self.picture[rows[own]] - self.place(rows[own], slot).rest)
        least, more = costs.argmin(0), costs.min(0) - now
        small = more < SPARE
        rows, now, least = rows[small], now[small], least[small]
        kept = [fit.take(rows) for fit in self.fits]
        before = self.cover[rows].copy(), self.tone[rows].copy(), self.there[rows].copy()
        self.there[rows, least], self.cover[rows, least] = False, 0
        for slot in range(slots):
            self.polish(slot, rows)
        worse = _energy(self.picture[rows] - self.composed(rows, self.order[rows])) > now + GAIN
        again = rows[worse]
        self.cover[again], self.tone[again], self.there[again] = (each[worse] for each in before)
        for fit, old in zip(self.fits, kept, strict=True):
            fit.put(again, old.take(worse))

    def judged(self) -> Reading:
        """What was found, and whether it looks like it."""
        m = len(self.picture)
        each, rows = np.arange(m), np.arange(m)[:, None]
        there = self.there[rows, self.order]
        drawn = self.composed(each, self.order)
        left, variance = self.picture - drawn, self.noise**2
        sharpness, misfit, opacity, allowed, seen = (np.zeros((m, MOST), np.float32) for _ in range(5))
        near, clear = np.zeros((m, SIZE, SIZE), bool), np.ones((m, SIZE, SIZE), np.float32)
        for i in range(MOST):
            slot = self.order[:, i]
            cover = self.cover[each, slot]
            shown = cover * clear
            region = maximum_filter(shown > 0, (1, 3, 3)) & (
                clear > 0.5
            )  # the object and its rim, but for what hides it
            near |= maximum_filter(cover > 0, (1, 5, 5))
            clear = clear * (1 - cover)
            change = shown[:, None] * (self.tone[each, slot] - self._under(slot))
            full, pixels = np.maximum(_energy(change), 1e-6), region.sum((1, 2))
            sharpness[:, i] = _sharpness(self.picture, drawn, region)
            misfit[:, i] = (_energy(left * region[:, None]) - 3 * variance * pixels) / full
            allowed[:, i] = MISFIT + 2 * variance * np.sqrt(6 * pixels) / full
            opacity[:, i] = 1 + np.einsum("nchw,nchw->n", left, change) / full
            seen[:, i] = shown.sum((1, 2))
        solid = (opacity > OPAQUE[0]) & (opacity < OPAQUE[1])
        sure = there & (sharpness > SHARP) & (misfit < allowed) & solid & (seen > AREA)
        odd = np.sqrt((uniform_filter(left, (1, 1, 3, 3)) ** 2).sum(1))  # noise is smaller in means over 3x3 pixels
        stray = ((odd > np.maximum(ODD, 2.5 * self.noise)[:, None, None]) & ~near).sum((1, 2)).astype(np.float32)
        legible = (sure == there).all(1) & (stray < STRAY) & (self.noise < NOISE) & (self.background >= 0)
        values = {name: np.stack([getattr(fit, name) for fit in self.fits], 1)[rows, self.order] for name in READ}
        scenes = Scenes(background=self.background, **values)
        scenes = replace(scenes, shape=np.where(there, scenes.shape, -1))
        for measure in (sharpness, misfit, opacity):
            measure[~there] = 0
        return Reading(scenes, sure, sharpness, misfit, opacity, self.noise, stray, legible)

    def _under(self, slot: Integers) -> Array:
        """What lies under the object of a slot [m] of its own in every picture."""
        found = self.ground.copy()
        for which in range(MOST):
            rows = np.flatnonzero(slot == which)
            found[rows] = self.place(rows, which).under
        return found


def parse(images: Tensor, look: Look = USUAL, parts: bool = False) -> Reading:
    """Read pictures float32 [n, 3, 32, 32] in [-1, 1]; values beyond are cut off, pictures with none are not legible.

    Args:
        look: how the scenes are drawn.
        parts: objects may have a lower half of another colour.
    """
    shown = (images.detach().cpu().float().clamp(-1, 1) + 1) / 2
    whole = shown.isfinite().all((1, 2, 3))
    pixels = torch.where(whole[:, None, None, None], shown, 0).numpy()
    found = joined([_read(pixels[start : start + CHUNK], look, parts) for start in range(0, len(pixels), CHUNK)])
    return replace(found, legible=found.legible & whole.numpy())


def joined(readings: Sequence[Reading]) -> Reading:
    """Readings one after the other as one."""
    first = readings[0]
    scenes = {name: np.concatenate([getattr(each.scenes, name) for each in readings]) for name in vars(first.scenes)}
    rest = {
        name: np.concatenate([getattr(each, name) for each in readings]) for name in vars(first) if name != "scenes"
    }
    return Reading(scenes=Scenes(**scenes), **rest)


def _read(pixels: Array, look: Look, parts: bool) -> Reading:
    drawing = _Drawing(pixels, look, parts)
    rows, slots = np.arange(len(pixels)), 0
    while slots < MOST and len(rows):
        rows = drawing.find(slots, rows)
        slots += 1
    drawing.arrange(slots)
    rows = np.arange(len(pixels))
    for slot in range(slots):
        drawing.polish(slot, rows)
    for _ in range(2):
        drawing.arrange(slots)
        drawing.prune(slots)
    drawing.arrange(slots)
    return drawing.judged()
