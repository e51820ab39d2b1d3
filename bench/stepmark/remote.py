"""The harness's ends of the processes of methods: born by the nursery, prepared, called, hung up on.

`ready` gives a `Template`: a method on a task, prepared, in a process of its own; `Template.worker` a `Worker`, which
answers calls for one cell and has never answered any for another. What a worker says is believed as far as
`stepmark.judge` can check it; time and the processor's seconds are read on this side as well.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stepmark import backbones, index, plugins, prepared
from stepmark.cell import digests, size_of, source_digest, track_of
from stepmark.child import state_from_data
from stepmark.literals import MethodInfo
from stepmark.meter import memory
from stepmark.meter.counts import BudgetExceeded
from stepmark.meter.flops import Flops
from stepmark.method import Skip
from stepmark.places import PACKAGE
from stepmark.record import Offline
from stepmark.runner import Call, prepared_path, shared_sources
from stepmark.syntax import PluginError, parse
from stepmark.task import BadOutput, Sealed, digest_of
from stepmark.wire import Closed, Link, WireError

READY = 4  # templates kept for the next cell: a method and its baseline, and what one looks at beside them
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class MethodFailed(Exception):
    """What a plugin raised in its process: kind, words, place; or that the process is gone."""


class Nursery:
    """The process that others are forked from."""

    def __init__(self) -> None:
        self.room = tempfile.mkdtemp(prefix="stepmark-")
        ours, theirs = socket.socketpair()
        environment = dict(os.environ) | dict.fromkeys(ONE_THREAD, "1")
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": self.room}
        environment |= {
            "TRITON_CACHE_DIR": self.room,
            "TORCHINDUCTOR_CACHE_DIR": self.room,
            "CUDA_CACHE_PATH": self.room,
        }
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-m", "stepmark.nursery", str(number)]
            self.process = subprocess.Popen(command, env=environment, pass_fds=[number], stdin=subprocess.DEVNULL)
        self.link = Link(ours)
        self.owner = os.getpid()

    def born(self, request: Mapping[str, Any]) -> tuple[Link, int]:
        """A new process that serves `request`, and its number."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.link.send(dict(request))
            socket.send_fds(self.link.end, [b"."], [theirs.fileno()])
            answer = self.link.receive()
        return Link(ours), int(answer["born"])

    def close(self) -> None:
        """End it and what it left."""
        if os.getpid() != self.owner:
            return
        self.link.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.process.kill()
        shutil.rmtree(self.room, ignore_errors=True)


_nursery: Nursery | None = None


def nursery() -> Nursery:
    """That of this process, started when first asked for."""
    global _nursery
    if _nursery is None or _nursery.owner != os.getpid() or _nursery.process.poll() is not None:
        _nursery = Nursery()
        atexit.register(_nursery.close)
    return _nursery


class Template:
    """A method on a task on a device, prepared with one training seed, in a process of its own.

    Raises:
        Skip, PluginError, MethodFailed: what the plugin raised while it was loaded or prepared.
    """

    def __init__(
        self,
        info: MethodInfo,
        task_id: str,
        tier: str = "embedded",
        device: str = "cpu",
        seed: int = 0,
        show_progress: bool = True,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self.info, self.seed, self.tier, self.device = info, seed, tier, torch.device(device)
        self.track, self.task = track_of(task_id)
        if task_id not in info.tasks:
            raise KeyError(f"{info.id} does not name task {task_id!r}; it names {', '.join(info.tasks)}")
        self.sources = dict(sources or digests(info, self.task))
        self._show_progress = show_progress
        self._close: Callable[[], Any] = lambda: None
        self.link, self.process = self._born("run")
        self._close = weakref.finalize(self, self.link.close)
        said = self._converse(self.link, "ready")
        self.offline = Offline(**said["ready"])
        self.ranks, self.loaded_bytes = int(said["ranks"]), int(said["loaded_bytes"])
        self.bounded = [str(name) for name in said["bounded"]]
        self.forks = self.device.type == "cpu" and self.ranks == 1
        self._attending: Worker | None = None
        self.open = 0  # workers that somebody still asks: they end with their template

    def worker(self) -> Worker:
        """Somebody who answers calls, and has answered none; where processes do not fork, the template itself, with the
        method's module as new."""
        self.open += 1
        if self.forks:
            others = _children(self.process)
            ours, theirs = socket.socketpair()
            with theirs:
                self.link.send({"do": "fork"})
                socket.send_fds(self.link.end, [b"."], [theirs.fileno()])
                _heard(self.link)
            new = [process for process in _children(self.process) if process not in others]
            return Worker(self, Link(ours), new[0] if new else 0)
        if self._attending is None:
            self.link.send({"do": "attend"})
            self._attending = Worker(self, self.link, self.process)
        self._attending.renew()
        return self._attending

    def close(self) -> None:
        """End the process."""
        self._close()

    # -- preparing ----------------------------------------------------------------------------------------------

    def _born(self, role: str, **more: Any) -> tuple[Link, int]:
        ranks = _ranks_of(self.info)
        return nursery().born(
            {
                "role": role,
                "info": index.plain_of(self.info),
                "task": self.task.id,
                "tier": self.tier,
                "device": str(self.device),
                "seed": self.seed,
                "show_progress": self._show_progress,
                "sources": self.sources,
                "networks": sorted(set(self.task.backbones.values())),
                "environment": {key: value for key, value in os.environ.items() if key.startswith("STEPMARK_")},
                "path": list(sys.path),
                "sources_of_tasks": plugins.restorers(),
                "ranks": ranks,
                **more,
            }
        )

    def _converse(self, link: Link, until: str) -> dict[str, Any]:
        """Answer what a process asks, until it says what is waited for."""
        while True:
            message = _heard(link)
            if until in message:
                return message
            try:
                if message.get("ask") == "prepared":
                    answer = {"path": str(self._prepared())}
                elif message.get("ask") == "once":
                    answer = self._once(link, message)
                else:
                    raise MethodFailed(f"the method's process says {sorted(message)[:3]}")
            except Exception as error:
                with contextlib.suppress(WireError):
                    link.send({"failed": type(error).__name__, "says": str(error)})
                raise
            link.send(answer)

    def _prepared(self) -> Path:
        """The file of this method's state: found, or made by a process that does nothing else."""
        path = prepared_path(self.info.id, self.task, self.sources, self.tier, self.device)
        return prepared.place(path, self.seed, partial(self._made, "prepare"))

    def _made(self, role: str, **more: Any) -> prepared.State:
        link, _ = self._born(role, **more)
        try:
            return _state(self._converse(link, "made"))
        finally:
            link.close()

    def _once(self, link: Link, asked: Mapping[str, Any]) -> dict[str, Any]:
        """A shared training. One that stands in a track is run without the plugin that asks, on the networks of the task
        as they are published; one that stands elsewhere is run by who asks, and shared within its file."""
        name, file, said = str(asked["name"]), Path(asked["file"]).resolve(), str(asked["literals"])
        sources = shared_sources(self.task, self.sources, self.tier, self.device)
        source, given = prepared.code_in(file, name), str(asked["given"])
        clean = file.is_relative_to(PACKAGE / "tracks") and given == _published(self.task.backbones, self.device)
        networks = given if clean else f"{asked['networks']} {self.info.path}"
        training = prepared.Training(name, file, source, said, networks, given, sources)

        def make() -> prepared.State:
            if clean:
                return self._made("once", name=name, file=str(file), literals=said)
            link.send({"make": True})
            return _state(self._converse(link, "made"))

        return {"path": str(prepared.place(training.path, self.seed, make))}


class Worker:
    """Answers calls on one method, prepared, on one task. What it says of itself is what its template said."""

    def __init__(self, template: Template, link: Link, process: int) -> None:
        self.template, self.link, self.process = template, link, process
        self.info, self.track, self.task, self.device = template.info, template.track, template.task, template.device
        self.ranks, self.bounded, self.loaded_bytes = template.ranks, template.bounded, template.loaded_bytes
        self.offline = template.offline

    def run(self, batch: Mapping[str, Any], rung: int, seed: int, index: int = 0) -> Call:
        """One call within its budget, by the clocks of both sides.

        Raises:
            BudgetExceeded, BadOutput, Sealed, Skip, MethodFailed: what came of it instead.
        """
        before = processor_ns(self.process)
        self._ask("call", batch, rung, seed, index=index, how="plain")
        _heard(self.link)
        waited, start = _queued_ns(self.process), time.perf_counter_ns()
        self.link.send({"go": True})
        _heard(self.link)
        outside, waited = time.perf_counter_ns() - start, _queued_ns(self.process) - waited
        call = _call(_heard(self.link), outside, _since(before, self.process), waited)
        most = rung * size_of(batch)
        if call.spent > most + 1e-6:
            raise BudgetExceeded.of(call.spent, most, size_of(batch))
        return call

    def counted(self, batch: Mapping[str, Any], rung: int, seed: int, index: int = 0) -> Call:
        """One call under the FLOP counter and the guard."""
        self._ask("call", batch, rung, seed, index=index, how="counted")
        return _call(_heard(self.link))

    def weighed(self, batch: Mapping[str, Any], rung: int, seed: int) -> memory.Memory:
        """The peak of one call above what is loaded."""
        self._ask("weighed", batch, rung, seed)
        return memory.Memory(**_heard(self.link)["memory"])

    def drafts(self, one: Mapping[str, Any], rung: int, seed: int) -> tuple[list[int], list[Any]] | None:
        """A batch of one text decoded while its drafts are listened to (`Runner.drafts`)."""
        self._ask("drafts", one, rung, seed)
        found: tuple[list[int], list[Any]] | None = _heard(self.link)["drafts"]
        return found

    def renew(self) -> None:
        """Globals that an earlier cell left in the method's module are gone."""
        self.link.send({"do": "renew"})
        _heard(self.link)

    def close(self) -> None:
        """Hang up; the template stays."""
        self.template.open -= 1
        if self.link is not self.template.link:
            self.link.close()

    def _ask(self, do: str, batch: Mapping[str, Any], rung: int, seed: int, **more: Any) -> None:
        self.link.send({"do": do, "batch": dict(batch), "rung": rung, "seed": seed, **more})


_KINDS: dict[str, type[Exception]] = {
    "Skip": Skip, "BadOutput": BadOutput, "Sealed": Sealed, "PluginError": PluginError,
}  # fmt: skip


def _heard(link: Link) -> dict[str, Any]:
    """The next message of a process; what it raised is raised here."""
    try:
        message = link.receive()
    except Closed:
        raise MethodFailed("the method's process is gone; it was killed, or ended itself") from None
    except WireError as error:
        raise BadOutput(str(error)) from None
    if not isinstance(message, dict):
        raise MethodFailed("the method's process says nothing that can be understood")
    if "failed" in message:
        kind, says = str(message["failed"]), str(message.get("says", ""))
        placed = f"{says} {message.get('place', '')}".strip()
        if kind == "BudgetExceeded":
            raise BudgetExceeded(placed)
        raise _KINDS[kind](says) if kind in _KINDS else MethodFailed(f"{kind}: {placed}")
    return message


def _call(
    message: Mapping[str, Any], outside_ns: int | None = None, used_ns: int | None = None, queued_ns: int = 0
) -> Call:
    try:
        said = dict(message["call"])
        if said["flops"] is not None:
            said["flops"] = Flops(**said["flops"])
        call = Call(**said, outside_ns=outside_ns, processor_ns=used_ns, queued_ns=queued_ns)
        figures = [call.spent, *call.evaluations.values(), *call.reported.values()]
        figures += [value for each in call.handles.values() for value in each.values()]
        if not all(type(value) in (int, float) and 0 <= value < float("inf") for value in figures):
            raise ValueError("counts that are no counts")
        return call
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MethodFailed(f"the method's process gives no account of its call: {error}") from None


def _state(message: Mapping[str, Any]) -> prepared.State:
    try:
        return state_from_data(message["made"])
    except (KeyError, TypeError, AttributeError) as error:
        raise MethodFailed(f"the method's process hands over no state: {error}") from None


_weights: dict[tuple[Any, ...], str] = {}


def _published(roles: Mapping[str, str], device: torch.device) -> str:
    """Digest of the weights of a task's networks as they are published."""
    key = (tuple(sorted((role, backbones.digest(name)) for role, name in roles.items())), str(device))
    if key not in _weights:
        _weights[key] = digest_of({role: backbones.load(name, device).state_dict() for role, name in roles.items()})
    return _weights[key]


def _ranks_of(info: MethodInfo) -> int:
    """How many processes a method says that it wants, read without running it: only one of several may open connections."""
    if "ranks" in info.overrides:
        return int(info.overrides["ranks"])
    for kind in ast.walk(parse(info.path)):
        if isinstance(kind, ast.ClassDef) and kind.name == info.class_name:
            for each in kind.body:
                targets = each.targets if isinstance(each, ast.Assign) else [getattr(each, "target", None)]
                named = any(isinstance(target, ast.Name) and target.id == "ranks" for target in targets)
                value = getattr(each, "value", None)
                if named and isinstance(value, ast.Constant) and type(value.value) is int:
                    return value.value
    return 1


# the processor's seconds --------------------------------------------------------------------------


def processor_ns(process: int) -> int | None:
    """Nanoseconds of the processor that a process has used, with those of its children; None where the system does not
    say (it does on Linux)."""
    try:
        own = time.clock_gettime_ns((~process << 3) | 2)
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ended = (int(fields[13]) + int(fields[14])) * 10**9 // os.sysconf("SC_CLK_TCK")
        return own + ended + sum(processor_ns(child) or 0 for child in _children(process))
    except (OSError, IndexError, ValueError):
        return None


def _queued_ns(process: int) -> int:
    """Nanoseconds that a process and this one have waited for a processor, which on a busy machine is most of the time; 0
    where the system does not say."""
    found = 0
    for each in ("self", process):
        with contextlib.suppress(OSError, IndexError, ValueError):
            found += int(Path(f"/proc/{each}/schedstat").read_text().split()[1])
    return found


def _children(process: int) -> list[int]:
    """Processes that a process has started; [] where the system does not say."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def _since(before: int | None, process: int) -> int | None:
    after = processor_ns(process)
    return None if before is None or after is None else after - before


# templates that are kept ------------------------------------------------------------------------

_ready: OrderedDict[tuple[Any, ...], Template] = OrderedDict()


def ready(
    info: MethodInfo,
    task_id: str,
    tier: str,
    device: str,
    seed: int = 0,
    show_progress: bool = True,
    sources: Mapping[str, str] | None = None,
) -> Template:
    """A template that is kept for the next cell, as long as neither the method's file nor anything else has changed that
    its state hangs on. One whose preparation draws no random numbers serves every seed."""
    sources = sources or digests(info, track_of(task_id)[1])
    same = (info.id, task_id, tier, device, source_digest(info.path), os.getpid(), *sorted(sources.items()))
    for key in ((*same, None), (*same, seed)):
        if key in _ready:
            _ready.move_to_end(key)
            return _ready[key]
    for key in [key for key, kept in _ready.items() if not kept.open][: max(0, len(_ready) + 1 - READY)]:
        _ready.pop(key).close()  # the longest unused; who is asked in this very cell stays
    made = Template(info, task_id, tier, device, seed, show_progress, sources)
    _ready[(*same, made.offline.seed)] = made
    return made


def forget() -> None:
    """Keep no template: what a plugin left behind must not reach the next cell."""
    while _ready:
        _ready.popitem()[1].close()
