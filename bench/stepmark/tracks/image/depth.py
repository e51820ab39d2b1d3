"""Track image, task of training data: how good a depth network do generated pairs of colour and depth make?

A method returns pairs [B, 4, 16, 16]: red, green, blue and depth. It is judged by what can be learned from them: a small
depth network is trained on 100 real pairs and the method's, half of every batch each, and its error on held-out real
scenes is the score. How long it learns, from which first weights and in which order hangs on the seed alone, so that
methods differ in their pairs and in nothing else. Real pairs themselves, given once more, are what no method must do worse
than. Pairs from a network cost its evaluations; pairs from elsewhere cost none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pixel_shuffle, pixel_unshuffle

from stepmark.task import Score, Task, digest_of, harness_only, load_split
from stepmark.tracks.image import check as check
from stepmark.tracks.image import handles as handles
from stepmark.tracks.image import layers as layers
from stepmark.tracks.image import reference_call as reference_call

TASKS = (
    Task(
        id="training_pairs/scenes16",
        version=1,
        summary="Pairs of colour and depth to train a depth network on, from a model of 100 real pairs",
        dataset="scenes16",
        backbones={"teacher": "scenes16_rgbd"},
        reference="teacher",
        unit="NFE",
        rungs=(2, 5, 10, 50),
        metrics={"rmse": "lower", "delta": "higher", "agreement": "higher"},
        n=1000,
        batch=100,
        seeds=3,
        smoke_n=8,
        smoke_rungs=(2,),
    ),
)


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, 4, 16, 16] standard normal, "condition": 0 throughout}, drawn on the CPU so that devices agree."""
    harness_only("the test inputs")
    noise = torch.randn(n, 4, 16, 16, generator=generator)
    return {"noise": noise.to(device), "condition": torch.zeros(n, dtype=torch.int64, device=device)}


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Of a depth network that learned from real pairs and these, on as many held-out real scenes as there are items.

    rmse: root of the mean squared error over all pixels, metres. delta: share of pixels whose depth is wrong by less than
    a factor of 1.25. Both are resampled over scenes. agreement: of the pairs themselves, how well edges of colour and of
    depth coincide (`edge_agreement`), resampled over pairs.
    """
    harness_only("the metrics")
    pairs = outputs.detach().float().cpu().clamp(-1, 1)
    seed = int(digest_of({"noise": batch["noise"]})[:12], 16)
    steps = STEPS if len(pairs) >= task.n else 10
    judge = trained_on(load_split(task.dataset, "train")["x0"], pairs, seed, steps)
    scenes = load_split(task.dataset, "test")["x0"][: len(pairs)]
    squares, close = errors(judge, scenes)
    agreement = edge_agreement(pairs).numpy()
    return {
        "rmse": Score(float(np.sqrt(squares.mean())), np.sqrt(squares[resample].mean(1)).tolist()),
        "delta": Score(float(close.mean()), close[resample].mean(1).tolist()),
        "agreement": Score(float(agreement.mean()), agreement[resample].mean(1).tolist()),
    }


# --- pairs ---------------------------------------------------------------------------------------------------------------


def edge_agreement(pairs: Tensor) -> Tensor:
    """How well edges of colour and of depth coincide in each pair [n, 4, H, W]: their correlation, float64 [n].

    An edge is the length of the slope between neighbouring 2x2 blocks of pixels: of the colours, and of log depth. A pair
    without any has 0.
    """
    pairs = pairs.detach().cpu().double()
    lengths = []
    for maps in (pairs[:, :3], log_metres(pairs[:, 3:])):
        down, right = slopes(avg_pool2d(maps, 2, 1))
        lengths.append((down[..., 1:].square() + right[..., 1:, :].square()).sum(1).sqrt().flatten(1))
    colour, depth = (length - length.mean(1, keepdim=True) for length in lengths)
    norms = colour.norm(dim=1) * depth.norm(dim=1)
    return torch.where(norms > 1e-9, (colour * depth).sum(1) / norms.clamp(min=1e-9), 0.0)


# --- the judge: a depth network --------------------------------------------------------------------------------------

STEPS, BATCH = 300, 32


class DepthNetwork(nn.Module):
    """Depth from one colour image: patches of 2x2 pixels, convolutions at that size and at half of it, and a skip.

    Takes colour [B, 3, 16, 16] in [-1, 1], gives log of depth in metres [B, 1, 16, 16]. It sees the row it is in, and a
    linear layer over all places tells each what the room is like.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.fine = nn.Sequential(_block(13, width), _block(width, width))
        self.coarse = nn.Sequential(_block(width, 2 * width, 2), _block(2 * width, 2 * width))
        self.room = nn.Linear(2 * width * 16, 2 * width)
        self.back = nn.Sequential(_block(3 * width, width), nn.Conv2d(width, 4, 3, padding=1))
        nn.init.zeros_(self.back[-1].weight)

    def forward(self, colour: Tensor) -> Tensor:
        patches = pixel_unshuffle(colour, 2)
        rows = torch.linspace(-1, 1, patches.shape[2], device=colour.device)[:, None].expand_as(patches[:, :1])
        fine = self.fine(torch.cat([patches, rows], 1))
        coarse = self.coarse(fine)
        coarse = coarse + self.room(coarse.flatten(1))[:, :, None, None]
        return pixel_shuffle(self.back(torch.cat([fine, interpolate(coarse, scale_factor=2.0)], 1)), 2) + 1


def _block(enter: int, leave: int, stride: int = 1) -> nn.Sequential:
    """Normalised, as it learns for moments only: without, some first weights never get anywhere."""
    return nn.Sequential(nn.Conv2d(enter, leave, 3, stride, 1), nn.GroupNorm(4, leave), nn.SiLU())


def log_metres(depth: Tensor) -> Tensor:
    """Log of depth in metres, of depth in [-1, 1]."""
    from stepmark.datasets import scenes16

    return scenes16.metres(depth).log()


def slopes(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbours downwards [..., H - 1, W] and to the right [..., H, W - 1]."""
    return maps.diff(dim=-2), maps.diff(dim=-1)


def dissimilarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean of (1 - SSIM) / 2 over windows of 3x3, of maps [B, 1, H, W] that span about one unit."""
    mean_a, mean_b = avg_pool2d(a, 3, 1), avg_pool2d(b, 3, 1)
    var_a, var_b = avg_pool2d(a * a, 3, 1) - mean_a**2, avg_pool2d(b * b, 3, 1) - mean_b**2
    both = avg_pool2d(a * b, 3, 1) - mean_a * mean_b
    similar = (2 * mean_a * mean_b + 0.01**2) * (2 * both + 0.03**2)
    similar = similar / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))
    return ((1 - similar) / 2).clamp(0, 1).mean()


def depth_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error of log depth [B, 1, H, W], that of its slopes, and `dissimilarity`."""
    edges = sum((a - b).abs().mean() for a, b in zip(slopes(found), slopes(wanted), strict=True))
    return (found - wanted).abs().mean() + edges + dissimilarity(found, wanted)


def trained_on(real: Tensor, pairs: Tensor, seed: int, steps: int = STEPS) -> DepthNetwork:
    """A depth network trained on real pairs and others [n, 4, H, W], half of every batch each, on the CPU.

    First weights and the order of both hang on the seed and on how many there are, not on what they show.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DepthNetwork()
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min((k + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * k / steps))
    )
    with torch.enable_grad():
        for _ in range(steps):
            rows = [torch.randint(len(part), (BATCH // 2,), generator=draw) for part in (real, pairs)]
            seen = torch.cat([real[rows[0]], pairs[rows[1]]])
            loss = depth_loss(network(seen[:, :3]), log_metres(seen[:, 3:]))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            rate.step()
    return network.eval()


@torch.no_grad()
def errors(network: nn.Module, scenes: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of every scene [n, 4, H, W]: mean squared error in metres^2, and share of pixels within a factor of 1.25."""
    found = torch.cat([network(part[:, :3]) for part in scenes.split(250)]).double()
    wanted = log_metres(scenes[:, 3:].double())
    squares = (found.exp() - wanted.exp()).square().mean((1, 2, 3))
    close = ((found - wanted).abs() < np.log(1.25)).double().mean((1, 2, 3))
    return squares.numpy(), close.numpy()
