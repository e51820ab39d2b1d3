"""Static token pruning: the prompt is pruned once, while it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.recall import PrunedDecoder, cuts_of, write_with

# As in LazyLLM: share of the tokens of a layer that the layers after it run over, by depth.
CUTS = ((1 / 2, 0.3), (2 / 3, 0.5), (5 / 6, 0.5))


class StaticPrune(Method):
    """Static token pruning, the baseline of LazyLLM: what the last token of the prompt does not look at is gone.

    After each of some layers the tokens are ranked by the attention that the last token of the prompt paid them there,
    and all but the best share are dropped: the deeper layers never see them. The choice is made once, before the first
    token is written, by the shares of `lazyllm`; tokens of the answer are all kept.
    """

    tasks = ("recall/needles",)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        model, outputs = session.networks["target"], []
        cuts = cuts_of(len(model.model.layers), CUTS)
        for prompt, room, temperature in zip(
            batch["prompt"], batch["max_new_tokens"], batch["temperature"], strict=True
        ):
            target = PrunedDecoder(model, len(prompt) + room, cuts, revive=False)
            outputs.append(write_with(target, prompt, room, rung, temperature, session.rng))
        return outputs
