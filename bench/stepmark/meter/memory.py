"""Peak memory of one call above the state that was loaded before it.

On CUDA the caching allocator keeps the figure itself. On the CPU torch has no such counter, so
`StorageTracker` follows the storage behind every tensor that an operator returns, from its first sight until
it is freed: exact to the byte and the same on every machine. It does not see what the tracker cannot: scratch
space inside a kernel, memory of numpy, work in other threads. `peak_rss` reads the whole process from the
kernel's high-water mark instead; it is noisy but misses nothing, and serves as the cross-check.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from stepmark import devices

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Peak in bytes above the loaded state and how it was read; or None and a one-line reason.

    `method`: "cuda_allocator", "cpu_storages", "rss_high_water".
    """

    bytes: int | None
    method: str | None = None
    reason: str | None = None

    @property
    def mib(self) -> float | None:
        return None if self.bytes is None else self.bytes / MIB


class StorageTracker(TorchDispatchMode):
    """Follows CPU storages made while it is active; `peak` and `live` are bytes above those that were there
    before.

    A storage is counted once however many views look into it. One that is first seen as the argument of an
    operator was there before: only its growth counts, and freeing it earns nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._counted: dict[int, int] = {}  # id of storage -> bytes of it that are in `live`
        self._before: dict[int, int] = {}  # id of storage -> bytes it had before this call
        self._watchers: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # A tensor subclass (quantised weights) must unfold first; its inner operators come back here.
        plain = torch._C._disabled_torch_dispatch_impl
        if any(getattr(kind, "__torch_dispatch__", plain) is not plain for kind in types):
            return NotImplemented
        # `torch.tensor([...])` hands a fresh tensor to `lift_fresh`: its argument is new, not loaded state.
        fresh = func is torch.ops.aten.lift_fresh.default
        arguments = list(_storages((args, kwargs)))
        if not fresh:
            for storage in arguments:
                self._see(storage, before=True)
        output = func(*args, **kwargs)
        for storage in arguments:
            self._see(storage)
        for storage in _storages(output):
            self._see(storage)
        return output

    def _see(self, storage: torch.UntypedStorage, before: bool = False) -> None:
        key = id(storage)
        size = storage.nbytes()
        if key not in self._counted:
            # Not an object of ours that lives on: the callback must not keep the storage, only know its number.
            self._watchers[key] = weakref.finalize(storage, self._freed, key)
            self._watchers[key].atexit = False
            self._counted[key] = 0
            self._before[key] = size if before else 0
        grown = max(0, size - self._before[key])
        self.live += grown - self._counted[key]
        self._counted[key] = grown
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int) -> None:
        self.live -= self._counted.pop(key, 0)
        self._before.pop(key, None)
        self._watchers.pop(key, None)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for watcher in list(self._watchers.values()):
            watcher.detach()
        self._watchers.clear()


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_iter(tree):
        # Sparse and other layouts without a strided storage cannot say what is behind them.
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and leaf.layout is torch.strided:
            yield leaf.untyped_storage()


def measure(call: Callable[[], Any], device: torch.device | str) -> Memory:
    """Peak of one call above the state loaded before it, on the device it runs on. Call it once before to
    warm up."""
    device = torch.device(device)
    if device.type == "cpu":
        tracker = StorageTracker()
        gc.collect()
        with tracker:
            output = call()  # kept to the end of the block: what a method returns is part of its peak
        del output
        return Memory(tracker.peak, "cpu_storages")
    if device.type != "cuda":
        return Memory(None, reason=f"no memory meter for devices of type {device.type}")
    if not torch.cuda.is_available():
        # Without a GPU the allocator's peak reads 0 and raises nothing.
        return Memory(None, reason="torch finds no CUDA device on this machine")
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    loaded = torch.cuda.memory_allocated(device)
    output = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - loaded
    del output
    return Memory(int(peak), "cuda_allocator")


# resident set -------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    """A size of /proc/self/status in bytes (VmHWM: high-water mark of the resident set, VmRSS: the set
    now)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_rss(call: Callable[[], Any]) -> Memory:
    """Growth of this process's resident set during one call, from the kernel's high-water mark.

    Where the mark can be reset (Linux: "5" written to /proc/self/clear_refs) the reading is good at any time.
    Where that is refused it is good only if the call passes every earlier peak; else it is null and says so.
    """
    gc.collect()
    try:
        before = _status("VmHWM")
    except OSError as error:
        return Memory(None, reason=f"no high-water mark of the resident set: {error}")
    try:
        Path("/proc/self/clear_refs").write_text("5")
        reset = True
    except OSError:
        reset = False
    loaded = _status("VmRSS")
    output = call()
    peak = _status("VmHWM")
    del output
    if not reset and peak <= before:
        return Memory(None, reason="the high-water mark cannot be reset here and the call stayed below it")
    return Memory(max(0, peak - loaded), "rss_high_water")


def peak_rss_in_subprocess(target: str, *arguments: Any, warmup: int = 0, timeout_s: float = 600.0) -> Memory:
    """`peak_rss` of a call in a fresh process, untouched by what this one did before.

    `target` is "package.module:function"; `function(*arguments)` (arguments that JSON can carry) loads the
    state and returns the call to be measured, which is made `warmup` times first. A failure of the process is
    a null with its last line.
    """
    request = json.dumps({"target": target, "arguments": arguments, "warmup": warmup})
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    # glibc raises this limit by itself once large blocks are freed and then keeps them: a warm call reads low.
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    command = [sys.executable, "-m", "stepmark.meter.memory"]
    try:
        done = subprocess.run(
            command,
            input=request,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Memory(None, reason=f"the measured process ran past {timeout_s:g} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Memory(None, reason=f"the measured process failed: {lines[-1][:200]}")
    return Memory(**json.loads(done.stdout.strip().splitlines()[-1]))


def _child() -> None:
    request = json.load(sys.stdin)
    module, _, function = request["target"].partition(":")
    devices.settle()
    call = getattr(importlib.import_module(module), function)(*request["arguments"])
    for _ in range(request["warmup"]):
        call()
    found = peak_rss(call)
    print(json.dumps({"bytes": found.bytes, "method": found.method, "reason": found.reason}))


if __name__ == "__main__":
    _child()
