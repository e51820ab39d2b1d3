"""Track image, task of search: more evaluations, better images - but the model is already as good as steps make it.

The model is told which digit is wished for, heeds it in part (`digits_flow_faint`) and draws another one a fifth of the
time. What it draws is settled by its noise, so that more steps do not help. A method may draw several times, or keep to
the paths that look right, and judge with a verifier that it trains itself in `prepare` on `session.train`. A rung counts
the rows of all its networks, the verifier's too. Two judges that no method sees look at the images: accuracy reads the
digit of each, fd looks at all of them together, and rises where a search finds what pleases its verifier and nothing else.

What the ground gives: Euler has accuracy .88, .82, .79 and fd 1.8, 1.5, 1.5, about, at 4, 8, 16 steps, and is a little worse
in both later on. Fewer steps alone look sharper: both must be held against those of few steps too, such as 8, and against a
choice at random (`best_of_random`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import Score, Task
from stepmark.tracks.image import check as check
from stepmark.tracks.image import handles as handles
from stepmark.tracks.image import inputs as inputs
from stepmark.tracks.image import layers as layers
from stepmark.tracks.image import reference_call as reference_call
from stepmark.tracks.image import score as distances

TASKS = (
    Task(
        id="search/digits",
        version=2,
        summary="8x8 digits by class, from a rectified-flow model that heeds its class in part",
        dataset="digits",
        backbones={"teacher": "digits_flow_faint"},
        judges={"classifier": "digits_classifier"},
        reference="teacher",
        unit="NFE",
        rungs=(4, 8, 16, 32, 64, 128),
        metrics={"accuracy": "higher", "fd": "lower"},
        n=400,
        batch=100,
        seeds=3,
        smoke_n=10,
        smoke_rungs=(4, 16),
    ),
)


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """accuracy: share of samples in which the judge reads the class wished for. fd: as on the other tasks of digits."""
    scores = distances(task, batch, outputs, networks, resample)
    classifier = networks["classifier"]
    device = next(classifier.parameters()).device
    with torch.no_grad():
        read = torch.cat([classifier(part.to(device)).argmax(1) for part in outputs.float().clamp(-1, 1).split(500)])
    right = (read.cpu() == batch["condition"].cpu()).numpy().astype(np.float64)
    return {"accuracy": Score(float(right.mean()), right[resample].mean(1).tolist())} | scores
