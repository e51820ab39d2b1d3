"""Track text to image, tasks of size: pictures two and four times as wide as those that the teacher has seen.

A rung counts rows of the networks whatever their size; NFE-equivalents and the peak of memory say what large ones cost. `run`
receives noise [B, 4, 8 k, 8 k] for pictures k times as wide, k = 2 or 4, and returns latents like it.

The scenes are of one or two plain objects, and the renderer can draw them at any size. A large picture shows the whole scene
once, and has as sharp edges as a small one. `caption` is read by the eye in the picture reduced to 32x32 by means of k x k
pixels: a scene that is there twice is wrong. `crop_fd` is the Frechet distance of the judge's features between crops of 32x32
pixels and crops of scenes drawn at this size: a picture that is only stretched has soft edges there, one that is put together
from pictures of the usual size has whole small scenes. Copies and stretching each win one of the two, so that a claim needs both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from stepmark.datasets.scenes32 import scenes_of
from stepmark.task import Score, Task, harness_only, load_split
from stepmark.tracks.image.metrics import classifier_features, frechet_distance, frechet_resampled, moments
from stepmark.tracks.scenes.drawing import PLAIN, SIZE, Scenes, render
from stepmark.tracks.scenes.metrics import caption_accuracy
from stepmark.tracks.scenes.parser import parse
from stepmark.tracks.text_to_image import LATENT, captions_of, decoded
from stepmark.tracks.text_to_image import check as check
from stepmark.tracks.text_to_image import handles as handles
from stepmark.tracks.text_to_image import layers as layers
from stepmark.tracks.text_to_image import reference_call as reference_call

# fmt: off
TASKS = (
    Task(
        id="large/scenes_x2", version=1, dataset="scenes32",
        summary="Scenes of 64x64 pixels from a teacher of 32x32",
        backbones={"teacher": "scenes_eps", "vae": "scenes_vae"},
        judges={"vae": "scenes_vae", "judge": "scenes_judge"}, reference="teacher",
        unit="NFE", rungs=(32, 64, 128, 256, 512), metrics={"crop_fd": "lower", "caption": "higher"},
        n=60, batch=30, seeds=3, smoke_n=2, smoke_rungs=(64,),
    ),
    Task(
        id="large/scenes_x4", version=1, dataset="scenes32",
        summary="Scenes of 128x128 pixels from a teacher of 32x32",
        backbones={"teacher": "scenes_eps", "vae": "scenes_vae"},
        judges={"vae": "scenes_vae", "judge": "scenes_judge"}, reference="teacher",
        unit="NFE", rungs=(128, 256, 512, 1024, 2048), metrics={"crop_fd": "lower", "caption": "higher"},
        n=30, batch=15, seeds=3, smoke_n=2, smoke_rungs=(256,),
    ),
)
# fmt: on


def _times(task: Task) -> int:
    return int(task.id[-1])


@lru_cache(maxsize=1)
def _plain() -> tuple[Tensor, Scenes]:
    """Ids of the captions and scenes of the held-out pictures with plain objects only, of one and two."""
    parts, ids = [], []
    for split in ("one", "two"):
        data = load_split("scenes32", split)
        scenes = scenes_of(data)
        rows = np.flatnonzero(((scenes.texture == PLAIN) | ~scenes.there).all(1))[:100]
        parts.append(scenes[rows])
        ids.append(data["tokens"][rows])
    both = {name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    return torch.cat(ids), Scenes(**both)


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, 4, 8 k, 8 k] standard normal, "condition": int64 [n, 32] of held-out captions}, drawn on the CPU."""
    harness_only("the test inputs")
    k = _times(task)
    noise = torch.randn(n, LATENT[0], k * LATENT[1], k * LATENT[2], generator=generator)
    ids = _plain()[0]
    rows = torch.randperm(len(ids), generator=generator)[:n]
    return {"noise": noise.to(device), "condition": ids[rows].to(device)}


def enlarged(scenes: Scenes, k: int) -> Tensor:
    """Scenes drawn k times as wide, float32 [n, 3, 32 k, 32 k] in [-1, 1]; textures keep their period in pixels."""
    rows = []
    for row in range(k):
        tiles = []
        for column in range(k):
            at = scenes.at * np.float32(k) - np.array([row, column], np.float32) * SIZE
            tiles.append(render(replace(scenes, at=at, radius=scenes.radius * np.float32(k))))
        rows.append(torch.cat(tiles, -1))
    return torch.cat(rows, -2)


def crops(pictures: Tensor) -> Tensor:
    """The crops of 32x32 pixels [k k n, 3, 32, 32] that pictures [n, 3, 32 k, 32 k] are laid out in, place by place."""
    starts = range(0, pictures.shape[-1], SIZE)
    return torch.cat([pictures[..., r : r + SIZE, c : c + SIZE] for r in starts for c in starts])


@lru_cache(maxsize=2)
def _reference_crops(k: int) -> Tensor:
    return crops(enlarged(_plain()[1], k))


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """crop_fd and caption, as at the top of this file; a resample of pictures takes all crops of each."""
    harness_only("the metrics")
    k = _times(task)
    pictures = decoded(networks["vae"], outputs.detach().cpu())
    right = caption_accuracy(captions_of(batch), parse(avg_pool2d(pictures, k)))["whole"]
    features = classifier_features(networks["judge"], crops(pictures))
    reference = moments(classifier_features(networks["judge"], _reference_crops(k)))
    each = (resample[:, None] + len(pictures) * np.arange(k * k)[:, None]).reshape(len(resample), -1)
    return {
        "crop_fd": Score(
            float(frechet_distance(*moments(features), *reference)),
            frechet_resampled(features, reference, each).tolist(),
        ),
        "caption": Score(float(right.mean()), right[resample].mean(1).tolist()),
    }
