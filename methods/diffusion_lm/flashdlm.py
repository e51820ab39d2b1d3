"""FlashDLM: a diffusion language model with frozen keys and values and an autoregressive guide (Hu et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.diffusion_lm.blocks import fill_guided
from stepmark.tracks.diffusion_lm.sampling import continuations, masked_texts


class FlashDLM(Method):
    """FlashDLM: FreeCache makes steps of a masked diffusion model cheap, guided diffusion makes them few.

    FreeCache (section 4.1): once a beginning of the text is clean, what is still masked behind it hardly moves its keys
    and values, so that these are kept from the step in which they last ran and only the rest of the text runs. Guided
    diffusion (section 4.2): in each step the model drafts all masks by its most likely words, an autoregressive model
    reads the draft once, and the words up to the first that it would not have written are unmasked, at least one; the
    guide supplies no word. The guide's passes are counted beside the budget, in FLOPs and in time.

    Greedy agreement and the draft of all masks are the official code's default. Of its caches the one up to the last
    clean word is used, which there is an option; its default keeps the prompt's alone.

    Differs from the paper: the guide is as large as the diffusion model, where theirs is a fifth of it; where the budget
    of a rung ends, the last evaluation keeps the whole draft.
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
    baselines = ("dlm_confidence", "guided_diffusion", "freecache", "ar_lm")
    claims = (
        Claim(
            "nfe[flashdlm,40] <= 0.5 * nfe[dlm_confidence,40] "
            "and valid[flashdlm,40] >= valid[dlm_confidence,40] - 0.02",
            says="at most half the steps of one word at a time, as many right texts",
        ),
        Claim(
            "valid[flashdlm,8] > valid[dlm_confidence,8] and valid[flashdlm,16] > valid[dlm_confidence,16]",
            says="within the same steps more right texts than by filling the k surest masks",
        ),
        Claim(
            "model_positions[flashdlm,40] <= 0.5 * model_positions[guided_diffusion,40]",
            says="the cache halves the positions that the diffusion model runs over",
        ),
        Claim(
            "latency_ms[flashdlm,40] <= 0.34 * latency_ms[dlm_confidence,40]",
            says="a third of the time of one word at a time",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        network, guide = session.networks["model"], session.networks["ar"]
        texts = masked_texts(batch, session.device).split(1)
        return continuations(batch, torch.cat([fill_guided(network, guide, x, rung, cached=True) for x in texts]))
