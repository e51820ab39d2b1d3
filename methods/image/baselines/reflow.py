from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import add_noise, schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser, euler_step
from stepmark.tracks.image.training import fit, teacher_pairs


class Reflow(Method):
    """ReFlow: retrain a flow on its own coupling of noise and samples, which makes its paths straight.

    The teacher's ODE, from t = 1 (noise) to t = 0 (data), sends each noise eps to a sample x0. A copy of the teacher is
    trained on these pairs with the loss of flow matching (equation 1 with the coupling of section 2.2, "2-rectified
    flow"), times uniform:

        x_t = (1 - t) x0 + t eps,      loss = |v(x_t, t) - (eps - x0)|^2

    and sampled with Euler steps. Pairs do not cross as often as independent ones, so few steps are enough. This is the
    plain recipe: mean squared error, uniform times, backward pairs only. The pairs are made by ten steps of Heun's method,
    and are the same for every student that learns from pairs of the teacher.
    """

    paper = Paper(
        id="rectified_flow",
        title="Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
        authors="Liu, Gong, Liu",
        year=2023,
        arxiv="2209.03003",
        code="gnobitab/RectifiedFlow",
    )
    tasks = ("class_to_image/digits_flow", "class_to_image/digits_flow_b")
    baselines = ("euler",)
    claims = (
        Claim(
            "fd[reflow,1] < fd[euler,9] and fd[reflow,2] < fd[euler,9]",
            says="one or two steps are better than nine of the flow that it straightens",
            headline=True,
        ),
    )

    pairs, solver_steps, batch, steps, rate = 6000, 10, 64, 1000, 1e-3

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        student, rng = session.networks["student"], session.rng
        n, schedule = session.scale(self.pairs, 64), schedule_of(student)
        pairs = session.once(teacher_pairs, n, session.scale(self.solver_steps, 2))
        eps, x0, condition = pairs["eps"], pairs["x0"], pairs["condition"]

        def loss() -> Tensor:
            pick = torch.randint(n, (self.batch,), generator=rng, device=session.device)
            t = torch.rand(self.batch, generator=rng, device=session.device)
            v = student(add_noise(schedule, x0[pick], eps[pick], t), t, condition[pick])
            return (v - (eps - x0)[pick]).square().mean()

        fit(session, student, loss, session.scale(self.steps, 4), self.rate)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["student"], batch["condition"])
        x = batch["noise"]
        for t, s in pairwise(uniform_times(rung)):
            x = euler_step(x, denoise.output(x, t), t, s)
        return x
