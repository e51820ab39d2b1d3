"""All records below a results folder, read once and summed up method by method.

A hundred thousand records with their resamples and raw timings are gigabytes as objects. Whatever the site says needs
all records of a method at a time (trust, what moved between versions, downloads), or the figures of all methods of the
newest version (groups, comparisons, verdicts). So each method's files are read, written into the downloads, and summed
up as rows; then the raw numbers go, but for the resamples of the newest version.
"""

from __future__ import annotations

import multiprocessing
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from stepmark.leaderboard import downloads
from stepmark.leaderboard.groups import assign_groups
from stepmark.leaderboard.rows import Row, homes, line_id, order, rows_of, settle
from stepmark.leaderboard.trust import Dispute, Intervals, Standing, standing

from stepmark import plugins, stats
from stepmark import record as record_files
from stepmark.admission import LeftOut, from_folders, is_version, left_out, sorted_out
from stepmark.meter.machine import usable_cores
from stepmark.record import Quality, Record, version_key
from stepmark.task import Task

DEVICE = re.compile(rb'"device": ?"(\w+)"')
APART = 50_000_000  # bytes of records from which on processes are worth their start


@dataclass
class Ledger:
    """What the pages are made from. Records are without resamples, those of older versions without any raw number.

    `rows` are of the newest version and in groups; `brought` are of that version too, on checkpoints that somebody brought:
    each stands for itself, and no claim is judged by it. `versions` holds those of every version, oldest first, but for tier
    smoke; `standings` are by (method, task); `files` counts the records in each part of the downloads; `left_out` are those
    that the board does not take in.
    """

    records: list[Record] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    brought: list[Row] = field(default_factory=list)
    versions: dict[str, list[Row]] = field(default_factory=dict)
    standings: dict[tuple[str, str], Standing] = field(default_factory=dict)
    files: dict[tuple[str, str], int] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)


class Asked(NamedTuple):
    """What is wanted of every method's records: the newest suite version, the machines whose rows are completed
    (`rows.homes`), a tier (None: all but smoke), accepted objections, and the folder for the parts of the downloads
    (None: nowhere).
    """

    newest: tuple[int, ...]
    home: Mapping[str, str]
    tier: str | None
    objections: Mapping[str, Dispute]
    folder: Path | None


def read(
    results: Path,
    tier: str | None = None,
    objections: Mapping[str, Dispute] | None = None,
    folder: Path | None = None,
) -> Ledger:
    """Everything below a results folder, in as many processes as there are cores where there is much to read.

    Raises:
        RecordError: a record cannot be read, or lies in a folder that its own fields do not name.
    """
    units: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for path in record_files.files(results):
        units[path.relative_to(results).with_suffix("").parts[2:]].append(path)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    newest = _newest(chain(*units.values()), results, tier)
    asked = Asked(newest, _homes(chain(*units.values()), results, newest), tier, objections or {}, folder)
    sizes = {key: sum(path.stat().st_size for path in paths) for key, paths in units.items()}
    # The largest first, so that no process is left alone with it at the end.
    work = [units[key] for key in sorted(units, key=lambda key: -sizes[key])]
    act = partial(_from_files, results, asked)
    if cores() > 1 and sum(sizes.values()) > APART:
        with multiprocessing.get_context("fork").Pool(min(cores(), len(work))) as pool:
            return _merge(list(pool.imap_unordered(act, work)))
    return _merge([act(paths) for paths in work])


def of(
    records: Iterable[Record],
    objections: Mapping[str, Dispute] | None = None,
    tier: str | None = None,
) -> Ledger:
    """The same of records in memory."""
    units: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in records:
        units[r.track, r.method].append(r)
    everything = [r for mine in units.values() for r in mine if _wanted(r, tier)]
    found = sorted_out(everything, _known(everything))[0]
    newest = max((version_key(r.suite) for r in found), default=())
    home = homes((r.device, r.machine) for r in found if version_key(r.suite) == newest)
    asked = Asked(newest, home, tier, objections or {}, None)
    return _merge([_sum_up(key, mine, asked) for key, mine in units.items()])


def cores() -> int:
    """How many processes may run at once; one where a process cannot be split in two."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return 1
    return usable_cores()


@contextmanager
def beside(work: Callable[[], None], apart: bool) -> Iterator[None]:
    """Do `work` while the body runs, in a process that sees what this one has; or, if not `apart`, before it.

    Raises:
        ValueError: the other process failed; the message is its own.
    """
    if not apart:
        work()
        yield
        return
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(work, there))
    process.start()
    there.close()
    try:
        yield
        said = here.recv() if here.poll(None) else ""
    except EOFError:
        said = "the process ended early"
    finally:
        process.join()
    if said:
        raise ValueError(said)


def _report(work: Callable[[], None], pipe: Connection) -> None:
    try:
        work()
        pipe.send("")
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


# one method -------------------------------------------------------------------------------------


@dataclass
class _Part:
    """What is left of the records of one method."""

    key: tuple[str, str]
    records: list[Record]
    rows: list[Row]
    brought: list[Row]
    versions: dict[str, list[Row]]
    standings: dict[tuple[str, str], Standing]
    count: int
    left_out: list[LeftOut]


def _wanted(r: Record, tier: str | None) -> bool:
    return r.tier == tier if tier else r.tier != "smoke"


def _known(records: Iterable[Record]) -> dict[str, tuple[str, Task]]:
    """The tasks of this checkout, and those that records of checkpoint folders speak of."""
    return from_folders(records) | plugins.tasks()


def _newest(paths: Iterable[Path], results: Path, tier: str | None) -> tuple[int, ...]:
    """The newest suite version that has a record of the tier which the board takes in."""
    suites: dict[tuple[int, ...], list[Path]] = defaultdict(list)
    for path in paths:
        suites[version_key(path.relative_to(results).parts[0])].append(path)
    known, methods = _known(()), plugins.methods()
    for key in sorted(suites, reverse=True):
        found = (r for path in suites[key] for r in record_files.read(path) if _wanted(r, tier))
        if any(not left_out(r, known, methods) for r in found):
            return key
    return ()


def _homes(paths: Iterable[Path], results: Path, newest: tuple[int, ...]) -> dict[str, str]:
    """`rows.homes` of the files of the newest version, of which only the devices are looked at."""
    pairs: list[tuple[str, str]] = []
    for path in paths:
        suite, machine = path.relative_to(results).parts[:2]
        if version_key(suite) == newest:
            pairs += [(device.decode(), machine) for device in DEVICE.findall(path.read_bytes())]
    return homes(pairs)


def _from_files(results: Path, asked: Asked, paths: Sequence[Path]) -> _Part:
    everything: list[Record] = []
    for path in paths:
        for r in record_files.read(path):
            record_files.check_place(results, path, r)
            everything.append(r)
    if not everything:  # a file without a whole line
        return _Part((*paths[0].relative_to(results).parts, "", "", "")[2:4], [], [], [], {}, {}, 0, [])
    return _sum_up((everything[0].track, everything[0].method), everything, asked)


def _sum_up(key: tuple[str, str], everything: Sequence[Record], asked: Asked) -> _Part:
    """The rows, trust and downloads of one method from all its records, those included that a later one replaces."""
    known, methods = plugins.tasks(), plugins.methods()
    once = {r.model_dump_json(): r for r in everything}  # a merge of two branches may leave a line twice
    texts, everything = list(once), list(once.values())
    within = intervals(everything)
    names = {id(r): line_id(text) for r, text in zip(everything, texts, strict=True)}
    judged = _known(everything)
    reasons = [left_out(r, judged, methods) for r in everything]
    if asked.folder is not None:
        downloads.write_part(asked.folder, key, everything, texts, list(names.values()), within, reasons)
    sound = [r for r, why in zip(everything, reasons, strict=True) if not why]
    latest = record_files.latest(sound)
    current = [r for r in latest if _wanted(r, asked.tier) and version_key(r.suite) == asked.newest]
    rows = rows_of((r for r in current if not r.checkpoint), known, asked.home)
    brought = rows_of((r for r in current if r.checkpoint), judged)
    shown = {r.suite for r in current}
    versions: dict[str, list[Row]] = {}
    for suite in {r.suite for r in everything if r.tier != "smoke" and is_version(r.suite)}:
        same = asked.tier is None and shown == {suite}
        if same:
            versions[suite] = rows
        elif suite in shown:
            same_suite = (r for r in latest if r.suite == suite and r.tier != "smoke")
            versions[suite] = rows_of(same_suite, known, asked.home)
        else:  # what methods and ladders were then is not known now
            past = record_files.latest(r for r in everything if r.suite == suite and r.tier != "smoke")
            versions[suite] = rows_of(past, known)
    every = list({id(row): row for mine in (rows, brought, *versions.values()) for row in mine}.values())
    settle(every)
    standings = {}
    by_record = {id(r): found for r, found in zip(everything, within, strict=True)}
    for task in {row.task for row in rows}:
        mine = [r for r in sound if r.task == task]
        standings[key[1], task] = standing(key[1], task, mine, asked.objections, lambda r: by_record[id(r)])
    keep = _Thin()
    thin = {id(r): keep(r, True) for r in current}
    newest = {id(row) for row in (*rows, *brought)}
    for row in every:
        row.id = names[id(row.first)]
        _let_go(row, thin if id(row) in newest else None, keep)
    aside = [
        LeftOut(keep(r, False), why)
        for r, why in zip(everything, reasons, strict=True)
        if why and _wanted(r, asked.tier)
    ]
    return _Part(key, [thin[id(r)] for r in current], rows, brought, versions, standings, len(everything), aside)


def intervals(records: Sequence[Record]) -> list[Intervals]:
    """95 % intervals of every record by metric, as `percentile_interval` gives them, many at a time."""
    alike: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for i, r in enumerate(records):
        for name, quality in r.quality.items():
            if quality.resamples:
                alike[len(quality.resamples)].append((i, name))
    found: list[dict[str, tuple[float, float]]] = [{} for _ in records]
    for keys in alike.values():
        for start in range(0, len(keys), 1024):
            some = keys[start : start + 1024]
            low, high = stats.intervals(np.array([records[i].quality[name].resamples for i, name in some]))
            for (i, name), a, b in zip(some, low.tolist(), high.tolist(), strict=True):
                found[i][name] = (a, b)
    return list(found)


class _Thin:
    """Makes copies of records without the long lists, which share what is alike."""

    FIELDS = set(Record.model_fields)

    def __init__(self) -> None:
        self.shared: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}

    def __call__(self, r: Record, figures: bool) -> Record:
        """`figures`: keep all but resamples; else only what tells where a record comes from."""
        values = r.__dict__ | {
            name: self.shared.setdefault(tuple(getattr(r, name).items()), getattr(r, name))
            for name in ("digests", "environment")
        }
        if figures:
            values["quality"] = {
                name: Quality.model_construct(value=quality.value, resamples=[]) for name, quality in r.quality.items()
            }
        else:
            empty: dict[str, Any] = {"latency": None, "memory": None, "energy": None, "offline": None, "flags": []}
            values |= empty | {name: {} for name in ("quality", "counts", "handles", "reported", "reasons")}
        # The set of the fields is two kilobytes large, and the same in all.
        return Record.model_construct(self.FIELDS, **values)


def _let_go(row: Row, thin: Mapping[int, Record] | None, keep: _Thin) -> None:
    """Drop the raw numbers of a row whose estimates have been computed."""
    if thin is not None:
        _ = row.centred  # made from what goes now
        row.records = {seed: thin[id(r)] for seed, r in row.records.items()}
    else:
        for name in ("status", "nfe", "nfe_equivalent"):
            getattr(row, name)
        row.records = {row.first.seed: keep(row.first, False)}
        row.centred = {}
    for name in ("measured", "own", "first", "timed"):  # found again among the thin ones
        row.__dict__.pop(name, None)


def _merge(parts: Sequence[_Part]) -> Ledger:
    found = Ledger()
    for part in sorted(parts, key=lambda part: part.key):
        found.records += part.records
        found.rows += part.rows
        found.brought += part.brought
        found.standings |= part.standings
        found.files[part.key] = part.count
        found.left_out += part.left_out
        for suite, rows in part.versions.items():
            found.versions.setdefault(suite, []).extend(rows)
    suites = sorted(found.versions, key=lambda suite: (version_key(suite), suite))
    found.versions = {suite: sorted(found.versions[suite], key=order) for suite in suites}
    found.rows.sort(key=order)
    found.brought.sort(key=order)
    assign_groups(found.rows, plugins.tasks())
    return found
