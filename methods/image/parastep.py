from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import Schedule, schedule_of, to_x0_eps, uniform_times
from stepmark.tracks.image.solvers import ddim_step


def jump(schedule: Schedule, x: Tensor, eps: Tensor, t: float, s: float) -> Tensor:
    """DDIM(x, t -> s) with a given noise."""
    x0 = to_x0_eps("epsilon", eps, x, schedule.alpha(t), schedule.sigma(t))[0]
    return ddim_step(schedule, x0, eps, s)


class ParaStep(Method):
    """ParaStep: p steps in one round, each from a state guessed with an old prediction (reuse, then predict).

    Neighbouring steps predict nearly the same noise. After a few steps taken one by one, a round covers the p times
    t_0 > t_1 > ... > t_{p-1} that come next, with a worker for each:

        reuse     x'_k = DDIM(x, t_0 -> t_k) with eps of the latest evaluation
        predict   eps_k = eps_theta(x'_k, t_k)                                 all p at once
        replay    x_{k+1} = DDIM(x_k, t_k -> t_{k+1}) with eps_k,  x_0 = x     in order, no evaluation

    eps_{p-1} is what the next round reuses. T evaluations are made as in a sequential sampler, but one after the other
    there are only warm-up + (T - warm-up) / p rounds.

    `parastep` is the paper's form for one device (BatchStep): the p states are stacked into one batch, so that a rung is
    spent on T steps, and depth, not evaluations, is what is saved. Steps of DDIM with one and the same eps add up to one
    longer step, so k of them are taken as one; for the same reason reuse without a prediction is DDIM with T / p steps.

    `parastep_processes` is the distributed form: each process is a worker, and after predict all exchange their eps_k, one
    tensor the size of the image and no activations, so that all replay the round and hold the same x again. In the first
    steps, taken one by one, worker 0 evaluates and sends. Stepmark starts the processes and counts their bytes and
    evaluations.

    Differs from the paper: DDIM steps only, no guidance; the processes are on one machine. In the released code predictions
    go to worker 0 alone, which replays the round and broadcasts x, and every other worker guesses with the prediction that
    it made itself in the round before; here all get all predictions and guess with the latest. There all evaluate the first
    steps, which leaves nothing to send; here worker 0. There BatchStep never guesses the last step, which is a round of its
    own; here it belongs to the last round.
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
            "latency_ms[parastep,16] < latency_ms[ddim,16] and fd[parastep,16] <= 1.1 * fd[ddim,16]",
            says="16 steps in rounds are done sooner than one after the other, at no loss of quality",
            task="class_to_image/digits_eps",
            headline=True,
            setting="one device evaluates the states of a round as one batch; the paper's devices share them",
        ),
        Claim(
            "rounds[parastep,32..64] <= 0.4 * rounds[ddim,32..64] and sliced_w2[parastep,32..64] <= 1.1 * sliced_w2[ddim,32..64]",
            says="in less than half of the rounds the points are spread no worse",
        ),
        Claim(
            "rounds[parastep,64] <= 0.4 * rounds[ddim,64] and endpoint_error[parastep,64] <= 1.1 * endpoint_error[ddim,64]",
            says="and each is as near to the exact solution as after 64 steps one by one",
        ),
        Claim(
            "rounds[parastep,64] < rounds[ddim,32] and endpoint_error[parastep,64] < endpoint_error[ddim,32]",
            says="64 steps in rounds end nearer to the exact solution than DDIM with more rounds",
        ),
        Claim(
            "rounds[parastep,32] < rounds[ddim,16] and endpoint_error[parastep,32] < endpoint_error[ddim,16]",
            says="and so do 32",
        ),
        Claim(
            "rounds[parastep,16] <= rounds[ddim,8] and fd[parastep,16] < fd[ddim,8]",
            says="images of 16 steps in 8 rounds are better than those of 8 steps",
            task="class_to_image/digits_eps",
            setting="five of 16 steps are taken one by one before the first round, of the paper's 50 a tenth",
        ),
        Claim(
            "rounds[parastep,16] <= rounds[ddim,8] and fd[parastep,16] < fd[ddim,8]",
            says="the same with a second model",
            task="class_to_image/digits_eps_b",
            setting="five of 16 steps are taken one by one before the first round, of the paper's 50 a tenth",
        ),
    )

    workers, warm_up = 4, 5  # workers of the batched form; steps that are taken one by one
    ranks = 1
    variants = (
        Variant(
            "parastep_processes",
            says="ParaStep on several devices: each evaluates another step of the same round, and they exchange predictions",
            ranks=2,
            tasks=("class_to_image/digits_eps",),
            claims=(
                Claim(
                    "latency_ms[parastep_processes,16] < latency_ms[ddim,16] "
                    "and fd[parastep_processes,16] <= 1.1 * fd[ddim,16]",
                    says="two devices are faster than one, at no loss of quality",
                    headline=True,
                    setting="the devices are cores of one machine, and a step takes milliseconds",
                ),
                Claim(
                    "rounds[parastep_processes,16] <= 0.7 * rounds[ddim,16] and fd[parastep_processes,16] < fd[ddim,10]",
                    says="16 steps in 11 rounds are better than 10 steps of DDIM, the nearest below on the ladder",
                ),
            ),
        ),
    )

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        sample = self.on_devices if self.ranks > 1 else self.in_batches
        return sample(session, batch["noise"], batch["condition"], list(pairwise(uniform_times(rung))))

    def in_batches(self, session: Session, x: Tensor, condition: Tensor, steps: list[tuple[float, float]]) -> Tensor:
        """Samples [B, ...] from noise x along steps (t, s): a round is one call on the stacked guesses of its workers."""
        network, eps, done = session.networks["teacher"], torch.zeros_like(x), 0
        schedule = schedule_of(network)
        while done < len(steps):
            width = 1 if done < self.warm_up else self.workers
            part = steps[done : done + width]
            start = part[0][0]
            guesses = torch.cat([x, *(jump(schedule, x, eps, start, t) for t, _ in part[1:])])
            times = torch.tensor([schedule.network_time(t) for t, _ in part], dtype=x.dtype, device=x.device)
            fresh = network(guesses, times.repeat_interleave(len(x)), condition.repeat(len(part))).chunk(len(part))
            for (t, s), eps in zip(part, fresh, strict=True):
                x = jump(schedule, x, eps, t, s)
            done += len(part)
        return x

    def on_devices(self, session: Session, x: Tensor, condition: Tensor, steps: list[tuple[float, float]]) -> Tensor:
        """The same, a round being one call in each process."""
        network, group, eps = session.networks["teacher"], session.group, torch.zeros_like(x)
        schedule = schedule_of(network)

        def predict(x: Tensor, t: float) -> Tensor:
            time = torch.full((len(x),), schedule.network_time(t), dtype=x.dtype, device=x.device)
            return network(x, time, condition)

        for t, s in steps[: self.warm_up]:
            eps = group.spread(predict(x, t) if group.rank == 0 else eps, source=0)
            x = jump(schedule, x, eps, t, s)
        for first in range(self.warm_up, len(steps), group.size):
            part = steps[first : first + group.size]
            if group.rank < len(part):  # else there is no step left for this worker
                t = part[group.rank][0]
                eps = predict(jump(schedule, x, eps, part[0][0], t) if group.rank else x, t)
            for (t, s), eps in zip(part, group.gather(eps), strict=False):  # noqa: B020 (the last eps is kept)
                x = jump(schedule, x, eps, t, s)
        return x
