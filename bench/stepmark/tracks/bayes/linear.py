"""A linear Gaussian problem and estimators of known fault, for tests of calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

DRAWS = 100


ESTIMATORS = ("exact", "overconfident", "underconfident", "shifted", "blind", "prior")


def linear_prior(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws [*shape, 4] of the prior N(0, I) of `coverage/linear_gaussian`. Free of charge."""
    return torch.randn(*shape, 4, generator=generator, device=generator.device)


def linear_simulator(theta: Tensor, design: Tensor, generator: torch.Generator) -> Tensor:
    """x = A theta + 0.5 e: theta [B * N, 4] grouped by model, design [B, 6, 4] -> [B * N, 6]. One row, one simulation."""
    grouped = theta.unflatten(0, (len(design), -1))
    x = grouped @ design.mT
    return (x + 0.5 * torch.randn(x.shape, generator=generator, device=x.device)).flatten(0, 1)


def simulate_pairs(
    simulators: Mapping[str, Callable[..., Any]], generator: torch.Generator, design: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """`count` simulated pairs for each model: theta* [B, N, 4], x [B, N, 6]."""
    theta = simulators["prior"]((len(design), count), generator)
    x = simulators["simulator"](theta.flatten(0, 1), design, generator)
    return theta, x.unflatten(0, (len(design), count))


def _estimator(design: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gain [B, 4, 6], shift [B, 4] and covariance [B, 4, 4] of the estimator N(gain x + shift, covariance).

    With C the exact posterior covariance, m(x) the exact mean and M = I - C the prior covariance of m(x):
    exact N(m, C); overconfident N(m, 0.75^2 C); underconfident N(m, 1.3^2 C); shifted N(m + 0.4 sd, C); prior N(0, I);
    blind N(1.5 m, C + 0.25 M). The last has the mean half as far again from the prior's as it should be, and the very
    covariance that theta - 1.5 m has over all simulations: its HPD regions and its ranks are right on average, as are
    those of the prior.
    """
    eye = torch.eye(design.shape[-1], device=design.device, dtype=design.dtype)
    covariance = torch.linalg.inv(eye + design.mT @ design / 0.25)
    gain = covariance @ design.mT / 0.25
    shift = torch.zeros_like(gain[..., 0])
    if name == "overconfident":
        covariance = 0.75**2 * covariance
    elif name == "underconfident":
        covariance = 1.3**2 * covariance
    elif name == "shifted":
        shift = 0.4 * covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    elif name == "blind":
        gain, covariance = 1.5 * gain, covariance + 0.25 * (eye - covariance)
    elif name == "prior":
        gain, covariance = 0 * gain, eye.expand_as(covariance)
    elif name != "exact":
        raise ValueError(f"no estimator {name!r}; there are {', '.join(ESTIMATORS)}")
    return gain, shift, covariance


def estimator_draws(x: Tensor, design: Tensor, name: str, draws: int, generator: torch.Generator) -> Tensor:
    """Draws [B, N, draws, 4] of the named estimator given x [B, N, 6] of the models design [B, 6, 4]."""
    gain, shift, covariance = _estimator(design, name)
    mean = x @ gain.mT + shift[:, None]
    noise = torch.randn(*mean.shape[:2], draws, mean.shape[-1], generator=generator, device=x.device, dtype=x.dtype)
    return mean[:, :, None] + noise @ torch.linalg.cholesky(covariance).mT[:, None]


def estimator_log_density(theta: Tensor, x: Tensor, design: Tensor, name: str) -> Tensor:
    """Log density [B, N, S] of the named estimator at theta [B, N, S, 4] given x [B, N, 6]."""
    gain, shift, covariance = _estimator(design, name)
    residual = theta - (x @ gain.mT + shift[:, None])[:, :, None]
    quadratic = ((residual @ torch.linalg.inv(covariance)[:, None]) * residual).sum(-1)
    return -0.5 * (quadratic + torch.logdet(2 * math.pi * covariance)[:, None, None])
