"""Settings of every test run."""

from __future__ import annotations

import os

import pytest


def pytest_configure() -> None:
    """Under pytest-xdist each worker keeps to one core: a timed cell takes the lock of the cores it may use.

    Without a GPU, Triton kernels run in Triton's interpreter, which has to be chosen before anything imports triton.
    """
    if not any(os.path.exists(f"/dev/{device}") for device in ("nvidiactl", "kfd", "dxg")):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if worker and len(cores) > 1:
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`--numprocesses auto`: as many as there are cores to use, in a container with a quota of time too."""
    from stepmark.meter.machine import usable_cores

    return usable_cores()
