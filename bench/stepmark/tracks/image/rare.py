"""Track image, task of minorities: how many rare samples does a sampler draw from a model that knows all of the data?

Two in a hundred points are rare, a quarter of them of each of four kinds that lie in four directions from the common
points beside them (`datasets/rare.py`). A sampler that follows the model draws as few; one that is after minorities draws
more of every kind, and must not pay for them with points where there are no data. Nothing says which are rare:
`condition` is 0 throughout.

What the ground gives, measured with 64 evaluations: the ancestral chain draws about .02 rare points, half a percent of a
kind or so. Whoever pushes points away from the origin draws .25, none of them of the kind that lies inside, and one in six
where there are no data; whoever pushes them inwards likewise the other way. Noise of 1.3 times the deviation draws .05. The
last two figures hang together: `rarest_share` must be read beside `precision`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import Score, Task, harness_only, load_split
from stepmark.tracks.image import check as check
from stepmark.tracks.image import handles as handles
from stepmark.tracks.image import layers as layers
from stepmark.tracks.image import reference_call as reference_call

TASKS = (
    Task(
        id="minority/rare_eps",
        version=2,
        summary="Draw the rare points of a 2-D mixture, with its exact noise prediction",
        dataset="rare",
        backbones={"teacher": "rare_eps"},
        reference="teacher",
        unit="NFE",
        rungs=(16, 32, 64, 128, 256),
        metrics={
            "minority_share": "higher",
            "rarest_share": "higher",
            "precision": "higher",
            "neighbour_distance": "higher",
        },
        n=2000,
        batch=2000,
        seeds=3,
        smoke_n=64,
        smoke_rungs=(16,),
    ),
)
WITHIN = 3.0  # standard deviations of a component around its centre that count as data: 98.9 % of it
NEIGHBOURS = 5


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, 2] standard normal, "condition": zeros}, drawn on the CPU so that devices agree."""
    harness_only("the test inputs")
    noise = torch.randn(n, 2, generator=generator)
    return {"noise": noise.to(device), "condition": torch.zeros(n, dtype=torch.long, device=device)}


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """minority_share: share of points that lie within a rare component. precision: share within any. rarest_share: of the
    four rare components, the smallest share that one has.

    neighbour_distance: mean distance to the five nearest points of the test split.
    """
    harness_only("the metrics")
    from stepmark.datasets import rare

    points = outputs.detach().double().cpu()
    inside = rare.distances(points).min(1).values < WITHIN
    component = torch.where(inside, rare.component_of(points), -1)
    kinds = [(component == rare.COMMON + k).double() for k in range(rare.RARE)]
    near = torch.cdist(points.float(), load_split(task.dataset, "test")["x0"]).topk(NEIGHBOURS, largest=False).values
    figures = {"minority_share": sum(kinds), "precision": inside.double(), "neighbour_distance": near.mean(1)}
    columns = {name: value.double().numpy() for name, value in figures.items()}
    scores = {name: Score(float(v.mean()), v[resample].mean(1).tolist()) for name, v in columns.items()}
    each = torch.stack(kinds, 1).numpy()  # [n, kinds]
    rarest = Score(float(each.mean(0).min()), each[resample].mean(1).min(1).tolist())
    return scores | {"rarest_share": rarest}
