from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.adapters import AdaptedUNet
from stepmark.tracks.image.fusing import guided_rows
from stepmark.tracks.image.schedules import add_noise, schedule_of, to_x0_eps, uniform_times
from stepmark.tracks.image.solvers import ddim_step
from stepmark.tracks.image.training import fit


class AGDNoisedData(Method):
    """The adapters of adapter guidance distillation trained on noised data: the ablation of its trajectories.

    The same frozen network, adapters, loss, number of stored states and updates as `agd`. Only the states differ: real
    images noised to the same times, x_t = (1 - t) x0 + t eps, as earlier distillation of guidance takes them, with the
    guided prediction at x_t as target,

        loss = |eps_adapted(x_t, t, c, w) - eps_w(x_t, t, c)|^2,      w uniform in [1, 6].

    Guided sampling leaves the paths of noised data, and does so the further the larger w is.
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

    trajectories, length, scales = 1000, 20, (1.0, 6.0)
    batch, steps, rate = 64, 1500, 2e-3

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"adapted": AdaptedUNet(session.clone("teacher"))}

    def prepare(self, session: Session) -> None:
        teacher, adapted = session.networks["teacher"], session.networks["adapted"]
        rng, device, schedule = session.rng, session.device, schedule_of(adapted)
        data, label = (session.train[key].to(device) for key in ("x0", "condition"))
        length, (low, high) = session.scale(self.length, 3), self.scales
        n = length * session.scale(self.trajectories, 8)
        pick = torch.randint(len(data), (n,), generator=rng, device=device)
        t = torch.tensor(uniform_times(length)[:-1], device=device).repeat(n // length)
        x = add_noise(schedule, data[pick], torch.randn(data[pick].shape, generator=rng, device=device), t)
        scale = low + (high - low) * torch.rand(n, generator=rng, device=device)
        stored = [x, schedule.network_time(t), label[pick], scale]
        parts = zip(*(part.split(100) for part in stored), strict=True)
        with torch.no_grad():
            stored.append(torch.cat([guided_rows(teacher, *part) for part in session.progress(list(parts))]))

        def loss() -> Tensor:
            pick = torch.randint(n, (self.batch,), generator=rng, device=device)
            x, t, condition, scale, target = (part[pick] for part in stored)
            return (adapted(x, t, condition, scale) - target).square().mean()

        fit(session, adapted, loss, session.scale(self.steps, 3), self.rate)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        adapted, x, scale = session.networks["adapted"], batch["noise"], batch["guidance"]
        schedule = schedule_of(adapted)
        for t, s in pairwise(uniform_times(rung)):
            output = adapted(x, torch.full_like(scale, schedule.network_time(t)), batch["condition"], scale)
            x = ddim_step(schedule, *to_x0_eps(schedule.prediction, output, x, schedule.alpha(t), schedule.sigma(t)), s)
        return x
