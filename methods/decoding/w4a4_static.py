"""Weights and activations of 4 bits, rounded to nearest, with one step for a whole tensor, fixed beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stepmark.backbones.lm import EOS, encode
from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.models import LEVELS, Int4Linear, activations_of, to_integers, write_greedily


class W4A4Static(Method):
    """4-bit integers for weights and activations, one step for all inputs of a projection, from calibration texts.

    s = max |X| / 7 over 64 texts, w_i for each output of the weights with a searched clip. Nothing is measured while
    decoding, and one channel that stands out takes all seven levels for good.
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

    def prepare(self, session: Session) -> None:
        """Find the greatest input of each projection."""
        student, data = session.networks["student"], session.train
        chosen = list(zip(data["prompt"], data["target"], strict=True))[: session.scale(64, 4)]
        texts = [[*encode(f"{prompt} {text}"), EOS] for prompt, text in chosen]
        names = tuple(name for name, part in student.named_modules() if isinstance(part, Int4Linear))
        for name, states in activations_of(session.networks["target"], texts, names).items():
            student.get_submodule(name).input_step.fill_(states.abs().max() / LEVELS)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        return write_greedily(session.networks["student"], batch, rung)
