"""Students with an adversary beside other losses: segments of consistency, growing latents, layouts; and the task of layouts."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from rigs.images import idle_session, method_of, module_of, ran
from stepmark.datasets.scenes32 import captioned, draw, packed, scenes_of
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate
from torch.utils.flop_counter import FlopCounterMode

from stepmark.backbones.scenes import RECIPES, FlowPainter, Painter, scaled_linear
from stepmark.backbones.scenes_judges import Reader
from stepmark.session import Session
from stepmark.tracks.image.metrics import classifier_features, moments
from stepmark.tracks.image.schedules import add_noise, schedule_of, uniform_times
from stepmark.tracks.scenes.captions import tokens
from stepmark.tracks.scenes.drawing import render
from stepmark.tracks.text_to_image import LATENT, adapters, layout
from stepmark.tracks.text_to_image.consistency import Pair, descend
from stepmark.tracks.text_to_image.distribution import predictions
from stepmark.tracks.text_to_image.rewards import log_probability

torch.set_num_threads(1)

EPS, FLOW, LAYOUT = "text_to_image/scenes_eps", "text_to_image/scenes_flow", "layout/scenes_eps"
hyper_sd, swd, aldm = (module_of(name) for name in ("hyper_sd", "swd", "aldm"))


# networks that are known exactly, and a small split ---------------------------------------------


class Words(nn.Module):
    """States that say how many tokens a caption has, by their first number."""

    def forward(self, ids: Tensor) -> Tensor:
        return (ids > 0).sum(1).double().view(-1, 1, 1).expand(-1, 32, 64).clone()


class Spot(nn.Module):
    """The exact network of data that lie in one point: -1 + gain (n / 10 + 1) for a caption of n tokens, -1 for the empty one.

    Guidance leads to -1 + w gain (n / 10 + 1). It keeps the shapes and the times that it is asked for.
    """

    def __init__(self, prediction: str = "epsilon", gain: float = 1.0) -> None:
        super().__init__()
        self.prediction, self.words = prediction, Words()
        self.asked: list[tuple[Tensor, Tensor]] = []
        if prediction == "epsilon":
            self.alphas_cumprod = scaled_linear()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, -10.0)

    def point(self, condition: Tensor) -> Tensor:
        return (-1 + self.gain * (condition[:, 0, 0] / 10 + 1)).view(-1, 1, 1, 1)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, *_: Any) -> Tensor:
        self.asked.append((x.detach(), t.detach()))
        schedule, point = schedule_of(self), self.point(condition)
        time = t.double() if schedule.flow else (t.double() + 1) / schedule.steps
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in (schedule.alpha(time), schedule.sigma(time)))
        eps = (x - alpha * point) / sigma.clamp(min=1e-12)
        return eps - point if schedule.flow else eps


class Bent(Spot):
    """A network that no path of its own is straight for."""

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, *_: Any) -> Tensor:
        self.asked.append((x.detach(), t.detach()))
        return self.gain * torch.tanh(x + t.view(-1, 1, 1, 1) / 1000 * condition[:, 0, 0].view(-1, 1, 1, 1))


class Every(nn.Module):
    """An autoencoder of a sort: every fourth pixel, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, :1]], 1)[..., ::4, ::4]

    def forward(self, z: Tensor) -> Tensor:
        return self.weight * z[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3)


class Shown(nn.Module):
    """A decoder that shows pictures that were made before."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__()
        self.weight, self.pictures = nn.Parameter(torch.zeros(())), pictures

    def decode(self, z: Tensor) -> Tensor:
        return self.pictures


def drawn(n: int, seed: int = 0, most: int = 3) -> dict[str, Any]:
    """Pictures of one, two, up to so many objects in turn."""
    rng = np.random.default_rng(seed)
    scenes = draw(1 + np.arange(n) % most, rng)
    return packed(scenes, captioned(scenes, rng))


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A train split of 16 pictures."""
    split = drawn(16)
    monkeypatch.setattr("stepmark.session.load_split", lambda *_: split)
    return split


def preparing(task: str, double: bool = True, **networks: nn.Module) -> Session:
    session = idle_session(task, **networks)
    session.dtype = torch.float64 if double else torch.float32
    session.begin("networks", 1)
    session.advance("prepare")
    return session


def asked(n: int = 4, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    noise = torch.randn(n, *LATENT, generator=torch.Generator().manual_seed(2), dtype=dtype)
    said = ("a red circle at top", "a blue square on black", "a green star at left", "a ring")
    return {"noise": noise, "condition": tokens((said * n)[:n])}


# the task of layouts ----------------------------------------------------------------------------


def test_the_truth_wins_and_another_picture_blur_and_forgotten_captions_lose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, n = layout.TASKS[0], 6
    data = drawn(n, seed=7, most=1)
    monkeypatch.setattr(layout, "load_split", lambda *_: data)
    batch = layout.inputs(task, n, torch.Generator().manual_seed(0), torch.device("cpu"))
    draws = torch.Generator().manual_seed(0)
    torch.testing.assert_close(batch["noise"], torch.randn(n, *LATENT, generator=draws))
    rows = torch.randperm(n, generator=draws)
    true, scenes = data["x0"][rows], scenes_of(data)[rows.numpy()]
    assert torch.equal(batch["condition"], data["tokens"][rows])
    torch.manual_seed(0)
    judge = Reader().eval()
    monkeypatch.setattr(layout, "_reference", lambda *_: moments(classifier_features(judge, true)))
    shown = {
        "true": true,
        "other": true.roll(1, 0),
        "blurred": avg_pool2d(true, 3, 1, 1),
        "recoloured": render(replace(scenes, colour=(scenes.colour + 3) % 8, background=(scenes.background + 4) % 8)),
    }
    resample = np.tile(np.arange(n), (2, 1))
    nets = {name: {"vae": Shown(pictures), "judge": judge} for name, pictures in shown.items()}
    found = {name: layout.score(task, batch, batch["noise"], pair, resample) for name, pair in nets.items()}
    assert all(set(each) == set(task.metrics) for each in found.values())
    miou, caption, fd = ({name: each[metric].value for name, each in found.items()} for metric in task.metrics)
    assert min(miou["true"], miou["recoloured"]) > 0.85 and caption["true"] > 0.8
    assert miou["other"] < 0.5 and caption["other"] < 0.2
    assert miou["blurred"] == caption["blurred"] == 0
    assert caption["recoloured"] < 0.2
    assert fd["true"] < 1e-3 < min(fd["blurred"], fd["recoloured"])
    assert found["true"]["miou"].resamples == pytest.approx([miou["true"]] * 2)


def test_layouts_show_the_shapes_that_are_in_front() -> None:
    data = drawn(30, seed=6)
    maps, scenes = layout.layouts_of(data, slice(None)), scenes_of(data)
    alone = scenes.there.sum(1) == 1
    for i in np.flatnonzero(alone):
        assert set(maps[i].unique().tolist()) == {0, 1 + scenes.shape[i, 0]}
    for i, j in zip(*np.nonzero(scenes.there), strict=True):  # areas are what radii say, but for what is hidden
        pixels = int((maps[i] == 1 + scenes.shape[i, j]).sum())
        assert pixels > 0.35 * 4 * scenes.radius[i, j] ** 2
    assert torch.equal(layout.layouts_of(data, torch.tensor([7, 3])), maps[[7, 3]])


def test_agreement_is_the_mean_over_classes_that_either_has() -> None:
    one, other = torch.zeros(2, 32, 32, dtype=torch.int64), torch.zeros(2, 32, 32, dtype=torch.int64)
    one[:, :16], other[:, :8] = 2, 2  # 512 pixels of which 256 agree; of the background 512 of 768
    one[1, 31] = 5  # a class that only one of them has
    for found in (layout.agreement(one, other), layout.agreement(other, one)):
        assert found[0] == pytest.approx((256 / 512 + 512 / 768) / 2)
        assert found[1] == pytest.approx((256 / 512 + 480 / 768 + 0) / 3)


# ALDM -------------------------------------------------------------------------------------------


def test_every_class_that_occurs_counts_alike() -> None:
    """The authors' weights: the mean is that over the classes of their means, by the number of logits."""
    draws = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 8, 16, 16, generator=draws)
    wanted = torch.zeros(3, 16, 16, dtype=torch.int64)
    wanted[0, :2, :3], wanted[1, 4:9, 4:5] = 3, 6
    errors = cross_entropy(logits, wanted, reduction="none")
    means = [errors[wanted == kind].mean() for kind in (0, 3, 6)]
    assert float(aldm.balanced(logits, wanted).mean()) == pytest.approx(float(torch.stack(means).mean() / 8))


def test_a_path_counts_as_its_mean_and_pulls_at_its_first_point() -> None:
    draws = torch.Generator().manual_seed(2)
    first = torch.rand(2, 4, 4, generator=draws, requires_grad=True)
    later = [torch.rand(2, 4, 4, generator=draws, requires_grad=True) for _ in range(3)]
    loss = aldm.along([first, *later])
    mean = torch.stack([first, *later]).mean(0)
    assert loss.item() == pytest.approx(mean.mean().item())
    loss.backward()
    torch.testing.assert_close(first.grad, (mean / first).detach() / first.numel())
    assert all(each.grad is None for each in later)
    alone = first.detach().clone().requires_grad_()
    aldm.along([alone]).backward()
    torch.testing.assert_close(alone.grad, torch.full_like(alone, 1 / alone.numel()))


def test_a_path_is_that_of_ddim_among_25_times() -> None:
    """Data in one point: x0 is that point everywhere, and the noise stays the same down to the data."""
    network, schedule = Spot(), schedule_of(Spot())
    batch = asked()
    states, noise, number = network.words(batch["condition"]), batch["noise"], torch.tensor([25, 25, 7, 3])
    times = torch.arange(26, dtype=torch.float64) / 25
    point = network.point(states).expand_as(noise)
    x = add_noise(schedule, point, noise, times[number])
    for k in range(3):
        eps, x0, x = aldm.advanced(network, x, number - k, states, None)
        torch.testing.assert_close(network.asked[-1][1], times[number - k] * 1000 - 1)
        torch.testing.assert_close(x0, point)
        torch.testing.assert_close(eps, noise)
        torch.testing.assert_close(x, add_noise(schedule, point, noise, times[number - k - 1]))
    torch.testing.assert_close(x[3], point[3])


def test_a_controlnet_begins_as_the_copied_half_that_adds_nothing() -> None:
    torch.manual_seed(3)
    painter = Painter()
    student = aldm.Controlled(painter)
    assert not any(p.requires_grad for p in painter.parameters())
    own, theirs = student.control.down_blocks.state_dict(), painter.unet.down_blocks.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    time = painter.unet.time_embedding.state_dict()
    assert all(torch.equal(value, time[name]) for name, value in student.control.time_embedding.state_dict().items())
    x, states, t = torch.randn(2, *LATENT), torch.randn(2, 32, 64), torch.tensor([100.0, 900.0])
    maps = torch.randint(7, (2, 32, 32))
    torch.testing.assert_close(student(x, t, states, maps), painter(x, t, states), rtol=0, atol=0)
    for layer in (*student.control.controlnet_down_blocks, student.control.controlnet_mid_block):
        nn.init.normal_(layer.weight)
    nn.init.normal_(student.control.controlnet_cond_embedding.conv_out.weight)
    one, other = (student(x, t, states, each) for each in (maps, maps.roll(1, 2)))
    assert not torch.allclose(one, other, atol=1e-3)
    torch.testing.assert_close(student(x, t, states, maps, 0.0), painter(x, t, states))


class Told(Bent):
    """A student with a ControlNet of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.control = nn.Linear(1, 1).double()

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, *_: Any) -> Tensor:
        return super().forward(x, t, condition) + self.control.bias


@pytest.mark.parametrize("path", [0, 2])
def test_the_segmenter_is_asked_along_the_path_in_every_eighth_update(
    monkeypatch: pytest.MonkeyPatch, few_pictures: dict[str, Any], path: int
) -> None:
    """Its lessons come first; what it says has no weight at the beginning; without a weight it is not asked at all."""
    told: list[str] = []
    maps = layout.layouts_of(few_pictures, slice(None))

    class Asked:
        def __init__(self, *_: Any) -> None: ...

        def learn(self, made: Tensor, real: Tensor, wanted: Tensor) -> None:
            told.append("learn")
            row = (maps == wanted[:1]).all((1, 2)).nonzero()[0, 0]  # the layout is that of the picture
            torch.testing.assert_close(real[0], Every().encode(few_pictures["x0"][row][None].double())[0])
            assert not made.requires_grad

        def judge(self, z: Tensor, wanted: Tensor) -> Tensor:
            told.append("slope" if z.requires_grad else "judge")
            return z.square().mean(1)

    monkeypatch.setattr(aldm, "Lessons", Asked)
    for weight in (0.1, 0.0):
        student, session = Told(), preparing(LAYOUT, teacher=Bent(), vae=Every())
        session.networks["student"] = student
        told.clear()
        aldm.controlnet(session, 17, 4, 1e-2, weight, path, 0.01, 1)
        whole = ["learn", "slope", *["judge"] * path]
        assert told == (["learn", *whole, *whole] if weight else [])
    times = [
        int(t.min()) for x, t in student.asked
    ]  # of the run without a weight: no estimate is too late for the path
    assert min(times) == (path + 1) * 40 - 1


@pytest.mark.parametrize("path", [0, 2])
def test_what_the_segmenter_says_is_to_fall_by_a_weight_that_grows(monkeypatch: pytest.MonkeyPatch, path: int) -> None:
    """Of 144 updates 17 are looked at: the weight is a third of itself in the 8th and whole in the 16th. The path goes down from
    the time that was drawn, by 40 timesteps a step.
    """
    said: list[float] = []
    losses: list[float] = []

    class Asked:
        def __init__(self, *_: Any) -> None: ...

        def learn(self, *_: Any) -> None: ...

        def judge(self, z: Tensor, wanted: Tensor) -> Tensor:
            said.append(float(z.square().mean()))
            return z.square().mean(1)

    monkeypatch.setattr(aldm, "Lessons", Asked)
    monkeypatch.setattr(aldm, "descend", lambda *_: [lambda loss: losses.append(loss.item())] * 17)
    found: dict[float, list[float]] = {}
    for weight in (0.1, 0.3):
        student, session = Told(), preparing(LAYOUT, teacher=Bent(), vae=Every())
        session.networks["student"] = student
        said.clear(), losses.clear()
        aldm.controlnet(session, 144, 4, 1e-2, weight, path, 0.01, 1)
        found[weight] = list(losses)
        for (_, t), (_, s) in pairwise(student.asked[-path - 1 :]):
            torch.testing.assert_close(t - s, torch.full_like(t, 40.0))
    gap = [more - less for less, more in zip(found[0.1], found[0.3], strict=True)]
    wanted = [0.0] * 17
    wanted[8], wanted[16] = 0.2 / 3 * float(np.mean(said[: path + 1])), 0.2 * float(np.mean(said[path + 1 :]))
    assert gap == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_layouts_are_told_to_both_halves_of_the_guided_step() -> None:
    class Mapped(Spot):
        def forward(self, x: Tensor, t: Tensor, condition: Tensor, *told: Any) -> Tensor:
            maps, strength = told
            assert len(maps) == len(x) and torch.equal(*maps.chunk(2)) and strength == 1.5
            return super().forward(x, t, condition)

    network, batch = Mapped(), asked()
    batch["layout"] = torch.randint(7, (4, 32, 32))
    out, spent = ran(idle_session(LAYOUT, student=network), method_of("aldm", strength=1.5), batch, 8)
    assert spent == 8
    states = network.words(batch["condition"])
    torch.testing.assert_close(out, (-1 + 3 * (network.point(states) + 1)).expand_as(out))


def test_a_segmenter_learns_layouts_and_what_was_made() -> None:
    data = drawn(4, seed=7)
    session = preparing(LAYOUT, False, teacher=Bent(), vae=nn.Identity())
    lessons, maps = aldm.Lessons(session, 1 / 8, 1, 2), layout.layouts_of(data, slice(None))
    for group in lessons.optimiser.param_groups:
        group["lr"] = 1e-2
    made = data["x0"].flip(1) * 0.3
    before = lessons.judge(data["x0"], maps).mean().item()
    for _ in range(30):
        lessons.learn(made, data["x0"], maps)
    assert lessons.judge(data["x0"], maps).mean().item() < 0.7 * before
    assert (lessons.seen(made).argmax(1) == aldm.FAKE).float().mean() > 0.8
    assert (lessons.seen(data["x0"]).argmax(1) == aldm.FAKE).float().mean() < 0.2


# SwD --------------------------------------------------------------------------------------------


def test_steps_are_at_the_times_of_the_authors_code() -> None:
    times = swd.grid()
    torch.testing.assert_close(times[[0, 7, 14, 18]], torch.tensor(method_of("swd").times), atol=6e-5, rtol=0)
    assert len(times) == 28 and 0 < float(times[-1]) < 0.01


@pytest.mark.parametrize("name", ["swd", "swd_two", "swd_one_token"])
def test_latents_grow_between_steps_and_are_noised_to_the_next_time(name: str) -> None:
    method, network, batch = method_of(name), Bent("flow"), asked()
    sides, times = method.sides, method.times
    session = idle_session(FLOW, student=network)
    out, spent = ran(session, method, batch, 4)
    assert spent == len(sides) and out.shape == batch["noise"].shape
    session.begin("run", 5, 16)
    x, states = batch["noise"][..., : sides[0], : sides[0]], network.words(batch["condition"])
    for i, (t, side) in enumerate(zip(times, sides, strict=True)):
        if i:
            large = x if sides[i - 1] == side else interpolate(x, scale_factor=side / sides[i - 1], mode="bicubic")
            x = (1 - t) * large + t * torch.randn(large.shape, generator=session.rng, dtype=x.dtype)
        torch.testing.assert_close(network.asked[i][0], x)
        assert float(network.asked[i][1][0]) == pytest.approx(t)
        x = x - t * network(x, torch.full((4,), t, dtype=x.dtype), states)
        network.asked.pop()
    torch.testing.assert_close(out, x)


def test_growing_steps_cost_seven_tenths_of_full_ones() -> None:
    network, spent = FlowPainter().eval(), {}
    for name in ("swd", "swd_full", "swd_two"):
        batch = {"noise": torch.randn(2, *LATENT), "condition": asked(2)["condition"]}
        with FlopCounterMode(display=False) as count:
            ran(idle_session(FLOW, student=network), method_of(name), batch, 4)
        spent[name] = count.get_total_flops()
    assert spent["swd"] < 0.7 * spent["swd_full"]
    assert spent["swd"] < 1.4 * spent["swd_two"]


def test_a_student_of_four_steps_has_no_fewer() -> None:
    from stepmark.method import Skip

    with pytest.raises(Skip):
        ran(idle_session(FLOW, student=Spot("flow")), method_of("swd"), asked(), 2)


def test_patches_are_matched_within_a_picture_and_in_any_order() -> None:
    draws = torch.Generator().manual_seed(4)
    made, real = (torch.randn(3, 9, 5, generator=draws, dtype=torch.float64) for _ in range(2))
    c = 0.001
    gap = (made.mean(1) - real.mean(1)).square()  # the squared MMD of a linear kernel, channel by channel
    kernel = torch.stack(
        [(made[:, :, None] * made[:, None]).mean((1, 2)), (real[:, :, None] * real[:, None]).mean((1, 2))]
    )
    torch.testing.assert_close(gap, kernel.sum(0) - 2 * (made[:, :, None] * real[:, None]).mean((1, 2)))
    assert float(swd.patch_loss(made, real)) == pytest.approx(float(((gap + c * c).sqrt() - c).mean()))
    assert float(swd.patch_loss(made, made[:, torch.randperm(9, generator=draws)])) == pytest.approx(0, abs=1e-9)
    assert float(swd.patch_loss(made, made.roll(1, 0))) > 0.1  # the same patches, in other pictures of the batch


def test_a_step_mends_the_picture_of_the_step_before(few_pictures: dict[str, Any]) -> None:
    """Pictures are encoded in every size, and what is enlarged is the same picture from the size before."""
    session = preparing(FLOW, teacher=Spot("flow"), vae=Every())
    data, pictures = swd.Pyramid(session, (4, 4, 6, 8), 12), few_pictures["x0"][:12].double()
    assert {side: tuple(x.shape) for side, x in data.x0.items()} == {s: (12, 4, s, s) for s in (4, 6, 8)}
    torch.testing.assert_close(data.x0[4], Every().encode(avg_pool2d(pictures, 2)))
    torch.testing.assert_close(data.x0[8], Every().encode(pictures))
    real, before, states = data.batch(5, 6, 4)
    rows = [int((data.x0[6] == each).all((1, 2, 3)).nonzero()[0]) for each in real]
    torch.testing.assert_close(before, interpolate(data.x0[4][rows], size=6, mode="bicubic"))
    torch.testing.assert_close(states, Words()(few_pictures["tokens"][rows]))
    torch.testing.assert_close(data.batch(5, 4, 4)[0].shape, data.batch(5, 4, 4)[1].shape)


def rivals_of(teacher: FlowPainter) -> Any:
    torch.manual_seed(8)
    session = preparing(FLOW, False, teacher=FlowPainter(48, 2))
    return swd.Rivals(session, teacher.requires_grad_(False), 1e-3)


def test_patches_are_looked_at_under_one_noise_by_the_teacher() -> None:
    """The same pictures cost nothing, whatever the noise, and the copy that learns has no say in it."""
    torch.manual_seed(9)
    rivals, states = rivals_of(FlowPainter(48, 2)), torch.randn(3, 32, 64)
    made, real = torch.randn(2, 3, 4, 6, 6)
    only = (0.0, 0.0, 1.0)
    assert float(rivals.loss(real, real, states, only)) == 0
    found = []
    for _ in range(2):
        rivals.rng.manual_seed(3)
        found.append(float(rivals.loss(made, real, states, only)))
        for p in rivals.fake.parameters():
            nn.init.normal_(p)
    assert found[0] == found[1] > 0


def test_the_tuned_teacher_and_the_copy_that_learns_pull_at_what_is_made() -> None:
    """Of matching alone: the slope at x is (x0_fake - x0_teacher) / mean |x - x0_teacher|, guided and not, over its numbers."""
    torch.manual_seed(10)
    teacher = FlowPainter(48, 2)
    rivals, states = rivals_of(teacher), torch.randn(3, 32, 64)
    for p in rivals.fake.transformer.parameters():
        nn.init.normal_(p, std=0.05)
    made = torch.randn(3, 4, 6, 6, requires_grad=True)
    rivals.rng.manual_seed(4)
    rivals.loss(made, made.detach(), states, (1.0, 0.0, 0.0)).backward()
    rivals.rng.manual_seed(4)
    t = rivals.times(3, 12)
    assert float(rivals.grid[12]) >= float(t.max())
    x = add_noise(rivals.schedule, made.detach(), rivals.noise(made), t)
    with torch.no_grad():
        fake = predictions(rivals.fake, x, t, states, rivals.schedule)[0]
        true = predictions(teacher, x, t, states, rivals.schedule, 3.0)[0]
    gap = (made - true).abs().mean((1, 2, 3), keepdim=True)
    assert made.grad is not None
    torch.testing.assert_close(made.grad * made.numel(), ((fake - true) / gap).detach(), rtol=1e-3, atol=1e-5)


def test_the_copy_learns_the_score_of_what_is_made_and_its_head_tells_it_from_real() -> None:
    torch.manual_seed(11)
    rivals, states = rivals_of(FlowPainter(48, 2)), torch.randn(4, 32, 64)
    made, real = torch.full((4, 4, 4, 4), 0.7), torch.full((4, 4, 4, 4), -0.7)

    def told(z: Tensor) -> float:
        return float(rivals.loss(z, z, states, (0.0, 1.0, 0.0)))

    def error() -> float:
        x, t = (
            0.5 * made + 0.5 * torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(6)),
            torch.full((4,), 0.5),
        )
        with torch.no_grad():
            return float((predictions(rivals.fake, x, t, states, rivals.schedule)[0] - made).square().mean())

    before = error()
    for _ in range(25):
        rivals.learn(made, real, states)
    assert error() < 0.7 * before
    assert told(real) < told(made)
    assert all(p.grad is None for p in rivals.teacher.parameters())


def test_a_student_is_given_the_picture_of_the_step_before_and_the_copy_has_its_lessons_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With noise of 0 step i is given (1 - t_i) of the picture, enlarged from the size before; the real one is in its own."""
    told: list[tuple[str, Tensor, Tensor]] = []
    given: list[tuple[Tensor, float]] = []
    sides, times, weights = (4, 6, 8), (0.9, 0.7, 0.6), (1.0, 5e-3, 1.0)

    class Listening:
        def __init__(self, *_: Any) -> None: ...

        def noise(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

        def learn(self, made: Tensor, real: Tensor, states: Tensor) -> None:
            told.append(("learn", made, real))

        def loss(self, made: Tensor, real: Tensor, states: Tensor, asked: Any) -> Tensor:
            assert tuple(asked) == weights
            told.append(("loss", made, real))
            return made.square().mean()

    def denoised(network: Any, x: Tensor, time: float, states: Tensor) -> Tensor:
        given.append((x, time))
        return network.gain * x

    monkeypatch.setattr(swd, "Rivals", Listening)
    monkeypatch.setattr(swd, "denoised", denoised)
    monkeypatch.setattr(swd, "fit", lambda session, network, loss, updates, *_, **__: [loss() for _ in range(updates)])
    session = preparing(FLOW, teacher=Spot("flow"), vae=Every())
    session.networks["student"] = session.clone("teacher")
    swd.student_of(session, sides, times, weights, 3, 2, 4, 12, 1, 1e-3, 1e-3)
    assert [kind for kind, _, _ in told] == ["learn", "learn", "loss"] * 3
    assert [made.requires_grad for _, made, _ in told] == [False, False, True] * 3
    data = swd.Pyramid(session, sides, 12)
    for number, ((x, time), (_, _, real)) in enumerate(zip(given, told, strict=True)):
        i = number // 3
        rows = [int((data.x0[sides[i]] == each).all((1, 2, 3)).nonzero()[0]) for each in real]
        small = data.x0[sides[max(i - 1, 0)]][rows]
        assert time == times[i]
        torch.testing.assert_close(x, (1 - time) * swd.enlarged(small, sides[i]))


def test_students_and_their_controls_are_trained_alike(few_pictures: dict[str, Any]) -> None:
    """The forced student is the full one; small sides have a tuned teacher, the full size has the teacher as it is."""
    teacher = FlowPainter(48, 2).requires_grad_(False)
    asked_for: list[str] = []

    class Counted(Session):
        def once(self, function: Any, *literals: Any) -> Any:
            asked_for.append(f"{function.__name__}{literals}")
            return super().once(function, *literals)

    for name in ("swd_full", "swd_forced", "swd"):
        session = preparing(FLOW, False, teacher=teacher, vae=RECIPES["scenes_vae"].build())
        session.__class__ = Counted
        session.networks["student"] = session.clone("teacher")
        method_of(name).prepare(session)
    full, forced, *own = (each for each in asked_for if not each.startswith("shrunk"))  # how pictures are encoded
    assert full == forced
    assert [each.split("(")[0] for each in own] == ["student_of", "resized_teacher"]


# Hyper-SD ---------------------------------------------------------------------------------------


def pair_of(t: Tensor, s: Tensor) -> Pair:
    batch, n = asked(len(t)), len(t)
    x = torch.randn(4, n, *LATENT, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    states = Words()(batch["condition"])
    return Pair(x[0], t, x[1], s, states, batch["condition"], torch.full_like(t, 3.0), x[2], x[3])


def test_segments_are_equal_and_join_in_pairs() -> None:
    schedule, t = schedule_of(Spot()), torch.arange(1, 41, dtype=torch.float64) / 40
    found = {k: hyper_sd.ends(t, k, schedule) for k in (8, 4, 2, 1)}
    for k, s in found.items():
        assert s.unique(return_counts=True)[1].tolist() == [40 // k] * k
        assert (s < t).all() and (t - s <= 1 / k + 1e-9).all()
        assert float(s[0]) == 0.001
        torch.testing.assert_close(hyper_sd.ends(t.float(), k, schedule), s.float())
    for many, few in pairwise((8, 4, 2, 1)):
        assert set(found[few].tolist()) == set(sorted(set(found[many].tolist()))[::2])


def test_a_jump_stays_where_it_is_and_two_are_one_along_an_exact_path() -> None:
    network, t = Spot(), torch.tensor([0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
    schedule, batch = schedule_of(network), asked()
    states, x = network.words(batch["condition"]), batch["noise"]
    for other in (network, Bent()):
        torch.testing.assert_close(hyper_sd.jump(other, x, t, t, states, schedule), x)
    middle, end = 0.6 * t, 0.2 * t
    twice = hyper_sd.jump(
        network, hyper_sd.jump(network, x, t, middle, states, schedule), middle, end, states, schedule
    )
    torch.testing.assert_close(twice, hyper_sd.jump(network, x, t, end, states, schedule))


def test_both_points_of_a_pair_go_to_the_beginning_of_the_first_ones_segment() -> None:
    """Where a step of the teacher ends a segment, its end is the target; else it is where the student gets to from there."""
    session = preparing(EPS, teacher=Bent(), vae=Every())
    pairs, student = hyper_sd.Segments(session, None, 4), Bent(gain=0.7)
    t = torch.tensor([3, 10, 26, 40], dtype=torch.float64) / 40
    pair = pair_of(t, t - 1 / 40)
    target = pairs.reached(student, pair, 40)[1].target
    torch.testing.assert_close(target, pair.ahead)
    found, filled, s = pairs.reached(student, pair, 4)
    torch.testing.assert_close(s, torch.tensor([0.001, 0.001, 0.5, 0.75], dtype=torch.float64))
    assert found.requires_grad and not filled.target.requires_grad
    for i in range(4):
        one = (v[i : i + 1] for v in (pair.ahead, pair.s, s, pair.states))
        torch.testing.assert_close(filled.target[i : i + 1], hyper_sd.jump(student, *one, pairs.schedule).detach())


def test_a_student_finds_where_its_guided_teacher_ends_through_all_stages() -> None:
    session = preparing(EPS, teacher=Spot(), vae=Every())
    pairs, student = hyper_sd.Segments(session, hyper_sd.Latents(session), 16), Spot(gain=1.5)
    for k in (8, 1):
        for step in descend(session, [student.gain], 40, 0.3):
            found, pair, _ = pairs.reached(student, pairs.draw(), k)
            step((found - pair.target).square().mean())
    assert student.gain.item() == pytest.approx(3.0, rel=0.05)


def test_the_adversary_weighs_more_the_fewer_segments_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of 4 and an adversary that says 7, a tenth of which counts: by 1 / 16 of 8 segments, by 1 / 2 of one."""
    t = torch.tensor([0.5, 1.0], dtype=torch.float64)
    pair = replace(pair_of(t, t), target=torch.zeros(2, *LATENT, dtype=torch.float64))
    losses: list[float] = []
    taught: list[Tensor] = []

    class Judge:
        def __init__(self, *_: Any) -> None: ...

        def loss(self, *_: Any) -> Tensor:
            return torch.tensor(7.0)

        def learn(self, found: Tensor, *_: Any) -> None:
            taught.append(found)

    monkeypatch.setattr(hyper_sd, "Adversary", Judge)
    monkeypatch.setattr(hyper_sd, "adapt", lambda network, *_: network)
    monkeypatch.setattr(hyper_sd, "tensors", lambda *_: {})
    monkeypatch.setattr(hyper_sd.Segments, "draw", lambda self: pair)
    monkeypatch.setattr(
        hyper_sd.Segments, "reached", lambda self, student, pair, k: (torch.full_like(pair.x, 2.0), pair, pair.s)
    )
    monkeypatch.setattr(hyper_sd, "descend", lambda *_: [lambda loss: losses.append(loss.item())])
    hyper_sd.segmented(preparing(EPS, teacher=Bent(), vae=Every()), (8, 1), 1, 2, 1e-3, 0.1)
    assert losses == pytest.approx([15 / 16 * 4 + 0.7 / 16, 4 / 2 + 0.7 / 2])
    assert len(taught) == 2
    losses.clear()
    hyper_sd.segmented(preparing(EPS, teacher=Bent(), vae=Every()), (8, 1), 1, 2, 1e-3, 0.0)
    assert losses == pytest.approx([4, 4]) and len(taught) == 2


def test_the_reward_is_climbed_and_then_the_pull_is_gone_against(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slopes in the student's number: of the reward 5, downwards by its weight; of a pull of 2 everywhere that of the point."""
    kept: list[Any] = []
    slopes: list[float] = []
    asked_of: list[Tensor] = []

    class Pull:
        def __init__(self, session: Session, **options: Any) -> None:
            assert options["own_guidance"] == 1.0

        def times(self, n: int) -> Tensor:
            return torch.ones(n, dtype=torch.float64)

        def pull(self, x: Tensor, states: Tensor, t: Tensor) -> Tensor:
            asked_of.append(states)
            return torch.full_like(x, 2.0)

        def learn(self, x: Tensor, states: Tensor) -> None: ...

    def adapt(network: Any, *_: Any) -> Any:
        kept.append(network)
        return network

    def step(loss: Tensor) -> None:
        kept[0].gain.grad = None
        loss.backward()
        slopes.append(kept[0].gain.grad.item())

    session = preparing(EPS, teacher=Spot(), vae=Every())
    monkeypatch.setattr(session, "once", lambda *_: {})
    monkeypatch.setattr(hyper_sd, "Latents", lambda session: None)
    monkeypatch.setattr(hyper_sd, "Scores", Pull)
    monkeypatch.setattr(hyper_sd, "adapt", adapt)
    monkeypatch.setattr(hyper_sd, "tensors", lambda *_: {})
    monkeypatch.setattr(hyper_sd, "descend", lambda *_: [step])
    monkeypatch.setattr(hyper_sd.Segments, "consistent", lambda self, student: torch.tensor(3.0, dtype=torch.float64))
    monkeypatch.setattr(hyper_sd, "liked", lambda session, student, *_: 5 * student.gain.expand(4))
    hyper_sd.unified(session, (1,), (1, 1, 1), 4, 1e-3, 0.1, 0.5, 0.25)
    point = float((asked_of[0][:, 0, 0] / 10 + 1).mean())  # how fast the exact network's point moves
    assert slopes == pytest.approx([-0.5 * 5, 0.25 * 2 * point], rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_steps_are_those_of_the_scheduler_that_the_authors_use(n: int) -> None:
    from diffusers import TCDScheduler

    network, batch = Bent(), asked()
    method, session = method_of("hyper_sd"), idle_session(EPS, student=network)
    _, spent = ran(session, method, batch, n)
    assert spent == n
    oracle = TCDScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    oracle.set_timesteps(timesteps=[round(1000 * t - 1) for t in uniform_times(n)[:-1]])
    session.begin("run", 5, 4 * n)
    x, states = batch["noise"], network.words(batch["condition"])
    for i, t in enumerate(oracle.timesteps):
        torch.testing.assert_close(network.asked[i][0], x, rtol=1e-4, atol=1e-4)
        assert float(network.asked[i][1][0]) == pytest.approx(float(t))
        eps = network(x, torch.full((4,), float(t), dtype=x.dtype), states)
        network.asked.pop()
        x = oracle.step(eps, t, x, eta=hyper_sd.ETA, generator=session.rng).prev_sample
    assert ran(session, method, batch, 64)[1] == 8


def test_one_adapter_goes_on_from_stage_to_stage_and_is_merged_in_the_end() -> None:
    torch.manual_seed(12)
    base, rng = Painter(), torch.Generator().manual_seed(0)
    first = adapters.adapt(Painter(), rng)
    first.load_state_dict({**first.state_dict(), **plain(base, first)})
    for name, p in first.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    kept = adapters.tensors(first)
    names = list(kept)
    random.Random(0).shuffle(names)  # a cache keeps no order
    second = adapters.adapt(Painter(), rng)
    second.load_state_dict({**second.state_dict(), **plain(base, second)})
    hyper_sd.put(second, {name: kept[name] for name in names})
    x, t, states = torch.randn(2, *LATENT), torch.tensor([10.0, 700.0]), torch.randn(2, 32, 64)
    with torch.no_grad():
        wanted = first(x, t, states)
        torch.testing.assert_close(second(x, t, states), wanted)
        adapters.merge(base, kept, adapters.ALPHA)
        torch.testing.assert_close(base(x, t, states), wanted, rtol=1e-3, atol=1e-4)


def plain(base: nn.Module, adapted: nn.Module) -> dict[str, Tensor]:
    """The weights of a network by the names that they have in an adapted one."""
    own = base.state_dict()
    return {name: own[name.replace(".base.", ".")] for name in adapted.state_dict() if "lora" not in name}


def test_an_adversary_learns_what_targets_look_like_and_its_loss_says_so() -> None:
    session = preparing(EPS, False, teacher=RECIPES["scenes_eps"].build().requires_grad_(False))
    adversary = hyper_sd.Adversary(session, 1e-2)
    t = torch.tensor([0.6, 0.4])
    s = hyper_sd.ends(t, 8, adversary.schedule)
    x, states = torch.randn(3, 2, *LATENT, generator=torch.Generator().manual_seed(5)), torch.randn(2, 32, 64)
    pair = Pair(x[0], t, x[1], t, states, states, t, x[2], x[2], target=torch.full_like(x[0], 0.8))
    made = torch.full_like(x[0], -0.8).requires_grad_()
    for _ in range(25):
        adversary.learn(made, pair, s)
    assert made.grad is None
    loss = adversary.loss(made, pair, s)
    assert float(loss) > 2 * float(adversary.loss(pair.target, pair, s))
    loss.backward()
    assert made.grad is not None and float(made.grad.abs().sum()) > 0
    for _ in range(5):
        u, _ = adversary.shaken(s, pair)
        assert (s <= u).all() and (u <= t).all()


def test_more_noise_leaves_points_where_their_times_say() -> None:
    schedule = schedule_of(Spot())
    s, u = torch.tensor([0.001, 0.2, 0.5], dtype=torch.float64), torch.tensor([0.3, 0.2, 0.9], dtype=torch.float64)
    x0 = torch.randn(3, *LATENT, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    none, unit = torch.zeros_like(x0), torch.ones_like(x0)
    clean = hyper_sd.noisier(schedule, add_noise(schedule, x0, none, s), s, u, none)
    torch.testing.assert_close(clean, add_noise(schedule, x0, none, u))
    parts = [
        hyper_sd.noisier(schedule, add_noise(schedule, none, old, s), s, u, new)
        for old, new in ((unit, none), (none, unit))
    ]
    total = parts[0].square() + parts[1].square()
    torch.testing.assert_close(total, schedule.sigma(u).square().view(-1, 1, 1, 1).expand_as(total))


def test_feedback_has_a_slope_in_one_step_only_and_reads_what_is_painted() -> None:
    class Taste(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3))[:, None] * torch.linspace(-1, 1, 224, dtype=x.dtype)

    session = preparing(EPS, teacher=Spot(), vae=Every(), reward=Taste())
    student, batch = Bent(), asked()
    states, counts = student.words(batch["condition"]), set()
    for _ in range(12):
        student.asked.clear()
        student.gain.grad = None
        found = hyper_sd.liked(session, student, batch["noise"], batch["condition"], states)
        counts.add(len(student.asked))
        x, t = student.asked[-1]  # from that point on by hand: its slope must be this and no more
        again = Bent()
        x0 = predictions(again, x, (t + 1) / 1000, states, schedule_of(again))[0]
        wanted = log_probability(Taste()(Every()(x0).clamp(-1, 1)), batch["condition"])
        torch.testing.assert_close(found, wanted)
        found.sum().backward()
        wanted.sum().backward()
        torch.testing.assert_close(student.gain.grad, again.gain.grad)
    assert min(counts) == 1 and 1 < max(counts) <= 8
