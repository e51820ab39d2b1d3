"""`stepmark site`, `samples`, `release`: from records to what readers see."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stepmark import __version__, plugins
from stepmark.commands.options import results_of, selection_of, tier_of


def samples(arguments: argparse.Namespace) -> int:
    """The pictures and texts of cells that have a record of this machine and no sample."""
    from stepmark import samples, suite
    from stepmark.meter.machine import machine_id
    from stepmark.record import read_all

    arguments.tier = tier_of(arguments)
    chosen = selection_of(arguments)
    suite.check_selection(chosen)
    results = results_of(arguments, arguments.tier)
    records = [
        r
        for r in read_all(results)
        if r.tier == arguments.tier
        and r.suite == __version__
        and r.machine == machine_id(arguments.device)
        and r.device == arguments.device.partition(":")[0]
        and (not chosen.methods or r.method in chosen.methods)
        and (not chosen.tracks or r.track in chosen.tracks)
        and (not chosen.tasks or r.task in chosen.tasks)
        and (not chosen.rungs or r.rung in chosen.rungs)
    ]
    made, left = samples.refresh(
        records, results, arguments.device, arguments.prepare, lambda text: print(text, file=sys.stderr)
    )
    print(f"{made} samples written below {results}" + (f", {left} could not be made" if left else ""))
    return 0


def migrate(arguments: argparse.Namespace) -> int:
    """Records of the first schema become records of the second."""
    from stepmark.migrate import carry, migrate

    results = results_of(arguments)
    print(f"{results}: {migrate(results)}")
    if arguments.carry:
        done, left = carry(results)
        print(f"{done} records carried into suite version {__version__}; {left} are older than their sources")
    return 0


def release(arguments: argparse.Namespace) -> int:
    """Freeze the suite version, or check those that are frozen."""
    from stepmark.leaderboard import release

    results = results_of(arguments)
    if arguments.check:
        faults = release.check_all(results)
        for fault in faults:
            print(fault)
        print("every release agrees with its manifest" if not faults else f"{len(faults)} to mend")
        return 1 if faults else 0
    manifest = release.freeze(results, force=arguments.force)
    print(f"released {manifest.suite}: {manifest.records} records, digest {manifest.digest}")
    for text in manifest.forced:
        print(f"forced: {text}")
    return 0


def site(arguments: argparse.Namespace) -> int:
    """The site, as files."""
    from stepmark.leaderboard import site

    results = results_of(arguments, arguments.tier)
    root = plugins.checkout() or Path.cwd()
    tier = None if arguments.tier == "embedded" else arguments.tier
    page = site.build(results, arguments.out or root / "build" / "site", tier)
    print(f"the site is in {page}")
    return 0
