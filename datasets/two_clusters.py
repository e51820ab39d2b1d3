"""Place of two clusters, theta ~ N(0, I) in 2-D, x_j | theta ~ .7 N(theta + u, I) + .3 N(theta - u, I).

u = (1.5, 0.9), so that the likelihood, and with it the posterior of one observation, has two modes: no linear regression
on the observations or their mean is near the posterior, and the sample mean is not sufficient. Given how many observations
came from the first cluster the posterior is Gaussian: that of n of them is a mixture of n + 1 normals and known
(``stepmark.tracks.bayes`` computes it). After the mixture toy problem of compositional score modelling (Geffner et al.
2023), whose clusters differ in width instead of place, for which no such posterior is known.

``train`` holds four layouts of one simulation budget of 10 000 calls: ``theta_m`` float32 [10000 // m, 2] and ``x_m``
float32 [10000 // m, m, 2] for m = 1, 5, 10, 30 observations of each parameter. A method uses one of them, so all spend
the same. ``test`` holds ``theta`` float32 [256, 2] and ``x`` float32 [256, 100, 2]; tasks with n observations take the
first n.
"""

from __future__ import annotations

import numpy as np
import torch
from stepmark.datasets.gaussian_mean import layouts
from torch import Tensor

from stepmark.task import Dataset

DATASET = Dataset(
    id="two_clusters",
    version=1,
    summary="parameters that place two clusters in 2-D, and sets of i.i.d. observations of either",
    licence="CC0-1.0",
    digests={
        "train": "c8b4ea43fdbe03a17c0a96b9d2af899bd490a2a3fba824572bdeb5dab2355eef",
        "test": "aba4413ced17846647365a1afd4fbe7cabd0168a4de354843aaf98ab1e511926",
    },
)
# The prior as a mixture of spherical normals, the equicorrelated noise of one observation, and where its clusters lie.
PRIOR_WEIGHTS = (1.0,)
PRIOR_MEANS = ((0.0, 0.0),)
PRIOR_STD = 1.0
NOISE_STD, CORRELATION = 1.0, 0.0
OFFSETS = ((1.5, 0.9), (-1.5, -0.9))
OFFSET_WEIGHTS = (0.7, 0.3)


def simulate_pairs(count: int, observations: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` draws theta [count, d] of the prior with ``observations`` draws each, x [count, observations, d]."""
    rng = np.random.default_rng(seed)  # numpy: the same bits on every CPU, which torch does not promise
    theta = np.array(PRIOR_MEANS[0]) + PRIOR_STD * rng.standard_normal((count, 2))
    cluster = (rng.random((count, observations)) >= OFFSET_WEIGHTS[0]).astype(np.int64)
    noise = NOISE_STD * rng.standard_normal((count, observations, 2))
    x = theta[:, None] + np.array(OFFSETS)[cluster] + noise
    return torch.from_numpy(theta.astype(np.float32)), torch.from_numpy(x.astype(np.float32))


def split(name: str) -> dict[str, Tensor]:
    """``train`` or ``test``. Raises KeyError for another name."""
    return layouts(name, simulate_pairs, test=5_000, train=4_000)
