"""SDEdit: noise on the source, and the target caption for the way back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.sampling import GuidedByCaption, ddim


class SDEdit(Method):
    """SDEdit (Meng et al. 2022): the source is noised to a time t0 and sampled from there,

        x_t0 = alpha_t0 z + sigma_t0 eps

    with DDIM on evenly spaced times, guided towards the target caption with w = 3: two evaluations a step. The earlier t0,
    the more is kept and the less is edited: t0 is 0.7, `sdedit_weak` 0.5 and `sdedit_strong` 0.9.
    """

    paper = None
    tasks = ("editing/scenes", "parts/scenes")
    baselines = ("copy_source",)
    variants = (
        Variant("sdedit_weak", says="from less noise: more is kept, less edited", strength=0.5),
        Variant("sdedit_strong", says="from more noise: more is edited, less kept", strength=0.9),
    )

    strength = 0.7  # t0

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < 2:
            skip("a guided step takes two evaluations")
        denoise = GuidedByCaption(session.networks["teacher"], batch, GUIDANCE)
        schedule, z = denoise.schedule, batch["source_latents"]
        x = schedule.alpha(self.strength) * z + schedule.sigma(self.strength) * batch["noise"]
        return ddim(denoise, x, uniform_times(rung // 2, self.strength))
