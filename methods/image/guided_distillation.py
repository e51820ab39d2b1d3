"""Guided distillation: classifier-free guidance is folded into one network, whose steps are then halved again and again."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.backbones.unet import TRAIN_TIMESTEPS
from stepmark.session import Session
from stepmark.tracks.image.fusing import guided_rows
from stepmark.tracks.image.schedules import Schedule, add_noise, schedule_of, to_x0_eps, uniform_times
from stepmark.tracks.image.solvers import ddim_step
from stepmark.tracks.image.training import fit, sinusoids


class WeightedUNet(nn.Module):
    """A copy of the teacher that takes the guidance weight w [B] too, embedded like the time; ignored until trained."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.prediction = base, base.prediction
        width = base.table.embedding_dim
        self.weight = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.weight[-1].weight)
        nn.init.zeros_(self.weight[-1].bias)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, w: Tensor) -> Tensor:
        label = self.base.embed(self.base.table(condition)) + self.weight(sinusoids(w, top=10.0))
        planes = torch.cat([x, self.base.coordinates.expand(len(x), -1, -1, -1)], 1)
        return self.base.unet(planes, t * TRAIN_TIMESTEPS, class_labels=label, return_dict=False)[0]


def column(t: Tensor) -> Tensor:
    """t [B] as [B, 1, 1, 1]."""
    return t.view(-1, 1, 1, 1)


def predicted(student: nn.Module, x: Tensor, t: Tensor, condition: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x0 and eps that a student predicts at times t [B]."""
    schedule = schedule_of(student)
    output = student(x, schedule.network_time(t), condition, w)
    return to_x0_eps(schedule.prediction, output, x, column(schedule.alpha(t)), column(schedule.sigma(t)))


def progressive_target(schedule: Schedule, x: Tensor, t: Tensor, end: Tensor, s: Tensor) -> Tensor:
    """The x0 with which one DDIM step from x at t lands on `end` at s (algorithm 2); t and s broadcast against x.

    (end - (sigma_s / sigma_t) x) / (alpha_s - (sigma_s / sigma_t) alpha_t)
    """
    ratio = schedule.sigma(s) / schedule.sigma(t)
    return (end - ratio * x) / (schedule.alpha(s) - ratio * schedule.alpha(t))


def weighted_error(schedule: Schedule, x0: Tensor, target: Tensor, t: Tensor) -> Tensor:
    """max(SNR(t), 1) |x0 - target|^2, mean over pixels and items: the truncated weight."""
    weight = (schedule.alpha(t) / schedule.sigma(t)).square().clamp(min=1)
    return (column(weight) * (x0 - target).square()).mean()


class GuidedDistillation(Method):
    """Distillation of guided diffusion: guidance folded into one network, then its steps halved again and again.

    Stage 1 (algorithm 1). A copy of the teacher is given the guidance weight w as a further input and learns, for w
    uniform in [0, 4] and images noised to a uniform time t,

        loss = max(SNR(t), 1) |x0_student(x_t, c, w) - x0_w(x_t, c)|^2
        x0_w = (1 + w) x0_teacher(x_t, c) - w x0_teacher(x_t)

    so that one evaluation does the work of two. Stage 2 (algorithm 2). For N = 16, 8, 4, 2, 1 an N-step student starts
    from its predecessor and learns to make in one DDIM step, from t = i / N, what that one makes in two of half the
    length; the target is the x0 that leads there:

        x0 = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t),      s = t - 1/N

    with the same loss, w still an input. Sampling is deterministic DDIM with the student of the largest N within the
    budget and w = 0.3, or what the batch asks for; with 32 evaluations or more the stage-1 student is used. The new input
    starts at zero.

    Differs from the paper: the teacher is a rectified flow, whose v = eps - x0 takes the place of its v, and DDIM's step
    is Euler's; 400 updates in stage 1 and 200 in each halving, at half the rate; halving starts at 32 steps; the stochastic
    sampler is left out. The student of stage 1 alone is not run in few steps, so that folding guidance in and halving are not
    told apart there.

    Guidance of scale 3 moves samples away from the data, so that a student which ignored it would have the better Frechet
    distance: the unguided sampler stands in the claims beside it, whose ends are far from the guided ones.

    What limits it here: a few hundred updates leave the student of stage 1 a distance from strong guidance that no number of
    steps makes up for, and every halving inherits it. At few evaluations, where the guided sampler's own steps are too
    long, that matters less.
    """

    paper = Paper(
        id="guided_distillation",
        title="On Distillation of Guided Diffusion Models",
        authors="Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans",
        year=2023,
        arxiv="2210.03142",
    )
    tasks = ("guided/digits_flow", "class_to_image/digits_flow")
    baselines = ("ddim_cfg", "euler")
    trainings = 3
    claims = (
        Claim(
            "fd[guided_distillation,4..16] <= 1.25 * fd[ddim_cfg,64] "
            "and endpoint_error[guided_distillation,4..16] < 0.5 * endpoint_error[euler,64]",
            says="from four evaluations on they are within 25 % of sixty-four of the guided sampler, and follow its guidance",
            headline=True,
            setting="400 updates of stage 1, which leave it a distance from strong guidance at any number of steps",
        ),
        Claim(
            "fd[guided_distillation,2..16] < fd[ddim_cfg,2..16] "
            "and endpoint_error[guided_distillation,2..16] < endpoint_error[euler,2..16]",
            says="in few evaluations the images are better than the guided sampler's own, and guidance is heeded",
            setting="400 updates of stage 1, which leave it a distance from strong guidance at any number of steps",
        ),
        Claim(
            "endpoint_error[guided_distillation,2..16] < endpoint_error[ddim_cfg,2..16]",
            says="with two to sixteen evaluations they end nearer to where guidance leads than the guided sampler's own",
            setting="400 updates of stage 1, which leave it a distance from strong guidance at any number of steps",
        ),
        Claim(
            "endpoint_error[guided_distillation,32] <= 1.1 * endpoint_error[ddim_cfg,64]",
            says="guidance folded into one network is followed as far for half of the evaluations",
            setting="400 updates of stage 1, which leave it a distance from strong guidance at any number of steps",
        ),
    )

    longest, lengths = 32, (16, 8, 4, 2, 1)
    most, weight = 4.0, 0.3  # of w: in training, in sampling
    batch, first_steps, steps, rate = 64, 400, 200, 1e-3

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {f"student_{n}": WeightedUNet(session.clone("teacher")) for n in (self.longest, *self.lengths)}

    def prepare(self, session: Session) -> None:
        teacher, rng, device = session.networks["teacher"], session.rng, session.device
        data, label = (session.train[key].to(device) for key in ("x0", "condition"))
        schedule, size = schedule_of(teacher), session.scale(self.batch, 8)

        def draw(steps: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Noised images, their times (uniform, or on a grid of so many steps), classes and guidance weights."""
            pick = torch.randint(len(data), (size,), generator=rng, device=device)
            t = torch.rand(size, generator=rng, device=device).clamp(min=1e-3)
            if steps is not None:
                t = (t * steps).ceil() / steps
            noise = torch.randn(data[pick].shape, generator=rng, device=device)
            w = self.most * torch.rand(size, generator=rng, device=device)
            return add_noise(schedule, data[pick], noise, t), t, label[pick], w

        student = session.networks[f"student_{self.longest}"]

        def guided() -> Tensor:
            x, t, condition, w = draw(None)
            with torch.no_grad():
                output = guided_rows(teacher, x, schedule.network_time(t), condition, 1 + w)
                alpha, sigma = column(schedule.alpha(t)), column(schedule.sigma(t))
                target = to_x0_eps(schedule.prediction, output, x, alpha, sigma)[0]
            return weighted_error(schedule, predicted(student, x, t, condition, w)[0], target, t)

        fit(session, student, guided, session.scale(self.first_steps, 1), self.rate)
        for n in self.lengths:
            self.halve(session, n, lambda n=n: draw(n))

    def halve(self, session: Session, n: int, draw: Any) -> None:
        """Train the n-step student on two steps each of the 2n-step one."""
        longer, student = (session.networks[f"student_{k}"] for k in (2 * n, n))
        student.load_state_dict(longer.state_dict())
        schedule = schedule_of(student)

        def loss() -> Tensor:
            x, t, condition, w = draw()
            with torch.no_grad():
                end = x
                for k in (0, 1):
                    now, then = t - k / (2 * n), t - (k + 1) / (2 * n)
                    end = ddim_step(schedule, *predicted(longer, end, now, condition, w), column(then))
                target = progressive_target(schedule, x, column(t), end, column(then))
            return weighted_error(schedule, predicted(student, x, t, condition, w)[0], target, t)

        fit(session, student, loss, session.scale(self.steps, 1), self.rate / 2)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        n = max(k for k in (self.longest, *self.lengths) if k <= rung)
        student, x = session.networks[f"student_{n}"], batch["noise"]
        schedule = schedule_of(student)
        scale = batch.get("guidance")  # 1 + w
        w = torch.full((len(x),), self.weight, dtype=x.dtype, device=x.device) if scale is None else scale - 1
        for t, s in pairwise(uniform_times(rung if n == self.longest else n)):
            x0, eps = predicted(student, x, torch.full_like(w, t), batch["condition"], w)
            x = ddim_step(schedule, x0, eps, s)
        return x
