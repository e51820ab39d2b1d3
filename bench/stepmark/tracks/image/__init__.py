"""Track image: how good are the images (or points) a generator draws from noise with a budget of network evaluations?

A rung is a number of function evaluations (NFE) per item; classifier-free guidance evaluates two rows per item and
counts twice. `run` receives {"noise": [B, ...], "condition": int64 [B] or [B, slots]} and returns samples shaped like
the noise: one finite floating tensor. All methods get the same noise for a seed, so that their figures are paired.
An item is a point [2] (`mixtures`), a digit [1, 8, 8] in [-1, 1] with its class, or a picture [3, 16, 16] in [-1, 1] with
its shape and colour (`shapes16`, two slots). `session.train` holds the same of the training data: "x0" and "condition".

Time runs from t = 1 (pure noise) to t = 0 (data), x_t = alpha(t) x0 + sigma(t) eps. "flow" networks predict the velocity
eps - x0 of straight paths, "epsilon" networks the noise eps of a variance-preserving path; `network.prediction` says which.
`session.networks["teacher"]` is called as network(x [B, ...], time [B], condition) -> [B, ...], where the time is t of a
flow and a timestep 0..999 of an epsilon network; `Denoiser` in `solvers` does that for either.
`network.null_condition(condition)` is the condition of the unguided prediction.

Modules beside this one, in the order in which they build on each other:

    schedules   `Schedule`: alpha, sigma and log-SNR of a network (`schedule_of`); `add_noise`; conversions between
                predictions; grids of times for samplers (`uniform_times`, `quadratic_times`, `karras_times`, ...)
    solvers     `Denoiser`: one evaluation of any network, guided or not, as predictions of x0 and eps; single steps of
                the standard solvers (`ddim_step`, `euler_step`, `heun_step`, `dpm_solver_pp_step`, `bridge_step`);
                `best_grids`: the grid that suits a solver
    training    `fit`: the loop; `teacher_pairs`; `pseudo_huber`; `PointField` and `fit_coupled`: flow matching on points
    fusing      `fused`: arithmetic that a Triton kernel does on a GPU; `guided_rows`
    patches     `Bands`: a network on several processes, each with a band of every image
    metrics     Frechet and sliced Wasserstein distance, exact endpoints

Every other module with TASKS of its own holds tasks whose inputs or metrics are its own, and what their methods share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import BadOutput, Score, Task, harness_only
from stepmark.tracks.image.metrics import (
    classifier_features,
    frechet_distance,
    frechet_resampled,
    moments,
    reference_moments,
    score_points,
)
from stepmark.tracks.image.solvers import Denoiser

# fmt: off
TASKS = (
    Task(
        id="sampling/mixtures_flow", version=1, dataset="mixtures",
        summary="Sample two 2-D Gaussian mixtures with the exact velocity field",
        backbones={"teacher": "mixtures_flow"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 16, 32, 64), metrics={"sliced_w2": "lower", "endpoint_error": "lower"},
        n=2000, batch=2000, seeds=3, smoke_n=64, smoke_rungs=(4,),
    ),
    Task(
        id="sampling/mixtures_eps", version=1, dataset="mixtures",
        summary="Sample two 2-D Gaussian mixtures with the exact noise prediction, variance-preserving path",
        backbones={"teacher": "mixtures_eps"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 16, 32, 64), metrics={"sliced_w2": "lower", "endpoint_error": "lower"},
        n=2000, batch=2000, seeds=3, smoke_n=64, smoke_rungs=(4,),
    ),
    Task(
        id="class_to_image/digits_flow", version=1, dataset="digits",
        summary="8x8 digits by class, rectified-flow teacher",
        backbones={"teacher": "digits_flow_a"}, judges={"classifier": "digits_classifier"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 9, 16, 50), metrics={"fd": "lower"},
        n=2000, batch=100, seeds=3, smoke_n=16, smoke_rungs=(4,),
    ),
    Task(
        id="class_to_image/digits_flow_b", version=1, dataset="digits",
        summary="8x8 digits by class, rectified-flow teacher of a second training seed",
        backbones={"teacher": "digits_flow_b"}, judges={"classifier": "digits_classifier"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 9, 16), metrics={"fd": "lower"},
        n=2000, batch=100, seeds=2, smoke_n=16, smoke_rungs=(4,),
    ),
    Task(
        id="class_to_image/digits_eps", version=1, dataset="digits",
        summary="8x8 digits by class, DDPM teacher (noise prediction)",
        backbones={"teacher": "digits_eps_a"}, judges={"classifier": "digits_classifier"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 6, 8, 10, 16), metrics={"fd": "lower"},
        n=2000, batch=100, seeds=3, smoke_n=16, smoke_rungs=(4,),
    ),
    Task(
        id="class_to_image/digits_eps_b", version=1, dataset="digits",
        summary="8x8 digits by class, DDPM teacher (noise prediction) of a second training seed",
        backbones={"teacher": "digits_eps_b"}, judges={"classifier": "digits_classifier"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 6, 8, 10, 16), metrics={"fd": "lower"},
        n=2000, batch=100, seeds=2, smoke_n=16, smoke_rungs=(4,),
    ),
    Task(
        id="class_to_image/digits_dit", version=1, dataset="digits",
        summary="8x8 digits by class, rectified-flow diffusion transformer",
        backbones={"teacher": "digits_dit"}, judges={"classifier": "digits_classifier"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 16, 50), metrics={"fd": "lower"},
        n=2000, batch=100, seeds=2, smoke_n=16, smoke_rungs=(4,),
    ),
    Task(
        id="attributes_to_image/shapes16", version=1, dataset="shapes16",
        summary="16x16 images of a shape of given form and colour, rectified-flow teacher, exact verifier",
        backbones={"teacher": "shapes16_flow"}, judges={"classifier": "shapes16_classifier"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 16), metrics={"fd": "lower", "alignment": "higher"},
        n=1000, batch=100, seeds=2, smoke_n=16, smoke_rungs=(4,),
    ),
)
# fmt: on


def _item_shape(task: Task) -> tuple[int, ...]:
    return {"mixtures": (2,), "digits": (1, 8, 8), "shapes16": (3, 16, 16)}[task.dataset]


def _conditions(task: Task, n: int) -> Tensor:
    """Balanced conditions of n items: every class (mixture, kind) in turn."""
    index = torch.arange(n)
    if task.dataset == "shapes16":
        return torch.stack([index % 3, 3 + index // 3 % 4], 1)
    return index % {"mixtures": 2, "digits": 10}[task.dataset]


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, ...] standard normal, "condition": balanced}, drawn on the CPU so that devices agree."""
    harness_only("the test inputs")
    noise = torch.randn(n, *_item_shape(task), generator=generator)
    return {"noise": noise.to(device), "condition": _conditions(task, n).to(device)}


def check(task: Task, batch: Mapping[str, Tensor], outputs: Any) -> None:
    """Samples must be one finite floating tensor shaped like the noise. Raises BadOutput."""
    expected = tuple(batch["noise"].shape)
    if not isinstance(outputs, Tensor):
        raise BadOutput(f"run returned {type(outputs).__name__}; return one tensor of shape {expected}")
    if tuple(outputs.shape) != expected:
        raise BadOutput(f"run returned shape {tuple(outputs.shape)}; the noise has {expected}")
    if not outputs.is_floating_point():
        raise BadOutput(f"run returned {outputs.dtype}; return floating-point samples")
    if not bool(torch.isfinite(outputs).all()):
        raise BadOutput(f"{int((~torch.isfinite(outputs)).sum())} values of the samples are not finite")


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics of the task over all items and over each bootstrap resample.

    fd: Frechet distance between classifier features of the samples and of the dataset's reference split, clamped to
    the range of the data. alignment: share of images whose shape and colour the exact verifier reads as asked.
    sliced_w2: to exact samples, mean of the two mixtures. endpoint_error: mean distance to the exact solution of the
    probability-flow ODE from the same noise.
    """
    harness_only("the metrics")
    outputs = outputs.detach().float().cpu()
    if task.dataset == "mixtures":
        return score_points(task, batch, outputs, resample)
    classifier = networks["classifier"]
    found = classifier_features(classifier, outputs.clamp(-1, 1))
    reference = reference_moments(task.dataset, classifier)
    value = float(frechet_distance(*moments(found), *reference))
    scores = {"fd": Score(value, frechet_resampled(found, reference, resample).tolist())}
    if "alignment" in task.metrics:
        from stepmark.datasets import shapes16

        read = shapes16.read_attributes(outputs)
        right = (read == batch["condition"].cpu()).all(1).numpy().astype(np.float64)
        scores["alignment"] = Score(float(right.mean()), right[resample].mean(1).tolist())
    return scores


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Image tasks have no simulators."""
    return {}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> int:
    """One evaluation of the teacher for every item of the batch; returns their number."""
    teacher = networks["teacher"]
    Denoiser(teacher, batch["condition"]).output(batch["noise"], 1.0)
    return len(batch["noise"])


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """Rows of the forward are counted, not layers."""
    return []
