"""The tour: its comparisons exist, what it says is computed, its agreement is that of `verify`, nothing is published."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rigs.records import whole

from stepmark import __version__, plugins, tour
from stepmark import record as record_files
from stepmark.cli import main
from stepmark.record import Latency, Quality, Record, append, path_of, read_all

STOP = tour.Stop("toy", "a toy", "unipc", "ddim", "class_to_image/digits_eps", (4, 8, 16), (("kv_bytes", "bytes"),))
TASK = plugins.tasks()[STOP.task][1]
METRIC = next(iter(TASK.metrics))


def make(method: str, rung: int, value: float, ms: float, **fields: Any) -> Record:
    """A record of lower-is-better quality `value` +- 2 %, its noise paired over methods."""
    noise = np.random.default_rng(0).normal(0, 0.02, 100)
    own = np.random.default_rng([rung, *method.encode()]).normal(0, 0.005, 100)
    full: dict[str, Any] = {
        "suite": __version__, "track": "image", "method": method, "task": STOP.task, "rung": rung, "seed": 0,
        "tier": "embedded", "machine": "here", "status": "ok", "counts": {"nfe": float(rung), "kv_bytes": 100.0},
        "quality": {METRIC: Quality(value=value, resamples=(value * (1 + noise + own)).tolist())},
        "latency": Latency(items=10, median_ms=10 * ms, iqr_ms=0.1, p95_ms=11 * ms, samples_ms=[10 * ms] * 5),
        "environment": {"device": "cpu"}, "command": "stepmark run", "created": "2031-01-02T03:04:05Z",
    }  # fmt: skip
    return whole(Record(**(full | fields)))


def keyed(*records: Record) -> dict[tuple[str, int], Record]:
    return {(r.method, r.rung): r for r in records}


@pytest.mark.parametrize("stop", tour.COMPARISONS, ids=lambda stop: stop.id)
def test_every_stop_names_what_there_is(stop: tour.Stop) -> None:
    methods = plugins.methods()
    task = tour.task_of(stop)
    for name in (stop.method, stop.baseline):
        assert stop.task in methods[name].tasks, name
    assert set(stop.rungs) <= set(task.rungs)
    assert list(stop.rungs) == sorted(stop.rungs)


def test_the_tour_is_a_handful_of_literals_in_one_place() -> None:
    assert 5 <= len(tour.COMPARISONS) <= 7
    assert len({stop.id for stop in tour.COMPARISONS}) == len(tour.COMPARISONS)
    assert {plugins.methods()[stop.method].track for stop in tour.COMPARISONS} >= {"image", "decoding", "bayes"}
    package = Path(tour.__file__).parent
    for path in (package / "cli.py", package / "commands/tour.py"):
        words = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not words & {name for stop in tour.COMPARISONS for name in (stop.method, stop.task)}, path


def test_the_best_that_is_reached_with_less_is_what_is_said() -> None:
    found = keyed(
        make("ddim", 4, 9.0, 4), make("ddim", 8, 4.0, 8), make("ddim", 16, 2.0, 16),
        make("unipc", 4, 4.5, 4), make("unipc", 8, 2.01, 8), make("unipc", 16, 1.0, 16),
    )  # fmt: skip
    assert tour.at(STOP, found, TASK) == (8, 16)
    said = tour.sentence(STOP, found, TASK)
    assert "unipc at 8 NFE reaches what ddim reaches at 16 (fd 2.01 against 2, lower is better)" in said
    assert "2.0x fewer evaluations, as many bytes, 2.0x as fast." in said


def test_what_is_not_reached_is_said_so() -> None:
    found = keyed(make("ddim", 16, 2.0, 10), make("unipc", 16, 4.0, 30, counts={"nfe": 16.0, "kv_bytes": 20.0}))
    said = tour.sentence(STOP, found, TASK)
    assert "unipc is worse than ddim at 16 NFE" in said
    assert "as many evaluations, 5.0x fewer bytes, 3.0x slower." in said
    found = keyed(make("ddim", 16, 2.0, 10), make("unipc", 16, 1.0, 10))
    assert "unipc is better than ddim at 16 NFE" in tour.sentence(STOP, found, TASK)


def test_a_loss_that_the_test_sees_is_no_reaching() -> None:
    found = keyed(make("ddim", 16, 2.0, 16), make("ddim", 8, 4.0, 8), make("unipc", 8, 2.2, 8))
    assert tour.at(STOP, found, TASK) != (8, 16)
    assert "is better than ddim at 8 NFE" in tour.sentence(STOP, found, TASK)


def test_agreement_is_that_of_another_machine_and_never_of_times() -> None:
    published = keyed(make("unipc", 8, 2.0, 8, machine="there"), make("ddim", 8, 4.0, 8, machine="there"))
    assert tour.agreement(keyed(make("unipc", 8, 2.1, 80)), published)[0] is True
    for off in (make("unipc", 8, 2.6, 8), make("unipc", 8, 2.0, 8, counts={"nfe": 8.5, "kv_bytes": 100.0})):
        agrees, said = tour.agreement(keyed(off), published)
        assert agrees is False
        assert said.startswith("Does not agree with the published record: unipc at 8: ")
    # On the machine that published, too: bits may differ between numbers of threads.
    assert tour.agreement(keyed(make("unipc", 8, 2.1, 8, machine="there")), published)[0] is True
    assert tour.agreement(keyed(make("unipc", 4, 2.0, 8)), published) == (
        None, "There is no published record to compare with."
    )  # fmt: skip


def test_the_published_time_is_that_of_the_same_pair() -> None:
    here = keyed(make("ddim", 16, 2.0, 16), make("unipc", 8, 2.0, 2), make("unipc", 16, 1.0, 16))
    there = keyed(make("ddim", 16, 2.0, 16), make("unipc", 8, 2.0, 4), make("unipc", 16, 1.0, 1))
    assert tour.published_time(STOP, here, there, TASK) == " There it is 4.0x as fast."
    assert tour.published_time(STOP, here, keyed(make("unipc", 8, 2.0, 4)), TASK) == ""


def test_the_table_holds_the_published_figure_beside_each() -> None:
    here, there = keyed(make("ddim", 8, 4.0, 8), make("unipc", 8, 2.0, 4)), keyed(make("unipc", 8, 2.25, 4))
    head, ddim, unipc = tour.table(STOP, here, there, TASK)
    assert len(head) == len(ddim) == len(unipc)
    assert ddim[:4] == ("ddim", "8", "4", "-")
    assert unipc[:4] == ("unipc", "8", "2", "2.25")
    assert unipc[-2:] == ("0.5", "-")


def test_the_site_gets_both_and_the_published_folder_nothing(tmp_path: Path) -> None:
    published, own = tmp_path / "published", tmp_path / "own"
    old, new, other = make("unipc", 8, 2.0, 8), make("unipc", 8, 2.1, 8), make("ddim", 8, 4.0, 8, machine="elsewhere")
    append(path_of(published, old), old)
    for each in (old, new, other):
        append(path_of(own, each), each)
    before = {path: path.read_bytes() for path in published.rglob("*.jsonl")}
    with tour.with_published(own, published) as merged:
        assert len(path_of(merged, old).read_text().splitlines()) == 2  # the repetition, once
        assert {(r.machine, r.method) for r in read_all(merged)} == {("here", "unipc"), ("elsewhere", "ddim")}
    assert {path: path.read_bytes() for path in published.rglob("*.jsonl")} == before
    assert not merged.exists()


def test_the_command_measures_says_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    small = tour.Stop("points", "points", "heun", "euler", "sampling/mixtures_flow", (2,))
    monkeypatch.setattr(tour, "COMPARISONS", (small,))
    command = ["tour", "--no-site", "--workers", "1", "--results", str(tmp_path / "r")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "heun is " in said and "at 2 NFE" in said
    assert "1 of 1 comparisons agree with the published records" in said
    assert {r.tier for r in read_all(tmp_path / "r")} == {"embedded"}
    lines = sum(path.read_text().count("\n") for path in record_files.files(tmp_path / "r"))
    assert main(command) == 0
    assert sum(path.read_text().count("\n") for path in record_files.files(tmp_path / "r")) == lines == 2


def test_a_stop_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tour", "nowhere"]) == 2
    error = capsys.readouterr().err.strip()
    assert "no stop 'nowhere'; known: cache" in error and "\n" not in error
    assert main(["tour", "--list", "cache"]) == 0
    assert "kv_int8 against autoregressive" in capsys.readouterr().out
