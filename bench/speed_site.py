"""How long the site takes to build from many records, and how much memory.

    python bench/speed_site.py [--records 100000] [--machines 10] [--versions 3] [--profile]

Synthetic records of every plugin on every task of its track, over machines, suite versions and seeds, with as many
resamples and timings as real ones, are written to a temporary folder; then the site is built from them, MkDocs
included, in a process of its own. Prints wall seconds, the peak resident memory of the build, and the largest page.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import pstats
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from stepmark import plugins
from stepmark.record import Latency, Memory, Offline, Quality, Record, path_of

RESAMPLES = 100
ROUNDS = 9


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
                    name: Quality(value=value, resamples=np.round(value * (1 + noise + own), 9).tolist())
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
                    digests=digests[info.id, task.id], environment={"device": "cpu", "cpu": "synthetic"},
                    command=f"stepmark run --method {info.id}", created="2031-01-02T03:04:05Z", commit="abcdef1",
                )  # fmt: skip
                made += 1
                if made == count:
                    return


def write(root: Path, count: int, machines: int, versions: int) -> int:
    """Records as files below `root`; how many."""
    lines: dict[Path, list[str]] = {}
    for each in records(count, machines, versions):
        lines.setdefault(path_of(root, each), []).append(each.model_dump_json())
    for path, texts in lines.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return sum(map(len, lines.values()))


def build(root: Path, profile: bool) -> tuple[float, float]:
    """(wall seconds, peak MiB) of one build; for a process that does nothing else."""
    begin = time.perf_counter()
    from stepmark.leaderboard import site

    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    site.build(root / "results", root / "out")
    if profile:
        profiler.disable()
        pstats.Stats(profiler, stream=sys.stdout).sort_stats("cumulative").print_stats(45)
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return time.perf_counter() - begin, peak


def main() -> None:
    """Write, build, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--machines", type=int, default=10)
    parser.add_argument("--versions", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print where the time goes; slower")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # A process of its own each: the memory of the writer does not count.
        with get_context("spawn").Pool(1) as pool:
            count = pool.apply(write, (root / "results", arguments.records, arguments.machines, arguments.versions))
        print(f"{count} records, {len(plugins.methods())} methods, {len(plugins.tasks())} tasks", flush=True)
        with get_context("spawn").Pool(1) as pool:
            seconds, peak = pool.apply(build, (root, arguments.profile))
        pages = sorted((root / "out").rglob("*.html"), key=lambda path: path.stat().st_size)
        largest = pages[-1]
        print(f"wall {seconds:.1f} s, peak {peak:,.0f} MiB, {len(pages)} pages, largest "
              f"{largest.relative_to(root / 'out')} with {largest.stat().st_size / 1024:,.0f} KB")  # fmt: skip


if __name__ == "__main__":
    main()
