"""Vocabulary expansion with random embeddings: the usual start of new tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.vocab import NEW_TOKENS, Tokens, expand_and_adapt, expanded, write_spelled


class RandomExpansion(Method):
    """The tokens and the adaptation of `vocab_expansion_lowres`; each new embedding is drawn at random.

    Every channel is a draw from the normal distribution with the mean and the standard deviation that the channel has
    over the old embeddings.
    """

    tasks = ("bilingual/stories",)
    baselines = ("source_vocabulary",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The target with more rows in its embeddings."""
        return {"student": expanded(session.clone("target"), NEW_TOKENS)}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Learn the tokens, draw, adapt."""

        def rows(tokens: Tokens, old: Tensor, texts: list[list[int]]) -> Tensor:
            noise = torch.randn(NEW_TOKENS, old.shape[1], generator=session.rng, device=session.device)
            return old.mean(0) + old.std(0) * noise

        return expand_and_adapt(session, rows)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        student, merges = session.networks["student"], session.state["merges"].tolist()
        size = len(student.get_parameter("model.embed_tokens.weight")) - NEW_TOKENS
        return write_spelled(student, Tokens(merges, size), batch, rung)
