"""Daily series of simulated people with a wearable: activity X_t (0 or 1) and hours of sleep Y_t, 222 days each.

Structural model of one person (deviations y = Y - 7 hours)::

    P(X_t = 1 | past) = sigmoid(a + b y_{t-1} + c X_{t-1})           sleeping well makes an active day likelier
    y_t = d + e X_t + f X_{t-1} + g y_{t-1} + h X_t y_{t-1} + s noise_t

so that yesterday's sleep is a common cause of today's activity and today's sleep, effects carry over to the next day, and
the effect of activity depends on yesterday's sleep (the shorter the night before, the larger). ``noise_t`` is a
standardised mixture of two normals: skewed, with a long tail of short nights. The parameters differ from person to person.

The recurring effect of a person is E[Y_t | X_t = 1] - E[Y_t | X_t = 0] in the long run of a trial that tosses a fair coin
for X every day. There X_t is independent of the past, so with m the long-run mean of y under the coin
``m = d + (e + f) / 2 + g m + h m / 2`` and the effect is ``e + h m``.

``train`` (64 people) and ``test`` (512) hold ``treatment`` and ``outcome`` float32 [N, 222]; ``test`` also ``effect``
float32 [N] (``train`` shows a method what data look like, not the answers).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stepmark.task import Dataset

DATASET = Dataset(
    id="wearable",
    version=1,
    summary="222 simulated days of activity and sleep per person, with the exact effect of activity by intervention",
    licence="CC0-1.0",
    digests={
        "train": "ecad289fd498390af0c2619f17e6f40faf36e8b1ab0a3fe6268b6be8b0c5f9b6",
        "test": "6d79dc394675ee32d01ef88f70a5f8e19165209463f47d9083696f91aff8827f",
    },
)
DAYS = 222
WARM_UP = 100  # days dropped, so that the series starts in its long-run law
MEAN_HOURS = 7.0


def parameters(count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Parameters a .. h and s (float64 [count] each) of ``count`` people."""
    ranges = {
        "a": (-0.4, 0.4),
        "b": (1.0, 2.0),
        "c": (0.0, 0.8),
        "d": (-0.3, 0.1),
        "e": (0.0, 0.5),
        "f": (-0.3, 0.1),
        "g": (0.4, 0.6),
        "h": (-0.3, 0.0),
        "s": (0.6, 0.9),
    }
    return {name: rng.uniform(low, high, count) for name, (low, high) in ranges.items()}


def noise(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Skewed noise of mean 0 and variance 1: 0.8 N(0.3, 0.6^2) + 0.2 N(-1.2, v) with v chosen to give variance 1."""
    short = rng.random(shape) < 0.2
    normal = rng.standard_normal(shape)
    variance = (1 - 0.8 * (0.36 + 0.09) - 0.2 * 1.44) / 0.2
    return np.where(short, -1.2 + variance**0.5 * normal, 0.3 + 0.6 * normal)


def series(p: dict[str, np.ndarray], days: int, rng: np.random.Generator, coin: bool) -> tuple[np.ndarray, np.ndarray]:
    """Treatment and outcome (hours), float64 [count, days]; ``coin``: X is tossed fairly instead of following the past."""
    count = len(p["a"])
    x, y = np.zeros(count), np.zeros(count)
    errors = noise((WARM_UP + days, count), rng)
    tosses = rng.random((WARM_UP + days, count))
    treatment, outcome = [], []
    for error, toss in zip(errors, tosses, strict=True):
        chance = 0.5 if coin else 1 / (1 + np.exp(-(p["a"] + p["b"] * y + p["c"] * x)))
        new = (toss < chance).astype(np.float64)
        y = p["d"] + p["e"] * new + p["f"] * x + p["g"] * y + p["h"] * new * y + p["s"] * error
        x = new
        treatment.append(x)
        outcome.append(y)
    return np.stack(treatment[WARM_UP:], axis=1), MEAN_HOURS + np.stack(outcome[WARM_UP:], axis=1)


def exact_effect(p: dict[str, np.ndarray]) -> np.ndarray:
    """The recurring effect of each person in hours, float64 [count]: closed form, see the module's docstring."""
    mean = (p["d"] + (p["e"] + p["f"]) / 2) / (1 - p["g"] - p["h"] / 2)
    return p["e"] + p["h"] * mean


def split(name: str) -> dict[str, Tensor]:
    """``train`` or ``test``. Raises KeyError for another name."""
    count, seed = {"train": (64, 1), "test": (512, 2)}[name]
    rng = np.random.default_rng(seed)  # numpy: the same bits on every CPU, which torch does not promise
    people = parameters(count, rng)
    treatment, outcome = series(people, DAYS, rng, coin=False)
    data = {"treatment": treatment, "outcome": outcome}
    if name == "test":
        data["effect"] = exact_effect(people)
    return {key: torch.from_numpy(value.astype(np.float32)) for key, value in data.items()}
