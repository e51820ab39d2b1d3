"""Track `bayes`: inference whose cost is simulator, likelihood, score or Monte Carlo calls. No shipped network is needed.

Three kinds of task:

* `posterior/*`: a batch is `x` float32 [B, n, D], sets of n i.i.d. observations; a method returns `DRAWS` posterior draws
  of every set, float32 [B, DRAWS, d]. The prior is known (`problem(task).prior`), the likelihood is reached through the
  counted handles `log_likelihood(theta [R, d], x [R, D]) -> [R]` and `simulator(theta [R, d], generator) -> [R, D]`; one
  row is one observation. Amortised methods learn offline from one layout of `session.train` (all layouts hold the same
  number of simulator calls) and call their sampling network `score`; one row of it is one evaluation.
* `coverage/*`: a batch is `design` [B, 6, 4], linear-Gaussian models; a method tests every estimator of `ESTIMATORS` on
  every model from `rung` simulations and returns `statistic` and `p_value`, float [B, len(ESTIMATORS)].
* `effect/*`: a batch is `treatment` and `outcome` [B, T], daily series of B people, and `person` int64 [B]; a method
  returns `effect`, `low` and `high` (float [B]): the recurring effect and a 95 % interval, from `rung` virtual trials.

The exact posterior of every problem is a mixture of Gaussians, so that the distance of draws to it needs no reference
sample; it is out of a method's reach.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from stepmark.task import BadOutput, Score, Task, harness_only, load_split

DRAWS = 100
ESTIMATORS = ("exact", "overconfident", "underconfident", "shifted", "blind", "prior")

TASKS = (
    Task(
        id="posterior/gaussian_n1",
        version=1,
        summary="Posterior of a 2-D Gaussian mean from one observation; exact posterior Gaussian",
        dataset="gaussian_mean",
        bounded=("score", "log_likelihood", "simulator"),
        unit="model evaluations per 100 draws",
        rungs=(1_000, 3_200, 10_000, 32_000),
        metrics={"mmd": "lower", "sliced_w2": "lower", "mean_error": "lower", "spread_error": "lower"},
        n=32,
        batch=8,
        smoke_n=4,
        smoke_rungs=(1_000,),
    ),
    Task(
        id="posterior/gaussian_n10",
        version=1,
        summary="Posterior of a 2-D Gaussian mean from 10 observations; exact posterior Gaussian",
        dataset="gaussian_mean",
        bounded=("score", "log_likelihood", "simulator"),
        unit="model evaluations per 100 draws",
        rungs=(3_200, 10_000, 32_000, 96_000),
        metrics={"mmd": "lower", "sliced_w2": "lower", "mean_error": "lower", "spread_error": "lower"},
        n=32,
        batch=8,
        smoke_n=4,
        smoke_rungs=(3_200,),
    ),
    Task(
        id="posterior/gaussian_n30",
        version=1,
        summary="Posterior of a 2-D Gaussian mean from 30 observations; exact posterior Gaussian",
        dataset="gaussian_mean",
        bounded=("score", "log_likelihood", "simulator"),
        unit="model evaluations per 100 draws",
        rungs=(9_600, 32_000, 96_000, 288_000),
        metrics={"mmd": "lower", "sliced_w2": "lower", "mean_error": "lower", "spread_error": "lower"},
        n=24,
        batch=4,
        smoke_n=4,
        smoke_rungs=(9_600,),
    ),
    Task(
        id="posterior/gaussian10_n30",
        version=1,
        summary="Posterior of a 10-D Gaussian mean from 30 observations; exact posterior Gaussian",
        dataset="gaussian10_mean",
        bounded=("score", "log_likelihood", "simulator"),
        unit="model evaluations per 100 draws",
        rungs=(9_600, 32_000, 96_000, 288_000),
        metrics={"mmd": "lower", "sliced_w2": "lower", "mean_error": "lower", "spread_error": "lower"},
        n=24,
        batch=4,
        smoke_n=4,
        smoke_rungs=(9_600,),
    ),
    Task(
        id="posterior/mixture_n10",
        version=1,
        summary="Posterior of a wide Gaussian's mean from 10 observations under a four-mode prior; exact posterior multimodal",
        dataset="mixture_mean",
        bounded=("score", "log_likelihood", "simulator"),
        unit="model evaluations per 100 draws",
        rungs=(3_200, 10_000, 32_000, 96_000),
        metrics={"mmd": "lower", "sliced_w2": "lower", "mean_error": "lower", "spread_error": "lower"},
        n=32,
        batch=8,
        smoke_n=4,
        smoke_rungs=(3_200,),
    ),
    Task(
        id="coverage/linear_gaussian",
        version=1,
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
    Task(
        id="effect/wearable",
        version=1,
        summary="Recurring effect of an active day on sleep from 222 confounded days of one person; exact effect known",
        dataset="wearable",
        bounded=("trial",),
        unit="virtual trials",
        rungs=(16, 64, 256, 1_024),
        metrics={"rmse": "lower", "abs_bias": "lower", "coverage": "higher", "interval_width": "lower"},
        n=128,
        batch=16,
        smoke_n=8,
        smoke_rungs=(16,),
    ),
)


# Mixtures of Gaussians: priors, posteriors and their diffused forms ----------------------------------------------------


@dataclass(frozen=True)
class GaussianMixture:
    """Mixtures of Gaussians, one for each leading index.

    Attributes:
        log_weights: [..., K], normalised.
        means: [..., K, d].
        covariances: [..., K, d, d].
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor

    def _component_log_probs(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """log w_k N(theta; k) and its precision-weighted residual for theta [..., d]: [..., K], [..., K, d]."""
        residual = theta[..., None, :] - self.means
        precision = torch.linalg.inv(self.covariances)
        weighted = (precision @ residual[..., None]).squeeze(-1)
        quadratic = (residual * weighted).sum(-1)
        log_det = torch.logdet(2 * math.pi * self.covariances)
        return self.log_weights - 0.5 * (quadratic + log_det), weighted

    def log_prob(self, theta: Tensor) -> Tensor:
        """log density at theta [..., d], whose leading dimensions broadcast with the mixture's."""
        return self._component_log_probs(theta)[0].logsumexp(-1)

    def score(self, theta: Tensor) -> Tensor:
        """Gradient of the log density at theta [..., d]."""
        log_probs, weighted = self._component_log_probs(theta)
        return -(log_probs.softmax(-1)[..., None] * weighted).sum(-2)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` draws of every mixture, [..., count, d]."""
        *lead, k, d = self.means.shape
        device = self.means.device
        weights = self.log_weights.exp().reshape(-1, k)
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        means = self.means.reshape(-1, k, d).gather(1, chosen[..., None].expand(-1, -1, d))
        factors = torch.linalg.cholesky(self.covariances.expand(*lead, k, d, d)).reshape(-1, k, d, d)
        noise = torch.randn(*chosen.shape, d, generator=generator, device=device, dtype=means.dtype)
        rows = torch.arange(len(factors), device=device)[:, None]
        return (means + (factors[rows, chosen] @ noise[..., None]).squeeze(-1)).reshape(*lead, count, d)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [..., d] and covariance [..., d, d]."""
        weights = self.log_weights.exp()[..., None]
        mean = (weights * self.means).sum(-2)
        offset = self.means - mean[..., None, :]
        spread = self.covariances + offset[..., :, None] * offset[..., None, :]
        return mean, (weights[..., None] * spread).sum(-3)

    def affine(self, matrix: Tensor, centre: Tensor) -> GaussianMixture:
        """The law of `matrix @ (theta - centre)`; matrix [..., d, d], centre [..., d]."""
        means = ((self.means - centre[..., None, :])[..., None, :] @ matrix[..., None, :, :].mT).squeeze(-2)
        covariances = matrix[..., None, :, :] @ self.covariances @ matrix[..., None, :, :].mT
        return GaussianMixture(self.log_weights, means, covariances)

    def diffused(self, t: float) -> GaussianMixture:
        """The law of theta_t = sqrt(a) theta + sqrt(1 - a) e, a = `alpha_bar(t)`."""
        a = alpha_bar(t)
        eye = torch.eye(self.means.shape[-1], dtype=self.means.dtype, device=self.means.device)
        return GaussianMixture(self.log_weights, a**0.5 * self.means, a * self.covariances + (1 - a) * eye)

    def to(self, target: Tensor | torch.device | torch.dtype) -> GaussianMixture:
        """The same on another device or in another dtype."""
        return GaussianMixture(self.log_weights.to(target), self.means.to(target), self.covariances.to(target))


@dataclass(frozen=True)
class Problem:
    """A known prior and a Gaussian likelihood x | theta ~ N(theta, noise).

    Attributes:
        prior: float32 mixture without leading dimensions; methods may use it freely.
        noise: covariance of one observation, [d, d].
    """

    prior: GaussianMixture
    noise: Tensor

    def simulate(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        """One observation for each row of theta [R, d]: [R, d]."""
        normal = torch.randn(theta.shape, generator=generator, device=theta.device, dtype=theta.dtype)
        return theta + normal @ torch.linalg.cholesky(self.noise).mT.to(theta)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """log p(x | theta) of each row: theta [R, d], x [R, d] -> [R]."""
        residual = x - theta
        precision = torch.linalg.inv(self.noise).to(theta)
        log_det = torch.logdet(2 * math.pi * self.noise).to(theta)
        return -0.5 * (((residual @ precision) * residual).sum(-1) + log_det)

    def posterior(self, x: Tensor) -> GaussianMixture:
        """The exact posterior of every set x [..., n, d], in float64. Harness only."""
        harness_only("the exact posterior")
        x = x.double()
        prior, noise = self.prior.to(torch.float64).to(x.device), self.noise.to(x)
        n = x.shape[-2]
        mean = x.mean(-2)[..., None, :]  # [..., 1, d]: sufficient
        prior_precision, data_precision = torch.linalg.inv(prior.covariances), n * torch.linalg.inv(noise)
        covariances = torch.linalg.inv(prior_precision + data_precision)
        shift = (prior_precision @ prior.means[..., None]) + data_precision @ mean[..., None]
        means = (covariances @ shift).squeeze(-1)
        # Component k explains the sample mean with N(mean; mu_k, C_k + noise / n).
        spread = prior.covariances + noise / n
        residual = mean - prior.means
        quadratic = (residual[..., None, :] @ torch.linalg.inv(spread) @ residual[..., None]).squeeze(-1).squeeze(-1)
        log_weights = prior.log_weights - 0.5 * (quadratic + torch.logdet(spread))
        return GaussianMixture(log_weights.log_softmax(-1), means, covariances.expand(*means.shape, means.shape[-1]))


def problem(task: Task) -> Problem:
    """Prior and likelihood of a `posterior/*` task."""
    data = importlib.import_module(f"stepmark.datasets.{task.dataset}")
    means = torch.tensor(data.PRIOR_MEANS)
    covariances = data.PRIOR_STD**2 * torch.eye(means.shape[-1]).expand(len(means), -1, -1)
    prior = GaussianMixture(torch.tensor(data.PRIOR_WEIGHTS).log(), means, covariances)
    d = means.shape[-1]
    noise = data.NOISE_STD**2 * ((1 - data.CORRELATION) * torch.eye(d) + data.CORRELATION * torch.ones(d, d))
    return Problem(prior, noise)


def observations(task: Task) -> int:
    """How many observations a set of a `posterior/*` task holds."""
    return int(task.id.rsplit("_n", 1)[1])


# The harness's side ----------------------------------------------------------------------------------------------------


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """`n` test inputs, drawn without replacement from the test split (with, should n exceed it)."""
    harness_only("the test split")
    data = load_split(task.dataset, "test")
    size = len(next(iter(data.values())))
    index = torch.cat([torch.randperm(size, generator=generator) for _ in range(math.ceil(n / size))])[:n]
    if task.id.startswith("posterior/"):
        return {"x": data["x"][index, : observations(task)].to(device)}
    if task.id.startswith("coverage/"):
        return {"design": data["design"][index].to(device)}
    # The effect itself stays behind: `score` looks it up under the person's number.
    return {
        "treatment": data["treatment"][index].to(device),
        "outcome": data["outcome"][index].to(device),
        "person": index.to(device),
    }


def check(task: Task, batch: Mapping[str, Tensor], outputs: Any) -> None:
    """Raise `BadOutput` unless the outputs have the shapes that the module's docstring names, and finite values."""
    size = len(next(iter(batch.values())))
    if task.id.startswith("posterior/"):
        expected = {"draws": (size, DRAWS, batch["x"].shape[-1])}
        outputs = {"draws": outputs}
    elif task.id.startswith("coverage/"):
        expected = {name: (size, len(ESTIMATORS)) for name in ("statistic", "p_value")}
    else:
        expected = dict.fromkeys(("effect", "low", "high"), (size,))
    if not isinstance(outputs, Mapping):
        raise BadOutput(f"{task.id} expects a dict with {', '.join(expected)}, got {type(outputs).__name__}")
    for name, shape in expected.items():
        value = outputs.get(name)
        if not isinstance(value, Tensor):
            raise BadOutput(f"{name}: expected a tensor of shape {list(shape)}, got {type(value).__name__}")
        if tuple(value.shape) != shape:
            raise BadOutput(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
        if not value.is_floating_point():
            raise BadOutput(f"{name}: expected floating point, got {value.dtype}")
        if not bool(torch.isfinite(value).all()):
            raise BadOutput(f"{name}: holds NaN or infinite values")
    if "p_value" in expected and not bool(((outputs["p_value"] >= 0) & (outputs["p_value"] <= 1)).all()):
        raise BadOutput("p_value: lies outside [0, 1]")
    if "low" in expected and not bool((outputs["low"] <= outputs["high"]).all()):
        raise BadOutput("low: lies above high")


def score(
    task: Task, batch: Mapping[str, Tensor], outputs: Any, networks: Mapping[str, nn.Module], resample: np.ndarray
) -> dict[str, Score]:
    """The metrics of the task over the whole test set, and over each bootstrap row of item indices.

    `posterior/*`, each set standardised by the moments of its exact posterior: `mmd` is the root of the mean unbiased
    squared maximum mean discrepancy (Gaussian kernels of widths 1/2, 1 and 2 times sqrt(d/2); expectations under the exact
    posterior in closed form), 0 where the mean is negative; `sliced_w2` the mean 2-Wasserstein distance over 32
    directions; `mean_error` the root mean squared error of the draws' mean; `spread_error` the mean absolute log ratio of
    standard deviations.
    `coverage/*`: `power_*` and `false_alarm` are rejection rates at level 5 %, `power` the mean over the wrong
    estimators, `deviation_*` the mean statistic. `effect/*`: errors in hours, `coverage` of the 95 % intervals.
    """
    harness_only("the metrics")
    if task.id.startswith("posterior/"):
        posterior = problem(task).posterior(batch["x"].cpu())
        return _posterior_scores(posterior, outputs.detach().cpu().double(), resample)
    if task.id.startswith("coverage/"):
        statistic = outputs["statistic"].detach().cpu().double().numpy()
        rejected = (outputs["p_value"].detach().cpu().double().numpy() <= 0.05).astype(np.float64)
        found = {"power": _mean_score(rejected[:, 1:].mean(1), resample)}
        for k, name in enumerate(ESTIMATORS):
            found["false_alarm" if name == "exact" else f"power_{name}"] = _mean_score(rejected[:, k], resample)
            found[f"deviation_{name}"] = _mean_score(statistic[:, k], resample)
        return {name: found[name] for name in task.metrics}
    truth = load_split(task.dataset, "test")["effect"][batch["person"].cpu()].double().numpy()
    effect, low, high = (outputs[k].detach().cpu().double().numpy() for k in ("effect", "low", "high"))
    error = effect - truth
    return {
        "rmse": _mean_score(error**2, resample, np.sqrt),
        "abs_bias": _mean_score(error, resample, np.abs),
        "coverage": _mean_score(((low <= truth) & (truth <= high)).astype(np.float64), resample),
        "interval_width": _mean_score(high - low, resample),
    }


def _mean_score(values: np.ndarray, resample: np.ndarray, after: Callable[[Any], Any] = lambda v: v) -> Score:
    """`after` of the mean of per-item values, over all items and over each bootstrap row."""
    return Score(float(after(values.mean())), [float(v) for v in after(values[resample].mean(axis=1))])


def _posterior_scores(posterior: GaussianMixture, draws: Tensor, resample: np.ndarray) -> dict[str, Score]:
    mean, covariance = posterior.moments()
    # Symmetric inverse square root: the standardisation does not depend on the order of the parameters.
    values, vectors = torch.linalg.eigh(covariance)
    whiten = vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT
    target = posterior.affine(whiten, mean)
    points = (draws - mean[:, None]) @ whiten.mT
    mmd = squared_mmd(points, target).numpy()
    w2 = sliced_w2(points, target).numpy()
    offset = points.mean(1).square().mean(-1).numpy()
    spread = points.std(1).clamp_min(1e-12).log().abs().mean(-1).numpy()
    return {
        "mmd": _mean_score(mmd, resample, lambda v: np.sqrt(np.maximum(v, 0))),
        "sliced_w2": _mean_score(w2, resample),
        "mean_error": _mean_score(offset, resample, np.sqrt),
        "spread_error": _mean_score(spread, resample),
    }


def squared_mmd(points: Tensor, target: GaussianMixture, widths: tuple[float, ...] = (0.5, 1.0, 2.0)) -> Tensor:
    """Unbiased estimate [B] of the squared MMD between points [B, S, d] and mixtures (leading dimension B).

    Gaussian kernels, averaged over `widths`, in units of sqrt(d / 2), by which distances grow (Gretton et al. 2012, eq.
    3). Only the points are sampled: the kernel's expectations under a mixture of Gaussians are Gaussian integrals, E
    k(x, Y) = sum_k w_k h^d |C_k + h^2 I|^(-1/2) exp(-r' (C_k + h^2 I)^(-1) r / 2).
    """
    s, d = points.shape[-2:]
    eye = torch.eye(d, dtype=points.dtype)
    pairs = torch.cdist(points, points).square()
    total = torch.zeros(len(points), dtype=points.dtype)
    for h in (width * math.sqrt(d / 2) for width in widths):
        scale = d * math.log(h) + 0.5 * d * math.log(2 * math.pi)  # turns a normal density into the kernel
        among = torch.exp(-pairs / (2 * h * h)).sum((-1, -2)) - s
        smoothed = GaussianMixture(target.log_weights, target.means, target.covariances + h * h * eye)
        wide = GaussianMixture(smoothed.log_weights[:, None], smoothed.means[:, None], smoothed.covariances[:, None])
        across = (wide.log_prob(points) + scale).exp().mean(-1)
        within = torch.zeros(len(points), dtype=points.dtype)
        for k in range(target.means.shape[-2]):
            shifted = GaussianMixture(
                target.log_weights, target.means, target.covariances + target.covariances[:, k : k + 1] + h * h * eye
            )
            within = within + target.log_weights[:, k].exp() * (shifted.log_prob(target.means[:, k]) + scale).exp()
        total = total + among / (s * (s - 1)) - 2 * across + within
    return total / len(widths)


def sliced_w2(points: Tensor, target: GaussianMixture, directions: int = 32) -> Tensor:
    """Mean [B] over directions of the 2-Wasserstein distance between projected points [B, S, d] and mixtures.

    In one dimension the distance is that of the quantile functions; those of the target come from 20 sorted draws per
    point, made with a fixed seed so that the metric is the same for every method.
    """
    d = points.shape[-1]
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(directions, d, generator=generator, dtype=torch.float64)
    axes = axes / axes.norm(dim=-1, keepdim=True)
    per_point = 20
    reference = target.sample(per_point * points.shape[-2], generator)
    sorted_points = (points @ axes.mT).sort(dim=-2).values.repeat_interleave(per_point, dim=-2)
    sorted_reference = (reference @ axes.mT).sort(dim=-2).values
    return (sorted_points - sorted_reference).square().mean(-2).sqrt().mean(-1)


# Handles ---------------------------------------------------------------------------------------------------------------


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """The counted simulators and likelihoods of a task, by name (see the module's docstring)."""
    if task.id.startswith("posterior/"):
        model = problem(task)

        def simulator(theta: Tensor, generator: torch.Generator) -> Tensor:
            """One observation [R, D] for each row of theta [R, d]."""
            return model.simulate(theta, generator)

        def log_likelihood(theta: Tensor, x: Tensor) -> Tensor:
            """log p(x | theta) [R] of the rows of theta [R, d] and x [R, D]."""
            if len(theta) != len(x):
                raise ValueError(f"log_likelihood: {len(theta)} rows of theta, {len(x)} of x; give one of each per row")
            return model.log_likelihood(theta, x)

        return {"simulator": simulator, "log_likelihood": log_likelihood}
    if task.id.startswith("coverage/"):
        return {
            "prior": linear_prior,
            "simulator": linear_simulator,
            "estimator": estimator_draws,
            "log_density": estimator_log_density,
        }
    return {"trial": virtual_trial}


def linear_prior(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws [*shape, 4] of the prior N(0, I) of `coverage/linear_gaussian`. Free of charge."""
    return torch.randn(*shape, 4, generator=generator, device=generator.device)


def linear_simulator(theta: Tensor, design: Tensor, generator: torch.Generator) -> Tensor:
    """x = A theta + 0.5 e: theta [B * N, 4] grouped by model, design [B, 6, 4] -> [B * N, 6]. One row, one simulation."""
    grouped = theta.unflatten(0, (len(design), -1))
    x = grouped @ design.mT
    return (x + 0.5 * torch.randn(x.shape, generator=generator, device=x.device)).flatten(0, 1)


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


def uniformity(f: Tensor) -> tuple[Tensor, Tensor]:
    """Kolmogorov-Smirnov test of f [..., N] against the uniform law: statistic and p-value, float64 [...].

    The statistic is max_c |ECP(c) - c| for the empirical coverage ECP(c) = mean(f < c); the p-value is exact.
    """
    n = f.shape[-1]
    ordered = f.double().sort(dim=-1).values
    upper = torch.arange(1, n + 1, device=f.device, dtype=torch.float64) / n
    statistic = torch.maximum(upper - ordered, ordered - (upper - 1 / n)).amax(-1)
    p_value = stats.kstwo.sf(statistic.cpu().numpy(), n)
    return statistic, torch.as_tensor(p_value, dtype=torch.float64, device=f.device)


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> int:
    """No task of this track has a reference network, so nothing is evaluated: 0 items."""
    return 0


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """Evaluations are calls of `forward` here."""
    return []


# Coverage tests, shared -------------------------------------------------------------------------------------------------


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


# Conditional score models, shared by the amortised samplers ------------------------------------------------------------


BETA_MIN, BETA_MAX = 0.1, 20.0
REPEATS = 4  # noise levels per training set and step
T_MIN = 0.01  # the networks are trained on [T_MIN, 1]; noise variance 0.002 at T_MIN


def beta(t: Any) -> Any:
    """Rate of the variance-preserving SDE d theta = -beta/2 theta dt + sqrt(beta) dw, linear in t in [0, 1]."""
    return BETA_MIN + (BETA_MAX - BETA_MIN) * t


def alpha_bar(t: Any) -> Any:
    """Squared signal level exp(-int_0^t beta); theta_t = sqrt(alpha_bar) theta_0 + sqrt(1 - alpha_bar) e."""
    integral = BETA_MIN * t + 0.5 * (BETA_MAX - BETA_MIN) * t * t
    return torch.exp(-integral) if isinstance(t, Tensor) else math.exp(-integral)


def score_networks(task: Task) -> dict[str, nn.Module]:
    """A score network and an encoder of observations for a `posterior/*` task, untrained."""
    d = problem(task).noise.shape[0]
    return {"score": ScoreNetwork(parameters=d), "encoder": SetEncoder(observables=d)}


class SetEncoder(nn.Module):
    """Permutation-invariant embedding of a set of observations (deep set): x [R, m, D], size [R] -> [R, width].

    Mean over the first `size` elements of a learned feature, beside the logarithm of the size. 2.7k parameters.
    """

    def __init__(self, observables: int, width: int = 24) -> None:
        super().__init__()
        self.feature = nn.Sequential(
            nn.Linear(observables, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, width - 1)
        )
        self.register_buffer("mean", torch.zeros(observables))
        self.register_buffer("std", torch.ones(observables))

    def forward(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Embed sets; `size` defaults to m. Elements beyond it are ignored."""
        r, m, _ = x.shape
        size = torch.full((r,), m, device=x.device) if size is None else size
        present = (torch.arange(m, device=x.device) < size[:, None])[..., None]
        pooled = (self.feature((x - self.mean) / self.std) * present).sum(1) / size[:, None]
        return torch.cat([pooled, size[:, None].log().to(pooled)], dim=-1)


class ScoreNetwork(nn.Module):
    """Conditional score of a diffused posterior, grad log p_t(theta | context): [R, d]. 11k parameters for d = 2.

    s = (a V + (1 - a) I)^(-1) (sqrt(a) F(theta, t, context) - theta) with a = alpha_bar(t), F an MLP and V the covariance
    of an undiffused posterior, roughly: that of the residuals of a linear regression (buffers `variances` and `basis`, its
    eigenvalues and vectors, set by `fit_score`). Were the posterior N(m, V), F would be m at every t: the network learns a
    slowly varying function, and near t = 0 its error is not divided by the noise level, as it is in a noise-predicting
    network; sums of many scores need that.
    """

    def __init__(self, parameters: int, context: int = 24, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(parameters + context + 5, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, parameters),
        )
        self.register_buffer("variances", torch.ones(parameters))
        self.register_buffer("basis", torch.eye(parameters))

    def forward(self, theta: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """theta [R, d], t [R] in (0, 1], context [R, c]."""
        a = alpha_bar(t)
        ratio = torch.log(a / (1 - a)) / 8
        features = torch.stack(
            [t, ratio, torch.sin(math.pi * t), torch.cos(math.pi * t), torch.cos(3 * math.pi * t)], dim=-1
        )
        a = a[:, None]
        gap = a.sqrt() * self.net(torch.cat([theta, context, features], dim=-1)) - theta
        return (gap @ self.basis / (a * self.variances + 1 - a)) @ self.basis.mT

    @property
    def covariance(self) -> Tensor:
        """V, [d, d]."""
        return (self.basis * self.variances) @ self.basis.mT


def fit_score(
    score_network: ScoreNetwork,
    encoder: SetEncoder,
    theta: Tensor,
    x: Tensor,
    generator: torch.Generator,
    steps: Iterable[int],
    total: int,
    random_size: bool = False,
    batch: int = 256,
    rate: float = 2e-3,
) -> float:
    """Train both networks in place by denoising score matching on theta [N, d], x [N, m, D]; returns the best loss.

    Loss E |sigma_t s(theta_t, t, x) + e|^2 (Vincent 2011; weight sigma^2) with t = T_MIN + (1 - T_MIN) u^2, u uniform:
    samplers spend their steps near t = 0, where this weight is small. Each step takes `batch` sets, encoded once, and
    REPEATS noise levels for each. A tenth of the parameters is held out; every total/40 steps the moving average of the
    weights is scored on it with fixed noise, and the best average is kept: small data sets overfit long before large
    ones, and every method gets the same care. With `random_size` each set is cut to a random number of its observations.
    """
    device = theta.device
    size_limit = x.shape[1]
    flat = x.flatten(0, 1)
    encoder.mean.copy_(flat.mean(0))
    encoder.std.copy_(flat.std(0))
    variances, basis = torch.linalg.eigh(_residual_covariance(theta, x.mean(1)))
    score_network.variances.copy_(variances)
    score_network.basis.copy_(basis)
    held = max(8, len(theta) // 10)
    train_theta, train_x, test_theta, test_x = theta[held:], x[held:], theta[:held], x[:held]
    parameters = [*score_network.parameters(), *encoder.parameters()]
    average = [p.detach().clone() for p in parameters]
    best, best_loss = [p.clone() for p in average], math.inf
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=total, pct_start=0.1)

    def loss_of(theta0: Tensor, sets: Tensor, t: Tensor, noise: Tensor, size: Tensor | None) -> Tensor:
        a = alpha_bar(t)[:, None]
        repeats = len(t) // len(theta0)
        theta0 = theta0.repeat_interleave(repeats, dim=0)
        context = encoder(sets, size).repeat_interleave(repeats, dim=0)
        predicted = score_network(a.sqrt() * theta0 + (1 - a).sqrt() * noise, t, context)
        return ((1 - a).sqrt() * predicted + noise).square().mean()

    def draw_size(count: int) -> Tensor | None:
        return torch.randint(1, size_limit + 1, (count,), generator=generator, device=device) if random_size else None

    def draw_time(count: int) -> Tensor:
        return T_MIN + (1 - T_MIN) * torch.rand(count, generator=generator, device=device).square()

    fixed_t = draw_time(held * max(1, 4_000 // held))
    fixed_noise = torch.randn(len(fixed_t), theta.shape[1], generator=generator, device=device)
    fixed_size = draw_size(held)
    every = max(1, total // 40)
    for step in steps:
        index = torch.randint(len(train_theta), (batch,), generator=generator, device=device)
        t = draw_time(batch * REPEATS)
        noise = torch.randn(batch * REPEATS, theta.shape[1], generator=generator, device=device)
        loss = loss_of(train_theta[index], train_x[index], t, noise, draw_size(batch))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        decay = min(0.995, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        if (step + 1) % every == 0:
            with torch.no_grad():
                current = [p.detach().clone() for p in parameters]
                _assign(parameters, average)
                held_out = float(loss_of(test_theta, test_x, fixed_t, fixed_noise, fixed_size))
                _assign(parameters, current)
            if held_out < best_loss:
                best, best_loss = [p.clone() for p in average], held_out
    with torch.no_grad():
        _assign(parameters, best)
    return best_loss


def _assign(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _residual_covariance(theta: Tensor, summary: Tensor) -> Tensor:
    """Covariance left in theta [N, d] after linear regression on summary [N, D]: a posterior covariance, roughly."""
    design = torch.cat([summary, torch.ones_like(summary[:, :1])], dim=-1).double().cpu()
    target = theta.double().cpu()
    residual = target - design @ torch.linalg.lstsq(design, target).solution
    return (residual.mT @ residual / (len(theta) - design.shape[1])).to(theta)


def compose_scores(scores: Tensor, prior_score: Tensor, t: float) -> Tensor:
    """Score of the bridging density of K factors at time t in [0, 1]: scores [..., K, d], prior_score [..., d].

    (1 - K) (1 - t) grad log p(theta) + sum_k s(theta, t, x_k) (Geffner et al. 2023, eq. 6-7, with T = 1). At t = 0, with
    the exact scores of the undiffused factors, it is the score of p(theta)^(1-K) prod_k p(theta | x_k), the posterior.
    """
    return (1 - scores.shape[-2]) * (1 - t) * prior_score + scores.sum(-2)


def set_scores(network: nn.Module, theta: Tensor, t: float, context: Tensor) -> Tensor:
    """Scores [B, S, K, d] of theta [B, S, d] under each of the K contexts [B, K, c]: B * S * K rows of the network."""
    b, s, d = theta.shape
    k = context.shape[1]
    rows = theta[:, :, None].expand(b, s, k, d).reshape(-1, d)
    contexts = context[:, None].expand(b, s, k, -1).reshape(-1, context.shape[-1])
    time = torch.full((len(rows),), t, device=theta.device, dtype=theta.dtype)
    return network(rows, time, contexts).reshape(b, s, k, d)


def annealed_langevin(
    score_of: Callable[[Tensor, float], Tensor],
    theta: Tensor,
    times: Iterable[float],
    step_sizes: Iterable[Tensor],
    repeats: int,
    generator: torch.Generator,
) -> Tensor:
    """Annealed Langevin dynamics on theta [..., d]: `repeats` steps theta += D S(theta, t) + sqrt(2 D) z at each (t, D).

    Step sizes are symmetric positive matrices [d, d]: any of them leaves the density with score S invariant, up to the
    discretisation; delta * I is the plain method.
    """
    for t, step in zip(times, step_sizes, strict=True):
        root = torch.linalg.cholesky(2 * step).mT
        for _ in range(repeats):
            noise = torch.randn(theta.shape, generator=generator, device=theta.device, dtype=theta.dtype)
            theta = theta + score_of(theta, t) @ step + noise @ root
    return theta


def bridging_schedule(steps: int, covariance: Tensor, factors: int) -> tuple[list[float], list[Tensor], int]:
    """Times and step sizes [d, d] from T = 1 down, and repeats at each, for `steps` Langevin steps over bridging densities.

    Levels stand at t = T_MIN + (1 - T_MIN) u^3, u uniform. The step is a fraction (0.7 falling to 0.2) of the covariance
    that `factors` composed factors leave at t, each of undiffused covariance `covariance`: the density has the precision
    of all of them together. Every level is repeated, up to 5 times, once there are 160 steps.
    """
    repeats = min(5, max(1, steps // 80))
    levels = max(1, steps // repeats)
    eye = torch.eye(len(covariance), device=covariance.device, dtype=covariance.dtype)
    times, sizes = [], []
    for i in range(levels):
        u = 1 - i / (levels - 1) if levels > 1 else 0.0
        t = T_MIN + (1 - T_MIN) * u**3
        a = alpha_bar(t)
        times.append(t)
        sizes.append((0.2 + 0.5 * u) * (a * covariance + (1 - a) * eye) / factors)
    return times, sizes, repeats
