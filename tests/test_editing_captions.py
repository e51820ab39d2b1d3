"""Editing with a text-to-image model: inversion, exchanged attention, masks of parts, anchors, and supervision that is mended."""

from __future__ import annotations

import itertools
from copy import deepcopy
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rigs.images import idle_session, method_of, module_of, ran
from stepmark.datasets.edits32 import KINDS, edit, instruct, sound
from stepmark.datasets.scenes32 import describe
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, mse_loss

from stepmark.backbones.scenes import Painter, scaled_linear
from stepmark.meter.counts import watch
from stepmark.method import Skip
from stepmark.tracks import editing
from stepmark.tracks.editing import attention, instructions, inversion
from stepmark.tracks.editing.attention import Control, PromptToPrompt, controlled, corresponding
from stepmark.tracks.image.schedules import leading_times, schedule_of
from stepmark.tracks.scenes.captions import END, PAD, VOCABULARY, tokens
from stepmark.tracks.scenes.drawing import render

torch.set_num_threads(1)

EDITING, PARTS, MOVING, INSTRUCTIONS = (f"{kind}/scenes" for kind in ("editing", "parts", "moving", "instructions"))
icd, pixelman, partedit, superedit = (module_of(name) for name in ("icd", "pixelman", "partedit", "superedit"))


# toys -------------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Toy(nn.Module):
    """What networks of noise have in common here. Of a caption it knows one number, that of its first token."""

    prediction = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        self.alphas_cumprod = scaled_linear()
        self.shift = nn.Parameter(torch.zeros(()))

    def words(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 64) + ids[:, :1, None]

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.zeros_like(condition)

    def level(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        schedule = schedule_of(self)
        time = (t + 1) / schedule.steps
        return tuple(each.view(-1, 1, 1, 1) for each in (time, schedule.alpha(time), schedule.sigma(time)))  # type: ignore[return-value]


class Blind(Toy):
    """Noise that hangs on the time and the caption alone: then a step up is undone by the step down."""

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return (condition[:, 0, 0].view(-1, 1, 1, 1) * torch.cos(3 * self.level(t)[0])).expand_as(x)


class Point(Toy):
    """The exact noise of data that is one point, the caption's number times the guidance: paths are straight."""

    told: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None) -> Tensor:
        _, alpha, sigma = self.level(t)
        self.told = guidance if self.told is None or guidance is None else torch.cat([self.told, guidance])
        number = condition[:, 0, 0] if guidance is None else guidance * condition[:, 0, 0]
        return (x - alpha * number.view(-1, 1, 1, 1)) / sigma.clamp(min=1e-3) + self.shift


class Boxes(nn.Module):
    """An autoencoder that keeps means over 4x4 pixels. As with the true one both ways are evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def encode(self, x: Tensor) -> Tensor:
        return self(x)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 4:
            return interpolate(x[:, :3], scale_factor=4)
        small = adaptive_avg_pool2d(x, 8)
        return torch.cat([small, small.mean(1, keepdim=True)], 1)


@lru_cache(maxsize=1)
def painter() -> Painter:
    """A network as the teacher is, untrained, whose attention is sharp enough to be seen."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = Painter()
    for name, part in found.unet.named_modules():
        if name.rpartition(".")[2] in attention.KINDS:
            part.to_k.weight.data *= 6
    return found.requires_grad_(False).eval()


def captions(*said: str) -> Tensor:
    return tokens(said)


def asked(n: int = 2, **others: Any) -> dict[str, Any]:
    source = others.pop("source", drawn(n, 3, 32, 32, seed=1).clamp(-1, 1))
    shown = {"source": source, "source_latents": Boxes().encode(source)}
    return {"noise": drawn(n, 4, 8, 8, seed=2)} | shown | others


def numbered(n: int, number: int) -> Tensor:
    """Captions of which a toy knows a number: their first token, before the end."""
    return torch.tensor([[number, END] + [PAD] * 30]).repeat(n, 1)


# inversion and baselines ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rung", "up", "down"),
    [("ddim_inversion", 12, 3, 1), ("ddim_inversion_unguided", 8, 2, 2), ("prompt_to_prompt", 16, 3, 1)],
)
def test_what_went_up_comes_down(name: str, rung: int, up: int, down: int) -> None:
    """Guidance of 3 makes a caption's number 3 out of 1: the way down is the way up, and the source is where it ends."""
    session, batch = idle_session(EDITING, teacher=Blind(), vae=Boxes()), asked()
    batch |= {"source_condition": numbered(2, up), "condition": numbered(2, down)}
    found, spent = ran(session, method_of(name), batch, rung)
    torch.testing.assert_close(found, Boxes().encode(batch["source"]), rtol=1e-3, atol=1e-3)
    assert spent == rung
    batch["condition"] = numbered(2, down + 1)
    assert (ran(session, method_of(name), batch, rung)[0] - found).abs().max() > 0.1
    with pytest.raises(Skip):
        ran(session, method_of(name), batch, 1)


def test_the_path_of_an_inversion_is_that_of_ddim() -> None:
    """Of a network that knows the time alone every point of the path leads down to the source."""
    z, times = drawn(3, 4, 8, 8), [1.0, 0.6, 0.3, 0.0]
    denoise = inversion.Denoiser(Blind(), Blind().words(numbered(3, 2)))
    path = inversion.inverted(denoise, z, times)
    assert len(path) == len(times) and torch.equal(path[-1], z)
    for number in range(3):
        t, s = times[number : number + 2]
        down = inversion.leap(denoise.schedule, path[number], denoise.output(path[number], t), t, s)
        torch.testing.assert_close(down, path[number + 1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "start"), [("sdedit", 0.7), ("sdedit_weak", 0.5)])
def test_noise_on_the_source_is_as_much_as_the_time_says(name: str, start: float) -> None:
    """A network that sees no noise leaves it all: z + (sigma / alpha) eps."""
    session = idle_session(EDITING, teacher=Blind(), vae=Boxes())
    batch = asked(condition=numbered(2, 0))
    found, spent = ran(session, method_of(name), batch, 9)
    schedule = schedule_of(Blind())
    level = schedule.sigma(start) / schedule.alpha(start)
    torch.testing.assert_close(found, Boxes().encode(batch["source"]) + level * batch["noise"], rtol=1e-4, atol=1e-4)
    assert spent == 8


@pytest.mark.parametrize(
    ("name", "task", "shape"),
    [
        ("source", EDITING, (2,)),
        ("agnostic", "tryon/figures", (2,)),
        ("target", "swapping/figures", (2,)),
        ("source", "clips/scenes", (2, 8)),
    ],
)
def test_a_copy_is_what_was_shown_and_costs_one_evaluation(name: str, task: str, shape: tuple[int, ...]) -> None:
    session, latents = idle_session(task, vae=Boxes()), drawn(*shape, 4, 8, 8, seed=1)
    batch = {"noise": drawn(*shape, 4, 8, 8), name: drawn(*shape, 3, 32, 32), f"{name}_latents": latents}
    batch |= {f"{other}_latents": 0 * latents for other in ("garment", "identity", "blanked")}
    found, spent = ran(session, method_of("copy_source"), batch, 1)
    assert torch.equal(found, latents) and spent == 1


# attention --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_control_that_changes_nothing_gives_the_network_itself() -> None:
    network, x, t = painter(), drawn(2, 4, 8, 8), torch.tensor([900.0, 100.0])
    states = network.words(captions("a red circle", "a blue square on black"))
    before = dict(network.unet.attn_processors)
    with controlled(network, Control()):
        found = network(x, t, states)
    torch.testing.assert_close(found, network(x, t, states), rtol=1e-4, atol=1e-5)
    assert all(network.unet.attn_processors[name] is own for name, own in before.items())


def said(words: attention.Words, target: str, row: int = 0) -> dict[str, str]:
    """Of every word of a target what the source has in its place, and in what way."""
    found = {}
    for place, word in enumerate(["<start>", *target.split(), "<end>"]):
        way = "kept" if words.kept[row, place] else "exchanged" if words.exchanged[row, place] else "new"
        found[f"{word} {place}"] = way
    return found


def test_words_correspond_one_for_one_and_new_ones_stand_alone() -> None:
    before = ["a red circle at top on black", "a red circle on black", "a red circle and a blue ring on black"]
    after = ["a blue circle at top on black", "a red circle and a blue ring on black", "a blue ring on black"]
    before, after = [*before, "a ring at top on black"], [*after, "a ring at bottom left on black"]
    source, target = captions(*before), captions(*after)
    words = corresponding(source, target)
    assert [key for key, way in said(words, after[0]).items() if way == "exchanged"] == ["blue 2"]
    assert [key for key, way in said(words, after[1], 1).items() if way == "new"] == [
        "and 4",
        "a 5",
        "blue 6",
        "ring 7",
    ]
    assert set(said(words, after[2], 2).values()) == {"kept"}
    assert [key for key, way in said(words, after[3], 3).items() if way == "new"] == ["bottom 4", "left 5"]
    assert all(words.mapper[1, 7 + k, 11 + k] == 1 for k in range(21)), "padding lies behind the ends"
    for row, i, j in words.mapper.nonzero().tolist():
        same = source[row, i] == target[row, j]
        assert bool(same) == bool(words.kept[row, j]) and bool(same) != bool(words.exchanged[row, j])
    assert words.mapper.sum(1).max() == 1 and words.kept[0, 8:].all()
    assert [VOCABULARY[source[0, i]] for i in words.given_up[0].nonzero().flatten().tolist()] == ["red"]


def test_maps_are_taken_over_for_as_long_as_the_authors_code_does() -> None:
    """Four steps: int(0.3 x 5) = 1 of words, int(0.6 x 4) = 2 of pixels; a word has the map of the one that it stands for."""
    words = corresponding(captions("a red circle"), captions("a blue circle"))
    control = PromptToPrompt(words, 4, (0, 2, 3), 0.3, 0.3, 0.6)
    for cross, n in ((True, 32), (False, 16)):
        maps = torch.rand(3, 2, 16, n, generator=torch.Generator().manual_seed(1))
        for control.step in range(4):
            found = control.maps(attention.Layer("", cross, False, None), maps)
            assert torch.equal(found[:2], maps[:2])
            taken = control.step < (1 if cross else 2)
            torch.testing.assert_close(found[2], maps[0] if taken else maps[2])
    longer = corresponding(captions("a circle"), captions("a circle and a ring"))
    control, maps = PromptToPrompt(longer, 4, (0, 1, 2), 0.3, 0.3, 0.6), torch.rand(2, 2, 16, 32)
    found = control.maps(attention.Layer("", True, False, None), maps)
    torch.testing.assert_close(found[1, ..., 3:6], maps[1, ..., 3:6])  # "and a ring", which is new
    torch.testing.assert_close(found[1, ..., 6], maps[0, ..., 3])  # the end, which has moved


@torch.no_grad()
def test_exchanged_attention_of_the_same_caption_is_inversion() -> None:
    session, batch = idle_session(EDITING, teacher=deepcopy(painter()), vae=Boxes()), asked()
    batch |= {"source_condition": captions(*["a red circle on black"] * 2)}
    same, other = captions(*["a red circle on black"] * 2), captions(*["a blue circle on black"] * 2)
    for wanted, equal in ((same, True), (other, False)):
        one = ran(session, method_of("prompt_to_prompt"), batch | {"condition": wanted}, 4)[0]
        two = ran(session, method_of("ddim_inversion"), batch | {"condition": wanted}, 3)[0]
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-3) == equal


# iCD --------------------------------------------------------------------------------------------


def test_segments_are_those_of_the_authors_code() -> None:
    """Down: the greatest of 0, 259, 519, 779 that is no greater than the timestep after a step; up: the least of 259 .. 999 that
    is no less."""
    k = torch.arange(51)
    low, high = icd.below(k).tolist(), icd.above(k).tolist()
    for number in range(51):
        timestep = 20 * number - 1
        down = max((end for end in (0, 259, 519, 779) if end <= timestep), default=0)
        assert low[number] == (50 if number == 50 else (down + 1) // 20)
        if number > 0:
            assert 20 * high[number] - 1 == min(end for end in (259, 519, 779, 999) if end >= timestep)


class Landing(Toy):
    """A student that jumps along the exact path of data N(w c, 1), for which x - alpha w c stays as it is."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up, self.told = up, []

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, guidance: Tensor) -> Tensor:
        self.told += guidance.tolist()
        time, alpha, sigma = self.level(t)
        k = (time * 50).round().long()
        goal = (icd.above(k + 1) if self.up else icd.below(k - 1)).float() / 50
        alpha_s, sigma_s = schedule_of(self).alpha(goal), schedule_of(self).sigma(goal)
        there = x + (alpha_s - alpha) * (guidance * condition[:, 0, 0]).view(-1, 1, 1, 1)
        return (there - alpha_s / alpha * x) / (sigma_s - alpha_s / alpha * sigma)


@pytest.mark.parametrize(("name", "rung", "cost"), [("icd", 8, 8), ("icd", 16, 12), ("icd_constant", 8, 8)])
def test_an_edit_moves_by_what_the_captions_say_with_guidance_where_it_is_on(name: str, rung: int, cost: int) -> None:
    encoder, decoder = Landing(up=True), Landing(up=False)
    session = idle_session(EDITING, vae=Boxes(), encoder=encoder, decoder=decoder)
    batch = asked(source_condition=numbered(2, 2), condition=numbered(2, 1))
    found, spent = ran(session, method_of(name), batch, rung)
    schedule = schedule_of(decoder)
    first, on, last = (schedule.alpha(t) for t in (0.02, 0.78, 1.0))
    start = first * Boxes().encode(batch["source"]) + schedule.sigma(0.02) * batch["noise"]
    early = 3.0 if name == "icd_constant" else 1.0
    expected = start + (last - first) * 2 + (on - last) * early + (1 - on) * 3.0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert spent == cost and set(encoder.told) == {1.0}
    with pytest.raises(Skip):
        ran(session, method_of(name), batch, 7)


def icd_losses(encoder: nn.Module, decoder: nn.Module, teacher: nn.Module) -> dict[str, Tensor]:
    n = 64
    numbers = torch.Generator().manual_seed(3)
    states = Point().words(torch.randint(1, 4, (n, 32), generator=numbers))
    scale = torch.tensor(icd.SCALES)[torch.randint(4, (n,), generator=numbers)]
    down, up = torch.arange(n) % 50 + 1, torch.arange(n) % 49 + 1
    pictures = drawn(n, 4, 8, 8) + states[:, :1, :1, None]
    given = icd.Drawn(pictures, drawn(n, 4, 8, 8, seed=8), states, scale, down, up, torch.arange(n) % 4)
    return icd.losses(encoder, decoder, teacher, given, schedule_of(teacher))


def test_students_that_know_straight_paths_have_no_loss_and_each_learns_from_its_own() -> None:
    """The guided teacher of a point leads to w times it, along a straight line: the student that is told w is right at once."""
    teacher, encoder, decoder = Point(), Point(), Point()
    assert max(value.item() for value in icd_losses(encoder, decoder, teacher).values()) < 1e-4
    assert encoder.told is not None and decoder.told is not None and teacher.told is None
    assert set(encoder.told.tolist()) == {1.0} and set(decoder.told.tolist()) == set(icd.SCALES)
    assert float((decoder.told == 1).float().mean()) > 0.5, "what it undoes and what it is undone by are not guided"
    decoder.shift.data += 0.1
    encoder.shift.data -= 0.1
    found = icd_losses(encoder, decoder, teacher)
    owner = {"decoder": decoder, "encoder": encoder, "encoder_preserves": encoder, "decoder_preserves": decoder}
    for name, value in found.items():
        assert value.item() > 1e-3
        grads = torch.autograd.grad(value, [encoder.shift, decoder.shift], retain_graph=True, allow_unused=True)
        for student, grad in zip((encoder, decoder), grads, strict=True):
            assert (grad is not None and float(grad.abs()) > 0) == (owner[name] is student), name
    encoder.shift.data = decoder.shift.data.clone()  # with the same error, there and back is no way at all
    again = icd_losses(encoder, decoder, teacher)["decoder_preserves"]
    assert again.item() < 0.5 * found["decoder_preserves"].item()


def test_both_are_taught_at_once_and_once_and_a_half_to_undo_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn has every scale, and every number that a step of the teacher leads on from."""
    worth = {"decoder": 1.0, "encoder": 10.0, "encoder_preserves": 100.0, "decoder_preserves": 1000.0}
    seen: list[Tensor] = []

    def noted(
        encoder: nn.Module, decoder: nn.Module, teacher: nn.Module, what: Any, schedule: Any
    ) -> dict[str, Tensor]:
        assert set(what.scale.tolist()) == set(icd.SCALES) and set(what.segment.tolist()) == {0, 1, 2, 3}
        assert set(what.down.tolist()) == set(range(1, 51)) and set(what.up.tolist()) == set(range(1, 50))
        return {name: torch.tensor(value) for name, value in worth.items()}

    data = SimpleNamespace(batch=lambda n: (drawn(n, 4, 8, 8), None, torch.zeros(n, 32, 64)))
    monkeypatch.setattr(icd, "losses", noted)
    monkeypatch.setattr(icd, "descend", lambda session, parameters, updates, rate: [seen.append] * updates)
    monkeypatch.setattr(icd, "Latents", lambda session: data)
    session: Any = SimpleNamespace(
        networks={"teacher": painter()},
        clone=lambda role: deepcopy(painter()),
        rng=torch.Generator().manual_seed(1),
        scale=lambda embedded, smoke: 2000 if embedded == 8 else smoke,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    for name, total in (("icd", 11 + 1.5 * 1100), ("icd_unpreserved", 11)):
        seen.clear()
        icd.distilled(session, method_of(name).preserve, 2)
        assert [float(value) for value in seen] == [total, total]


def test_the_source_lends_its_maps_and_takes_none() -> None:
    """With the same captions there is nothing to lend; with others the edit is another one than without."""
    session = idle_session(EDITING, vae=Boxes(), encoder=deepcopy(painter()), decoder=deepcopy(painter()))
    batch = asked(source_condition=captions(*["a red circle on black"] * 2))
    for wanted, same in (("a red circle on black", True), ("a blue circle on black", False)):
        batch["condition"] = captions(*[wanted] * 2)
        one, two = (ran(session, method_of(name), batch, 16)[0] for name in ("icd", "icd_uncontrolled"))
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-3) == same


# PixelMan ---------------------------------------------------------------------------------------


def placed(*boxes: tuple[int, int, int, int]) -> Tensor:
    """Masks [n, 32, 32] of boxes: top, left, height, width."""
    found = torch.zeros(len(boxes), 32, 32, dtype=torch.bool)
    for row, (top, left, height, width) in enumerate(boxes):
        found[row, top : top + height, left : left + width] = True
    return found


def moving(shift: Tensor, **others: Any) -> dict[str, Any]:
    mask = placed((2, 3, 8, 8), (18, 16, 7, 9))
    return asked(mask=mask, shift=shift, condition=captions(*["a ring"] * 2), **others)


def test_sixteen_steps_take_64_evaluations_and_one_encodes() -> None:
    """Whether something is encoded or not, the rungs of the task pay for the same steps."""
    assert pixelman.price(16, True) == 64
    assert pixelman.guided_steps(16) == [1, 1, 1, 0, 1, 0, 1, 0, 3] + [0] * 7
    (task,) = (task for task in editing.TASKS if task.id == MOVING)
    for further in (0, 1):
        paid = [rung - further for rung in task.rungs]
        steps = [max(n for n in range(1, rung) if pixelman.price(n, True) <= rung) for rung in paid]
        assert steps == [2, 4, 8, 16, 31]


def test_pixels_are_shifted_and_nothing_comes_in() -> None:
    x, shift = drawn(3, 2, 6, 5), torch.tensor([[2, -1], [0, 0], [-3, 4]])
    found = pixelman.shifted(x, shift)
    for row, (down, right) in enumerate(shift.tolist()):
        for i, j in itertools.product(range(6), range(5)):
            inside = 0 <= i - down < 6 and 0 <= j - right < 5
            expected = x[row, :, i - down, j - right] if inside else torch.zeros(2)
            assert torch.equal(found[row, :, i, j], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixelman", "pixelman_unguided"])
def test_an_object_that_stays_where_it_is_changes_nothing(name: str) -> None:
    """The three branches are one, and whatever the network makes of it cancels."""
    session = idle_session(MOVING, teacher=deepcopy(painter()), vae=Boxes(), guide=pixelman.Guide())
    batch = moving(torch.zeros(2, 2))
    found, spent = ran(session, method_of(name), batch, 9)
    torch.testing.assert_close(found, batch["source_latents"], rtol=1e-3, atol=2e-3)
    assert spent == (9 if name == "pixelman" else 7)


class Partial(Toy):
    """Noise 0.5 x, and of a target, which is asked alone, one more: then the branches differ by what can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.Module()
        self.unet.up_blocks = nn.ModuleList()

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return 0.5 * x + (1.0 if len(x) == 2 else 0.0)


class Pull(nn.Module):
    """A gradient of 1 everywhere."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return torch.ones_like(x)


@pytest.mark.parametrize(("name", "rung", "cost"), [("pixelman_unguided", 13, 13), ("pixelman", 15, 14)])
def test_the_copied_object_is_the_anchor_of_what_changes(
    name: str, rung: int, cost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps: d <- m ((1 - sigma / 2) d - (sigma + (1 - sigma / 2) p) / alpha) with m = 1 less the new place, in the last two
    1, and p the pull against the gradient, in the first step."""
    monkeypatch.setattr(pixelman.Branches, "look", lambda self: None)
    session = idle_session(MOVING, teacher=Partial(), vae=Boxes(), guide=Pull())
    batch = moving(torch.tensor([[11.8, 8.2], [-14.0, -9.0]]))
    found, spent = ran(session, method_of(name), batch, rung)
    new, pasted = placed((14, 11, 8, 8), (4, 7, 7, 9)), batch["source"].clone()
    for row, (box, old) in enumerate(zip(new, batch["mask"], strict=True)):
        pasted[row][:, box] = batch["source"][row][:, old]
    rest = 1 - adaptive_avg_pool2d(new[:, None].float(), 8)
    schedule, change = schedule_of(Partial()), torch.zeros(2, 4, 8, 8)
    for number, t in enumerate(leading_times(4)[:-1]):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        pull = 40 / 64 if number == 0 and name == "pixelman" else 0.0
        further = (sigma + (1 - sigma / 2) * pull) / alpha
        change = (rest if number < 2 else 1) * ((1 - sigma / 2) * change - further)
    torch.testing.assert_close(found, Boxes().encode(pasted) + change, rtol=1e-3, atol=1e-3)
    assert spent == cost
    copied, spent = ran(session, method_of("pixelman_pasted"), batch, 9)
    torch.testing.assert_close(copied, Boxes().encode(pasted))
    assert spent == 1


def test_a_plastered_hole_has_the_background() -> None:
    old, new = placed((2, 3, 8, 8), (18, 16, 7, 9)), placed((14, 13, 8, 8), (4, 7, 7, 9))
    plain = torch.full((2, 3, 32, 32), 0.3)
    source, wanted = torch.where(old[:, None], drawn(2, 3, 32, 32), plain), plain.clone()
    for row in range(2):
        wanted[row][:, new[row]] = source[row][:, old[row]]
    batch = moving(torch.tensor([[12.0, 10.0], [-14.0, -9.0]]), source=source)
    session = idle_session(MOVING, teacher=Partial(), vae=Boxes())
    found, spent = ran(session, method_of("pixelman_plastered"), batch, 9)
    torch.testing.assert_close(found, Boxes().encode(wanted))
    assert spent == 1


class Timed(Blind):
    """The same with the blocks of a UNet, of which it has none."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.Module()
        self.unet.up_blocks = nn.ModuleList()


@pytest.mark.parametrize("how", ["inverted", "inpainted"])
def test_what_it_is_held_against_inverts_the_source_or_samples_the_hole(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixelman.Branches, "look", lambda self: None)
    session = idle_session(MOVING, teacher=Timed(), vae=Boxes(), guide=pixelman.Guide())
    batch, method = moving(torch.zeros(2, 2)), pixelman.PixelMan()
    method.how, method.guided, z = how, False, Boxes().encode(batch["source"])
    if how == "inverted":
        found, spent = ran(session, method, batch, 12)
        torch.testing.assert_close(found, z, rtol=1e-3, atol=1e-3)
    else:
        batch["shift"] = torch.tensor([[18.0, 17.0], [-15.0, -12.0]])
        found, spent = ran(session, method, batch, 12)
        hole = pixelman.covered(batch["mask"], 8)[:, None].expand(-1, 4, -1, -1)
        new = pixelman.covered(placed((20, 20, 8, 8), (3, 4, 7, 9)), 8)[:, None].expand_as(hole)
        torch.testing.assert_close(found[~hole & ~new], z[~hole & ~new])
        assert (found - z)[hole].abs().min() > 1e-4
    assert spent == 12


def test_like_the_object_is_what_its_new_place_looks_at() -> None:
    move = pixelman.Move(placed((0, 0, 4, 4)), placed((8, 8, 4, 8)), torch.tensor([[8, 8]]))
    control, maps = pixelman.Branches(move, True, 8), torch.zeros(1, 64, 64)
    new = torch.tensor([2 * 8 + 2, 2 * 8 + 3])
    maps[0, new[0], 5], maps[0, new[1], 5], maps[0, new[1], 6], maps[0, new[0], 7] = 0.9, 0.9, 0.1, 0.2
    maps[0, 0, 63] = 1.0  # what others look at does not count
    control.seen = [maps, maps]
    assert torch.equal(control.similar, pixelman.covered(move.old, 8))
    control.look()
    assert control.similar.flatten().nonzero().flatten().tolist() == [
        5,
        7,
    ]  # means of 0.9, 0.05 and 0.1; a tenth is 0.09


class Recorded(pixelman.Branches):  # type: ignore[name-defined, misc]
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.recorded: list[tuple[int, Tensor]] = []

    def maps(self, layer: attention.Layer, maps: Tensor) -> Tensor:
        if not layer.cross:
            self.recorded.append((round(maps.shape[2] ** 0.5), maps.chunk(len(self.roles))[-1]))
        return super().maps(layer, maps)


@torch.no_grad()
def test_the_hole_sees_neither_the_object_nor_what_is_like_it() -> None:
    network, x, t = painter(), drawn(2, 4, 8, 8), torch.full((2,), 500.0)
    old, new = placed((2, 3, 8, 8), (18, 16, 7, 9)), placed((18, 20, 8, 8), (2, 2, 7, 9))
    move = pixelman.Move(old, new, torch.tensor([[16, 17], [-16, -14]]))
    states, seen = network.words(captions(*["a ring"] * 2)), {}
    for leakproof in (True, False):
        control = Recorded(move, leakproof, 8)
        control.roles = ("source",)
        with controlled(network, control):
            network(x, t, states)
            control.recorded.clear()
            control.roles = ("target",)
            network(x, t, states)
        seen[leakproof] = control.recorded
    for (side, tight), (_, loose) in zip(seen[True], seen[False], strict=True):
        there, was = (adaptive_avg_pool2d(mask[:, None].float(), side).flatten(1) > 0 for mask in (new, old))
        for row in range(2):
            hole, hidden = was[row] & ~there[row], there[row] | was[row]
            assert hole.any() and not hidden.all()
            assert tight[row][:, hole][:, :, hidden].max() < 1e-6 < loose[row][:, hole][:, :, hidden].max()
    torch.testing.assert_close(
        seen[True][0][1][0][:, ~hidden_rows(old, new)], seen[False][0][1][0][:, ~hidden_rows(old, new)]
    )


def hidden_rows(old: Tensor, new: Tensor) -> Tensor:
    """Rows of the first picture, in 8x8, that belong to the hole."""
    there, was = (adaptive_avg_pool2d(mask[:1, None].float(), 8).flatten() > 0 for mask in (new, old))
    return was & ~there


@torch.no_grad()
def test_a_target_takes_keys_and_values_of_the_source_behind_the_middle() -> None:
    network, t = painter(), torch.full((1,), 500.0)
    states = network.words(captions("a ring"))
    move = pixelman.Move(placed((2, 3, 8, 8)), placed((18, 20, 8, 8)), torch.tensor([[16, 17]]))
    source, copy, target = drawn(3, 1, 4, 8, 8)

    def ask(first: tuple[str, ...], rows: list[Tensor]) -> tuple[Tensor, Any]:
        control = pixelman.Branches(move, False, 8)
        with controlled(network, control):
            control.roles = first
            network(torch.cat(rows), t.repeat(len(rows)), states.repeat(len(rows), 1, 1))
            control.roles = ("target",)
            return network(target, t, states), control

    found, control = ask(("source",), [source])
    assert len(control.kept) == 4 and all("up_blocks" in name and name.endswith("attn1") for name in control.kept)
    torch.testing.assert_close(ask(("manipulated", "source"), [copy, source])[0], found, rtol=1e-3, atol=1e-4)
    assert (ask(("source",), [copy])[0] - found).abs().max() > 1e-3
    kept, layer = drawn(6, 1, 4, 16, 16), attention.Layer("up", False, True, None)
    control.roles = ("source",)
    control.inputs(layer, *kept[:3])
    control.roles = ("target",)
    assert all(torch.equal(a, b) for a, b in zip(control.inputs(layer, *kept[3:]), kept[[3, 1, 2]], strict=True))
    plain = network(target, t, states)
    torch.testing.assert_close(ask(("source",), [target])[0], plain, rtol=1e-3, atol=1e-4)
    assert (found - plain).abs().max() > 1e-3


def test_energies_are_least_where_the_object_has_moved_and_the_hole_is_filled() -> None:
    """Then every cosine is 1 or, of what was in the hole, -1: 4/5, and 6/5 + 0.2 x 0 + 2 x 0.8/5."""
    move = pixelman.Move(placed((2, 2, 8, 8)), placed((18, 20, 8, 8)), torch.tensor([[16, 18]]))
    old, new = (pixelman.covered(mask, 16)[:, None] for mask in (move.old, move.new))
    reference = drawn(1, 6, 16, 16)
    around = (reference * ~(old | new)).sum((2, 3), keepdim=True)
    reference = torch.where(old, -around, reference)
    now = torch.where(old, around, reference)
    now = torch.where(new, pixelman.shifted(reference, torch.tensor([[8, 9]])), now)
    first, second = pixelman.energies([now, now], [reference, reference], move)
    torch.testing.assert_close(first, torch.tensor([4 / 5]))
    torch.testing.assert_close(second, torch.tensor([6 / 5 + 2 * 0.8 / 5]))
    worse = pixelman.energies([reference, reference], [reference, reference], move)
    assert worse[0] > first
    torch.testing.assert_close(worse[1], torch.tensor([6 / 5 + 0.2 + 2 * 0.8]))


def test_the_pull_is_of_the_object_at_its_new_place_and_of_the_rest_elsewhere() -> None:
    """A step against it lowers both energies."""
    network, t = painter(), 0.5
    states = network.words(captions("a ring"))
    move = pixelman.Move(placed((2, 3, 8, 8)), placed((18, 20, 8, 8)), torch.tensor([[16, 17]]))
    x, man = drawn(1, 4, 8, 8), drawn(1, 4, 8, 8, seed=9)
    time = torch.full((1,), schedule_of(network).network_time(t))

    def features(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return pixelman.asked(network, x, time, states)[1]

    reference = features(man)
    there = pixelman.covered(move.new, 8)[:, None]
    pull = pixelman.Guide()(x, t, network, states, reference, move)
    assert not network.unet.up_blocks[0]._forward_hooks
    for number, where in ((0, there), (1, ~there)):
        before = pixelman.energies(features(x), reference, move)[number]
        after = pixelman.energies(features(x - 0.5 * pull * where), reference, move)[number]
        assert float(after) < float(before)


# PartEdit ---------------------------------------------------------------------------------------


def test_otsu_parts_where_the_classes_lie_farthest_apart() -> None:
    x = torch.rand(5, 64, generator=torch.Generator().manual_seed(2)) ** 3
    for values, threshold in zip(x, partedit.otsu(x), strict=True):
        parts = [(values[values <= cut], values[values > cut]) for cut in values.sort().values[:-1]]
        spread = [len(low) * len(high) * float(high.mean() - low.mean()) ** 2 for low, high in parts]
        low, high = parts[int(np.argmax(spread))]
        assert low.max() < threshold < high.min()
    torch.testing.assert_close(partedit.otsu(torch.tensor([[0.1, 0.1, 0.9, 0.1]])), torch.tensor([0.5]))


def test_a_mask_is_cut_below_half_and_above_omega_of_the_threshold() -> None:
    """Of values 0, 0.1 and 1, most of them 0, the threshold is 0.55; half of it is 0.275, one and a half 0.825."""
    maps = torch.zeros(1, 8, 8)
    maps[0, 0, :5] = torch.tensor([0.1, 0.2, 1.0, 1.0, 1.0])
    scaled = maps.clone()
    threshold = float(partedit.otsu(maps.flatten(1)))
    assert threshold == pytest.approx(0.6)
    maps[0, 1, :2] = torch.tensor([0.5, 0.95])
    threshold = float(partedit.otsu(maps.flatten(1)))
    found = partedit.soft_mask(3 * maps + 2, 0.5, 1.5)
    scaled = maps.flatten()
    for value, mask in zip(scaled.tolist(), found.flatten().tolist(), strict=True):
        expected = 0.0 if value < 0.5 * threshold else 1.0 if value >= 1.5 * threshold else value
        assert mask == pytest.approx(expected, abs=1e-5)
    assert 0.5 in found.flatten().tolist() and set(partedit.soft_mask(maps, 1.0, 1.0).flatten().tolist()) == {0.0, 1.0}


def blending(mask: float | None, part: Tensor | None = None) -> Any:
    words = corresponding(captions("a red circle"), captions("a blue circle"))
    control = partedit.Blending(words, 4, part, (0.5, 1.5))
    control.mask, control.step = None if mask is None else torch.full((1, 8, 8), mask), 3
    control.until = (0, 0, 0)
    return control


@torch.no_grad()
def test_outside_the_mask_the_edit_is_the_source_and_inside_it_is_itself() -> None:
    network = painter()
    told, wanted = (network.words(captions(text)) for text in ("a red circle", "a blue circle"))
    null = network.null_condition(told)
    x, t, states = drawn(1, 4, 8, 8).repeat(4, 1, 1, 1), torch.full((4,), 400.0), torch.cat([null, told, null, wanted])

    def asked(mask: float | None) -> Tensor:
        with controlled(network, blending(mask, told)):
            return network(x, t, states)

    plain, none, all_of_it = network(x, t, states), asked(0.0), asked(1.0)
    assert (plain[3] - plain[1]).abs().max() > 1e-3
    torch.testing.assert_close(none[2:], plain[:2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(all_of_it, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(none[:2], plain[:2], rtol=1e-3, atol=1e-4)


class OwnRow(Control):
    """As in the authors' code: a row of its own for the part, whose queries are the source's."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def inputs(self, layer: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat([query[:1], query[:1]]), key, value

    def maps(self, layer: Any, maps: Tensor) -> Tensor:
        if layer.cross:
            self.seen.append(partedit.enlarged(maps[1:, ..., 1].mean(1)))
        return maps


@torch.no_grad()
def test_a_part_is_looked_for_with_the_queries_of_the_source() -> None:
    network, x, t = painter(), drawn(1, 4, 8, 8), torch.full((1,), 400.0)
    told, part = network.words(captions("a red circle")), partedit.filled(drawn(1, 2, 64))
    assert torch.equal(part[:, 2:], part[:, :1].expand(-1, 30, -1)) and not torch.equal(part[:, 1], part[:, 0])
    own, control = OwnRow(), blending(None, part)
    control.alone = True
    with controlled(network, own):
        network(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([told, part]))
    with controlled(network, control):
        network(x, t, told)
    assert len(control.seen) == 7
    for found, expected in zip(control.seen, own.seen, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    control.look()
    assert control.mask is not None and not control.seen


def test_tokens_learn_the_masks_of_their_own_part_and_the_network_learns_nothing() -> None:
    """One part is everywhere, the other nowhere: attention to the one rises, to the other it falls."""
    network = painter()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    masks = torch.stack([torch.ones(2, 32, 32), torch.zeros(2, 32, 32)], 1)
    session: Any = SimpleNamespace(
        networks={"teacher": network, "vae": Boxes()},
        train={"x0": drawn(2, 3, 32, 32), "masks": masks, "tokens": captions(*["a ring"] * 2)},
        rng=torch.Generator().manual_seed(4),
        device=torch.device("cpu"),
        dtype=torch.float32,
        progress=lambda found, what: found,
    )
    looked = {}
    for updates in (0, 12):
        session.rng.manual_seed(4)
        learned = partedit.part_tokens(session, 2, updates)["tokens"]
        looking = partedit.Looking()
        with torch.no_grad(), controlled(network, looking):
            network(drawn(2, 4, 8, 8), torch.full((2,), 300.0), partedit.filled(learned))
        looked[updates] = torch.stack(looking.seen).mean((0, 2, 3))
    assert looked[12][0] > 1.2 * looked[0][0] and looked[12][1] < 0.95 * looked[0][1]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@torch.no_grad()
def test_three_steps_and_a_first_look_take_16_evaluations() -> None:
    session = idle_session(PARTS, teacher=deepcopy(painter()), vae=Boxes())
    batch = asked(part=torch.tensor([0, 1]), source_condition=captions(*["a red circle"] * 2))
    batch |= {"condition": captions(*["a blue circle"] * 2)}
    session.state = {"tokens": drawn(2, 2, 64)}
    found, spent = ran(session, method_of("partedit"), batch, 17)
    assert spent == 16 and found.isfinite().all()
    worded = ran(session, method_of("partedit_worded"), batch, 17)[0]
    assert (worded - found).abs().max() > 1e-4


def test_where_nothing_is_asked_for_one_step_is_inversion() -> None:
    """All four rows are the same one, that of the inverted source: nothing is guided, exchanged or blended."""
    session = idle_session(PARTS, teacher=deepcopy(painter()), vae=Boxes())
    nothing = painter().null_condition(captions(*["a red circle"] * 2))
    batch = asked(part=torch.tensor([0, 1]), source_condition=nothing, condition=nothing)
    session.state = {"tokens": drawn(2, 2, 64)}
    found, spent = ran(session, method_of("partedit"), batch, 6)
    wanted = ran(session, method_of("ddim_inversion_unguided"), batch, 2)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert spent == 6


# SuperEdit --------------------------------------------------------------------------------------


def test_what_differs_between_two_scenes_is_said_as_the_truth_says_it() -> None:
    rng, found, expected = np.random.default_rng(3), [], []
    for kind in KINDS:
        source, target, which = edit(kind, rng, 16)
        good = np.flatnonzero(sound(source) & sound(target))
        pairs = [describe(scenes[good]) for scenes in (source, target)]
        for before, after, number in zip(*pairs, which[good].tolist(), strict=True):
            assert instructions.difference(before, after) == instruct(kind, before, after, number)
            assert instructions.difference(before, before) is None
        if kind in ("shape", "add", "move", "background"):
            found += instructions.seen(render(source[good[:1]]), render(target[good[:1]]))
            expected.append(instruct(kind, pairs[0][0], pairs[1][0], int(which[good[0]])))
    assert sum(one == other for one, other in zip(found, expected, strict=True)) >= 3


def test_a_wrong_instruction_is_wrong_in_one_fact() -> None:
    rng = np.random.default_rng(1)
    given = ("make the red circle blue", "add a small cyan plain ring at top left", "move the red star to bottom")
    more = ("make the background navy", "remove the blue cross", "turn the red ring into a star")
    for text, number in zip((*given, *more), (3, 5, 3, 1, 2, 3), strict=True):
        seen = set()
        for _ in range(40):
            found = instructions.altered(text, rng)
            own, other = (
                [(kinds, " ".join(each.split()[start:end])) for start, end, kinds in instructions.facts(each)]
                for each in (text, found)
            )
            assert sum(a != b for a, b in zip(own, other, strict=True)) == 1
            seen.add(tuple(a != b for a, b in zip(own, other, strict=True)))
        assert len(seen) == len(own) == number
    session: Any = SimpleNamespace(seed=7, train={"instruction": list(given) * 500})
    share = np.mean([a != b for a, b in zip(superedit.given(session), given * 500, strict=True)])
    assert share == pytest.approx(superedit.NOISE, abs=0.04)


def test_the_triplet_asks_for_a_margin_of_rows_that_count() -> None:
    right, wrong = torch.tensor([1.0, 1.0, 3.0, 9.0]), torch.tensor([2.0, 1.0, 1.0, 1.0])
    counts = torch.tensor([True, True, True, False])
    assert float(superedit.triplet(right, wrong, counts)) == pytest.approx((0 + 5e-4 + 2 + 5e-4) / 3)
    assert float(superedit.triplet(right, wrong, torch.zeros(4, dtype=torch.bool))) == 0


@torch.no_grad()
def test_an_editor_is_at_first_the_network_that_it_is_a_copy_of() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        own, copied = Painter(), Painter()
    copied.load_state_dict(own.state_dict())
    editor, x, t = superedit.Editor(copied), drawn(2, 4, 8, 8), torch.tensor([700.0, 50.0])
    states = own.words(captions("make the red circle blue", "remove the ring"))
    torch.testing.assert_close(editor(x, t, states, drawn(2, 4, 8, 8)), own(x, t, states), rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in editor.painter.words.parameters())
    editor.painter.unet.conv_in.weight[:, 4:] += 0.1
    assert mse_loss(editor(x, t, states, drawn(2, 4, 8, 8)), own(x, t, states)) > 1e-6


class Sum(nn.Module):
    """An editor whose noise is the source, and the instruction's number times it."""

    prediction = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        self.painter, self.alphas_cumprod = Toy(), scaled_linear()

    def forward(self, x: Tensor, t: Tensor, states: Tensor, source: Tensor) -> Tensor:
        return source + states[:, 0, 0].view(-1, 1, 1, 1) * source


def test_guidance_is_by_the_picture_and_by_the_instruction() -> None:
    """One step: (x - sigma (1.5 z + 3 (2 z))) / alpha, where the number of the instruction is 2."""
    session, batch = idle_session(INSTRUCTIONS, vae=Boxes(), editor=Sum()), asked(instruction=numbered(2, 2))
    found, spent = ran(session, method_of("superedit"), batch, 4)
    schedule, z = schedule_of(Sum()), Boxes().encode(batch["source"])
    expected = (batch["noise"] - schedule.sigma(1.0) * (1.5 + 6) * z) / schedule.alpha(1.0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
    assert spent == 3


class Guess(nn.Module):
    """An editor that answers with a number of its own, more where it is told more; keeps what it was asked."""

    prediction = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        self.painter, self.alphas_cumprod = Toy(), scaled_linear()
        self.weight = nn.Parameter(torch.zeros(()))
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, states: Tensor, source: Tensor) -> Tensor:
        self.asked.append((states[:, 0, 0].clone(), source.flatten(1).abs().amax(1)))
        return torch.zeros_like(x) + self.weight * states[:, :1, :1, None]


def taught(editor: Guess, updates: int, batch: int) -> None:
    """Teach an editor 8 pairs, the right instruction of pair 3 being 3 and its wrong ones 300 .. 303."""
    session: Any = SimpleNamespace(
        rng=torch.Generator().manual_seed(2),
        device=torch.device("cpu"),
        dtype=torch.float32,
        scale=lambda embedded, smoke: embedded,
        progress=lambda found, what: found,
    )
    latents = {"before": torch.ones(8, 4, 8, 8), "after": drawn(8, 4, 8, 8)}
    right = torch.arange(1, 9)[:, None].repeat(1, 32)
    bad = (100 * right[:, None] + torch.arange(4)[:, None]).contiguous()
    superedit.teach(session, editor, latents, right, bad, updates, batch)


def test_wrong_instructions_count_behind_the_first_third(monkeypatch: pytest.MonkeyPatch) -> None:
    values: list[float] = []

    def asked_often(session: Any, editor: nn.Module, loss: Any, updates: int, *_: Any, **__: Any) -> None:
        values.extend(float(loss().detach()) for _ in range(updates))

    monkeypatch.setattr(superedit, "fit", asked_often)
    monkeypatch.setattr(superedit, "triplet", lambda *_: torch.tensor(100.0))
    taught(Guess(), 6, 8)
    assert [value > 50 for value in values] == [False] * 2 + [True] * 4


def test_wrong_instructions_stand_beside_right_ones_and_both_are_left_out_together() -> None:
    editor = Guess()
    taught(editor, 6, 400)
    told, wrong = (torch.cat(each) for each in zip(*(numbers.chunk(2) for numbers, _ in editor.asked), strict=True))
    shown = torch.cat([source.chunk(2)[0] for _, source in editor.asked]) > 0
    assert ((wrong - 100 * told)[told > 0] >= 0).all() and set((wrong - 100 * told).tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert torch.equal(told == 0, wrong == 0)
    for share, expected in (((told == 0), 0.1), (~shown, 0.1), ((told == 0) & ~shown, 0.05)):
        assert float(share.float().mean()) == pytest.approx(expected, abs=0.02)


def test_everything_is_counted() -> None:
    """Networks that a method adds are watched by their rows."""
    session = idle_session(INSTRUCTIONS, vae=Boxes())
    session.networks["editor"] = watch(session._ledger, "editor", Sum())
    session.begin("run", 1, 100)
    superedit.SuperEdit().run(session, asked(instruction=numbered(2, 1)), 32)
    assert session.spent == 2 * 30
