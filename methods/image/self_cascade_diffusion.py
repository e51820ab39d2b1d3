from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.cascade import Cascade, base_samples, from_pivot, train_cascade
from stepmark.tracks.image.solvers import Denoiser


class SelfCascadeDiffusion(Method):
    """Self-cascade diffusion: a network adapts to twice its size by tiny feature upsamplers, everything else frozen.

    As in `self_cascade_free`, the small sample z_0, doubled and noised to t = 0.5, is where the large one starts. Here the
    network also sees z_0 itself while it denoises: at every time t the clean z_0 passes through the frozen network, and
    its features at each level of the encoder correct those of the large image (section 3.4, equation 6)

        f_n <- f_n + phi_n(up(h_n), t)

    with h_n and f_n what leaves level n (and the middle block) for the small and the large image. Only the phi_n learn,
    some thousand parameters in all, by the network's own loss on a thousand large images, whose halves are their pivots.
    `FeatureUpsampler` and `Cascade` are in `bench/stepmark/tracks/image/cascade.py`. A large step is one row of a larger
    network; what it costs is in the FLOPs, with the decoder's pass over z_0, whose outcome is thrown away.

    Differs from the paper: one doubling, pixels instead of latents, a flow instead of a diffusion. phi_n is one narrow
    block instead of two, starts at zero and learns only the times that are sampled. It is used at all of them; the
    released code goes without it in the last tenth of the timesteps.
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
    baselines = ("euler", "self_cascade_free", "upsampled_samples")
    claims = (
        Claim(
            "fd[self_cascade_diffusion,16] < fd[euler,16] and misfit[self_cascade_diffusion,16] < misfit[euler,16]",
            says="composition and shapes are better than those of direct sampling at the larger size",
        ),
        Claim(
            "misfit[self_cascade_diffusion,16] < misfit[self_cascade_free,16] "
            "and misfit[self_cascade_diffusion,16] < misfit[upsampled_samples,16]",
            says="with tuned upsamplers shapes are sharper than without, and than those of an upsampled small sample",
        ),
    )

    start = 0.5

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"cascade": Cascade(session.clone("teacher"))}

    def prepare(self, session: Session) -> None:
        train_cascade(session, session.networks["cascade"], self.start)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        noise, condition, cascade = batch["noise"], batch["condition"], session.networks["cascade"]
        pivot = base_samples(Denoiser(session.networks["teacher"], condition), noise, rung // 2)
        eps = torch.randn(noise.shape, generator=session.rng, device=noise.device, dtype=noise.dtype)

        def velocity(x: Tensor, t: float) -> Tensor:
            return cascade(x, pivot, torch.full((len(x),), t, dtype=x.dtype, device=x.device), condition)

        return from_pivot(velocity, cascade, pivot, eps, rung - rung // 2, self.start)
