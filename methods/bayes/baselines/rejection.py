"""See the class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method, Session
from stepmark.tracks.bayes import linear, problems


class Rejection(Method):
    """Rejection sampling from the prior: exact draws, as long as the budget yields enough of them.

    A prior draw theta is accepted with probability prod_j p(x_j | theta) / M. The bound M is the likelihood at its
    maximum, which for a location family with Gaussian noise is the sample mean (no bound is known for `two_clusters`, which
    is left out); that evaluation is paid for too. Accepted
    draws are exact and independent. Should fewer than DRAWS be accepted, they are repeated in turn; should none be, the
    proposal of highest likelihood is repeated (the only case in which draws are wrong rather than few).

    Source: von Neumann 1951. K = rung / n - 1 proposals for each set.
    """

    tasks = (
        "posterior/gaussian_n30",
        "posterior/gaussian10_n30",
        "posterior/gaussian_n10",
        "posterior/gaussian_n1",
        "posterior/mixture_n10",
    )

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        """Posterior draws [B, DRAWS, d] for the sets x [B, n, d]."""
        x = batch["x"]
        b, n, d = x.shape
        k = max(1, rung // n - 1)
        prior = problems.problem(session.task).prior.to(x.device)
        theta = torch.cat([x.mean(1, keepdim=True), prior.sample(b * k, session.rng).reshape(b, k, d)], dim=1)
        rows = theta[:, :, None].expand(b, k + 1, n, d).reshape(-1, d)
        data = x[:, None].expand(b, k + 1, n, d).reshape(-1, d)
        log_likelihood = session.simulators["log_likelihood"](rows, data).reshape(b, k + 1, n).sum(-1)
        ratio = log_likelihood[:, 1:] - log_likelihood[:, :1]
        accepted = torch.rand(b, k, generator=session.rng, device=x.device).log() <= ratio
        # Accepted proposals first, in the order of their drawing; then take them in turn.
        first = accepted.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        first = torch.where(accepted.any(-1, keepdim=True), first, ratio.argmax(-1, keepdim=True))
        count = accepted.sum(-1, keepdim=True).clamp_min(1)
        turn = torch.arange(linear.DRAWS, device=x.device) % count
        return theta[:, 1:].gather(1, first.gather(1, turn)[..., None].expand(-1, -1, d))
