"""ECHO: worked examples of the model's own, each written again behind the others until they are alike (Jin and Lu,
2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.reasoners import decode, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.demonstrating import (
    MOST,
    Shown,
    greedy,
    kept,
    prompts,
    representatives,
    together,
    written,
)

SHOTS = 8


class EchoSelfHarmonizedCoT(Method):
    """ECHO: the examples of Auto-CoT, made of one piece.

        1. and 2. as in `auto_cot`: k questions from k clusters, each with the text that the model writes of it with
           nothing before.
        3. Demonstration unification, T times: in random order each example is taken out and its text dropped; the other
           k - 1 stand in random order before its question, and the model writes it again, at the likeliest token each.
           The new text takes the place of the old one at once, right or wrong, and those after it see it.

    So texts take on each other's style, and what one of them tells mends another. k = 8 and T = 4, which the authors
    suggest; with T = 0 it is `auto_cot`, with the same clusters. All of it happens in `prepare`. The k examples then
    stand before every question, and one greedy text is written. Texts fit into 64 tokens, which is where the claims
    are.

    `echo_once` stops at T = 1. `echo_asked` is the control for style alone: the same clusters, but all texts, the last
    one too, are asked for in one style, with the reading of each sign (<rules>), and nothing is written again.

    Differs from the paper: as `auto_cot` does. A text that is cut at 128 tokens, or has no answer, is shown as it is.

    What limits it here: texts have five styles, of which some do several signs in a step and are wrong more often.
    Nothing says that the style on which the examples agree is a good one. What a text guesses about a sign that no
    question tells can be handed on too. How alike the texts become is no figure of the records; only what that is worth
    is.
    """

    paper = Paper(
        id="echo_self_harmonized_cot",
        title="Self-Harmonized Chain of Thought",
        authors="Ziqi Jin, Wei Lu",
        year=2024,
        arxiv="2409.04057",
        code="Xalp/ECHO",
    )
    tasks = ("shown/mixed", "shown/deep")
    baselines = ("auto_cot", "chain_of_thought", "auto_cot_random", "echo_once", "echo_asked")
    claims = (
        Claim(
            "accuracy[echo_self_harmonized_cot,64] > accuracy[auto_cot,64]",
            says="more accurate than the same examples before they were made alike",
            headline=True,
        ),
        Claim(
            "accuracy[echo_self_harmonized_cot,64] > accuracy[chain_of_thought,64] "
            "and accuracy[echo_self_harmonized_cot,64] > accuracy[auto_cot_random,64]",
            says="and than without examples, or with random ones of the model's own",
        ),
        Claim(
            "accuracy[echo_self_harmonized_cot,64] >= accuracy[echo_once,64]",
            says="four rounds are no worse than one",
        ),
        Claim(
            "accuracy[echo_self_harmonized_cot,64] > accuracy[echo_asked,64]",
            says="it is not one style alone, which can be asked for: examples mend each other",
        ),
        Claim(
            "accuracy[echo_self_harmonized_cot,64] > accuracy[auto_cot,64] "
            "and accuracy[echo_self_harmonized_cot,64] > accuracy[chain_of_thought,64]",
            says="more accurate than either with more signs than the model has seen, too",
            task="shown/deep",
        ),
    )
    rounds, form = 4, "<cot>"
    trainings = 3
    variants = (
        Variant("echo_once", says="each text is written again once", rounds=1, tasks=("shown/mixed",)),
        Variant(
            "echo_asked",
            says="one style that is asked for, no text written again",
            rounds=0,
            form="<rules>",
            tasks=("shown/mixed",),
        ),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """What stands before the questions about each person."""
        shown = representatives(session, session.scale(64, 8), self.form, SHOTS)
        for _ in session.progress(range(session.scale(self.rounds, min(1, self.rounds)))):
            self.unify(session, list(shown.values()))
        return kept({name: together(examples) for name, examples in shown.items()})

    def unify(self, session: Session, groups: list[list[Shown]]) -> None:
        """Write each example again behind the others of its group, in random order; groups side by side."""

        def shuffled(count: int) -> list[int]:
            return torch.randperm(count, generator=session.rng, device=session.device).tolist()

        orders = [shuffled(len(group)) for group in groups]
        for turn in range(SHOTS):
            going = [(group, order[turn]) for group, order in zip(groups, orders, strict=True) if turn < len(order)]
            asked = []
            for group, k in going:
                others = [group[i] for i in shuffled(len(group)) if i != k]
                asked.append([*together(others), *encode(f"{group[k].question} {self.form}")])
            texts = written(session.networks["model"], asked, MOST)
            for (group, k), text in zip(going, texts, strict=True):
                group[k] = group[k]._replace(text=decode(text))

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One greedy text a question."""
        return greedy(session, batch, prompts(session.state, batch, self.form))
