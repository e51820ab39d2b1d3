"""Where cells run: here, in worker processes on this machine, or on a Ray cluster.

All yield the same records and samples; the caller writes. A cell that is timed has its device to itself: on this
machine by a lock file for each core or GPU, on Ray by taking every CPU (and a GPU) of a node.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from multiprocessing.connection import Connection, wait
from pathlib import Path

from stepmark import hub
from stepmark.cell import Cell
from stepmark.places import cache_folder
from stepmark.record import Record, parse
from stepmark.run import measured
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


def available(device: str) -> int:
    """How many workers `pool` can give a device each: cores that this process may use, or GPUs."""
    if device == "cpu":
        return len(os.sched_getaffinity(0))
    import torch

    return torch.accelerator.device_count()


def pool(cells: Iterable[Cell], device: str, timing: bool, workers: int) -> Iterator[tuple[Record, Shown | None]]:
    """Run cells in worker processes, each pinned to a core of its own (or with a GPU of its own), as they come free.

    The cells of one method on one task stay with one worker, which prepares once. Cores share caches and memory
    bandwidth: for figures to publish, one worker is the quieter choice.

    Raises:
        ValueError: more workers than devices. DeviceBusy: timing is wanted and another process is timing on a core.
        ChildProcessError: a worker was killed.
    """
    if not 1 <= workers <= available(device):
        raise ValueError(f"--workers {workers}: this machine offers 1 to {available(device)} on {device}")
    groups = [list(group) for _, group in groupby(cells, key=lambda cell: (cell.method, cell.task))]
    groups.reverse()  # taken from the end
    context = multiprocessing.get_context("spawn")  # a forked torch is not safe on CUDA
    cores = sorted(os.sched_getaffinity(0))
    lines: list[Connection] = []
    running = []
    try:
        for index in range(min(workers, len(groups))):
            line, far = context.Pipe()
            place = (device, cores[index]) if device == "cpu" else (f"{device.split(':')[0]}:{index}", None)
            process = context.Process(target=_worker, args=(far, *place, timing))
            process.start()
            far.close()
            line.send(groups.pop())
            lines.append(line)
            running.append(process)
        while lines:
            ready = wait(lines)
            for line in [each for each in lines if each in ready]:
                try:
                    answer = line.recv()
                except EOFError:
                    raise ChildProcessError("a worker process died; the same command goes on where it was") from None
                if isinstance(answer, Exception):
                    raise answer
                if answer is not None:
                    record, shown = answer
                    yield parse(record, "worker"), SHOWN.validate_json(shown) if shown else None
                elif groups:
                    line.send(groups.pop())
                else:
                    line.close()  # which ends the worker
                    lines.remove(line)
    finally:
        for process in running:
            process.kill() if lines else process.join()


def _worker(line: Connection, device: str, core: int | None, timing: bool) -> None:
    """Answer every group of cells with its records one by one, then None; end when the other side is gone."""
    if sys.platform == "linux":  # a killed suite takes its workers with it, in the middle of a cell too
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if core is not None:
        os.sched_setaffinity(0, {core})
    hub.restore()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            cells = line.recv()
            try:
                with device_lock(device) if timing else contextlib.nullcontext():
                    for cell in cells:
                        record, shown = measured(cell, device, timing, show_progress=False)
                        line.send((record.model_dump_json(), shown.model_dump_json() if shown else None))
            except DeviceBusy as busy:
                line.send(busy)
                return
            line.send(None)


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
    named = {name: value for name, value in os.environ.items() if name == hub.VARIABLE}

    def work(fields: dict[str, object], on: str, timed: bool) -> tuple[str, str | None]:
        hub.restore()
        cell = Cell(**fields)  # type: ignore[arg-type]
        with device_lock(on) if timed else contextlib.nullcontext():
            record, shown = measured(cell, on, timed, show_progress=False)
        return record.model_dump_json(), shown.model_dump_json() if shown else None

    remote = cluster.remote(work)
    waiting: dict[object, Cell] = {}
    for cell in cells:
        timed = timing and cell.seed == 0
        told = {"runtime_env": {"env_vars": named}} if named else {}  # the folder lies at the same place on every node
        task = remote.options(num_cpus=whole if timed else 1, num_gpus=gpus, max_retries=2, **told)
        waiting[task.remote(asdict(cell), device, timed)] = cell
    while waiting:
        ready, _ = cluster.wait(list(waiting), num_returns=1)
        for reference in ready:
            cell = waiting.pop(reference)
            record, shown = cluster.get(reference)
            yield parse(record, f"ray:{cell.method}"), SHOWN.validate_json(shown) if shown else None
