"""Samplers as policies: every step is normal about its mean, so that it has a likelihood, and a reward at the end can pull it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of
from stepmark.tracks.text_to_image import GUIDANCE, LATENT
from stepmark.tracks.text_to_image.consistency import predict, sample_times
from stepmark.tracks.text_to_image.sampling import noise_like


def played(
    session: Session, states: Tensor, moves: int, move: Callable[[Tensor, int], tuple[Tensor, float]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Paths from noise to pictures of captions: their points [n, 4, 8, 8], one more than moves, and the mean of every move.

    move(x, number): mean and standard deviation of the move of that number from x. session: whose stream is drawn from.
    """
    path = [torch.randn(len(states), *LATENT, generator=session.rng, device=states.device, dtype=states.dtype)]
    means = []
    for number in range(moves):
        mean, spread = move(path[-1], number)
        means.append(mean)
        path.append(mean + spread * noise_like(mean, session.rng) if spread else mean)
    return path, means


def student_move(network: nn.Module, x: Tensor, number: int, moves: int, states: Tensor) -> tuple[Tensor, float]:
    """A move of a consistency student that is told the guidance scale: z_s ~ N(alpha_s f(z_t, c, t), sigma_s^2), its mean
    [n, 4, 8, 8] and standard deviation. The last of the moves is certain."""
    schedule = schedule_of(network)
    t, s = [*sample_times(moves), 0.0][number : number + 2]
    level = torch.full_like(x[:, 0, 0, 0], t)
    end = predict(network, x, level, states, torch.full_like(level, GUIDANCE), schedule)
    return schedule.alpha(s) * end, schedule.sigma(s)


def likelihood_ratio(after: Tensor, mean: Tensor, before: Tensor, spread: float) -> Tensor:
    """How much likelier the points that were reached [n, ...] are now than when they were drawn, [n]: of the means over the
    values of their log-likelihoods, as the codes of DDPO and its descendants have it.

    mean, before: of the step now and when it was drawn, of standard deviation `spread`.
    """
    change = (after - before).square() - (after - mean).square()
    return (change.flatten(1).mean(1) / (2 * spread**2)).exp()


def clipped_loss(advantage: Tensor, ratio: Tensor, clip: float) -> Tensor:
    """Mean of max(-A r, -A clip(r, 1 - e, 1 + e)) over steps of advantages A [n] (PPO, Schulman et al. 2017, equation 7)."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
