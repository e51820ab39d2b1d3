"""The target trained on as it is: what training alone does for a model that others convert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stepmark.backbones.lm import EOS, batches, encode, fit
from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.models import write_greedily


class SiluTuned(Method):
    """The dense target with its SiLU gates, trained on for the steps that relufication takes, on the same texts.

    450 steps on completions of the train split with the optimiser and the rate of `relu_strikes_back`. Nothing is
    skipped, so that a difference in quality is due to the activations and not to the texts.
    """

    tasks = ("converted/stories", "converted/words")
    baselines = ("autoregressive",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """A copy of the target."""
        return {"student": session.clone("target")}

    def prepare(self, session: Session) -> None:
        """Train on."""
        data = session.train
        chosen = list(zip(data["prompt"], data["target"], strict=True))[: session.scale(16_000, 8)]
        rows = [(encode(prompt), [*encode(target), EOS]) for prompt, target in chosen]
        stream = batches(rows, session.scale(1500, 150), session.seed)
        for steps in (session.scale(150, 1), session.scale(300, 1)):
            fit(
                session.networks["student"],
                session.progress,
                steps=steps,
                lr=2e-3,
                seed=session.seed,
                stream=stream,
            )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        return write_greedily(session.networks["student"], batch, rung)
