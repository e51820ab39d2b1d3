"""See the class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepmark import Claim, Method, Paper, Session, Variant
from stepmark.task import Task
from stepmark.tracks.bayes import linear, noising, problems


class CompositionalScoreSBI(Method):
    """F-NPSE: compose the scores of single-observation posteriors and sample by annealed Langevin dynamics.

    One network learns s(theta, t, x) = grad log p_t(theta | x), the score of the diffused posterior of ONE observation,
    by denoising score matching on 10 000 pairs; the number of observations n is free at test time. The posterior of n
    i.i.d. observations is p(theta)^(1-n) prod_j p(theta | x_j). Sampling follows bridging densities whose score is

        S(theta, t) = (1 - n) (T - t) / T grad log p(theta) + sum_j s(theta, t, x_j),

    the posterior's at t = 0 and that of N(0, I / n) at t = T. They are not the forward-diffused posterior, so a reverse
    SDE would be wrong; instead, from t = T to 0, theta <- theta + delta_t S + sqrt(2 delta_t) z. One draw costs n rows
    of the network for each Langevin step: rung / (100 n) steps.

    `compositional_score_sbi_partial` (PF-NPSE, section 3.4) stands between this (n factors, whose network errors add up)
    and `npse_set` (one factor, that needs n simulations per training example): a permutation-invariant network learns the
    score of the posterior of 1 .. m = 5 observations, and the n are cut into K = ceil(n / m) subsets, with K in the place
    of n above; the paper finds m about 6 most robust. Every method has the same 10 000 simulations: 2000 parameters with 5
    observations each, 10 000 / n with n.

    `npse_set` (the paper's baseline "NPSE", section 4) samples by deterministic DDIM steps (Song, Meng and Ermon 2021, eq.
    12) on times u^2, at most 200: one row a step and draw, and right, since its s IS the score of the diffused posterior.

    `naive_sum_reverse_sde` is the short cut that section 3.2 warns of: the same networks and S, integrated as if S were
    the score of the forward-diffused posterior, d theta = (beta/2 theta + beta S) d tau + sqrt(beta) dw, tau = 1 - t. Where
    S is stiff that SDE equilibrates at about half the variance that S stands for, however many steps are taken. To give it
    its best chance the stiff part is integrated exactly, and draws are kept in the box of +-6 prior standard deviations.

    Source: Geffner, Papamakarios and Mnih 2023, sections 3.1-3.4 and algorithm 1. Differences: the paper walks 400 levels
    with 5 steps each and delta_t proportional to 1 - alpha_t / alpha_{t-1}, far beyond the ladder, and that step is
    unstable on a coarse schedule. Here the step is a matrix, tau_t (alpha_bar V + (1 - alpha_bar) I) / n: a fraction tau_t
    (0.7 falling to 0.2) of the covariance that n composed factors leave, V being the residual covariance of a linear
    regression on the training pairs; levels are dense near t = 0 and stop at 0.01 T; each is repeated up to 5 times once
    there are 160 steps. The network is small (14k parameters) and trained on the known prior's own scale.

    The headline begins at 96 000 evaluations: of 30 observations, 9 600 are three Langevin steps, with which it is far
    off, and even 288 000 are 96, where the paper takes 2000; so do its other claims with 30 observations. Two clusters are
    the task of the headline because a regression does not solve it. Whether 6000 updates are enough is not shown: with
    exact scores the same sampler comes far nearer on the four-mode prior, where the set network is ahead. Left out is a
    neural likelihood with MCMC, which the paper compares with as well; `importance_sampling` knows the exact likelihood
    and is no such arm (with ten parameters it fails all the same).

    What limits it on the Gaussian tasks: a linear regression on the training pairs, from which the networks take no more
    than its covariance, is nearly the whole answer there, and alone (`linear_posterior`) it is nearer than any of them.
    With two parameters and many observations the set network, from few parameters with as many observations each, is ahead
    of the full composition, in whose sum the error of a score learnt from single observations counts as often as there are
    observations; with ten all are far off, and about alike. The partial factorisation is about as near at the smallest
    budget, where the full one is far off, as at the largest.
    """

    paper = Paper(
        id="compositional_score_sbi",
        title="Compositional Score Modeling for Simulation-based Inference",
        authors="Tomas Geffner, George Papamakarios, Andriy Mnih",
        year=2023,
        arxiv="2209.14249",
    )
    tasks = (
        "posterior/gaussian_n30",
        "posterior/gaussian10_n30",
        "posterior/gaussian_n10",
        "posterior/gaussian_n1",
        "posterior/mixture_n10",
        "posterior/two_clusters_n30",
        "posterior/two_clusters_n10",
    )
    baselines = ("npse_set", "linear_posterior", "naive_sum_reverse_sde", "importance_sampling")
    claims = (
        Claim(
            "mmd[compositional_score_sbi,96000..288000] < mmd[npse_set,96000..288000] and "
            "mmd[compositional_score_sbi,96000..288000] < mmd[linear_posterior,96000..288000]",
            says="30 observations of two clusters, same simulations: composed single-observation scores beat a set network",
            task="posterior/two_clusters_n30",
            headline=True,
        ),
        Claim(
            "mmd[compositional_score_sbi,32000..96000] < mmd[npse_set,32000..96000] and "
            "mmd[compositional_score_sbi,32000..96000] < mmd[linear_posterior,32000..96000]",
            says="10 observations of two clusters: the same",
            task="posterior/two_clusters_n10",
        ),
        Claim(
            "mmd[compositional_score_sbi,32000..96000] < mmd[npse_set,32000..96000]",
            says="10 observations, four-mode prior: the same",
            task="posterior/mixture_n10",
            setting="6000 updates of a small network: with exact scores the same sampler comes near",
        ),
        Claim(
            "mmd[compositional_score_sbi,96000..288000] < mmd[npse_set,96000..288000]",
            says="30 observations, 2 parameters, all Gaussian: the same",
            task="posterior/gaussian_n30",
            setting="a regression without a network is nearer than either on a Gaussian problem: this does not tell who learns",
        ),
        Claim(
            "mmd[compositional_score_sbi,96000..288000] < mmd[npse_set,96000..288000]",
            says="30 observations, 10 parameters, all Gaussian: the same",
            task="posterior/gaussian10_n30",
            setting="a regression without a network is nearer than either on a Gaussian problem: this does not tell who learns",
        ),
        Claim(
            "mmd[compositional_score_sbi,96000..288000] < mmd[naive_sum_reverse_sde,96000..288000]",
            says="summed scores need Langevin dynamics: a reverse SDE with the same scores is worse",
            task="posterior/two_clusters_n30",
        ),
    )

    subset = 1  # observations of a factor, m; 0: all of them
    sampler = "langevin"  # or "ddim", "reverse_sde"
    variants = (
        Variant(
            "compositional_score_sbi_partial",
            says="PF-NPSE: compose the scores of posteriors of 5 observations each, fewer factors and fewer calls",
            subset=5,
            tasks=(
                "posterior/gaussian_n30",
                "posterior/gaussian10_n30",
                "posterior/gaussian_n10",
                "posterior/mixture_n10",
                "posterior/two_clusters_n30",
                "posterior/two_clusters_n10",
            ),
            baselines=("compositional_score_sbi", "npse_set", "naive_sum_reverse_sde"),
            claims=(
                Claim(
                    "mmd[compositional_score_sbi_partial,96000..288000] < mmd[compositional_score_sbi,96000..288000] and "
                    "mmd[compositional_score_sbi_partial,96000..288000] < mmd[npse_set,96000..288000]",
                    says="30 observations of two clusters: a partial factorisation beats both ends, all factors and none",
                    task="posterior/two_clusters_n30",
                    headline=True,
                ),
                Claim(
                    "mmd[compositional_score_sbi_partial,*] < mmd[compositional_score_sbi,*]",
                    says="at every budget it is nearer than the full factorisation, which needs more calls",
                    task="posterior/two_clusters_n30",
                ),
            ),
        ),
        Variant(
            "npse_set",
            says="NPSE with a set encoder: learn the posterior score of all n observations at once, sample by DDIM",
            subset=0,
            sampler="ddim",
            baselines=(),
        ),
        Variant(
            "naive_sum_reverse_sde",
            says="Composed single-observation scores in a plain reverse SDE: the short cut that F-NPSE warns of",
            sampler="reverse_sde",
            tasks=(
                "posterior/gaussian_n30",
                "posterior/gaussian10_n30",
                "posterior/gaussian_n10",
                "posterior/mixture_n10",
                "posterior/two_clusters_n30",
                "posterior/two_clusters_n10",
            ),
            baselines=(),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The score network and its embedding of a set of observations."""
        return score_networks(session.task)

    def prepare(self, session: Session) -> Mapping[str, Tensor]:
        """Denoising score matching, one training for all variants with the same sets."""
        found = session.once(trained_scores, self.subset)
        for name in ("score", "encoder"):
            weights = {
                key.removeprefix(f"{name}."): value for key, value in found.items() if key.startswith(f"{name}.")
            }
            session.networks[name].load_state_dict(weights)
        return {"held_out_loss": found["held_out_loss"]}

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        """Posterior draws [B, DRAWS, d] for the sets x [B, n, d]."""
        x = batch["x"]
        b, n, d = x.shape
        m = self.subset or n
        factors = math.ceil(n / m)
        padded = torch.cat([x, x.new_zeros(b, factors * m - n, d)], dim=1)
        size = torch.full((b, factors), m, device=x.device)
        size[:, -1] = n - (factors - 1) * m
        context = session.networks["encoder"](padded.reshape(b * factors, m, d), size.reshape(-1))
        context = context.reshape(b, factors, -1)
        network, rng = session.networks["score"], session.rng
        prior = problems.problem(session.task).prior.to(x.device)
        steps = rung // (linear.DRAWS * factors)
        start = torch.randn(b, linear.DRAWS, d, generator=rng, device=x.device)

        def composed(theta: Tensor, t: float) -> Tensor:
            return compose_scores(set_scores(network, theta, t, context), prior.score(theta), t)

        if self.sampler == "ddim":
            return reverse_ddim(
                lambda theta, t: set_scores(network, theta, t, context)[:, :, 0], start, min(200, max(1, steps))
            )
        if self.sampler == "reverse_sde":
            reach = 6 * float(prior.moments()[1].diagonal().max()) ** 0.5
            return reverse_sde(composed, start, max(1, steps), float(network.variances.mean()), factors, reach, rng)
        times, sizes, repeats = bridging_schedule(steps, network.covariance, factors)
        return annealed_langevin(composed, start / factors**0.5, times, sizes, repeats, rng)


REPEATS = 4  # noise levels per training set and step


T_MIN = 0.01  # the networks are trained on [T_MIN, 1]; noise variance 0.002 at T_MIN


def trained_scores(session: Session, subset: int) -> dict[str, Tensor]:
    """Train both networks on 10 000 simulations, as many parameters as there are sets of `subset` (0: of all) in them;
    their weights and the loss on what was held out.
    """
    total = session.scale(6_000, 20)
    data = session.train
    m = subset or problems.observations(session.task)
    score, encoder = session.networks["score"], session.networks["encoder"]
    loss = fit_score(
        score,
        encoder,
        data[f"theta_{m}"].to(session.device),
        data[f"x_{m}"].to(session.device),
        session.rng,
        session.progress(range(total), "score matching"),
        total,
        random_size=subset > 1,
    )
    weights = {
        f"{name}.{key}": v for name in ("score", "encoder") for key, v in session.networks[name].state_dict().items()
    }
    return weights | {"held_out_loss": torch.tensor(loss)}


def score_networks(task: Task) -> dict[str, nn.Module]:
    """A score network and an encoder of observations for a `posterior/*` task, untrained."""
    d = problems.problem(task).noise.shape[0]
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
        a = noising.alpha_bar(t)
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
        a = noising.alpha_bar(t)[:, None]
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
        a = noising.alpha_bar(t)
        times.append(t)
        sizes.append((0.2 + 0.5 * u) * (a * covariance + (1 - a) * eye) / factors)
    return times, sizes, repeats


def reverse_ddim(score_of: Callable[[Tensor, float], Tensor], theta: Tensor, steps: int) -> Tensor:
    """Deterministic DDIM from t = 1 to T_MIN on times u^2, for the score of a forward-diffused density of theta [..., d].

    theta_s = sqrt(a_s) x0 + sqrt(1 - a_s) e with e = -sqrt(1 - a_t) s and x0 = (theta_t - sqrt(1 - a_t) e) / sqrt(a_t).
    """
    times = [max(T_MIN, (1 - i / steps) ** 2) for i in range(steps + 1)]
    for t, s in pairwise(times):
        a_t, a_s = noising.alpha_bar(t), noising.alpha_bar(s)
        noise = -((1 - a_t) ** 0.5) * score_of(theta, t)
        clean = (theta - (1 - a_t) ** 0.5 * noise) / a_t**0.5
        # The last step lands on the data; before it clean is a posterior mean, noise brings the spread back.
        theta = a_s**0.5 * clean + (1 - a_s) ** 0.5 * noise
    return theta


def reverse_sde(
    score_of: Callable[[Tensor, float], Tensor],
    theta: Tensor,
    steps: int,
    variance: float,
    factors: int,
    reach: float,
    generator: torch.Generator,
) -> Tensor:
    """Integrate the reverse SDE from t = 1 to T_MIN in `steps` steps with a stiff-stable exponential Euler scheme.

    The drift beta (theta / 2 + S) is split into -r theta with r = beta (factors / (a v + 1 - a) - 1/2), its stiff part if
    the factors were Gaussian with undiffused variance v, and a rest that is frozen over a step; the linear SDE is then
    solved exactly. As steps go to infinity this is the plain reverse SDE.
    """
    for i in range(steps):
        t, s = (max(T_MIN, (1 - k / steps) ** 2) for k in (i, i + 1))
        a = noising.alpha_bar(t)
        # beta integrated over the step, so that a coarse step still sees all of its noise.
        spent = math.log(noising.alpha_bar(s) / a)
        rate = factors / (a * variance + 1 - a) - 0.5
        drift = 0.5 * theta + score_of(theta, t)
        shrink = -math.expm1(-rate * spent) / rate
        noise = torch.randn(theta.shape, generator=generator, device=theta.device, dtype=theta.dtype)
        spread = math.sqrt(-math.expm1(-2 * rate * spent) / (2 * rate))
        theta = (theta + shrink * drift + spread * noise).clamp(-reach, reach)
    return theta
