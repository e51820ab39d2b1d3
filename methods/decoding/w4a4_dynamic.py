"""Weights and activations of 4 bits, rounded to nearest, with a step of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.models import Int4Linear, to_integers, write_greedily


class W4A4Dynamic(Method):
    """4-bit integers for weights and activations, each token's inputs scaled by their own greatest value.

    Y = s_t w_i sum_j V_ij round(X_tj / s_t) with s_t = max_j |X_tj| / 7, found anew for every token and projection. One
    step for each output of the weights, with a searched clip. One channel that stands out takes all seven levels.
    """

    tasks = ("outliers/words",)
    baselines = ("autoregressive",)

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The target with integer projections."""
        student: Any = session.clone("target")
        for layer in student.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, dense in list(block.named_children()):
                    if isinstance(dense, nn.Linear):
                        integer = Int4Linear(dense.in_features, dense.out_features)
                        integer.store(*to_integers(dense.weight.detach()))
                        setattr(block, name, integer)
        return {"student": student}

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        return write_greedily(session.networks["student"], batch, rung)
