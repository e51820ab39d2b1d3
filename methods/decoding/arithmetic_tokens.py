"""Byte-pair encoding with a marker for capitals and single digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.tokens import LanguageModel, Scheme, learn, read


class ArithmeticTokens(Method):
    """The arithmetic strategy of the paper of `mgpt`: as `case_tokens`, and numbers go digit by digit.

    Digits and the signs of arithmetic are cut off before pairs are counted, so that none of them is ever part of a longer
    token: a number is read and written in the places of its digits, as sums are worked out.
    """

    tasks = ("tokenisation/dialects",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The model, of one size whatever the tokens."""
        return {"lm": LanguageModel()}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Learn the tokens, then the model on them."""
        return learn(session, Scheme(capitals=True, digits=True))

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> dict[str, Tensor]:
        """Log-likelihoods of the lines and their numbers of tokens."""
        return read(session, batch, rung)
