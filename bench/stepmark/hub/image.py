"""Track image, tasks of checkpoint folders: how near does a sampler come to where the network's own ODE leads?

There is no reference data for a network that somebody brings. What every network has is its probability-flow ODE: from
a given noise it leads to one sample, and a sampler with few evaluations ends beside it. The solution is computed here
by Heun's method with many steps, kept on disk, and every method starts from the same noise. Samples are compared in the
network's own space. A rung counts rows of the network: with guidance an evaluation takes two, and a method gets half as
many evaluations.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.hub import digests
from stepmark.hub.image_tasks import conditions
from stepmark.hub.source import current
from stepmark.places import cache_folder
from stepmark.task import Score, Task, harness_only
from stepmark.tracks.image import check as check
from stepmark.tracks.image.schedules import Schedule
from stepmark.tracks.image.solvers import Denoiser, ddim_step, heun_step

STEPS = 96  # of Heun's method, two evaluations each


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, ...] standard normal, "condition": spread over all conditions}, drawn on the CPU."""
    harness_only("the test inputs")
    made = current()
    kinds = conditions(made)
    noise = torch.randn(n, *made.shape, generator=generator)
    index = torch.arange(n)
    return {"noise": noise.to(device), "condition": (index % kinds if n >= kinds else index * kinds // n).to(device)}


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """None: everything costly here is a network."""
    return {}


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """The model inside the wrapper, whose rows are counted: with guidance two for each item."""
    assert isinstance(network.model, nn.Module)
    return [network.model]


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> int:
    """One evaluation for every item of the batch; returns how many rows of the model it takes."""
    Denoiser(networks["teacher"], batch["condition"]).output(batch["noise"], 1.0)
    return len(batch["noise"]) * task.price


def solution_times(schedule: Schedule, steps: int) -> list[float]:
    """From 1 to the first training timestep with equal steps in the square root of t, then 0."""
    last = (1 / schedule.steps) ** 0.5
    return [(1 + (last - 1) * i / (steps - 1)) ** 2 for i in range(steps)] + [0.0]


@torch.no_grad()
def solution(network: nn.Module, noise: Tensor, condition: Tensor, steps: int) -> Tensor:
    """Where the probability-flow ODE of a network takes the noise [B, ...], by Heun's method."""
    denoise, x = Denoiser(network, condition), noise
    times = solution_times(denoise.schedule, steps)
    for t, s in pairwise(times[:-1]):
        x = heun_step(denoise, x, t, s)
    return ddim_step(denoise.schedule, *denoise(x, times[-2]), 0.0)


def solutions(task: Task, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Solutions of the batch with `STEPS` steps and with half of them, kept on disk: they cost hundreds of evaluations."""
    from safetensors.torch import load_file, save_file

    noise, condition = batch["noise"], batch["condition"]
    made = current()
    sources = (digests.of_network(made, "teacher"), digests.of_inputs(made), str(STEPS), noise.device.type)
    sha = hashlib.sha256(" ".join(sources).encode())
    for part in (noise, condition):
        sha.update(part.cpu().contiguous().numpy().tobytes())
    path = cache_folder() / "solutions" / f"{sha.hexdigest()[:32]}.safetensors"
    if not path.exists():
        parts = list(zip(noise.split(task.batch), condition.split(task.batch), strict=True))
        found = {
            name: torch.cat([solution(network, *part, steps) for part in parts]).cpu().contiguous()
            for name, steps in (("fine", STEPS), ("coarse", STEPS // 2))
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file(found, temporary)
        temporary.replace(path)
    kept = load_file(path)
    return kept["fine"], kept["coarse"]


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all items and over each bootstrap resample.

    endpoint_error: root mean square distance, over the elements of an item, to the network's own solution from the same
    noise; mean over items. reference_error: the same distance between that solution and one with half as many steps: an
    endpoint_error that is not well above it says nothing.
    """
    harness_only("the metrics")
    fine, coarse = solutions(task, networks["teacher"], batch)

    def distance(a: Tensor, b: Tensor) -> Score:
        items = (a.double() - b.double()).flatten(1).square().mean(1).sqrt().numpy()
        return Score(float(items.mean()), items[resample].mean(1).tolist())

    return {"endpoint_error": distance(outputs.detach().cpu(), fine), "reference_error": distance(coarse, fine)}
