"""Layers of any family under the call of Llama's, on a `KeyValueCache` of the track or on caches that attend by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stepmark.hub.stage import CACHE, Stage
from stepmark.task import skip
from stepmark.tracks.decoding.decoder import KeyValueCache

HELD = "stepmark_held"  # what the track's `HeldAttention` asks a configuration for
OURS = "stepmark_hub_held"  # what it gets: the same, honouring what the family scales
NAMES = {
    "self_attn": ("self_attn", "attn", "attention", "self_attention", "temporal_block"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe"),
}


class Slots(KeyValueCache):
    """A `KeyValueCache` for any family: values may be smaller than keys, and slots know their places in the text."""

    places: list[int]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As in `KeyValueCache`."""
        if self._keys[layer] is None:
            self._keys[layer], self._values[layer] = (
                part.new_empty(*part.shape[:2], self.capacity, part.shape[3]) for part in (keys, values)
            )
        return super().update(keys, values, layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a pass comes after."""
        return self.start

    def compact(self, start: int, kept: Sequence[int]) -> None:
        """As in `KeyValueCache`."""
        if self.places:
            self.places[start : start + len(kept)] = [self.places[slot] for slot in kept]
        super().compact(start, kept)


class Layer(nn.Module):
    """A layer of a model that is called as Llama's are: `position_embeddings` are the positions, twice."""

    def __init__(self, real: nn.Module, index: int, stage: Stage, kinds: Kinds) -> None:
        super().__init__()
        self.real, self.index, self.kinds = real, index, kinds
        self._stage = (stage,)  # no child: its modules are the model's

    @property
    def self_attn(self) -> nn.Module:
        """The attention, whatever it is called."""
        return self._part("self_attn")

    @property
    def mlp(self) -> nn.Module:
        """The feed-forward part, whatever it is called."""
        return self._part("mlp")

    def _part(self, which: str) -> nn.Module:
        name = self._name(which)
        if name is None or not hasattr(self._modules["real"], name):
            skip(f"needs the parts of a layer: {type(self.real).__name__} has none called {which}")
        return getattr(self.real, name)

    def _name(self, which: str) -> str | None:
        return next((name for name in NAMES[which] if hasattr(self.real, name)), None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NAMES:
            setattr(self.real, self._name(name) or name, value)
        else:
            super().__setattr__(name, value)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Tensor:
        """Hidden states [1, T, D]. `attention_mask`: bool [1, 1, T, S]; None, or causal: the model's own is taken."""
        assert position_embeddings is not None
        positions, stage = position_embeddings[0], self._stage[0]
        slots = isinstance(past_key_values, KeyValueCache)
        start = past_key_values.start if slots else 0
        if slots and type(past_key_values) is KeyValueCache:
            past_key_values.__class__ = Slots  # the track makes them, and this adds to what they do
            vars(past_key_values)["places"] = []
        if not slots and self.kinds.held:
            skip(self.kinds.held)
        heard = stage.heard(self.index, hidden, positions, start, attention_mask)
        asked = {name: past_key_values if value is CACHE else value for name, value in heard.items()}
        first = asked.pop("")
        hidden = first if self.index == 0 else hidden
        if slots:
            mask = self.kinds.mask(self.index, attention_mask, positions[0], past_key_values, hidden.dtype)
            if mask is not None:
                asked["attention_mask"] = mask
        running.cache, running.layer, running.window = past_key_values, self.index, self.kinds.windows[self.index]
        found = self.real(hidden, **asked)
        return found[0] if isinstance(found, tuple) else found


class Kinds:
    """What a model's layers are, and what cannot be done with them ("": it can; else why not).

    windows: tokens that a layer sees, None: all. chunked: whether windows are chunks. trees: drafts as trees. held:
    attention over caches that evict. moves: keys that are moved to other positions. layers: layers one by one.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        kinds = DynamicCache(config=config).layers
        self.windows = [getattr(kind, "sliding_window", None) for kind in kinds]
        self.chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
        self.trees = self.held = self.moves = self.layers = ""
        self._drawn: tuple[Any, dict[Any, Tensor | None]] = None, {}

    def mask(self, index: int, given: Tensor | None, positions: Tensor, cache: Slots, dtype: Any) -> Tensor | None:
        """The mask of a layer where a `Decoder` asks for another than the causal one; None: it does not."""
        start, stop = cache.start, cache.start + len(positions)
        if given is None or given is self._drawn[0]:
            if given is not None:
                return self._of(index, given, cache, positions, dtype)
            cache.places[:] = range(stop)
            return None
        self._drawn = given, {}
        at = positions.tolist()
        causal = at == list(range(start, stop)) and bool(given[0, 0].equal(causal_mask(start, stop, given.device)))
        if causal:
            cache.places[:] = range(stop)
            self._drawn[1]["causal"] = None
            return None
        if self.trees:
            skip(self.trees)
        cache.places[:] = [*cache.places[:start], *range(len(cache.places), start), *at]
        return self._of(index, given, cache, positions, dtype)

    def _of(self, index: int, given: Tensor, cache: Slots, positions: Tensor, dtype: Any) -> Tensor | None:
        drawn, window = self._drawn[1], self.windows[index]
        if "causal" in drawn:
            return None
        if window not in drawn:
            seen = given
            if window is not None and int(positions.max()) >= window:
                if self.chunked:
                    skip("trees of drafts beyond the first chunk of chunked attention are not driven")
                places = torch.tensor(cache.places, device=given.device)
                seen = given & (positions[:, None] - places < window)
            if self.config._attn_implementation == "eager":
                seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
                    ~seen, torch.finfo(dtype).min
                )
            drawn[window] = seen
        return drawn[window]


def causal_mask(start: int, stop: int, device: torch.device) -> Tensor:
    at = torch.arange(stop, device=device)
    return at[start:, None] >= at


running = SimpleNamespace(cache=None, layer=0, window=None)  # which cache the layer that runs asks


def ask_cache(
    module: nn.Module,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention that asks the cache for its outputs, which takes d^-0.5 for scale: queries make up for another one."""
    cache, size = running.cache, queries.shape[-1]
    if softcap is not None or s_aux is not None:
        skip("attends by itself over its cache, and would leave out the model's soft caps or sinks")
    if values.shape[-1] != size:
        skip("attends by itself over its cache, and takes values for as large as keys")
    if running.window is not None and int(cache.now[-1]) >= running.window:
        skip(f"attends by itself over its cache, and knows nothing of the model's window of {running.window} tokens")
    if scaling is not None:
        queries = queries * (scaling * size**0.5)
    try:
        outputs = cache.attend_from(running.layer, queries[0], keys[0], values[0])
    except RuntimeError:
        if queries.dtype == torch.float32:
            raise
        skip(
            f"attends by itself over its cache, in float32; this model is in {str(queries.dtype).removeprefix('torch.')}"
        )
    return outputs.transpose(0, 1)[None], None


ALL_ATTENTION_FUNCTIONS.register(OURS, ask_cache)
