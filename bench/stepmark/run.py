"""One cell -> one record: prepare (or load), count, audit, score, time, weigh.

`Bench` is one method on one task, ready to run: networks loaded and watched, `prepare` done or its cached result
loaded. `measure` walks the passes of one cell and returns its record; nothing here knows a method's name.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime as dt
import fcntl
import gc
import hashlib
import importlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from stepmark import __version__, backbones, plugins, samples
from stepmark import record as records
from stepmark.audit import Guard
from stepmark.backbones import checkpoint
from stepmark.distributed import SENT, Pool, device_of
from stepmark.meter import energy, latency, machine, memory
from stepmark.meter.counts import BudgetExceeded, Flops, Ledger, Traffic, count_flops, watch, watch_function
from stepmark.method import Method, Skip
from stepmark.places import cache_folder
from stepmark.plugins import MethodInfo
from stepmark.session import Session, derive_seed
from stepmark.stats import bootstrap_indices
from stepmark.task import CHECKPOINT, BadOutput, Sealed, Task, digest_of, sealed

RESAMPLES = 100
CONTRACT = "1"  # raised when the meaning of a cached prepared state changes


@dataclass(frozen=True)
class Cell:
    """The unit of work, of resuming and of a record."""

    method: str
    task: str
    rung: int
    seed: int
    tier: str = "embedded"

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """Of `Record.key` what hangs on neither device nor checkpoint."""
        return (self.method, self.task, self.rung, self.seed, self.tier)

    @property
    def command(self) -> str:
        """The command that repeats this cell."""
        made = checkpoint.current() if self.task.startswith(CHECKPOINT) else None
        what = f"--task {self.task}" if made is None else made.choice.words
        return f"stepmark run --method {self.method} {what} --rung {self.rung} --seed {self.seed} --tier {self.tier}"


def track_of(task: str) -> tuple[ModuleType, Task]:
    """The track module that holds a task, and the task.

    Raises:
        KeyError: one line that lists the known tasks.
    """
    known = plugins.tasks()
    if task not in known and task.startswith(CHECKPOINT):
        raise KeyError(f"task {task!r} is made from a checkpoint folder: name it by --backbone FOLDER")
    if task not in known:
        raise KeyError(f"no task {task!r}; known: {', '.join(sorted(known))}")
    return importlib.import_module(f"stepmark.tracks.{plugins.track_file(task).stem}"), known[task][1]


def cut(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Items start..stop of a batch."""
    return {key: value[start:stop] for key, value in batch.items()}


def size_of(batch: Mapping[str, Any]) -> int:
    """Number of items of a batch."""
    return len(next(iter(batch.values())))


def join(parts: list[Any]) -> Any:
    """Outputs of consecutive batches as one: tensors are concatenated, lists extended, dicts joined by key."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {key: join([part[key] for part in parts]) for key in first}
    return [item for part in parts for item in part]


def fingerprint(outputs: Any) -> str:
    """Digest of outputs, bit for bit."""
    return digest_of({"outputs": outputs})


def source_digest(*paths: Path) -> str:
    """sha256 over the bytes of files."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.read_bytes())
    return sha.hexdigest()


def digests(info: MethodInfo, task: Task) -> dict[str, str]:
    """Everything that can move a figure, by name."""
    found = plugins.source_digests(info, task)
    for role, backbone in sorted((task.backbones | task.judges).items()):
        found[f"backbone_{role}"] = backbones.digest(backbone)[: plugins.DIGITS]
    return found


def prepared_path(info: MethodInfo, task: Task, tier: str, device: torch.device) -> Path:
    """Where the prepared state of a method is kept, under a digest of all that it hangs on."""
    parts = digests(info, task) | {"tier": tier, "contract": CONTRACT, "device": device.type}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "prepared" / f"{info.id}-{digest[:32]}.safetensors"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class First:
    """The first call of a cell: digest of its outputs, what it spent, and what the method itself reported."""

    outputs: str
    spent: float
    evaluations: dict[str, float]
    reported: dict[str, float]


class Bench:
    """One method on one task on one device, prepared. Holds no state that a later cell could feel."""

    def __init__(
        self,
        info: MethodInfo,
        task_id: str,
        tier: str = "embedded",
        device: str = "cpu",
        show_progress: bool = True,
        rank: int = 0,
    ) -> None:
        self.info = info
        self.track, self.task = track_of(task_id)
        if task_id not in info.tasks:
            raise KeyError(f"{info.id} does not name task {task_id!r}; it names {', '.join(info.tasks)}")
        self.tier, self.device = tier, torch.device(device)
        self.dtype = torch.float32
        self.price = 1  # rows of a network that one evaluation of it takes
        if self.task.from_folder:
            checkpoint.admit(self._load())
            self.price = checkpoint.current().price
        self.ledger = Ledger(bounded=self.task.bounded)
        self.networks = {
            role: self._watched(role, backbones.load(name, self.device)) for role, name in self.task.backbones.items()
        }
        if self.task.from_folder:
            self.networks = checkpoint.Roles(self.networks)
        handles = self.track.handles(self.task, self.device)
        simulators = {name: watch_function(self.ledger, name, function) for name, function in handles.items()}
        told = checkpoint.seen(self.task) if self.task.from_folder else self.task
        self.session = Session(
            told, tier, self.device, self.dtype, self.networks, simulators, self.ledger, show_progress
        )
        self.method = self._load()
        self.offline = self._prepare()
        self.ranks = self.method.ranks
        self.pool: Pool | None = None
        if self.ranks > 1:
            self.ledger.entries[SENT] = Traffic()
            if rank == 0:  # the others are in processes of the pool, with a bench each
                self.device = device_of(self.device, 0)
                self.pool = Pool(info.id, task_id, tier, self.device, self.ranks)

    def _load(self) -> Method:
        with sealed():
            return plugins.load_class(self.info)()

    def _watched(self, name: str, network: nn.Module) -> nn.Module:
        return watch(self.ledger, name, network, self.track.layers(self.task, name, network))

    # -- prepare ------------------------------------------------------------------------------------------------

    def _prepare(self) -> records.Offline:
        seed = derive_seed("prepare", self.task.id, self.task.version)
        self.session.begin("prepare", seed)
        with sealed(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # initial weights of new networks
            own = self.method.networks(self.session)
        for name, network in own.items():
            for part in network.modules():
                part.__dict__.pop("forward", None)
            network.to(self.device)
            self.networks[name] = self._watched(name, network)
        path = prepared_path(self.info, self.task, self.tier, self.device)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                self._train(own, path)
            return self._restore(own, path)

    def _train(self, own: dict[str, nn.Module], path: Path) -> None:
        from safetensors.torch import save_file

        start = time.perf_counter()
        with sealed(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.session.seed)
            state = self.method.prepare(self.session) or {}
        self._synchronise()
        seconds = time.perf_counter() - start
        tensors = {f"state.{key}": value for key, value in state.items()}
        for name, network in own.items():
            tensors |= {f"network.{name}.{key}": value for key, value in network.state_dict().items()}
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        spent = {name: figures["evaluations"] for name, figures in self.ledger.snapshot().items()}
        cost = {"seconds": f"{seconds:.3f}", "evaluations": json.dumps(spent)}
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file(tensors or {"empty": torch.zeros(0)}, temporary, metadata=cost)
        temporary.replace(path)

    def _restore(self, own: dict[str, nn.Module], path: Path) -> records.Offline:
        from safetensors import safe_open

        weights: dict[str, dict[str, Tensor]] = {name: {} for name in own}
        size = 0
        self.session.state = {}
        with safe_open(path, framework="pt") as handle:
            cost = handle.metadata()
            for key in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                kind, _, rest = key.partition(".")
                tensor = handle.get_tensor(key)
                size += tensor.numel() * tensor.element_size()
                if kind == "state":
                    self.session.state[rest] = tensor.to(self.device)
                elif kind == "network":
                    name, _, parameter = rest.partition(".")
                    weights[name][parameter] = tensor
        for name, network in own.items():
            network.load_state_dict(weights[name])
            network.eval().requires_grad_(False)
        for name in self.task.backbones:  # a prepare that touched them must not leak into run
            fresh = backbones.load(self.task.backbones[name], self.device)
            self.networks[name].load_state_dict(fresh.state_dict())
            self.networks[name].eval().requires_grad_(False)
        self.method = self._load()
        return records.Offline(
            seconds=float(cost["seconds"]), evaluations=json.loads(cost["evaluations"]), state_mib=size / 2**20
        )

    # -- run ----------------------------------------------------------------------------------------------------

    def inputs(self, n: int, seed: int, purpose: str = "test") -> dict[str, Any]:
        """n test inputs of a noise seed: the same for every method, on every machine."""
        generator = torch.Generator().manual_seed(derive_seed(purpose, self.task.id, self.task.version, seed))
        return self.track.inputs(self.task, n, generator, self.device)

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
            return self.pool.call(partial(self.method.run, self.session, batch, rung // self.price), self.ledger)
        return self.method.run(self.session, batch, rung // self.price)

    def take_part(self, batch: Mapping[str, Any], rung: int, counting: bool) -> tuple[Flops | None, list[str]]:
        """A worker's part of a call that has begun: its FLOPs and what the guard flags, where those are counted."""
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
        return flops, guard.flags

    def run(self, batch: Mapping[str, Any], rung: int, seed: int, index: int = 0) -> Any:
        """One checked `run` call."""
        self.begin(batch, rung, seed, index)
        with sealed(), torch.no_grad():
            outputs = self.call(batch, rung)
        self.ledger.check()
        self.track.check(self.task, batch, outputs)
        return outputs

    def _synchronise(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def reference_flops(self, probe: Mapping[str, Any]) -> float | None:
        """FLOPs per item of one reference evaluation; None where the task has no network or nothing is countable."""
        if self.task.reference is None:
            return None
        self.ledger.reset()
        with torch.no_grad(), count_flops(self.ledger, list(self.networks.values())) as flops:
            items = self.track.reference_call(self.task, self.networks, probe)
        return flops.total / items or None

    def counted(self, batch: Mapping[str, Any], rung: int, seed: int) -> tuple[Flops, Guard]:
        """One call under the FLOP counter and the guard."""
        self.begin(batch, rung, seed)
        guard = Guard(self.session.rng, self.session.seed)
        with sealed(), torch.no_grad(), count_flops(self.ledger, list(self.networks.values())) as flops, guard:
            self.call(batch, rung)
        for report in self.pool.reports if self.pool is not None else []:
            if report.flops is not None:
                flops.ranks = [*(flops.ranks or [flops.total]), report.flops.total]
                flops.strays += report.flops.strays
                flops.threads += report.flops.threads
                flops.outside += report.flops.outside
            guard.flags += [flag for flag in report.flags if flag not in guard.flags]
        flops.total = sum(flops.ranks) or flops.total
        return flops, guard

    def audit(self, batch: dict[str, Any], first: First, rung: int, seed: int) -> tuple[list[str], dict[str, float]]:
        """Compare calls with each other. `first` is what the first call on `batch` gave. Returns flags, FLOP counts."""
        flags: list[str] = []
        for name, value in first.reported.items():
            own = first.spent if name == "nfe" else first.evaluations.get(name)
            if own is None:
                flags.append(f"reports {name}, which the harness does not count; report nfe or a handle's name")
            elif abs(own - value) > 1e-6:
                flags.append(f"reports {value:g} {name} for the batch, the harness counted {own:g}")

        probe = cut(batch, 0, min(self.task.probe, size_of(batch)))
        flops, guard = self.counted(probe, rung, seed)
        spent = self.ledger.spent
        flags += guard.flags
        items = size_of(probe)
        reference = self.reference_flops(probe)
        if flops.strays:
            flags.append(f"calls modules that no handle counts: {', '.join(sorted(set(flops.strays))[:3])}")
        if flops.threads:
            flags.append(f"calls modules in another thread: {', '.join(sorted(set(flops.threads))[:3])}")
        if reference and flops.outside >= 0.5 * reference * items:
            flags.append(
                f"spends {flops.outside / reference / items:.1f} reference evaluations per item outside any handle"
            )

        # Inputs that nobody has seen: their seed hangs on the method's own source, so no source can contain it.
        number = int(source_digest(self.info.path)[:12], 16)
        hidden, guard = self.counted(self.inputs(items, number, "audit"), rung, seed)
        flags += [flag for flag in guard.flags if flag not in flags]
        seen, unseen = (flops.total, spent), (hidden.total, self.ledger.spent)
        if any(a < 0.4 * b for a, b in zip(seen, unseen, strict=True)) and size_of(batch) > items:
            # One short text beside a long one is no sign of anything: a whole batch is.
            seen = (self.counted(batch, rung, seed)[0].total, self.ledger.spent)
            secret = self.inputs(size_of(batch), number, "audit")
            unseen = (self.counted(secret, rung, seed)[0].total, self.ledger.spent)
        for name, known, new in zip(("FLOPs", "evaluations"), seen, unseen, strict=True):
            if known < 0.4 * new:
                flags.append(f"spends {known:g} {name} on the test inputs but {new:g} on unseen ones: answers kept?")

        other = next((r for r in self.task.rungs if r != rung), rung)
        with contextlib.suppress(Exception):  # that rung's own cell reports its faults
            self.run(probe, other, seed + 1)
        again = self.run(batch, rung, seed)
        if fingerprint(again) != first.outputs:
            flags.append("the same call with the same seed gave other bits after another rung had run: hidden state")
        elif self.ledger.evaluations() != first.evaluations:
            flags.append("the same call counted differently the second time: answers kept between calls?")
        figures = {"flops": flops.total / items, "flops_outside": flops.outside / items}
        if reference:
            figures["nfe_equivalent"] = flops.total / items / reference
        if flops.ranks:
            figures |= {"ranks": float(self.ranks), "rank_flops": max(flops.ranks) / items}
        if flops.held:
            figures["kv_bytes"] = float(flops.held)
        return flags, figures

    def quality(self, n: int, rung: int, seed: int) -> tuple[dict[str, Any], Any, First, dict[str, dict[str, float]]]:
        """Run on all n items in batches: (inputs, outputs, the first call, counts by handle)."""
        inputs = self.inputs(n, seed)
        parts: list[Any] = []
        totals: dict[str, dict[str, float]] = {}
        first: First | None = None
        for index, start in enumerate(range(0, n, self.task.batch)):
            parts.append(self.run(cut(inputs, start, start + self.task.batch), rung, seed, index))
            if first is None:
                first = First(
                    fingerprint(parts[0]), self.ledger.spent, self.ledger.evaluations(), dict(self.session.reported)
                )
            for name, figures in self.ledger.snapshot().items():
                total = totals.setdefault(name, dict.fromkeys(figures, 0.0))
                for key, value in figures.items():
                    total[key] = total.get(key, 0.0) + value
        assert first is not None
        return inputs, join(parts), first, totals

    def judges(self) -> dict[str, nn.Module]:
        """Uncounted copies of the task's backbones and judges, for the metrics."""
        return {role: _judge(name, str(self.device)) for role, name in (self.task.backbones | self.task.judges).items()}


@lru_cache(maxsize=16)
def _judge(backbone: str, device: str) -> nn.Module:
    return backbones.load(backbone, device)


@lru_cache(maxsize=4)
def bench(method: str, task: str, tier: str, device: str, digest: str = "", show_progress: bool = True) -> Bench:
    """A prepared `Bench`, kept for the next rung. `digest` (of the source) makes an edited plugin a new one."""
    known = plugins.methods()
    if method not in known:
        raise KeyError(f"no method {method!r}; see: stepmark list methods")
    made = Bench(known[method], task, tier, device, show_progress)
    _settle()
    return made


@lru_cache(maxsize=1)
def _settle() -> None:
    """Spare the garbage collector what the libraries hold for good: it runs before every measurement, 0.3 s each."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # the libraries' own clean-up expects to be collected


def _time(
    mine: Bench, batch: dict[str, Any], first: First, cell: Cell
) -> tuple[records.Latency, list[str], str | None]:
    benches = {"method": mine}
    baseline: str | None = None
    for name in mine.info.baselines:
        if cell.task not in plugins.methods()[name].tasks:
            continue
        source = source_digest(plugins.methods()[name].path)
        try:
            other = bench(name, cell.task, cell.tier, str(mine.device), source)
            if mine.task.from_folder:  # where a method may need what the folder does not bring
                other.run(batch, cell.rung, cell.seed)
        except Skip:
            if mine.task.from_folder:
                continue
            raise
        baseline, benches["baseline"] = name, other
        break
    smoke = cell.tier == "smoke"
    with sealed(), torch.no_grad():
        read = latency.measure(
            {name: partial(each.call, batch, cell.rung) for name, each in benches.items()},
            mine.device,
            warmup=1,
            min_rounds=2 if smoke else mine.task.rounds,
            min_seconds=0.02 if smoke else mine.task.seconds,
            max_seconds=1.0 if smoke else 8.0,
            setups={name: partial(each.begin, batch, cell.rung, cell.seed) for name, each in benches.items()},
        )
    own = read["method"]
    flags = (
        [] if fingerprint(own.output) == first.outputs else ["the timed call gave other outputs than the scored one"]
    )
    figures: dict[str, Any] = {}
    if baseline is not None:
        other_read = read["baseline"]
        ratio = latency.ratio(other_read, own)
        figures = {
            "baseline": baseline,
            "baseline_median_ms": other_read.median_ns / 1e6,
            "baseline_samples_ms": [round(s / 1e6, 6) for s in other_read.samples_ns],
            "speedup": ratio.value,
            "speedup_low": ratio.low,
            "speedup_high": ratio.high,
        }
    found = records.Latency(
        items=size_of(batch),
        median_ms=own.median_ns / 1e6,
        iqr_ms=own.iqr_ns / 1e6,
        p95_ms=own.p95_ns / 1e6,
        samples_ms=[round(s / 1e6, 6) for s in own.samples_ns],
        cuda_ms=own.cuda_median_ms,
        **figures,
    )
    return found, flags, own.note


def measure(cell: Cell, device: str = "cpu", timing: bool = True, show_progress: bool = True) -> records.Record:
    """All passes of one cell. Never raises for what a plugin does: a failure is a record with its message.

    Timing, memory and energy are read at seed 0 only, where `timing` is set: other seeds repeat the quality.
    """
    return measured(cell, device, timing, show_progress)[0]


def measured(
    cell: Cell, device: str = "cpu", timing: bool = True, show_progress: bool = True
) -> tuple[records.Record, samples.Shown | None]:
    """As `measure`, and what the cell gave to look at (seed 0 only)."""
    info = plugins.methods().get(cell.method)
    if info is None:
        raise KeyError(f"no method {cell.method!r}; see: stepmark list methods")
    task = track_of(cell.task)[1]
    torch.set_num_threads(1)
    fields: dict[str, Any] = {
        "suite": __version__,
        "track": plugins.tasks()[cell.task][0],
        "method": cell.method,
        "task": cell.task,
        "rung": cell.rung,
        "seed": cell.seed,
        "tier": cell.tier,
        "machine": machine.machine_id(),
        "device": torch.device(device).type,
        "checkpoint": task.checkpoint[: plugins.DIGITS],
        "digests": digests(info, task),
        "environment": machine.environment()
        | {"threads": "1"}
        | ({"checkpoint": task.summary} if task.from_folder else {}),
        "command": cell.command,
        "created": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
    }
    shown: samples.Shown | None = None
    try:
        passed, shown = _passes(cell, info, device, timing, show_progress)
        fields["environment"] |= passed.pop("environment", {})
        fields |= passed
    except Skip as reason:
        fields |= {"status": "skipped", "message": _one_line(str(reason))}
    except (BudgetExceeded, BadOutput, Sealed) as error:
        fields |= {"status": "failed", "message": _one_line(f"{type(error).__name__}: {error}")}
    except Exception as error:
        fields |= {
            "status": "failed",
            "message": _one_line(f"{type(error).__name__}: {error} {_place(error, info.path)}"),
        }
    return records.Record(**fields), shown


def _passes(
    cell: Cell, info: MethodInfo, device: str, timing: bool, show_progress: bool
) -> tuple[dict[str, Any], samples.Shown | None]:
    mine = bench(cell.method, cell.task, cell.tier, device, source_digest(info.path), show_progress)
    why = records.UNTIMED
    if mine.ranks > (cores := machine.usable_cores()) and mine.device.type == "cpu":
        timing, why = False, f"{mine.ranks} processes on {cores} core: their times would say nothing"
    mine.method = mine._load()  # globals that an earlier rung left in the module are gone
    task = mine.task
    n = task.items(cell.tier)
    inputs, outputs, first, handles = mine.quality(n, cell.rung, cell.seed)
    batch = cut(inputs, 0, task.batch)
    resample = bootstrap_indices(n, RESAMPLES, derive_seed("resample", task.id, cell.seed) % 2**32)
    scores = mine.track.score(task, inputs, outputs, mine.judges(), resample)
    bounded = [*mine.ledger.networks] if task.bounded == ("*",) else list(task.bounded)
    counts = {"nfe": sum(handles.get(name, {}).get("evaluations", 0.0) for name in bounded) / n}
    for name, figures in handles.items():
        counts |= {f"{name}_{key}": value / n for key, value in figures.items() if key != "calls"}
    found: dict[str, Any] = {
        "status": "ok",
        "handles": handles,
        "reported": first.reported,
        "quality": {name: _quality(s.value, s.resamples) for name, s in scores.items()},
        "offline": mine.offline,
        "outputs": fingerprint(outputs),
    }
    reasons: dict[str, str] = {}
    flags: list[str] = []
    if cell.seed == 0:
        flags, figures = mine.audit(batch, first, cell.rung, cell.seed)
        counts |= figures
        if "nfe_equivalent" not in figures:
            reasons["nfe_equivalent"] = "the task has no network whose evaluation has countable FLOPs"
    if cell.seed == 0 and timing:
        found["latency"], more, note = _time(mine, batch, first, cell)
        flags += more
        reasons |= {"latency": note} if note else {}
        # Items in a list are run one after the other: the peak is that of one, and the tracker is slow.
        listed = isinstance(next(iter(batch.values())), list)
        weighed = cut(batch, 0, task.probe) if listed else batch
        mine.begin(weighed, cell.rung, cell.seed)
        with sealed(), torch.no_grad():
            peak = memory.measure(lambda: mine.call(weighed, cell.rung), mine.device)
        state = sum(p.numel() * p.element_size() for net in mine.networks.values() for p in net.parameters())
        if peak.bytes is None:
            reasons["memory"] = peak.reason or "not read"
        else:
            found["memory"] = records.Memory(peak_mib=peak.bytes / 2**20, how=str(peak.method), state_mib=state / 2**20)
        if cell.tier == "smoke":
            read = energy.Energy(None, reason="not read at tier smoke")
        else:
            read = energy.measure(_again(mine, batch, cell), mine.device)
        if read.joules is None or read.window_s is None:
            reasons["energy"] = read.reason or "not read"
        else:
            found["energy"] = records.Energy(
                joules=read.joules, idle_watts=read.idle_watts, window_s=read.window_s, sensor=str(read.method)
            )
    elif cell.seed:
        reasons |= dict.fromkeys(("latency", "memory", "energy"), "read at seed 0; other seeds repeat the quality")
    else:
        reasons |= dict.fromkeys(("latency", "memory", "energy"), why)
    if mine.ranks > 1:  # what its times have to be read beside
        found["environment"] = {"processes": str(mine.ranks), "cores": str(machine.usable_cores())}
    if flags:
        bench.cache_clear()  # whatever the plugin left behind must not reach the next cell
    found |= {"counts": counts, "reasons": reasons, "flags": flags, "status": "flagged" if flags else "ok"}
    shown = cell.seed == 0 and not task.from_folder  # of a checkpoint: latents, or words of another vocabulary
    if not shown:
        return found, None
    return found, samples.marked(samples.of_outputs(inputs, outputs), mine, inputs, cell.rung, cell.seed)


def _again(mine: Bench, batch: Mapping[str, Any], cell: Cell) -> Callable[[], Any]:
    def once() -> Any:
        mine.begin(batch, cell.rung, cell.seed)
        with sealed(), torch.no_grad():
            return mine.call(batch, cell.rung)

    return once


def _quality(value: float, resamples: list[float]) -> records.Quality:
    return records.Quality(value=float(value), resamples=[float(f"{r:.6g}") for r in resamples])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1900]


def _place(error: BaseException, path: Path) -> str:
    """(file:line) of the innermost frame inside the plugin."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            place = f"({path.name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Commit of the checkout, `-dirty` when tracked files differ from it; None outside a checkout."""
    root = plugins.checkout()
    if root is None:
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!leaderboard/results")
        return git("rev-parse", "HEAD")[:12] + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None
