"""One evaluation of a network as predictions of x0 and eps (`Denoiser`), and single steps of the standard solvers.

A step leads from x at time t to time s < t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from stepmark.tracks.image.schedules import (
    Schedule,
    karras_times,
    log_snr_times,
    quadratic_times,
    schedule_of,
    shift_times,
    to_x0_eps,
    uniform_times,
)

if TYPE_CHECKING:
    from stepmark.session import Session


class Denoiser:
    """One network, its schedule and a batch's condition: `denoise(x, t)` -> (x0, eps) for one evaluation.

    Args:
        network: called as network(x, time, condition); has `prediction` and `null_condition`.
        condition: int64 [B] or [B, slots].
        guidance: w of classifier-free guidance, null + w (conditional - null) (Ho and Salimans 2022). 1 is the plain
            conditional prediction and costs one row per item; any other w costs two, in one call.
    """

    def __init__(self, network: nn.Module, condition: Tensor, guidance: float = 1.0) -> None:
        self.network, self.guidance = network, guidance
        self.schedule = schedule_of(network)
        self.condition = condition
        if guidance != 1.0:
            self.condition = torch.cat([network.null_condition(condition), condition])

    def output(self, x: Tensor, t: float) -> Tensor:
        """What the network itself predicts (eps or the velocity), guided: [B, ...] at x [B, ...], t in (0, 1]. One evaluation."""
        rows = x if self.guidance == 1.0 else torch.cat([x, x])
        time = torch.full((len(rows),), self.schedule.network_time(t), dtype=x.dtype, device=x.device)
        out = self.network(rows, time, self.condition)
        if self.guidance == 1.0:
            return out
        null, conditional = out.chunk(2)
        return torch.lerp(null, conditional, self.guidance)

    def __call__(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Predictions of x0 and eps [B, ...] at x [B, ...], t in (0, 1]."""
        schedule = self.schedule
        return to_x0_eps(schedule.prediction, self.output(x, t), x, schedule.alpha(t), schedule.sigma(t))


def ddim_step(schedule: Schedule, x0: Tensor, eps: Tensor, s: float) -> Tensor:
    """Deterministic DDIM: alpha_s x0 + sigma_s eps (Song et al. 2021, equation 12 with sigma = 0).

    For flow networks this is the Euler step x + (s - t) v.
    """
    return schedule.alpha(s) * x0 + schedule.sigma(s) * eps


def ddim_coefficients(schedule: Schedule, t: float, s: float) -> tuple[float, float]:
    """(a, b) for which `ddim_step` from t to s is a x + b output, of the network's own output (eps or v)."""
    alpha, sigma, then = schedule.alpha(t), schedule.sigma(t), (schedule.alpha(s), schedule.sigma(s))
    if schedule.prediction == "flow":
        return then[0] + then[1], then[1] * alpha - then[0] * sigma
    if schedule.prediction == "epsilon":
        return then[0] / alpha, then[1] - then[0] * sigma / alpha
    raise ValueError(f"prediction {schedule.prediction!r} is not known here; use 'epsilon' or 'flow'")


def euler_step(x: Tensor, velocity: Tensor, t: float, s: float) -> Tensor:
    """x [B, ...] at time t taken to time s along a straight line: x + (s - t) velocity.

    velocity: dx/dt [B, ...], what a flow network predicts (`denoise.output(x, t)`).
    """
    return torch.add(x, velocity, alpha=s - t)


def heun_step(denoise: Denoiser, x: Tensor, t: float, s: float) -> Tensor:
    """Heun's second-order step, two evaluations, for s > 0 (Karras et al. 2022, algorithm 1).

    The ODE is taken where it is straightest: dx/dt = v for flow networks, and d(x / alpha) / d(sigma / alpha) = eps
    for noise prediction.
    """
    schedule = denoise.schedule
    if schedule.flow:
        slope = denoise.output(x, t)
        ahead = denoise.output(euler_step(x, slope, t, s), s)
        return torch.add(x, slope + ahead, alpha=0.5 * (s - t))
    scaled, level, level_s = x / schedule.alpha(t), *(schedule.sigma(u) / schedule.alpha(u) for u in (t, s))
    eps = denoise(x, t)[1]
    ahead = denoise((scaled + (level_s - level) * eps) * schedule.alpha(s), s)[1]
    return (scaled + 0.5 * (level_s - level) * (eps + ahead)) * schedule.alpha(s)


def dpm_solver_pp_step(
    schedule: Schedule, x: Tensor, past: Sequence[tuple[float, Tensor]], s: float, order: int = 2
) -> Tensor:
    """DPM-Solver++ multistep update of order 1, 2 (2M) or 3 (3M) (Lu et al. 2022b, algorithm 2).

    Args:
        past: (time, prediction of x0) of the evaluations so far, the latest last; at least `order` of them are used,
            and the order falls to their number.
        s: the time to reach. At s = 0 the log-SNR is infinite and every order is the first.

    Order 3 is the Taylor expansion of the exact solution with all its terms. The authors' code and its descendants
    (diffusers too) take half of the last term, which leaves a method of order 2; orders 1 and 2 are the same.
    """
    lambda_s = schedule.log_snr(s)
    t, x0 = past[-1]
    h = lambda_s - schedule.log_snr(t)
    decay = math.expm1(-h)  # e^-h - 1
    base = (schedule.sigma(s) / schedule.sigma(t)) * x - schedule.alpha(s) * decay * x0
    order = 1 if math.isinf(h) else min(order, len(past))
    if order == 1:
        return base
    u, previous = past[-2]
    r0 = (schedule.log_snr(t) - schedule.log_snr(u)) / h
    first = (x0 - previous) / r0
    if order == 2:
        return base - 0.5 * schedule.alpha(s) * decay * first
    w, oldest = past[-3]
    r1 = (schedule.log_snr(u) - schedule.log_snr(w)) / h
    bend = (first - (previous - oldest) / r1) / (r0 + r1)  # half of h^2 times the second derivative
    first = first + r0 * bend
    slope, curve = decay / h + 1, 0.5 - (decay + h) / h**2
    return base + schedule.alpha(s) * (slope * first + 2 * curve * bend)


def common_grids(schedule: Schedule, n: int) -> dict[str, list[float]]:
    """The grids of n steps that samplers commonly use, by name: n + 1 times each, from the noise down to 0."""
    return {
        "uniform": uniform_times(n),
        "quadratic": quadratic_times(n),
        "log-SNR": log_snr_times(schedule, n),
        "Karras": karras_times(schedule, n),
        "shift 2": shift_times(uniform_times(n), 2.0),
        "shift 1/2": shift_times(uniform_times(n), 0.5),
    }


@torch.no_grad()
def best_grids(session: Session, solve: Callable[[Denoiser, Tensor, list[float]], Tensor]) -> dict[str, Tensor]:
    """Of `common_grids`, for every rung, the one on which a solver ends nearest to the exact solution. For `prepare`.

    solve(denoise, noise, times) gives samples. Nearest in mean square over 256 noises to 64 steps of Heun's method;
    no image is looked at. Returns {"times_<rung>": float64 [rung + 1]}.
    """
    label = session.train["condition"].to(session.device)
    n, device = session.scale(256, 16), session.device
    condition = label[torch.randint(len(label), (n,), generator=session.rng, device=device)]
    noise = torch.randn(n, *session.train["x0"].shape[1:], generator=session.rng, device=device)
    denoise, exact = Denoiser(session.networks["teacher"], condition), noise
    times = uniform_times(session.scale(64, 8))
    for t, s in pairwise(times[:-1]):
        exact = heun_step(denoise, exact, t, s)
    exact = ddim_step(denoise.schedule, *denoise(exact, times[-2]), 0.0)
    chosen = {}
    for rung in session.progress(session.scale(session.task.rungs, session.task.smoke_rungs), "grids"):
        candidates = list(common_grids(denoise.schedule, rung).values())
        errors = [float((solve(denoise, noise, grid) - exact).square().mean()) for grid in candidates]
        chosen[f"times_{rung}"] = torch.tensor(candidates[int(np.argmin(errors))], dtype=torch.float64)
    return chosen


def bridge_step(x0: Tensor, x: Tensor, t: Tensor, s: Tensor, epsilon: float, rng: torch.Generator) -> Tensor:
    """x_s [B, ...] of the Brownian bridge that is at x0 at time 0 and at x at time t, for s < t, [B] each.

    Normal with mean (1 - s/t) x0 + (s/t) x and variance epsilon s (t - s) / t; at s = 0 it is x0.
    """
    shape = (-1, *[1] * (x.dim() - 1))
    ratio, spread = (s / t).view(shape), (epsilon * s * (t - s) / t).sqrt().view(shape)
    return torch.lerp(x0, x, ratio) + spread * torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
