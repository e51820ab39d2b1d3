"""DDIM backwards: which noise a picture came from, and the path between the two."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from stepmark.tracks.image.schedules import Schedule
from stepmark.tracks.image.solvers import Denoiser


def leap(schedule: Schedule, x: Tensor, eps: Tensor, t: Any, s: Any) -> Tensor:
    """x [B, ...] at t taken to s, which may lie before or behind, along a predicted noise: alpha_s x0 + sigma_s eps with x0 =
    (x - sigma_t eps) / alpha_t. Times are floats, or tensors that broadcast against x. With the same noise the leap from s
    back to t undoes it."""
    x0 = (x - schedule.sigma(t) * eps) / schedule.alpha(t)
    return schedule.alpha(s) * x0 + schedule.sigma(s) * eps


def inverted(denoise: Denoiser, x: Tensor, times: Sequence[float]) -> list[Tensor]:
    """Where latents x at times[-1] = 0 are at each of the times, which fall: the path that a network of noise would take to
    them. One evaluation a step.

    The noise of a step from s up to t is asked at time t, where the way down will ask for it, of the latents at s, as those at t
    are not known yet (Mokady et al. 2023, and their code). What that changes from step to step is the error of DDIM inversion.
    """
    path = [x]
    for s, t in pairwise(reversed(times)):
        x = leap(denoise.schedule, x, denoise.output(x, t), s, t)
        path.append(x)
    return path[::-1]
