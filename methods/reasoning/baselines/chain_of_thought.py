"""Chain of thought: the steps in words, then the answer, at the likeliest token each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.method import Method, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.solving import LONGEST_TEXT, left, prompts, steps_form


class ChainOfThought(Method):
    """One greedy text a question with its steps, a proof where there is something to deduce (Wei et al. 2022).

    `direct_answer` asks for the answer at once. What a rung holds beyond the end of a text is left.
    """

    tasks = (
        "deduce/chains",
        "deduce/dense",
        "deduce/deep",
        "solve/problems",
        "solve/judged",
        "solve/countdown",
        "solve/game24",
        "navigate/paths",
        "shown/mixed",
        "shown/bare",
        "shown/told",
        "shown/deep",
        "shown/wishes",
        "know/hops",
        "know/could",
        "know/years",
        "know/claims",
        "know/odd",
        "know/options",
        "know/make",
    )
    form = ""  # what the task has for steps
    variants = (
        Variant(
            "direct_answer",
            says="the answer at once",
            form="<dir>",
            tasks=(
                "deduce/chains",
                "deduce/dense",
                "deduce/deep",
                "solve/problems",
                "solve/judged",
                "know/hops",
                "know/could",
                "know/years",
                "know/claims",
                "know/odd",
                "know/options",
                "know/make",
            ),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """Greedy texts of at most `rung` tokens."""
        chains = Chains(session.networks["model"], prompts(batch, self.form or steps_form(session.task.id)))
        chains.write(limit=min(left(session, batch), LONGEST_TEXT))
        return [chains.written(i) for i in range(len(chains))]
