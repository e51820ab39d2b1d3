"""Known answers for every statistic, and the error rates that intervals and tests promise."""

from __future__ import annotations

import numpy as np
import pytest

from stepmark.stats import (
    bootstrap_indices,
    centred,
    cost_to_quality,
    holm,
    hypervolume,
    mean_interval,
    paired_test,
    paired_test_values,
    pareto_front,
    percentile_interval,
    tie_groups,
)


def test_indices_are_pinned_for_ever():
    rows = bootstrap_indices(10, 2, seed=7)
    assert rows.dtype == np.int64
    assert rows.shape == (2, 10)
    assert rows.tolist() == [[6, 8, 7, 2, 3, 8, 0, 8, 7, 4], [3, 2, 2, 4, 5, 5, 9, 7, 6, 9]]
    assert not np.array_equal(rows, bootstrap_indices(10, 2, seed=8))


def test_indices_are_uniform():
    counts = np.bincount(bootstrap_indices(7, 10_000, seed=0).ravel(), minlength=7)
    assert counts.size == 7
    # Chi-square with 6 degrees of freedom: 22.5 is its 99.9 % point.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 22.5


@pytest.mark.parametrize(("n", "B"), [(0, 5), (5, 0)])
def test_indices_refuse_nothing(n, B):
    with pytest.raises(ValueError, match="n >= 1"):
        bootstrap_indices(n, B, 0)


def test_percentile_interval_known_answer():
    assert percentile_interval(np.arange(1001)) == pytest.approx((25.0, 975.0))
    assert percentile_interval(np.arange(1001), level=0.5) == pytest.approx((250.0, 750.0))


def test_percentile_interval_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="1 of 3 values"):
        percentile_interval([1.0, float("nan"), 2.0])


def test_interval_covers_as_promised():
    rng = np.random.default_rng(1)
    data = rng.exponential(size=(600, 80))
    inside = [low <= 1.0 <= high for low, high in (mean_interval(row, B=400) for row in data)]
    # Binomial spread at 600 is 0.9 %; on skewed data at n = 80 the percentile interval falls a little short.
    assert 0.91 <= np.mean(inside) <= 0.97


def test_centred_shifts_the_mean_and_nothing_else():
    shifted = centred([1.0, 2.0, 6.0], 2.0)
    assert shifted.tolist() == [0.0, 1.0, 5.0]


def test_paired_test_sees_a_difference_that_unpaired_intervals_hide():
    rng = np.random.default_rng(2)
    items = rng.normal(size=200)
    rows = bootstrap_indices(200, 1000, seed=0)
    a = items[rows].mean(axis=1)
    b = (items + 0.02 + 0.01 * rng.normal(size=200))[rows].mean(axis=1)
    assert percentile_interval(a).high > percentile_interval(b).low  # they overlap
    found = paired_test(a, b)
    assert found.p < 0.001
    assert found.high < 0
    assert found.difference == pytest.approx(-0.02, abs=0.003)
    assert paired_test(b, a).difference == -found.difference


def test_paired_test_of_constants():
    assert paired_test([4.0, 4.0], [4.0, 4.0]).p == 1.0
    assert paired_test([4.0, 4.0], [5.0, 5.0]).p == 0.0


def test_paired_test_tail_is_not_cut_off_by_the_number_of_draws():
    rng = np.random.default_rng(3)
    assert paired_test(rng.normal(10.0, 1.0, 200), np.zeros(200)).p < 1e-12
    assert 0.02 < paired_test(rng.normal(1.96, 1.0, 5000), np.zeros(5000)).p < 0.08


def test_paired_test_over_seeds_widens_by_their_spread():
    calm = np.random.default_rng(4).normal(1.0, 0.01, size=(4, 500))
    spread = calm + np.array([[-2.0], [-1.0], [1.0], [2.0]])
    nought = np.zeros((4, 500))
    assert paired_test(calm, nought).p < 1e-6
    found = paired_test(spread, nought)
    assert found.p > 0.05
    assert found.low < 0 < found.high
    # Mean of four draws from {-2, -1, 1, 2}: standard deviation sqrt(2.5) / 2, hence a 95 % width near 3.
    assert 2.4 < found.high - found.low < 3.6


def test_paired_test_refuses_what_is_not_paired():
    with pytest.raises(ValueError, match="not paired"):
        paired_test([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("n", [8, 30])
def test_paired_test_values_keeps_its_nominal_error(n):
    rng = np.random.default_rng(5)
    shared = rng.normal(scale=5.0, size=(1000, n))  # what pairing takes out
    a, b = shared + rng.normal(size=(1000, n)), shared + rng.normal(size=(1000, n))
    rejected = np.mean([paired_test_values(x, y, B=300).p <= 0.05 for x, y in zip(a, b, strict=True)])
    assert 0.02 <= rejected <= 0.07  # at n = 8 a little on the safe side


def test_paired_test_over_resamples_keeps_its_nominal_error():
    rng = np.random.default_rng(6)
    rows = bootstrap_indices(60, 300, seed=0)
    a, b = rng.normal(size=(1000, 60)), rng.normal(size=(1000, 60))
    rejected = np.mean(
        [paired_test(x[rows].mean(axis=1), y[rows].mean(axis=1)).p <= 0.05 for x, y in zip(a, b, strict=True)]
    )
    assert 0.03 <= rejected <= 0.08


def test_paired_test_values_has_power_and_edges():
    rng = np.random.default_rng(7)
    base = rng.normal(size=30)
    found = paired_test_values(base + 1.0 + 0.1 * rng.normal(size=30), base)
    assert found.p < 0.01
    assert found.low < 1.0 < found.high
    assert found.high - found.low < 0.2
    assert paired_test_values([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired_test_values([2.0, 3.0], [1.0, 2.0]).p == 0.0
    with pytest.raises(ValueError, match="two pairs"):
        paired_test_values([1.0], [2.0])


def test_holm_known_answer():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([]).size == 0
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([1.2])


def test_tie_groups():
    rng = np.random.default_rng(8)
    noise = rng.normal(size=500)
    resamples = {
        "best": 10 + noise,
        "level": 9.9 + noise + rng.normal(size=500),
        "second": 6 + noise + 0.1 * rng.normal(size=500),
        "last": 1 + noise + 0.1 * rng.normal(size=500),
    }
    names = ["last", "second", "level", "best"]
    assert tie_groups(names, resamples, higher_is_better=True) == [["best", "level"], ["second"], ["last"]]
    assert tie_groups(names, resamples, higher_is_better=False) == [["last"], ["second"], ["level", "best"]]
    assert tie_groups([], {}, higher_is_better=True) == []


def test_tie_groups_separate_a_long_table():
    rng = np.random.default_rng(9)
    resamples = {f"m{i:02d}": i + 0.1 * rng.normal(size=200) for i in range(60)}
    groups = tie_groups(sorted(resamples), resamples, higher_is_better=False)
    assert groups == [[f"m{i:02d}"] for i in range(60)]


def test_pareto_front_known_answer():
    points = [(1, 1), (2, 3), (3, 2), (4, 5), (2, 3), (5, 5)]
    assert pareto_front(points) == [0, 1, 4, 3]
    assert pareto_front(points, ("lower", "lower")) == [0]
    assert pareto_front([]) == []
    with pytest.raises(ValueError, match="directions"):
        pareto_front([(1, 2, 3)])


def test_pareto_front_by_definition():
    points = np.random.default_rng(10).integers(0, 6, size=(60, 3))
    front = set(pareto_front(points, ("lower", "higher", "lower")))
    signed = points * [1, -1, 1]
    for i, p in enumerate(signed):
        dominated = any((q <= p).all() and (q < p).any() for q in signed)
        assert (i in front) == (not dominated)


def test_hypervolume_known_answer():
    reference = (100.0, 0.0)
    assert hypervolume([(1, 3)], reference) == pytest.approx(6.0)  # two decades x 3
    assert hypervolume([(1, 3), (10, 5)], reference) == pytest.approx(6.0 + 1 * 2)
    assert hypervolume([(1, 3), (10, 5), (10, 4), (200, 9), (1, -1)], reference) == pytest.approx(8.0)
    assert hypervolume([(1, 2)], (100.0, 5.0), quality="lower") == pytest.approx(6.0)
    assert hypervolume([], reference) == 0.0
    with pytest.raises(ValueError, match="positive"):
        hypervolume([(0, 1)], reference)


def test_hypervolume_by_counting():
    rng = np.random.default_rng(11)
    points = np.column_stack([10 ** rng.uniform(0, 2, 8), rng.uniform(0, 1, 8)])
    grid = np.column_stack([rng.uniform(0, 2, 200_000), rng.uniform(0, 1, 200_000)])
    covered = np.zeros(len(grid), dtype=bool)
    for cost, quality in points:
        covered |= (grid[:, 0] >= np.log10(cost)) & (grid[:, 1] <= quality)
    assert hypervolume(points, (100.0, 0.0)) == pytest.approx(2.0 * covered.mean(), abs=0.01)


def test_cost_to_quality_known_answer():
    curve = [(4, 3.0), (1, 1.0), (16, 4.0)]
    assert cost_to_quality(curve, 2.0) == pytest.approx(2.0)  # half way from 1 to 4 in the logarithm
    assert cost_to_quality(curve, 3.0) == 4.0
    assert cost_to_quality(curve, 3.5) == pytest.approx(8.0)
    assert cost_to_quality(curve, 0.5) == 1.0
    assert cost_to_quality(curve, 4.5) is None
    assert cost_to_quality([(1, 9.0), (100, 5.0)], 7.0, quality="lower") == pytest.approx(10.0)
    assert cost_to_quality([], 1.0) is None
    with pytest.raises(ValueError, match="positive"):
        cost_to_quality([(0, 1.0)], 0.5)
