from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of, to_x0_eps, uniform_times
from stepmark.tracks.image.solvers import ddim_step


class ParaStepProcesses(Method):
    """ParaStep on several devices: each evaluates another step of the same round, and they exchange predictions.

    The distributed form of `parastep`, with as many steps t_0 > ... > t_{p-1} in a round as there are processes. Worker k

        reuse     x'_k = DDIM(x, t_0 -> t_k) with eps of the latest evaluation that all know
        predict   eps_k = eps_theta(x'_k, t_k)
        exchange  eps_k to every other worker: one tensor the size of the image, no activations
        replay    x_{j+1} = DDIM(x_j, t_j -> t_{j+1}) with eps_j,  x_0 = x,  j = 0 .. p-1

    so that all hold the same x again. In the first steps, taken one by one, worker 0 evaluates and sends.

    Differs from the paper: DDIM steps only; the processes are on one machine. In the released code predictions go to worker
    0 alone, which replays the round and broadcasts x, and every other worker guesses with the prediction that it made
    itself in the round before; here all get all predictions and guess with the latest. There all evaluate the first steps,
    which leaves nothing to send; here worker 0. Stepmark starts the processes and counts their bytes and evaluations.
    """

    paper = Paper(
        id="parastep",
        title="Communication-Efficient Diffusion Denoising Parallelization via Reuse-then-Predict Mechanism",
        authors="Wang, Li, Yu, Guo, Zhao",
        year=2025,
        arxiv="2505.14741",
        code="sjtu-zhao-lab/ParaStep",
    )
    tasks = ("class_to_image/digits_eps",)
    baselines = ("ddim",)
    claims = (
        Claim(
            "rounds[parastep_processes,16] <= 0.75 * rounds[ddim,16] and fd[parastep_processes,16] < fd[ddim,10]",
            says="16 steps in at most 12 rounds are better than 10 steps of DDIM",
        ),
        Claim("latency_ms[parastep_processes,16] < latency_ms[ddim,16]", says="two devices are faster than one"),
    )

    ranks = 2
    warm_up = 5

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        network, condition, group = session.networks["teacher"], batch["condition"], session.group
        schedule, steps = schedule_of(network), list(pairwise(uniform_times(rung)))
        x, eps = batch["noise"], torch.zeros_like(batch["noise"])

        def jump(x: Tensor, eps: Tensor, t: float, s: float) -> Tensor:
            x0 = to_x0_eps("epsilon", eps, x, schedule.alpha(t), schedule.sigma(t))[0]
            return ddim_step(schedule, x0, eps, s)

        def predict(x: Tensor, t: float) -> Tensor:
            time = torch.full((len(x),), schedule.network_time(t), dtype=x.dtype, device=x.device)
            return network(x, time, condition)

        for t, s in steps[: self.warm_up]:
            eps = group.spread(predict(x, t) if group.rank == 0 else eps, source=0)
            x = jump(x, eps, t, s)
        for first in range(self.warm_up, rung, group.size):
            part = steps[first : first + group.size]
            if group.rank < len(part):  # else there is no step left for this worker
                t = part[group.rank][0]
                eps = predict(jump(x, eps, part[0][0], t) if group.rank else x, t)
            for (t, s), eps in zip(part, group.gather(eps), strict=False):  # noqa: B020 (the last eps is kept)
                x = jump(x, eps, t, s)
        return x
