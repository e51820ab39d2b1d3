"""Two Gaussian mixtures in the plane, eight components each: the exact density is known, so errors have a ground truth.

``condition`` names the mixture. 0: eight equal round components on a circle. 1: components of unequal weight, unequal
and correlated covariance, off the circle. Both have points within about [-2, 2].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stepmark.task import Dataset

DATASET = Dataset(
    id="mixtures",
    version=1,
    summary="two Gaussian mixtures in 2-D with known density: eight on a circle, eight unequal",
    licence="Apache-2.0",
    digests={
        "train": "52ce35acb166bbf409ba3411cb14b83222ba752fb01fc3c21b3dcace8a868a1f",
        "test": "507a7fea5460b05f6f599fb139738dd8e8aaa372a95a5d3fb2079978857e50c2",
    },
)
SHAPE = (2,)
MIXTURES = 2
COMPONENTS = 8
COUNTS = {"train": 20000, "test": 8000}
SEEDS = {"train": 21, "test": 22}


def _components() -> tuple[Tensor, Tensor, Tensor]:
    """Weights [2, 8], means [2, 8, 2] and covariances [2, 8, 2, 2] of both mixtures, float64."""
    index = torch.arange(COMPONENTS, dtype=torch.float64)
    angle = 2 * math.pi * index / COMPONENTS
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    round_covariance = 0.1**2 * torch.eye(2, dtype=torch.float64).expand(COMPONENTS, 2, 2)
    weight = 1.0 + index  # 1 : 2 : ... : 8
    spiral = circle * (0.4 + 0.15 * index)[:, None]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    spread = torch.stack([0.02 + 0.02 * index / 7, 0.18 - 0.1 * index / 7], 1)
    covariance = turn @ torch.diag_embed(spread**2) @ turn.mT
    return (
        torch.stack([torch.full_like(weight, 1 / COMPONENTS), weight / weight.sum()]),
        torch.stack([circle, spiral]),
        torch.stack([round_covariance, covariance]),
    )


WEIGHTS, MEANS, COVARIANCES = _components()


def draw(condition: Tensor, rng: np.random.Generator) -> Tensor:
    """Exact samples float32 [N, 2] of the mixtures ``condition`` int64 [N]."""
    weights = WEIGHTS[condition].numpy()
    component = (rng.random(len(condition))[:, None] > weights.cumsum(1)[:, :-1]).sum(1)
    factor = torch.linalg.cholesky(COVARIANCES)[condition, component].numpy()
    normal = rng.standard_normal((len(condition), 2))
    points = MEANS[condition, component].numpy() + (factor * normal[:, None, :]).sum(2)
    return torch.from_numpy(points.astype(np.float32))


def split(name: str) -> dict[str, Tensor]:
    """``x0`` [N, 2] and ``condition`` [N] of ``train`` (20 000) or ``test`` (8 000), half of each mixture.

    Raises KeyError for another name.
    """
    rng = np.random.default_rng(SEEDS[name])
    condition = torch.arange(COUNTS[name]) % MIXTURES
    return {"x0": draw(condition, rng), "condition": condition}


def log_density(x: Tensor, condition: Tensor) -> Tensor:
    """Exact log density [N] at x [N, 2] under the mixtures ``condition`` int64 [N]; differentiable in x."""
    offset = x[:, None] - MEANS[condition].to(x.dtype)
    covariance = COVARIANCES[condition].to(x.dtype)
    mahalanobis = (offset * torch.linalg.solve(covariance, offset[..., None])[..., 0]).sum(-1)
    log_normal = -0.5 * (mahalanobis + torch.logdet(covariance)) - math.log(2 * math.pi)
    return torch.logsumexp(WEIGHTS[condition].to(x.dtype).log() + log_normal, 1)
