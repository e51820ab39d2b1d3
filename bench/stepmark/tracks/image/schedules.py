"""Noise schedules: alpha(t) and sigma(t), conversions between predictions, and grids of times for samplers.

A grid is n + 1 floats from the noisiest down to 0, with one evaluation at each but the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.backbones.unet import TRAIN_TIMESTEPS, alphas_cumprod


class Schedule:
    """alpha(t), sigma(t) of x_t = alpha x0 + sigma eps for t in [0, 1]; t = 0 is data, t = 1 noise.

    "flow": alpha = 1 - t, sigma = t; the network's own time is t.
    "epsilon": variance preserving, alpha^2 = abar. Timestep n of the training grid stands at t = (n + 1) / N, data at
    t = 0, and log abar is linear in between (DPM-Solver, Lu et al. 2022, appendix D.4); the network's own time is
    N t - 1, a timestep in 0..N - 1.

    Every method takes a float and returns a float, or a tensor and returns a tensor of its shape.

    Args:
        prediction: "flow" or "epsilon".
        abar: cumulative products of 1 - beta, [N], of an "epsilon" network; default: Stepmark's own (linear, N = 1000).
    """

    def __init__(self, prediction: str, abar: Tensor | None = None) -> None:
        if prediction not in ("flow", "epsilon"):
            raise ValueError(f'prediction {prediction!r} is not known; use "flow" or "epsilon"')
        self.prediction = prediction
        abar = alphas_cumprod() if abar is None else abar.double().cpu()
        self.steps = len(abar)
        self._log_abar = np.concatenate([[0.0], abar.log().numpy()])
        self._places = np.arange(self.steps + 1) / self.steps

    @property
    def flow(self) -> bool:
        """Whether paths are straight lines in t (rectified flow)."""
        return self.prediction == "flow"

    def alpha(self, t: Any) -> Any:
        """Scale of the signal at time t: x_t = alpha(t) x0 + sigma(t) eps."""
        if self.flow:
            return 1 - t
        half = 0.5 * self._interpolate(t, self._places, self._log_abar)
        return half.exp() if isinstance(half, Tensor) else math.exp(half)

    def sigma(self, t: Any) -> Any:
        """Scale of the noise at time t."""
        if self.flow:
            return t
        log_abar = self._interpolate(t, self._places, self._log_abar)
        return (-torch.expm1(log_abar)).sqrt() if isinstance(log_abar, Tensor) else math.sqrt(-math.expm1(log_abar))

    def log_snr(self, t: Any) -> Any:
        """lambda(t) = log(alpha / sigma): infinite at t = 0, and minus infinity at t = 1 of a flow."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        if isinstance(alpha, Tensor):
            return alpha.log() - sigma.log()
        if alpha == 0 or sigma == 0:
            return math.inf if sigma == 0 else -math.inf
        return math.log(alpha) - math.log(sigma)

    def time(self, log_snr: Any) -> Any:
        """The time t at which the log-SNR is this: the inverse of `log_snr`."""
        if self.flow:
            return torch.sigmoid(-log_snr) if isinstance(log_snr, Tensor) else 1 / (1 + math.exp(log_snr))
        if isinstance(log_snr, Tensor):
            log_abar: Any = -torch.nn.functional.softplus(-2 * log_snr)
        else:
            log_abar = -float(np.logaddexp(0.0, -2 * log_snr))
        return self._interpolate(log_abar, self._log_abar[::-1], self._places[::-1])

    def network_time(self, t: Any) -> Any:
        """What the network takes as its time argument at time t: t itself of a flow, else the timestep N t - 1."""
        return t if self.flow else t * self.steps - 1

    def _interpolate(self, at: Any, x: NDArray[np.float64], y: NDArray[np.float64]) -> Any:
        if not isinstance(at, Tensor):
            return float(np.interp(at, x, y))
        found = np.interp(at.detach().cpu().double().numpy(), x, y)
        return torch.as_tensor(found, dtype=at.dtype, device=at.device)


@lru_cache(maxsize=8)
def _default_schedule(prediction: str) -> Schedule:
    return Schedule(prediction)


def schedule_of(network: nn.Module) -> Schedule:
    """The schedule a network was trained on, from its `prediction` and, where it has one, its own `alphas_cumprod`."""
    own = getattr(network, "alphas_cumprod", None)
    return _default_schedule(str(network.prediction)) if own is None else Schedule(str(network.prediction), own)


def to_x0_eps(kind: str, output: Tensor, x: Tensor, alpha: Any, sigma: Any) -> tuple[Tensor, Tensor]:
    """x0 and eps from a network's output at x = alpha x0 + sigma eps.

    kind: "epsilon"; "sample" (x0); "v" (alpha eps - sigma x0, Salimans and Ho 2022); "flow" (eps - x0, which needs
    alpha + sigma = 1). alpha and sigma are floats or tensors that broadcast against x.
    """
    if kind == "flow":
        return x - sigma * output, x + alpha * output
    if kind == "epsilon":
        return (x - sigma * output) / alpha, output
    if kind == "v":
        return alpha * x - sigma * output, sigma * x + alpha * output
    if kind == "sample":
        return output, (x - alpha * output) / sigma
    raise ValueError(f'prediction {kind!r} is not known; use "epsilon", "sample", "v" or "flow"')


def from_x0_eps(kind: str, x0: Tensor, eps: Tensor, alpha: Any, sigma: Any) -> Tensor:
    """The network output of the given kind that stands for (x0, eps): the inverse of `to_x0_eps`."""
    targets = {"flow": eps - x0, "epsilon": eps, "v": alpha * eps - sigma * x0, "sample": x0}
    if kind not in targets:
        raise ValueError(f'prediction {kind!r} is not known; use "epsilon", "sample", "v" or "flow"')
    return targets[kind]


def add_noise(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t [B, ...] at times t [B]: the forward process."""
    shape = (-1, *[1] * (x0.dim() - 1))
    return schedule.alpha(t).view(shape) * x0 + schedule.sigma(t).view(shape) * eps


def uniform_times(n: int, start: float = 1.0) -> list[float]:
    """Equal steps in t. On the training grid these are the "trailing" timesteps N, N - N/n, ... (Lin et al. 2024)."""
    return [start * (1 - i / n) for i in range(n)] + [0.0]


def leading_times(n: int, steps: int = TRAIN_TIMESTEPS) -> list[float]:
    """The "leading" timesteps (n - 1) k, ..., k, 0 with k = N // n of DDIM (Song et al. 2021): never reaches t = 1."""
    return [(i * (steps // n) + 1) / steps for i in reversed(range(n))] + [0.0]


def quadratic_times(n: int, start: float = 1.0) -> list[float]:
    """t proportional to the square of equal steps: dense near the data (DDIM's quadratic option)."""
    return [start * (1 - i / n) ** 2 for i in range(n)] + [0.0]


def log_snr_times(schedule: Schedule, n: int, start: float = 0.999, end: float = 0.001) -> list[float]:
    """Equal steps in log-SNR between `start` and `end`, then 0 (DPM-Solver, Lu et al. 2022)."""
    first, last = schedule.log_snr(start), schedule.log_snr(end)
    return [schedule.time(first + (last - first) * i / max(n - 1, 1)) for i in range(n)] + [0.0]


def karras_times(schedule: Schedule, n: int, rho: float = 7.0, start: float = 0.999, end: float = 0.001) -> list[float]:
    """Equal steps in (sigma / alpha)^(1 / rho), then 0 (Karras et al. 2022, equation 5)."""
    high, low = (math.exp(-schedule.log_snr(t) / rho) for t in (start, end))
    return [schedule.time(-rho * math.log(high + (low - high) * i / max(n - 1, 1))) for i in range(n)] + [0.0]


def shift_times(times: Sequence[float], shift: float) -> list[float]:
    """t -> s t / (1 + (s - 1) t): more steps near the noise for s > 1 (Esser et al. 2024, equation 23)."""
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def snap_times(schedule: Schedule, times: Sequence[float]) -> list[float]:
    """The nearest times of the training grid of an "epsilon" network; other schedules have none and keep theirs."""
    if schedule.flow:
        return list(times)
    return [0.0 if t == 0 else max(round(t * schedule.steps), 1) / schedule.steps for t in times]
