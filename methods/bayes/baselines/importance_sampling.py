"""See the class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method, Session
from stepmark.tracks.bayes import linear, problems


class ImportanceSampling(Method):
    """Sampling-importance-resampling from the prior: weigh prior draws by the likelihood, resample.

    K = rung / n proposals theta_k from the prior, weights w_k proportional to prod_j p(x_j | theta_k), and DRAWS of them
    drawn with systematic resampling. Self-normalised importance sampling: expectations under the weights converge to
    those under the posterior as K grows, and the unnormalised mean of w is an unbiased estimate of the evidence. With many
    observations few proposals carry all the weight and draws repeat.

    Source: Rubin 1988 (SIR); Kitagawa 1996 (systematic resampling). Needs the likelihood, which amortised methods do not.
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
        proposals, log_weights = weighted_proposals(session, x, rung)
        index = systematic_resample(log_weights.softmax(-1), linear.DRAWS, session.rng)
        return proposals.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def weighted_proposals(session: Session, x: Tensor, rung: int) -> tuple[Tensor, Tensor]:
    """Prior draws [B, K, d] and the log likelihood of their set [B, K], with K n rows of the likelihood for each set."""
    b, n, d = x.shape
    k = max(1, rung // n)
    prior = problems.problem(session.task).prior.to(x.device)
    theta = prior.sample(b * k, session.rng).reshape(b, k, d)
    rows = theta[:, :, None].expand(b, k, n, d).reshape(-1, d)
    data = x[:, None].expand(b, k, n, d).reshape(-1, d)
    log_likelihood = session.simulators["log_likelihood"](rows, data).reshape(b, k, n).sum(-1)
    return theta, log_likelihood


def systematic_resample(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices [B, count] of a systematic resample of weights [B, K], in random order."""
    b, k = weights.shape
    offset = torch.rand(b, 1, generator=generator, device=weights.device, dtype=torch.float64)
    points = (torch.arange(count, device=weights.device) + offset) / count
    index = torch.searchsorted(weights.double().cumsum(-1), points).clamp_max(k - 1)
    order = torch.rand(b, count, generator=generator, device=weights.device).argsort(-1)
    return index.gather(1, order)
