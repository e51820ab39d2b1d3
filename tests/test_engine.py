"""Engines: the same records from this process and from a Ray cluster; a timed device is not shared."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from stepmark import engine, locks, plugins, suite
from stepmark import record as records
from stepmark.judge import Judge
from stepmark.meter import machine

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


def test_workers_where_nothing_can_be_pinned_lock_a_core_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS: a second worker that locked every core would find the first one's taken."""
    held: list[object] = []
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.setattr(engine.ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *_: None))
    monkeypatch.setattr(engine, "device_lock", lambda device, cores=None: held.append(cores) or nullcontext())

    class Line:
        def recv(self) -> list[object]:
            raise EOFError

    engine._worker(Line(), "cpu", 1, True)  # type: ignore[arg-type]
    assert held == [[1]]


def test_a_worker_holds_its_core_from_the_first_cell_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setattr(engine.ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *_: None))
    monkeypatch.setattr(engine, "_as_text", lambda made: ("record", None))
    busy: list[bool] = []

    def measured(*_: object, **__: object) -> None:
        try:
            with engine.device_lock("cpu", [0]):
                busy.append(False)
        except engine.DeviceBusy:
            busy.append(True)

    monkeypatch.setattr(engine, "measured", measured)
    groups = iter([[1], [2, 3]])

    class Line:
        sent: list[object] = []

        def recv(self) -> list[object]:
            if None in self.sent:  # between two groups somebody else would like to have the core
                measured()
            return next(groups, None) or self.end()

        def end(self) -> list[object]:
            raise EOFError

        def send(self, what: object) -> None:
            self.sent.append(what)

    engine._worker(Line(), "cpu", 0, True)  # type: ignore[arg-type]
    assert busy == [True] * 5 and len(Line.sent) == 5


def _hold(ready: object, done: object) -> None:
    with engine.device_lock("cpu"):
        ready.set()  # type: ignore[attr-defined]
        done.wait(30)  # type: ignore[attr-defined]


def test_a_device_that_is_being_timed_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPMARK_LOCKS", str(tmp_path))
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
        names = {f"timing-{locks.here()}-cpu{core}.lock" for core in machine.cores()}
        assert {path.name for path in locks.folder().glob("*cpu*.lock")} == names
        assert all((locks.folder() / name).read_text().split()[0] == str(os.getpid()) for name in names)


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


# which cells ------------------------------------------------------------------------------------


def test_a_method_that_is_trained_thrice_has_three_seeds_of_the_same_items() -> None:
    def seeds(method: str, tier: str) -> list[int]:
        chosen = suite.Selection(tier, methods=(method,), tasks=("greedy/words",), rungs=(4,))
        return [cell.seed for cell in suite.cells(chosen)]

    assert plugins.tasks()["greedy/words"][1].seeds == 1
    assert seeds("medusa", "embedded") == seeds("medusa_chain", "embedded") == [0, 1, 2]
    assert seeds("medusa", "smoke") == seeds("autoregressive", "embedded") == [0]
    judge = Judge("greedy/words")
    assert judge.inputs(5, 2) == judge.inputs(5, 0) != judge.unseen(5)
    three = Judge("sampling/mixtures_eps")  # a task of three seeds
    assert not three.inputs(5, 2)["noise"].equal(three.inputs(5, 0)["noise"])
    assert three.inputs(5, 4)["noise"].equal(three.inputs(5, 1)["noise"])
    outputs = [[7, 1]] * 5
    first, third = (judge.score(judge.inputs(5, 0), outputs, seed)["tokens"].resamples for seed in (0, 2))
    assert first == third, "the same resamples of the items"


@pytest.mark.parametrize(
    ("chosen", "cells", "said"),
    [
        ({"methods": ("ddim", "euler"), "tasks": ("sampling/mixtures_eps",)}, 6,
         ["euler does not run on sampling/mixtures_eps, but on "]),
        ({"methods": ("ddim",), "tasks": ("sampling/mixtures_flow",)}, 0,
         ["ddim does not run on sampling/mixtures_flow, but on "]),
        ({"methods": ("ddim", "euler"), "tracks": ("decoding",)}, 0,
         ["ddim is of track image, not of decoding", "euler is of track image, not of decoding"]),
        ({"tracks": ("image", "decoding"), "tasks": ("sampling/mixtures_eps",)}, None,
         ["no method of the selection runs on decoding"]),
        ({"methods": ("euler",), "tasks": ("sampling/mixtures_flow",), "rungs": (2, 5, 7)}, 1,
         ["no rung 5, 7 at tier smoke here, but 1, 2, 4, "]),
        ({"methods": ("euler",), "rungs": (5,)}, 0, ["no rung 5 at tier smoke here, but "]),
        ({"methods": ("euler",), "rungs": (2,), "seeds": (0, 1)}, None, ["no seed 1 at tier smoke here, but 0"]),
        ({"methods": ("euler",), "seeds": (-1,)}, 0, ["no seed -1 at tier smoke here, but 0"]),
        ({"methods": ("euler",), "tasks": ("sampling/mixtures_flow",)}, None, []),
    ],
)  # fmt: skip
def test_what_is_named_and_left_out_is_said(chosen: dict[str, tuple[str, ...]], cells: int, said: list[str]) -> None:
    selection = suite.Selection("smoke", **chosen)  # type: ignore[arg-type]
    found = suite.cells(selection)
    assert cells is None or bool(found) == bool(cells)
    lines = suite.unmet(selection, found)
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True)), lines
