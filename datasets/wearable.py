"""Daily series of simulated people with a wearable: activity X_t (0 or 1) and hours of sleep Y_t, 2190 days each.

Structural model of one person (deviations y = Y - 7 hours, v = max(-y_{t-1} - 0.3, 0) how short the last night was)::

    P(X_t = 1 | past) = sigmoid(a + b y_{t-1} + c X_{t-1})           sleeping well makes an active day likelier
    y_t = d + e X_t + f X_{t-1} + g y_{t-1} + h X_t v + k X_t X_{t-1} + q v + s noise_t

so that yesterday's sleep is a common cause of today's activity and today's sleep, effects carry over to the next day, and
activity helps after short nights above all, the more the shorter: a bend, and an interaction of two days' activity, that
no regression on X_t, X_{t-1}, Y_{t-1} and X_t Y_{t-1} can represent. Short nights are followed by few active days, so that
the days as they were weigh the effect otherwise than the days of a trial. ``noise_t`` is a standardised mixture of two
normals: skewed, with a long tail of short nights. The parameters differ from person to person.

The recurring effect of a person is E[Y_t | X_t = 1] - E[Y_t | X_t = 0] in the long run of a trial that tosses a fair coin
for X every day. There X_t is independent of the past, so the effect is the mean of e + h v + k X_{t-1} over that trial,
which has no closed form: ``effect`` averages it over 32 000 simulated days, the same coins and noise for everybody
(standard error 0.006 hours). All arithmetic of the outcome is +, * and max, the same bits on every processor.

``train`` (64 people) and ``test`` (256) hold ``treatment`` and ``outcome`` float32 [N, 2190]; tasks of fewer days take the
first ones. ``test`` also holds ``effect`` float32 [N] (``train`` shows a method what data look like, not the answers).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stepmark.task import Dataset

DATASET = Dataset(
    id="wearable",
    version=2,
    summary="six simulated years of activity and sleep per person, with the effect of activity by intervention",
    licence="CC0-1.0",
    digests={
        "train": "4ebdd5434bb311424b880762a481dd7b83557e574c302a8209b689db47dad37d",
        "test": "f10a27a669a750749c3e67533a8c500020a2e9d740d505090595486b75116d0f",
    },
)
DAYS = 2_190
WARM_UP = 100  # days dropped, so that the series starts in its long-run law
MEAN_HOURS = 7.0
SHORT = 0.3  # hours below the mean from which a night is short


def parameters(count: int, rng: np.random.Generator, bend: float = 1.0) -> dict[str, np.ndarray]:
    """Parameters a .. s (float64 [count] each) of ``count`` people; ``bend`` scales h, k and q, and 0 leaves a linear model."""
    ranges = {
        "a": (-0.4, 0.4),
        "b": (1.0, 2.0),
        "c": (0.0, 0.8),
        "d": (-0.3, 0.1),
        "e": (0.0, 0.4),
        "f": (-0.3, 0.1),
        "g": (0.4, 0.6),
        "h": (1.0, 2.0),
        "k": (-0.3, 0.3),
        "q": (-0.1, 0.1),
        "s": (0.6, 0.9),
    }
    drawn = {name: rng.uniform(low, high, count) for name, (low, high) in ranges.items()}
    return drawn | {name: bend * drawn[name] for name in ("h", "k", "q")}


def noise(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Skewed noise of mean 0 and variance 1: 0.8 N(0.3, 0.6^2) + 0.2 N(-1.2, v) with v chosen to give variance 1."""
    short = rng.random(shape) < 0.2
    normal = rng.standard_normal(shape)
    variance = (1 - 0.8 * (0.36 + 0.09) - 0.2 * 1.44) / 0.2
    return np.where(short, -1.2 + variance**0.5 * normal, 0.3 + 0.6 * normal)


def outcome_mean(p: dict[str, np.ndarray], x: np.ndarray | float, x_lag: np.ndarray, y_lag: np.ndarray) -> np.ndarray:
    """Mean deviation of today's sleep, of the shape of ``y_lag``."""
    short = np.maximum(-y_lag - SHORT, 0)
    past = p["d"] + p["f"] * x_lag + p["g"] * y_lag + p["q"] * short
    return past + (p["e"] + p["h"] * short + p["k"] * x_lag) * x


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
        y = outcome_mean(p, new, x, y) + p["s"] * error
        x = new
        treatment.append(x)
        outcome.append(y)
    return np.stack(treatment[WARM_UP:], axis=1), MEAN_HOURS + np.stack(outcome[WARM_UP:], axis=1)


def recurring_effect(p: dict[str, np.ndarray], chains: int = 80, days: int = 400) -> np.ndarray:
    """The recurring effect of each person in hours, float64 [count]: the mean contrast of a long trial of coin tosses."""
    q = {name: value[:, None] for name, value in p.items()}
    rng = np.random.default_rng(9)
    settle = 30
    errors = noise((settle + days, chains), rng)
    tosses = (rng.random((settle + days, chains)) < 0.5).astype(np.float64)
    x, y = np.zeros(chains), np.zeros((len(p["a"]), chains))
    total = np.zeros_like(y)
    for day, (error, new) in enumerate(zip(errors, tosses, strict=True)):
        if day >= settle:
            total += outcome_mean(q, 1.0, x, y) - outcome_mean(q, 0.0, x, y)
        y = outcome_mean(q, new, x, y) + q["s"] * error
        x = new
    return total.mean(1) / days


def split(name: str) -> dict[str, Tensor]:
    """``train`` or ``test``. Raises KeyError for another name."""
    count, seed = {"train": (64, 1), "test": (256, 2)}[name]
    rng = np.random.default_rng(seed)  # numpy: the same bits on every CPU, which torch does not promise
    people = parameters(count, rng)
    treatment, outcome = series(people, DAYS, rng, coin=False)
    data = {"treatment": treatment, "outcome": outcome}
    if name == "test":
        data["effect"] = recurring_effect(people)
    return {key: torch.from_numpy(value.astype(np.float32)) for key, value in data.items()}
