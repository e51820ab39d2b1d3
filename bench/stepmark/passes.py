"""The passes over a cell, each a function from a runner, its judge and the cell to a part of the record.

They are separate so that none disturbs another: quality and counts come from plain calls, FLOPs and the audit from calls
under watch, times from calls that nothing watches, memory and energy from calls of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from stepmark import plugins, record, runner
from stepmark.cell import Cell, cut, fingerprint, join, size_of
from stepmark.claims import TIMES, parse
from stepmark.judge import Judge
from stepmark.meter import latency as clock
from stepmark.meter import machine
from stepmark.method import Skip
from stepmark.runner import Call, Runner
from stepmark.task import sealed


@dataclass
class Part:
    """What a pass adds to a record: fields, and lines of the tables and the list that all passes share."""

    fields: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answers:
    """What the quality pass was given and gave, for those who look closer: all items; of the first batch the call too."""

    inputs: dict[str, Any]
    outputs: Any
    batch: dict[str, Any]
    first: Call


def quality(mine: Runner, judge: Judge, cell: Cell) -> tuple[Part, Answers]:
    """All items in batches, each counted and checked; then the metrics."""
    task = judge.task
    n = task.items(cell.tier)
    inputs = judge.inputs(n, cell.seed)
    calls: list[Call] = []
    handles: dict[str, dict[str, float]] = {}
    for index, start in enumerate(range(0, n, task.batch)):
        batch = cut(inputs, start, start + task.batch)
        calls.append(mine.run(batch, cell.rung, cell.seed, index))
        judge.check(batch, calls[-1].outputs)
        for name, figures in calls[-1].handles.items():
            total = handles.setdefault(name, dict.fromkeys(figures, 0.0))
            for key, value in figures.items():
                total[key] = total.get(key, 0.0) + value
    outputs = join([call.outputs for call in calls])
    scores = judge.score(inputs, outputs, cell.seed)
    fields = {
        "handles": handles,
        "reported": calls[0].reported,
        "quality": {
            name: record.Quality(value=float(s.value), resamples=[float(f"{r:.6g}") for r in s.resamples])
            for name, s in scores.items()
        },
        "offline": mine.offline,
        "outputs": fingerprint(outputs),
    }
    counts = {"nfe": sum(handles.get(name, {}).get("evaluations", 0.0) for name in mine.bounded) / n}
    for name, figures in handles.items():
        counts |= {f"{name}_{key}": value / n for key, value in figures.items() if key != "calls"}
    return Part(fields, counts), Answers(inputs, outputs, cut(inputs, 0, task.batch), calls[0])


def counts(mine: Runner, judge: Judge, cell: Cell, answers: Answers) -> Part:
    """FLOPs and key/value bytes of a watched call, and what the comparisons of calls flag."""
    batch, first = answers.batch, answers.first
    flags = judge.reports(first)
    call, reference, more = judge.work(mine, batch, cell.rung, cell.seed)
    flags += more + judge.again(mine, batch, first, cell.rung, cell.seed)
    flops, items = call.flops, min(judge.task.probe, size_of(batch))
    assert flops is not None
    figures = {"flops": flops.total / items, "flops_outside": flops.outside / items}
    reasons = {}
    if reference:
        figures["nfe_equivalent"] = flops.total / items / reference
    else:
        reasons["nfe_equivalent"] = "the task has no network whose evaluation has countable FLOPs"
    if flops.ranks:
        figures |= {"ranks": float(mine.ranks), "rank_flops": max(flops.ranks) / items}
    if flops.held:
        figures |= {"kv_bytes": float(flops.held), "kv_read_bytes": flops.read / items}
    return Part({}, figures, reasons, flags)


def latency(mine: Runner, judge: Judge, cell: Cell, answers: Answers) -> Part:
    """Wall time of calls on the first batch, in rounds with those of the first baseline that runs on the task and of the
    methods that a claim of time names beside it."""
    batch, task = answers.batch, judge.task
    runners = {"method": mine}
    baseline = _baseline(mine, judge, cell, batch)
    if baseline is not None:
        runners["baseline"] = baseline
    runners |= _beside(mine, cell, {each.info.id for each in runners.values()})
    smoke = cell.tier == "smoke"
    with sealed(), torch.no_grad():
        read = clock.measure(
            {name: partial(each.call, batch, cell.rung) for name, each in runners.items()},
            mine.device,
            warmup=1,
            min_rounds=2 if smoke else task.rounds,
            min_seconds=0.02 if smoke else task.seconds,
            max_seconds=1.0 if smoke else 8.0,
            setups={name: partial(each.begin, batch, cell.rung, cell.seed) for name, each in runners.items()},
        )
    own = read["method"]
    others = {name: _milliseconds(each) for name, each in read.items() if name not in ("method", "baseline")}
    figures: dict[str, Any] = {"beside": others} if others else {}
    if baseline is not None:
        other = read["baseline"]
        ratio = clock.ratio(other, own)
        figures |= {
            "baseline": baseline.info.id,
            "baseline_median_ms": other.median_ns / 1e6,
            "baseline_samples_ms": _milliseconds(other),
            "speedup": ratio.value,
            "speedup_low": ratio.low,
            "speedup_high": ratio.high,
        }
    found = record.Latency(
        items=size_of(batch),
        median_ms=own.median_ns / 1e6,
        iqr_ms=own.iqr_ns / 1e6,
        p95_ms=own.p95_ns / 1e6,
        samples_ms=_milliseconds(own),
        cuda_ms=own.cuda_median_ms,
        **figures,
    )
    same = fingerprint(own.output) == fingerprint(answers.first.outputs)
    flags = [] if same else ["the timed call gave other outputs than the scored one"]
    return Part({"latency": found}, reasons={"latency": own.note} if own.note else {}, flags=flags)


def _baseline(mine: Runner, judge: Judge, cell: Cell, batch: Mapping[str, Any]) -> Runner | None:
    """The first baseline that names the task, trained with seed 0. Where a task does not bring all that methods may
    ask for, one that lacks something is passed over."""
    partly = bool(judge.task.absent or judge.task.untrained)
    known = plugins.methods()
    for name in mine.info.baselines:
        if cell.task not in known[name].tasks:
            continue
        try:
            found = runner.ready(known[name], cell.task, cell.tier, str(mine.device))
            if partly:
                found.run(batch, cell.rung, cell.seed)
            return found
        except Skip:
            if not partly:
                raise
    return None


def _beside(mine: Runner, cell: Cell, have: set[str]) -> dict[str, Runner]:
    """Runners of further methods whose times at this cell's rung a claim of the method compares with its own."""
    known, named = plugins.methods(), []
    for claim in mine.info.claims:
        if (claim.task or mine.info.tasks[0]) == cell.task:
            named += [r.method for r in parse(claim.check).references() if r.metric in TIMES]
    ids = [name for name in dict.fromkeys(named) if name not in have and cell.task in known[name].tasks]
    return {name: runner.ready(known[name], cell.task, cell.tier, str(mine.device)) for name in ids}


def _milliseconds(read: clock.Latency) -> list[float]:
    return [round(ns / 1e6, 6) for ns in read.samples_ns]


def memory(mine: Runner, judge: Judge, cell: Cell, answers: Answers) -> Part:
    """The peak of one call. Where items run one after the other it is that of a few, and the tracker is slow."""
    batch = answers.batch
    few = cell.tier == "smoke" or isinstance(next(iter(batch.values())), list)
    peak = mine.weighed(cut(batch, 0, judge.task.probe) if few else batch, cell.rung, cell.seed)
    if peak.bytes is None:
        return Part(reasons={"memory": peak.reason or "not read"})
    mib = 2**20
    found = record.Memory(peak_mib=peak.bytes / mib, how=str(peak.method), state_mib=mine.loaded_bytes / mib)
    return Part({"memory": found})


def energy(mine: Runner, judge: Judge, cell: Cell, answers: Answers) -> Part:
    """Joules of one call."""
    if cell.tier == "smoke":
        return Part(reasons={"energy": "not read at tier smoke"})
    read = mine.fed(answers.batch, cell.rung, cell.seed)
    if read.joules is None or read.window_s is None:
        return Part(reasons={"energy": read.reason or "not read"})
    found = record.Energy(
        joules=read.joules, idle_watts=read.idle_watts, window_s=read.window_s, sensor=str(read.method)
    )
    return Part({"energy": found})


def timeless(mine: Runner, cell: Cell, timing: bool) -> str:
    """Why neither time nor memory nor energy is read of a cell; "": they are."""
    if cell.seed:
        return "read at seed 0; other seeds repeat the quality"
    cores = machine.usable_cores()
    if mine.ranks > cores and mine.device.type == "cpu":
        return f"{mine.ranks} processes on {cores} core: their times would say nothing"
    return "" if timing else record.UNTIMED
