"""Small classifiers whose 64 penultimate features carry the Frechet distances of the image tasks."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stepmark.backbones import Progress, Recipe
from stepmark.task import load_split

FEATURES = 64


class Classifier(nn.Module):
    """Three convolutions, 64 features, linear head.

    Args:
        channels, size: images are [B, channels, size, size] in [-1, 1].
        width: channels of the first convolution.
        labels: outputs of the head.
    """

    def __init__(self, channels: int, size: int, width: int, labels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (size // 4) ** 2, FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Linear(FEATURES, labels)

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features [B, 64] of images [B, C, H, W]."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, labels]."""
        return self.head(self.body(x))


def _build(seed: int, channels: int, size: int, width: int, labels: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):  # torch draws initial weights from the global stream
        torch.manual_seed(seed)
        return Classifier(channels, size, width, labels)


def _fit(network: nn.Module, x: Tensor, target: Tensor, steps: int, seed: int, progress: Progress) -> None:
    """Cross entropy on images [N, C, H, W] and classes int64 [N]: AdamW with a cosine, batches of 64."""
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)))
    network.train()
    for _ in progress(range(steps), "train"):
        rows = torch.randint(len(x), (64,), generator=draw)
        loss = cross_entropy(network(x[rows]), target[rows])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval()


def _train_digits(network: nn.Module, progress: Progress, seed: int) -> dict[str, float]:
    train, test = load_split("digits", "train"), load_split("digits", "test")
    _fit(network, train["x0"], train["condition"], 500, seed, progress)
    with torch.no_grad():
        right = network(test["x0"]).argmax(1) == test["condition"]
    return {"test_accuracy": right.float().mean().item()}


def _kind(condition: Tensor) -> Tensor:
    """One of twelve kinds [N] from shape and colour [N, 2] (shapes are rows 0..2, colours rows 3..6)."""
    return (condition[:, 1] - 3) * 3 + condition[:, 0]


def _train_shapes(network: nn.Module, progress: Progress, seed: int) -> dict[str, float]:
    train, test = load_split("shapes16", "train"), load_split("shapes16", "test")
    _fit(network, train["x0"], _kind(train["condition"]), 800, seed, progress)
    with torch.no_grad():
        right = network(test["x0"]).argmax(1) == _kind(test["condition"])
    return {"test_accuracy": right.float().mean().item()}


RECIPES: dict[str, Recipe] = {
    "digits_classifier": Recipe(
        partial(_build, 700, 1, 8, 16, 10), partial(_train_digits, seed=701), "digits, 10 classes"
    ),
    "shapes16_classifier": Recipe(
        partial(_build, 800, 3, 16, 24, 12), partial(_train_shapes, seed=801), "shapes16, 12 kinds (shape and colour)"
    ),
}
