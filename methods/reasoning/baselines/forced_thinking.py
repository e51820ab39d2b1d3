"""Whole thoughts: what a method that ends a thought has to be no worse than."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.method import Method, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.stopping import ANSWER, CUE, Thoughts


class ForcedThinking(Method):
    """A thought, sampled at temperature .6, that ends by itself, or where the rung does: there ``</think> ans`` is put in, and
    the likeliest answer follows (budget forcing without its word to go on, Muennighoff et al. 2025).

    `full_thinking` lets the rung cut the text wherever it stands.
    """

    tasks = ("solve/problems",)
    forced = True
    variants = (Variant("full_thinking", says="cut by the rung, without an answer", forced=False),)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """Texts with whole thoughts."""
        thoughts = Thoughts(session.networks["model"], batch["question"], rung, ANSWER if self.forced else 0)
        thoughts.write(thoughts.thinking(), session.rng, sentence=False)
        return thoughts.finish(CUE if self.forced else None)
