"""Track image, task of captions: many prompts, one start noise, and where the sampler would have led from it.

A picture is asked for by a caption, shares of three shapes and of four colours, which the network sees as the same blend
of its embeddings: half a disc and half a square, mostly red. Captions come from a continuum, so that what was made
for one of them is never exactly right for the next, and all pictures start from the one noise of `start_noise`, as
text-to-image services with a fixed seed do. What is measured is the distance to where the network's own flow leads
from there under the caption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import Score, Task, harness_only
from stepmark.tracks.image import check as check
from stepmark.tracks.image import handles as handles
from stepmark.tracks.image import layers as layers
from stepmark.tracks.image import reference_call as reference_call
from stepmark.tracks.image.metrics import ends
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser

TASKS = (
    Task(
        id="captions/shapes16",
        version=1,
        summary="16x16 pictures for blended captions from one start noise, rectified-flow teacher",
        dataset="shapes16",
        backbones={"teacher": "shapes16_flow_blend"},
        reference="teacher",
        unit="NFE",
        rungs=(2, 4, 8, 16),
        metrics={"endpoint_error": "lower"},
        n=200,
        batch=100,
        seeds=3,
        smoke_n=8,
        smoke_rungs=(4,),
    ),
)
SHAPE = (3, 16, 16)
KINDS = (3, 4)  # shapes and colours, each with shares that sum to one
NOISE_SEED = 1024
STEPS = 32  # of Heun's method, whose ends stand for the exact ones
_ENDS: dict[str, Tensor] = {}


def start_noise() -> Tensor:
    """The noise [3, 16, 16] that every picture of the task starts from."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(NOISE_SEED))


def captions(n: int, generator: torch.Generator) -> Tensor:
    """n captions, float32 [n, 7]: shares of the shapes and of the colours, each uniform on its simplex."""
    parts = []
    for kinds in KINDS:
        share = -torch.rand(n, kinds, generator=generator, device=generator.device).clamp(min=1e-7).log()
        parts.append(share / share.sum(1, keepdim=True))
    return torch.cat(parts, 1)


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, 3, 16, 16], the start noise n times, "condition": captions [n, 7]}."""
    harness_only("the test inputs")
    return {
        "noise": start_noise().expand(n, *SHAPE).clone().to(device),
        "condition": captions(n, generator).to(device),
    }


def _ends(task: Task, batch: Mapping[str, Tensor]) -> Tensor:
    """The ends of a batch, kept for the few seeds of a task."""
    from stepmark.backbones import load

    noise, condition = batch["noise"].detach().cpu(), batch["condition"].cpu()
    key = f"{task.id} {hashlib.sha256(condition.contiguous().numpy().tobytes()).hexdigest()}"
    if key not in _ENDS:
        _ENDS[key] = ends(Denoiser(load(task.backbones["teacher"]), condition), noise, uniform_times(STEPS))
    return _ENDS[key]


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """endpoint_error: mean distance, over all pixels together, to where the flow leads under the caption."""
    harness_only("the metrics")
    away = (outputs.detach().float().cpu() - _ends(task, batch)).flatten(1).norm(dim=1).double().numpy()
    return {"endpoint_error": Score(float(away.mean()), away[resample].mean(1).tolist())}
