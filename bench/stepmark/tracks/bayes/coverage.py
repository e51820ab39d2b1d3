"""Track bayes, task of calibration: which of six estimators is the exact posterior?

Beside `design` [B, 6, 4], linear-Gaussian models, a batch has `estimators` int64 [B, E]: numbers that stand for the
estimators of `linear.ESTIMATORS`, in an order of its own for every model, so that nobody can answer by the place of a
column. `run` tests all of them, column by column, from `rung` simulations and returns `statistic` and `p_value`, float
[B, E], in the order of the numbers. The draws of column k are

    session.simulators["estimator"](x, design, batch["estimators"][:, k], draws, generator)

and "log_density" takes such numbers likewise. The score puts the columns back in the order of `linear.ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepmark.task import Score, Task
from stepmark.tracks import bayes
from stepmark.tracks.bayes import check as check
from stepmark.tracks.bayes import layers as layers
from stepmark.tracks.bayes import linear
from stepmark.tracks.bayes import reference_call as reference_call

TASKS = (
    Task(
        id="coverage/linear_gaussian",
        version=2,
        summary="Tell an exact posterior estimator from five wrong ones, two of them with perfect HPD coverage",
        dataset="linear_gaussian",
        bounded=("simulator",),
        unit="simulations",
        rungs=(50, 200, 500, 2_000),
        metrics={
            "power": "higher",
            "false_alarm": "lower",
            "power_overconfident": "higher",
            "power_underconfident": "higher",
            "power_shifted": "higher",
            "power_blind": "higher",
            "power_prior": "higher",
            "deviation_exact": "lower",
            "deviation_overconfident": "higher",
            "deviation_blind": "higher",
            "deviation_prior": "higher",
        },
        n=96,
        batch=8,
        smoke_n=8,
        smoke_rungs=(50,),
    ),
)


def coded(items: int, generator: torch.Generator) -> Tensor:
    """Numbers int64 [items, E] for the estimators, each once, shuffled for every model. Which stands for which the harness
    alone looks up (`kinds`).
    """
    numbers = torch.randint(2**62, (items, 400), generator=generator)
    found = kinds(numbers)
    first = torch.stack([(found == kind).int().argmax(1) for kind in range(len(linear.ESTIMATORS))], 1)
    order = torch.rand(items, len(linear.ESTIMATORS), generator=generator).argsort(1)
    return numbers.gather(1, first.gather(1, order))


def kinds(numbers: Tensor) -> Tensor:
    """Places in `linear.ESTIMATORS` of what the numbers stand for: a mixing of their bits (Steele and Vigna 2021)."""
    return (((numbers * 6364136223846793005 + 1442695040888963407) >> 33) & 0x7FFFFFFF) % len(linear.ESTIMATORS)


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """`n` models of the test split, and the numbers of their estimators."""
    return bayes.inputs(task, n, generator, device) | {"estimators": coded(n, generator).to(device)}


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """The counted handles: prior, simulator, and the estimators by number."""

    def estimator(x: Tensor, design: Tensor, which: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        """Draws [B, N, draws, 4] given x [B, N, 6] of the models design [B, 6, 4], of the estimators which [B]."""
        found = x.new_empty(*x.shape[:2], draws, design.shape[-1])
        for rows, name in _by_name(which):
            found[rows] = linear.estimator_draws(x[rows], design[rows], name, draws, generator)
        return found

    def log_density(theta: Tensor, x: Tensor, design: Tensor, which: Tensor) -> Tensor:
        """Log density [B, N, S] at theta [B, N, S, 4] given x [B, N, 6], of the estimators which [B]."""
        found = theta.new_empty(theta.shape[:3])
        for rows, name in _by_name(which):
            found[rows] = linear.estimator_log_density(theta[rows], x[rows], design[rows], name)
        return found

    return bayes.handles(task, device) | {"estimator": estimator, "log_density": log_density}


def _by_name(which: Tensor) -> list[tuple[Tensor, str]]:
    found = kinds(which)
    each = [((found == kind).nonzero()[:, 0], name) for kind, name in enumerate(linear.ESTIMATORS)]
    return [(rows, name) for rows, name in each if len(rows)]


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    networks: Mapping[str, nn.Module],
    resample: np.ndarray,
) -> dict[str, Score]:
    """As the track's, with the columns in the order of `linear.ESTIMATORS`."""
    place = kinds(batch["estimators"]).argsort(1)
    sorted_out = {name: value.gather(1, place) for name, value in outputs.items()}
    return bayes.score(task, batch, sorted_out, networks, resample)
