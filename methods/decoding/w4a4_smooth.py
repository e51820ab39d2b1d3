"""Weights and activations of 4 bits with a step of each token, after channels were smoothed (Xiao et al., ICML 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stepmark.backbones.lm import EOS, encode
from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.models import Int4Linear, activations_of, to_integers, write_greedily

GROUPS = {
    "input_layernorm": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "post_attention_layernorm": ("mlp", ("gate_proj", "up_proj")),
}


class W4A4Smooth(Method):
    """SmoothQuant at 4 bits: great channels behind the norms are made smaller and their weights greater, beforehand.

    f_j = sqrt(max |X_j| / max_i |W_ij|) over 64 calibration texts; the norm's gain is divided by f_j, the columns of the
    weights that follow are multiplied by it, which changes nothing before rounding. Then each token's inputs have a step
    of their own, found while decoding, and each output of the weights one with a searched clip.
    """

    tasks = ("outliers/words",)
    baselines = ("autoregressive", "w4a4_dynamic")

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
        """Find the factors and fold them."""
        target, student, data = session.networks["target"], session.networks["student"], session.train
        chosen = list(zip(data["prompt"], data["target"], strict=True))[: session.scale(64, 4)]
        texts = [[*encode(f"{prompt} {text}"), EOS] for prompt, text in chosen]
        for i, (dense, integer) in enumerate(zip(target.model.layers, student.model.layers, strict=True)):
            for norm, (block, names) in GROUPS.items():
                first = f"model.layers.{i}.{block}.{names[0]}"
                greatest = activations_of(target, texts, (first,))[first].abs().amax(0)
                weights = {name: dense.get_submodule(f"{block}.{name}").weight for name in names}
                columns = torch.cat(list(weights.values())).abs().amax(0)
                factor = (greatest / columns).clamp(min=1e-8).sqrt()
                with torch.no_grad():
                    integer.get_submodule(norm).weight /= factor
                for name, weight in weights.items():
                    integer.get_submodule(f"{block}.{name}").store(*to_integers(weight * factor))

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        return write_greedily(session.networks["student"], batch, rung)
