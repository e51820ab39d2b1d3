"""See the class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method, Session
from stepmark.tracks.bayes import linear, metrics


class SBC(Method):
    """Simulation-based calibration: the rank of each true parameter among the estimator's draws must be uniform.

    f_id = #{j : theta_ijd < theta*_id} / n for each parameter d, tested for uniformity as in `tarp`; the statistic is the
    largest over the parameters, the p-value the smallest times their number (Bonferroni). Sees marginals, averaged over x:
    the prior passes, and so does a bias that the spread makes up for.

    Source: Talts, Betancourt, Simpson, Vehtari and Gelman 2018, algorithm 1. n = 99 draws.
    """

    tasks = ("coverage/linear_gaussian",)
    draws = 99

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> dict[str, Tensor]:
        """Statistic and p-value [B, E] of every estimator on the models design [B, 6, 4]."""
        design = batch["design"]
        theta, x = linear.simulate_pairs(session.simulators, session.rng, design, rung)
        statistics, p_values = [], []
        for which in batch["estimators"].unbind(1):
            samples = session.simulators["estimator"](x, design, which, self.draws, session.rng)
            rank = (samples < theta[:, :, None]).sum(2)
            jitter = torch.rand(rank.shape, generator=session.rng, device=theta.device)
            statistic, p_value = metrics.uniformity(((rank + jitter) / (self.draws + 1)).mT)
            statistics.append(statistic.amax(-1))
            p_values.append((p_value.amin(-1) * theta.shape[-1]).clamp_max(1))
        return {"statistic": torch.stack(statistics, dim=-1), "p_value": torch.stack(p_values, dim=-1)}
