"""See the class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Session


class MoTR(Method):
    """MoTR: fit an outcome model to one person's days, then run virtual n-of-1 trials on it (g-formula).

    1. Fit m(x, history) = E[Y_t | X_t = x, X_{t-1}, Y_{t-1}] on the observed series: ridge regression on X_t, X_{t-1},
       Y_{t-1} and X_t Y_{t-1} (effects may differ by yesterday's outcome); keep its residuals.
    2. A virtual trial: toss X_t fairly, whatever the past, for t = 1 .. T, generate Y_t = m(X_t, X_{t-1}, Y_{t-1}) plus a
       residual drawn with replacement, and feed X_t and Y_t back as lags. Carry-over and autocorrelation stay, while
       confounding by the past is cut. The trial's effect is mean(Y | X = 1) - mean(Y | X = 0).
    3. The effect is the mean over `rung` trials, its interval their 2.5 % and 97.5 % quantiles.

    It estimates the average recurring effect: standardisation (back-door adjustment) under serial interference.

    Source: Daza, Matias and Schneider 2022 (arXiv 2208.00739), section on model-twin randomisation. Differences: the paper
    stops when the running mean settles, here the rung is the number of trials; trials start at a random observed day; the
    interval speaks of the spread over trials of 222 days, as the paper's does, not of the error of the fitted model.
    """

    paper = Paper(
        id="motr",
        title="Model-Twin Randomization (MoTR): A Monte Carlo Method for Estimating the Within-Individual Average "
        "Treatment Effect Using Wearable Sensors",
        authors="Eric J. Daza, Igor Matias, Logan Schneider",
        year=2022,
        arxiv="2208.00739",
    )
    tasks = ("effect/wearable",)
    baselines = ("naive_difference", "lagged_regression", "propensity_weighting")
    claims = (
        Claim(
            "abs_bias[motr,256] < 0.5 * abs_bias[naive_difference,256] and rmse[motr,256] < rmse[naive_difference,256]",
            says="virtual trials remove most of the confounding of a plain comparison of days",
        ),
    )
    ridge = 1.0

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> dict[str, Tensor]:
        """Effect and 95 % interval [B] from treatment and outcome [B, T]."""
        x, y = batch["treatment"].double(), batch["outcome"].double()
        people, days = x.shape
        centre, scale = y.mean(1, keepdim=True), y.std(1, keepdim=True)
        standard = (y - centre) / scale
        beta = fit_outcome(x, standard, self.ridge)
        residuals = standard[:, 1:] - predict(beta[:, None], x[:, 1:], x[:, :-1], standard[:, :-1])
        residuals = residuals - residuals.mean(1, keepdim=True)

        shape = (people, rung, days)
        device, rng = x.device, session.rng
        tossed = (torch.rand(shape, generator=rng, device=device) < 0.5).double()
        drawn = torch.randint(days - 1, shape, generator=rng, device=device)
        noise = residuals[:, None].expand(people, rung, days - 1).gather(2, drawn)
        day = torch.randint(days, (people, rung), generator=rng, device=device)
        start = torch.stack([x.gather(1, day), standard.gather(1, day)], dim=-1)
        rows = beta.repeat_interleave(rung, dim=0)
        outcomes = session.simulators["trial"](
            start.flatten(0, 1),
            tossed.flatten(0, 1),
            noise.flatten(0, 1),
            lambda now, x_lag, y_lag: predict(rows, now, x_lag, y_lag),
        ).reshape(shape)

        treated = tossed.sum(-1).clamp_min(1)
        untreated = (1 - tossed).sum(-1).clamp_min(1)
        effects = (outcomes * tossed).sum(-1) / treated - (outcomes * (1 - tossed)).sum(-1) / untreated
        low, high = torch.quantile(effects, torch.tensor([0.025, 0.975], dtype=effects.dtype, device=device), dim=-1)
        scale = scale.squeeze(1)
        return {"effect": effects.mean(-1) * scale, "low": low * scale, "high": high * scale}


def features(x: Tensor, x_lag: Tensor, y_lag: Tensor) -> Tensor:
    """Regressors of the outcome model, [..., 5]: 1, X_t, X_{t-1}, Y_{t-1}, X_t Y_{t-1}."""
    return torch.stack([torch.ones_like(x), x, x_lag, y_lag, x * y_lag], dim=-1)


def predict(beta: Tensor, x: Tensor, x_lag: Tensor, y_lag: Tensor) -> Tensor:
    """Outcome model m with coefficients beta [..., 5]."""
    return (features(x, x_lag, y_lag) * beta).sum(-1)


def fit_outcome(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Ridge coefficients [B, 5] of each person's series x, y [B, T]; the intercept is not shrunk."""
    design = features(x[:, 1:], x[:, :-1], y[:, :-1])
    penalty = ridge * torch.eye(5, dtype=y.dtype, device=y.device)
    penalty[0, 0] = 0
    return torch.linalg.solve(design.mT @ design + penalty, design.mT @ y[:, 1:, None]).squeeze(-1)
