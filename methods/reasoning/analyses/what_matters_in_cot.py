"""What matters in chain-of-thought prompting: examples whose steps are spoilt in seven ways (Wang et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.demonstrating import (
    Shown,
    greedy,
    kept,
    owned,
    prompts,
    restarted,
    signs_of,
    together,
)

SHOTS = 4


class WhatMattersInCoT(Method):
    """Chain of thought behind examples, and what is left of it when the examples are spoilt.

    4 of a person's own questions of 3 or 4 signs stand with texts step by step before the question; one greedy text is
    written. In a step ``3 beze 7`` the digits are the bridging objects, through which one must pass; the sign between
    them, with its place in the text, is the language template. All variants show the same questions:

        what_matters_invalid                every result but the last is wrong and the next step goes on from it:
                                            neither relevance nor coherence is lost, the reasoning is
        what_matters_shuffled_objects       the pairs of digits stand in another order (no coherence of objects)
        what_matters_shuffled_templates     the signs do
        what_matters_shuffled               both do, in two orders
        what_matters_foreign_objects        the digits are those of another start, rightly worked (no relevance)
        what_matters_foreign_templates      the signs are those of another question
        what_matters_foreign                both are: the text of another question
        what_matters_standard               answers alone, and asked for at once (standard prompting)

    Where order alone is lost, and in invalid texts, the answer stays; where the digits are foreign, it is theirs.
    `chain_of_thought` shows nothing. Measured are answers and, in the text, the F1 of the results that it goes through
    (`bridging`). On shown/bare the same examples have to tell what signs mean, which they do on shown/told only in how
    texts are written: a contrast that shows what the finding hangs on. Texts fit into 64 tokens, and claims are over
    the rungs from there on.

    Differs from the paper: 4 examples, not 8. Its texts are spoilt by hand, these by rule. Digits under a foreign sign,
    or in another order, are no longer what the sign makes of them, where the paper's equations stay true. Orders are
    rotations, by one, of signs by two where both are lost. Foreign signs are those of an own question of as many signs
    that shares the fewest. Of objects the paper also gives the recall.

    What limits it here: the model was trained on examples that are right, or wrong as somebody is who does not know
    what signs mean, never on shuffled ones: what these do may be mere strangeness. It knows styles without examples
    too, so that little hangs on them where the question tells all.
    """

    paper = Paper(
        id="what_matters_in_cot",
        title="Towards Understanding Chain-of-Thought Prompting: An Empirical Study of What Matters",
        authors="Boshi Wang, Sewon Min, Xiang Deng, Jiaming Shen, You Wu, Luke Zettlemoyer, Huan Sun",
        year=2022,
        arxiv="2212.10001",
        code="sunlab-osu/Understanding-CoT",
    )
    tasks = ("shown/told", "shown/bare")
    baselines = ("what_matters_standard", "chain_of_thought", "what_matters_invalid")
    claims = (
        Claim(
            "accuracy[what_matters_invalid,64] >= 0.8 * accuracy[what_matters_in_cot,64] "
            "and bridging[what_matters_invalid,64] >= 0.8 * bridging[what_matters_in_cot,64] "
            "and accuracy[what_matters_in_cot,64] > accuracy[what_matters_standard,64] + 0.1",
            says="invalid reasoning in the examples keeps four fifths and more of what a chain of thought is worth, "
            "which is more than answers alone are",
            headline=True,
        ),
        Claim(
            "accuracy[what_matters_foreign,64] < accuracy[what_matters_invalid,64] "
            "and accuracy[what_matters_shuffled,64] < accuracy[what_matters_invalid,64]",
            says="relevance and order matter more than validity",
            headline=True,
        ),
        Claim(
            "accuracy[what_matters_foreign_objects,64] < accuracy[what_matters_shuffled_objects,64]",
            says="that digits come from the question matters more than their order",
        ),
        Claim(
            "accuracy[what_matters_shuffled_templates,64] < accuracy[what_matters_foreign_templates,64]",
            says="of templates order matters more than where they come from",
        ),
        Claim(
            "accuracy[what_matters_in_cot,64] > accuracy[chain_of_thought,64]",
            says="examples are of use at all where the question tells everything",
        ),
        Claim(
            "accuracy[what_matters_invalid,64] < 0.8 * accuracy[what_matters_in_cot,64]",
            says="where examples have to tell what signs mean, validity does matter",
            task="shown/bare",
        ),
    )
    objects, templates, form = "own", "own", "<cot>"
    trainings = 3
    variants = (
        Variant("what_matters_invalid", says="wrong results between", objects="invalid"),
        Variant(
            "what_matters_shuffled_objects", says="digits in another order", objects="shuffled", tasks=("shown/told",)
        ),
        Variant(
            "what_matters_shuffled_templates",
            says="signs in another order",
            templates="shuffled",
            tasks=("shown/told",),
        ),
        Variant(
            "what_matters_shuffled",
            says="both in other orders",
            objects="shuffled",
            templates="shuffled",
            tasks=("shown/told",),
        ),
        Variant(
            "what_matters_foreign_objects", says="digits of another start", objects="foreign", tasks=("shown/told",)
        ),
        Variant(
            "what_matters_foreign_templates",
            says="signs of another question",
            templates="foreign",
            tasks=("shown/told",),
        ),
        Variant(
            "what_matters_foreign",
            says="the text of another question",
            objects="foreign",
            templates="foreign",
            tasks=("shown/told",),
        ),
        Variant("what_matters_standard", says="answers alone", form="<dir>", tasks=("shown/told",)),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """What stands before the questions about each person."""
        train, before = session.train, dict[str, list[int]]()
        for name, own in owned(train, session.task).items():
            fit = [row for row in own if train["level"][row] in (3, 4)]  # of which an order can be lost
            order = [fit[k] for k in torch.randperm(len(fit), generator=session.rng, device=session.device).tolist()]
            draws = torch.randint(1, 10, (SHOTS, 4), generator=session.rng, device=session.device).tolist()
            shown = []
            for row, shifts in zip(order[:SHOTS], draws, strict=False):
                question, text = train["question"][row], train["single"][row]
                signs = signs_of(question)
                like = [k for k in order if train["level"][k] == len(signs) and k != row]
                other = min(like, key=lambda k: len(set(signs) & set(signs_of(train["question"][k]))), default=row)
                start = (int(text.split()[0]) + shifts[-1]) % 10
                text = self.ablated(text, restarted(question, start), train["single"][other], shifts)
                shown.append(Shown(question, self.form, text))
            before[name] = together(shown)
        return kept(before)

    def ablated(self, text: str, elsewhere: str, foreign: str, shifts: Sequence[int]) -> str:
        """A text with the objects and templates that are wanted. `elsewhere`: the same from another start; `foreign`:
        that of another question; `shifts`: 1 to 9, by how much results are wrong."""
        pairs, signs, answer = taken_apart(text)
        if self.objects == "invalid":
            wrong = [(int(y) + shift) % 10 for (_, y), shift in zip(pairs[:-1], shifts, strict=False)]
            digits = [pairs[0][0], *map(str, wrong), answer]
            pairs = list(pairwise(digits))
        elif self.objects == "foreign":
            pairs, _, answer = taken_apart(foreign if self.templates == "foreign" else elsewhere)
        elif self.objects == "shuffled":
            pairs = [*pairs[1:], *pairs[:1]]
        if self.templates == "foreign":
            signs = taken_apart(foreign)[1]
        elif self.templates == "shuffled":
            by = 2 if self.objects == "shuffled" else 1
            signs = [*signs[by:], *signs[:by]]
        steps = [f"{x} {sign} {y} ." for (x, y), sign in zip(pairs, signs, strict=True)]
        return " ".join([*(steps if self.form == "<cot>" else []), f"ans {answer}"])

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One greedy text a question."""
        return greedy(session, batch, prompts(session.state, batch, self.form))


def taken_apart(text: str) -> tuple[list[tuple[str, str]], list[str], str]:
    """A text step by step: pairs of digits, signs, the answer."""
    *steps, ending = text.split(" . ")
    words = [step.split() for step in steps]
    return [(x, y) for x, _, y in words], [sign for _, sign, _ in words], ending.split()[1]
