"""Samplers as policies: every step is normal about its mean, so that it has a likelihood, and a reward at the end can pull it."""

from __future__ import annotations

import torch
from torch import Tensor


def likelihood_ratio(after: Tensor, mean: Tensor, before: Tensor, spread: float) -> Tensor:
    """How much likelier the points that were reached [n, ...] are now than when they were drawn, [n]: of the means over the
    values of their log-likelihoods, as the codes of DDPO and its descendants have it.

    mean, before: of the step now and when it was drawn, of standard deviation `spread`.
    """
    change = (after - before).square() - (after - mean).square()
    return (change.flatten(1).mean(1) / (2 * spread**2)).exp()


def clipped_loss(advantage: Tensor, ratio: Tensor, clip: float) -> Tensor:
    """Mean of max(-A r, -A clip(r, 1 - e, 1 + e)) over steps of advantages A [n] (PPO, Schulman et al. 2017, equation 7)."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
