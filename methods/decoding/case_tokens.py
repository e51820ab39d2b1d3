"""Byte-pair encoding of small letters, with a marker for capitals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.tokens import LanguageModel, Scheme, learn, read


class CaseTokens(Method):
    """The case strategy of the paper of `mgpt`: a capital is a special token and its small letter.

    A word has the same tokens wherever it stands, which a capital would change, and the vocabulary has room for others.
    The marker is a token that the model must predict and run, and it parts a capitalised word from the space before it.
    Capitals whose small letter does not give them back stay, and a marker in the text itself is doubled, so that every
    text can be told from its tokens.
    """

    tasks = ("tokenisation/dialects",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The model, of one size whatever the tokens."""
        return {"lm": LanguageModel()}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Learn the tokens, then the model on them."""
        return learn(session, Scheme(capitals=True))

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> dict[str, Tensor]:
        """Log-likelihoods of the lines and their numbers of tokens."""
        return read(session, batch, rung)
