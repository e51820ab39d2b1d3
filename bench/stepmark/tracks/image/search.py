"""Track image, tasks of search: the batch wishes for something that the model was never told.

The model draws from all of the data; `condition` is the wish and changes nothing in the network. Whoever samples once
gets what is wished for by chance only, with however many steps; a method may instead draw several times, or keep to the
paths that look right, and judge with a verifier that it trains itself in `prepare` on `session.train`. A rung counts
the rows of all its networks, the verifier's too. The judge of the metric is another network, which no method sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import Score, Task
from stepmark.tracks.image import check as check
from stepmark.tracks.image import handles as handles
from stepmark.tracks.image import inputs as inputs
from stepmark.tracks.image import layers as layers
from stepmark.tracks.image import reference_call as reference_call
from stepmark.tracks.image import score as distances
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, euler_step
from stepmark.tracks.image.training import fit

if TYPE_CHECKING:
    from stepmark.session import Session

TASKS = (
    Task(
        id="search/digits",
        version=1,
        summary="8x8 digits wished for by class, from a rectified-flow model that knows no classes",
        dataset="digits",
        backbones={"teacher": "digits_flow_unnamed"},
        judges={"classifier": "digits_classifier"},
        reference="teacher",
        unit="NFE",
        rungs=(4, 8, 16, 32, 64),
        metrics={"accuracy": "higher", "fd": "lower"},
        n=500,
        batch=100,
        seeds=2,
        smoke_n=32,
        smoke_rungs=(4, 16),
    ),
)


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """accuracy: share of samples in which the judge reads the class wished for. fd: as on the other tasks of digits."""
    scores = distances(task, batch, outputs, networks, resample)
    classifier = networks["classifier"]
    device = next(classifier.parameters()).device
    with torch.no_grad():
        read = torch.cat([classifier(part.to(device)).argmax(1) for part in outputs.float().clamp(-1, 1).split(500)])
    right = (read.cpu() == batch["condition"].cpu()).numpy().astype(np.float64)
    return {"accuracy": Score(float(right.mean()), right[resample].mean(1).tolist())} | scores


# --- what searches share ----------------------------------------------------------------------------------------------


class Verifier(nn.Module):
    """A small classifier of images [B, channels, size, size] into `kinds` classes, for a method to train."""

    def __init__(self, channels: int, size: int, kinds: int, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (size // 4) ** 2, kinds),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, kinds]."""
        return self.body(x)


def new_verifier(session: Session) -> Verifier:
    """Untrained, for the images and classes of the train split."""
    shape = session.train["x0"].shape
    return Verifier(shape[1], shape[2], 1 + int(session.train["condition"].max()))


def train_verifier(session: Session, verifier: nn.Module) -> None:
    """Cross entropy on the train split. A little noise on the images: early predictions are to be judged too."""
    data, label = (session.train[key].to(session.device) for key in ("x0", "condition"))

    def loss() -> Tensor:
        rows = torch.randint(len(data), (64,), generator=session.rng, device=session.device)
        noise = torch.randn(data[rows].shape, generator=session.rng, device=session.device)
        level = 0.4 * torch.rand(64, 1, 1, 1, generator=session.rng, device=session.device)
        return nn.functional.cross_entropy(verifier(data[rows] + level * noise), label[rows])

    fit(session, verifier, loss, session.scale(1000, 4), rate=3e-3)


def approval(verifier: nn.Module, images: Tensor, wish: Tensor) -> Tensor:
    """log p(wish | image) [B] of a verifier: one evaluation of it for every image."""
    return verifier(images).log_softmax(1).gather(1, wish[:, None])[:, 0]


def euler_sample(denoise: Denoiser, x: Tensor, steps: int) -> Tensor:
    """Images [B, ...] from noise in equal Euler steps, one evaluation each."""
    for t, s in pairwise(uniform_times(steps)):
        x = euler_step(x, denoise.output(x, t), t, s)
    return x
