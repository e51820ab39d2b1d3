"""Track image, task of resolution: 32x32 images from a network that was trained on 16x16.

The network takes images of any size. At twice the size it still draws shapes of the pixels that it knows, too small and
sometimes several of them: it has learned composition at one size only. `session.train` holds a thousand images of the
larger size, for methods that adapt. A rung counts rows of any size; what a row costs is in the FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from stepmark.task import Score, Task, harness_only
from stepmark.tracks.image import check as check
from stepmark.tracks.image import handles as handles
from stepmark.tracks.image import layers as layers
from stepmark.tracks.image import reference_call as reference_call
from stepmark.tracks.image import score as distances
from stepmark.tracks.image.schedules import add_noise, schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser, euler_step
from stepmark.tracks.image.training import fit, sinusoids

if TYPE_CHECKING:
    from stepmark.session import Session

TASKS = (
    Task(
        id="attributes_to_image/shapes32",
        version=1,
        summary="32x32 images of a shape of given form and colour, from a rectified-flow model of 16x16 images",
        dataset="shapes32",
        backbones={"teacher": "shapes16_flow_any"},
        judges={"classifier": "shapes16_classifier"},
        reference="teacher",
        unit="NFE",
        rungs=(4, 8, 16),
        metrics={"misfit": "lower", "alignment": "higher", "fd": "lower", "single": "higher"},
        n=240,
        batch=60,
        seeds=2,
        smoke_n=12,
        smoke_rungs=(4,),
    ),
)


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, 3, 32, 32] standard normal, "condition": balanced}, drawn on the CPU so that devices agree."""
    harness_only("the test inputs")
    noise, index = torch.randn(n, 3, 32, 32, generator=generator), torch.arange(n)
    condition = torch.stack([index % 3, 3 + index // 3 % 4], 1)
    return {"noise": noise.to(device), "condition": condition.to(device)}


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """misfit: mean difference from a sharp image of the shape named. single: share of images with exactly one object.

    alignment and fd: those of `attributes_to_image/shapes16`, of the images at half the size, so of composition alone.
    """
    harness_only("the metrics")
    from stepmark.datasets import shapes32

    condition, images = batch["condition"].cpu(), outputs.detach().float().cpu()
    figures = {
        "misfit": shapes32.misfit(images, condition),
        "single": (shapes32.objects(images) == 1).double(),
    }
    columns = {name: value.double().numpy() for name, value in figures.items()}
    own = {name: Score(float(v.mean()), v[resample].mean(1).tolist()) for name, v in columns.items()}
    return own | distances(replace(task, dataset="shapes16"), batch, halved(images), networks, resample)


# --- from one resolution to the next -----------------------------------------------------------------------------------


def halved(images: Tensor) -> Tensor:
    """Means over 2x2 pixels: [B, C, H, W] to [B, C, H / 2, W / 2]."""
    return avg_pool2d(images, 2)


def doubled(images: Tensor) -> Tensor:
    """Bilinear interpolation to twice the size."""
    return interpolate(images, scale_factor=2, mode="bilinear")


def base_samples(denoise: Denoiser, noise: Tensor, steps: int) -> Tensor:
    """Samples [B, C, H / 2, W / 2] at the size of training in equal Euler steps. Their noise is the mean of 2x2 values of
    `noise` [B, C, H, W], at unit variance again.
    """
    x = 2 * halved(noise)
    for t, s in pairwise(uniform_times(steps)):
        x = euler_step(x, denoise.output(x, t), t, s)
    return x


def from_pivot(
    velocity: Callable[[Tensor, float], Tensor],
    network: nn.Module,
    pivot: Tensor,
    eps: Tensor,
    steps: int,
    start: float,
) -> Tensor:
    """Samples [B, C, H, W] in equal Euler steps from time `start` < 1, where the sample of the smaller size, doubled and
    noised, stands for the steps that are left out (Guo et al. 2024, equation 5).
    """
    x = add_noise(schedule_of(network), doubled(pivot), eps, torch.full((len(eps),), start, device=eps.device))
    for t, s in pairwise(uniform_times(steps, start)):
        x = euler_step(x, velocity(x, t), t, s)
    return x


class FeatureUpsampler(nn.Module):
    """Features [B, C, h, w] of the smaller image as a correction [B, C, 2 h, 2 w] to those of the larger; at first none.

    Normalised, doubled, narrowed to `width` channels, told the time, widened again (Guo et al. 2024, section 3.4).
    """

    def __init__(self, channels: int, width: int = 8) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU())
        self.narrow = nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Linear(32, width)
        self.widen = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.widen.weight)
        nn.init.zeros_(self.widen.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        """Correction for features at times t [B]."""
        hidden = self.narrow(doubled(self.enter(features))) + self.time(sinusoids(t))[:, :, None, None]
        return self.widen(nn.functional.silu(hidden))


class Cascade(nn.Module):
    """A frozen network with feature upsamplers: it sees the smaller image too, and only the upsamplers learn.

    The smaller image, without noise, passes through the same network at the same time; what leaves each level of the
    encoder and the middle block is upsampled and added to what leaves it in the pass of the larger image.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.prediction = base.prediction
        blocks = self._blocks()
        self.upsamplers = nn.ModuleList(FeatureUpsampler(int(block.resnets[-1].out_channels)) for block in blocks)

    def _blocks(self) -> list[Any]:
        unet: Any = self.base.named.unet  # type: ignore[union-attr]
        return [*unet.down_blocks, unet.mid_block]

    def forward(self, x: Tensor, pivot: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Prediction [B, C, H, W] at x [B, C, H, W], pivot [B, C, H / 2, W / 2], t float [B]."""
        features: list[Tensor] = []

        def keep(block: nn.Module, given: Any, found: Any) -> None:
            features.append(found[0] if isinstance(found, tuple) else found)

        def add(upsampler: nn.Module, place: int, found: Any) -> Any:
            more = upsampler(features[place], t)
            return (found[0] + more, *found[1:]) if isinstance(found, tuple) else found + more

        hooks = [block.register_forward_hook(keep) for block in self._blocks()]
        with torch.no_grad():
            self.base(pivot, t, condition)
        for hook in hooks:
            hook.remove()
        hooks = [
            block.register_forward_hook(lambda _, given, found, one=one, place=place: add(one, place, found))
            for place, (block, one) in enumerate(zip(self._blocks(), self.upsamplers, strict=True))
        ]
        out = self.base(x, t, condition)
        for hook in hooks:
            hook.remove()
        return out


def train_cascade(session: Session, cascade: Cascade, start: float, steps: int = 200, batch: int = 16) -> None:
    """Flow matching on the images of the larger size at times below `start`, their halves as pivots."""
    data, label = (session.train[key].to(session.device) for key in ("x0", "condition"))

    def loss() -> Tensor:
        rows = torch.randint(len(data), (batch,), generator=session.rng, device=session.device)
        x0, eps = data[rows], torch.randn(data[rows].shape, generator=session.rng, device=session.device)
        t = start * torch.rand(batch, generator=session.rng, device=session.device)
        v = cascade(add_noise(schedule_of(cascade), x0, eps, t), halved(x0), t, label[rows])
        return (v - (eps - x0)).square().mean()

    fit(session, cascade, loss, session.scale(steps, 2), rate=2e-3, ema=0.98, clip=1.0)
