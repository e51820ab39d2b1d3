"""Inference scaling flaws: resampling until an imperfect verifier accepts, and what that is worth (Stroebl et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import DIGITS, EOS, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.oracles import right
from stepmark.tracks.reasoning.solving import CHAIN, answer_of, judged, prompts


def numbered(text: Sequence[int]) -> bool:
    """Whether a text that has ended gives a number as its answer."""
    digits = encode(answer_of(text) or "")
    return 0 < len(digits) < 5 and all(token in DIGITS for token in digits)


class InferenceScalingFlaws(Method):
    """Resampling with an imperfect verifier: chains are sampled until one is accepted, or the rung is spent.

    With p the chance that a chain is right, and verifiers that accept right ones with 1 - fn and wrong ones with fp, what
    is accepted is right with

        TP / (TP + FP),   TP = p (1 - fn),   FP = (1 - p) fp

    however many attempts there are: more of them only make it likelier that anything is accepted. What is accepted late
    is of hard questions, with small p, and mostly wrong. With 1 for a right answer, -c for a wrong one and 0 for none, the
    utility of K attempts rises and then falls.

    An attempt is a chain at temperature 0.7, of at most 64 tokens; another is begun for a question while it may still have so
    many, so that rung 64 is one attempt, 256 six or seven, 512 fourteen or so. The outcome verifier accepts above 0.5 what gives
    a number. Where nothing was accepted, there is no answer. The method is the small model; `resampled_model` and
    `resampled_large` are the others, `single_small`, `single_model` and `single_large` one attempt without a verifier, the
    single-sample accuracies. `coin_resampling` accepts by a coin, which leaves p as it is, and `exact_resampling` by an exact
    check, the perfect verifier, a bound. `self_consistency` and `best_of_n` spend the same rung on a vote and on a choice.

    Where there is no answer the end of the sequence is returned at once, so that of what is recorded

        utility = accuracy - c (answered - accuracy)

    and accuracy / answered is the accuracy of what is accepted.

    Differs from the paper: verifiers are networks that read a chain, trained on chains of the middle model, where the paper's
    are unit tests of programs; they are wrong on some questions always, as tests with gaps are. The paper draws many
    samples of a task once and counts; here attempts end with the rung, of which fourteen are the most. c is 1 and 2, of the
    paper's 0.7, 1 and 2.

    What limits it here: the large model is stronger than the small one by its size alone, on one kind of task that all were
    trained on.
    """

    paper = Paper(
        id="inference_scaling_flaws",
        title="Inference Scaling scriptsizeFLaws: The Limits of LLM Resampling with Imperfect Verifiers",
        authors="Benedikt Stroebl, Sayash Kapoor, Arvind Narayanan",
        year=2024,
        arxiv="2411.17501",
        code="benediktstroebl/inference-scaling-limits",
    )
    tasks = ("solve/sizes",)
    baselines = ("single_large", "single_small", "coin_resampling", "self_consistency", "best_of_n")
    claims = (
        Claim(
            "accuracy[inference_scaling_flaws,64..512] < "
            "accuracy[single_large,64..512] * answered[inference_scaling_flaws,64..512]",
            says="what the small model has accepted is right less often than one sample of the large, however many attempts",
            headline=True,
        ),
        Claim(
            "accuracy[single_small,64..512] < accuracy[single_model,64..512] < accuracy[single_large,64..512] and "
            "accuracy[inference_scaling_flaws,64..512] / answered[inference_scaling_flaws,64..512] "
            "< accuracy[resampled_model,64..512] / answered[resampled_model,64..512] "
            "< accuracy[resampled_large,64..512] / answered[resampled_large,64..512]",
            says="the more often a model is right at once, the fewer of its accepted answers are wrong",
            headline=True,
        ),
        Claim(
            "max(2 * accuracy[inference_scaling_flaws,64] - answered[inference_scaling_flaws,64], "
            "2 * accuracy[inference_scaling_flaws,128] - answered[inference_scaling_flaws,128], "
            "2 * accuracy[inference_scaling_flaws,256] - answered[inference_scaling_flaws,256]) > "
            "2 * accuracy[inference_scaling_flaws,512] - answered[inference_scaling_flaws,512]",
            says="with a wrong answer as bad as a right one is good, seven attempts or fewer are worth more than fourteen",
            headline=True,
        ),
        Claim(
            "accuracy[inference_scaling_flaws,512] / answered[inference_scaling_flaws,512] "
            "<= accuracy[inference_scaling_flaws,128] / answered[inference_scaling_flaws,128]",
            says="more attempts make what is accepted no more often right",
        ),
        Claim(
            "accuracy[inference_scaling_flaws,64..512] / answered[inference_scaling_flaws,64..512] "
            "> accuracy[coin_resampling,64..512] / answered[coin_resampling,64..512] + 0.02",
            says="the verifier is of use: what it accepts is right more often than what a coin accepts",
        ),
    )
    role, verifier, threshold, attempts, temperature = "small", "outcome", 0.5, 1000, 0.7
    variants = (
        Variant("resampled_model", says="the middle model", role="model"),
        Variant("resampled_large", says="the large model", role="large"),
        Variant("single_small", says="one attempt of the small model, not verified", verifier="none", attempts=1),
        Variant(
            "single_model",
            says="one attempt of the middle model, not verified",
            role="model",
            verifier="none",
            attempts=1,
        ),
        Variant(
            "single_large",
            says="one attempt of the large model, not verified",
            role="large",
            verifier="none",
            attempts=1,
        ),
        Variant("coin_resampling", says="a coin in the place of the verifier", verifier="coin"),
        Variant("exact_resampling", says="an exact check in its place: a bound", verifier="exact"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The first text accepted of each question, or the end of the sequence alone."""
        asked = prompts(batch, "<cot>")
        first = Chains(session.networks[self.role], asked)
        first.read()  # the prompts are read once for all attempts: with it comes the first token of each
        found: list[list[int]] = [[EOS] for _ in asked]
        left, going, tries = [rung - 1] * len(asked), list(range(len(asked))), 0
        while going and tries < self.attempts:
            chains = first.take(going)
            chains.write(
                limit=[min(CHAIN, left[i] + 1) for i in going], temperature=self.temperature, generator=session.rng
            )
            texts = [chains.written(k) for k in range(len(going))]
            open_still = []
            for i, text, good in zip(going, texts, self.accepted(session, batch, going, chains), strict=True):
                left[i] -= len(text) - 1
                if good:
                    found[i] = text
                elif left[i] >= CHAIN:
                    open_still.append(i)
            going, tries = open_still, tries + 1
        return found

    def accepted(self, session: Session, batch: Mapping[str, Any], going: Sequence[int], chains: Chains) -> list[bool]:
        """Which of the texts, of these questions, are accepted; of those whose answer is no number none is."""
        answered = [k for k in range(len(chains)) if numbered(chains.written(k))]
        if self.verifier == "none":
            worth = [1.0] * len(answered)
        elif self.verifier == "coin":
            worth = torch.rand(len(answered), generator=session.rng, device=session.device).tolist()
        elif self.verifier == "exact":
            worth = [float(right(batch["question"][going[k]], chains.written(k))) for k in answered]
        else:
            worth = judged(session.networks["outcome"], [chains.texts[k] for k in answered]) if answered else []
        good = {k for k, p in zip(answered, worth, strict=True) if p > self.threshold}
        return [k in good for k in range(len(chains))]
