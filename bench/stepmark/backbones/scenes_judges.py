"""Networks that look at pictures of scenes: the judge whose features carry the Frechet distances, and the reward.

They are of one kind and trained alike but for their seeds and their data: the judge sees all styles and no method sees it;
the reward is handed to methods, who may please it. Neither is the eye that captions are checked by.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stepmark.backbones import Progress, Recipe
from stepmark.backbones.scenes import HEADS, _built, _training
from stepmark.task import load_split
from stepmark.tracks.scenes.captions import BACKGROUNDS, PLACES

FEATURES = 64
KINDS = {name: kinds + 1 for name, kinds in HEADS.items()}  # the last: nothing there
LOGITS = len(PLACES) * sum(KINDS.values()) + len(BACKGROUNDS)


class Reader(nn.Module):
    """Says what lies in each of the nine places of pictures [B, 3, 32, 32] in [-1, 1]: logits [B, 224], see `parted`."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 64, 64)
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            before, stride = (3, 1) if i == 0 else (widths[i - 1], 2)
            layers += [nn.Conv2d(before, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
        self.body = nn.Sequential(*layers)  # [B, 64, 4, 4]
        self.gather = nn.Sequential(nn.Flatten(), nn.Linear(64 * 16, 256), nn.SiLU())
        self.squeeze = nn.Sequential(nn.Linear(256, FEATURES), nn.SiLU())
        self.head = nn.Linear(256 + FEATURES, LOGITS)

    def features(self, x: Tensor) -> Tensor:
        """Features [B, 64] of pictures [B, 3, 32, 32]."""
        return self.squeeze(self.gather(self.body(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 224] of pictures [B, 3, 32, 32]."""
        wide = self.gather(self.body(x))
        return self.head(torch.cat([wide, self.squeeze(wide)], 1))


def parted(logits: Tensor) -> dict[str, Tensor]:
    """Logits [B, 224] of a `Reader` by attribute, [B, 9, kinds + 1] (the last: nothing there), and of the background [B, 8]."""
    sizes = [len(PLACES) * kinds for kinds in KINDS.values()]
    *found, background = logits.split([*sizes, len(BACKGROUNDS)], 1)
    placed = {name: part.unflatten(1, (len(PLACES), -1)) for name, part in zip(KINDS, found, strict=True)}
    return placed | {"background": background}


def _truth(objects: Tensor, background: Tensor) -> dict[str, Tensor]:
    """What lies in each place [N, 9] by attribute, from the `objects` [N, 3, 5] and the `background` [N] of a split."""
    found = {name: torch.full((len(objects), len(PLACES)), kinds - 1) for name, kinds in KINDS.items()}
    rows, slots = (objects[..., 0] >= 0).nonzero(as_tuple=True)
    for i, name in enumerate(KINDS):  # in the order of `objects`, whose last is the place
        found[name][rows, objects[rows, slots, 4]] = objects[rows, slots, i]
    return found | {"background": background}


def _train(network: nn.Module, progress: Progress, seed: int, sets: tuple[str, ...], steps: int) -> dict[str, float]:
    """Cross entropy of every place and attribute, batches of 64, pictures shaken by noise of up to 0.1."""
    assert isinstance(network, Reader)
    parts = [load_split(name, "train") for name in sets]
    x = torch.cat([part["x0"] for part in parts])
    truths = [_truth(part["objects"], part["background"]) for part in parts]
    truth = {name: torch.cat([each[name] for each in truths]) for name in truths[0]}
    draw = torch.Generator().manual_seed(seed)
    with _training(network, steps, rate=2e-3, ema=0.99) as step:
        for _ in progress(range(steps), "train"):
            rows = torch.randint(len(x), (64,), generator=draw)
            shaken = x[rows] + 0.1 * torch.rand(64, 1, 1, 1, generator=draw) * torch.randn(
                64, 3, 32, 32, generator=draw
            )
            said = parted(network(shaken))
            losses = [cross_entropy(said[name].flatten(0, -2), truth[name][rows].flatten()) for name in said]
            step(torch.stack(losses).sum())
    test = load_split("scenes32", "test")
    with torch.no_grad():
        read = parted(torch.cat([network(part) for part in test["x0"].split(500)]))
    report = {}
    for name, target in _truth(test["objects"], test["background"]).items():
        right = read[name].argmax(-1) == target
        there = right if name == "background" else right[target < KINDS[name] - 1]
        report[f"accuracy_{name}"] = there.float().mean().item()
    return report


RECIPES: dict[str, Recipe] = {
    "scenes_judge": Recipe(
        partial(_built, Reader, 950),
        partial(_train, seed=951, sets=("scenes32", "pastel32"), steps=4_000),
        "scenes32 and pastel32, what lies where: features of the Frechet distance",
    ),
    "scenes_reward": Recipe(
        partial(_built, Reader, 960),
        partial(_train, seed=961, sets=("scenes32",), steps=4_000),
        "scenes32, what lies where: a reward that methods may follow",
    ),
}
