"""Ancestral sampling, the reverse chain itself: the reference point of samplers that push it elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Method
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser


class Ancestral(Method):
    """Ancestral sampling: the reverse Markov chain of a diffusion model, on a short grid of timesteps.

    A step from t to s draws from the posterior of x_s given x_t and the prediction of x0 (Ho, Jain and Abbeel 2020,
    equations 6 and 7; DDIM with eta = 1):

        v   = sigma_s^2 / sigma_t^2 (1 - alpha_t^2 / alpha_s^2)
        x_s = alpha_s x0 + (sigma_s^2 - v)^{1/2} eps + v^{1/2} z,   z ~ N(0, I)

    One evaluation a step; the last step, to the data, adds no noise. Timesteps are equally spaced from the last one down.
    """

    tasks = ("minority/rare_eps",)
    baselines = ("ddim",)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise, x = Denoiser(session.networks["teacher"], batch["condition"]), batch["noise"]
        schedule = denoise.schedule
        for t, s in pairwise(uniform_times(rung)):
            x0, eps = denoise(x, t)
            ratio = schedule.alpha(t) / schedule.alpha(s)
            variance = (schedule.sigma(s) / schedule.sigma(t)) ** 2 * (1 - ratio**2)
            z = torch.randn(x.shape, generator=session.rng, device=x.device, dtype=x.dtype)
            mean = schedule.alpha(s) * x0 + max(schedule.sigma(s) ** 2 - variance, 0) ** 0.5 * eps
            x = mean + variance**0.5 * z
        return x
