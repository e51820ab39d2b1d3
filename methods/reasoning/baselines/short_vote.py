"""A vote of short chains: as self-consistency, of texts that have a fraction of the tokens that are kept for one there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.reasoning.populations import texts_that_fit
from stepmark.tracks.reasoning.solving import CHAIN, answer_of, plurality, prompts, steps_form


class ShortVote(Method):
    """As many chains as the rung has room for at temperature .7, and the plurality of their answers (Wang et al. 2022).

    Of each question another chain is begun while there is room for one as long as its longest so far; `self_consistency` has to
    have room for any that may come, which is most of a small rung where chains have ten tokens. The text that is returned
    is the first that gives the answer chosen.
    """

    tasks = ("know/years", "know/claims", "know/odd", "know/options")
    temperature = 0.7

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question, chosen among all that were written."""
        first = Chains(session.networks["model"], prompts(batch, steps_form(session.task.id)))
        found = texts_that_fit(session, first, rung, CHAIN, temperature=self.temperature)
        return [texts[plurality([answer_of(text) for text in texts])] for texts in found]
