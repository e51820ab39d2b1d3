"""Autoregressive decoding: one token per target forward, with a key/value cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import write_plainly


class Autoregressive(Method):
    """Plain autoregressive decoding with a key/value cache: the floor of the track.

    Prefill, then one token per forward of the target: the greatest logit at temperature 0, else a draw from the
    softmax. It is draft-and-verify with an empty draft, so that every other method differs from it in its draft only.
    """

    tasks = (
        "greedy/sums",
        "greedy/words",
        "greedy/hops",
        "greedy/words_weak",
        "greedy/hops_weak",
        "greedy/stories",
        "greedy/sums_deep",
        "greedy/words_deep",
        "greedy/stories_deep",
        "sampling/stories",
        "recall/needles",
        "forced/stories",
        "outliers/words",
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> Any:
        """New token ids per prompt; of tasks `forced/...` log-probabilities [B, V] of the next word, with a full cache."""
        if "context" in batch:
            model = session.networks["target"]
            last = [Decoder(model, len(text)).forward(text, last=1)[0].log_softmax(-1) for text in batch["context"]]
            return torch.stack(last)

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            target = Decoder(session.networks["target"], len(prompt) + room)
            return write_plainly(target, prompt, room, rung, temperature, session.rng)

        return write_each(batch, write)
