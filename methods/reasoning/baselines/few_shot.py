"""Few-shot prompting: worked examples of the same person before the question, right ones, drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepmark.method import Method, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.demonstrating import (
    Shown,
    greedy,
    kept,
    owned,
    picked,
    prompts,
    sampled,
    shelved,
    together,
)
from stepmark.tracks.reasoning.solving import answer_of, plurality


class FewShot(Method):
    """`shots` questions of a person's own, drawn at random, with their right answers (Brown et al. 2020; Wei et al. 2022),
    then the question; one greedy text.

    The answers are worked as whoever wrote them does (`column` target), which is not the same throughout. `few_shot_single`
    shows all of them step by step, `few_shot_ruled` with the reading of each sign, `few_shot_direct` the answers alone;
    `zero_shot_chain` and `zero_shot_direct` show nothing. `few_shot_fresh` draws examples anew for each question, so that what it
    records is a mean over hundreds of draws; all others show a person's questions the same ones. `few_shot_vote` samples as
    many texts as the rung has room for and takes the plurality of their answers. What a rung holds beyond the end of a text is
    left by all others.
    """

    tasks = ("shown/mixed", "shown/bare", "shown/told", "shown/deep")
    shots, column, form, temperature, fresh = 8, "target", "<cot>", 0.0, False
    trainings = 3
    variants = (
        Variant("few_shot_single", says="all examples step by step", column="single"),
        Variant("few_shot_ruled", says="all examples with the reading of each sign", column="ruled", form="<rules>"),
        Variant("few_shot_direct", says="answers alone, shown and asked for", column="answer", form="<dir>"),
        Variant("few_shot_four", says="half as many examples", shots=4),
        Variant("zero_shot_chain", says="no examples", shots=0),
        Variant("zero_shot_direct", says="no examples, the answer at once", shots=0, form="<dir>"),
        Variant("few_shot_vote", says="the plurality of sampled texts", temperature=0.7),
        Variant(
            "few_shot_fresh",
            says="other random examples for each question",
            fresh=True,
            tasks=("shown/mixed", "shown/bare", "shown/deep"),
        ),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """What stands before the questions about each person, or all that may."""
        train, own = session.train, owned(session.train, session.task)
        opening = "ans " if self.column == "answer" else ""

        def shown(row: int) -> list[int]:
            return together([Shown(train["question"][row], self.form, opening + train[self.column][row])])

        if self.fresh:
            return shelved({name: [shown(row) for row in rows] for name, rows in own.items()})
        shots = min(self.shots, 4) if session.task.id == "shown/told" else self.shots  # its examples are twice as long
        before = dict[str, list[int]]()
        for name, rows in own.items():
            drawn = torch.randperm(len(rows), generator=session.rng, device=session.device)[:shots].tolist()
            before[name] = [token for k in drawn for token in shown(rows[k])]
        return kept(before)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question."""

        def drawn(_: int, own: list[int]) -> list[int]:
            order = torch.randperm(len(own), generator=session.rng, device=session.device)
            return [own[k] for k in order[: self.shots].tolist()]

        if self.fresh:
            return greedy(session, batch, picked(session.state, batch, self.form, drawn))
        asked = prompts(session.state, batch, self.form)
        if not self.temperature:
            return greedy(session, batch, asked)
        found = sampled(session, batch, asked, self.temperature)
        return [texts[plurality([answer_of(text) for text in texts])] for texts in found]
