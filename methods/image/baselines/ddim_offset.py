from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Method
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step


class OffsetStart(Method):
    """DDIM that starts where training ended: control of whatever mends a schedule that does not end in pure noise.

    The last states of training are alpha_T x0 + sigma_T eps. Sampling from eps alone leaves alpha_T x0 out, of which the
    mean is what a network heeds most. Here a picture starts from sigma_T eps + alpha_T c, c [B, C, 1, 1] being the channels'
    means of a training picture drawn at random, whatever its class; nothing is trained. Timesteps are trailing, steps those
    of `ddim`.

    Guttenberg's offset noise (2023) is the neighbour of it that changes the training.
    """

    tasks = ("class_to_image/shades",)
    baselines = ("ddim",)

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """The means [N, C] of the training pictures."""
        return {"means": session.train["x0"].mean((2, 3)).to(session.device)}

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        """Images [B, C, H, W]."""
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        noise, means = batch["noise"], session.state["means"]
        drawn = torch.randint(len(means), (len(noise),), generator=session.rng, device=noise.device)
        schedule = denoise.schedule
        x = schedule.sigma(1.0) * noise + schedule.alpha(1.0) * means[drawn][:, :, None, None]
        for t, s in pairwise(uniform_times(rung)):
            x = ddim_step(schedule, *denoise(x, t), s)
        return x
