"""Adaptation to a language without new tokens: the source tokenizer spells every word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.vocab import Tokens, adapt, texts_of, write_spelled


class SourceVocabulary(Method):
    """The target, trained on with the texts of `vocab_expansion_lowres` in its own tokens: letters.

    As many texts a step and as many steps, which take more tokens here, so more computation.
    """

    tasks = ("bilingual/stories",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """A copy of the target."""
        return {"student": session.clone("target")}

    def prepare(self, session: Session) -> None:
        """Adapt."""
        adapt(session, texts_of(session))

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        return write_spelled(session.networks["student"], Tokens([], 0), batch, rung)
