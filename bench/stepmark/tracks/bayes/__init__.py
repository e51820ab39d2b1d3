"""Track `bayes`: inference whose cost is simulator, likelihood, score or Monte Carlo calls. No shipped network is needed.

Three kinds of task:

* `posterior/*`: a batch is `x` float32 [B, n, D], sets of n i.i.d. observations; a method returns `DRAWS` posterior draws
  of every set, float32 [B, DRAWS, d]. The prior is known (`problem(task).prior`), the likelihood is reached through the
  counted handles `log_likelihood(theta [R, d], x [R, D]) -> [R]` and `simulator(theta [R, d], generator) -> [R, D]`; one
  row is one observation. Amortised methods learn offline from one layout of `session.train` (all layouts hold the same
  number of simulator calls) and call their sampling network `score`; one row of it is one evaluation.
* `coverage/*` (in `coverage.py`): a batch is `design` [B, 6, 4], linear-Gaussian models; a method tests every estimator of
  `ESTIMATORS` on every model from `rung` simulations and returns `statistic` and `p_value`, float [B, len(ESTIMATORS)].
* `effect/*`: a batch is `treatment` and `outcome` [B, T], daily series of B people, and `person` int64 [B]; a method
  returns `effect`, `low` and `high` (float [B]): the recurring effect and a 95 % interval, from `rung` virtual trials.

The exact posterior of every problem is a mixture of Gaussians, so that the distance of draws to it needs no reference
sample; it is out of a method's reach.

Which task can tell what, measured on controls:

* On the Gaussian problems `linear_posterior`, a regression without a network, is all but exact with two parameters, and
  nearer than any network with ten: they show how errors add up, not who learns. On `two_clusters` it is far off (mmd about
  .22 at n = 10, .29 at n = 30, where that of exact draws is next to nothing) and so are amortised networks after short
  training; there they are compared.
* `effect/*`, rmse (size of the bias) in hours, about: on 222 days lagged regression .16 (.09), propensity weighting .22
  (.06), a plain difference .32 (.25): noise decides, and the simplest adjustment wins. On 2190 days .12 (.09), .11 (.07),
  .33 (.28), and virtual trials with the regression's four regressors .12 (.10): bias decides, and only a model that can
  bend has little of it (.03). With the bends taken out of the generator (`bend=0`) lagged regression is unbiased and wins on
  both (.12, .04).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepmark.task import BadOutput, Score, Task, harness_only, load_split
from stepmark.tracks.bayes.linear import (
    DRAWS,
    ESTIMATORS,
    estimator_draws,
    estimator_log_density,
    linear_prior,
    linear_simulator,
)
from stepmark.tracks.bayes.metrics import sliced_w2, squared_mmd
from stepmark.tracks.bayes.problems import GaussianMixture, observations, problem
from stepmark.tracks.bayes.trials import virtual_trial

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
        id="posterior/two_clusters_n10",
        version=1,
        summary="Posterior of the place of two clusters from 10 observations of either; exact posterior a mixture",
        dataset="two_clusters",
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
        id="posterior/two_clusters_n30",
        version=1,
        summary="Posterior of the place of two clusters from 30 observations of either; exact posterior a mixture",
        dataset="two_clusters",
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
        id="effect/wearable",
        version=2,
        summary="Recurring effect of an active day on sleep from 222 confounded days of one person; bends and an interaction",
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
    Task(
        id="effect/wearable_years",
        version=1,
        summary="Recurring effect of an active day on sleep from 2190 confounded days of one person; bends and an interaction",
        dataset="wearable",
        bounded=("trial",),
        unit="virtual trials",
        rungs=(4, 16, 64, 256),
        metrics={"rmse": "lower", "abs_bias": "lower", "coverage": "higher", "interval_width": "lower"},
        n=128,
        batch=8,
        smoke_n=4,
        smoke_rungs=(4,),
    ),
)


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
        "treatment": data["treatment"][index, : days(task)].to(device),
        "outcome": data["outcome"][index, : days(task)].to(device),
        "person": index.to(device),
    }


def days(task: Task) -> int | None:
    """How many days of a series an `effect/*` task shows; None: all."""
    return 222 if task.id == "effect/wearable" else None


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


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> int:
    """No task of this track has a reference network, so nothing is evaluated: 0 items."""
    return 0


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """Evaluations are calls of `forward` here."""
    return []
