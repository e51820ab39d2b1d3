"""Boards of records that nobody measured, and what a page of the site shows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np
from stepmark.leaderboard import ledger
from stepmark.leaderboard.pages import Board
from stepmark.leaderboard.trust import Dispute

from rigs.records import whole
from stepmark import __version__, plugins
from stepmark.record import Quality, Record

HOSTILE = "<script>alert(1)</script> **[x](javascript:alert(2))** `a` {: onclick=x } _y_ </h1>"


def record(method: str, task: str, rung: int, value: float, **fields: Any) -> Record:
    """A record of the task's first metric."""
    track, found = plugins.tasks()[task]
    resamples = (value * (1 + np.random.default_rng(0).normal(0, 0.02, 100))).tolist()
    full: dict[str, Any] = {
        "suite": __version__, "track": track, "method": method, "task": task, "rung": rung, "seed": 0, "tier": "embedded",
        "machine": "test-cpu", "status": "ok", "counts": {"nfe": float(rung)},
        "quality": {next(iter(found.metrics)): Quality(value=value, resamples=resamples)},
        "command": "stepmark run", "created": "2031-01-02T03:04:05Z", "commit": "abcdef1",
    }  # fmt: skip
    return whole(Record(**(full | fields)))


def make_board(records: Sequence[Record], objections: Mapping[str, Dispute] | None = None) -> Board:
    """All that pages are made from, of the real plugins and catalogue."""
    return Board(ledger.of(records, objections), plugins.methods(), plugins.tasks(), "https://example.org/r")


class Text(HTMLParser):
    """Text and tags of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.parts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    @property
    def content(self) -> str:
        """All text, spaces joined."""
        return " ".join(" ".join(self.parts).split())
