"""See the class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method, Session
from stepmark.tracks.bayes import linear, problems


class ABCRejection(Method):
    """Approximate Bayesian computation: simulate from prior draws, keep the DRAWS whose data come closest.

    K = rung / n prior draws, n simulations each; the distance is that of the sample means, standardised by their spread
    over the simulations. Needs no likelihood, only the simulator. The tolerance is whatever keeps DRAWS of K, so the
    posterior it samples is as wide as the budget is small; with K below DRAWS the nearest are repeated. On `two_clusters`
    the mean is not sufficient, and the posterior given it is wider than the one given the set.

    Source: Pritchard et al. 1999; Beaumont, Zhang and Balding 2002 (tolerance as a quantile, without regression).
    """

    tasks = (
        "posterior/gaussian_n30",
        "posterior/gaussian10_n30",
        "posterior/gaussian_n10",
        "posterior/gaussian_n1",
        "posterior/mixture_n10",
        "posterior/two_clusters_n30",
        "posterior/two_clusters_n10",
    )

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        """Posterior draws [B, DRAWS, d] for the sets x [B, n, d]."""
        x = batch["x"]
        b, n, d = x.shape
        k = max(1, rung // n)
        theta = problems.problem(session.task).prior.to(x.device).sample(b * k, session.rng)
        simulated = session.simulators["simulator"](theta.repeat_interleave(n, dim=0), session.rng)
        summary = simulated.reshape(b, k, n, -1).mean(2)
        scale = summary.flatten(0, 1).std(0)
        distance = ((summary - x.mean(1, keepdim=True)) / scale).norm(dim=-1)
        nearest = distance.argsort(dim=-1)[:, : linear.DRAWS]
        turn = torch.arange(linear.DRAWS, device=x.device) % nearest.shape[1]
        return theta.reshape(b, k, d).gather(1, nearest[:, turn][..., None].expand(-1, -1, d))
