"""Training of students against their teacher through time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from stepmark.backbones.mdlm import MASK, logits
from stepmark.tracks.diffusion_lm.sampling import Denoiser, draw_words, uniforms, word_log_probabilities


def targets_through_time(
    denoise: Denoiser, x: Tensor, t: Tensor, step: float, count: int, rng: torch.Generator
) -> Tensor:
    """What a student should predict at once where the teacher takes `count` ancestral steps: log p, [B, L, V].

    Deschenaux and Gulcehre 2025, algorithm 1: at each mask the teacher's log probabilities of the step in which it was
    replaced, for masks that remain those of its last step. Positions visible in x hold 0.

    Args:
        t: [B], the times of x. step: length of one teacher step.
    """
    masked = x == MASK
    target = torch.zeros(*x.shape, 1, dtype=torch.float64, device=x.device)
    for i in range(count):
        now, then = (t - i * step).clamp(min=1e-6), (t - (i + 1) * step).clamp(min=0)
        log_p = word_log_probabilities(denoise(x).double())
        u, v = uniforms(x, rng)
        moved = (x == MASK) & (u < ((now - then) / now)[:, None])
        open_ = (x == MASK)[..., None]
        target = torch.where(open_, log_p, target)  # stays, once the mask is gone
        x = x.masked_scatter(moved, draw_words(log_p[moved].exp(), v[moved]))
    return torch.where(masked[..., None], target, torch.zeros_like(target))


def denoiser(network: nn.Module) -> Denoiser:
    """A masked-diffusion GPT-2 as a function from token ids to logits."""
    return partial(logits, network)
