"""A key/value cache of 8-bit integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.method import Method
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.held_cache import HeldCache, HeldDecoder, write_held


class KvInt8(Method):
    """Keys and values as 8-bit integers, with one 16-bit scale for each token and head: the floor of quantised caches.

    x is stored as round(x / s) with s = max |x| / 127 over the channels of one token in one head, and read as s times
    the integer: an error of at most s / 2 in each channel. Nothing is evicted, every token is seen. Integers and scales
    are what is held; numbers in full precision exist for one layer at a time, while it attends.
    """

    tasks = ("recall/needles",)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""

        def decoder(model: nn.Module, length: int, capacity: int) -> Decoder:
            cache = Int8Cache(len(model.model.layers))
            return HeldDecoder(model, capacity, cache)

        return write_held(session, batch, rung, decoder)


class Int8Cache(HeldCache):
    """Full attention on integers: keys and values int8 [H, n, d], their scales float16 [H, n, 2]."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.scales: list[Tensor | None] = [None] * depth

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Quantise, then hold."""
        (keys, key_scales), (values, value_scales) = quantise(keys), quantise(values)
        super().append(layer, keys, values)
        new, before = torch.cat((key_scales, value_scales), 2), self.scales[layer]
        self.scales[layer] = new if before is None else torch.cat((before, new), 1)

    def held(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values in full precision, and positions."""
        keys, values, positions = super().held(layer)
        scales = self.scales[layer].float()
        return keys * scales[:, :, :1], values * scales[:, :, 1:], positions


def quantise(states: Tensor) -> tuple[Tensor, Tensor]:
    """Integers int8 [.., d] and scales float16 [.., 1] of states [.., d]."""
    # The scale is rounded up to 16 bits first: the greatest channel stays within 127 and the error is half a step.
    scales = (states.abs().amax(-1, keepdim=True) / 127 * (1 + 2**-10)).half()
    scales = scales.clamp(min=torch.finfo(torch.float16).smallest_normal)
    return (states / scales.float()).round().to(torch.int8), scales
