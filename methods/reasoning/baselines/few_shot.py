"""Few-shot prompting: worked examples of the same person before the question, right ones, drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepmark.method import Method, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.demonstrating import Shown, greedy, kept, owned, picked, prompts, shelved, together


class FewShot(Method):
    """8 questions of a person's own, drawn at random, with their right answers (Brown et al. 2020; Wei et al. 2022),
    then the question; one greedy text.

    The answers are worked as whoever wrote them does (`column` target), which is not the same throughout;
    `few_shot_ruled` has all of them with the reading of each sign. The questions about a person stand behind the same
    examples, other ones in each training; `few_shot_fresh` draws examples anew for each question, so that what it
    records is a mean over hundreds of draws. Without any example it is `chain_of_thought`. What a rung holds beyond the
    end of a text is left.
    """

    tasks = ("shown/mixed", "shown/bare", "shown/deep")
    shots, column, form, fresh = 8, "target", "<cot>", False
    trainings = 3
    variants = (
        Variant(
            "few_shot_ruled",
            says="all examples with the reading of each sign",
            column="ruled",
            form="<rules>",
            tasks=("shown/bare",),
        ),
        Variant(
            "few_shot_fresh",
            says="other random examples for each question",
            fresh=True,
            tasks=("shown/bare", "shown/deep"),
        ),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """What stands before the questions about each person, or all that may."""
        train, before = session.train, dict[str, list[int]]()

        def shown(row: int) -> list[int]:
            return together([Shown(train["question"][row], self.form, train[self.column][row])])

        own = owned(train, session.task)
        if self.fresh:
            return shelved({name: [shown(row) for row in rows] for name, rows in own.items()})
        for name, rows in own.items():
            drawn = torch.randperm(len(rows), generator=session.rng, device=session.device)[: self.shots].tolist()
            before[name] = [token for k in drawn for token in shown(rows[k])]
        return kept(before)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question."""

        def drawn(_: int, own: list[int]) -> list[int]:
            order = torch.randperm(len(own), generator=session.rng, device=session.device)
            return [own[k] for k in order[: self.shots].tolist()]

        if self.fresh:
            return greedy(session, batch, picked(session.state, batch, self.form, drawn))
        return greedy(session, batch, prompts(session.state, batch, self.form))
