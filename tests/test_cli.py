"""The command line: help that teaches, one-line errors, the scaffold, the check, verify."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepmark import plugins, run
from stepmark import record as records
from stepmark.cell import Cell
from stepmark.check import check, scaffold, static
from stepmark.cli import main
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
        (["run", "--method", "ddim", "--task", "sampling/mixtures_flow"], "no cell"),
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
