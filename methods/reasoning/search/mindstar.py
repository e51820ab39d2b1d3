"""MindStar: beam search or Levin tree search over steps, guided by a process verifier (Kang, Li, Chen et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.best_first import Node, search
from stepmark.tracks.reasoning.solving import CHAIN

SHARPNESS = 0.1  # temperature at which judgements of siblings become a policy


class MindStar(Method):
    """MindStar (M*): reasoning as a search for a path of steps, by two orders, here Levin tree search.

    At the chosen node N next steps are sampled at temperature .7 and judged by the process verifier: R(e) for the question,
    the path and the step e. `mindstar_beam` (BEAM) goes on with the best of them, and never returns. Levin tree search keeps
    all nodes and goes on with the one of least

        f(n) = cost(n) / pi(n)
        pi(n) = product of P(e) over the steps e that lead to n
        P(e) = exp(R(e) / T) / sum of exp(R(e') / T) over the steps e' drawn beside e

    where cost(n) is the number of tokens of the path. A path of unlikely steps or a long one makes way for an earlier
    branch; before a finished chain n is chosen, at most cost(n) / pi(n) nodes are expanded (Orseau et al. 2018, theorem 3).
    The first finished chain that is chosen is the answer.

    The rung sets N: half as many branches as it has whole chains of 64 tokens, at most the paper's 16, so that there is room
    for going back: 2 at 256, 4 at 512. Below 256 that is one, and one chain is sampled.

    Differs from the paper: no code was found. That pi comes from a softmax over siblings is a reading of how a
    policy follows from judgements, and T = 0.1 is chosen for judgements between 0 and 1. Equal steps are one node that has the
    sum of their shares. At most 16 nodes of a question wait. A chain that has ended keeps the judgement of its last step.
    The verifier was taught on the model's own texts, the paper's on others. A node is read anew when it is branched, and each
    of its children by the verifier, which counts in NFE-equivalents. Where the rung runs out the best finished chain is
    taken, or the best node is written to its end.

    Its controls: `mindstar_coin` tosses a coin for R; `mindstar_exact` has R from an exact check of all steps, a bound.

    What limits it here: the larger model has 3.4 times the weights of the model, and was trained on the same data for as
    long. Chains are short, so that a level of a tree costs about a fifth of a chain.
    """

    paper = Paper(
        id="mindstar",
        title="MindStar: Enhancing Math Reasoning in Pre-trained LLMs at Inference Time",
        authors="Jikun Kang, Xin Zhe Li, Xi Chen, Amirreza Kazemi, Qianyi Sun, Boxing Chen, Dong Li, Xu He, Quan He, "
        "Feng Wen, Jianye Hao, Jun Yao",
        year=2024,
        arxiv="2405.16265",
    )
    tasks = ("solve/problems",)
    baselines = (
        "chain_of_thought",
        "large_alone",
        "self_consistency",
        "particle_best_of_n",
        "mindstar_beam",
        "mindstar_coin",
    )
    claims = (
        Claim(
            "accuracy[mindstar,256..512] > accuracy[chain_of_thought,256..512] "
            "and accuracy[mindstar,256..512] >= accuracy[large_alone,256..512] - 0.01 "
            "and nfe_equivalent[mindstar,256..512] < nfe_equivalent[large_alone,256..512]",
            says="the model with a search is well above its chain of thought and about as accurate as a larger model, and "
            "costs less",
            headline=True,
            setting="the larger model is 3.4 times as large, not more than ten times: a search costs more than that",
        ),
        Claim(
            "accuracy[mindstar,256..512] > accuracy[self_consistency,256..512] "
            "and accuracy[mindstar,256..512] > accuracy[particle_best_of_n,256..512] "
            "and deep[mindstar,256..512] > deep[self_consistency,256..512]",
            says="more accurate than a vote and than best-of-n with the same verifier, within as many tokens, and so on problems "
            "of five steps",
        ),
        Claim(
            "accuracy[mindstar,256..512] >= accuracy[mindstar_beam,256..512]",
            says="Levin tree search is no worse than the beam",
        ),
        Claim(
            "accuracy[mindstar,256..512] > accuracy[mindstar_coin,256..512]",
            says="it is the verifier that guides it",
        ),
    )
    judge, levin = "process", True
    variants = (
        Variant("mindstar_beam", says="goes on with the best of the last steps, never back (BEAM)", levin=False),
        Variant("mindstar_coin", says="a coin for a verifier", judge="coin"),
        Variant("mindstar_exact", says="an exact check of the steps for a verifier: a bound", judge="exact"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question."""
        rule = levin if self.levin else beam
        return search(session, batch, rung, min(16, rung // (2 * CHAIN)), rule, judge=self.judge, back=self.levin)


def levin(parent: Node, children: list[Node]) -> None:
    """log pi and log f of the children."""
    top = max(child.worth for child in children)
    weights = [child.copies * math.exp((child.worth - top) / SHARPNESS) for child in children]
    for child, weight in zip(children, weights, strict=True):
        child.carried = parent.carried + math.log(max(weight / sum(weights), 1e-300))
        child.cost = math.log(len(child.text)) - child.carried


def beam(parent: Node, children: list[Node]) -> None:
    """The best judgement first."""
    for child in children:
        child.cost = -child.worth
