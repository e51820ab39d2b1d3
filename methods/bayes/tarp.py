"""See the class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Session, Variant
from stepmark.tracks.bayes import linear, metrics


class TARP(Method):
    """TARP: test a posterior estimator with credible balls around random reference points, from samples alone.

    For each of N simulated pairs (theta*_i, x_i): draw theta_ij ~ q(theta | x_i), pick a reference point r_i that may
    depend on x_i but not on theta*_i, and take the mass of the ball around r_i that reaches to theta*_i,

        f_i = #{j : d(theta_ij, r_i) < d(theta*_i, r_i)} / n.

    ECP(c) = mean_i 1[f_i < c] is the expected coverage of such balls at credibility c. If q is the posterior, ECP(c) = c
    for every law of r; if ECP(c) = c for every law of r that may depend on x, q is the posterior. No density is needed.
    Distances are Euclidean, after each parameter is scaled to [0, 1] by its range over 1000 draws of the prior.

    The test reported is that of Kolmogorov and Smirnov: statistic max_c |ECP(c) - c|. With n = 99 draws f has 100
    equally likely values under the null; it is spread over its step at random, which makes the p-value exact.

    Source: Lemos, Coogan, Hezaveh and Perreault-Levasseur 2023, algorithm 2 and theorem 3; section 4.2 shows that r must
    depend on x to find an estimator that ignores x, with r between U + 0.1 x and U + x. Here x is not a parameter, so r_i
    is uniform on the box plus half a least-squares prediction of theta from x_i, fitted on a fifth of the simulations that
    takes no further part (so that r_i knows nothing of theta*_i). Differences: that pilot counts against the rung; the
    paper bootstraps an error band where this file has an exact p-value, and goes to hundreds of dimensions where these are
    four. A classifier two-sample test is left out.

    What limits it: the mass of a ball tells little of a shift that is small beside the ball. To find a shifted
    estimator it needs more than ten times the simulations that HPD coverage and ranks need, and where simulations are
    few (50) it finds fewer of the wrong ones, all together, than HPD coverage does; what it finds and they do not are
    the bias that averages out and the prior.

    `tarp_uniform` takes the paper's plain choice, reference points that ignore x. It is valid for any estimator, but blind
    to one that ignores x, such as the prior: then theta*_i and the draws have the same law whatever r_i is.
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
            "false_alarm[tarp,*] <= 0.1 and power_blind[tarp,*] > power_blind[hpd_coverage,*] and "
            "power_blind[tarp,*] > power_blind[sbc,*] and power_prior[tarp,*] > power_prior[hpd_coverage,*] and "
            "power_prior[tarp,*] > power_prior[sbc,*] and power_blind[tarp,500..2000] > 0.9 and "
            "power_prior[tarp,500..2000] > 0.9",
            says="necessary and sufficient, from samples alone: it finds two wrong estimators that HPD coverage and ranks "
            "pass, the more surely the more simulations there are, and passes the exact one",
            headline=True,
        ),
        Claim(
            "power_prior[tarp,*] > power_prior[tarp_uniform,*] and power_prior[tarp,500..2000] > 0.9 and "
            "power_prior[tarp_uniform,*] < 0.2 and false_alarm[tarp_uniform,*] <= 0.1",
            says="references that depend on x find an estimator that ignores x; independent ones do not, and are valid",
        ),
    )
    draws = 99
    pilot = 0.2  # share of the simulations that the reference points are fitted on
    pull = 0.5  # how far a reference point follows the prediction; 0: it ignores x, and nothing is fitted
    variants = (
        Variant(
            "tarp_uniform", says="TARP with reference points that ignore x, uniform on the box", baselines=(), pull=0.0
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> dict[str, Tensor]:
        """Statistic and p-value [B, E] of every estimator on the models design [B, 6, 4]."""
        design = batch["design"]
        theta, x = linear.simulate_pairs(session.simulators, session.rng, design, rung)
        prediction: Tensor | None = None
        if self.pull:
            pilot = max(8, round(self.pilot * rung))
            prediction = fit_linear(theta[:, :pilot], x[:, :pilot])(x[:, pilot:])
            theta, x = theta[:, pilot:], x[:, pilot:]
        low, width = unit_box(session.simulators, session.rng)
        reference = low + width * torch.rand(theta.shape, generator=session.rng, device=theta.device)
        if prediction is not None:
            reference = reference + self.pull * prediction
        return ball_test(session.simulators, session.rng, theta, x, batch, reference, width, self.draws)


def fit_linear(theta: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Least-squares predictor of theta [B, N, d] from x [B, N, D], with a whiff of ridge for the smallest pilots."""
    features = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    gram = features.mT @ features + 1e-3 * torch.eye(features.shape[-1], device=x.device)
    beta = torch.linalg.solve(gram, features.mT @ theta)
    return lambda new: torch.cat([new, torch.ones_like(new[..., :1])], dim=-1) @ beta


def unit_box(simulators: Mapping[str, Callable[..., Any]], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lower corner and width [d] of the box that holds 1000 draws of the prior: what scales a parameter to [0, 1].

    From draws of their own, not from the theta* under test, so that the test stays exact.
    """
    draws = simulators["prior"]((1_000,), generator)
    low = draws.amin(0)
    return low, draws.amax(0) - low


def ball_test(
    simulators: Mapping[str, Callable[..., Any]],
    generator: torch.Generator,
    theta: Tensor,
    x: Tensor,
    batch: Mapping[str, Tensor],
    reference: Tensor,
    width: Tensor,
    draws: int,
) -> dict[str, Tensor]:
    """Test every estimator of a batch by the mass of balls around reference [B, N, d] that reach to theta [B, N, d] (see `TARP`).

    Distances are Euclidean in units of width [d]. Returns statistic and p-value [B, E].
    """
    radius = ((theta - reference) / width).norm(dim=-1, keepdim=True)
    statistics, p_values = [], []
    for which in batch["estimators"].unbind(1):
        samples = simulators["estimator"](x, batch["design"], which, draws, generator)
        inside = (((samples - reference[:, :, None]) / width).norm(dim=-1) < radius).sum(-1)
        jitter = torch.rand(inside.shape, generator=generator, device=theta.device)
        statistic, p_value = metrics.uniformity((inside + jitter) / (draws + 1))
        statistics.append(statistic)
        p_values.append(p_value)
    return {"statistic": torch.stack(statistics, dim=-1), "p_value": torch.stack(p_values, dim=-1)}
