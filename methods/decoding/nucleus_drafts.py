"""Drafts by nucleus sampling: each draft in passes of its own (Holtzman et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepmark.backbones.lm import PAD
from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.speculation import draw
from stepmark.tracks.decoding.texts import nucleus

TOP_P = 0.9


class NucleusDrafts(Method):
    """Nucleus sampling, draft after draft: what several drafts cost without superposition.

    The prompt is read once and gives the first token of every draft; then each draft takes a forward per token. Tokens
    are drawn from the fewest likeliest ones that hold 0.9 of the distribution. A rung is shared out evenly.
    """

    tasks = ("drafts/stories",)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The drafts of each prompt, one after the other."""
        outputs = []
        for prompt, length, drafts in zip(batch["prompt"], batch["max_new_tokens"], batch["drafts"], strict=True):
            target = Decoder(session.networks["target"], len(prompt) + length)
            first, written = target.forward(prompt, last=1)[0], []
            for _ in range(drafts):
                target.rollback(len(prompt))
                logits, draft = first, []
                while True:
                    u = float(torch.rand((), generator=session.rng, device=target.device))
                    draft.append(draw(nucleus(logits.softmax(-1), TOP_P), u))
                    if draft[-1] == target.eos or len(draft) > min(length - 1, (rung - 1) // drafts):
                        break
                    logits = target.forward(draft[-1:])[0]
                written += [*draft, *[PAD] * (length - len(draft))]
            outputs.append(written)
        return outputs
