"""Search at inference: candidates of a batch, what the reward thinks of them, and which of them go on.

The candidates of a batch of B stand B rows apart: those of item i are the rows i, B + i, 2 B + i, and so on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepmark.session import Session
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.rewards import log_probability

JUDGED = 2  # evaluations that a candidate takes to be judged: the decoder's and the reward's
ROOM = 16  # evaluations that a candidate of a guided sampler is worth at least: seven steps, and to be judged


def candidates(noise: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """n noises for every item, [n B, ...]: the given ones, [B, ...], come first."""
    shape = ((n - 1) * len(noise), *noise.shape[1:])
    return torch.cat([noise, torch.randn(shape, generator=rng, device=noise.device, dtype=noise.dtype)])


def guided(session: Session, condition: Tensor, n: int) -> Denoiser:
    """The guided teacher for n candidates of captions int64 [B, 32], which are encoded once."""
    network = session.networks["teacher"]
    return Denoiser(network, network.words(condition).repeat(n, 1, 1), GUIDANCE)


def judged(session: Session, x0: Tensor, condition: Tensor) -> Tensor:
    """Log-probability [n, B] that the reward gives to captions int64 [B, 32] in what candidates [n B, 4, 8, 8] decode to.
    Two evaluations each."""
    logits = session.networks["reward"](session.networks["vae"](x0).clamp(-1, 1))
    copies = len(x0) // len(condition)
    return log_probability(logits, condition.repeat(copies, 1)).view(copies, -1)


def taken(x: Tensor, which: Tensor) -> Tensor:
    """The candidates of numbers `which` int64 [k, B] out of x [n B, ...]: [k B, ...]."""
    items = which.shape[1]
    return x[(which * items + torch.arange(items, device=x.device)).flatten()]
