"""Prompt lookup decoding: drafts copied from the text so far (Saxena 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import speculate

LONGEST, LENGTH = 3, 6  # of an n-gram that is looked up; tokens copied at most


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

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            target = Decoder(session.networks["target"], len(prompt) + room)

            def propose(tokens: list[int], most: int) -> tuple[list[int], None]:
                return prompt_lookup(tokens, LONGEST, min(LENGTH, most)), None

            return speculate(target, prompt, room, rung, temperature, propose, session.rng)

        return write_each(batch, write)


def prompt_lookup(tokens: Sequence[int], longest: int, length: int) -> list[int]:
    """Draft by lookup: what followed the most recent earlier occurrence of the longest n-gram that ends the text.

    Args:
        longest: greatest n tried, down to 1. length: tokens to draft at most.
    """
    end = len(tokens)
    for n in range(min(longest, end - 1), 0, -1):
        tail = tokens[end - n :]
        for i in range(end - n - 1, -1, -1):
            if tokens[i : i + n] == tail:
                return list(tokens[i + n : i + n + length])
    return []
