"""DPM-Solver++ (2M) with classifier-free guidance in latents: the solver that few-step students are held against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepmark import Method, Paper
from stepmark.method import skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import uniform_times
from stepmark.tracks.text_to_image import GUIDANCE
from stepmark.tracks.text_to_image.sampling import GuidedByCaption, dpm_solver_pp


class DPMGuided(Method):
    """DPM-Solver++ of second order, multistep (Lu et al. 2022b, algorithm 2), on evenly spaced times, guided with w = 3; its
    last step is of first order. Two evaluations a step.
    """

    paper = Paper(
        id="dpm_guided",
        title="DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
        authors="Lu, Zhou, Bao, Chen, Li, Zhu",
        year=2022,
        arxiv="2211.01095",
        code="LuChengTHU/dpm-solver",
    )
    tasks = (
        "text_to_image/scenes_eps",
        "text_to_image/scenes_pastel",
        "free/scenes_eps",
        "negative/scenes_eps",
    )
    unclaimed = "a reference point: the fast solver that few-step methods are held against"

    @torch.no_grad()
    def run(self, session: Session, batch: Mapping[str, Tensor], rung: int) -> Tensor:
        if rung < 2:
            skip("a guided step takes two evaluations")
        denoise = GuidedByCaption(session.networks["teacher"], batch, GUIDANCE)
        return dpm_solver_pp(denoise, batch["noise"], uniform_times(rung // 2))
