"""What `import` finds: the same modules from a checkout, an editable install and a wheel; no real package shadowed."""

from __future__ import annotations

import resource
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from stepmark import plugins
from stepmark.cli import EXTRAS
from stepmark.meter import machine

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


SYSTEMS = {
    "macOS": {"sys_platform": "darwin", "platform_machine": "arm64"},
    "Linux on ARM": {"sys_platform": "linux", "platform_machine": "aarch64"},
    "Linux": {"sys_platform": "linux", "platform_machine": "x86_64"},
}
CUDA = ("nvidia-c", "nvidia-n", "cuda-", "triton")  # wheels of Linux alone; nvidia-ml-py is Python


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", ["3.11.0", "3.11.9", "3.13.2"])
def test_the_lock_pins_for_each_system_what_it_has_and_all_that_is_asked_for(system: str, python: str) -> None:
    from packaging.requirements import Requirement

    assert ROOT is not None
    short = python.rpartition(".")[0]
    here = {**SYSTEMS[system], "python_full_version": python, "python_version": short}
    pins = machine.pins(ROOT / "requirements.lock", here)
    versions = dict(pin.split("==") for pin in pins)
    assert len(versions) == len(pins)  # one of each
    assert bool([name for name in versions if name.startswith(CUDA)]) == (system != "macOS")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(versions[requirement.name.lower()]), requirement


def test_every_extra_that_is_named_to_users_is_there() -> None:
    assert ROOT is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS.values()) == set(project["optional-dependencies"]) - {"dev"}


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
        ("class A(Method):\n    tasks = tuple(x for x in 'ab')\n", "bad.py:2: write a plain literal here, not tuple("),
        ("T = ('a',)\nclass A(Method):\n    tasks = T\n", "here, not T: tasks is read without running the file"),
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
