"""The guide: its code runs, its commands parse, and the API pages say all that a newcomer needs."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stepmark.leaderboard import api_pages

from stepmark import backbones, cli, plugins
from stepmark.cell import Cell
from stepmark.check import check, running
from stepmark.run import measure
from stepmark.task import load_split

DOCS = [*sorted(Path("docs").glob("*.md")), Path("README.md"), Path("CONTRIBUTING.md")]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


PROOFS = [text for text in blocks(Path("docs/add-a-method.md"), "python") if "def test_" in text]
EXAMPLES = [text for text in blocks(Path("docs/add-a-method.md"), "python") if text.startswith('"""')]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path / "mine"))
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "mine"


def test_the_page_for_authors_has_a_sampler_and_a_drafter() -> None:
    assert [re.findall(r"tracks\.(\w+)\.", text)[0] for text in EXAMPLES] == ["image", "decoding"]


@pytest.mark.parametrize("number", [0, 1], ids=["sampler", "drafter"])
def test_a_copied_example_keeps_the_contract(number: int, elsewhere: Path) -> None:
    text = EXAMPLES[number]
    name = re.findall(r"(\w+)\[(\w+),", text)[0][1]
    track = re.findall(r"tracks\.(\w+)\.", text)[0]
    said = re.search(
        rf"Copy this to `methods/({track}/baselines/{name}\.py)`", Path("docs/add-a-method.md").read_text()
    )
    assert said is not None  # the page says where to save it, which is no paper's place
    path = elsewhere / said[1]
    path.parent.mkdir(parents=True)
    path.write_text(text)
    info = plugins.methods()[name]
    assert [*check(path, run=False), *running(info, fresh=False)] == []
    # It does what it says: nearer than Euler, more than a word for each forward.
    task, rung = info.tasks[0], {"image": 32, "decoding": 32}[track]
    mine, other = (measure(Cell(m, task, rung, 0, "smoke"), timing=False) for m in (name, info.baselines[0]))
    metric, better = {"image": ("endpoint_error", -1), "decoding": ("tokens", 1)}[track]
    assert better * mine.quality[metric].value > better * other.quality[metric].value


def test_the_proof_of_the_sampler_passes_and_fails_with_the_method(elsewhere: Path) -> None:
    (proof,) = PROOFS
    scope: dict[str, Any] = {}
    exec(compile(proof, "docs/add-a-method.md", "exec"), scope)
    (prove,) = (value for name, value in scope.items() if name.startswith("test_"))
    path = elsewhere / "image" / "baselines" / "my_midpoint.py"
    path.parent.mkdir(parents=True)
    path.write_text(EXAMPLES[0])
    prove()
    for right, wrong in (
        ("slope, t, middle), middle)", "slope, t, middle), t)"),  # the slope is not the middle's
        ("middle = (t + s) / 2", "middle = s"),
        ("if s > 0 or not odd:", "if s > 0:"),
        ("divmod(rung, 2)", "divmod(rung - 1, 2)"),
    ):
        assert right in EXAMPLES[0]
        path.write_text(EXAMPLES[0].replace(right, wrong))
        with pytest.raises(AssertionError):
            prove()


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_code_parses_and_commands_are_understood(path: Path) -> None:
    for text in blocks(path, "python"):
        ast.parse(text)
    for text in blocks(path, "bash"):
        for line in text.splitlines():
            found = re.search(r"(?:^|[ /])stepmark( .*)?$", line.partition("#")[0].rstrip())
            if found and "pip install" not in line and "<" not in line and not line.startswith(("git", "cd")):
                cli._parsed(shlex.split(found[1] or ""))


@pytest.fixture(scope="module")
def board() -> Any:
    return SimpleNamespace(tasks=plugins.tasks(), tracks=plugins.tracks)


@pytest.mark.parametrize("track", plugins.tracks())
def test_an_author_finds_tasks_networks_and_shared_functions(track: str, board: Any) -> None:
    page = "\n\n".join(api_pages.track_page(board, track))
    for task_id, (of_track, task) in plugins.tasks().items():
        if of_track == track:
            assert f">{task_id}</a>" in page
            for word in (*task.metrics, *task.backbones.values(), *map(str, task.rungs)):
                assert word in page, (task_id, word)
    for path in (Path(plugins.__file__).parent / "tracks" / track).rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                doc = ast.get_docstring(node)
                assert doc, f"{path.name}: {node.name} says nothing"
                if node.name not in plugins.TRACK_CALLS and "Harness only" not in doc:
                    assert re.search(rf"\b{node.name}\(", page), node.name
    assert "Harness only" not in page


def test_a_page_has_signatures_shapes_and_arguments(board: Any) -> None:
    page = "\n\n".join(api_pages.track_page(board, "decoding"))
    assert "from stepmark.tracks.decoding.speculation import speculate&#10;speculate(&#10;    target: Decoder," in page
    assert "<dt>budget</dt><dd>evaluations the target may spend" in page
    assert "Decoder(model: nn.Module, capacity: int)" in page
    assert ".rollback(length: int) -&gt; None" in page
    assert ".spent: float" in page
    assert "Propose = Callable[[list[int], int], tuple[list[int], &#x27;Tensor | None&#x27;]]" in page
    page = "\n\n".join(api_pages.track_page(board, "image"))
    assert "ddim_step(schedule: Schedule, x0: Tensor, eps: Tensor, s: float) -&gt; Tensor" in page
    assert "Denoiser(...)(x: Tensor, t: float) -&gt; tuple[Tensor, Tensor]" in page
    assert "digits, DDPM UNet (noise prediction), first seed" in page
    contract = "\n\n".join(api_pages.index(board))
    for words in (".prepare(session: Session)", ".run(session: Session, batch: Mapping[str, Any], rung: int)", ".once(",
                  ".scale(embedded: T, smoke: T) -&gt; T", "Claim(check: str, says: str", "<dt>rng, seed</dt>"):  # fmt: skip
        assert words in contract or words.replace("(session: Session)", "(session: Session)") in contract, words
    assert ".begin(" not in contract  # the harness's own


@pytest.mark.parametrize("track", plugins.tracks())
def test_what_methods_use_of_the_language_models_is_told(track: str, board: Any) -> None:
    used: set[str] = set()
    for info in plugins.methods().values():
        if info.track == track and info.base is None:
            for node in ast.walk(ast.parse(info.path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module == "stepmark.backbones.lm":
                    used |= {alias.name for alias in node.names}
    page = "\n\n".join(api_pages.track_page(board, track))
    assert ("stepmark.backbones.lm</" in page or "{ #lm }" in page) == bool(used)
    for name in used:
        assert f"<code>{name}</code>" in page or f"import {name}&#10;" in page, name


def test_what_is_told_of_the_language_models_is_so() -> None:
    lm = importlib.import_module("stepmark.backbones.lm")
    assert (lm.PAD, lm.EOS, lm.UNKNOWN) == (0, 1, 2)
    assert [lm.VOCABULARY[i] for i in (0, 1, 2)] == ["<pad>", "<eos>", "<unk>"]
    assert lm.encode("tom nobody") == [lm.VOCABULARY.index("tom"), lm.UNKNOWN]
    data = load_split("stories", "train")
    assert lm.EOS not in lm.encode(data["target"][0]) and not data["target"][0].startswith(data["prompt"][0])
    spare = set(lm.VOCABULARY[lm.VOCABULARY.index("<mask>") :])
    assert "<pause>" in spare
    assert all(spare.isdisjoint(f"{p} {t}".split()) for p, t in zip(data["prompt"], data["target"], strict=True))


def test_networks_are_called_what_the_recipes_call_them() -> None:
    assert api_pages.summaries() == {name: recipe.summary for name, recipe in backbones.recipes().items()}


def test_docstrings_are_set_plainly_and_escaped() -> None:
    html = api_pages.said(
        'What `f` gives for "eps" <b>.\n\n- one\n  goes on\n- two\n\n    x = 1\n\nArgs:\n    a, b: numbers\n        and more\n'
        "    *rest: others\nReturns: a list,\nof three.\nRaises:\n    ValueError: never."
    )
    assert "<code>f</code> gives for &quot;eps&quot; &lt;b&gt;." in html
    assert "<li>one goes on</li><li>two</li>" in html
    assert "<pre><code>x = 1</code></pre>" in html
    assert "<dt>a, b</dt><dd>numbers and more</dd><dt>*rest</dt><dd>others</dd>" in html
    assert "<b>Returns</b>: a list, of three." in html
    assert "<dt>ValueError</dt><dd>never.</dd>" in html
