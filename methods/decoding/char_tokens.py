"""Character-level tokens: every character is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.tokens import LanguageModel, Scheme, learn, read


class CharTokens(Method):
    """The character strategy of the paper of `mgpt`: a token is a character of the train split.

    Nothing is learnt but which characters there are; others fall back to the bytes of their UTF-8. The model spells every
    word, so that a text takes as many steps as it has characters, and a budget of tokens holds few demonstrations.
    """

    tasks = ("tokenisation/dialects",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The model, of one size whatever the tokens."""
        return {"lm": LanguageModel()}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Learn the tokens, then the model on them."""
        return learn(session, Scheme(characters=True))

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> dict[str, Tensor]:
        """Log-likelihoods of the lines and their numbers of tokens."""
        return read(session, batch, rung)
