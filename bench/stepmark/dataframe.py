"""All records as one tidy table: `from stepmark import frame`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stepmark import admission, plugins
from stepmark.places import results_folder
from stepmark.record import Latency, Quality, Record
from stepmark.stats import bootstrap_medians, centred, intervals

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 1000  # of the interval of a median latency, as on the board
UNITS = {
    "nfe": "evaluations per item",
    "nfe_equivalent": "reference evaluations per item",
    "flops": "FLOP per item",
    "flops_outside": "FLOP per item",
    "kv_bytes": "bytes",
    "kv_read_bytes": "bytes per item",
    "latency_ms": "ms per item",
    "speedup": "times",
    "memory_mib": "MiB",
    "state_mib": "MiB",
    "joules": "J per item",
    "offline_s": "s",
    "offline_evaluations": "evaluations",
}
COLUMNS = (
    "suite", "machine", "device", "checkpoint", "tier", "track", "task", "method", "base", "rung", "rung_unit", "seed",
    "status", "figure", "value", "low", "high", "unit", "better", "created", "left_out",
)  # fmt: skip


class _Figure(NamedTuple):
    name: str
    value: float
    low: float = float("nan")
    high: float = float("nan")


def frame(results: Path | str | None = None, tier: str | None = None) -> pd.DataFrame:
    """Every record below a results folder as a tidy table: one row per record and figure.

    `results`: the folder (default: where `stepmark run` writes records of this tier); `tier`: records of this tier only
    (default: all that are there). Of each cell the newest record counts.

    Columns:
        suite, machine, device, checkpoint, tier: where and with what suite it was measured; figures of different places
            are compared as ratios only. `checkpoint` is "" for the tasks of the suite.
        track, task, method, base: what was measured; `base` is the method whose variant it is, or the method itself.
        rung, rung_unit, seed: the budget, what it counts, and the seed of the noise.
        status: ok, flagged, failed or skipped. A record without figures has one row, with neither figure nor value.
        figure: a metric of the task (`fd`), a count (`nfe`, `nfe_equivalent`, `flops`), or `latency_ms`, `speedup`,
            `memory_mib`, `joules`, `offline_s`, `offline_evaluations`. Time, memory and energy are read at seed 0 only.
        value, low, high: the figure and its 95 % interval: of a metric over the items, of time over the rounds; NaN
            where there is none.
        unit, better: of the value; "lower" or "higher" for metrics, else missing.
        created: when the record was written, UTC.
        left_out: why the board leaves the record out (not of this suite, incomplete); missing where it takes it in.

    Raises:
        ModuleNotFoundError: without pandas. RecordError: a record cannot be read.
    """
    try:
        import pandas as pd
    except ModuleNotFoundError:
        raise ModuleNotFoundError("stepmark.frame needs pandas: pip install 'stepmark[frame]'") from None
    taken, others = admission.read(Path(results) if results is not None else results_folder(tier or "embedded"))
    reasons: list[str | None] = [*([None] * len(taken)), *(each.why for each in others)]
    pairs = list(zip([*taken, *(each.record for each in others)], reasons, strict=True))
    pairs = [(r, why) for r, why in pairs if tier is None or r.tier == tier]
    chosen = [r for r, _ in pairs]
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    methods, tasks = plugins.methods(), plugins.tasks()
    for (r, why), figures in zip(pairs, _figures(chosen), strict=True):
        info, task = methods.get(r.method), tasks.get(r.task, ("", None))[1]
        better = task.metrics if task else {}  # of a task that this checkout lacks nobody knows
        what = {
            "suite": r.suite, "machine": r.machine, "device": r.device, "checkpoint": r.checkpoint, "tier": r.tier,
            "track": r.track, "task": r.task, "method": r.method, "base": (info.base if info else None) or r.method,
            "rung": r.rung, "rung_unit": task.unit if task else None, "seed": r.seed, "status": r.status,
            "created": r.created, "left_out": why,
        }  # fmt: skip
        for each in figures:
            for name, value in what.items():
                columns[name].append(value)
            columns["figure"].append(None if each is None else each.name)
            for name in ("value", "low", "high"):
                columns[name].append(float("nan") if each is None else getattr(each, name))
            columns["unit"].append(None if each is None or each.name in better else _unit(each.name))
            columns["better"].append(None if each is None else better.get(each.name))
    made = pd.DataFrame(columns)
    texts = [name for name in COLUMNS if name not in {"rung", "seed", "value", "low", "high", "created"}]
    kinds = dict.fromkeys(texts, "str") | {"rung": "int64", "seed": "int64"}
    kinds |= dict.fromkeys(("value", "low", "high"), "float64")
    return made.astype(kinds).assign(created=pd.to_datetime(made["created"], utc=True))


def _unit(name: str) -> str | None:
    return UNITS.get(name) or ("per item" if name.endswith(("_evaluations", "_positions")) else None)


def _figures(records: Sequence[Record]) -> Iterator[Sequence[_Figure | None]]:
    """The figures of each record in turn; `[None]` of one that has none."""
    metrics = _metrics([(i, name, q) for i, r in enumerate(records) for name, q in r.quality.items()])
    times = _times([(i, r.latency) for i, r in enumerate(records) if r.latency and r.latency.items > 0])
    for i, r in enumerate(records):
        found = [*metrics.get(i, ()), *(_Figure(name, value) for name, value in r.counts.items())]
        if r.latency and i in times:
            found.append(times[i])
            if (ratio := r.latency.speedup) is not None:
                ends = (r.latency.speedup_low, r.latency.speedup_high)
                found.append(_Figure("speedup", ratio, *(ratio if end is None else end for end in ends)))
        if r.memory:
            found.append(_Figure("memory_mib", r.memory.peak_mib))
        if r.energy and r.latency and r.latency.items > 0:
            found.append(_Figure("joules", r.energy.joules / r.latency.items))
        if r.offline:
            found.append(_Figure("offline_s", r.offline.seconds))
            found.append(_Figure("offline_evaluations", float(sum(r.offline.evaluations.values()))))
        yield found or [None]


def _metrics(asked: Sequence[tuple[int, str, Quality]]) -> dict[int, list[_Figure]]:
    """Metrics by the place of their record, many at a time. Intervals stand about the value, as on the board."""
    alike: dict[int, list[int]] = defaultdict(list)
    for place, (*_, quality) in enumerate(asked):
        alike[len(quality.resamples)].append(place)
    ends = [(float("nan"), float("nan"))] * len(asked)
    for size, places in alike.items():
        if size:
            values = np.array([asked[place][2].value for place in places])
            with np.errstate(over="ignore", invalid="ignore"):
                tables = centred([asked[place][2].resamples for place in places], values)
            low, high = (end.tolist() for end in intervals(tables))
            for place, value, a, b in zip(places, values.tolist(), low, high, strict=True):
                ends[place] = (min(a, value), max(b, value))
    found: dict[int, list[_Figure]] = defaultdict(list)
    for (i, name, quality), pair in zip(asked, ends, strict=True):
        found[i].append(_Figure(name, quality.value, *pair))
    return found


def _times(asked: Sequence[tuple[int, Latency]]) -> dict[int, _Figure]:
    """Milliseconds per item by the place of their record, with the interval of the median over the rounds."""
    alike: dict[int, list[tuple[int, Latency]]] = defaultdict(list)
    for i, latency in asked:
        alike[len(latency.samples_ms or [0.0])].append((i, latency))
    found: dict[int, _Figure] = {}
    for same in alike.values():
        medians = bootstrap_medians([latency.samples_ms or [latency.median_ms] for _, latency in same], DRAWS)
        low, high = intervals(medians / np.array([latency.items for _, latency in same])[:, None])
        for (i, latency), a, b in zip(same, low.tolist(), high.tolist(), strict=True):
            value = latency.median_ms / latency.items
            found[i] = _Figure("latency_ms", value, min(a, value), max(b, value))
    return found
