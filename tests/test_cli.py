"""The command line: help that teaches, one-line errors, the scaffold, the check, verify."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stepmark import forecast, plugins, run, suite
from stepmark import record as records
from stepmark.cell import Cell
from stepmark.check import check, scaffold, static
from stepmark.cli import main
from stepmark.commands.options import missing
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
        (["run", "--method", "nope"], "no method 'nope'; known:"),
        (["run", "--task", "no/pe"], "no task 'no/pe'; known:"),
        (["run", "--track", "nope"], "no track 'nope'; known:"),
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
        (["verify", "nowhere.jsonl"], "nowhere.jsonl is not there"),
        (["verify"], "give a record file, FILE:LINE, --sample N, or --slice K/N"),
        (["verify", "--sample", "3", "--results", "nowhere"], "can be run again here"),
        (["samples", "--method", "nope"], "no method 'nope'; known:"),
        (["release", "--results", "nowhere"], "no records of suite version"),
        (["new", "methods/nowhere/foo"], "the folder must be a track"),
        (["new", "methods/image/Foo-Bar"], "is no id"),
        (["new", "methods/image/ddim"], "already"),
        (["backbones", "train"], "name the backbones"),
        (["backbones", "train", "nope"], "no backbone 'nope'; known:"),
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


def test_a_forecast_is_the_published_time_of_the_calls_and_of_the_preparation() -> None:
    cell = Cell("ddim", "sampling/mixtures_eps", 4, 1, "embedded")
    task = plugins.tasks()[cell.task][1]
    known = next(r for r in records.read_all(results_folder("embedded")) if r.method == "ddim" and r.latency)
    times = known.latency.model_copy(update={"items": task.batch, "median_ms": 5000.0})  # type: ignore[union-attr]
    offline = records.Offline(seconds=100.0, state_mib=0.0, seed=0)
    record = known.model_copy(update={"task": cell.task, "rung": 4, "latency": times, "offline": offline})
    batches = math.ceil(task.n / task.batch)
    running, preparing = forecast.seconds([cell], [record], True) or (0, 0)
    assert running == pytest.approx(5.0 * batches, rel=0.1) and preparing == 100
    unknown = replace(cell, rung=8)
    assert forecast.seconds([cell, unknown], [record], True) == pytest.approx((2 * running, 100))
    assert forecast.seconds([cell, replace(cell, seed=2)], [record], True) == pytest.approx((2 * running, 200))
    assert forecast.seconds([replace(cell, seed=0)], [record], True)[0] > running + 8  # type: ignore[index]
    assert forecast.seconds([unknown], [], True) is None


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("lm_eval", ["run", "--via", "lm-eval", "--method", "greedy", "--task", "greedy/words"], "lm-eval"),
        ("mkdocs.commands.build", None, "site"),
        ("pandas", None, "frame"),
    ],
)
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(
    module: str, command: list[str] | None, extra: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if command is None:
        assert missing(ModuleNotFoundError(f"No module named {module!r}", name=module)).endswith(
            f"{module.partition('.')[0]} is not installed: pip install 'stepmark[{extra}]'"
        )
        return
    for name in [name for name in sys.modules if name.startswith((module, "stepmark.via_lm_eval"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(command) == 2
    assert capsys.readouterr().err == f"stepmark: {module} is not installed: pip install 'stepmark[{extra}]'\n"


@pytest.mark.parametrize("info", plugins.methods().values(), ids=lambda info: info.id)
def test_the_source_of_every_method_keeps_the_contract(info: plugins.MethodInfo) -> None:
    assert list(static(info)) == []


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An author's own folder of methods."""
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path))
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_scaffold_filled_in_passes_the_check(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", str(elsewhere / "image" / "my_sampler")]) == 0
    path = elsewhere / "image" / "my_sampler.py"
    findings = check(path)
    assert any("fill in run" in finding and "my_sampler.py:" in finding for finding in findings), findings
    text = path.read_text()
    start = text.index("        raise ValueError")
    text = text[:start] + (
        "        denoise = Denoiser(session.networks['teacher'], batch['condition'])\n"
        "        x = batch['noise']\n"
        "        for t, s in pairwise(uniform_times(rung)):\n"
        "            x0, eps = denoise(x, t)\n"
        "            x = ddim_step(denoise.schedule, x0, eps, s)\n"
        "        return x\n"
    )
    text = text.replace(
        "from stepmark import Claim",
        "from itertools import pairwise\nfrom stepmark.tracks.image.schedules import uniform_times\n"
        "from stepmark.tracks.image.solvers import Denoiser, ddim_step\n"
        "from stepmark import Claim",
    )
    path.write_text(text)
    assert check(path) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("import ", "import subprocess\nimport ", 1), "imports subprocess: run must not start processes"),
        (('tasks = ("', 'tasks = ("nowhere/at_all", "', 1), "tasks: 'nowhere/at_all' is not there"),
        (('baselines = ("', 'baselines = ("nobody", "', 1), "there is no method 'nobody'"),
        (("says=", 'task="posterior/gaussian_n1", says=', 1), "does not run on posterior/gaussian_n1"),
        (("Claim(", 'Claim("fid[ddim,3] < 1", says="x"), Claim(', 1), "not on the ladder"),
        (("Claim(", 'Claim("__import__(1)", says="x"), Claim(', 1), "claim '__import__(1)'"),
    ],
)
def test_the_check_says_what_is_wrong_in_plain_words(elsewhere: Path, change: tuple[str, str, int], words: str) -> None:
    path = scaffold(elsewhere / "image" / "other_sampler")
    head, brk, body = path.read_text().partition("from stepmark import")
    text = (head + brk + body).replace(*change) if change[0] != "import " else "import subprocess\n" + head + brk + body
    text = text.replace("from __future__ import annotations\n", "") if change[0] == "import " else text
    path.write_text(text)
    findings = check(path, run=False)
    assert any(words in finding for finding in findings), findings


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
