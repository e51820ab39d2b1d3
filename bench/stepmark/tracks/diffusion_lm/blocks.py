"""Decoding in blocks with caches: words are unmasked by confidence, and what is settled is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones.mdlm import LENGTH, MASK, logits
from stepmark.tracks.decoding.decoder import KeyValueCache
from stepmark.tracks.diffusion_lm.sampling import word_probabilities


def run_blocks(network: nn.Module, ids: Tensor, start: int, cache: KeyValueCache) -> Tensor:
    """Logits [B, T, V] of the positions start .. start + T - 1, the blocks of a GPT-2 over these positions alone.

    Keys and values of all other positions are those that the cache holds: of the positions before `start` as they were
    when they last ran. A causal network looks back only, the other one at all 'start + T' positions.
    """
    inner: Any = network.transformer
    stop = start + ids.shape[1]
    positions = torch.arange(start, stop, device=ids.device)
    mask = None
    if inner.h[0].attn.is_causal and start > 0 and ids.shape[1] > 1:
        mask = (positions[:, None] >= torch.arange(stop, device=ids.device))[None, None]
    hidden = inner.wte(ids) + inner.wpe(positions)
    cache.start = start
    for block in inner.h:
        hidden = block(hidden, past_key_values=cache, attention_mask=mask)
    found: Tensor = network.lm_head(inner.ln_f(hidden))
    return found


def new_cache(network: nn.Module) -> KeyValueCache:
    """An empty cache for one batch of texts."""
    inner: Any = network.transformer
    return KeyValueCache(len(inner.h), LENGTH)


def unmask_confident(found: Tensor, x: Tensor, count: int) -> Tensor:
    """x [B, L] with the `count` masks filled of whose most likely word the model is most certain, by that word."""
    p, words = word_probabilities(found).max(-1)
    best = p.masked_fill(x != MASK, -1.0).topk(count, dim=1).indices
    return x.scatter(1, best, words.gather(1, best))


def agreed(draft: list[int], guide: list[int]) -> int:
    """How many leading words of a draft the guide would have written too; 1 if none, so that every step goes on."""
    kept = 0
    while kept < len(draft) and draft[kept] == guide[kept]:
        kept += 1
    return max(1, kept)


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


def fill_guided(network: nn.Module, guide: nn.Module, x: Tensor, budget: int, cached: bool) -> Tensor:
    """One text [1, L] filled from the left by guided diffusion (Hu et al. 2025, section 4.2).

    Each step the diffusion model drafts every mask by its most likely word, the autoregressive `guide` reads the draft
    in one pass, and the words up to the first on which they differ are kept; the first one always. The guide only
    agrees or not, it supplies no word. The last evaluation of the budget keeps the whole draft.
    """
    from stepmark.backbones.mdlm import START

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
