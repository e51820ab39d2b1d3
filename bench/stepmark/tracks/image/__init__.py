"""Track image: how good are the images (or points) a generator draws from noise with a budget of network evaluations?

A rung is a number of function evaluations (NFE) per item; classifier-free guidance evaluates two rows per item and
counts twice. `run` receives {"noise": [B, ...], "condition": int64 [B] or [B, slots]} and returns samples shaped like
the noise. All methods get the same noise for a seed, so that their figures are paired.

Time runs from t = 1 (pure noise) to t = 0 (data), x_t = alpha(t) x0 + sigma(t) eps, with `Schedule` for alpha, sigma
and log-SNR, grids of times for samplers (`uniform_times`, `karras_times`, ...), a `Denoiser` that turns one evaluation
of any network into predictions of x0 and eps, and single steps of the standard solvers (`ddim_step`, `heun_step`,
`dpm_solver_pp_step`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.backbones.unet import TRAIN_TIMESTEPS, alphas_cumprod
from stepmark.task import BadOutput, Score, Task, harness_only, load_split

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stepmark.distributed import Exchange, Group
    from stepmark.session import Session

TASKS = (
    Task(
        id="sampling/mixtures_flow",
        version=1,
        summary="Sample two 2-D Gaussian mixtures with the exact velocity field",
        dataset="mixtures",
        backbones={"teacher": "mixtures_flow"},
        reference="teacher",
        unit="NFE",
        rungs=(1, 2, 4, 8, 16, 32, 64),
        metrics={"sliced_w2": "lower", "endpoint_error": "lower"},
        n=2000,
        batch=2000,
        seeds=3,
        smoke_n=64,
        smoke_rungs=(4,),
    ),
    Task(
        id="sampling/mixtures_eps",
        version=1,
        summary="Sample two 2-D Gaussian mixtures with the exact noise prediction, variance-preserving path",
        dataset="mixtures",
        backbones={"teacher": "mixtures_eps"},
        reference="teacher",
        unit="NFE",
        rungs=(1, 2, 4, 8, 16, 32, 64),
        metrics={"sliced_w2": "lower", "endpoint_error": "lower"},
        n=2000,
        batch=2000,
        seeds=3,
        smoke_n=64,
        smoke_rungs=(4,),
    ),
    Task(
        id="class_to_image/digits_flow",
        version=1,
        summary="8x8 digits by class, rectified-flow teacher",
        dataset="digits",
        backbones={"teacher": "digits_flow_a"},
        judges={"classifier": "digits_classifier"},
        reference="teacher",
        unit="NFE",
        rungs=(1, 2, 4, 8, 9, 16, 50),
        metrics={"fd": "lower"},
        n=2000,
        batch=100,
        seeds=3,
        smoke_n=64,
        smoke_rungs=(4,),
    ),
    Task(
        id="class_to_image/digits_flow_b",
        version=1,
        summary="8x8 digits by class, rectified-flow teacher of a second training seed",
        dataset="digits",
        backbones={"teacher": "digits_flow_b"},
        judges={"classifier": "digits_classifier"},
        reference="teacher",
        unit="NFE",
        rungs=(1, 2, 4, 8, 9, 16),
        metrics={"fd": "lower"},
        n=2000,
        batch=100,
        seeds=2,
        smoke_n=64,
        smoke_rungs=(4,),
    ),
    Task(
        id="class_to_image/digits_eps",
        version=1,
        summary="8x8 digits by class, DDPM teacher (noise prediction)",
        dataset="digits",
        backbones={"teacher": "digits_eps_a"},
        judges={"classifier": "digits_classifier"},
        reference="teacher",
        unit="NFE",
        rungs=(1, 2, 4, 6, 8, 10, 16),
        metrics={"fd": "lower"},
        n=2000,
        batch=100,
        seeds=3,
        smoke_n=64,
        smoke_rungs=(4,),
    ),
    Task(
        id="class_to_image/digits_eps_b",
        version=1,
        summary="8x8 digits by class, DDPM teacher (noise prediction) of a second training seed",
        dataset="digits",
        backbones={"teacher": "digits_eps_b"},
        judges={"classifier": "digits_classifier"},
        reference="teacher",
        unit="NFE",
        rungs=(1, 2, 4, 6, 8, 10, 16),
        metrics={"fd": "lower"},
        n=2000,
        batch=100,
        seeds=2,
        smoke_n=64,
        smoke_rungs=(4,),
    ),
    Task(
        id="class_to_image/digits_dit",
        version=1,
        summary="8x8 digits by class, rectified-flow diffusion transformer",
        dataset="digits",
        backbones={"teacher": "digits_dit"},
        judges={"classifier": "digits_classifier"},
        reference="teacher",
        unit="NFE",
        rungs=(1, 2, 4, 8, 16, 50),
        metrics={"fd": "lower"},
        n=2000,
        batch=100,
        seeds=2,
        smoke_n=32,
        smoke_rungs=(4,),
    ),
    Task(
        id="attributes_to_image/shapes16",
        version=1,
        summary="16x16 images of a shape of given form and colour, rectified-flow teacher, exact verifier",
        dataset="shapes16",
        backbones={"teacher": "shapes16_flow"},
        judges={"classifier": "shapes16_classifier"},
        reference="teacher",
        unit="NFE",
        rungs=(1, 2, 4, 8, 16),
        metrics={"fd": "lower", "alignment": "higher"},
        n=1000,
        batch=100,
        seeds=2,
        smoke_n=64,
        smoke_rungs=(4,),
    ),
)

# --- schedules and predictions ---------------------------------------------------------------------------------------


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
        """Scale of the signal."""
        if self.flow:
            return 1 - t
        half = 0.5 * self._interpolate(t, self._places, self._log_abar)
        return half.exp() if isinstance(half, Tensor) else math.exp(half)

    def sigma(self, t: Any) -> Any:
        """Scale of the noise."""
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
        """The inverse of `log_snr`."""
        if self.flow:
            return torch.sigmoid(-log_snr) if isinstance(log_snr, Tensor) else 1 / (1 + math.exp(log_snr))
        if isinstance(log_snr, Tensor):
            log_abar: Any = -torch.nn.functional.softplus(-2 * log_snr)
        else:
            log_abar = -float(np.logaddexp(0.0, -2 * log_snr))
        return self._interpolate(log_abar, self._log_abar[::-1], self._places[::-1])

    def network_time(self, t: Any) -> Any:
        """What the network takes as its time argument."""
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
        """What the network itself predicts (eps or v), guided."""
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


# --- grids of times: n + 1 floats from the noisiest down to 0, one evaluation at each but the last -------------------


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


# --- single steps of solvers: from x at time t to time s < t ---------------------------------------------------------


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
    """x + (s - t) dx/dt; velocity is what a flow network predicts."""
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


def unipc_step(
    schedule: Schedule,
    x: Tensor,
    past: Sequence[tuple[float, Tensor]],
    s: float,
    order: int = 2,
    ahead: Tensor | None = None,
) -> Tensor:
    """From x at the time of `past[-1]` to time s: the predictor UniP, or with `ahead` the corrector UniC (Zhao et al.
    2023, equations 3 and 8, predicted data, B(h) = e^h - 1).

    past: (time, prediction of x0) of the evaluations so far, the latest last; `order` of them are used, and the order
    falls to the number there is. ahead: prediction of x0 at the predicted point at s. A step of infinite length in
    log-SNR, from pure noise of a flow or to the data, is of first order and has no corrector.
    """
    t, x0 = past[-1]
    now = schedule.log_snr(t)
    h = schedule.log_snr(s) - now
    alpha, phi = schedule.alpha(s), math.expm1(-h)  # phi_1 of the paper times -h, and B(h) of its variant bh2
    base = (schedule.sigma(s) / schedule.sigma(t)) * x - alpha * phi * x0
    if math.isinf(h):
        return base
    known = [(schedule.log_snr(u), m) for u, m in past[-order:-1] if math.isfinite(schedule.log_snr(u))]
    points = [((at - now) / h, m) for at, m in reversed(known)] + ([] if ahead is None else [(1.0, ahead)])
    if not points:
        return base
    moments, term = [], phi / -h - 1
    for k in range(1, len(points) + 1):
        moments.append(term * math.factorial(k) / phi)
        term = term / -h - 1 / math.factorial(k + 1)
    powers = np.vander([r for r, _ in points], increasing=True).T
    weights = [0.5] if len(points) == 1 else np.linalg.solve(powers, moments).tolist()
    slopes = [w / r * (m - x0) for w, (r, m) in zip(weights, points, strict=True)]
    return base - alpha * phi * torch.stack(slopes).sum(0)


def exponential_weights(schedule: Schedule, times: Sequence[float], s: float) -> list[float]:
    """Weight of the noise predicted at each of `times` (the latest last) in a DEIS step to s > 0 (Zhang and Chen 2023,
    equation 15).

    integral of l_i(log rho) d rho from the latest time to s, rho = sigma / alpha, l_i the Lagrange basis on the nodes
    log rho(times): exact by Gauss-Legendre quadrature, as the integrand is a polynomial times an exponential.
    """
    nodes = [-schedule.log_snr(t) for t in times]
    start, end = nodes[-1], -schedule.log_snr(s)
    place, weight = np.polynomial.legendre.leggauss(16)
    at = 0.5 * (end - start) * place + 0.5 * (end + start)
    found = []
    for i, node in enumerate(nodes):
        basis = np.prod([(at - other) / (node - other) for j, other in enumerate(nodes) if j != i], axis=0)
        found.append(float((0.5 * (end - start) * weight * basis * np.exp(at)).sum()))
    return found


def unipc_sample(denoise: Denoiser, x: Tensor, times: Sequence[float], order: int = 2) -> Tensor:
    """Samples [B, ...] from noise x: every evaluation corrects the step that led to it, then predicts the next (UniPC,
    algorithm 1). One evaluation a step.
    """
    past: list[tuple[float, Tensor]] = []
    before = x
    for t, s in pairwise(times):
        x0 = denoise(x, t)[0]
        if past:
            x = unipc_step(denoise.schedule, before, past, t, order, ahead=x0)
        past = [*past, (t, x0)][-order:]
        before, x = x, unipc_step(denoise.schedule, x, past, s, order)
    return x


def deis_sample(denoise: Denoiser, x: Tensor, times: Sequence[float], order: int = 3) -> Tensor:
    """Samples [B, ...] from noise x by DEIS with the last `order` predictions; the step to the data is DDIM's."""
    schedule = denoise.schedule
    past: list[tuple[float, Tensor]] = []
    for t, s in pairwise(times):
        x0, eps = denoise(x, t)
        if s == 0:
            return ddim_step(schedule, x0, eps, s)
        past = [*past, (t, eps)][-order:]
        weights = exponential_weights(schedule, [u for u, _ in past], s)
        step = torch.stack([w * e for w, (_, e) in zip(weights, past, strict=True)]).sum(0)
        x = schedule.alpha(s) * (x / schedule.alpha(t) + step)
    return x


# --- the grid that suits a solver --------------------------------------------------------------------------------------


def common_grids(schedule: Schedule, n: int) -> dict[str, list[float]]:
    """The grids of n steps that samplers commonly use, by name."""
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


# --- training in prepare -----------------------------------------------------------------------------------------------


def fit(
    session: Session,
    network: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    rate: float = 1e-3,
    ema: float = 0.99,
    clip: float | None = None,
) -> list[float]:
    """Minimise `loss()`, which draws its own batch, over the parameters of a student; returns the losses.

    AdamW with 20 warm-up steps and a cosine down to 2 % of the rate. The network is left in eval mode holding the
    exponential moving average of its weights.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min((k + 1) / 20, 0.02 + 0.49 * (1 + math.cos(math.pi * k / steps)))
    )
    average = [p.detach().clone() for p in parameters]
    losses: list[float] = []
    network.train()
    for step in session.progress(range(steps), "train"):
        value = loss()
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimiser.step()
        schedule.step()
        losses.append(value.item())
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(ema, (step + 1) / (step + 10)))
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    network.eval()
    return losses


# --- students --------------------------------------------------------------------------------------------------------


def sinusoids(values: Tensor, width: int = 32, top: float = 1000.0) -> Tensor:
    """Sines and cosines [B, width] of values [B], at width / 2 frequencies from 1 to `top`."""
    frequency = torch.logspace(0, math.log10(top), width // 2, device=values.device, dtype=values.dtype)
    angle = values[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def pseudo_huber(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over items [B, ...] of sqrt(|a - b|^2 + c^2) - c, c = 0.00054 sqrt(d) (Song and Dhariwal 2024)."""
    c = 0.00054 * math.sqrt(prediction[0].numel())
    return (((prediction - target).flatten(1).square().sum(1) + c**2).sqrt() - c).mean()


@torch.no_grad()
def teacher_pairs(session: Session, n: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """n noises, the samples to which so many DDIM steps of the teacher take them, and their conditions. For `prepare`.

    Conditions are drawn from the labels of the training data; no image is looked at.
    """
    label, shape = session.train["condition"].to(session.device), session.train["x0"].shape[1:]
    condition = label[torch.randint(len(label), (n,), generator=session.rng, device=session.device)]
    eps = torch.randn(n, *shape, generator=session.rng, device=session.device)
    samples = []
    for x, part in zip(session.progress(eps.split(200), "pairs"), condition.split(200), strict=True):
        denoise = Denoiser(session.networks["teacher"], part)
        for t, s in pairwise(uniform_times(steps)):
            x = ddim_step(denoise.schedule, *denoise(x, t), s)
        samples.append(x)
    return eps, torch.cat(samples), condition


class PointField(nn.Module):
    """An untrained perceptron for points of the plane, called like the networks of images: a velocity [B, 2].

    kinds: number of conditions. extra: further numbers [B, extra] that are appended to x, such as a latent.
    """

    prediction = "flow"

    def __init__(self, kinds: int, width: int = 128, extra: int = 0, outputs: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(kinds, 16)
        sizes = (2 + extra + 32 + 16, width, width, width)
        hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.body = nn.Sequential(*hidden, nn.Linear(width, outputs))

    def null_condition(self, condition: Tensor) -> Tensor:
        """Points have no unconditional branch."""
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.body(torch.cat([x, sinusoids(t, top=100.0), self.table(condition)], 1))


def fit_coupled(
    session: Session,
    network: nn.Module,
    couple: Callable[[Tensor, Tensor, Tensor], Tensor],
    steps: int,
    batch: int = 256,
    pool: int = 1024,
    rate: float = 2e-3,
) -> None:
    """Flow matching from scratch with paired noise: |v(x_t, t) - (eps - x0)|^2, x_t = (1 - t) x0 + t eps, t uniform.

    couple(eps, x0, condition) gives, for a pool of data [pool, ...], the index [pool] of the noise of each; a pool
    serves pool / batch updates, so that a coupling may look at more items than an update needs (Cheng and Schwing
    2025, section 3.3).
    """
    rng, device = session.rng, session.device
    data, label = (session.train[key].to(device) for key in ("x0", "condition"))
    schedule = schedule_of(network)
    waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def loss() -> Tensor:
        if not waiting:
            pick = torch.randint(len(data), (pool,), generator=rng, device=device)
            noise = torch.randn(data[pick].shape, generator=rng, device=device)
            chosen = couple(noise, data[pick], label[pick])
            waiting.extend(zip(*(part.split(batch) for part in (data[pick], noise[chosen], label[pick])), strict=True))
        x0, eps, condition = waiting.pop()
        t = torch.rand(len(x0), generator=rng, device=device)
        v = network(add_noise(schedule, x0, eps, t), t, condition)
        return (v - (eps - x0)).square().mean()

    fit(session, network, loss, steps, rate, ema=0.997)


def bridge_step(x0: Tensor, x: Tensor, t: Tensor, s: Tensor, epsilon: float, rng: torch.Generator) -> Tensor:
    """x_s [B, ...] of the Brownian bridge that is at x0 at time 0 and at x at time t, for s < t, [B] each.

    Normal with mean (1 - s/t) x0 + (s/t) x and variance epsilon s (t - s) / t; at s = 0 it is x0.
    """
    shape = (-1, *[1] * (x.dim() - 1))
    ratio, spread = (s / t).view(shape), (epsilon * s * (t - s) / t).sqrt().view(shape)
    return torch.lerp(x0, x, ratio) + spread * torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)


class GuidanceAdapter(nn.Module):
    """Cross-attention from features [B, C, H, W] to tokens [B, n, width], one head; gives zero until it is trained."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, width, bias=False)
        self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, channels, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        score = self.query(features.flatten(2).mT) @ self.key(tokens).mT / math.sqrt(tokens.shape[-1])
        return self.out(score.softmax(-1) @ self.value(tokens)).mT.reshape(features.shape)


class AdaptedUNet(nn.Module):
    """A frozen UNet with a `GuidanceAdapter` behind every residual block, told time, condition and guidance scale.

    Called as network(x, t, condition, scale) with scale float [B]. Adapters share three small projections of the
    time and condition as the UNet itself embeds them, and of sinusoids of the scale.
    """

    def __init__(self, base: nn.Module, width: int = 10) -> None:
        super().__init__()
        from diffusers.models.resnet import ResnetBlock2D

        self.base, self.prediction = base.requires_grad_(False), base.prediction
        features = base.table.embedding_dim
        self.embed = nn.ModuleList(nn.Linear(n, width) for n in (features, features, 32))
        blocks = [part for part in base.unet.modules() if isinstance(part, ResnetBlock2D)]
        self.adapters = nn.ModuleList(GuidanceAdapter(block.out_channels, width) for block in blocks)
        self._tokens = torch.zeros(0)
        for block, adapter in zip(blocks, self.adapters, strict=True):
            block.register_forward_hook(
                lambda _, inputs, output, adapter=adapter: output + adapter(output, self._tokens)
            )

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, scale: Tensor) -> Tensor:
        base = self.base
        step = t * TRAIN_TIMESTEPS if self.prediction == "flow" else t
        time = base.unet.time_embedding(base.unet.time_proj(step))
        parts = (time, base.embed(base.table(condition)), sinusoids(scale, top=10.0))
        self._tokens = torch.stack([embed(part) for embed, part in zip(self.embed, parts, strict=True)], 1)
        return base(x, t, condition)


def guided_rows(network: nn.Module, x: Tensor, t: Tensor, condition: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance with a time t [B] and scale [B] of its own for every row: null + scale (cond - null)."""
    twice = torch.cat([network.null_condition(condition), condition])
    null, conditional = network(torch.cat([x, x]), torch.cat([t, t]), twice).chunk(2)
    return torch.lerp(null, conditional, scale.view(-1, *[1] * (x.dim() - 1)))


# --- kernels ---------------------------------------------------------------------------------------------------------


def fused(kernel: str, x: Tensor, *arguments: Any) -> Tensor:
    """A function of `stepmark.kernels` by its name: in Triton on a GPU where no gradient is wanted, else in plain torch.

    "sampler_step": x, output, guidance, a, b; "adaptive_norm": x, scale, shift, eps (see `kernels/reference.py`).
    """
    module = "reference"
    if x.is_cuda and not torch.is_grad_enabled() and importlib.util.find_spec("triton"):
        module = kernel
    return getattr(importlib.import_module(f"stepmark.kernels.{module}"), kernel)(x, *arguments)


# --- decoupled transformers (DDT) --------------------------------------------------------------------------------------


class DecoupledBlock(nn.Module):
    """A transformer block on [B, L, width] whose norms and residuals are modulated by c, [B, 1 or L, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """As x."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(c).chunk(6, -1)
        inner = fused("adaptive_norm", x, scale, shift)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(inner).chunk(3, -1))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.out(mixed)
        return x + gate_mlp * self.mlp(fused("adaptive_norm", x, scale_mlp, shift_mlp))


class DecoupledDiT(nn.Module):
    """A decoupled diffusion transformer (Wang et al. 2025): z = encoder(x_t, t, y), v = decoder(x_t, t, z).

    The encoder's blocks are modulated by time and class, the decoder's token by token by z = SiLU(t + what the encoder
    found). Called as network(x, t, condition) it gives (v, z); called with the z of another step, the encoder is left
    out.
    """

    prediction = "flow"

    def __init__(
        self, size: int, channels: int, kinds: int, width: int = 64, encoder: int = 4, decoder: int = 2, patch: int = 2
    ) -> None:
        super().__init__()
        self.patch, self.width, planes = patch, width, channels * patch**2
        self.place = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.see, self.draw = nn.Linear(planes, width), nn.Linear(planes, width)  # one for each half
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.kind = nn.Embedding(kinds, width)
        self.encoder = nn.ModuleList(DecoupledBlock(width, 4) for _ in range(encoder))
        self.decoder = nn.ModuleList(DecoupledBlock(width, 4) for _ in range(decoder))
        self.last_modulation, self.last = nn.Linear(width, 2 * width), nn.Linear(width, planes)
        for layer in (self.last_modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """v [B, C, H, W] and z [B, L, width] for x [B, C, H, W], t float [B], condition int64 [B]."""
        silu, grid = torch.nn.functional.silu, x.shape[-1] // self.patch
        tokens = torch.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)
        time = self.time(sinusoids(t, 64))[:, None]
        if z is None:
            state, c = self.see(tokens) + self.place, silu(time + self.kind(condition)[:, None])
            for block in self.encoder:
                state = block(state, c)
            z = silu(time + state)
        h = self.draw(tokens) + self.place
        for block in self.decoder:
            h = block(h, z)
        shift, scale = self.last_modulation(z).chunk(2, -1)
        out = self.last(fused("adaptive_norm", h, scale, shift))
        return torch.pixel_shuffle(out.transpose(1, 2).unflatten(2, (grid, -1)), self.patch), z


def masked_features(session: Session, patch: int = 2, width: int = 32) -> Callable[[Tensor], Tensor]:
    """A small self-supervised encoder, images -> [B, L, width]: it is trained to fill in patches that were blanked."""
    data, rng, device = session.train["x0"].to(session.device), session.rng, session.device
    layers = [nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
    trunk = nn.Sequential(nn.Conv2d(data.shape[1], width, patch, stride=patch), *layers)
    whole = nn.Sequential(trunk, nn.SiLU(), nn.Conv2d(width, data.shape[1] * patch**2, 1)).to(device)

    def loss() -> Tensor:
        x = data[torch.randint(len(data), (128,), generator=rng, device=device)]
        target = torch.pixel_unshuffle(x, patch)
        blank = (torch.rand(len(x), 1, *target.shape[2:], generator=rng, device=device) < 0.5).to(x.dtype)
        missing = whole(x * (1 - blank.repeat_interleave(patch, 2).repeat_interleave(patch, 3)))
        return (blank * (missing - target).square()).mean()

    fit(session, whole, loss, session.scale(400, 4))
    return torch.no_grad()(lambda x: trunk(x).flatten(2).transpose(1, 2))


def fit_decoupled(session: Session, network: nn.Module, steps: int = 900, layer: int = 2, weight: float = 0.5) -> None:
    """Train a decoupled transformer on flow matching, with tokens of an encoder layer aligned to `masked_features`.

    loss = |v - (eps - x0)|^2 + weight (1 - cos(projection(encoder layer), features of the clean image)), times
    distributed as the sigmoid of a normal variable.
    """
    data, label, rng, device = (
        *(session.train[k].to(session.device) for k in ("x0", "condition")),
        session.rng,
        session.device,
    )
    features, seen = masked_features(session), []
    size = features(data[:1]).shape[-1]
    project = nn.Sequential(nn.Linear(network.width, network.width), nn.SiLU(), nn.Linear(network.width, size)).to(
        device
    )
    hook = network.encoder[layer - 1].register_forward_hook(lambda module, given, found: seen.append(found))

    def loss() -> Tensor:
        pick = torch.randint(len(data), (64,), generator=rng, device=device)
        x0, t = data[pick], torch.randn(64, generator=rng, device=device).sigmoid()
        eps = torch.randn(x0.shape, generator=rng, device=device)
        v = network(add_noise(_default_schedule("flow"), x0, eps, t), t, label[pick])[0]
        alike = torch.nn.functional.cosine_similarity(project(seen.pop()), features(x0), dim=-1)
        return (v - (eps - x0)).square().mean() + weight * (1 - alike).mean()

    fit(session, nn.ModuleList([network, project]), loss, session.scale(steps, 4), clip=1.0)
    hook.remove()


def sample_decoupled(
    network: nn.Module, x: Tensor, condition: Tensor, steps: int, recomputed: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Euler steps of a decoupled transformer whose encoder runs in the `recomputed` steps only (0 among them), its z being
    kept in between. Returns the samples [B, ...] and the z of every step [steps, B, L, width].
    """
    z, kept = None, []
    for step, (t, s) in enumerate(pairwise(uniform_times(steps))):
        time = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        v, z = network(x, time, condition, None if step in recomputed else z)
        x = euler_step(x, v, t, s)
        kept.append(z)
    return x, torch.stack(kept)


@torch.no_grad()
def state_similarity(session: Session, network: nn.Module, steps: int) -> Tensor:
    """S [steps, steps]: mean cosine of the tokens of z between any two steps, on noises with classes of the train split."""
    label, n = session.train["condition"].to(session.device), session.scale(64, 8)
    condition = label[torch.randint(len(label), (n,), generator=session.rng, device=session.device)]
    noise = torch.randn(n, *session.train["x0"].shape[1:], generator=session.rng, device=session.device)
    states = sample_decoupled(network, noise, condition, steps, range(steps))[1]
    unit = torch.nn.functional.normalize(states.flatten(1, 2), dim=-1)
    return torch.einsum("ind,jnd->ij", unit, unit) / unit.shape[1]


def chosen_steps(similarity: Tensor, count: int) -> list[int]:
    """The `count` steps to recompute at, step 0 among them, that maximise the sum over steps i of S[i, last one <= i].

    Dynamic programming (Wang et al. 2025, section 4.3): best[k][i] is the least loss of the first i steps with k
    recomputations, the last of them at some j < i, so that best[k][i] = min over j of best[k-1][j] + the sum of 1 - S[l, j]
    for l = j .. i - 1.
    """
    loss = (1 - similarity.double()).tolist()
    steps, infinite = len(loss), float("inf")
    spans = [[0.0] * (steps + 1) for _ in range(steps)]  # spans[j][i]: steps j .. i - 1 use the z of step j
    for j in range(steps):
        for i in range(j, steps):
            spans[j][i + 1] = spans[j][i] + loss[i][j]
    best = [[0.0] + [infinite] * steps]
    origin: list[list[int]] = []
    for _ in range(count):
        reached = [
            min((best[-1][j] + spans[j][i], j) for j in range(i)) if i else (infinite, 0) for i in range(steps + 1)
        ]
        best.append([value for value, _ in reached])
        origin.append([j for _, j in reached])
    chosen, end = [], steps
    for places in reversed(origin):
        end = places[end]
        chosen.append(end)
    return chosen[::-1]


# --- patch parallelism -------------------------------------------------------------------------------------------------


class Bands:
    """A network evaluated on bands: every rank of a group holds a horizontal band of each image, and of each activation.

    Convolutions take the rows beyond the border, self-attention further keys and values and group norms the statistics
    from other ranks; while `synchronous` those of this evaluation, else those that were sent in the one before (Li et al.
    2024, displaced patch parallelism). The first convolution always takes fresh rows: latents, not activations.

    Args:
        group: the ranks, as many as there are bands, in order from the top.
        reach: whose keys and values attention sees beside its own. "all": those of every rank; a number f: of the
            neighbours the rows next to the border, as many as f of a band, and statistics of neighbours only; "none":
            nothing is exchanged at all, rows beyond the border are zero.

    Acts on diffusers' UNet2DModel and DiTTransformer2DModel in the wrappers of the backbones, inside `on(network)`.
    """

    def __init__(self, group: Group, reach: str | float = "all") -> None:
        self.group, self.reach, self.synchronous = group, reach, True
        self._sent: dict[nn.Module, Exchange] = {}
        self._statistics: dict[nn.Module, Tensor] = {}

    @property
    def neighbours(self) -> list[int]:
        """The ranks of the bands above and below."""
        return [rank for rank in (self.group.rank - 1, self.group.rank + 1) if 0 <= rank < self.group.size]

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of [..., height, width]."""
        return whole.chunk(self.group.size, -2)[self.group.rank]

    def join(self, band: Tensor) -> Tensor:
        """The whole [..., height, width] of everybody's bands."""
        return torch.cat(self.group.gather(band), -2)

    def output(self, denoise: Denoiser, band: Tensor, t: float) -> Tensor:
        """What the network predicts for this rank's band."""
        found = denoise.output(band, t)
        return found if found.shape == band.shape else self.own(found)

    @contextlib.contextmanager
    def on(self, network: nn.Module) -> Iterator[None]:
        """Inside, the network takes and gives bands."""
        forwards: dict[nn.Module, Callable[..., Tensor]] = {}
        for part in network.modules():
            kind = type(part).__name__
            if isinstance(part, nn.Conv2d) and part.padding[0]:
                first = part is getattr(getattr(network, "unet", None), "conv_in", None)
                forwards[part] = functools.partial(self._convolution, part, first)
            elif isinstance(part, nn.GroupNorm):
                forwards[part] = functools.partial(self._norm, part)
            elif kind == "Attention":
                forwards |= {linear: functools.partial(self._keys, linear) for linear in (part.to_k, part.to_v)}
            elif kind == "PatchEmbed":
                forwards[part] = functools.partial(self._tokens, part)
            elif kind == "DiTTransformer2DModel":
                forwards[part.proj_out_2] = functools.partial(self._in_place, part.proj_out_2)
        coordinates = getattr(network, "coordinates", None)
        try:
            for part, forward in forwards.items():
                part.forward = forward
            if coordinates is not None:
                network.coordinates = self.own(coordinates)
            yield
        finally:
            for part in forwards:
                part.__dict__.pop("forward", None)
            if coordinates is not None:
                network.coordinates = coordinates

    def _remote(self, part: nn.Module, outgoing: dict[int, Tensor], fresh: bool = False) -> dict[int, Tensor]:
        """Send, and return what the listed ranks sent for the same module: now, or in the evaluation before."""
        if self.reach == "none":
            return {}
        now = self.group.exchange(outgoing)
        before, self._sent[part] = self._sent.get(part, now), now
        return (now if self.synchronous or fresh else before).wait()

    def _convolution(self, part: nn.Conv2d, fresh: bool, x: Tensor) -> Tensor:
        edge, above, below = int(part.padding[0]), self.group.rank - 1, self.group.rank + 1
        rows = {above: x[:, :, :edge], below: x[:, :, -edge:]}
        got = self._remote(part, {rank: rows[rank] for rank in self.neighbours}, fresh)
        outside = torch.zeros_like(rows[above])
        padded = torch.cat([got.get(above, outside), x, got.get(below, outside)], 2)
        sides = (0, int(part.padding[1]))
        return torch.conv2d(padded, part.weight, part.bias, part.stride, sides, part.dilation, part.groups)

    def _norm(self, part: nn.GroupNorm, x: Tensor) -> Tensor:
        """Statistics of the whole image: of old ones, this rank's share is brought up to date (section 4.2)."""
        grouped = x.reshape(len(x), part.num_groups, -1)
        own = torch.stack([grouped.mean(-1), grouped.square().mean(-1)])
        peers = self.group.others if self.reach == "all" else self.neighbours
        before, self._statistics[part] = self._statistics.get(part, own), own
        got = self._remote(part, dict.fromkeys(peers, own))
        then = own if self.synchronous else before
        mean, square = torch.stack([then, *got.values()]).mean(0) + own - then
        variance = square - mean.square()
        variance = torch.where(variance < 0, own[1] - own[0].square(), variance)
        scale = (variance + part.eps).rsqrt()[..., None]
        normed = ((grouped - mean[..., None]) * scale).view(x.shape)
        shape = (1, -1, *[1] * (x.dim() - 2))
        return normed * part.weight.view(shape) + part.bias.view(shape)

    def _keys(self, part: nn.Linear, x: Tensor) -> Tensor:
        """Keys or values [B, L, d] of this band with those of other bands in their places."""
        own, rank = torch.nn.functional.linear(x, part.weight, part.bias), self.group.rank
        if isinstance(self.reach, str):
            outgoing = dict.fromkeys(self.group.others, own)
        else:
            width = math.isqrt(own.shape[1] * self.group.size)
            edge = width * max(1, round(self.reach * own.shape[1] / width))
            parts = {rank - 1: own[:, :edge], rank + 1: own[:, -edge:]}
            outgoing = {peer: parts[peer] for peer in self.neighbours}
        got = self._remote(part, outgoing) | {rank: own}
        return torch.cat([got[place] for place in sorted(got)], 1)

    def _tokens(self, part: nn.Module, x: Tensor) -> Tensor:
        """Patches of the band as tokens, with the position they have in the whole image."""
        tokens = part.proj(x).flatten(2).transpose(1, 2)
        return tokens + part.pos_embed.chunk(self.group.size, 1)[self.group.rank]

    def _in_place(self, part: nn.Linear, x: Tensor) -> Tensor:
        """The band's tokens of the output in their place among all, the others zero: diffusers builds a square of them."""
        out = torch.nn.functional.linear(x, part.weight, part.bias)
        whole = out.new_zeros(len(out), out.shape[1] * self.group.size, out.shape[2])
        whole.chunk(self.group.size, 1)[self.group.rank].copy_(out)
        return whole


# --- jumps along a flow ------------------------------------------------------------------------------------------------


class JumpMLP(nn.Module):
    """Mean velocity from time t to s < t at points of the plane: x_s = x_t - (t - s) u(x_t, t, s).

    aware: whether it is told s. Without it, u is one direction for every s: the mean of the exact ones over s, as they are met.
    """

    def __init__(self, kinds: int, aware: bool, width: int = 128) -> None:
        super().__init__()
        self.aware = aware
        self.table = nn.Embedding(kinds, 16)
        sizes = (2 + 64 + 16, width, width, width)
        hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.body = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Tensor) -> Tensor:
        """u [B, 2] at x [B, 2], t and s float [B], condition int64 [B]."""
        times = torch.stack([t, s if self.aware else torch.zeros_like(s)], 1)
        angle = times[:, :, None] * torch.logspace(0, 2, 16, device=x.device, dtype=x.dtype)
        waves = torch.cat([angle.sin(), angle.cos()], 2).flatten(1)
        return self.body(torch.cat([x, waves, self.table(condition)], 1))


@torch.no_grad()
def flow_paths(denoise: Denoiser, noise: Tensor, times: Sequence[float]) -> Tensor:
    """States [len(times), B, ...] of the exact ODE of a flow at each of `times`, by Heun's method, the last step DDIM's."""
    states = [noise]
    for t, s in pairwise(times):
        x = states[-1]
        states.append(heun_step(denoise, x, t, s) if s > 0 else ddim_step(denoise.schedule, *denoise(x, t), s))
    return torch.stack(states)


def fit_jumps(session: Session, network: nn.Module, steps: int = 6000, batch: int = 1024) -> None:
    """Regress u on the mean velocity (x_t - x_s) / (t - s) between random times of the teacher's own trajectories."""
    rng, device, labels = session.rng, session.device, session.train["condition"].to(session.device)
    n = session.scale(8000, 64)
    condition = labels[torch.randint(len(labels), (n,), generator=rng, device=device)]
    noise = torch.randn(n, 2, generator=rng, device=device)
    grid = quadratic_times(session.scale(96, 8))
    paths = flow_paths(Denoiser(session.networks["teacher"], condition), noise.double(), grid).float()
    times = torch.tensor(grid, dtype=torch.float32, device=device)

    def loss() -> Tensor:
        item = torch.randint(n, (batch,), generator=rng, device=device)
        first, second = torch.randint(len(times) - 1, (2, batch), generator=rng, device=device)
        early, late = torch.minimum(first, second), torch.maximum(first, second) + 1
        t, s, x = times[early], times[late], paths[early, item]
        target = (x - paths[late, item]) / (t - s)[:, None]
        return (network(x, t, s, condition[item]) - target).square().mean()

    fit(session, network, loss, session.scale(steps, 4), rate=2e-3, ema=0.997)


@torch.no_grad()
def take_jumps(network: nn.Module, x: Tensor, condition: Tensor, times: Sequence[float]) -> Tensor:
    """From noise through `times`, one evaluation of u for each jump."""
    for t, s in pairwise(times):
        now, then = (torch.full((len(x),), time, dtype=x.dtype, device=x.device) for time in (t, s))
        x = x - (t - s) * network(x, now, then, condition)
    return x


# --- metrics ---------------------------------------------------------------------------------------------------------


def moments(features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [d] and unbiased covariance [d, d] of features [n, d]."""
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(
    mean: NDArray[np.float64],
    covariance: NDArray[np.float64],
    other_mean: NDArray[np.float64],
    other_covariance: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Squared Frechet distance between Gaussians (Dowson and Landau 1982; FID, Heusel et al. 2017).

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2), the last as the sum of the square roots of the eigenvalues of
    the symmetric matrix C2^(1/2) C1 C2^(1/2). mean [..., d] and covariance [..., d, d] may be stacked; returns [...].
    """
    values, vectors = np.linalg.eigh(other_covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covariance @ root)
    trace = np.trace(covariance, axis1=-2, axis2=-1) + np.trace(other_covariance)
    return ((mean - other_mean) ** 2).sum(-1) + trace - 2 * np.sqrt(cross.clip(min=0)).sum(-1)


def frechet_resampled(
    features: NDArray[np.float64],
    reference: tuple[NDArray[np.float64], NDArray[np.float64]],
    resample: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Frechet distance to the reference moments of every resample [B, n] of features [n, d]: float64 [B]."""
    n, d = features.shape
    counts = np.stack([np.bincount(row, minlength=n) for row in resample]).astype(np.float64)
    size = counts.sum(1, keepdims=True)
    centre = features.mean(0)
    shifted = features - centre
    # second moments of all resamples in one matrix product: the distinct products of features as columns
    rows, columns = np.triu_indices(d)
    mean = counts @ shifted / size
    packed = counts @ (shifted[:, rows] * shifted[:, columns])
    second = np.empty((len(counts), d, d))
    second[:, rows, columns] = packed
    second[:, columns, rows] = packed
    covariance = (second - size[:, :, None] * mean[:, :, None] * mean[:, None, :]) / (size[:, :, None] - 1)
    return frechet_distance(mean + centre, covariance, *reference)


def sliced_w2(
    samples: NDArray[np.float64],
    exact: NDArray[np.float64],
    resample: NDArray[np.int64] | None = None,
    directions: int = 16,
) -> NDArray[np.float64]:
    """Sliced 2-Wasserstein distance (Bonneel et al. 2015) from samples [n, 2] to exact samples [m, 2].

    Root mean square over `directions` equally spaced directions of the half circle. Returns float64 [B], one for every
    row of item indices of `resample`, or [1] without.
    """
    counts = np.ones((1, len(samples)), dtype=np.int64)
    if resample is not None:
        counts = np.stack([np.bincount(row, minlength=len(samples)) for row in resample])
    angles = math.pi * np.arange(directions) / directions
    axes = np.stack([np.cos(angles), np.sin(angles)])
    ours, theirs = samples @ axes, np.sort(exact @ axes, axis=0)
    order = np.argsort(ours, axis=0)
    places = (np.arange(len(theirs)) + 0.5) / len(theirs)
    total = np.zeros(len(counts))
    for k in range(directions):
        values = ours[order[:, k], k]
        for b, row in enumerate(counts):
            # quantiles of the resample by repetition in sorted order, those of the truth by interpolation
            quantiles = np.repeat(values, row[order[:, k]])
            truth = np.interp((np.arange(len(quantiles)) + 0.5) / len(quantiles), places, theirs[:, k])
            total[b] += ((quantiles - truth) ** 2).mean()
    return np.sqrt(total / directions)


def exact_endpoints(network: nn.Module, noise: Tensor, condition: Tensor, steps: int = 256) -> Tensor:
    """Where the probability-flow ODE of an exact network takes the noise: Heun in float64 on a dense grid, [B, 2]."""
    denoise = Denoiser(network, condition)
    x = noise.double()
    times = quadratic_times(steps)
    for t, s in pairwise(times[:-1]):
        x = heun_step(denoise, x, t, s)
    return ddim_step(denoise.schedule, *denoise(x, times[-2]), 0.0)


# --- what the harness calls ------------------------------------------------------------------------------------------


def _item_shape(task: Task) -> tuple[int, ...]:
    return {"mixtures": (2,), "digits": (1, 8, 8), "shapes16": (3, 16, 16)}[task.dataset]


def _conditions(task: Task, n: int) -> Tensor:
    """Balanced conditions of n items: every class (mixture, kind) in turn."""
    index = torch.arange(n)
    if task.dataset == "shapes16":
        return torch.stack([index % 3, 3 + index // 3 % 4], 1)
    return index % {"mixtures": 2, "digits": 10}[task.dataset]


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, ...] standard normal, "condition": balanced}, drawn on the CPU so that devices agree."""
    harness_only("the test inputs")
    noise = torch.randn(n, *_item_shape(task), generator=generator)
    return {"noise": noise.to(device), "condition": _conditions(task, n).to(device)}


def check(task: Task, batch: Mapping[str, Tensor], outputs: Any) -> None:
    """Samples must be one finite floating tensor shaped like the noise. Raises BadOutput."""
    expected = tuple(batch["noise"].shape)
    if not isinstance(outputs, Tensor):
        raise BadOutput(f"run returned {type(outputs).__name__}; return one tensor of shape {expected}")
    if tuple(outputs.shape) != expected:
        raise BadOutput(f"run returned shape {tuple(outputs.shape)}; the noise has {expected}")
    if not outputs.is_floating_point():
        raise BadOutput(f"run returned {outputs.dtype}; return floating-point samples")
    if not bool(torch.isfinite(outputs).all()):
        raise BadOutput(f"{int((~torch.isfinite(outputs)).sum())} values of the samples are not finite")


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics of the task over all items and over each bootstrap resample.

    fd: Frechet distance between classifier features of the samples and of the dataset's reference split, clamped to
    the range of the data. alignment: share of images whose shape and colour the exact verifier reads as asked.
    sliced_w2: to exact samples, mean of the two mixtures. endpoint_error: mean distance to the exact solution of the
    probability-flow ODE from the same noise.
    """
    harness_only("the metrics")
    outputs = outputs.detach().float().cpu()
    if task.dataset == "mixtures":
        return _score_points(task, batch, outputs, resample)
    classifier = networks["classifier"]
    found = _features(classifier, outputs.clamp(-1, 1))
    reference = _reference_moments(task.dataset, classifier)
    value = float(frechet_distance(*moments(found), *reference))
    scores = {"fd": Score(value, frechet_resampled(found, reference, resample).tolist())}
    if "alignment" in task.metrics:
        from stepmark.datasets import shapes16

        read = shapes16.read_attributes(outputs)
        right = (read == batch["condition"].cpu()).all(1).numpy().astype(np.float64)
        scores["alignment"] = Score(float(right.mean()), right[resample].mean(1).tolist())
    return scores


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Image tasks have no simulators."""
    return {}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> int:
    """One evaluation of the teacher for every item of the batch; returns their number."""
    teacher = networks["teacher"]
    Denoiser(teacher, batch["condition"]).output(batch["noise"], 1.0)
    return len(batch["noise"])


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """Rows of the forward are counted, not layers."""
    return []


def _features(classifier: nn.Module, images: Tensor) -> NDArray[np.float64]:
    device = next(classifier.parameters()).device
    with torch.no_grad():
        parts = [classifier.features(part.to(device)).double().cpu() for part in images.split(500)]
    return torch.cat(parts).numpy()


_MOMENTS: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}


def _reference_moments(dataset: str, classifier: nn.Module) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    sha = hashlib.sha256(dataset.encode())
    for value in classifier.state_dict().values():
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    key = sha.hexdigest()
    if key not in _MOMENTS:
        _MOMENTS[key] = moments(_features(classifier, load_split(dataset, "reference")["x0"]))
    return _MOMENTS[key]


_ENDPOINTS: dict[str, Tensor] = {}


def _endpoints(task: Task, batch: Mapping[str, Tensor]) -> Tensor:
    """Exact endpoints of the batch's noise, kept for the few seeds of a task: they cost 511 evaluations."""
    from stepmark.backbones import load

    noise, condition = batch["noise"].detach().cpu(), batch["condition"].cpu()
    key = f"{task.id} {hashlib.sha256(noise.contiguous().numpy().tobytes()).hexdigest()}"
    if key not in _ENDPOINTS:
        with torch.no_grad():
            _ENDPOINTS[key] = exact_endpoints(load(task.backbones["teacher"]), noise, condition)
    return _ENDPOINTS[key]


def _score_points(
    task: Task, batch: Mapping[str, Tensor], outputs: Tensor, resample: NDArray[np.int64]
) -> dict[str, Score]:
    condition = batch["condition"].cpu().numpy()
    points, exact = outputs.double().numpy(), load_split(task.dataset, "test")
    truth, truth_condition = exact["x0"].double().numpy(), exact["condition"].numpy()
    values, spread = [], []
    for mixture in np.unique(condition):
        inside = condition == mixture
        place = np.cumsum(inside) - 1
        target = truth[truth_condition == mixture]
        values.append(sliced_w2(points[inside], target)[0])
        rows = [place[row[inside[row]]] for row in resample]
        counts = sliced_w2(points[inside], target, rows)
        spread.append(counts)
    distance = np.linalg.norm(points - _endpoints(task, batch).numpy(), axis=1)
    return {
        "sliced_w2": Score(float(np.mean(values)), np.mean(spread, axis=0).tolist()),
        "endpoint_error": Score(float(distance.mean()), distance[resample].mean(1).tolist()),
    }
