"""The scenes of 32x32 pixels, their captions, the eye that reads them back, and the sets that are made of them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from stepmark.datasets import clips32, edits32, parts32, regions32, scenes32, tryon32
from torch import Tensor

from stepmark import plugins
from stepmark.task import digest_of
from stepmark.tracks.scenes import captions as words
from stepmark.tracks.scenes import metrics
from stepmark.tracks.scenes.captions import ATTRIBUTES, Caption, Thing, read, write
from stepmark.tracks.scenes.drawing import (
    HALVES,
    PASTEL,
    Scenes,
    area,
    depth,
    edges,
    layout,
    masks,
    open_ground,
    owners,
    render,
)
from stepmark.tracks.scenes.parser import Reading, parse

NAMES = ("scenes32", "pastel32", "regions32", "parts32", "edits32", "tryon32", "clips32")
LONG = 1_000  # pictures; larger splits are checked when they are loaded
N = 24


def truth(scenes: Scenes) -> Reading:
    """What a perfect eye reads."""
    there, ones = scenes.there, np.ones(scenes.shape.shape, np.float32)
    zeros = np.zeros(len(scenes), np.float32)
    return Reading(scenes, there, ones, 0 * ones, ones, zeros, zeros, np.ones(len(scenes), bool))


def right(captions: list[Caption], reading: Reading, name: str = "whole") -> float:
    return float(np.nanmean(metrics.caption_accuracy(captions, reading)[name]))


@pytest.fixture(scope="module")
def tested() -> dict[str, Any]:
    return scenes32.split("test")


@pytest.fixture(scope="module")
def drawn() -> dict[int, tuple[Scenes, list[Caption], Tensor]]:
    """By number of objects: scenes, full captions, pictures."""
    found = {}
    for count in (1, 2, 3):
        scenes = scenes32.draw(np.full(N, count), np.random.default_rng(count))
        found[count] = scenes, scenes32.describe(scenes), render(scenes)
    return found


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_data_are_the_committed_ones(name: str) -> None:
    module = importlib.import_module(f"stepmark.datasets.{name}")
    assert set(module.DATASET.digests) == set(module.COUNTS)
    for split, digest in module.DATASET.digests.items():
        if split == "test" or (module.COUNTS[split] <= LONG and name != "clips32"):
            assert digest_of(module.split(split)) == digest, split
    with pytest.raises(KeyError):
        module.split("other")


def test_sets_are_listed_and_no_track_is_without_tasks() -> None:
    assert set(NAMES) <= set(plugins.datasets())
    assert set(plugins.tracks()) == {track for track, _ in plugins.fixed_tasks().values()}


def test_a_picture_does_not_hang_on_those_beside_it(tested: dict[str, Any]) -> None:
    scenes = scenes32.scenes_of(tested)
    some = np.arange(3, 400, 37)
    assert torch.equal(render(scenes[some]), tested["x0"][some])
    bits = (tested["x0"] + 1) * 127.5
    assert (bits - bits.round()).abs().max() < 1e-4
    assert tested["x0"].min() == -1 and tested["x0"].max() == 1


def test_scenes_keep_to_the_rules(tested: dict[str, Any]) -> None:
    scenes = scenes32.scenes_of(tested)
    there = scenes.there
    assert (area(masks(scenes))[there] >= scenes32.SEEN * 4 * scenes.radius[there] ** 2 - 1e-3).all()
    for name in ("colour", "place"):
        values = np.where(there, getattr(scenes, name), -1 - np.arange(3))
        assert all(len(set(row)) == 3 for row in values.tolist()), name
    assert torch.equal(tested["objects"][..., 2][torch.from_numpy(there)], torch.from_numpy(scenes.size[there]))
    rim = torch.cat([tested["x0"][..., 0, :], tested["x0"][..., -1, :]], 2)
    ground = rim.median(2).values  # an object cut off by the rim would show there
    assert ((rim - ground[..., None]).abs().amax(1) < 0.5).float().mean() > 0.98
    for name, kinds in (("shape", 6), ("colour", 8), ("size", 3), ("texture", 3), ("place", 9)):
        shares = np.bincount(getattr(scenes, name)[there], minlength=kinds) / there.sum()
        assert np.abs(shares * kinds - 1).max() < 0.2, name


# --- captions --------------------------------------------------------------------------------------------------------


def test_captions_are_read_back(tested: dict[str, Any]) -> None:
    texts = tested["text"] + ["", "on grey", "an object", "a star in the north as pastel and no small object"]
    texts += ["a circle at top left left of an object at top", "a circle at top left of an object"]
    for name in ("pastel32", "parts32", "regions32"):
        texts += importlib.import_module(f"stepmark.datasets.{name}").split("test")["text"][:200]
    assert [write(read(text)) for text in texts] == texts
    assert words.texts(words.tokens(texts)) == texts
    said = [read(text) for text in tested["text"]]
    assert sum(c.absent is not None for c in said) > 100
    assert {c.relation for c in said} == {None, *range(len(words.RELATIONS))}
    ids = words.tokens(["a red circle"])
    assert ids.shape == (1, words.LENGTH) and ids[0, 0] == words.START and ids[0, 4] == words.END
    assert len(words.VOCABULARY) == len(set(words.VOCABULARY)) <= 80


@pytest.mark.parametrize(
    "text", ["a red", "red circle", "a circle at", "a circle and", "a circle red", "a circle on top"]
)
def test_what_is_no_caption_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no caption"):
        read(text)


def test_a_negative_prompt_is_the_clause_alone() -> None:
    caption = read("a circle on black and no red star")
    assert words.negative_prompt(caption) == "a red star"
    assert write(words.positive(caption)) == "a circle on black"
    assert write(words.swapped(read("a circle left of a star"))) == "a star right of a circle"
    assert words.unwanted(words.negative_prompt(caption)) == caption.absent
    assert words.unwanted(words.negative_prompt(words.positive(caption))) is None


@pytest.mark.parametrize("split", ["test", "negative", "two", "protected", "free"])
def test_captions_are_true_and_tell_scenes_apart(split: str) -> None:
    data = scenes32.split(split)
    scenes, said = scenes32.scenes_of(data), [read(text) for text in data["text"]]
    held = metrics.caption_accuracy(said, truth(scenes))
    assert (held["whole"] == 1).all()
    if split == "protected":
        assert len(set(data["text"])) == 1
        return
    others = metrics.caption_accuracy(said, truth(scenes[np.roll(np.arange(len(scenes)), len(scenes) // 2)]))
    assert others["whole"].mean() < 0.2


def test_every_fault_of_a_caption_is_seen() -> None:
    scenes = scenes32.draw(np.full(50, 2), np.random.default_rng(4))
    full = scenes32.describe(scenes)
    for name, kinds in ATTRIBUTES.items():
        for i in (0, 1):
            wrong = []
            for caption in full:
                things = list(caption.objects)
                things[i] = replace(things[i], **{name: (getattr(things[i], name) + 1) % len(kinds)})
                wrong.append(replace(caption, objects=tuple(things)))
            found = metrics.caption_accuracy(wrong, truth(scenes))
            assert found["whole"].max() == 0 and found[name].max() <= 0.5
    assert right([replace(c, objects=c.objects[:1], relation=None) for c in full], truth(scenes)) == 0  # one too many
    assert right([replace(c, background=(c.background or 0) ^ 1) for c in full], truth(scenes)) == 0
    assert right([replace(c, absent=Thing(colour=c.objects[1].colour)) for c in full], truth(scenes), "absent") == 0
    one = Caption((Thing(0), Thing(1)), 0)
    pair = Scenes(*(np.array([[a, b]]) for a, b in ((0, 1), (0, 1), (0, 0), (-1, -1))),
                  np.array([[[16, 8], [16, 24]]], np.float32), np.full((1, 2), 3, np.float32), np.array([0]))  # fmt: skip
    for relation in range(6):
        assert right([replace(one, relation=relation)], truth(pair)) == (relation == 0)
        assert right([words.swapped(replace(one, relation=relation))], truth(pair)) == (relation == 0)
    near = replace(pair, at=np.array([[[16, 14], [16, 17]]], np.float32))
    assert right([replace(one, relation=4)], truth(near)) == 1 and right([replace(one, relation=5)], truth(near)) == 0


def test_entropy_is_of_what_is_free() -> None:
    data = scenes32.split("free")
    found = metrics.diversity(truth(scenes32.scenes_of(data)), data["group"].numpy())
    assert found["shape"] == found["colour"] == 0
    assert all(found[name] > 0.9 for name in ("size", "texture", "place", "background"))
    assert metrics.entropy(np.zeros(20, np.int64), 4) == 0
    assert metrics.entropy(np.arange(4).repeat(1000), 4) == pytest.approx(2, abs=0.002)
    assert metrics.entropy(np.array([0, 1, 2, 3]), 4) == 2


# --- what the renderer knows -----------------------------------------------------------------------------------------


def test_masks_are_what_taking_an_object_away_changes(drawn: dict[int, Any]) -> None:
    scenes, _, pictures = drawn[3]
    seen = masks(scenes)
    assert np.abs(seen.sum(1) + open_ground(scenes) - 1).max() < 1e-5
    for i in range(3):
        away = render(scenes.without(np.full(N, i)))
        changed = (away != pictures).any(1).numpy()
        assert not (changed & (seen[:, i] == 0)).any()
        assert changed[seen[:, i] > 0.05].all()


def test_layout_depth_and_edges_are_those_of_the_masks(drawn: dict[int, Any]) -> None:
    scenes = drawn[3][0]
    owner, box, far, rim = owners(scenes), layout(scenes), depth(scenes), edges(scenes)
    seen = masks(scenes)
    for n in range(0, N, 7):
        for i in range(3):
            rows, columns = np.nonzero(seen[n, i] > 0.5)
            assert box[n, i].tolist() == [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
            assert np.abs(far[n][seen[n, i] > 0.5] - i / 3).max() < 1e-6
        assert (far[n][seen[n].max(0) <= 0.5] == 1).all()
        for row in range(31):
            for column in range(31):
                here = owner[n, row, column]
                assert rim[n, row, column] == (owner[n, row + 1, column] != here or owner[n, row, column + 1] != here)
    lone = scenes32.draw(np.ones(5, np.int64), np.random.default_rng(0))
    assert not layout(lone)[:, 1:].any()


# --- the eye ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "least"), [(1, 1.0), (2, 0.95), (3, 0.9)])
def test_renders_are_read(count: int, least: float, drawn: dict[int, Any]) -> None:
    scenes, said, pictures = drawn[count]
    found = parse(pictures)
    assert right(said, found) >= least
    if count == 1:
        assert np.abs(found.scenes.at[:, 0] - scenes.at[:, 0]).max() < 0.2  # pixels
        assert np.abs(found.scenes.radius[:, 0] - scenes.radius[:, 0]).max() < 0.2


def test_noise_and_a_shift_of_colour_are_borne(drawn: dict[int, Any]) -> None:
    _, said, pictures = drawn[2]
    rng = np.random.default_rng(1)
    for amount, least in ((0.1, 0.92), (0.2, 0.85)):
        noise = torch.from_numpy(rng.standard_normal(pictures.shape).astype(np.float32))
        assert right(said, parse(pictures + amount * noise)) >= least
    sign = torch.from_numpy(rng.choice([-0.1, 0.1], (N, 3, 1, 1)).astype(np.float32))
    assert right(said, parse(pictures + sign)) >= 0.92


def test_blur_does_not_pass(drawn: dict[int, Any]) -> None:
    _, said, pictures = drawn[1]
    for width, least, most in ((0.5, 0.9, 1.0), (1.0, 0.0, 0.0), (2.0, 0.0, 0.0)):
        found = parse(torch.from_numpy(gaussian_filter(pictures.numpy(), (0, 0, width, width))))
        assert least <= right(said, found) <= most
        assert least <= found.sure.any(1).mean() <= max(most, 0.03)


def spoilt(kind: str, scenes: Scenes, pictures: Tensor) -> Tensor:
    """Pictures that a metric must not take for right ones of single objects."""
    rng = np.random.default_rng(9)
    empty = render(scenes.without(np.zeros(len(scenes), np.int64)))
    left = (torch.arange(32) < torch.from_numpy(scenes.at[:, 0, 1])[:, None])[:, None, None]
    if kind == "mean of renders":  # what a model that draws the mean in one step makes
        again = scenes[np.repeat(np.arange(len(scenes)), 32)]
        at = scenes32.settle(again.place, np.maximum(again.shape, 0), again.radius, rng)
        return render(replace(again, at=at)).unflatten(0, (len(scenes), 32)).mean(1)
    if kind == "half transparent":
        return (pictures + empty) / 2
    if kind == "two halves":
        other = scenes32.draw(np.ones(len(scenes), np.int64), rng, background=scenes.background)
        return torch.where(left, pictures, render(replace(other, at=scenes.at)))
    if kind == "one half":
        return torch.where(left, pictures, empty)
    if kind == "noise":
        return torch.from_numpy(rng.standard_normal(pictures.shape).astype(np.float32))
    if kind == "one more":
        shape, at = scenes.shape.copy(), scenes.at.copy()
        shape[:, 1], at[:, 1] = 0, np.where(at[:, 0] > 16, 7, 25)  # on the other side, so that both show
        return render(replace(scenes, shape=shape, at=at))
    if kind == "nothing":
        return empty
    return pictures * torch.tensor(float("nan"))


WHOLE = ("one more", "nothing")  # they show what there is as it should be; there is too much of it, or too little
KINDS = (
    "mean of renders",
    "half transparent",
    "two halves",
    "one half",
    "noise",
    "one more",
    "nothing",
    "not a number",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_picture_is_refused(kind: str, drawn: dict[int, Any]) -> None:
    scenes, said, pictures = drawn[1]
    found = parse(spoilt(kind, scenes, pictures))
    assert right(said, found) <= 0.03
    assert (found.legible.mean() > 0.95) if kind in WHOLE else (found.legible.mean() <= 0.07)


def test_another_look_is_read_by_its_own_eye(drawn: dict[int, Any]) -> None:
    scenes, said, pictures = drawn[1]
    pastel = render(scenes, PASTEL)
    assert right(said, parse(pastel, PASTEL)) >= 0.95
    assert right(said, parse(pastel)) <= 0.15
    assert right(said, parse(pictures, PASTEL)) <= 0.05


# --- sets that methods need ------------------------------------------------------------------------------------------


def test_halves_are_read_and_their_masks_are_exact() -> None:
    data = parts32.split("test")
    scenes = scenes32.scenes_of(data)[:N]
    said = [read(text) for text in data["text"][:N]]
    assert right(said, parse(data["x0"][:N], parts=True)) >= 0.95
    assert (scenes.texture[:, 0] == HALVES).all() and (scenes.lower[:, 0] != scenes.colour[:, 0]).all()
    upper, lower = data["masks"][:N].unbind(1)
    assert torch.allclose(upper + lower, torch.from_numpy(masks(scenes)[:, 0]), atol=1e-5)
    new = render(replace(scenes, colour=(scenes.colour + 1) % 8))
    changed = (new != data["x0"][:N]).any(1)
    assert not (changed & (upper == 0)).any() and changed[upper > 0.05].all()


def test_regions_have_the_modes_they_say() -> None:
    data = regions32.split("test")
    region, colour = data["region"].numpy(), data["objects"][:, 0, 1].numpy()
    mode = regions32.mode_of(region, colour, data["background"].numpy())
    assert (mode == data["mode"].numpy()).all()
    assert regions32.probabilities().sum((1, 2)) == pytest.approx(np.ones(4))
    assert (regions32.probabilities() > 0).sum() == 32 == ((regions32.probabilities() > 0).sum(0) == 1).sum()
    for where in range(4):
        shares = np.bincount(mode[region == where], minlength=8) / (region == where).sum()
        sd = np.sqrt(regions32.SHARES / (region == where).sum())
        assert (np.abs(shares - regions32.SHARES) < 4 * sd).all()
    assert regions32.mode_of(np.array([0]), np.array([0]), np.array([1])) == -1


def test_edits_change_what_they_say_and_nothing_outside_the_mask() -> None:
    data = edits32.split("test")
    changed = (data["source"] != data["x0"]).any(1)
    assert not (changed & ~data["mask"]).any()
    assert changed.flatten(1).any(1).all()
    assert (
        changed.sum((1, 2)) > 0.2 * data["mask"].sum((1, 2))
    ).float().mean() > 0.95  # the mask is no larger than needed
    per = len(data["text"]) // len(edits32.KINDS)
    for i, kind in enumerate(edits32.KINDS):
        for n in range(i * per, (i + 1) * per):
            before, after = read(data["source_text"][n]), read(data["text"][n])
            assert data["kind"][n] == i
            said = data["instruction"][n]
            if kind == "background":
                assert before.objects == after.objects and before.background != after.background
                assert said.endswith(words.BACKGROUNDS[after.background])
                continue
            assert before.background == after.background
            gone, come = set(before.objects) - set(after.objects), set(after.objects) - set(before.objects)
            assert (len(gone), len(come)) == {"add": (0, 1), "remove": (1, 0)}.get(kind, (1, 1)), said
            if gone:
                old = gone.pop()
                assert f"the {words.COLOURS[old.colour]} {words.SHAPES[old.shape]}" in said
            if gone or kind in ("add", "remove"):
                continue
            new = come.pop()
            named = {"place": "move"}
            differ = {named.get(name, name) for name in ATTRIBUTES if getattr(old, name) != getattr(new, name)}
            assert kind in differ and differ - {kind} <= {"size", "move"}, said  # a radius near two sizes may be either
            assert said.endswith(
                dict(ATTRIBUTES, move=words.PLACES)[kind][getattr(new, "place" if kind == "move" else kind)]
            )
    assert words.texts(data["instruction_tokens"]) == data["instruction"]
    some = range(0, 800, 20)
    assert right([read(data["text"][n]) for n in some], parse(data["x0"][list(some)])) >= 0.9


def test_a_garment_is_worn_as_it_lies() -> None:
    data = tryon32.split("test")
    assert not ((data["x0"] != data["person"]).any(1) & ~data["mask"]).any()
    assert not (data["agnostic"].abs() * data["mask"][:, None]).any()
    assert torch.equal(*(data[k] * ~data["mask"][:, None] for k in ("agnostic", "x0")))
    attributes = data["attributes"].numpy()
    figure = np.tile(np.array([16, 16, tryon32.FLAT], np.float32), (len(attributes), 1))
    none = np.zeros(len(attributes), np.int64)
    worn, seen = tryon32.dressed(none, none, figure, attributes)
    whole = np.broadcast_to((seen == 1)[:, None], worn.shape)
    assert np.abs(worn - tryon32.flat(attributes))[whole].max() < 1e-6
    assert (seen == 1).sum((1, 2)).min() > 30


def test_clips_move_evenly_and_differ_only_where_the_removed_object_shows() -> None:
    data = clips32.split("test")
    assert not ((data["x0"] != data["without"]).any(2) & ~data["mask"]).any()
    assert (data["x0"] != data["without"]).flatten(2).any(2).float().mean() > 0.95
    steps = data["path"][:, :, :2].diff(dim=1)
    assert (steps - steps[:, :1]).abs().max() < 1e-4
    moved = data["path"][:, -1, :2] - data["path"][:, 0, :2]
    assert moved.norm(dim=-1).mean() > 4
    assert right([read(text) for text in data["text"][:20]], parse(data["x0"][:20, 0], clips32.LINED)) >= 0.75
