"""What the harness hands to a method: counted networks and simulators, data, randomness, device, state, progress."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from stepmark import prepared
from stepmark.distributed import Group
from stepmark.meter.counts import Ledger, Updates
from stepmark.task import Sealed, Task, digest_of, load_split, skip

T = TypeVar("T")


def derive_seed(*coordinates: object) -> int:
    """A 63-bit seed from the coordinates of a cell: the same on every machine, unrelated between neighbours."""
    text = "\x1f".join(map(str, coordinates)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class Session:
    """One method on one task, for one stage (`prepare` or `run`).

    Attributes:
        task, tier: the problem; "smoke" | "embedded" | "hub".
        networks: role -> counted `nn.Module`, the task's backbones and those the method declared.
        simulators: name -> counted callable (simulators, likelihoods, verifiers), where the track has them.
        state: the tensors that `prepare` returned.
        rng, seed: the stage's `torch.Generator` on `device`, and an integer for numpy and scikit-learn. Where `prepare`
            uses them, every seed of a cell is another training; where not, all seeds share one.
        device, dtype: where tensors live.
        group: the processes that run the method together, as this one sees them; a single one unless the method sets
            `ranks`.

    Trainings that several methods or variants share stand in a function of their own, and `once` runs it for all:

        def trained(session: Session, updates: int) -> dict[str, Tensor]:
            network = Student()              # built here, so that its first weights hang on nothing else
            fit(network, session.train, updates, session.rng)
            return network.state_dict()
        ...
            session.networks["student"].load_state_dict(session.once(trained, session.scale(3000, 20)))  # in prepare
    """

    def __init__(
        self,
        task: Task,
        tier: str,
        device: torch.device,
        dtype: torch.dtype,
        networks: dict[str, nn.Module],
        simulators: dict[str, Callable[..., Any]],
        ledger: Ledger,
        show_progress: bool = True,
        training: int = 0,
        sources: Mapping[str, str] | None = None,
        store: prepared.Store | None = None,
    ) -> None:
        """Harness only. `training`: the seed of this training. `sources`: digests of what every training on the task
        hangs on; without them `once` keeps nothing. `store`: who keeps it."""
        self.task, self.tier, self.device, self.dtype = task, tier, device, dtype
        self.networks, self.simulators = networks, simulators
        self.state: dict[str, Tensor] = {}
        self.group = Group()
        self.rng = torch.Generator(device=device)
        self._seed = 0
        self._seed_read = False
        self._training, self._sources, self._store = training, sources, store or prepared.Cache()
        self._running: list[str] = []  # what `once` runs, the innermost last
        self._ledger = ledger
        self._show_progress = show_progress
        self._stage, self._stage_seed = "", 0
        self.reported: dict[str, float] = {}
        self.drew = False
        self.shared: dict[str, prepared.Cost] = {}
        self.shared_seconds = 0.0
        self.shared_updates = 0.0

    @property
    def seed(self) -> int:
        """The stage's seed for numpy and scikit-learn, below 2**32. Reading it counts as drawing a random number."""
        self._seed_read = True
        return self._seed

    def begin(self, stage: str, seed: int, limit: float = float("inf"), items: int = 0) -> None:
        """Harness only: start a stage with its own random stream and budget, which is for a batch of `items`.

        From here on `drew` says whether random numbers were drawn inside `drawing`, `shared` what the trainings that
        `once` was asked for cost, `shared_seconds` how long they took or took to load here, `shared_updates` how many
        updates they made here.
        """
        self._stage, self._stage_seed = stage, seed
        self._reseed(seed)
        self._ledger.reset(limit, items)
        self.reported = {}
        self.drew, self.shared, self.shared_seconds, self.shared_updates = False, {}, 0.0, 0.0

    def advance(self, stage: str) -> None:
        """Harness only: from `networks` to `prepare`, with the random streams as they stand."""
        self._stage = stage

    def _reseed(self, seed: int) -> None:
        self._seed, self._seed_read = seed % (2**32), False
        self.rng.manual_seed(seed)

    @contextlib.contextmanager
    def drawing(self, seed: int) -> Iterator[None]:
        """Harness only: torch's global generator starts at `seed` inside and is put back afterwards; `drew` learns
        whether a number was drawn from it or from `rng`, or `seed` was read."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            before = self._streams()
            yield
            self.drew = self.drew or self._seed_read or self._streams() != before

    def _streams(self) -> list[bytes]:
        states = [self.rng.get_state(), torch.random.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        elsewhere = (np.random.get_state(legacy=True), random.getstate())  # which nobody should draw from, but may
        return [*(state.numpy().tobytes() for state in states), repr(elsewhere).encode()]

    @property
    def train(self) -> Mapping[str, Any]:
        """The dataset's train split. Only `prepare` may look at it."""
        if self._stage not in ("networks", "prepare"):
            raise Sealed("session.train is for prepare; run gets its inputs as batch and its state as session.state")
        if self.task.module:
            brought = getattr(importlib.import_module(self.task.module), "train", None)
            if brought is not None:
                return brought(self.task)
        if self.task.untrained:
            skip(self.task.untrained)
        return load_split(self.task.dataset, "train")

    def once(self, function: Callable[..., Mapping[str, Tensor]], *literals: Any) -> Mapping[str, Tensor]:
        """What `function(session, *literals)` returns, tensors by name, run once for all who ask for the same. In
        `prepare` only; it may ask for others in turn.

        The same is: the function's name and source and what it uses of its file and of tracks, the literals, the task
        with its data and networks, the tier, the kind of device, the training seed (unless it draws no random numbers)
        and the weights of all networks as they stand. Its random streams begin where
        those of `prepare` begin, and streams and networks are afterwards as they were before, so that nothing hangs on
        who asks first. Its cost is part of the offline
        cost of everyone who asks.

        Raises:
            Sealed: outside `prepare`. TypeError: no function at the top level of a file, literals that are not plain,
            or a function that asks for itself.
        """
        if self._stage != "prepare":
            raise Sealed("session.once is for prepare; what it returned can be kept in session.state")
        said = prepared.as_literals(literals)
        source = prepared.code_of(function)
        name = f"{source}{said}"
        if name in self._running:
            raise TypeError(f"session.once: {function.__name__}{said} asks for itself")
        start = time.perf_counter()

        def make() -> prepared.State:
            return self.made(name, lambda: function(self, *literals))

        with Updates() as made:
            if self._sources is None:
                state = make()
            else:
                state = self._store.once(
                    prepared.Training(
                        function.__name__,
                        Path(inspect.unwrap(function).__code__.co_filename),
                        source,
                        said,
                        self._weights(self.networks),
                        self._weights(self.task.backbones),
                        self._sources,
                    ),
                    self._training,
                    make,
                )
        for network in self.networks.values():  # as after a training, also where it was found
            network.zero_grad(set_to_none=True)
        self.shared_seconds += time.perf_counter() - start
        self.shared_updates += made.count
        self.shared |= state.costs
        self.drew = self.drew or state.drew
        return {key: value.to(self.device) for key, value in state.tensors.items()}

    def _weights(self, roles: Iterable[str]) -> str:
        return digest_of({role: self.networks[role].state_dict() for role in roles})

    def made(self, name: str, function: Callable[[], Mapping[str, Tensor]]) -> prepared.State:
        """Harness only: run a shared training with random streams and counts of its own, and put back the caller's."""
        stream, numbers = self.rng.get_state(), (self._seed, self._seed_read)
        tallies = (self.drew, self.shared, self.shared_seconds, self.shared_updates)
        entries = dict(self._ledger.entries)
        self.drew, self.shared, self.shared_seconds, self.shared_updates = False, {}, 0.0, 0.0
        self._reseed(self._stage_seed)
        self._ledger.reset()
        self._running.append(name)
        try:
            start = time.perf_counter()
            with _unchanged(self.networks), self.drawing(self._seed), Updates() as made:
                tensors = {key: value.detach().clone() for key, value in function().items()}
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            seconds = time.perf_counter() - start - self.shared_seconds
            own = prepared.Cost(seconds, self._ledger.asked(), made.count - self.shared_updates)
            return prepared.State(tensors, self.drew, own, self.shared)
        finally:
            self._running.pop()
            self.rng.set_state(stream)
            self._seed, self._seed_read = numbers
            self.drew, self.shared, self.shared_seconds, self.shared_updates = tallies
            self._ledger.entries.update(entries)

    @property
    def spent(self) -> float:
        """Evaluations this `run` call has used so far, over the whole batch, in the unit of the rung."""
        return self._ledger.spent

    @property
    def limit(self) -> float:
        """Evaluations this `run` call may use over the whole batch: rung x items."""
        return self._ledger.limit

    def clone(self, name: str) -> nn.Module:
        """A trainable copy of one of the networks, for `Method.networks` to return as a student. One that is made in
        `prepare` counts as the network that it is a copy of."""
        if self.task.untrained:  # said before a network of somebody's is copied for nothing
            skip(f"trains a network of its own: {self.task.untrained}")
        copy = deepcopy(self.networks[name])
        for part in copy.modules() if self._stage != "prepare" else ():
            part.__dict__.pop("forward", None)  # the counter of the original: the copy gets one of its own
        return copy.requires_grad_(True)

    def scale(self, embedded: T, smoke: T) -> T:
        """`smoke` at tier smoke, else `embedded`: for training lengths and search budgets."""
        return smoke if self.tier == "smoke" else embedded

    def progress(self, iterable: Iterable[T], desc: str = "") -> Iterable[T]:
        """A progress bar around an offline loop; silent inside `run`."""
        if self._stage != "prepare" or not self._show_progress:
            return iterable
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # its monitor thread would wake up inside timed calls
        return tqdm(iterable, desc=desc, leave=False, mininterval=0.5, dynamic_ncols=True)

    def report(self, **counts: float) -> None:
        """Counts the method took itself, per batch: kept beside the harness's, which they must match."""
        for name, value in counts.items():
            self.reported[name] = self.reported.get(name, 0.0) + float(value)


@contextlib.contextmanager
def _unchanged(networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Weights, gradients wanted and modes of networks are afterwards as they were before."""
    weights = {role: deepcopy(network.state_dict()) for role, network in networks.items()}
    parts = [part for network in networks.values() for part in network.modules()]
    modes = [part.training for part in parts]
    wanted = [(p, p.requires_grad) for network in networks.values() for p in network.parameters()]
    try:
        yield
    finally:
        for role, network in networks.items():
            network.load_state_dict(weights[role])
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
        for parameter, want in wanted:
            parameter.requires_grad_(want)
