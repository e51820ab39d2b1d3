"""Settings of every test run."""

from __future__ import annotations

import os


def pytest_configure() -> None:
    """Under pytest-xdist each worker keeps to one core: a timed cell takes the lock of the cores it may use."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if worker and len(cores) > 1:
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
