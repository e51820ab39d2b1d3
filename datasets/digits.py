"""Handwritten digits, 8x8 grey, 10 classes: the 1797 images bundled with scikit-learn (UCI Optical Recognition
of Handwritten Digits, test part; Alpaydin and Kaynak 1998).

``split`` returns ``x0`` float32 [N, 1, 8, 8] in [-1, 1] and ``condition`` int64 [N] (the class). Every sixth image of
each class is in ``test``, the rest in ``train``; ``reference`` is all of them, the target of Frechet distances.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from stepmark.task import Dataset

DATASET = Dataset(
    id="digits",
    version=1,
    summary="1797 real 8x8 grey images of handwritten digits, 10 classes",
    licence="CC-BY-4.0",
    digests={
        "train": "a3219daefd9c072c727d6d617e8410e09c370f3f60aec18d8331939e80e1c433",
        "test": "9b063695fe7776bae447aac5c56b4eeadad62fb194c4240e1d7e2846857b3407",
        "reference": "b640ea9d007e6a2da0dccde238c690d640ca91bc8b6a310bf39a83809ae56c56",
    },
)
CLASSES = 10
SHAPE = (1, 8, 8)


@cache
def _all() -> tuple[Tensor, Tensor, Tensor]:
    """All images, labels and the test mask."""
    bunch = load_digits()
    images = torch.from_numpy((bunch.images / 8.0 - 1.0).astype(np.float32))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(CLASSES):
        held_out[(labels == label).nonzero().flatten()[::6]] = True
    return images, labels, held_out


def split(name: str) -> dict[str, Tensor]:
    """``train`` (1493 images), ``test`` (304) or ``reference`` (all 1797). Raises KeyError for another name."""
    images, labels, held_out = _all()
    keep = {"train": ~held_out, "test": held_out, "reference": torch.ones_like(held_out)}[name]
    return {"x0": images[keep].clone(), "condition": labels[keep].clone()}
