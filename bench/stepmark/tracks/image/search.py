"""Track image, tasks of search: the batch wishes for something that the model was never told.

The model draws from all of the data; `condition` is the wish and changes nothing in the network. Whoever samples once
gets what is wished for by chance only, with however many steps; a method may instead draw several times, or keep to the
paths that look right, and judge with a verifier that it trains itself in `prepare` on `session.train`. A rung counts
the rows of all its networks, the verifier's too. The judge of the metric is another network, which no method sees.
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
        version=1,
        summary="8x8 digits wished for by class, from a rectified-flow model that knows no classes",
        dataset="digits",
        backbones={"teacher": "digits_flow_unnamed"},
        judges={"classifier": "digits_classifier"},
        reference="teacher",
        unit="NFE",
        rungs=(4, 8, 16, 32, 64),
        metrics={"accuracy": "higher", "fd": "lower"},
        n=500,
        batch=100,
        seeds=2,
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
