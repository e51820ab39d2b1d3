"""Catching plugins that look better than they are, on purpose or by accident.

`listening` hears of threads, processes, files and sockets in every call, `Guard` of random numbers in counted ones. Both
live in the plugin's own process, where a plugin can silence them; what it cannot silence is compared outside
(`stepmark.judge`): same seed same bits in another process, the same work on inputs that nobody has seen, seconds of the
processor that the counts explain. `static_findings` reads the source.
"""

from __future__ import annotations

import _thread
import ast
import contextlib
import os
import random
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from stepmark.syntax import parse

PROCESS_EVENTS = {"subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "pty.spawn"}
THREAD_EVENTS = {"_thread.start_new_thread", "_thread.start_joinable_thread"}
NETWORK_EVENTS = {"socket.connect", "socket.bind", "socket.getaddrinfo"}
LIBRARIES = tuple({sysconfig.get_paths()[k] for k in ("stdlib", "platstdlib", "purelib", "platlib")} | {sys.prefix})

_heard: list[str] | None = None  # the flags of the call that is running
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _heard is None:
        return
    if event in PROCESS_EVENTS:
        _flag(f"starts a process in run ({event}); the harness cannot count there")
    elif event in THREAD_EVENTS:
        _flag("starts a thread in run; the harness cannot count there")
    elif event in NETWORK_EVENTS:
        _flag(f"uses the network in run ({event})")
    elif event == "open" and arguments and isinstance(arguments[0], (str, bytes)):
        path = os.fsdecode(arguments[0])
        mode = arguments[1] if len(arguments) > 1 else "r"
        writes = isinstance(mode, str) and any(c in mode for c in "wax+")
        code = (
            path.endswith((".py", ".pyc", ".so"))
            or path in sys.path
            or path.startswith((*LIBRARIES, "/proc/", "/sys/", "/dev/"))
        )
        if writes or not code:
            _flag(f"opens a file in run ({Path(path).name}); run is a pure function of its arguments")


def _flag(text: str) -> None:
    if _heard is not None and text not in _heard:
        _heard.append(text)


def _install() -> None:
    global _installed
    _installed = True
    sys.addaudithook(_hook)
    started, low = threading.Thread.start, _thread.start_new_thread

    def start(thread: threading.Thread) -> None:  # Python 3.11 raises no audit event for a thread
        _hook("_thread.start_new_thread", ())
        started(thread)

    def start_new_thread(*arguments: Any, **named: Any) -> int:
        _hook("_thread.start_new_thread", ())
        return low(*arguments, **named)

    threading.Thread.start = start  # type: ignore[method-assign, assignment]
    _thread.start_new_thread = start_new_thread


@contextlib.contextmanager
def listening(flags: list[str]) -> Iterator[None]:
    """While inside, processes, threads, files and sockets of the calling code leave a flag: in every call, timed or not."""
    global _heard
    if not _installed:
        _install()
    _heard = flags
    try:
        yield
    finally:
        _heard = None


class Guard:
    """While inside, notes in `flags` random numbers that are not the session's. `rng`/`seed` are the session's.

    Of operators it sees those that somebody shows it, as `count_flops` does.
    """

    def __init__(self, rng: torch.Generator, seed: int, flags: list[str]) -> None:
        self.flags = flags
        self._allowed = {rng.initial_seed(), seed}
        self._seed = seed

    def _flag(self, text: str) -> None:
        if text not in self.flags:
            self.flags.append(text)

    def sees(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """An operator that takes a generator is called with these arguments."""
        generator = kwargs.get("generator")
        if generator is None:
            generator = next((a for a in args if isinstance(a, torch.Generator)), None)
        if generator is not None and generator.initial_seed() not in self._allowed:
            self._flag("draws from a generator of its own in run; use session.rng")

    def __enter__(self) -> Guard:
        self._global_state = _global_random_state()
        self._default_rng = np.random.default_rng
        np.random.default_rng = self._checked_default_rng
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        np.random.default_rng = self._default_rng
        if _global_random_state() != self._global_state:
            self._flag("draws from a global random state in run; use session.rng or session.seed")

    def _checked_default_rng(self, seed: Any = None) -> np.random.Generator:
        first = seed[0] if isinstance(seed, (list, tuple)) and seed else seed
        if first is None or (isinstance(first, (int, np.integer)) and int(first) != self._seed):
            self._flag("seeds numpy with something else than session.seed in run")
        return self._default_rng(seed)


def _global_random_state() -> tuple[bytes, str, str]:
    return (
        torch.random.get_rng_state().numpy().tobytes(),
        repr(np.random.get_state(legacy=True)),
        repr(random.getstate()),
    )


HARNESS = (
    "stepmark.datasets", "sklearn.datasets", "stepmark.run", "stepmark.judge", "stepmark.passes", "stepmark.audit",
)  # fmt: skip
FORBIDDEN = {
    "subprocess": "run must not start processes",
    "multiprocessing": "run must not start processes",
    "threading": "run must not start threads",
    "concurrent": "run must not start threads or processes",
    "socket": "methods have no network",
    "requests": "methods have no network",
    "urllib": "methods have no network",
    "ctypes": "native code cannot be counted",
    "pickle": "state is tensors, saved by the harness as safetensors",
    "gc": "the harness's objects are out of reach",
    "inspect": "the harness's objects are out of reach",
}


def static_findings(path: Path) -> list[str]:
    """What the source alone shows to be against the contract, as `line N: ...` in plain words."""
    findings: list[str] = []
    for node in ast.walk(parse(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
        line = getattr(node, "lineno", 0)
        for name in names:
            root = name.split(".")[0]
            if root in FORBIDDEN:
                findings.append(f"line {line}: imports {name}: {FORBIDDEN[root]}")
            if name.startswith(HARNESS):
                findings.append(f"line {line}: imports {name}: data come from session.train and batch alone")
        if isinstance(node, ast.Global):
            findings.append(f"line {node.lineno}: global {', '.join(node.names)}: run keeps no state between calls")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in {"cuda"}:
                findings.append(f"line {node.lineno}: .cuda(): the device is session.device")
            if node.func.attr == "manual_seed" and ast.unparse(node.func.value) in {"torch", "torch.cuda"}:
                findings.append(f"line {node.lineno}: torch.manual_seed: randomness comes from session.rng")
    return sorted(set(findings))
