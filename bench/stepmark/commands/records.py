"""`stepmark show`, `compare`, `verify`: what records say, and whether they can be repeated."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from stepmark import plugins
from stepmark.commands.options import choice_of, methods_of, tier_of
from stepmark.commands.table import columns
from stepmark.places import results_folder


def show(arguments: argparse.Namespace) -> int:
    """The leaderboard as a table."""
    from stepmark import admission
    from stepmark.leaderboard import tables

    arguments.tier = tier_of(arguments)
    results = arguments.results or results_folder(arguments.tier)
    taken, others = admission.read(results)
    found = [r for r in (*taken, *(each.record for each in others)) if r.tier == arguments.tier]
    tasks = plugins.tasks() | admission.from_folders(found)
    metrics = tuple(getattr(arguments, "metric", ()))
    _known("method", arguments.method, {*plugins.methods(), *(r.method for r in found)})
    _known("task", arguments.task, {*tasks, *(r.task for r in found)})
    _known("track", arguments.track, plugins.tracks())
    _known("metric", metrics, {name for _, task in tasks.values() for name in task.metrics})
    wanted: dict[str, Collection[Any]] = {
        "method": methods_of(arguments), "track": arguments.track, "task": arguments.task, "rung": arguments.rung,
        "seed": arguments.seed,
    }  # fmt: skip
    for name, values in wanted.items():
        if values and found:
            there = {getattr(r, name) for r in found}
            found = [r for r in found if getattr(r, name) in values]
            if not found:
                print(f"no records of {name} {_listed(values)}; there are those of {_listed(there)}")
                return 0
    seeds = len(set(arguments.seed)) or None
    print(tables.show(found, metrics, seeds) if found else f"no records below {results}; write some with: stepmark run")
    return 0


def _listed(values: Collection[Any]) -> str:
    """Values in order, the first dozen of them."""
    names = [str(value) for value in sorted(values)]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _known(kind: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raise `ValueError` with what may have been meant, if a name is neither of this checkout nor recorded."""
    for name in names:
        if name not in known:
            near = get_close_matches(name, sorted(known), 3)
            meant = f"did you mean {' or '.join(near)}?" if near else f"known: {_listed(known)}"
            raise ValueError(f"no {kind} {name!r}; {meant}")


def compare(arguments: argparse.Namespace) -> int:
    """Two methods by paired tests."""
    from stepmark import admission
    from stepmark.leaderboard import tables

    results = arguments.results or results_folder(arguments.tier)
    taken, others = admission.read(results)
    both = (arguments.a, arguments.b)
    _known("method", both, {*plugins.methods(), *(r.method for r in taken), *(each.record.method for each in others)})
    _known("track", [arguments.track] if arguments.track else [], plugins.tracks())
    found = [r for r in (*taken, *(each.record for each in others)) if r.tier == arguments.tier]
    print(tables.compare(found, *both, arguments.track))
    aside = [each for each in others if each.record.tier == arguments.tier and each.record.method in both]
    print("".join(f"\n{text}\n" for text in tables.left_out(aside)), end="")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Recorded cells again: 0 when all agree, else 1."""
    choice = choice_of(arguments)
    if choice is None:
        return _verified(arguments)
    from stepmark import hub

    with hub.using(choice):
        return _verified(arguments)


def _verified(arguments: argparse.Namespace) -> int:
    if (arguments.record is None) == (arguments.sample is None):
        raise ValueError("give a record file, FILE:LINE, or --sample N")
    if arguments.sample is not None:
        return _verify_sample(arguments)
    from stepmark import record
    from stepmark.verify import verify

    name, colon, line = arguments.record.rpartition(":")
    path, number = (Path(name), int(line)) if colon and line.isdigit() else (Path(arguments.record), None)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; records lie in leaderboard/results/<version>/<machine>/<track>/")
    records = list(record.read(path))
    if number is not None:
        if not 1 <= number <= len(records):
            raise ValueError(f"{path} has {len(records)} records; give a line between 1 and {len(records)}")
        records = [records[number - 1]]
    wrong = 0
    for each in records:
        found = verify(each, arguments.device)
        wrong += bool(found.differs)
        print(
            f"{each.method} on {each.task}, rung {each.rung}, seed {each.seed}: "
            + ("differs" if found.differs else "agrees")
        )
        for text in found.differs:
            print(f"  - {text}")
        for text in (*found.agrees, *found.notes):
            print(f"    {text}")
    print(f"{len(records) - wrong} of {len(records)} records agree")
    return 1 if wrong else 0


def _verify_sample(arguments: argparse.Namespace) -> int:
    from stepmark.leaderboard.rows import record_id
    from stepmark.record import read_all
    from stepmark.verify import draw, verify

    results = arguments.results or results_folder(arguments.tier)
    chosen = draw(
        [r for r in read_all(results) if r.tier == arguments.tier], arguments.sample, arguments.seed_of_sample
    )
    if not chosen:
        raise ValueError(f"no record of tier {arguments.tier} below {results} can be run again here")
    rows: list[tuple[str, ...]] = [("method", "task", "rung", "seed", "record", "verdict", "what")]
    wrong = 0
    for record in chosen:
        found = verify(record, arguments.device)
        wrong += bool(found.differs)
        what = "; ".join(found.differs or found.agrees)
        rows.append(
            (record.method, record.task, str(record.rung), str(record.seed), record_id(record),
             "differs" if found.differs else "agrees", "".join(c if c.isprintable() else "?" for c in what)[:160])
        )  # fmt: skip
    print(columns(rows, ""))
    print(f"{len(chosen) - wrong} of {len(chosen)} records agree (sample {arguments.seed_of_sample})")
    return 1 if wrong else 0
