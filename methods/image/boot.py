from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import Schedule, schedule_of
from stepmark.tracks.image.training import fit


def signal_step(schedule: Schedule, y: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One DDIM step of the Signal-ODE, y_s = y_t + (1 - e^(lambda_t - lambda_s)) (x0 - y_t) (equation 8).

    y and x0 [B, ...], the teacher's prediction at alpha_t y + sigma_t eps; times t > s [B]; lambda = log(alpha / sigma).
    """
    ratio = (schedule.alpha(t) * schedule.sigma(s)) / (schedule.sigma(t) * schedule.alpha(s))
    return x0 + ratio.view(-1, *[1] * (y.dim() - 1)) * (y - x0)


class Boot(Method):
    """BOOT: distil a sampler into one step from noise alone, each level bootstrapping on the one above it.

    The student y(eps, t) predicts from the initial noise the signal of the teacher's trajectory at every level,
    y_t = (x_t - sigma_t eps) / alpha_t, so that y(eps, 0) is a sample in one evaluation. The signal obeys an ODE without
    a noise term (equation 7), and two levels t and s = t - delta are tied by one step of it with the teacher's x0:

        loss = |y(eps, s) - sg[y_s]|^2 / delta^2,   y_s = signal step from y(eps, t), x0 = f(alpha_t y(eps, t) + sigma_t eps, t)
             + beta |y(eps, 1) - f(eps, 1)|^2                                                     (equations 9 and 10)

    No image is read: only noise and labels. The student starts from the teacher's weights, its time input meaning the
    level to reach; with a flow teacher y(eps, t) = eps - student(eps, t), which meets the boundary at t = 1 from the
    start. Levels t are uniform and delta is 1/16. The factor 1 / delta^2 is left out: with beta 1 beside it
    the boundary weighs as much as with beta 256 in the loss as written, which matters little where it is met from the start.

    Differs from the paper: a flow instead of a diffusion, so that the boundary is met at once; the teacher is
    conditional and not guided; the loss has no weight over levels; 700 updates, where regression on
    stored samples has 1000 at twice the rate.

    One evaluation is made at every rung: more cannot help a map that starts from the noise.

    What limits it here: sixteen levels learn from one another, each from the one above it as that stands at the time, and
    a few hundred updates do not carry what the uppermost knows down to the samples. One step is much nearer to the data
    than four of the teacher, but not as near as nine, and regression on stored samples, whose target is there from the
    first update, gets further, as does consistency distillation, which reads the images.
    """

    paper = Paper(
        id="boot",
        title="BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping",
        authors="Gu, Zhai, Zhang, Liu, Susskind",
        year=2023,
        arxiv="2306.05544",
    )
    tasks = ("class_to_image/digits_flow", "class_to_image/digits_flow_b")
    baselines = ("euler", "one_step_regression")
    claims = (
        Claim(
            "fd[boot,1] <= fd[euler,9]",
            says="one step is as good as about ten of the teacher",
            headline=True,
            setting="700 updates: what is right at a level has hardly reached the lowest one, where samples are made",
        ),
        Claim("fd[boot,1] < fd[euler,4]", says="and better than four"),
        Claim(
            "fd[boot,1] <= 1.1 * fd[one_step_regression,1]",
            says="and within 10 % of regression on stored samples of the teacher, which have to be made first",
            setting="700 updates: what is right at a level has hardly reached the lowest one, where samples are made",
        ),
        Claim(
            "fd[boot,1] <= 1.1 * fd[consistency_distillation,1]",
            says="and of consistency distillation, which reads the images",
            setting="700 updates: what is right at a level has hardly reached the lowest one, where samples are made",
        ),
    )

    delta, beta, batch, steps, rate = 1 / 16, 1.0, 64, 700, 5e-4

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        teacher, student, rng = session.networks["teacher"], session.networks["student"], session.rng
        labels = session.train["condition"].to(session.device)
        shape = (self.batch, *session.train["x0"].shape[1:])  # all that is taken of the images
        schedule = schedule_of(teacher)

        def column(t: Tensor) -> Tensor:
            return t.view(-1, *[1] * (len(shape) - 1))

        def predicted(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return x - column(schedule.sigma(t)) * teacher(x, t, condition)

        def loss() -> Tensor:
            condition = labels[torch.randint(len(labels), (self.batch,), generator=rng, device=session.device)]
            eps = torch.randn(shape, generator=rng, device=session.device)
            t = self.delta + (1 - self.delta) * torch.rand(self.batch, generator=rng, device=session.device)
            s, one = t - self.delta, torch.ones_like(t)
            with torch.no_grad():
                y = self.signal(student, eps, t, condition)
                x0 = predicted(column(schedule.alpha(t)) * y + column(schedule.sigma(t)) * eps, t, condition)
                target = signal_step(schedule, y, x0, t, s)
                edge = predicted(eps, one, condition)
            both = self.signal(
                student, eps.repeat(2, *[1] * (len(shape) - 1)), torch.cat([s, one]), condition.repeat(2)
            )
            below, boundary = both.chunk(2)
            return (below - target).square().mean() + self.beta * (boundary - edge).square().mean()

        fit(session, student, loss, session.scale(self.steps, 4), self.rate)

    @staticmethod
    def signal(student: nn.Module, eps: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """y(eps, t) [B, ...]."""
        return eps - student(eps, t, condition)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        eps = batch["noise"]
        level = torch.zeros(len(eps), dtype=eps.dtype, device=eps.device)
        return self.signal(session.networks["student"], eps, level, batch["condition"])
