"""What likelihood-free methods on parameters share: simulated pairs and distances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stepmark.tracks.bayes.linear import ESTIMATORS
from stepmark.tracks.bayes.metrics import uniformity


def simulate_pairs(
    simulators: Mapping[str, Callable[..., Any]], generator: torch.Generator, design: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """`count` simulated pairs for each model: theta* [B, N, 4], x [B, N, 6]."""
    theta = simulators["prior"]((len(design), count), generator)
    x = simulators["simulator"](theta.flatten(0, 1), design, generator)
    return theta, x.unflatten(0, (len(design), count))


def unit_box(simulators: Mapping[str, Callable[..., Any]], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lower corner and width [d] of the box that holds 1000 draws of the prior: what scales a parameter to [0, 1].

    From draws of their own, not from the theta* under test, so that the test stays exact.
    """
    draws = simulators["prior"]((1_000,), generator)
    low = draws.amin(0)
    return low, draws.amax(0) - low


def ball_test(
    simulators: Mapping[str, Callable[..., Any]],
    generator: torch.Generator,
    theta: Tensor,
    x: Tensor,
    design: Tensor,
    reference: Tensor,
    width: Tensor,
    draws: int,
) -> dict[str, Tensor]:
    """Test every estimator by the mass of balls around reference [B, N, d] that reach to theta [B, N, d] (see `tarp`).

    Distances are Euclidean in units of width [d]. Returns statistic and p-value [B, len(ESTIMATORS)].
    """
    radius = ((theta - reference) / width).norm(dim=-1, keepdim=True)
    statistics, p_values = [], []
    for name in ESTIMATORS:
        samples = simulators["estimator"](x, design, name, draws, generator)
        inside = (((samples - reference[:, :, None]) / width).norm(dim=-1) < radius).sum(-1)
        jitter = torch.rand(inside.shape, generator=generator, device=theta.device)
        statistic, p_value = uniformity((inside + jitter) / (draws + 1))
        statistics.append(statistic)
        p_values.append(p_value)
    return {"statistic": torch.stack(statistics, dim=-1), "p_value": torch.stack(p_values, dim=-1)}
