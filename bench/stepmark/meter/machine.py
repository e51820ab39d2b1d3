"""What machine a record was read on: a fingerprint for people, a short id for folders and comparisons.

Cheap and without torch: files of the kernel, psutil, and NVML through ctypes; no process is started on Linux,
and the constant part is read once per process. Nothing that names a person is looked at: no host name, user,
path or serial number.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import psutil

from stepmark import devices

PROC, CGROUPS = "/proc", "/sys/fs/cgroup"
LONGEST_SLUG = 80  # characters of an id before its digest
LIBRARIES = (
    "stepmark", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "safetensors", "diffusers", "transformers",
    "tokenizers", "accelerate", "triton", "zeus", "ray",
)  # fmt: skip
NOISE = re.compile(
    r"\((?:r|tm|c)\)|@.*$|\bwith\b.*$|\b\d+(?:st|nd|rd|th) gen\b|\b(?:\d+|six|eight|twelve|sixteen)-core\b"
    r"|\b(?:cpu|processor|amd|intel|nvidia|genuine|authentic)\b",
    re.IGNORECASE,
)
MEMORY_OF_GPU = re.compile(r"(?<!g\.)\b\d+\s*gi?b\b|\b(?:hbm\d\w*|pcie|sxm\d*|nvl)\b", re.IGNORECASE)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _cpu_model() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "cpu model", "Model") and value.strip():
            return " ".join(value.split())
    if sys.platform == "darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            return subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return platform.processor() or platform.machine() or "unknown"


def _cpu_revision() -> str | None:
    """Family, model and stepping. Processors of one name round differently: bits are compared within a revision only."""
    found: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    parts = [found[key] for key in ("cpu family", "model", "stepping") if found.get(key)]
    return ".".join(parts) or None


def _mhz(path: str) -> float | None:
    text = _read(path)
    return int(text) / 1000 if text and text.isdigit() else None


def _gpus() -> dict[str, object]:
    """Driver, highest CUDA version of the driver, and the `cards` (name, uuid, clocks) of NVIDIA GPUs, from NVML; {}
    without the library."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return {}
    if nvml.nvmlInit_v2() != 0:
        return {}
    try:
        text = ctypes.create_string_buffer(96)
        found: dict[str, object] = {}
        if nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))) == 0:
            found["gpu_driver"] = text.value.decode(errors="replace")
        number = ctypes.c_int()
        if nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(number)) == 0:
            found["gpu_driver_cuda"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        cards: list[dict[str, object]] = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
                continue
            card: dict[str, object] = {}
            for key, ask in (("name", nvml.nvmlDeviceGetName), ("uuid", nvml.nvmlDeviceGetUUID)):
                if ask(handle, text, ctypes.c_uint(len(text))) == 0:
                    card[key] = text.value.decode(errors="replace")
            clock = ctypes.c_uint()
            # Clock type 1 is that of the multiprocessors.
            if nvml.nvmlDeviceGetMaxClockInfo(handle, 1, ctypes.byref(clock)) == 0:
                card["gpu_max_mhz"] = clock.value
            if nvml.nvmlDeviceGetClockInfo(handle, 1, ctypes.byref(clock)) == 0:
                card["gpu_mhz_at_start"] = clock.value
            if "name" in card:
                cards.append(card)
        return found | {"cards": cards}
    finally:
        nvml.nvmlShutdown()


def _versions() -> dict[str, str]:
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def lock_digest() -> str | None:
    """sha256 of the pins of the checkout's requirements.lock that hold on this system; None outside a checkout.

    Pins of other systems, and the markers that tell them apart, change nothing that is installed here.
    """
    for folder in Path(__file__).resolve().parents:
        lock = folder / "requirements.lock"
        if lock.is_file():
            return hashlib.sha256("".join(f"{pin}\n" for pin in pins(lock)).encode()).hexdigest()
        if (folder / "pyproject.toml").is_file():
            break  # the root of the checkout: what lies above is somebody else's
    return None


def pins(lock: Path, system: dict[str, str] | None = None) -> list[str]:
    """The lines name==version of a lock file that hold on this system, or on one of these markers of PEP 508."""
    from packaging.markers import Marker

    found = []
    for line in lock.read_text(encoding="utf-8").splitlines():
        pin, _, marker = (part.strip() for part in line.partition(";"))
        if pin and not pin.startswith("#") and (not marker or Marker(marker).evaluate(system)):
            found.append(pin)
    return found


@functools.cache
def _hardware() -> dict[str, object]:
    """The fields that the id is made of: stable from boot to boot and from one installation to the next."""
    return {
        "cpu": _cpu_model(),
        "logical_cores": os.cpu_count() or 1,
        "ram_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": [card["name"] for card in _cards()],
    }


@functools.cache
def _nvidia() -> dict[str, object]:
    return _gpus()


def _cards() -> list[dict[str, object]]:
    cards = _nvidia().get("cards", [])
    assert isinstance(cards, list)
    return cards


@functools.cache
def _constant() -> dict[str, object]:
    cpufreq = "/sys/devices/system/cpu/cpu0/cpufreq/"
    found: dict[str, object] = {
        **_hardware(),
        "cpu_revision": _cpu_revision(),
        "physical_cores": psutil.cpu_count(logical=False),
        "architecture": platform.machine(),
        "cpu_max_mhz": _mhz(cpufreq + "cpuinfo_max_freq"),
        "cpu_governor": _read(cpufreq + "scaling_governor"),
        "os": platform.system(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libraries": _versions(),
        "lock": lock_digest(),
    }
    return found | {key: value for key, value in _nvidia().items() if key != "cards"}


def cores() -> list[int]:
    """Numbers of the cores that this process may be on. Where the system has no affinity (macOS): all."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def usable_cores() -> int:
    """Cores that this process may keep busy: those that it may be on, and no more than its container is given time for
    (`docker run --cpus=2`). Of a core and a half one: the half would be timed while it waits.
    """
    quota = _quota()
    return len(cores()) if quota is None else max(1, min(len(cores()), int(quota)))


def _quota() -> float | None:
    """Cores' worth of time that control groups grant this process; None without a limit. A group has what the groups
    above it leave; in a container the path from outside may mean nothing, and the root of the mount is its own."""
    found: list[float] = []
    for line in (_read(f"{PROC}/self/cgroup") or "0::/\n1:cpu:/").splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "none", "")
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = [CGROUPS, f"{CGROUPS}/unified"] if not controllers else [f"{CGROUPS}/{controllers}", f"{CGROUPS}/cpu"]
        steps = [part for part in path.split("/") if part and part != ".."]
        for root in roots:
            for depth in range(len(steps) + 1):
                found += _granted("/".join([root, *steps[:depth]]))
    return min(found, default=None)


def _granted(group: str) -> list[float]:
    """The limit of one control group, of version 2 or 1, if it has one."""
    quota, _, period = (_read(f"{group}/cpu.max") or "").partition(" ")
    if not quota:
        quota, period = _read(f"{group}/cpu.cfs_quota_us") or "", _read(f"{group}/cpu.cfs_period_us") or ""
    period = period.strip() or "100000"
    return [int(quota) / int(period)] if quota.isdigit() and period.isdigit() and int(quota) and int(period) else []


def fingerprint(device: str = "cpu") -> dict[str, object]:
    """All that is known of the machine and the installation; fields that cannot be read are None or missing.

    Keys: cpu, cpu_revision (family, model and stepping), logical_cores, physical_cores, usable_cores, ram_gib,
    architecture, cpu_max_mhz, cpu_governor, gpus (list of names), gpu_driver, gpu_driver_cuda, gpu_max_mhz,
    gpu_mhz_at_start, os, python, libraries (name -> version), lock (sha256), torch_cuda, torch_threads and vector_units
    (None until torch is imported), machine (the id). Clocks are those of `device`, of the first card for the CPU. Of a
    device that is not the CPU also: gpu (its name), gpu_index, tf32.
    """
    torch = sys.modules.get("torch")  # never imported for the CPU: that would cost seconds
    return {
        **_constant(),
        **_device(device),
        "usable_cores": usable_cores(),
        "torch_threads": torch.get_num_threads() if torch is not None else None,
        "torch_cuda": torch.version.cuda if torch is not None else None,
        "vector_units": torch.backends.cpu.get_cpu_capability() if torch is not None else None,
        "machine": machine_id(device),
    }


def _device(device: str) -> dict[str, object]:
    """What is to be said of the device that a record was measured on, and on no other of this machine."""
    if devices.kind_of(device) == "cpu":
        card = next(iter(_cards()), {})
    else:
        uuid = devices.uuid_of(device)
        same = (card for card in _cards() if str(card.get("uuid", "")).lower().removeprefix("gpu-") == uuid)
        card = next(same, {}) if uuid else {}  # a slice of a card has clocks of its own, which NVML does not tell
    found = {key: value for key, value in card.items() if key not in {"name", "uuid"}}
    if devices.kind_of(device) == "cpu":
        return found
    index = int(devices.named(device).partition(":")[2])
    return found | {"gpu": devices.model_of(device), "gpu_index": index, "tf32": devices.tf32()}


def environment(device: str = "cpu") -> dict[str, str]:
    """The fingerprint flattened to lines, as records keep it: lower-case keys, absent fields left out, and without the
    clock of the moment, so that every run on a machine has the same.
    """
    lines: dict[str, str] = {}
    for key, value in fingerprint(device).items():
        if key == "gpu_mhz_at_start":
            continue
        if isinstance(value, dict):
            lines.update({re.sub(r"[^a-z0-9]+", "_", f"{name}".lower()): str(text) for name, text in value.items()})
        elif isinstance(value, list):
            if value:
                lines[key] = ", ".join(map(str, value))
        elif value is not None:
            lines[key] = str(value)
    return lines


def _slug(name: str, noise: re.Pattern[str] = NOISE) -> str:
    plain = NOISE.sub(" ", noise.sub(" ", name)).lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:32].strip("-")


def describe(cpu: str, logical_cores: int, ram_gib: int, gpus: list[str]) -> str:
    """The id of a machine of these parts: a readable slug and eight digits of a digest over exactly these
    fields. GPUs of several models are all named."""
    fields = {"cpu": cpu, "logical_cores": logical_cores, "ram_gib": ram_gib, "gpus": gpus}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
    parts = [_slug(cpu) or "cpu", f"{logical_cores}c"]
    for model in dict.fromkeys(gpus):
        short = _slug(model, MEMORY_OF_GPU) or "gpu"
        parts.append(short if gpus.count(model) == 1 else f"{gpus.count(model)}x-{short}")
    return "-".join(parts)[:LONGEST_SLUG].strip("-") + f"-{digest}"


def machine_id(device: str = "cpu") -> str:
    """Short id of this machine, such as `epyc-7b13-2c-1a2b3c4d`; the same in every process and after an update.

    Figures of one id are compared. So GPUs of one machine have ids of their own where they are not of one model, and
    so has a slice of one.
    """
    model = devices.model_of(device)
    hardware = _hardware()
    gpus = hardware["gpus"]
    assert isinstance(gpus, list)
    if model is not None and set(gpus) != {model}:
        gpus = [model] * max(1, gpus.count(model))
    return describe(str(hardware["cpu"]), int(str(hardware["logical_cores"])), int(str(hardware["ram_gib"])), gpus)


def machine_ids(kind: str) -> set[str]:
    """The ids that cells may get here whichever device of this kind they run on; slices are not among them."""
    if kind == "cpu":
        return {machine_id()}
    hardware = _hardware()
    gpus = hardware["gpus"]
    assert isinstance(gpus, list)
    rest = (str(hardware["cpu"]), int(str(hardware["logical_cores"])), int(str(hardware["ram_gib"])))
    return {describe(*rest, [model] * gpus.count(model)) for model in gpus}
