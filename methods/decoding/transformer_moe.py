"""A Transformer with switch layers (Fedus et al. 2022), over the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.moe import BLOCKS, WIDTH, CausalAttention, SwitchLayer, learn, next_words, snapshots

EXPERTS = 8


class TransformerMoe(Method):
    """Attention and switch layers in turn, at the active parameters of `moe_mamba`.

    Attention has 4 d^2 weights and an expert, of inner width 4 d, 8 d^2: together those of two Mamba blocks. The cache
    of keys and values grows with the text.
    """

    tasks = ("learning/stories",)
    baselines = ("mamba_lm",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """One model for each rung."""

        def mixers() -> list[nn.Module]:
            pairs = ((CausalAttention(WIDTH), SwitchLayer(WIDTH, 4 * WIDTH, EXPERTS)) for _ in range(BLOCKS // 2))
            return [mixer for pair in pairs for mixer in pair]

        return snapshots(session, mixers)

    def prepare(self, session: Session) -> None:
        """Train, with the balance loss of the switch layers."""
        learn(session, balance=0.01)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> Tensor:
        """Log-probabilities of the next words."""
        return next_words(session, batch, rung)
