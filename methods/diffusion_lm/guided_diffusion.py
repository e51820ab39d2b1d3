"""Guided diffusion alone: FlashDLM without its cache (Hu et al., 2025, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.diffusion_lm.blocks import fill_guided
from stepmark.tracks.diffusion_lm.sampling import continuations, masked_texts


class GuidedDiffusion(Method):
    """Guided diffusion: an autoregressive model tells how much of a diffusion model's draft may be unmasked at once.

    In each step the diffusion model runs over the whole text and drafts all masks by its most likely words; the guide
    reads the draft in one pass, and the words up to the first that it would not have written are unmasked, at least
    one. FlashDLM is this with FreeCache; what the cache approximates shows in the difference.
    """

    paper = Paper(
        id="flashdlm",
        title="Accelerating Diffusion Language Model Inference via Efficient KV Caching and Guided Diffusion",
        authors="Zhanqiu Hu, Jian Meng, Yash Akhauri, Mohamed S. Abdelfattah, Jae-sun Seo, Zhiru Zhang, Udit Gupta",
        year=2025,
        arxiv="2505.21467",
        code="ZhanqiuHu/flash-dlm-experimental",
    )
    tasks = ("completion/stories64",)
    baselines = ("dlm_confidence",)
    claims = (
        Claim(
            "nfe[guided_diffusion,40] <= 0.5 * nfe[dlm_confidence,40] "
            "and valid[guided_diffusion,40] >= valid[dlm_confidence,40] - 0.02",
            says="at most half the steps of one word at a time, as many right texts",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        network, guide = session.networks["model"], session.networks["ar"]
        texts = masked_texts(batch, session.device).split(1)
        return continuations(batch, torch.cat([fill_guided(network, guide, x, rung, cached=False) for x in texts]))
