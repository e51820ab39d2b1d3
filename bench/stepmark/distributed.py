"""Methods that run on several processes at once: the group they talk through, and the processes themselves.

A method whose class says `ranks = N` is called N times at once, in N processes that hold a copy of the networks, the
state and the batch each: rank 0 is the process that measures, the others are started, fed and ended here. All run the
same `run`, tell themselves apart by `session.group.rank` and exchange tensors by `session.group` alone, which counts the
bytes. What rank 0 returns is the output of the call. Gloo carries the tensors on CPUs, NCCL on CUDA devices, of which
every rank has its own.

A worker ends when it is told to, when it fails and when the process that started it is gone; a call in which any rank
fails ends all of them, and the next call starts new ones.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib
import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from stepmark import devices
from stepmark.meter.counts import Entry, Ledger, Traffic
from stepmark.task import skip

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from stepmark.meter.flops import Flops

START_SECONDS, EXCHANGE_SECONDS, END_SECONDS, GRACE_SECONDS = 300.0, 60.0, 5.0, 1.0
SENT = "sent"  # handle of the traffic: its figures stand in a record as sent_bytes and sent_messages per item


class RankFailed(RuntimeError):
    """A process of a distributed method failed or died. One line that names the rank and why."""


class Lost(RuntimeError):
    """An exchange broke off: another rank has failed, which says why."""


class Exchange:
    """Tensors on their way between the ranks."""

    def __init__(
        self, group: Group, work: Any, buffers: tuple[Tensor, Tensor] | None, received: dict[int, Tensor]
    ) -> None:
        self._group, self._work, self._buffers, self._received = group, work, buffers, received

    def wait(self) -> dict[int, Tensor]:
        """What each of the other ranks sent, by rank, as soon as all of it is here."""
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise Lost(str(error)) from None
            self._group._open.discard(self)
            self._work = self._buffers = None
        return self._received


class Group:
    """The ranks of a method, as one of them sees it: `session.group`. Alone (size 1) where a method has one process.

    Attributes:
        rank, size: which of how many.
    """

    def __init__(self, rank: int = 0, size: int = 1, backend: Any = None, ledger: Ledger | None = None) -> None:
        self.rank, self.size = rank, size
        self._backend, self._ledger = backend, ledger
        self._open: set[Exchange] = set()

    @property
    def others(self) -> list[int]:
        """All ranks but this one."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def exchange(self, parts: Mapping[int, Tensor]) -> Exchange:
        """Start to send each rank of `parts` a tensor and to receive one of the same shape and type from it; returns at
        once. A rank that sends nothing to another gets nothing from it, so that both must list each other. All ranks
        make their exchanges in the same order.
        """
        return self._start(parts, parts)

    def gather(self, part: Tensor) -> list[Tensor]:
        """The parts of all ranks, equal in shape, in the order of the ranks. Waits for them."""
        got = self.exchange(dict.fromkeys(self.others, part)).wait()
        return [got.get(rank, part) for rank in range(self.size)]

    def spread(self, tensor: Tensor, source: int) -> Tensor:
        """The tensor that rank `source` gives, on every rank; the others give one of its shape. Waits for it."""
        if self.rank == source:
            self._start(dict.fromkeys(self.others, tensor), {}).wait()
            return tensor
        return self._start({}, {source: tensor}).wait()[source]

    def _start(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> Exchange:
        """Send tensors, receive tensors shaped like those of `incoming`: one collective call of all ranks."""
        if self.rank in outgoing:
            raise ValueError(f"rank {self.rank} cannot send to itself")
        if self.size == 1:
            return Exchange(self, None, None, {})
        given = next(iter((outgoing or incoming).values()), torch.zeros(0))
        out, into = (
            [parts[r].numel() if r in parts else 0 for r in range(self.size)] for parts in (outgoing, incoming)
        )
        sent = torch.cat([given.new_empty(0), *(outgoing[rank].reshape(-1) for rank in sorted(outgoing))])
        got = sent.new_empty(sum(into))
        work = self._backend.alltoall_base(got, sent, into, out)
        if self._ledger is not None:
            traffic = self._ledger.entries[SENT]
            assert isinstance(traffic, Traffic)
            traffic.messages += len(outgoing)
            traffic.bytes += sent.numel() * sent.element_size()
        pieces = got.split(into)
        started = Exchange(self, work, (sent, got), {r: pieces[r].view(like.shape) for r, like in incoming.items()})
        self._open.add(started)
        return started

    def finish(self) -> None:
        """Harness only: wait for every exchange that was started and never asked for."""
        for started in list(self._open):
            started.wait()


@dataclass
class Report:
    """What a worker tells of its part in a call."""

    entries: dict[str, Entry]
    flops: Flops | None = None
    flags: list[str] = field(default_factory=list)


class Worker(Protocol):
    """What a rank does its part with; `stepmark.runner.Runner` is one."""

    device: torch.device
    ledger: Ledger
    session: Any

    def begin(self, batch: Mapping[str, Any], rung: int, seed: int, index: int = 0) -> None:
        """Take a job."""

    def take_part(self, batch: Mapping[str, Any], rung: int, counting: bool) -> Report:
        """Do it."""
        ...


def device_of(device: torch.device, rank: int) -> torch.device:
    """The device of a rank: on CUDA one each."""
    return torch.device(device.type, rank) if device.type == "cuda" else device


def _store(size: int, port: int = 0) -> dist.TCPStore:
    """Where the ranks meet: a port of this machine, served by rank 0, which opens it."""
    limit = dt.timedelta(seconds=START_SECONDS)
    return dist.TCPStore("127.0.0.1", port, size, port == 0, timeout=limit, wait_for_workers=False)


def _backend(device: torch.device, store: dist.TCPStore, rank: int, size: int) -> Any:
    """Join the group. Not the default group of the process: it may be in several."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = dt.timedelta(seconds=EXCHANGE_SECONDS)
        return dist.ProcessGroupNCCL(store, rank, size, options)
    gloo: Any = dist.ProcessGroupGloo  # its options are not in the type stubs
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = dt.timedelta(seconds=EXCHANGE_SECONDS)
    return gloo(store, rank, size, options)


class Pool:
    """The processes of ranks 1, 2, ... of one method on one task. `start` makes rank 0 a member too.

    `make(device=, rank=, show_progress=)` makes a `Worker`, in the process of that rank, after `restore()` of the modules
    `sources` has been called there: what stands in this process besides the plugins.
    """

    def __init__(
        self, make: Callable[..., Worker], device: torch.device, ranks: int, sources: Sequence[str] = ()
    ) -> None:
        if device.type == "cuda" and torch.cuda.device_count() < ranks:
            skip(f"needs {ranks} CUDA devices, there are {torch.cuda.device_count()}")
        self.make, self.device, self.ranks, self.sources = make, device, ranks, sources
        self.reports: list[Report] = []
        self._group: Group | None = None  # while the processes run
        self._closer: Callable[[], Any] = lambda: None
        self._links: list[Connection] = []
        self._processes: list[BaseProcess] = []

    def start(self, ledger: Ledger) -> Group:
        """Start the processes, unless they run, and return rank 0's group."""
        if self._group is not None:
            return self._group
        context: Any = multiprocessing.get_context(
            "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        )
        if context.get_start_method() == "forkserver":  # seconds of imports once, not in every process
            context.set_forkserver_preload(["stepmark.runner", "diffusers.models.unets.unet_2d"])
        links: list[Connection] = []
        processes: list[BaseProcess] = []
        self._links, self._processes = links, processes
        self._closer = weakref.finalize(self, _end, links, processes)  # also when this process ends in good order
        try:
            store = _store(self.ranks)
            environment = {key: value for key, value in os.environ.items() if key.startswith("STEPMARK_")}
            for rank in range(1, self.ranks):
                ours, theirs = context.Pipe()
                links.append(ours)
                device = str(device_of(self.device, rank))
                arguments = (theirs, self.make, device, rank, self.ranks, store.port, environment, self.sources)
                process = context.Process(target=_serve, args=arguments, name=f"stepmark rank {rank}", daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
            for rank in range(1, self.ranks):
                self._hear(rank, START_SECONDS)
            self._group = Group(0, self.ranks, _backend(self.device, store, 0, self.ranks), ledger)
        except BaseException:
            self.close(at_once=True)
            raise
        return self._group

    def close(self, at_once: bool = False) -> None:
        """End the processes; at once where they may wait for something that will not come."""
        for process in self._processes if at_once else []:
            process.kill()
        self._closer()
        self._group = None

    def give(self, *job: Any) -> None:
        """Hand every worker the arguments of `Worker.begin` for the next call, outside the clock."""
        batch, *rest = job
        plain = {key: value.cpu().numpy() if isinstance(value, Tensor) else value for key, value in batch.items()}
        for link in self._links:
            try:
                link.send((plain, *rest))
            except OSError as error:
                raise self._culprit(str(error)) from None

    def call(self, run: Callable[[], Any], ledger: Ledger) -> Any:
        """Rank 0's part of a call while the workers do theirs; adds what they counted to `ledger`."""
        counting = ledger.flops_now is not None
        try:
            for link in self._links:
                link.send(counting)
            outputs = run()
            if self._group is not None:
                self._group.finish()
            self.reports = [self._hear(rank, EXCHANGE_SECONDS) for rank in range(1, self.ranks)]
        except RankFailed:
            raise
        except (Lost, OSError) as error:
            raise self._culprit(str(error)) from None
        except BaseException:
            self.close(at_once=True)
            raise
        for report in self.reports:
            for name, entry in report.entries.items():
                ledger.entries[name].join(entry)
        return outputs

    def _hear(self, rank: int, seconds: float) -> Any:
        """The next message of a worker."""
        link = self._links[rank - 1]
        try:
            kind, content = link.recv() if link.poll(seconds) else ("failed", f"says nothing for {seconds:g} s")
        except (EOFError, OSError) as error:
            raise self._culprit(str(error)) from None
        if kind == "failed":
            self.close(at_once=True)
            raise RankFailed(f"rank {rank} of {self.ranks}: {content}")
        return content

    def _culprit(self, fault: str) -> RankFailed:
        """End the processes and say which rank failed first: the others only lost an exchange with it."""
        found = []
        for rank, (link, process) in enumerate(zip(self._links, self._processes, strict=True), 1):
            with contextlib.suppress(EOFError, OSError):
                while link.poll(GRACE_SECONDS):
                    kind, content = link.recv()
                    if kind == "failed":
                        found.append((rank, content))
            process.join(GRACE_SECONDS)
            if process.exitcode not in (None, 0, 1):
                found.append((rank, f"died (exit code {process.exitcode})"))
        self.close(at_once=True)
        found.sort(key=lambda reason: reason[1].startswith("Lost"))
        return RankFailed(f"rank {found[0][0]} of {self.ranks}: {found[0][1]}" if found else f"lost a rank: {fault}")


def _end(links: list[Connection], processes: list[BaseProcess]) -> None:
    """Tell the workers to end, and make sure of it."""
    for link in links:
        with contextlib.suppress(OSError):
            link.send(None)
            link.close()
    for process in processes:
        process.join(END_SECONDS if process.is_alive() else 0)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(
    link: Connection,
    make: Callable[..., Worker],
    device: str,
    rank: int,
    size: int,
    port: int,
    environment: dict[str, str],
    sources: Sequence[str],
) -> None:
    """A worker's life. It leaves without clean-up: nothing of it is worth saving, and a broken group would wait."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the process that started this one
    os.environ.update(environment)
    devices.settle()
    code = 1
    try:
        for module in sources:
            importlib.import_module(module).restore()
        worker = make(device=device, rank=rank, show_progress=False)
        link.send(("ready", None))
        backend = _backend(worker.device, _store(size, port), rank, size)
        worker.session.group = Group(rank, size, backend, worker.ledger)
        _work(link, worker)
        code = 0
    except (EOFError, KeyboardInterrupt):
        pass
    except BaseException as error:
        with contextlib.suppress(OSError):
            link.send(("failed", " ".join(f"{type(error).__name__}: {error}".split())[:500]))
    finally:
        os._exit(code)


def _work(link: Connection, worker: Worker) -> None:
    """Take jobs and do them, until told to end. A job that is followed by another was called off."""
    batch: dict[str, Any] = {}
    while (message := link.recv()) is not None:
        if isinstance(message, tuple):
            plain, *rest = message
            batch = {
                key: torch.from_numpy(value).to(worker.device) if hasattr(value, "dtype") else value
                for key, value in plain.items()
            }
            worker.begin(batch, *rest)
            rung = rest[0]
        else:
            link.send(("done", worker.take_part(batch, rung, counting=message)))
