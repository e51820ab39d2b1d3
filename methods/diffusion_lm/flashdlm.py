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
from stepmark.tracks.diffusion_lm.blocks import new_cache, run_blocks, unmask_confident
from stepmark.tracks.diffusion_lm.sampling import continuations, masked_texts, word_probabilities


class FreeCache:
    """Keys and values of one text, those of its clean beginning kept (Hu et al. 2025, section 4.1).

    `clean` is where the next pass starts: the first mask of the text as the last pass saw it. What stands before it was
    written when it last ran, so that no kept key or value is that of a mask.
    """

    def __init__(self, network: nn.Module) -> None:
        self.states = new_cache(network)
        self.clean = 0


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
    `flashdlm_corrected` is the other mode of the official code, in which the guide's own word is written where the two
    differ: texts are then the guide's, as in speculative decoding. `left_to_right` is the control: no guide, but as many
    words from the left in each step as the budget asks for.

    Greedy agreement and the draft of all masks are the official code's default. Its verifier returns the guide's own
    word at the first disagreement as well; the default generator drops it, or writes the draft's where nothing agreed.

    Differs from the paper: words are fixed one by one, where the authors keep keys and values block by block or of the
    prompt alone. A word that has just been written runs once more before its keys and values are kept; the official
    code's most eager cache starts behind it, at the last word written, and keeps for the others what they were while
    they were masks. The guide is as large as the diffusion model, where theirs is a fifth of it. Where the budget of a
    rung ends, the last evaluation keeps the whole draft.

    What limits it here: forty new words leave few steps to save, where the paper's answers have hundreds. Where 4 or 8
    steps have to do, fewer texts are right than by the surest words, for the last of them keeps the whole draft. The
    surest words do not come from the left, so that `freecache` alone waits for gaps to close. The guide knows the grammar
    as well as the diffusion model does, and writing with it alone takes a tenth of the FLOPs of asking it.
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
    baselines = ("dlm_confidence", "guided_diffusion", "freecache", "left_to_right", "ar_lm")
    claims = (
        Claim(
            "latency_ms[flashdlm,40] <= latency_ms[dlm_confidence,40] / 12 "
            "and valid[flashdlm,40] >= valid[dlm_confidence,40] - 0.02",
            says="twelve times faster than one word at a time, as many right texts",
            headline=True,
            setting="forty new words where the paper's answers have hundreds: fewer than twelve fall to one step",
        ),
        Claim(
            "latency_ms[flashdlm,40] <= latency_ms[ar_lm,40] and valid[flashdlm,40] >= valid[ar_lm,40] - 0.02",
            says="as fast as the autoregressive model alone, as many right texts",
        ),
        Claim(
            "nfe_equivalent[flashdlm,40] <= nfe_equivalent[dlm_confidence,40] / 2 "
            "and valid[flashdlm,40] >= valid[dlm_confidence,40] - 0.02",
            says="half the FLOPs of one word at a time, the guide's included, as many right texts",
        ),
        Claim(
            "nfe[flashdlm,40] <= nfe[dlm_confidence,16] and nfe_equivalent[flashdlm,40] <= nfe_equivalent[dlm_confidence,16] "
            "and valid[flashdlm,40] > valid[dlm_confidence,16] "
            "and valid[flashdlm,40] > valid[left_to_right,16]",
            says="in no more steps and FLOPs more right texts than by the k surest words, or by k words from the left",
        ),
        Claim(
            "model_positions[flashdlm,40] <= 0.5 * model_positions[guided_diffusion,40] "
            "and valid[flashdlm,40] >= valid[guided_diffusion,40] - 0.02",
            says="the cache halves the positions that the diffusion model runs over, and costs no right text",
        ),
    )

    cached = True
    rule = "agree"  # which words a step unmasks: "agree", "correct", "left" or "surest"
    variants = (
        Variant(
            "freecache",
            says="FreeCache alone: keys and values of the clean beginning are kept, the surest words unmasked",
            rule="surest",
            baselines=("dlm_confidence",),
            claims=(
                Claim(
                    "model_positions[freecache,40] <= 0.5 * model_positions[dlm_confidence,40] "
                    "and valid[freecache,*] >= valid[dlm_confidence,*] - 0.02",
                    says="half the positions at one word a step, and at any number of steps as many right texts",
                ),
            ),
        ),
        Variant(
            "guided_diffusion",
            says="Guided diffusion alone: an autoregressive model tells how much of a draft is unmasked at once",
            cached=False,
            baselines=("dlm_confidence", "left_to_right"),
            claims=(
                Claim(
                    "nfe[guided_diffusion,40] <= 0.5 * nfe[dlm_confidence,40] "
                    "and valid[guided_diffusion,40] >= valid[dlm_confidence,40] - 0.02",
                    says="at most half the steps of one word at a time, as many right texts",
                ),
            ),
        ),
        Variant(
            "flashdlm_corrected",
            says="FlashDLM whose guide writes its own word where it disagrees with the draft",
            rule="correct",
            baselines=("flashdlm", "ar_lm"),
        ),
        Variant(
            "left_to_right",
            says="No guide: each step unmasks the same number of words from the left",
            rule="left",
            baselines=("dlm_confidence",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per text."""
        network, outputs = session.networks["model"], []
        for x in masked_texts(batch, session.device).split(1):
            cache = FreeCache(network) if self.cached else None
            if self.rule == "surest":
                outputs.append(fill_surest(network, x, rung, cache))
            elif self.rule == "left":
                outputs.append(fill_from_the_left(network, x, rung, cache))
            else:
                outputs.append(fill_guided(network, session.networks["ar"], x, rung, cache, self.rule == "correct"))
        return continuations(batch, torch.cat(outputs))


def first_mask(x: Tensor) -> int:
    """Position of the first mask of one text [1, L], L if there is none."""
    masks = (x[0] == MASK).nonzero()
    return int(masks[0]) if len(masks) else x.shape[1]


def run_from_clean(network: nn.Module, x: Tensor, cache: FreeCache | None) -> Tensor:
    """Logits [1, L, V] of one text, its clean beginning taken from the cache.

    The first call runs over all positions, later ones from the first mask of the call before on: over the words that
    were written since, and over all behind them. Keys and values of the words before stay as they were when they last
    ran, though the words behind have changed since. Logits of positions that did not run are 0. Without a cache
    everything runs.
    """
    if cache is None:
        return logits(network, x)
    start = cache.clean
    found = run_blocks(network, x[:, start:], start, cache.states)
    cache.clean = first_mask(x)
    return torch.cat([found.new_zeros(1, start, found.shape[2]), found], 1)


def fill_surest(network: nn.Module, x: Tensor, budget: int, cache: FreeCache | None) -> Tensor:
    """One text [1, L] filled by the surest words, its masks spread evenly over the steps."""
    for left in range(budget, 0, -1):
        masks = int((x == MASK).sum())
        if masks == 0:
            break
        x = unmask_confident(run_from_clean(network, x, cache), x, math.ceil(masks / left))
    return x


def fill_from_the_left(network: nn.Module, x: Tensor, budget: int, cache: FreeCache | None) -> Tensor:
    """One text [1, L] filled from the left by most likely words, its masks spread evenly over the steps."""
    for left in range(budget, 0, -1):
        start = first_mask(x)
        if start == x.shape[1]:
            break
        stop = start + math.ceil((x.shape[1] - start) / left)
        words = word_probabilities(run_from_clean(network, x, cache)).argmax(-1)
        x = torch.cat([x[:, :start], words[:, start:stop], x[:, stop:]], 1)
    return x


def agreed(draft: list[int], guide: list[int]) -> int:
    """How many leading words of a draft the guide would have written too."""
    kept = 0
    while kept < len(draft) and draft[kept] == guide[kept]:
        kept += 1
    return kept


def fill_guided(
    network: nn.Module, guide: nn.Module, x: Tensor, budget: int, cache: FreeCache | None, corrected: bool
) -> Tensor:
    """One text [1, L] filled from the left by guided diffusion (Hu et al. 2025, section 4.2).

    Each step the diffusion model drafts every mask by its most likely word, the autoregressive `guide` reads the draft
    in one pass, and the words up to the first on which they differ are kept; the first one always. The guide only
    agrees or not; with `corrected` it writes the word on which they differ. The last evaluation of the budget keeps the
    whole draft.
    """
    guides = new_cache(guide)
    read = 0  # positions whose keys and values the guide holds, for words that stay
    for left in range(budget, 0, -1):
        start = first_mask(x)
        if start == x.shape[1]:
            break
        words = word_probabilities(run_from_clean(network, x, cache)).argmax(-1)
        draft = torch.where(x == MASK, words, x)
        stop = x.shape[1]
        if left > 1:
            before = torch.cat([torch.full_like(draft[:, :1], START), draft[:, :-1]], 1)
            wished = word_probabilities(run_blocks(guide, before[:, read:], read, guides)).argmax(-1)[:, start - read :]
            kept = agreed(draft[0, start:].tolist(), wished[0].tolist())
            if corrected and start + kept < stop:
                draft[0, start + kept] = wished[0, kept]
                kept += 1
            stop = read = start + max(1, kept)
        x = torch.cat([draft[:, :stop], x[:, stop:]], 1)
    return x
