"""What `import` finds: the same modules from a checkout, an editable install and a wheel; no real package shadowed."""

from __future__ import annotations

import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stepmark import plugins

ROOT = plugins.checkout()

pytestmark = pytest.mark.skipif(ROOT is None, reason="needs a checkout")

WHERE = """
import datasets, lm_eval, diffusers, transformers, stepmark.methods.image.baselines.ddim, stepmark.datasets.digits
for module in (datasets, lm_eval, diffusers, transformers):
    assert "site-packages" in module.__file__, module.__file__
print(stepmark.__file__)
print(stepmark.methods.image.baselines.ddim.__file__)
print(stepmark.datasets.digits.__file__)
"""


def python(code: str, *, cwd: Path, path: str | None = None) -> list[str]:
    """Lines printed by a fresh interpreter."""
    import os

    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "STEPMARK_METHODS"}}
    if path:
        environment["PYTHONPATH"] = path
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_no_plugin_folder_is_a_package() -> None:
    assert ROOT is not None
    for name in plugins.MOUNTS:
        assert not list((ROOT / name).rglob("__init__.py")), f"{name}/ would shadow an installed package of that name"


def test_the_root_imports_the_real_packages_and_ours() -> None:
    assert ROOT is not None
    found = python(WHERE, cwd=ROOT)
    assert found == [
        str(ROOT / "bench/stepmark/__init__.py"),
        str(ROOT / "methods/image/baselines/ddim.py"),
        str(ROOT / "datasets/digits.py"),
    ]


def test_pytest_imports_the_same_modules() -> None:
    import stepmark.methods.image.baselines.ddim as ddim

    import stepmark

    assert ROOT is not None
    assert Path(stepmark.__file__) == ROOT / "bench/stepmark/__init__.py"
    assert Path(ddim.__file__) == ROOT / "methods/image/baselines/ddim.py"


def test_a_wheel_holds_the_plugins_and_finds_them(tmp_path: Path) -> None:
    assert ROOT is not None
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wheel = next(tmp_path.glob("*.whl"))
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.startswith(("methods/", "datasets/", "test", "conftest"))]
        archive.extractall(unpacked)
    code = """
import sys
import stepmark, stepmark.methods.image.baselines.ddim, stepmark.datasets.digits
from stepmark import plugins
print(stepmark.__file__, stepmark.methods.image.baselines.ddim.__file__, stepmark.datasets.digits.__file__)
print(*sorted(plugins.methods()))
from stepmark import backbones
print(len(backbones.manifest()))
"""
    found = python(code, cwd=tmp_path, path=str(unpacked))
    inside = unpacked / "stepmark"
    assert found[:3] == [
        str(inside / "__init__.py"),
        str(inside / "methods/image/baselines/ddim.py"),
        str(inside / "datasets/digits.py"),
    ]
    assert found[3:-1] == sorted(plugins.methods())
    assert int(found[-1]) >= 5


def test_listing_is_quick_and_does_not_import_torch() -> None:
    code = "import sys; from stepmark.cli import main; main(['list']); assert 'torch' not in sys.modules"
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python(code, cwd=Path.cwd())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(f"\nstepmark list: {min(seconds):.2f} s of CPU time")
    assert min(seconds) < 0.5


def test_out_of_tree_methods_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "mine.py").write_text(
        "from stepmark import Method\nclass Mine(Method):\n    tasks = ('sampling/mixtures_flow',)\n"
    )
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path))
    assert plugins.methods()["mine"].path == tmp_path / "image" / "mine.py"
    (tmp_path / "image" / "ddim.py").write_text((tmp_path / "image" / "mine.py").read_text())
    assert plugins.methods()["ddim"].path.is_relative_to(Path.cwd())  # an id that is taken is left out
    monkeypatch.setenv("STEPMARK_METHODS", str(tmp_path / "nowhere"))
    with pytest.raises(plugins.PluginError, match="which is no folder"):
        plugins.methods()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("x = 1\n", "0 subclasses of Method"),
        ("class A(Method):\n    tasks = ('a/b',)\nclass B(Method):\n    tasks = ('a/b',)\n", "2 subclasses of Method"),
        ("class A(Method):\n    tasks = ('a/b')\n", "tuple of strings"),
        ("class A(Method):\n    pass\n", "tasks is empty"),
        ("class A(Method):\n    tasks = tuple(x for x in 'ab')\n", "bad.py:2: write a plain literal"),
        ("class A(Method):\n    tasks = ('a/b',)\n    paper = Paper(id='x', colour=1)\n", "bad.py:3: Paper takes"),
        ("class A(Method):\n    tasks = ('a/b',)\n    paper = Paper(id='x')\n", "missing 3 required"),
        ("class A(Method:\n", "bad.py:1"),
    ],
)
def test_a_bad_plugin_is_named_in_one_line(tmp_path: Path, body: str, words: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(body)
    with pytest.raises(plugins.PluginError) as caught:
        plugins.read_methods(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
