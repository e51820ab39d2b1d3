"""The matrix of cells, and walking it so that nothing is lost: a killed suite resumes at the next cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stepmark import __version__, devices, engine, names, plugins, samples
from stepmark import record as records
from stepmark.cell import Cell, digests
from stepmark.meter import machine
from stepmark.places import may_change, writable, writable_cache


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
    lacking: bool = False  # leave out also what another machine has measured
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
            seeds = range(info.seeds(task, selection.tier))
            chosen = tuple(rung for rung in task.rungs if rung in selection.rungs)
            ladder = chosen if selection.rungs else task.ladder(selection.tier)
            found += [
                Cell(info.id, task_id, rung, seed, selection.tier)
                for seed in seeds
                if not selection.seeds or seed in selection.seeds
                for rung in ladder
            ]
    return found


def unmet(selection: Selection, found: Sequence[Cell]) -> list[str]:
    """What was named and has no cell among those `found`: a line each that says which other choice leaves it none."""
    tasks = plugins.tasks()
    pairs = [
        (info, task)
        for info in plugins.methods().values()
        for task in info.tasks
        if (not selection.methods or info.id in selection.methods)
        and (not selection.tracks or info.track in selection.tracks)
        and (not selection.tasks or task in selection.tasks)
    ]
    said: list[str] = []
    for name in dict.fromkeys(selection.methods):
        info, mine = plugins.methods()[name], [task for each, task in pairs if each.id == name]
        if selection.tracks and info.track not in selection.tracks:
            said.append(f"{name} is of track {info.track}, not of {', '.join(selection.tracks)}")
        elif not mine:
            said.append(f"{name} does not run on {', '.join(selection.tasks)}, but on {', '.join(info.tasks)}")
        elif found and not any(cell.method == name for cell in found):
            said.append(
                f"{name} has none of these rungs: {_listed({r for task in mine for r in tasks[task][1].rungs})}"
            )
    if not said:
        reached = {name for info, task in pairs for name in (info.track, task)}
        absent = [name for name in (*selection.tracks, *selection.tasks) if name not in reached]
        said += [f"no method of the selection runs on {name}" for name in dict.fromkeys(absent)]
    rungs = {rung for _, task in pairs for rung in tasks[task][1].rungs}
    seeds = {seed for info, task in pairs for seed in range(info.seeds(tasks[task][1], selection.tier))}
    for kind, asked, have in (("rung", selection.rungs, rungs), ("seed", selection.seeds, seeds)):
        off = [number for number in dict.fromkeys(asked) if number not in have]
        said += (
            [f"no {kind} {_listed(off)} at tier {selection.tier} here, but {_listed(have)}"] if pairs and off else []
        )
    return said


def _listed(numbers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _file(cell: Cell, results: Path, place: str) -> Path:
    track = plugins.methods()[cell.method].track
    return results / __version__ / place / track / f"{cell.method}.jsonl"


def pending(
    wanted: Sequence[Cell], results: Path, device: str = "cpu", timing: bool = False, place: str | None = None
) -> list[Cell]:
    """Cells without a record of the same digests on this kind of device of this machine, or of the one with the id
    `place`. Failed ones are tried again.

    With `timing` also those whose record was made without it.
    """
    have: dict[records.Key, records.Record] = {}
    place = place or machine.machine_id()
    for path in {_file(cell, results, place) for cell in wanted}:
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


def places(options: Options) -> set[str]:
    """The ids of machines under which the cells of a run may be filed: that of the device, of each GPU where several
    work, of every node of a cluster.

    Raises: as the engine that runs them.
    """
    if options.engine == "ray":
        return engine.ray_machines(options.device, options.address)
    one = devices.named(options.device)
    if options.workers > 1 and one != "cpu":
        return {machine.machine_id(f"{devices.kind_of(one)}:{index}") for index in range(options.workers)}
    return {machine.machine_id(one)}


def todo(wanted: Sequence[Cell], options: Options) -> list[Cell]:
    """Those cells that are still to be measured: whatever can be refused is refused here, before anything runs.

    Raises:
        ValueError: a device that is not there, more workers than it has, results or cache that cannot be written.
        ModuleNotFoundError: an engine that is not installed.
    """
    if options.engine == "local":
        engine.workers_of(options.device, options.workers)
    writable_cache()
    writable(options.results, "name a folder with --results")
    left = list(wanted)
    for place in sorted(places(options)):
        for path in {_file(cell, options.results, place) for cell in wanted}:
            may_change(path)
        if not options.again:
            left = pending(left, options.results, options.device, options.timing, place)
    if options.lacking and not options.again:
        for folder in sorted((options.results / __version__).glob("*/")):
            left = pending(left, options.results, options.device, options.timing, folder.name)
    return left


def walk(selection: Selection, options: Options) -> Iterator[records.Record]:
    """Run what is still to do, write each record as it arrives, and yield it.

    Raises:
        KeyError, PluginError: a wrong selection. DeviceBusy: somebody else is timing here. As `todo`.
    """
    wanted = cells(selection)
    left = todo(wanted, options)
    if len(left) < len(wanted):
        options.announce(f"{len(wanted) - len(left)} of {len(wanted)} cells are done already")
    yield from measure(left, options)


def measure(wanted: Sequence[Cell], options: Options) -> Iterator[records.Record]:
    """Run these cells, write each record as it arrives, and yield it."""
    if not wanted:
        return
    if options.engine == "ray":
        stream = engine.ray(wanted, options.device, options.timing, options.address)
    elif options.workers > 1:
        stream = engine.pool(wanted, options.device, options.timing, options.workers)
    else:
        stream = engine.local(wanted, options.device, options.timing)
    for record, shown in stream:
        records.append(records.path_of(options.results, record), record)
        if shown is not None:
            samples.keep(options.results, record, shown)
        yield record
