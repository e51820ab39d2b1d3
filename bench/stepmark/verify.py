"""`stepmark verify`: run recorded cells again and say what agrees.

On the machine that wrote a record, counts and outputs on the CPU must be equal; elsewhere quality must lie within the
record's own bootstrap interval, and counts must still be equal. Timings are shown, never judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from stepmark import plugins
from stepmark.record import Record
from stepmark.stats import percentile_interval


@dataclass
class Agreement:
    """What agrees between a record and its repetition, line by line; `differs` is empty when it is reproduced."""

    record: Record
    again: Record
    agrees: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# Counted in floating point or over the method's own adaptive path, so compared within a relative tolerance elsewhere.
SAME_MACHINE, OTHER_MACHINE = 0.0, 0.02


def compare(record: Record, again: Record, intervals: Mapping[str, tuple[float, float]] | None = None) -> Agreement:
    """Compare a record with its repetition, without running anything.

    `intervals`: the 95 % intervals of the record's resamples by metric, where they are known already.
    """
    found = Agreement(record, again)
    changed = sorted(n for n in record.digests if again.digests.get(n) != record.digests[n])
    if changed:
        found.notes.append(f"changed since the record was written: {', '.join(changed)}")
    if record.checkpoint != again.checkpoint:
        found.notes.append("the record is of another checkpoint")
    same = record.machine == again.machine and record.environment == again.environment
    on_cpu = record.device == again.device == "cpu"
    exact = same and on_cpu
    if record.status != again.status:
        found.differs.append(
            f"status: {record.status} in the record, {again.status} now ({again.message or 'no message'})"
        )
    tolerance = SAME_MACHINE if exact else OTHER_MACHINE
    counts = [n for n in record.counts if n in again.counts]
    wrong = [n for n in counts if abs(record.counts[n] - again.counts[n]) > tolerance * abs(record.counts[n]) + 1e-9]
    for name in sorted(set(record.counts) - set(again.counts)):
        found.differs.append(f"{name}: {record.counts[name]:g} in the record, not counted now")
    for name in wrong:
        found.differs.append(f"{name}: {record.counts[name]:g} in the record, {again.counts[name]:g} now")
    if counts and not wrong:
        found.agrees.append(f"{len(counts)} counts")
    for name, quality in record.quality.items():
        if name not in again.quality:
            found.differs.append(f"{name}: in the record, not measured now")
            continue
        now = again.quality[name].value
        if exact:
            agrees = now == quality.value
            wanted = f"{quality.value:g} exactly"
        else:
            if intervals is not None:
                low, high = intervals.get(name, (quality.value, quality.value))
            else:
                both = (quality.value, quality.value)
                low, high = percentile_interval(quality.resamples) if quality.resamples else both
            margin = max(high - low, abs(quality.value) * 0.01, 1e-9)
            agrees = low - margin <= now <= high + margin
            wanted = f"{quality.value:g} within [{low - margin:g}, {high + margin:g}]"
        (found.agrees if agrees else found.differs).append(name if agrees else f"{name}: wanted {wanted}, got {now:g}")
    if exact and record.outputs is not None:
        equal = record.outputs == again.outputs
        (found.agrees if equal else found.differs).append(
            "outputs, bit for bit" if equal else "outputs differ in some bit"
        )
    if record.latency and again.latency:
        found.notes.append(f"latency {record.latency.median_ms:.3f} ms then, {again.latency.median_ms:.3f} ms now")
    return found


def verify(record: Record, device: str = "cpu", timing: bool = False) -> Agreement:
    """Run the record's cell again here and compare."""
    from stepmark.cell import Cell
    from stepmark.run import measure  # imports torch, which those who only compare need not wait for

    cell = Cell(record.method, record.task, record.rung, record.seed, record.tier)
    return compare(record, measure(cell, device, timing, show_progress=False))


def draw(records: Sequence[Record], n: int, seed: int) -> list[Record]:
    """n of the records that can be run again here, the same for the same seed: one of a method before two of any.

    The order of the records does not matter, so that another machine draws the same.
    """
    known, tasks = plugins.methods(), plugins.tasks()
    by_method: dict[str, list[Record]] = {}
    for r in sorted(records, key=lambda r: (r.suite, r.machine, *map(str, r.key), r.created)):
        if r.status in {"ok", "flagged"} and r.method in known and r.task in tasks:
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
