"""Few-shot prompting: worked examples of the same person before the question, right ones, drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.method import Method, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.demonstrating import Shown, kept, owned, prompts, together
from stepmark.tracks.reasoning.solving import CHAIN, answer_of, left, plurality, write_chains


class FewShot(Method):
    """`shots` questions of a person's own, drawn at random, with their right answers (Brown et al. 2020; Wei et al. 2022),
    then the question; one greedy text.

    The answers are worked as whoever wrote them does (`column` target), which is not the same throughout. `few_shot_single`
    shows all of them step by step, `few_shot_ruled` with the reading of each sign, `few_shot_direct` the answers alone;
    `zero_shot_chain` and `zero_shot_direct` show nothing. `few_shot_vote` samples as many texts as the rung has room for and
    takes the plurality of their answers. What a rung holds beyond the end of a text is left by all others.
    """

    tasks = ("shown/mixed", "shown/bare", "shown/told", "shown/deep")
    shots, column, form, temperature = 8, "target", "<cot>", 0.0
    trainings = 3
    variants = (
        Variant("few_shot_single", says="all examples step by step", column="single"),
        Variant("few_shot_ruled", says="all examples with the reading of each sign", column="ruled", form="<rules>"),
        Variant("few_shot_direct", says="answers alone, shown and asked for", column="answer", form="<dir>"),
        Variant("few_shot_four", says="half as many examples", shots=4),
        Variant("zero_shot_chain", says="no examples", shots=0),
        Variant("zero_shot_direct", says="no examples, the answer at once", shots=0, form="<dir>"),
        Variant("few_shot_vote", says="the plurality of sampled texts", temperature=0.7),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """What stands before the questions about each person."""
        train, before = session.train, dict[str, list[int]]()
        shots = min(self.shots, 4) if session.task.id == "shown/told" else self.shots  # its examples are twice as long
        opening = "ans " if self.column == "answer" else ""
        for name, rows in owned(train, session.task).items():
            drawn = torch.randperm(len(rows), generator=session.rng, device=session.device)[:shots].tolist()
            before[name] = together(
                [
                    Shown(train["question"][k], self.form, opening + train[self.column][k])
                    for k in (rows[i] for i in drawn)
                ]
            )
        return kept(before)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question."""
        first = Chains(session.networks["model"], prompts(session.state, batch, self.form))
        if not self.temperature:
            first.write(limit=min(left(session, batch), 2 * CHAIN))
            return [first.written(i) for i in range(len(first))]
        first.read()  # the prompts are read once for all texts
        found: list[list[list[int]]] = [[] for _ in range(len(first))]
        while not found[0] or left(session, batch) >= CHAIN:
            chains = first.take(range(len(first)))
            write_chains(session, chains, min(CHAIN, left(session, batch) + 1), self.temperature)
            for i, texts in enumerate(found):
                texts.append(chains.written(i))
        return [texts[plurality([answer_of(text) for text in texts])] for texts in found]
