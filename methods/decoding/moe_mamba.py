"""MoE-Mamba: Mamba blocks and switch layers in turn (Pioro et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.moe import BLOCKS, WIDTH, MambaBlock, SwitchLayer, learn, next_words, snapshots

EXPERTS = 8


class MoeMamba(Method):
    """Every second Mamba block gives way to a switch layer, of which a token uses one expert.

    x + Mamba(norm x), then x + Switch(norm x), and so on (section 3 of the paper, its figure 1). An expert is a ReLU
    network of inner width 3 d, 6 d^2 weights like the Mamba block in its place, so that a token meets as many parameters
    as in `mamba_lm`. Routing is top-1 with capacity factor 1 and a balance loss of weight 0.01. A Mamba block holds a
    state of constant size, a switch layer none.

    Differs from the paper: width 64, 4 blocks and 8 experts for 512, 16 and 32; state size 8; 480 training steps. While
    it reads contexts no token is dropped, so that what a token gets does not hang on others.

    What limits it here: with 480 steps each of eight experts sees an eighth of the words, and the stories of one grammar
    hold little that needs more parameters than a Mamba block has; what is learned by steps counts for more.
    """

    paper = Paper(
        id="moe_mamba",
        title="MoE-Mamba: Efficient Selective State Space Models with Mixture of Experts",
        authors="Maciej Pióro, Kamil Ciebiera, Krystian Król, Jan Ludziejewski, Michał Krutul, Jakub Krajewski, "
        "Szymon Antoniak, Piotr Miłoś, Marek Cygan, Sebastian Jaszczur",
        year=2024,
        arxiv="2401.04081",
    )
    tasks = ("learning/stories",)
    baselines = ("mamba_lm", "transformer_moe")
    claims = (
        Claim("loss[moe_mamba,480] < loss[mamba_lm,480]", says="a lower loss than Mamba after as many steps"),
        Claim("loss[moe_mamba,240] <= loss[mamba_lm,480]", says="Mamba's final loss in half the training steps"),
        Claim(
            "loss[moe_mamba,480] < loss[transformer_moe,480]",
            says="a lower loss than a Transformer with experts after as many steps",
        ),
        Claim(
            "2 * kv_bytes[moe_mamba,480] <= kv_bytes[transformer_moe,480]",
            says="half the memory of a Transformer's cache, on a text of at most 120 words",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """One model for each rung."""

        def mixers() -> list[nn.Module]:
            pairs = ((MambaBlock(WIDTH), SwitchLayer(WIDTH, 3 * WIDTH, EXPERTS)) for _ in range(BLOCKS // 2))
            return [mixer for pair in pairs for mixer in pair]

        return snapshots(session, mixers)

    def prepare(self, session: Session) -> None:
        """Train, with the balance loss of the switch layers."""
        learn(session, balance=0.01)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> Tensor:
        """Log-probabilities of the next words."""
        return next_words(session, batch, rung)
