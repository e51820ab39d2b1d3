"""A model whose layers cannot be driven one by one is one layer: its own forward on its own cache, which is cut or read again."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from stepmark.hub.layers import causal_mask
from stepmark.task import skip
from stepmark.tracks.decoding.decoder import KeyValueCache


class Past:
    """What one text left in a model's own cache, and how to go back in it.

    Attention's states are cut. A recurrent state cannot be: the one before the last pass is kept, and what was read since
    is read again. Beyond the last pass, where that state or what has left a sliding window is gone, all is read again.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.own = self._empty()
        self.length = self.mark = 0  # tokens read; of them those before the last pass
        self.recurrent = any(self.own.is_linear)
        self.forgets = self.recurrent or any(self.own.is_sliding)
        self.before: list[Any] = []
        self.fed: Tensor | None = None  # embeddings [1, length, D] of all, of a cache that forgets

    def _empty(self) -> DynamicCache:
        made = DynamicCache(config=self.config)
        if not any(made.is_linear):
            made.activate_past_recording()  # of sliding layers: what leaves the window stays until the next pass
        return made

    def again(self, start: int, hidden: Tensor) -> tuple[int, Tensor]:
        """Go back to at most `start` tokens. Returns how many are left, and what is to be read behind them."""
        whole = hidden if self.fed is None else torch.cat((self.fed[:, :start], hidden), 1)
        if self.forgets and start < self.mark:
            self.own, self.mark = self._empty(), 0
        elif self.recurrent and start < self.length:
            self._restore()
        else:
            if self.length and not self.recurrent:
                self.own.crop(start - self.length)
            self.mark = start
        if self.recurrent:
            self._keep()
        self.length = start + hidden.shape[1]
        if not self.forgets:
            return start, hidden
        self.fed = whole
        return self.mark, whole[:, self.mark :]

    def _keep(self) -> None:
        self.before = [
            copy.deepcopy({n: v for n, v in vars(layer).items() if n not in ("keys", "values")}) if linear else None
            for layer, linear in zip(self.own.layers, self.own.is_linear, strict=True)
        ]

    def _restore(self) -> None:
        for layer, state in zip(self.own.layers, self.before, strict=True):
            if state is not None:
                vars(layer).update(copy.deepcopy(state))
            held: dict[str, Any] = vars(layer)
            if held.get("keys") is not None and held["keys"].numel():
                for name in ("keys", "values"):
                    held[name] = held[name][:, :, : self.mark]


class Whole(nn.Module):
    """All layers of a model at once, by its own forward on its own cache.

    `single`: behind a cache the model reads one token at a time only.
    """

    def __init__(self, base: nn.Module, config: Any, reason: str, single: bool = False) -> None:
        super().__init__()
        self.base, self.config, self.reason, self.single = base, config, reason, single

    def _needed(self) -> NoReturn:
        skip(f"needs the layers of the model one by one: {self.reason}")

    @property
    def self_attn(self) -> nn.Module:
        """There is none."""
        self._needed()

    @property
    def mlp(self) -> nn.Module:
        """There is none."""
        self._needed()

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Tensor:
        """Last hidden states [1, T, D] of the base, its norm included."""
        assert position_embeddings is not None
        positions = position_embeddings[0]
        if not isinstance(past_key_values, KeyValueCache):
            self._needed()
        start, count = past_key_values.start, hidden.shape[1]
        expected = torch.arange(start, start + count, device=positions.device)
        causal = attention_mask is None or attention_mask[0, 0].equal(
            causal_mask(start, start + count, positions.device)
        )
        if not causal or not positions[0].equal(expected):
            self._needed()
        if "past" not in vars(past_key_values):
            vars(past_key_values)["past"] = Past(self.config)
        past = vars(past_key_values)["past"]
        first, read = past.again(start, hidden)
        if self.single and first and read.shape[1] > 1:
            skip("checks several tokens in one forward; behind its cache this model reads one at a time only")
        places = torch.arange(first, first + read.shape[1], device=hidden.device)[None]
        found = self.base(inputs_embeds=read, position_ids=places, past_key_values=past.own, use_cache=True)
        return found[0][:, -count:]
