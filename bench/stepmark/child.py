"""What happens in the processes of a method: each is a fork of the nursery, and talks to the harness over one socket.

There are three kinds, by what is asked of them:
- *prepare*: runs `networks` and `prepare`, hands the state over and ends;
- *once*: runs a training that stands in a track, without the plugin that asks for it, so that nobody else's result can be
  spoilt by it;
- *run*: holds the prepared method, has never called it, and forks a process of its own for every cell, which answers
  calls. Where processes cannot be forked (CUDA, methods on several processes) it answers them itself.

None of them has a cache or results that it could write, a test split or a metric. Everything that leaves is plain data.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import os
import random
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from stepmark import confine, devices, index, places, task
from stepmark.method import Method
from stepmark.prepared import Cost, State, Store, Training, code_of, read
from stepmark.runner import Call, Runner, prepare_seed
from stepmark.wire import Closed, Link, WireError


def serve(end: socket.socket, request: Mapping[str, Any]) -> NoReturn:
    """The life of a process of a method. Leaves without clean-up: nothing in it is worth saving."""
    link = Link(end)
    try:
        _settle_in(request)
        _LIVES[request["role"]](link, request)
    except (Closed, KeyboardInterrupt):
        pass
    except BaseException as error:
        with contextlib.suppress(Exception):
            link.send(failure(error, request["info"]["path"]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _settle_in(request: Mapping[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the harness, which hangs up
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    confine.end_with_parent()
    for name in [name for name in os.environ if name.startswith("STEPMARK_")]:
        del os.environ[name]
    os.environ.update(request["environment"])
    sys.path[:] = request["path"]
    devices.settle()
    several = request["ranks"] > 1
    room = [os.environ["TMPDIR"], os.devnull, *(["/dev"] if several or request["device"] != "cpu" else [])]
    confine.confined(room, network=several)
    for module in request["sources_of_tasks"]:
        importlib.import_module(module).restore()
    task.seal()


def failure(error: BaseException, path: str) -> dict[str, Any]:
    """An exception as a message: its kind, its words, where in the plugin's file it was raised."""
    place, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            place = f"({Path(path).name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return {"failed": type(error).__name__, "says": str(error)[:4000], "place": place}


# preparing --------------------------------------------------------------------------------------


def state_as_data(state: State) -> dict[str, Any]:
    """A state to send."""
    costs = {name: asdict(cost) for name, cost in state.costs.items()}
    return {"tensors": dict(state.tensors), "drew": state.drew, "own": asdict(state.own), "costs": costs}


def state_from_data(said: Mapping[str, Any]) -> State:
    """A state that was sent.

    Raises:
        TypeError, KeyError: it is none.
    """
    tensors = said["tensors"]
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise TypeError("prepare returned something else than tensors")
    costs = {str(name): Cost(**cost) for name, cost in said["costs"].items()}
    return State(tensors, bool(said["drew"]), Cost(**said["own"]), costs)


class Asking:
    """The store of a process that has none: the harness keeps what is prepared, and is asked for it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.found: Path | None = None

    def prepared(self, path: Path, seed: int, make: Callable[[], State]) -> State:
        """Where a state lies by its sources is for the harness to say."""
        self.found = Path(self._ask({"ask": "prepared"})["path"])
        return read(self.found)

    def once(self, training: Training, seed: int, make: Callable[[], State]) -> State:
        """Found, made by somebody clean, or to be made here."""
        said = {"name": training.name, "file": str(training.file), "literals": training.literals}
        answer = self._ask({"ask": "once", **said, "networks": training.networks, "given": training.given})
        if "path" not in answer:
            answer = self._ask({"made": state_as_data(make())})
        return read(Path(answer["path"]))

    def for_ranks(self) -> Store:
        """They read what this process was told of, and ask nobody."""
        return _Given(self.found)

    def _ask(self, question: dict[str, Any]) -> Any:
        self.link.send(question)
        answer = self.link.receive()
        if "failed" in answer:
            raise RuntimeError(answer["says"])
        return answer


class _Making(Asking):
    """Of the process that prepares: it is the one who makes the state."""

    def prepared(self, path: Path, seed: int, make: Callable[[], State]) -> NoReturn:
        self.link.send({"made": state_as_data(make())})
        raise Closed


class _Given:
    """Of further ranks: the state that rank 0 was given. By now it has been found."""

    def __init__(self, found: Path | None) -> None:
        self._found = found

    def prepared(self, path: Path, seed: int, make: Callable[[], State]) -> State:
        assert self._found is not None
        return read(self._found)

    def once(self, training: Training, seed: int, make: Callable[[], State]) -> State:
        raise AssertionError("a rank prepares nothing")

    def for_ranks(self) -> Store:
        return self


def _runner(request: Mapping[str, Any], store: Store, kind: type[Runner] = Runner) -> Runner:
    return kind(
        index.info_of(request["info"]),
        request["task"],
        request["tier"],
        request["device"],
        request["seed"],
        request["show_progress"],
        sources=request["sources"],
        store=store,
    )


def _prepare(link: Link, request: Mapping[str, Any]) -> None:
    _runner(request, _Making(link))


class _Nobody(Runner):
    """The networks and data of a task, without a method."""

    def _load(self) -> Method:
        return Method()


def _once(link: Link, request: Mapping[str, Any]) -> None:
    """Run a training of a track."""
    stem = Path(request["file"]).relative_to(places.PACKAGE.parent).with_suffix("")
    parts = stem.parts if stem.name != "__init__" else stem.parent.parts
    function = getattr(importlib.import_module(".".join(parts)), request["name"])
    literals = ast.literal_eval(request["literals"])
    host = _runner(request, Asking(link), _Nobody)
    host.session.begin("networks", prepare_seed(host.task, host.seed))
    host.session.advance("prepare")
    state = host.session.made(f"{code_of(function)}{request['literals']}", lambda: function(host.session, *literals))
    link.send({"made": state_as_data(state)})


# running ----------------------------------------------------------------------------------------


def _run(link: Link, request: Mapping[str, Any]) -> None:
    """Get ready, then fork for every cell, or attend to calls here."""
    runner = _runner(request, Asking(link))
    gc.collect()
    gc.freeze()  # what is loaded stays: the collector, which runs before every measurement, need not look at it again
    link.send(
        {
            "ready": runner.offline.model_dump(),
            "ranks": runner.ranks,
            "bounded": list(runner.bounded),
            "loaded_bytes": runner.loaded_bytes,
        }
    )
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended cells leave no trace
    while link.receive()["do"] != "attend":
        _, ends, _, _ = socket.recv_fds(link.end, 1, 1)
        sys.stdout.flush()  # else both would write what stands in its buffer
        if os.fork() == 0:
            link.close()
            link = Link(socket.socket(fileno=ends[0]))
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            confine.end_with_parent()
            attend(link, runner)
            return
        os.close(ends[0])
        link.send({"born": True})
    attend(link, runner)


def attend(link: Link, runner: Runner) -> None:
    """Answer calls until nobody asks any more."""
    chance = secrets.randbits(32)  # whoever draws from a global stream gets something else in every process
    torch.manual_seed(chance)
    np.random.seed(chance)
    random.seed(chance)
    while True:
        message = link.receive()
        try:
            answer = _DOES[message["do"]](link, runner, message)
        except (Closed, KeyboardInterrupt):
            raise
        except BaseException as error:
            answer = failure(error, str(runner.info.path))
        try:
            link.send(answer)
        except Closed:
            raise
        except WireError as error:
            link.send(failure(error, str(runner.info.path)))


def _call(link: Link, runner: Runner, message: Mapping[str, Any]) -> dict[str, Any]:
    """One call, in three steps, so that the harness's clock can stand around the middle one: the batch is taken and the
    call begins; it goes; the outputs are given."""
    batch, rung, seed, at = _batch(runner, message), message["rung"], message["seed"], message["index"]
    if message["how"] == "counted":
        call = runner.counted(batch, rung, seed, at)
    else:
        runner.begin(batch, rung, seed, at)
        link.send({"taken": True})
        link.receive()
        try:
            call = runner.go(batch, rung)
        except Exception as error:  # the harness waits for the end of the call first
            link.send({"ns": 0})
            return failure(error, str(runner.info.path))
        link.send({"ns": call.ns})
    return {"call": call_as_data(call)}


def call_as_data(call: Call) -> dict[str, Any]:
    """A call to send."""
    figures = {
        name: value for name, value in vars(call).items() if name not in ("outside_ns", "processor_ns", "queued_ns")
    }
    return figures | {"flops": None if call.flops is None else asdict(call.flops)}


def _batch(runner: Runner, message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _to(value, runner.device) for key, value in message["batch"].items()}


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [_to(each, device) for each in value] if type(value) is list else value


def _weighed(link: Link, runner: Runner, message: Mapping[str, Any]) -> dict[str, Any]:
    return {"memory": asdict(runner.weighed(_batch(runner, message), message["rung"], message["seed"]))}


def _drafts(link: Link, runner: Runner, message: Mapping[str, Any]) -> dict[str, Any]:
    return {"drafts": runner.drafts(_batch(runner, message), message["rung"], message["seed"])}


def _renew(link: Link, runner: Runner, message: Mapping[str, Any]) -> dict[str, Any]:
    runner.renew()
    return {"renewed": True}


_LIVES = {"run": _run, "prepare": _prepare, "once": _once}
_DOES = {"call": _call, "weighed": _weighed, "drafts": _drafts, "renew": _renew}
