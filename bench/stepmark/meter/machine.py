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

LIBRARIES = (
    "stepmark", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "safetensors", "diffusers", "transformers",
    "tokenizers", "accelerate", "triton", "zeus", "ray",
)  # fmt: skip
NOISE = re.compile(
    r"\((?:r|tm|c)\)|@.*$|\bwith\b.*$|\b\d+(?:st|nd|rd|th) gen\b|\b(?:\d+|six|eight|twelve|sixteen)-core\b"
    r"|\b(?:cpu|processor|amd|intel|nvidia|genuine|authentic)\b",
    re.IGNORECASE,
)
MEMORY_OF_GPU = re.compile(r"\b\d+\s*gi?b\b|\b(?:hbm\d\w*|pcie|sxm\d*|nvl)\b", re.IGNORECASE)


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
    """Names, driver, highest CUDA version of the driver and clocks of NVIDIA GPUs, from NVML; {} without the
    library."""
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
        names: list[str] = []
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
                continue
            if nvml.nvmlDeviceGetName(handle, text, ctypes.c_uint(len(text))) == 0:
                names.append(text.value.decode(errors="replace"))
            clock = ctypes.c_uint()
            # Clock type 1 is that of the multiprocessors.
            if index == 0 and nvml.nvmlDeviceGetMaxClockInfo(handle, 1, ctypes.byref(clock)) == 0:
                found["gpu_max_mhz"] = clock.value
            if index == 0 and nvml.nvmlDeviceGetClockInfo(handle, 1, ctypes.byref(clock)) == 0:
                found["gpu_mhz_at_start"] = clock.value
        return found | ({"gpus": names} if names else {})
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


def lock_digest() -> str | None:
    """sha256 of the checkout's requirements.lock; None outside a checkout."""
    for folder in Path(__file__).resolve().parents:
        lock = folder / "requirements.lock"
        if lock.is_file():
            return hashlib.sha256(lock.read_bytes()).hexdigest()
        if (folder / "pyproject.toml").is_file():
            break  # the root of the checkout: what lies above is somebody else's
    return None


@functools.cache
def _hardware() -> dict[str, object]:
    """The fields that the id is made of: stable from boot to boot and from one installation to the next."""
    return {
        "cpu": _cpu_model(),
        "logical_cores": os.cpu_count() or 1,
        "ram_gib": round(psutil.virtual_memory().total / 2**30),
        "gpus": _nvidia().get("gpus", []),
    }


@functools.cache
def _nvidia() -> dict[str, object]:
    return _gpus()


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
    return found | {key: value for key, value in _nvidia().items() if key != "gpus"}


def usable_cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def fingerprint() -> dict[str, object]:
    """All that is known of the machine and the installation; fields that cannot be read are None or missing.

    Keys: cpu, cpu_revision (family, model and stepping), logical_cores, physical_cores, usable_cores, ram_gib,
    architecture, cpu_max_mhz, cpu_governor, gpus (list of names), gpu_driver, gpu_driver_cuda, gpu_max_mhz,
    gpu_mhz_at_start, os, python, libraries (name -> version), lock (sha256), torch_cuda, torch_threads and vector_units
    (None until torch is imported), machine (the id).
    """
    torch = sys.modules.get("torch")  # never imported from here: that would cost seconds
    return {
        **_constant(),
        "usable_cores": usable_cores(),
        "torch_threads": torch.get_num_threads() if torch is not None else None,
        "torch_cuda": torch.version.cuda if torch is not None else None,
        "vector_units": torch.backends.cpu.get_cpu_capability() if torch is not None else None,
        "machine": machine_id(),
    }


def environment() -> dict[str, str]:
    """The fingerprint flattened to lines, as records keep it: lower-case keys, absent fields left out, and without the
    clock of the moment, so that every run on a machine has the same.
    """
    lines: dict[str, str] = {}
    for key, value in fingerprint().items():
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
    fields."""
    fields = {"cpu": cpu, "logical_cores": logical_cores, "ram_gib": ram_gib, "gpus": gpus}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]
    parts = [_slug(cpu) or "cpu", f"{logical_cores}c"]
    if gpus:
        short = _slug(gpus[0], MEMORY_OF_GPU) or "gpu"
        parts.append(short if len(gpus) == 1 else f"{len(gpus)}x-{short}")
    return "-".join([*parts, digest])


def machine_id() -> str:
    """Short id of this machine, such as `epyc-7b13-2c-1a2b3c4d`; the same in every process and after an
    update."""
    hardware = _hardware()
    gpus = hardware["gpus"]
    assert isinstance(gpus, list)
    return describe(str(hardware["cpu"]), int(str(hardware["logical_cores"])), int(str(hardware["ram_gib"])), gpus)
