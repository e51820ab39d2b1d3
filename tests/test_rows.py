"""Rows that several machines measured together: quality travels, times stay where they were taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepmark.leaderboard import ledger
from stepmark.leaderboard.rows import Place, Row, homes, index, lenders, rows_of
from stepmark.leaderboard.verdicts import judge
from test_verdicts import RUNGS, info, record, timed

from stepmark import plugins
from stepmark.admission import sorted_out
from stepmark.method import Claim
from stepmark.places import results_folder
from stepmark.record import Record, append, files, path_of, read

HERE, THERE = "test-cpu", "other-cpu"
OLD, NEW = {"digests": {"method": "1" * 16}, "created": "2031-01-01T00:00:00Z"}, {"digests": {"method": "2" * 16}}


def rows(*records: Record, home: str = HERE) -> dict[tuple[str, str], Row]:
    """Rows by machine and method."""
    return {(row.place.machine, row.method): row for row in rows_of(records, plugins.tasks(), {"cpu": home})}


def seed(number: int, value: float = 1.0, method: str = "fast", **fields: Any) -> Record:
    return record(method, RUNGS[0], value, number, **fields)


def test_a_row_takes_over_the_quality_of_seeds_that_it_lacks() -> None:
    mine = seed(0, latency=timed(1.0, 2.0))
    other = [seed(s, 3.0, machine=THERE, latency=timed(9.0, 9.0)) for s in (0, 1, 2)]
    found = rows(mine, *other)
    row = found[HERE, "fast"]
    assert (row.status, row.lent) == ("ok", {1: THERE, 2: THERE})
    assert row.quality["sliced_w2"].value == (1.0 + 3.0 + 3.0) / 3
    assert row.timed is mine, "which is its own"
    assert found[THERE, "fast"].lent == {}, "that one lacked nothing"
    assert "2 of 3 on other-cpu" in lenders([row]) and lenders([found[THERE, "fast"]]) == ""


def test_times_of_another_machine_never_become_those_of_a_row() -> None:
    row = rows(seed(1), seed(0, machine=THERE, latency=timed(9.0, 9.0)))[HERE, "fast"]
    assert row.lent == {0: THERE} and row.first.machine == THERE
    assert (row.timed, row.latency_ms, row.speedup, row.memory_mib, row.joules) == (None,) * 5
    assert THERE in (row.reason("latency") or "")


def test_only_the_home_takes_over_whole_rows() -> None:
    records = [seed(0), seed(0, method="base", machine=THERE)]
    assert (HERE, "base") in rows(*records) and (THERE, "fast") not in rows(*records)
    assert {*rows(seed(0, machine=THERE))} == {(THERE, "fast")}, "the home has measured nothing of that task"
    assert homes([("cpu", HERE), ("cpu", THERE), ("cpu", THERE), ("cuda", HERE)]) == {"cpu": THERE, "cuda": HERE}
    assert homes([("cpu", "b"), ("cpu", "a")]) == homes([("cpu", "a"), ("cpu", "b")]) == {"cpu": "a"}


def test_newest_sources_are_taken_and_nothing_else() -> None:
    stale = rows(seed(0, 5.0, **OLD), seed(0, 1.0, machine=THERE, **NEW))[HERE, "fast"]
    assert stale.quality["sliced_w2"].value == 1.0, "the row's own is of older sources"
    old = rows(seed(0, 1.0, **NEW), seed(1, 5.0, machine=THERE, **OLD))[HERE, "fast"]
    assert old.lent == {}
    assert rows(seed(0), seed(1, machine=THERE, status="failed", quality={}))[HERE, "fast"].lent == {}
    flagged = rows(seed(0), seed(1, machine=THERE, status="flagged", flags=["it looked"]))[HERE, "fast"]
    assert flagged.status == "flagged", "what is wrong elsewhere is not left out"
    folder = [seed(0, checkpoint="a" * 16), seed(1, machine=THERE, checkpoint="a" * 16)]
    assert rows(*folder)[HERE, "fast"].lent == {}, "on somebody's checkpoint each machine stands for itself"
    gpu = rows_of([seed(0), seed(1, machine=THERE, device="cuda")], plugins.tasks(), {"cpu": HERE, "cuda": THERE})
    assert [(row.place.device, row.lent) for row in gpu] == [("cuda", {}), ("cpu", {})], "another device, another place"


def test_a_claim_of_quality_is_judged_over_machines_and_one_of_time_on_one() -> None:
    fast = [seed(0, 1.0, latency=timed(1.0, 2.0)), *(seed(s, 1.0, machine=THERE) for s in (1, 2))]
    base = [seed(s, 2.0, method="base", machine=THERE, latency=timed(0.1, 0.1)) for s in (0, 1, 2)]
    found = index(rows_of([*fast, *base], plugins.tasks(), {"cpu": HERE}))

    def verdict(check: str) -> str:
        claim = Claim(check.replace("R", str(RUNGS[0])), says="a claim")
        return judge(claim, info(claim), Place(HERE, "embedded"), found).state

    assert verdict("sliced_w2[fast,R] < sliced_w2[base,R]") == "reproduced"
    assert verdict("latency_ms[fast,R] <= 0.6 * latency_ms[base,R]") == "reproduced", "in turns, on this machine"
    there = [*fast[1:], *base, seed(0, 1.0, machine=THERE, latency=timed(1.0, 2.0))]
    elsewhere = record("fast", RUNGS[1], 1.0, 0)  # the home has measured something of the task, at another rung
    own = index(rows_of([*there, elsewhere], plugins.tasks(), {"cpu": HERE}))
    claim = Claim(f"latency_ms[fast,{RUNGS[0]}] < latency_ms[base,{RUNGS[0]}]", says="a claim")
    place = Place(THERE, "embedded")
    assert judge(claim, info(claim), place, own).state == "reproduced"
    assert {row.place for row in own.values()} == {place, Place(HERE, "embedded")}
    assert judge(claim, info(claim), Place(HERE, "embedded"), own).state == "not run", "it has times of no one"


def test_the_ledger_finds_the_home_in_the_files(tmp_path: Path) -> None:
    published = next(path for path in files(results_folder("embedded")) if path.stem == "ddim")
    kept, _ = sorted_out(read(published), plugins.tasks())
    first = kept[0]
    others = [r for r in kept if r.key[:3] == first.key[:3] and r.seed != first.seed and r.digests == first.digests]
    assert others
    away = [r.model_copy(update={"machine": THERE, "environment": {}}) for r in others]
    for r in [first, first.model_copy(update={"created": "2031-01-01T00:00:00Z"}), *away[:1]]:
        append(path_of(tmp_path, r), r)
    for found in (ledger.read(tmp_path), ledger.of([first, first, *away[:1]])):
        assert not found.left_out
        lent = {row.place.machine: row.lent for row in found.rows}
        assert lent == {first.machine: {others[0].seed: THERE}, THERE: {first.seed: first.machine}}
