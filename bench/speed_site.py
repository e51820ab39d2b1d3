"""How long the site takes to build from many records, and how much memory.

    python bench/speed_site.py [--records 100000] [--machines 12] [--versions 3] [--cores 2] [--keep FOLDER] [--profile]
                               [--goal 60]

Synthetic records of every plugin on every task of its track, over machines, suite versions and seeds, with as many
resamples and timings as real ones, are written to a temporary folder; then the site is built from them, MkDocs
included, by processes of their own on `--cores` cores. Prints the wall and CPU seconds of the whole and of MkDocs
alone, the peak of the memory of all processes together, and the largest page; exits with 1 if it took more seconds of
the clock than `--goal`. CPU seconds are the figure to read on a machine that has other work: on idle cores the wall
time lies between them divided by the cores and them.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import os
import pstats
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from stepmark import plugins
from stepmark.record import Latency, Memory, Offline, Quality, Record, environments, keep_environment, line_of, path_of

RESAMPLES = 100
ROUNDS = 9
ENVIRONMENT = {"cpu": "synthetic"} | {f"library_{i}": "1.2.3" for i in range(25)}


def records(count: int, machines: int, versions: int) -> Iterator[Record]:
    """`count` records or as many as there are cells, older suite versions last."""
    cells = [
        (info, task)
        for info in plugins.methods().values()
        for task_id in info.tasks
        for task in [plugins.tasks()[task_id][1]]
    ]
    rng = np.random.default_rng(0)
    digests = {(info.id, task.id): plugins.source_digests(info, task) for info, task in cells}
    made = 0
    for version, machine, seed in itertools.product(reversed(range(versions)), range(machines), range(3)):
        for info, task in cells:
            noise = np.random.default_rng(seed).normal(0, 0.05, RESAMPLES)
            for rung in task.rungs:
                value = float(1 + rng.exponential() / (1 + rung))
                own = rng.normal(0, 0.02, RESAMPLES)
                quality = {
                    name: Quality(value=value, resamples=[float(f"{x:.6g}") for x in value * (1 + noise + own)])
                    for name in task.metrics
                }
                rounds = np.round(rung * (1 + 0.05 * rng.random(ROUNDS)), 6).tolist()
                yield Record(
                    suite=f"0.{version + 1}.0", track=info.track, method=info.id, task=task.id, rung=rung, seed=seed,
                    tier="embedded", machine=f"machine-{machine}", status="ok",
                    counts={"nfe": float(rung), "nfe_equivalent": 1.1 * rung, "flops": 1e6 * rung}, quality=quality,
                    latency=Latency(
                        items=task.batch, median_ms=float(np.median(rounds)), iqr_ms=0.1, p95_ms=max(rounds),
                        samples_ms=rounds,
                    ) if seed == 0 else None,
                    memory=Memory(peak_mib=float(rung), how="tracker", state_mib=0.0) if seed == 0 else None,
                    offline=Offline(seconds=1.0, evaluations={}, state_mib=0.0), outputs="ab" * 16,
                    digests=digests[info.id, task.id], environment=ENVIRONMENT,
                    command=f"stepmark run --method {info.id}", created="2031-01-02T03:04:05Z", commit="abcdef1",
                )  # fmt: skip
                made += 1
                if made == count:
                    return


def write(root: Path, count: int, machines: int, versions: int) -> int:
    """Records as files below `root`; how many."""
    lines: dict[Path, list[str]] = {}
    for each in records(count, machines, versions):
        lines.setdefault(path_of(root, each), []).append(line_of(each))
    for path, texts in lines.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        keep_environment(environments(path), ENVIRONMENT)
    return sum(map(len, lines.values()))


@dataclass
class Cost:
    """What a build took: seconds of the clock and of the processors, MkDocs' part of the latter, peak MiB."""

    wall: float = 0.0
    cpu: float = 0.0
    mkdocs: float = 0.0
    peak: float = 0.0


def build(root: Path, cores: int, profile: bool) -> Cost:
    """One build, in a process that does nothing else."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    cost, begin = Cost(), time.perf_counter()
    from stepmark.leaderboard import site

    whole = site._mkdocs

    def timed(*arguments: Any) -> None:
        start = time.process_time()
        whole(*arguments)
        cost.mkdocs = time.process_time() - start

    site._mkdocs = timed
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    site.build(root / "results", root / "out")
    if profile:
        profiler.disable()
        pstats.Stats(profiler, stream=sys.stdout).sort_stats("cumulative").print_stats(60)
    cost.wall = time.perf_counter() - begin
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cost.cpu = sum(each.ru_utime + each.ru_stime for each in used)
    # Linux counts in KiB, macOS in bytes. Children may have run together, so this is only a fallback.
    cost.peak = sum(each.ru_maxrss for each in used) / (2**20 if sys.platform == "darwin" else 2**10)
    return cost


def memory(pid: int) -> float:
    """MiB of a process and all its children now, pages that they share counted once; 0 where Linux does not say."""
    found = 0.0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                found += int(line.split()[1]) / 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += sum(memory(int(child)) for child in (task / "children").read_text().split())
    except OSError:  # it ended meanwhile
        pass
    return found


def main() -> int:
    """Write, build, print; 1 above the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--machines", type=int, default=12)
    parser.add_argument("--versions", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="0: as many as there are")
    parser.add_argument("--keep", type=Path, help="folder for records and site; records found there are used again")
    parser.add_argument("--profile", action="store_true", help="print where the time of the main process goes; slower")
    parser.add_argument("--goal", type=float, metavar="SECONDS", help="exit with 1 if the build takes longer")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.keep or Path(folder)
        context = get_context("spawn")
        if not (root / "results").exists():
            # A process of its own each: the memory of the writer does not count.
            with context.Pool(1) as pool:
                pool.apply(write, (root / "results", arguments.records, arguments.machines, arguments.versions))
        count = sum(path.read_bytes().count(b"\n") for path in (root / "results").rglob("*.jsonl"))
        print(f"{count:,} records, {len(plugins.methods())} methods, {len(plugins.tasks())} tasks", flush=True)
        with ProcessPoolExecutor(1, context) as pool:
            work = pool.submit(build, root, arguments.cores, arguments.profile)
            peak = 0.0
            while not work.done():
                peak = max([peak, *(memory(process.pid) for process in pool._processes.values())])
                time.sleep(0.5)  # asking costs the machine time as well
            cost = work.result()
        pages = sorted((root / "out").rglob("*.html"), key=lambda path: path.stat().st_size)
        largest = pages[-1]
        print(f"wall {cost.wall:.1f} s, CPU {cost.cpu:.1f} s (MkDocs {cost.mkdocs:.1f} s), "
              f"peak {peak or cost.peak:,.0f} MiB, {len(pages)} pages, largest {largest.relative_to(root / 'out')} "
              f"with {largest.stat().st_size / 1024:,.0f} KB")  # fmt: skip
    if arguments.goal is None:
        return 0
    print(f"{'ok  ' if cost.wall <= arguments.goal else 'OVER'} site: {cost.wall:.1f} s, goal {arguments.goal:g} s")
    return int(cost.wall > arguments.goal)


if __name__ == "__main__":
    sys.exit(main())
