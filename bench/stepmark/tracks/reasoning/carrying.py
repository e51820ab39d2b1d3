"""What methods share on procedures: one step asked for at a time, the state in the place of the start."""

from __future__ import annotations

from collections.abc import Sequence

from stepmark.backbones.reasoners import EOS, WORDS, encode
from stepmark.datasets.procedures import onward as onward

END, NEXT = "end", WORDS.index(";")


def told(states: Sequence[str], ended: bool) -> list[int]:
    """Token ids of states one after the other; with the end of the sequence where they have ended, or there are none."""
    text = encode(" ; ".join([*states, *([END] if ended else [])]))
    return [*text, EOS] if ended or not text else text
