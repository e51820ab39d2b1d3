from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of, to_x0_eps, uniform_times
from stepmark.tracks.image.solvers import ddim_step


class ParaStep(Method):
    """ParaStep: p steps in one round, each from a state guessed with an old prediction (reuse, then predict).

    Neighbouring steps predict nearly the same noise. After a few steps taken one by one, a round covers the p times
    t_0 > t_1 > ... > t_{p-1} that come next, with a worker for each:

        reuse     x'_k = DDIM(x, t_0 -> t_k) with eps of the latest evaluation
        predict   eps_k = eps_theta(x'_k, t_k)                                 all p at once
        replay    x_{k+1} = DDIM(x_k, t_k -> t_{k+1}) with eps_k,  x_0 = x     in order, no evaluation

    eps_{p-1} is what the next round reuses. T evaluations are made as in a sequential sampler, but one after the other
    there are only warm-up + (T - warm-up) / p rounds.

    This is the paper's form for one device (BatchStep): the p states are stacked into one batch, so that a rung is spent
    on T steps, and depth, not evaluations, is what is saved. Steps of DDIM with one and the same eps add up to one longer
    step, so k of them are taken as one; for the same reason reuse without a prediction is DDIM with T / p steps.

    Differs from the paper: one process, no exchange between devices; DDIM steps only.
    """

    paper = Paper(
        id="parastep",
        title="Communication-Efficient Diffusion Denoising Parallelization via Reuse-then-Predict Mechanism",
        authors="Wang, Li, Yu, Guo, Zhao",
        year=2025,
        arxiv="2505.14741",
        code="sjtu-zhao-lab/ParaStep",
    )
    tasks = ("sampling/mixtures_eps", "class_to_image/digits_eps", "class_to_image/digits_eps_b")
    baselines = ("ddim",)
    claims = (
        Claim(
            "rounds[parastep,64] <= 0.4 * rounds[ddim,64] and endpoint_error[parastep,64] < endpoint_error[ddim,16]",
            says="64 steps in less than half the rounds end nearer to the exact solution than DDIM with a quarter of them",
        ),
        Claim(
            "rounds[parastep,64] < rounds[ddim,32] and endpoint_error[parastep,64] < endpoint_error[ddim,32]",
            says="and nearer than DDIM with more rounds",
        ),
        Claim(
            "rounds[parastep,16] <= rounds[ddim,8] and fd[parastep,16] < fd[ddim,8]",
            says="images of 16 steps in 8 rounds are better than those of 8 steps",
            task="class_to_image/digits_eps",
        ),
    )

    workers, warm_up = 4, 5

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        network, condition, x = session.networks["teacher"], batch["condition"], batch["noise"]
        schedule, steps = schedule_of(network), list(pairwise(uniform_times(rung)))
        eps = torch.zeros_like(x)

        def jump(x: Tensor, eps: Tensor, t: float, s: float) -> Tensor:
            x0 = to_x0_eps("epsilon", eps, x, schedule.alpha(t), schedule.sigma(t))[0]
            return ddim_step(schedule, x0, eps, s)

        done = 0
        while done < rung:
            width = 1 if done < self.warm_up else self.workers
            part = steps[done : done + width]
            start = part[0][0]
            guesses = torch.cat([x, *(jump(x, eps, start, t) for t, _ in part[1:])])
            times = torch.tensor([schedule.network_time(t) for t, _ in part], dtype=x.dtype, device=x.device)
            fresh = network(guesses, times.repeat_interleave(len(x)), condition.repeat(len(part))).chunk(len(part))
            for (t, s), eps in zip(part, fresh, strict=True):
                x = jump(x, eps, t, s)
            done += len(part)
        return x
