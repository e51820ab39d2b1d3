"""Self-guided minority sampling: towards what the model itself cannot reconstruct."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import add_noise, uniform_times
from stepmark.tracks.image.solvers import Denoiser


class Guide(nn.Module):
    """Prediction of x0 and eps at x_t, and the direction in which x_t becomes less likely. Has no weights of its own.

    A network for the sake of the count: its rows stand for the pass backwards, the two evaluations inside are counted as
    the denoiser's.
    """

    def forward(
        self, x: Tensor, t: float, level: float, noise: Tensor, denoise: Denoiser
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x0, eps and the gradient of |x0(x_t) - x0(x_level)| over its largest entry, all [B, ...]."""
        with torch.enable_grad():
            state = x.detach().requires_grad_(True)
            x0, eps = denoise(state.clone(), t)  # counting FLOPs does not bear a leaf here
            with torch.no_grad():
                times = torch.full((len(x),), level, dtype=x.dtype, device=x.device)
                again = denoise(add_noise(denoise.schedule, x0, noise, times), level)[0]
            loss = (x0 - again).flatten(1).norm(dim=1).sum()
        (gradient,) = torch.autograd.grad(loss, state)
        largest = gradient.flatten(1).abs().amax(1).clamp(min=1e-12).view(-1, *[1] * (x.dim() - 1))
        return x0.detach(), eps.detach(), gradient / largest


class SelfGuidedMinority(Method):
    """Self-guided minority sampling: push samples to where the model itself cannot reconstruct what it predicts.

    A common x0 survives being noised and denoised again, a rare one turns into something common. So the reconstruction
    loss of the posterior mean tells how unlikely the features of x_t are, with no classifier (equations 6 to 8):

        x0   = E[x0 | x_t]
        x0'  = E[x0 | x_s],   x_s = alpha_s x0 + sigma_s z,   s = 0.8
        g    = grad_{x_t} |x0 - x0'|,   x0' held fixed
        x_{t-1} <- ancestral step + w v_t g / max |g|

    with v_t the variance of the step, so that guidance fades as the noise does. It acts at every fifth step only
    (intermittent guidance), the others are plain. A guided step costs three evaluations, two and a pass backwards, so the
    rung pays for S steps with S + 2 ceil(S / 5) <= rung.

    The choice of s, the fixed x0', the norm and the scaling are those of the authors' code; w is 5 instead of 1, as the
    chain has some tens of steps and points of the plane need no restraint that keeps images on their manifold.

    Differs from the paper: the distance is that of the points, LPIPS needs a network of its own.
    """

    paper = Paper(
        id="sg_minority",
        title="Self-Guided Generation of Minority Samples Using Diffusion Models",
        authors="Um, Ye",
        year=2024,
        arxiv="2407.11555",
        code="soobin-um/sg-minority",
    )
    tasks = ("minority/rare_eps",)
    baselines = ("ancestral", "ddim")
    claims = (
        Claim(
            "minority_share[sg_minority,64] > 2 * max(minority_share[ancestral,64], minority_share[ddim,64])",
            says="more than twice the share of rare samples, at the same number of evaluations",
        ),
        Claim(
            "neighbour_distance[sg_minority,64] > neighbour_distance[ancestral,64] "
            "and precision[sg_minority,64] >= 0.85 * precision[ancestral,64]",
            says="samples lie where data are sparse, and still among the data",
        ),
    )

    weight, level, every = 5.0, 0.8, 5

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"guide": Guide()}

    def steps(self, rung: int) -> int:
        """The most steps S with S + 2 ceil(S / every) <= rung."""
        return max(s for s in range(1, rung + 1) if s + 2 * -(-s // self.every) <= rung or s == 1)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise, x = Denoiser(session.networks["teacher"], batch["condition"]), batch["noise"]
        schedule, guide = denoise.schedule, session.networks["guide"]

        def draw() -> Tensor:
            return torch.randn(x.shape, generator=session.rng, device=x.device, dtype=x.dtype)

        for step, (t, s) in enumerate(pairwise(uniform_times(self.steps(rung)))):
            push = torch.zeros_like(x)
            if step % self.every == 0 and self.weight:
                x0, eps, push = guide(x, t, self.level, draw(), denoise)
            else:
                x0, eps = denoise(x, t)
            ratio = schedule.alpha(t) / schedule.alpha(s)
            variance = (schedule.sigma(s) / schedule.sigma(t)) ** 2 * (1 - ratio**2)
            mean = schedule.alpha(s) * x0 + max(schedule.sigma(s) ** 2 - variance, 0) ** 0.5 * eps
            x = mean + self.weight * variance * push + variance**0.5 * draw()
        return x
