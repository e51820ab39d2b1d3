"""Running the blocks of a network over some positions of a text on kept keys and values, and confident unmasking."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones.mdlm import LENGTH, MASK
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
    """An empty key/value cache of all blocks, for one batch of texts of the full length."""
    inner: Any = network.transformer
    return KeyValueCache(len(inner.h), LENGTH)


def unmask_confident(found: Tensor, x: Tensor, count: int) -> Tensor:
    """x [B, L] with the `count` masks filled of whose most likely word the model is most certain, by that word."""
    p, words = word_probabilities(found).max(-1)
    best = p.masked_fill(x != MASK, -1.0).topk(count, dim=1).indices
    return x.scatter(1, best, words.gather(1, best))
