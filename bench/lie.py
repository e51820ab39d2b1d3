"""What a planted lie is: see `lies.py`."""

from __future__ import annotations

from dataclasses import dataclass

FAIR = ""


@dataclass(frozen=True)
class Lie:
    """A body, and where it is tried. `items`: how many items a smoke cell of the task has, where not its own number."""

    words: str
    body: str
    task: str = "sampling/mixtures_flow"
    rung: int = 4
    timing: bool = False
    items: int = 0
    track: str = "image"
