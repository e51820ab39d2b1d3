"""Score networks on sets of observations, and sampling from their compositions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from stepmark.task import Task
from stepmark.tracks.bayes.noising import alpha_bar
from stepmark.tracks.bayes.problems import problem

REPEATS = 4  # noise levels per training set and step


T_MIN = 0.01  # the networks are trained on [T_MIN, 1]; noise variance 0.002 at T_MIN


def score_networks(task: Task) -> dict[str, nn.Module]:
    """A score network and an encoder of observations for a `posterior/*` task, untrained."""
    d = problem(task).noise.shape[0]
    return {"score": ScoreNetwork(parameters=d), "encoder": SetEncoder(observables=d)}


class SetEncoder(nn.Module):
    """Permutation-invariant embedding of a set of observations (deep set): x [R, m, D], size [R] -> [R, width].

    Mean over the first `size` elements of a learned feature, beside the logarithm of the size. 2.7k parameters.
    """

    def __init__(self, observables: int, width: int = 24) -> None:
        super().__init__()
        self.feature = nn.Sequential(
            nn.Linear(observables, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, width - 1)
        )
        self.register_buffer("mean", torch.zeros(observables))
        self.register_buffer("std", torch.ones(observables))

    def forward(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """Embed sets; `size` defaults to m. Elements beyond it are ignored."""
        r, m, _ = x.shape
        size = torch.full((r,), m, device=x.device) if size is None else size
        present = (torch.arange(m, device=x.device) < size[:, None])[..., None]
        pooled = (self.feature((x - self.mean) / self.std) * present).sum(1) / size[:, None]
        return torch.cat([pooled, size[:, None].log().to(pooled)], dim=-1)


class ScoreNetwork(nn.Module):
    """Conditional score of a diffused posterior, grad log p_t(theta | context): [R, d]. 11k parameters for d = 2.

    s = (a V + (1 - a) I)^(-1) (sqrt(a) F(theta, t, context) - theta) with a = alpha_bar(t), F an MLP and V the covariance
    of an undiffused posterior, roughly: that of the residuals of a linear regression (buffers `variances` and `basis`, its
    eigenvalues and vectors, set by `fit_score`). Were the posterior N(m, V), F would be m at every t: the network learns a
    slowly varying function, and near t = 0 its error is not divided by the noise level, as it is in a noise-predicting
    network; sums of many scores need that.
    """

    def __init__(self, parameters: int, context: int = 24, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(parameters + context + 5, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, parameters),
        )
        self.register_buffer("variances", torch.ones(parameters))
        self.register_buffer("basis", torch.eye(parameters))

    def forward(self, theta: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """theta [R, d], t [R] in (0, 1], context [R, c]."""
        a = alpha_bar(t)
        ratio = torch.log(a / (1 - a)) / 8
        features = torch.stack(
            [t, ratio, torch.sin(math.pi * t), torch.cos(math.pi * t), torch.cos(3 * math.pi * t)], dim=-1
        )
        a = a[:, None]
        gap = a.sqrt() * self.net(torch.cat([theta, context, features], dim=-1)) - theta
        return (gap @ self.basis / (a * self.variances + 1 - a)) @ self.basis.mT

    @property
    def covariance(self) -> Tensor:
        """V, [d, d]."""
        return (self.basis * self.variances) @ self.basis.mT


def fit_score(
    score_network: ScoreNetwork,
    encoder: SetEncoder,
    theta: Tensor,
    x: Tensor,
    generator: torch.Generator,
    steps: Iterable[int],
    total: int,
    random_size: bool = False,
    batch: int = 256,
    rate: float = 2e-3,
) -> float:
    """Train both networks in place by denoising score matching on theta [N, d], x [N, m, D]; returns the best loss.

    Loss E |sigma_t s(theta_t, t, x) + e|^2 (Vincent 2011; weight sigma^2) with t = T_MIN + (1 - T_MIN) u^2, u uniform:
    samplers spend their steps near t = 0, where this weight is small. Each step takes `batch` sets, encoded once, and
    REPEATS noise levels for each. A tenth of the parameters is held out; every total/40 steps the moving average of the
    weights is scored on it with fixed noise, and the best average is kept: small data sets overfit long before large
    ones, and every method gets the same care. With `random_size` each set is cut to a random number of its observations.
    """
    device = theta.device
    size_limit = x.shape[1]
    flat = x.flatten(0, 1)
    encoder.mean.copy_(flat.mean(0))
    encoder.std.copy_(flat.std(0))
    variances, basis = torch.linalg.eigh(_residual_covariance(theta, x.mean(1)))
    score_network.variances.copy_(variances)
    score_network.basis.copy_(basis)
    held = max(8, len(theta) // 10)
    train_theta, train_x, test_theta, test_x = theta[held:], x[held:], theta[:held], x[:held]
    parameters = [*score_network.parameters(), *encoder.parameters()]
    average = [p.detach().clone() for p in parameters]
    best, best_loss = [p.clone() for p in average], math.inf
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=total, pct_start=0.1)

    def loss_of(theta0: Tensor, sets: Tensor, t: Tensor, noise: Tensor, size: Tensor | None) -> Tensor:
        a = alpha_bar(t)[:, None]
        repeats = len(t) // len(theta0)
        theta0 = theta0.repeat_interleave(repeats, dim=0)
        context = encoder(sets, size).repeat_interleave(repeats, dim=0)
        predicted = score_network(a.sqrt() * theta0 + (1 - a).sqrt() * noise, t, context)
        return ((1 - a).sqrt() * predicted + noise).square().mean()

    def draw_size(count: int) -> Tensor | None:
        return torch.randint(1, size_limit + 1, (count,), generator=generator, device=device) if random_size else None

    def draw_time(count: int) -> Tensor:
        return T_MIN + (1 - T_MIN) * torch.rand(count, generator=generator, device=device).square()

    fixed_t = draw_time(held * max(1, 4_000 // held))
    fixed_noise = torch.randn(len(fixed_t), theta.shape[1], generator=generator, device=device)
    fixed_size = draw_size(held)
    every = max(1, total // 40)
    for step in steps:
        index = torch.randint(len(train_theta), (batch,), generator=generator, device=device)
        t = draw_time(batch * REPEATS)
        noise = torch.randn(batch * REPEATS, theta.shape[1], generator=generator, device=device)
        loss = loss_of(train_theta[index], train_x[index], t, noise, draw_size(batch))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        decay = min(0.995, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        if (step + 1) % every == 0:
            with torch.no_grad():
                current = [p.detach().clone() for p in parameters]
                _assign(parameters, average)
                held_out = float(loss_of(test_theta, test_x, fixed_t, fixed_noise, fixed_size))
                _assign(parameters, current)
            if held_out < best_loss:
                best, best_loss = [p.clone() for p in average], held_out
    with torch.no_grad():
        _assign(parameters, best)
    return best_loss


def _assign(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _residual_covariance(theta: Tensor, summary: Tensor) -> Tensor:
    """Covariance left in theta [N, d] after linear regression on summary [N, D]: a posterior covariance, roughly."""
    design = torch.cat([summary, torch.ones_like(summary[:, :1])], dim=-1).double().cpu()
    target = theta.double().cpu()
    residual = target - design @ torch.linalg.lstsq(design, target).solution
    return (residual.mT @ residual / (len(theta) - design.shape[1])).to(theta)


def compose_scores(scores: Tensor, prior_score: Tensor, t: float) -> Tensor:
    """Score of the bridging density of K factors at time t in [0, 1]: scores [..., K, d], prior_score [..., d].

    (1 - K) (1 - t) grad log p(theta) + sum_k s(theta, t, x_k) (Geffner et al. 2023, eq. 6-7, with T = 1). At t = 0, with
    the exact scores of the undiffused factors, it is the score of p(theta)^(1-K) prod_k p(theta | x_k), the posterior.
    """
    return (1 - scores.shape[-2]) * (1 - t) * prior_score + scores.sum(-2)


def set_scores(network: nn.Module, theta: Tensor, t: float, context: Tensor) -> Tensor:
    """Scores [B, S, K, d] of theta [B, S, d] under each of the K contexts [B, K, c]: B * S * K rows of the network."""
    b, s, d = theta.shape
    k = context.shape[1]
    rows = theta[:, :, None].expand(b, s, k, d).reshape(-1, d)
    contexts = context[:, None].expand(b, s, k, -1).reshape(-1, context.shape[-1])
    time = torch.full((len(rows),), t, device=theta.device, dtype=theta.dtype)
    return network(rows, time, contexts).reshape(b, s, k, d)


def annealed_langevin(
    score_of: Callable[[Tensor, float], Tensor],
    theta: Tensor,
    times: Iterable[float],
    step_sizes: Iterable[Tensor],
    repeats: int,
    generator: torch.Generator,
) -> Tensor:
    """Annealed Langevin dynamics on theta [..., d]: `repeats` steps theta += D S(theta, t) + sqrt(2 D) z at each (t, D).

    Step sizes are symmetric positive matrices [d, d]: any of them leaves the density with score S invariant, up to the
    discretisation; delta * I is the plain method.
    """
    for t, step in zip(times, step_sizes, strict=True):
        root = torch.linalg.cholesky(2 * step).mT
        for _ in range(repeats):
            noise = torch.randn(theta.shape, generator=generator, device=theta.device, dtype=theta.dtype)
            theta = theta + score_of(theta, t) @ step + noise @ root
    return theta


def bridging_schedule(steps: int, covariance: Tensor, factors: int) -> tuple[list[float], list[Tensor], int]:
    """Times and step sizes [d, d] from T = 1 down, and repeats at each, for `steps` Langevin steps over bridging densities.

    Levels stand at t = T_MIN + (1 - T_MIN) u^3, u uniform. The step is a fraction (0.7 falling to 0.2) of the covariance
    that `factors` composed factors leave at t, each of undiffused covariance `covariance`: the density has the precision
    of all of them together. Every level is repeated, up to 5 times, once there are 160 steps.
    """
    repeats = min(5, max(1, steps // 80))
    levels = max(1, steps // repeats)
    eye = torch.eye(len(covariance), device=covariance.device, dtype=covariance.dtype)
    times, sizes = [], []
    for i in range(levels):
        u = 1 - i / (levels - 1) if levels > 1 else 0.0
        t = T_MIN + (1 - T_MIN) * u**3
        a = alpha_bar(t)
        times.append(t)
        sizes.append((0.2 + 0.5 * u) * (a * covariance + (1 - a) * eye) / factors)
    return times, sizes, repeats
