"""Contrastive in-context learning: liked answers beside others, and what sets them apart (Gao and Das, 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import decode, encode
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
    written,
)
from stepmark.tracks.reasoning.solving import left

FORM = "<cot>"


class ContrastiveICL(Method):
    """Contrastive in-context learning: examples of what is wanted and of what is not, then an analysis, then the answer.

        1. `pairs` questions of somebody's stand in front, each twice: with an answer that they liked, marked ``good``, and
           with one that they did not, marked ``bad``.
        2. Behind them the model says what sets the two kinds apart: ``<wish>`` asks for it, and it names one of four traits.
           A row is spent on that for every question, as the paper spends a reply on it.
        3. Then the question is asked, and one greedy text is written. Nothing is trained.

    `contrastive_examples` leaves out the analysis, `contrastive_self` has the model's own zero-shot answers for the bad ones.
    Pairs are drawn once for each person and training. Texts fit into 64 tokens, and claims are over the rungs from there on.

    Its baselines: `contrastive_positive` shows as many texts, all of them liked, of twice as many questions;
    `contrastive_none` nothing; `contrastive_by_hand` the liked ones and the wish itself, written by somebody who knows it.
    Its controls: `contrastive_swapped` has the marks the wrong way round, `contrastive_unmarked` none, `contrastive_negative`
    shows only what was not liked.

    Differs from the paper: no code was found. The marks are words that the model was trained on, the paper's a system
    message. The analysis is one word. What is wanted is exactly one of four traits of an answer, and no other; the paper's
    answers are held against those of people. The analysis without the examples, which the paper tries too, is left out: the
    model never met it.

    What limits it here: an answer that was liked has the trait that is wanted, always another one too, and of the two
    others each by chance; one that was not lacks the first and mostly has the second. So a liked answer alone leaves two to
    choose from, and whoever copies all that the liked ones have is not accurate.
    """

    paper = Paper(
        id="contrastive_icl",
        title="Customizing Language Model Responses with Contrastive In-Context Learning",
        authors="Xiang Gao, Kamalika Das",
        year=2024,
        arxiv="2401.17390",
    )
    tasks = ("shown/wishes",)
    baselines = ("contrastive_positive", "contrastive_none", "contrastive_by_hand", "contrastive_swapped")
    claims = (
        Claim(
            "accuracy[contrastive_icl,64..256] > accuracy[contrastive_positive,64..256] "
            "and accuracy[contrastive_icl,64..256] > accuracy[contrastive_none,64..256]",
            says="answers are as somebody wants them more often than behind as many liked answers alone, or none",
            headline=True,
            setting="what is wanted is one of four traits, which a model of this size has to find by comparison; the paper asks "
            "large models for a tone that they know by name",
        ),
        Claim(
            "accuracy[contrastive_icl,64..256] > accuracy[contrastive_examples,64..256] "
            "and accuracy[contrastive_examples,64..256] > accuracy[contrastive_positive,64..256]",
            says="saying what sets the answers apart adds to showing them, and showing both kinds to showing one",
            setting="what is wanted is one of four traits, which a model of this size has to find by comparison; the paper asks "
            "large models for a tone that they know by name",
        ),
        Claim(
            "accuracy[contrastive_self,64..256] >= accuracy[contrastive_icl,64..256] - 0.03",
            says="the model's own answers do for the ones that were not liked",
            setting="the model's own answers have no trait where it has none by habit, so that nothing tells the two apart that "
            "every liked answer has",
        ),
        Claim(
            "wished[contrastive_icl,64..256] > wished[contrastive_swapped,64..256] "
            "and accuracy[contrastive_icl,64..256] > accuracy[contrastive_unmarked,64..256] "
            "and accuracy[contrastive_icl,64..256] > accuracy[contrastive_negative,64..256]",
            says="it is the contrast: neither marks the wrong way round, nor none, nor what was not liked alone do it",
        ),
        Claim(
            "right[contrastive_icl,64..256] >= right[contrastive_none,64..256] - 0.03",
            says="answers are no less right for it",
        ),
    )
    pairs, analysis, shows, negatives = 2, True, "pairs", "disliked"
    trainings = 3
    variants = (
        Variant("contrastive_examples", says="no analysis", analysis=False),
        Variant("contrastive_self", says="own answers for those that were not liked", negatives="own"),
        Variant("contrastive_positive", says="as many texts, all liked", shows="good", analysis=False),
        Variant("contrastive_none", says="the question alone", pairs=0, analysis=False),
        Variant("contrastive_by_hand", says="liked texts and the wish in words", shows="told", analysis=False),
        Variant("contrastive_swapped", says="marks the wrong way round", shows="swapped", analysis=False),
        Variant("contrastive_unmarked", says="pairs without marks", shows="unmarked", analysis=False),
        Variant("contrastive_negative", says="as many texts, none liked", shows="bad", analysis=False),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """What stands before the questions about each person."""
        train, rows = session.train, dict[str, list[int]]()
        one_kind = self.shows in ("good", "bad", "told")
        count = self.pairs * 2 if one_kind else self.pairs
        for name, own in owned(train, session.task).items():
            fit = [row for row in own if train["level"][row] in (2, 3)]  # signs of those that are asked
            order = torch.randperm(len(fit), generator=session.rng, device=session.device)[:count]
            rows[name] = [fit[k] for k in order.tolist()]
        texts = {mark: {row: train[mark][row] for own in rows.values() for row in own} for mark in ("good", "bad")}
        if self.negatives == "own":
            asked = {row: encode(f"{train['question'][row]} {FORM}") for row in texts["bad"]}
            found = written(session.networks["model"], list(asked.values()), MOST)
            texts["bad"] = {row: decode(text) for row, text in zip(asked, found, strict=True)}
        before = {}
        for name, own in rows.items():
            before[name] = together([s for row in own for s in self.examples(train["question"][row], row, texts)])
            if self.shows == "told":
                before[name] += encode(f"<wish> {wish_of(name)} |")
        return kept(before)

    def examples(self, question: str, row: int, texts: Mapping[str, Mapping[int, str]]) -> list[Shown]:
        """A question with its texts and what is said of them."""
        if self.shows in ("good", "told"):
            return [Shown(question, FORM, texts["good"][row], "good")]
        if self.shows == "bad":
            return [Shown(question, FORM, texts["bad"][row], "bad")]
        marks: Sequence[str] = {"pairs": ("good", "bad"), "swapped": ("bad", "good"), "unmarked": ("", "")}[self.shows]
        return [
            Shown(question, FORM, texts[kind][row], mark) for kind, mark in zip(("good", "bad"), marks, strict=True)
        ]

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One greedy text a question."""
        if not self.analysis:
            return greedy(session, batch, prompts(session.state, batch, FORM))
        before = standing(session.state)
        analyses = [[*before.get(question[0], []), *encode("<wish>")] for question in batch["question"]]
        chains = Chains(session.networks["model"], analyses)
        chains.write(limit=1)
        for i, question in enumerate(batch["question"]):
            chains.put(i, [*encode("|"), *question, *encode(FORM)])
            chains.starts[i] = len(chains.texts[i])
        chains.write(limit=min(left(session, batch), MOST))
        return [chains.written(i) for i in range(len(chains))]
