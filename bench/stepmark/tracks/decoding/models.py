"""Track decoding, tasks of other models: how much cheaper may the model itself become, and what does it still write?

Tasks `converted/...` and `outliers/...` give a target that a method turns into a cheaper one of its own (sparse
activations, integers): networks called `student` count against the rung as the target does. Inputs, outputs and metrics
are those of the track, so that `exact_match` says how often the cheaper model writes what the target would have written.
In `outliers/...` a few channels of the normalised hidden states are far greater than the others, as in large models.

The parts that methods share stand below: plain decoding with any model (`write_greedily`), layers whose zero activations
cost nothing (`SparseLinear`, `SparseMlp`, `RectifiedNorm`, `rectify`), and linear maps on 4-bit integers (`Int4Linear`,
`to_integers`, `activations_of`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

from stepmark.task import Task
from stepmark.tracks.decoding import check as check
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import inputs as inputs
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding import reference_call as reference_call
from stepmark.tracks.decoding import score as score
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.speculation import speculate

TASKS = (
    Task(
        id="converted/words",
        version=1,
        summary="Greedy decoding of word problems by a model made from a 4-layer target",
        dataset="words",
        backbones={"target": "lm_target"},
        reference="target",
        bounded=("target", "student"),
        unit="target forwards",
        rungs=(16, 40),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=64,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
    Task(
        id="outliers/words",
        version=1,
        summary="Greedy decoding of word problems, 4-layer target whose normalised states have outlier channels",
        dataset="words",
        backbones={"target": "lm_outliers"},
        reference="target",
        bounded=("target", "student"),
        unit="target forwards",
        rungs=(16, 40),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=64,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
    Task(
        id="converted/stories",
        version=1,
        summary="Greedy decoding of stories with a refrain by a model made from a 4-layer target",
        dataset="stories",
        backbones={"target": "lm_target"},
        reference="target",
        bounded=("target", "student"),
        unit="target forwards",
        rungs=(32, 96),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
)


def write_greedily(model: nn.Module, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
    """New token ids per prompt by plain decoding with a model: prefill, then one token per forward."""
    outputs = []
    for prompt, room, temperature in zip(batch["prompt"], batch["max_new_tokens"], batch["temperature"], strict=True):
        decoder = Decoder(model, len(prompt) + room)
        outputs.append(speculate(decoder, prompt, room, rung, temperature, lambda tokens, most: ([], None)))
    return outputs


# -- sparse activations ---------------------------------------------------------------------------------------------


class SparseLinear(nn.Module):
    """A linear map without bias. For a single token only the columns of the weights that meet no zero are read."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.weight: nn.Parameter = dense.weight

    def forward(self, x: Tensor) -> Tensor:
        """[.., T, in] -> [.., T, out]."""
        if x.numel() > x.shape[-1]:
            return F.linear(x, self.weight)
        row = x.flatten()
        live = row.nonzero()[:, 0]
        return (self.weight.index_select(1, live) @ row[live]).view(*x.shape[:-1], -1)


class SparseMlp(nn.Module):
    """A gated feed-forward block with ReLU in place of SiLU: down(relu(gate x) * up x).

    For a single token the rows of `up` and the columns of `down` of neurons whose gate is shut are not read, nor are
    the columns of `gate` and `up` that meet a zero of x.
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = SparseLinear(dense.gate_proj), SparseLinear(dense.up_proj)
        self.down_proj = SparseLinear(dense.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        """[.., T, D] -> [.., T, D]."""
        gate = self.gate_proj(x).relu()
        if x.numel() > x.shape[-1]:
            return self.down_proj(gate * self.up_proj(x))
        row, live = x.flatten(), gate.flatten().nonzero()[:, 0]
        seen = row.nonzero()[:, 0]
        opened = self.up_proj.weight.index_select(0, live).index_select(1, seen) @ row[seen]
        found = self.down_proj.weight.index_select(1, live) @ (gate.flatten()[live] * opened)
        return found.view(x.shape)


class RectifiedNorm(nn.Module):
    """A norm and a ReLU after it, which `on` switches."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.on = norm, True

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] -> [.., D]."""
        return self.norm(x).relu() if self.on else self.norm(x)


def rectify(model: nn.Module) -> nn.Module:
    """Put ReLUs into a Llama, in place: in the gates, and after the norms before attention and feed-forward."""
    for layer in model.model.layers:
        layer.mlp = SparseMlp(layer.mlp)
        layer.input_layernorm = RectifiedNorm(layer.input_layernorm)
        layer.post_attention_layernorm = RectifiedNorm(layer.post_attention_layernorm)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, SparseLinear(getattr(layer.self_attn, name)))
    return model


# -- integers -------------------------------------------------------------------------------------------------------

LEVELS = 7  # integers -7 .. 7: four bits, symmetric


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
