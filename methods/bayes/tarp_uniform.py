"""See the class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method, Session
from stepmark.tracks.bayes import abc


class TARPUniform(Method):
    """TARP with reference points that ignore x: uniform on the box of the prior.

    The plain choice of Lemos et al. 2023, algorithm 2, otherwise the same test as `tarp`. Valid for any estimator, but
    blind to one that ignores x, such as the prior (their section 4.2): then theta*_i and the draws have the same law
    whatever r_i is.
    """

    tasks = ("coverage/linear_gaussian",)
    draws = 99

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> dict[str, Tensor]:
        """Statistic and p-value [B, E] of every estimator on the models design [B, 6, 4]."""
        design = batch["design"]
        theta, x = abc.simulate_pairs(session.simulators, session.rng, design, rung)
        low, width = abc.unit_box(session.simulators, session.rng)
        reference = low + width * torch.rand(theta.shape, generator=session.rng, device=theta.device)
        return abc.ball_test(session.simulators, session.rng, theta, x, design, reference, width, self.draws)
