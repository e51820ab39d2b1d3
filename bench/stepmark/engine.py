"""Where cells run: in this process, or on a Ray cluster. Both yield the same records and samples; the caller writes.

A cell that is timed has its device to itself: locally by a lock file for each core or GPU, on Ray by taking every CPU
(and a GPU) of a node.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from stepmark.record import Record, parse
from stepmark.run import Cell, cache_folder, measured
from stepmark.samples import SHOWN, Shown


class DeviceBusy(Exception):
    """Another run is timing on this device. One line that says which process and what to do."""


def _lock_files(device: str) -> list[Path]:
    """One file per accelerator, or per core this process may run on: pinned runs may share a CPU, not a core."""
    cores = [f"cpu{core}" for core in sorted(os.sched_getaffinity(0))]
    names = cores if device == "cpu" else [device.replace(":", "")]
    return [cache_folder() / f"timing-{name}.lock" for name in names]


@contextlib.contextmanager
def device_lock(device: str) -> Iterator[None]:
    """Hold a device for timing.

    Raises:
        DeviceBusy: another process holds it, or one of its cores.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        for path in _lock_files(device):
            handle = held.enter_context(open(path, "a+"))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.seek(0)
                holder = handle.read().strip() or "unknown"
                raise DeviceBusy(
                    f"process {holder} is timing on {device}; wait for it, or run with --no-timing"
                ) from None
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
        yield


def local(cells: Iterable[Cell], device: str, timing: bool) -> Iterator[tuple[Record, Shown | None]]:
    """Run cells one after the other in this process.

    Raises:
        DeviceBusy: timing is wanted and another process is timing on the device.
    """
    with device_lock(device) if timing else contextlib.nullcontext():
        for cell in cells:
            yield measured(cell, device, timing)


def ray(
    cells: Iterable[Cell], device: str, timing: bool, address: str | None = None
) -> Iterator[tuple[Record, Shown | None]]:
    """Run cells on a Ray cluster (a local one when `address` is None), yielding what they give as it arrives.

    A timed cell (seed 0) asks for all CPUs of the smallest node, so that nothing runs beside it; the others ask for
    one CPU. On CUDA each cell asks for one GPU. Every node needs the same Stepmark installed.
    """
    import ray as cluster

    if not cluster.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cluster.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    nodes = [node["Resources"].get("CPU", 0.0) for node in cluster.nodes() if node["Alive"]]
    whole = max(1.0, min(nodes))
    gpus = 0 if device == "cpu" else 1

    def work(fields: dict[str, object], on: str, timed: bool) -> tuple[str, str | None]:
        cell = Cell(**fields)  # type: ignore[arg-type]
        with device_lock(on) if timed else contextlib.nullcontext():
            record, shown = measured(cell, on, timed, show_progress=False)
        return record.model_dump_json(), shown.model_dump_json() if shown else None

    remote = cluster.remote(work)
    waiting: dict[object, Cell] = {}
    for cell in cells:
        timed = timing and cell.seed == 0
        task = remote.options(num_cpus=whole if timed else 1, num_gpus=gpus, max_retries=2)
        waiting[task.remote(asdict(cell), device, timed)] = cell
    while waiting:
        ready, _ = cluster.wait(list(waiting), num_returns=1)
        for reference in ready:
            cell = waiting.pop(reference)
            record, shown = cluster.get(reference)
            yield parse(record, f"ray:{cell.method}"), SHOWN.validate_json(shown) if shown else None
