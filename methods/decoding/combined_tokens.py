"""Byte-pair encoding with a marker for capitals, single digits, punctuation and spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.tokens import LanguageModel, Scheme, learn, read


class CombinedTokens(Method):
    """The combined strategy of the paper of `mgpt`: as `arithmetic_tokens`, and so do punctuation marks and white space.

    No token holds the space before its word, so that a word is the same at the start of a line and within it; every
    space is a token to predict and run.
    """

    tasks = ("tokenisation/dialects",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The model, of one size whatever the tokens."""
        return {"lm": LanguageModel()}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Learn the tokens, then the model on them."""
        return learn(session, Scheme(capitals=True, digits=True, punctuation=True))

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> dict[str, Tensor]:
        """Log-likelihoods of the lines and their numbers of tokens."""
        return read(session, batch, rung)
