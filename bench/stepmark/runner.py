"""The plugin's side of a measurement: a method on a task, prepared, and the calls into it.

Batches, rungs and seeds go in; outputs, counts, FLOPs and flags come out. What is asked and what answers are worth is the
other side's business (`stepmark.judge`): no test split, no metric and no record is in reach from here, so that all of it
can live in a process of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepmark import backbones, devices, distributed, plugins, prepared
from stepmark.audit import Guard
from stepmark.cell import digests, size_of, source_digest, track_of
from stepmark.meter import energy, memory
from stepmark.meter.counts import Flops, Ledger, Traffic, Updates, count_flops, watch, watch_function
from stepmark.method import Method, skip
from stepmark.plugins import MethodInfo
from stepmark.record import Offline
from stepmark.session import Session, derive_seed
from stepmark.task import Task, sealed

READY = 4  # runners kept for the next cell: a method and its baseline, and what one looks at beside them


@dataclass(frozen=True)
class Call:
    """One call of `run`: what it returned and what it spent. Counts are over the whole batch.

    Attributes:
        spent: evaluations in the unit of the rung.
        handles: figures by handle; of handles never called none.
        evaluations: by handle, of all of them.
        reported: what the method says it asked.
        flops: where they were counted. flags: what the guard saw, where it watched.
    """

    outputs: Any
    spent: float
    handles: dict[str, dict[str, float]]
    evaluations: dict[str, float]
    reported: dict[str, float]
    flops: Flops | None = None
    flags: list[str] = field(default_factory=list)


class Networks(dict[str, nn.Module]):
    """Networks by role. A method that asks for one which whoever brought the task left out is skipped."""

    def __init__(self, networks: Mapping[str, nn.Module], absent: Mapping[str, str]) -> None:
        super().__init__(networks)
        self._absent = absent

    def __missing__(self, role: str) -> nn.Module:
        if reason := self._absent.get(role, self._absent.get("*")):
            skip(reason)
        raise KeyError(role)


def prepared_path(method: str, task: Task, sources: Mapping[str, str], tier: str, device: torch.device) -> Path:
    """Where the state of a method lies that draws no random numbers; beside it lie those of single seeds. `sources`: the
    digests of all that its figures hang on.
    """
    return prepared.path_of("prepared", method, {**sources, **_preparing(task, tier, device)})


def _preparing(task: Task, tier: str, device: torch.device) -> dict[str, str]:
    """What a state hangs on besides the sources of a record: a method may prepare for each rung of the ladder."""
    return {"tier": tier, "device": device.type, "ladder": f"{task.rungs} {task.smoke_rungs}"}


class Runner:
    """One method on one task on one device, prepared with one seed. Holds no state that a later cell could feel."""

    def __init__(
        self,
        info: MethodInfo,
        task_id: str,
        tier: str = "embedded",
        device: str = "cpu",
        seed: int = 0,
        show_progress: bool = True,
        rank: int = 0,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        """`sources`: the digests of all that the figures hang on, where somebody has taken them already."""
        devices.settle()
        self.info, self.seed = info, seed
        self.track, self.task = track_of(task_id)
        self.sources = sources or digests(info, self.task)
        if task_id not in info.tasks:
            raise KeyError(f"{info.id} does not name task {task_id!r}; it names {', '.join(info.tasks)}")
        self.tier, self.device = tier, torch.device(device)
        self.method = self._load()
        self.ledger = Ledger(bounded=self.task.bounded)
        loaded = {role: backbones.load(name, self.device) for role, name in self.task.backbones.items()}
        self.networks = Networks({role: self._watched(role, net) for role, net in loaded.items()}, self.task.absent)
        self.session = self._session(show_progress)
        self.offline = self._prepare()
        self.ranks = self.method.ranks
        self.pool: distributed.Pool | None = None
        if self.ranks > 1:
            self.ledger.entries[distributed.SENT] = Traffic()
            if rank == 0:  # the others are in processes of the pool, with a runner each
                self.device = distributed.device_of(self.device, 0)
                make = partial(Runner, info, task_id, tier, seed=seed)
                self.pool = distributed.Pool(make, self.device, self.ranks, plugins.restorers())

    def _load(self) -> Method:
        with sealed():
            return plugins.load_class(self.info)()

    def _watched(self, name: str, network: nn.Module) -> nn.Module:
        return watch(self.ledger, name, network, self.track.layers(self.task, name, network))

    def _session(self, show_progress: bool) -> Session:
        task = replace(self.task, dataset=self.task.follows) if self.task.follows else self.task
        simulators = {
            name: watch_function(self.ledger, name, function)
            for name, function in self.track.handles(self.task, self.device).items()
        }
        theirs = {name: digest for name, digest in self.sources.items() if name not in _OF_METHODS}
        sources = theirs | _preparing(self.task, self.tier, self.device)
        return Session(
            task, self.tier, self.device, torch.float32, self.networks, simulators, self.ledger, show_progress,
            self.seed, sources,
        )  # fmt: skip

    # -- prepare ------------------------------------------------------------------------------------------------

    def _prepare(self) -> Offline:
        """Train or load, so that what follows finds the same in either case."""
        if type(self.method).networks is Method.networks and type(self.method).prepare is Method.prepare:
            return Offline(seconds=0.0, evaluations={}, state_mib=0.0, updates=0.0)
        seed = derive_seed("prepare", self.task.id, self.task.version) + self.seed
        self.session.begin("networks", seed)
        with sealed(), self.session.drawing(seed):  # initial weights of new networks
            own = self.method.networks(self.session)
        if own and self.task.untrained:
            skip(f"trains a network of its own: {self.task.untrained}")
        for name, network in own.items():
            for part in network.modules():
                part.__dict__.pop("forward", None)
            network.to(self.device)
            self.networks[name] = self._watched(name, network)
        self.session.advance("prepare")
        path = prepared_path(self.info.id, self.task, self.sources, self.tier, self.device)
        state = prepared.kept(path, self.seed, partial(self._train, own, seed))
        self._restore(own, state.tensors)
        self.method = self._load()
        size = sum(value.numel() * value.element_size() for value in state.tensors.values())
        evaluations: dict[str, float] = {}
        for cost in state.costs.values():
            for name, count in cost.evaluations.items():
                evaluations[name] = evaluations.get(name, 0.0) + count
        return Offline(
            seconds=sum(cost.seconds for cost in state.costs.values()),
            evaluations=evaluations,
            state_mib=size / 2**20,
            seed=self.seed if state.drew else None,
            updates=sum(cost.updates for cost in state.costs.values()),
        )

    def _train(self, own: dict[str, nn.Module], seed: int) -> prepared.State:
        start = time.perf_counter()
        with sealed(), self.session.drawing(seed % 2**32), Updates() as made:
            state = self.method.prepare(self.session) or {}
        self._synchronise()
        seconds = time.perf_counter() - start - self.session.shared_seconds
        tensors = {f"state.{key}": value for key, value in state.items()}
        for name, network in own.items():
            tensors |= {f"network.{name}.{key}": value for key, value in network.state_dict().items()}
        cost = prepared.Cost(round(seconds, 3), self.ledger.asked(), made.count - self.session.shared_updates)
        return prepared.State(tensors, self.session.drew, cost, self.session.shared)

    def _restore(self, own: dict[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
        weights: dict[str, dict[str, Tensor]] = {name: {} for name in own}
        self.session.state = {}
        for key, tensor in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "state":
                self.session.state[rest] = tensor.to(self.device)
            else:
                name, _, parameter = rest.partition(".")
                weights[name][parameter] = tensor
        for name, network in own.items():
            network.load_state_dict(weights[name])
            network.eval().requires_grad_(False)
        for name in self.task.backbones:  # a prepare that touched them must not leak into run
            fresh = backbones.load(self.task.backbones[name], self.device)
            self.networks[name].load_state_dict(fresh.state_dict())
            self.networks[name].eval().requires_grad_(False)

    # -- run ----------------------------------------------------------------------------------------------------

    def renew(self) -> None:
        """Globals that an earlier cell left in the method's module are gone."""
        self.method = self._load()

    def begin(self, batch: Mapping[str, Any], rung: int, seed: int, index: int = 0) -> None:
        """Everything before the timed call: random stream, budget, counters."""
        self.session.begin("run", derive_seed("run", self.task.id, seed, index), rung * size_of(batch))
        if self.ranks > 1:
            first = next(iter(batch.values()))
            self.ledger.whole = first[0].numel() if isinstance(first, Tensor) else 0
        if self.pool is not None:
            self.session.group = self.pool.start(self.ledger)
            self.pool.give(batch, rung, seed, index)

    def call(self, batch: Mapping[str, Any], rung: int) -> Any:
        """The timed call and nothing else."""
        if self.pool is not None:
            run = partial(self.method.run, self.session, batch, rung // self.task.price)
            return self.pool.call(run, self.ledger)
        return self.method.run(self.session, batch, rung // self.task.price)

    def run(self, batch: Mapping[str, Any], rung: int, seed: int, index: int = 0) -> Call:
        """One call within its budget.

        Raises:
            BudgetExceeded: it asked for more.
        """
        outputs = self._again(batch, rung, seed, index)
        self.ledger.check()
        return self._called(outputs)

    def counted(self, batch: Mapping[str, Any], rung: int, seed: int) -> Call:
        """One call under the FLOP counter and the guard."""
        self.begin(batch, rung, seed)
        guard = Guard(self.session.rng, self.session.seed)
        with sealed(), torch.no_grad(), count_flops(self.ledger, list(self.networks.values())) as flops, guard:
            outputs = self.call(batch, rung)
        for report in self.pool.reports if self.pool is not None else []:
            if report.flops is not None:
                flops.ranks = [*(flops.ranks or [flops.total]), report.flops.total]
                flops.strays += report.flops.strays
                flops.threads += report.flops.threads
                flops.outside += report.flops.outside
            guard.flags += [flag for flag in report.flags if flag not in guard.flags]
        flops.total = sum(flops.ranks) or flops.total
        return self._called(outputs, flops, guard.flags)

    def reference_flops(self, probe: Mapping[str, Any]) -> float | None:
        """FLOPs per item of one reference evaluation; None where the task has no network or nothing is countable."""
        if self.task.reference is None:
            return None
        self.ledger.reset()
        with torch.no_grad(), count_flops(self.ledger, list(self.networks.values())) as flops:
            items = self.track.reference_call(self.task, self.networks, probe)
        return flops.total / items or None

    def weighed(self, batch: Mapping[str, Any], rung: int, seed: int) -> memory.Memory:
        """The peak of one call above what is loaded."""
        self.begin(batch, rung, seed)
        with sealed(), torch.no_grad():
            return memory.measure(partial(self.call, batch, rung), self.device)

    def fed(self, batch: Mapping[str, Any], rung: int, seed: int) -> energy.Energy:
        """The energy of one call, from a window of many."""
        return energy.measure(partial(self._again, batch, rung, seed), self.device)

    @property
    def bounded(self) -> list[str]:
        """Handles whose evaluations the rung limits."""
        return self.ledger.networks if self.task.bounded == ("*",) else list(self.task.bounded)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the parameters of all networks."""
        return sum(p.numel() * p.element_size() for net in self.networks.values() for p in net.parameters())

    def drafts(self, one: Mapping[str, Any], rung: int, seed: int) -> tuple[list[int], list[Any]] | None:
        """A batch of one text decoded while its drafts are listened to: (new tokens, (draft, what was written) of each
        step); None where the track has nothing of the kind."""
        steps_of = getattr(self.track, "steps_of", None)
        if steps_of is None:
            return None
        return steps_of(lambda: self.run(one, rung, seed).outputs, self.method, lambda: self.ledger.spent)

    def take_part(self, batch: Mapping[str, Any], rung: int, counting: bool) -> distributed.Report:
        """A worker's part of a call that has begun: what it counted, with FLOPs and flags where those are asked for."""
        guard = Guard(self.session.rng, self.session.seed)
        with contextlib.ExitStack() as watching:
            watching.enter_context(sealed())
            watching.enter_context(torch.no_grad())
            flops = None
            if counting:
                flops = watching.enter_context(count_flops(self.ledger, list(self.networks.values())))
                watching.enter_context(guard)
            self.call(batch, rung)
            self.session.group.finish()
        return distributed.Report(dict(self.ledger.entries), flops, guard.flags)

    def _again(self, batch: Mapping[str, Any], rung: int, seed: int, index: int = 0) -> Any:
        self.begin(batch, rung, seed, index)
        with sealed(), torch.no_grad():
            return self.call(batch, rung)

    def _called(self, outputs: Any, flops: Flops | None = None, flags: list[str] | None = None) -> Call:
        ledger = self.ledger
        reported = dict(self.session.reported)
        return Call(outputs, ledger.spent, ledger.snapshot(), ledger.evaluations(), reported, flops, flags or [])

    def _synchronise(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


_OF_METHODS = ("method", "track")  # digests that differ between methods of one task

# runners that are kept --------------------------------------------------------------------------

_ready: OrderedDict[tuple[Any, ...], Runner] = OrderedDict()


def ready(
    info: MethodInfo,
    task_id: str,
    tier: str,
    device: str,
    seed: int = 0,
    show_progress: bool = True,
    sources: Mapping[str, str] | None = None,
) -> Runner:
    """A runner that is kept for the next cell, as long as neither the method's file nor anything else has changed that
    its state hangs on. One whose preparation draws no random numbers serves every seed."""
    sources = sources or digests(info, track_of(task_id)[1])
    same = (info.id, task_id, tier, device, source_digest(info.path), *sorted(sources.items()))
    for key in ((*same, None), (*same, seed)):
        if key in _ready:
            _ready.move_to_end(key)
            return _ready[key]
    while len(_ready) >= READY:
        _ready.popitem(last=False)
    made = Runner(info, task_id, tier, device, seed, show_progress, sources=sources)
    _ready[(*same, made.offline.seed)] = made
    _settle()
    return made


def forget() -> None:
    """Keep no runner: what a plugin left behind must not reach the next cell."""
    _ready.clear()


_settled = 0  # modules there were


def _settle() -> None:
    """Spare the garbage collector what the libraries hold for good, again whenever more of them have been loaded: it runs
    before every measurement, tenths of a second each."""
    global _settled
    if len(sys.modules) < _settled + 50:
        return
    if not _settled:
        atexit.register(gc.unfreeze)  # the libraries' own clean-up expects to be collected
    gc.collect()
    gc.freeze()
    _settled = len(sys.modules)
