"""The problems: simulators with priors, observations and exact posteriors."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stepmark.task import Task, harness_only
from stepmark.tracks.bayes.noising import alpha_bar


@dataclass(frozen=True)
class GaussianMixture:
    """Mixtures of Gaussians, one for each leading index.

    Attributes:
        log_weights: [..., K], normalised.
        means: [..., K, d].
        covariances: [..., K, d, d].
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor

    def _component_log_probs(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """log w_k N(theta; k) and its precision-weighted residual for theta [..., d]: [..., K], [..., K, d]."""
        residual = theta[..., None, :] - self.means
        precision = torch.linalg.inv(self.covariances)
        weighted = (precision @ residual[..., None]).squeeze(-1)
        quadratic = (residual * weighted).sum(-1)
        log_det = torch.logdet(2 * math.pi * self.covariances)
        return self.log_weights - 0.5 * (quadratic + log_det), weighted

    def log_prob(self, theta: Tensor) -> Tensor:
        """log density at theta [..., d], whose leading dimensions broadcast with the mixture's."""
        return self._component_log_probs(theta)[0].logsumexp(-1)

    def score(self, theta: Tensor) -> Tensor:
        """Gradient of the log density at theta [..., d]."""
        log_probs, weighted = self._component_log_probs(theta)
        return -(log_probs.softmax(-1)[..., None] * weighted).sum(-2)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` draws of every mixture, [..., count, d]."""
        *lead, k, d = self.means.shape
        device = self.means.device
        weights = self.log_weights.exp().reshape(-1, k)
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        means = self.means.reshape(-1, k, d).gather(1, chosen[..., None].expand(-1, -1, d))
        factors = torch.linalg.cholesky(self.covariances.expand(*lead, k, d, d)).reshape(-1, k, d, d)
        noise = torch.randn(*chosen.shape, d, generator=generator, device=device, dtype=means.dtype)
        rows = torch.arange(len(factors), device=device)[:, None]
        return (means + (factors[rows, chosen] @ noise[..., None]).squeeze(-1)).reshape(*lead, count, d)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [..., d] and covariance [..., d, d]."""
        weights = self.log_weights.exp()[..., None]
        mean = (weights * self.means).sum(-2)
        offset = self.means - mean[..., None, :]
        spread = self.covariances + offset[..., :, None] * offset[..., None, :]
        return mean, (weights[..., None] * spread).sum(-3)

    def affine(self, matrix: Tensor, centre: Tensor) -> GaussianMixture:
        """The law of `matrix @ (theta - centre)`; matrix [..., d, d], centre [..., d]."""
        means = ((self.means - centre[..., None, :])[..., None, :] @ matrix[..., None, :, :].mT).squeeze(-2)
        covariances = matrix[..., None, :, :] @ self.covariances @ matrix[..., None, :, :].mT
        return GaussianMixture(self.log_weights, means, covariances)

    def diffused(self, t: float) -> GaussianMixture:
        """The law of theta_t = sqrt(a) theta + sqrt(1 - a) e, a = `alpha_bar(t)`."""
        a = alpha_bar(t)
        eye = torch.eye(self.means.shape[-1], dtype=self.means.dtype, device=self.means.device)
        return GaussianMixture(self.log_weights, a**0.5 * self.means, a * self.covariances + (1 - a) * eye)

    def to(self, target: Tensor | torch.device | torch.dtype) -> GaussianMixture:
        """The same on another device or in another dtype."""
        return GaussianMixture(self.log_weights.to(target), self.means.to(target), self.covariances.to(target))


@dataclass(frozen=True)
class Problem:
    """A known prior and a Gaussian likelihood x | theta ~ N(theta, noise).

    Attributes:
        prior: float32 mixture without leading dimensions; methods may use it freely.
        noise: covariance of one observation, [d, d].
    """

    prior: GaussianMixture
    noise: Tensor

    def simulate(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        """One observation for each row of theta [R, d]: [R, d]."""
        normal = torch.randn(theta.shape, generator=generator, device=theta.device, dtype=theta.dtype)
        return theta + normal @ torch.linalg.cholesky(self.noise).mT.to(theta)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """log p(x | theta) of each row: theta [R, d], x [R, d] -> [R]."""
        residual = x - theta
        precision = torch.linalg.inv(self.noise).to(theta)
        log_det = torch.logdet(2 * math.pi * self.noise).to(theta)
        return -0.5 * (((residual @ precision) * residual).sum(-1) + log_det)

    def posterior(self, x: Tensor) -> GaussianMixture:
        """The exact posterior of every set x [..., n, d], in float64. Harness only."""
        harness_only("the exact posterior")
        x = x.double()
        prior, noise = self.prior.to(torch.float64).to(x.device), self.noise.to(x)
        n = x.shape[-2]
        mean = x.mean(-2)[..., None, :]  # [..., 1, d]: sufficient
        prior_precision, data_precision = torch.linalg.inv(prior.covariances), n * torch.linalg.inv(noise)
        covariances = torch.linalg.inv(prior_precision + data_precision)
        shift = (prior_precision @ prior.means[..., None]) + data_precision @ mean[..., None]
        means = (covariances @ shift).squeeze(-1)
        # Component k explains the sample mean with N(mean; mu_k, C_k + noise / n).
        spread = prior.covariances + noise / n
        residual = mean - prior.means
        quadratic = (residual[..., None, :] @ torch.linalg.inv(spread) @ residual[..., None]).squeeze(-1).squeeze(-1)
        log_weights = prior.log_weights - 0.5 * (quadratic + torch.logdet(spread))
        return GaussianMixture(log_weights.log_softmax(-1), means, covariances.expand(*means.shape, means.shape[-1]))


def problem(task: Task) -> Problem:
    """Prior and likelihood of a `posterior/*` task."""
    data = importlib.import_module(f"stepmark.datasets.{task.dataset}")
    means = torch.tensor(data.PRIOR_MEANS)
    covariances = data.PRIOR_STD**2 * torch.eye(means.shape[-1]).expand(len(means), -1, -1)
    prior = GaussianMixture(torch.tensor(data.PRIOR_WEIGHTS).log(), means, covariances)
    d = means.shape[-1]
    noise = data.NOISE_STD**2 * ((1 - data.CORRELATION) * torch.eye(d) + data.CORRELATION * torch.ones(d, d))
    return Problem(prior, noise)


def observations(task: Task) -> int:
    """How many observations a set of a `posterior/*` task holds."""
    return int(task.id.rsplit("_n", 1)[1])
