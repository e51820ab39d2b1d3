"""The plugin's side of a measurement: a method on a task, prepared, and the calls into it.

Batches, rungs and seeds go in; outputs, counts, FLOPs and flags come out. What is asked and what answers are worth is the
other side's business (`stepmark.judge`). A measurement has it in a process of its own (`stepmark.child`), out of whose
reach are the test split, the metrics, the records and the cache.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepmark import backbones, devices, distributed, plugins, prepared
from stepmark.audit import Guard, listening
from stepmark.cell import digests, size_of, track_of
from stepmark.meter import latency, memory
from stepmark.meter.counts import Ledger, Traffic, Updates, watch, watch_function
from stepmark.meter.flops import Flops, count_flops
from stepmark.method import Method, skip
from stepmark.plugins import MethodInfo
from stepmark.record import Offline
from stepmark.session import Session, derive_seed
from stepmark.task import BadOutput, Task, sealed
from stepmark.wire import WireError, settled


@dataclass(frozen=True)
class Call:
    """One call of `run`: what it returned and what it spent. Counts are over the whole batch.

    Attributes:
        spent: evaluations in the unit of the rung.
        handles: figures by handle; of handles never called none.
        evaluations: by handle, of all of them.
        reported: what the method says it asked.
        ns, device_ns: wall time of the call by the clock of its process, and by the device's own.
        flops: where they were counted. flags: what was seen during the call.
        outside_ns, processor_ns: of a call in a process of its own, what the other side's clock read, and seconds of the
            processor that the process used from the batch to the outputs. queued_ns: how long it and the other side waited
            for a processor meanwhile.
    """

    outputs: Any
    spent: float
    handles: dict[str, dict[str, float]]
    evaluations: dict[str, float]
    reported: dict[str, float]
    ns: int = 0
    device_ns: int | None = None
    flops: Flops | None = None
    flags: list[str] = field(default_factory=list)
    outside_ns: int | None = None
    processor_ns: int | None = None
    queued_ns: int = 0


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


def shared_sources(task: Task, sources: Mapping[str, str], tier: str, device: torch.device) -> dict[str, str]:
    """What a training on a task hangs on, whoever asks for it. `sources`: the digests of a method's figures."""
    theirs = {name: digest for name, digest in sources.items() if name not in _OF_METHODS}
    return theirs | _preparing(task, tier, device)


def _preparing(task: Task, tier: str, device: torch.device) -> dict[str, str]:
    """What a state hangs on besides the sources of a record: a method may prepare for each rung of the ladder."""
    return {"tier": tier, "device": device.type, "ladder": f"{task.rungs} {task.smoke_rungs}"}


def prepare_seed(task: Task, training: int) -> int:
    """The seed of the random streams of a preparation."""
    return derive_seed("prepare", task.id, task.version) + training


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
        store: prepared.Store | None = None,
    ) -> None:
        """`sources`: the digests of all that the figures hang on, where somebody has taken them already. `store`: who keeps
        what is prepared; by default the cache of this machine."""
        devices.settle()
        self.info, self.seed = info, seed
        self.track, self.task = track_of(task_id)
        self.sources = sources or digests(info, self.task)
        if task_id not in info.tasks:
            raise KeyError(f"{info.id} does not name task {task_id!r}; it names {', '.join(info.tasks)}")
        self.tier, self.device = tier, torch.device(device)
        self.store = store or prepared.Cache()
        self._clock = latency.Sampler(self.device)
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
                make = partial(Runner, info, task_id, tier, seed=seed, store=self.store.for_ranks())
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
        sources = shared_sources(self.task, self.sources, self.tier, self.device)
        return Session(
            task, self.tier, self.device, torch.float32, self.networks, simulators, self.ledger, show_progress,
            self.seed, sources, self.store,
        )  # fmt: skip

    # -- prepare ------------------------------------------------------------------------------------------------

    def _prepare(self) -> Offline:
        """Train or load, so that what follows finds the same in either case."""
        if type(self.method).networks is Method.networks and type(self.method).prepare is Method.prepare:
            return Offline(seconds=0.0, evaluations={}, state_mib=0.0, updates=0.0)
        seed = prepare_seed(self.task, self.seed)
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
        state = self.store.prepared(path, self.seed, partial(self._train, own, seed))
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
        items = size_of(batch)
        self.session.begin("run", derive_seed("run", self.task.id, seed, index), rung * items, items)
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
        """One call within its budget, by the clock.

        Raises:
            BudgetExceeded: it asked for more. BadOutput: outputs that are more than plain data.
        """
        self.begin(batch, rung, seed, index)
        return self.go(batch, rung)

    def go(self, batch: Mapping[str, Any], rung: int) -> Call:
        """The call that has begun. What it returns is copied out inside the clock: nothing is left to be worked out."""
        flags: list[str] = []
        with sealed(), torch.no_grad(), listening(flags):
            for _ in range(3):  # the process has waited: the clock's own path and that of the copy must not be cold
                self._clock.sample(partial(settled, next(iter(batch.values()))))
            ns, device_ns, outputs = self._clock.sample(partial(self._settled, batch, rung))
        self.ledger.check()
        return self._called(outputs, flags, ns=ns, device_ns=device_ns)

    def _settled(self, batch: Mapping[str, Any], rung: int) -> Any:
        outputs = self.call(batch, rung)
        try:
            return settled(outputs)
        except WireError as error:
            raise BadOutput(str(error)) from None

    def counted(self, batch: Mapping[str, Any], rung: int, seed: int, index: int = 0) -> Call:
        """One call under the FLOP counter and the guard."""
        self.begin(batch, rung, seed, index)
        flags: list[str] = []
        guard = Guard(self.session.rng, self.session.seed, flags)
        watching = count_flops(self.ledger, list(self.networks.values()), guard)
        with sealed(), torch.no_grad(), watching as flops, listening(flags):
            outputs = self._settled(batch, rung)
        for report in self.pool.reports if self.pool is not None else []:
            if report.flops is not None:
                flops.ranks = [*(flops.ranks or [flops.total]), report.flops.total]
                flops.strays += report.flops.strays
                flops.threads += report.flops.threads
                flops.outside += report.flops.outside
                for name, each in report.flops.inside.items():
                    flops.inside[name] = flops.inside.get(name, 0) + each
                flops.arithmetic += report.flops.arithmetic
                flops.unpriced += [name for name in report.flops.unpriced if name not in flops.unpriced]
            flags += [flag for flag in report.flags if flag not in flags]
        flops.total = sum(flops.ranks) or flops.total
        return self._called(outputs, flags, flops=flops)

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
        flags: list[str] = []
        with contextlib.ExitStack() as watching:
            watching.enter_context(sealed())
            watching.enter_context(torch.no_grad())
            watching.enter_context(listening(flags))
            flops = None
            if counting:
                guard = Guard(self.session.rng, self.session.seed, flags)
                flops = watching.enter_context(count_flops(self.ledger, list(self.networks.values()), guard))
            self.call(batch, rung)
            self.session.group.finish()
        return distributed.Report(dict(self.ledger.entries), flops, flags)

    def _called(self, outputs: Any, flags: list[str], **figures: Any) -> Call:
        ledger = self.ledger
        reported = dict(self.session.reported)
        return Call(outputs, ledger.spent, ledger.snapshot(), ledger.evaluations(), reported, flags=flags, **figures)

    def _synchronise(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


_OF_METHODS = ("method", "track")  # digests that differ between methods of one task
