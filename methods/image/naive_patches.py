from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.patches import Bands
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser, euler_step


class NaivePatches(Method):
    """Naive patches: bands of an image on several devices that know nothing of each other.

    The other end of what DistriFusion is measured against (section 4.1, figure 3): each device samples its band as if it
    were an image of its own, with zeros beyond the border, attention within the band and its own moments in group norms.
    Only the finished bands are put together. The bands are told where in the image they are.
    """

    paper = Paper(
        id="distrifusion",
        title="DistriFusion: Distributed Parallel Inference for High-Resolution Diffusion Models",
        authors="Li, Cai, Cao, Zhang, Cai, Bai, Jia, Liu, Li, Han",
        year=2024,
        arxiv="2402.19481",
        code="mit-han-lab/distrifuser",
    )
    tasks = ("attributes_to_image/shapes16", "class_to_image/digits_flow", "class_to_image/digits_dit")
    baselines = ("euler",)
    claims = (
        Claim("fd[naive_patches,16] > 1.1 * fd[euler,16]", says="bands that know nothing of each other do not fit"),
    )

    ranks = 2

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        network = session.networks["teacher"]
        denoise, bands = Denoiser(network, batch["condition"]), Bands(session.group, reach="none")
        x = bands.own(batch["noise"])
        with bands.on(network):
            for t, s in pairwise(uniform_times(rung)):
                x = euler_step(x, bands.output(denoise, x, t), t, s)
        return bands.join(x)
