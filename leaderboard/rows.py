"""From records to rows. A *row* is one method at one rung of one task in one place, over all its noise seeds.

`stepmark show`, `stepmark compare` and the site all read rows; nothing here runs or imports a plugin. What a row says
of its method (groups, fronts, verdicts, trust) is computed in the modules of those names.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from stepmark.leaderboard.estimates import WILDEST, Estimate, sane

from stepmark import plugins
from stepmark.admission import sorted_out
from stepmark.plugins import MethodInfo
from stepmark.record import Quality, Record, version_key
from stepmark.stats import bootstrap_medians, centred, drawn, intervals
from stepmark.task import Task

Training = Literal["none", "calibrated", "trained"]
NETWORK_MIB = 0.01  # the least state that is taken for trained weights: about 2600 numbers
TIMED_DRAWS = 1000  # of the interval of a median latency
AT_ONCE = 128  # pairs whose draws are held at once


class Place(NamedTuple):
    """Where figures may be compared directly: one device of one machine at one tier, and one checkpoint if any."""

    machine: str
    tier: str
    device: str = "cpu"
    checkpoint: str = ""

    @property
    def where(self) -> str:
        """Machine, the device if it is not the processor, and the checkpoint."""
        device = "" if self.device == "cpu" else f", {self.device}"
        return self.machine + device + (f", checkpoint {self.checkpoint[:8]}" if self.checkpoint else "")

    def __str__(self) -> str:
        return self.where if self.tier == "embedded" else f"{self.where} ({self.tier})"


Seeds = dict[tuple[Place, str, str, str, int], dict[int, Record]]  # by place, track, task, method and rung


def place_of(record: Record) -> Place:
    """Where a record was taken."""
    return Place(record.machine, record.tier, record.device, record.checkpoint)


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
    seeds: int = 1  # that the task, or the method, asks for
    task_seeds: int = 1  # a further seed has the items of one of them; `records` may hold those of other machines

    @cached_property
    def measured(self) -> dict[int, Record]:
        """The seeds that gave figures."""
        return {s: r for s, r in self.records.items() if r.status in {"ok", "flagged"}}

    @cached_property
    def own(self) -> dict[int, Record]:
        """The seeds that gave figures on this machine: times, memory and energy are theirs alone."""
        return {s: r for s, r in self.measured.items() if r.machine == self.place.machine}

    @property
    def lent(self) -> dict[int, str]:
        """Seeds whose quality was measured elsewhere, with the machine."""
        return {s: r.machine for s, r in sorted(self.records.items()) if r.machine != self.place.machine}

    def seed_for(self, seed: int) -> int:
        """The seed itself; of one beyond those of this row, which another method is trained with, that of the same items."""
        return seed if seed in self.records or seed < self.seeds else seed % self.task_seeds

    def of(self, seed: int) -> Record:
        """The record that stands for a seed (`seed_for`).

        Raises:
            KeyError: it was not measured.
        """
        return self.measured[self.seed_for(seed)]

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
        """The worst status over seeds; *incomplete* where all is well but some of the seeds are missing."""
        found = {r.status for r in self.records.values()}
        worst = next(s for s in ("failed", "flagged", "skipped", "ok") if s in found)
        return "incomplete" if worst == "ok" and len(self.records) < self.seeds else worst

    @property
    def ranked(self) -> bool:
        """Whether the figures take part in groups, fronts, comparisons and verdicts: all seeds ran, none is flagged."""
        return self.status == "ok"

    @cached_property
    def notes(self) -> list[str]:
        """Messages and flags of all seeds, each once. Untrusted text."""
        found = [text for r in self.records.values() for text in ([r.message] if r.message else []) + r.flags]
        found += [f"{len(self.records)} of {self.seeds} seeds"] if self.status == "incomplete" else []
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
        wanted = sorted(self.measured if seeds is None else set(seeds))
        tables = [have.get(self.seed_for(s)) for s in wanted]
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
        """The record that holds the latency, of this machine."""
        readings = (r for _, r in sorted(self.own.items()) if r.latency and r.latency.items > 0)
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
        return sane(next((r.memory.peak_mib for r in self.own.values() if r.memory), None))

    @property
    def joules(self) -> float | None:
        """Joules per item."""
        for r in self.own.values():
            if r.energy and r.latency and r.latency.items > 0:
                return sane(r.energy.joules / r.latency.items)
        return None

    @property
    def offline_s(self) -> float | None:
        """Seconds of `prepare`, paid once for the whole ladder."""
        return sane(next((r.offline.seconds for r in self.measured.values() if r.offline), None))

    def reason(self, name: str) -> str | None:
        """Why a figure is null, as the harness wrote it. Untrusted text."""
        elsewhere = name in {"latency", "speedup", "memory", "energy"} and self.first.machine != self.place.machine
        return f"its quality was measured on {self.first.machine}" if elsewhere else self.first.reasons.get(name)

    def cost(self, axis: str) -> float | None:
        """Position on a cost axis: "unit" or the name of a figure of the row."""
        if axis == "latency_ms":
            return self.latency_ms.value if self.latency_ms else None
        value = self.nfe if axis == "unit" else getattr(self, axis)
        return None if value is None else float(value)


def record_id(record: Record) -> str:
    """Twelve hex digits that name a record, of the sha256 of all that it says: what a dispute quotes."""
    return line_id(record.model_dump_json())


def line_id(line: str) -> str:
    """The id of the record that is this JSON when written out whole, as the downloads hold it."""
    return hashlib.sha256(line.encode()).hexdigest()[:12]


# many rows at once ------------------------------------------------------------------------------


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


# reading ----------------------------------------------------------------------------------------


def newest(records: Sequence[Record]) -> list[Record]:
    """Records of the newest suite version among them."""
    version = max((version_key(r.suite) for r in records), default=())
    return [r for r in records if version_key(r.suite) == version]


def cells(records: Iterable[Record], known: Mapping[str, tuple[str, Task]]) -> list[Row]:
    """The rows of those records that the board takes in (`admission`), later ones replacing earlier ones of the same
    seed; without groups.
    """
    found = sorted_out(records, known)[0]
    return rows_of(found, known, homes((r.device, r.machine) for r in found))


def homes(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The machine with most records of each kind of device, whose rows are completed with what only others measured.

    `pairs`: (device, machine) of every record.
    """
    order = sorted(Counter(pairs).items(), key=lambda item: (-item[1], item[0]), reverse=True)
    return dict(pair for pair, _ in order)  # the last of a device stays


def rows_of(
    records: Iterable[Record], known: Mapping[str, tuple[str, Task]], home: Mapping[str, str] | None = None
) -> list[Row]:
    """The rows of records, whether the board takes them in or not: of older versions, of which only the past is told.

    Quality travels between machines, times do not: see `_complete` for what a row takes over. `home`: `homes`.
    """
    methods = plugins.methods()
    seeds: Seeds = defaultdict(dict)
    for r in records:
        if r.task in known:
            seeds[(place_of(r), r.track, r.task, r.method, r.rung)][r.seed] = r
    _complete(seeds, home or {})
    found = [
        Row(
            place,
            track,
            task,
            method,
            rung,
            by_seed,
            seeds=1 if place.checkpoint else asked(methods.get(method), known[task][1], place.tier),
            task_seeds=known[task][1].seeds,
        )
        for (place, track, task, method, rung), by_seed in seeds.items()
    ]
    found.sort(key=order)
    return found


def _complete(seeds: Seeds, home: Mapping[str, str]) -> None:
    """Give rows, in place, the figures that other machines measured with the newest sources of the same method on the
    same task: each row the seeds that it lacks or has of older sources, and the home, of tasks that it has measured
    something of, also the rows that it lacks.
    """
    sources: dict[tuple[Any, ...], Record] = {}
    beside: dict[tuple[Any, ...], dict[str, dict[int, Record]]] = defaultdict(dict)
    tasks: dict[tuple[Any, ...], set[str]] = defaultdict(set)  # the machines that have measured something of each
    for (place, *cell), mine in seeds.items():
        if not place.checkpoint:  # those stand for themselves
            beside[place[1:], *cell][place.machine] = mine
            tasks[place[1:], *cell[:2]].add(place.machine)
            for r in mine.values():
                pair = place[1:], *cell[:3]
                sources[pair] = max(r, sources.get(pair, r), key=lambda each: each.created)
    for (where, *cell), machines in beside.items():
        main = home.get(where[1])
        asking = {*machines, main} if main in tasks[where, *cell[:2]] else {*machines}
        if len(asking) == 1:
            continue
        now = sources[where, *cell[:3]].digests
        fresh: dict[int, Record] = {}
        for r in (r for mine in machines.values() for r in mine.values()):
            if r.digests == now and r.status in {"ok", "flagged"}:
                fresh[r.seed] = max(r, fresh.get(r.seed, r), key=lambda each: each.created)
        for machine in asking:
            mine = machines.get(machine, {})
            more = {s: r for s, r in fresh.items() if s not in mine or mine[s].digests != now}
            if more:
                seeds[(Place(machine, *where), *cell)] = dict(sorted((mine | more).items()))


def shared_seeds(rows: Sequence[Row]) -> list[int]:
    """The seeds of which each of the rows has a record (`Row.of`)."""
    seeds = sorted({seed for row in rows for seed in row.measured})
    return [seed for seed in seeds if all(row.seed_for(seed) in row.measured for row in rows)]


def asked(info: MethodInfo | None, task: Task, tier: str = "embedded") -> int:
    """How many seeds a row of a method on a task needs."""
    return info.seeds(task, tier) if info is not None else 1 if tier == "smoke" else task.seeds


# asking -----------------------------------------------------------------------------------------


def order(row: Row) -> tuple[Any, ...]:
    """The order of rows everywhere."""
    return (row.place, row.track, row.task, row.rung, row.method)


def split(found: Sequence[Row], *fields: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some of their fields, in order."""
    parts: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in found:
        parts[tuple(getattr(row, name) for name in fields)].append(row)
    return dict(parts)


def index(found: Sequence[Row]) -> dict[tuple[Place, str, str, int], Row]:
    """Rows by (place, task, method, rung)."""
    return {(row.place, row.task, row.method, row.rung): row for row in found}


def places(found: Sequence[Row]) -> list[Place]:
    """Every place, that with most rows first."""
    counted = Counter(row.place for row in found)
    return sorted(counted, key=lambda place: (-counted[place], place))


def lenders(found: Sequence[Row]) -> str:
    """In a sentence which figures of rows of one place other machines measured; "" where none."""
    lent = Counter(machine for row in found for machine in row.lent.values())
    total = sum(len(row.records) for row in found)
    said = ", ".join(f"{n} of {total} on {machine}" for machine, n in sorted(lent.items()))
    return f"Seeds whose quality was measured elsewhere, and their times left out: {said}." if said else ""


def headline(task: Task) -> tuple[str, bool]:
    """The first metric of a task, and whether higher is better."""
    metric, direction = next(iter(task.metrics.items()))
    return metric, direction == "higher"


def best(candidates: Sequence[Row], metric: str, higher: bool) -> Row:
    """The row of best quality, the smallest rung among equals."""
    return max(
        candidates, key=lambda row: (row.quality[metric].value if higher else -row.quality[metric].value, -row.rung)
    )


def training(mine: Sequence[Row]) -> Training:
    """What a method needs before it can run, from the records of its `prepare`.

    *trained*: it left a state as large as a network; *calibrated*: it spent evaluations or left a smaller state.
    """
    costs = [r.offline for row in mine for r in row.measured.values() if r.offline]
    if any(cost.state_mib >= NETWORK_MIB for cost in costs):
        return "trained"
    return "calibrated" if any(cost.state_mib > 0 or cost.evaluations for cost in costs) else "none"
