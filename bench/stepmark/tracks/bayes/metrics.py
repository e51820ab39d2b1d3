"""Distances between samples and the exact posterior, and tests of uniformity."""

from __future__ import annotations

import math

import torch
from scipy import stats
from torch import Tensor

from stepmark.tracks.bayes.problems import GaussianMixture


def squared_mmd(points: Tensor, target: GaussianMixture, widths: tuple[float, ...] = (0.5, 1.0, 2.0)) -> Tensor:
    """Unbiased estimate [B] of the squared MMD between points [B, S, d] and mixtures (leading dimension B).

    Gaussian kernels, averaged over `widths`, in units of sqrt(d / 2), by which distances grow (Gretton et al. 2012, eq.
    3). Only the points are sampled: the kernel's expectations under a mixture of Gaussians are Gaussian integrals, E
    k(x, Y) = sum_k w_k h^d |C_k + h^2 I|^(-1/2) exp(-r' (C_k + h^2 I)^(-1) r / 2).
    """
    s, d = points.shape[-2:]
    eye = torch.eye(d, dtype=points.dtype)
    pairs = torch.cdist(points, points).square()
    total = torch.zeros(len(points), dtype=points.dtype)
    for h in (width * math.sqrt(d / 2) for width in widths):
        scale = d * math.log(h) + 0.5 * d * math.log(2 * math.pi)  # turns a normal density into the kernel
        among = torch.exp(-pairs / (2 * h * h)).sum((-1, -2)) - s
        smoothed = GaussianMixture(target.log_weights, target.means, target.covariances + h * h * eye)
        wide = GaussianMixture(smoothed.log_weights[:, None], smoothed.means[:, None], smoothed.covariances[:, None])
        across = (wide.log_prob(points) + scale).exp().mean(-1)
        within = torch.zeros(len(points), dtype=points.dtype)
        for k in range(target.means.shape[-2]):
            shifted = GaussianMixture(
                target.log_weights, target.means, target.covariances + target.covariances[:, k : k + 1] + h * h * eye
            )
            within = within + target.log_weights[:, k].exp() * (shifted.log_prob(target.means[:, k]) + scale).exp()
        total = total + among / (s * (s - 1)) - 2 * across + within
    return total / len(widths)


def sliced_w2(points: Tensor, target: GaussianMixture, directions: int = 32) -> Tensor:
    """Mean [B] over directions of the 2-Wasserstein distance between projected points [B, S, d] and mixtures.

    In one dimension the distance is that of the quantile functions; those of the target come from 20 sorted draws per
    point, made with a fixed seed so that the metric is the same for every method.
    """
    d = points.shape[-1]
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(directions, d, generator=generator, dtype=torch.float64)
    axes = axes / axes.norm(dim=-1, keepdim=True)
    per_point = 20
    reference = target.sample(per_point * points.shape[-2], generator)
    sorted_points = (points @ axes.mT).sort(dim=-2).values.repeat_interleave(per_point, dim=-2)
    sorted_reference = (reference @ axes.mT).sort(dim=-2).values
    return (sorted_points - sorted_reference).square().mean(-2).sqrt().mean(-1)


def uniformity(f: Tensor) -> tuple[Tensor, Tensor]:
    """Kolmogorov-Smirnov test of f [..., N] against the uniform law: statistic and p-value, float64 [...].

    The statistic is max_c |ECP(c) - c| for the empirical coverage ECP(c) = mean(f < c); the p-value is exact.
    """
    n = f.shape[-1]
    ordered = f.double().sort(dim=-1).values
    upper = torch.arange(1, n + 1, device=f.device, dtype=torch.float64) / n
    statistic = torch.maximum(upper - ordered, ordered - (upper - 1 / n)).amax(-1)
    p_value = stats.kstwo.sf(statistic.cpu().numpy(), n)
    return statistic, torch.as_tensor(p_value, dtype=torch.float64, device=f.device)
