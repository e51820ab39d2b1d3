"""Denoisers of colour and depth together: the network of RGB images with four channels instead of three.

Only the first and the last convolution differ from those of an RGB network (Papa et al. 2024): depth, scaled to the range
of the colours, is one more channel, and noise is added to and predicted for all four.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.unet import ConditionalUNet, alphas_cumprod, train_denoiser
from stepmark.task import load_split


def network_of(channels: int, seed: int = 700) -> ConditionalUNet:
    """An untrained network of pictures [B, channels, 16, 16], predicting noise; nothing is named by a condition."""
    with torch.random.fork_rng(devices=[]):  # diffusers draws initial weights from the global stream
        torch.manual_seed(seed)
        return ConditionalUNet(16, channels, (32, 64), 1, "epsilon", patch=2, attention=True)


@torch.no_grad()
def noise_loss(network: nn.Module, pairs: Tensor) -> float:
    """Mean squared error of the predicted noise on pairs, at the same times and noise for every network."""
    draw = torch.Generator().manual_seed(702)
    signal = alphas_cumprod().float()
    found = []
    for part in pairs.split(100):
        index = torch.randint(len(signal), (len(part),), generator=draw)
        eps = torch.randn(part.shape, generator=draw)
        abar = signal[index].view(-1, 1, 1, 1)
        x_t = abar.sqrt() * part + (1 - abar).sqrt() * eps
        condition = torch.zeros(len(part), dtype=torch.int64)
        found.append((network(x_t, index.float(), condition) - eps).square().mean((1, 2, 3)))
    return float(torch.cat(found).mean())


def _train(network: nn.Module, progress: Progress) -> dict[str, float]:
    """Trained on the real pairs and their mirror images alone. The report says how far it only knows them by heart."""
    assert isinstance(network, ConditionalUNet)
    real = load_split("scenes16", "train")
    both = torch.cat([real["x0"], real["x0"].flip(3)])
    data = {"x0": both, "condition": real["condition"].repeat(2)}
    report = train_denoiser(network, data, STEPS, 701, progress, ema=0.999, drop=0.0, clip=1.0)
    held_out = load_split("scenes16", "test")["x0"][:400]
    return report | {"loss_train": noise_loss(network, both), "loss_held_out": noise_loss(network, held_out)}


STEPS = 6000

RECIPES: dict[str, Recipe] = {
    "scenes16_rgbd": Recipe(
        partial(network_of, 4), _train, "scenes16, DDPM UNet of colour and depth (noise prediction)"
    ),
}
