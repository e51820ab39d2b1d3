"""Where cells run: here, in worker processes on this machine, or on a Ray cluster.

All yield the same records and samples; the caller writes. A cell that is timed has its device to itself: on this
machine by a lock for each core or GPU, on Ray by taking every CPU (and a GPU) of a node. Locks are taken before anything
is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from multiprocessing.connection import Connection, wait
from typing import Any

from stepmark import devices, hub, locks
from stepmark.cell import Cell
from stepmark.meter import machine
from stepmark.record import Record, parse
from stepmark.run import measured
from stepmark.samples import SHOWN, Shown

Made = tuple[Record, Shown | None]


class DeviceBusy(Exception):
    """Another run is timing on this device. One line that says which process and what to do."""


def _lock_names(device: str, cores: Sequence[int]) -> list[str]:
    """One lock per accelerator, by what it is and not by the number that this process gives it; or per core: pinned runs
    may share a CPU, not a core."""
    if devices.kind_of(device) == "cpu":
        return [f"cpu{core}" for core in cores]
    return [f"gpu-{uuid}" if (uuid := devices.uuid_of(device)) else devices.named(device).replace(":", "")]


@contextlib.contextmanager
def device_lock(device: str, cores: Sequence[int] | None = None) -> Iterator[None]:
    """Hold a device for timing; of the CPU these cores, or all that this process may be on.

    Raises:
        DeviceBusy: another process holds it, or one of its cores. ValueError: no such device, or no locks here.
    """
    names = _lock_names(device, machine.cores() if cores is None else cores)
    with contextlib.ExitStack() as stack:
        for name in names:
            try:
                stack.enter_context(locks.held(locks.folder() / f"timing-{locks.here()}-{name}.lock"))
            except locks.Held as holder:
                raise DeviceBusy(f"{holder} is timing on {device}; wait for it, or run with --no-timing") from None
        yield


def local(cells: Iterable[Cell], device: str, timing: bool) -> Iterator[Made]:
    """Run cells one after the other in this process.

    Raises:
        ValueError: no such device. DeviceBusy: timing is wanted and another process is timing on the device.
    """
    device = devices.named(device)
    with device_lock(device) if timing else contextlib.nullcontext():
        for cell in cells:
            yield measured(cell, device, timing)


def available(device: str) -> int:
    """How many workers `pool` can give a device each: cores that this process may use, or GPUs. A device that is named by
    its number is one.

    Raises:
        ValueError: no such device.
    """
    one = devices.named(device)
    if one == "cpu":
        return machine.usable_cores()
    return 1 if device == one else devices.count(device)


def workers_of(device: str, workers: int) -> int:
    """How many workers are meant; 0: as many as there are devices for.

    Raises:
        ValueError: fewer than none, or more than there are devices for.
    """
    most = available(device)
    if not 0 <= workers <= most:
        raise ValueError(f"--workers {workers}: this machine offers 1 to {most} on {device}, 0 means all of them")
    return workers or most


def pool(cells: Iterable[Cell], device: str, timing: bool, workers: int) -> Iterator[Made]:
    """Run cells in worker processes, each pinned to a core of its own (or with a GPU of its own), as they come free.

    The cells of one method on one task stay with one worker, which prepares once. Cores share caches and memory
    bandwidth: for figures to publish, one worker is the quieter choice.

    Raises:
        ValueError: more workers than devices. DeviceBusy: timing is wanted and another process is timing on a core.
        ChildProcessError: a worker was killed.
    """
    workers = workers_of(device, workers)
    groups = [list(group) for _, group in groupby(cells, key=lambda cell: (cell.method, cell.task))]
    groups.reverse()  # taken from the end
    context = multiprocessing.get_context("spawn")  # a forked torch is not safe on CUDA
    one, cores = devices.named(device), machine.cores()
    lines: list[Connection] = []
    running = []
    try:
        for index in range(min(workers, len(groups))):
            line, far = context.Pipe()
            gpu = one if device == one else f"{devices.kind_of(one)}:{index}"
            place = (one, cores[index]) if one == "cpu" else (gpu, None)
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
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    hub.restore()
    with contextlib.ExitStack() as stack, contextlib.suppress(EOFError, KeyboardInterrupt):
        try:
            if timing:  # from the first cell to the last: nobody is to come in between two groups
                stack.enter_context(device_lock(device, None if core is None else [core]))
        except (DeviceBusy, ValueError) as refusal:
            line.send(refusal)
            return
        while True:
            for cell in line.recv():
                line.send(_as_text(measured(cell, device, timing, show_progress=False)))
            line.send(None)


def _as_text(made: Made) -> tuple[str, str | None]:
    """What travels from another process."""
    record, shown = made
    return record.model_dump_json(), shown.model_dump_json() if shown else None


# Ray --------------------------------------------------------------------------------------------


def ray(cells: Iterable[Cell], device: str, timing: bool, address: str | None = None) -> Iterator[Made]:
    """Run cells on a Ray cluster (a local one when `address` is None), yielding what they give as it arrives.

    A timed cell (seed 0) has a node to itself: it takes all its CPUs, one such cell at a time. When none of these are
    left to begin, the others take one CPU each. On CUDA each cell takes one GPU. Nodes without a CPU (a head that only
    schedules) or, on CUDA, without a GPU have no part in it. Every node needs the same Stepmark installed.

    Raises:
        ModuleNotFoundError: no Ray. ValueError: no node can run a cell. DeviceBusy: somebody is timing on a node.
        ChildProcessError: a node was lost, or is not set up.
    """
    cluster = _cluster(address)
    nodes = _nodes(cluster, device)
    timed = deque(cell for cell in cells if timing and cell.seed == 0)
    others = [cell for cell in cells if not (timing and cell.seed == 0)]

    def work(fields: dict[str, Any], alone: bool) -> tuple[str, str | None]:
        hub.restore()
        one = devices.named(device)
        with device_lock(one) if alone else contextlib.nullcontext():
            return _as_text(measured(Cell(**fields), one, alone, show_progress=False))

    # A checkpoint's folder lies at the same place on every node.
    named = {name: value for name, value in os.environ.items() if name == hub.VARIABLE}
    told: dict[str, Any] = {"runtime_env": {"env_vars": named}} if named else {}
    told |= {"num_gpus": int(device != "cpu"), "max_retries": 2}
    remote = cluster.remote(work)
    free = list(nodes)
    running: dict[Any, tuple[Cell, str | None]] = {}
    try:
        while timed or others or running:
            while timed and free:
                cell, node = timed.popleft(), free.pop(0)
                alone = {"num_cpus": nodes[node], "scheduling_strategy": _on(node), **told}
                running[remote.options(**alone).remote(asdict(cell), True)] = cell, node
            if not timed:
                beside = remote.options(num_cpus=1, **told)
                running |= {beside.remote(asdict(cell), False): (cell, None) for cell in others}
                others = []
            ready, _ = cluster.wait(list(running), num_returns=1)
            for reference in ready:
                cell, had = running.pop(reference)
                free += [had] if had else []
                record, shown = _answer(cluster, reference, f"{cell.method} on {cell.task}")
                yield parse(record, f"ray:{cell.method}"), SHOWN.validate_json(shown) if shown else None
    finally:
        for reference in running:  # nobody waits for them any more
            cluster.cancel(reference, force=True)


def ray_machines(device: str, address: str | None = None) -> set[str]:
    """The ids that cells get on the nodes of a cluster: what a record there is filed under, whatever this machine is.

    Raises: as `ray`.
    """
    cluster = _cluster(address)
    ask = cluster.remote(machine.machine_ids)
    asked = [ask.options(num_cpus=0, scheduling_strategy=_on(node)).remote(device) for node in _nodes(cluster, device)]
    return set().union(*(_answer(cluster, reference, "a node's name") for reference in asked))


def _cluster(address: str | None) -> Any:
    """The module `ray`, connected."""
    import ray as cluster

    if not cluster.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cores = None if address or "RAY_ADDRESS" in os.environ else machine.usable_cores()  # of a cluster made here
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        try:
            cluster.init(address=address, num_cpus=cores, **quiet)
        except ConnectionError as error:
            raise ValueError(f"--address {address}: no Ray cluster answers there ({error})") from None
    return cluster


def _nodes(cluster: Any, device: str) -> dict[str, float]:
    """CPUs of every node that can run a cell on the device, by the node's id."""
    if device not in {"cpu", "cuda"}:
        raise ValueError(f"--device {device}: Ray says which device of its kind a cell gets; say cpu or cuda")
    found = {}
    for node in cluster.nodes():
        has = node["Resources"]
        if node["Alive"] and has.get("CPU", 0.0) >= 1 and (device == "cpu" or has.get("GPU", 0.0) >= 1):
            found[str(node["NodeID"])] = float(has["CPU"])
    if not found:
        raise ValueError(f"no node of the Ray cluster offers a CPU{'' if device == 'cpu' else ' and a GPU'}")
    return found


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _answer(cluster: Any, reference: Any, what: str) -> Any:
    """What a task gave. What it raised arrives wrapped: our own refusals are unwrapped, all else is said in one line."""
    try:
        return cluster.get(reference)
    except cluster.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, DeviceBusy | ValueError):
            raise cause from None
        lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
        said = lines[-1][:300] if lines else type(error).__name__
        raise ChildProcessError(f"Ray: {what}: {said}; the same command goes on where it was") from None
