from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.adapters import AdaptedUNet
from stepmark.tracks.image.fusing import guided_rows
from stepmark.tracks.image.schedules import schedule_of, to_x0_eps, uniform_times
from stepmark.tracks.image.solvers import ddim_step
from stepmark.tracks.image.training import fit


@torch.no_grad()
def guided_trajectories(
    network: nn.Module, noise: Tensor, condition: Tensor, scale: Tensor, steps: int
) -> tuple[Tensor, ...]:
    """States, network times, conditions, scales and guided outputs [steps * B, ...] that DDIM with guidance meets."""
    schedule, x, met = schedule_of(network), noise, []
    for t, s in pairwise(uniform_times(steps)):
        time = torch.full((len(x),), schedule.network_time(t), dtype=x.dtype, device=x.device)
        output = guided_rows(network, x, time, condition, scale)
        met.append((x, time, condition, scale, output))
        x = ddim_step(schedule, *to_x0_eps(schedule.prediction, output, x, schedule.alpha(t), schedule.sigma(t)), s)
    return tuple(torch.cat(part) for part in zip(*met, strict=True))


class AGD(Method):
    """Adapter guidance distillation: small adapters on a frozen network do the work of its unconditional branch.

    Guidance needs eps_w = eps(x_t) + w (eps(x_t, c) - eps(x_t)), two evaluations a step. Here the network stays as it is
    and gets adapters behind every residual block: cross-attention from the features (queries) to three tokens made of
    the time, the condition and the scale w,

        h <- h + O softmax(Q h K^T / sqrt(d)) V,      K, V of (time, condition, w)

    with O zero at first, so that training starts from the network itself. They have 4 % of its parameters. Training
    takes no images: guided trajectories are sampled with w uniform in [1, 6], every state is stored with its guided
    prediction, and the adapted network learns to predict the same in one evaluation,

        loss = |eps_adapted(x_t, t, c, w) - eps_w|^2.

    The inputs of training are thus the states that sampling meets, not noised data. Sampling is DDIM with the scale that
    the batch asks for, in the convention above, one evaluation a step.

    Differs from the paper: the network is a class-conditional UNet without cross-attention, so that adapters sit where
    time and class enter it; they read what a block gives, while the authors' read what it is given, in parallel to it, and
    add positional encodings to the tokens; the network predicts a velocity, to which guidance applies alike; trajectories
    have 20 steps.

    What limits it here: 4 % of the parameters of a small network leave little room for all scales up to 6, and two minutes
    of training little time. The distance to the end of each path also counts every error on the way, which the Frechet
    distance of the paper forgives as long as the samples as a whole are right.
    """

    paper = Paper(
        id="agd",
        title="Efficient Distillation of Classifier-Free Guidance using Adapters",
        authors="Jensen, Sadat",
        year=2025,
        arxiv="2503.07274",
        code="cristianpjensen/agd",
    )
    tasks = ("guided/digits_flow",)
    baselines = ("ddim_cfg", "agd_noised_data")
    claims = (
        Claim(
            "endpoint_error[agd,16] <= 1.05 * endpoint_error[ddim_cfg,32]",
            says="sixteen evaluations follow guidance as far as sixteen guided steps of two",
        ),
        Claim(
            "endpoint_error[agd,32] < 0.5 * endpoint_error[euler,32]",
            says="and end less than half as far from it as the network without adapters",
        ),
        Claim(
            "endpoint_error[agd,32] < endpoint_error[agd_noised_data,32]",
            says="trained on the states of guided sampling they follow it better than trained on noised data",
        ),
    )

    trajectories, length, scales = 1000, 20, (1.0, 6.0)
    batch, steps, rate = 64, 1500, 2e-3

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"adapted": AdaptedUNet(session.clone("teacher"))}

    def prepare(self, session: Session) -> None:
        adapted, rng, device = session.networks["adapted"], session.rng, session.device
        label, shape = session.train["condition"].to(device), session.train["x0"].shape[1:]
        n, (low, high) = session.scale(self.trajectories, 8), self.scales
        condition = label[torch.randint(len(label), (n,), generator=rng, device=device)]
        noise = torch.randn(n, *shape, generator=rng, device=device)
        scale = low + (high - low) * torch.rand(n, generator=rng, device=device)
        parts = zip(*(part.split(100) for part in (noise, condition, scale)), strict=True)
        length = session.scale(self.length, 3)
        found = [
            guided_trajectories(session.networks["teacher"], *part, length) for part in session.progress(list(parts))
        ]
        stored = [torch.cat(part) for part in zip(*found, strict=True)]

        def loss() -> Tensor:
            pick = torch.randint(len(stored[0]), (self.batch,), generator=rng, device=device)
            x, t, label, scale, target = (part[pick] for part in stored)
            return (adapted(x, t, label, scale) - target).square().mean()

        fit(session, adapted, loss, session.scale(self.steps, 3), self.rate)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        adapted, x, scale = session.networks["adapted"], batch["noise"], batch["guidance"]
        schedule = schedule_of(adapted)
        for t, s in pairwise(uniform_times(rung)):
            output = adapted(x, torch.full_like(scale, schedule.network_time(t)), batch["condition"], scale)
            x = ddim_step(schedule, *to_x0_eps(schedule.prediction, output, x, schedule.alpha(t), schedule.sigma(t)), s)
        return x
