"""Contrastive in-context learning: liked answers beside others, and what sets them apart (Gao and Das, 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.demonstrating import (
    MOST,
    Shown,
    greedy,
    kept,
    owned,
    prompts,
    standing,
    together,
    wish_of,
)
from stepmark.tracks.reasoning.solving import left

FORM = "<cot>"


class ContrastiveICL(Method):
    """Contrastive in-context learning: examples of what is wanted and of what is not, then an analysis, then the
    answer.

        1. `pairs` questions of somebody's stand in front, each twice: with an answer that they liked, behind the word
           ``good``, and with one that they did not, behind ``bad``.
        2. Behind them the model says what sets the two kinds apart: ``<wish>`` asks for it, and it names one of four
           traits. A row is spent on that for every question, as the paper spends a reply on it.
        3. Then the question is asked, and one greedy text is written. Nothing is trained.

    `contrastive_examples` leaves out the analysis, `contrastive_instruction` the examples, once the model has named the
    wish. Pairs are drawn once for each person and training. Texts fit into 64 tokens, which is where the claims are. An
    answer is met where it is right, has what its person wants, and nothing besides.

    Its baselines: `contrastive_positive` shows as many texts, all of them liked, of twice as many questions;
    `contrastive_by_hand` the wish alone, written by somebody who knows it, a bound on the analysis; `chain_of_thought`
    nothing. `contrastive_swapped` is the control: the same texts with the marks the wrong way round.

    Differs from the paper: no code was found. The marks are words that the model was trained on, the paper's are
    headings. The analysis is one word. What is wanted is exactly one of four traits of an answer, and no other; the
    paper's answers are held against those of people. Its negative examples are also written by the model itself,
    without any example; that is left out, for here such answers lack all traits of the liked ones and tell no two of
    them apart.

    What limits it here: an answer that was liked has the trait that is wanted, always another one too, and of the two
    others each by chance; one that was not lacks the first and mostly has the second. So liked answers alone leave two
    to choose from, which is right half the time, and two pairs tell it to an ideal reader in 19 of 20 cases. That
    contrast is needed is thus a matter of the ground; whether this model makes use of it is not.
    """

    paper = Paper(
        id="contrastive_icl",
        title="Customizing Language Model Responses with Contrastive In-Context Learning",
        authors="Xiang Gao, Kamalika Das",
        year=2024,
        arxiv="2401.17390",
    )
    tasks = ("shown/wishes",)
    baselines = ("contrastive_positive", "chain_of_thought", "contrastive_by_hand", "contrastive_swapped")
    claims = (
        Claim(
            "met[contrastive_icl,64] > max(met[contrastive_positive,64], met[chain_of_thought,64], "
            "met[contrastive_swapped,64])",
            says="answers are as somebody wants them more often than behind as many liked answers alone, or none, or "
            "the same ones with their marks the wrong way round",
            headline=True,
            setting="what is wanted is one of four traits, which a model of this size has to find by comparison; the "
            "paper asks large models for a tone that they know by name",
        ),
        Claim(
            "met[contrastive_examples,64] > met[contrastive_positive,64] "
            "and met[contrastive_icl,64] > met[contrastive_examples,64]",
            says="showing both kinds adds to showing one, and saying what sets them apart to showing both",
        ),
        Claim(
            "met[contrastive_icl,64] > met[contrastive_instruction,64]",
            says="with the analysis the examples are still of use",
        ),
        Claim(
            "accuracy[contrastive_icl,64] >= accuracy[chain_of_thought,64] - 0.03",
            says="answers are no less right for it",
        ),
    )
    pairs, shows, analysis, keeps = 2, "pairs", True, True
    trainings = 3
    variants = (
        Variant("contrastive_examples", says="no analysis", analysis=False),
        Variant("contrastive_instruction", says="the analysis without the examples that led to it", keeps=False),
        Variant("contrastive_positive", says="as many texts, all liked", shows="good", analysis=False),
        Variant("contrastive_by_hand", says="the wish in words alone", shows="told", analysis=False),
        Variant("contrastive_swapped", says="marks the wrong way round", shows="swapped"),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """What stands before the questions about each person."""
        train, before = session.train, dict[str, list[int]]()
        for name, own in owned(train, session.task).items():
            if self.shows == "told":
                before[name] = encode(f"<wish> {wish_of(name)} |")
                continue
            fit = [row for row in own if train["level"][row] in (2, 3)]  # signs of those that are asked
            order = torch.randperm(len(fit), generator=session.rng, device=session.device).tolist()
            rows = [fit[k] for k in order[: self.pairs * 2 if self.shows == "good" else self.pairs]]
            before[name] = together([shown for row in rows for shown in self.examples(train, row)])
        return kept(before)

    def examples(self, train: Mapping[str, Any], row: int) -> list[Shown]:
        """A question with its texts, each behind what is said of it."""
        marks = {"good": "good"} if self.shows == "good" else {"good": "good", "bad": "bad"}
        if self.shows == "swapped":
            marks = {"bad": "good", "good": "bad"}
        return [Shown(train["question"][row], FORM, train[kind][row], mark) for kind, mark in marks.items()]

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One greedy text a question."""
        if not self.analysis:
            return greedy(session, batch, prompts(session.state, batch, FORM))
        before = standing(session.state)
        shown = [before.get(question[0], []) for question in batch["question"]]
        chains = Chains(session.networks["model"], [[*each, *encode("<wish>")] for each in shown])
        named = chains.write(limit=1)
        if not self.keeps:
            chains = Chains(session.networks["model"], [[*encode("<wish>"), *word] for word in named])
        for i, question in enumerate(batch["question"]):
            chains.put(i, [*encode("|"), *question, *encode(FORM)])
            chains.starts[i] = len(chains.texts[i])
        chains.write(limit=min(left(session, batch), MOST))
        return [chains.written(i) for i in range(len(chains))]
