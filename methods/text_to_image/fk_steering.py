"""FK steering: particles that a reward resamples while they are denoised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Claim, Method, Paper, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.text_to_image.sampling import noisy_step
from stepmark.tracks.text_to_image.search import JUDGED, ROOM, candidates, guided, judged, taken


def judged_steps(steps: int, every: int) -> list[int]:
    """Which of so many steps end with the particles being judged: each `every`-th, and the last."""
    return sorted({*range(every - 1, steps, every), steps - 1})


def ancestors(log_weight: Tensor, rng: torch.Generator) -> Tensor:
    """Multinomial resampling: as many numbers of particles int64 [K, B] as there are weights [K, B], item by item."""
    weight = log_weight.softmax(0).T
    return torch.multinomial(weight, weight.shape[1], replacement=True, generator=rng).T


def steered(
    denoise: Denoiser,
    x: Tensor,
    steps: int,
    every: int,
    judge: Callable[[Tensor], Tensor],
    potential: str,
    strength: float,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Particles [K B, ...] denoised from noise x in ancestral steps and resampled on the way; their rewards [K, B], and the
    logarithms [K, B] of their last potentials, by which they are still to be resampled.

    judge: rewards [K, B] of predictions of x0 [K B, ...].
    """
    past = x.new_tensor(-torch.inf if potential == "max" else 0.0)
    product = x.new_zeros(())
    for step, (t, s) in enumerate(pairwise(uniform_times(steps))):
        x0, eps = denoise(x, t)
        x = noisy_step(denoise.schedule, x0, eps, t, s, 1.0, rng)
        if step not in judged_steps(steps, every):
            continue
        reward = judge(x0)
        if step == steps - 1:
            break
        seen = {"max": torch.maximum(past, reward), "difference": reward, "sum": past + reward}[potential]
        log_weight = strength * (reward - past if potential == "difference" else seen)
        which = ancestors(log_weight, rng)
        x, past, product = taken(x, which), seen.gather(0, which), (product + log_weight).gather(0, which)
    return x, reward, strength * reward - product


class FKSteering(Method):
    """FK steering: particles whose law at the end is p(x0) exp(lambda r(x0)), by resampling while they are denoised.

    K particles take the ancestral sampler's steps. At some of them each is judged by the reward r_t of its predicted x0,
    and K ancestors are drawn with replacement in proportion to a potential (algorithm 1). With lambda = 10,

        G_t = exp(lambda max_{s >= t} r_s)                  max, which the authors take for pictures
        G_t = exp(lambda (r_t - r_{t + 1}))                 difference
        G_t = exp(lambda sum_{s >= t} r_s)                  sum
        G_0 = exp(lambda r(x0)) / (G_1 G_2 ...)             the last, for all three

    where s runs over the judgings of a particle's own line: the product is exp(lambda r(x0)) whatever the rewards on the
    way were. The last resampling is left out where more than half of the particles count (as in the authors' code), and
    the particle with the highest reward is returned.

    r is the log-probability that the reward network gives to the caption. A step takes two evaluations of a particle, and
    a judging two more. K is a sixteenth of the rung, as in `best_of_n`, and every second step is judged: 64 evaluations
    are four particles of five steps that are resampled twice on the way, 32 are two of them. With 16 nothing could be
    judged before the end.

    Differs from the paper: 5 steps and 4 particles at most, not 100 and 4 or more; it resamples after steps 20, 40, 60 and
    80 of them. The maximum in the authors' code begins at a reward of 0, above which log-probabilities never are, here with
    the first; and it stands there, as does the sum, in the last potential in the place of r(x0), which the paper has.
    Gradients of the reward, learned rewards and text models are left out, and there is no larger, fine-tuned model to be
    held against: the claims are against as many pictures without resampling, of either sampler.

    What limits it here: two evaluations for every look at a particle are a step less for it, where the paper's rewards
    cost next to nothing beside its steps, and of two to four particles few lines are left to choose from.
    """

    paper = Paper(
        id="fk_steering",
        title="A General Framework for Inference-time Scaling and Steering of Diffusion Models",
        authors="Singhal, Horvitz, Teehan, Ren, Yu, McKeown, Ranganath",
        year=2025,
        arxiv="2501.06848",
        code="zacharyhorvitz/Fk-Diffusion-Steering",
    )
    tasks = ("text_to_image/scenes_eps",)
    baselines = ("best_of_n", "best_of_n_stochastic", "ddim_guided", "random_of_n")
    claims = (
        Claim(
            "caption[fk_steering,32..64] > max(caption[best_of_n,32..64], caption[best_of_n_stochastic,32..64], "
            "caption[ddim_guided,32..64], caption[random_of_n,32..64]) and fd[fk_steering,32..64] <= 1.1 * fd[best_of_n,32..64]",
            says="captions are followed better than by the best of as many pictures, or by more steps, for as many "
            "evaluations, and the pictures stay as good",
            headline=True,
            setting="5 steps, not 100, so that judging a particle costs as much as a step of it; no larger model to beat",
        ),
        Claim(
            "caption[fk_steering,32..64] > caption[best_of_n_stochastic,32..64]",
            says="resampling on the way is better than choosing at the end, with the same sampler",
            setting="5 steps, not 100, so that judging a particle costs as much as a step of it",
        ),
        Claim(
            "caption[fk_steering,32..64] > caption[random_of_n,32..64]",
            says="it is the reward that does it, not the number of pictures",
        ),
    )

    potential = "max"  # "max" | "difference" | "sum"
    strength, every = 10.0, 2  # lambda; how many steps from one judging to the next
    variants = (
        Variant(
            "fk_steering_difference",
            says="potentials of the difference to the reward before",
            potential="difference",
            baselines=("best_of_n", "fk_steering"),
        ),
        Variant(
            "fk_steering_sum",
            says="potentials of the sum of rewards so far",
            potential="sum",
            baselines=("best_of_n", "fk_steering"),
        ),
        Variant(
            "fk_steering_gentle",
            says="with lambda = 2, the authors' other choice",
            strength=2.0,
            baselines=("best_of_n", "fk_steering"),
        ),
    )

    def steps(self, room: int) -> int:
        """The most steps that so many evaluations of a particle pay for."""
        return max(n for n in range(1, room // 2) if 2 * n + JUDGED * len(judged_steps(n, self.every)) <= room)

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < 2 * ROOM:
            skip("two particles that are judged before the end take 32 evaluations")
        particles, rng, condition = rung // ROOM, session.rng, batch["condition"]
        x, reward, last = steered(
            guided(session, condition, particles),
            candidates(batch["noise"], particles, rng),
            self.steps(rung // particles),
            self.every,
            lambda x0: judged(session, x0, condition),
            self.potential,
            self.strength,
            rng,
        )
        counting = 1 / last.softmax(0).square().sum(0)  # effective number of particles [B]
        keep = torch.arange(particles, device=x.device)[:, None].expand_as(reward)
        which = torch.where(counting < particles / 2, ancestors(last, rng), keep)
        best = reward.gather(0, which).argmax(0, keepdim=True)
        return taken(x, which.gather(0, best))
