"""A transformer over the tokens of several pictures at once: of a clip's frames, or of a picture and those that it is to follow.

Every picture is a frame of its own, with its own time and place, and all tokens look at each other. There is no text. The
blocks are those of diffusion transformers with adaptive norms (Peebles and Xie 2023), of layers of diffusers, with one table of
shifts and scales for all of them (Chen et al. 2023).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PATCH, SIDE = 2, 4  # latents along a side of a token, tokens along a side of a frame
TOKENS = SIDE**2  # of a frame


def patched(frames: Tensor) -> Tensor:
    """Tokens [B, 16 F, 4 C] of frames [B, F, C, 8, 8], frame after frame, row after row."""
    some = frames.unflatten(4, (SIDE, PATCH)).unflatten(3, (SIDE, PATCH))  # [B, F, C, 4, 2, 4, 2]
    return some.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)


def unpatched(tokens: Tensor) -> Tensor:
    """Frames [B, F, C, 8, 8] of tokens [B, 16 F, 4 C]: the inverse of `patched`."""
    some = tokens.unflatten(1, (-1, SIDE, SIDE)).unflatten(-1, (-1, PATCH, PATCH))  # [B, F, 4, 4, C, 2, 2]
    return some.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)


def waves(values: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """Sines and cosines [..., width] of values [...] at width / 2 rates from 1 to 1 / longest."""
    rates = torch.exp(torch.arange(width // 2, device=values.device) * (-math.log(longest) / (width // 2)))
    angles = values.unsqueeze(-1) * rates.to(values.dtype)
    return torch.cat([angles.sin(), angles.cos()], -1)


class Block(nn.Module):
    """Self-attention and a perceptron, each behind a norm with a shift, a scale and a gate by token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        from diffusers.models.attention import FeedForward
        from diffusers.models.attention_processor import Attention

        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = Attention(query_dim=width, heads=heads, dim_head=width // heads, bias=True)
        self.ff = FeedForward(width, activation_fn="gelu-approximate")
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x: Tensor, time: Tensor, further: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens x [B, n, width] after the block, and what its attention looked at; time [B, n, 6, width]. further [B, m,
        width]: what it also looks at."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (self.table + time).unbind(-2)
        seen = self.norm(x) * (1 + scale) + shift
        both = seen if further is None else torch.cat([seen, further], 1)
        x = x + gate * self.attn(seen, encoder_hidden_states=both)
        return x + gate_ff * self.ff(self.norm(x) * (1 + scale_ff) + shift_ff), seen


class TokenTransformer(nn.Module):
    """A velocity eps - x0 [B, F, 4, 8, 8] for frames [B, F, C, 8, 8] in patches of 2x2, called as
    network(frames, times [B, F], places).

    Args:
        channels: C. width, depth, heads: of the transformer.
        tokens: further tokens that it has learnt, of which a call may ask for one.

    Places int64 [F, 3] say of each frame its number in time, and how many tokens it lies below and beside the first one.
    """

    prediction = "flow"

    def __init__(self, channels: int = 4, width: int = 96, depth: int = 6, heads: int = 4, tokens: int = 0) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(PATCH**2 * channels, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.last = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, PATCH**2 * 4)
        self.tokens = nn.Parameter(torch.randn(tokens, width) * 0.02)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        frames: Tensor,
        times: Tensor,
        places: Tensor,
        token: Tensor | None = None,
        further: Sequence[Tensor] | None = None,
        keep: bool = False,
    ) -> Any:
        """The velocity of every frame; with `keep`, what the attention of each block looked at, [B, n, width].

        token: int64 [B], which of the learnt tokens each row is told. further: of each block, what it also looks at.
        """
        x = self.embed(patched(frames)) + self._place(places).to(frames.dtype)
        time = self.time(waves(1000 * times, self.width)).repeat_interleave(TOKENS, 1)  # [B, 16 F, width]
        if token is not None:
            x, time = torch.cat([x, self.tokens[token][:, None]], 1), torch.cat([time, time[:, :1]], 1)
        levels, kept = self.modulate(time).unflatten(-1, (6, -1)), []
        for block, more in zip(self.blocks, further or itertools.repeat(None), strict=False):
            x, seen = block(x, levels, more)
            kept.append(seen)
        if keep:
            return kept
        n = len(times[0]) * TOKENS
        shift, scale = self.last(nn.functional.silu(time[:, :n])).chunk(2, -1)
        return unpatched(self.out(self.blocks[0].norm(x[:, :n]) * (1 + scale) + shift))

    def _place(self, places: Tensor) -> Tensor:
        """Sines and cosines of every token's place [16 F, width]: a third of the width for each coordinate."""
        within = torch.cartesian_prod(*(torch.arange(SIDE, device=places.device),) * 2)  # [16, 2]: row, column
        at = places[:, None].repeat(1, TOKENS, 1)
        at[..., 1:] += within
        return torch.cat([waves(each, self.width // 3) for each in at.flatten(0, 1).double().unbind(-1)], -1)


class Routed(nn.Module):
    """A linear layer and low-rank adapters of some frames: base(x) + B A x on the tokens of a frame, B zero at first.

    Args:
        ranks: frame -> rank of its adapter; other frames have none.
    """

    def __init__(self, base: nn.Linear, ranks: Mapping[int, int]) -> None:
        super().__init__()
        self.base = base
        like: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.ModuleDict({str(k): nn.Linear(base.in_features, r, **like) for k, r in ranks.items()})
        self.up = nn.ModuleDict({str(k): nn.Linear(r, base.out_features, **like) for k, r in ranks.items()})
        for layer in self.up.values():
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            self.up[str(k)](self.down[str(k)](part)) if str(k) in self.up else None
            for k, part in enumerate(x.split(TOKENS, 1))
        ]
        found = self.base(x)
        return torch.cat(
            [y if part is None else y + part for y, part in zip(found.split(TOKENS, 1), parts, strict=True)], 1
        )


def route(network: TokenTransformer, ranks: Mapping[int, int]) -> TokenTransformer:
    """The network, changed in place: all projections of its attention have adapters of some frames. Nothing but these learns."""
    network.requires_grad_(False)
    for block in network.blocks:
        for name in ("to_q", "to_k", "to_v"):
            setattr(block.attn, name, Routed(getattr(block.attn, name), ranks))
        block.attn.to_out[0] = Routed(block.attn.to_out[0], ranks)
    return network
