"""What tests of caches that let go share: random targets and texts, plain stepping, untrained networks, a cache that masks."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rigs import decoding
from stepmark import plugins
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.held_cache import HeavyHitterCache, attend

PROMPT = 60


def tiny(seed: int = 0, layers: int = 3, shared: int = 1) -> Any:
    """A random Llama, 2 query heads on `shared` key heads, weights large enough for attention that is far from even."""
    return decoding.tiny(seed, layers, width=32, shared=shared)


def text(seed: int = 0, length: int = PROMPT) -> list[int]:
    return torch.randint(2, 13, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def steps(decoder: Decoder, ids: Sequence[int], prompt: int) -> Tensor:
    """Logits [len(ids) - prompt + 1, V] after a prompt read at once and then token by token."""
    with torch.no_grad():
        rows = [decoder.forward(ids[:prompt], last=1)]
        rows += [decoder.forward([token], last=1) for token in ids[prompt:]]
    return torch.cat(rows)


def kernels(method: str, model: Any, seed: int = 0) -> nn.Module:
    """A method's own untrained networks for a model; evictions and states made frequent enough to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        session: Any = SimpleNamespace(networks={"target": model}, clone=lambda role: model)
        (network,) = plugins.load_class(plugins.methods()[method])().networks(session).values()
        for name, parameter in network.named_parameters():
            if name in {"s1", "s2"}:
                nn.init.normal_(parameter)
            if name in {"weight", "bias"}:
                nn.init.normal_(parameter, 4.0 if name == "bias" else 0.0, 0.5)
    return network.requires_grad_(False)


class Masked(HeavyHitterCache):
    """H2O that only masks what it evicts: the same text, and nothing saved."""

    def __init__(self, depth: int, heavy: int, recent: int) -> None:
        super().__init__(depth, heavy, recent)
        self.gone: list[Tensor | None] = [None] * depth

    def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.append(layer, keys, values)
        k, v, at = self.held(layer)
        gone, total = self.gone[layer], self.scores[layer]
        new = torch.zeros(len(k), k.shape[1], dtype=torch.bool)
        sums = torch.zeros(len(k), k.shape[1])
        if gone is not None and total is not None:
            new[:, : gone.shape[1]] = gone
            sums[:, : total.shape[1]] = total
        outputs, weights = attend(queries, k, v, (at[:, None] <= self.now[:, None]) & ~new[:, None])
        sums += weights.unflatten(0, (len(k), -1)).mean(1).sum(1)
        for head in range(len(k)):
            alive = [i for i in range(k.shape[1]) if not new[head, i]]
            if len(alive) > self.heavy + self.recent:
                old = sorted(alive[: -self.recent], key=lambda i: -float(sums[head, i]))
                new[head, old[self.heavy :]] = True
        self.gone[layer], self.scores[layer] = new, sums
        return outputs
