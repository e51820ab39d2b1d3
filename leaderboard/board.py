"""From records to everything a reader sees: rows, tie groups, fronts, verdicts, trust, coverage. No figure is typed in.

A *row* is one method at one rung of one task on one machine, over all its noise seeds. `stepmark show`,
`stepmark compare` and the site all read rows; nothing here runs or imports a plugin.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepmark import claims, plugins
from stepmark.method import Claim
from stepmark.plugins import MethodInfo
from stepmark.record import Quality, Record
from stepmark.stats import (
    PairedTest,
    bootstrap_medians,
    centred,
    drawn,
    holm,
    hypervolume,
    intervals,
    paired_tests,
    pareto_front,
    standardised_differences,
    tie_groups,
)
from stepmark.task import SCORED, Task
from stepmark.verify import compare as repeat

Trust = Literal["claimed", "measured", "reproduced", "disputed"]
Coverage = Literal["live", "not run", "no plugin yet"]
Training = Literal["none", "calibrated", "trained"]
NETWORK_MIB = 0.01  # the least state that is taken for trained weights: about 2600 numbers
ALPHA = 0.05
WILDEST = 1e100  # no measurement is larger; beyond it sums and squares leave the floating-point numbers
TIMED_DRAWS = 1000  # of the interval of a median latency
REASONS = 3  # of a trust state that a page gives
AT_ONCE = 128  # pairs whose draws are held at once
LATENCY_DRAWS = 100  # where a record has no quality resamples whose number could be followed


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % interval, in the metric's own unit."""

    value: float
    low: float
    high: float


class Place(NamedTuple):
    """Where figures may be compared directly: one device of one machine at one tier, and one checkpoint if any."""

    machine: str
    tier: str
    device: str = "cpu"
    checkpoint: str = ""

    @classmethod
    def of(cls, record: Record) -> Place:
        """Where a record was measured."""
        return cls(record.machine, record.tier, record.device, record.checkpoint)

    @property
    def where(self) -> str:
        """Machine, the device if it is not the processor, and the checkpoint."""
        device = "" if self.device == "cpu" else f", {self.device}"
        return self.machine + device + (f", checkpoint {self.checkpoint[:8]}" if self.checkpoint else "")

    def __str__(self) -> str:
        return self.where if self.tier == "embedded" else f"{self.where} ({self.tier})"


@dataclass
class Row:
    """One method at one rung of one task in one place. `group` is its tie group among the methods at that rung.

    What is computed from the records is kept, so that a row can let go of their raw numbers (see `ledger`).
    """

    place: Place
    track: str
    task: str
    method: str
    rung: int
    records: dict[int, Record]
    group: int | None = None

    @cached_property
    def measured(self) -> dict[int, Record]:
        """The seeds that gave figures."""
        return {s: r for s, r in self.records.items() if r.status in {"ok", "flagged"}}

    @cached_property
    def first(self) -> Record:
        """The record of the smallest measured seed, else of the smallest seed: that one is timed."""
        have = self.measured or self.records
        return have[min(have)]

    @cached_property
    def id(self) -> str:
        """The id of the first record."""
        return record_id(self.first)

    @cached_property
    def status(self) -> str:
        """The worst status over seeds."""
        found = {r.status for r in self.records.values()}
        return next(s for s in ("failed", "flagged", "skipped", "ok") if s in found)

    @property
    def ranked(self) -> bool:
        """Whether the figures take part in groups, fronts, comparisons and verdicts: all seeds ran, none is flagged."""
        return self.status == "ok"

    @cached_property
    def notes(self) -> list[str]:
        """Messages and flags of all seeds, each once. Untrusted text."""
        found = [text for r in self.records.values() for text in ([r.message] if r.message else []) + r.flags]
        return list(dict.fromkeys(found))

    @cached_property
    def centred(self) -> dict[str, dict[int, NDArray[np.float64]]]:
        """Metric -> seed -> resamples about the value over all items; without those that are no measurement."""
        return _centred([self])[0]

    @cached_property
    def quality(self) -> dict[str, Estimate]:
        """Metric -> mean over seeds with its interval."""
        return _qualities([self])[0]

    def resamples(self, metric: str, seeds: Iterable[int] | None = None) -> NDArray[np.float64] | None:
        """Centred resamples [seeds, B] of the given seeds (default: all measured); None where they do not line up."""
        have = self.centred.get(metric, {})
        tables = [have.get(s) for s in sorted(self.measured if seeds is None else set(seeds))]
        sizes = {None if table is None else table.size for table in tables}
        return None if None in sizes or len(sizes) != 1 else np.stack(tables)  # type: ignore[arg-type]

    @cached_property
    def nfe(self) -> float | None:
        """Evaluations per item that count against the rung, mean over seeds."""
        found = [r.counts["nfe"] for r in self.measured.values() if "nfe" in r.counts]
        return sane(math.fsum(found) / len(found)) if found and all(sane(x) is not None for x in found) else None

    @cached_property
    def nfe_equivalent(self) -> float | None:
        """FLOPs spent per item / FLOPs of one reference evaluation."""
        found = (r.counts["nfe_equivalent"] for r in self.measured.values() if "nfe_equivalent" in r.counts)
        return sane(next(found, None))

    @cached_property
    def timed(self) -> Record | None:
        """The record that holds the latency."""
        readings = (r for _, r in sorted(self.measured.items()) if r.latency and r.latency.items > 0)
        return next((r for r in readings if r.latency and sane(r.latency.median_ms) is not None), None)

    @cached_property
    def latency_ms(self) -> Estimate | None:
        """Milliseconds per item: median of the rounds, and the interval of that median."""
        return _latencies([self])[0]

    @property
    def speedup(self) -> Estimate | None:
        """Latency of the baseline at the same rung, interleaved in the same run, over that of the method."""
        latency = self.timed.latency if self.timed else None
        if latency is None or latency.speedup is None or sane(latency.speedup) is None:
            return None
        low = latency.speedup if latency.speedup_low is None else latency.speedup_low
        high = latency.speedup if latency.speedup_high is None else latency.speedup_high
        return Estimate(latency.speedup, low, high)

    @property
    def memory_mib(self) -> float | None:
        """Peak of one `run` call above the loaded state."""
        return sane(next((r.memory.peak_mib for r in self.measured.values() if r.memory), None))

    @property
    def joules(self) -> float | None:
        """Joules per item."""
        for r in self.measured.values():
            if r.energy and r.latency and r.latency.items > 0:
                return sane(r.energy.joules / r.latency.items)
        return None

    @property
    def offline_s(self) -> float | None:
        """Seconds of `prepare`, paid once for the whole ladder."""
        return sane(next((r.offline.seconds for r in self.measured.values() if r.offline), None))

    def reason(self, name: str) -> str | None:
        """Why a figure is null, as the harness wrote it. Untrusted text."""
        return self.first.reasons.get(name)

    def cost(self, axis: str) -> float | None:
        """Position on a cost axis: "unit" or the name of a figure of the row."""
        if axis == "latency_ms":
            return self.latency_ms.value if self.latency_ms else None
        value = self.nfe if axis == "unit" else getattr(self, axis)
        return None if value is None else float(value)


def sane(x: float | None) -> float | None:
    """The figure, or None where it is no measurement: records are untrusted, and 1e308 is a number too."""
    return x if x is not None and abs(x) <= WILDEST else None


def _latency_resamples(record: Record, draws: int, against_baseline: bool = False) -> NDArray[np.float64]:
    """Bootstrap of the median ms per item [draws], or of the speed-up over the baseline's paired rounds."""
    latency = record.latency
    assert latency is not None
    own = np.asarray(latency.samples_ms or [latency.median_ms])
    medians = bootstrap_medians(own[None], draws)[0]
    if against_baseline:
        other = np.asarray(latency.baseline_samples_ms or [])
        if other.size != own.size:
            return np.full(draws, latency.speedup if latency.speedup is not None else np.nan)
        return bootstrap_medians(other[None], draws)[0] / np.maximum(medians, 1e-9)
    return medians / latency.items


# many rows at once --------------------------------------------------------------------------------


def settle(found: Sequence[Row]) -> None:
    """Compute the estimates of many rows, which is far cheaper together than one by one."""
    for row, tables in zip(found, _centred(found), strict=True):
        row.centred = tables
    for row, quality, latency in zip(found, _qualities(found), _latencies(found), strict=True):
        row.quality, row.latency_ms = quality, latency


def _centred(found: Sequence[Row]) -> list[dict[str, dict[int, NDArray[np.float64]]]]:
    """`Row.centred` of many rows."""
    alike: dict[int, list[tuple[int, str, int, Quality]]] = defaultdict(list)
    for i, row in enumerate(found):
        for seed, r in row.measured.items():
            for metric, quality in r.quality.items():
                alike[len(quality.resamples) or 1].append((i, metric, seed, quality))
    made: list[dict[str, dict[int, NDArray[np.float64]]]] = [{} for _ in found]
    for same in alike.values():
        tables = np.array([quality.resamples or [quality.value] for *_, quality in same])
        values = np.array([quality.value for *_, quality in same])
        sound = (np.abs(values) <= WILDEST) & (np.abs(tables) <= WILDEST).all(axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            tables = centred(tables, values)
        for (i, metric, seed, _), table, good in zip(same, tables, sound, strict=True):
            if good:
                made[i].setdefault(metric, {})[seed] = table
    return made


def _qualities(found: Sequence[Row]) -> list[dict[str, Estimate]]:
    alike: dict[tuple[int, ...], list[tuple[int, str, NDArray[np.float64]]]] = defaultdict(list)
    for i, row in enumerate(found):
        for metric in row.first.quality if row.measured else ():
            table = row.resamples(metric)
            if table is not None:
                alike[table.shape].append((i, metric, table))
    made: list[dict[str, Estimate]] = [{} for _ in found]
    for same in alike.values():
        for start in range(0, len(same), AT_ONCE):
            some = same[start : start + AT_ONCE]
            # Seeds and items are drawn as every comparison on the site draws them.
            low, high = intervals(drawn(np.stack([table for *_, table in some])))
            for (i, metric, _), a, b in zip(some, low.tolist(), high.tolist(), strict=True):
                value = float(np.mean([r.quality[metric].value for r in found[i].measured.values()]))
                made[i][metric] = Estimate(value, min(a, value), max(b, value))
    # In the order of the record, whatever was computed together.
    return [{m: d[m] for m in row.first.quality if m in d} if d else d for row, d in zip(found, made, strict=True)]


def _latencies(found: Sequence[Row]) -> list[Estimate | None]:
    alike: dict[int, list[int]] = defaultdict(list)
    made: list[Estimate | None] = [None] * len(found)
    for i, row in enumerate(found):
        if row.timed is not None and row.timed.latency is not None:
            alike[len(row.timed.latency.samples_ms or [0.0])].append(i)
    for places_ in alike.values():
        for start in range(0, len(places_), AT_ONCE):
            some = places_[start : start + AT_ONCE]
            readings = [latency for i in some if (timed := found[i].timed) and (latency := timed.latency)]
            medians = bootstrap_medians([each.samples_ms or [each.median_ms] for each in readings], TIMED_DRAWS)
            with np.errstate(over="ignore"):
                medians /= np.array([each.items for each in readings])[:, None]
            sound = (np.abs(medians) <= WILDEST).all(axis=1)
            low, high = intervals(medians)
            for i, each, good, a, b in zip(some, readings, sound, low.tolist(), high.tolist(), strict=True):
                value = each.median_ms / each.items
                made[i] = Estimate(value, min(a, value), max(b, value)) if good else Estimate(value, value, value)
    return made


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
        seeds = tuple(sorted(a.measured.keys() & b.measured.keys()))
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


# reading ---------------------------------------------------------------------------------------


def version_key(suite: str) -> tuple[int, ...]:
    """Order of suite versions."""
    return tuple(int(part) for part in re.findall(r"\d+", suite)[:4])


def current(records: Sequence[Record], tier: str | None = None) -> list[Record]:
    """Records of the newest suite version (older ones stay downloadable), of one tier or of all but smoke."""
    return newest([r for r in records if (r.tier == tier if tier else r.tier != "smoke")])


def newest(records: Sequence[Record]) -> list[Record]:
    """Records of the newest suite version among them."""
    version = max((version_key(r.suite) for r in records), default=())
    return [r for r in records if version_key(r.suite) == version]


def rows(records: Sequence[Record], known: Mapping[str, tuple[str, Task]] | None = None) -> list[Row]:
    """One row per (place, task, method, rung), tie groups assigned, in a stable order.

    Records of tasks that are not `known` (default: those of this checkout) are left out: nothing says which way their
    metrics go.
    """
    known = plugins.tasks() if known is None else known
    found = cells(records, known)
    assign_groups(found, known)
    return found


def cells(records: Iterable[Record], known: Mapping[str, tuple[str, Task]]) -> list[Row]:
    """The rows of some records, later ones replacing earlier ones of the same seed; without groups."""
    seeds: dict[tuple[Place, str, str, str, int], dict[int, Record]] = defaultdict(dict)
    for r in records:
        if r.task in known:
            seeds[(Place.of(r), r.track, r.task, r.method, r.rung)][r.seed] = r
    found = [
        Row(place, track, task, method, rung, by_seed) for (place, track, task, method, rung), by_seed in seeds.items()
    ]
    found.sort(key=order)
    return found


def order(row: Row) -> tuple[Any, ...]:
    """The order of rows everywhere."""
    return (row.place, row.track, row.task, row.rung, row.method)


def assign_groups(found: Sequence[Row], known: Mapping[str, tuple[str, Task]]) -> None:
    """Give every row its tie group."""
    for task_rows in split(found, "place", "task", "rung").values():
        _assign_groups(task_rows, known[task_rows[0].task][1])


def split(found: Sequence[Row], *fields: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some of their fields, in order."""
    parts: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in found:
        parts[tuple(getattr(row, name) for name in fields)].append(row)
    return dict(parts)


def headline(task: Task) -> tuple[str, bool]:
    """The first metric of a task, and whether higher is better."""
    metric, direction = next(iter(task.metrics.items()))
    return metric, direction == "higher"


def _common(candidates: Sequence[Row], metric: str) -> dict[str, NDArray[np.float64]]:
    """Resamples by method, over the seeds that all have; methods of another number of resamples are left out."""
    have = [row for row in candidates if metric in row.quality]
    if not have:
        return {}
    shared = set.intersection(*(set(row.measured) for row in have)) or {
        Counter(s for row in have for s in row.measured).most_common(1)[0][0]
    }
    tables = {row.method: table for row in have if (table := row.resamples(metric, shared)) is not None}
    size = Counter(table.shape[1] for table in tables.values()).most_common(1)
    return {name: table for name, table in tables.items() if table.shape[1] == size[0][0]}


def _assign_groups(at_rung: Sequence[Row], task: Task) -> None:
    metric, higher = headline(task)
    ranked = [row for row in at_rung if row.ranked]
    tables = _common(ranked, metric)
    points = {row.method: row.quality[metric].value for row in ranked if row.method in tables}
    groups = tie_groups(list(tables), tables, higher, ALPHA, points)
    number = {name: i for i, names in enumerate(groups, start=1) for name in names}
    for row in at_rung:
        row.group = number.get(row.method)


def front(candidates: Sequence[Row], axis: str, metric: str, higher: bool) -> list[Row]:
    """Ranked rows that no other beats on both cost and quality, cheapest first."""
    priced = [(row, row.cost(axis)) for row in candidates if row.ranked and metric in row.quality]
    have = [row for row, cost in priced if cost is not None]
    points = [(cost, row.quality[metric].value) for row, cost in priced if cost is not None]
    return [have[i] for i in pareto_front(points, ("lower", "higher" if higher else "lower"))]


# what a step buys ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bargain:
    """The cheapest row that the baseline's best row does not significantly beat; `row` is None if there is none."""

    task: str
    place: Place
    baseline: Row
    row: Row | None

    def factor(self, axis: str) -> float | None:
        """How many times cheaper on a cost axis."""
        if self.row is None:
            return None
        mine, other = self.row.cost(axis), self.baseline.cost(axis)
        return other / mine if mine and other else None


def anchor(candidates: Sequence[Row], infos: Mapping[str, MethodInfo]) -> str | None:
    """The baseline of a task: of the methods compared with no other, the one that most others name."""
    present = sorted({row.method for row in candidates if row.ranked})
    plain = [name for name in present if name in infos and not infos[name].baselines]
    named = Counter(b for name in present if name in infos for b in infos[name].baselines[:1])
    return max(plain, key=lambda name: (named[name], name), default=None)


def bargain(candidates: Sequence[Row], task: Task, infos: Mapping[str, MethodInfo]) -> Bargain | None:
    """What the best method buys on one task in one place; None where no baseline has been measured.

    A method matches the baseline if the paired test at `ALPHA` finds no loss in the headline metric. The test is not
    corrected for the number of candidates: here a correction would make matching easier.
    """
    metric, higher = headline(task)
    name = anchor(candidates, infos)
    ranked = [row for row in candidates if row.ranked and metric in row.quality and row.nfe]
    own = [row for row in ranked if row.method == name]
    if not own:
        return None
    top = best(own, metric, higher)
    cheaper = [row for row in ranked if row.method != name and (row.nfe or 0) < (top.nfe or 0)]
    matches = not_worse(cheaper, top, metric, higher)
    order = sorted(matches, key=lambda row: (row.nfe_equivalent or row.nfe or 0.0, row.nfe or 0.0, row.method))
    return Bargain(task.id, top.place, top, order[0] if order else None)


def not_worse(candidates: Sequence[Row], other: Row, metric: str, higher: bool) -> list[Row]:
    """Those rows that are not significantly worse than `other`; whoever cannot be compared with it counts as worse."""
    tests = paired([(row, other) for row in candidates], metric)
    worse = [
        found is None or (found[0].p <= ALPHA and (found[0].difference < 0 if higher else found[0].difference > 0))
        for found in tests
    ]
    return [row for row, lost in zip(candidates, worse, strict=True) if row is other or not lost]


def training(mine: Sequence[Row]) -> Training:
    """What a method needs before it can run, from the records of its `prepare`.

    *trained*: it left a state as large as a network; *calibrated*: it spent evaluations or left a smaller state.
    """
    costs = [r.offline for row in mine for r in row.measured.values() if r.offline]
    if any(cost.state_mib >= NETWORK_MIB for cost in costs):
        return "trained"
    return "calibrated" if any(cost.state_mib > 0 or cost.evaluations for cost in costs) else "none"


# ladders as a whole ------------------------------------------------------------------------------

COSTS = ("unit", "nfe_equivalent", "latency_ms")


@dataclass(frozen=True)
class Yardstick:
    """What the ladders of a task in one place are read against: the baseline's own ladder.

    `best` is the baseline's best row and `worst` its worst value; `dearest` is its largest cost on each axis. Quality
    is normalised to 0 at `worst` and 1 at the best value; (`dearest`, 0) is the reference point of the hypervolume.
    """

    best: Row
    metric: str
    higher: bool
    worst: float
    dearest: dict[str, float | None]

    def normalised(self, value: float) -> float | None:
        """Quality on the baseline's own scale; None where the baseline's ladder is flat."""
        span = self.best.quality[self.metric].value - self.worst
        return sane((value - self.worst) / span) if span else None


@dataclass(frozen=True)
class Ladder:
    """A method's whole ladder on one task in one place. Both figures are by cost axis, None where there is none.

    `matching`: cheapest cost of a row that the baseline's best row does not significantly beat (paired test at
    `ALPHA`). `area`: hypervolume, in decades of cost times the baseline's own range of quality.
    """

    method: str
    best: Row
    matching: dict[str, float | None]
    area: dict[str, float | None]


def best(candidates: Sequence[Row], metric: str, higher: bool) -> Row:
    """The row of best quality, the smallest rung among equals."""
    return max(
        candidates, key=lambda row: (row.quality[metric].value if higher else -row.quality[metric].value, -row.rung)
    )


def yardstick(candidates: Sequence[Row], task: Task, infos: Mapping[str, MethodInfo]) -> Yardstick | None:
    """The baseline's ladder in one place; None where no baseline has been measured."""
    metric, higher = headline(task)
    name = anchor(candidates, infos)
    own = [row for row in candidates if row.method == name and row.ranked and metric in row.quality]
    if not own:
        return None
    values = [row.quality[metric].value for row in own]
    dearest = {axis: max((c for row in own if (c := row.cost(axis))), default=None) for axis in COSTS}
    return Yardstick(best(own, metric, higher), metric, higher, min(values) if higher else max(values), dearest)


def ladders(candidates: Sequence[Row], task: Task, infos: Mapping[str, MethodInfo]) -> list[Ladder]:
    """Every method's ladder on one task in one place, read against the baseline's."""
    metric, higher = headline(task)
    against = yardstick(candidates, task, infos)
    ranked = [row for row in candidates if row.ranked and metric in row.quality]
    matches = not_worse(ranked, against.best, metric, higher) if against is not None else []
    able = {id(row) for row in matches}
    found: list[Ladder] = []
    for (method,), mine in sorted(split(ranked, "method").items()):
        matching: dict[str, float | None] = dict.fromkeys(COSTS)
        area: dict[str, float | None] = dict.fromkeys(COSTS)
        if against is not None:
            same = [row for row in mine if id(row) in able]
            for axis in COSTS:
                matching[axis] = min((c for row in same if (c := row.cost(axis)) is not None and c > 0), default=None)
                area[axis] = _area(mine, axis, against)
        found.append(Ladder(method, best(mine, metric, higher), matching, area))
    return found


def _area(mine: Sequence[Row], axis: str, against: Yardstick) -> float | None:
    """Hypervolume of a ladder beside the yardstick; None where a cost is missing or the baseline's ladder is flat."""
    reference = against.dearest[axis]
    points = [(row.cost(axis), against.normalised(row.quality[against.metric].value)) for row in mine]
    whole = [(cost, value) for cost, value in points if cost is not None and cost > 0 and value is not None]
    if not reference or reference <= 0 or len(whole) < len(points):
        return None
    return hypervolume(whole, (reference, 0.0))


# claims ---------------------------------------------------------------------------------------


def claim_task(claim: Claim, info: MethodInfo) -> str:
    """The task a claim is evaluated on."""
    return claim.task or info.tasks[0]


def judge(claim: Claim, task: str, place: Place, found: Mapping[tuple[Place, str, str, int], Row]) -> claims.Verdict:
    """The verdict of a claim from the rows of one place; `found` is `index(rows)`."""
    try:
        check = claims.parse(claim.check)
    except claims.ClaimError as error:
        return claims.Verdict("not run", None, None, {}, 0, f"not run: {error}")
    references = check.references()
    needed = [found.get((place, task, r.method, r.rung)) for r in references]
    seeds = sorted(set.intersection(*(set(row.measured) if row else set() for row in needed)))

    def look(metric: str, method: str, rung: int) -> list[NDArray[np.float64]] | str:
        row = found.get((place, task, method, rung))
        if row is None:
            return "no record"
        if not row.ranked:
            return f"{row.status}: {'; '.join(row.notes)[:300] or 'no message'}"
        if not seeds:
            return "no noise seed that all figures of the claim share"
        figures = [_figure(row, row.measured[s], metric) for s in seeds]
        reason = row.reason(metric.removesuffix("_ms").removesuffix("_mib")) or "not measured"
        return reason if any(f is None for f in figures) else [f for f in figures if f is not None]

    def point(metric: str, method: str, rung: int) -> float | None:
        row = found[(place, task, method, rung)]
        if metric in row.first.quality:
            return float(np.mean([row.measured[s].quality[metric].value for s in seeds]))
        exact = {"latency_ms": row.latency_ms, "speedup": row.speedup}.get(metric)
        return exact.value if exact else None

    return claims.verdict(check, look, points=point)


def _figure(row: Row, record: Record, metric: str) -> NDArray[np.float64] | None:
    """One seed's figure for a claim: resamples of a metric or of a timing, length one for counts."""
    if metric in record.quality:
        return row.centred.get(metric, {}).get(record.seed)
    if metric in record.counts:
        return np.array([record.counts[metric]])
    if metric in {"latency_ms", "speedup"} and row.timed is not None:
        draws = max((tables[record.seed].size for tables in row.centred.values() if record.seed in tables), default=0)
        figures = _latency_resamples(row.timed, draws if draws > 1 else LATENCY_DRAWS, metric == "speedup")
        return figures if np.isfinite(figures).all() else None
    single = {"memory_mib": row.memory_mib, "joules": row.joules, "rounds": rounds(record)}.get(metric)
    if single is None:  # FLOPs and NFE-equivalents are counted at one seed and are the same at all
        single = next((r.counts[metric] for r in row.measured.values() if metric in r.counts), None)
    return None if single is None else np.array([single])


def rounds(record: Record) -> float | None:
    """Network calls that follow each other in one `run` call: the depth of a method that evaluates several states of an
    item at once. None for a task that is not known, or where no network was called.
    """
    task = plugins.tasks().get(record.task, ("", None))[1]
    calls = sum(figures.get("calls", 0.0) for figures in record.handles.values())
    return calls / math.ceil(task.items(record.tier) / task.batch) if task and calls else None


def index(found: Sequence[Row]) -> dict[tuple[Place, str, str, int], Row]:
    """Rows by (place, task, method, rung)."""
    return {(row.place, row.task, row.method, row.rung): row for row in found}


def places(found: Sequence[Row]) -> list[Place]:
    """Every place, that with most rows first."""
    counted = Counter(row.place for row in found)
    return sorted(counted, key=lambda place: (-counted[place], place))


Verdicts = list[tuple[Claim, dict[Place, claims.Verdict]]]


def verdicts(
    info: MethodInfo, found: Sequence[Row], have: Mapping[tuple[Place, str, str, int], Row] | None = None
) -> Verdicts:
    """Every claim of a method with its verdict in every place that ran the method, best covered place first.

    `have` is `index(found)`, for those who ask for many methods.
    """
    have = index(found) if have is None else have
    where = places([row for row in found if row.method == info.id])
    return [
        (claim, {place: judge(claim, claim_task(claim, info), place, have) for place in where}) for claim in info.claims
    ]


# trust ---------------------------------------------------------------------------------------


def record_id(record: Record) -> str:
    """Twelve hex digits that name a record, of the sha256 of all that it says: what a dispute quotes."""
    return line_id(record.model_dump_json())


def line_id(line: str) -> str:
    """The id of the record that is this JSON when written out whole, as the downloads hold it."""
    return hashlib.sha256(line.encode()).hexdigest()[:12]


class Dispute(NamedTuple):
    """An accepted objection to a record: a line of `leaderboard/disputes.jsonl`."""

    record: str
    says: str
    link: str


def disputes(path: Path) -> dict[str, Dispute]:
    """Accepted disputes by record id; {} without the file.

    Raises:
        ValueError: a line that is no dispute.
    """
    found: dict[str, Dispute] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            each = Dispute(**json.loads(line))
        except (ValueError, TypeError):
            raise ValueError(f"{path}:{number}: a dispute is an object of the strings record, says and link") from None
        found[each.record] = each
    return found


@dataclass
class Standing:
    """Trust in a method's figures on one task, and why."""

    state: Trust
    reasons: list[str] = field(default_factory=list)

    @property
    def said(self) -> str:
        """The first reasons, accepted objections before all others, and how many more there are. Untrusted text."""
        more = f"; and {len(self.reasons) - REASONS} more" if len(self.reasons) > REASONS else ""
        return "; ".join(self.reasons[:REASONS]) + more


Intervals = Mapping[str, tuple[float, float]]


def standing(
    method: str,
    task: str,
    everything: Sequence[Record],
    objections: Mapping[str, Dispute],
    intervals_of: Callable[[Record], Intervals | None] = lambda record: None,
) -> Standing:
    """Derived from all runs: *claimed* without one, *measured* with one, *reproduced* when a second machine or another
    commit agrees on the same sources (by the rules of `stepmark verify`), *disputed* when it does not or when an
    objection was accepted. `intervals_of` gives the 95 % intervals of a record's metrics, where they are known already.
    """
    runs: dict[tuple[int, int, str, str], list[Record]] = defaultdict(list)
    for r in everything:
        if r.method == method and r.task == task and r.status in {"ok", "flagged"} and r.tier != "smoke":
            runs[(r.rung, r.seed, r.tier, r.checkpoint)].append(r)
    if not runs:
        return Standing("claimed")
    found = Standing("measured")
    agreeing: set[str] = set()
    differing: list[str] = []
    for (rung, seed, *_), again in sorted(runs.items()):
        for r in again:
            if objections and (objection := objections.get(record_id(r))) is not None:
                found.state = "disputed"
                found.reasons.append(f"record {objection.record}: {objection.says} ({objection.link})")
        for other in again[1:]:
            first = again[0]
            elsewhere = (other.machine, other.device) != (first.machine, first.device)
            if first.digests != other.digests or not (elsewhere or other.commit != first.commit):
                continue
            differs = repeat(first, other, intervals_of(first)).differs
            if differs:
                found.state = "disputed"
                differing.append(f"rung {rung}, seed {seed}: a second run differs: {differs[0]}")
            else:
                agreeing.add(f"machine {Place.of(other).where}" if elsewhere else f"commit {other.commit}")
    found.reasons += differing
    if agreeing and found.state == "measured":
        found.state = "reproduced"
        found.reasons = [f"agrees with {name}" for name in sorted(agreeing)]
    return found


def stale(record: Record, info: MethodInfo | None, task: Task) -> bool:
    """Whether the sources that a record was written from have changed since."""
    now = plugins.source_digests(info, task) if info is not None else {}
    return any(record.digests.get(name, digest) != digest for name, digest in now.items())


# coverage ---------------------------------------------------------------------------------------


class CatalogueEntry(NamedTuple):
    """A paper of `leaderboard/catalogue.jsonl`. `headline`: its own figures, each with its setting; null: not found."""

    id: str
    title: str
    authors: list[str] | None
    year: int | None
    arxiv: str | None
    reference: str | None
    kind: str
    track: str
    tags: list[str]
    code: str | None
    headline: list[str]

    @property
    def byline(self) -> str:
        """All authors, or the first three and how many more."""
        names = self.authors or []
        return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


@dataclass
class Covered:
    """A paper, its plugins, and how far it has come. `states` counts the verdicts of the claims of all its plugins,
    each in its best covered place.
    """

    entry: CatalogueEntry
    infos: tuple[MethodInfo, ...]
    status: Coverage
    states: Counter[str]

    @property
    def info(self) -> MethodInfo | None:
        """The plugin that carries the paper's own name, else the first."""
        return next((info for info in self.infos if info.id == self.entry.id), next(iter(self.infos), None))


def catalogue(path: Path | None = None) -> list[CatalogueEntry]:
    """Every paper, in the order of the file.

    Raises:
        ValueError: a line that is no entry.
    """
    path = path or Path(__file__).with_name("catalogue.jsonl")
    found: list[CatalogueEntry] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = CatalogueEntry(**json.loads(line))
            if not re.fullmatch(r"[a-z0-9][a-z0-9_]{0,63}", entry.id):
                raise ValueError("an id is made of lower-case letters, digits and underscores")
            found.append(entry)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: {error}; an entry has {', '.join(CatalogueEntry._fields)}") from None
    return found


def coverage(
    papers: Sequence[CatalogueEntry],
    infos: Mapping[str, MethodInfo],
    found: Sequence[Row],
    judged: Mapping[str, Verdicts] | None = None,
) -> list[Covered]:
    """Every paper with its computed status. Plugins belong to the paper that their `Paper.id` names; one that has run
    makes it live. `judged` holds the verdicts by method (default: they are computed).
    """
    if judged is None:
        have = index(found)
        judged = {name: verdicts(info, found, have) for name, info in infos.items()}
    by_paper: dict[str, list[MethodInfo]] = defaultdict(list)
    for info in infos.values():
        if info.paper:
            by_paper[info.paper.id].append(info)
    live = {row.method for row in found if row.measured}
    result: list[Covered] = []
    for entry in papers:
        mine = by_paper.get(entry.id, [])
        status: Coverage = "no plugin yet" if not mine else "not run"
        if any(info.id in live for info in mine):
            status = "live"
        states: Counter[str] = sum((tally(judged[info.id]) for info in mine), Counter())
        result.append(Covered(entry, tuple(mine), status, states))
    return result


def tally(judged: Verdicts) -> Counter[str]:
    """How many claims of a method got which verdict in its best covered place."""
    return Counter(next(iter(by.values())).state if by else "not run" for _, by in judged)


# for people at a terminal ---------------------------------------------------------------------------------------


def figure(x: float | None) -> str:
    """A number in three or four digits; a dash for null."""
    if x is None:
        return "-"
    size = abs(x)
    if x == 0:
        return "0"
    if size >= 1e7 or size < 1e-3:
        return f"{x:.2e}"
    if size >= 1000:
        return f"{x:,.0f}"
    text = f"{x:.4f}" if size < 1 else f"{x:.3f}" if size < 10 else f"{x:.2f}" if size < 100 else f"{x:.1f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def with_interval(e: Estimate | None) -> str:
    """`value [low, high]`."""
    return "-" if e is None else f"{figure(e.value)} [{figure(e.low)}, {figure(e.high)}]"


def _aligned(head: Sequence[str], body: Sequence[Sequence[str]], left: tuple[int, ...]) -> list[str]:
    table = (head, *body)
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]

    def cell(text: str, i: int) -> str:
        return text.ljust(widths[i]) if i in left else text.rjust(widths[i])

    return ["  ".join(cell(text, i) for i, text in enumerate(line)).rstrip() for line in table]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def from_folders(records: Sequence[Record]) -> dict[str, tuple[str, Task]]:
    """What is known of tasks that somebody brought, from their records alone: metrics and unit."""
    found: dict[str, tuple[str, Task]] = {}
    for r in records:
        if "checkpoint" in r.environment and r.track in SCORED:
            origin = r.environment["checkpoint"]
            task = Task(r.task, 1, "", "checkpoint", rungs=(), n=0, batch=0, origin=origin, **SCORED[r.track])
            found[r.task] = (r.track, task)
    return found


def show(records: Sequence[Record]) -> str:
    """An aligned table per task and machine: best first at each rung, groups instead of ranks. Newest suite, any tier."""
    known = from_folders(records) | plugins.tasks()
    found = rows(newest(records), known)
    blocks: list[str] = []
    for (place, task_id), mine in split(found, "place", "task").items():
        task = known[task_id][1]
        metric, higher = headline(task)

        def order(row: Row, metric: str = metric, higher: bool = higher) -> tuple[Any, ...]:
            value = row.quality[metric].value if metric in row.quality else 0.0
            return (row.rung, row.group or 10**6, -value if higher else value, row.method)

        better = f"{metric} ({task.metrics[metric]} is better)"
        head = ("rung", "group", "method", better, "NFE", "NFE-eq", "ms/item", "speed-up", "peak MiB", "status")
        body = [
            (
                str(row.rung),
                str(row.group or "-"),
                row.method,
                with_interval(row.quality.get(metric)),
                figure(row.nfe),
                figure(row.nfe_equivalent),
                figure(row.latency_ms.value if row.latency_ms else None),
                f"{figure(row.speedup.value)}x" if row.speedup else "-",
                figure(row.memory_mib),
                _printable(row.status + (f": {row.notes[0][:80]}" if row.notes else "")),
            )
            for row in sorted(mine, key=order)
        ]
        lines = _aligned(head, body, (1, 2, 9))
        title = f"{task_id} v{task.version} on {place}; rungs in {task.unit}"
        if task.origin:
            title += f"\n{_printable(mine[0].first.environment.get('checkpoint', task.origin))}"
        blocks.append(f"{title}\n" + "\n".join(lines))
    unknown = sorted({r.task for r in records if r.task not in known})
    if unknown:
        blocks.append(f"left out: records of tasks that are not in this checkout ({', '.join(unknown)})")
    return "\n\n".join(blocks) or "no records"


@dataclass(frozen=True)
class Comparison:
    """a - b in the headline metric at one rung: difference, interval, Holm-adjusted p, effect size, who is better."""

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


def comparisons(records: Sequence[Record], a: str, b: str, track: str | None = None) -> Contrast:
    """Paired tests of two methods wherever both have figures at the same rung, Holm-corrected over all of them.

    What is flagged takes no part: neither can it win, nor does it count for the correction.

    Raises:
        ValueError: a method without records, or the same method twice.
    """
    recorded = sorted({r.method for r in records})
    for name in (a, b):
        if name not in recorded:
            raise ValueError(f"no records of method {name!r}; recorded: {', '.join(recorded) or 'none'}")
    if a == b:
        raise ValueError("give two different methods")
    chosen = [r for r in newest(records) if r.method in {a, b} and (track is None or r.track == track)]
    known = from_folders(chosen) | plugins.tasks()
    return contrasts(cells(chosen, known), [(a, b)], known)[a, b]


def contrasts(
    found: Sequence[Row], wanted: Sequence[tuple[str, str]], known: Mapping[str, tuple[str, Task]]
) -> dict[tuple[str, str], Contrast]:
    """The comparisons of each wanted pair of methods, over rows that may hold others too; see `comparisons`."""
    made = {pair: Contrast() for pair in wanted}
    for same in split(found, "place", "task", "rung").values():
        task = known[same[0].task][1]
        metric, higher = headline(task)
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
        for (mine, other), test in zip(pairs, paired(pairs, metric, task.items(same[0].place.tier)), strict=True):
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


def compare(records: Sequence[Record], a: str, b: str, track: str | None = None) -> str:
    """Paired tests of two methods as an aligned table, with a plain sentence at the end.

    Raises:
        ValueError: a method without records, or the same method twice.
    """
    found = comparisons(records, a, b, track)
    if not found.tests:
        return in_a_sentence(found, a, b, track)
    known = from_folders(records) | plugins.tasks()
    head = (
        "task", "machine", "rung", "metric", f"{a} - {b}", "95 % interval", "p (Holm)", "effect", "better",
        "latency ratio",
    )  # fmt: skip
    body = [
        (
            c.task,
            str(c.place),
            str(c.rung),
            headline(known[c.task][1])[0],
            figure(c.difference),
            f"[{figure(c.low)}, {figure(c.high)}]",
            f"{c.p:.3f}" if c.p >= 0.001 else "<0.001",
            figure(c.effect),
            c.winner or "tied",
            figure(c.latency_ratio),
        )
        for c in found.tests
    ]
    return "\n".join(_aligned(head, body, (0, 1, 3, 8))) + "\n\n" + in_a_sentence(found, a, b)


STATES = {"flagged": "is flagged", "failed": "failed at some seed"}  # how a sentence calls what leaves a row out


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
