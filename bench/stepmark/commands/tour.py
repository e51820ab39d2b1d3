"""`stepmark tour`: the headline comparisons, measured here, the published figures beside them, and the site with both."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from stepmark import plugins
from stepmark.commands.options import workers_of
from stepmark.commands.table import columns
from stepmark.places import results_folder


def tour(arguments: argparse.Namespace) -> int:
    """Measure, print and build the site: 0 unless a cell failed."""
    from tqdm import tqdm

    from stepmark import tour as stops
    from stepmark.record import Record, read_all

    chosen = stops.chosen(arguments.stop)
    if arguments.list:
        print(columns([(s.id, f"{s.method} against {s.baseline} on {s.task}", s.says) for s in chosen], ""))
        return 0
    begin = time.monotonic()
    root, results = plugins.checkout(), arguments.results or stops.folder()
    published = read_all(results_folder("embedded")) if root else []
    # Two workers at most: a stop has two methods.
    workers = min(2, workers_of(arguments))
    failed: list[Record] = []
    verdicts: list[bool | None] = []
    tqdm.monitor_interval = 0
    for number, stop in enumerate(chosen, start=1):
        task = stops.task_of(stop)
        print(
            f"\n{number} of {len(chosen)}  {stop.says}\n{stop.method} against {stop.baseline}: {task.summary}",
            flush=True,
        )
        made: list[Record] = []
        with tqdm(total=2 * len(stop.rungs), unit="cell", dynamic_ncols=True, leave=False) as bar:

            def told(record: Record) -> None:
                made.append(record)
                bar.set_postfix_str(f"{record.method}, rung {record.rung}")
                bar.update()

            found = stops.measure(stop, results, arguments.device, workers, arguments.again, told)
        here = stops.figures(found, stop)
        bad = [r for r in made if r.status != "ok"]
        failed += bad
        for r in bad:
            print(f"{r.status}: {r.method}, rung {r.rung}: {r.message or '; '.join(r.flags)}", file=sys.stderr)
        if not any(name == stop.baseline for name, _ in here) or not any(name == stop.method for name, _ in here):
            continue
        theirs = stops.figures(published, stop)
        print("\n" + columns(stops.table(stop, here, theirs, task)))
        offline = {r.method: r.offline.seconds for r in here.values() if r.offline and r.offline.seconds >= 1}
        for name, seconds in offline.items():
            print(f"  {name} was prepared once, in {seconds:.0f} s")
        verdict, said = stops.agreement(here, theirs)
        verdicts.append(verdict)
        print(
            f"\n  => {stops.sentence(stop, here, task)}\n     {said}{stops.published_time(stop, here, theirs, task)}",
            flush=True,
        )
    compared = [verdict for verdict in verdicts if verdict is not None]
    counted = f"{compared.count(True)} of {len(compared)} comparisons agree with the published records"
    print(f"\n{counted}; measured in {time.monotonic() - begin:.0f} s. The records are below {results}.")
    if root is None:
        print("The site is built from a checkout; this is an installed package.")
    elif not arguments.no_site:
        from stepmark.leaderboard import site

        with stops.with_published(results, results_folder("embedded")) as merged:
            page = site.build(merged, arguments.out or Path(root) / "build" / "site")
        print(f"The site, with the records of this machine in it, is {page}.")
    print("Every method once, small: stepmark run --quick. One method in full: stepmark run --method ID.")
    return 1 if failed else 0
