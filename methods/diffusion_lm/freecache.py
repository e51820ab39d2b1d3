"""FreeCache alone: confident unmasking with frozen keys and values of the clean beginning (Hu et al., 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from stepmark.backbones.mdlm import MASK
from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.diffusion_lm.blocks import free_cache, run_from_clean, unmask_confident
from stepmark.tracks.diffusion_lm.sampling import continuations, masked_texts


class FreeCache(Method):
    """FreeCache: keys and values of the prompt and of the words that follow it without a gap are kept, not run again.

    Section 4.1 of FlashDLM, with the usual unmasking of the surest words. The first step runs over the whole text; then
    only the positions from the last word of the clean beginning on run, attending to kept keys and values of the words
    before. Words written behind a gap run on. What a kept word would have answered to words written since is missed:
    the approximation. It saves positions and FLOPs, not steps.

    Differs from the paper: keys and values are kept from the step in which a word joins the clean beginning, word by
    word, where the authors fix them block by block.

    What limits it here: texts are short, and words written behind a gap still run, until the gap is closed.
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
            "model_positions[freecache,40] <= 0.5 * model_positions[dlm_confidence,40] "
            "and valid[freecache,40] >= valid[dlm_confidence,40] - 0.02",
            says="at most half the positions run, as many texts are right",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        network, outputs = session.networks["model"], []
        for x in masked_texts(batch, session.device).split(1):
            cache = free_cache(network)
            for left in range(rung, 0, -1):
                masks = int((x == MASK).sum())
                if masks == 0:
                    break
                x = unmask_confident(run_from_clean(network, x, cache), x, math.ceil(masks / left))
            outputs.append(x)
        return continuations(batch, torch.cat(outputs))
