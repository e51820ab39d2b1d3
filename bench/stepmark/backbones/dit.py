"""A small conditional diffusion transformer (diffusers' DiTTransformer2DModel), called as the UNets beside it are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.unet import TRAIN_TIMESTEPS, train_denoiser
from stepmark.task import load_split


class ConditionalDiT(nn.Module):
    """A `diffusers.DiTTransformer2DModel`: images in patches as tokens, time and class in adaptive layer norms.

    Args:
        size, channels: images are [B, channels, size, size].
        width, depth, heads: of the transformer.
        patch: pixels of a token's side.
        kinds: classes; one more row of the table stands for "no condition" (guidance).

    `dit` is the wrapped model; its prediction is a flow, v = eps - x0. The gates of the layer norms and the last layer
    start at zero, so that every block starts as the identity (Peebles and Xie 2023, section 3.2).
    """

    prediction = "flow"

    def __init__(
        self, size: int, channels: int, width: int, depth: int, heads: int, kinds: int, patch: int = 2
    ) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel  # seconds to import: only when a network is built

        transformer: Any = DiTTransformer2DModel  # whose parts are not in its type
        self.dit = transformer(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=channels,
            num_layers=depth,
            sample_size=size,
            patch_size=patch,
            num_embeds_ada_norm=kinds,
        )
        self.kinds, self.patch = kinds, patch
        blocks = self.dit.transformer_blocks
        for block in blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0  # the trainer leaves conditions out, from its own stream
        for last in (*(block.norm1.linear for block in blocks), self.dit.proj_out_1, self.dit.proj_out_2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def null_condition(self, condition: Tensor) -> Tensor:
        """The condition of the unconditional branch, in the shape of `condition`."""
        return torch.full_like(condition, self.kinds)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """v [B, C, H, W] for x [B, C, H, W], t float [B] in [0, 1], condition int64 [B]."""
        return self.dit(x, t * TRAIN_TIMESTEPS, condition, return_dict=False)[0]


def _build(seed: int, size: int, channels: int, width: int, depth: int, heads: int, kinds: int) -> ConditionalDiT:
    """An untrained transformer whose first weights depend on the seed only."""
    with torch.random.fork_rng(devices=[]):  # diffusers draws initial weights from the global stream
        torch.manual_seed(seed)
        return ConditionalDiT(size, channels, width, depth, heads, kinds)


def _train_digits(network: nn.Module, progress: Progress, seed: int) -> dict[str, float]:
    return train_denoiser(network, load_split("digits", "train"), 1800, seed, progress, clip=1.0)


RECIPES: dict[str, Recipe] = {
    "digits_dit": Recipe(
        partial(_build, 600, 8, 1, 64, 6, 4, 10), partial(_train_digits, seed=601), "digits, rectified-flow DiT"
    ),
}
