"""SpecReason: a small model drafts whole steps, the large one scores them and rewrites what it rejects (Pan et al., 2025)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import DIGITS, EOS, STOP, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.sharing import follow, share
from stepmark.tracks.reasoning.solving import STEP, prompts, write_step

STEPS, MOST = 16, 300  # most steps of a text, most tokens of one that is written in one go
GUESSES = 5  # tokens of a draft of speculative decoding
SCORE = encode("<score>")


def guessed(large: Chains, chosen: Sequence[int], guesses: Sequence[Sequence[int]], ends: Collection[int]) -> list[int]:
    """Write on the chosen texts as the model would at its likeliest token each: of a guess what it would have written
    itself, and one token more unless that ends the piece. One row for each. Returns how many tokens were added."""
    before = [len(large.texts[i]) for i in chosen]
    for i, start, guess, (own, _) in zip(chosen, before, guesses, large.check(chosen, guesses), strict=True):
        same = next((k for k, token in enumerate(guess) if token != own[k]), len(guess))
        large.cut(i, start + same)
        if not (same and guess[same - 1] in ends):
            large.put(i, [own[same]])
    return [len(large.texts[i]) - start for i, start in zip(chosen, before, strict=True)]


class SpecReason(Method):
    """SpecReason: the small model drafts a step, the large one (the base model) says what it is worth, and writes it anew
    where that is too little.

    A step ends at a full stop. In turn, until the text ends:

        1. the small model writes the next step;
        2. the base model reads it and gives a digit from 0 to 9, in one call with one token;
        3. from the threshold 7 on the step stays. Else it is forgotten and the base model writes the step itself.

    What a step is worth is asked of the base model in the format <verify>; the digit is its likeliest token, and another
    token counts 0, as in the authors' code. Keys and values of the text under judgement are kept, so that a verdict reads
    the new step only; what the base model writes itself is judged by nobody and stands before the next draft.

    `specreason_decode` is the paper's hierarchy: the base model's own steps are written by speculative decoding, 5 tokens
    guessed by the small model and checked in a call. `specreason_tokens` is speculative decoding alone. In
    `specreason_shuffled` the digits of a round are dealt out anew among the questions of the batch: as many steps are kept
    and the cost is the same, but the digits say nothing.

    A rung bounds all tokens of both models and all verdicts, over the batch. It sets nothing else: a text that has ended
    leaves the rest, as greedy chains do. Where less is left for a question than a draft and a verdict, its text is cut.

    Differs from the paper: all models take the likeliest token (the paper samples at 0.6), since the chains that it is held
    against do. An answer is no step that the format of the verdicts knows: where the draft is not a step that ends in a full
    stop, the base model writes. The first steps are not kept for the base model, an option of the paper.

    What limits it here: steps have about 8 tokens, not hundreds, so that a verdict and an answer weigh more. Verdict and
    solution are two formats with two prompts: their caches are not shared, and the base model reads what it judges and
    rewrites twice.
    """

    paper = Paper(
        id="specreason",
        title="SpecReason: Fast and Accurate Inference-Time Compute via Speculative Reasoning",
        authors="Rui Pan, Yinwei Dai, Zhihao Zhang, Gabriele Oliaro, Zhihao Jia, Ravi Netravali",
        year=2025,
        arxiv="2504.07891",
        code="ruipeterpan/specreason",
    )
    tasks = ("solve/sizes",)
    baselines = ("large_alone", "small_alone", "specreason_tokens", "specreason_shuffled")
    claims = (
        Claim(
            "latency_ms[specreason,128..512] <= 0.67 * latency_ms[large_alone,128..512] "
            "and accuracy[specreason,128..512] > accuracy[large_alone,128..512]",
            says="two thirds of the base model's time or less, and more answers are right (the paper: 1.5 to 2.5 times as fast, "
            "1.0 to 9.9 % better)",
            headline=True,
            setting="chains of some 30 tokens that end by themselves, of a base model whose calls take hardly longer than "
            "the small one's; the paper's is cut by a budget that its thousands of tokens overrun, which is where it loses",
        ),
        Claim(
            "large_evaluations[specreason,128..512] + 0.08 * small_evaluations[specreason,128..512] "
            "<= 0.67 * large_evaluations[large_alone,128..512]",
            says="two thirds of the base model's evaluations or fewer, those of the small model by their size (0.08 of a "
            "large one)",
        ),
        Claim(
            "large_evaluations[specreason,128..512] <= 0.7 * large_evaluations[large_alone,128..512] "
            "and accuracy[specreason,128..512] >= accuracy[large_alone,128..512] - 0.02 "
            "and accuracy[specreason,128..512] > accuracy[small_alone,128..512]",
            says="at most 70 % of the base model's calls, as right as it alone, and more than the small model alone",
        ),
        Claim(
            "large_evaluations[specreason_decode,128..512] + 0.08 * small_evaluations[specreason_decode,128..512] "
            "<= 0.8 * (large_evaluations[specreason_tokens,128..512] "
            "+ 0.08 * small_evaluations[specreason_tokens,128..512]) "
            "and accuracy[specreason_decode,128..512] >= accuracy[specreason_tokens,128..512] - 0.02",
            says="together with speculative decoding a fifth fewer calls than by that alone (the paper: 19 to 44 % of the time)",
            setting="a step has 8 tokens, two drafts of speculative decoding; in the paper it has hundreds",
        ),
        Claim(
            "accuracy[specreason,128..512] > accuracy[specreason_shuffled,128..512]",
            says="it matters which steps are kept, not how many",
        ),
    )

    threshold, draft, decode, shuffled = 7, True, False, False
    variants = (
        Variant("specreason_shuffled", says="the digits are dealt out anew among the questions", shuffled=True),
        Variant("specreason_decode", says="the base model's steps by speculative decoding", decode=True),
        Variant("specreason_tokens", says="speculative decoding alone, no steps drafted", draft=False, decode=True),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question, steps of both models in it."""
        asked = prompts(batch, "<cot>")
        small, large = Chains(session.networks["small"], asked), Chains(session.networks["large"], asked)
        judge = Chains(session.networks["large"], prompts(batch, "<verify>"))
        if not self.draft:
            self.write(session, small, large, list(range(len(asked))), MOST, ())
        for _ in range(STEPS if self.draft else 0):
            going = [i for i in range(len(asked)) if not large.ended(i)]
            room = share(session, len(going))
            if not going or room < 2:
                break
            kept = self.drafted(session, small, large, judge, going, min(STEP, room - 1))
            self.write(session, small, large, [i for i in going if i not in kept], STEP, (STOP,))
        return [large.written(i) or [EOS] for i in range(len(asked))]

    def drafted(
        self, session: Session, small: Chains, large: Chains, judge: Chains, going: list[int], most: int
    ) -> list[int]:
        """Draft a step of each text and keep what is worth it. Returns the texts that have got one."""
        for i in going:
            follow(small, i, large.written(i))
        drafts = dict(zip(going, write_step(small, going, session, 0.0, most), strict=True))
        steps = [i for i in going if drafts[i][-1:] == [STOP]]
        for i in steps:
            follow(judge, i, [*large.written(i), *drafts[i], *SCORE])
        said = judge.read(steps).argmax(-1).tolist() if steps else []
        worth = [DIGITS.index(token) if token in DIGITS else 0 for token in said]
        if self.shuffled:
            order = torch.randperm(len(worth), generator=session.rng, device=session.device).tolist()
            worth = [worth[k] for k in order]
        kept = [i for i, digit in zip(steps, worth, strict=True) if digit >= self.threshold]
        for i in kept:
            large.put(i, drafts[i])
        return kept

    def write(
        self, session: Session, small: Chains, large: Chains, chosen: list[int], most: int, stop: tuple[int, ...]
    ) -> None:
        """Let the base model write up to a token of `stop`, the end, or `most` tokens."""
        if not self.decode:
            large.write(chosen, stop=stop, limit=min(most, share(session, len(chosen))))
            return
        room, ends = dict.fromkeys(chosen, most), {EOS, *stop}
        going = chosen
        while going and (each := share(session, len(going))) >= 2:
            for i in going:
                follow(small, i, large.written(i))
            limits = [min(GUESSES, each - 1, room[i] - 1) for i in going]
            guesses = small.write(going, stop=stop, limit=limits)
            for i, added in zip(going, guessed(large, going, guesses, ends), strict=True):
                room[i] -= added
            going = [i for i in going if large.texts[i][-1] not in ends and room[i] > 0]
