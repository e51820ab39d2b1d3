"""What tests of masked-diffusion language models share: small languages with exact posteriors, and random networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones import mdlm
from stepmark.backbones.lm import VOCABULARY
from stepmark.tracks.diffusion_lm import MASK

V = len(VOCABULARY)
A, B, C = 3, 4, 5  # words of small languages


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact_denoiser(language: dict[tuple[int, ...], float]) -> Any:
    """The posterior of each position given the visible words of a small language, as logits [B, L, V]."""
    words = torch.tensor(list(language))
    weights = torch.tensor(list(language.values()), dtype=torch.float64)

    def denoise(x: Tensor) -> Tensor:
        fits = ((x[:, None] == words) | (x[:, None] == MASK)).all(2).double() * weights
        p = torch.einsum("bn,nlv->blv", fits / fits.sum(1, keepdim=True), nn.functional.one_hot(words, V).double())
        return p.log()

    return denoise


def tiny(causal: bool, seed: int = 0) -> Any:
    """A random network of the backbones' kind, its weights large enough for attention to matter."""
    model = mdlm.build(32, 2, seed, causal)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval().requires_grad_(False)
