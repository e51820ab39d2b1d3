"""What samplers of the track share: a network asked by captions that are encoded once, with guidance and negative prompts; the
standard solvers from one time to another; fresh noise, in a step and on clean latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark.session import Session
from stepmark.tracks.image.schedules import Schedule, add_noise
from stepmark.tracks.image.solvers import Denoiser, ddim_step, dpm_solver_pp_step


class GuidedByCaption(Denoiser):
    """A `Denoiser` of a batch's captions: `denoise(x, t)` -> (x0, eps), `denoise.output(x, t)` -> eps or v.

    The captions are encoded here, once. Where the batch has a negative prompt, guidance leads away from that, and not from the
    empty caption.

    Args:
        network: the teacher or a network like it, with `words`.
        batch: "condition" int64 [B, 32], and "negative" where there are negative prompts.
        guidance: w of null + w (conditional - null); 1 is the plain prediction and costs one row a picture, else two.
    """

    def __init__(self, network: nn.Module, batch: Mapping[str, Tensor], guidance: float) -> None:
        states = network.words(batch["condition"])
        super().__init__(network, states, guidance)
        if guidance != 1.0 and "negative" in batch:
            self.condition = torch.cat([network.words(batch["negative"]), states])


# whole paths ------------------------------------------------------------------------------------


def ddim(denoise: Denoiser, x: Tensor, times: Sequence[float]) -> Tensor:
    """x [B, ...] at times[0] taken to times[-1] in steps of DDIM, of a flow of Euler's: one evaluation each."""
    for t, s in pairwise(times):
        x = ddim_step(denoise.schedule, *denoise(x, t), s)
    return x


def dpm_solver_pp(denoise: Denoiser, x: Tensor, times: Sequence[float]) -> Tensor:
    """The same in steps of DPM-Solver++ (2M)."""
    past: list[tuple[float, Tensor]] = []
    for t, s in pairwise(times):
        past.append((t, denoise(x, t)[0]))
        x = dpm_solver_pp_step(denoise.schedule, x, past, s)
    return x


# noise ------------------------------------------------------------------------------------------


def column(t: Tensor) -> Tensor:
    """t [B] as [B, 1, 1, 1]."""
    return t.view(-1, 1, 1, 1)


def noise_like(x: Tensor, rng: torch.Generator | None) -> Tensor:
    """Standard normal values in the shape of x."""
    return torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)


def noised(session: Session, schedule: Schedule, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x at random times t [B] of the training grid, evenly from 1/1000 to 1, the times, and the noise. For `prepare`."""
    u = 1 - torch.rand(len(x0), generator=session.rng, device=x0.device, dtype=x0.dtype)
    t = (u * schedule.steps).ceil() / schedule.steps
    eps = noise_like(x0, session.rng)
    return add_noise(schedule, x0, eps, t), t, eps


def noisy_move(schedule: Schedule, x0: Tensor, eps: Tensor, t: float, s: float, eta: float) -> tuple[Tensor, float]:
    """Mean and standard deviation of a step from time t to s < t with fresh noise of variance v (Song et al. 2021, equations 12
    and 16, for any schedule):

        alpha_s x0 + sqrt(sigma_s^2 - v) eps,   v = eta^2 sigma_s^2 (1 - (alpha_t sigma_s / (alpha_s sigma_t))^2)

    eta = 0 is DDIM, eta = 1 the ancestral step.
    """
    sigma = schedule.sigma(s)
    left = schedule.alpha(t) * sigma / (schedule.alpha(s) * schedule.sigma(t))
    variance = (eta * sigma) ** 2 * (1 - left**2)
    return schedule.alpha(s) * x0 + max(sigma**2 - variance, 0) ** 0.5 * eps, variance**0.5


def noisy_step(
    schedule: Schedule, x0: Tensor, eps: Tensor, t: float, s: float, eta: float, rng: torch.Generator | None
) -> Tensor:
    """Where such a step ends, with noise that is drawn where there is any."""
    mean, spread = noisy_move(schedule, x0, eps, t, s, eta)
    return mean + spread * noise_like(mean, rng) if spread > 0 else mean
