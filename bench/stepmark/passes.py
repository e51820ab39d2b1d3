"""The passes over a cell, each a function from a worker, its judge and the cell to a part of the record.

They are separate so that none disturbs another: quality and counts come from plain calls, FLOPs from calls under watch,
times from calls that nothing watches, memory and energy from calls of their own. A plain call is the same thing in every
pass: a method cannot tell the scored ones from the timed and the audited ones.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import floor, log10
from typing import Any

import numpy as np

from stepmark import plugins, record, remote
from stepmark.cell import Cell, cut, fingerprint, join, size_of
from stepmark.claims import TIMES, parse
from stepmark.judge import Judge, tokens_of
from stepmark.meter import energy as joules
from stepmark.meter import latency as clock
from stepmark.meter import machine
from stepmark.method import Skip
from stepmark.remote import Template, Worker
from stepmark.runner import Call

MORE = 8  # calls like the scored and the timed ones, where these leave a doubt


def rounded(resamples: Iterable[float]) -> list[float]:
    """Resamples in decimals, a hundredth of their range or less apart: finer ones move no interval, and records are long."""
    numbers = np.asarray(list(resamples), dtype=np.float64)
    if not numbers.size or not np.ptp(numbers) > 0:
        return [float(f"{number:.6g}") for number in numbers]
    return [round(number, 2 - floor(log10(np.ptp(numbers)))) for number in numbers.tolist()]


@dataclass
class Part:
    """What a pass adds to a record: fields, and lines of the tables and the list that all passes share."""

    fields: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answers:
    """What the quality pass was given and gave, for those who look closer: all items; of the first batch the call too, and
    the evaluations of every batch of its size."""

    inputs: dict[str, Any]
    outputs: Any
    batch: dict[str, Any]
    first: Call
    spent: list[float]


def quality(mine: Worker, judge: Judge, cell: Cell) -> tuple[Part, Answers]:
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
            name: record.Quality(value=float(s.value), resamples=rounded(s.resamples)) for name, s in scores.items()
        },
        "offline": mine.offline,
        "outputs": fingerprint(outputs),
    }
    counts = {"nfe": sum(handles.get(name, {}).get("evaluations", 0.0) for name in mine.bounded) / n}
    for name, figures in handles.items():
        counts |= {f"{name}_{key}": value / n for key, value in figures.items() if key != "calls"}
    flags = list(dict.fromkeys(flag for call in calls for flag in call.flags))
    batch = cut(inputs, 0, task.batch)
    spent = [call.spent for call in calls[: max(1, n // size_of(batch))]]
    return Part(fields, counts, flags=flags), Answers(inputs, outputs, batch, calls[0], spent)


def counts(mine: Worker, judge: Judge, cell: Cell, answers: Answers) -> Part:
    """FLOPs and key/value bytes of a watched call, and what comparisons of calls flag."""
    batch, first = answers.batch, answers.first
    probe = cut(batch, 0, min(judge.task.probe, size_of(batch)))
    items = size_of(probe)
    call, reference = mine.counted(probe, cell.rung, cell.seed), judge.reference_flops(probe)
    flags = judge.reports(first) + judge.work(call, reference, items, judge.instead(mine, first, cell.rung))
    flags += judge.nothing_asked(first, mine.offline)
    flags += judge.copies(answers.outputs) + judge.planted(mine, cell.rung)
    with somebody_else(mine) as other:
        found = judge.unseen_work(mine, other, batch, first, call, cell.rung, cell.seed, reference)
    flags += [flag for flag in found if flag not in flags]
    flops = call.flops
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


@contextlib.contextmanager
def somebody_else(mine: Worker) -> Iterator[Worker]:
    """Another worker of the same method, which has answered nothing yet; where processes do not fork, the same one."""
    other = mine.template.worker()
    try:
        yield other
    finally:
        other.close()


def latency(mine: Worker, judge: Judge, cell: Cell, answers: Answers) -> Part:
    """Wall time of calls on batches of the size of the first, in rounds with those of the first baseline that runs on the
    task at this rung and of the methods that a claim of time names beside it. Every round has inputs that nobody has seen;
    all subjects of a round have the same."""
    task, size = judge.task, size_of(answers.batch)
    smoke, secret = cell.tier == "smoke", secrets.randbits(60)
    batches: dict[int, dict[str, Any]] = {}  # of the round that is running
    calls: list[Call] = []
    written: dict[str, list[int]] = {}

    def turn(name: str, number: int) -> tuple[int, int | None, Any]:
        if number not in batches:
            batches.clear()
            batches[number] = judge.inputs(size, secret + number, "timed")
        call = workers[name].run(batches[number], cell.rung, secret + number)
        if number >= 0:
            written.setdefault(name, []).extend(tokens_of(call.outputs))
            if name == "method":
                calls.append(call)
        return call.ns, call.device_ns, call.outputs

    with contextlib.ExitStack() as opened:
        workers, baseline = {"method": mine}, None

        def joins(name: str, template: Template) -> bool:
            """Whether somebody takes part: not who skips this rung, which is no fault of the method's."""
            workers[name] = worker = template.worker()
            opened.callback(worker.close)
            try:
                turn(name, -1)
            except Skip:
                del workers[name]
            return name in workers

        for template in _ready(mine, cell, mine.info.baselines):
            if joins("baseline", template):
                baseline = template
                break
        have = {mine.info.id, *([baseline.info.id] if baseline else [])}
        for template in _ready(mine, cell, (name for name in _beside(mine, cell) if name not in have)):
            joins(template.info.id, template)
        read = clock.take_turns(
            {name: partial(turn, name) for name in workers},
            warmup=1,
            min_rounds=2 if smoke else task.rounds,
            min_seconds=0.02 if smoke else task.seconds,
            max_seconds=1.0 if smoke else 60.0 if cell.tier == "hub" else 8.0,  # a real model takes seconds for a text
            events=judge.device.type == "cuda",
        )
    own = read["method"]
    flags = [*judge.clocks(calls), *dict.fromkeys(flag for call in calls for flag in call.flags)]
    last = len(own.samples_ns) - 1

    with somebody_else(mine) as other:  # the last round again, by somebody who has not seen the others
        again = other.run(judge.inputs(size, secret + last, "timed"), cell.rung, secret + last)

        def more() -> tuple[list[float], list[float]]:
            known = judge.inputs(task.items("embedded"), cell.seed)  # of which tier smoke has scored the first few
            starts = range(size * len(answers.spent), size_of(known) - size + 1, size)[:MORE]
            scored = [other.run(cut(known, i, i + size), cell.rung, cell.seed).spent for i in starts]
            numbers = [secret - 2 - i for i in range(MORE)]
            return scored, [other.run(judge.inputs(size, each, "timed"), cell.rung, each).spent for each in numbers]

        flags += judge.hurried(answers.spent, [call.spent for call in calls], more)
    if fingerprint(again.outputs) != fingerprint(own.output):
        flags.append("a timed call gave other outputs than the same call in another process: hidden state")
    others = {name: _milliseconds(each) for name, each in read.items() if name not in ("method", "baseline")}
    figures: dict[str, Any] = {"beside": others} if others else {}
    if written["method"]:
        figures |= {"tokens": written["method"], "baseline_tokens": written.get("baseline", [])}
    if baseline is not None:
        other_read = read["baseline"]
        ratio = clock.ratio(other_read, own)
        figures |= {
            "baseline": baseline.info.id,
            "baseline_median_ms": other_read.median_ns / 1e6,
            "baseline_samples_ms": _milliseconds(other_read),
            "speedup": ratio.value,
            "speedup_low": ratio.low,
            "speedup_high": ratio.high,
        }
    found = record.Latency(
        items=size,
        median_ms=own.median_ns / 1e6,
        iqr_ms=own.iqr_ns / 1e6,
        p95_ms=own.p95_ns / 1e6,
        samples_ms=_milliseconds(own),
        cuda_ms=own.cuda_median_ms,
        **figures,
    )
    reasons = {"latency": own.note} if own.note else {}
    if baseline is None and any(cell.task in plugins.methods()[name].tasks for name in mine.info.baselines):
        reasons["speedup"] = "every baseline skips this rung"
    return Part({"latency": found}, reasons=reasons, flags=flags)


def _ready(mine: Worker, cell: Cell, names: Iterable[str]) -> Iterator[Template]:
    """Those of some methods that name the task, trained with seed 0; who skips it while preparing is passed over."""
    known = plugins.methods()
    for name in names:
        if cell.task in known[name].tasks:
            try:
                found = remote.ready(known[name], cell.task, cell.tier, str(mine.device))
            except Skip:
                continue
            yield found


def _beside(mine: Worker, cell: Cell) -> list[str]:
    """Further methods whose times at this cell's rung a claim of the method compares with its own."""
    named = []
    for claim in mine.info.claims:
        if (claim.task or mine.info.tasks[0]) == cell.task:
            named += [r.method for r in parse(claim.check).references() if r.metric in TIMES]
    return list(dict.fromkeys(named))


def _milliseconds(read: clock.Latency) -> list[float]:
    return [round(ns / 1e6, 6) for ns in read.samples_ns]


def memory(mine: Worker, judge: Judge, cell: Cell, answers: Answers) -> Part:
    """The peak of one call. Where items run one after the other it is that of a few, and the tracker is slow."""
    batch = answers.batch
    few = cell.tier == "smoke" or isinstance(next(iter(batch.values())), list)
    peak = mine.weighed(cut(batch, 0, judge.task.probe) if few else batch, cell.rung, cell.seed)
    if peak.bytes is None:
        return Part(reasons={"memory": peak.reason or "not read"})
    mib = 2**20
    found = record.Memory(peak_mib=peak.bytes / mib, how=str(peak.method), state_mib=mine.loaded_bytes / mib)
    return Part({"memory": found})


def energy(mine: Worker, judge: Judge, cell: Cell, answers: Answers) -> Part:
    """Joules of one call."""
    if cell.tier == "smoke":
        return Part(reasons={"energy": "not read at tier smoke"})
    read = joules.measure(partial(mine.run, answers.batch, cell.rung, cell.seed), mine.device)
    if read.joules is None or read.window_s is None:
        return Part(reasons={"energy": read.reason or "not read"})
    found = record.Energy(
        joules=read.joules, idle_watts=read.idle_watts, window_s=read.window_s, sensor=str(read.method)
    )
    return Part({"energy": found})


def timeless(mine: Worker, cell: Cell, timing: bool) -> str:
    """Why neither time nor memory nor energy is read of a cell; "": they are."""
    if cell.seed:
        return "read at seed 0; other seeds repeat the quality"
    cores = machine.usable_cores()
    if mine.ranks > cores and mine.device.type == "cpu":
        return f"{mine.ranks} processes on {cores} core: their times would say nothing"
    return "" if timing else record.UNTIMED
