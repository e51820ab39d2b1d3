"""Track image, task of resolution: 32x32 images from a network that was trained on 16x16.

The network takes images of any size. At twice the size it still draws shapes of the pixels that it knows, too small,
and in most images not exactly one of them: it has learned composition at one size only. `session.train` holds a
thousand images of the larger size, for methods that adapt. A rung counts rows of any size; what a row costs is in the
FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from stepmark.task import Score, Task, harness_only
from stepmark.tracks.image import check as check
from stepmark.tracks.image import handles as handles
from stepmark.tracks.image import layers as layers
from stepmark.tracks.image import reference_call as reference_call
from stepmark.tracks.image import score as distances

TASKS = (
    Task(
        id="attributes_to_image/shapes32",
        version=1,
        summary="32x32 images of a shape of given form and colour, from a rectified-flow model of 16x16 images",
        dataset="shapes32",
        backbones={"teacher": "shapes16_flow_any"},
        judges={"classifier": "shapes16_classifier"},
        reference="teacher",
        unit="NFE",
        rungs=(4, 8, 16),
        metrics={"misfit": "lower", "alignment": "higher", "fd": "lower", "single": "higher"},
        n=240,
        batch=60,
        seeds=2,
        smoke_n=4,
        smoke_rungs=(4,),
    ),
)


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, 3, 32, 32] standard normal, "condition": balanced}, drawn on the CPU so that devices agree."""
    harness_only("the test inputs")
    noise, index = torch.randn(n, 3, 32, 32, generator=generator), torch.arange(n)
    condition = torch.stack([index % 3, 3 + index // 3 % 4], 1)
    return {"noise": noise.to(device), "condition": condition.to(device)}


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """misfit: mean difference from a sharp image of the shape named. single: share of images with exactly one object.

    alignment and fd: those of `attributes_to_image/shapes16`, of the images at half the size, so of composition alone.
    """
    harness_only("the metrics")
    from stepmark.datasets import shapes32

    condition, images = batch["condition"].cpu(), outputs.detach().float().cpu()
    figures = {
        "misfit": shapes32.misfit(images, condition),
        "single": (shapes32.objects(images) == 1).double(),
    }
    columns = {name: value.double().numpy() for name, value in figures.items()}
    own = {name: Score(float(v.mean()), v[resample].mean(1).tolist()) for name, v in columns.items()}
    return own | distances(replace(task, dataset="shapes16"), batch, halved(images), networks, resample)


def halved(images: Tensor) -> Tensor:
    """Means over 2x2 pixels: [B, C, H, W] to [B, C, H / 2, W / 2]."""
    return avg_pool2d(images, 2)
