"""What is prepared is prepared once: tensors in the cache, under a digest of all that they hang on.

A state into which no random number went is the same for every training seed and is kept once; any other is kept for its
seed. Which it is, the session watches while the state is made; the file says it from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from stepmark import locks
from stepmark.digests import definitions, reach_digest
from stepmark.meter import machine
from stepmark.places import cache_folder

LONGEST_WAIT_S = 1800.0  # for another process that makes the same state
CONTRACT = "3"  # raised when the meaning of a cached state changes
NO_FUNCTION = "session.once takes a function that stands at the top level of a method's file or of a track"
EMPTY, NAME = "empty", "="  # stands for no tensors at all, of which safetensors makes no file; begins every other name


@dataclass(frozen=True)
class Cost:
    """What making a state took: wall seconds, evaluations by handle, updates of optimisers."""

    seconds: float
    evaluations: dict[str, float]
    updates: float = 0.0


@dataclass(frozen=True)
class State:
    """Tensors by name; whether random numbers went into them; what they cost.

    `costs`: of the state itself and of every shared training that it used, by the name of its file: whoever uses a
    training pays for it once, whether it was found or made.
    """

    tensors: dict[str, Tensor]
    drew: bool
    own: Cost
    costs: dict[str, Cost] = field(default_factory=dict)


def path_of(kind: str, name: str, parts: Mapping[str, str]) -> Path:
    """Where a state lies that hangs on `parts`, where no random numbers went into it."""
    beneath = {"contract": CONTRACT, "torch": torch.__version__, "lock": machine.lock_digest() or ""}
    beneath["vector_units"] = torch.backends.cpu.get_cpu_capability()
    digest = hashlib.sha256(json.dumps(dict(parts) | beneath, sort_keys=True).encode()).hexdigest()
    return cache_folder() / kind / f"{name}-{digest[:32]}.safetensors"


def find(path: Path, seed: int) -> Path | None:
    """The file of a state for a training seed, if it has been made."""
    return next((place for place in (path, _of_seed(path, seed)) if place.exists()), None)


def kept(path: Path, seed: int, make: Callable[[], State]) -> State:
    """The state at `path` for a training seed: loaded, or made and stored by one process while others wait."""
    return read(place(path, seed, make))


def place(path: Path, seed: int, make: Callable[[], State]) -> Path:
    """The file of that state, which is made where it is not there or is damaged."""
    with contextlib.ExitStack() as held:
        if not any(path.parent.glob(f"{path.stem}-*.safetensors")):  # else it is known that every seed has its own
            held.enter_context(_locked(path.with_suffix(".lock")))
        own = _of_seed(path, seed)
        held.enter_context(_locked(own.with_suffix(".lock")))
        found = find(path, seed)
        if found is not None:
            try:
                read(found)
                return found
            except (OSError, ValueError, KeyError, TypeError, SafetensorError):
                found.unlink(missing_ok=True)  # a damaged file is none
        state = make()
        found = own if state.drew else path
        _write(found, state)
        return found


def _of_seed(path: Path, seed: int) -> Path:
    return path.with_name(f"{path.stem}-{seed}{path.suffix}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """While one process makes a state, others wait; but not for ever. Two that make the same state do work twice and
    harm nothing: it is put in its place whole."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(locks.Held):
            stack.enter_context(locks.held(path, LONGEST_WAIT_S))
        yield


def _write(path: Path, state: State) -> None:
    from safetensors.torch import save_file

    said = {"drew": state.drew, "own": asdict(state.own), "costs": {k: asdict(v) for k, v in state.costs.items()}}
    temporary = path.with_suffix(f".{locks.here()}-{os.getpid()}")  # caches may be shared by machines
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.tensors.items()}
    named = {f"{NAME}{name}": value for name, value in tensors.items()}
    save_file(named or {EMPTY: torch.zeros(0)}, temporary, metadata={"state": json.dumps(said)})
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(path)


def read(path: Path) -> State:
    """What `kept` has written."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        said = json.loads(handle.metadata()["state"])
        names = [name for name in handle.keys() if name.startswith(NAME)]  # noqa: SIM118 (a handle is no dict)
        tensors = {name.removeprefix(NAME): handle.get_tensor(name) for name in names}
    own = Cost(**said["own"])
    return State(tensors, said["drew"], own, {path.stem: own} | {k: Cost(**v) for k, v in said["costs"].items()})


class Store(Protocol):
    """Who keeps what is prepared. `make` makes it, where nobody has."""

    def prepared(self, path: Path, seed: int, make: Callable[[], State]) -> State:
        """The state of a method for a training seed."""

    def once(self, training: Training, seed: int, make: Callable[[], State]) -> State:
        """The result of a shared training for a training seed."""

    def for_ranks(self) -> Store:
        """The same in the processes that this one starts."""


@dataclass(frozen=True)
class Training:
    """What a shared training is: a function at the top level of a file, its literals as text, and what it hangs on.

    `networks`: digest of the weights of all networks as they stand; `given`: of those of the task alone. `sources`: of
    everything else.
    """

    name: str
    file: Path
    source: str
    literals: str
    networks: str
    given: str
    sources: Mapping[str, str]

    @property
    def path(self) -> Path:
        """Where its result lies."""
        parts = {"source": self.source, "literals": self.literals, "networks": self.networks}
        return path_of("once", self.name, parts | dict(self.sources))


class Cache:
    """The cache folder of this machine, in this process."""

    def prepared(self, path: Path, seed: int, make: Callable[[], State]) -> State:
        """As the protocol says."""
        return kept(path, seed, make)

    def once(self, training: Training, seed: int, make: Callable[[], State]) -> State:
        """As the protocol says."""
        return kept(training.path, seed, make)

    def for_ranks(self) -> Store:
        """Itself."""
        return self


# what a shared training hangs on ----------------------------------------------------------------


def as_literals(literals: tuple[Any, ...]) -> str:
    """Plain literals as text.

    Raises:
        TypeError: something else, whose text would not say what it is.
    """
    for value in literals:
        if not _plain(value):
            raise TypeError(
                f"session.once takes plain literals after the function, not {type(value).__name__}; "
                "give numbers, strings, None, and tuples, lists or dicts of them"
            )
    return repr(literals)


def _plain(value: Any) -> bool:
    if type(value) in {tuple, list}:
        return all(map(_plain, value))
    if type(value) is dict:
        return all(_plain(key) and _plain(each) for key, each in value.items())
    return type(value) in {type(None), bool, int, float, str}


def code_of(function: Callable[..., Any]) -> str:
    """sha256 of what a function at the top level of a file makes happen: its source and what it reaches from there, in
    that file and in the tracks.

    Raises:
        TypeError: a lambda, a method, a function within another.
    """
    function = inspect.unwrap(function)  # a decorator's own file says nothing of what it holds
    name, code = getattr(function, "__name__", ""), getattr(function, "__code__", None)
    path = Path(code.co_filename) if code is not None else Path()
    if code is None:
        raise TypeError(NO_FUNCTION)
    return code_in(path, name)


def code_in(path: Path, name: str) -> str:
    """The same, by the function's file and name."""
    if not path.is_file() or not any(name in each.defined for each in definitions(path)):
        raise TypeError(NO_FUNCTION)
    return f"{name} {reach_digest([(path, [name])])}"
