"""Ancestral sampling of a masked diffusion language model from the nucleus of its distributions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.diffusion_lm.sampling import ancestral, continuations, masked_texts
from stepmark.tracks.diffusion_lm.training import denoiser

NUCLEUS = 0.9


class MDLMNucleus(Method):
    """MDLM's ancestral sampler, each word drawn from the smallest set of words with 90 % of the probability.

    What remasking samplers are compared with: they draw from the nucleus as well (Wang et al. 2025, section 5.1).
    """

    tasks = ("generation/stories64", "completion/stories64")
    baselines = ("mdlm_ancestral",)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        x = masked_texts(batch, session.device)
        return continuations(batch, ancestral(denoiser(session.networks["model"]), x, rung, session.rng, NUCLEUS))
