"""Mean of a correlated Gaussian, standard normal prior: theta ~ N(0, I) in 2-D, x_j | theta ~ N(theta, Sigma) i.i.d.

The Gaussian/Gaussian toy problem of compositional score modelling (Geffner et al. 2023), with correlation 0.8. The
posterior of any number of observations is Gaussian and known (``stepmark.tracks.bayes`` computes it).

``train`` holds four layouts of one simulation budget of 10 000 calls: ``theta_m`` float32 [10000 // m, 2] and ``x_m``
float32 [10000 // m, m, 2] for m = 1, 5, 10, 30 observations of each parameter. A method uses one of them, so all spend
the same. ``test`` holds ``theta`` float32 [256, 2] and ``x`` float32 [256, 100, 2]; tasks with n observations take the
first n.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from stepmark.task import Dataset

DATASET = Dataset(
    id="gaussian_mean",
    version=1,
    summary="parameters of a 2-D correlated Gaussian with a normal prior, and sets of i.i.d. observations",
    licence="CC0-1.0",
    digests={
        "train": "3fbd9158ec425adf1777fe6f5ac9e27e509515c13ac196c8cf68b617985fbd75",
        "test": "fa4989d9e621be010224924e519e40138024b2b3fb62503a9ca0842e325c30d2",
    },
)
BUDGET = 10_000  # simulator calls in each training layout
LAYOUTS = (1, 5, 10, 30)
TEST_SETS, TEST_OBSERVATIONS = 256, 100
# The prior as a mixture of spherical normals, and the equicorrelated noise of one observation.
PRIOR_WEIGHTS = (1.0,)
PRIOR_MEANS = ((0.0, 0.0),)
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


def layouts(
    name: str, pairs: Callable[[int, int, int], tuple[Tensor, Tensor]], test: int, train: int
) -> dict[str, Tensor]:
    """The split ``train`` or ``test`` of a problem, as told above; its seeds are `test`, and `train` + m of layout m.

    ``pairs``: as `simulate_pairs`. Raises KeyError for any other name.
    """
    if name == "test":
        theta, x = pairs(TEST_SETS, TEST_OBSERVATIONS, test)
        return {"theta": theta, "x": x}
    if name != "train":
        raise KeyError(name)
    data: dict[str, Tensor] = {}
    for m in LAYOUTS:
        data[f"theta_{m}"], data[f"x_{m}"] = pairs(BUDGET // m, m, train + m)
    return data


def split(name: str) -> dict[str, Tensor]:
    """``train`` or ``test``. Raises KeyError for another name."""
    return layouts(name, simulate_pairs, test=1_000, train=0)
