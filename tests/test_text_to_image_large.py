"""Pictures larger than the teacher's: what the metrics say of the true ones, of stretched ones and of copies side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rigs.images import idle_session, method_of, module_of, ran
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from stepmark.backbones.scenes import scaled_linear
from stepmark.backbones.scenes_judges import Reader
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.scenes.drawing import render
from stepmark.tracks.text_to_image import large
from stepmark.tracks.text_to_image.sampling import ddim

torch.set_num_threads(1)

pixelsmith = module_of("pixelsmith")
TASKS = {task.id: task for task in large.TASKS}


class Shown(nn.Module):
    """A decoder that shows pictures that were made before."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.pictures, self.at = pictures, 0

    def decode(self, z: Tensor) -> Tensor:
        self.at += len(z)
        return self.pictures[self.at - len(z) : self.at]


def judge() -> Reader:
    torch.manual_seed(0)
    return Reader().eval()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_truth_wins_both_and_stretching_and_copies_one_each(task: large.Task) -> None:
    k, n = int(task.id[-1]), 24
    batch = large.inputs(task, n, torch.Generator().manual_seed(0), torch.device("cpu"))
    ids, scenes = large._plain()
    rows = [int((ids == row).all(1).nonzero()[0]) for row in batch["condition"]]
    small, true = render(scenes[np.array(rows)]), large.enlarged(scenes[np.array(rows)], k)
    shown = {
        "true": true,
        "stretched": interpolate(small, scale_factor=k, mode="bicubic").clamp(-1, 1),
        "copies": small.repeat(1, 1, k, k),
    }
    resample = np.tile(np.arange(n), (2, 1))
    networks = {name: {"vae": Shown(pictures), "judge": judge()} for name, pictures in shown.items()}
    found = {name: large.score(task, batch, batch["noise"], nets, resample) for name, nets in networks.items()}
    fd, caption = ({name: each[metric].value for name, each in found.items()} for metric in ("crop_fd", "caption"))
    assert fd["true"] < fd["stretched"] and fd["true"] < fd["copies"]
    assert min(caption["true"], caption["stretched"]) > 0.8
    assert caption["copies"] < 0.1
    assert found["true"]["crop_fd"].resamples == pytest.approx([fd["true"]] * 2)


def test_a_large_drawing_is_the_small_one_drawn_larger() -> None:
    _, scenes = large._plain()
    few = scenes[:20]
    near = (avg_pool2d(large.enlarged(few, 2), 2) - render(few)).abs()
    assert float(near.mean()) < 0.01
    torch.testing.assert_close(large.enlarged(few, 1), render(few), rtol=0, atol=0)


class Pointwise(nn.Module):
    """A network of noise that looks at every value for itself, so that patches and the whole must agree."""

    prediction = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        self.alphas_cumprod = scaled_linear()

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return torch.tanh(x) * (1 + t.view(-1, 1, 1, 1) / 1000) / 2


def refined(slider: float, steps: int = 5, size: int = 16) -> tuple[Tensor, Tensor, Tensor, Denoiser]:
    """What refining makes of a guide and a noise, with those."""
    draw = torch.Generator().manual_seed(1)
    noise, guide = (torch.randn(2, 4, size, size, generator=draw) for _ in range(2))
    method = pixelsmith.Pixelsmith()
    method.slider = slider
    denoise = Denoiser(Pointwise(), torch.zeros(2, 1, dtype=torch.int64), 3.0)
    plan = pixelsmith.rounds(size, steps, draw)
    return method.refine(denoise, guide, noise, plan, draw), guide, noise, denoise


def test_every_place_makes_every_step_once_whatever_patches_it_lies_in() -> None:
    found, guide, noise, denoise = refined(0.0)
    start = denoise.schedule.alpha(1.0) * guide + denoise.schedule.sigma(1.0) * noise
    torch.testing.assert_close(found, ddim(denoise, start, uniform_times(5)))
    together = pixelsmith.side_by_side(denoise, start, 5)
    torch.testing.assert_close(together, found)


@pytest.mark.parametrize("size", [16, 32])
def test_the_plan_reaches_every_place_and_no_patch_for_nothing(size: int) -> None:
    for corners in pixelsmith.rounds(size, 3, torch.Generator().manual_seed(2)):
        waiting = torch.ones(size, size, dtype=torch.bool)
        for row, column in corners:
            assert 0 <= row <= size - 8 and 0 <= column <= size - 8
            assert waiting[row : row + 8, column : column + 8].any()
            waiting[row : row + 8, column : column + 8] = False
        assert not waiting.any()


def test_phases_are_shared_and_magnitudes_kept() -> None:
    draw = torch.Generator().manual_seed(3)
    patch, guide = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(2))
    torch.testing.assert_close(pixelsmith.shared_phase(patch, patch), patch)
    found = torch.fft.rfft2(pixelsmith.shared_phase(patch, guide))
    own, theirs = torch.fft.rfft2(patch), torch.fft.rfft2(guide)
    torch.testing.assert_close(found.abs(), own.abs(), rtol=1e-3, atol=1e-3)
    inner = (..., slice(1, 4), slice(1, 4))  # elsewhere a real patch has conjugates of its own
    middle = torch.angle(own[inner] / own[inner].abs() + theirs[inner] / theirs[inner].abs())
    off = torch.angle(torch.exp(1j * (found[inner].angle() - middle)))
    assert float(off.abs().max()) < 1e-3


def test_the_guide_holds_the_picture_until_the_slider() -> None:
    away = {}
    for slider in (0.0, 0.5, 1.0):
        found, guide, _, _ = refined(slider)
        away[slider] = float((found - guide).square().mean())
    assert away[1.0] < away[0.5] < away[0.0]


def test_a_chess_board_takes_half_of_the_values_in_either_shift() -> None:
    draw = torch.Generator().manual_seed(4)
    boards = torch.stack([pixelsmith.chess(draw) for _ in range(20)])
    assert (boards.sum((1, 2)) == 32).all()
    assert len(boards.unique(dim=0)) == 2
    assert not (boards[:, :-1] & boards[:, 1:]).any()


class Counting(nn.Module):
    """A network of noise that answers its first call with ones (times `by`), its second with twos, and so on; keeps what it is
    shown."""

    prediction = "epsilon"

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by, self.calls = by, 0
        self.shown: list[Tensor] = []
        self.alphas_cumprod = scaled_linear()

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.calls += 1
        self.shown.append(x.clone())
        return torch.full_like(x, self.by * self.calls)


def stepped(
    network: Counting, plan: list[list[tuple[int, int]]], slider: float
) -> tuple[Tensor, list[Tensor], Denoiser]:
    draw = torch.Generator().manual_seed(5)
    noise, guide = (torch.randn(1, 4, 16, 16, generator=draw) for _ in range(2))
    method = pixelsmith.Pixelsmith()
    method.slider = slider
    denoise = Denoiser(network, torch.zeros(1, 1, dtype=torch.int64))
    schedule = denoise.schedule
    guides = [schedule.alpha(t) * guide + schedule.sigma(t) * noise for t in (1.0, 0.5)]
    return method.refine(denoise, guide, noise, plan, draw), guides, denoise


def test_what_is_ahead_stays_but_for_a_border_that_is_mixed() -> None:
    """Patches in the four corners and a needless fifth: every place keeps its first call, the fifth changes nothing."""
    plan = [[(0, 0), (4, 0), (8, 0), (0, 8), (8, 8), (4, 4)]]
    found, guides, denoise = stepped(Counting(1.0), plan, 0.0)
    schedule = denoise.schedule
    call = (guides[0] - schedule.alpha(1.0) * found)[0, 0] / schedule.sigma(1.0)  # x0 = (x - sigma call) / alpha
    assert call[2, 2] == pytest.approx(1, abs=1e-3)
    assert call[7, 3] == pytest.approx(1.5, abs=1e-3)  # the second patch waits from row 8 on: its neighbours are mixed
    assert call[6, 3] == pytest.approx(1, abs=1e-3)
    assert call[9, 3] == pytest.approx(2, abs=1e-3)
    assert call[14, 3] == pytest.approx(3, abs=1e-3)
    assert call[2, 12] == pytest.approx(4, abs=1e-3)
    assert call[12, 12] == pytest.approx(5, abs=1e-3)
    assert not torch.isclose(call, torch.tensor(6.0), atol=0.4).any()


@pytest.mark.parametrize(("slider", "share"), [(1.0, 0.5), (0.5, 0.0)])
def test_every_other_value_before_the_slider_is_the_guides_at_the_next_time(
    slider: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the last step before it, after which there is no guide."""
    monkeypatch.setattr(pixelsmith, "shared_phase", lambda patch, guide: patch)
    plan = [[(0, 0), (0, 8), (8, 0), (8, 8)]] * 2
    found, guides, denoise = stepped(Counting(0.0), plan, slider)
    before = found * denoise.schedule.alpha(0.5)  # the last step only scales
    same = torch.isclose(before, guides[1], atol=1e-4)
    assert same.float().mean() == pytest.approx(share, abs=0.05)
    assert not torch.isclose(before, guides[0], atol=1e-4).float().mean() > 0.05


def test_phases_are_shared_by_the_patch_as_it_stands_and_what_is_ahead_then_goes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the second patch a half is ahead: its phases count, the network sees it as it was, and it stays where it is."""
    seen: list[tuple[Tensor, Tensor]] = []

    def shared(patch: Tensor, guide: Tensor) -> Tensor:
        seen.append((patch.clone(), guide.clone()))
        return patch + 1

    monkeypatch.setattr(pixelsmith, "shared_phase", shared)
    network = Counting(0.0)
    found, guides, denoise = stepped(network, [[(0, 0), (0, 4)]], 1.0)
    start, alpha = guides[0][..., :8, :12], denoise.schedule.alpha(1.0)
    ended = (start + 1) / alpha  # a step without noise only scales
    torch.testing.assert_close(seen[1][0], torch.cat([ended[..., 4:8], start[..., 8:]], 3))
    torch.testing.assert_close(seen[1][1], start[..., 4:])
    torch.testing.assert_close(network.shown[1], torch.cat([start[..., 4:8], start[..., 8:] + 1], 3))
    for columns in (slice(7), slice(8, 12)):
        torch.testing.assert_close(found[..., :8, columns], ended[..., columns])


class Spoken(Pointwise):
    """The same, asked by captions."""

    def words(self, ids: Tensor) -> Tensor:
        return ids[:, :, None].float()


class Blocks(nn.Module):
    """An autoencoder whose latents are the means of 4x4 pixels, and nothing in the last channel."""

    def encode(self, x: Tensor) -> Tensor:
        return self(x)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 4:
            return interpolate(x[:, :3], scale_factor=4)
        return torch.cat([avg_pool2d(x, 4), torch.zeros_like(x[:, :1, ::4, ::4])], 1)


@pytest.mark.parametrize(("task", "rung"), [("large/scenes_x2", 64), ("large/scenes_x4", 256)])
def test_a_rung_pays_for_the_small_picture_its_guide_and_the_patches(task: str, rung: int) -> None:
    k, draw = int(task[-1]), torch.Generator().manual_seed(6)
    noise = torch.randn(2, 4, 8 * k, 8 * k, generator=draw)
    batch = {"noise": noise, "condition": torch.zeros(2, 32, dtype=torch.int64)}
    session, found = idle_session(task, teacher=Spoken(), vae=Blocks()), {}
    price = {"direct": rung, "stretched": rung, "free": rung - rung % (2 * len(pixelsmith.grid(8 * k)))}
    for way, wanted in price.items():
        found[way], spent = ran(session, method_of(f"pixelsmith_{way}"), batch, rung)
        assert spent == wanted and found[way].shape == noise.shape
    _, spent = ran(session, method_of("pixelsmith"), batch, rung)
    assert rung - 2 * (1 + 4 * k * k) < spent <= rung  # the next step would not have fitted

    denoise = Denoiser(Spoken(), torch.zeros(2, 32, 1), 3.0)
    small = ddim(denoise, avg_pool2d(noise, k) * k, uniform_times(rung // 2 - 1))
    shown = interpolate(Blocks()(small).clamp(-1, 1), scale_factor=k, mode="bicubic").clamp(-1, 1)
    torch.testing.assert_close(found["stretched"], Blocks().encode(shown))
