"""Key/value caches that let go of what they evict, and decoding on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from stepmark.backbones.lm import rotate_by
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import write_plainly


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k / sqrt(d) + bias) v of heads that may share keys: (outputs [.., H, T, d], weights [.., H, T, S]).

    Args:
        queries: [.., H, T, d]. keys, values: [.., H / g, S, d]; g neighbouring query heads share one of them.
        seen: bool, True where a query may look; bias: added to the logits. Both broadcast to [.., H / g, T, S].
    """
    *rest, heads, length, size = queries.shape
    shared = keys.shape[-3]
    grouped = queries.reshape(*rest, shared, heads // shared, length, size)
    logits = grouped @ keys.unsqueeze(-3).transpose(-1, -2) * size**-0.5
    if bias is not None:
        logits = logits + bias.unsqueeze(-3)
    if seen is not None:
        logits = logits.masked_fill(~seen.unsqueeze(-3), float("-inf"))
    weights = logits.softmax(-1)
    return (weights @ values.unsqueeze(-3)).reshape(queries.shape), weights.flatten(-4, -3)


def look(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
    """Outputs [H, T, d] as `attend` gives them, by the fused kernel that decoder layers use: no weights, and quick.

    Args:
        queries: [H, T, d]. keys, values: [H / g, S, d]. seen: bool [T, S]; None: causal, for T = S.
    """
    if len(queries) > len(keys):
        keys, values = (part.repeat_interleave(len(queries) // len(part), 0) for part in (keys, values))
    found = nn.functional.scaled_dot_product_attention(
        queries[None], keys[None], values[None], attn_mask=seen, is_causal=seen is None
    )
    return found[0]


class HeldCache:
    """Keys and values of one sequence, as many as are kept: what is evicted is gone, and what is held is counted.

    For each layer: keys [H, n, d], rotated at their positions in the text, values [H, n, d] and positions int32
    [H, n]. Heads may hold different tokens, but equally many. Attention asks the cache (`attend_from`), which appends
    the new states, looks, and lets `evict` choose. This class evicts nothing: it is full attention.
    """

    def __init__(self, depth: int) -> None:
        self.keys: list[Tensor | None] = [None] * depth
        self.values: list[Tensor | None] = [None] * depth
        self.positions: list[Tensor | None] = [None] * depth
        self.now = torch.zeros(0, dtype=torch.long)  # positions [T] of the tokens that run

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What a decoder layer calls before it attends: the new states come back, and `attend_from` gets them."""
        return keys, values

    def before(self, layer: int, hidden: Tensor) -> None:
        """Called with what goes into a layer, [1, T, D], before the layer runs."""

    def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention outputs [H, T, d] of the tokens at `now`, whose states are appended first."""
        self.append(layer, keys, values)
        held_keys, held_values, positions = self.held(layer)
        outputs, weights = attend(queries, held_keys, held_values, positions[:, None] <= self.now[:, None])
        self.evict(layer, weights)
        return outputs

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Hold the states [H, T, d] of the tokens at `now` as well."""
        new = (keys, values, self.now.int().expand(len(keys), -1))
        for stored, states in zip((self.keys, self.values, self.positions), new, strict=True):
            before = stored[layer]
            stored[layer] = states.clone() if before is None else torch.cat((before, states), 1)

    def held(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions of a layer."""
        keys, values, positions = self.keys[layer], self.values[layer], self.positions[layer]
        if keys is None or values is None or positions is None:
            raise ValueError(f"layer {layer} has not run yet: its cache is empty")
        return keys, values, positions

    def evict(self, layer: int, weights: Tensor) -> None:
        """Called after a layer has attended with `weights` [query heads, T, n]: drop what the policy drops."""

    def keep(self, layer: int, kept: Tensor) -> None:
        """Hold only the entries `kept`, int64 [H, m], in their order; the rest is freed."""
        for stored in (self.keys, self.values):
            states = cast(Tensor, stored[layer])
            stored[layer] = states.gather(1, kept[..., None].expand(-1, -1, states.shape[2]))
        self.positions[layer] = cast(Tensor, self.positions[layer]).gather(1, kept)


class HeavyHitterCache(HeldCache):
    """Keeps the tokens that have drawn most attention and the most recent ones (Zhang et al. 2023, algorithm 1).

    A token's score is the sum of the attention weights that it got from all queries so far, for each head apart
    (query heads that share keys: their mean). Beyond `heavy` + `recent` tokens the last `recent` stay, and of the
    others the `heavy` greatest scores.
    """

    def __init__(self, depth: int, heavy: int, recent: int) -> None:
        super().__init__(depth)
        self.heavy, self.recent = heavy, recent
        self.scores: list[Tensor | None] = [None] * depth

    def evict(self, layer: int, weights: Tensor) -> None:
        """Add the weights [query heads, T, n] to the scores and keep the best."""
        scores = weights.unflatten(0, (len(self.held(layer)[0]), -1)).mean(1).sum(1)
        earlier = self.scores[layer]
        if earlier is not None:
            scores[:, : earlier.shape[1]] += earlier
        first_recent = scores.shape[1] - self.recent
        if first_recent > self.heavy:
            best = scores[:, :first_recent].topk(self.heavy).indices.sort().values
            last = torch.arange(first_recent, scores.shape[1], device=scores.device)
            kept = torch.cat((best, last.expand(len(scores), -1)), 1)
            self.keep(layer, kept)
            scores = scores.gather(1, kept)
        self.scores[layer] = scores


# -- sinks and a window -----------------------------------------------------------------------------------------------


def attend_band(
    queries: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    now: Tensor,
    sinks: int,
    window: int,
    rotary: nn.Module | None = None,
) -> Tensor:
    """Outputs [H, T, d] where each token sees the first `sinks` tokens and the last `window`, its own among them.

    In blocks of twice `window` queries, so that the work is linear in the length of the text.

    Args:
        queries: [H, T, d] of the tokens at `now` [T], ascending. states: keys and values [H, n, d], positions [n].
        rotary: where given, distances are those in a cache without gaps (Xiao et al. 2024, section 3.2): a query that
            stands beyond sinks + window sees the sinks from position sinks + window - 1.
    """
    keys, values, at = states
    early = at < sinks
    outputs = []
    for first in range(0, len(now), 2 * window):
        q, t = queries[:, first : first + 2 * window], now[first : first + 2 * window, None]
        near = ~early & (at > t[0] - window) & (at <= t[-1])
        seen = torch.cat((at[early] <= t, (at[near] > t - window) & (at[near] <= t)), 1)
        if rotary is None:
            k, v = (torch.cat((part[:, early], part[:, near]), 1) for part in (keys, values))
            outputs.append(look(q, k, v, seen))
            continue
        moved = rotate_by(q, (t[:, 0].clamp(max=sinks + window - 1) - t[:, 0])[None].expand(len(q), -1), rotary)
        group = len(q) // len(keys)
        k, v, far = (part.repeat_interleave(group, 0) for part in (keys[:, near], values, keys[:, early]))
        logits = torch.cat((moved @ far.transpose(1, 2), q @ k.transpose(1, 2)), 2) * q.shape[2] ** -0.5
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(weights @ torch.cat((v[:, early], v[:, near]), 1))
    return torch.cat(outputs, 1)


class BandCache(HeldCache):
    """Attention sinks and a sliding window: of a layer the first `sinks` tokens and the last `window` - 1 are held.

    The next token sees these and itself. The layers `full` hold everything. `rotary` as in `attend_band`.
    """

    def __init__(
        self, depth: int, sinks: int, window: int, rotary: nn.Module | None = None, full: Sequence[int] = ()
    ) -> None:
        super().__init__(depth)
        self.sinks, self.window, self.rotary, self.full = sinks, window, rotary, tuple(full)

    def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Outputs [H, T, d] of the tokens at `now`."""
        self.append(layer, keys, values)
        held_keys, held_values, positions = self.held(layer)
        if layer in self.full:  # the tokens that run are the last ones held: causal where they are all there are
            alone = positions.shape[1] == len(self.now)
            return look(queries, held_keys, held_values, None if alone else positions[0] <= self.now[:, None])
        states = held_keys, held_values, positions[0]
        outputs = attend_band(queries, states, self.now, self.sinks, self.window, self.rotary)
        stays = (positions[0] < self.sinks) | (positions[0] > self.now[-1] + 1 - self.window)
        self.keep(layer, stays.nonzero()[:, 0].expand(len(keys), -1))
        return outputs


# -- decoding ---------------------------------------------------------------------------------------------------------


class HeldDecoder(Decoder):
    """A decoder on a `HeldCache`. Tokens keep their positions in the text, whatever was evicted before them."""

    def __init__(self, model: nn.Module, capacity: int, cache: HeldCache) -> None:
        """`capacity`: greatest position + 1."""
        super().__init__(model, capacity)
        self.held_cache = cache

    def run(
        self,
        hidden: Tensor,
        start: int,
        chosen: Sequence[nn.Module] | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As in `Decoder`, but `start` is the position of the first token, and the cache alone says who sees what."""
        chosen = self.layers if chosen is None else chosen
        if positions is None:
            positions = torch.arange(start, start + hidden.shape[1], device=self.device)
        rotary = self._cos[:, positions], self._sin[:, positions]
        self.held_cache.now = positions
        self.layer_calls += len(chosen)
        with HeldAttention(self.model):
            for layer in chosen:
                self.held_cache.before(layer.self_attn.layer_idx, hidden)
                hidden = layer(
                    hidden, position_embeddings=rotary, past_key_values=self.held_cache, cache=self.held_cache
                )
        return hidden


class HeldAttention:
    """While inside, the attention of a model asks the `cache` that its layers are called with (`attend_from`)."""

    def __init__(self, model: nn.Module) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.config: Any = model.config
        self.before = self.config._attn_implementation
        ALL_ATTENTION_FUNCTIONS.register("stepmark_held", _ask_cache)

    def __enter__(self) -> None:
        self.config._attn_implementation = "stepmark_held"

    def __exit__(self, *error: object) -> None:
        self.config._attn_implementation = self.before


def _ask_cache(
    module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, cache: Any = None, **_: Any
) -> tuple[Tensor, None]:
    outputs = cache.attend_from(module.layer_idx, queries[0], keys[0], values[0])
    return outputs.transpose(0, 1)[None], None


def write_held(
    session: Session,
    batch: Mapping[str, Any],
    rung: int,
    decoder: Callable[[nn.Module, int, int], Decoder],
    role: str = "target",
) -> Any:
    """New token ids per prompt by plain decoding of a network, each prompt on a cache of its own.

    Of tasks `forced/...` the log-probabilities [B, V] of the next word, each text read token after token.

    Args:
        decoder: (network, tokens of the text that shares of the cache are taken of, greatest position + 1) -> what
            decodes it. Of `forced/...`, where a cache of a fifth of the text is to be of `rung` tokens, 5 times the rung.
    """
    model = session.networks[role]
    if "context" in batch:
        return torch.stack([foretell(decoder(model, 5 * rung, len(text)), text) for text in batch["context"]])

    def write(prompt: list[int], room: int, temperature: float) -> list[int]:
        target = decoder(model, len(prompt), len(prompt) + room)
        return write_plainly(target, prompt, room, rung, temperature, session.rng)

    return write_each(batch, write)


def foretell(target: Decoder, text: Sequence[int]) -> Tensor:
    """Log-probabilities [V] of what comes after a text that is read token after token."""
    for token in text[:-1]:
        target.run(target.embed([token]), target.length)
        target.length += 1
    return target.forward(text[-1:])[0].log_softmax(-1)
