"""DDIM inversion: back to the noise with the source's caption, and down again with the target's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.editing.inversion import inverted
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.sampling import GuidedByCaption, ddim


class DDIMInversion(Method):
    """DDIM inversion (Song et al. 2021, section 4.3): the source is taken up to the noise that DDIM would have made it from,
    with its own caption and no guidance, and from there down with the target caption and guidance w = 3.

    Both ways have the same evenly spaced times. A step takes one evaluation up and two down, so that there are a third as many
    as the budget. `ddim_inversion_unguided` is not guided on the way down either, and takes half as many as the budget.
    """

    paper = None
    tasks = ("editing/scenes", "parts/scenes")
    baselines = ("copy_source", "sdedit")
    variants = (
        Variant("ddim_inversion_unguided", says="down without guidance, as it went up: more is kept", guidance=1.0),
    )

    guidance = GUIDANCE

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        price = 2 if self.guidance == 1.0 else 3
        if rung < price:
            skip("a step takes one evaluation up, and one down or, with guidance, two")
        teacher, z = session.networks["teacher"], batch["source_latents"]
        times = uniform_times(rung // price)
        x = inverted(Denoiser(teacher, teacher.words(batch["source_condition"])), z, times)[0]
        return ddim(GuidedByCaption(teacher, batch, self.guidance), x, times)
