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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stepmark import claims, plugins
from stepmark import record as record_files
from stepmark.method import Claim
from stepmark.plugins import MethodInfo
from stepmark.record import Record
from stepmark.stats import (
    PairedTest,
    bootstrap_indices,
    centred,
    holm,
    hypervolume,
    paired_test,
    pareto_front,
    standardised_difference,
    tie_groups,
)
from stepmark.task import Task

Trust = Literal["claimed", "measured", "reproduced", "disputed"]
Coverage = Literal["live", "not run", "no plugin yet"]
Training = Literal["none", "calibrated", "trained"]
NETWORK_MIB = 0.01  # the least state that is taken for trained weights: about 2600 numbers
ALPHA = 0.05
WILDEST = 1e100  # no measurement is larger; beyond it sums and squares leave the floating-point numbers
LATENCY_DRAWS = 100  # where a record has no quality resamples whose number could be followed


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % interval, in the metric's own unit."""

    value: float
    low: float
    high: float


class Place(NamedTuple):
    """Where figures may be compared directly: one machine at one tier."""

    machine: str
    tier: str

    def __str__(self) -> str:
        return self.machine if self.tier == "embedded" else f"{self.machine} ({self.tier})"


@dataclass
class Row:
    """One method at one rung of one task in one place. `group` is its tie group among the methods at that rung."""

    place: Place
    track: str
    task: str
    method: str
    rung: int
    records: dict[int, Record]
    group: int | None = None

    @property
    def measured(self) -> dict[int, Record]:
        """The seeds that gave figures."""
        return {s: r for s, r in self.records.items() if r.status in {"ok", "flagged"}}

    @cached_property
    def first(self) -> Record:
        """The record of the smallest measured seed, else of the smallest seed: that one is timed."""
        have = self.measured or self.records
        return have[min(have)]

    @property
    def status(self) -> str:
        """The worst status over seeds."""
        found = {r.status for r in self.records.values()}
        return next(s for s in ("failed", "flagged", "skipped", "ok") if s in found)

    @property
    def ranked(self) -> bool:
        """Whether the figures take part in groups, fronts and verdicts: all seeds ran and none is flagged."""
        return self.status == "ok"

    @property
    def notes(self) -> list[str]:
        """Messages and flags of all seeds, each once. Untrusted text."""
        found = [text for r in self.records.values() for text in ([r.message] if r.message else []) + r.flags]
        return list(dict.fromkeys(found))

    @cached_property
    def quality(self) -> dict[str, Estimate]:
        """Metric -> mean over seeds with its interval."""
        found: dict[str, Estimate] = {}
        for metric in self.first.quality if self.measured else ():
            table = self.resamples(metric)
            if table is not None:
                value = float(np.mean([r.quality[metric].value for r in self.measured.values()]))
                # A test against nought draws seeds and items as every comparison on the site does.
                spread = paired_test(table, np.zeros_like(table))
                found[metric] = Estimate(value, min(spread.low, value), max(spread.high, value))
        return found

    def resamples(self, metric: str, seeds: Iterable[int] | None = None) -> NDArray[np.float64] | None:
        """Centred resamples [seeds, B] of the given seeds (default: all measured); None where they do not line up."""
        chosen = [self.measured[s] for s in sorted(self.measured if seeds is None else seeds) if s in self.measured]
        if not chosen or (seeds is not None and len(chosen) != len(set(seeds))):
            return None
        if any(metric not in r.quality for r in chosen):
            return None
        tables = [table for r in chosen if (table := _centred(r, metric)) is not None]
        return np.stack(tables) if len(tables) == len(chosen) and len({t.size for t in tables}) == 1 else None

    @property
    def nfe(self) -> float | None:
        """Evaluations per item that count against the rung, mean over seeds."""
        found = [r.counts["nfe"] for r in self.measured.values() if "nfe" in r.counts]
        return sane(math.fsum(found) / len(found)) if found and all(sane(x) is not None for x in found) else None

    @property
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
        if self.timed is None or self.timed.latency is None:
            return None
        medians = _latency_resamples(self.timed, 1000)
        value = self.timed.latency.median_ms / self.timed.latency.items
        if not np.isfinite(medians).all() or sane(float(np.abs(medians).max())) is None:
            return Estimate(value, value, value)
        low, high = np.quantile(medians, [0.025, 0.975])
        return Estimate(value, min(float(low), value), max(float(high), value))

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


def _centred(record: Record, metric: str) -> NDArray[np.float64] | None:
    quality = record.quality[metric]
    found = np.asarray(quality.resamples or [quality.value])
    if sane(quality.value) is None or sane(float(np.abs(found).max())) is None:
        return None
    return centred(found, quality.value)


def _latency_resamples(record: Record, draws: int, against_baseline: bool = False) -> NDArray[np.float64]:
    """Bootstrap of the median ms per item [draws], or of the speed-up over the baseline's paired rounds."""
    latency = record.latency
    assert latency is not None
    own = np.asarray(latency.samples_ms or [latency.median_ms])
    index = bootstrap_indices(own.size, draws, 0)
    medians = np.median(own[index], axis=1)
    if against_baseline:
        other = np.asarray(latency.baseline_samples_ms or [])
        if other.size != own.size:
            return np.full(draws, latency.speedup if latency.speedup is not None else np.nan)
        return np.median(other[index], axis=1) / np.maximum(medians, 1e-9)
    return medians / latency.items


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


def rows(records: Sequence[Record]) -> list[Row]:
    """One row per (place, task, method, rung), tie groups assigned, in a stable order.

    Records of tasks that this checkout does not hold are left out: nothing says which way their metrics go.
    """
    known = plugins.tasks()
    cells: dict[tuple[Place, str, str, str, int], dict[int, Record]] = defaultdict(dict)
    for r in records:
        if r.task in known:
            cells[(Place(r.machine, r.tier), r.track, r.task, r.method, r.rung)][r.seed] = r
    found = [
        Row(place, track, task, method, rung, by_seed) for (place, track, task, method, rung), by_seed in cells.items()
    ]
    found.sort(key=lambda row: (row.place, row.track, row.task, row.rung, row.method))
    for task_rows in split(found, "place", "task", "rung").values():
        _assign_groups(task_rows, known[task_rows[0].task][1])
    return found


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
    best = _best(own, metric, higher)
    cheaper = [row for row in ranked if row.method != name and (row.nfe or 0) < (best.nfe or 0)]
    matches = [row for row in cheaper if not _loses(row, best, metric, higher)]
    order = sorted(matches, key=lambda row: (row.nfe_equivalent or row.nfe or 0.0, row.nfe or 0.0, row.method))
    return Bargain(task.id, best.place, best, order[0] if order else None)


def _loses(row: Row, other: Row, metric: str, higher: bool) -> bool:
    """Whether `row` is significantly worse than `other`, or cannot be compared with it."""
    seeds = set(row.measured) & set(other.measured)
    mine, theirs = row.resamples(metric, seeds), other.resamples(metric, seeds)
    if mine is None or theirs is None or mine.shape != theirs.shape:
        return True
    test = paired_test(mine, theirs)
    return test.p <= ALPHA and (test.difference < 0 if higher else test.difference > 0)


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


def _best(candidates: Sequence[Row], metric: str, higher: bool) -> Row:
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
    return Yardstick(_best(own, metric, higher), metric, higher, min(values) if higher else max(values), dearest)


def ladders(candidates: Sequence[Row], task: Task, infos: Mapping[str, MethodInfo]) -> list[Ladder]:
    """Every method's ladder on one task in one place, read against the baseline's."""
    metric, higher = headline(task)
    against = yardstick(candidates, task, infos)
    ranked = [row for row in candidates if row.ranked and metric in row.quality]
    found: list[Ladder] = []
    for (method,), mine in sorted(split(ranked, "method").items()):
        matching: dict[str, float | None] = dict.fromkeys(COSTS)
        area: dict[str, float | None] = dict.fromkeys(COSTS)
        if against is not None:
            same = [row for row in mine if row is against.best or not _loses(row, against.best, metric, higher)]
            for axis in COSTS:
                matching[axis] = min((c for row in same if (c := row.cost(axis)) is not None and c > 0), default=None)
                area[axis] = _area(mine, axis, against)
        found.append(Ladder(method, _best(mine, metric, higher), matching, area))
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
        return _centred(record, metric)
    if metric in record.counts:
        return np.array([record.counts[metric]])
    if metric in {"latency_ms", "speedup"} and row.timed is not None:
        draws = max((len(q.resamples) for q in record.quality.values()), default=0)
        figures = _latency_resamples(row.timed, draws if draws > 1 else LATENCY_DRAWS, metric == "speedup")
        return figures if np.isfinite(figures).all() else None
    single = {"memory_mib": row.memory_mib, "joules": row.joules}.get(metric)
    if single is None:  # FLOPs and NFE-equivalents are counted at one seed and are the same at all
        single = next((r.counts[metric] for r in row.measured.values() if metric in r.counts), None)
    return None if single is None else np.array([single])


def index(found: Sequence[Row]) -> dict[tuple[Place, str, str, int], Row]:
    """Rows by (place, task, method, rung)."""
    return {(row.place, row.task, row.method, row.rung): row for row in found}


def places(found: Sequence[Row]) -> list[Place]:
    """Every place, that with most rows first."""
    counted = Counter(row.place for row in found)
    return sorted(counted, key=lambda place: (-counted[place], place))


def verdicts(info: MethodInfo, found: Sequence[Row]) -> list[tuple[Claim, dict[Place, claims.Verdict]]]:
    """Every claim of a method with its verdict in every place that ran the method, best covered place first."""
    have = index(found)
    where = places([row for row in found if row.method == info.id])
    return [
        (claim, {place: judge(claim, claim_task(claim, info), place, have) for place in where}) for claim in info.claims
    ]


# trust ---------------------------------------------------------------------------------------


def record_id(record: Record) -> str:
    """Twelve hex digits that name a record: what a dispute quotes."""
    text = json.dumps(record.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def history(root: Path) -> list[Record]:
    """Every record below a results folder, those included that a later one of the same cell replaces."""
    return [r for path in sorted(root.rglob("*.jsonl")) for r in record_files.read_once(path)]


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


def standing(method: str, task: str, everything: Sequence[Record], objections: Mapping[str, Dispute]) -> Standing:
    """Derived from all runs: *claimed* without one, *measured* with one, *reproduced* when a second machine or another
    commit agrees on the same sources (by the rules of `stepmark verify`), *disputed* when it does not or when an
    objection was accepted.
    """
    runs: dict[tuple[int, int, str], list[Record]] = defaultdict(list)
    for r in everything:
        if r.method == method and r.task == task and r.status in {"ok", "flagged"} and r.tier != "smoke":
            runs[(r.rung, r.seed, r.tier)].append(r)
    if not runs:
        return Standing("claimed")
    found = Standing("measured")
    agreeing: set[str] = set()
    for (rung, seed, _), again in sorted(runs.items()):
        for r in again:
            if objections and (objection := objections.get(record_id(r))) is not None:
                found.state = "disputed"
                found.reasons.append(f"record {objection.record}: {objection.says} ({objection.link})")
        for other in again[1:]:
            first = again[0]
            elsewhere = other.machine != first.machine
            if first.digests != other.digests or not (elsewhere or other.commit != first.commit):
                continue
            from stepmark.verify import compare as repeat  # imports torch: only where something was run twice

            differs = repeat(first, other).differs
            if differs:
                found.state = "disputed"
                found.reasons.append(f"rung {rung}, seed {seed}: a second run differs: {differs[0]}")
            else:
                agreeing.add(f"machine {other.machine}" if elsewhere else f"commit {other.commit}")
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


def coverage(papers: Sequence[CatalogueEntry], infos: Mapping[str, MethodInfo], found: Sequence[Row]) -> list[Covered]:
    """Every paper with its computed status. Plugins belong to the paper that their `Paper.id` names; one that has run
    makes it live.
    """
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
        states: Counter[str] = sum((tally(info, found) for info in mine), Counter())
        result.append(Covered(entry, tuple(mine), status, states))
    return result


def tally(info: MethodInfo, found: Sequence[Row]) -> Counter[str]:
    """How many claims of a method got which verdict in its best covered place."""
    return Counter(next(iter(by.values())).state if by else "not run" for _, by in verdicts(info, found))


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


def show(records: Sequence[Record]) -> str:
    """An aligned table per task and machine: best first at each rung, groups instead of ranks. Newest suite, any tier."""
    found = rows(newest(records))
    known = plugins.tasks()
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
        blocks.append(f"{task_id} v{task.version} on {place}; rungs in {task.unit}\n" + "\n".join(lines))
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


def comparisons(records: Sequence[Record], a: str, b: str, track: str | None = None) -> list[Comparison]:
    """Paired tests of two methods wherever both have figures at the same rung, Holm-corrected over all of them.

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
    return contrasts(rows(chosen), a, b)


def contrasts(found: Sequence[Row], a: str, b: str) -> list[Comparison]:
    """Paired tests of two methods over rows that may hold others too; see `comparisons`."""
    have = index([row for row in found if row.method == b])
    known = plugins.tasks()
    pairs: list[tuple[Row, Row, PairedTest, float | None, bool]] = []
    for mine in found:
        other = have.get((mine.place, mine.task, b, mine.rung))
        if mine.method != a or other is None:
            continue
        task = known[mine.task][1]
        metric, higher = headline(task)
        seeds = set(mine.measured) & set(other.measured)
        first, second = mine.resamples(metric, seeds), other.resamples(metric, seeds)
        if first is not None and second is not None and first.shape == second.shape:
            effect = standardised_difference(first, second, task.items(mine.place.tier))
            pairs.append((mine, other, paired_test(first, second), effect, higher))
    adjusted = holm([test.p for _, _, test, _, _ in pairs])
    tests: list[Comparison] = []
    for (mine, other, test, effect, higher), p in zip(pairs, adjusted, strict=True):
        winner = None if p > ALPHA else (a if (test.difference > 0) == higher else b)
        ratio = None
        if mine.latency_ms and other.latency_ms and other.latency_ms.value:
            ratio = sane(mine.latency_ms.value / other.latency_ms.value)
        tests.append(
            Comparison(
                mine.task, mine.place, mine.rung, test.difference, test.low, test.high, float(p), winner, ratio, effect
            )
        )
    return tests


def compare(records: Sequence[Record], a: str, b: str, track: str | None = None) -> str:
    """Paired tests of two methods as an aligned table, with a plain sentence at the end.

    Raises:
        ValueError: a method without records, or the same method twice.
    """
    found = comparisons(records, a, b, track)
    if not found:
        return f"{a} and {b} share no rung of a task on one machine" + (f" in track {track}" if track else "")
    known = plugins.tasks()
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
        for c in found
    ]
    return "\n".join(_aligned(head, body, (0, 1, 3, 8))) + "\n\n" + in_a_sentence(found, a, b)


def in_a_sentence(found: Sequence[Comparison], a: str, b: str) -> str:
    """What the comparisons of two methods come to."""
    count = Counter(c.winner for c in found)
    ratios = [c.latency_ratio for c in found if c.latency_ratio is not None]
    time = "Latency was not read for both."
    if ratios:
        time = f"At equal rungs {a} takes {figure(float(np.median(ratios)))} times as long as {b} (median)."
    return (
        f"{a} is better than {b} in {count[a]} of {len(found)} comparisons, worse in {count[b]}, and {count[None]} "
        f"show no difference (paired bootstrap, Holm-corrected at {ALPHA:.0%}). {time}"
    )
