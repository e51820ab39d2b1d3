"""Options of `pytest bench/`: the ruler tests itself, then the suite runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--tier`, `--device` and the selection, as `stepmark run` has them."""
    group = parser.getgroup("stepmark")
    group.addoption("--tier", choices=["smoke", "embedded", "hub"], default="smoke", help="size of the suite")
    group.addoption("--quick", action="store_true", help="each method on one task of each kind only")
    group.addoption("--device", default="cpu", help="device of the suite: cpu, cuda, ...")
    group.addoption("--method", action="append", default=[], help="only this method (repeatable)")
    group.addoption("--track", action="append", default=[], help="only this track (repeatable)")
    group.addoption("--results", default=None, help="folder of the records; at tier smoke a temporary one")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> None:
    """At tier smoke prepared states and locks go to a temporary folder: a test run leaves nothing behind, and a device that
    somebody measures on is no failure of it."""
    if pytestconfig.getoption("--tier") == "smoke":
        os.environ["STEPMARK_LOCKS"] = str(tmp_path_factory.mktemp("locks"))
        if "STEPMARK_CACHE" not in os.environ:
            os.environ["STEPMARK_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the suite writes its records."""
    from stepmark.places import results_folder

    tier = pytestconfig.getoption("--tier")
    if given := pytestconfig.getoption("--results"):
        return Path(given)
    return tmp_path_factory.mktemp("results") if tier == "smoke" else results_folder(tier)
