"""MergeQuant: 4-bit static quantisation by channel, its steps folded into norms and weights (Wang et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from stepmark.backbones.lm import EOS, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.models import write_greedily

RANK, COPIES = 8, 4  # rank of the compensation; channels that are split off others, and pruned in their stead
LEVELS = 7  # integers -7 .. 7: four bits, symmetric
# What follows each norm, and what follows none.
GROUPS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
OTHERS = ("self_attn.o_proj", "mlp.down_proj")


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
    here and 128 channels have little to prune; weights are rounded to nearest under a searched clip; a channel's clip ratio
    is that of its own least error, where the paper takes the error of the layer's output.

    What limits it here: integers cost time on this processor, and at width 128 the low-rank branch costs more than the
    steps of each token that are saved. Rounding to nearest writes nothing right on channels that stand out so far, so that
    smoothing is the control that counts. The channels that stand out are gains of norms, which migration and smoothing
    alike take out whole: what splitting, pruning and clipping are worth no claim tells. Of 64 texts one is more than the
    paper's 1.3 points.

    Three controls have integer projections of the same kind, no branch, and weights whose clip counts the errors of all
    columns the same, where MergeQuant's weighs them by the mean square of their inputs: what claims show against
    `w4a4_smooth` is the worth of steps, branch and weighing together. `w4a4_dynamic`: each token's inputs have a step
    of their own, s_t = max_j |X_tj| / 7, found anew for every token and projection; one channel that stands out takes all
    seven levels. `w4a4_static`: one step for all inputs of a projection, max |X| / 7 over the calibration texts; nothing is
    measured while decoding, and one channel that stands out takes all levels for good. `w4a4_smooth` is SmoothQuant (Xiao
    et al., ICML 2023) at 4 bits: with f_j = sqrt(max |X_j| / max_i |W_ij|) the norm's gain is divided by f_j and the columns
    of the weights that follow are multiplied by it, which changes nothing before rounding; then steps of each token.
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
            "accuracy[mergequant,40] >= accuracy[autoregressive,40] - 0.013 "
            "and 1.77 * latency_ms[mergequant,*] <= latency_ms[autoregressive,*]",
            says="at most 1.3 points below full precision, at 1.77 times its speed",
            headline=True,
            setting="a CPU has no products of 4-bit integers: they are unpacked for every one, at this width in vain",
        ),
        Claim(
            "accuracy[mergequant,40] >= accuracy[autoregressive,40] - 0.013",
            says="at most 1.3 points below full precision",
        ),
        Claim(
            "accuracy[mergequant,40] > accuracy[w4a4_static,40] and accuracy[mergequant,40] > accuracy[w4a4_dynamic,40]",
            says="better than integers rounded to nearest, with a step for a whole tensor or for each token",
        ),
        Claim(
            "exact_match[mergequant,*] >= exact_match[w4a4_smooth,*] - 0.01",
            says="texts agree with full precision as often as with smoothed channels and steps taken anew for every token",
        ),
        Claim(
            "latency_ms[mergequant,*] < latency_ms[w4a4_smooth,*]",
            says="faster than steps taken anew for every token",
            setting="at width 128 the branch of rank 8 costs more than the steps of each token that it spares",
        ),
    )

    steps = "channels"  # of the inputs: "channels", folded away; "tokens", "tensor", "smoothed": see the controls
    variants = (
        Variant(
            "w4a4_dynamic",
            says="weights and activations of 4 bits, rounded to nearest, with a step of each token",
            steps="tokens",
            baselines=("autoregressive",),
        ),
        Variant(
            "w4a4_static",
            says="weights and activations of 4 bits, rounded to nearest, with one step for a whole tensor, fixed beforehand",
            steps="tensor",
            baselines=("autoregressive",),
        ),
        Variant(
            "w4a4_smooth",
            says="SmoothQuant at 4 bits: channels smoothed beforehand, then a step of each token",
            steps="smoothed",
            baselines=("autoregressive", "w4a4_dynamic"),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The target with integer projections, and with rounding norms where steps are those of channels."""
        student: Any = session.clone("target")
        for layer in student.model.layers:
            if self.steps == "channels":
                for norm in GROUPS:
                    setattr(layer, norm, RoundingNorm(getattr(layer, norm)))
            for name in (*sum(GROUPS.values(), ()), *OTHERS):
                dense, (owner, _, own) = layer.get_submodule(name), name.rpartition(".")
                integer = Int4Linear(dense.in_features, dense.out_features, RANK if self.steps == "channels" else 0)
                if self.steps != "channels":
                    integer.store(*to_integers(dense.weight.detach()))
                setattr(layer.get_submodule(owner), own, integer)
        return {"student": student}

    def prepare(self, session: Session) -> None:
        """Calibrate on 64 texts."""
        if self.steps == "tokens":
            return
        target, student, data = session.networks["target"], session.networks["student"], session.train
        chosen = list(zip(data["prompt"], data["target"], strict=True))[: session.scale(64, 4)]
        texts = [[*encode(f"{prompt} {text}"), EOS] for prompt, text in chosen]
        {"channels": merge_steps, "tensor": fix_steps, "smoothed": smooth}[self.steps](target, student, texts)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        return write_greedily(session.networks["student"], batch, rung)


# -- MergeQuant -----------------------------------------------------------------------------------------------------


def merge_steps(target: nn.Module, student: nn.Module, texts: list[list[int]]) -> None:
    """Calibrate norms and projections, layer by layer."""
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


# -- the controls -----------------------------------------------------------------------------------------------------


def fix_steps(target: nn.Module, student: nn.Module, texts: list[list[int]]) -> None:
    """One step for all inputs of a projection, by the greatest of them."""
    names = tuple(name for name, part in student.named_modules() if isinstance(part, Int4Linear))
    for name, states in activations_of(target, texts, names).items():
        student.get_submodule(name).input_step.fill_(states.abs().max() / LEVELS)


def smooth(target: nn.Module, student: nn.Module, texts: list[list[int]]) -> None:
    """Find the factors between norms and weights, and fold them."""
    for i, (dense, integer) in enumerate(zip(target.model.layers, student.model.layers, strict=True)):
        for norm, group in GROUPS.items():
            first = f"model.layers.{i}.{group[0]}"
            greatest = activations_of(target, texts, (first,))[first].abs().amax(0)
            weights = {name: dense.get_submodule(name).weight for name in group}
            columns = torch.cat(list(weights.values())).abs().amax(0)
            factor = (greatest / columns).clamp(min=1e-8).sqrt()
            with torch.no_grad():
                integer.get_submodule(norm).weight /= factor
            for name, weight in weights.items():
                integer.get_submodule(name).store(*to_integers(weight * factor))


# -- projections on integers ------------------------------------------------------------------------------------------


def _integer_products(left: tuple[int, ...], right: tuple[int, ...], *_: Any, **__: Any) -> int:
    """An integer multiply-add counts as one of floats does."""
    return 2 * left[0] * left[1] * right[1]


if torch.ops.aten._int_mm not in flop_registry:
    register_flop_formula(torch.ops.aten._int_mm)(_integer_products)


def to_integers(weight: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Integers int8 [out, in] and steps [out] of a matrix, each row clipped where its error is least.

    Args:
        weights: [in], how much an error of each column counts (mean square of its input); default: all the same.
    """
    weights = torch.ones_like(weight[0]) if weights is None else weights
    greatest = weight.abs().amax(1, keepdim=True).clamp(min=1e-8)
    best = torch.full_like(greatest, float("inf"))
    steps = greatest / LEVELS
    for share in torch.linspace(0.5, 1.0, 11).tolist():
        step = share * greatest / LEVELS
        error = (((weight / step).round().clamp(-LEVELS, LEVELS) * step - weight) ** 2 * weights).sum(1, keepdim=True)
        steps, best = torch.where(error < best, step, steps), torch.minimum(error, best)
    return (weight / steps).round().clamp(-LEVELS, LEVELS).to(torch.int8), steps[:, 0]


def pack(integers: Tensor) -> Tensor:
    """Integers int8 [out, in] of four bits, two to a byte: uint8 [out, in / 2]."""
    low, high = integers[:, ::2] & 15, integers[:, 1::2] & 15
    return (low | (high << 4)).view(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """What `pack` was given."""
    both = torch.stack((packed & 15, packed >> 4), -1).flatten(1).view(torch.int8)
    return (both ^ 8) - 8


class Int4Linear(nn.Module):
    """A linear map whose weights are 4-bit integers, two to a byte, with one step for each output.

    Inputs are integers already (int8, from a norm that rounds), or are rounded here: with the fixed `input_step` where it
    is not 0, else with a step of each token. Products and sums are those of integers (`torch._int_mm`, int32). An optional
    low-rank branch up (down x) in floats makes up for what rounding lost.
    """

    def __init__(self, inputs: int, outputs: int, rank: int = 0) -> None:
        """All zero: `store` fills it."""
        super().__init__()

        def fixed(values: Tensor) -> nn.Parameter:
            return nn.Parameter(values, requires_grad=False)  # a parameter, so that its bytes count as the model's

        self.packed = fixed(torch.zeros(outputs, inputs // 2, dtype=torch.uint8))
        self.steps, self.input_step = fixed(torch.zeros(outputs)), fixed(torch.zeros(()))
        self.down, self.up = fixed(torch.zeros(rank, inputs)), fixed(torch.zeros(outputs, rank))

    def store(self, integers: Tensor, steps: Tensor) -> None:
        """Take over integers [out, in] and steps [out]."""
        with torch.no_grad():
            self.packed.copy_(pack(integers))
            self.steps.copy_(steps)

    def forward(self, x: Tensor) -> Tensor:
        """[.., T, in], floats or int8 -> floats [.., T, out]."""
        scale: Tensor | float = 1.0
        if x.dtype != torch.int8:
            scale = self.input_step if self.input_step > 0 else x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / LEVELS
            x = (x / scale).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        rows = x.reshape(-1, x.shape[-1])
        found = torch._int_mm(rows, unpack(self.packed).t()) * self.steps
        if len(self.down):
            found = found + (rows.float() @ self.down.t()) @ self.up.t()
        return found.view(*x.shape[:-1], -1) * scale

    def correct(self, inputs: Tensor, outputs: Tensor) -> None:
        """Fit the low-rank branch to what is missing: reduced-rank regression of outputs on inputs.

        Args:
            inputs: rounded inputs [N, in] as the integers see them, times their step. outputs: [N, out], wanted.
        """
        missing = outputs - inputs @ (unpack(self.packed) * self.steps[:, None]).t()
        gram = inputs.t() @ inputs
        ridge = 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        full = torch.linalg.solve(gram + ridge, inputs.t() @ missing)
        directions = torch.linalg.svd(inputs @ full, full_matrices=False).Vh[: len(self.down)]
        with torch.no_grad():
            self.down.copy_((full @ directions.t()).t())
            self.up.copy_(directions.t())


# -- calibration ------------------------------------------------------------------------------------------------------


def activations_of(model: nn.Module, texts: list[list[int]], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Inputs of the modules `names` of a model on some texts: name -> [tokens, width]."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: found[name].append(given[0].flatten(0, -2))
        )
        for name in names
    ]
    device = next(model.parameters()).device
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([text], device=device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}
