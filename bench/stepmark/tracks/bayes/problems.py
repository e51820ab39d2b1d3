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
    """A known prior and a likelihood x | theta ~ sum_c w_c N(theta + offset_c, noise) of one or two components.

    Attributes:
        prior: float32 mixture without leading dimensions; methods may use it freely.
        noise: covariance of one observation's component, [d, d].
        offsets: [C, d], C = 1 or 2.
        log_weights: [C], normalised.
    """

    prior: GaussianMixture
    noise: Tensor
    offsets: Tensor
    log_weights: Tensor

    def simulate(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        """One observation for each row of theta [R, d]: [R, d]."""
        normal = torch.randn(theta.shape, generator=generator, device=theta.device, dtype=theta.dtype)
        centre = theta
        if len(self.offsets) > 1:
            chosen = torch.multinomial(
                self.log_weights.exp().to(theta.device), len(theta), replacement=True, generator=generator
            )
            centre = theta + self.offsets.to(theta)[chosen]
        return centre + normal @ torch.linalg.cholesky(self.noise).mT.to(theta)

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """log p(x | theta) of each row: theta [R, d], x [R, d] -> [R]."""
        precision = torch.linalg.inv(self.noise).to(theta)
        log_det = torch.logdet(2 * math.pi * self.noise).to(theta)
        parts = []
        for offset, log_weight in zip(self.offsets.to(theta), self.log_weights.to(theta), strict=True):
            residual = x - theta - offset
            parts.append(log_weight - 0.5 * (((residual @ precision) * residual).sum(-1) + log_det))
        return parts[0] if len(parts) == 1 else torch.stack(parts).logsumexp(0)

    def posterior(self, x: Tensor) -> GaussianMixture:
        """The exact posterior of every set x [..., n, d], in float64. Harness only.

        Given which k of the n observations came from component 1, theta's posterior is that of a Gaussian mean with
        sample mean xbar - (k offset_1 + (n - k) offset_0) / n: it hangs on k alone, so that the 2^n assignments make a
        mixture of n + 1 terms for each component of the prior.
        """
        harness_only("the exact posterior")
        x = x.double()
        prior, noise = self.prior.to(torch.float64).to(x.device), self.noise.to(x)
        n = x.shape[-2]
        log_counts, shifts = self._assignments(x)
        means = x.mean(-2)[..., None, :] - shifts  # [..., k, d]: sufficient
        prior_precision, data_precision = torch.linalg.inv(prior.covariances), n * torch.linalg.inv(noise)
        covariances = torch.linalg.inv(prior_precision + data_precision)
        shift = (prior_precision @ prior.means[..., None]) + data_precision @ means[..., None, :, None]
        centres = (covariances @ shift).squeeze(-1)
        # A component of the prior explains the sample mean with N(mean; mu, C + noise / n).
        spread = prior.covariances + noise / n
        residual = means[..., None, :] - prior.means
        quadratic = (residual[..., None, :] @ torch.linalg.inv(spread) @ residual[..., None]).squeeze(-1).squeeze(-1)
        log_weights = log_counts[..., None] + prior.log_weights - 0.5 * (quadratic + torch.logdet(spread))
        centres, log_weights = centres.flatten(-3, -2), log_weights.flatten(-2)
        spreads = covariances.repeat(len(shifts), 1, 1)
        return GaussianMixture(log_weights.log_softmax(-1), centres, spreads.expand(*centres.shape, centres.shape[-1]))

    def _assignments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log evidence [..., K], but for theta, of k = 0 .. K - 1 observations from component 1, and mean offset [K, d].

        Summed over the assignments with that k: the coefficients of prod_j (b_j + a_j z), a_j and b_j being the weight
        and density of what each component leaves of x_j.
        """
        n = x.shape[-2]
        offsets = self.offsets.to(x)
        if len(offsets) == 1:
            return x.new_zeros(*x.shape[:-2], 1), offsets
        precision = torch.linalg.inv(self.noise.to(x))
        left = x[..., None, :] - offsets  # [..., n, 2, d]
        log_parts = self.log_weights.to(x) - 0.5 * ((left @ precision) * left).sum(-1)
        log_counts = log_parts[..., 0, :]
        none = torch.full_like(log_counts[..., :1], -math.inf)
        for j in range(1, n):
            stay = torch.cat([log_counts, none], -1) + log_parts[..., j, :1]
            log_counts = torch.logaddexp(stay, torch.cat([none, log_counts], -1) + log_parts[..., j, 1:])
        share = torch.arange(n + 1, dtype=x.dtype, device=x.device)[:, None] / n
        shifts = share * offsets[1] + (1 - share) * offsets[0]
        mean = x.mean(-2)[..., None, :] - shifts
        return log_counts + 0.5 * n * ((mean @ precision) * mean).sum(-1), shifts


def problem(task: Task) -> Problem:
    """Prior and likelihood of a `posterior/*` task; a method may know the prior, `problem(session.task).prior`."""
    data = importlib.import_module(f"stepmark.datasets.{task.dataset}")
    means = torch.tensor(data.PRIOR_MEANS)
    covariances = data.PRIOR_STD**2 * torch.eye(means.shape[-1]).expand(len(means), -1, -1)
    prior = GaussianMixture(torch.tensor(data.PRIOR_WEIGHTS).log(), means, covariances)
    d = means.shape[-1]
    noise = data.NOISE_STD**2 * ((1 - data.CORRELATION) * torch.eye(d) + data.CORRELATION * torch.ones(d, d))
    offsets = torch.tensor(getattr(data, "OFFSETS", ((0.0,) * d,)))
    return Problem(prior, noise, offsets, torch.tensor(getattr(data, "OFFSET_WEIGHTS", (1.0,))).log())


def observations(task: Task) -> int:
    """How many observations a set of a `posterior/*` task holds."""
    return int(task.id.rsplit("_n", 1)[1])
