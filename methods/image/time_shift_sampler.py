from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import Schedule, schedule_of, to_x0_eps, uniform_times
from stepmark.tracks.image.solvers import ddim_step, dpm_solver_pp_step


def shifted_timesteps(schedule: Schedule, x: Tensor, n: int, window: int) -> Tensor:
    """Timestep tau of each sample, int64 [B], whose noise variance is nearest to the variance of its pixels.

    argmin over tau in [n - window / 2, n + window / 2] of |var(x) - (1 - abar_tau)|; x [B, ...]; window in timesteps.
    """
    taus = torch.arange(max(n - window // 2, 0), min(n + window // 2, schedule.steps - 1) + 1, device=x.device)
    expected = schedule.sigma((taus.double() + 1) / schedule.steps) ** 2
    variance = x.flatten(1).double().var(1)
    return taus[(variance[:, None] - expected).abs().argmin(1)]


class TimeShiftSampler(Method):
    """Time-Shift Sampler (TS-DDIM): tell the network the timestep that a sample looks like, not the one it is due at.

    Errors pile up while sampling, so that x_t is no longer noised as much as the network was trained to expect at t
    (exposure bias). After every step to timestep n the variance of each sample's own pixels is compared with that of
    the training schedule, and the network is evaluated next at the timestep in a window of width w around n that fits
    best (algorithm 3):

        t_s = argmin over tau in [n - w/2, n + w/2] of |var(x) - sigma_tau^2|,   sigma_tau^2 = 1 - abar_tau
        eps = eps_theta(x, t_s)                                                  if n > cutoff, else eps_theta(x, n)

    while the coefficients of the solver stay on the normal grid. Near the data the pixels' variance is that of the
    image, so shifting stops below the cutoff. No further network evaluation is made. w and the cutoff are tuned per
    step count in the paper; here one pair, chosen on the first digits teacher, serves all step counts but the smallest,
    whose states are too far from any training state to be shifted. `order = 2` puts the shift around DPM-Solver++ 2M
    instead of DDIM (order 1).

    Differs from the paper: sampling starts at the last timestep ("trailing" grid, as the baseline does). On the points
    of the mixtures "pixels" are two coordinates: the variance says little there, which the figures show.
    """

    paper = Paper(
        id="time_shift_sampler",
        title="Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps",
        authors="Li, Qu, Yao, Sun, Moens",
        year=2024,
        arxiv="2305.15583",
        code="Mingxiao-Li/TS-DPM",
    )
    tasks = ("class_to_image/digits_eps", "class_to_image/digits_eps_b", "sampling/mixtures_eps")
    baselines = ("ddim",)
    claims = (
        Claim(
            "fd[time_shift_sampler,10] < fd[ddim,10] and nfe[time_shift_sampler,10] == nfe[ddim,10]",
            says="better samples than DDIM at 10 steps, with not one evaluation more",
            headline=True,
        ),
        Claim(
            "fd[time_shift_sampler,10] < fd[ddim,10] and nfe[time_shift_sampler,10] == nfe[ddim,10]",
            says="the same with a second model that no setting was chosen on",
            task="class_to_image/digits_eps_b",
        ),
        Claim(
            "fd[time_shift_sampler,4..16] < fd[ddim,4..16]",
            says="and with any number of steps, of the second model too",
            task="class_to_image/digits_eps_b",
        ),
    )

    window = 100  # w in timesteps
    cutoff = 200  # timestep below which nothing is shifted
    fewest = 4  # steps from which on samples are shifted
    order = 1

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        network, condition, x = session.networks["teacher"], batch["condition"], batch["noise"]
        schedule = schedule_of(network)
        width = self.window if rung >= self.fewest else 0
        timesteps = torch.full((len(x),), schedule.network_time(1.0), dtype=x.dtype, device=x.device)
        past: list[tuple[float, Tensor]] = []
        for t, s in pairwise(uniform_times(rung)):
            output = network(x, timesteps, condition)
            x0, eps = to_x0_eps("epsilon", output, x, schedule.alpha(t), schedule.sigma(t))
            past = [*past[-1:], (t, x0)]
            x = ddim_step(schedule, x0, eps, s) if self.order == 1 else dpm_solver_pp_step(schedule, x, past, s)
            n = schedule.network_time(s)
            timesteps = torch.full_like(timesteps, n)
            if width > 0 and n > self.cutoff:
                timesteps = shifted_timesteps(schedule, x, round(n), width).to(x.dtype)
        return x
