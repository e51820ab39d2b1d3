"""Which records the board takes in: those of the suite's own methods, tasks and ladders that are whole.

Anybody may send a record, and what can be read (`record`) may still be of another suite, lack half of its figures, or hold
figures that cannot come from one measurement. Such records stand in the downloads and are named where records are shown;
they never become rows, so that nothing is ranked, grouped, compared or judged by them. Whether the figures are true only
`verify` can tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

import stepmark
from stepmark import plugins
from stepmark import record as records
from stepmark.meter.machine import describe
from stepmark.plugins import MethodInfo
from stepmark.record import Latency, Quality, Record, version_key
from stepmark.task import SCORED, Task, scored_as

RESAMPLES = 100  # of the items, in every metric of a record
LARGEST_RUNG = 10**6  # on a checkpoint of somebody's own, whose ladder is not known
BEYOND = 2.0  # how many ranges of its resamples a value may lie outside of them; biased metrics lie outside a little
DIGITS = 1e-5  # of resamples that are all alike six digits are written, and sums are of floating point
SHELL = re.compile(r"[^\w ./:=+,@%-]")  # what a command on a page must not hold, for people paste it

Known = Mapping[str, tuple[str, Task]]


class LeftOut(NamedTuple):
    """A record that the board does not take in, and why, in a line."""

    record: Record
    why: str


def left_out(r: Record, known: Known, methods: Mapping[str, MethodInfo]) -> str:
    """Why a record takes no part, in a line; "": it does. `known`: tasks by id, with their tracks."""
    why = next(_foreign(r, known, methods), "")
    if why:
        return f"not of this suite: {why}"
    if r.status in {"ok", "flagged"}:
        why = next(_unfit(r, known[r.task][1], methods[r.method]), "")
    return f"incomplete: {why}" if why else ""


def sorted_out(found: Iterable[Record], known: Known) -> tuple[list[Record], list[LeftOut]]:
    """The records that the board takes in, and the others."""
    kept, others = [], []
    methods = plugins.methods()
    for r in found:
        if why := left_out(r, known, methods):
            others.append(LeftOut(r, why))
        else:
            kept.append(r)
    return kept, others


def read(root: Path, known: Known | None = None) -> tuple[list[Record], list[LeftOut]]:
    """All records below a results folder: the newest of each cell that is taken in, and all that are not.

    Raises:
        RecordError: a record cannot be read, or lies in a folder that its own fields do not name.
    """
    everything = records.everything(root)
    kept, others = sorted_out(everything, from_folders(everything) | plugins.tasks() if known is None else known)
    return records.latest(kept), others


def from_folders(found: Iterable[Record]) -> dict[str, tuple[str, Task]]:
    """What is known of the tasks made from checkpoint folders when the folders are not at hand: metrics and unit."""
    made: dict[str, tuple[str, Task]] = {}
    for r in found:
        if r.checkpoint and r.track in SCORED and r.task.startswith("checkpoint/") and r.task not in made:
            task = Task(r.task, 1, "", "checkpoint", rungs=(), n=0, batch=0, seeds=1, **scored_as(r.track, r.task))
            made[r.task] = (r.track, task)
    return made


def is_version(suite: str) -> bool:
    """Whether there may be such a version of the suite: this one, or one before it."""
    now = stepmark.__version__
    return suite == now or (
        re.fullmatch(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){2}", suite) is not None
        and version_key(suite) < version_key(now)
    )


# of this suite ----------------------------------------------------------------------------------


def _foreign(r: Record, known: Known, methods: Mapping[str, MethodInfo]) -> Iterator[str]:
    if not is_version(r.suite):
        yield f"it is of suite {r.suite}, this is {stepmark.__version__}"
    info = methods.get(r.method)
    if info is None:
        yield f"there is no method {r.method}"
    elif info.track != r.track:
        yield f"{r.method} is of track {info.track}, not {r.track}"
    if r.task not in known:
        yield f"there is no task {r.task}"
        return
    track, task = known[r.task]
    own = bool(r.checkpoint)
    if track != r.track:
        yield f"{r.task} is of track {track}, not {r.track}"
    if own != r.task.startswith("checkpoint/") or r.tier not in {"smoke", "hub" if own else "embedded"}:
        yield f"{r.task} at tier {r.tier} with {'a' if own else 'no'} checkpoint"
    if own:
        if not 0 < r.rung <= LARGEST_RUNG:
            yield f"rung {r.rung} is no budget"
        if SHELL.search(r.command):
            yield "its command holds more than options"
    else:
        if info is not None and r.task not in info.tasks:
            yield f"{r.method} does not name {r.task}"
        if r.rung not in {*task.rungs, *task.ladder(r.tier)}:  # at tier smoke others may be asked for
            yield f"rung {r.rung} is not on the ladder of {r.task}"
        where = "" if r.device == "cpu" else f" --device {r.device}"
        what = f"--method {r.method} --task {r.task} --rung {r.rung} --seed {r.seed} --tier {r.tier}"
        if r.command != f"stepmark run {what}{where}":
            yield "its command is not the one that repeats it"
    seeds = info.seeds(task, r.tier) if info is not None else 1 if r.tier == "smoke" else task.seeds
    if r.seed >= seeds:
        yield f"seed {r.seed} is not one of the {seeds} of {r.method} on {r.task}"
    if not _of_its_machine(r):
        yield "its environment is of another machine"
    if r.status == "ok" and r.flags:
        yield "it is ok and has flags"


def _of_its_machine(r: Record) -> bool:
    """Whether the environment, as far as it says, is that of the machine whose id the record carries."""
    said = r.environment
    if said.get("machine", r.machine) != r.machine:
        return False
    if not {"cpu", "logical_cores", "ram_gib"} <= said.keys():
        return True
    if not (said["logical_cores"].isdecimal() and said["ram_gib"].isdecimal()):
        return False
    gpus = said["gpus"].split(", ") if "gpus" in said else []
    return describe(said["cpu"], int(said["logical_cores"][:9]), int(said["ram_gib"][:9]), gpus) == r.machine


# whole ------------------------------------------------------------------------------------------


def _unfit(r: Record, task: Task, info: MethodInfo) -> Iterator[str]:
    """What cannot have come from one measurement of the cell."""
    for name in sorted(task.metrics.keys() ^ r.quality.keys()):
        yield f"no metric {name}" if name in task.metrics else f"{name}, which {r.task} does not measure"
    for name, quality in r.quality.items():
        yield from (f"{name} {text}" for text in _resampled(quality))
    if r.outputs is None:
        yield "no digest of its outputs"
    if "nfe" not in r.counts:
        yield "no nfe"
    elif r.counts["nfe"] > r.rung * (1 + DIGITS):
        yield f"{r.counts['nfe']:g} evaluations at rung {r.rung}"
    yield from _counted(r, task)
    if r.latency is not None:
        yield from (f"its times {text}" for text in _timed(r.latency, info))


def _resampled(quality: Quality) -> Iterator[str]:
    if len(quality.resamples) != RESAMPLES:
        yield f"has {len(quality.resamples)} resamples, not {RESAMPLES}"
        return
    low, high = min(quality.resamples), max(quality.resamples)
    room = BEYOND * (high - low) + DIGITS * max(abs(low), abs(high), abs(quality.value))
    if not low - room <= quality.value <= high + room:
        yield f"is {quality.value:g} and its resamples lie between {low:g} and {high:g}"


def _counted(r: Record, task: Task) -> Iterator[str]:
    """Counts per item are those of the handles over the items."""
    if r.checkpoint:  # nobody knows how many items it had
        return
    items = task.items(r.tier)
    bounded = 0.0
    for handle, figures in r.handles.items():
        if handle in task.bounded or task.bounded == ("*",):
            bounded += figures.get("evaluations", 0.0)
        for name, value in figures.items():
            count = r.counts.get(f"{handle}_{name}")
            if name != "calls" and (count is None or abs(count * items - value) > DIGITS * max(value, 1.0)):
                yield f"{handle}_{name} is not what {handle} counted over {items} items"
    if abs(r.counts.get("nfe", 0.0) * items - bounded) > DIGITS * max(bounded, 1.0):
        yield f"nfe is not what its networks counted over {items} items"


def _timed(latency: Latency, info: MethodInfo) -> Iterator[str]:
    def fits(value: float | None, samples: list[float] | None) -> bool:
        return bool(samples) and value is not None and abs(value - median(samples or [])) <= DIGITS * abs(value)

    if not latency.items or not fits(latency.median_ms, latency.samples_ms):
        yield "have a median that is not theirs"
    for tokens, samples in (
        (latency.tokens, latency.samples_ms),
        (latency.baseline_tokens, latency.baseline_samples_ms or []),
    ):
        if tokens and len(tokens) != len(samples):
            yield "have tokens of other rounds"
    if latency.baseline is None:
        return
    if latency.baseline not in info.baselines:
        yield f"were taken beside {latency.baseline}, which is no baseline of {info.id}"
    if not fits(latency.baseline_median_ms, latency.baseline_samples_ms):
        yield "have a baseline's median that is not theirs"
    elif len(latency.baseline_samples_ms or ()) != len(latency.samples_ms):
        yield "were not taken in turns with the baseline's"
    elif latency.speedup is not None and latency.baseline_median_ms is not None:
        ratio = latency.baseline_median_ms / max(latency.median_ms, 1e-12)
        if abs(latency.speedup - ratio) > 1e-3 * ratio:
            yield "give another speed-up"
