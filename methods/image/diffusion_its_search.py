from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.search import approval, euler_sample, new_verifier, train_verifier
from stepmark.tracks.image.solvers import Denoiser


class RandomSearch(Method):
    """Random search over initial noises: draw several, sample from each, keep what a verifier likes best.

    More steps refine the sample that a noise leads to; they cannot change which one it is. So evaluations beyond a few
    steps are better spent on noises (section 3.1):

        n_1, ..., n_N ~ N(0, I),   x_i = ODE solver from n_i,   return the x_i with the highest V(x_i, wish)

    The verifier V is a supervised one, a small classifier trained here on the train split, log p(wish | x). Every image
    takes 4 Euler steps and one evaluation of V, so that N is a fifth of the rung; a rung that leaves no choice goes into
    steps. The judge that counts is another network: what only pleases V does not help.

    Differs from the paper: verifier and judge are small classifiers instead of Inception or DINO heads, and the model
    knows no classes, as a base model does not know what a person wants.
    """

    paper = Paper(
        id="diffusion_its_search",
        title="Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps",
        authors="Ma, Tong, Jia, Hu, Su, Zhang, Yang, Li, Jaakkola, Jia, Xie",
        year=2025,
        arxiv="2501.09732",
    )
    tasks = ("search/digits",)
    baselines = ("euler",)
    claims = (
        Claim(
            "accuracy[diffusion_its_search,64] > accuracy[euler,64]",
            says="the model cannot hear the wish, so that more steps do not serve it: at 64 evaluations search does better",
        ),
        Claim(
            "accuracy[diffusion_its_search,8] <= accuracy[diffusion_its_search,16] "
            "<= accuracy[diffusion_its_search,32] <= accuracy[diffusion_its_search,64]",
            says="and the more noises are searched, the better",
        ),
    )

    steps = 4  # of one image

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"verifier": new_verifier(session)}

    def prepare(self, session: Session) -> None:
        train_verifier(session, session.networks["verifier"])

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        noise, wish = batch["noise"], batch["condition"]
        denoise, verifier = Denoiser(session.networks["teacher"], wish), session.networks["verifier"]
        tries = rung // (self.steps + 1)
        if tries < 2:
            return euler_sample(denoise, noise, rung)
        best, liked = noise, torch.full((len(noise),), -torch.inf, device=noise.device)
        for _ in range(tries):
            found = euler_sample(denoise, noise, self.steps)
            value = approval(verifier, found, wish)
            better = value > liked
            best = torch.where(better[:, None, None, None], found, best)
            liked = torch.where(better, value, liked)
            noise = torch.randn(noise.shape, generator=session.rng, device=noise.device, dtype=noise.dtype)
        return best
