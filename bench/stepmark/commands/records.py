"""`stepmark show`, `compare`, `verify`: what records say, and whether they can be repeated."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepmark import plugins
from stepmark.commands.options import SMOKE, choice_of, methods_of, results_of, tier_of
from stepmark.names import meant

if TYPE_CHECKING:
    from stepmark.record import Record
    from stepmark.task import Task


def show(arguments: argparse.Namespace) -> int:
    """The leaderboard as a table.

    Raises:
        ValueError: records there are, but none of what was asked for.
    """
    from stepmark import admission
    from stepmark.leaderboard import tables

    arguments.tier = tier_of(arguments)
    results = results_of(arguments, arguments.tier)
    taken, others = admission.read(results)
    found = [r for r in (*taken, *(each.record for each in others)) if r.tier == arguments.tier]
    tasks = admission.from_folders(found) | plugins.tasks()
    metrics = tuple(getattr(arguments, "metric", ()))
    _known("method", arguments.method, {*plugins.methods(), *(r.method for r in found)})
    _known("task", arguments.task, {*tasks, *(r.task for r in found)})
    _known("track", arguments.track, plugins.tracks())
    wanted: dict[str, Collection[Any]] = {
        "method": methods_of(arguments), "track": arguments.track, "task": arguments.task, "rung": arguments.rung,
        "seed": arguments.seed,
    }  # fmt: skip
    for name, values in wanted.items():
        if values and found:
            there = {getattr(r, name) for r in found}
            found = [r for r in found if getattr(r, name) in values]
            if not found:
                raise ValueError(f"no records of {name} {_listed(values)}; there are those of {_listed(there)}")
    _known_metrics(metrics, {r.task for r in found} or arguments.task, tasks)
    seeds = len(set(arguments.seed)) or None
    print(tables.show(found, metrics, seeds) if found else f"no records below {results}; write some with: stepmark run")
    _say_smoke(arguments.tier)
    return 0


def _listed(values: Collection[Any]) -> str:
    """Values in order, the first dozen of them."""
    names = [str(value) for value in sorted(values)]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _known(kind: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raise `ValueError` with what may have been meant, if a name is neither of this checkout nor recorded."""
    for name in names:
        if name not in known:
            raise ValueError(f"no {kind} {name!r}; {meant(name, sorted(known)) or f'known: {_listed(known)}'}")


def _known_metrics(names: Sequence[str], asked: Collection[str], tasks: Mapping[str, tuple[str, Task]]) -> None:
    """Raise `ValueError` with the metrics of the tasks that are asked for (none: all), if none of them has a name."""
    chosen = [tasks[task][1] for task in asked if task in tasks] or [task for _, task in tasks.values()]
    known = list(dict.fromkeys(name for task in chosen for name in task.metrics))
    one = len(chosen) == 1
    where, whose = (chosen[0].id, "its") if one else (f"any of {len(chosen)} tasks", "their")
    for name in names:
        if name not in known:
            guess = f" {near}" if (near := meant(name, known)) else ""
            have = ", ".join(known) if one else f"{_listed(known)} (stepmark list tasks)"
            raise ValueError(f"no metric {name!r} on {where};{guess} {whose} metrics: {have}")


def compare(arguments: argparse.Namespace) -> int:
    """Two methods by paired tests."""
    from stepmark import admission
    from stepmark.leaderboard import tables

    results = results_of(arguments, arguments.tier)
    taken, others = admission.read(results)
    both = (arguments.a, arguments.b)
    _known("method", both, {*plugins.methods(), *(r.method for r in taken), *(each.record.method for each in others)})
    _known("track", [arguments.track] if arguments.track else [], plugins.tracks())
    found = [r for r in (*taken, *(each.record for each in others)) if r.tier == arguments.tier]
    if arguments.metric is not None:
        of = [{r.task for r in found if r.method == each and arguments.track in {None, r.track}} for each in both]
        _known_metrics([arguments.metric], of[0] & of[1], admission.from_folders(found) | plugins.tasks())
    print(tables.compare(found, *both, arguments.track, arguments.metric))
    aside = [each for each in others if each.record.tier == arguments.tier and each.record.method in both]
    print("".join(f"\n{text}\n" for text in tables.left_out(aside)), end="")
    _say_smoke(arguments.tier)
    return 0


def _say_smoke(tier: str) -> None:
    if tier == "smoke":
        print(f"\ntier smoke: {SMOKE}. --tier embedded measures (of a checkpoint --tier hub).")


def verify(arguments: argparse.Namespace) -> int:
    """Recorded cells again: 0 when all agree, else 1."""
    choice = choice_of(arguments)
    if choice is None:
        return _verified(arguments)
    from stepmark import hub

    with hub.using(choice):
        return _verified(arguments)


def _verified(arguments: argparse.Namespace) -> int:
    asked = [arguments.record, arguments.sample, arguments.slice]
    if sum(each is not None for each in asked) != 1:
        raise ValueError("give a record file, FILE:LINE, --sample N, or --slice K/N")
    from stepmark import admission, record
    from stepmark.leaderboard.rows import record_id
    from stepmark.verify import check, draw, evidence, is_current, portion

    if arguments.record is not None:
        root, records = _of_file(arguments.record)
        cells = [[r] for r in records]
    else:
        root = results_of(arguments, arguments.tier)
        taken, others = admission.read(root)
        records = [r for r in (*taken, *(each.record for each in others)) if r.tier == arguments.tier]
        if arguments.sample is not None:
            cells = [[r] for r in draw(records, arguments.sample, arguments.seed_of_sample)]
        else:
            part, _, parts = arguments.slice.partition("/")
            if not (part.isdecimal() and parts.isdecimal()):
                raise ValueError(f"--slice {arguments.slice}: give K/N, such as 3/7")
            every = portion(records, int(part), int(parts), (arguments.device or "cpu").partition(":")[0])
            current = [[r for r in cell if is_current(r)] for cell in every]
            if old := sum(map(len, every)) - sum(map(len, current)):
                print(f"{old} records are older than their sources: run their cells again to have new ones", flush=True)
            cells = [cell for cell in current if cell]
        if not records or (arguments.sample is not None and not cells):
            raise ValueError(f"no record of tier {arguments.tier} below {root} can be run again here")
    if not arguments.keep and (arguments.into or arguments.no_timing):
        raise ValueError("--into and --no-timing are for --keep")
    verdicts: Counter[str] = Counter()
    timing = arguments.keep and not arguments.no_timing
    for cell in cells:
        found = check(cell, arguments.device, timing)
        for each in found:
            r = each.record
            verdicts[each.verdict] += 1
            print(
                f"{each.verdict}: {r.method} on {r.task}, rung {r.rung}, seed {r.seed}, record {record_id(r)} of {r.machine}"
            )
            lines = [
                *(f"  - {text}" for text in each.differs),
                *(f"    {text}" for text in (*each.agrees, *each.notes)),
            ]
            print("\n".join(map(_printable, lines)), flush=True)
        again = found[0].again
        if again is found[0].record:  # which is not of this suite, so that nothing was run
            continue
        if arguments.keep and again.status in {"ok", "flagged"}:
            record.append(record.path_of(arguments.into or root, again), again)
            shows = sorted({evidence(each.record, again) for each in found if each.verdict == "agrees"} - {""})
            here = f"    kept as a record of {again.machine}"
            earned = (
                f"the figures are reproduced, by {', '.join(shows)}"
                if shows
                else ("which adds no evidence: another machine or another clean commit that agrees would")
            )
            print(f"{here}: {earned}", flush=True)
        elif arguments.keep:
            print(_printable(f"    not kept: {again.status}, {again.message}"))
    said = f"{verdicts['agrees']} of {verdicts.total()} records agree"
    if verdicts["changed"]:
        said += f"; of {verdicts['changed']} the sources have changed since, so that nothing is said of them"
    print(said)
    return 1 if verdicts["differs"] or verdicts["changed"] else 0


def _of_file(asked: str) -> tuple[Path, list[Record]]:
    """FILE or FILE:LINE: the results folder, and the records that are meant.

    Raises:
        FileNotFoundError, ValueError: there is no such file or line. RecordError: it cannot be read, or lies elsewhere
            than its records say.
    """
    from stepmark import record

    name, colon, line = asked.rpartition(":")
    path, number = (Path(name), int(line)) if colon and line.isdigit() else (Path(asked), None)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; records lie in leaderboard/results/<version>/<machine>/<track>/")
    records = list(record.read(path))
    whole = path.absolute()
    for each in records:
        record.check_place(whole.parents[3], whole, each)
    if number is not None:
        if not 1 <= number <= len(records):
            raise ValueError(f"{path} has {len(records)} records; give a line between 1 and {len(records)}")
        records = [records[number - 1]]
    return whole.parents[3], records


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
