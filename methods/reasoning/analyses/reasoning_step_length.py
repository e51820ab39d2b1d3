"""The impact of reasoning step length: the same examples worked in more or fewer steps (Jin et al., 2024)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.demonstrating import Shown, greedy, kept, misworked, owned, prompts, together

SHOTS = 4


class ReasoningStepLength(Method):
    """Examples whose texts are longer or shorter, while what they know stays the same.

    4 of a person's own questions of 3 or 4 signs, of which the question tells all, stand with right texts before the
    question; one greedy text is written. All variants show the same questions, which differ in how they are worked:

        step_length_once     all signs in one step (compressed)
        step_length_pairs    two signs a step (compressed)
        step_length_single   a step for each sign: the chain of thought that the others are held against
        the method           the same, and after each step what is left is said again (read the question again, repeat
                             state)
        step_length_ruled    the same as single, and each step first says how its sign is read (think about the word)

    None of the longer texts holds anything that the question does not tell. `step_length_wrong` has texts of the
    method's length in which every result is wrong, the answer too, each step going on from the one before.
    `step_length_direct` shows answers alone and asks for one.

    Its control: `step_length_dots` has the texts of single, filled up with full stops behind each step to as many
    tokens as the method's, so that they are longer and say no more. Texts fit into 64 tokens, which is where the claims
    are; easy questions have 1 or 2 signs, hard ones 5 or 6.

    Differs from the paper: of its five ways to lengthen, self-verification and equations are left out: the model met
    checks only where wishes were asked for, and an equation is what a step is. So is its prompt without examples, that
    asks for more steps. Texts are not written by hand but by rule. All steps of wrong texts are wrong, the paper has a
    wrong one or two in a text. Number of shots: 4 throughout.

    What limits it here: the model was trained on all five styles, and takes on that of the examples: what is measured
    is what it can work out in a step, not whether long examples make it think. It was also trained behind wrong
    examples.
    """

    paper = Paper(
        id="reasoning_step_length",
        title="The Impact of Reasoning Step Length on Large Language Models",
        authors="Mingyu Jin, Qinkai Yu, Dong Shu, Haiyan Zhao, Wenyue Hua, Yanda Meng, Yongfeng Zhang, Mengnan Du",
        year=2024,
        arxiv="2401.04925",
        code="MingyuJ666/The-Impact-of-Reasoning-Step-Length-on-Large-Language-Models",
    )
    tasks = ("shown/told",)
    baselines = ("step_length_single", "step_length_once", "step_length_direct", "chain_of_thought", "step_length_dots")
    claims = (
        Claim(
            "accuracy[reasoning_step_length,64] > accuracy[step_length_single,64] "
            "> accuracy[step_length_pairs,64] > accuracy[step_length_once,64]",
            says="longer steps that say nothing new make answers right more often, shorter ones that keep all less "
            "often",
            headline=True,
        ),
        Claim(
            "accuracy[step_length_wrong,64] > accuracy[step_length_once,64] "
            "and accuracy[step_length_wrong,64] >= 0.9 * accuracy[reasoning_step_length,64]",
            says="wrong texts of the proper length are better than right ones that are short, and nearly as good as "
            "right ones",
            headline=True,
        ),
        Claim(
            "hard[reasoning_step_length,64] - hard[step_length_once,64] "
            "> easy[reasoning_step_length,64] - easy[step_length_once,64]",
            says="hard questions gain more from length than easy ones",
            headline=True,
        ),
        Claim(
            "accuracy[step_length_ruled,64] > accuracy[step_length_single,64]",
            says="thinking about the word helps too",
        ),
        Claim(
            "accuracy[reasoning_step_length,64] > accuracy[step_length_dots,64] "
            "and accuracy[reasoning_step_length,64] > accuracy[step_length_direct,64]",
            says="it is steps, not tokens: full stops in their place do less, and so do answers alone",
        ),
    )
    column, form, change = "again", "<cot>", "none"
    trainings = 3
    variants = (
        Variant("step_length_once", says="all signs in one step", column="once"),
        Variant("step_length_pairs", says="two signs a step", column="pairs"),
        Variant("step_length_single", says="a step for each sign", column="single"),
        Variant("step_length_ruled", says="each step says how its sign is read", column="ruled"),
        Variant("step_length_wrong", says="as long, and wrong throughout", change="wrong"),
        Variant("step_length_dots", says="a step for each sign, and full stops to the same length", change="dots"),
        Variant("step_length_direct", says="answers alone, shown and asked for", column="answer", form="<dir>"),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """What stands before the questions about each person."""
        train, before, rng = session.train, dict[str, list[int]](), random.Random(session.seed)
        for name, own in owned(train, session.task).items():
            # With fewer signs some of the styles are the same.
            fit = [row for row in own if train["level"][row] in (3, 4)]
            order = torch.randperm(len(fit), generator=session.rng, device=session.device)[:SHOTS]
            shown = []
            for row in (fit[k] for k in order.tolist()):
                text = train[self.column][row]
                if self.change == "wrong":
                    text = misworked(text, rng)
                elif self.change == "dots":
                    text = dotted(train["single"][row], len(text.split()))
                elif self.column == "answer":
                    text = f"ans {text}"
                shown.append(Shown(train["question"][row], self.form, text))
            before[name] = together(shown)
        return kept(before)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One greedy text a question."""
        return greedy(session, batch, prompts(session.state, batch, self.form))


def dotted(text: str, length: int) -> str:
    """A text with further full stops behind those that it has, shared out evenly, so that it has so many words."""
    *steps, answer = text.split(" . ")
    extra = length - len(text.split())
    shares = [(extra * (k + 1)) // len(steps) - (extra * k) // len(steps) for k in range(len(steps))]
    return " ".join([*(f"{step} .{' .' * share}" for step, share in zip(steps, shares, strict=True)), answer])
