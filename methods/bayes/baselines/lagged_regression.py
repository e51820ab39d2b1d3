"""See the class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method, Session


class LaggedRegression(Method):
    """Least squares of the outcome on today's treatment and yesterday's treatment and outcome; the treatment's coefficient.

    Adjusts for the common causes that MoTR adjusts for, but assumes that the effect is the same on every day: where it
    depends on yesterday's outcome the coefficient is a weighted mean over the days as they were, not over those of a trial.
    The interval is the usual normal one. Runs no trials: the same at every rung.
    """

    tasks = ("effect/wearable", "effect/wearable_years")

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> dict[str, Tensor]:
        """Effect and 95 % interval [B] from treatment and outcome [B, T]."""
        x, y = batch["treatment"].double(), batch["outcome"].double()
        target = y[:, 1:]
        design = torch.stack([torch.ones_like(target), x[:, 1:], x[:, :-1], y[:, :-1]], dim=-1)
        inverse = torch.linalg.inv(design.mT @ design)
        beta = (inverse @ design.mT @ target[..., None]).squeeze(-1)
        residual = target - (design @ beta[..., None]).squeeze(-1)
        variance = residual.square().sum(1) / (target.shape[1] - design.shape[-1])
        half = 1.96 * (variance * inverse[:, 1, 1]).sqrt()
        return {"effect": beta[:, 1], "low": beta[:, 1] - half, "high": beta[:, 1] + half}
