"""Joules of one call, from hardware counters alone.

Zeus reads the cumulative counters (NVML on the GPU, RAPL on the CPU). They step about every 100 ms, so the
call is repeated until the window is far longer than that, and the idle power of the same sensors is read in a
window of its own beside it. Where no sensor can be read the figure is null with its reason. Nothing here is
ever modelled from a nominal power or a load: an estimate is not a reading.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stepmark import devices

COUNTER_PERIOD_S = 0.1  # the slower counters in use refresh about ten times a second
SHORTEST_WINDOW_S = 20 * COUNTER_PERIOD_S
RAPL_FILES = (
    "/sys/class/powercap/intel-rapl/intel-rapl:*/energy_uj",
    "/sys/class/powercap/intel-rapl:*/energy_uj",
)


@dataclass(frozen=True)
class Energy:
    """Energy of one call on the sensors of its own device; or None and a one-line reason.

    `joules` is the counter's figure over the window divided by the calls in it, idle power included;
    `joules_above_idle` has `idle_watts` x time taken off. `sensors` holds the window's joules by sensor
    ("gpu0", "cpu0", "dram0").
    """

    joules: float | None
    joules_above_idle: float | None = None
    idle_watts: float | None = None
    window_s: float | None = None
    calls: int = 0
    sensors: dict[str, float] = field(default_factory=dict)
    method: str | None = None
    reason: str | None = None


def missing_sensor(device: Any) -> str | None:
    """Why the energy of this device cannot be read here, in one line; None if a sensor seems to be there.

    Cheap, and asked before Zeus is imported: that takes seconds, and on a machine without sensors Zeus raises
    nothing and adds up to 0 J.
    """
    kind = devices.kind_of(str(device))
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "torch finds no CUDA device on this machine"
        if " MIG " in (devices.model_of(str(device)) or ""):
            return "a MIG slice has no energy counter: the card's is that of all its slices"
        if os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            return "CUDA numbers the GPUs by another order than their counters; unset CUDA_DEVICE_ORDER"
    elif kind == "cpu":
        files = [path for pattern in RAPL_FILES for path in glob.glob(pattern)]
        if not files:
            return "the machine shows no RAPL energy counter"
        if not any(os.access(path, os.R_OK) for path in files) and not _zeusd():
            return "the RAPL energy counter may not be read by this user; run as root or start zeusd"
    else:
        return f"no energy meter for devices of type {kind}"
    try:
        found = importlib.util.find_spec("zeus") is not None
    except (ImportError, ValueError):
        found = False
    return None if found else "Zeus is not installed; pip install 'stepmark[energy]'"


def _zeusd() -> bool:
    return any(name.startswith("ZEUSD_") for name in os.environ)


def _monitor(device: Any) -> Any:
    from zeus.monitor import ZeusMonitor  # type: ignore[import-untyped]

    if devices.kind_of(str(device)) == "cpu":
        return ZeusMonitor(gpu_indices=[])
    return ZeusMonitor(gpu_indices=[int(devices.named(device).partition(":")[2])], cpu_indices=[])


def _readings(measurement: Any) -> dict[str, float]:
    """Joules by sensor of a Zeus measurement; sensors that it does not have are not in it."""
    parts: dict[str, float] = {}
    for name, readings in (
        ("gpu", measurement.gpu_energy),
        ("cpu", measurement.cpu_energy),
        ("dram", measurement.dram_energy),
    ):
        for index, joules in (readings or {}).items():
            parts[f"{name}{index}"] = float(joules)
    return parts


def measure(
    call: Callable[[], Any],
    device: Any,
    min_window_s: float = 3.0,
    idle_s: float = 3.0,
    monitor: Any = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Energy:
    """Energy of one call, repeated for at least `min_window_s` seconds (never less than `SHORTEST_WINDOW_S`).

    `device` is a torch device or its name. The figure is that of the device's own sensors: the GPU for
    "cuda", CPU packages and their DRAM for "cpu". `monitor` (an object with Zeus's `begin_window` and
    `end_window`) replaces the search for a sensor. Faults of the sensor become a reason; an error of `call`
    itself is raised as it is.
    """
    from stepmark.meter.latency import synchroniser

    if monitor is None:
        reason = missing_sensor(device)
        if reason is not None:
            return Energy(None, reason=reason)
        try:
            monitor = _monitor(device)
            if not getattr(monitor, "gpu_indices", ()) and not getattr(monitor, "cpu_indices", ()):
                return Energy(None, reason="Zeus finds no sensor for this device")
            for index in getattr(monitor, "gpu_indices", ()):
                # Without a counter Zeus adds up polled power instead, which is an estimate.
                if not monitor.gpus.supports_get_total_energy_consumption(index):
                    return Energy(None, reason=f"GPU {index} has no energy counter")
        except Exception as error:  # each vendor library raises its own kind
            return Energy(None, reason=f"Zeus cannot read a sensor: {_line(error)}")

    synchronise = synchroniser(device)
    call()
    synchronise()
    try:
        sleep(0.5)  # let the power of the warm-up call fall before idle is read
        monitor.begin_window("stepmark_idle")
        sleep(max(idle_s, SHORTEST_WINDOW_S))
        idle = monitor.end_window("stepmark_idle")
        monitor.begin_window("stepmark_calls")
    except Exception as error:
        return Energy(None, reason=f"Zeus cannot read a sensor: {_line(error)}")
    calls, began = 0, clock()
    while calls == 0 or clock() - began < max(min_window_s, SHORTEST_WINDOW_S):
        call()
        synchronise()
        calls += 1
    try:
        spent = monitor.end_window("stepmark_calls")
    except Exception as error:
        return Energy(None, reason=f"Zeus cannot read a sensor: {_line(error)}")

    sensors, resting = _readings(spent), _readings(idle)
    if not sensors:
        return Energy(None, reason="Zeus finds no sensor for this device")
    stuck = [name for name, joules in sensors.items() if not joules > 0 or not joules < float("inf")]
    if stuck:
        return Energy(
            None, reason=f"the counter of {', '.join(stuck)} did not advance over {spent.time:.1f} s of calls"
        )
    total, window = sum(sensors.values()), float(spent.time)
    idle_watts = sum(resting.values()) / float(idle.time) if resting and min(resting.values()) >= 0 else None
    above = None if idle_watts is None else (total - idle_watts * window) / calls
    return Energy(
        total / calls, above, idle_watts, window, calls, sensors, method="zeus: " + ", ".join(sorted(sensors))
    )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
