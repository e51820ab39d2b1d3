"""Bag of tricks: best of N with its temperature and its judge varied one at a time (Liu et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, STOP, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning import oracles
from stepmark.tracks.reasoning.populations import drawn, texts_that_fit
from stepmark.tracks.reasoning.solving import CHAIN, answer_of, judged, prompts, self_judged

TEMPERATURES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
TOP_PS = (1.0, 0.95, 0.9, 0.8)
TUNED_ON, TUNED_N = 100, 6  # questions of training, chains of each


class BagOfTricks(Method):
    """Best of N under a budget of tokens: chains are sampled, a judge scores them, the best is returned (section 3).

    The proposer has a temperature and a top-p. Both are tuned in `prepare` on 100 questions of training with 6 chains each: first
    the temperature among six from 0.5 to 1, then top-p among four at that temperature, each by the accuracy of the chain that
    the judge chooses; the larger of equally good ones. The judge is what a variant changes:

        the method              outcome verifier, a judgement at the end of the chain
        itc_self                the model itself: the mean digit that it gives the last step in the format <verify>, a row each
        itc_random              any chain
        itc_exact               any chain that is right, by an exact check: what a perfect judge would choose, a bound

    so that accuracy over that of `itc_exact` is how well a judge selects. As many chains are sampled as the rung has room for,
    an own judgement included; verifiers are no language models and cost no rows. `itc_untuned` and `itc_random_untuned` are at
    temperature 1 and top-p 1, the second so that what tuning does to any chain is not put down to the judge.

    Differs from the paper: best of N alone; of its five other methods, `self_consistency` and `step_beam` (step-level best of
    N, beam search) stand beside it, MCTS and self-refine have no counterpart. One task of its eight has judges here. Prompt
    types are `direct_answer` and `full_thinking`. A model as a judge of another is left out, and so is a process reward as a
    judge of whole texts: `particle_best_of_n` is one.

    What limits it here: the verifiers were trained on chains of this model and task, so that whether their gains carry over to
    other tasks, which the paper doubts, cannot be seen.
    """

    paper = Paper(
        id="itc_bag_of_tricks",
        title="Bag of Tricks for Inference-time Computation of LLM Reasoning",
        authors="Fan Liu, Wenshuo Chao, Naiqiang Tan, Hao Liu",
        year=2025,
        arxiv="2502.07191",
        code="usail-hkust/benchmark_inference_time_computation_LLM",
    )
    tasks = ("solve/judged",)
    baselines = ("chain_of_thought", "self_consistency", "step_beam", "itc_random", "itc_untuned")
    claims = (
        Claim(
            "accuracy[itc_bag_of_tricks,256..512] - accuracy[itc_untuned,256..512] >= 0.01",
            says="tuning temperature and top-p alone gives a hundredth or more (the paper: up to five)",
            headline=True,
        ),
        Claim(
            "accuracy[itc_bag_of_tricks,256..512] > accuracy[itc_self,256..512] "
            "and accuracy[itc_self,256..512] < accuracy[itc_random,256..512] + 0.02",
            says="a reward model selects better than the model itself, which hardly selects better than chance",
            headline=True,
        ),
        Claim(
            "accuracy[itc_bag_of_tricks,256..512] > accuracy[itc_random,256..512] + 0.02 "
            "and accuracy[itc_exact,256..512] > accuracy[itc_bag_of_tricks,256..512] + 0.02",
            says="the judge is of use, and far from a perfect one",
        ),
        Claim(
            "accuracy[itc_random,256..512] - accuracy[itc_random_untuned,256..512] > "
            "accuracy[itc_bag_of_tricks,256..512] - accuracy[itc_untuned,256..512]",
            says="what tuning gives is better chains: without a judge it gives more",
        ),
    )
    trainings = 3
    judge, tuned = "outcome", True
    variants = (
        Variant("itc_untuned", says="at temperature 1", tuned=False),
        Variant("itc_random", says="any chain", judge="random"),
        Variant("itc_random_untuned", says="any chain, at temperature 1", judge="random", tuned=False),
        Variant("itc_self", says="the model judges itself", judge="self"),
        Variant("itc_exact", says="an exact check chooses: a bound", judge="exact"),
    )

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """{"temperature", "top_p"}, float32 each."""
        if not self.tuned:
            return {"temperature": torch.tensor(1.0), "top_p": torch.tensor(1.0)}
        return session.once(tuned_for, self.judge, session.scale(TUNED_ON, 2))

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The chain that the judge likes best."""
        asked = prompts(batch, "<cot>")
        temperature, top_p = (float(session.state[name]) for name in ("temperature", "top_p"))
        texts = texts_that_fit(
            session, Chains(session.networks["model"], asked), rung, CHAIN,
            temperature=temperature, top_p=top_p, aside=int(self.judge == "self"),
        )  # fmt: skip
        return chosen(session, asked, texts, self.judge)


def tuned_for(session: Session, judge: str, count: int) -> dict[str, Tensor]:
    """The temperature, then the top-p, at which the chains that a judge chooses are right most often."""
    asked = [encode(f"{question} <cot>") for question in session.train["question"][:count]]
    best = {"temperature": 1.0, "top_p": 1.0}
    for name, values in (("temperature", TEMPERATURES), ("top_p", TOP_PS)):
        right = {}
        for value in values:
            first = Chains(session.networks["model"], asked)
            texts = texts_that_fit(
                session,
                first,
                TUNED_N * CHAIN,
                CHAIN,
                most=TUNED_N,
                **best | {name: value},  # type: ignore[arg-type]
            )
            picked = chosen(session, asked, texts, judge)
            answers = zip(picked, session.train["answer"], strict=False)
            right[value] = sum(answer_of(text) == answer for text, answer in answers)
        best[name] = max(right, key=right.__getitem__)
    return {name: torch.tensor(value) for name, value in best.items()}


def chosen(
    session: Session, asked: Sequence[list[int]], texts: Sequence[list[list[int]]], judge: str
) -> list[list[int]]:
    """The text that a judge chooses for each prompt; one with an answer, where any has one."""
    found = []
    for prompt, mine in zip(asked, texts, strict=True):
        whole = [text for text in mine if answer_of(text) is not None] or mine
        worth = worths(session, prompt, whole, judge)
        found.append(whole[max(range(len(whole)), key=worth.__getitem__)])
    return found


def worths(session: Session, prompt: list[int], texts: Sequence[list[int]], judge: str) -> list[float]:
    """What a judge gives each text."""
    if judge == "random":
        first = drawn(session, [1.0] * len(texts), 1)[0]
        return [float(k == first) for k in range(len(texts))]
    if judge == "exact":
        return [float(oracles.right(prompt[:-1], text)) for text in texts]
    if judge == "outcome":
        return judged(session.networks["outcome"], [[*prompt, *text] for text in texts])
    steps = [text[: len(text) - text[::-1].index(STOP)] if STOP in text else [EOS] for text in texts]
    digits = self_judged(session.networks["model"], [prompt[:-1]] * len(texts), steps)
    return (digits @ torch.arange(10.0, device=digits.device)).tolist()  # type: ignore[no-any-return]
