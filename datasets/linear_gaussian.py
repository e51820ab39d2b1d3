"""Linear-Gaussian models: theta ~ N(0, I) in 4-D, x = A theta + 0.5 e in 6-D, a different design A for every item.

``train`` (64 designs) and ``test`` (512 designs) hold ``design`` float32 [N, 6, 4], entries N(0, 1/6). The posterior of
every design is Gaussian and known; ``stepmark.tracks.bayes`` derives right and wrong posterior estimators from it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stepmark.task import Dataset

DATASET = Dataset(
    id="linear_gaussian",
    version=1,
    summary="random designs of a linear-Gaussian simulator with 4 parameters and 6 observables",
    licence="CC0-1.0",
    digests={
        "train": "b9e6c16073f12f0206d1f4fc1633b16ba1a345e29960657af0f3a358832b0d1e",
        "test": "f69c3513b1fb79b70b6d15cd8a21e7a2d6108a688dc8943321adb8ba0164bc6c",
    },
)
PARAMETERS, OBSERVABLES = 4, 6
NOISE_STD = 0.5


def split(name: str) -> dict[str, Tensor]:
    """``train`` or ``test``. Raises KeyError for another name."""
    count, seed = {"train": (64, 1), "test": (512, 2)}[name]
    # numpy: the same bits on every CPU, which torch does not promise
    design = np.random.default_rng(seed).standard_normal((count, OBSERVABLES, PARAMETERS)) / OBSERVABLES**0.5
    return {"design": torch.from_numpy(design.astype(np.float32))}
