"""The price of a row: what the projection of `make test` takes for what."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from stepmark import plugins

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def price() -> ModuleType:
    spec = importlib.util.spec_from_file_location("price", ROOT / "bench" / "price.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


JUNIT = """<testsuites><testsuite>
<testcase classname="bench.test_suite" name="test_cells[ddim-class_to_image/digits_eps]" time="120"/>
<testcase classname="tests.test_image_solvers" name="test_unipc" time="60"/>
<testcase classname="tests.test_image_track" name="test_score" time="30"/>
<testcase classname="tests.test_cli" name="test_the_source_of_every_method_keeps_the_contract[ddim]" time="6"/>
<testcase classname="tests.test_cli" name="test_every_command_explains_itself" time="30"/>
<testcase classname="bench.test_instruments" name="test_sleep" time="60"/>
</testsuite></testsuites>"""


def test_tests_are_told_apart_by_what_they_grow_with(price: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "shared.xml"
    path.write_text(JUNIT)
    found = price.costs([path], plugins.tracks())
    assert found.seconds == {
        price.CELLS: 120, price.PROOFS: 60, price.CONTRACT: 6, price.FIXED: 60, price.ALONE: 60
    }  # fmt: skip
    assert price.minutes(found.seconds) == pytest.approx((246 / 2 + 60) / 60)
    assert price.minutes(found.seconds, 3) == pytest.approx(((186 * 3 + 60) / 2 + 60) / 60)


def test_a_goal_that_is_missed_is_a_failure(price: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "slow.xml"
    path.write_text(JUNIT.replace('time="120"', 'time="12000"'))
    command = [sys.executable, str(Path(price.__file__)), "tests", "--junit", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "OVER make test on 2 cores" in done.stdout
    done = subprocess.run([*command[:-1], str(tmp_path / "none")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "make test writes them" in done.stderr
