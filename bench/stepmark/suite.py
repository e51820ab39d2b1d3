"""The matrix of cells, and walking it so that nothing is lost: a killed suite resumes at the next cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stepmark import __version__, engine, names, plugins, samples
from stepmark import record as records
from stepmark.cell import Cell, digests
from stepmark.meter import machine


@dataclass(frozen=True)
class Selection:
    """Which cells to run; an empty tuple means all. `quick`: each method on one task of each kind (`most_shared`)."""

    tier: str = "embedded"
    methods: tuple[str, ...] = ()
    tracks: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    rungs: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    quick: bool = False


@dataclass
class Options:
    """How to run them."""

    results: Path
    device: str = "cpu"
    engine: str = "local"
    workers: int = 1  # of engine local: processes, each on a core or GPU of its own
    address: str | None = None
    timing: bool = True
    again: bool = False
    announce: Callable[[str], None] = field(default=print)


def check_selection(selection: Selection) -> None:
    """Raise `KeyError` with one line that says what was perhaps meant, if a name is not known."""
    known: dict[str, tuple[tuple[str, ...], Collection[str]]] = {
        "method": (selection.methods, plugins.methods()),
        "task": (selection.tasks, plugins.tasks()),
        "track": (selection.tracks, plugins.tracks()),
    }
    for kind, (asked, have) in known.items():
        for name in asked:
            if name not in have:
                raise KeyError(names.unknown(kind, name, have, f"stepmark list {kind}s"))


def most_shared(info: plugins.MethodInfo, tasks: Sequence[str]) -> list[str]:
    """Of each kind among these tasks of a method (kind/name) the one that most methods of its track name."""
    shared = Counter(t for other in plugins.methods().values() if other.track == info.track for t in other.tasks)
    kinds = dict.fromkeys(task.split("/")[0] for task in tasks)
    return [max((t for t in tasks if t.split("/")[0] == kind), key=lambda task: shared[task]) for kind in kinds]


def cells(selection: Selection) -> list[Cell]:
    """Every cell of the selection: methods by track, baselines (methods that no other is compared with) first.

    Raises:
        KeyError: a name that is not known. PluginError: a method names a task that is not there.
    """
    check_selection(selection)
    known = plugins.methods()
    order = sorted(known.values(), key=lambda m: (m.track, bool(m.baselines), m.id))
    found: list[Cell] = []
    for info in order:
        if (selection.methods and info.id not in selection.methods) or (
            selection.tracks and info.track not in selection.tracks
        ):
            continue
        for task_id in info.tasks:
            if task_id not in plugins.tasks():
                raise plugins.PluginError(
                    f"{info.path}: names task {task_id!r}, which is not there (stepmark list tasks)"
                )
        asked = [task_id for task_id in info.tasks if not selection.tasks or task_id in selection.tasks]
        for task_id in most_shared(info, asked) if selection.quick else asked:
            task = plugins.tasks()[task_id][1]
            seeds = range(1 if selection.tier == "smoke" else task.seeds)
            chosen = tuple(rung for rung in task.rungs if rung in selection.rungs)
            ladder = chosen if selection.rungs else task.ladder(selection.tier)
            found += [
                Cell(info.id, task_id, rung, seed, selection.tier)
                for seed in seeds
                if not selection.seeds or seed in selection.seeds
                for rung in ladder
            ]
    return found


def _file(cell: Cell, results: Path) -> Path:
    track = plugins.methods()[cell.method].track
    return results / __version__ / machine.machine_id() / track / f"{cell.method}.jsonl"


def pending(wanted: Sequence[Cell], results: Path, device: str = "cpu", timing: bool = False) -> list[Cell]:
    """Cells without a record of the same digests on this machine and device. Failed ones are tried again.

    With `timing` also those whose record was made without it.
    """
    have: dict[records.Key, records.Record] = {}
    for path in {_file(cell, results) for cell in wanted}:
        have |= records.keys(path)
    known = plugins.methods()
    current: dict[tuple[str, str], dict[str, str]] = {}
    left: list[Cell] = []
    for cell in wanted:
        pair, task = (cell.method, cell.task), plugins.tasks()[cell.task][1]
        if pair not in current:
            try:
                current[pair] = digests(known[cell.method], task)
            except plugins.PluginError:  # its run will say so
                current[pair] = {}
        found = have.get((*cell.key, device.partition(":")[0], task.checkpoint[: plugins.DIGITS]))
        if (
            found is None
            or found.digests != current[pair]
            or found.status == "failed"
            or (timing and found.reasons.get("latency") == records.UNTIMED)
        ):
            left.append(cell)
    return left


def walk(selection: Selection, options: Options) -> Iterator[records.Record]:
    """Run what is still to do, write each record as it arrives, and yield it.

    Raises:
        KeyError, PluginError: a wrong selection. DeviceBusy: somebody else is timing here.
    """
    wanted = cells(selection)
    todo = wanted if options.again else pending(wanted, options.results, options.device, options.timing)
    if len(todo) < len(wanted):
        options.announce(f"{len(wanted) - len(todo)} of {len(wanted)} cells are done already")
    if not todo:
        return
    if options.engine == "ray":
        stream = engine.ray(todo, options.device, options.timing, options.address)
    elif options.workers > 1:
        stream = engine.pool(todo, options.device, options.timing, options.workers)
    else:
        stream = engine.local(todo, options.device, options.timing)
    for record, shown in stream:
        records.append(records.path_of(options.results, record), record)
        if shown is not None:
            samples.keep(options.results, record, shown)
        yield record
