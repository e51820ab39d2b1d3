"""The suite: every method on every task it names. `pytest bench/ --tier embedded` writes the published records."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from stepmark import plugins, remote, suite
from stepmark.judge import Judge
from stepmark.meter import latency


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each (method, task) of the selection, baselines first."""
    option = metafunc.config.getoption
    methods, tracks = tuple(option("--method")), tuple(option("--track"))
    chosen = suite.Selection(option("--tier"), methods=methods, tracks=tracks, quick=option("--quick"))
    pairs = list(dict.fromkeys((cell.method, cell.task) for cell in suite.cells(chosen)))
    metafunc.parametrize(("method", "task"), pairs, ids=[f"{method}-{task}" for method, task in pairs])


def test_cells(
    method: str, task: str, results: Path, pytestconfig: pytest.Config, request: pytest.FixtureRequest
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

    if hasattr(pytestconfig, "workerinput"):  # where tests run side by side pytest-benchmark takes no times
        return
    benchmark = request.getfixturevalue("benchmark")
    worker, judge = remote.ready(plugins.methods()[method], task, tier, device).worker(), Judge(task, device)
    rung = next(r.rung for r in reversed(made) if r.status == "ok") if made else judge.task.ladder(tier)[-1]
    batch = judge.inputs(min(judge.task.batch, judge.task.items(tier)), 0)
    latency.with_pytest_benchmark(benchmark, partial(worker.run, batch, rung, 0), rounds=2, device=device, warmup=1)
    worker.close()
    benchmark.extra_info.update(method=method, task=task, rung=rung)
