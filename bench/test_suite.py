"""The suite: every method on every task it names. `pytest bench/ --tier embedded` writes the published records."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from stepmark import plugins, remote, suite, turns
from stepmark.judge import Judge
from stepmark.meter import latency
from stepmark.places import results_folder


def chosen(config: pytest.Config) -> tuple[list[turns.Pair], list[turns.Pair]]:
    """Methods and tasks of the selection, baselines first: those that are run, and all."""
    option = config.getoption
    asked = suite.Selection(
        option("--tier"), methods=tuple(option("--method")), tracks=tuple(option("--track")), quick=option("--quick")
    )
    return _chosen(asked, option("--turns"), config.rootpath)


@cache
def _chosen(asked: suite.Selection, every_nth: int, root: Path) -> tuple[list[turns.Pair], list[turns.Pair]]:
    every = list(dict.fromkeys((cell.method, cell.task) for cell in suite.cells(asked)))
    if every_nth == 1 or asked.methods:
        return every, every
    return turns.in_turn(every, turns.vouched(results_folder("embedded")), every_nth, turns.turn_of(root)), every


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each (method, task) that is run."""
    pairs, _ = chosen(metafunc.config)
    metafunc.parametrize(("method", "task"), pairs, ids=[f"{method}-{task}" for method, task in pairs])


def test_cells(
    method: str, task: str, results: Path, pytestconfig: pytest.Config, request: pytest.FixtureRequest, benchmark: Any
) -> None:
    """All rungs and seeds: each cell leaves a whole record, none fails, none is flagged."""
    tier, device = pytestconfig.getoption("--tier"), pytestconfig.getoption("--device")
    selection = suite.Selection(tier=tier, methods=(method,), tasks=(task,))
    lines: list[str] = []
    options = suite.Options(results=results, device=device, announce=lines.append)
    made = list(suite.walk(selection, options))
    assert made or lines, "no cell was run and none was done already"
    assert not [f"rung {r.rung}, seed {r.seed}: {r.message}" for r in made if r.status == "failed"]
    assert not [f"rung {r.rung}, seed {r.seed}: {r.flags}" for r in made if r.status == "flagged"]
    if made and all(record.status == "skipped" for record in made):
        pytest.skip(str(made[0].message))

    worker, judge = remote.ready(plugins.methods()[method], task, tier, device).worker(), Judge(task, device)
    rung = next(r.rung for r in reversed(made) if r.status == "ok") if made else judge.task.ladder(tier)[-1]
    batch = judge.inputs(min(judge.task.batch, judge.task.items(tier)), 0)
    latency.with_pytest_benchmark(benchmark, partial(worker.run, batch, rung, 0), rounds=2, device=device, warmup=1)
    worker.close()
    benchmark.extra_info.update(method=method, task=task, rung=rung)
