"""Track image, task of guidance: where does classifier-free guidance lead, and who gets there for less?

Guidance pushes every prediction away from the unconditional one, which costs a second evaluation a step. Distilling it
into one is measured here by what it has to keep: from the same noise, at the same scale, the sample that the guided
sampler would draw. The scale is strong, so that a network that ignores it ends somewhere else. `guidance` of the batch is
w of null + w (cond - null), one for each item.
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
from stepmark.tracks.image import inputs as noises
from stepmark.tracks.image import layers as layers
from stepmark.tracks.image import reference_call as reference_call
from stepmark.tracks.image import score as distances
from stepmark.tracks.image.metrics import ends
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser

TASKS = (
    Task(
        id="guided/digits_flow",
        version=1,
        summary="Follow classifier-free guidance of scale 3 to its end, 8x8 digits, rectified-flow teacher",
        dataset="digits",
        backbones={"teacher": "digits_flow_a"},
        judges={"classifier": "digits_classifier"},
        reference="teacher",
        unit="NFE",
        rungs=(1, 2, 4, 8, 16, 32, 64),
        metrics={"endpoint_error": "lower", "fd": "lower"},
        n=400,
        batch=200,
        seeds=2,
        smoke_n=10,
        smoke_rungs=(4,),
    ),
)
SCALE = 3.0  # Jensen and Sadat 2025: from about here on guided paths leave those of noised data
STEPS = 64  # of Heun's method, whose ends stand for the exact ones
_ENDS: dict[str, Tensor] = {}


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, 1, 8, 8] standard normal, "condition": every class in turn, "guidance": 3.0 for each}."""
    return noises(task, n, generator, device) | {"guidance": torch.full((n,), SCALE, device=device)}


@torch.no_grad()
def guided_endpoints(network: nn.Module, noise: Tensor, condition: Tensor, scale: float, steps: int = STEPS) -> Tensor:
    """Where guidance of one scale leads from the noise [B, ...]: Heun's method in equal steps, the last one Euler's."""
    return ends(Denoiser(network, condition, scale), noise, uniform_times(steps))


def _ends(task: Task, batch: Mapping[str, Tensor]) -> Tensor:
    """The ends of a batch's noise, kept for the few seeds of a task: they take a while."""
    from stepmark.backbones import load

    noise, condition = batch["noise"].detach().cpu(), batch["condition"].cpu()
    key = f"{task.id} {hashlib.sha256(noise.contiguous().numpy().tobytes()).hexdigest()}"
    if key not in _ENDS:
        _ENDS[key] = guided_endpoints(load(task.backbones["teacher"]), noise, condition, SCALE)
    return _ENDS[key]


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """endpoint_error: mean distance, over all pixels together, to where the guided sampler leads from the same noise.

    fd: as on the other tasks of digits. Guidance trades the spread of a class for its clarity, so that a sampler which
    follows it is not nearer to the data.
    """
    harness_only("the metrics")
    away = (outputs.detach().float().cpu() - _ends(task, batch)).flatten(1).norm(dim=1).double().numpy()
    found = {"endpoint_error": Score(float(away.mean()), away[resample].mean(1).tolist())}
    return found | distances(task, batch, outputs, networks, resample)
