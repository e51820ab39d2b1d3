from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.training import fit, pseudo_huber, teacher_pairs


class OneStepRegression(Method):
    """Knowledge distillation of a sampler: one evaluation regressed on the end of the teacher's deterministic chain.

    DDIM without noise is a function from noise to sample. A copy of the teacher learns it directly: pairs (eps, x0) are
    stored, x0 by ten steps of Heun's method with the teacher, and

        loss = d(F(eps, c), x0),      F(eps, c) = eps - v(eps, 1, c)

    (the paper's denoising student). It looks at no image, and makes a sample in one evaluation whatever the budget. The
    plainest way to a one-step student, and what others are compared with.

    Differs from the paper: the teacher is a rectified flow, so the chain is Heun's and F starts as the teacher's own
    guess; d is the pseudo-Huber distance instead of the squared one.
    """

    paper = Paper(
        id="denoising_student",
        title="Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed",
        authors="Luhman, Luhman",
        year=2021,
        arxiv="2101.02388",
        code="tcl9876/Denoising_Student",
    )
    tasks = ("class_to_image/digits_flow", "class_to_image/digits_flow_b")
    baselines = ("euler",)
    claims = (
        Claim(
            "fd[one_step_regression,1] < fd[euler,9]", says="one step is better than nine of the teacher", headline=True
        ),
    )

    pairs, solver_steps, batch, steps, rate = 6000, 10, 64, 1000, 1e-3

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        n = session.scale(self.pairs, 64)
        pairs = session.once(teacher_pairs, n, session.scale(self.solver_steps, 2))
        eps, x0, condition = pairs["eps"], pairs["x0"], pairs["condition"]

        def loss() -> Tensor:
            pick = torch.randint(n, (self.batch,), generator=session.rng, device=session.device)
            return pseudo_huber(self.sample(session.networks["student"], eps[pick], condition[pick]), x0[pick])

        fit(session, session.networks["student"], loss, session.scale(self.steps, 4), self.rate)

    @staticmethod
    def sample(student: nn.Module, eps: Tensor, condition: Tensor) -> Tensor:
        """F(eps, c) [B, ...]."""
        return eps - student(eps, torch.ones(len(eps), dtype=eps.dtype, device=eps.device), condition)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        return self.sample(session.networks["student"], batch["noise"], batch["condition"])
