"""Track image, task of brightness: can a sampler draw very dark and very bright pictures?

The model was trained, as many are, on a schedule whose last timestep still shows the picture through the noise; in a
flat picture that is its brightness. Sampling from noise alone then asks it for something that it never saw. How visible a
flat picture is grows with the root of its number of pixels: the schedule keeps more signal than that of latent models,
and still less of a flat picture, as 64 pixels are 256 times fewer than the 16 384 values of a latent image.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import Score, Task, harness_only, load_split
from stepmark.tracks.image import check as check
from stepmark.tracks.image import handles as handles
from stepmark.tracks.image import layers as layers
from stepmark.tracks.image import reference_call as reference_call
from stepmark.tracks.image.metrics import frechet_distance, frechet_resampled, moments

TASKS = (
    Task(
        id="class_to_image/shades",
        version=1,
        summary="8x8 pictures of any brightness, DDPM teacher on a schedule that does not end in pure noise",
        dataset="shades",
        backbones={"teacher": "shades_eps"},
        reference="teacher",
        unit="NFE",
        rungs=(5, 10, 25, 50),
        metrics={"w1_brightness": "lower", "fd": "lower"},
        n=2000,
        batch=500,
        seeds=3,
        smoke_n=64,
        smoke_rungs=(5, 10),
    ),
)


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, 1, 8, 8] standard normal, "condition": each mark in turn}, drawn on the CPU so that devices agree."""
    harness_only("the test inputs")
    noise = torch.randn(n, 1, 8, 8, generator=generator)
    return {"noise": noise.to(device), "condition": (torch.arange(n) % 3).to(device)}


@lru_cache(maxsize=1)
def _truth() -> tuple[NDArray[np.float64], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Sorted brightness of the reference pictures, and moments of their pixels."""
    pixels = load_split("shades", "reference")["x0"].flatten(1).double().numpy()
    return np.sort(pixels.mean(1)), moments(pixels)


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """w1_brightness: 1-Wasserstein distance between mean pixels of the samples and of the data. fd: Frechet distance
    between their pixels. Both on samples clamped to the range of the data.
    """
    harness_only("the metrics")
    pixels = outputs.detach().double().cpu().clamp(-1, 1).flatten(1).numpy()
    brightness, reference = _truth()
    places = (np.arange(len(pixels)) + 0.5) / len(pixels)
    quantiles = np.quantile(brightness, places)
    rows = np.concatenate([np.arange(len(pixels))[None], resample])
    away = np.abs(np.sort(pixels.mean(1)[rows], axis=1) - quantiles).mean(1)
    value = float(frechet_distance(*moments(pixels), *reference))
    return {
        "w1_brightness": Score(float(away[0]), away[1:].tolist()),
        "fd": Score(value, frechet_resampled(pixels, reference, resample).tolist()),
    }
