"""Prompt lookup decoding: drafts copied from the text so far (Saxena 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.speculation import prompt_lookup, speculate


class PromptLookup(Method):
    """Prompt lookup decoding: the draft is what followed the last n-gram where it stood before.

    The longest n-gram (n from 3 down to 1) that ends the text is looked up in the prompt and the text so far; the
    6 tokens after its most recent earlier occurrence are the draft, which the target checks in one forward. No draft
    model, no training. The original takes the earliest occurrence; the most recent one copies from closer by.

    What limits it here: a story repeats itself only once its refrain comes back, so that short budgets gain little.
    """

    paper = Paper(
        id="prompt_lookup",
        title="Prompt Lookup Decoding",
        authors="Apoorv Saxena",
        year=2023,
        code="apoorvumang/prompt-lookup-decoding",
        url="https://github.com/apoorvumang/prompt-lookup-decoding",
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
            "exact_match[prompt_lookup,32] >= 1 and tokens[prompt_lookup,32] >= 1.5 * tokens[autoregressive,32]",
            says="on text that repeats itself, half as many tokens again per forward, and the target's own",
            task="greedy/stories",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        outputs = []
        for prompt, room, temperature in zip(
            batch["prompt"], batch["max_new_tokens"], batch["temperature"], strict=True
        ):
            target = Decoder(session.networks["target"], len(prompt) + room)
            outputs.append(
                speculate(
                    target,
                    prompt,
                    room,
                    rung,
                    temperature,
                    lambda tokens, most: (prompt_lookup(tokens, 3, min(6, most)), None),
                    session.rng,
                )
            )
        return outputs
