"""See the class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Session
from stepmark.tracks import bayes


class TARP(Method):
    """TARP: test a posterior estimator with credible balls around random reference points, from samples alone.

    For each of N simulated pairs (theta*_i, x_i): draw theta_ij ~ q(theta | x_i), pick a reference point r_i that may
    depend on x_i but not on theta*_i, and take the mass of the ball around r_i that reaches to theta*_i,

        f_i = #{j : d(theta_ij, r_i) < d(theta*_i, r_i)} / n.

    ECP(c) = mean_i 1[f_i < c] is the expected coverage of such balls at credibility c. If q is the posterior, ECP(c) = c
    for every law of r; if ECP(c) = c for every law of r that may depend on x, q is the posterior. No density is needed.
    Distances are Euclidean, after each parameter is scaled to [0, 1] by its range over the simulated theta*.

    The test reported is that of Kolmogorov and Smirnov: statistic max_c |ECP(c) - c|. With n = 99 draws f has 100
    equally likely values under the null; it is spread over its step at random, which makes the p-value exact.

    Source: Lemos, Coogan, Hezaveh and Perreault-Levasseur 2023, algorithm 2 and theorem 3; section 4.2 shows that r must
    depend on x to find an estimator that ignores x. Here r_i is uniform on the unit box, moved by a least-squares
    prediction of theta from x (fitted on the other half of the simulations, so that r_i knows nothing of theta*_i).
    Differences: the paper bootstraps an error band where this file has an exact p-value; the x-dependence is a choice.
    """

    paper = Paper(
        id="tarp",
        title="Sampling-Based Accuracy Testing of Posterior Estimators for General Inference",
        authors="Pablo Lemos, Adam Coogan, Yashar Hezaveh, Laurence Perreault-Levasseur",
        year=2023,
        arxiv="2302.03026",
        code="Ciela-Institute/tarp",
    )
    tasks = ("coverage/linear_gaussian",)
    baselines = ("hpd_coverage", "sbc", "tarp_uniform")
    claims = (
        Claim(
            "deviation_exact[tarp,500] <= 0.0607",
            says="the exact posterior stays inside the 95 % band of a uniform law (1.358 / sqrt(500))",
        ),
        Claim(
            "deviation_overconfident[tarp,500] > 3 * deviation_exact[tarp,500]",
            says="an overconfident estimator deviates three times as much as the exact one",
        ),
        Claim(
            "deviation_blind[tarp,500] > 3 * deviation_exact[tarp,500] and "
            "deviation_blind[hpd_coverage,500] <= 1.5 * deviation_exact[hpd_coverage,500]",
            says="a bias that HPD coverage cannot see deviates three times as much as the exact posterior",
        ),
        Claim(
            "power_prior[tarp,500] > 0.95 and power_prior[tarp_uniform,500] < 0.15",
            says="references that depend on x find an estimator that ignores x; independent ones do not",
        ),
    )
    draws = 99

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> dict[str, Tensor]:
        """Statistic and p-value [B, E] of every estimator on the models design [B, 6, 4]."""
        design = batch["design"]
        theta, x = bayes.simulate_pairs(session.simulators, session.rng, design, rung)
        box = torch.rand(theta.shape, generator=session.rng, device=theta.device)
        low, width = bayes.unit_box(theta)
        reference = low + width * (box - 0.5) + held_out_prediction(theta, x)
        return bayes.ball_test(session.simulators, session.rng, theta, x, design, reference, self.draws)


def held_out_prediction(theta: Tensor, x: Tensor) -> Tensor:
    """Least-squares prediction [B, N, d] of theta from x, each half of the N pairs predicted by the other's fit."""
    half = x.shape[1] // 2
    features = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)

    def fit(rows: slice) -> Tensor:
        a = features[:, rows]
        # A whiff of ridge keeps the smallest rungs, 25 pairs for 7 coefficients, well posed.
        gram = a.mT @ a + 1e-3 * torch.eye(a.shape[-1], device=a.device)
        return torch.linalg.solve(gram, a.mT @ theta[:, rows])

    first, second = slice(0, half), slice(half, None)
    return torch.cat([features[:, first] @ fit(second), features[:, second] @ fit(first)], dim=1)
