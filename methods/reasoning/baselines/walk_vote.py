"""Self-consistency where a text is its own answer: many sampled walks, and the one that most of them are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import decode
from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.reasoning.navigate import ends
from stepmark.tracks.reasoning.populations import texts_that_fit
from stepmark.tracks.reasoning.solving import plurality, prompts

WALK = 32  # most tokens of a walk, three moves more than any question here needs


class WalkVote(Method):
    """As many walks as the rung has room for at temperature .7, and the plurality of those that say to arrive (Wang et
    al. 2022).

    Of each question another walk is begun while there is room for one as long as its longest so far. Moves are not
    checked.
    """

    tasks = ("navigate/paths",)
    temperature = 0.7

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One walk a question, chosen among all that were written."""
        first = Chains(session.networks["model"], prompts(batch, "<cot>"))
        found = texts_that_fit(session, first, rung, WALK, temperature=self.temperature)
        return [
            texts[plurality([decode(text) if ends(question, text) else None for text in texts])]
            for question, texts in zip(batch["question"], found, strict=True)
        ]
