from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.cascade import base_samples, from_pivot
from stepmark.tracks.image.solvers import Denoiser


class SelfCascadeFree(Method):
    """Self-cascade without tuning: the small sample of a network is the pivot of its large one.

    A network composes well at the size it was trained on only. So (section 3.3)

        z_0   sample at the size of training
        z_K = alpha_K up(z_0) + sigma_K eps,   K < T        (equation 5, up: bilinear)
        then denoise from K to 0 at the larger size, with the same network

    Composition comes from the pivot, and the steps from T to K are left out: large images start at t = 0.5. Half of the
    rung are steps at the small size, half at the large one.

    Differs from the paper: one doubling instead of several; pixels instead of latents; Euler steps of a flow.
    """

    paper = Paper(
        id="self_cascade_diffusion",
        title="Make a Cheap Scaling: A Self-Cascade Diffusion Model for Higher-Resolution Adaptation",
        authors="Guo, He, Chen, Xia, Cun, Wang, Huang, Zhang, Wang, Chen, Shan, Wen",
        year=2024,
        arxiv="2402.10491",
        code="GuoLanqing/Self-Cascade",
    )
    tasks = ("attributes_to_image/shapes32",)
    baselines = ("euler", "upsampled_samples")
    claims = (
        Claim(
            "fd[self_cascade_free,16] < fd[euler,16] and single[self_cascade_free,16] >= single[euler,16]",
            says="composition is better than that of direct sampling at the larger size",
        ),
        Claim(
            "misfit[self_cascade_free,16] < misfit[upsampled_samples,16]",
            says="and shapes are sharper than those of an upsampled small sample",
        ),
    )

    start = 0.5

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        noise, network = batch["noise"], session.networks["teacher"]
        denoise = Denoiser(network, batch["condition"])
        pivot = base_samples(denoise, noise, rung // 2)
        eps = torch.randn(noise.shape, generator=session.rng, device=noise.device, dtype=noise.dtype)
        return from_pivot(denoise.output, network, pivot, eps, rung - rung // 2, self.start)
