"""A virtual trial whose causal effect is known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def virtual_trial(
    start: Tensor, treatment: Tensor, noise: Tensor, step: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Run R virtual n-of-1 trials: outcomes [R, T].

    y_t = step(x_t, x_{t-1}, y_{t-1}) + noise_t, each [R]; start [R, 2] holds (x_0, y_0), treatment and noise are [R, T].
    One row, one trial.
    """
    x_lag, y_lag = start.unbind(-1)
    outcomes = torch.empty_like(noise)
    for t in range(noise.shape[1]):
        x = treatment[:, t]
        y_lag = step(x, x_lag, y_lag) + noise[:, t]
        outcomes[:, t] = y_lag
        x_lag = x
    return outcomes
