"""Complexity-based prompting: the examples with most steps, and the vote of the chains with most (Fu et al., 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.reasoners import encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.demonstrating import (
    Shown,
    greedy,
    kept,
    owned,
    prompts,
    sampled,
    sentences,
    signs_of,
    together,
)
from stepmark.tracks.reasoning.solving import answer_of, plurality

FORM = "<cot>"


class ComplexityBasedPrompting(Method):
    """Complexity-based prompting: of what has been worked already, the texts with most steps are shown.

    Input side: among a person's own questions with their right texts, the 8 whose texts have most sentences stand
    before the question, those with most first, ties in random order; one greedy text is written. Output side,
    `complexity_vote` (complexity-based consistency): behind 8 random examples N texts are sampled at temperature 0.7,
    the K of them with most sentences are kept, and the answer of most of these is taken. N is what the rung has room
    for, about 20 at 512, and K = 0.7 N, between the paper's 30 and 40 of 50. With K = N, `complexity_vote_all`, it is
    self-consistency.

    Its controls: `complexity_simple` shows the 8 with fewest sentences, `few_shot_fresh` any, drawn anew for each
    question (hundreds of draws). Complex examples also show more steps in all: so `complexity_two` shows 2 complex ones
    and `complexity_two_simple` as many of the simplest as have no fewer steps together, the paper's own control.
    `complexity_covering` asks for no length, but takes one example after the other that has most signs of which none
    before it has.

    Texts fit into 64 tokens, which is where the claims of one text are; those of votes are from 128 on.

    Differs from the paper: a sentence is a step, as in the paper where texts have no lines. The own questions are those
    of a person, as signs mean another thing with everyone. K / N is fixed, the paper's is tuned. Its votes are behind
    complex examples; here texts take on the style of these, so that all have equally many sentences and K of them are
    any: behind examples of all styles texts differ in their steps, and each side is held for itself.

    What limits it here: a longer text is about more signs, and so the examples with most steps tell more of what the
    signs of a question mean. That is a reason for them which the paper does not give, and `complexity_covering` is what
    to hold it against. On the output side a longer text of a question is one worked in smaller steps.
    """

    paper = Paper(
        id="complexity_based_prompting",
        title="Complexity-Based Prompting for Multi-Step Reasoning",
        authors="Yao Fu, Hao Peng, Ashish Sabharwal, Peter Clark, Tushar Khot",
        year=2022,
        arxiv="2210.00720",
        code="FranxYao/Complexity-Based-Prompting",
    )
    tasks = ("shown/bare", "shown/deep")
    baselines = (
        "few_shot_fresh",
        "chain_of_thought",
        "complexity_simple",
        "complexity_covering",
        "complexity_vote_all",
    )
    claims = (
        Claim(
            "accuracy[complexity_based_prompting,64] > accuracy[few_shot_fresh,64] "
            "and accuracy[complexity_based_prompting,64] > accuracy[complexity_simple,64]",
            says="the examples with most steps are better than random ones, and than those with fewest",
            headline=True,
        ),
        Claim(
            "accuracy[complexity_vote,128..512] > accuracy[complexity_vote_all,128..512]",
            says="a vote of the chains with most steps is better than a vote of all, of as many tokens",
            headline=True,
        ),
        Claim(
            "accuracy[complexity_two,64] > accuracy[complexity_two_simple,64]",
            says="few complex examples are better than many simple ones with as many steps in all",
        ),
        Claim(
            "accuracy[complexity_based_prompting,64] >= accuracy[complexity_covering,64]",
            says="most steps are as good a choice as most different signs, which knows what an example is good for",
        ),
        Claim(
            "accuracy[complexity_based_prompting,64] > accuracy[few_shot_fresh,64] "
            "and accuracy[complexity_based_prompting,64] > accuracy[complexity_simple,64]",
            says="so are complex ones for questions of more signs than any example has",
            task="shown/deep",
        ),
    )
    shots, order, matched, temperature, share = 8, "complex", False, 0.0, 0.7
    trainings = 3
    variants = (
        Variant("complexity_simple", says="the examples with fewest steps", order="simple"),
        Variant("complexity_two", says="two of the complex examples", shots=2, tasks=("shown/bare",)),
        Variant(
            "complexity_two_simple",
            says="simple examples with as many steps in all",
            shots=2,
            order="simple",
            matched=True,
            tasks=("shown/bare",),
        ),
        Variant(
            "complexity_covering",
            says="the examples with most different signs",
            order="covering",
            tasks=("shown/bare",),
        ),
        Variant(
            "complexity_vote",
            says="the vote of the chains with most steps",
            order="random",
            temperature=0.7,
            tasks=("shown/bare",),
            baselines=("complexity_vote_all",),
        ),
        Variant(
            "complexity_vote_all",
            says="the vote of all chains",
            order="random",
            temperature=0.7,
            share=1.0,
            tasks=("shown/bare",),
            baselines=("chain_of_thought",),
        ),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """What stands before the questions about each person."""
        train, before = session.train, dict[str, list[int]]()
        for name, own in owned(train, session.task).items():
            order = torch.randperm(len(own), generator=session.rng, device=session.device)
            rows = [own[k] for k in order.tolist()]
            texts = [encode(train["target"][row]) for row in rows]
            chosen = self.chosen(texts, [signs_of(train["question"][row]) for row in rows])
            before[name] = together([Shown(train["question"][rows[k]], FORM, train["target"][rows[k]]) for k in chosen])
        return kept(before)

    def chosen(self, texts: Sequence[Sequence[int]], signs: Sequence[Sequence[str]]) -> list[int]:
        """Numbers of the examples that are shown, in their order."""
        steps = [sentences(text) for text in texts]
        if self.order == "random":  # as they come
            return list(range(min(self.shots, len(texts))))
        if self.order == "covering":
            found, seen = list[int](), set[str]()
            for _ in range(min(self.shots, len(texts))):
                left = [k for k in range(len(texts)) if k not in found]
                found.append(max(left, key=lambda k: len(set(signs[k]) - seen)))
                seen |= set(signs[found[-1]])
            return found
        complex_first = sorted(range(len(texts)), key=lambda k: -steps[k])[: self.shots]
        if self.order == "complex":
            return complex_first
        simple_first = sorted(range(len(texts)), key=lambda k: steps[k])
        if not self.matched:
            return simple_first[: self.shots]
        most, found = sum(steps[k] for k in complex_first), []
        while sum(steps[k] for k in found) < most:
            found.append(simple_first[len(found)])
        return found

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question."""
        asked = prompts(session.state, batch, FORM)
        if not self.temperature:
            return greedy(session, batch, asked)
        return [self.voted(session, texts) for texts in sampled(session, batch, asked, self.temperature)]

    def voted(self, session: Session, texts: Sequence[list[int]]) -> list[int]:
        """The first of the kept texts that has the answer of most of them."""
        order = torch.randperm(len(texts), generator=session.rng, device=session.device).tolist()
        order.sort(key=lambda k: -sentences(texts[k]))
        some = [texts[k] for k in sorted(order[: math.ceil(self.share * len(texts))])]
        return some[plurality([answer_of(text) for text in some])]
