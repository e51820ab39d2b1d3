"""FlashDLM: a diffusion language model with frozen keys and values and an autoregressive guide (Hu et al., 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones.mdlm import MASK, START, logits
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import KeyValueCache
from stepmark.tracks.diffusion_lm.blocks import new_cache, run_blocks, unmask_confident
from stepmark.tracks.diffusion_lm.sampling import continuations, masked_texts, word_probabilities


class FlashDLM(Method):
    """FlashDLM: FreeCache makes steps of a masked diffusion model cheap, guided diffusion makes them few.

    FreeCache (section 4.1): once a beginning of the text is clean, what is still masked behind it hardly moves its keys
    and values, so that these are kept from the step in which they last ran and only the rest of the text runs. Guided
    diffusion (section 4.2): in each step the model drafts all masks by its most likely words, an autoregressive model
    reads the draft once, and the words up to the first that it would not have written are unmasked, at least one; the
    guide supplies no word. The guide's passes are counted beside the budget, in FLOPs and in time.

    `freecache` is the cache alone, with the usual unmasking of the surest words: it saves positions and FLOPs, not steps.
    Words written behind a gap run on, until the gap is closed, and what a kept word would have answered to words written
    since is missed: the approximation. `guided_diffusion` is the guide alone, each step over the whole text.

    Greedy agreement and the draft of all masks are the official code's default. Of its caches the one up to the last
    clean word is used, which there is an option; its default keeps the prompt's alone.

    Differs from the paper: keys and values are kept from the step in which a word joins the clean beginning, word by word,
    where the authors fix them block by block;
    the guide is as large as the diffusion model, where theirs is a fifth of it; where the budget
    of a rung ends, the last evaluation keeps the whole draft.

    What limits it here: texts are short.
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

    cached, guided = True, True
    variants = (
        Variant(
            "freecache",
            says="FreeCache alone: keys and values of the clean beginning are kept, the surest words unmasked",
            guided=False,
            baselines=("dlm_confidence",),
            claims=(
                Claim(
                    "model_positions[freecache,40] <= 0.5 * model_positions[dlm_confidence,40] "
                    "and valid[freecache,40] >= valid[dlm_confidence,40] - 0.02",
                    says="at most half the positions run, as many texts are right",
                ),
            ),
        ),
        Variant(
            "guided_diffusion",
            says="Guided diffusion alone: an autoregressive model tells how much of a draft is unmasked at once",
            cached=False,
            baselines=("dlm_confidence",),
            claims=(
                Claim(
                    "nfe[guided_diffusion,40] <= 0.5 * nfe[dlm_confidence,40] "
                    "and valid[guided_diffusion,40] >= valid[dlm_confidence,40] - 0.02",
                    says="at most half the steps of one word at a time, as many right texts",
                ),
            ),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        network, outputs = session.networks["model"], []
        for x in masked_texts(batch, session.device).split(1):
            if self.guided:
                outputs.append(fill_guided(network, session.networks["ar"], x, rung, self.cached))
            else:
                outputs.append(fill_confident(network, x, rung))
        return continuations(batch, torch.cat(outputs))


def first_mask(x: Tensor) -> int:
    """Position of the first mask of one text [1, L], L if there is none."""
    masks = (x[0] == MASK).nonzero()
    return int(masks[0]) if len(masks) else x.shape[1]


def run_from_clean(network: nn.Module, x: Tensor, cache: KeyValueCache | None) -> Tensor:
    """Logits [1, L, V] of one text, its clean beginning taken from the cache (FreeCache, Hu et al. 2025, section 4.1).

    The first call runs over all positions. Later ones start at the last word of the clean beginning: keys and values
    of the words before it stay as they were when they last ran, though the words behind have changed since. Logits of
    positions that did not run are 0. Without a cache everything runs.
    """
    if cache is None:
        return logits(network, x)
    start = max(0, first_mask(x) - 1) if cache.start >= 0 else 0
    found = run_blocks(network, x[:, start:], start, cache)
    return torch.cat([found.new_zeros(1, start, found.shape[2]), found], 1)


def free_cache(network: nn.Module) -> KeyValueCache:
    """A cache for `run_from_clean`, which tells by its start whether a first pass has been."""
    cache = new_cache(network)
    cache.start = -1
    return cache


def fill_confident(network: nn.Module, x: Tensor, budget: int) -> Tensor:
    """One text [1, L] filled by the surest words on FreeCache, its masks spread evenly over the steps."""
    cache = free_cache(network)
    for left in range(budget, 0, -1):
        masks = int((x == MASK).sum())
        if masks == 0:
            break
        x = unmask_confident(run_from_clean(network, x, cache), x, math.ceil(masks / left))
    return x


def agreed(draft: list[int], guide: list[int]) -> int:
    """How many leading words of a draft the guide would have written too; 1 if none, so that every step goes on."""
    kept = 0
    while kept < len(draft) and draft[kept] == guide[kept]:
        kept += 1
    return max(1, kept)


def fill_guided(network: nn.Module, guide: nn.Module, x: Tensor, budget: int, cached: bool) -> Tensor:
    """One text [1, L] filled from the left by guided diffusion (Hu et al. 2025, section 4.2).

    Each step the diffusion model drafts every mask by its most likely word, the autoregressive `guide` reads the draft
    in one pass, and the words up to the first on which they differ are kept; the first one always. The guide only
    agrees or not, it supplies no word. The last evaluation of the budget keeps the whole draft.
    """
    own, guides = free_cache(network) if cached else None, new_cache(guide)
    read = 0  # positions whose keys and values the guide holds, for words that stay
    for left in range(budget, 0, -1):
        start = first_mask(x)
        if start == x.shape[1]:
            break
        words = word_probabilities(run_from_clean(network, x, own)).argmax(-1)
        draft = torch.where(x == MASK, words, x)
        kept = x.shape[1] - start
        if left > 1:
            before = torch.cat([torch.full_like(draft[:, :1], START), draft[:, :-1]], 1)
            wished = word_probabilities(run_blocks(guide, before[:, read:], read, guides)).argmax(-1)
            kept = agreed(draft[0, start:].tolist(), wished[0, start - read :].tolist())
            read = start + kept
        x = torch.cat([draft[:, : start + kept], x[:, start + kept :]], 1)
    return x
