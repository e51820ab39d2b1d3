"""The one timing protocol.

Every subject is warmed up by full calls at the measured shapes. Then come rounds: each round times each
subject once, every other round in reverse order (A B, B A, A B, ...), so that a drift of the clock, the
temperature or the neighbours falls on all of them alike, and sample i of every subject belongs to round i. A
sample is `perf_counter_ns` around one call with the device idle on both sides and the garbage collector off;
on CUDA a pair of events reads the same call from the device's side. No sample is thrown away.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from stepmark.stats import bootstrap_indices, percentile_interval

clock = time.perf_counter_ns  # a module name, so that a test can drive the protocol by a clock of its own

FEWEST_ROUNDS = 2  # one in each order, even if a single call outlasts max_seconds
NO_EVENTS = "CUDA events need a CUDA device"


@dataclass(frozen=True)
class Latency:
    """All samples of one subject, in the order of the rounds, and the output of its last timed call.

    `cuda_samples_ns` is None where no events were taken, with the reason in `cuda_reason`. `note` says in one
    line what cut the measurement short, if anything did.
    """

    samples_ns: tuple[int, ...]
    cuda_samples_ns: tuple[int, ...] | None = None
    cuda_reason: str | None = NO_EVENTS
    note: str | None = None
    output: Any = None

    def __post_init__(self) -> None:
        if not self.samples_ns:
            raise ValueError("a latency needs at least one sample")

    @property
    def rounds(self) -> int:
        return len(self.samples_ns)

    @property
    def median_ns(self) -> float:
        return float(np.median(self.samples_ns))

    @property
    def iqr_ns(self) -> float:
        """Distance of the quartiles."""
        low, high = np.quantile(self.samples_ns, [0.25, 0.75])
        return float(high - low)

    @property
    def p95_ns(self) -> float:
        return float(np.quantile(self.samples_ns, 0.95))

    @property
    def samples_ms(self) -> list[float]:
        return [sample / 1e6 for sample in self.samples_ns]

    @property
    def median_ms(self) -> float:
        return self.median_ns / 1e6

    @property
    def iqr_ms(self) -> float:
        return self.iqr_ns / 1e6

    @property
    def p95_ms(self) -> float:
        return self.p95_ns / 1e6

    @property
    def cuda_median_ms(self) -> float | None:
        return None if self.cuda_samples_ns is None else float(np.median(self.cuda_samples_ns)) / 1e6


@dataclass(frozen=True)
class Ratio:
    """Median of a over median of b, and its bootstrap interval over rounds."""

    value: float
    low: float
    high: float


def synchroniser(device: torch.device | str) -> Callable[[], None]:
    """A call that waits until the device is idle; on the CPU, where calls are done when they return, nothing.

    Raises:
        RuntimeError: a device that is not the CPU, on a machine without an accelerator.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return lambda: None
    if not torch.accelerator.is_available():
        raise RuntimeError(f"device {device} asked for, but torch finds no accelerator on this machine")
    return lambda: torch.accelerator.synchronize(device)


class Sampler:
    """Times single calls on one device."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.synchronise = synchroniser(self.device)
        self.events = self.device.type == "cuda"
        self.start = torch.cuda.Event(enable_timing=True) if self.events else None
        self.end = torch.cuda.Event(enable_timing=True) if self.events else None

    def sample(self, call: Callable[[], Any]) -> tuple[int, int | None, Any]:
        """Wall nanoseconds, device nanoseconds or None, and the output of one call."""
        synchronise, collecting = self.synchronise, gc.isenabled()
        synchronise()
        gc.disable()
        try:
            if self.start is None or self.end is None:
                before = clock()
                output = call()
                synchronise()
                return clock() - before, None, output
            # Named stream: the current stream of the measured device, not of whichever device is current.
            stream = torch.cuda.current_stream(self.device)
            before = clock()
            self.start.record(stream)
            output = call()
            self.end.record(stream)
            synchronise()
            wall = clock() - before
            return wall, round(self.start.elapsed_time(self.end) * 1e6), output
        finally:
            if collecting:
                gc.enable()


def measure(
    subjects: Mapping[str, Callable[[], Any]],
    device: torch.device | str,
    warmup: int = 2,
    min_rounds: int = 10,
    min_seconds: float = 1.0,
    max_seconds: float = 60.0,
    setups: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Latency]:
    """Time subjects of this process against each other; each is a call without arguments at the shapes to be measured.

    `setups[name]` runs before every call of that subject, outside the clock (random stream, counters). The rest as
    `take_turns`.
    """
    sampler, before = Sampler(device), dict(setups or {})

    def turn(name: str, number: int) -> tuple[int, int | None, Any]:
        if (setup := before.get(name)) is not None:
            setup()
        return sampler.sample(subjects[name])

    turns = {name: partial(turn, name) for name in subjects}
    return take_turns(turns, warmup, min_rounds, min_seconds, max_seconds, sampler.events)


def take_turns(
    subjects: Mapping[str, Callable[[int], tuple[int, int | None, Any]]],
    warmup: int,
    min_rounds: int,
    min_seconds: float,
    max_seconds: float,
    events: bool = False,
) -> dict[str, Latency]:
    """Time subjects against each other. Each makes the call of a round, whose number it is told (warm-ups are below 0), and
    returns its wall nanoseconds, those of the device or None, and what it wants to be kept of the last call.

    Rounds go on until there are `min_rounds` of them and every subject has been timed for `min_seconds` in
    all. No round begins after `max_seconds` of rounds (warm-up not included), but `FEWEST_ROUNDS` are always
    made; a measurement cut short says so in `note`. An error of a subject is raised as it is.
    """
    if not subjects:
        raise ValueError("measure: no subjects")
    if warmup < 1 or min_rounds < 1:
        raise ValueError("measure: at least one warm-up call and one round")
    forward = list(subjects)
    for number in range(-warmup, 0):
        for name in forward:
            subjects[name](number)
    wall: dict[str, list[int]] = {name: [] for name in forward}
    cuda: dict[str, list[int]] = {name: [] for name in forward}
    outputs: dict[str, Any] = {}
    gc.collect()
    began, rounds, note = clock(), 0, None
    while True:
        enough = rounds >= min_rounds and min(sum(samples) for samples in wall.values()) >= min_seconds * 1e9
        if enough and rounds >= FEWEST_ROUNDS:
            break
        if rounds >= FEWEST_ROUNDS and clock() - began >= max_seconds * 1e9:
            note = f"stopped after {rounds} rounds at the limit of {max_seconds:g} s"
            break
        for name in forward if rounds % 2 == 0 else reversed(forward):
            outputs.pop(name, None)  # freed before the clock starts, not inside the sample
            ns, device_ns, outputs[name] = subjects[name](rounds)
            wall[name].append(ns)
            if device_ns is not None:
                cuda[name].append(device_ns)
        rounds += 1
    return {
        name: Latency(
            samples_ns=tuple(wall[name]),
            cuda_samples_ns=tuple(cuda[name]) if events else None,
            cuda_reason=None if events else NO_EVENTS,
            note=note,
            output=outputs[name],
        )
        for name in forward
    }


def ratio(a: Latency, b: Latency, B: int = 2000, seed: int = 0, level: float = 0.95) -> Ratio:
    """Ratio of the medians of two subjects of one `measure` call, resampled by rounds that both keep in step.

    Raises:
        ValueError: different numbers of rounds, that is subjects which were not interleaved; a median of
            nought.
    """
    if a.rounds != b.rounds:
        raise ValueError(f"ratio: {a.rounds} and {b.rounds} rounds were not interleaved; measure both in one call")
    first, second = np.asarray(a.samples_ns, dtype=np.float64), np.asarray(b.samples_ns, dtype=np.float64)
    if np.median(second) == 0:
        raise ValueError("ratio: the second median is zero")
    rows = bootstrap_indices(a.rounds, B, seed)
    below = np.median(second[rows], axis=1)
    # A clock too coarse for the call can make a resampled median nought; one tick is the least it can tell.
    low, high = percentile_interval(np.median(first[rows], axis=1) / np.maximum(below, 1.0), level)
    return Ratio(float(np.median(first) / np.median(second)), low, high)


def floor(device: torch.device | str, rounds: int = 2000) -> float:
    """Median nanoseconds that the protocol reads for a call that does nothing: what it adds to every
    sample."""
    sampler = Sampler(device)

    def nothing() -> None:
        return None

    for _ in range(rounds // 10 + 1):
        sampler.sample(nothing)
    return float(np.median([sampler.sample(nothing)[0] for _ in range(rounds)]))


def with_pytest_benchmark(
    benchmark: Any,
    call: Callable[[], Any],
    rounds: int,
    device: torch.device | str = "cpu",
    warmup: int = 2,
) -> tuple[Any, Latency | None]:
    """The same sample taken by the `benchmark` fixture of pytest-benchmark: (output of the last call,
    latency).

    For the tables that pytest prints; one subject, hence no interleaving and no ratio. The latency is None
    where the fixture took no times (`--benchmark-disable`, xdist); the output is there all the same.
    """
    synchronise = synchroniser(device)

    def timed() -> Any:
        output = call()
        synchronise()
        return output

    def idle() -> None:
        synchronise()

    output = benchmark.pedantic(timed, setup=idle, rounds=rounds, warmup_rounds=warmup, iterations=1)
    if benchmark.stats is None:
        return output, None
    samples = tuple(round(seconds * 1e9) for seconds in benchmark.stats.stats.data)
    return output, Latency(samples_ns=samples, cuda_reason="pytest-benchmark takes no CUDA events", output=output)
