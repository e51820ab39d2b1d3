from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.schedules import add_noise, leading_times, schedule_of, to_x0_eps, uniform_times
from stepmark.tracks.image.solvers import ddim_step

LONGEST = 0.1  # step of a search away from ratio 1


def downhill(loss: Callable[[float], float], highest: float, first: float, tolerance: float) -> float:
    """The minimum of a function of one number below `highest` that is reached from 1 by going downhill.

    Steps from 1 double up to a tenth, to the side on which the function falls, until it rises or the range (0, highest) ends; the
    minimum between the last three points is Brent's.
    """
    at_one = loss(1.0)
    for sign in (-1.0, 1.0):
        points, values, step = [1.0], [at_one], first
        while True:
            nearer = min(max(points[-1] + sign * step, 0.01), highest)
            if nearer == points[-1]:
                break
            points.append(nearer)
            values.append(loss(nearer))
            if values[-1] >= values[-2]:
                break
            step = min(2 * step, LONGEST)
        if len(values) > 1 and min(values) < at_one:
            bounds = (min(points[-3:]), max(points[-3:]))
            found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": tolerance})
            best = int(np.argmin(values))
            return float(found.x) if found.fun <= values[best] else points[best]
    within = minimize_scalar(
        loss, bounds=(1 - first, min(1 + first, highest)), method="bounded", options={"xatol": tolerance}
    )
    return float(within.x) if within.fun < at_one else 1.0


class TimestepAligner(Method):
    """Timestep aligner (TimeTuner): one scalar per step, the timestep that the network is told instead of its own.

    A DDIM step from t to s follows the direction that holds at t only. The network is asked at another timestep tau,
    while the solver's coefficients stay:

        x_s = alpha_s x0 + sigma_s eps,   eps = eps_theta(x_t, tau),   x0 = (x_t - sigma_t eps) / alpha_t

    tau = ratio * t is found for one step after the other, with the network frozen, where the direction found at the end
    of the step is that of its beginning (the loss L_i of the authors' code):

        L(tau) = E | eps_theta(x_t, t) - eps_theta(x_s(tau), s) |^2

    The states x_t come from the training images, noised to t = 1 and led down by the steps tuned so far (sequential
    mode). The last step, to the data, keeps its timestep. Sampling costs what DDIM costs.

    Timesteps are (n - 1) k, ..., k, 0 with k = N // n, so that sampling begins below the last timestep with what is pure
    noise only there; to tell the network a later time is then much of what there is to gain. The authors' are each one
    later, (n - 1) k + 1, ..., k + 1, 1, and their last step leads to timestep 0, where here it leads to the data.
    `untuned_leading` is DDIM on the same timesteps. `timestep_aligner_trailing` begins at the last timestep, as `ddim`
    does, and shows what is left to gain once the grid is mended.

    Differs: L is a function of one number, so it is minimised on fixed states, the same for all step counts, instead of by
    500 steps of Adam from 1 on fresh ones. As those do, the search begins at ratio 1 and goes downhill, as far as it goes:
    in growing steps until L rises again, then by Brent's method between the last three. Only tau <= 1 is kept to, the last
    time that the network was trained on. Step counts from 2 to 16 are tuned, others use their own timesteps.

    What limits it here: on the authors' grid tuned timesteps are better with few steps and worse with many, of images
    from eight or ten on, of points at sixteen. On images the grid that begins at the last timestep gains about as much
    or more without a search, and on it tuned timesteps are worse than DDIM's at any number from four to sixteen: images
    of 64 pixels may leave little to repair there. The headline moved to the authors' grid only after a first run of one
    seed on that one.
    """

    paper = Paper(
        id="timestep_aligner",
        title="Towards More Accurate Diffusion Model Acceleration with A Timestep Aligner",
        authors="Xia, Shen, Lei, Zhou, Yi, Zhao, Wang, Liu",
        year=2024,
        arxiv="2310.09469",
        code="THU-LYJ-Lab/time-tuner",
    )
    tasks = ("class_to_image/digits_eps", "class_to_image/digits_eps_b", "sampling/mixtures_eps")
    baselines = ("untuned_leading", "ddim")
    trainings = 3
    claims = (
        Claim(
            "fd[timestep_aligner,4..16] < fd[untuned_leading,4..16]",
            says="tuned timesteps are better than DDIM's own on the same grid, at any number of steps",
            headline=True,
        ),
        Claim(
            "fd[timestep_aligner,4..16] < fd[untuned_leading,4..16]",
            says="the same with a second model",
            task="class_to_image/digits_eps_b",
        ),
        Claim(
            "endpoint_error[timestep_aligner,4..16] < endpoint_error[untuned_leading,4..16]",
            says="on points, tuned steps end closer to the exact solution",
            task="sampling/mixtures_eps",
        ),
        Claim(
            "fd[timestep_aligner,4..16] < fd[ddim,4..16]",
            says="and it gains more than a grid that begins at the last timestep",
        ),
    )

    grid, tuned = "leading", True  # or "trailing"; whether the network is told other times than the solver's
    variants = (
        Variant(
            "untuned_leading",
            says="control: DDIM on the same timesteps, which begin below the last one",
            tuned=False,
            trainings=1,
            baselines=("ddim",),
        ),
        Variant(
            "timestep_aligner_trailing",
            says="on the grid that begins at the last timestep",
            grid="trailing",
            baselines=("ddim",),
            claims=(
                Claim(
                    "fd[timestep_aligner_trailing,4..16] < fd[ddim,4..16]",
                    says="tuned steps are better than those of DDIM on the trailing grid too",
                    setting="the authors tune the leading grid, which begins below the last timestep",
                ),
            ),
        ),
    )
    fewest, most, states = 2, 16, 256
    first, tolerance = 0.02, 1e-3  # the first step away from ratio 1, the precision of the last

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """{"ratios_<rung>": tau / t of every step, [rung]} for the rungs that are tuned."""
        if not self.tuned:
            return {}
        data, label = (session.train[key].to(session.device) for key in ("x0", "condition"))
        pick = torch.randperm(len(data), generator=session.rng, device=session.device)[: session.scale(self.states, 16)]
        noise = torch.randn(data[pick].shape, generator=session.rng, device=session.device, dtype=data.dtype)
        schedule = schedule_of(session.networks["teacher"])
        start = add_noise(schedule, data[pick], noise, torch.ones(len(pick), device=session.device))
        wanted = [rung for rung in session.task.rungs if self.fewest <= rung <= self.most]
        return {
            f"ratios_{rung}": self.tune(session.networks["teacher"], start, label[pick], rung)
            for rung in session.progress(session.scale(wanted, [4]), "timesteps")
        }

    @torch.no_grad()
    def tune(self, network: nn.Module, x: Tensor, condition: Tensor, rung: int) -> Tensor:
        """tau / t of `rung` steps from the states x [B, ...] at t = 1."""
        ratios: list[float] = []
        for t, s in pairwise(self.times(network, rung)[:-1]):
            begin = self.noise(network, x, t, condition)

            def loss(ratio: float, x: Tensor = x, t: float = t, s: float = s, begin: Tensor = begin) -> float:
                end = self.noise(network, self.step(network, x, t, s, ratio, condition), s, condition)
                return float((begin - end).square().flatten(1).sum(1).mean())

            ratios.append(downhill(loss, 1 / t, self.first, self.tolerance))
            x = self.step(network, x, t, s, ratios[-1], condition)
        return torch.tensor([*ratios, 1.0], dtype=torch.float64)

    def times(self, network: nn.Module, rung: int) -> list[float]:
        """The solver's grid of `rung` steps."""
        return leading_times(rung, schedule_of(network).steps) if self.grid == "leading" else uniform_times(rung)

    @staticmethod
    def noise(network: nn.Module, x: Tensor, t: float, condition: Tensor) -> Tensor:
        """eps_theta(x, t) [B, ...]."""
        time = torch.full((len(x),), schedule_of(network).network_time(t), dtype=x.dtype, device=x.device)
        return network(x, time, condition)

    def step(self, network: nn.Module, x: Tensor, t: float, s: float, ratio: float, condition: Tensor) -> Tensor:
        """A DDIM step from t to s with the noise that the network predicts for the time ratio * t."""
        schedule = schedule_of(network)
        eps = self.noise(network, x, ratio * t, condition)
        x0, eps = to_x0_eps("epsilon", eps, x, schedule.alpha(t), schedule.sigma(t))
        return ddim_step(schedule, x0, eps, s)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        ratios = session.state[f"ratios_{rung}"].tolist() if f"ratios_{rung}" in session.state else [1.0] * rung
        network, x = session.networks["teacher"], batch["noise"]
        for (t, s), ratio in zip(pairwise(self.times(network, rung)), ratios, strict=True):
            x = self.step(network, x, t, s, ratio, batch["condition"])
        return x
