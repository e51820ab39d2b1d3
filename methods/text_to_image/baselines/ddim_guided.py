"""DDIM with classifier-free guidance in latents: what every row of the track is held against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.sampling import GuidedByCaption, ddim


class DDIMGuided(Method):
    """DDIM (Song et al. 2021, equation 12 with sigma = 0) on evenly spaced times from the noisiest, guided with

        eps_w = eps(x_t) + w (eps(x_t, c) - eps(x_t))

    (Ho and Salimans 2022), w = 3: two evaluations a step, so half as many steps as the budget. A flow's step is Euler's. The
    caption is encoded once. A negative prompt takes the place of the empty caption.
    """

    paper = Paper(
        id="ddim_guided",
        title="Denoising Diffusion Implicit Models",
        authors="Song, Meng, Ermon",
        year=2021,
        arxiv="2010.02502",
        code="ermongroup/ddim",
    )
    tasks = (
        "text_to_image/scenes_eps",
        "text_to_image/scenes_flow",
        "text_to_image/scenes_pastel",
        "free/scenes_eps",
        "negative/scenes_eps",
    )
    unclaimed = "a reference point: the sampler that few-step methods replace"
    variants = (Variant("ddim_unguided", says="captions without guidance, one evaluation a step", guidance=1.0),)

    guidance = GUIDANCE

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        price = 1 if self.guidance == 1.0 else 2
        if rung < price:
            skip("a guided step takes two evaluations")
        denoise = GuidedByCaption(session.networks["teacher"], batch, self.guidance)
        return ddim(denoise, batch["noise"], uniform_times(rung // price))
