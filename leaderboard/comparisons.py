"""Paired tests of two methods wherever both have figures, corrected over all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
from stepmark.leaderboard.estimates import figure, sane
from stepmark.leaderboard.groups import ALPHA, paired
from stepmark.leaderboard.rows import Place, Row, headline, homes, newest, rows_of, split

from stepmark import plugins
from stepmark.admission import from_folders, sorted_out
from stepmark.names import unknown
from stepmark.record import Record
from stepmark.stats import PairedTest, holm
from stepmark.task import Task

STATES = {  # how a sentence calls what leaves a row out
    "flagged": "is flagged",
    "failed": "failed at some seed",
    "incomplete": "lacks seeds of its task",
}


@dataclass(frozen=True)
class Comparison:
    """a - b in one metric at one rung: difference, interval, Holm-adjusted p, effect size, who is better."""

    task: str
    place: Place
    rung: int
    difference: float
    low: float
    high: float
    p: float
    winner: str | None
    latency_ratio: float | None
    effect: float | None


@dataclass
class Contrast:
    """All comparisons of two methods, and how many there would be more if records were not flagged or had not failed:
    by (method, status).
    """

    tests: list[Comparison] = field(default_factory=list)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)


def comparisons(
    records: Sequence[Record], a: str, b: str, track: str | None = None, metric: str | None = None
) -> Contrast:
    """Paired tests of two methods wherever both have figures at the same rung, Holm-corrected over all of them: in the
    first metric of each task, or in `metric` on the tasks that have it.

    What is flagged or incomplete takes no part, nor do records that the board leaves out: neither can they win, nor do
    they count for the correction.

    Raises:
        ValueError: a method without records, or the same method twice.
    """
    known = from_folders(records) | plugins.tasks()
    taken, others = sorted_out(records, known)
    recorded = sorted({r.method for r in taken})
    for name in (a, b):
        if name not in recorded:
            why = next((each.why for each in others if each.record.method == name), "")
            raise ValueError(
                f"no records of method {name!r}: {why}"
                if why
                else unknown("records of method", name, recorded, "stepmark show")
            )
    if a == b:
        raise ValueError("give two different methods")
    chosen = [r for r in newest(taken) if r.method in {a, b} and (track is None or r.track == track)]
    return contrasts(
        rows_of(chosen, known, homes(Counter((r.device, r.machine) for r in newest(taken)))), [(a, b)], known, metric
    )[a, b]


def contrasts(
    found: Sequence[Row],
    wanted: Sequence[tuple[str, str]],
    known: Mapping[str, tuple[str, Task]],
    metric: str | None = None,
) -> dict[tuple[str, str], Contrast]:
    """The comparisons of each wanted pair of methods, over rows that may hold others too; see `comparisons`."""
    made = {pair: Contrast() for pair in wanted}
    for same in split(found, "place", "task", "rung").values():
        task = known[same[0].task][1]
        if metric is not None and metric not in task.metrics:
            continue
        chosen, higher = headline(task) if metric is None else (metric, task.metrics[metric] == "higher")
        pairs: list[tuple[Row, Row]] = []
        for one, two in combinations([row for row in same if row.measured], 2):
            mine, other = (one, two) if (one.method, two.method) in made else (two, one)
            if (mine.method, other.method) not in made:
                continue
            if mine.ranked and other.ranked:
                pairs.append((mine, other))
            else:
                left = made[mine.method, other.method].left_out
                left.update((row.method, row.status) for row in (mine, other) if not row.ranked)
        # Of a checkpoint that is not at hand nobody knows how many items it had: no effect size.
        for (mine, other), test in zip(pairs, paired(pairs, chosen, task.items(same[0].place.tier)), strict=True):
            if test is not None:
                made[mine.method, other.method].tests.append(_comparison(mine, other, *test, higher))
    for contrast in made.values():
        adjusted = holm([each.p for each in contrast.tests]).tolist()
        contrast.tests = [
            replace(each, p=p, winner=each.winner if p <= ALPHA else None)
            for each, p in zip(contrast.tests, adjusted, strict=True)
        ]
    return made


def _comparison(mine: Row, other: Row, test: PairedTest, effect: float | None, higher: bool) -> Comparison:
    """One test, before the correction over all of the pair's."""
    ratio = None
    if mine.latency_ms and other.latency_ms and other.latency_ms.value:
        ratio = sane(mine.latency_ms.value / other.latency_ms.value)
    better = mine.method if (test.difference > 0) == higher else other.method
    return Comparison(
        mine.task, mine.place, mine.rung, test.difference, test.low, test.high, test.p, better, ratio, effect
    )


def in_a_sentence(found: Contrast, a: str, b: str, track: str | None = None) -> str:
    """What the comparisons of two methods come to, and what was left out of them."""
    tests = found.tests
    left = ", ".join(
        f"{n} where {method} {STATES.get(state, state)}" for (method, state), n in sorted(found.left_out.items())
    )
    left = f" Left out of the comparison: {left}." if left else ""
    if not tests:
        where = f" in track {track}" if track else ""
        return f"{a} and {b} share no rung of a task on one machine at which they can be compared{where}.{left}"
    count = Counter(c.winner for c in tests)
    ratios = [c.latency_ratio for c in tests if c.latency_ratio is not None]
    time = "Latency was not read for both."
    if ratios:
        time = f"At equal rungs {a} takes {figure(float(np.median(ratios)))} times as long as {b} (median)."
    return (
        f"{a} is better than {b} in {count[a]} of {len(tests)} comparisons, worse in {count[b]}, and {count[None]} "
        f"show no difference (paired bootstrap, Holm-corrected at {ALPHA:.0%}). {time}{left}"
    )
