"""Counts that the harness takes itself: network evaluations, simulator calls, positions, layers (FLOPs: `flops.py`).

Every costly thing a method can reach is watched by a `Ledger`. A network is counted by replacing `forward` on the
instance, so that `net(x)`, `net.forward(x)` and a `deepcopy` of it all count; where a track names the layers of a
network, an evaluation is all of them once, and a call that runs some of them costs its share.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

ALL = ""  # the name of all handles together


class BudgetExceeded(Exception):
    """A `run` call asked for more than its rung allows."""

    @classmethod
    def of(cls, spent: float, limit: float, items: int = 0) -> BudgetExceeded:
        """What was asked and what was allowed, over a batch of `items` (0: not known)."""
        allowed = f"rung {limit / items:g} x {items} items = {limit:g}" if items else f"{limit:g}"
        said = f"{spent:g} evaluations asked of a batch that may spend {allowed}"
        return cls(f"{said}; session.spent counts them, session.limit is what a call of run may spend")


@dataclass
class Entry:
    """What was asked of one handle: calls, rows (items over all calls), positions (rows x sequence length)."""

    calls: int = 0
    rows: float = 0
    positions: float = 0
    layers: int = 0  # how many layers make one evaluation; 0: a call of `forward` is one
    layer_calls: int = 0
    layer_rows: float = 0
    layer_positions: float = 0

    @property
    def evaluations(self) -> float:
        """Evaluations, item by item: rows of `forward`, or layer rows / layers."""
        return self.layer_rows / self.layers if self.layers else float(self.rows)

    def as_dict(self) -> dict[str, float]:
        """The figures that go into a record."""
        positions = self.layer_positions / self.layers if self.layers else float(self.positions)
        figures = {"calls": float(self.calls), "evaluations": self.evaluations, "positions": positions}
        return figures | ({"layer_evaluations": float(self.layer_rows)} if self.layers else {})

    def join(self, other: Entry) -> None:
        """Add what another rank asked of its copy of the handle, at the same time: the calls do not follow each other."""
        self.calls = max(self.calls, other.calls)
        self.layer_calls = max(self.layer_calls, other.layer_calls)
        self.rows += other.rows
        self.positions += other.positions
        self.layer_rows += other.layer_rows
        self.layer_positions += other.layer_positions


@dataclass
class Traffic(Entry):
    """What one rank sent to others: messages are counted once, where they are sent."""

    messages: int = 0
    bytes: int = 0

    def as_dict(self) -> dict[str, float]:
        """The figures that go into a record."""
        return {"messages": float(self.messages), "bytes": float(self.bytes)}

    def join(self, other: Entry) -> None:
        """Add what another rank sent."""
        assert isinstance(other, Traffic)
        self.messages += other.messages
        self.bytes += other.bytes


@dataclass
class Ledger:
    """The counts of one stage (a `run` call or a `prepare`), and the budget it must keep to.

    `bounded` names the handles whose evaluations count against `limit`; `("*",)` is every network.
    """

    bounded: tuple[str, ...] = ("*",)
    limit: float = float("inf")
    items: int = 0  # of the batch that the limit is for; 0: of none
    entries: dict[str, Entry] = field(default_factory=dict)
    networks: list[str] = field(default_factory=list)
    active: int = 0  # counted calls that are running, one inside the other
    flops_now: Callable[[], int] | None = None  # set while FLOPs are counted
    flops_inside: dict[str, int] = field(default_factory=dict)  # by handle; what it calls itself is within its own
    entered: dict[str, list[int]] = field(default_factory=dict)  # FLOPs at the start of each running call, by handle
    held: int = 0  # greatest bytes in the caches at the start of a layer, read while FLOPs are counted
    read: float = 0.0  # bytes that layers found in the caches, summed over their calls
    caches: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    whole: int = 0  # elements of a whole item, where ranks hold parts: an evaluation of a part costs its share

    def enter(self, name: str) -> None:
        """A counted call of a handle begins."""
        self.active += 1
        if self.flops_now is not None:
            for each in (name, ALL) if self.active == 1 else (name,):
                self.entered.setdefault(each, []).append(self.flops_now())

    def leave(self, name: str) -> None:
        """A counted call of a handle ends."""
        self.active -= 1
        if self.flops_now is not None:
            for each in (name, ALL) if self.active == 0 else (name,):
                start = self.entered[each].pop()
                if not self.entered[each]:  # of calls within each other the outermost counts
                    self.flops_inside[each] = self.flops_inside.get(each, 0) + self.flops_now() - start

    def hold(self, cache: Any, depth: int) -> None:
        """One of `depth` layers begins with this key/value cache: weigh it and every other that still lives."""
        self.caches.add(cache)
        self.held = max(self.held, held_bytes(list(self.caches)))
        self.read += held_bytes(cache) / depth

    def reset(self, limit: float = float("inf"), items: int = 0) -> None:
        """Start a stage: all counts to zero, a new limit in evaluations, for a batch of `items`."""
        self.limit, self.items = limit, items
        for name, entry in self.entries.items():
            self.entries[name] = type(entry)(layers=entry.layers)

    @property
    def spent(self) -> float:
        """Evaluations of the bounded handles since `reset`."""
        names = self.networks if self.bounded == ("*",) else self.bounded
        return sum(self.entries[name].evaluations for name in names if name in self.entries)

    def check(self) -> None:
        """Raise `BudgetExceeded` once more was asked than the limit allows."""
        if self.spent > self.limit + 1e-6:
            raise BudgetExceeded.of(self.spent, self.limit, self.items)

    def evaluations(self) -> dict[str, float]:
        """Evaluations by handle."""
        return {name: entry.evaluations for name, entry in self.entries.items()}

    def asked(self) -> dict[str, float]:
        """Evaluations by handle, handles never called left out."""
        return {name: figures["evaluations"] for name, figures in self.snapshot().items() if "evaluations" in figures}

    def snapshot(self) -> dict[str, dict[str, float]]:
        """Counts by handle, handles never called left out."""
        asked = {n: e for n, e in self.entries.items() if e.calls or e.layer_calls or isinstance(e, Traffic)}
        return {name: entry.as_dict() for name, entry in asked.items()}


class Updates:
    """Counts the updates that optimisers of torch make in this process, from outside of who makes them."""

    def __init__(self) -> None:
        self.count = 0
        self._hook: Any = None

    def __enter__(self) -> Updates:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        def counted(*_: Any) -> None:
            self.count += 1

        self._hook = register_optimizer_step_post_hook(counted)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def held_bytes(owner: Any) -> int:
    """Bytes of the storages behind every tensor that an object holds, in attributes and containers at any depth.

    A storage counts once and whole, however small a view of it is in use: what is only masked or cut off by a view is
    still held. Networks are not looked into.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [owner]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (str, bytes, int, float, nn.Module)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset, deque)):
            waiting.extend(item)
        else:
            slots = (
                getattr(item, name, None) for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())
            )
            waiting.extend([*slots, *getattr(item, "__dict__", {}).values()])
    return sum(storages.values())


NAMED_FIRST = ("input_ids", "inputs_embeds", "hidden_states", "sample", "x")  # what networks call what they work on


def shape_of(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, int]:
    """(rows, positions) of a call: first dimension of what it works on; x sequence length for tokens and hidden states.

    What it works on is its first tensor of two dimensions or more, of a usual name before the others, so that a time that
    comes first or stands alone makes no batch smaller.
    """
    tensors = [value for value in (*args, *map(kwargs.get, NAMED_FIRST), *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors:
        return 1, 1
    value = next((each for each in tensors if each.ndim > 1), tensors[0])
    rows = value.shape[0] if value.ndim else 1
    sequence = value.ndim == 3 or (value.ndim == 2 and not value.is_floating_point())
    return rows, rows * value.shape[1] if sequence else rows


def _elements(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Elements of the first tensor of a call."""
    return next((value.numel() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), 0)


def _intercept(
    ledger: Ledger, name: str, module: nn.Module, before: Callable[[tuple[Any, ...], dict[str, Any]], None]
) -> None:
    original = type(module).forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before(args, kwargs)
        ledger.enter(name)
        try:
            return original(self, *args, **kwargs)
        finally:
            ledger.leave(name)

    module.forward = types.MethodType(forward, module)


def watch(ledger: Ledger, name: str, module: nn.Module, layers: Sequence[nn.Module] = ()) -> nn.Module:
    """Count every evaluation of `module` in `ledger` under `name`. Returns the module."""
    if name in ledger.entries:
        raise ValueError(f"two handles are called {name!r}; rename the one that the method adds")
    ledger.entries[name] = Entry(layers=len(layers))
    ledger.networks.append(name)

    def on_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entry = ledger.entries[name]
        rows, positions = shape_of(args, kwargs)
        share = _elements(args, kwargs) / (rows * ledger.whole) if ledger.whole else 1
        entry.calls += 1
        entry.rows += rows * share
        entry.positions += positions * share
        if not layers:
            ledger.check()

    def on_layer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entry = ledger.entries[name]
        rows, positions = shape_of(args, kwargs)
        share = _elements(args, kwargs) / (rows * ledger.whole) if ledger.whole else 1
        entry.layer_calls += 1
        entry.layer_rows += rows * share
        entry.layer_positions += positions * share
        if ledger.flops_now is not None and kwargs.get("past_key_values") is not None:
            ledger.hold(kwargs["past_key_values"], len(layers))
        ledger.check()

    _intercept(ledger, name, module, on_call)
    for layer in layers:
        _intercept(ledger, name, layer, on_layer)
    if layers:  # embedding, norms and head belong to an evaluation too, when a method calls them by themselves
        inner = {id(part) for layer in layers for part in layer.modules()}
        for part in module.modules():
            if part is not module and id(part) not in inner and not any(True for _ in part.children()):
                _intercept(ledger, name, part, lambda args, kwargs: None)
    return module


def watch_function(ledger: Ledger, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A counted form of a simulator, likelihood, verifier or retriever. One row per item of its first tensor."""
    if name in ledger.entries:
        raise ValueError(f"two handles are called {name!r}")
    ledger.entries[name] = Entry()

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        entry = ledger.entries[name]
        rows, positions = shape_of(args, kwargs)
        entry.calls += 1
        entry.rows += rows
        entry.positions += positions
        ledger.check()
        ledger.enter(name)
        try:
            return function(*args, **kwargs)
        finally:
            ledger.leave(name)

    return counted
