"""Which smoke tests a commit runs: what no record vouches for, and of the rest some, so that all come round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepmark import __version__, plugins, turns
from stepmark.cell import digests

PAIRS = [("a", "t"), ("b", "t"), ("c", "t"), ("d", "t"), ("a", "u"), ("b", "u"), ("c", "v")]


def test_what_nobody_vouches_for_is_run_and_the_rest_comes_round() -> None:
    vouched = {*PAIRS} - {("b", "u")}
    seen = [turns.in_turn(PAIRS, vouched, 3, turn) for turn in range(3)]
    assert all(("b", "u") in found for found in seen)
    assert {pair for found in seen for pair in found} == set(PAIRS)
    for found in seen:
        assert {task for _, task in found} == {"t", "u", "v"}  # each task at every commit
        assert found == [pair for pair in PAIRS if pair in found]  # baselines stay first
        assert sum(task == "t" for _, task in found) < 3
    assert turns.in_turn(PAIRS, vouched, 1, 12345) == PAIRS
    assert turns.in_turn(PAIRS, set(), 3, 1) == PAIRS
    assert turns.in_turn(PAIRS, vouched, 3, 5) == seen[2]
    with pytest.raises(ValueError, match="1 \\(all\\) or more"):
        turns.in_turn(PAIRS, vouched, 0, 0)


def test_only_an_ok_record_of_todays_sources_vouches(tmp_path: Path) -> None:
    method, task = plugins.methods()["euler"], "sampling/mixtures_flow"
    now = digests(method, plugins.tasks()[task][1])
    path = tmp_path / __version__ / "some-machine" / "image" / "euler.jsonl"
    path.parent.mkdir(parents=True)

    def write(*lines: object) -> None:
        path.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in lines))

    good = {"method": "euler", "task": task, "status": "ok", "digests": now}
    write(good)
    assert turns.vouched(tmp_path) == {("euler", task)}
    write({**good, "status": "flagged"}, {**good, "status": "failed"}, {**good, "digests": now | {"method": "0" * 16}})
    assert turns.vouched(tmp_path) == set()
    write("{torn", "[]", {**good, "method": "nobody"}, {**good, "task": "greedy/words"}, {"method": "euler"})
    assert turns.vouched(tmp_path) == set()


def test_the_commit_tells_whose_turn_it_is(tmp_path: Path) -> None:
    assert turns.turn_of(tmp_path) == 0  # no checkout
    root = plugins.checkout()
    assert root is not None
    assert turns.turn_of(root) == turns.turn_of(root)
