"""Chains of thought until one solves: where no vote can be taken, what as many tokens buy without any search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS
from stepmark.method import Method, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.moves import last, solves, start, whole
from stepmark.tracks.reasoning.solving import prompts


class TrustedChains(Method):
    """Chains of thought sampled at temperature .7 until one solves, or the rung has no room for another.

    A chain is taken to solve where its last move says that the target alone is left: that is the model's own word.
    `checked_chains` holds the exact check instead, which can be made from the question alone, so that it stops only at a right
    solution. Where none solves the last chain is returned.
    """

    tasks = ("solve/game24", "solve/countdown")
    temperature, check = 0.7, False
    variants = (Variant("checked_chains", says="until one passes the exact check", check=True),)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One chain a question."""
        questions = batch["question"]
        lengths = [whole(len(start(question)[0])) for question in questions]
        first = Chains(session.networks["model"], prompts(batch, "<cot>"))
        first.read()  # the prompts are read once for all chains
        spent, found = [1] * len(first), [[EOS]] * len(first)
        going = list(range(len(first)))
        while going:
            chains = first.take(going)
            rooms = [min(lengths[i] + 1, rung - spent[i] + 1) for i in going]
            chains.write(limit=rooms, temperature=self.temperature, generator=session.rng)
            for row, i in enumerate(going):
                found[i] = chains.written(row)
                spent[i] += len(found[i]) - 1  # the first token came with the prompt
            going = [i for i in going if not self.solved(questions[i], found[i]) and rung - spent[i] >= lengths[i]]
        return found

    def solved(self, question: Sequence[int], text: Sequence[int]) -> bool:
        """Whether the exact check passes a text, or the text itself says that the target alone is left."""
        return solves(question, text) if self.check else last(text) == (start(question)[1],)
