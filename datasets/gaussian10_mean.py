"""Mean of a correlated Gaussian, standard normal prior: theta ~ N(0, I) in 10-D, x_j | theta ~ N(theta, Sigma) i.i.d.

The problem of `gaussian_mean` with ten parameters: too many for sampling from the prior, and for learning the posterior
of a large set from few sets. The posterior of any number of observations is Gaussian and known
(``stepmark.tracks.bayes`` computes it).

``train`` holds four layouts of one simulation budget of 10 000 calls: ``theta_m`` float32 [10000 // m, 10] and ``x_m``
float32 [10000 // m, m, 10] for m = 1, 5, 10, 30 observations of each parameter. A method uses one of them, so all spend
the same. ``test`` holds ``theta`` float32 [256, 10] and ``x`` float32 [256, 100, 10]; tasks with n observations take the
first n.
"""

from __future__ import annotations

import numpy as np
import torch
from stepmark.datasets.gaussian_mean import layouts
from torch import Tensor

from stepmark.task import Dataset

DATASET = Dataset(
    id="gaussian10_mean",
    version=1,
    summary="parameters of a 10-D correlated Gaussian with a normal prior, and sets of i.i.d. observations",
    licence="CC0-1.0",
    digests={
        "train": "cb0aaafd5f4ac2f79105b622c2cc7e612aad47cb1c4e942a4e1f80c670c79dac",
        "test": "96c559290c3ffa658c5e9669a9bdcaf73d730e3ddcb01f2e7f44da23bcd653b8",
    },
)
# The prior as a mixture of spherical normals, and the equicorrelated noise of one observation.
PRIOR_WEIGHTS = (1.0,)
PRIOR_MEANS = ((0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),)
PRIOR_STD = 1.0
NOISE_STD, CORRELATION = 1.0, 0.8


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
    return layouts(name, simulate_pairs, test=3_000, train=2_000)
