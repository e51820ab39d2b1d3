"""H2O: a key/value cache of heavy hitters and recent tokens (Zhang et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stepmark.method import Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.held_cache import HeavyHitterCache, HeldDecoder, write_held

HEAVY, RECENT = 0.1, 0.1  # of the prompt's tokens
LEAST = 16  # tokens of each kind, where somebody brings short prompts


class H2O(Method):
    """H2O: each head keeps the tokens that have drawn most attention, and the most recent ones.

    Algorithm 1 of the paper. The score of token i in a head is o_i = sum over the queries so far of its attention
    weight. When more than h + r tokens are held, the last r stay and of the others the h with the greatest score; the
    rest are evicted for good, with their scores. As in the official code that really drops (not masks) entries, the
    prompt is read with full attention, layer by layer, and evicted from at once, so that no two layers are ever held
    whole; keys keep the positions that they were written at. h and r are a tenth of the prompt each, and 16 tokens at least
    where a text is written: a tenth of a short prompt would be a token or two.
    """

    paper = Paper(
        id="h2o",
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        authors="Zhenyu Zhang, Ying Sheng, Tianyi Zhou, Tianlong Chen, Lianmin Zheng, Ruisi Cai, Zhao Song, Yuandong Tian, "
        "Christopher Ré, Clark Barrett, Zhangyang Wang, Beidi Chen",
        year=2023,
        arxiv="2306.14048",
        code="FMInference/H2O",
    )
    tasks = ("recall/needles", "forced/stories")

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> Any:
        """New token ids per prompt; of tasks `forced/...` log-probabilities [B, V] of the next word."""

        least = 1 if "context" in batch else LEAST

        def decoder(model: nn.Module, length: int, capacity: int) -> Decoder:
            heavy, recent = (max(least, round(part * length)) for part in (HEAVY, RECENT))
            cache = HeavyHitterCache(len(model.model.layers), heavy, recent)
            return HeldDecoder(model, capacity, cache)

        return write_held(session, batch, rung, decoder)
