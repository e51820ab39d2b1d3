"""An autoregressive language model of the same size, with a key/value cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stepmark.backbones.mdlm import START, logits
from stepmark.method import Method, skip
from stepmark.session import Session
from stepmark.tracks.diffusion_lm.blocks import new_cache, run_blocks
from stepmark.tracks.diffusion_lm.sampling import continuations, draw_words, masked_texts, word_probabilities


class ARLM(Method):
    """What masked diffusion competes with: words from left to right, each after one evaluation over one position.

    Writing takes one evaluation per word, so that there is nothing to show on rungs with fewer. With keys and values
    kept, all of them together run over each position once: as many FLOPs as one evaluation of the diffusion model over
    the whole text, but one after the other. -log p of a text is exact and takes a single evaluation.
    """

    tasks = ("generation/stories64", "completion/stories64", "likelihood/stories64")

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]] | Tensor:
        """New token ids per text, or -log p of each text in nats."""
        network = session.networks["ar"]
        if "tokens" in batch:
            tokens = batch["tokens"]
            before = torch.cat([torch.full_like(tokens[:, :1], START), tokens[:, :-1]], 1)
            return cross_entropy(logits(network, before).transpose(1, 2).double(), tokens, reduction="none").sum(1)
        x = masked_texts(batch, session.device)
        known = len(batch["prompt"][0])
        needed = x.shape[1] - known
        if rung < needed:
            skip(f"writes one word per evaluation: {needed} words need a rung of {needed}")
        cache = new_cache(network)
        before = torch.cat([torch.full_like(x[:, :1], START), x], 1)
        start = 0
        for position in range(known, x.shape[1]):
            p = word_probabilities(run_blocks(network, before[:, start : position + 1], start, cache)[:, -1])
            u = torch.rand(len(x), generator=session.rng, device=x.device, dtype=torch.float64)
            before[:, position + 1] = draw_words(p, u)
            start = position + 1
        return continuations(batch, before[:, 1:])
