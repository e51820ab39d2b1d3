"""An author's files: the scaffold, the check, and that what is wrong with one plugin stops nothing else."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from stepmark.leaderboard import coverage
from stepmark.leaderboard.rows import cells, index
from stepmark.leaderboard.verdicts import judge

from stepmark import check as contract
from stepmark import plugins
from stepmark.cell import Cell
from stepmark.check import aloud, check, further_rungs, running, warned
from stepmark.cli import main
from stepmark.method import Claim
from stepmark.names import meant
from stepmark.places import results_folder
from stepmark.record import files, read
from stepmark.run import measure
from stepmark.scaffold import first_claim, folder_of, scaffold, usual_baseline

LEAST = """from stepmark import Method
class Mine(Method):
    '''One.

    Two.
    '''
    tasks = ('sampling/mixtures_flow',)
"""
FILLED = """
        denoise = Denoiser(session.networks['teacher'], batch['condition'])
        x = batch['noise']
        for t, s in pairwise(uniform_times(rung)):
            x0, eps = denoise(x, t)
            x = ddim_step(denoise.schedule, x0, eps, s)
        return x
"""
IMPORTS = """from itertools import pairwise
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An author's own folder of methods."""
    (tmp_path / "mine" / "image").mkdir(parents=True)
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path / "mine"))
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "mine"


def written(text: str, run: str = FILLED) -> str:
    """A scaffold of track image, filled in."""
    start = text.index("        raise ValueError")
    text = text[:start] + run.removeprefix("\n")
    text = text.replace('title="..."', 'title="A title"').replace('authors="..."', 'authors="Somebody"')
    text = text.replace("one line that says what it does.", "steps.").replace(
        "the update rule with the paper's equation or algorithm numbers.", "x_s = a x0 + b eps"
    )
    text = text.replace("    Differs from the paper: what, and why (delete this line if nothing does).\n", "")
    return text.replace("from stepmark import Claim", f"{IMPORTS}from stepmark import Claim")


# the scaffold -------------------------------------------------------------------------------------


def test_a_scaffold_filled_in_passes_the_check(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", str(elsewhere / "image" / "my_sampler")]) == 0
    assert "STEPMARK_METHODS" not in capsys.readouterr().out
    path = elsewhere / "image" / "my_sampler.py"
    findings = check(path)
    for words in ("fill in run", "my_sampler.py:", "title='...' says nothing", "still the template's"):
        assert any(words in finding for finding in findings), findings
    path.write_text(written(path.read_text()))
    said: list[str] = []

    def stage(what: str) -> contextlib.nullcontext[None]:
        said.append(what)
        return contextlib.nullcontext()

    assert check(path, stage=stage) == []
    at = "my_sampler on sampling/mixtures_flow at rung"
    further = (f"{at} {rung}, audited" for rung in (1, 8, 64))
    assert said == ["my_sampler, the source", f"{at} 4, audited", f"{at} 4, again in a fresh process", *further]
    assert not any("stands at one rung" in text for text in warned(path))


def test_the_baseline_of_a_new_file_is_what_most_methods_are_compared_with(elsewhere: Path) -> None:
    assert usual_baseline("greedy/stories") == "autoregressive"
    assert usual_baseline("class_to_image/digits_eps") == "ddim"
    for task, (_, problem) in plugins.tasks().items():
        baseline = usual_baseline(task)
        assert task in plugins.methods()[baseline].tasks, problem.id
    text = scaffold(elsewhere / "decoding" / "my_drafter", "greedy/stories").read_text()
    assert 'baselines = ("autoregressive",)' in text and 'tasks = ("greedy/stories",)' in text
    assert '"first_divergence[my_drafter,8..64] > first_divergence[autoregressive,8..64]"' in text


def test_the_first_claim_of_a_file_can_hold_and_fail_at_each_of_its_rungs() -> None:
    """By the published records of speculative decoding: ahead of plain decoding at each, which is not ahead of itself."""
    both = [path for path in files(results_folder("embedded")) if path.stem in {"speculative", "autoregressive"}]
    rows = cells([r for path in both for r in read(path)], plugins.tasks())
    found = index(rows)
    info = plugins.methods()["speculative"]
    places = {row.place for row in rows if row.method == info.id}
    for task in info.tasks:
        stated, _ = first_claim(plugins.tasks()[task][1], info.id, "autoregressive")
        states = {judge(Claim(stated, "x", task=task), info, place, found).state for place in places}
        assert "reproduced" in states, (task, stated)
        itself = Claim(stated.replace(info.id, "autoregressive"), "x", task=task)
        assert {judge(itself, info, place, found).state for place in places} <= {"not reproduced", "not run"}
    named = {t: first_claim(task, "a", "b")[0] for t, (_, task) in plugins.tasks().items()}
    assert named["sampling/mixtures_flow"] == "sliced_w2[a,*] < sliced_w2[b,*]"
    assert (
        named["recall/needles"] == "first_divergence[a,8] > first_divergence[b,8]"
    )  # one word of one forward is all's
    assert named["parallel/friend_lists"] == "accuracy[a,8..32] > accuracy[b,8..32]"


def test_a_reference_point_is_written_among_the_baselines(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", str(elsewhere / "image" / "my_point"), "--baseline"]) == 0
    path = elsewhere / "image" / "baselines" / "my_point.py"
    assert f"wrote {path};" in capsys.readouterr().out and not (elsewhere / "image" / "my_point.py").exists()
    text = path.read_text()
    assert "    paper = None\n" in text
    assert not any(words in text for words in ("Paper", "headline", "Differs", "catalogue"))
    assert main(["new", str(elsewhere / "image" / "baselines" / "my_other")]) == 0
    assert (elsewhere / "image" / "baselines" / "my_other.py").read_text() == text.replace(
        "my_point", "my_other"
    ).replace("MyPoint", "MyOther").replace("My point", "My other")
    subprocess.run([sys.executable, "-m", "ruff", "format", "--check", "--line-length", "120", path], check=True)
    path.write_text(written(text))
    assert check(path, run=False) == [] and warned(path) == []
    assert main(["new", str(elsewhere / "image" / "my_point"), "--baseline"]) == 2
    assert "already" in capsys.readouterr().err


def test_a_new_file_of_a_checkout_comes_with_the_line_of_its_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = plugins.checkout()
    assert root is not None
    line = coverage.blank(root / "methods" / "image" / "my_sampler.py")
    assert line is not None
    (tmp_path / "catalogue.jsonl").write_text(line + "\n")
    (entry,) = coverage.catalogue(tmp_path / "catalogue.jsonl")
    assert (entry.id, entry.track, entry.kind) == ("my_sampler", "image", "method")
    (tmp_path / "catalogue.jsonl").write_text(line.replace('"method"', '"metod"'))
    with pytest.raises(ValueError, match="kind 'metod' is none of method, analysis"):
        coverage.catalogue(tmp_path / "catalogue.jsonl")
    for needless in (root / "methods/image/ddt.py", root / "methods/image/baselines/x.py", tmp_path / "image/x.py"):
        assert coverage.blank(needless) is None
    told = Path("CONTRIBUTING.md").read_text()
    assert all(f"| `{field}` |" in told for field in coverage.CatalogueEntry._fields)
    assert all(f"*{kind}*" in told for kind in coverage.KINDS)


def test_a_new_file_outside_the_folders_of_methods_says_how_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "methods/image/my_sampler"]) == 0
    out = capsys.readouterr().out
    assert f"export STEPMARK_METHODS={tmp_path / 'methods'}" in out
    assert folder_of(Path("methods/image/family/my_sampler.py")) == tmp_path / "methods"


# what is wrong with one plugin stops nothing else -------------------------------------------------

BROKEN = {
    "syntax.py": (b"class A(:\n", "syntax.py:1: invalid syntax"),
    "latin.py": ("# caf\xe9\n".encode("latin-1") + LEAST.encode(), "latin.py: not UTF-8 text; save the file as UTF-8"),
    "nothing.py": (b"x = 1\n", "has 0 subclasses of Method"),
    "null.py": (b"a\0b\n", "null bytes"),
    "my-ddim.py": (LEAST.encode(), "rename it my_ddim.py"),
    "Mine.py": (LEAST.encode(), "rename it mine.py"),
    "ddim.py": (LEAST.encode(), "method id 'ddim' stands in"),
    "twice.py": (
        LEAST.replace("tasks =", "variants = (Variant('twice', says='x'),)\n    tasks =").encode(),
        "method id 'twice' stands in",
    ),
    "numbered.py": (
        LEAST.encode() + b"    paper = Paper(id=3, title='a', authors='b', year=2020)\n",
        "takes id as str",
    ),
    "said.py": (LEAST.encode() + b"    paper = 'a paper'\n", "paper must be Paper(...)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_left_out_and_said_once(
    name: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = elsewhere / "image" / name
    content, words = BROKEN[name]
    path.write_bytes(content)
    (elsewhere / "image" / "good.py").write_text(LEAST)
    assert {"good", "ddim"} <= set(plugins.methods())
    assert plugins.methods()["ddim"].path != path
    assert main(["list", "methods"]) == 0
    assert capsys.readouterr().err.count(words) == 1
    (finding,) = check(path, run=False)
    assert words in finding and "\n" not in finding
    path.unlink()
    assert main(["list", "methods"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("head", "tail", "words"),
    [
        ("# -*- coding: klingon -*-\n", "", "unknown encoding: klingon"),
        ("", "    def run(self, session, batch, rung):\n        return (\n", "mine.py:9: '(' was never closed"),
        (
            "",
            "    def run(self, session, batch, rung):\n        x = 1\n      y = 2\n",
            "mine.py:10: unindent does not match",
        ),
    ],
)
def test_what_only_a_run_would_stumble_over_is_one_line_of_the_check(
    head: str, tail: str, words: str, elsewhere: Path
) -> None:
    path = elsewhere / "image" / "mine.py"
    path.write_text(head + LEAST + tail)
    for run in (False, True):
        (finding,) = check(path, run=run)
        assert words in finding and "\n" not in finding


def test_no_shipped_plugin_is_left_out() -> None:
    plugins.methods()
    assert plugins.left_out() == []


def test_what_cannot_be_followed_or_belongs_to_no_track_is_left_out(elsewhere: Path) -> None:
    (elsewhere / "image" / "loop").symlink_to("loop")
    (elsewhere / "image" / "gone.py").symlink_to("nowhere")
    (elsewhere / "imgae").mkdir()
    (elsewhere / "imgae" / "mine.py").write_text(LEAST)
    (elsewhere / "notes").mkdir()  # holds no plugin, so that nothing is said
    assert "mine" not in plugins.methods()
    assert plugins.left_out() == [f"{elsewhere / 'imgae'}: no track 'imgae'; did you mean 'image'?"]
    (finding,) = check(elsewhere / "imgae" / "mine.py", run=False)
    assert "no track 'imgae'; did you mean 'image'?" in finding


def test_a_byte_order_mark_is_no_fault(elsewhere: Path) -> None:
    path = elsewhere / "image" / "marked.py"
    path.write_bytes(b"\xef\xbb\xbf" + LEAST.encode())
    assert plugins.methods()["marked"].path == path
    assert check(path, run=False) == []
    assert plugins.load_class(plugins.methods()["marked"]).__name__ == "Mine"


@pytest.mark.parametrize("layout", ["mine.py", "samplers/mine.py"])
def test_a_folder_without_tracks_is_one_line(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / layout).parent.mkdir(exist_ok=True)
    (tmp_path / layout).write_text(LEAST)
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path))
    assert main(["list", "methods"]) == 2
    error = capsys.readouterr().err
    assert "has no folder of a track; lay methods out as <track>/<id>.py" in error and error.count("\n") == 1
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path / "nowhere"))
    assert main(["list", "methods"]) == 2
    assert "which is no folder" in capsys.readouterr().err
    plugins.mount()  # as an import does: it must not stop a program that asks for no methods


# the check ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("import ", "import subprocess\nimport ", 1), "imports subprocess: run must not start processes"),
        (('tasks = ("', 'tasks = ("nowhere/at_all", "', 1), "tasks: no task 'nowhere/at_all'"),
        (("sampling/mixtures_flow", "sampling/mixture_flow", 1), "did you mean 'sampling/mixtures_flow'"),
        (('baselines = ("', 'baselines = ("nobody", "', 1), "baselines: no method 'nobody'"),
        (('baselines = ("euler"', 'baselines = ("eulr"', 1), "baselines: no method 'eulr'; did you mean 'euler'"),
        (('baselines = ("euler"', 'baselines = ("other_sampler"', 1), "is the method itself"),
        (
            ("says=", 'task="posterior/gaussian_n1", says=', 1),
            "does not run on posterior/gaussian_n1; write task='sampling/mixtures_flow', where all that it names run",
        ),
        (
            ("says=", 'task="class_to_image/digits_flow", says=', 1),
            "other_sampler does not run on class_to_image/digits_flow; add 'class_to_image/digits_flow' to tasks, or write",
        ),
        (
            ("Claim(", 'Claim("tokens[other_sampler,8] < tokens[autoregressive,8]", says="x"), Claim(', 1),
            "autoregressive does not run on sampling/mixtures_flow; name methods that share a task",
        ),
        (("Claim(", 'Claim("sliced_w2[ddim_,3] < 1", says="x"), Claim(', 1), "no method 'ddim_'; did you mean 'ddim'"),
        (("Claim(", 'Claim("slice_w2[euler,4] < 1", says="x"), Claim(', 1), "did you mean 'sliced_w2'?"),
        (("Claim(", 'Claim("fid[euler,3] < 1", says="x"), Claim(', 1), "not on the ladder"),
        (("Claim(", 'Claim("__import__(1)", says="x"), Claim(', 1), "claim '__import__(1)'"),
        (("better at every budget", "...", 1), "says='...' says nothing"),
        (('title="..."', 'title=" "', 1), "title=' ' says nothing"),
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


def test_more_rungs_are_tried_than_the_smoke_ladder_has(elsewhere: Path) -> None:
    path = scaffold(elsewhere / "image" / "late")
    path.write_text(
        written(
            path.read_text()
            .replace("sliced_w2[late,*]", "sliced_w2[late,32]")
            .replace("import Tensor", "import Tensor, rand"),
            FILLED.replace("        return x\n", "        return x + 0 * (rand(()) if rung >= 16 else 0)\n"),
        )
    )
    info = plugins.methods()["late"]
    assert plugins.tasks()[info.tasks[0]][1].ladder("smoke") == (4,)
    assert further_rungs(info, info.tasks[0]) == [1, 8, 32, 64]
    known = plugins.methods()
    assert further_rungs(known["ddim_best_grid"], "class_to_image/digits_eps") == [
        10
    ]  # a variant: what its claim names
    assert further_rungs(known["ddim"], "sampling/mixtures_eps") == []  # not its first task, and no claim on it
    findings = list(running(info, fresh=False))
    assert {f.partition(":")[0][-7:] for f in findings} == {"rung 32", "rung 64"}
    assert all("draws from a global random state" in f for f in findings)


def test_a_state_made_for_each_rung_is_asked_for_on_the_smoke_ladder_alone(elsewhere: Path) -> None:
    path = scaffold(elsewhere / "image" / "prepared")
    prepare = (
        "    def prepare(self, session):\n"
        "        return {f'shift_{n}': session.train['x0'][0, 0] * 0 for n in session.task.smoke_rungs}\n\n"
    )
    ending = "        return x + session.state[f'shift_{rung}']\n"
    text = written(path.read_text(), FILLED.replace("        return x\n", ending))
    path.write_text(text.replace("    def run(", f"{prepare}    def run("))
    assert list(running(plugins.methods()["prepared"], fresh=False)) == []
    path.write_text(path.read_text().replace("session.state[f'shift_{rung}']", "1 / (rung - 1)"))
    (finding,) = running(plugins.methods()["prepared"], fresh=False)
    assert "at rung 1: ZeroDivisionError" in finding


def test_what_the_check_is_at_is_a_line_each(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contract, "warnings", lambda info: [])
    path = elsewhere / "image" / "mine.py"
    path.write_text(LEAST)
    assert main(["check", str(path), "--no-run"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{path}: keeps the contract\n"
    lines = [re.sub(r" \d+\.\d s$", "", line) for line in err.splitlines()]
    assert lines == ["mine, the source ...", "mine, its claims by the records ..."]
    monkeypatch.setattr(contract, "running", lambda *_, **__: iter(()))
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().err.startswith("runs are of tier smoke: a few items, enough to see that a method works.")
    with pytest.raises(KeyError), aloud("a stage"):
        raise KeyError
    assert re.fullmatch(r"a stage \.\.\. \d+\.\d s\n", capsys.readouterr().err)  # its line ends, whatever happens


def test_a_rung_that_is_skipped_hides_no_other(elsewhere: Path) -> None:
    """The whole smoke ladder is skipped; what is wrong further on is found, and repeated in a fresh process."""
    path = scaffold(elsewhere / "image" / "picky")
    skipping = "        if rung <= 4:\n            skip('five evaluations at least')\n        denoise = Denoiser(session.networks"
    text = written(path.read_text(), FILLED.replace("        denoise = Denoiser(session.networks", skipping))
    path.write_text(text.replace(IMPORTS, f"{IMPORTS}from stepmark.method import skip\n"))
    stages: list[str] = []

    def noted(what: str) -> contextlib.nullcontext[None]:
        stages.append(what)
        return contextlib.nullcontext()

    assert list(running(plugins.methods()["picky"], stage=noted)) == []
    assert [what for what in stages if "again in a fresh process" in what] == [
        "picky on sampling/mixtures_flow at rung 8, again in a fresh process"
    ]
    path.write_text(path.read_text().replace("return x\n", "return x[:1]\n"))
    findings = list(running(plugins.methods()["picky"], fresh=False))
    assert findings and all("at rung 4" not in finding and "run returned shape" in finding for finding in findings)


def test_who_skips_a_rung_takes_no_part_in_the_rounds(elsewhere: Path) -> None:
    """Neither a baseline nor a method that a claim of time names beside makes another's cell a skipped one."""
    skipping = "        if rung <= 4:\n            skip('five evaluations at least')\n        denoise = Denoiser(session.networks"
    text = written(
        scaffold(elsewhere / "image" / "picky").read_text(),
        FILLED.replace("        denoise = Denoiser(session.networks", skipping),
    )
    (elsewhere / "image" / "picky.py").write_text(text.replace(IMPORTS, f"{IMPORTS}from stepmark.method import skip\n"))
    path = scaffold(elsewhere / "image" / "steady")
    text = written(path.read_text())
    text = re.sub(r"baselines = .*", 'baselines = ("picky", "euler")', text)
    claim = 'Claim("latency_ms[steady,4] <= latency_ms[picky,4] and latency_ms[steady,4] <= latency_ms[heun,4]", says="soon")'
    path.write_text(re.sub(r"claims = \(.*?\n    \)\n", f"claims = ({claim},)\n", text, flags=re.DOTALL))
    (task, *_) = plugins.methods()["steady"].tasks
    found = measure(Cell("steady", task, 4, 0, "smoke"), show_progress=False)
    assert found.status == "ok", found.message
    assert found.latency is not None
    assert found.latency.baseline == "euler"
    assert set(found.latency.beside) == {"heun"}
    path.write_text(re.sub(r"baselines = .*", 'baselines = ("picky",)', path.read_text()))
    alone = measure(Cell("steady", task, 4, 0, "smoke"), show_progress=False)
    assert alone.latency is not None
    assert alone.latency.speedup is None
    assert alone.reasons["speedup"] == "every baseline skips this rung"
    assert measure(Cell("picky", task, 4, 0, "smoke"), show_progress=False).status == "skipped"


def test_a_call_beyond_its_rung_is_told_the_sum_and_the_line(elsewhere: Path) -> None:
    path = scaffold(elsewhere / "image" / "greedy_one")
    path.write_text(written(path.read_text(), FILLED.replace("uniform_times(rung)", "uniform_times(rung + 1)")))
    items = plugins.tasks()["sampling/mixtures_flow"][1].items("smoke")
    finding = next(running(plugins.methods()["greedy_one"], fresh=False))
    assert f"{5 * items} evaluations asked of a batch that may spend rung 4 x {items} items = {4 * items};" in finding
    line = 1 + path.read_text().splitlines().index("            x0, eps = denoise(x, t)")
    assert f"(greedy_one.py:{line})" in finding


def test_a_paper_that_the_catalogue_does_not_hold_is_a_warning(elsewhere: Path) -> None:
    path = scaffold(elsewhere / "image" / "my_sampler")
    assert any("no 'my_sampler' in leaderboard/catalogue.jsonl; add a line" in text for text in warned(path))
    path.write_text(path.read_text().replace('id="my_sampler"', 'id="redy"'))
    assert any("no 'redy' in leaderboard/catalogue.jsonl; did you mean 'redi'" in text for text in warned(path))
    path.write_text(path.read_text().replace('id="redy"', 'id="redi"'))
    assert not any("catalogue" in text for text in warned(path))


def test_what_the_check_asks_to_mend_is_no_warning_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(contract, "checkout", lambda: tmp_path)
    monkeypatch.setattr(plugins, "method_folders", lambda: [tmp_path / "methods"])
    info = plugins.read_methods(scaffold(tmp_path / "methods" / "image" / "my_sampler"))[0]
    (finding,) = contract.misplaced(info)
    assert "add the paper's line" in finding
    assert list(contract.unlisted(info)) == []
    monkeypatch.setattr(contract, "checkout", lambda: None)  # elsewhere nothing is misplaced
    assert len(list(contract.unlisted(info))) == 1


def test_a_checkout_inside_a_folder_of_baselines_is_no_reference_point(tmp_path: Path) -> None:
    outer = tmp_path / "baselines"
    path, reference = outer / "mine" / "image" / "my_sampler.py", outer / "mine" / "image" / "baselines" / "my_point.py"
    assert not contract.among_baselines(path)
    assert contract.among_baselines(reference)
    info = plugins.read_methods(scaffold(path))[0]
    scaffold(reference)
    assert len(list(contract.unlisted(info))) == 1
    nothing = replace(info, claims=())
    assert any("claims is empty" in text for text in contract.static(nothing))
    assert not any("claims is empty" in text for text in contract.static(replace(nothing, path=reference)))


@pytest.mark.parametrize("path", ["methods/image", "docs/quickstart.md", "nowhere.py", "/dev/null"])
def test_what_is_no_plugin_is_said_so(path: str) -> None:
    (finding,) = check(Path(path))
    assert "give the file of a method" in finding


def test_names_that_were_meant() -> None:
    assert meant("DDIM", ["ddim", "euler"]) == "did you mean 'ddim'?"
    assert meant("my-ddim", ["my_ddim"]) == "did you mean 'my_ddim'?"
    assert (
        meant("stories", ["greedy/stories", "sampling/stories"])
        == "did you mean 'greedy/stories' or 'sampling/stories'?"
    )
    assert meant("zzz", ["ddim"]) == meant("", ["ddim"]) == ""
