"""TOVA: the token that the newest one looks at least goes (Oren et al., EMNLP 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from stepmark.method import Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.chains import write_chains
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.held_cache import HeldCache, HeldDecoder, write_held

# Of the greatest length of a text: what DMS is seen to hold there, window and all. Other texts keep an eighth.
KEPT = {"sums": 0.34}


class Tova(Method):
    """TOVA, token omission via attention: of each layer's cache the tokens stay that the newest token attends to most.

    Where more than the budget is held, the tokens with the least attention of the newest query, mean over heads, are
    evicted, once for all heads of a layer. The prompt is read with full attention and then cut to the budget by the
    attention of its last token. No training.

    It is a baseline of DMS, and holds as much. Of sums that is 0.34 of the greatest length: of the longest, 79 tokens, 27 of
    4160 bytes, 112 kB, where DMS holds 108 to 116 kB at its fullest. DMS is trained to a quarter, but its window comes on
    top. Of needles it is an eighth, what DMS is trained to; there DMS ends up with less.
    """

    paper = Paper(
        id="tova",
        title="Transformers are Multi-State RNNs",
        authors="Matanel Oren, Michael Hassid, Nir Yarden, Yossi Adi, Roy Schwartz",
        year=2024,
        arxiv="2401.06104",
        code="schwartz-lab-NLP/TOVA",
    )
    tasks = ("recall/needles", "scaling/sums")
    baselines = ("autoregressive",)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> Any:
        """New token ids per prompt; several texts of it in tasks of several chains."""
        share = KEPT.get(session.task.dataset, 1 / 8)

        def decoder(model: nn.Module, length: int, capacity: int) -> Decoder:
            return HeldDecoder(model, capacity, TovaCache(len(model.model.layers), round(share * capacity)))

        write = write_chains if session.task.id.startswith("scaling/") else write_held
        return write(session, batch, rung, decoder)


class TovaCache(HeldCache):
    """Holds at most `most` tokens of a layer."""

    def __init__(self, depth: int, most: int) -> None:
        super().__init__(depth)
        self.most = most

    def evict(self, layer: int, weights: Tensor) -> None:
        """Keep the tokens with the greatest of the last query's weights [query heads, T, n]."""
        if weights.shape[2] > self.most:
            kept = weights[:, -1].mean(0).topk(self.most).indices.sort().values
            self.keep(layer, kept.expand(len(self.held(layer)[0]), -1))
