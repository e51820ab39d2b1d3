"""See the class."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepmark import Method, Session


class NaiveDifference(Method):
    """Mean outcome of treated days minus mean outcome of untreated days, with a Welch interval.

    What a correlation (or a regression without lags) says. Biased wherever the past drives both treatment and outcome; the
    interval also ignores serial dependence. Runs no trials: the same at every rung.
    """

    tasks = ("effect/wearable", "effect/wearable_years")

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> dict[str, Tensor]:
        """Effect and 95 % interval [B] from treatment and outcome [B, T]."""
        x, y = batch["treatment"].double(), batch["outcome"].double()
        means, errors = [], []
        for group in (x, 1 - x):
            count = group.sum(1).clamp_min(2)
            mean = (group * y).sum(1) / count
            variance = (group * (y - mean[:, None]).square()).sum(1) / (count - 1)
            means.append(mean)
            errors.append(variance / count)
        effect = means[0] - means[1]
        half = 1.96 * (errors[0] + errors[1]).sqrt()
        return {"effect": effect, "low": effect - half, "high": effect + half}
