"""Track text to image: how much of their captions do pictures show with a budget of network evaluations?

A rung is a number of function evaluations (NFE) per picture; classifier-free guidance evaluates two rows and counts twice,
and so does every row of another network that `run` asks (the decoder, a reward, a small model). `run` receives
{"noise": [B, 4, 8, 8], "condition": int64 [B, 32]} (ids of the captions) and returns latents like the noise, which the harness
decodes; "negative" int64 [B, 32] is in the batch of tasks with negative prompts.

`session.networks["teacher"]` is called as network(x [B, 4, 8, 8], time [B], condition) -> [B, 4, 8, 8], as image networks are:
`Denoiser`, schedules and solvers of `stepmark.tracks.image` do for it, and `network.null_condition` is the empty caption.
Captions may be given by their states, float [B, 32, 64], which `network.words` makes of ids: encoded once, asked often. "vae"
is the autoencoder (`encode`; a call decodes), "reward" a reader of pictures (`rewards`). `session.train` is the train
split of the scenes: "x0" [N, 3, 32, 32], "tokens", "text", "objects" and "background"; `latent.Latents` encodes it.

Pictures are judged by two that no method sees. The eye draws again what it sees, and says of how many pictures all
that the caption says is true (`caption`). A judge's features give the Frechet distance to held-out pictures (`fd`). A picture
that is blurred shows nothing to the eye; one that everybody gets alike has a large fd.

    latent        the training pictures as latents
    sampling      a network asked by captions that are encoded once, the standard solvers, steps with fresh noise
    inside        what a network's parts give, what stands in its attention, its first half alone
    rewards       log-probability of a caption by a reader, for methods that follow a reward
    search        candidates of a batch, judged by that reward
    policies      paths of normal steps, and their likelihoods
    consistency   consistency distillation and its sampler
    distribution  students that are pulled by the difference of two scores
    students      students that several methods start from
    adapters      low-rank adapters in the format of PEFT
    large, layout tasks of their own: pictures larger than the teacher's, pictures laid out by a map

The captions, how scenes are drawn, the eye and what is counted with it are in `stepmark.tracks.scenes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import Score, Task, harness_only, load_split
from stepmark.tracks.image import check as as_images
from stepmark.tracks.image.metrics import classifier_features, frechet_distance, frechet_resampled, moments
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.scenes.captions import (
    Caption,
    negative_prompt,
    positive,
    read,
    texts,
    tokens,
    unwanted,
    write,
)
from stepmark.tracks.scenes.drawing import PASTEL, USUAL
from stepmark.tracks.scenes.metrics import caption_accuracy, diversity
from stepmark.tracks.scenes.parser import Reading, parse

# fmt: off
TASKS = (
    Task(
        id="text_to_image/scenes_eps", version=1, dataset="scenes32",
        summary="32x32 scenes of one to three objects by caption, latent diffusion UNet (noise prediction)",
        backbones={"teacher": "scenes_eps", "vae": "scenes_vae", "reward": "scenes_reward"},
        judges={"vae": "scenes_vae", "judge": "scenes_judge"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 16, 32, 64),
        metrics={"fd": "lower", "caption": "higher", "parts": "higher", "w1_brightness": "lower"},
        n=300, batch=100, seeds=3, smoke_n=6, smoke_rungs=(4, 32),
    ),
    Task(
        id="text_to_image/scenes_flow", version=1, dataset="scenes32",
        summary="32x32 scenes of one to three objects by caption, latent rectified-flow transformer",
        backbones={"teacher": "scenes_flow", "vae": "scenes_vae", "reward": "scenes_reward"},
        judges={"vae": "scenes_vae", "judge": "scenes_judge"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 16, 32, 64), metrics={"fd": "lower", "caption": "higher", "parts": "higher"},
        n=300, batch=100, seeds=3, smoke_n=6, smoke_rungs=(4, 32),
    ),
    Task(
        id="text_to_image/scenes_pastel", version=1, dataset="pastel32",
        summary="The same by a copy of the UNet that was tuned to another style",
        backbones={"teacher": "scenes_pastel", "vae": "scenes_vae", "base": "scenes_eps"},
        judges={"vae": "scenes_vae", "judge": "scenes_judge"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 16, 32, 64), metrics={"fd": "lower", "caption": "higher", "parts": "higher"},
        n=300, batch=100, seeds=3, smoke_n=6, smoke_rungs=(4, 32),
    ),
    Task(
        id="free/scenes_eps", version=1, dataset="scenes32",
        summary="Captions that leave most open: do twelve pictures of each differ?",
        backbones={"teacher": "scenes_eps", "vae": "scenes_vae", "reward": "scenes_reward"},
        judges={"vae": "scenes_vae", "judge": "scenes_judge"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 16, 32, 64),
        metrics={"diversity": "higher", "caption": "higher", "fd": "lower"},
        n=300, batch=100, seeds=3, smoke_n=6, smoke_rungs=(4, 32),
    ),
    Task(
        id="negative/scenes_eps", version=1, dataset="scenes32",
        summary="Captions with a negative prompt: what must not be there is not there",
        backbones={"teacher": "scenes_eps", "vae": "scenes_vae", "reward": "scenes_reward"},
        judges={"vae": "scenes_vae", "judge": "scenes_judge"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 16, 32, 64),
        metrics={"absent": "higher", "caption": "higher", "fd": "lower"},
        n=300, batch=100, seeds=3, smoke_n=6, smoke_rungs=(4, 32),
    ),
)
# fmt: on
LATENT = (4, 8, 8)
GUIDANCE = 3.0  # w of null + w (conditional - null) at which the teachers are best: what a guided baseline takes
EACH = 12  # pictures of one caption where captions leave most open
SPLITS = {"free": "free", "negative": "negative"}  # by kind of task, where the captions are not those of the test split


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, 4, 8, 8] standard normal, "condition": int64 [n, 32]} of held-out captions, drawn on the CPU; captions of
    `free` come twelve times each, one after the other, and with those of `negative` goes "negative", the same shape."""
    harness_only("the test inputs")
    kind = task.id.partition("/")[0]
    data = load_split(task.dataset, SPLITS.get(kind, "test"))
    noise = torch.randn(n, *LATENT, generator=generator)
    if kind == "free":
        first = (data["group"][:, None] == torch.arange(int(data["group"].max()) + 1)).int().argmax(0)
        rows = first[torch.randperm(len(first), generator=generator)].repeat_interleave(EACH)[:n]
    else:
        rows = torch.randperm(len(data["tokens"]), generator=generator)[:n]
    found = {"noise": noise, "condition": data["tokens"][rows]}
    if kind == "negative":
        captions = [read(data["text"][row]) for row in rows.tolist()]
        found["condition"] = tokens([write(positive(caption)) for caption in captions])
        found["negative"] = tokens([negative_prompt(caption) for caption in captions])
    return {name: value.to(device) for name, value in found.items()}


def check(task: Task, batch: Mapping[str, Tensor], outputs: Any) -> None:
    """Latents must be one finite floating tensor shaped like the noise. Raises BadOutput."""
    as_images(task, batch, outputs)


@torch.no_grad()
def decoded(vae: nn.Module, latents: Tensor) -> Tensor:
    """Pictures [n, 3, 32, 32] in [-1, 1] of latents [n, 4, 8, 8], on the CPU."""
    device = next(vae.parameters()).device
    return torch.cat([vae.decode(part.to(device)).cpu() for part in latents.float().split(100)]).clamp(-1, 1)


def captions_of(batch: Mapping[str, Tensor]) -> list[Caption]:
    """What the pictures of a batch are to show, and not to show."""
    captions = [read(text) for text in texts(batch["condition"].cpu())]
    if "negative" not in batch:
        return captions
    negative = texts(batch["negative"].cpu())
    return [replace(each, absent=unwanted(text)) for each, text in zip(captions, negative, strict=True)]


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """caption: share of pictures that are legible and show all that the caption says and nothing that it rules out. parts: the
    mean share of what it says that is right, picture by picture. absent: share of legible pictures in which nothing fits the
    negative prompt. fd: Frechet distance between the judge's features of the pictures and of the held-out ones of the same
    split. diversity: what varies among pictures of a caption that the eye is sure of, of all that could (`metrics`).
    w1_brightness: 1-Wasserstein distance between the mean pixels of the pictures and of the held-out ones.
    """
    harness_only("the metrics")
    kind, look = task.id.partition("/")[0], PASTEL if task.dataset == "pastel32" else USUAL
    pictures = decoded(networks["vae"], outputs.detach().cpu())
    reading = parse(pictures, look)
    right = caption_accuracy(captions_of(batch), reading)
    found = {"caption": right["whole"]}
    said = np.stack([value for name, value in right.items() if name != "whole"])
    found["parts"] = np.nanmean(np.where(np.isnan(said).all(0), 0.0, said), 0)
    found["absent"] = np.nan_to_num(right["absent"])
    scores = {
        name: Score(float(value.mean()), value[resample].mean(1).tolist())
        for name, value in found.items()
        if name in task.metrics
    }
    features = classifier_features(networks["judge"], pictures)
    reference = _reference(task.dataset, SPLITS.get(kind, "test"), networks["judge"])
    distance = float(frechet_distance(*moments(features), *reference))
    scores["fd"] = Score(distance, frechet_resampled(features, reference, resample).tolist())
    if "w1_brightness" in task.metrics:
        light = pictures.double().flatten(1).mean(1).numpy()
        true = load_split(task.dataset, SPLITS.get(kind, "test"))["x0"].double().flatten(1).mean(1).numpy()
        quantiles = np.quantile(true, (np.arange(len(light)) + 0.5) / len(light))
        rows = np.concatenate([np.arange(len(light))[None], resample])
        away = np.abs(np.sort(light[rows], axis=1) - quantiles).mean(1)
        scores["w1_brightness"] = Score(float(away[0]), away[1:].tolist())
    if "diversity" in task.metrics:
        group = np.unique(batch["condition"].cpu().numpy(), axis=0, return_inverse=True)[1].ravel()
        spread = [_varied(reading[rows], group[rows]) for rows in resample]
        scores["diversity"] = Score(_varied(reading, group), spread)
    return scores


def _varied(reading: Reading, group: NDArray[np.int64]) -> float:
    return float(np.mean(list(diversity(reading, group).values())))


_REFERENCES: dict[tuple[str, str, int], tuple[NDArray[np.float64], NDArray[np.float64]]] = {}


def _reference(dataset: str, split: str, judge: nn.Module) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance of the judge's features of the pictures of a split, once per judge in a process."""
    key = (dataset, split, id(judge))
    if key not in _REFERENCES:
        _REFERENCES[key] = moments(classifier_features(judge, load_split(dataset, split)["x0"]))
    return _REFERENCES[key]


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """No simulators here."""
    return {}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> int:
    """One evaluation of the teacher for every picture of the batch, captions encoded; returns their number."""
    Denoiser(networks["teacher"], batch["condition"]).output(batch["noise"], 1.0)
    return len(batch["noise"])


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """Rows of the forward are counted, not layers."""
    return []
