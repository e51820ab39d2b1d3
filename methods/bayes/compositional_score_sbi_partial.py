"""See the class."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Session
from stepmark.tracks.bayes import linear, problems, scores


class PartiallyFactorisedNPSE(Method):
    """PF-NPSE: compose the scores of posteriors of subsets of m = 5 observations, fewer factors and fewer calls.

    Between F-NPSE (m = 1: n factors, whose network errors add up) and plain NPSE (m = n: one factor, that needs n
    simulations per training example). A permutation-invariant network learns the score of the posterior of 1 .. m
    observations; at test time n observations are cut into K = ceil(n / m) subsets X_k and

        S(theta, t) = (1 - K) (T - t) / T grad log p(theta) + sum_k s(theta, t, X_k)

    is sampled by annealed Langevin dynamics. One draw costs K rows of the network for each step: rung / (100 K) steps.

    Source: Geffner, Papamakarios and Mnih 2023, section 3.4, which finds m about 6 most robust. The simulation budget is
    that of the other methods: 2000 parameters with 5 observations each. Differences in schedule and step size: those of
    `compositional_score_sbi`, with K factors.

    What limits it on the Gaussian tasks: all networks start from a linear regression that is nearly the answer there, which
    favours the set network; the partial factorisation needs the fewest steps.
    """

    paper = Paper(
        id="compositional_score_sbi",
        title="Compositional Score Modeling for Simulation-based Inference",
        authors="Tomas Geffner, George Papamakarios, Andriy Mnih",
        year=2023,
        arxiv="2209.14249",
    )
    tasks = ("posterior/gaussian_n30", "posterior/gaussian10_n30", "posterior/gaussian_n10", "posterior/mixture_n10")
    baselines = ("compositional_score_sbi", "npse_set", "naive_sum_reverse_sde")
    claims = (
        Claim(
            "mmd[compositional_score_sbi_partial,288000] < mmd[compositional_score_sbi,288000] and "
            "mmd[compositional_score_sbi_partial,288000] < mmd[npse_set,288000]",
            says="a partial factorisation is more robust than both ends, full factorisation and none",
            task="posterior/gaussian_n30",
        ),
    )
    subset = 5

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The score network and the embedding of a subset."""
        return scores.score_networks(session.task)

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """Denoising score matching on 2000 sets of 5, cut to random sizes 1 .. 5."""
        total = session.scale(2_000, 60)
        data = session.train
        loss = scores.fit_score(
            session.networks["score"],
            session.networks["encoder"],
            data[f"theta_{self.subset}"].to(session.device),
            data[f"x_{self.subset}"].to(session.device),
            session.rng,
            session.progress(range(total), "score matching"),
            total,
            random_size=True,
        )
        return {"held_out_loss": torch.tensor(loss)}

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        """Posterior draws [B, DRAWS, d] for the sets x [B, n, d]."""
        x = batch["x"]
        b, n, d = x.shape
        network = session.networks["score"]
        prior = problems.problem(session.task).prior.to(x.device)
        factors = math.ceil(n / self.subset)
        padded = torch.cat([x, x.new_zeros(b, factors * self.subset - n, d)], dim=1)
        size = torch.full((b, factors), self.subset, device=x.device)
        size[:, -1] = n - (factors - 1) * self.subset
        sets = padded.reshape(b * factors, self.subset, d)
        context = session.networks["encoder"](sets, size.reshape(-1)).reshape(b, factors, -1)
        times, sizes, repeats = scores.bridging_schedule(rung // (linear.DRAWS * factors), network.covariance, factors)

        def bridging_score(theta: Tensor, t: float) -> Tensor:
            return scores.compose_scores(scores.set_scores(network, theta, t, context), prior.score(theta), t)

        start = torch.randn(b, linear.DRAWS, d, generator=session.rng, device=x.device) / factors**0.5
        return scores.annealed_langevin(bridging_score, start, times, sizes, repeats, session.rng)
