from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stepmark import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.image.metrics import frechet_distance, moments
from stepmark.tracks.image.schedules import quadratic_times, uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step
from stepmark.tracks.image.training import fit

Candidate = tuple[tuple[int, tuple[int, ...]], ...]  # (timestep, layers left out there), noisiest first


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The layers of a UNet that can be left out, its residual and attention blocks, in the order of its modules."""
    return [part for part in network.modules() if type(part).__name__ in ("ResnetBlock2D", "Attention")]


@contextmanager
def without(network: nn.Module, skipped: Iterable[int]) -> Iterator[None]:
    """Inside, the numbered layers hand on what they add to: a residual block its shortcut, attention its input."""
    layers = layers_of(network)
    parts = [layers[index] for index in skipped]
    try:
        for part in parts:
            through = getattr(part, "conv_shortcut", None) or nn.Identity()
            part.forward = lambda x, *_, through=through, **__: through(x)
        yield
    finally:
        for part in parts:
            del part.forward


def sample(denoise: Denoiser, x: Tensor, times: Iterable[float], skips: Iterable[Iterable[int]]) -> Tensor:
    """DDIM from x at times[0] to times[-1], leaving out skips[i] of the network's layers in evaluation i."""
    for (t, s), skipped in zip(pairwise(times), skips, strict=True):
        with without(denoise.network, skipped):
            x = ddim_step(denoise.schedule, *denoise(x, t), s)
    return x


def repair(places: Iterable[tuple[int, tuple[int, ...]]], rng: Generator, steps: int) -> Candidate:
    """As many distinct timesteps below `steps` as there are places, noisiest first; repeated ones are drawn anew."""
    chosen: dict[int, tuple[int, ...]] = {}
    for n, skipped in places:
        while n in chosen:
            n = int(rng.integers(steps))
        chosen[n] = skipped
    return tuple(sorted(chosen.items(), reverse=True))


def mutate(parent: Candidate, rng: Generator, steps: int, rate: float, layers: int, cut: int) -> Candidate:
    """Every timestep, and every set of at most `cut` left-out layers, drawn anew with probability `rate`."""
    places = []
    for n, skipped in parent:
        if rng.random() < rate:
            n = int(rng.integers(steps))
        if cut and rng.random() < rate:
            skipped = tuple(sorted(rng.permutation(layers)[: rng.integers(cut + 1)].tolist()))
        places.append((n, skipped))
    return repair(places, rng, steps)


def cross(a: Candidate, b: Candidate, rng: Generator, steps: int) -> Candidate:
    """Each place, a timestep with its layers, from either parent."""
    return repair((x if rng.random() < 0.5 else y for x, y in zip(a, b, strict=True)), rng, steps)


def evolve(
    fitness: Callable[[Candidate], float],
    start: list[Candidate],
    rng: Generator,
    generations: int,
    population: int,
    parents: int = 10,
    steps: int = 1000,
    rate: float = 0.25,
    layers: int = 0,
    cut: int = 0,
    blind: bool = False,
) -> tuple[dict[Candidate, float], list[float]]:
    """Evolutionary search (algorithm 1): the fitness of all candidates seen, and the best of each generation so far.

    The first generation is `start`; each later one is half mutants of the best `parents` so far, three tenths crosses
    of two of them, and new random candidates: all of them where the search is `blind`. No candidate is evaluated twice.
    """
    known = {candidate: fitness(candidate) for candidate in start}
    history = [min(known.values())]
    for _ in range(generations - 1):
        best = sorted(known, key=lambda c: (known[c], c))[:parents]
        for place in range(population):
            a, b = (best[int(i)] for i in rng.integers(len(best), size=2))
            if blind:
                child = mutate(a, rng, steps, 1.0, layers, cut)
            elif place < 0.5 * population:
                child = mutate(a, rng, steps, rate, layers, cut)
            elif place < 0.8 * population:
                child = cross(a, b, rng, steps)
            else:
                child = mutate(a, rng, steps, 1.0, layers, cut)
            while child in known:  # the place of what was seen before is taken by something new
                child = mutate(a, rng, steps, 1.0, layers, cut)
            known[child] = fitness(child)
        history.append(min(known.values()))
    return known, history


class AutoDiffusion(Method):
    """AutoDiffusion: search the timesteps, and the layers used at each, with which a frozen model samples best.

    A candidate is a set of K timesteps out of all 1000 together with, for each, the layers of the UNet that are left
    out (section 3.2). Its fitness is the Frechet distance between features of generated and of training images
    (section 3.4): errors of single steps do not add up to quality. Evolution keeps the best and makes children by
    mutation and crossover (algorithm 1), each with exactly K distinct timesteps. Two stages: schedules alone, then
    masks and schedules around the best, from which the cheapest candidate within 2 % of the best fitness is taken. Both
    stages ask the same scorer. The result is plugged into DDIM.

    A skipped layer makes an evaluation cheaper, not free: it still counts against the rung, and the saving shows as
    fewer NFE-equivalents. In the release the layers of all steps together are bounded instead, so that a skipped one may
    pay for another step, and the best candidate below the bound is taken.

    `autodiffusion_steps` searches timesteps alone in both stages and takes the best, as the release does for its figures
    of four steps. `autodiffusion_random` is random search for them: the same first candidates, scorer and number of
    candidates, all of them but the first drawn anew, and the best of them taken.

    The DDIM of the paper has leading timesteps (0, 250, 500 and 750 of 1000), which never begin at the noise: that is
    `untuned_leading`. `ddim` here begins at the last timestep, and with four to eight steps is better for it.

    Features are those of a small perceptron that learns to classify the training images in prepare (the metric's own
    classifier is out of reach). Other differences: populations and sample sizes are far smaller; the first generation
    holds the uniform and the quadratic schedule, mutants of the uniform one and random ones, where the authors begin with
    uniform steps and random ones; rungs that are not searched use uniform steps. Mutation has rate 0.25, as in the
    authors' runs, at first too, where theirs has 0.1, and 0.1 in the second stage; half of the children are mutants and
    three tenths crosses as in their search of schedules, where that of layers has two tenths. There the share of layers
    that may go rises from generation to generation; here it is none in the first stage and two layers in the second,
    drawn anew as a whole. The second checkpoint is searched anew; no schedule is carried from one to the other.

    What limits it here: a UNet of two levels with one block each has few layers to spare, and the fitness of 256 samples
    is a noisy guide where the paper has 5000, so that what is found differs much from search to search. Searched timesteps
    are better than uniform ones with four to eight steps, on average, and no better with ten; with eight and ten they are
    worse than the quadratic schedule that the search begins with, and nowhere clearly better than those of random search.
    """

    paper = Paper(
        id="autodiffusion",
        title="AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion "
        "Model Acceleration",
        authors="Li, Li, Zheng, Wu, Xiao, Wang, Zheng, Pan, Chao, Ji",
        year=2023,
        arxiv="2309.10438",
        code="lilijiangg/AutoDiffusion",
    )
    tasks = ("class_to_image/digits_eps", "class_to_image/digits_eps_b")
    baselines = ("ddim", "ddim_quadratic", "autodiffusion_random")
    claims = (
        Claim(
            "fd[autodiffusion_steps,4..10] < fd[ddim,4..10] "
            "and fd[autodiffusion_steps,4..10] < fd[untuned_leading,4..10]",
            says="searched steps are better than uniform ones at every step count, wherever these begin",
            headline=True,
            setting="80 candidates scored on 256 samples; the release scores 500 on 5000",
        ),
        Claim(
            "fd[autodiffusion_steps,4] <= fd[ddim,6]",
            says="four searched steps are no worse than six uniform ones",
            setting="80 candidates scored on 256 samples; the release scores 500 on 5000",
        ),
        Claim(
            "fd[autodiffusion_steps,4..10] < fd[ddim_quadratic,4..10]",
            says="and better than quadratic ones, which no search is needed for",
            setting="80 candidates scored on 256 samples; the release scores 500 on 5000",
        ),
        Claim(
            "fd[autodiffusion_steps,4..10] < fd[autodiffusion_random,4..10]",
            says="evolution finds better ones than random search among as many candidates",
            setting="80 candidates scored on 256 samples; the release scores 500 on 5000",
        ),
        Claim(
            "nfe_equivalent[autodiffusion,4..10] < nfe_equivalent[ddim,4..10] "
            "and fd[autodiffusion,4..10] <= min(fd[ddim,4..10], fd[ddim_quadratic,4..10])",
            says="some layers can be left out at no loss",
        ),
    )

    rungs = (4, 6, 8, 10)
    generations, population, samples = (5, 4), 10, 256  # generations of the two stages
    cut, slack, blind = 2, 1.02, False
    variants = (
        Variant(
            "autodiffusion_steps",
            says="timesteps alone are searched, the network stays whole, and the best schedule is taken",
            tasks=("class_to_image/digits_eps",),
            cut=0,
            slack=1.0,
        ),
        Variant(
            "autodiffusion_random",
            says="control: random search among as many candidates, from the same first ones",
            blind=True,
            slack=1.0,
            baselines=("ddim", "ddim_quadratic"),
        ),
    )

    def prepare(self, session: Session) -> dict[str, Tensor]:
        rng, network = np.random.default_rng(session.seed), session.networks["teacher"]
        layers, steps = len(layers_of(network)), Denoiser(network, session.train["condition"]).schedule.steps
        fitness = self.scorer(session, session.scale(self.samples, 32))
        generations = session.scale(self.generations, (2, 2))
        population = session.scale(self.population, 3)
        state: dict[str, Tensor] = {}
        for rung in session.progress(session.scale(self.rungs, (4,)), "search"):
            grids = [grid(rung)[:-1] for grid in (uniform_times, quadratic_times)]
            start = [repair([(max(round(t * steps), 1) - 1, ()) for t in grid], rng, steps) for grid in grids]
            start += [mutate(start[0], rng, steps, (0.25, 1.0)[i % 2], 0, 0) for i in range(population - 2)]
            known, _ = evolve(fitness, start, rng, generations[0], population, steps=steps, blind=self.blind)
            best = sorted(known, key=lambda c: known[c])[: population // 2]
            cut = 0 if self.blind else self.cut
            known, _ = evolve(
                fitness, best, rng, generations[1], population, steps=steps, rate=0.1, layers=layers, cut=cut,
                blind=self.blind,
            )  # fmt: skip
            limit = self.slack * min(known.values())
            chosen = max((c for c in known if known[c] <= limit), key=lambda c: (sum(len(s) for _, s in c), -known[c]))
            state[f"timesteps_{rung}"] = torch.tensor([n for n, _ in chosen])
            state[f"kept_{rung}"] = torch.tensor([[i not in s for i in range(layers)] for _, s in chosen])
        return state

    def scorer(self, session: Session, n: int) -> Callable[[Candidate], float]:
        """Fitness of a candidate: Frechet distance of n samples, always from the same noise, to the training images.

        Candidates that were scored before are not sampled again.
        """
        data, labels = (session.train[key].to(session.device) for key in ("x0", "condition"))
        sizes = (data[0].numel(), 64, 16)
        hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        trunk = nn.Sequential(nn.Flatten(), *hidden).to(session.device)
        perceptron = nn.Sequential(trunk, nn.Linear(sizes[-1], 1 + int(labels.max()), device=session.device))

        def loss() -> Tensor:
            pick = torch.randint(len(data), (128,), generator=session.rng, device=session.device)
            return cross_entropy(perceptron(data[pick]), labels[pick])

        fit(session, perceptron, loss, session.scale(400, 20))
        pick = torch.randperm(len(data), generator=session.rng, device=session.device)[:n]
        noise = torch.randn(data[pick].shape, generator=session.rng, device=session.device)
        denoise = Denoiser(session.networks["teacher"], labels[pick])

        @torch.no_grad()
        def features(x: Tensor) -> np.ndarray:
            return trunk(x.clamp(-1, 1)).double().cpu().numpy()

        @functools.cache
        @torch.no_grad()
        def fitness(candidate: Candidate) -> float:
            times = [*((t + 1) / denoise.schedule.steps for t, _ in candidate), 0.0]
            found = features(sample(denoise, noise, times, [skipped for _, skipped in candidate]))
            return float(frechet_distance(*moments(found), *target))

        target = moments(features(data))
        return fitness

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        denoise = Denoiser(session.networks["teacher"], batch["condition"])
        if f"timesteps_{rung}" not in session.state:
            return sample(denoise, batch["noise"], uniform_times(rung), [()] * rung)
        times = [*((session.state[f"timesteps_{rung}"] + 1) / denoise.schedule.steps).tolist(), 0.0]
        skips = [(~kept).nonzero().flatten().tolist() for kept in session.state[f"kept_{rung}"]]
        return sample(denoise, batch["noise"], times, skips)
