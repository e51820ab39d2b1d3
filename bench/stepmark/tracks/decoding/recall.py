"""Track decoding, tasks of recall: what may a key/value cache forget, and what need not be computed at all?

A long prompt states facts among sentences that say nothing of them, and asks for some of the facts at its end. A rung
counts target forwards as on the other tasks; rung 1 is the prefill alone. What a method saves shows in other counts:
`kv_bytes` (what its caches hold, read by the harness from the tensors themselves), positions run through the layers of
the target (`target_positions`, token-layers over layers), FLOPs and time.

Inputs and outputs are those of the track. The algorithms that methods share stand below: caches that let go of what they
evict (`HeldCache` and its kinds), a decoder on them (`HeldDecoder`), token pruning (`PrunedDecoder`), training with
sparse attention (`train_band`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from stepmark.backbones.lm import rotate_by
from stepmark.task import Task, harness_only, load_split
from stepmark.tracks.decoding import check as check
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding import reference_call as reference_call
from stepmark.tracks.decoding import score as score
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.speculation import speculate

TASKS = (
    Task(
        id="recall/needles",
        version=1,
        summary="Recall of 4 of 16 facts from a text of 1000 words, 6-layer target: what may a key/value cache forget?",
        dataset="needles",
        backbones={"target": "lm_recall"},
        reference="target",
        bounded=("target", "student"),  # a target that a method has trained on takes the target's place
        unit="target forwards",
        rungs=(1, 8, 16),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=1,
        smoke_rungs=(2,),
        probe=1,
    ),
)

MAX_NEW_TOKENS = 16


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` distinct prompts of the test split."""
    from stepmark.backbones.lm import encode

    harness_only("the test split")
    prompts = load_split(task.dataset, "test")["prompt"]
    chosen = torch.randperm(len(prompts), generator=generator)[:n].tolist()
    return {
        "prompt": [encode(prompts[i]) for i in chosen],
        "max_new_tokens": [MAX_NEW_TOKENS] * n,
        "temperature": [0.0] * n,
    }


# -- caches that let go ---------------------------------------------------------------------------------------------


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


def attend_band(
    queries: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    now: Tensor,
    sinks: int,
    window: int,
    rotary: nn.Module | None = None,
) -> Tensor:
    """Outputs [H, T, d] where each token sees the first `sinks` tokens and the last `window`, its own among them.

    In blocks of `window` queries, so that the work is linear in the length of the text.

    Args:
        queries: [H, T, d] of the tokens at `now` [T], ascending. states: keys and values [H, n, d], positions [n].
        rotary: where given, distances are those in a cache without gaps (Xiao et al. 2024, section 3.2): a query that
            stands beyond sinks + window sees the sinks from position sinks + window - 1.
    """
    keys, values, at = states
    early = at < sinks
    outputs = []
    for first in range(0, len(now), window):
        q, t = queries[:, first : first + window], now[first : first + window, None]
        near = ~early & (at > t[0] - window) & (at <= t[-1])
        moved = q
        if rotary is not None:
            moved = rotate_by(q, (t[:, 0].clamp(max=sinks + window - 1) - t[:, 0])[None].expand(len(q), -1), rotary)
        group = len(q) // len(keys)
        k, v, far = (part.repeat_interleave(group, 0) for part in (keys[:, near], values, keys[:, early]))
        logits = torch.cat((moved @ far.transpose(1, 2), q @ k.transpose(1, 2)), 2) * q.shape[2] ** -0.5
        seen = torch.cat((at[early] <= t, (at[near] > t - window) & (at[near] <= t)), 1)
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(weights @ torch.cat((v[:, early], v[:, near]), 1))
    return torch.cat(outputs, 1)


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
        if layer in self.full:
            return super().attend_from(layer, queries, keys, values)
        self.append(layer, keys, values)
        held_keys, held_values, positions = self.held(layer)
        states = held_keys, held_values, positions[0]
        outputs = attend_band(queries, states, self.now, self.sinks, self.window, self.rotary)
        stays = (positions[0] < self.sinks) | (positions[0] > self.now[-1] + 1 - self.window)
        self.keep(layer, stays.nonzero()[:, 0].expand(len(keys), -1))
        return outputs


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


def write_with(
    target: Decoder, prompt: Sequence[int], room: int, budget: float, temperature: float, rng: torch.Generator
) -> list[int]:
    """Plain decoding of one prompt: prefill, then one token per forward."""
    return speculate(target, prompt, room, budget, temperature, lambda tokens, most: ([], None), rng)


# -- pruning of tokens ----------------------------------------------------------------------------------------------


class PrunedCache(HeldCache):
    """For each layer the tokens that have come so far; a pass may look at the `visible` positions only.

    `importance` [n] is the attention that the last token paid in the layer that ran last, mean over heads, and
    `candidates` [n] the positions it belongs to. `waiting[s]` are the tokens left behind before stage s (a run of
    layers), as (positions [m], hidden states [m, D]): the auxiliary cache.
    """

    def __init__(self, depth: int, capacity: int) -> None:
        super().__init__(depth)
        self.visible = torch.ones(capacity, dtype=torch.bool)
        self.importance = self.candidates = torch.zeros(0)
        self.waiting: dict[int, tuple[Tensor, Tensor]] = {}

    def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Outputs [H, T, d] of the tokens at `now`, whose last one is the newest token of the text."""
        self.append(layer, keys, values)
        held_keys, held_values, positions = self.held(layer)
        at = positions[0].long()
        looked_at = self.visible[at].nonzero()[:, 0]
        at = at[looked_at]
        outputs, weights = attend(queries, held_keys[:, looked_at], held_values[:, looked_at], at <= self.now[:, None])
        self.importance, self.candidates = weights[:, -1].mean(0), at
        return outputs


class PrunedDecoder(HeldDecoder):
    """Passes whose later layers run over ever fewer tokens, chosen anew for every token that is written.

    LazyLLM (Fu et al. 2024, sections 3.1 to 3.3). After each layer of `cuts` the tokens that the newest token looks
    at least are left behind, but for a share of those that came to this layer. A token that was left behind and is
    chosen later goes on from the hidden state it stopped with, so that none runs twice through a layer. Without
    `revive` it is gone for good: pruning once, in the prefill, and the choice of the prefill stays.
    """

    def __init__(self, model: nn.Module, capacity: int, cuts: Sequence[tuple[int, float]], revive: bool = True) -> None:
        """`cuts`: (layer, share kept after it), ascending."""
        cache = PrunedCache(len(model.model.layers), capacity)
        super().__init__(model, capacity, cache)
        cache.visible = cache.visible.to(self.device)
        self.pruned, self.revive, self.shares = cache, revive, [share for _, share in cuts]
        ends = [layer + 1 for layer, _ in cuts]
        self.stages = list(zip([0, *ends], [*ends, len(self.layers)], strict=True))

    def forward(self, ids: Sequence[int], last: int | None = None) -> Tensor:
        """Logits [1, V] after the last of `ids`, which continue the text."""
        cache, newest = self.pruned, self.length + len(ids) - 1
        at, hidden = torch.arange(self.length, newest + 1, device=self.device), self.embed(ids)
        cache.visible[:] = True
        for stage, (first, stop) in enumerate(self.stages):
            if stage:
                at, hidden = self.choose(stage, at, hidden, newest)
            hidden = self.run(hidden, 0, self.layers[first:stop], positions=at)
        self.length = newest + 1
        return self.logits(hidden[:, -1:])

    def choose(self, stage: int, at: Tensor, hidden: Tensor, newest: int) -> tuple[Tensor, Tensor]:
        """The tokens (positions, hidden states) that run through a stage, out of those that have just run before it.

        Of the visible tokens the most important stay visible. Those among them without keys and values beyond this
        point go on; running tokens that do not go on wait.
        """
        cache = self.pruned
        if self.revive or self.length == 0:
            most = max(1, round(self.shares[stage - 1] * len(cache.candidates)))
            importance = cache.importance.masked_fill(cache.candidates == newest, float("inf"))
            chosen = cache.candidates[importance.topk(most).indices]
        else:
            # The choice of the prefill: whoever has gone on before, and what was written since.
            earlier = cache.positions[self.stages[stage][0]]
            chosen = torch.cat((cast(Tensor, earlier)[0].long(), at[-1:]))
        cache.visible[:] = False
        cache.visible[chosen] = True
        waiting_at, waiting = cache.waiting.get(stage, (at[:0], hidden[0, :0]))
        pool_at, pool = torch.cat((waiting_at, at)), torch.cat((waiting, hidden[0]))
        goes_on = cache.visible[pool_at]
        stays = ~goes_on if self.revive else goes_on & False
        cache.waiting[stage] = pool_at[stays], pool[stays]
        order = pool_at[goes_on].argsort()
        return pool_at[goes_on][order], pool[goes_on][order][None]


def cuts_of(depth: int, shares: Sequence[tuple[float, float]]) -> list[tuple[int, float]]:
    """Cuts of a `PrunedDecoder` from (depth as a share of the layers, share kept), none after the last layer."""
    cuts = {round(depth * part) - 1: share for part, share in shares}
    return [(layer, share) for layer, share in cuts.items() if 0 <= layer < depth - 1]


# -- training with sparse attention ---------------------------------------------------------------------------------


def train_band(
    student: nn.Module,
    rows: list[tuple[list[int], list[int]]],
    full: Sequence[int],
    sinks: int,
    window: int,
    steps: int,
    seed: int,
    progress: Callable[[Iterable[int], str], Iterable[int]],
) -> float:
    """Train a model on whose layers but `full` see what `BandCache` lets them see. Returns the last loss.

    Args:
        rows: (prompt ids, completion ids); the loss is on completions. As `stepmark.backbones.lm.fit` otherwise.
    """
    from stepmark.backbones.lm import Muon, batches

    model: Any = student
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = [Muon(matrices, lr=1.0), torch.optim.AdamW(others, betas=(0.9, 0.98))]
    stream, loss = batches(rows, 2600, seed), torch.zeros(())
    for step in progress(range(steps), "sparse attention"):
        ids, labels = (part.to(model.device) for part in next(stream))
        at = torch.arange(ids.shape[1], device=ids.device)
        near = (at <= at[:, None]) & ((at > at[:, None] - window) | (at < sinks))
        hidden = model.model.embed_tokens(ids)
        rotary = model.model.rotary_emb(hidden, at[None])
        for i, layer in enumerate(model.model.layers):
            hidden = layer(hidden, attention_mask=None if i in full else near[None, None], position_embeddings=rotary)
        wanted = labels >= 0
        loss = nn.functional.cross_entropy(model.lm_head(model.model.norm(hidden)[wanted]), labels[wanted])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps)
            optimiser.step()
            optimiser.zero_grad()
    return float(loss.detach())
