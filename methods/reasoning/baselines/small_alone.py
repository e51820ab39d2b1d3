"""The small model alone, and the large one: what a method that lets both work has to be better than."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.method import Method, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.solving import LONGEST_TEXT, left, prompts


class SmallAlone(Method):
    """One greedy chain of thought a question, as `chain_of_thought`, by the small model; `large_alone` by the large one."""

    tasks = ("solve/sizes",)
    role = "small"
    variants = (Variant("large_alone", says="the large model alone", role="large"),)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """Greedy texts of at most `rung` tokens."""
        chains = Chains(session.networks[self.role], prompts(batch, "<cot>"))
        chains.write(limit=min(left(session, batch), LONGEST_TEXT))
        return [chains.written(i) for i in range(len(chains))]
