"""MergeQuant: 4-bit static quantisation by channel, its steps folded into norms and weights (Wang et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones.lm import EOS, encode
from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.models import LEVELS, Int4Linear, activations_of, to_integers, write_greedily

RANK, COPIES = 8, 4  # rank of the compensation; channels that are split off others, and pruned in their stead
# What follows each norm, and what follows none.
GROUPS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
OTHERS = ("self_attn.o_proj", "mlp.down_proj")


class RoundingNorm(nn.Module):
    """An RMS norm whose outputs are integers: round(x_j gamma_j / (s_j rms(x))), of the chosen channels in their order."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.epsilon: float = norm.variance_epsilon
        self.gain = nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
        self.register_buffer("channels", torch.arange(len(self.gain)))

    def forward(self, x: Tensor) -> Tensor:
        """Floats [.., D] -> int8 [.., D]."""
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)
        return (normed[..., self.channels] * self.gain).round().clamp(-LEVELS, LEVELS).to(torch.int8)


def channel_steps(states: Tensor) -> Tensor:
    """Steps [D] of the channels of [N, D], each clipped where its own squared error is least (adaptive clipping)."""
    greatest = states.abs().amax(0).clamp(min=1e-8)
    best, steps = torch.full_like(greatest, float("inf")), greatest / LEVELS
    for share in torch.linspace(0.4, 1.0, 13).tolist():
        step = share * greatest / LEVELS
        error = (((states / step).round().clamp(-LEVELS, LEVELS) * step - states) ** 2).sum(0)
        steps, best = torch.where(error < best, step, steps), torch.minimum(error, best)
    return steps


def reconstruct(folded: Tensor, importance: Tensor, copies: int) -> tuple[Tensor, Tensor]:
    """Split the channels that stand out, prune as many of the least important: (channels [D], parts [D]).

    A channel in m parts stands m times in `channels`, and 1 / m of its weights goes with each part. One part more goes to
    whichever channel has the greatest weights per part, `copies` times.

    Args:
        folded: [out, D] weights with the steps of their inputs. importance: [D], mean square that a channel adds.
    """
    size = folded.abs().amax(0)
    pruned = set(importance.argsort()[:copies].tolist())
    parts = torch.ones(len(size), dtype=torch.long)
    for _ in range(copies):
        parts[int((size / parts).argmax())] += 1
    channels = [j for j in range(len(size)) if j not in pruned or parts[j] > 1 for _ in range(int(parts[j]))]
    chosen = torch.tensor(channels[: len(size)])
    return chosen, parts[chosen]


class MergeQuant(Method):
    """MergeQuant: weights and activations of 4 bits, steps fixed beforehand for each channel, at no cost while decoding.

    A step for each input channel cannot be taken out of a sum of integer products. So it is folded away beforehand
    (quantisation step migration): with X_j = gamma_j x_j / rms(x) behind a norm and steps s_j,

        Z_j = round(X_j / s_j) = round((gamma_j / s_j) x_j / rms(x))      the norm's gain becomes gamma_j / s_j
        Y_i = sum_j W_ij s_j Z_j = w_i sum_j V_ij Z_j                     V = integers of W diag(s), with steps w_i

    and nothing is quantised or scaled per token any more. Steps: max |X_j| / 7 over calibration texts, times a clip ratio
    of each channel with the least error (adaptive clipping). Folded columns that stand out from the others would widen the
    steps w_i: these channels are split into m equal parts, and as many of the least important are pruned, so that the
    width stays (dimensional reconstruction). Projections behind no norm (attention output, down) take steps of each token.
    A branch of rank 8 makes up for the error of each projection.

    Weights lie as two integers to a byte, and products are products of integers; embedding, output head, attention scores
    and cache stay in floats. Differs from the paper: the branch is solved in closed form on the calibration texts, where
    the paper trains one; parts are given to the greatest folded columns, 4 in all, as outlier channels have small weights
    here and 128 channels have little to prune; weights are rounded to nearest under a searched clip.
    """

    paper = Paper(
        id="mergequant",
        title="MergeQuant: Accurate 4-bit Static Quantization of Large Language Models by Channel-wise Calibration",
        authors="Jinguang Wang, Jingyu Wang, Haifeng Sun, Tingting Yang, Zirui Zhuang, Wanyi Ning, Yuexi Yin, Qi Qi, "
        "Jianxin Liao",
        year=2025,
        arxiv="2503.07654",
    )
    tasks = ("outliers/words",)
    baselines = ("autoregressive", "w4a4_dynamic", "w4a4_static", "w4a4_smooth")
    claims = (
        Claim(
            "accuracy[mergequant,40] >= accuracy[autoregressive,40] - 0.013",
            says="at most 1.3 points below full precision",
        ),
        Claim(
            "accuracy[mergequant,40] > accuracy[w4a4_static,40]",
            says="better than static steps for whole tensors",
        ),
        Claim(
            "accuracy[mergequant,40] >= accuracy[w4a4_dynamic,40] - 0.02",
            says="as good as steps taken anew for every token",
        ),
        Claim(
            "accuracy[mergequant,40] >= accuracy[w4a4_smooth,40] - 0.02",
            says="as good as smoothed channels with steps taken anew for every token",
        ),
        Claim(
            "latency_ms[mergequant,40] < latency_ms[w4a4_smooth,40]",
            says="faster than steps taken anew for every token",
        ),
        Claim(
            "1.77 * latency_ms[mergequant,40] <= latency_ms[autoregressive,40]",
            says="1.77 times as fast as full precision",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The target with rounding norms and integer projections."""
        student: Any = session.clone("target")
        for layer in student.model.layers:
            for norm in GROUPS:
                setattr(layer, norm, RoundingNorm(getattr(layer, norm)))
            for name in (*sum(GROUPS.values(), ()), *OTHERS):
                dense, (owner, _, own) = layer.get_submodule(name), name.rpartition(".")
                setattr(layer.get_submodule(owner), own, Int4Linear(dense.in_features, dense.out_features, RANK))
        return {"student": student}

    def prepare(self, session: Session) -> None:
        """Calibrate on 64 texts, layer by layer."""
        target, student, data = session.networks["target"], session.networks["student"], session.train
        chosen = list(zip(data["prompt"], data["target"], strict=True))[: session.scale(64, 4)]
        texts = [[*encode(f"{prompt} {text}"), EOS] for prompt, text in chosen]
        names = [name for norm, group in GROUPS.items() for name in (norm, group[0])] + list(OTHERS)
        for i, (dense, integer) in enumerate(zip(target.model.layers, student.model.layers, strict=True)):
            seen = activations_of(target, texts, tuple(f"model.layers.{i}.{name}" for name in names))
            states = {name: seen[f"model.layers.{i}.{name}"] for name in names}
            for norm, group in GROUPS.items():
                merge(dense, integer, norm, group, states[norm], states[group[0]])
            for name in OTHERS:
                x, weight, module = states[name], dense.get_submodule(name).weight, integer.get_submodule(name)
                module.store(*to_integers(weight, x.square().mean(0)))
                step = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / LEVELS
                module.correct((x / step).round() * step, x @ weight.t())

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        return write_greedily(session.networks["student"], batch, rung)


def merge(
    dense: nn.Module, integer: nn.Module, norm: str, group: tuple[str, ...], hidden: Tensor, normed: Tensor
) -> None:
    """Fold the steps of a norm's outputs into the norm and into the projections that follow it.

    Args:
        hidden, normed: [N, D], what went into the norm of the dense layer and what came out.
    """
    weights = [dense.get_submodule(name).weight for name in group]
    steps = channel_steps(normed)
    folded = torch.cat(weights) * steps
    power = normed.square().mean(0)
    channels, parts = reconstruct(folded, power * torch.cat(weights).square().sum(0), COPIES)
    rounding: Any = integer.get_submodule(norm)
    with torch.no_grad():
        rounding.channels.copy_(channels)
        rounding.gain.copy_((dense.get_submodule(norm).weight / steps)[channels])
    z = rounding(hidden).float()
    for name, weight in zip(group, weights, strict=True):
        module: Any = integer.get_submodule(name)
        module.store(*to_integers((weight * steps)[:, channels] / parts, z.square().mean(0)))
        module.correct(z, normed @ weight.t())
