"""What makes a record old: a change of what runs, not of what is said about it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from stepmark import backbones, digests, index, literals, plugins, syntax

METHOD = '''"""A method."""
from stepmark.method import Claim, Method
from stepmark.tracks.toy import step


class Toy(Method):
    """Docstring."""

    tasks = ("a/b",)
    claims = (Claim("fd[toy,1] < 2", says="small"),)
    width = 3

    def run(self, session, batch, rung):
        """Another."""
        return step(batch, self.width)  # comment
'''
TRACK = '''"""A track."""
import math


def step(x, width):
    return inner(x) * width


def inner(x):
    return x + SHIFT


SHIFT = math.pi


def unrelated(x):
    return x
'''


def digest(tmp_path: Path, text: str, roots: set[str] | None = None) -> str:
    path = tmp_path / "toy.py"
    path.write_text(text)
    return digests.code_digest(path) if roots is None else digests.reach_digest([(path, roots)])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # comment", "  # another"),
        ('"""Docstring."""', '"""Words, and\n\n    more words."""'),
        ('says="small"', 'says="tiny"'),
        ('tasks = ("a/b",)', 'tasks = ("a/b", "a/c")'),
        ("return step(batch, self.width)", "return step(\n            batch,\n            self.width,\n        )"),
        ('        """Another."""\n', ""),
    ],
)
def test_words_leave_the_digest_alone(tmp_path: Path, old: str, new: str) -> None:
    assert old in METHOD
    assert digest(tmp_path, METHOD.replace(old, new)) == digest(tmp_path, METHOD)


@pytest.mark.parametrize(
    ("old", "new"),
    [("width = 3", "width = 4"), ("return step", "return 2 * step"), ("import step", "import leap as step")],
)
def test_code_moves_the_digest(tmp_path: Path, old: str, new: str) -> None:
    assert old in METHOD
    assert digest(tmp_path, METHOD.replace(old, new)) != digest(tmp_path, METHOD)


@pytest.mark.parametrize("reading", ["len(self.claims)", "getattr(self, 'claims')", "self.__doc__"])
def test_words_that_the_code_reads_count(tmp_path: Path, reading: str) -> None:
    method = METHOD.replace("return step(batch, self.width)", f"return step(batch, {reading})")
    for old, new in (('says="small"', 'says="tiny"'), ('"""Docstring."""', '"""Other."""')):
        assert digest(tmp_path, method.replace(old, new)) != digest(tmp_path, method)


def test_of_a_track_only_what_is_used_counts(tmp_path: Path) -> None:
    path = tmp_path / "method.py"
    path.write_text(METHOD)
    used = {
        name for each in digests.definitions(path) for name in each.defined | each.used | {i[0] for i in each.imports}
    }
    before = digest(tmp_path, TRACK, used)
    assert digest(tmp_path, TRACK.replace("return x\n", "return -x\n"), used) == before
    assert digest(tmp_path, TRACK + "\n\ndef more():\n    return 1\n", used) == before
    for old, new in (
        ("* width", "/ width"),
        ("x + SHIFT", "x - SHIFT"),
        ("math.pi", "math.e"),
        ("import math", "import cmath as math"),
    ):
        assert digest(tmp_path, TRACK.replace(old, new), used) != before, f"{old} -> {new} went unseen"


def test_every_file_of_a_plugin_folder_counts(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "__init__.py").write_text(METHOD)
    (folder / "part.py").write_text("A = 1\n")
    before = digests.code_digest(folder / "__init__.py")
    (folder / "part.py").write_text("A = 2\n")
    assert digests.code_digest(folder / "__init__.py") != before


def test_leaving_functions_out_changes_nothing_that_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Listing parses outlines of the files; what it finds must be what the whole files say."""

    def found() -> tuple[object, ...]:
        plugins._known.clear()
        plugins._placed_tasks.cache_clear()
        return plugins.methods(), plugins._placed_tasks(), plugins.datasets()

    monkeypatch.setattr(index, "load", dict)
    quick = found()
    monkeypatch.setattr(literals, "outline", syntax.parse)
    assert quick == found()
    monkeypatch.undo()

    path = tmp_path / "odd.py"
    path.write_text(
        'A = (\n    "def f(",\n)\n\n\n@cache\ndef f(\n    x: int,\n) -> str:\n    """\n    Text.\n\n    A = 1\n    """\n'
        '    return """\n    B = 2\n"""\n\n\nclass C(Method):\n    async def g(self): return 1\n    tasks = ("a",)\n'
    )
    body = literals.outline(path).body
    assert literals.assigned(body, path, ("A", "B")) == {"A": ("def f(",)}
    assert literals.assigned(body[-1].body, path, ("tasks",)) == {"tasks": ("a",)}  # type: ignore[attr-defined]
    path.write_text("def f():\n    x = '''\ndef g(\n'''\nA = 3\n")  # a text in a function that is no function
    assert literals.assigned(literals.outline(path).body, path, ("A",)) == {"A": 3}


def test_a_function_may_move_between_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is reached counts, wherever it stands: through imports at the top, of whole modules, and inside functions."""
    package = tmp_path / "stepmark"
    track = package / "tracks" / "toy"
    track.mkdir(parents=True)
    monkeypatch.setattr(digests, "PACKAGE", package)
    method = tmp_path / "method.py"
    method.write_text("from stepmark.tracks.toy import step\n\n\ndef run(x):\n    return step(x)\n")
    step, inner = "def step(x):\n    return inner(x)\n", "def inner(x):\n    return x + 1\n"

    def found(main: str, other: str = "", text: str | None = None) -> str:
        (track / "__init__.py").write_text(main)
        (track / "steps.py").write_text(other)
        if text is not None:
            method.write_text(text)
        digests._file.cache_clear()
        return digests.reach_digest([(method, None)], leave_out=[method])

    whole = found(f"{step}\n\n{inner}")
    assert found(f"from stepmark.tracks.toy.steps import inner\n\n\n{step}", inner) == whole
    assert found("from stepmark.tracks.toy.steps import step as step\n", f"{step}\n\n{inner}") == whole
    assert found("from stepmark.tracks.toy.steps import step as step\n", f"{step}\n\n{inner}\n\nB = 2\n") == whole
    assert (
        found("from stepmark.tracks.toy.steps import step as step\n", f"{step}\n\n{inner}".replace("1", "2")) != whole
    )
    through = "from stepmark.tracks.toy import steps\n\n\ndef run(x):\n    return steps.step(x)\n"
    assert found("", f"{step}\n\n{inner}", through) == whole
    late = "def run(x):\n    from stepmark.tracks.toy.steps import step\n\n    return step(x)\n"
    assert found("", f"{step}\n\n{inner}", late) == whole


def test_the_digest_of_an_analytic_backbone_is_that_of_what_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the library that its arguments are bound with: two recipes of one file, two digests; one that stands on trained
    weights has another when these change, and those of others stay."""
    names = ["mixtures_flow", "mixtures_eps", "rare_eps", "digits_flow_faint", "shapes16_flow_any"]
    before = {name: backbones.digest(name) for name in names}
    assert len(set(before.values())) == len(names)
    trained = backbones.manifest()
    trained["digits_flow_a"]["sha256"] = "other"
    monkeypatch.setattr(backbones, "manifest", lambda: trained)
    after = {name: backbones.digest(name) for name in names}
    assert [name for name in names if after[name] != before[name]] == ["digits_flow_faint"]
    recipe = replace(backbones.recipe("mixtures_flow"), build=backbones.recipe("rare_eps").build)
    monkeypatch.setitem(backbones.recipes(), "mixtures_flow", recipe)
    assert backbones.digest("mixtures_flow") == before["rare_eps"]


def test_a_stray_file_beside_tasks_and_datasets_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another system leaves beside every file is no Python, and nobody's."""
    root = Path(plugins.__file__).parents[2]
    shutil.copytree(root / "bench" / "stepmark" / "tracks" / "bayes", tmp_path / "tracks" / "bayes")
    (tmp_path / "datasets").mkdir()
    shutil.copy(root / "datasets" / "mixtures.py", tmp_path / "datasets")
    monkeypatch.setattr(plugins, "PACKAGE", tmp_path)
    monkeypatch.setattr(plugins, "checkout", lambda: tmp_path)
    wanted = set(plugins._placed_tasks.__wrapped__()), set(plugins.datasets())
    assert all(wanted)
    for stray in (tmp_path / "tracks" / "bayes" / "._coverage.py", tmp_path / "datasets" / "._mixtures.py"):
        stray.write_bytes(b"\x00\xff\nTASKS = DATASET = (")
    assert (set(plugins._placed_tasks.__wrapped__()), set(plugins.datasets())) == wanted
