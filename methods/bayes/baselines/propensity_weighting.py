"""See the class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method, Session


class PropensityWeighting(Method):
    """Inverse-propensity weighting: weigh each day by one over the chance of the treatment that it had.

    p_t = P(X_t = 1 | X_{t-1}, Y_{t-1}) by logistic regression (Newton's method, ridge 1); days are weighted by
    1 / p_t or 1 / (1 - p_t), chances clipped to [0.02, 0.98], and the weighted means compared (Hajek). It needs no outcome
    model, and averages the effect over the days as they were rather than over those of a trial. The interval is that of
    the influence function. Runs no trials: the same at every rung.

    Source: the propensity-score twin that Daza and Schneider set beside MoTR; Lunceford and Davidian 2004 for the variance.
    """

    tasks = ("effect/wearable", "effect/wearable_years")

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> dict[str, Tensor]:
        """Effect and 95 % interval [B] from treatment and outcome [B, T]."""
        x, y = batch["treatment"].double(), batch["outcome"].double()
        centred = y - y.mean(1, keepdim=True)
        now, target = x[:, 1:], y[:, 1:]
        design = torch.stack([torch.ones_like(now), x[:, :-1], centred[:, :-1]], dim=-1)
        penalty = torch.diag(torch.tensor([0.0, 1.0, 1.0], dtype=y.dtype, device=y.device))
        beta = torch.zeros(len(x), 3, dtype=y.dtype, device=y.device)
        for _ in range(12):
            chance = torch.sigmoid((design @ beta[..., None]).squeeze(-1))
            gradient = (design.mT @ (now - chance)[..., None]).squeeze(-1) - beta @ penalty
            curvature = design.mT @ (design * (chance * (1 - chance))[..., None]) + penalty
            beta = beta + torch.linalg.solve(curvature, gradient)
        chance = torch.sigmoid((design @ beta[..., None]).squeeze(-1)).clamp(0.02, 0.98)
        means, influence = [], []
        for weight in (now / chance, (1 - now) / (1 - chance)):
            mean = (weight * target).sum(1) / weight.sum(1)
            means.append(mean)
            influence.append(weight * (target - mean[:, None]) / weight.mean(1, keepdim=True))
        effect = means[0] - means[1]
        half = 1.96 * (influence[0] - influence[1]).std(1) / target.shape[1] ** 0.5
        return {"effect": effect, "low": effect - half, "high": effect + half}
