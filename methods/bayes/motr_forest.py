"""See the class."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from sklearn.ensemble import RandomForestRegressor
from torch import Tensor

from stepmark import Claim, Method, Paper, Session


class MoTRForest(Method):
    """MoTR with a random forest as outcome model: virtual n-of-1 trials without a formula for the effect.

    The algorithm of `motr`, with m(x, X_{t-1}, Y_{t-1}) a forest of 40 trees of at least 8 days a leaf. A forest in two
    binary and one real variable is a table: it is evaluated once on a grid of 201 outcomes for each of the four pairs of
    treatments, and the trials look it up (nearest grid point). Residuals are out-of-bag, so that they are not too small.

    Source: Daza, Matias and Schneider 2022 (arXiv 2208.00739), who fit generalised linear models and random forests.
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
    baselines = ("motr", "naive_difference", "lagged_regression", "propensity_weighting")
    claims = (
        Claim(
            "abs_bias[motr_forest,256] < 0.5 * abs_bias[naive_difference,256] and "
            "rmse[motr_forest,256] < rmse[naive_difference,256]",
            says="the same with a random forest as outcome model",
        ),
    )
    trees = 40
    grid = 201

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> dict[str, Tensor]:
        """Effect and 95 % interval [B] from treatment and outcome [B, T]."""
        x, y = batch["treatment"].double(), batch["outcome"].double()
        people, days = x.shape
        device, rng = x.device, session.rng
        low_y, high_y = y.amin(1), y.amax(1)
        tables, residuals = [], []
        for person in range(people):
            table, left_over = self._fit(x[person].cpu().numpy(), y[person].cpu().numpy(), session.seed)
            tables.append(torch.from_numpy(table))
            residuals.append(torch.from_numpy(left_over))
        table = torch.stack(tables).to(device).repeat_interleave(rung, dim=0)  # [B * rung, 4 * grid]
        floor, width = low_y.repeat_interleave(rung), (high_y - low_y).repeat_interleave(rung)

        shape = (people, rung, days)
        tossed = (torch.rand(shape, generator=rng, device=device) < 0.5).double()
        drawn = torch.randint(days - 1, shape, generator=rng, device=device)
        noise = torch.stack(residuals).to(device)[:, None].expand(people, rung, days - 1).gather(2, drawn)
        day = torch.randint(days, (people, rung), generator=rng, device=device)
        start = torch.stack([x.gather(1, day), y.gather(1, day)], dim=-1)

        def look_up(now: Tensor, x_lag: Tensor, y_lag: Tensor) -> Tensor:
            place = ((y_lag - floor) / width * (self.grid - 1)).round().clamp(0, self.grid - 1)
            return table.gather(1, ((2 * now + x_lag) * self.grid + place).long()[:, None]).squeeze(1)

        outcomes = session.simulators["trial"](start.flatten(0, 1), tossed.flatten(0, 1), noise.flatten(0, 1), look_up)
        outcomes = outcomes.reshape(shape)
        treated = tossed.sum(-1).clamp_min(1)
        untreated = (1 - tossed).sum(-1).clamp_min(1)
        effects = (outcomes * tossed).sum(-1) / treated - (outcomes * (1 - tossed)).sum(-1) / untreated
        low, high = torch.quantile(effects, torch.tensor([0.025, 0.975], dtype=effects.dtype, device=device), dim=-1)
        return {"effect": effects.mean(-1), "low": low, "high": high}

    def _fit(self, x: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Table of the forest [4 * grid], rows 2 X_t + X_{t-1}, and centred out-of-bag residuals [T - 1]."""
        forest = RandomForestRegressor(
            self.trees, min_samples_leaf=8, max_features=1.0, oob_score=True, n_jobs=1, random_state=seed
        )
        forest.fit(np.stack([x[1:], x[:-1], y[:-1]], axis=-1), y[1:])
        levels = np.linspace(y.min(), y.max(), self.grid)
        points = [
            np.stack([np.full_like(levels, a), np.full_like(levels, b), levels], -1) for a in (0, 1) for b in (0, 1)
        ]
        residuals = y[1:] - forest.oob_prediction_
        return forest.predict(np.concatenate(points)), residuals - residuals.mean()
