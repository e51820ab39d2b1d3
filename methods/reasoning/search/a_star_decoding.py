"""A*-decoding: a priority queue over unfinished chains, costs and estimates from a process verifier (Chatziveroglou, 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.best_first import Node, search


class AStarDecoding(Method):
    """A*-decoding: the chain that promises most is written on, until the most promising one is a finished one.

    A node s is a chain up to the end of a step, r(s) what the process verifier says of it. Its estimate of what is still to
    come is h, the cost of a step is by how much it makes that estimate worse, and the queue is ordered by f:

        h(s) = 1 - r(s)
        c(s, s') = max(0, h(s') - h(s))
        g(s') = g(s) + c(s, s'),   g = 0 at the question
        f(s) = g(s) + h(s)

    The node of least f leaves the queue. A finished one is the answer. From any other, k next steps are sampled at
    temperature .7, judged, and put into the queue, of which the 16 best are kept. As long as steps keep their worth the
    search goes straight on; a step that loses pays twice, in g and in h, and an older branch may come before it.

    The rung sets k, the root of a 32nd of it: 2 at 128 and 256, 4 at 512; the rest of it is for going back, and is left
    where there is nothing to go back for. Below 128 there is no room for two branches and one chain is sampled.

    Differs from the paper: no code was found. h and f are the catalogue's row; that g takes increases of h alone is from
    a survey's account of the paper. The question alone has r = 0, so that no first step costs anything. Steps that were
    drawn twice are one node. A chain that has ended keeps the r of its last step, as the verifier here was taught to judge
    at full stops only. k grows with the rung; where the rung runs out before a chain has ended, the best one is written to
    its end from what was kept for that.

    Its controls: `a_star_greedy` goes by h alone, `a_star_coin` tosses a coin for r, and `a_star_exact` has r from an exact
    check of all steps, a bound. The paper's baselines stand with the same verifier and temperature: `particle_filtering_its`,
    and `particle_best_of_n` for whole chains.

    What limits it here: chains have two to five steps, so that there are few places to go back to. On
    solve/problems the verifier is a plain copy of the model, which tells little.
    """

    paper = Paper(
        id="a_star_decoding",
        title="A*-Decoding: Token-Efficient Inference Scaling",
        authors="Giannis Chatziveroglou",
        year=2025,
        arxiv="2505.13672",
    )
    tasks = ("solve/judged", "solve/problems")
    baselines = (
        "particle_best_of_n",
        "particle_filtering_its",
        "self_consistency",
        "a_star_greedy",
        "a_star_coin",
    )
    claims = (
        Claim(
            "accuracy[a_star_decoding,256..512] >= accuracy[particle_best_of_n,256..512] - 0.01 "
            "and accuracy[a_star_decoding,256..512] >= accuracy[particle_filtering_its,256..512] - 0.01 "
            "and nfe[a_star_decoding,256..512] <= 0.6 * nfe[particle_best_of_n,256..512] "
            "and process_evaluations[a_star_decoding,256..512] <= 0.7 * process_evaluations[particle_filtering_its,256..512]",
            says="as accurate as best-of-n and particle filtering with the same verifier at the same rung, with six tenths "
            "of the tokens (the paper: up to 3 times fewer) and seven tenths of the verifier's passes",
            headline=True,
        ),
        Claim(
            "accuracy[a_star_decoding,512] > accuracy[particle_best_of_n,256] "
            "and accuracy[a_star_decoding,512] > accuracy[particle_filtering_its,256] "
            "and accuracy[a_star_decoding,512] > accuracy[self_consistency,256] and nfe[a_star_decoding,512] <= 256",
            says="others could not have saved as much by a smaller rung: of the greatest it uses half, and is more accurate than "
            "they are with so much, and than a vote",
        ),
        Claim(
            "accuracy[a_star_decoding,128..512] > accuracy[a_star_coin,128..512] "
            "and accuracy[a_star_decoding,128..512] >= accuracy[a_star_greedy,128..512]",
            says="it is the verifier that guides it, and the cost of the way does no harm",
        ),
        Claim(
            "deep[a_star_decoding,256..512] >= deep[particle_best_of_n,256..512] - 0.01 "
            "and deep[a_star_decoding,256..512] > deep[self_consistency,256..512]",
            says="the same on problems of five steps, and more of these than a vote at as many tokens",
        ),
        Claim(
            "accuracy[a_star_decoding,256..512] >= accuracy[particle_best_of_n,256..512] - 0.01 "
            "and accuracy[a_star_decoding,256..512] >= accuracy[particle_filtering_its,256..512] - 0.01 "
            "and nfe[a_star_decoding,256..512] <= 0.6 * nfe[particle_best_of_n,256..512] "
            "and process_evaluations[a_star_decoding,256..512] <= 0.7 * process_evaluations[particle_filtering_its,256..512]",
            says="the headline with a verifier that hardly tells right from wrong steps of one question",
            task="solve/problems",
        ),
    )
    judge, way = "process", True
    variants = (
        Variant("a_star_greedy", says="by the estimate alone, whatever the way has cost", way=False),
        Variant("a_star_coin", says="a coin for a verifier", judge="coin"),
        Variant("a_star_exact", says="an exact check of the steps for a verifier: a bound", judge="exact"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question."""
        return search(session, batch, rung, math.isqrt(rung // 32), self.rule, self.judge)

    def rule(self, parent: Node, children: list[Node]) -> None:
        """g and f of the children."""
        for child in children:
            if self.way:
                child.carried = parent.carried + max(0.0, parent.worth - child.worth)
            child.cost = child.carried + 1 - child.worth
