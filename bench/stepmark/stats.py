"""Bootstrap intervals, paired tests, tie groups, Pareto fronts and costs to a quality, on numpy alone.

Vocabulary: a *resample* is one row of `bootstrap_indices`; a metric evaluated on B rows gives an array of B
resamples. Two methods evaluated on the same rows are *paired*: index b means the same items for both, so
their difference is free of the luck of the draw. Metrics of several seeds are stacked as [S, B]; B is at
least a few hundred for a test to be worth reading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Direction = Literal["lower", "higher"]


class Interval(NamedTuple):
    """A closed interval, in the unit of whatever it was computed from."""

    low: float
    high: float


def _finite(values: ArrayLike, what: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"{what}: no values")
    if not np.isfinite(array).all():
        raise ValueError(f"{what}: {int((~np.isfinite(array)).sum())} of {array.size} values are not finite")
    return array


def _phi(z: float) -> float:
    """Upper tail of the standard normal."""
    return 0.5 * math.erfc(z / math.sqrt(2.0))


# resampling ---------------------------------------------------------------------------------------------


def bootstrap_indices(n: int, B: int, seed: int) -> NDArray[np.int64]:
    """Item indices of B bootstrap resamples of n items: int64 [B, n], uniform with replacement.

    Made from the raw PCG64 stream, which numpy promises never to change, and not from `Generator.integers`,
    which it may: records written years apart must stay paired.
    """
    if n < 1 or B < 1:
        raise ValueError(f"bootstrap_indices needs n >= 1 and B >= 1, not n={n}, B={B}")
    raw = np.random.PCG64(seed).random_raw(B * n)
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.minimum((unit * n).astype(np.int64), n - 1).reshape(B, n)


@lru_cache(maxsize=64)
def _seed_draws(seeds: int, resamples: int, draws: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which seeds [draws, seeds] and which resample [draws, 1] every test of this shape takes: made once."""
    # Child seeds keep the two index streams apart while one number repeats the test.
    streams = np.random.SeedSequence(seed).generate_state(2)
    which = bootstrap_indices(seeds, draws, int(streams[0]))
    row = np.zeros((draws, 1), dtype=np.int64)
    if resamples > 1:
        row = bootstrap_indices(resamples, draws, int(streams[1]))[:, :1].copy()
    which.setflags(write=False)
    row.setflags(write=False)
    return which, row


def drawn(tables: ArrayLike, draws: int = 2000, seed: int = 0) -> NDArray[np.float64]:
    """Resamples [..., S, B] as the draws [..., draws] of a paired test: each takes S seeds with replacement and one
    resample index, the same for all of them, and averages. With S = 1 the B resamples are used as they are.

    Which seeds and indices are taken hangs on S, B and `seed` alone. The difference of two rows of draws is therefore
    the draws of the difference, and a table that stands in many comparisons needs drawing once.
    """
    array = np.asarray(tables, dtype=np.float64)
    seeds, resamples = array.shape[-2:]
    if seeds == 1:
        return array[..., 0, :]
    which, row = _seed_draws(seeds, resamples, draws, seed)
    flat = array.reshape(*array.shape[:-2], seeds * resamples)
    total = np.take(flat, which[:, 0] * resamples + row[:, 0], axis=-1)
    for s in range(1, seeds):
        total += np.take(flat, which[:, s] * resamples + row[:, 0], axis=-1)
    return total / seeds


def bootstrap_medians(samples: ArrayLike, draws: int, seed: int = 0) -> NDArray[np.float64]:
    """Medians [R, draws] of bootstrap resamples of each row of `samples` [R, n]; all rows take the same draws.

    Nothing is sorted twice: how often a draw holds each place of a row says where its median lies among the row's
    sorted values.
    """
    array = np.asarray(samples, dtype=np.float64)
    n = array.shape[1]
    times = _multiplicities(n, draws, seed)
    order = np.argsort(array, axis=1, kind="stable")
    ordered = np.take_along_axis(array, order, axis=1)

    def statistic(k: int) -> NDArray[np.float64]:
        """The k-th smallest value of each draw, counted from nought."""
        counted = np.zeros((array.shape[0], draws), dtype=times.dtype)
        below = np.zeros_like(counted)
        for j in range(n):
            counted += times[order[:, j]]
            below += (counted <= k).view(np.uint8)
        return np.take_along_axis(ordered, below.astype(np.intp), axis=1)

    if n % 2:
        return statistic(n // 2)
    with np.errstate(over="ignore"):
        return (statistic(n // 2 - 1) + statistic(n // 2)) / 2


@lru_cache(maxsize=64)
def _multiplicities(n: int, draws: int, seed: int) -> NDArray[Any]:
    """How often each of n places [n, draws] stands in each bootstrap resample."""
    index = bootstrap_indices(n, draws, seed)
    counted = np.bincount((index + n * np.arange(draws)[:, None]).ravel(), minlength=n * draws)
    found = counted.reshape(draws, n).T.astype(np.uint8 if n < 256 else np.uint32, order="C")
    found.setflags(write=False)
    return found


def percentile_interval(resamples: ArrayLike, level: float = 0.95) -> Interval:
    """Percentile bootstrap interval of the given level (Efron and Tibshirani 1993, section 13.3)."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    values = _finite(resamples, "percentile_interval")
    low, high = np.quantile(values, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(low), float(high))


def intervals(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the 95 % percentile intervals of rows [n, draws], as `percentile_interval` gives them one at a time."""
    ordered = np.sort(rows, axis=1)  # faster by half than the selection that np.quantile does
    ends = []
    for level in (0.025, 0.975):
        place = level * (rows.shape[1] - 1)
        below = int(place)
        a, b = ordered[:, below], ordered[:, min(below + 1, rows.shape[1] - 1)]
        share = place - below
        with np.errstate(over="ignore", invalid="ignore"):
            # Which of the two ways round is what np.quantile does, to the last bit.
            ends.append(a + (b - a) * share if share < 0.5 else b - (b - a) * (1 - share))
    return ends[0], ends[1]


def mean_interval(values: ArrayLike, B: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Percentile bootstrap interval of the mean of `values` [n]."""
    array = _finite(values, "mean_interval").ravel()
    return percentile_interval(array[bootstrap_indices(array.size, B, seed)].mean(axis=1), level)


def centred(resamples: ArrayLike, value: ArrayLike) -> NDArray[np.float64]:
    """Resamples [..., B] shifted so that their mean is the value [...] over all items.

    A resample repeats items, and metrics that reward variety (a Frechet distance above all) read worse on it
    than on the full set. The shift takes that bias out to first order; it is nothing for a mean.
    """
    array = _finite(resamples, "centred")
    return array + (np.asarray(value, dtype=np.float64) - array.mean(axis=-1))[..., None]


# tests --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedTest:
    """Result of a paired test of a against b: difference a - b, its 95 % interval, two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def paired_test(a: ArrayLike, b: ArrayLike, draws: int = 2000, seed: int = 0) -> PairedTest:
    """Test whether two metrics differ, from their paired resamples [B] or, over seeds, [S, B].

    Over seeds each draw takes S seeds with replacement and one resample index, the same for all of them, and
    averages; with S = 1 the B resamples are used as they are. The p-value inverts the percentile interval:
    twice the smaller tail of the differences at zero. Where no draw crosses zero the draws can say no more
    than p < 2 / draws, which a Holm correction over a long table would turn into "tied"; there the normal
    tail at the draws' own mean and spread is used, never above that bound. Differences that never vary
    (counts) have p = 0, or 1 where they are nought.
    """
    first, second = np.atleast_2d(_finite(a, "paired_test")), np.atleast_2d(_finite(b, "paired_test"))
    if first.shape != second.shape:
        raise ValueError(f"paired_test: shapes {first.shape} and {second.shape} are not paired")
    found = paired_tests(first[None], second[None], drawn(first[None], draws, seed), drawn(second[None], draws, seed))
    return found[0]


def paired_tests(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    first_draws: NDArray[np.float64],
    second_draws: NDArray[np.float64],
) -> list[PairedTest]:
    """`paired_test` of many pairs at once: their resamples [n, S, B], and what `drawn` makes of these."""
    means = first.mean(axis=(1, 2)) - second.mean(axis=(1, 2))
    differences = first_draws - second_draws
    low, high = intervals(differences)
    p = _tail_p(differences)
    return [PairedTest(*each) for each in zip(*(x.tolist() for x in (means, low, high, p)), strict=True)]


def _tail_p(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two-sided p-values of rows of draws [n, draws]."""
    count = differences.shape[1]
    tail = np.minimum((differences <= 0).sum(axis=1), (differences >= 0).sum(axis=1))
    p = np.minimum(1.0, 2.0 * (tail + 1) / (count + 1))
    (clear,) = np.nonzero(tail == 0)
    if clear.size:
        spread, mean = differences[clear].std(axis=1), differences[clear].mean(axis=1)
        for i, s, m in zip(clear, spread.tolist(), mean.tolist(), strict=True):
            p[i] = min(p[i], 2.0 * _phi(abs(m) / s)) if s else 0.0
    return p


def paired_test_values(a: ArrayLike, b: ArrayLike, B: int = 2000, seed: int = 0) -> PairedTest:
    """Test whether the means of paired values [n] differ (items, seeds or rounds; the same order in both).

    Bootstrap-t: the studentised difference is resampled under the null hypothesis (the differences centred on
    nought), which keeps the nominal error even at n of about ten (Efron and Tibshirani 1993, section 12.5 and
    algorithm 16.2). Needs n >= 2.
    """
    first, second = _finite(a, "paired_test_values").ravel(), _finite(b, "paired_test_values").ravel()
    if first.shape != second.shape:
        raise ValueError(f"paired_test_values: {first.size} and {second.size} values are not paired")
    n = first.size
    if n < 2:
        raise ValueError("paired_test_values needs at least two pairs")
    differences = first - second
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    if error == 0.0:
        return PairedTest(mean, mean, mean, 1.0 if mean == 0.0 else 0.0)
    drawn = differences[bootstrap_indices(n, B, seed)]
    errors = drawn.std(axis=1, ddof=1) / math.sqrt(n)
    keep = errors > 0  # a resample of one repeated pair has no spread and says nothing about t
    if not keep.any():
        raise ValueError("paired_test_values: every resample repeats one pair, B is too small")
    t = (drawn.mean(axis=1)[keep] - mean) / errors[keep]
    p = (1 + int((np.abs(t) >= abs(mean) / error).sum())) / (t.size + 1)
    below, above = np.quantile(t, [0.025, 0.975])
    return PairedTest(mean, mean - float(above) * error, mean - float(below) * error, float(min(1.0, p)))


def standardised_difference(a: ArrayLike, b: ArrayLike, items: int) -> float | None:
    """The mean difference a - b in standard deviations of the paired differences of single items.

    `a` and `b` are paired resamples [B] or, over seeds, [S, B]. The spread of the difference over resamples, pooled
    over seeds, is its standard error over items; times the root of `items` it is the spread of one item's difference.
    For a metric that is a mean over items this is Cohen's d of paired samples; for others, such as a Frechet distance,
    it is the same ratio by analogy. Unlike p it does not grow with the number of items. None where nothing varies but
    the means differ: then no spread can be the unit.
    """
    first, second = np.atleast_2d(_finite(a, "effect size")), np.atleast_2d(_finite(b, "effect size"))
    if first.shape != second.shape or items < 1:
        raise ValueError(f"effect size: shapes {first.shape} and {second.shape} are not paired, or {items} items")
    return standardised_differences(first[None], second[None], items)[0]


def standardised_differences(first: NDArray[np.float64], second: NDArray[np.float64], items: int) -> list[float | None]:
    """`standardised_difference` of many pairs [n, S, B] at once."""
    grid = first - second
    means = grid.mean(axis=(1, 2))
    spreads = np.sqrt(grid.var(axis=2).mean(axis=1) * items)
    # Below the rounding of the differences themselves a spread is no spread.
    least = 1e-12 * np.maximum(np.abs(first).max(axis=(1, 2)), np.abs(second).max(axis=(1, 2)))
    found: list[float | None] = []
    for mean, spread, bound in zip(means.tolist(), spreads.tolist(), least.tolist(), strict=True):
        found.append(mean / spread if spread > bound else 0.0 if mean == 0.0 else None)
    return found


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjusted p-values, in the given order (Holm 1979)."""
    p = np.asarray(p_values, dtype=np.float64).ravel()
    if p.size == 0:
        return p
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("holm: p-values must lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def tie_groups(
    names: Sequence[str],
    resamples: Mapping[str, ArrayLike],
    higher_is_better: bool,
    alpha: float = 0.05,
    points: Mapping[str, float] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> list[list[str]]:
    """Names in groups, best first: a group holds its best and every other not significantly different from
    it.

    `resamples[name]` is [B] or [S, B], paired over the names; `points` orders the names (default: the mean of
    their resamples). Within a group the comparisons with its best are Holm-corrected at `alpha`. Being tied
    is not transitive, so a noisy method may join a group ahead of a sharper one that stands above it.
    """
    rows = {name: np.atleast_2d(_finite(resamples[name], f"tie_groups: {name}")) for name in names}
    if len(rows) != len(names):
        raise ValueError("tie_groups: names must be unique")
    if len(shapes := {row.shape for row in rows.values()}) > 1:
        raise ValueError(f"tie_groups: shapes {sorted(shapes)} are not paired")
    drawings = {name: drawn(row, draws, seed) for name, row in rows.items()}
    value = {name: float(points[name]) if points is not None else float(rows[name].mean()) for name in names}
    left = sorted(names, key=lambda name: (-value[name] if higher_is_better else value[name], name))
    groups: list[list[str]] = []
    while left:
        best, others = left[0], left[1:]
        adjusted = holm(_tail_p(drawings[best] - np.stack([drawings[name] for name in others])) if others else [])
        tied = {name for name, p in zip(others, adjusted, strict=True) if p > alpha}
        groups.append([best, *(name for name in others if name in tied)])
        left = [name for name in others if name not in tied]
    return groups


# curves -------------------------------------------------------------------------------------------------


def pareto_front(points: ArrayLike, directions: Sequence[Direction] = ("lower", "higher")) -> list[int]:
    """Indices of the points [N, K] that no other point dominates, ordered by the first axis, then the second.

    `directions` says for each of the K axes which way is better; the default is cost and quality. A point
    dominates another if it is at least as good on every axis and better on one; equal points both stay.
    """
    array = np.asarray(points, dtype=np.float64)
    if array.size == 0:
        return []
    if array.ndim != 2 or array.shape[1] != len(directions):
        raise ValueError(f"pareto_front: points of shape {array.shape} do not match {len(directions)} directions")
    _finite(array, "pareto_front")
    costs = array * np.array([{"lower": 1.0, "higher": -1.0}[direction] for direction in directions])
    no_worse = (costs[:, None, :] <= costs[None, :, :]).all(axis=2)
    better = (costs[:, None, :] < costs[None, :, :]).any(axis=2)
    front = np.flatnonzero(~(no_worse & better).any(axis=0))
    return sorted((int(i) for i in front), key=lambda i: (*costs[i], i))


def hypervolume(points: ArrayLike, reference: tuple[float, float], quality: Direction = "higher") -> float:
    """Area that the points [N, 2] of (cost, quality) dominate up to the reference point.

    The cost axis is logarithmic (base ten: the unit is decades x the unit of quality), since a saving from
    100 to 50 calls is worth that from 2 to 1. `reference` = (largest cost, worst quality) is declared by the
    caller and must be the same for every method compared. Points beyond the reference on either axis add
    nothing.
    """
    if reference[0] <= 0 or not all(map(math.isfinite, reference)):
        raise ValueError(f"hypervolume: reference {reference} needs a positive cost and finite numbers")
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    if array.size and (not np.isfinite(array).all() or (array[:, 0] <= 0).any()):
        raise ValueError("hypervolume: costs must be positive and all values finite")
    sign = 1.0 if quality == "higher" else -1.0
    width = math.log10(reference[0]) - np.log10(array[:, 0])
    height = sign * (array[:, 1] - reference[1])
    area, best = 0.0, 0.0
    # From the cheapest on, a point adds the strip by which it rises above all cheaper ones.
    for i in np.argsort(-width, kind="stable"):
        if width[i] > 0 and height[i] > best:
            area += float(width[i] * (height[i] - best))
            best = float(height[i])
    return area


def cost_to_quality(curve: ArrayLike, threshold: float, quality: Direction = "higher") -> float | None:
    """Smallest cost at which the curve [N, 2] of (cost, quality) reaches the threshold; None if it never
    does.

    Between neighbouring rungs quality is taken as linear in the logarithm of cost. Nothing is extrapolated: a
    curve that starts beyond the threshold returns its first cost, which is then an upper bound.
    """
    array = np.asarray(curve, dtype=np.float64).reshape(-1, 2)
    if array.size == 0:
        return None
    if not np.isfinite(array).all() or (array[:, 0] <= 0).any():
        raise ValueError("cost_to_quality: costs must be positive and all values finite")
    sign = 1.0 if quality == "higher" else -1.0
    array = array[np.argsort(array[:, 0], kind="stable")]
    over = sign * (array[:, 1] - threshold)
    reached = np.flatnonzero(over >= 0)
    if reached.size == 0:
        return None
    i = int(reached[0])
    if i == 0 or over[i] == 0:
        return float(array[i, 0])
    share = -over[i - 1] / (over[i] - over[i - 1])
    before, after = np.log(array[i - 1, 0]), np.log(array[i, 0])
    return float(np.exp(before + share * (after - before)))
