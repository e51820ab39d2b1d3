"""Jacobi decoding: parallel fixed-point iteration on guessed tokens (Santilli et al., ACL 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import verify_greedy

WINDOW = 16  # guessed tokens that are refined together


class Jacobi(Method):
    """Jacobi decoding: a window of guessed tokens is replaced by the target's answers until it no longer changes.

    Greedy decoding is the triangular system y_i = argmax p(. | y_1 .. y_(i-1), x). The Jacobi iteration

        y_i^(j+1) = argmax p(. | y_1^(j) .. y_(i-1)^(j), x)          (algorithm 1, all i in one forward)

    fixes at least one further token per forward, and more where a guess happened to be right. A guess that equals the
    target's own token after fixed tokens is fixed itself, so that the output is greedy decoding's.

    Differs from the paper: its blocks are solved one after the other (algorithm 2), while this window moves on with
    every token that is fixed, which never takes more forwards. Guesses start as tokens drawn from the prompt, as in
    lookahead decoding, not as padding, which this target was not trained to see.
    """

    paper = Paper(
        id="jacobi_decoding",
        title="Accelerating Transformer Inference for Translation via Parallel Decoding",
        authors="Andrea Santilli, Silvio Severino, Emilian Postolache, Valentino Maiorca, Michele Mancusi, "
        "Riccardo Marin, Emanuele Rodola",
        year=2023,
        arxiv="2305.10427",
    )
    tasks = (
        "greedy/sums",
        "greedy/words",
        "greedy/hops",
        "greedy/stories",
        "greedy/sums_deep",
        "greedy/words_deep",
        "greedy/stories_deep",
    )
    baselines = ("autoregressive",)
    claims = (
        Claim(
            "exact_match[jacobi,64] >= 1 and nfe[jacobi,64] <= nfe[autoregressive,64]",
            says="the output is greedy decoding's, in no more forwards",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            target = Decoder(session.networks["target"], len(prompt) + room + WINDOW)
            tokens, end = list(prompt), len(prompt) + room
            guesses: list[int] = []
            while target.spent + 1 <= rung and len(tokens) < end:
                fill = torch.randint(len(prompt), (WINDOW,), generator=session.rng, device=target.device).tolist()
                guesses += [prompt[i] for i in fill[len(guesses) :]]
                answers = target.forward([*tokens[target.length :], *guesses], last=WINDOW + 1).argmax(-1).tolist()
                fixed = verify_greedy(guesses, answers)
                guesses = answers[len(fixed) :]
                tokens += fixed[: fixed.index(target.eos) + 1] if target.eos in fixed else fixed
                target.rollback(len(tokens) - 1)
                if tokens[-1] == target.eos:
                    break
            return tokens[len(prompt) : end]

        return write_each(batch, write)
