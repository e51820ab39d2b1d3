"""Engines: the same records from this process and from a Ray cluster; a timed device is not shared."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from stepmark import engine, plugins, suite
from stepmark import record as records

SELECTION = suite.Selection(tier="smoke", methods=("euler",), tasks=("sampling/mixtures_flow",), rungs=(2, 4))
EQUAL = {"counts", "quality", "outputs", "flags", "status", "handles", "digests", "rung", "seed"}


def content(results: Path) -> list[dict[str, object]]:
    """What must not hang on the engine, in the order of the cells."""
    found = sorted(records.read_all(results), key=lambda r: r.key)
    return [r.model_dump(include=EQUAL) for r in found]


def test_ray_writes_the_records_that_the_local_engine_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="the extra stepmark[ray] is not installed")
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    options = suite.Options(results=tmp_path / "local", timing=False, announce=lambda text: None)
    assert len(list(suite.walk(SELECTION, options))) == 2
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        options = suite.Options(results=tmp_path / "ray", engine="ray", timing=True, announce=lambda text: None)
        made = list(suite.walk(SELECTION, options))
    finally:
        ray.shutdown()
    assert len(made) == 2
    assert all(record.latency is not None for record in made)
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def test_worker_processes_write_the_records_that_this_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    options = suite.Options(results=tmp_path / "local", timing=False, announce=lambda text: None)
    alone = list(suite.walk(SELECTION, options))
    made = list(engine.pool(suite.cells(SELECTION), "cpu", True, 1))
    assert [record.outputs for record, _ in made] == [record.outputs for record in alone]
    assert all(record.latency is not None and shown is not None for record, shown in made)
    with pytest.raises(ValueError, match="--workers 9999: this machine offers 1 to"):
        next(engine.pool([], "cpu", True, 9999))


def test_a_worker_reports_that_its_core_is_being_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path))
    with engine.device_lock("cpu"), pytest.raises(engine.DeviceBusy, match=f"process {os.getpid()} is timing on cpu"):
        list(engine.pool(suite.cells(SELECTION), "cpu", True, 1))


def _hold(ready: object, done: object) -> None:
    with engine.device_lock("cpu"):
        ready.set()  # type: ignore[attr-defined]
        done.wait(30)  # type: ignore[attr-defined]


def test_a_device_that_is_being_timed_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path))
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(ready, done))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(engine.DeviceBusy, match=rf"process {holder.pid} is timing on cpu; wait"):
            next(engine.local([], "cpu", timing=True), None)
        assert list(engine.local([], "cpu", timing=False)) == []
    finally:
        done.set()
        holder.join()
    with engine.device_lock("cpu"):
        locks = {path.name for path in tmp_path.glob("timing-cpu*.lock")}
        assert locks == {f"timing-cpu{core}.lock" for core in os.sched_getaffinity(0)}
        assert all((tmp_path / name).read_text() == str(os.getpid()) for name in locks)


def test_the_quick_suite_has_each_method_once_a_kind_where_it_has_most_neighbours() -> None:
    methods = plugins.methods()
    found = {(cell.method, cell.task) for cell in suite.cells(suite.Selection(tier="smoke", quick=True))}
    kinds = {(name, task.split("/")[0]) for name, info in methods.items() for task in info.tasks}
    assert sorted((name, task.split("/")[0]) for name, task in found) == sorted(kinds)
    for name, chosen in found:
        alike = [t for t in methods[name].tasks if t.split("/")[0] == chosen.split("/")[0]]
        sharing = {t: sum(t in m.tasks for m in methods.values()) for t in alike}
        assert sharing[chosen] == max(sharing.values())
    only = suite.Selection(tier="smoke", quick=True, methods=("ddim",), tasks=("sampling/mixtures_eps",))
    assert [cell.task for cell in suite.cells(only)] == ["sampling/mixtures_eps"]
