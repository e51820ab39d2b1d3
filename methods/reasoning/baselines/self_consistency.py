"""Self-consistency: many sampled chains, and the answer that most of them give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.reasoning.solving import CHAIN, answer_of, left, plurality, prompts, steps_form, write_chains


class SelfConsistency(Method):
    """As many chains as the rung has room for at temperature .7, and the plurality of their answers (Wang et al. 2022).

    A chain more is begun for all questions of a batch while each may still have `CHAIN` tokens; the first may be cut. The
    text that is returned is the first that gives the answer chosen.
    """

    tasks = ("deduce/chains", "deduce/dense", "deduce/deep", "solve/problems", "solve/judged")
    temperature = 0.7

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question, chosen among all that were written."""
        asked = prompts(batch, steps_form(session.task.id))
        first = Chains(session.networks["model"], asked)
        first.read()  # the prompts are read once for all chains
        found: list[list[list[int]]] = [[] for _ in asked]
        while not found[0] or left(session, batch) >= CHAIN:
            chains = first.take(range(len(asked)))
            write_chains(session, chains, min(CHAIN, left(session, batch) + 1), self.temperature)
            for i, texts in enumerate(found):
                texts.append(chains.written(i))
        return [texts[plurality([answer_of(text) for text in texts])] for texts in found]
