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


def coded(items: int, generator: torch.Generator) -> Tensor:
    """Numbers int64 [items, 6] that stand for the estimators, each once, in an order of its own for every model. Which
    stands for which the harness alone looks up (`kinds`), so that answers must come from draws."""
    codes = torch.randint(2**62, (items, 400), generator=generator)
    found = kinds(codes)
    first = torch.stack([(found == kind).int().argmax(1) for kind in range(len(ESTIMATORS))], 1)
    order = torch.rand(items, len(ESTIMATORS), generator=generator).argsort(1)
    return codes.gather(1, first.gather(1, order))


def kinds(codes: Tensor) -> Tensor:
    """Places in `ESTIMATORS` of what the numbers stand for: a mixing of their bits (Steele and Vigna 2021)."""
    return (((codes * 6364136223846793005 + 1442695040888963407) >> 33) & 0x7FFFFFFF) % len(ESTIMATORS)


def _estimator(design: Tensor, which: str | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_named`, of one estimator for all models, or of the one that a number [B] stands for."""
    if isinstance(which, str):
        return _named(design, which)
    rows, kind = torch.arange(len(design), device=design.device), kinds(which)
    gain, shift, covariance = zip(*(_named(design, name) for name in ESTIMATORS), strict=True)
    return torch.stack(gain)[kind, rows], torch.stack(shift)[kind, rows], torch.stack(covariance)[kind, rows]


def _named(design: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
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


def estimator_draws(x: Tensor, design: Tensor, which: str | Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Draws [B, N, draws, 4] of an estimator, by its name or by a number for each model [B], given x [B, N, 6] of the models
    design [B, 6, 4]."""
    gain, shift, covariance = _estimator(design, which)
    mean = x @ gain.mT + shift[:, None]
    noise = torch.randn(*mean.shape[:2], draws, mean.shape[-1], generator=generator, device=x.device, dtype=x.dtype)
    return mean[:, :, None] + noise @ torch.linalg.cholesky(covariance).mT[:, None]


def estimator_log_density(theta: Tensor, x: Tensor, design: Tensor, which: str | Tensor) -> Tensor:
    """Log density [B, N, S] of an estimator, by name or number, at theta [B, N, S, 4] given x [B, N, 6]."""
    gain, shift, covariance = _estimator(design, which)
    residual = theta - (x @ gain.mT + shift[:, None])[:, :, None]
    quadratic = ((residual @ torch.linalg.inv(covariance)[:, None]) * residual).sum(-1)
    return -0.5 * (quadratic + torch.logdet(2 * math.pi * covariance)[:, None, None])
