from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from stepmark import Method
from stepmark.session import Session
from stepmark.tracks.image.cascade import base_samples
from stepmark.tracks.image.solvers import Denoiser


class UpsampledSamples(Method):
    """Samples at the size of training, enlarged by bicubic interpolation: composition of the best, no detail.

    All of the rung are Euler steps at the small size, whose rows cost a quarter of those of the large one.
    """

    tasks = ("attributes_to_image/shapes32",)
    baselines = ("euler",)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        return interpolate(base_samples(denoise, batch["noise"], rung), scale_factor=2, mode="bicubic")
