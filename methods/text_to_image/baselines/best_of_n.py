"""Best of n: several pictures of a caption, of which the reward keeps one. What every search has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from stepmark import Method, Variant
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.text_to_image.sampling import noisy_step
from stepmark.tracks.text_to_image.search import JUDGED, ROOM, candidates, guided, judged, taken


class BestOfN(Method):
    """Best of n: n pictures of a caption from as many noises, and the one that the reward gives the highest value,

        x_i = guided DDIM from noise i,   the x_i with the highest log p(caption | decoded x_i)

    A picture of S steps takes 2 S evaluations, and two more to be decoded and judged. n is a sixteenth of the rung and at
    least 2, the steps are what the rung then pays for: four pictures of seven steps for 64, two of seven for 32, two of
    three for 16. Below 16 there would be a single step for each.

    `best_of_n_stochastic` takes ancestral steps (eta = 1): the sampler of those who search while they sample. `random_of_n`
    takes one of the n pictures by lot and asks no reward.
    """

    paper = None
    tasks = ("text_to_image/scenes_eps", "text_to_image/scenes_flow")
    baselines = ("ddim_guided",)

    eta, blind = 0.0, False
    variants = (
        Variant(
            "best_of_n_stochastic",
            says="best of n pictures of the ancestral sampler",
            eta=1.0,
            tasks=("text_to_image/scenes_eps",),
            baselines=("ddim_guided", "best_of_n"),
        ),
        Variant("random_of_n", says="control: one of the n pictures by lot", blind=True),
    )

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < ROOM:
            skip("two pictures of three guided steps, decoded and judged, take sixteen evaluations")
        n, rng, condition = max(2, rung // ROOM), session.rng, batch["condition"]
        denoise, x = guided(session, condition, n), candidates(batch["noise"], n, rng)
        for t, s in pairwise(uniform_times((rung // n - JUDGED) // 2)):
            x = noisy_step(denoise.schedule, *denoise(x, t), t, s, self.eta, rng)
        lots = torch.rand(n, len(condition), generator=rng, device=x.device)
        value = lots if self.blind else judged(session, x, condition)
        return taken(x, value.argmax(0, keepdim=True))
