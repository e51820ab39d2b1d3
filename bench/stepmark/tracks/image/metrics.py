"""Metrics of images and points: Fréchet distance, sliced Wasserstein distance, distance to the exact endpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import Score, Task, load_split
from stepmark.tracks.image.schedules import quadratic_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step, heun_step


def moments(features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [d] and unbiased covariance [d, d] of features [n, d]."""
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(
    mean: NDArray[np.float64],
    covariance: NDArray[np.float64],
    other_mean: NDArray[np.float64],
    other_covariance: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Squared Frechet distance between Gaussians (Dowson and Landau 1982; FID, Heusel et al. 2017).

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2), the last as the sum of the square roots of the eigenvalues of
    the symmetric matrix C2^(1/2) C1 C2^(1/2). mean [..., d] and covariance [..., d, d] may be stacked; returns [...].
    """
    values, vectors = np.linalg.eigh(other_covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covariance @ root)
    trace = np.trace(covariance, axis1=-2, axis2=-1) + np.trace(other_covariance)
    return ((mean - other_mean) ** 2).sum(-1) + trace - 2 * np.sqrt(cross.clip(min=0)).sum(-1)


def frechet_resampled(
    features: NDArray[np.float64],
    reference: tuple[NDArray[np.float64], NDArray[np.float64]],
    resample: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Frechet distance to the reference moments of every resample [B, n] of features [n, d]: float64 [B]."""
    n, d = features.shape
    counts = np.stack([np.bincount(row, minlength=n) for row in resample]).astype(np.float64)
    size = counts.sum(1, keepdims=True)
    centre = features.mean(0)
    shifted = features - centre
    # second moments of all resamples in one matrix product: the distinct products of features as columns
    rows, columns = np.triu_indices(d)
    mean = counts @ shifted / size
    packed = counts @ (shifted[:, rows] * shifted[:, columns])
    second = np.empty((len(counts), d, d))
    second[:, rows, columns] = packed
    second[:, columns, rows] = packed
    covariance = (second - size[:, :, None] * mean[:, :, None] * mean[:, None, :]) / (size[:, :, None] - 1)
    return frechet_distance(mean + centre, covariance, *reference)


def sliced_w2(
    samples: NDArray[np.float64],
    exact: NDArray[np.float64],
    resample: NDArray[np.int64] | None = None,
    directions: int = 16,
) -> NDArray[np.float64]:
    """Sliced 2-Wasserstein distance (Bonneel et al. 2015) from samples [n, 2] to exact samples [m, 2].

    Root mean square over `directions` equally spaced directions of the half circle. Returns float64 [B], one for every
    row of item indices of `resample`, or [1] without.
    """
    counts = np.ones((1, len(samples)), dtype=np.int64)
    if resample is not None:
        counts = np.stack([np.bincount(row, minlength=len(samples)) for row in resample])
    angles = math.pi * np.arange(directions) / directions
    axes = np.stack([np.cos(angles), np.sin(angles)])
    ours, theirs = samples @ axes, np.sort(exact @ axes, axis=0)
    order = np.argsort(ours, axis=0)
    places = (np.arange(len(theirs)) + 0.5) / len(theirs)
    total = np.zeros(len(counts))
    for k in range(directions):
        values = ours[order[:, k], k]
        for b, row in enumerate(counts):
            # quantiles of the resample by repetition in sorted order, those of the truth by interpolation
            quantiles = np.repeat(values, row[order[:, k]])
            truth = np.interp((np.arange(len(quantiles)) + 0.5) / len(quantiles), places, theirs[:, k])
            total[b] += ((quantiles - truth) ** 2).mean()
    return np.sqrt(total / directions)


def exact_endpoints(network: nn.Module, noise: Tensor, condition: Tensor, steps: int = 256) -> Tensor:
    """Where the probability-flow ODE of an exact network takes the noise: Heun in float64 on a dense grid, [B, 2]."""
    return ends(Denoiser(network, condition), noise.double(), quadratic_times(steps))


@torch.no_grad()
def ends(denoise: Denoiser, x: Tensor, times: Sequence[float]) -> Tensor:
    """Where a network leads x [B, ...] on a dense grid of times, the last one 0: Heun's method, the last step Euler's."""
    for t, s in pairwise(times[:-1]):
        x = heun_step(denoise, x, t, s)
    return ddim_step(denoise.schedule, *denoise(x, times[-2]), 0.0)


def classifier_features(classifier: nn.Module, images: Tensor) -> NDArray[np.float64]:
    """Features [n, d] that a classifier finds in images [n, C, H, W]."""
    device = next(classifier.parameters()).device
    with torch.no_grad():
        parts = [classifier.features(part.to(device)).double().cpu() for part in images.split(500)]
    return torch.cat(parts).numpy()


_MOMENTS: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}


def reference_moments(dataset: str, classifier: nn.Module) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance of the features of a dataset's reference split, computed once per dataset and classifier."""
    sha = hashlib.sha256(dataset.encode())
    for value in classifier.state_dict().values():
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    key = sha.hexdigest()
    if key not in _MOMENTS:
        _MOMENTS[key] = moments(classifier_features(classifier, load_split(dataset, "reference")["x0"]))
    return _MOMENTS[key]


_ENDPOINTS: dict[str, Tensor] = {}


def _endpoints(task: Task, batch: Mapping[str, Tensor]) -> Tensor:
    """Exact endpoints of the batch's noise, kept for the few seeds of a task: they cost 511 evaluations."""
    from stepmark.backbones import load

    noise, condition = batch["noise"].detach().cpu(), batch["condition"].cpu()
    key = f"{task.id} {hashlib.sha256(noise.contiguous().numpy().tobytes()).hexdigest()}"
    if key not in _ENDPOINTS:
        with torch.no_grad():
            _ENDPOINTS[key] = exact_endpoints(load(task.backbones["teacher"]), noise, condition)
    return _ENDPOINTS[key]


def score_points(
    task: Task, batch: Mapping[str, Tensor], outputs: Tensor, resample: NDArray[np.int64]
) -> dict[str, Score]:
    """Distance of points to exact samples of their mixture, and to the exact ends of their own noises."""
    condition = batch["condition"].cpu().numpy()
    points, exact = outputs.double().numpy(), load_split(task.dataset, "test")
    truth, truth_condition = exact["x0"].double().numpy(), exact["condition"].numpy()
    values, spread = [], []
    for mixture in np.unique(condition):
        inside = condition == mixture
        place = np.cumsum(inside) - 1
        target = truth[truth_condition == mixture]
        values.append(sliced_w2(points[inside], target)[0])
        rows = [place[row[inside[row]]] for row in resample]
        spread.append(sliced_w2(points[inside], target, rows))
    distance = np.linalg.norm(points - _endpoints(task, batch).numpy(), axis=1)
    return {
        "sliced_w2": Score(float(np.mean(values)), np.mean(spread, axis=0).tolist()),
        "endpoint_error": Score(float(distance.mean()), distance[resample].mean(1).tolist()),
    }
