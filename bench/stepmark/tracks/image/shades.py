"""Track image, task of brightness: can a sampler draw very dark and very bright pictures?

The model was trained, as many are, on a schedule whose last timestep still shows the picture through the noise; in a
flat picture that is its brightness. Sampling from noise alone then asks it for something that it never saw. How visible a
flat picture is grows with the root of its number of pixels: the schedule keeps more signal than that of latent models,
and still less of a flat picture, as 64 pixels are 256 times fewer than the 16 384 values of a latent image.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import Score, Task, harness_only, load_split
from stepmark.tracks.image import check as check
from stepmark.tracks.image import handles as handles
from stepmark.tracks.image import layers as layers
from stepmark.tracks.image import reference_call as reference_call
from stepmark.tracks.image.metrics import frechet_distance, frechet_resampled, moments
from stepmark.tracks.image.schedules import from_x0_eps, schedule_of, to_x0_eps
from stepmark.tracks.image.training import fit

if TYPE_CHECKING:
    from stepmark.session import Session

TASKS = (
    Task(
        id="class_to_image/shades",
        version=1,
        summary="8x8 pictures of any brightness, DDPM teacher on a schedule that does not end in pure noise",
        dataset="shades",
        backbones={"teacher": "shades_eps"},
        reference="teacher",
        unit="NFE",
        rungs=(5, 10, 25, 50),
        metrics={"w1_brightness": "lower", "fd": "lower"},
        n=2000,
        batch=500,
        seeds=3,
        smoke_n=64,
        smoke_rungs=(5, 10),
    ),
)


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """{"noise": [n, 1, 8, 8] standard normal, "condition": each mark in turn}, drawn on the CPU so that devices agree."""
    harness_only("the test inputs")
    noise = torch.randn(n, 1, 8, 8, generator=generator)
    return {"noise": noise.to(device), "condition": (torch.arange(n) % 3).to(device)}


@lru_cache(maxsize=1)
def _truth() -> tuple[NDArray[np.float64], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Sorted brightness of the reference pictures, and moments of their pixels."""
    pixels = load_split("shades", "reference")["x0"].flatten(1).double().numpy()
    return np.sort(pixels.mean(1)), moments(pixels)


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """w1_brightness: 1-Wasserstein distance between mean pixels of the samples and of the data. fd: Frechet distance
    between their pixels. Both on samples clamped to the range of the data.
    """
    harness_only("the metrics")
    pixels = outputs.detach().double().cpu().clamp(-1, 1).flatten(1).numpy()
    brightness, reference = _truth()
    places = (np.arange(len(pixels)) + 0.5) / len(pixels)
    quantiles = np.quantile(brightness, places)
    rows = np.concatenate([np.arange(len(pixels))[None], resample])
    away = np.abs(np.sort(pixels.mean(1)[rows], axis=1) - quantiles).mean(1)
    value = float(frechet_distance(*moments(pixels), *reference))
    return {
        "w1_brightness": Score(float(away[0]), away[1:].tolist()),
        "fd": Score(value, frechet_resampled(pixels, reference, resample).tolist()),
    }


# --- schedules that end in pure noise, and guidance that does not overexpose -------------------------------------------


def zero_terminal(signal: Tensor) -> Tensor:
    """sqrt(abar) [N] of a schedule, moved and stretched so that the last is 0 and the first what it was (Lin et al. 2024,
    algorithm 1).
    """
    return (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])


def trailing_timesteps(n: int, steps: int) -> list[int]:
    """round(N - i N / n) - 1 for i < n: the last timestep is always the first to be sampled (Lin et al. 2024, table 2)."""
    return [round(steps - i * steps / n) - 1 for i in range(n)]


def rescaled_guidance(null: Tensor, conditional: Tensor, guidance: float, share: float) -> Tensor:
    """null + w (conditional - null), a share of it scaled to the deviation of the conditional prediction (Lin et al. 2024,
    equations 14 to 16). Deviations are those over all values of an item.
    """
    guided = torch.lerp(null, conditional, guidance)
    shape = (-1, *[1] * (null.dim() - 1))
    ratio = (conditional.flatten(1).std(1) / guided.flatten(1).std(1)).view(shape)
    return torch.lerp(guided, ratio * guided, share)


def signal_of(network: nn.Module) -> Tensor:
    """sqrt(abar') float64 [N]: the network's schedule with its last timestep made pure noise."""
    schedule = schedule_of(network)
    times = (torch.arange(schedule.steps, dtype=torch.float64) + 1) / schedule.steps
    return zero_terminal(schedule.alpha(times))


def finetune_v(session: Session, student: nn.Module) -> None:
    """Train a copy of the teacher to predict v on the schedule that ends in pure noise; conditions are sometimes dropped."""
    data, label = (session.train[key].to(session.device) for key in ("x0", "condition"))
    signal = signal_of(session.networks["teacher"]).to(session.device)
    noise_scale = (1 - signal.square()).sqrt()

    def loss() -> Tensor:
        rows = torch.randint(len(data), (128,), generator=session.rng, device=session.device)
        index = torch.randint(len(signal), (128,), generator=session.rng, device=session.device)
        eps = torch.randn(data[rows].shape, generator=session.rng, device=session.device)
        dropped = torch.rand(128, generator=session.rng, device=session.device) < 0.15
        condition = torch.where(dropped, student.null_condition(label[rows]), label[rows])
        alpha, sigma = (part[index].float().view(-1, 1, 1, 1) for part in (signal, noise_scale))
        target = from_x0_eps("v", data[rows], eps, alpha, sigma)
        return (student(alpha * data[rows] + sigma * eps, index.float(), condition) - target).square().mean()

    fit(session, student, loss, session.scale(5000, 4), rate=1e-3, ema=0.997, clip=1.0)


def flawed_signal(network: nn.Module) -> Tensor:
    """sqrt(abar) float64 [N]: the network's schedule as it is."""
    schedule = schedule_of(network)
    return schedule.alpha((torch.arange(schedule.steps, dtype=torch.float64) + 1) / schedule.steps)


def finetune_flawed(session: Session, student: nn.Module) -> None:
    """The training of `finetune_v`, draw for draw, on the schedule as it is: what further updates alone do."""
    data, label = (session.train[key].to(session.device) for key in ("x0", "condition"))
    signal = flawed_signal(session.networks["teacher"]).to(session.device)

    def loss() -> Tensor:
        rows = torch.randint(len(data), (128,), generator=session.rng, device=session.device)
        index = torch.randint(len(signal), (128,), generator=session.rng, device=session.device)
        eps = torch.randn(data[rows].shape, generator=session.rng, device=session.device)
        dropped = torch.rand(128, generator=session.rng, device=session.device) < 0.15
        condition = torch.where(dropped, student.null_condition(label[rows]), label[rows])
        alpha = signal[index].float().view(-1, 1, 1, 1)
        sigma = (1 - alpha.square()).sqrt()
        target = from_x0_eps("v", data[rows], eps, alpha, sigma)
        return (student(alpha * data[rows] + sigma * eps, index.float(), condition) - target).square().mean()

    fit(session, student, loss, session.scale(5000, 4), rate=1e-3, ema=0.997, clip=1.0)


def sample_v(
    network: nn.Module, signal: Tensor, x: Tensor, condition: Tensor, steps: int, guidance: float, share: float
) -> Tensor:
    """Images [B, ...] by DDIM with a network that predicts v, from the last timestep. One row a step and item, two where
    guidance is not 1.
    """
    guided = guidance != 1.0
    asked = torch.cat([network.null_condition(condition), condition]) if guided else condition
    timesteps = trailing_timesteps(steps, len(signal))
    for n, after in zip(timesteps, [*timesteps[1:], -1], strict=True):
        rows = torch.cat([x, x]) if guided else x
        output = network(rows, torch.full((len(rows),), float(n), dtype=x.dtype, device=x.device), asked)
        if guided:
            null, conditional = output.chunk(2)
            output = rescaled_guidance(null, conditional, guidance, share)
        alpha, onward = float(signal[n]), float(signal[after]) if after >= 0 else 1.0
        x0, eps = to_x0_eps("v", output, x, alpha, (1 - alpha**2) ** 0.5)
        x = onward * x0 + (1 - onward**2) ** 0.5 * eps
    return x
