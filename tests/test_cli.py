"""The command line: help that teaches, one-line errors, the scaffold, the check, verify."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from stepmark import forecast, plugins, run, suite
from stepmark import record as records
from stepmark.cell import Cell
from stepmark.check import static
from stepmark.cli import EXTRAS, main
from stepmark.places import results_folder
from stepmark.verify import compare


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["list"],
        ["run"],
        ["tour"],
        ["check"],
        ["new"],
        ["show"],
        ["compare"],
        ["verify"],
        ["samples"],
        ["release"],
        ["site"],
        ["backbones"],
    ],
)
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: stepmark" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["run", "--method", "ddim", "--task", "sampling/mixtures_flow"], "no cell: ddim does not run on sampling/mix"),
        (
            ["run", "--method", "euler", "--rung", "3", "--rung", "5"],
            "no cell: no rung 3, 5 at tier embedded here, but",
        ),
        (["run", "--workers", "-1"], "--workers -1: this machine offers 1 to"),
        (["run", "--workers", "1000"], "--workers 1000: this machine offers 1 to"),
        (["tour", "--workers", "-1"], "--workers -1: this machine offers 1 to"),
        (["run", "--workers", "2", "--engine", "ray"], "--workers is for --engine local"),
        (["run", "--address", "auto"], "add --engine ray"),
        (["run", "--method", "nope"], "no method 'nope'; see: stepmark list methods"),
        (["run", "--method", "DDMI"], "no method 'DDMI'; did you mean 'ddim'"),
        (["run", "--task", "no/pe"], "no task 'no/pe'; see: stepmark list tasks"),
        (["run", "--task", "digits_flow"], "did you mean 'class_to_image/digits_flow' or 'guided/digits_flow'?"),
        (["run", "--track", "nope"], "no track 'nope'; known: bayes, decoding"),
        (["run", "--track", "images"], "no track 'images'; did you mean 'image'?"),
        (["compare", "ddim", "hen"], "no method 'hen'; did you mean 'heun'?"),
        (["tour", "smapler"], "no stop 'smapler'; did you mean 'sampler'?"),
        (["verify", "nowhere.jsonl"], "nowhere.jsonl is not there"),
        (["verify"], "give a record file, FILE:LINE, --sample N, or --slice K/N"),
        (["verify", "--sample", "3", "--results", "nowhere"], "--results nowhere: there is no such folder"),
        (["show", "--results", "nowhere"], "--results nowhere: there is no such folder"),
        (["compare", "ddim", "unipc", "--results", "nowhere"], "--results nowhere: there is no such folder"),
        (["samples", "--method", "nope"], "no method 'nope'; see:"),
        (["samples", "--results", "nowhere"], "--results nowhere: there is no such folder"),
        (["site", "--results", "nowhere"], "--results nowhere: there is no such folder"),
        (["migrate", "--results", "pyproject.toml"], "--results pyproject.toml: there is no such folder"),
        (["release", "--results", "nowhere"], "no such folder"),
        (["new", "methods/nowhere/foo"], "the folder must be a track"),
        (["new", "methods/image/Foo-Bar"], "is no id"),
        (["new", "methods/image/ddim"], "already"),
        (["backbones", "train"], "name the backbones"),
        (["backbones", "train", "nope"], "no backbone 'nope'; see: stepmark backbones list"),
        (["backbones", "train", "lm_taget"], "no backbone 'lm_taget'; did you mean 'lm_target'"),
        (["new", "methods/imgae/foo"], "did you mean 'image'?"),
        (["new", "methods/image/foo_bar", "--task", "greedy/stories"], "no task 'greedy/stories'"),
        (["new", "pyproject.toml/image/foo_bar"], "pyproject.toml/image: Not a directory"),
    ],
)
def test_bad_input_is_one_line_that_names_the_mend(
    command: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert error.count("\n") == 0


def test_a_run_says_what_is_left_out_and_what_it_will_take_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begun(*_: object) -> list[object]:
        print("begun", file=sys.stderr)
        return []

    monkeypatch.setattr(suite, "measure", begun)
    names = ["--method", "ddim", "--method", "euler"]
    assert main(["run", *names, "--task", "sampling/mixtures_eps", "--quiet", "--results", str(tmp_path)]) == 0
    left_out, forecasted, *after = capsys.readouterr().err.splitlines()
    assert left_out.startswith("left out: euler does not run on sampling/mixtures_eps, but on ")
    assert re.match(r"\d+ cells to run, about \d+ (s|minutes|hours) by the published latencies", forecasted)
    assert "begun" in "".join(after)
    monkeypatch.setattr(suite, "todo", lambda cells, options: list(cells))
    assert main(["run", "--quiet", "--results", str(tmp_path)]) == 0  # everything there is
    assert re.match(r"\d,\d{3} cells to run, about \d+ (hours|days) by the pub", capsys.readouterr().err)


def test_a_forecast_is_the_published_time_of_the_calls_and_of_the_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("ddim", "sampling/mixtures_eps", 4, 1, "embedded")
    task = plugins.tasks()[cell.task][1]
    known = next(r for r in records.read_all(results_folder("embedded")) if r.method == "ddim" and r.latency)
    times = known.latency.model_copy(update={"items": task.batch, "median_ms": 5000.0})  # type: ignore[union-attr]
    offline = records.Offline(seconds=100.0, state_mib=0.0, seed=0)
    record = known.model_copy(update={"task": cell.task, "rung": 4, "latency": times, "offline": offline})
    batches = math.ceil(task.n / task.batch)
    running, preparing = forecast.seconds([cell], [record], True) or (0, 0)
    assert running == pytest.approx(5.0 * batches, rel=0.1) and preparing == 100
    options = suite.Options(results_folder("embedded"), workers=2)
    monkeypatch.setattr(forecast, "seconds", lambda *_: (4.0, 0.0))  # of two workers, who start but once
    said = f"about {4 / 2 + forecast.START:.0f} s by the published latencies, start and audit included"
    assert forecast.sentence([cell], options) == f"1 cell to run, {said}"
    monkeypatch.undo()
    unknown = replace(cell, rung=8)
    assert forecast.seconds([cell, unknown], [record], True) == pytest.approx((2 * running, 100))
    assert forecast.seconds([cell, replace(cell, seed=2)], [record], True) == pytest.approx((2 * running, 200))
    assert forecast.seconds([replace(cell, seed=0)], [record], True)[0] > running + 8  # type: ignore[index]
    quick = record.model_copy(update={"latency": times.model_copy(update={"median_ms": 0.0})})
    audited, plain = (forecast.seconds([replace(cell, seed=s)], [quick], False) or (0, 0) for s in (0, 1))
    assert audited[0] == pytest.approx(plain[0] + forecast.AUDIT)
    assert forecast.seconds([unknown], [], True) is None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["lst"], "no command 'lst'; did you mean 'list'?"),
        (["zzz"], "no command 'zzz'; known: backbones, check"),
        (["list", "task"], "did you mean 'tasks'?"),
        (["run", "--metod", "ddim"], "'--metod' is not understood; did you mean '--method'?"),
        (["run", "--tier", "fast"], "invalid choice: 'fast' (choose from 'smoke', 'embedded', 'hub')"),
        (["compare", "ddim"], "the following arguments are required"),
        (["show", "ddim"], "'ddim' is not understood"),
    ],
)
def test_wrong_use_is_one_line_that_names_what_was_meant(
    command: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert words in error
    assert error.count("\n") == 0


def test_bare_stepmark_says_what_to_type_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "stepmark list" in out and "stepmark tour" in out and "stepmark new" in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "mkdocs", None)
    monkeypatch.setitem(sys.modules, "mkdocs.commands.build", None)
    (tmp_path / "results").mkdir()
    pages = importlib.import_module("stepmark.leaderboard.site")
    monkeypatch.setattr(pages, "build", lambda *_: importlib.import_module("mkdocs.commands.build"))
    assert main(["site", "--results", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert "the extra site: pip install -e '.[site]'" in error and error.count("\n") == 1
    written = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) == set(written) - {"dev"}


def listed(capsys: pytest.CaptureFixture[str], *what: str) -> list[str]:
    assert main(["list", *what]) == 0
    return capsys.readouterr().out.splitlines()


def test_list_tasks_shows_rungs_seeds_and_which_way_metrics_go(capsys: pytest.CaptureFixture[str]) -> None:
    head, *lines = listed(capsys, "tasks")
    assert head.split()[:5] == ["task", "track", "version", "seeds", "rungs"]
    (line,) = (line for line in lines if line.startswith("attributes_to_image/shapes16 "))
    for words in ("1 2 4 8 16  ", "  2  ", "NFE", "fd (lower), alignment (higher)", "exact verifier"):
        assert words in line
    assert len(lines) == len(plugins.tasks())


def test_lists_are_cut_for_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    title = max((m.title for m in plugins.methods().values()), key=len)
    assert len(title) > 90
    whole = listed(capsys, "methods")
    assert any(line.endswith(title) for line in whole)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, listed(capsys, "methods"))) == 80


def test_a_reader_that_goes_away_is_no_fault() -> None:
    code = "from stepmark.cli import main; import sys; sys.exit(main(['list', 'tracks']))"  # fits into a buffer
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("info", plugins.methods().values(), ids=lambda info: info.id)
def test_the_source_of_every_method_keeps_the_contract(info: plugins.MethodInfo) -> None:
    assert list(static(info)) == []


def test_verify_agrees_with_a_true_record_and_not_with_a_forged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    command = ["run", "--tier", "smoke", "--method", "euler", "--task", "sampling/mixtures_flow", "--rung", "2"]
    assert main([*command, "--results", str(tmp_path / "r"), "--quiet", "--no-timing"]) == 0
    path = next((tmp_path / "r").rglob("euler.jsonl"))
    assert main(["verify", f"{path}:1"]) == 0
    assert "outputs, bit for bit" in capsys.readouterr().out
    record = next(records.read(path))
    quality = {name: q.model_copy(update={"value": q.value * 0.99}) for name, q in record.quality.items()}
    forged = record.model_copy(update={"quality": quality, "counts": record.counts | {"nfe": 1.0}})
    path.write_text(forged.model_dump_json() + "\n")
    assert main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert "nfe: 1 in the record, 2 now" in out
    assert "sliced_w2: wanted" in out


def test_elsewhere_quality_must_lie_in_the_interval_and_counts_must_agree() -> None:
    cell = Cell("euler", "sampling/mixtures_flow", 2, 0, "smoke")
    record = run.measure(cell, timing=False, show_progress=False)
    other = record.model_copy(update={"machine": "other-4c-00000000"})
    assert compare(other, record).differs == []
    name, quality = next(iter(record.quality.items()))
    far = other.model_copy(update={"quality": {name: quality.model_copy(update={"value": quality.value * 5})}})
    assert any("within" in text for text in compare(record, far).differs)
    assert compare(other.model_copy(update={"counts": {"nfe": 9.0}}), record).differs
