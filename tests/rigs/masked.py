"""What tests of masked-diffusion language models share: small languages known exactly, random networks, stories."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones import mdlm
from stepmark.backbones.lm import VOCABULARY, encode
from stepmark.meter.counts import Ledger, watch
from stepmark.task import load_split
from stepmark.tracks import diffusion_lm as track
from stepmark.tracks.diffusion_lm import MASK

TASKS = {task.id: task for task in track.TASKS}
V = len(VOCABULARY)
A, B, C = 3, 4, 5  # words of small languages


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@lru_cache
def texts(count: int | None = None) -> Tensor:
    """The first stories of the test split, or all of them, as ids: read them, and write to a clone."""
    return torch.tensor([encode(text) for text in load_split("stories64", "test")["text"][:count]])


def session_of(task: str = "generation/stories64", seed: int = 0, **networks: nn.Module) -> Any:
    """What `run` sees, counted as the harness counts it."""
    ledger = Ledger(bounded=TASKS[task].bounded)
    for name, network in networks.items():
        for part in network.modules():
            part.__dict__.pop("forward", None)
        watch(ledger, name, network, track.layers(TASKS[task], name, network))
    return SimpleNamespace(networks=networks, rng=rng(seed), device=torch.device("cpu"), ledger=ledger, state={})


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


def thought_decoder(layers: int, vectors: int, size: int, window: int, gain: float = 1.0) -> Any:
    """A random decoder of `latent_thought_lm`, 32 wide, its matrices times `gain`."""
    from stepmark.methods.diffusion_lm.latent_thought_lm import ThoughtDecoder

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        decoder = ThoughtDecoder(32, layers, vectors, size, window)
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(gain)
    return decoder.eval().requires_grad_(False)
