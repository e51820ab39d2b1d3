from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from stepmark import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.image.schedules import add_noise, schedule_of, to_x0_eps, uniform_times
from stepmark.tracks.image.solvers import ddim_step


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

    Differs: L is a function of one number, so it is minimised by Brent's bounded search on fixed states instead of 500
    steps of Adam from 1 on fresh ones, which know no bounds: tau / t stays within 0.7 and 1.2, and tau below 1; a tau that
    lowers L by nothing is not taken; step counts from 2 to 16 are tuned, others use their own timesteps.
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
    baselines = ("ddim",)
    claims = (
        Claim("fd[timestep_aligner,10] < fd[ddim,10]", says="ten tuned steps are better than ten of DDIM"),
        Claim(
            "endpoint_error[timestep_aligner,8] < endpoint_error[ddim,8]",
            says="on points, eight tuned steps end closer to the exact solution",
            task="sampling/mixtures_eps",
        ),
    )

    fewest, most, states, evaluations = 2, 16, 256, 12
    bounds = (0.7, 1.2)  # of tau / t

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """{"ratios_<rung>": tau / t of every step, [rung]} for the rungs that are tuned."""
        data, label = (session.train[key].to(session.device) for key in ("x0", "condition"))
        pick = torch.randperm(len(data), generator=session.rng, device=session.device)[: session.scale(self.states, 16)]
        noise = torch.randn(data[pick].shape, generator=session.rng, device=session.device, dtype=data.dtype)
        schedule = schedule_of(session.networks["teacher"])
        start = add_noise(schedule, data[pick], noise, torch.ones(len(pick), device=session.device))
        wanted = [rung for rung in session.task.rungs if self.fewest <= rung <= self.most]
        return {
            f"ratios_{rung}": self.tune(
                session.networks["teacher"], start, label[pick], rung, session.scale(self.evaluations, 3)
            )
            for rung in session.progress(session.scale(wanted, [4]), "timesteps")
        }

    @torch.no_grad()
    def tune(self, network: nn.Module, x: Tensor, condition: Tensor, rung: int, evaluations: int) -> Tensor:
        """tau / t of `rung` steps from the states x [B, ...] at t = 1."""
        ratios: list[float] = []
        for t, s in pairwise(uniform_times(rung)[:-1]):
            begin = self.noise(network, x, t, condition)

            def loss(ratio: float, x: Tensor = x, t: float = t, s: float = s, begin: Tensor = begin) -> float:
                end = self.noise(network, self.step(network, x, t, s, ratio, condition), s, condition)
                return float((begin - end).square().flatten(1).sum(1).mean())

            limits = (self.bounds[0], min(self.bounds[1], 1 / t))
            found = minimize_scalar(
                loss, bounds=limits, method="bounded", options={"maxiter": evaluations, "xatol": 1e-4}
            )
            ratios.append(float(found.x) if found.fun < loss(1.0) else 1.0)
            x = self.step(network, x, t, s, ratios[-1], condition)
        return torch.tensor([*ratios, 1.0], dtype=torch.float64)

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
        x = batch["noise"]
        for (t, s), ratio in zip(pairwise(uniform_times(rung)), ratios, strict=True):
            x = self.step(session.networks["teacher"], x, t, s, ratio, batch["condition"])
        return x
