"""Samplers of masked diffusion: ancestral steps, remasking, and what the network says of each word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones.mdlm import MASK, logits

# Texts outside the grammar have probability 0. Scored through a channel that replaces one word in a hundred by any
# other, they have a finite figure, and each wrong word costs about ln(words / 0.01) nats.
NOISE = 0.01


Denoiser = Callable[[Tensor], Tensor]  # from token ids [B, L] to logits [B, L, V]


def denoiser(network: nn.Module) -> Denoiser:
    """A masked-diffusion GPT-2, `session.networks["model"]`, as a function from token ids [B, L] to logits [B, L, V]."""
    return partial(logits, network)


def masked_texts(batch: Mapping[str, Any], device: torch.device) -> Tensor:
    """The prompts, followed by masks up to the length asked for: int64 [B, L]."""
    rows = [ids + [MASK] * (n - len(ids)) for ids, n in zip(batch["prompt"], batch["length"], strict=True)]
    return torch.tensor(rows, device=device)


def continuations(batch: Mapping[str, Any], x: Tensor) -> list[list[int]]:
    """What follows the prompts in texts x, int64 [B, L]: what `run` returns."""
    return [row[len(prompt) :] for prompt, row in zip(batch["prompt"], x.tolist(), strict=True)]


def word_log_probabilities(found: Tensor) -> Tensor:
    """log p of the clean words [..., V] from logits: a mask is none of them."""
    return found.index_fill(-1, torch.tensor([MASK], device=found.device), -torch.inf).log_softmax(-1)


def word_probabilities(found: Tensor, nucleus: float = 1.0) -> Tensor:
    """Probabilities, float64 [..., V], of logits: no mask, and only the smallest set of words with mass >= `nucleus`.

    In double precision, for rounding in single precision makes rare words rarer (Zheng et al. 2025, section 4).
    """
    p = word_log_probabilities(found.double()).exp()
    if nucleus < 1:
        ordered, index = torch.sort(p, dim=-1, descending=True, stable=True)
        kept = ordered * (ordered.cumsum(-1) - ordered < nucleus)
        p = torch.zeros_like(p).scatter(-1, index, kept)
        p = p / p.sum(-1, keepdim=True)
    return p


def draw_words(p: Tensor, u: Tensor) -> Tensor:
    """The words whose cumulative probability first exceeds u: p [N, V], u in [0, 1) [N] -> int64 [N]."""
    cumulative = p.cumsum(-1)
    drawn = torch.searchsorted(cumulative, (u.double() * cumulative[:, -1])[:, None], right=True)[:, 0]
    # Rounding may put u behind the last word that is possible at all.
    last = p.shape[1] - 1 - (p > 0).flip(1).to(torch.uint8).argmax(1)
    return torch.minimum(drawn, last)


def uniforms(x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two uniforms for each position of x: whether it moves, and to which word. Drawn at every step by every sampler,
    so that samplers that decide alike stay on the same random stream."""
    return (
        torch.rand(x.shape, generator=rng, device=x.device, dtype=torch.float64),
        torch.rand(x.shape, generator=rng, device=x.device, dtype=torch.float64),
    )


def fill(denoise: Denoiser, x: Tensor, where: Tensor, u: Tensor, nucleus: float) -> Tensor:
    """Words drawn at the positions `where` [B, L]; only texts with such a position are evaluated."""
    filled, rows = x.clone(), where.any(1)
    if rows.any():
        filled[where] = draw_words(word_probabilities(denoise(x[rows])[where[rows]], nucleus), u[where])
    return filled


def times(steps: int) -> list[float]:
    """The grid 1, 1 - 1/steps, ..., 0 of `steps` equal steps: steps + 1 times, from all masked to all visible."""
    return [1 - i / steps for i in range(steps)] + [0.0]


def ancestral_step(
    denoise: Denoiser, x: Tensor, t: float, s: float, rng: torch.Generator, nucleus: float = 1.0
) -> Tensor:
    """One reverse step from t to s < t: each mask is replaced with probability (t - s) / t, by a word from the model.

    Sahoo et al. 2024, equation 7 with alpha = 1 - t: visible words are carried over. Which masks move does not hang on
    the model, so that a text of which none moves needs no evaluation.
    """
    u, v = uniforms(x, rng)
    return fill(denoise, x, (x == MASK) & (u < (t - s) / t), v, nucleus)


def ancestral(denoise: Denoiser, x: Tensor, steps: int, rng: torch.Generator, nucleus: float = 1.0) -> Tensor:
    """All masks of x [B, L] filled in `steps` reverse steps; at most `steps` evaluations of each text, L if fewer."""
    for t, s in pairwise(times(steps)):
        x = ancestral_step(denoise, x, t, s, rng, nucleus)
    return x


def greatest_sigma(visible: float, then: float) -> float:
    """Greatest probability of remasking for which the posterior is one: min(1, (1 - alpha_s) / alpha_t)."""
    return min(1.0, (1 - then) / visible) if visible > 0 else 1.0


def moves(visible: float, then: float, sigma: float) -> tuple[float, float]:
    """Probabilities that a mask is replaced, and that a word is masked again, in a step from alpha_t to alpha_s.

    Wang et al. 2025, equation 6: (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t) and sigma. For every sigma a position
    that is visible with probability alpha_t before the step is so with probability alpha_s after it.
    """
    return (then - (1 - sigma) * visible) / (1 - visible), sigma


def remasking_step(
    denoise: Denoiser,
    x: Tensor,
    visible: float,
    then: float,
    sigma: float,
    fixed: Tensor,
    rng: torch.Generator,
    nucleus: float = 1.0,
) -> Tensor:
    """One step of ReMDM from alpha_t = `visible` to alpha_s = `then`. With sigma 0 it is `ancestral_step`.

    Args:
        sigma: probability with which a word is masked again.
        fixed: bool [B, L], words of the prompt, which stay.
    """
    reveal, hide = moves(visible, then, sigma)
    u, v = uniforms(x, rng)
    masked = x == MASK
    filled = fill(denoise, x, masked & (u < reveal), v, nucleus)
    return filled.masked_fill(~masked & ~fixed & (u < hide), MASK)


# From (alpha_t, alpha_s) to sigma.
Sigma = Callable[[float, float], float]


def remask(
    denoise: Denoiser, x: Tensor, steps: int, sigma: Sigma, rng: torch.Generator, nucleus: float = 1.0
) -> Tensor:
    """Texts, int64 [B, L], after `steps` steps of ReMDM from texts x with masks, on the time grid of `ancestral`."""
    fixed = x != MASK
    for t, s in pairwise(times(steps)):
        x = remasking_step(denoise, x, 1 - t, 1 - s, sigma(1 - t, 1 - s), fixed, rng, nucleus)
    return x
