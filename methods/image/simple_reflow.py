from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import add_noise, schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser, dpm_solver_pp_step, heun_step
from stepmark.tracks.image.training import fit


def high_pass(x: Tensor) -> Tensor:
    """x [B, C, H, W] minus its 3x3 binomial blur: 0 for constant images, the image itself for a checkerboard."""
    row = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = (row[:, None] * row).expand(x.shape[1], 1, 3, 3)
    return x - conv2d(pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])


def normalised_loss(residual: Tensor, emphasis: float) -> Tensor:
    """Mean over the batch of l / sg[l] with l = |phi(residual)|^2 per sample, phi = I + emphasis * high-pass."""
    size = (residual + emphasis * high_pass(residual)).flatten(1).square().mean(1)
    return (size / (size.detach() + 1e-8)).mean()


def exponential_times(n: int, base: float, generator: torch.Generator) -> Tensor:
    """n training times in [0, 1] of density proportional to base^t, by the inverse of its distribution function."""
    u = torch.rand(n, generator=generator, device=generator.device)
    return torch.log1p((base - 1) * u) / math.log(base)


def sigmoid_times(n: int, kappa: float) -> list[float]:
    """n + 1 times from 1 to 0, the sigmoid of equal steps in [-kappa / 2, kappa / 2], rescaled: dense at both ends."""
    low, high = (1 / (1 + math.exp(-sign * kappa / 2)) for sign in (-1, 1))
    inner = [(1 / (1 + math.exp(-kappa * (0.5 - i / n))) - low) / (high - low) for i in range(1, n)]
    return [1.0, *inner, 0.0]


def integrate(denoise: Denoiser, x: Tensor, times: list[float]) -> Tensor:
    """x at times[0] taken along the flow to times[-1], which may lie before or behind, by Heun steps."""
    for t, s in pairwise(times):
        x = heun_step(denoise, x, t, s)
    return x


def project(eps: Tensor) -> Tensor:
    """Noises [N, ...] moved as little as possible to zero mean and unit covariance: C^(-1/2) (eps - mean).

    That is the optimal transport map from N(mean, C) to N(0, I).
    """
    flat = eps.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    root = vectors * values.clamp(min=1e-6).rsqrt() @ vectors.T
    return ((flat - flat.mean(0)) @ root).to(eps.dtype).view_as(eps)


class SimpleReflow(Method):
    """Simple ReFlow: seven choices that make retraining a flow on its own coupling lose less quality.

    As plain ReFlow, a copy of the teacher learns the straight paths x_t = (1 - t) x0 + t eps between paired ends
    (t = 1 is noise). The choices, numbered as in the paper's sections on training, learning and inference:

    1. every sample's loss is divided by a stop-gradient copy of itself, w = 1 / sg[l(x_t, t)], so that all weigh alike;
    2. times have density proportional to 10^t: the noisy end is where a straight path is hardest to learn;
    3. the error is measured after phi = I + lambda HPF, with a high-pass filter HPF; phi is linear and invertible, so
       the minimiser stays the same;
    4. less dropout than the base model: the teachers here are trained without any, and so is the student;
    5. pairs of three kinds: backward (noise to sample by the ODE), forward (real data to noise by the ODE run in
       reverse) and projected (forward pairs whose noises are corrected to a Gaussian marginal);
    6. times of sampling from a sigmoid, t_i = sig(kappa (1/2 - i/N)) rescaled to [0, 1];
    7. a DPM-Solver instead of Euler or Heun.

    Differs from the paper: the data are 8x8 digits and 1000 training steps; the teacher is a flow already, so that
    nothing is converted from EDM; noises are projected by the optimal map between Gaussians; the solver is
    DPM-Solver++ 2M, whose steps of one evaluation fit every rung. No guidance (it hurts on these data).
    """

    paper = Paper(
        id="simple_reflow",
        title="Simple ReFlow: Improved Techniques for Fast Flow Models",
        authors="Kim, Hsieh, Klein, Cuturi, Ye, Kawar, Thornton",
        year=2025,
        arxiv="2410.07815",
    )
    tasks = ("class_to_image/digits_flow", "class_to_image/digits_flow_b")
    baselines = ("reflow", "euler")
    claims = (
        Claim(
            "fd[simple_reflow,9] < fd[reflow,9] and fd[simple_reflow,9] < fd[euler,9]",
            says="with 9 evaluations better than plain ReFlow and than the teacher",
        ),
        Claim(
            "fd[simple_reflow,9] <= 1.15 * fd[euler,50]",
            says="with 9 evaluations within 15 % of the teacher's 50",
        ),
    )

    pairs, solver_steps, batch, steps, rate = 6000, 10, 64, 1000, 1e-3  # the budget of plain ReFlow
    mix = (0.5, 0.25, 0.25)  # shares of backward, forward and projected pairs in a batch
    time_base, emphasis, kappa = 10.0, 1.0, 8.0

    def networks(self, session: Session) -> dict[str, nn.Module]:
        return {"student": session.clone("teacher")}

    def prepare(self, session: Session) -> None:
        teacher, student = session.networks["teacher"], session.networks["student"]
        rng, device = session.rng, session.device
        schedule, times = schedule_of(teacher), uniform_times(session.scale(self.solver_steps, 2))
        data, label = (session.train[key].to(device) for key in ("x0", "condition"))
        n, m = session.scale((self.pairs, len(data)), (64, 96))
        condition = label[torch.randint(len(label), (n,), generator=rng, device=device)]
        eps = torch.randn(n, *data.shape[1:], generator=rng, device=device)
        data, label = data[:m], label[:m]
        with torch.no_grad():
            x0 = integrate(Denoiser(teacher, condition), eps, times)
            inverted = integrate(Denoiser(teacher, label), data, times[::-1])
        kinds = [(x0, eps, condition), (data, inverted, label), (data, project(inverted), label)]
        sizes = [round(share * self.batch) for share in self.mix]

        def loss() -> Tensor:
            parts = []
            for size, kind in zip(sizes, kinds, strict=True):
                pick = torch.randint(len(kind[0]), (size,), generator=rng, device=device)
                parts.append([end[pick] for end in kind])
            start, end, classes = (torch.cat(column) for column in zip(*parts, strict=True))
            t = exponential_times(len(start), self.time_base, rng)
            v = student(add_noise(schedule, start, end, t), t, classes)
            return normalised_loss(v - (end - start), self.emphasis)

        fit(session, student, loss, session.scale(self.steps, 4), self.rate)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["student"], batch["condition"])
        x, past = batch["noise"], []
        for t, s in pairwise(sigmoid_times(rung, self.kappa)):
            past = [*past[-1:], (t, denoise(x, t)[0])]
            x = dpm_solver_pp_step(denoise.schedule, x, past, s, order=2)
        return x
