"""Flat grey pictures of any brightness, 8x8: a background between black and white, and on it a small mark.

`condition` is int64 [N], the mark: 0 square, 1 cross, 2 ring, all within 3x3 pixels. Brightness of the background is
uniform, in steps of 1/64, and said by nothing: very dark and very bright pictures are as frequent as grey ones. The mark
differs from the background by 0.75, towards grey, so that its contrast tells no brightness.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stepmark.task import Dataset

DATASET = Dataset(
    id="shades",
    version=1,
    summary="8x8 grey pictures of a small mark on a flat background of uniformly distributed brightness",
    licence="Apache-2.0",
    digests={
        "train": "86492b8cc847215a082452ad47d46508a226dd7ca3cbd982c85a2794c0d8c4b7",
        "reference": "b08f78d1cd55ed1c27ead2398b95db35ebee16f47346fe3152a1eb34442bae3d",
    },
)
SIZE = 8
MARKS = np.array(
    [[[1, 1, 1], [1, 1, 1], [1, 1, 1]], [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[1, 1, 1], [1, 0, 1], [1, 1, 1]]]
)
CONTRAST = 0.75
COUNTS = {"train": 10000, "reference": 10000}
SEEDS = {"train": 51, "reference": 52}


def split(name: str) -> dict[str, Tensor]:
    """``x0`` float32 [N, 1, 8, 8] in [-1, 1] and ``condition`` [N] of ``train`` or ``reference`` (10 000 each).

    Raises KeyError for another name.
    """
    count, rng = COUNTS[name], np.random.default_rng(SEEDS[name])
    condition = rng.integers(0, len(MARKS), count)
    background = rng.integers(-64, 65, count) / 64
    row, column = rng.integers(0, SIZE - 2, (2, count))
    cover = np.zeros((count, SIZE, SIZE))
    for i in range(3):
        for j in range(3):
            cover[np.arange(count), row + i, column + j] = MARKS[condition, i, j]
    step = np.where(background > 0, -CONTRAST, CONTRAST)
    images = background[:, None, None] + step[:, None, None] * cover
    return {"x0": torch.from_numpy(images.astype(np.float32))[:, None], "condition": torch.from_numpy(condition)}
