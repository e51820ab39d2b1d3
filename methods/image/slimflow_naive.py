from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Method, Paper
from stepmark.backbones.unet import ConditionalUNet
from stepmark.session import Session
from stepmark.tracks.image.schedules import add_noise, schedule_of
from stepmark.tracks.image.training import fit, pseudo_huber, teacher_pairs


class SlimFlowNaive(Method):
    """The naive way to a small one-step student: reflow from scratch, then distillation, on stored pairs alone.

    The baseline of SlimFlow, with its network, pairs, steps and distance. A small UNet with random weights is trained on
    the teacher's pairs (eps, x0) from the first step, without a way from random pairs to them,

        loss = |x0 - eps + v(x_t, t)|^2,   x_t = (1 - t) x0 + t eps

    and then as a one-step student F(eps) = eps - v(eps, 1) on the same pairs, loss = d(F(eps), x0).
    """

    paper = Paper(
        id="slimflow",
        title="SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow",
        authors="Zhu, Liu, Liu",
        year=2024,
        arxiv="2407.12718",
        code="yuanzhi-zhu/SlimFlow",
    )
    tasks = ("class_to_image/digits_flow", "class_to_image/digits_flow_b")

    pairs, solver_steps, batch = 6000, 20, 64
    reflow_steps, distil_steps, rate = 1600, 1000, 2e-3

    def networks(self, session: Session) -> dict[str, nn.Module]:
        data, kinds = session.train["x0"], 1 + int(session.train["condition"].max())
        return {"student": ConditionalUNet(data.shape[-1], data.shape[1], (8, 16), kinds, "flow")}

    def prepare(self, session: Session) -> None:
        student, rng, device = session.networks["student"], session.rng, session.device
        n, schedule = session.scale(self.pairs, 64), schedule_of(student)
        eps, x0, condition = teacher_pairs(session, n, session.scale(self.solver_steps, 2))

        def reflow() -> Tensor:
            pick = torch.randint(n, (self.batch,), generator=rng, device=device)
            t = torch.rand(self.batch, generator=rng, device=device)
            v = student(add_noise(schedule, x0[pick], eps[pick], t), t, condition[pick])
            return (x0[pick] - eps[pick] + v).square().mean()

        def distil() -> Tensor:
            pick = torch.randint(n, (self.batch,), generator=rng, device=device)
            return pseudo_huber(self.sample(student, eps[pick], condition[pick]), x0[pick])

        fit(session, student, reflow, session.scale(self.reflow_steps, 4), self.rate)
        fit(session, student, distil, session.scale(self.distil_steps, 4), self.rate / 2)

    @staticmethod
    def sample(student: nn.Module, eps: Tensor, condition: Tensor) -> Tensor:
        """F(eps, c) [B, ...]."""
        return eps - student(eps, torch.ones(len(eps), dtype=eps.dtype, device=eps.device), condition)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        return self.sample(session.networks["student"], batch["noise"], batch["condition"])
