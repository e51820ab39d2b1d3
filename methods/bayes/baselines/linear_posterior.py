"""See the class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method, Session
from stepmark.tracks.bayes import linear, problems


class LinearPosterior(Method):
    """One Gaussian for all: least squares of the parameters on a set's mean, spread by the residuals' covariance.

    theta ~ N(B xbar + b, V), fitted in closed form on the simulations that a set network learns from, whose score is
    scaled by the same V. Of the right form where prior and likelihood are Gaussian, and nearer there than any network;
    wrong wherever the posterior is not, or the mean is not sufficient. Evaluates nothing: the same at every rung.
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

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """Coefficients [d + 1, d] and a Cholesky factor [d, d] of what is left."""
        n = problems.observations(session.task)
        theta = session.train[f"theta_{n}"].double()
        design = with_one(session.train[f"x_{n}"].double().mean(1))
        beta = torch.linalg.lstsq(design, theta).solution
        residual = theta - design @ beta
        covariance = residual.mT @ residual / (len(theta) - design.shape[1])
        return {"beta": beta.float(), "root": torch.linalg.cholesky(covariance).float()}

    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        """Posterior draws [B, DRAWS, d] for the sets x [B, n, d]."""
        x = batch["x"]
        mean = with_one(x.mean(1)) @ session.state["beta"].to(x)
        noise = torch.randn(len(x), linear.DRAWS, x.shape[-1], generator=session.rng, device=x.device)
        return mean[:, None] + noise @ session.state["root"].to(x).mT


def with_one(x: Tensor) -> Tensor:
    """x [R, D] and a column of ones."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=-1)
