"""Track text to image, the task of layouts: pictures by caption in which every object lies where, and is what, a map says.

`run` receives {"noise": [B, 4, 8, 8], "condition": int64 [B, 32], "layout": int64 [B, 32, 32]} and returns latents like the
noise. The layout says of every pixel what is to be seen there: 0 the background, 1 + the index of a shape (`SHAPES`) an object
of that shape. Colours, textures and the background are the caption's alone. `layouts_of(session.train, rows)` makes those of
pictures of the train split, in `prepare`.

The eye draws again what it sees, and what it has drawn has a layout: `miou` is, picture by picture, the mean over classes of
the intersection of the two layouts over their union, of the classes that either of them has. A picture that is not legible
has 0, so that a blurred map in colours wins nothing. `caption` and `fd` are those of the other tasks: who paints the layout and
forgets the caption, or paints what nobody has seen, loses there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.datasets.scenes32 import scenes_of
from stepmark.task import Score, Task, harness_only, load_split
from stepmark.tracks.image.metrics import classifier_features, frechet_distance, frechet_resampled, moments
from stepmark.tracks.scenes.captions import SHAPES
from stepmark.tracks.scenes.drawing import Scenes, owners
from stepmark.tracks.scenes.metrics import caption_accuracy
from stepmark.tracks.scenes.parser import Reading, parse
from stepmark.tracks.text_to_image import LATENT, _reference, captions_of, decoded
from stepmark.tracks.text_to_image import check as check
from stepmark.tracks.text_to_image import handles as handles
from stepmark.tracks.text_to_image import layers as layers
from stepmark.tracks.text_to_image import reference_call as reference_call

# fmt: off
TASKS = (
    Task(
        id="layout/scenes_eps", version=1, dataset="scenes32",
        summary="32x32 scenes by caption and by a map of what lies where",
        backbones={"teacher": "scenes_eps", "vae": "scenes_vae"},
        judges={"vae": "scenes_vae", "judge": "scenes_judge"}, reference="teacher",
        unit="NFE", rungs=(2, 4, 8, 16, 32, 64), metrics={"miou": "higher", "caption": "higher", "fd": "lower"},
        n=300, batch=100, seeds=3, smoke_n=6, smoke_rungs=(4, 32),
    ),
)
# fmt: on
CLASSES = 1 + len(SHAPES)  # of layouts: the background, and a class a shape


def layouts(scenes: Scenes) -> Tensor:
    """What every pixel of scenes shows, int64 [n, 32, 32]: 0 the background, 1 + its index the shape of an object."""
    owner = owners(scenes)
    shape = np.take_along_axis(scenes.shape, owner.clip(min=0).reshape(len(owner), -1), 1).reshape(owner.shape)
    return torch.from_numpy(np.where(owner < 0, 0, 1 + shape))


def layouts_of(data: Mapping[str, Any], rows: Any) -> Tensor:
    """Layouts of the pictures of a split with those numbers, a slice or int64 [n]."""
    return layouts(scenes_of({name: data[name][rows] for name in ("objects", "geometry", "background")}))


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, 4, 8, 8] standard normal, "condition": int64 [n, 32], "layout": int64 [n, 32, 32]} of held-out scenes and
    their captions, drawn on the CPU."""
    harness_only("the test inputs")
    data = load_split(task.dataset, "test")
    noise = torch.randn(n, *LATENT, generator=generator)
    rows = torch.randperm(len(data["tokens"]), generator=generator)[:n]
    found = {"noise": noise, "condition": data["tokens"][rows], "layout": layouts_of(data, rows)}
    return {name: value.to(device) for name, value in found.items()}


def agreement(found: Tensor, wanted: Tensor) -> NDArray[np.float64]:
    """Mean intersection over union of layouts int64 [n, 32, 32], over the classes that either of the two has: float64 [n]."""
    kinds = torch.arange(CLASSES)[:, None, None, None]
    one, other = found == kinds, wanted == kinds  # [classes, n, 32, 32]
    union, both = (part.sum((2, 3)).double() for part in (one | other, one & other))
    return ((both / union.clamp(min=1)).sum(0) / (union > 0).sum(0)).numpy()


def faithful(reading: Reading, wanted: Tensor) -> NDArray[np.float64]:
    """How well pictures that were read agree with their layouts [n, 32, 32], float64 [n]; 0 if one is not legible."""
    return agreement(layouts(reading.scenes), wanted) * reading.legible


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """miou, caption and fd, as at the top of this file."""
    harness_only("the metrics")
    pictures = decoded(networks["vae"], outputs.detach().cpu())
    reading = parse(pictures)
    each = {
        "miou": faithful(reading, batch["layout"].cpu()),
        "caption": caption_accuracy(captions_of(batch), reading)["whole"],
    }
    scores = {name: Score(float(value.mean()), value[resample].mean(1).tolist()) for name, value in each.items()}
    features = classifier_features(networks["judge"], pictures)
    reference = _reference(task.dataset, "test", networks["judge"])
    distance = float(frechet_distance(*moments(features), *reference))
    scores["fd"] = Score(distance, frechet_resampled(features, reference, resample).tolist())
    return scores
