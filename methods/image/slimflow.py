from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.backbones.unet import ConditionalUNet
from stepmark.session import Session
from stepmark.tracks.image.schedules import add_noise, schedule_of
from stepmark.tracks.image.training import fit, pseudo_huber, teacher_pairs


def small_network(session: Session) -> ConditionalUNet:
    """An untrained UNet of the teacher's kind with half its channels: a quarter of the parameters."""
    data = session.train["x0"]
    return ConditionalUNet(data.shape[-1], data.shape[1], (8, 16), 1 + int(session.train["condition"].max()), "flow")


def annealed(eps: Tensor, fresh: Tensor, beta: float) -> Tensor:
    """sqrt(1 - beta^2) eps + beta fresh: random pairing at beta = 1, the teacher's at 0, standard normal throughout."""
    return math.sqrt(1 - beta**2) * eps + beta * fresh


def jump(network: nn.Module, x: Tensor, t: Tensor, s: Tensor, condition: Tensor) -> Tensor:
    """Euler's step from t to s, [B] each."""
    return x + (s - t).view(-1, 1, 1, 1) * network(x, t, condition)


class SlimFlow(Method):
    """SlimFlow: a one-step student that is also small, by annealing reflow and flow-guided distillation.

    The small network cannot start from the large teacher. Annealing reflow (section 3.1) trains it from scratch on a
    pairing of noise and data that moves from random to the teacher's own: with stored pairs (eps, x0) of the teacher's
    ODE and fresh noise eps',

        eps_b = sqrt(1 - b^2) eps + b eps',   x_t = (1 - t) x0 + t eps_b
        loss  = |x0 - eps_b + v(x_t, t)|^2,   b from 1 to 0

    so that it begins as flow matching on easy targets and ends as a 2-rectified flow. Flow-guided distillation (section
    3.2) turns this flow v into a one-step student v', F(eps) = eps - v'(eps, 1), which starts from it, with

        loss = d(F(eps), x0) + d(F(eps'), Euler of v from eps' in two steps, 1 -> t -> 0),     t in [0.2, 0.8]

    The second term is computed as training goes, from fresh noise, and makes up for a limited number of stored pairs.
    One evaluation of the small network makes a sample, whatever the budget.

    `slimflow_naive` is the paper's baseline, with the same network, pairs, steps and distance: reflow from scratch on the
    teacher's pairs from the first step, without a way from random pairs to them (b = 0), and then distillation on the
    stored pairs alone, loss = d(F(eps), x0). `slimflow_direct` leaves the flow out: a small network from scratch, the same
    loss on the same pairs from the first update, as many updates as the others take in both stages.
    `slimflow_annealed` and `slimflow_guided` take one of the two parts alone.

    Differs from the paper: b falls linearly over the first 60 % of the steps (the released code offers this course, a
    cosine and an exponential one, over 300 000 updates). The learning rate falls by a cosine over the same updates, where
    it is constant there, and most of the training comes after b has reached zero: here the teacher's own pairs get the last
    640 updates, and of the rates of all updates, added up, a ninth. Digits are not mirrored; d is the pseudo-Huber distance
    (no perceptual one on 8x8 images). Both of Euler's steps are the frozen flow's; the released code takes the first along
    the student's own prediction.

    What limits it here: with half the channels, one evaluation and minutes of training the student follows the teacher's
    pairs only roughly. Annealing spends most of a short training on pairs that are not the teacher's, where the naive way
    spends all of it on those that are. A flow that is not yet straight is a poor second teacher at two steps. The naive
    way is ahead in every training that was measured: each of the two parts alone costs something, and both cost most.
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
    baselines = ("slimflow_naive", "slimflow_direct", "one_step_regression", "euler")
    claims = (
        Claim(
            "fd[slimflow,1] < fd[slimflow_naive,1] and fd[slimflow,1] < fd[slimflow_direct,1]",
            says="a small network with one step is better than by reflow and distillation without annealing and guidance, and "
            "than by distillation alone, without a flow between",
            headline=True,
            setting="the teacher's own pairs get a ninth of the learning rate of 1 600 updates, most of them there",
        ),
        Claim(
            "fd[slimflow,1] < fd[slimflow_naive,1] and fd[slimflow,1] < fd[slimflow_direct,1]",
            says="the same with a second model",
            task="class_to_image/digits_flow_b",
            setting="the teacher's own pairs get a ninth of the learning rate of 1 600 updates, most of them there",
        ),
        Claim(
            "fd[slimflow,1] < fd[slimflow_annealed,1] and fd[slimflow,1] < fd[slimflow_guided,1]",
            says="annealing and guidance both have their share in it",
            setting="the teacher's own pairs get a ninth of the learning rate of 1 600 updates, most of them there",
        ),
        Claim(
            "fd[slimflow,1] <= 1.5 * fd[one_step_regression,1] and nfe_equivalent[slimflow,1] < 0.5",
            says="for less than half the cost within half as much again of one step of the full-size network",
            setting="the teacher's own pairs get a ninth of the learning rate of 1 600 updates, most of them there",
        ),
        Claim(
            "fd[slimflow,1] < fd[euler,8] and nfe_equivalent[slimflow,1] < 0.5",
            says="and nearer to the data than eight steps of the teacher",
        ),
    )

    pairs, solver_steps, batch = 6000, 10, 64
    reflow_steps, distil_steps, rate = 1600, 1000, 2e-3
    anneal = 0.6  # share of the reflow after which b is zero; 0: it is zero from the start
    guided = True  # whether the flow teaches the student on fresh noise too
    direct = False  # no flow at all: distillation from the first update
    variants = (
        Variant(
            "slimflow_naive",
            says="The naive way to a small one-step student: reflow from scratch, then distillation, on stored pairs alone",
            anneal=0.0,
            guided=False,
            baselines=(),
        ),
        Variant(
            "slimflow_annealed",
            says="Annealing reflow alone: then distillation on the stored pairs, without the flow's guidance",
            guided=False,
            baselines=("slimflow_naive",),
            claims=(
                Claim(
                    "fd[slimflow_annealed,1] < fd[slimflow_naive,1]",
                    says="annealing alone is better than reflow from scratch on the teacher's pairs",
                    setting="the teacher's own pairs get a ninth of the learning rate of 1 600 updates, most of them there",
                ),
            ),
        ),
        Variant(
            "slimflow_guided",
            says="Flow-guided distillation alone, after reflow from scratch on the teacher's pairs",
            anneal=0.0,
            baselines=("slimflow_naive",),
            claims=(
                Claim(
                    "fd[slimflow_guided,1] < fd[slimflow_naive,1]",
                    says="guidance alone is better than distillation on the stored pairs",
                ),
            ),
        ),
        Variant(
            "slimflow_direct",
            says="One-step distillation of the large teacher's pairs into the small network, for as many updates in all",
            direct=True,
            guided=False,
            baselines=(),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": small_network(session)}

    def prepare(self, session: Session) -> None:
        student, rng, device = session.networks["student"], session.rng, session.device
        n, steps = session.scale((self.pairs, self.reflow_steps), (64, 4))
        pairs = session.once(teacher_pairs, n, session.scale(self.solver_steps, 2))
        eps, x0, condition = pairs["eps"], pairs["x0"], pairs["condition"]
        schedule, done = schedule_of(student), iter(range(steps))

        def draw() -> Tensor:
            return torch.randint(n, (self.batch,), generator=rng, device=device)

        def fresh() -> Tensor:
            return torch.randn(self.batch, *x0.shape[1:], generator=rng, device=device)

        def reflow() -> Tensor:
            pick = draw()
            noise = eps[pick]
            if self.anneal:
                noise = annealed(noise, fresh(), self.share(next(done) / steps))
            t = torch.rand(self.batch, generator=rng, device=device)
            v = student(add_noise(schedule, x0[pick], noise, t), t, condition[pick])
            return (x0[pick] - noise + v).square().mean()

        def distil() -> Tensor:
            pick = draw()
            stored = pseudo_huber(self.sample(student, eps[pick], condition[pick]), x0[pick])
            if not self.guided:
                return stored
            noise = fresh()
            middle = 0.2 + 0.6 * torch.rand(self.batch, generator=rng, device=device)
            one, zero = torch.ones_like(middle), torch.zeros_like(middle)
            with torch.no_grad():
                target = jump(flow, noise, one, middle, condition[pick])
                target = jump(flow, target, middle, zero, condition[pick])
            return stored + pseudo_huber(self.sample(student, noise, condition[pick]), target)

        last = session.scale(self.distil_steps, 4)
        if self.direct:
            fit(session, student, distil, steps + last, self.rate)
            return
        fit(session, student, reflow, steps, self.rate)
        flow = session.clone("student").eval().requires_grad_(False)
        fit(session, student, distil, last, self.rate / 2)

    def share(self, progress: float) -> float:
        """b, the share of fresh noise, after so much of the reflow: 1 at its start, 0 from `anneal` on."""
        return max(0.0, 1 - progress / self.anneal)

    @staticmethod
    def sample(student: nn.Module, eps: Tensor, condition: Tensor) -> Tensor:
        """F(eps, c) [B, ...]."""
        one = torch.ones(len(eps), dtype=eps.dtype, device=eps.device)
        return jump(student, eps, one, torch.zeros_like(one), condition)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        return self.sample(session.networks["student"], batch["noise"], batch["condition"])
