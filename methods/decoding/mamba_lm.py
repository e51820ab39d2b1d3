"""Mamba (Gu and Dao 2023): a language model of selective state space blocks alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.moe import BLOCKS, WIDTH, MambaBlock, learn, next_words, snapshots


class MambaLm(Method):
    """Mamba blocks only, four of them: what `moe_mamba` is compared with at equal active parameters.

    Each is x + Mamba(norm x): a convolution over the last four words, a state space whose step sizes, inputs and outputs
    hang on the word (h_t = exp(D_t A) h_(t-1) + D_t B_t u_t, y_t = C_t h_t, algorithm 2 of the paper) and a gate. Its
    state does not grow with the text. Smaller than the paper's: width 64, state size 8.
    """

    tasks = ("learning/stories",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """One model for each rung."""
        return snapshots(session, lambda: [MambaBlock(WIDTH) for _ in range(BLOCKS)])

    def prepare(self, session: Session) -> None:
        """Train."""
        learn(session)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> Tensor:
        """Log-probabilities of the next words."""
        return next_words(session, batch, rung)
