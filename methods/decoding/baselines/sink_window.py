"""StreamingLLM: attention sinks and a sliding window (Xiao et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stepmark.method import Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.held_cache import BandCache, HeldDecoder, write_held

SINKS, WINDOW = 4, 0.2  # first tokens that stay; the window, of the prompt's tokens
LEAST = 32  # tokens of the window, where somebody brings short prompts


class SinkWindow(Method):
    """StreamingLLM: keep the first tokens, on which attention leans whatever they say, and the most recent ones.

    Figure 4 of the paper: a token sees s sinks and the last w tokens. Distances are those inside the cache (section
    3.2): entry i of the cache stands at position i, a new token at s + w - 1, so that no distance exceeds the cache. The
    text is read in one pass that gives what token-by-token streaming gives, in work linear in its length; of each
    layer only the sinks and the last w - 1 tokens are held, with keys at their positions in the text, and the distance
    to the sinks is mended by a rotation of the query. Where a text is written the window has 32 tokens at least.
    """

    paper = Paper(
        id="streaming_llm",
        title="Efficient Streaming Language Models with Attention Sinks",
        authors="Guangxuan Xiao, Yuandong Tian, Beidi Chen, Song Han, Mike Lewis",
        year=2023,
        arxiv="2309.17453",
        code="mit-han-lab/streaming-llm",
    )
    tasks = ("recall/needles", "forced/stories")

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> Any:
        """New token ids per prompt; of tasks `forced/...` log-probabilities [B, V] of the next word."""

        least = 1 if "context" in batch else LEAST

        def decoder(model: nn.Module, length: int, capacity: int) -> Decoder:
            window = max(least, round(WINDOW * length) - SINKS)
            cache = BandCache(len(model.model.layers), SINKS, window, model.model.rotary_emb)
            return HeldDecoder(model, capacity, cache)

        return write_held(session, batch, rung, decoder)
