"""Sinks and a window in all layers, trained so: what sparse attention alone can learn to recall."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stepmark.backbones.lm import EOS, encode
from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.recall import BandCache, HeldDecoder, train_band, write_with

SINKS, WINDOW = 4, 64  # as in longgen


class SinkWindowTrained(Method):
    """The baseline of LongGen without its full layers: every layer sees the first 4 tokens and the last 64 only.

    The target is trained on with this attention as LongGen is, for as many steps on the same texts. Information travels
    64 tokens per layer at most, so that six layers reach back 378 tokens: what stands further away is out of reach.
    """

    tasks = ("recall/needles",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The target, to be trained on."""
        return {"student": session.clone("target")}

    def prepare(self, session: Session) -> None:
        """Train with the attention that it will run with."""
        rows = [
            (encode(prompt), [*encode(target), EOS])
            for prompt, target in zip(session.train["prompt"], session.train["target"], strict=True)
        ]
        rows = rows[: session.scale(len(rows), 2)]
        student = session.networks["student"]
        steps = session.scale(150, 1)
        train_band(student, rows, (), SINKS, WINDOW, steps, session.seed, session.progress)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        model, outputs = session.networks["student"], []
        for prompt, room, temperature in zip(
            batch["prompt"], batch["max_new_tokens"], batch["temperature"], strict=True
        ):
            cache = BandCache(len(model.model.layers), SINKS, WINDOW)
            target = HeldDecoder(model, len(prompt) + room, cache)
            outputs.append(write_with(target, prompt, room, rung, temperature, session.rng))
        return outputs
