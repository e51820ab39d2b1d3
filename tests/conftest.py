"""Fixtures that several test modules use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stepmark.tracks.decoding.decoder import Decoder


@pytest.fixture(autouse=True)
def _own_locks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that somebody measures on is no failure of a test: what it times is not published."""
    monkeypatch.setenv("STEPMARK_LOCKS", str(tmp_path_factory.getbasetemp() / "locks"))


@pytest.fixture(scope="module")
def one_thread() -> None:
    """Small networks are fastest on a single thread."""
    torch.set_num_threads(1)


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> list[Decoder]:
    """Every decoder built while the test runs."""
    built: list[Decoder] = []
    original = Decoder.__init__

    def init(self: Decoder, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        built.append(self)

    monkeypatch.setattr(Decoder, "__init__", init)
    return built
