from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.search import approval, euler_sample, new_verifier, train_verifier
from stepmark.tracks.image.solvers import Denoiser


class ZeroOrderSearch(Method):
    """Zero-order search over initial noises: climb from a noise to the best of its neighbours, again and again.

    Random search uses nothing of what it has seen, and with a verifier that can be fooled it finds what fools it. Here the
    search stays near (section 3.1): from the pivot n, the noise that was given,

        n_i = (n + lambda z_i) / sqrt(1 + lambda^2),   z_i ~ N(0, I),   i = 1..N
        x_i = ODE solver from n_i;   the n_i with the highest V(x_i, wish) is the next pivot

    so long as it is better than the pivot itself. Noises keep unit variance. Images take 4 Euler steps and one evaluation
    of the verifier, a small classifier trained here, so that a fifth of the rung are noises: the pivot's, then rounds of N.

    Differs from the paper: a pivot that is better than all of its neighbours stays; the verifier is a small classifier.
    """

    paper = Paper(
        id="diffusion_its_search",
        title="Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps",
        authors="Ma, Tong, Jia, Hu, Su, Zhang, Yang, Li, Jaakkola, Jia, Xie",
        year=2025,
        arxiv="2501.09732",
    )
    tasks = ("search/digits",)
    baselines = ("euler", "diffusion_its_search")
    claims = (
        Claim(
            "accuracy[diffusion_its_search_zero_order,64] >= accuracy[euler,4] "
            "and accuracy[diffusion_its_search_zero_order,64] > accuracy[euler,64]",
            says="a judge who was not asked prefers the searched image to the first one, and to one of more steps",
        ),
        Claim(
            "accuracy[diffusion_its_search_zero_order,16] <= accuracy[diffusion_its_search_zero_order,32] "
            "<= accuracy[diffusion_its_search_zero_order,64]",
            says="the longer the search, the better",
        ),
    )

    steps, neighbours = 4, 2
    reach = 0.7  # lambda

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"verifier": new_verifier(session)}

    def prepare(self, session: Session) -> None:
        train_verifier(session, session.networks["verifier"])

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        pivot, wish = batch["noise"], batch["condition"]
        denoise, verifier = Denoiser(session.networks["teacher"], wish), session.networks["verifier"]
        tries = rung // (self.steps + 1)
        if tries < 2:
            return euler_sample(denoise, pivot, rung)
        best = euler_sample(denoise, pivot, self.steps)
        liked = approval(verifier, best, wish)
        for first in range(1, tries, self.neighbours):
            centre = pivot
            for _ in range(first, min(first + self.neighbours, tries)):
                step = torch.randn(pivot.shape, generator=session.rng, device=pivot.device, dtype=pivot.dtype)
                noise = (centre + self.reach * step) / (1 + self.reach**2) ** 0.5
                found = euler_sample(denoise, noise, self.steps)
                value = approval(verifier, found, wish)
                better = value > liked
                chosen = better[:, None, None, None]
                best, pivot = torch.where(chosen, found, best), torch.where(chosen, noise, pivot)
                liked = torch.where(better, value, liked)
        return best
