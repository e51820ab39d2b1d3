"""What is left of a rung for the texts that go on, and one text at which two models write in turn."""

from __future__ import annotations

from collections.abc import Sequence

from stepmark.backbones.chains import Chains
from stepmark.session import Session


def share(session: Session, texts: int) -> int:
    """Tokens that each of so many texts may still have, out of what is left for the whole batch."""
    return int((session.limit - session.spent) // max(1, texts))


def follow(chains: Chains, i: int, written: Sequence[int]) -> None:
    """Let text i say behind its prompt what was written elsewhere. What it has in common with it stays read."""
    own = chains.written(i)
    same = next((k for k, (a, b) in enumerate(zip(own, written, strict=False)) if a != b), min(len(own), len(written)))
    if same < len(own):
        chains.cut(i, chains.starts[i] + same)
    if same < len(written):
        chains.put(i, written[same:])
