"""Adapters that learn guidance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stepmark.backbones.unet import TRAIN_TIMESTEPS
from stepmark.tracks.image.training import sinusoids


class GuidanceAdapter(nn.Module):
    """Cross-attention from features [B, C, H, W] to tokens [B, n, width], one head; gives zero until it is trained."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, width, bias=False)
        self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, channels, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        score = self.query(features.flatten(2).mT) @ self.key(tokens).mT / math.sqrt(tokens.shape[-1])
        return self.out(score.softmax(-1) @ self.value(tokens)).mT.reshape(features.shape)


class AdaptedUNet(nn.Module):
    """A frozen UNet with a `GuidanceAdapter` behind every residual block, told time, condition and guidance scale.

    Called as network(x, t, condition, scale) with scale float [B]. Adapters share three small projections of the
    time and condition as the UNet itself embeds them, and of sinusoids of the scale.
    """

    def __init__(self, base: nn.Module, width: int = 10) -> None:
        super().__init__()
        from diffusers.models.resnet import ResnetBlock2D

        self.base, self.prediction = base.requires_grad_(False), base.prediction
        features = base.table.embedding_dim
        self.embed = nn.ModuleList(nn.Linear(n, width) for n in (features, features, 32))
        blocks = [part for part in base.unet.modules() if isinstance(part, ResnetBlock2D)]
        self.adapters = nn.ModuleList(GuidanceAdapter(block.out_channels, width) for block in blocks)
        self._tokens = torch.zeros(0)
        for block, adapter in zip(blocks, self.adapters, strict=True):
            block.register_forward_hook(
                lambda _, inputs, output, adapter=adapter: output + adapter(output, self._tokens)
            )

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, scale: Tensor) -> Tensor:
        base = self.base
        step = t * TRAIN_TIMESTEPS if self.prediction == "flow" else t
        time = base.unet.time_embedding(base.unet.time_proj(step))
        parts = (time, base.embed(base.table(condition)), sinusoids(scale, top=10.0))
        self._tokens = torch.stack([embed(part) for embed, part in zip(self.embed, parts, strict=True)], 1)
        return base(x, t, condition)
