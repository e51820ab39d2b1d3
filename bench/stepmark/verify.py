"""`stepmark verify`: run recorded cells again, say what agrees, and keep what was measured.

On the machine and in the environment that wrote a record everything that the CPU computes must be the same to the bit:
counts, metrics, resamples, outputs. Elsewhere counts lie within 2 %, metrics within the record's own bootstrap interval
widened by its width, and the resamples must be of the same items: as wide, and moving together. Timings are shown, never
judged.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import numpy as np

import stepmark
from stepmark import plugins
from stepmark.admission import from_folders, left_out
from stepmark.record import Quality, Record
from stepmark.stats import percentile_interval

# Counted in floating point or over the method's own adaptive path, so compared within a relative tolerance elsewhere.
SAME_MACHINE, OTHER_MACHINE = 0.0, 0.02
NO_BITS = {"usable_cores", "cpu_governor", "cpu_max_mhz"}  # of an environment: what moves times and no figure
WIDER = 3.0  # how many times as wide the resamples of one run may be as those of another
TOGETHER = 0.3  # least correlation of two runs' resamples of the same items; of invented ones it is 0 +- 0.1


@dataclass
class Agreement:
    """What agrees between a record and its repetition, line by line; `differs` is empty when it is reproduced.

    `changed`: sources of the record that are not those of the repetition, which then says nothing about it.
    """

    record: Record
    again: Record
    agrees: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Literal["agrees", "differs", "changed"]:
        """*changed* where other sources ran than the record names: what differs then is no fault of the record."""
        return "changed" if self.changed else "differs" if self.differs else "agrees"


def compare(record: Record, again: Record, intervals: Mapping[str, tuple[float, float]] | None = None) -> Agreement:
    """Compare a record with its repetition, without running anything.

    `intervals`: the 95 % intervals of the record's resamples by metric, where they are known already.
    """
    found = Agreement(record, again)
    names = record.digests.keys() | again.digests.keys()
    found.changed = sorted(n for n in names if again.digests.get(n) != record.digests.get(n))
    if found.changed:
        found.notes.append(f"changed since the record was written: {', '.join(found.changed)}")
    if record.checkpoint != again.checkpoint:
        found.differs.append("the record is of another checkpoint")
    exact = _same_bits(record, again)
    if record.status != again.status:
        found.differs.append(
            f"status: {record.status} in the record, {again.status} now ({again.message or 'no message'})"
        )
    found.differs += [f"flagged now, not in the record: {text}" for text in again.flags if text not in record.flags]
    _compare_counts(found, exact)
    for name in sorted(again.quality.keys() - record.quality.keys()):
        found.differs.append(f"{name}: measured now, not in the record")
    for name, quality in record.quality.items():
        if name not in again.quality:
            found.differs.append(f"{name}: in the record, not measured now")
            continue
        interval = None if intervals is None else intervals.get(name)
        wrong = _exactly(quality, again.quality[name]) if exact else _nearly(found, name, interval)
        (found.differs if wrong else found.agrees).append(f"{name}: {wrong}" if wrong else name)
    if again.outputs is not None and record.outputs is None:
        found.differs.append("the record has no digest of its outputs")
    elif exact and again.outputs is not None:
        equal = record.outputs == again.outputs
        (found.agrees if equal else found.differs).append(
            "outputs, bit for bit" if equal else "outputs differ in some bit"
        )
    if record.latency and again.latency:
        found.notes.append(f"latency {record.latency.median_ms:.3f} ms then, {again.latency.median_ms:.3f} ms now")
    return found


def _same_bits(record: Record, again: Record) -> bool:
    """Whether both were computed where the same sources give the same bits."""
    here, there = ({k: v for k, v in r.environment.items() if k not in NO_BITS} for r in (record, again))
    return record.machine == again.machine and here == there and record.device == again.device == "cpu"


def _counted(record: Record, exact: bool) -> dict[str, float]:
    """All that was counted, by name; `exact`: also what only the same bits must give."""
    found = dict(record.counts)
    for handle, figures in record.handles.items():
        found |= {f"{handle} {name}": value for name, value in figures.items()}
    if exact:
        found |= {f"reported {name}": value for name, value in record.reported.items()}
        if record.offline is not None:
            found |= {f"offline {name}": value for name, value in record.offline.evaluations.items()}
            found["offline state_mib"] = record.offline.state_mib
            if record.offline.updates is not None:
                found["offline updates"] = record.offline.updates
    return found


def _compare_counts(found: Agreement, exact: bool) -> None:
    then, now = _counted(found.record, exact), _counted(found.again, exact)
    tolerance = SAME_MACHINE if exact else OTHER_MACHINE
    both = [n for n in then if n in now]
    wrong = [n for n in both if abs(then[n] - now[n]) > tolerance * abs(then[n]) + 1e-9]
    found.differs += [f"{name}: {then[name]:g} in the record, not counted now" for name in then if name not in now]
    if found.record.suite == found.again.suite:  # a later harness may count more
        found.differs += [f"{name}: {now[name]:g} now, not in the record" for name in now if name not in then]
    found.differs += [f"{name}: {then[name]:g} in the record, {now[name]:g} now" for name in wrong]
    if both and not wrong:
        found.agrees.append(f"{len(both)} counts")


def _exactly(then: Quality, now: Quality) -> str:
    """What is not the same to the bit; "": nothing."""
    if now.value != then.value:
        return f"wanted {then.value:g} exactly, got {now.value:g}"
    return "" if list(now.resamples) == list(then.resamples) else "its resamples are not those of these outputs"


def _nearly(found: Agreement, name: str, interval: tuple[float, float] | None) -> str:
    """What lies outside of what another machine may give; "": nothing."""
    then, now = found.record.quality[name], found.again.quality[name]
    if len(then.resamples) != len(now.resamples):
        return f"{len(then.resamples)} resamples in the record, {len(now.resamples)} now"
    if not then.resamples:
        low = high = then.value
    else:
        low, high = interval or percentile_interval(then.resamples)
    floor = max(abs(then.value) * 0.01, 1e-9)
    margin = max(high - low, floor)
    least, most = (
        min(low, then.value) - margin,
        max(high, then.value) + margin,
    )  # a biased metric lies beside its resamples
    if not least <= now.value <= most:
        return f"wanted {then.value:g} within [{least:g}, {most:g}], got {now.value:g}"
    if not then.resamples:
        return ""
    begin, end = percentile_interval(now.resamples)
    widths = sorted((high - low, end - begin))
    if widths[1] > WIDER * widths[0] + floor:
        return f"its resamples are {high - low:g} wide in the record, {end - begin:g} now"
    trained = any(r.offline is not None and r.offline.seed is not None for r in (found.record, found.again))
    if widths[0] > floor and found.record.device == found.again.device and not trained:
        together = float(np.corrcoef(then.resamples, now.resamples)[0, 1])
        if not together >= TOGETHER:
            return f"its resamples are not of these items: they move together by {together:.2f}"
    return ""


def verify(record: Record, device: str | None = None, timing: bool = False) -> Agreement:
    """Run the record's cell again here, on the kind of device that it names, and compare.

    Raises:
        ValueError: another kind of device was asked for.
    """
    return check([record], device, timing)[0]


def check(records: Sequence[Record], device: str | None = None, timing: bool = False) -> list[Agreement]:
    """Run the cell that some records are of once, and compare it with each. What is not of this suite is not run.

    Raises:
        ValueError: another kind of device was asked for.
    """
    from stepmark.cell import Cell
    from stepmark.run import measure  # imports torch, which those who only compare need not wait for

    first = records[0]
    device = device or first.device
    if device.partition(":")[0] != first.device:
        raise ValueError(f"the record is of device {first.device}: verify it with --device {first.device}")
    known, methods = from_folders(records) | plugins.tasks(), plugins.methods()
    reasons = [left_out(r, known, methods) for r in records]
    if all(why.startswith("not of this suite") for why in reasons):
        return [Agreement(r, r, differs=[why]) for r, why in zip(records, reasons, strict=True)]
    again = measure(
        Cell(first.method, first.task, first.rung, first.seed, first.tier), device, timing, show_progress=False
    )
    found = [compare(r, again) for r in records]
    for each, why in zip(found, reasons, strict=True):
        each.differs[:0] = [why] if why else []
        if not each.record.environment:
            each.differs.append("the record names no environment")
    return found


def evidence(record: Record, again: Record) -> str:
    """What a repetition that agrees shows beyond the record itself; "": nothing.

    A second machine or device, or another commit; one that was changed says nothing about which.
    """
    if (record.machine, record.device) != (again.machine, again.device):
        return f"machine {again.machine}" + ("" if again.device == "cpu" else f", {again.device}")
    commits = [(r.commit or "").partition("-")[0] for r in (record, again)]
    clean = again.commit is not None and not again.commit.endswith("-dirty")
    return f"commit {again.commit}" if clean and commits[0] and not _alike(*commits) else ""


def _alike(a: str, b: str) -> bool:
    """Whether two names of commits may be one, cut at another length."""
    return a.startswith(b) or b.startswith(a)


def is_current(record: Record) -> bool:
    """Whether the sources of a record are those of this checkout, so that running it again can say something of it."""
    from stepmark.cell import digests

    info, task = plugins.methods()[record.method], plugins.tasks()[record.task][1]
    return record.digests == digests(info, task)


# which records ----------------------------------------------------------------------------------


def _runnable(records: Sequence[Record]) -> list[Record]:
    """Those that can be run again here, in an order that does not hang on theirs: another machine has the same."""
    known, tasks = plugins.methods(), plugins.tasks()
    ordered = sorted(records, key=lambda r: (r.suite, r.machine, *map(str, r.key), r.created))
    return [r for r in ordered if r.status in {"ok", "flagged"} and r.method in known and r.task in tasks]


def draw(records: Sequence[Record], n: int, seed: int) -> list[Record]:
    """n of the records that can be run again here, the same for the same seed: one of a method before two of any."""
    by_method: dict[str, list[Record]] = {}
    for r in _runnable(records):
        by_method.setdefault(r.method, []).append(r)
    random = Random(f"sample {seed}")
    for mine in by_method.values():
        random.shuffle(mine)
    chosen: list[Record] = []
    while len(chosen) < n and any(by_method.values()):
        order = sorted(name for name, mine in by_method.items() if mine)
        random.shuffle(order)
        chosen += [by_method[name].pop() for name in order]
    return chosen[: max(n, 0)]


def portion(records: Sequence[Record], part: int, parts: int, device: str = "cpu") -> list[list[Record]]:
    """The records of this suite version in one of so many parts, cell by cell; all parts together hold them all.

    A method's cells on a task fall into one part, so that it is prepared once, and into the same whatever else is
    recorded.

    Raises:
        ValueError: there is no such part.
    """
    if not 1 <= part <= parts:
        raise ValueError(f"part {part} of {parts}: give one between 1 and {max(parts, 1)}")
    cells: dict[tuple[object, ...], list[Record]] = defaultdict(list)
    for r in _runnable(records):
        number = int(hashlib.sha256(f"{r.method} {r.task}".encode()).hexdigest(), 16)
        if number % parts == part - 1 and r.suite == stepmark.__version__ and r.device == device:
            cells[r.method, r.task, r.seed, r.rung, r.tier, r.checkpoint].append(r)
    return [
        cells[key] for key in sorted(cells, key=lambda key: [f"{x:09d}" if isinstance(x, int) else str(x) for x in key])
    ]
