"""See the class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method, Session
from stepmark.tracks.bayes import linear, metrics


class HPDCoverage(Method):
    """Coverage of highest-posterior-density regions: the usual test, which needs the estimator's density.

    f_i = #{j : q(theta_ij | x_i) > q(theta*_i | x_i)} / n is the mass of the smallest HPD region that holds theta*_i; if q
    is the posterior, f is uniform. The converse fails: the prior, and any estimator whose spread makes up for its bias
    on average, pass. Statistic and p-value as in `tarp`, with n = 99 draws.

    Source: Hermans et al. 2022 (expected coverage of HPD regions); Rozet and Louppe 2021.
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
            both = torch.cat([theta[:, :, None], samples], dim=2)
            density = session.simulators["log_density"](both, x, design, which)
            denser = (density[..., 1:] > density[..., :1]).sum(-1)
            jitter = torch.rand(denser.shape, generator=session.rng, device=theta.device)
            statistic, p_value = metrics.uniformity((denser + jitter) / (self.draws + 1))
            statistics.append(statistic)
            p_values.append(p_value)
        return {"statistic": torch.stack(statistics, dim=-1), "p_value": torch.stack(p_values, dim=-1)}
