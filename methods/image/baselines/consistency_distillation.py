from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import add_noise, schedule_of, uniform_times
from stepmark.tracks.image.training import fit, pseudo_huber


def column(t: Tensor, x: Tensor) -> Tensor:
    """t [B] as [B, 1, ...], to multiply x [B, ...] with."""
    return t.view(-1, *[1] * (x.dim() - 1))


def endpoint(network: nn.Module, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    """f(x, t) = x - t network(x, t): the data that x at time t [B] leads to. f(x, 0) = x whatever the network."""
    return x - column(t, x) * network(x, t, condition)


def ode_step(teacher: nn.Module, x: Tensor, t: Tensor, s: Tensor, condition: Tensor) -> Tensor:
    """Heun's step of the teacher's flow from t to s < t, [B] each: two evaluations."""
    slope = teacher(x, t, condition)
    ahead = teacher(x + column(s - t, x) * slope, s, condition)
    return x + column(s - t, x) * (slope + ahead) / 2


class ConsistencyDistillation(Method):
    """Consistency distillation: a student that maps any point of the teacher's trajectory to its end at once.

    f(x_t, t) = x_t - t v(x_t, t) starts as the teacher's own guess and is trained to agree with itself along the
    teacher's ODE (algorithm 2): for an image noised to t, and the point x_s to which one step of the ODE leads from there,

        loss = d(f(x_t, t), f_ema(x_s, s)),   s = t - 1/16

    f_ema holds an exponential moving average of the student's weights. One evaluation from noise gives a sample; more of
    them alternate between noising the sample to a lower time and mapping it to its end again (algorithm 1), times equally
    spaced. It stands for the family that latent consistency models belong to: here without guidance, with Heun's step as
    the solver, the pseudo-Huber distance of the later work (Song and Dhariwal 2024) and a fixed step.
    """

    paper = Paper(
        id="consistency_models",
        title="Consistency Models",
        authors="Song, Dhariwal, Chen, Sutskever",
        year=2023,
        arxiv="2303.01469",
        code="openai/consistency_models",
    )
    tasks = ("class_to_image/digits_flow", "class_to_image/digits_flow_b")
    baselines = ("euler", "one_step_regression")
    claims = (
        Claim(
            "fd[consistency_distillation,1] < fd[euler,9]",
            says="one step is better than nine of the teacher",
            headline=True,
        ),
        Claim(
            "fd[consistency_distillation,2] < fd[consistency_distillation,1]",
            says="a second step improves the sample",
        ),
    )

    step, ema, batch, steps, rate = 1 / 16, 0.95, 64, 600, 5e-4

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        teacher, student, rng = session.networks["teacher"], session.networks["student"], session.rng
        data, label = (session.train[key].to(session.device) for key in ("x0", "condition"))
        schedule = schedule_of(teacher)
        average = session.clone("student").requires_grad_(False)

        def loss() -> Tensor:
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), student.parameters(), strict=True):
                    slow.lerp_(fast, 1 - self.ema)
                pick = torch.randint(len(data), (self.batch,), generator=rng, device=session.device)
                t = self.step + (1 - self.step) * torch.rand(self.batch, generator=rng, device=session.device)
                noise = torch.randn(data[pick].shape, generator=rng, device=session.device)
                x = add_noise(schedule, data[pick], noise, t)
                below = ode_step(teacher, x, t, t - self.step, label[pick])
                target = endpoint(average, below, t - self.step, label[pick])
            return pseudo_huber(endpoint(student, x, t, label[pick]), target)

        fit(session, student, loss, session.scale(self.steps, 4), self.rate)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        student, condition, x = session.networks["student"], batch["condition"], batch["noise"]
        schedule = schedule_of(student)
        for t, s in pairwise(uniform_times(rung)):
            now, then = (torch.full((len(x),), time, dtype=x.dtype, device=x.device) for time in (t, s))
            x = endpoint(student, x, now, condition)
            if s > 0:
                noise = torch.randn(x.shape, generator=session.rng, device=x.device, dtype=x.dtype)
                x = add_noise(schedule, x, noise, then)
        return x
