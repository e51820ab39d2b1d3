"""What a causal language model of transformers has read of many texts, each at a length of its own.

Keys and values are kept text by text from their first token on. For a pass they are laid so that all of them end in the same
slot, on a cache of transformers' own: a text and what it goes on with are then next to each other, and the masks, windows and
positions of the model's own forward hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from stepmark.task import skip


class Held:
    """Of B texts, what was read.

    Attributes:
        lengths: int64 [B], ids read of each text, which whoever drives them may lessen.
        ids: by text, the ids that were read. tokens: the tokens whose keys and values are kept.
        keys, values: by layer [B, slots, H, D].
    """

    def __init__(self, rows: int, states: bool = False) -> None:
        if states:
            skip(
                "looks at hidden states, for which something would have to be trained, and a checkpoint folder brings no data"
            )
        self.lengths = torch.zeros(rows, dtype=torch.long)
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.stateful = False

    def take(self, rows: Sequence[int]) -> Held:
        """A copy that holds these rows, in this order; a row may come several times."""
        other = Held(0)
        index = torch.tensor(list(rows), dtype=torch.long)
        other.lengths = self.lengths[index]
        other.ids = [list(self.ids[row]) for row in rows]
        other.tokens = [list(self.tokens[row]) for row in rows]
        used = max(map(len, other.tokens), default=0)
        for held, copy in ((self.keys, other.keys), (self.values, other.values)):
            copy += [each[index.to(each.device), :used] for each in held]
        return other

    def swap(self, some: Sequence[int], others: Sequence[int]) -> None:
        """Exchange rows, each of some with one of others."""
        pairs, turned = [*some, *others], [*others, *some]
        self.lengths[pairs] = self.lengths[turned]
        for held in (*self.keys, *self.values):
            held[pairs] = held[turned]
        for lists in (self.ids, self.tokens):
            moved = [lists[row] for row in turned]
            for row, own in zip(pairs, moved, strict=True):
                lists[row] = own

    def read(self, base: Any, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Final hidden states [B', T, D] of what the first B' texts go on with, padded on the right; they are kept."""
        rows, count = len(pieces), max(map(len, pieces))
        device = next(base.parameters()).device
        past = [len(self.tokens[row]) for row in range(rows)]
        last = max(past)
        ids = torch.tensor([[*piece, *[piece[-1]] * (count - len(piece))] for piece in pieces], device=device)
        starts = torch.tensor(past, device=device)[:, None]
        ahead = last - starts  # empty slots before each text
        places = starts + torch.arange(count, device=device)
        seen = torch.cat([torch.arange(last, device=device) >= ahead, torch.ones_like(ids, dtype=torch.bool)], 1)
        cache = DynamicCache(self._laid(rows, last, ahead) if last else None)
        more = {"position_ids": places} if _takes_positions(type(base)) else {}  # others count what the mask shows
        out = base(input_ids=ids, attention_mask=seen.long(), past_key_values=cache, use_cache=True, **more)
        self._keep(cache, rows, last, places)
        for row, piece in enumerate(pieces):
            self.tokens[row] += piece
        return out.last_hidden_state  # type: ignore[no-any-return]

    def _laid(self, rows: int, last: int, ahead: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values by layer [B', H, last, D], at the end of these slots."""
        slots = (torch.arange(last, device=ahead.device) - ahead).clamp(min=0)
        row = torch.arange(rows, device=ahead.device)[:, None]
        return [
            (keys[row, slots].transpose(1, 2), values[row, slots].transpose(1, 2))
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def _keep(self, cache: DynamicCache, rows: int, last: int, places: Tensor) -> None:
        """Put the new keys and values where each text stands; those of the padding are written over by what comes next."""
        row = torch.arange(rows, device=places.device)[:, None]
        slots = int(places.max()) + 1
        for number, layer in enumerate(cache.layers):
            for held, new in ((self.keys, layer.keys), (self.values, layer.values)):
                part = new[:, :, last:].transpose(1, 2)
                have = held[number].shape[1] if number < len(held) else 0
                if have < slots:
                    wider = part.new_zeros((len(self.ids), slots + 32, *part.shape[2:]))
                    if have:
                        wider[:, :have] = held[number]
                    held[number : number + 1] = [wider]
                held[number][row, places] = part


@lru_cache(maxsize=8)
def _takes_positions(kind: type) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
