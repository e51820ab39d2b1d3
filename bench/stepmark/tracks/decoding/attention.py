"""Causal attention over a text that comes in parts, for language models that a method builds and trains itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD = 32  # channels of a head


class States:
    """What a model holds of the text so far: by block, tensors that the block itself chooses."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[Tensor, ...]] = {}
        self.length = 0


class CausalAttention(nn.Module):
    """Multi-head attention with rotary positions, 4 width^2 weights. It holds the keys and values of the whole text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, 3 * width, bias=False)
        self.leave = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, states: States | None, layer: int) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, length, width = x.shape
        start = 0 if states is None else states.length
        queries, keys, values = self.enter(x).view(batch, length, 3, width // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        angles = torch.arange(start, start + length, device=x.device)[:, None] * 10_000.0 ** -torch.linspace(
            0, 1, HEAD // 2 + 1, device=x.device
        )[:-1].to(x)
        queries, keys = (_turned(part, angles) for part in (queries, keys))
        if states is not None:
            if layer in states.held:
                keys, values = (
                    torch.cat((old, new), 2) for old, new in zip(states.held[layer], (keys, values), strict=True)
                )
            states.held[layer] = keys.clone(), values.clone()
        seen = torch.ones(length, start + length, dtype=torch.bool, device=x.device).tril(start)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        return self.leave(attended.transpose(1, 2).reshape(x.shape))


def _turned(states: Tensor, angles: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
