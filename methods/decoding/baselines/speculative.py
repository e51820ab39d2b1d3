"""Speculative decoding with a small draft model (Leviathan, Kalman and Matias, ICML 2023, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import draft_while_sure, speculate

# Tokens drafted per step, by task: about the acceptance length at which a longer draft stops paying in time.
DRAFTED = {"sums": 8, "words": 6, "hops": 4, "stories": 8}


class Speculative(Method):
    """Speculative decoding: a draft model writes k tokens, the target checks them in one forward.

    Algorithm 1 of the paper. Greedy: the longest prefix that the target would have written is kept, and the target's
    own next token with it. Sampling: token x is kept with probability min(1, p(x)/q(x)), at the first rejection one
    is drawn from norm(max(0, p - q)), so that the output has the target's distribution. k is fixed per workload, as
    in section 3.5 of the paper. The draft model's forwards are counted beside the budget, in FLOPs and in time.
    """

    paper = Paper(
        id="speculative_decoding",
        title="Fast Inference from Transformers via Speculative Decoding",
        authors="Yaniv Leviathan, Matan Kalman, Yossi Matias",
        year=2023,
        arxiv="2211.17192",
    )
    tasks = (
        "greedy/sums",
        "greedy/words",
        "greedy/hops",
        "greedy/stories",
        "greedy/sums_deep",
        "greedy/words_deep",
        "greedy/stories_deep",
        "sampling/stories",
    )
    baselines = ("autoregressive",)
    claims = (
        Claim(
            "exact_match[speculative,16] >= 1 and tokens[speculative,16] >= 2 * tokens[autoregressive,16]",
            says="the output is the target's own, at two or more tokens per target forward",
        ),
        Claim(
            "latency_ms[speculative,64] <= 0.67 * latency_ms[autoregressive,64]",
            says="decoding takes at most two thirds of the time where the target is dear",
            task="greedy/sums_deep",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            target, small = (Decoder(session.networks[role], len(prompt) + room) for role in ("target", "draft"))
            k = DRAFTED[session.task.dataset]

            def propose(tokens: list[int], most: int) -> tuple[list[int], Tensor | None]:
                small.rollback(min(small.length, len(tokens) - 1))

                def after(draft: list[int]) -> Tensor:
                    return small.forward((tokens + draft)[small.length :], last=1)[0]

                return draft_while_sure(after, min(k, most), small.eos, temperature, session.rng)

            return speculate(target, prompt, room, rung, temperature, propose, session.rng)

        return write_each(batch, write)
