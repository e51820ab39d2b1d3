"""Variants: further settings of a method in its own file, each a method everywhere."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from stepmark import check, index, plugins, suite
from stepmark.run import measure

TASK = "sampling/mixtures_eps"
PLUGIN = '''"""Toy."""

from stepmark import Claim, Method, Paper, Variant


class Toy(Method):
    """A toy: the noise, scaled.

    Equation 1 of nothing.

    Differs from no paper.
    """

    paper = Paper(id="toy", title="Toy", authors="A. Toy", year=2026)
    tasks = ("sampling/mixtures_eps", "sampling/mixtures_flow")
    baselines = ("toy_double",)
    claims = (Claim("sliced_w2[toy,4] < sliced_w2[toy_double,4]", says="less is better", headline=True),)
    scale, shift = 1.0, 0.0
    variants = (
        Variant("toy_double", says="twice as far out", scale=2.0),
        Variant("toy_half", says="half as far out", scale=0.5, tasks=("sampling/mixtures_eps",), baselines=("toy",)),
    )

    def run(self, session, batch, rung):
        x = batch["noise"]
        session.networks["teacher"](x, x.new_full((len(x),), 500.0), batch["condition"])
        return x * self.scale + self.shift
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy two folders below its track."""
    path = tmp_path / "plugins" / "image" / "family" / "toy.py"
    path.parent.mkdir(parents=True)
    path.write_text(PLUGIN)
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path / "plugins"))
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    return path


def test_a_variant_is_a_method(toy: Path) -> None:
    known = plugins.methods()
    assert {known[name].track for name in ("toy", "toy_double", "toy_half")} == {"image"}
    double, half = known["toy_double"], known["toy_half"]
    assert (double.base, double.title, double.paper) == ("toy", "twice as far out", known["toy"].paper)
    assert double.tasks == known["toy"].tasks and half.tasks == (TASK,)
    assert double.baselines == () and half.baselines == ("toy",), "a method is not its own baseline"
    assert known["toy"].claims and not double.claims, "a claim is stated once, by the method"
    assert plugins.load_class(half)().scale == 0.5 and plugins.load_class(known["toy"])().scale == 1.0
    assert plugins.load_class(half).__doc__ == "half as far out"

    cells = suite.cells(suite.Selection("smoke", methods=("toy_half",)))
    assert {(c.method, c.task) for c in cells} == {("toy_half", TASK)}
    records = {name: measure(suite.Cell(name, TASK, 4, 0, "smoke"), timing=False) for name in ("toy", "toy_double")}
    assert [r.status for r in records.values()] == ["ok", "ok"]
    assert records["toy"].quality["sliced_w2"].value != records["toy_double"].quality["sliced_w2"].value


def test_a_new_variant_leaves_the_digests_of_others_alone(toy: Path) -> None:
    def found() -> dict[str, str]:
        return {name: plugins.method_digest(info) for name, info in plugins.methods().items() if name.startswith("toy")}

    before = found()
    assert len(set(before.values())) == 3
    toy.write_text(
        PLUGIN.replace("    variants = (", '    variants = (\n        Variant("toy_far", says="far", scale=9.0),')
    )
    after = found()
    assert {name: after[name] for name in before} == before and "toy_far" in after
    toy.write_text(PLUGIN.replace("scale=0.5", "scale=0.25"))
    assert {name for name, digest in found().items() if digest != before[name]} == {"toy_half"}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("scale=2.0", "scal=2.0", "sets scal, which the class Toy does not define"),
        ("scale=2.0", "paper=None", "sets paper"),
        ("scale=2.0", "scale=float(2)", r"not float\(2\): variants is read without running"),
        ('"toy_double", says', '"Toy-Double", says', "small letters"),
        ('says="twice as far out", ', "", "says"),
        ("scale=2.0", 'tasks="sampling/mixtures_eps"', "tasks must be a tuple of strings"),
        ("scale=2.0", "**{}", "Variant takes"),
        ("scale=2.0", "trainings=0", "trainings says with how many seeds"),
        ('"toy_double", says', '"ddim", says', "stands in"),
    ],
)
def test_a_fault_is_one_line_that_names_file_and_mend(toy: Path, old: str, new: str, says: str) -> None:
    assert old in PLUGIN
    toy.write_text(PLUGIN.replace(old, new, 1))
    assert "toy_double" not in plugins.methods()
    (said,) = plugins.left_out()
    assert re.search(says, said)
    assert "\n" not in said and "toy.py" in said


def test_check_looks_at_every_variant(toy: Path) -> None:
    assert check.check(toy) == []
    toy.write_text(PLUGIN.replace("scale=0.5, tasks", "scale=None, tasks"))
    assert [f for f in check.check(toy) if f.startswith("variant toy_half: ")]


def test_the_index_knows_a_file_until_it_changes(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plugins.methods()
    plugins._known.clear()
    read: list[Path] = []
    reader = plugins.read_methods
    monkeypatch.setattr(plugins, "read_methods", lambda path: read.append(path) or reader(path))
    assert plugins.methods() == before and read == [], "all of it stands in the index"
    toy.write_text(PLUGIN.replace("twice", "thrice"))
    plugins._known.clear()
    assert plugins.methods()["toy_double"].says.startswith("thrice") and read == [toy]
    index._place().write_text("no index")
    plugins._known.clear()
    assert plugins.methods()["toy_double"].says.startswith("thrice"), "a broken index is none"


def test_a_thousand_methods_are_listed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the index: what `bench/price.py` measures as a whole command."""
    from stepmark.cli import main

    folder = tmp_path / "plugins" / "image"
    folder.mkdir(parents=True)
    for i in range(1000):
        text = (
            PLUGIN.replace("toy_half", f"half_{i}").replace("toy_double", f"double_{i}").replace('"toy"', f'"toy_{i}"')
        )
        (folder / f"toy_{i}.py").write_text(text)
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path / "plugins"))
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "cache"))
    plugins.methods()
    plugins._known.clear()
    start = time.process_time()
    assert main(["list", "methods"]) == 0
    spent: Any = time.process_time() - start
    assert capsys.readouterr().out.count("far out") == 2000
    plugins._known.clear()
    assert spent < 0.5, f"{spent:.2f} s"
