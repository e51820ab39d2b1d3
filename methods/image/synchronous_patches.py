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


class SynchronousPatches(Method):
    """Synchronous patch parallelism: bands of an image on several devices, which wait for each other in every layer.

    What DistriFusion (section 4.2) is measured against: keys and values, border rows and moments of group norms are those
    of the same step, so that the image is that of one device up to rounding, and every exchange is waited for.
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
        Claim(
            "abs(fd[synchronous_patches,16] - fd[euler,16]) <= 0.001 * fd[euler,16] and "
            "rank_flops[synchronous_patches,16] <= 0.6 * flops[euler,16]",
            says="the images are those of one device, for little more than half of the work on each of two",
        ),
    )

    ranks = 2

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        network = session.networks["teacher"]
        denoise, bands = Denoiser(network, batch["condition"]), Bands(session.group)
        x = bands.own(batch["noise"])
        with bands.on(network):
            for t, s in pairwise(uniform_times(rung)):
                x = euler_step(x, bands.output(denoise, x, t), t, s)
        return bands.join(x)
