"""The Ray engine on clusters made up: nodes unlike each other, a driver unlike its nodes, what tasks raise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stepmark import engine, suite
from stepmark import record as records
from stepmark.cell import Cell
from stepmark.cli import main
from stepmark.meter import machine

CELLS = [Cell("euler", "sampling/mixtures_flow", rung, seed) for seed in (0, 1) for rung in (1, 2, 4, 8)]


class RayError(Exception):
    """As `ray.exceptions.RayError`."""


class RayTaskError(RayError):
    """What a task raised, wrapped."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"ray::work() (pid=1)\n  File ...\n{type(cause).__name__}: {cause}")
        self.cause = cause


class Cluster(ModuleType):
    """A cluster whose tasks end one at a time, oldest first, and which never gives out what a node has not."""

    def __init__(self, *nodes: dict[str, float]) -> None:
        super().__init__("ray")
        self.list = [{"NodeID": str(i), "Alive": True, "Resources": has} for i, has in enumerate(nodes)]
        self.exceptions = SimpleNamespace(RayError=RayError)
        self.running: dict[object, dict[str, Any]] = {}
        self.most: dict[str, int] = {}  # timed cells at once on each node
        self.order: list[bool] = []
        self.cancelled = 0
        self.answer: Callable[[Callable[..., Any], tuple[Any, ...]], Any] = lambda function, given: function(*given)

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return self.list

    def remote(self, function: Callable[..., Any]) -> Any:
        def options(**asked: Any) -> Any:
            return SimpleNamespace(remote=lambda *given: self.begin(function, given, asked))

        return SimpleNamespace(options=options)

    def begin(self, function: Callable[..., Any], given: tuple[Any, ...], asked: dict[str, Any]) -> object:
        reference = object()
        self.running[reference] = {"function": function, "given": given, **asked}
        node = asked.get("scheduling_strategy")
        if asked["num_cpus"] >= 1:
            self.order.append(node is not None)
        if node is not None and asked["num_cpus"]:
            assert asked["num_cpus"] == self.list[int(node)]["Resources"]["CPU"]  # all of them
            there = [task for task in self.running.values() if task.get("scheduling_strategy") == node]
            self.most[node] = max(self.most.get(node, 0), len(there))
        return reference

    def wait(self, references: list[object], num_returns: int) -> tuple[list[object], list[object]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: object) -> Any:
        task = self.running.pop(reference)
        try:
            return self.answer(task["function"], task["given"])
        except Exception as error:
            raise RayTaskError(error) from None

    def cancel(self, reference: object, force: bool) -> None:
        self.cancelled += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    """Make a cluster of nodes with these resources; their cells are measured at once and say nothing."""

    def make(*nodes: dict[str, float]) -> Cluster:
        made = Cluster(*nodes)
        monkeypatch.setitem(sys.modules, "ray", made)
        monkeypatch.setattr(engine, "_on", lambda node: node)
        monkeypatch.setattr(engine, "measured", lambda cell, device, timing, show_progress: (cell, None))
        monkeypatch.setattr(engine, "_as_text", lambda made: made)
        monkeypatch.setattr(engine, "parse", lambda record, name: record)
        monkeypatch.setattr(engine.devices, "named", lambda device: device)
        monkeypatch.setattr(engine, "device_lock", lambda device: nullcontext())
        return made

    return make


@pytest.mark.parametrize(
    "cpus", [(0, 16, 16), (16, 16), (8, 64), (0, 2, 3, 16), (1,)], ids=lambda cpus: "-".join(map(str, cpus))
)
def test_a_timed_cell_has_its_node_to_itself(cpus: tuple[int, ...], cluster: Callable[..., Cluster]) -> None:
    ray = cluster(*({"CPU": float(n)} if n else {} for n in cpus))
    found = [record for record, _ in engine.ray(CELLS, "cpu", True)]
    assert sorted(map(str, found)) == sorted(map(str, CELLS))
    assert set(ray.most.values()) == {1}
    assert len(ray.most) == min(4, sum(n > 0 for n in cpus))  # and no node that could work is idle
    assert ray.order == [True] * 4 + [False] * 4
    assert [record for record, _ in engine.ray(CELLS, "cpu", False)] == CELLS and ray.order[8:] == [False] * 8


def test_gpu_cells_go_to_nodes_with_a_gpu(cluster: Callable[..., Cluster]) -> None:
    ray = cluster({"CPU": 16.0}, {"CPU": 8.0, "GPU": 2.0}, {"GPU": 1.0})
    assert len(list(engine.ray(CELLS, "cuda", True))) == 8
    assert ray.most == {"1": 1}
    cluster({"CPU": 16.0}, {})
    with pytest.raises(ValueError, match="no node of the Ray cluster offers a CPU and a GPU"):
        next(engine.ray(CELLS, "cuda", True))
    for named in ("cuda:1", "mps", "gpu"):
        with pytest.raises(ValueError, match=f"--device {named}: .* say cpu or cuda"):
            next(engine.ray(CELLS, named, True))
    cluster({}, {"CPU": 0.5})
    with pytest.raises(ValueError, match=r"no node of the Ray cluster offers a CPU$"):
        next(engine.ray(CELLS, "cpu", True))


def test_what_tasks_raise_is_one_line(
    cluster: Callable[..., Cluster], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = cluster({"CPU": 2.0})
    command = ["run", "--engine", "ray", "--tier", "smoke", "--method", "euler", "--results", str(tmp_path), "--again"]

    def raising(error: Exception) -> None:
        def answer(function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
            raise error

        ray.answer = answer

    raising(engine.DeviceBusy("process 7 is timing on cpu; wait for it, or run with --no-timing"))
    assert main(command) == 2
    assert "stepmark: process 7 is timing on cpu; wait for it, or run with --no-timing\n" in capsys.readouterr().err
    raising(ModuleNotFoundError("No module named 'stepmark'"))
    with pytest.raises(ChildProcessError, match=r"^Ray: euler on .*: No module named 'stepmark'; the same command"):
        list(engine.ray(CELLS, "cpu", False))
    assert ray.cancelled >= 7  # nobody waits for the others any more


def test_a_driver_unlike_its_nodes_goes_on_where_it_was(
    cluster: Callable[..., Cluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = suite.Selection("smoke", methods=("euler",), tasks=("sampling/mixtures_flow",), rungs=(2, 4))
    options = suite.Options(tmp_path, timing=False, announce=lambda text: None)
    made = list(suite.walk(selection, options))
    here, there = machine.machine_id(), "epyc-16c-00000000"
    assert len(made) == 2 and {r.machine for r in made} == {here}
    for record in made:  # as they would be filed by a node
        moved = record.model_copy(update={"machine": there})
        records.append(records.path_of(tmp_path / "ray", moved), moved)
    ray = cluster({"CPU": 16.0})
    ray.answer = lambda function, given: (
        {there} if function is machine.machine_ids else pytest.fail("a cell that is done ran again")
    )
    options = suite.Options(tmp_path / "ray", engine="ray", timing=False, announce=lambda text: None)
    assert suite.places(options) == {there}
    assert list(suite.walk(selection, options)) == []
    more = suite.Selection("smoke", methods=("euler",), tasks=("sampling/mixtures_flow",), rungs=(2, 4, 8))
    assert [cell.rung for cell in suite.todo(suite.cells(more), options)] == [8]


def test_without_ray_the_command_that_installs_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for extra in ([], ["--again"]):
        assert main(["run", "--engine", "ray", "--method", "euler", "--results", str(tmp_path), *extra]) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith(
            "stepmark: ray is not installed; it comes with the extra ray: pip install"
        )
