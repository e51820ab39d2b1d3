"""Paired tests of rows, and the tie groups that they make: rows of a group are not told apart."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stepmark.leaderboard.rows import AT_ONCE, Row, cells, headline, shared_seeds, split

from stepmark import plugins
from stepmark.record import Record
from stepmark.stats import PairedTest, drawn, paired_tests, standardised_differences, tie_groups
from stepmark.task import Task

ALPHA = 0.05


def paired(
    pairs: Sequence[tuple[Row, Row]], metric: str, items: int = 0
) -> list[tuple[PairedTest, float | None] | None]:
    """The paired test of each pair of rows over the seeds that both have, and with `items` its effect size; None where
    they cannot be compared. Rows that stand in many pairs are drawn once.
    """
    tables: dict[tuple[int, tuple[int, ...]], tuple[NDArray[np.float64], NDArray[np.float64]] | None] = {}

    def look(row: Row, seeds: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        key = (id(row), seeds)
        if key not in tables:
            table = row.resamples(metric, seeds)
            tables[key] = None if table is None else (table, drawn(table))
        return tables[key]

    alike: dict[tuple[int, ...], list[tuple[int, Any, Any]]] = defaultdict(list)
    for i, (a, b) in enumerate(pairs):
        seeds = tuple(shared_seeds([a, b]))
        first, second = look(a, seeds), look(b, seeds)
        if first is not None and second is not None and first[0].shape == second[0].shape:
            alike[first[0].shape].append((i, first, second))
    found: list[tuple[PairedTest, float | None] | None] = [None] * len(pairs)
    for same in alike.values():
        for start in range(0, len(same), AT_ONCE):
            some = same[start : start + AT_ONCE]
            a, b = (np.stack([each[side][0] for each in some]) for side in (1, 2))
            tests = paired_tests(a, b, *(np.stack([each[side][1] for each in some]) for side in (1, 2)))
            effects = standardised_differences(a, b, items) if items else [None] * len(some)
            for (i, *_), test, effect in zip(some, tests, effects, strict=True):
                found[i] = (test, effect)
    return found


def not_worse(candidates: Sequence[Row], other: Row, metric: str, higher: bool) -> list[Row]:
    """Those rows that are not significantly worse than `other`; whoever cannot be compared with it counts as worse."""
    tests = paired([(row, other) for row in candidates], metric)
    worse = [
        found is None or (found[0].p <= ALPHA and (found[0].difference < 0 if higher else found[0].difference > 0))
        for found in tests
    ]
    return [row for row, lost in zip(candidates, worse, strict=True) if row is other or not lost]


def grouped(records: Sequence[Record], known: Mapping[str, tuple[str, Task]] | None = None) -> list[Row]:
    """One row per (place, task, method, rung), tie groups assigned, in a stable order.

    Records of tasks that are not `known` (default: those of this checkout) are left out: nothing says which way their
    metrics go.
    """
    known = plugins.tasks() if known is None else known
    found = cells(records, known)
    assign_groups(found, known)
    return found


def assign_groups(found: Sequence[Row], known: Mapping[str, tuple[str, Task]], metric: str | None = None) -> None:
    """Give every row its tie group, by a metric of its task (default: the first)."""
    for task_rows in split(found, "place", "task", "rung").values():
        task = known[task_rows[0].task][1]
        _assign_groups(task_rows, *(headline(task) if metric is None else (metric, task.metrics[metric] == "higher")))


def _common(candidates: Sequence[Row], metric: str) -> dict[str, NDArray[np.float64]]:
    """Resamples by method, over the seeds that all have; methods of another number of resamples are left out."""
    have = [row for row in candidates if metric in row.quality]
    if not have:
        return {}
    shared = set(shared_seeds(have)) or {Counter(s for row in have for s in row.measured).most_common(1)[0][0]}
    tables = {row.method: table for row in have if (table := row.resamples(metric, shared)) is not None}
    size = Counter(table.shape[1] for table in tables.values()).most_common(1)
    return {name: table for name, table in tables.items() if table.shape[1] == size[0][0]}


def _assign_groups(at_rung: Sequence[Row], metric: str, higher: bool) -> None:
    ranked = [row for row in at_rung if row.ranked]
    tables = _common(ranked, metric)
    points = {row.method: row.quality[metric].value for row in ranked if row.method in tables}
    groups = tie_groups(list(tables), tables, higher, ALPHA, points)
    number = {name: i for i, names in enumerate(groups, start=1) for name in names}
    for row in at_rung:
        row.group = number.get(row.method)
