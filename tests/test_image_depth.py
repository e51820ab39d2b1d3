"""Pairs of colour and depth: the rooms they show, the network that draws them, and the judge that learns from them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from stepmark.datasets import scenes16
from torch import Tensor, nn

from stepmark import backbones, plugins, samples
from stepmark.backbones import rgbd
from stepmark.cell import track_of
from stepmark.meter.counts import Ledger, watch
from stepmark.session import Session
from stepmark.task import BadOutput, digest_of, load_split
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser

torch.set_num_threads(1)

TASK = "training_pairs/scenes16"
depth = importlib.import_module("stepmark.tracks.image.depth")
d4d: Any = importlib.import_module("stepmark.methods.image.d4d_rgbd")
FREE = ("real_pairs_only", "engine_pairs", "augmented_pairs", "mirrored_pairs")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run_of(method: str, n: int = 6, rung: int = 3) -> tuple[Tensor, float]:
    """What a method returns at smoke for n items, and how many rows of the network it spent."""
    plugin = plugins.load_class(plugins.methods()[method])()
    spec, ledger = track_of(TASK)[1], Ledger()
    networks = {"teacher": watch(ledger, "teacher", backbones.load("scenes16_rgbd"))}
    session = Session(spec, "smoke", torch.device("cpu"), torch.float32, networks, {}, ledger, False)
    session.begin("prepare", 1)
    session.state = plugin.prepare(session) or {}
    session.begin("run", 2, rung * n)
    batch = depth.inputs(spec, n, generator(3), torch.device("cpu"))
    with torch.no_grad():
        found = plugin.run(session, batch, rung)
    depth.check(spec, batch, found)
    return found, session.spent


# --- rooms ------------------------------------------------------------------------------------------------------------


def room(*objects: tuple[int, float, float, float, float], wall: float = 6.0, **more: Any) -> scenes16.Rooms:
    """One plain room, evenly lit, with objects (kind, sideways, distance, half the width, height) of colours of their own."""
    k = len(objects)
    fields: dict[str, Any] = {
        "wall": np.array([wall]),
        "kind": np.array([[each[0] for each in objects]], dtype=np.int64).reshape(1, k),
        "place": np.array([[each[1:3] for each in objects]]).reshape(1, k, 2),
        "extent": np.array([[each[3:5] for each in objects]]).reshape(1, k, 2),
        "albedo": np.array([[[0.2, 0.2, 0.2], [0.4, 0.4, 0.4], *np.eye(3)[:k]]]),
        "check": np.tile([0.0, 1.0], (1, k + 2, 1)),
        "light": np.array([[0.0, 0.0, 1.0]]),
        "ambient": np.array([1.0]),
        "exposure": np.array([1.0]),
        "haze": np.array([np.inf]),
        "noise": 0.0,
    }
    return scenes16.Rooms(**(fields | more))


def shown(rooms: scenes16.Rooms) -> tuple[Tensor, Tensor]:
    """Colour [3, 16, 16] in [0, 1] and depth in metres [16, 16] of the first room."""
    pair = scenes16.render(rooms, np.random.default_rng(0))[0]
    return (pair[:3] + 1) / 2, scenes16.metres(pair[3])


def test_splits_are_what_their_digests_say() -> None:
    assert set(scenes16.DATASET.digests) == {"train", "test"}
    train, test = (load_split("scenes16", name) for name in ("train", "test"))  # which checks the digests
    assert train["x0"].shape == (100, 4, 16, 16) and test["x0"].shape == train["engine"].shape == (1000, 4, 16, 16)
    for pairs in (train["x0"], train["engine"], test["x0"]):
        assert pairs.abs().max() <= 1 and len(pairs.unique(dim=0)) == len(pairs)
    assert torch.cdist(test["x0"].flatten(1), train["x0"].flatten(1)).min() > 1  # no scene is in both


def test_depth_is_that_of_the_geometry() -> None:
    """Floor and wall by hand: a ray that falls v per metre meets the floor at eye height / v, if no wall is before."""
    _, found = shown(room())
    middle = (torch.arange(16) + 0.5) / 16
    fall = 2 * scenes16.FIELD * (middle - scenes16.HORIZON)
    expected = torch.where(fall > 0, scenes16.EYE / fall.clamp(min=1e-9), torch.inf).clamp(max=6)
    torch.testing.assert_close(found, expected[:, None].expand(16, 16).float(), atol=2e-3, rtol=0)


def test_the_nearer_object_hides_the_farther_one_in_colour_and_depth() -> None:
    far, near = (0, 0.0, 4.0, 1.0, 1.6), (0, 0.3, 2.0, 0.3, 1.0)
    colour, metres = shown(room(far, near))
    green = (colour[1] == 1) & (colour[0] == 0)  # where nothing but the nearer one is
    red = (colour[0] == 1) & (colour[1] == 0)
    assert green.sum() > 4 and red.sum() > 4
    assert (metres[green] == 2).all() and (metres[red] == 4).all()
    alone, _ = shown(room((0, 9.0, 4.0, 1.0, 1.6), near))  # the other one out of view
    assert torch.equal((alone[1] == 1) & (alone[0] == 0), green)
    swapped = room(near, far)
    looks = {"albedo": room(far, near).albedo[:, [0, 1, 3, 2]]}
    for one, other in zip(shown(replace(swapped, **looks)), (colour, metres), strict=True):
        assert torch.equal(one, other)  # the order in which they are listed is nothing


def test_what_is_twice_as_far_is_half_as_large_and_hazier() -> None:
    def cover(distance: float, kind: int) -> float:
        with_it, without = shown(room((kind, 0.0, distance, 0.4, 0.8)))[0], shown(room())[0]
        return float((with_it[0] - without[0]).clamp(min=0).sum())

    for kind in (0, 1, 2):
        assert cover(2, kind) / cover(4, kind) == pytest.approx(4, rel=0.25)
    assert torch.equal(shown(room((0, 0.0, np.inf, 0.4, 0.8)))[0], shown(room())[0])  # one that is not there
    hazes = [shown(room(wall=wall, haze=np.array([8.0])))[0][:, 0, 0] for wall in (3.0, 6.0)]
    away = [float((colour - torch.tensor([0.75, 0.8, 0.85])).norm()) for colour in hazes]
    assert away[1] < away[0]


def test_round_things_are_lit_from_the_side_of_the_light_and_curve_away() -> None:
    light = np.array([[0.8, 0.36, 0.48]])
    colour, metres = shown(room((1, 0.0, 1.6, 0.6, 0), light=light, ambient=np.array([0.3])))
    ball = colour[0] > 1.2 * colour[1]
    columns = ball.nonzero()[:, 1]
    right, left = (ball & (torch.arange(16) > 9)), (ball & (torch.arange(16) < 6))
    assert colour[0][right].mean() > 1.5 * colour[0][left].mean()
    assert metres[ball].min() < 1.7 and metres[:, columns.min()][ball[:, columns.min()]].min() > 1.75


# --- the network ----------------------------------------------------------------------------------------------------------


def test_only_the_first_and_the_last_convolution_are_not_those_of_a_network_of_colours() -> None:
    pairs, colours = (rgbd.network_of(channels).state_dict() for channels in (4, 3))
    assert pairs.keys() == colours.keys()
    changed = {name for name in pairs if pairs[name].shape != colours[name].shape}
    assert changed == {"unet.conv_in.weight", "unet.conv_out.weight", "unet.conv_out.bias"}
    patch = backbones.load("scenes16_rgbd").patch
    both = (pairs["unet.conv_in.weight"].shape[1] - 2) / patch**2, len(pairs["unet.conv_out.bias"]) / patch**2
    assert both == (4, 4)  # besides the two coordinates that every such network sees


def test_colour_and_depth_are_drawn_together() -> None:
    """The trained network uses each for the other, and what it draws agrees far better than what is put together."""
    network, real = backbones.load("scenes16_rgbd"), load_split("scenes16", "test")["x0"][:200]
    torn = torch.cat([real[:, :3], real[:, 3:].roll(1, 0)], 1)
    untrained = rgbd.network_of(4).eval()
    assert rgbd.noise_loss(network, real) < 0.5 * rgbd.noise_loss(untrained, real)
    assert rgbd.noise_loss(network, real) < 0.97 * rgbd.noise_loss(network, torn)
    noise = torch.randn(60, 4, 16, 16, generator=generator(5))
    drawn = d4d.sample_pairs(network, noise, torch.zeros(60, dtype=torch.int64), 10)
    torn = torch.cat([drawn[:, :3], drawn[:, 3:].roll(1, 0)], 1)
    assert depth.edge_agreement(drawn).mean() > depth.edge_agreement(torn).mean() + 0.1


class Known(nn.Module):
    """The exact noise prediction of data that are one pair; keeps the times that it was asked for."""

    prediction = "epsilon"

    def __init__(self, pair: Tensor) -> None:
        super().__init__()
        self.pair, self.asked = pair, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        abar = rgbd.alphas_cumprod()[t.round().long()].float().view(-1, 1, 1, 1)
        self.asked.append(float(t[0]))
        return (x - abar.sqrt() * self.pair) / (1 - abar).sqrt()


def test_samples_of_a_known_model_are_its_data_at_any_number_of_steps() -> None:
    pair = load_split("scenes16", "test")["x0"][:1]
    noise = torch.randn(5, 4, 16, 16, generator=generator(6))
    for steps in (1, 4):
        network = Known(pair)
        found = d4d.sample_pairs(network, noise, torch.zeros(5, dtype=torch.int64), steps)
        torch.testing.assert_close(found, pair.expand_as(found), atol=2e-3, rtol=0)
        assert network.asked == pytest.approx([1000 * (1 - i / steps) - 1 for i in range(steps)], abs=1e-3)


class Linear(nn.Module):
    """The exact noise prediction of data N(0, 1/4)."""

    prediction = "epsilon"

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        abar = rgbd.alphas_cumprod()[t.round().long()].float().view(-1, 1, 1, 1)
        return (1 - abar).sqrt() / (abar / 4 + 1 - abar) * x


def test_steps_are_those_of_ddim_where_nothing_leaves_the_range_of_the_data() -> None:
    ddim = importlib.import_module("stepmark.methods.image.baselines.ddim").DDIM
    noise, wish = torch.randn(5, 4, 16, 16, generator=generator(6)), torch.zeros(5, dtype=torch.int64)
    for scale, alike in ((0.2, True), (3.0, False)):
        found = d4d.sample_pairs(Linear(), scale * noise, wish, 5)
        plain = ddim.solve(Denoiser(Linear(), wish), scale * noise, uniform_times(5))
        assert torch.allclose(found, plain, atol=1e-5) == alike
        assert found.abs().max() <= 1


# --- methods ---------------------------------------------------------------------------------------------------------------


def test_pairs_from_elsewhere_cost_no_evaluation_and_are_what_they_say() -> None:
    train = load_split("scenes16", "train")
    for method, source in zip(FREE, ("x0", "engine", None, None), strict=True):
        found, spent = run_of(method, 40)
        assert spent == 0
        if source is not None:
            assert all(any(torch.equal(one, other) for other in train[source]) for one in found)
            assert len(found.unique(dim=0)) > 20
    real, found = train["x0"], run_of("mirrored_pairs", 40)[0]
    kept, turned = (
        sum(any(torch.equal(one, other) for other in pairs) for one in found) for pairs in (real, real.flip(3))
    )
    assert kept + turned == 40 and 8 < kept < 32
    found, spent = run_of("d4d_rgbd", 6, 3)
    assert spent == 3 * 6 and found.shape == (6, 4, 16, 16)


def test_augmentation_moves_colour_and_depth_alike() -> None:
    real = load_split("scenes16", "train")["x0"]
    whole = d4d.augmented(real, generator(1), 16)
    mirrored = torch.stack([(a - b).abs().max() < 1e-4 for a, b in zip(whole.flip(3), real, strict=True)])
    same = torch.stack([(a - b).abs().max() < 1e-4 for a, b in zip(whole, real, strict=True)])
    assert (mirrored | same).all() and 30 < int(mirrored.sum()) < 70
    axis = torch.linspace(-0.9, 0.9, 16)
    ramp = torch.stack([axis[None].expand(16, 16), axis[:, None].expand(16, 16)])
    pairs = torch.stack([ramp[0], ramp[1], ramp[1], ramp[0]]).expand(50, -1, -1, -1)
    found = d4d.augmented(pairs, generator(2))
    assert (found[:, 0] - found[:, 3]).abs().max() < 0.07  # within a pixel: depth is not blurred
    spans = found[:, 1].amax((1, 2)) - found[:, 1].amin((1, 2))
    assert 1.3 < spans.min() < 1.45 and 1.7 < spans.max() <= 1.801  # windows of 12 to 16 pixels


# --- the judge ---------------------------------------------------------------------------------------------------------------


def rooms(n: int, seed: int) -> Tensor:
    """More pairs of the real style."""
    rng = np.random.default_rng(seed)
    return scenes16.render(scenes16.real_rooms(n, rng), rng)


def test_the_judge_learns_from_pairs_that_belong_together() -> None:
    real, more = load_split("scenes16", "train")["x0"][:8], rooms(300, 9)
    torn = torch.cat([more[:, :3], more[:, 3:].roll(1, 0)], 1)
    held_out = load_split("scenes16", "test")["x0"][:300]
    good, bad = (depth.errors(depth.trained_on(real, pairs, 1, 150), held_out) for pairs in (more, torn))
    assert good[0].mean() < 0.9 * bad[0].mean()
    assert good[1].mean() > bad[1].mean()


def test_the_judge_hangs_on_seed_and_pairs_alone() -> None:
    real, pairs = load_split("scenes16", "train")["x0"][:20], rooms(20, 8)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = depth.trained_on(real, pairs, 5, 2).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (depth.trained_on(real, pairs, seed, 2).state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    moved = depth.trained_on(real, pairs.flip(3), 5, 2).state_dict()
    assert not all(torch.equal(first[name], moved[name]) for name in first)


def test_errors_and_losses_against_hand_made_depths() -> None:
    scenes = rooms(12, 7)

    class Wrong(nn.Module):
        """The true depth times a factor."""

        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, colour: Tensor) -> Tensor:
            which = [int((scenes[:, :3] == one).all((1, 2, 3)).nonzero()) for one in colour]
            return depth.log_metres(scenes[which, 3:]) + np.log(self.factor)

    for factor, close in ((1.0, 1.0), (1.2, 1.0), (0.81, 1.0), (1.3, 0.0), (0.75, 0.0)):
        squares, share = depth.errors(Wrong(factor), scenes)
        metres = scenes16.metres(scenes[:, 3]).double()
        np.testing.assert_allclose(squares, ((factor - 1) * metres).square().mean((1, 2)), rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(share, close)
    maps = depth.log_metres(scenes[:, 3:])
    assert float(depth.depth_loss(maps, maps)) == pytest.approx(0, abs=1e-6)
    assert float(depth.depth_loss(maps + 0.3, maps)) >= 0.3  # a shift changes no slope
    assert float(depth.depth_loss(maps.mean((2, 3), keepdim=True).expand_as(maps), maps)) > 0.3
    assert float(depth.dissimilarity(maps, maps.roll(1, 0))) > float(depth.dissimilarity(maps, maps + 0.01))


def test_edges_agree_where_they_coincide() -> None:
    real = load_split("scenes16", "test")["x0"]
    torn = torch.cat([real[:, :3], real[:, 3:].roll(1, 0)], 1)
    assert depth.edge_agreement(real).mean() > depth.edge_agreement(torn).mean() + 0.1
    step = torch.where(torch.arange(16) < 7, -0.5, 0.5).expand(1, 1, 16, 16)
    assert float(depth.edge_agreement(step.expand(1, 4, 16, 16))) == pytest.approx(1)
    crossed = torch.cat([step.expand(1, 3, 16, 16), step.mT], 1)
    assert float(depth.edge_agreement(crossed)) < 0.2
    assert float(depth.edge_agreement(torch.zeros(1, 4, 16, 16))) == 0


def test_scores_resample_scenes_and_pair_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    task = track_of(TASK)[1]
    batch = depth.inputs(task, 30, generator(1), torch.device("cpu"))
    assert batch["noise"].shape == (30, 4, 16, 16)
    asked = []
    real_training = depth.trained_on

    def noted(real: Tensor, pairs: Tensor, seed: int, steps: int) -> nn.Module:
        asked.append((len(real), seed, steps))
        return real_training(real, pairs, seed, steps)

    monkeypatch.setattr(depth, "trained_on", noted)
    rows = np.stack([np.arange(30), np.zeros(30, dtype=np.int64), np.arange(30)[::-1]])
    scores = [depth.score(task, batch, pairs, {}, rows) for pairs in (rooms(30, 1), rooms(30, 2) * 3)]
    assert asked[0] == asked[1] and asked[0][0] == 100  # the same training for every method of a seed
    depth.score(task, batch | {"noise": batch["noise"] + 1}, rooms(30, 1), {}, rows)
    assert asked[2][1] != asked[0][1]
    for found in scores:
        assert set(found) == set(task.metrics)
        for one in found.values():
            assert len(one.resamples) == 3 and one.resamples[0] == pytest.approx(one.value) == pytest.approx(
                one.resamples[2]
            )
    judge = real_training(load_split("scenes16", "train")["x0"], rooms(30, 1).clamp(-1, 1), asked[0][1], asked[0][2])
    squares, close = depth.errors(judge, load_split("scenes16", "test")["x0"][:1])
    assert scores[0]["rmse"].resamples[1] == pytest.approx(float(squares[0] ** 0.5), rel=1e-4)
    assert scores[0]["delta"].resamples[1] == pytest.approx(float(close[0]), rel=1e-4)
    with pytest.raises(BadOutput, match="shape"):
        depth.check(task, batch, rooms(29, 1))


def test_a_picture_of_a_pair_shows_depth_below_colour() -> None:
    pairs = load_split("scenes16", "train")["x0"][:12]
    strip = samples.of_outputs({"noise": torch.zeros_like(pairs)}, pairs)
    assert isinstance(strip, samples.Pictures)
    assert (strip.count, strip.height, strip.width) == (samples.IMAGES, 32, 16)
    pixels = torch.from_numpy(strip.pixels().copy())
    wanted = ((pairs[2] + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(pixels[:16, 32:48], wanted[:3].permute(1, 2, 0))
    assert torch.equal(pixels[16:, 32:48], wanted[3][:, :, None].expand(-1, -1, 3))
    assert digest_of({"pairs": pairs}) == digest_of({"pairs": load_split("scenes16", "train")["x0"][:12]})
