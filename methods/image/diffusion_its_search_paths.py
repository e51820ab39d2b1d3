from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import Schedule, uniform_times
from stepmark.tracks.image.search import approval, euler_sample, new_verifier, train_verifier
from stepmark.tracks.image.solvers import Denoiser, ddim_step, euler_step


def noise_again(schedule: Schedule, x: Tensor, noise: Tensor, t: float, s: float) -> Tensor:
    """From x [B, ...] at time t forward to the noisier time s: the marginal of x_s, given that x is one of x_t."""
    ratio = schedule.alpha(s) / schedule.alpha(t)
    return ratio * x + (schedule.sigma(s) ** 2 - (ratio * schedule.sigma(t)) ** 2) ** 0.5 * noise


class PathSearch(Method):
    """Search over paths: branch while sampling, judge what each branch is heading for, keep the best.

    N noises are brought to an intermediate time. Then, round after round (section 3.1, Search over Paths),

        each path at t gets M copies with new noise, forward from t to t + df
        each copy takes a step of the ODE back to t + df - db < t, and V judges the x0 that was predicted for it
        the N copies with the highest V(x0, wish) go on

    until the time is 0, where the best of the N is returned. Time goes down by quarters; df is an eighth. A round costs
    two evaluations for each of N M copies, the network's and the verifier's; at the last the prediction is the image.
    N is 2 and M what the rung allows; below 14 evaluations there is one path. The verifier is a small classifier trained
    here, log p(wish | x).

    Differs from the paper: paths compete within one item, as there; the verifier reads the prediction of the step itself,
    so that judging needs no further evaluation of the network.
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
            "accuracy[diffusion_its_search_paths,64] > accuracy[euler,64]",
            says="at 64 evaluations search over paths is better than more denoising steps",
        ),
        Claim(
            "accuracy[diffusion_its_search_paths,16] < accuracy[diffusion_its_search_paths,32] "
            "< accuracy[diffusion_its_search_paths,64]",
            says="more paths, better images",
        ),
    )

    paths, levels = 2, 4
    forward = 0.125  # df

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"verifier": new_verifier(session)}

    def prepare(self, session: Session) -> None:
        train_verifier(session, session.networks["verifier"])

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        first, wish = batch["noise"], batch["condition"]
        verifier, rounds = session.networks["verifier"], 2 * (self.levels - 1)
        if rung < 1 + rounds:
            return euler_sample(Denoiser(session.networks["teacher"], wish), first, rung)
        width = min(self.paths, rung // (1 + rounds))
        copies = (rung - width) // (rounds * width)

        def draw(n: int) -> Tensor:
            shape = (n * len(first), *first.shape[1:])
            return torch.randn(shape, generator=session.rng, device=first.device, dtype=first.dtype)

        times = uniform_times(self.levels)
        x = torch.cat([first, draw(width - 1)])  # paths of an item stand len(first) rows apart, as do their copies
        denoise = Denoiser(session.networks["teacher"], wish.repeat(width))
        x = euler_step(x, denoise.output(x, 1.0), 1.0, times[1])
        wishes = wish.repeat(width * copies)
        denoise = Denoiser(session.networks["teacher"], wishes)
        for t, s in pairwise(times[1:]):
            up = t + self.forward
            x = noise_again(denoise.schedule, x.repeat(copies, *[1] * (x.dim() - 1)), draw(width * copies), t, up)
            x0, eps = denoise(x, up)
            value = approval(verifier, x0, wishes).view(-1, len(first))
            x = ddim_step(denoise.schedule, x0, eps, s)
            best = value.topk(width if s > 0 else 1, dim=0).indices  # [width, B]
            rows = (best * len(first) + torch.arange(len(first), device=best.device)).flatten()
            x = x[rows]
        return x
