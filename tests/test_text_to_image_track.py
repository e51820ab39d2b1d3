"""Track text to image: what true pictures, blur, one picture for all and pictures of other captions get."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from stepmark.backbones.scenes_judges import KINDS, Reader
from stepmark.task import Task, load_split
from stepmark.tracks import text_to_image as track
from stepmark.tracks.scenes.captions import COLOURS, SHAPES, tokens, write
from stepmark.tracks.scenes.drawing import PASTEL
from stepmark.tracks.text_to_image.rewards import log_probability

torch.set_num_threads(1)

TASKS = {task.id: task for task in track.TASKS}
N = 12


class Shown(nn.Module):
    """A decoder that shows pictures that were made before."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.pictures, self.at = pictures, 0

    def decode(self, z: Tensor) -> Tensor:
        self.at += len(z)
        return self.pictures[self.at - len(z) : self.at]


def drawn(task: Task) -> dict[str, Tensor]:
    return track.inputs(task, N, torch.Generator().manual_seed(0), torch.device("cpu"))


def scored(task: Task, batch: Mapping[str, Tensor], pictures: Tensor) -> dict[str, float]:
    torch.manual_seed(0)
    networks = {"vae": Shown(pictures), "judge": Reader().eval()}
    found = track.score(task, batch, batch["noise"], networks, np.tile(np.arange(N), (2, 1)))
    assert set(found) == set(task.metrics)
    assert all(score.resamples == pytest.approx([score.value] * 2) for score in found.values())
    return {name: score.value for name, score in found.items()}


def truth(task: Task, batch: Mapping[str, Tensor]) -> Tensor:
    """Held-out pictures of the captions of a batch, a different one for each of those of one caption."""
    kind = task.id.partition("/")[0]
    data = load_split(task.dataset, track.SPLITS.get(kind, "test"))
    if kind == "negative":
        whole = {tuple(row): i for i, row in enumerate(data["tokens"].tolist())}
        captions = track.captions_of(batch)
        rows = [whole[tuple(tokens([write(caption)])[0].tolist())] for caption in captions]
    else:
        places: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(data["tokens"].tolist()):
            places.setdefault(tuple(row), []).append(i)
        rows = [places[tuple(row)].pop() for row in batch["condition"].tolist()]
    return data["x0"][rows]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_true_pictures_are_best_and_dumb_ones_lose(task: Task) -> None:
    batch = drawn(task)
    true = truth(task, batch)
    blurred = torch.from_numpy(gaussian_filter(true.numpy(), (0, 0, 1, 1)))
    best, blur = scored(task, batch, true), scored(task, batch, blurred)
    assert best["caption"] > 0.9
    assert blur["caption"] < 0.1
    if "absent" in task.metrics:
        assert best["absent"] > 0.9
    if "diversity" in task.metrics:
        alike = scored(task, batch, true[:1].expand_as(true))
        assert best["diversity"] > 0.5 and alike["diversity"] < 0.3
    else:
        others = scored(task, batch, true.roll(1, 0))
        assert others["caption"] < 0.2
        if "w1_brightness" in task.metrics:
            assert scored(task, batch, true * 0.5 - 0.5)["w1_brightness"] > 1.5 * best["w1_brightness"]


def test_a_style_is_read_in_its_own_look() -> None:
    task = TASKS["text_to_image/scenes_pastel"]
    assert PASTEL.pale > 0
    usual = scored(task, batch := drawn(task), load_split("scenes32", "test")["x0"][:N])
    assert usual["caption"] < 0.1 and len(batch["condition"]) == N


def test_what_is_forbidden_is_taken_from_the_prompt_and_asked_of_the_picture() -> None:
    task = TASKS["negative/scenes_eps"]
    batch = drawn(task)
    assert all(caption.absent is not None for caption in track.captions_of(batch))
    plain = track.captions_of({"condition": batch["condition"]})
    assert all(caption.absent is None for caption in plain)


def certain(place: int, shape: int, colour: int) -> Tensor:
    """Logits of a reader that is sure of one object in one place, and of nothing elsewhere."""
    parts = []
    for name, kinds in KINDS.items():
        part = torch.zeros(1, 9, kinds)
        part[:, :, -1] = 50.0
        value = {"shape": shape, "colour": colour}.get(name, 0)
        part[0, place, -1], part[0, place, value] = 0.0, 50.0
        parts.append(part.flatten(1))
    return torch.cat([*parts, torch.zeros(1, 8)], 1)


def test_the_reward_is_the_probability_of_what_is_said_wherever_it_lies() -> None:
    red_circle = certain(4, SHAPES.index("circle"), COLOURS.index("red"))
    said = {
        "a red circle at centre": 0.0,
        "a red circle": 0.0,
        "an object": 0.0,
        "a red object": 0.0,
        "a blue circle": -50.0,
        "a red circle at top": -100.0,
        "a red circle and a blue square": (0.0 - 100.0 + np.log(9)) / 2,  # two wrong attributes in each of nine places
    }
    found = log_probability(red_circle.expand(len(said), -1), tokens(said))
    torch.testing.assert_close(found, torch.tensor([float(value) for value in said.values()]), atol=0.05, rtol=0)
    one = log_probability(torch.zeros(1, red_circle.shape[1]), tokens(["a red circle on black"]))
    place = np.log(9) + np.log(1 / KINDS["shape"]) + np.log(1 / KINDS["colour"])
    assert float(one) == pytest.approx((place + np.log(1 / 8)) / 2, rel=1e-4)
