"""The price of a row: what one more method costs everyone, held against its goals. Exits with 1 above any of them.

    python bench/price.py cells [--sample 48] [--profile 10]   CPU of a smoke cell, without imports: median <= 1 s
    python bench/price.py list [--methods 1000]                `stepmark list`, warm: < 0.5 s
    python bench/price.py site [--records 100000]              the site (bench/speed_site.py): < 60 s
    python bench/price.py audit [--sample 48]                  the ruler's share of a board's seconds: <= 10 %
    python bench/price.py prepare                              preparation, published: each training seed <= 3 minutes
    python bench/price.py tests [--junit build/junit]          `make test`: <= 11 minutes, with 700 methods <= 20

Several may be named; `make price` runs the first two. Seconds of `list` are of the processor, children included; those of
`cells` are of all processors, so that the machine must have nothing else to do; those of `site` are of the clock.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

CELL, LIST, PREPARE, SITE, TESTS, TESTS_THEN, METHODS_THEN = 1.0, 0.5, 180.0, 60.0, 11.0, 20.0, 700
AUDIT = 0.10
WORKERS = 2  # cores that `make test` is to be cheap on
TIMED = {"test_meter", "test_instruments"}  # as in the Makefile: alone on the machine
ROOT = Path(__file__).parent.parent


def cpu_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def busy_seconds() -> float:
    """Processor seconds of the whole machine. A cell's processes are many, and what ended ones have used nobody is told."""
    times = psutil.cpu_times()
    return float(times.user + times.system)


def held(what: str, seconds: float, goal: float, unit: str = "s") -> bool:
    """Print a figure beside its goal; whether it is met."""
    print(f"{'ok  ' if seconds <= goal else 'OVER'} {what}: {seconds:.2f} {unit}, goal {goal:g} {unit}", flush=True)
    return seconds <= goal


# smoke cells ------------------------------------------------------------------------------------------------------


def cells(sample: int, profile: int) -> bool:
    """One cell for each method and kind of task: the first rung of smoke, with the preparation that it waits for.

    `sample`: that many, evenly spaced in the order of the suite (0: all). Before the first of each kind of task another
    method runs on it unmeasured, so that imports, data sets and backbones are there, as they are in a worker of a suite.
    """
    from stepmark import run, suite
    from stepmark.cell import Cell

    first: dict[tuple[str, str], Cell] = {}
    for cell in suite.cells(suite.Selection("smoke", quick=True)):
        first.setdefault((cell.method, cell.task), cell)
    every = list(first.values())
    chosen = every if not 0 < sample < len(every) else [every[i * len(every) // sample] for i in range(sample)]
    found: list[tuple[float, str, cProfile.Profile]] = []
    warm: set[str] = set()
    with tempfile.TemporaryDirectory() as aside, tempfile.TemporaryDirectory() as cache:
        for cell in chosen:
            kind = _kind(cell.task)
            other = next((c for c in every if _kind(c.task) == kind and c.method != cell.method), None)
            if kind not in warm and other is not None:
                os.environ["STEPMARK_CACHE"] = aside
                run.measure(other, show_progress=False)
            warm.add(kind)
            os.environ["STEPMARK_CACHE"] = cache
            profiler = cProfile.Profile()
            before = busy_seconds()
            if profile:
                profiler.enable()
            record = run.measure(cell, show_progress=False)
            profiler.disable()
            spent = busy_seconds() - before
            if record.status == "failed":
                raise SystemExit(f"failed: {cell.method} on {cell.task}: {record.message}")
            if record.status != "skipped":  # which costs nothing, and is no cell
                found.append((spent, f"{cell.method} on {cell.task}", profiler))
    found.sort(key=lambda each: -each[0])
    print(f"{len(found)} of {len(every)} smoke cells; the dearest:")
    for seconds, name, _ in found[:10]:
        print(f"  {seconds:6.2f} s  {name}")
    for _, name, profiler in found[:profile]:
        print(f"\n{name}")
        pstats.Stats(profiler, stream=sys.stdout).sort_stats("cumulative").print_stats("methods/|stepmark/", 30)
    return held("smoke cell, median CPU", statistics.median(seconds for seconds, *_ in found), CELL)


def _kind(task: str) -> str:
    return task.split("/")[0]


# the ruler --------------------------------------------------------------------------------------------------------


def audit(sample: int) -> bool:
    """Seconds that a board takes for counting FLOPs and for looking for lies, of all its seconds: those of the other seeds,
    which repeat the quality, and of the published preparations among them.

    `sample`: that many cells, evenly spaced in the order of the suite (0: all). Says the standard error, and the share
    without preparations too.
    """
    from stepmark import passes, plugins, run, suite
    from stepmark.places import results_folder
    from stepmark.record import read_all

    taken: dict[str, float] = defaultdict(float)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given)
            finally:
                taken[function.__name__] += time.perf_counter() - start

        return timed

    for name in ("quality", "counts", "latency", "memory", "energy"):
        setattr(passes, name, watched(getattr(passes, name)))
    prepared: dict[tuple[str, str], dict[int | None, float]] = defaultdict(dict)
    rungs: dict[tuple[str, str], set[int]] = defaultdict(set)
    for record in read_all(results_folder("embedded")):
        rungs[record.method, record.task].add(record.rung)
        if record.offline:
            prepared[record.method, record.task][record.offline.seed] = record.offline.seconds
    every = [c for c in suite.cells(suite.Selection()) if not c.seed]
    chosen = every if not 0 < sample < len(every) else [every[i * len(every) // sample] for i in range(sample)]
    found: list[tuple[float, float, float]] = []
    for cell in chosen:
        taken.clear()
        if run.measure(cell, show_progress=False).status == "skipped":
            continue
        pair = cell.method, cell.task
        repeated = taken["quality"] * (plugins.tasks()[cell.task][1].seeds - 1)
        preparing = sum(prepared[pair].values()) / max(1, len(rungs[pair]))
        found.append((taken["counts"], sum(taken.values()) + repeated, preparing))
        print(
            f"  {taken['counts']:6.1f} of {found[-1][1]:6.1f} s  {cell.method} on {cell.task}, rung {cell.rung}",
            flush=True,
        )
    spent, cells_alone = sum(a for a, _, _ in found), sum(t for _, t, _ in found)
    whole = cells_alone + sum(p for _, _, p in found)
    share = spent / whole
    error = sum((a - share * (t + p)) ** 2 for a, t, p in found) ** 0.5 / whole
    print(
        f"{len(found)} cells: {spent:.0f} s of audit, {cells_alone:.0f} s in all, {whole:.0f} s with preparations; "
        f"{spent / cells_alone:.1%} without these, {share:.1%} with them, standard error {error:.1%}"
    )
    return held("the audit's share", 100 * share, 100 * AUDIT, "%")


# stepmark list ----------------------------------------------------------------------------------------------------

METHOD = '''"""Synthetic method {number}.

It stands for a file of usual length.
"""

from __future__ import annotations

from stepmark import Claim, Method, Paper


class Synthetic{number}(Method):
    """Synthetic method {number}: a line that says what it does."""

    paper = Paper(id="synthetic_{number}", arxiv="0000.00000", title="A title", authors="A. Author", year=2031)
    tasks = ("sampling/mixtures_flow", "class_to_image/digits_flow")
    baselines = ("euler",)
    claims = (Claim("sliced_w2[synthetic_{number},8] < sliced_w2[euler,8]", says="better at 8"),)

    def run(self, session, batch, rung):
        """Nothing of use."""
        x = batch["noise"]
'''


def listing(methods: int) -> bool:
    """`stepmark list` with that many methods more, in processes of its own: without an index, then with it."""
    with tempfile.TemporaryDirectory() as folder:
        track = Path(folder, "methods", "image")
        track.mkdir(parents=True)
        for number in range(methods):
            body = "".join(f"        x = x + {i} * batch['noise']\n" for i in range(60))
            track.joinpath(f"synthetic_{number}.py").write_text(
                METHOD.format(number=number) + body + "        return x\n"
            )
        environment = os.environ | {"STEPMARK_METHODS": str(track.parent), "STEPMARK_CACHE": str(Path(folder, "cache"))}
        seconds = []
        for _ in range(4):
            before = cpu_seconds()
            command = [sys.executable, "-m", "stepmark.cli", "list"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            seconds.append(cpu_seconds() - before)
            if done.returncode or f"synthetic_{methods - 1} " not in done.stdout:
                raise SystemExit(f"stepmark list failed: {done.stderr.strip()[-500:]}")
        print(f"stepmark list, {methods} methods more, the first time: {seconds[0]:.2f} s")
        return held("stepmark list, CPU", statistics.median(seconds[1:]), LIST)


# preparation ------------------------------------------------------------------------------------------------------


def preparation() -> bool:
    """What a training seed of each method took in the published records."""
    from stepmark.places import results_folder
    from stepmark.record import read_all

    cost: dict[str, float] = {}
    for record in read_all(results_folder("embedded")):
        if record.offline:
            name = f"{record.method} on {record.task}"
            cost[name] = max(cost.get(name, 0.0), record.offline.seconds)
    dearest = sorted(cost.items(), key=lambda each: -each[1])[:5]
    for name, seconds in dearest:
        print(f"  {seconds:6.0f} s  {name}")
    return held("preparation of a training seed", dearest[0][1] if dearest else 0.0, PREPARE)


# the site ---------------------------------------------------------------------------------------------------------


def site(records: int) -> bool:
    """The site from synthetic records, as `speed_site.py` builds it."""
    command = [sys.executable, str(ROOT / "bench" / "speed_site.py"), "--records", str(records), "--goal", str(SITE)]
    return subprocess.run(command).returncode == 0


# the tests --------------------------------------------------------------------------------------------------------


class Costs(NamedTuple):
    """Seconds of the tests by what they grow with, and how many tests there are of each."""

    seconds: dict[str, float]
    count: dict[str, int]


CELLS, CONTRACT, PROOFS = "suite cells (by method)", "checks of each method's source", "proofs (by method)"
FIXED, ALONE = "harness, site, records (fixed)", "what measures time, alone (fixed)"


def kind_of(module: str, name: str, tracks: Iterable[str]) -> str:
    """What a test grows with, from its module and name."""
    if module in TIMED:
        return ALONE
    if module == "test_suite":
        return CELLS
    if name.startswith("test_the_source_of_every_method"):
        return CONTRACT
    about = module.removeprefix("test_")
    of_track = any(about.startswith(track) for track in tracks)
    return PROOFS if (of_track and not about.endswith(("_track", "_models"))) or about == "papers" else FIXED


def costs(files: Iterable[Path], tracks: Iterable[str]) -> Costs:
    """Sum up the test cases of junit files, as `pytest --junitxml` writes them."""
    found = Costs(defaultdict(float), defaultdict(int))
    names = tuple(tracks)
    for path in files:
        for case in ElementTree.parse(path).iter("testcase"):
            module = next((part for part in case.get("classname", "").split(".") if part.startswith("test_")), "")
            kind = kind_of(module, case.get("name", ""), names)
            found.seconds[kind] += float(case.get("time", 0))
            found.count[kind] += 1
    return found


def minutes(seconds: dict[str, float], growth: float = 1.0) -> float:
    """`make test` on `WORKERS` cores, if what grows with the methods is `growth` times as much."""
    shared = sum(
        s * (growth if kind in {CELLS, CONTRACT, PROOFS} else 1) for kind, s in seconds.items() if kind != ALONE
    )
    return (shared / WORKERS + seconds.get(ALONE, 0.0)) / 60


def tests(junit: Path) -> bool:
    """Today's `make test` and that of `METHODS_THEN` methods, from the junit files of its last run."""
    from stepmark import plugins

    files = [junit] if junit.is_file() else sorted(junit.glob("*.xml"))
    if not files:
        raise SystemExit(f"no junit file at {junit}; make test writes them")
    found, methods = costs(files, plugins.tracks()), len(plugins.methods())
    print(f"{sum(found.count.values())} tests, {methods} methods; processor minutes, and with {METHODS_THEN} methods:")
    growth = METHODS_THEN / methods
    for kind, seconds in sorted(found.seconds.items(), key=lambda each: -each[1]):
        then = seconds * (growth if kind in {CELLS, CONTRACT, PROOFS} else 1)
        print(f"  {seconds / 60:6.1f}  {then / 60:6.1f}  {found.count[kind]:5d} tests  {kind}")
    now = held(f"make test on {WORKERS} cores", minutes(found.seconds), TESTS, "min")
    later = f"make test with {METHODS_THEN} methods"
    return held(later, minutes(found.seconds, growth), TESTS_THEN, "min") and now


def main() -> int:
    """What was named, one after the other; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["cells", "list", "audit", "prepare", "site", "tests"])
    parser.add_argument("--sample", type=int, default=48, metavar="N", help="of the smoke cells (0: all)")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="profile the N dearest cells; slower")
    parser.add_argument("--methods", type=int, default=1000, metavar="N")
    parser.add_argument("--records", type=int, default=100_000, metavar="N")
    parser.add_argument("--junit", type=Path, default=ROOT / "build" / "junit", help="a file, or a folder of them")
    arguments = parser.parse_args()
    act = {
        "cells": lambda: cells(arguments.sample, arguments.profile),
        "list": lambda: listing(arguments.methods),
        "audit": lambda: audit(arguments.sample),
        "prepare": preparation,
        "site": lambda: site(arguments.records),
        "tests": lambda: tests(arguments.junit),
    }
    missed = [what for what in arguments.what if not act[what]()]  # all of them run, whatever the first one says
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
