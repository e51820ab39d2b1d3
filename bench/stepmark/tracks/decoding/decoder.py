"""Driving the layers of a language model: a key/value cache with rollback, forward passes on it, prompt after prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class KeyValueCache:
    """Keys and values of one sequence for every layer, in buffers of fixed capacity.

    Slots are addressed, not appended: a pass over T positions from slot `start` writes slots start .. start + T - 1
    of the layers it runs and sees all slots before. Going back is choosing a smaller `start` for the next pass, for
    each layer on its own where a method leaves layers out. Decoder layers of transformers take it as
    `past_key_values`; unlike `DynamicCache` nothing is copied when it grows or is cropped.
    """

    def __init__(self, depth: int, capacity: int) -> None:
        self.capacity = capacity
        self.start = 0
        self._keys: list[Tensor | None] = [None] * depth
        self._values: list[Tensor | None] = [None] * depth

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values [1, H, T, D] from slot `start` on; returns those of all slots up to there."""
        stop = self.start + keys.shape[2]
        stored_keys, stored_values = self._keys[layer], self._values[layer]
        if stored_keys is None or stored_values is None:
            shape = (keys.shape[0], keys.shape[1], self.capacity, keys.shape[3])
            stored_keys = self._keys[layer] = keys.new_empty(shape)
            stored_values = self._values[layer] = values.new_empty(shape)
        stored_keys[:, :, self.start : stop] = keys
        stored_values[:, :, self.start : stop] = values
        return stored_keys[:, :, :stop], stored_values[:, :, :stop]

    def compact(self, start: int, kept: Sequence[int]) -> None:
        """Move the slots `kept` (ascending) to start, start + 1, ...: keep one branch of a drafted tree."""
        if list(kept) == list(range(start, start + len(kept))):
            return
        for stored in (*self._keys, *self._values):
            if stored is not None:
                stored[:, :, start : start + len(kept)] = stored[:, :, list(kept)]

    def states(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, H, length, D] of a layer's first slots."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            raise ValueError(f"layer {layer} has not run yet: its cache is empty")
        return keys[:, :, :length], values[:, :, :length]


def run_layers(
    hidden: Tensor,
    cache: KeyValueCache,
    start: int,
    chosen: Sequence[nn.Module],
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> Tensor:
    """Hidden states [1, T, D] after the decoder layers `chosen`, for the cache slots from `start` on.

    Args:
        rotary: cos and sin [1, T, d] at the positions of `hidden`.
        mask: bool [1, 1, T, start + T], True where a query may look; None for causal attention where T is 1 or
            start is 0.
    """
    cache.start = start
    for layer in chosen:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
    return hidden


class Decoder:
    """A Llama-type model writing one sequence: its cache, its length, and what it has spent.

    Built anew for every prompt. Works on the model's own sub-modules without the wrappers of `model.forward`, which
    cost more than a layer at these sizes. Token ids go in as lists; logits come out as [T, V].
    """

    def __init__(self, model: nn.Module, capacity: int) -> None:
        """`capacity`: greatest number of slots in use at once (prompt, new tokens and drafts)."""
        self.model: Any = model
        self.inner: Any = model.model
        self.layers: list[nn.Module] = list(self.inner.layers)
        self.device = self.inner.embed_tokens.weight.device
        self.eos: int = self.model.config.eos_token_id
        self.cache = KeyValueCache(len(self.layers), capacity)
        self.length = 0
        self.layer_calls = 0
        positions = torch.arange(capacity, device=self.device)
        self._cos, self._sin = self.inner.rotary_emb(self.inner.embed_tokens.weight, positions[None])
        self._causal = positions[:, None] >= positions[None]

    @property
    def spent(self) -> float:
        """Evaluations so far: layer calls / layers."""
        return self.layer_calls / len(self.layers)

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Input embeddings [1, T, D] of T token ids, for `run`. Costs nothing that is counted."""
        return self.inner.embed_tokens(torch.tensor([ids], device=self.device))

    def run(
        self,
        hidden: Tensor,
        start: int,
        chosen: Sequence[nn.Module] | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [1, T, D] after the layers `chosen` (default all), before the final norm.

        Args:
            hidden: [1, T, D], embeddings or the result of lower layers.
            start: cache slot of the first position; slots from there on are overwritten.
            positions: int64 [T], where they are not start, start + 1, ... (trees, look-ahead windows).
            mask: bool [T, start + T], True where a query may look, where it is not causal.
        """
        chosen = self.layers if chosen is None else chosen
        stop = start + hidden.shape[1]
        if positions is None:
            rotary = self._cos[:, start:stop], self._sin[:, start:stop]
        else:
            rotary = self._cos[:, positions], self._sin[:, positions]
        if mask is None and start > 0 and hidden.shape[1] > 1:
            mask = self._causal[start:stop, :stop]
        self.layer_calls += len(chosen)
        return run_layers(hidden, self.cache, start, chosen, rotary, None if mask is None else mask[None, None])

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [T, V] of hidden states [1, T, D] that come from the last layer."""
        return self.model.lm_head(self.inner.norm(hidden))[0]

    def forward(self, ids: Sequence[int], last: int | None = None) -> Tensor:
        """Append tokens: one evaluation. Logits [T, V] after each of them, or only after the `last` ones."""
        hidden = self.run(self.embed(ids), self.length)
        self.length += len(ids)
        return self.logits(hidden if last is None else hidden[:, -last:])

    def rollback(self, length: int) -> None:
        """Forget all tokens but the first `length`: the next forward overwrites their slots. Costs nothing."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back from {self.length} to {length} tokens")
        self.length = length


def write_each(batch: Mapping[str, Any], write: Callable[[list[int], int, float], list[int]]) -> list[list[int]]:
    """New token ids of every prompt of a batch, one prompt after the other.

    Args:
        write: (prompt, most new tokens, temperature) -> new token ids.

    Returns: what `run` of the track returns.
    """
    rows = zip(batch["prompt"], batch["max_new_tokens"], batch["temperature"], strict=True)
    return [write(*row) for row in rows]
