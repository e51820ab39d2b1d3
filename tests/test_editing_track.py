"""Track editing: what a perfect editor, a copy of the source and blur get, and that the batch does not hold the answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepmark.task import Task
from stepmark.tracks import editing

torch.set_num_threads(1)

TASKS = {task.id: task for task in editing.TASKS}
N = 6


class Shown(nn.Module):
    """An autoencoder whose decoder shows pictures that were made before, one after the other."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.pictures, self.at = pictures.flatten(0, -4), 0

    def decode(self, z: Tensor) -> Tensor:
        self.at += len(z)
        return self.pictures[self.at - len(z) : self.at]


class Means(nn.Module):
    """An autoencoder whose latents are means over 4x4 pixels, and how often it was asked for one."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def encode(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        small = nn.functional.avg_pool2d(x, 4)
        return torch.cat([small, small.mean(1, keepdim=True)], 1)


@pytest.fixture(autouse=True)
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Means]:
    """In the place of the shipped one, which takes seconds for a split."""
    found = Means()
    monkeypatch.setattr(editing, "_autoencoder", lambda vae: found)
    editing._split_latents.cache_clear()
    yield found
    editing._split_latents.cache_clear()


def scored(task: Task, batch: Mapping[str, Tensor], pictures: Tensor) -> dict[str, float]:
    resample = np.tile(np.arange(N), (3, 1))
    found = editing.score(task, batch, batch["noise"], {"vae": Shown(pictures)}, resample)
    assert all(score.resamples == pytest.approx([score.value] * 3) for score in found.values())
    return {name: score.value for name, score in found.items()}


def drawn(task: Task, seed: int = 0) -> dict[str, Tensor]:
    return editing.inputs(task, N, torch.Generator().manual_seed(seed), torch.device("cpu"))


def source_of(task: Task, batch: Mapping[str, Tensor]) -> Tensor:
    return batch[editing.SHOWN.get(task.id.partition("/")[0], "source")]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_truth_is_best_and_a_copy_of_the_source_edits_nothing(task: Task) -> None:
    batch = drawn(task)
    wanted, mask, _ = editing.truth(task, batch)
    source = source_of(task, batch)
    best, copy = scored(task, batch, wanted), scored(task, batch, source)
    assert best["kept"] == copy["kept"] == 0
    for name in set(task.metrics) - {"kept", "edit"}:
        assert best[name] == 60
        assert copy[name] < 25
    if "edit" in task.metrics:
        assert best["edit"] > 0.8
        assert copy["edit"] == 0
    outside = ~mask.unsqueeze(-3).expand_as(wanted)
    torch.testing.assert_close(source[outside], wanted[outside], rtol=0, atol=0)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_nothing_in_the_batch_is_the_answer(task: Task) -> None:
    batch = drawn(task)
    wanted, _, _ = editing.truth(task, batch)
    latents = Means().encode(wanted.flatten(0, -4)).unflatten(0, wanted.shape[:-3])
    for answer in (wanted, latents):
        for name, value in batch.items():
            if value.shape == answer.shape:
                assert float((value - answer).abs().flatten(1).amax(1).min()) > 0, name


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_all_pictures_are_in_the_batch_as_latents_and_a_split_is_encoded_once(task: Task, encoder: Means) -> None:
    batch = drawn(task)
    pictures = {name: value for name, value in batch.items() if value.shape[-3:] == (3, 32, 32)}
    if task.id.startswith("clips"):
        pictures["blanked"] = torch.where(batch["mask"][:, :, None], torch.tensor(0.0), batch["source"])
    assert {name for name in batch if name.endswith("_latents")} == {f"{name}_latents" for name in pictures}
    for name, value in pictures.items():
        wanted = Means().encode(value.flatten(0, -4)).unflatten(0, value.shape[:-3])
        torch.testing.assert_close(batch[f"{name}_latents"], wanted)
        assert batch[f"{name}_latents"].shape == batch["noise"].shape
    before = encoder.asked
    again = drawn(task, seed=1)
    assert encoder.asked - before == (N if "identity" in again else 0)


def test_damage_outside_the_mask_is_seen_apart_from_the_edit() -> None:
    task = TASKS["removing/scenes"]
    batch = drawn(task)
    wanted, mask, _ = editing.truth(task, batch)
    damaged = torch.where(mask[:, None], wanted, (wanted + 0.1).clamp(-1, 1))
    found = scored(task, batch, damaged)
    assert found["inside"] == 60
    expected = (damaged - wanted).abs()[~mask[:, None].expand_as(wanted)]
    assert 0 < found["kept"] <= 0.1
    assert found["kept"] == pytest.approx(float(expected.mean()), rel=0.1)


def test_a_shift_takes_the_object_from_where_it_shows_to_where_it_lies() -> None:
    task = TASKS["moving/scenes"]
    batch = drawn(task)

    def pasted(way: int) -> Tensor:
        moved = batch["source"].clone()
        for row in range(N):
            places = batch["mask"][row].nonzero()
            there = places + way * batch["shift"][row].round().long()
            good = ((there >= 0) & (there < 32)).all(1)
            moved[row][:, there[good, 0], there[good, 1]] = batch["source"][row][:, places[good, 0], places[good, 1]]
        return moved

    right, wrong = (scored(task, batch, pasted(way))["psnr"] for way in (1, -1))
    assert right > scored(task, batch, batch["source"])["psnr"] > wrong
