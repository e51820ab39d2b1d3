"""Verification: a true record agrees, one in which anything was changed does not, and what was measured can be kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rigs.records import few_seeds, whole
from stepmark.leaderboard import ledger
from stepmark.leaderboard.trust import standing

from stepmark import __version__, plugins, run
from stepmark import record as records
from stepmark.cell import Cell
from stepmark.cli import main
from stepmark.meter import machine
from stepmark.record import Quality, Record
from stepmark.verify import check, compare, evidence, portion

CELL = Cell("euler", "sampling/mixtures_flow", 2, 0, "embedded")
HERE = machine.machine_id()


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A record that was measured here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPMARK_CACHE", str(tmp_path_factory.mktemp("cache")))
        return run.measure(CELL, timing=False, show_progress=False)


def elsewhere(r: Record, cpu: str = "Other 3000") -> Record:
    """The same, as if another machine had written it."""
    environment = r.environment | {"cpu": cpu}
    name = machine.describe(cpu, int(environment["logical_cores"]), int(environment["ram_gib"]), [])
    return r.model_copy(update={"machine": name, "environment": environment | {"machine": name}})


def changed(r: Record, **fields: Any) -> Record:
    return r.model_copy(update=fields)


def without(table: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != name}


def resampled(r: Record, make: Callable[[np.ndarray, float], Any]) -> Record:
    """The first metric with other resamples."""
    name, quality = next(iter(r.quality.items()))
    other = [float(x) for x in make(np.array(quality.resamples), quality.value)]
    return changed(r, quality=r.quality | {name: Quality(value=quality.value, resamples=other)})


def _noise(x: np.ndarray, value: float) -> np.ndarray:
    return np.random.default_rng(7).permutation(x)


LIES: dict[str, Callable[[Record], Record]] = {
    "no resamples": lambda r: resampled(r, lambda x, v: []),
    "too few resamples": lambda r: resampled(r, lambda x, v: x[:50]),
    "resamples as narrow as a line": lambda r: resampled(r, lambda x, v: np.full(100, v)),
    "resamples a tenth as wide": lambda r: resampled(r, lambda x, v: v + (x - v) / 10),
    "resamples ten times as wide": lambda r: resampled(r, lambda x, v: v + (x - v) * 10),
    "resamples of other items": lambda r: resampled(r, _noise),
    "a count renamed": lambda r: changed(r, counts=without(r.counts, "flops") | {"flop": r.counts["flops"]}),
    "a count dropped": lambda r: changed(r, counts=without(r.counts, "flops")),
    "a count added": lambda r: changed(r, counts=r.counts | {"saved": 1.0}),
    "a count moved": lambda r: changed(r, counts=r.counts | {"flops": r.counts["flops"] * 0.9}),
    "a handle renamed": lambda r: changed(r, handles={f"{name}_": value for name, value in r.handles.items()}),
    "no handles": lambda r: changed(r, handles={}),
    "a handle's calls": lambda r: changed(r, handles={n: f | {"calls": 1.0} for n, f in r.handles.items()}),
    "a metric dropped": lambda r: changed(r, quality=dict(list(r.quality.items())[1:])),
    "a metric added": lambda r: changed(r, quality=r.quality | {"charm": next(iter(r.quality.values()))}),
    "no outputs": lambda r: changed(r, outputs=None),
    "another status": lambda r: changed(r, status="flagged", flags=["x"]),
    "another checkpoint": lambda r: changed(r, checkpoint="ab" * 8),
    "no digests": lambda r: changed(r, digests={}),
    "another digest": lambda r: changed(r, digests=r.digests | {"method": "ab" * 8}),
    "no environment": lambda r: changed(r, environment={}),
    "another rung": lambda r: changed(r, rung=4),
    "another seed": lambda r: changed(r, seed=1),
    "another machine's environment": lambda r: changed(r, environment=r.environment | {"cpu": "Abacus"}),
    "a suite to come": lambda r: changed(r, suite="99.0.0"),
    "another's command": lambda r: changed(r, command="curl x | sh"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_record_in_which_anything_was_changed_does_not_agree(
    true: Record, lie: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = {0: true, 1: changed(true, seed=1, outputs="cd" * 32)}
    far = {s: changed(r, counts={n: 2 * x for n, x in r.counts.items()}, rung=4) for s, r in again.items()}
    monkeypatch.setattr(run, "measure", lambda cell, *_, **__: (far if cell.rung == 4 else again)[cell.seed])
    recorded = elsewhere(true) if where == "elsewhere" else true
    (right,) = check([recorded])
    assert right.verdict == "agrees", right.differs
    (wrong,) = check([LIES[lie](recorded)])
    if (where, lie) == ("elsewhere", "another seed"):
        return  # whose figures are those of the first here, and another machine need not have the same bits
    assert wrong.verdict != "agrees"


@pytest.mark.parametrize(
    "fields",
    [{"outputs": "cd" * 32}, {"reported": {"nfe": 1.0}}, {"offline": None}],
    ids=lambda fields: next(iter(fields)),
)
def test_on_the_same_machine_every_bit_must_be_the_same(true: Record, fields: dict[str, Any]) -> None:
    assert compare(changed(true, **fields), true).differs
    last = Quality(value=1.0, resamples=[0.5] * 100), Quality(value=1.0, resamples=[0.5] * 99 + [0.5 + 1e-12])
    one, other = (changed(true, quality={"sliced_w2": each}) for each in last)
    assert compare(one, other).differs
    assert not compare(elsewhere(one), other).differs


def test_flags_that_were_taken_out_are_missed(true: Record) -> None:
    flagged = changed(true, status="flagged", flags=["keeps answers", "calls modules that no handle counts"])
    assert compare(flagged, flagged).verdict == "agrees"
    assert compare(changed(flagged, flags=["keeps answers"]), flagged).differs


def test_a_record_of_another_device_is_not_verified_on_this_one(true: Record) -> None:
    with pytest.raises(ValueError, match="--device cuda"):
        check([changed(true, device="cuda")], "cpu")


def test_a_later_harness_may_count_more(true: Record) -> None:
    old = changed(true, counts=without(true.counts, "flops"), suite="0.0.9")
    assert compare(elsewhere(old), true).differs == []


def test_one_that_is_not_of_this_suite_is_not_run(true: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure", lambda *_, **__: pytest.fail("was run"))
    (found,) = check([changed(true, rung=10**12)])
    assert found.verdict == "differs"
    assert "not on the ladder" in found.differs[0]


# what a repetition shows -------------------------------------------------------------------------


def test_a_second_machine_or_a_clean_commit_is_evidence(true: Record) -> None:
    first = changed(true, commit="abcdef1")
    assert evidence(first, first) == ""
    assert evidence(first, changed(first, commit="abcdef1234")) == ""  # the same, written out longer
    assert evidence(first, changed(first, commit="1234567")) == "commit 1234567"
    assert evidence(first, changed(first, commit="1234567-dirty")) == ""
    assert evidence(first, changed(first, commit=None)) == ""
    assert evidence(first, elsewhere(first)).startswith("machine other-3000-")
    assert evidence(first, changed(first, device="cuda")).endswith(", cuda")


def test_trust_holds_runs_of_the_newest_sources_against_each_other(true: Record) -> None:
    name, quality = next(iter(true.quality.items()))
    old = changed(true, digests={"method": "0" * 16}, created="2026-01-01T00:00:00Z", counts={"nfe": 1.0})
    other = changed(elsewhere(true), created="2031-01-02T00:00:00Z")
    wild = changed(other, quality=true.quality | {name: Quality(value=quality.value * 9, resamples=quality.resamples)})

    def state(*runs: Record) -> str:
        return standing("euler", CELL.task, runs, {}).state

    assert state(old, true) == "measured"
    assert state(old, true, other) == "reproduced"  # though the oldest run has no second one
    assert state(true, wild) == "disputed"


def test_what_was_measured_is_kept_under_the_machine_that_verified(
    true: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_seeds(monkeypatch, 1)
    foreign = changed(elsewhere(true), created="2026-01-01T00:00:00Z")
    path = records.path_of(tmp_path, foreign)
    records.append(path, foreign)
    calls: list[tuple[Any, ...]] = []

    def measure(*given: Any, **_: Any) -> Record:
        calls.append(given)
        return true

    monkeypatch.setattr(run, "measure", measure)
    where = ["--results", str(tmp_path)]
    before = ledger.read(tmp_path)
    assert before.standings["euler", CELL.task].state == "measured"
    assert main(["verify", "--sample", "1", *where]) == 0
    assert [r.machine for r in records.read_all(tmp_path)] == [foreign.machine]  # nothing is kept unasked
    assert main(["verify", f"{path}:1", "--keep"]) == 0
    said = capsys.readouterr().out
    assert f"kept as a record of {HERE}: the figures are reproduced, by machine {HERE}" in said
    assert main(["verify", f"{path}:1", "--no-timing"]) == 2
    assert [given[2] for given in calls] == [False, True]  # what is kept is whole: it is timed
    assert {r.machine for r in records.read_all(tmp_path)} == {foreign.machine, HERE}
    after = ledger.read(tmp_path).standings["euler", CELL.task]
    assert (after.state, after.reasons) == ("reproduced", [f"agrees with machine {HERE}"])
    assert main(["verify", f"{path}:1", "--keep", "--into", str(tmp_path / "aside")]) == 0
    assert [r.machine for r in records.read_all(tmp_path / "aside")] == [HERE]
    # The same machine again: nothing new is shown, and it says so.
    assert main(["verify", str(records.path_of(tmp_path, true)), "--keep", "--no-timing"]) == 0
    assert "adds no evidence" in capsys.readouterr().out
    assert calls[-1][2] is False


def test_a_slice_runs_what_is_current_and_names_what_is_old(
    true: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = changed(
        true, digests=true.digests | {"method": "ab" * 8}, seed=1, command=true.command.replace("seed 0", "seed 1")
    )
    for r in (elsewhere(true), true, old):
        records.append(records.path_of(tmp_path, r), r)
    ran = []
    monkeypatch.setattr(run, "measure", lambda cell, *_, **__: ran.append(cell) or true)
    where = ["--results", str(tmp_path)]
    for part in range(1, 4):
        assert main(["verify", "--slice", f"{part}/3", *where]) == 0
    said = capsys.readouterr().out
    assert ran == [CELL]  # once, for the records of both machines
    assert "2 of 2 records agree" in said
    assert "1 records are older than their sources" in said
    for wrong in ("0/3", "4/3", "3", "a/b", "1/0"):
        assert main(["verify", "--slice", wrong, *where]) == 2


def test_all_slices_together_are_the_board_and_a_task_stays_whole() -> None:
    methods = [info for info in plugins.methods().values() if info.track == "image"][:40]
    made = [
        whole(Record.model_validate({
            "suite": __version__, "track": "image", "method": info.id, "task": task, "rung": 4, "seed": seed,
            "tier": "embedded", "machine": name, "status": "ok", "command": "x", "created": "2026-01-01T00:00:00Z",
        }))
        for info in methods for task in info.tasks for seed in (0, 1) for name in ("one-cpu", "two-cpu")
    ]  # fmt: skip
    parts = [portion(made, k, 7) for k in range(1, 8)]
    cells = [cell for part in parts for cell in part]
    assert sum(map(len, cells)) == len(made)
    assert all(len(cell) == 2 for cell in cells)  # both machines' records of a cell: run once
    homes: dict[tuple[str, str], set[int]] = {}
    for k, part in enumerate(parts):
        for cell in part:
            homes.setdefault((cell[0].method, cell[0].task), set()).add(k)
    assert all(len(ks) == 1 for ks in homes.values())
    assert max(map(len, parts)) < len(cells) / 2
    assert portion([changed(r, suite="0.0.9") for r in made], 1, 1) == []
    for wrong in ((0, 7), (8, 7), (1, 0)):
        with pytest.raises(ValueError, match="part"):
            portion(made, *wrong)


def test_a_record_that_lies_in_a_foreign_file_is_not_verified(
    true: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = records.path_of(tmp_path, true).with_name("heun.jsonl")
    records.append(path, true)
    assert main(["verify", str(path)]) == 2
    assert "belongs in" in capsys.readouterr().err
    assert json.loads(path.read_text())["method"] == "euler"
