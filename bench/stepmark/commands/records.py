"""`stepmark show`, `compare`, `verify`: what records say, and whether they can be repeated."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepmark.commands.options import choice_of, methods_of, tier_of
from stepmark.commands.table import columns
from stepmark.places import results_folder


def show(arguments: argparse.Namespace) -> int:
    """The leaderboard as a table."""
    from stepmark.leaderboard import tables
    from stepmark.record import read_all

    arguments.tier = tier_of(arguments)
    methods = methods_of(arguments)
    results = arguments.results or results_folder(arguments.tier)
    records = [
        r
        for r in read_all(results)
        if r.tier == arguments.tier
        and (not methods or r.method in methods)
        and (not arguments.track or r.track in arguments.track)
        and (not arguments.task or r.task in arguments.task)
    ]
    print(tables.show(records) if records else f"no records below {results}; write some with: stepmark run")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Two methods by paired tests."""
    from stepmark.leaderboard import tables
    from stepmark.record import read_all

    results = arguments.results or results_folder(arguments.tier)
    records = [r for r in read_all(results) if r.tier == arguments.tier]
    print(tables.compare(records, arguments.a, arguments.b, arguments.track))
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
