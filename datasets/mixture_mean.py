"""Mean of a wide Gaussian, four-mode prior: theta ~ sum_k N(mu_k, 0.8^2 I) / 4 in 2-D, x_j | theta ~ N(theta, 9 I) i.i.d.

The modes mu_k lie at (+-1.8, +-1.8). One observation says little, so even ten leave a posterior with several modes. It is
again a mixture of Gaussians and known (``stepmark.tracks.bayes`` computes it), while neither the posterior of one
observation nor that of a set is Gaussian.

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
    id="mixture_mean",
    version=1,
    summary="parameters of a wide 2-D Gaussian with a four-mode prior, and sets of i.i.d. observations",
    licence="CC0-1.0",
    digests={
        "train": "88f5bd077fb30b57c1ce44bfa425c5e97865b56140f8cf660f3ed55379406986",
        "test": "0ff7f2f105508ced60fd6dd5e5a8e7f6b9e3e4ea4eff222da9321ebddccaa1e4",
    },
)
# The prior as a mixture of spherical normals, and the equicorrelated noise of one observation.
PRIOR_WEIGHTS = (0.25, 0.25, 0.25, 0.25)
PRIOR_MEANS = ((-1.8, -1.8), (-1.8, 1.8), (1.8, -1.8), (1.8, 1.8))
PRIOR_STD = 0.8
NOISE_STD, CORRELATION = 3.0, 0.0


def simulate_pairs(count: int, observations: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` draws theta [count, d] of the prior with ``observations`` draws each, x [count, observations, d]."""
    rng = np.random.default_rng(seed)  # numpy: the same bits on every CPU, which torch does not promise
    component = rng.choice(len(PRIOR_WEIGHTS), size=count, p=PRIOR_WEIGHTS)
    theta = np.array(PRIOR_MEANS)[component]
    theta = theta + PRIOR_STD * rng.standard_normal(theta.shape)
    d = theta.shape[1]
    # Equicorrelated noise: a part common to all coordinates and one of each, without a matrix product.
    common = rng.standard_normal((count, observations, 1))
    own = rng.standard_normal((count, observations, d))
    x = theta[:, None] + NOISE_STD * (CORRELATION**0.5 * common + (1 - CORRELATION) ** 0.5 * own)
    return torch.from_numpy(theta.astype(np.float32)), torch.from_numpy(x.astype(np.float32))


def split(name: str) -> dict[str, Tensor]:
    """``train`` or ``test``. Raises KeyError for another name."""
    return layouts(name, simulate_pairs, test=2_000, train=1_000)
