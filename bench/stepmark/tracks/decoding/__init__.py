"""Track decoding: how much of a text a language model writes with a budget of its own forward passes.

A rung is a number of target forwards per prompt: one target forward is all decoder layers once, over however many
positions the call holds; a call that runs some of the layers costs its share. The prefill is a forward and gives the
first token. Decoding ends with the end-of-sequence token, after `max_new_tokens`, or when the budget allows no
further forward. Plain decoding gets one token per forward, so the curve over the rungs is quality against forwards.

`run` receives {"prompt": lists of token ids, "max_new_tokens": ints, "temperature": floats (0: greedy)} and returns
one list of new token ids per prompt, at most `max_new_tokens` long, nothing after the end-of-sequence token.

The algorithms that methods share stand below: a key/value cache with rollback (`KeyValueCache`), forward passes on it
and runs of single layers (`Decoder`, `run_layers`), drafts from an early exit (`EarlyExitDecoder`), the
draft-and-verify loop (`speculate`), greedy verification, the acceptance rule of speculative sampling, prompt lookup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import BadOutput, Score, Task, harness_only, load_split

TASKS = (
    Task(
        id="greedy/sums",
        version=1,
        summary="Greedy decoding of column additions, 4-layer target",
        dataset="sums",
        backbones={"target": "lm_target", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(8, 16, 32, 64),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
    Task(
        id="greedy/words",
        version=1,
        summary="Greedy decoding of word problems, 4-layer target",
        dataset="words",
        backbones={"target": "lm_target", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(4, 8, 16, 32),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
    Task(
        id="greedy/hops",
        version=1,
        summary="Greedy decoding of multi-hop answers, 4-layer target",
        dataset="hops",
        backbones={"target": "lm_target", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(4, 8, 16, 24),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
    Task(
        id="greedy/words_weak",
        version=1,
        summary="Greedy decoding of word problems, 1-layer target that is often wrong",
        dataset="words",
        backbones={"target": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(16, 32, 64),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=192,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
    Task(
        id="greedy/hops_weak",
        version=1,
        summary="Greedy decoding of multi-hop answers, 1-layer target that is often wrong",
        dataset="hops",
        backbones={"target": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(12, 24, 48),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=192,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
    Task(
        id="greedy/stories",
        version=1,
        summary="Greedy decoding of stories with a refrain, 4-layer target",
        dataset="stories",
        backbones={"target": "lm_target", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(8, 16, 32, 64, 96),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
    Task(
        id="greedy/sums_deep",
        version=1,
        summary="Greedy decoding of column additions, 12-layer target",
        dataset="sums",
        backbones={"target": "lm_deep", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(8, 16, 32, 64),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(4,),
        probe=1,
    ),
    Task(
        id="greedy/words_deep",
        version=1,
        summary="Greedy decoding of word problems, 12-layer target",
        dataset="words",
        backbones={"target": "lm_deep", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(4, 8, 16, 32),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(4,),
        probe=1,
    ),
    Task(
        id="greedy/stories_deep",
        version=1,
        summary="Greedy decoding of stories with a refrain, 12-layer target",
        dataset="stories",
        backbones={"target": "lm_deep", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(8, 16, 32, 64, 96),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(4,),
        probe=1,
    ),
    Task(
        id="sampling/stories",
        version=1,
        summary="Sampling of stories at temperature 1: lossless means the same distribution, 4-layer target",
        dataset="stories",
        backbones={"target": "lm_target", "draft": "lm_draft"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(8, 16, 32, 64, 96),
        metrics={"accuracy": "higher", "token_bias": "lower", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
)

MAX_NEW_TOKENS = {"sums": 64, "words": 40, "hops": 24, "stories": 96}
# Two logits closer than this count as tied: cached and uncached passes differ by rounding.
TIE = 1e-4


# -- what the harness calls ---------------------------------------------------------------------------------------


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` distinct prompts of the test split."""
    from stepmark.backbones.lm import encode

    harness_only("the test split")
    prompts = load_split(task.dataset, "test")["prompt"]
    chosen = torch.randperm(len(prompts), generator=generator)[:n].tolist()
    return {
        "prompt": [encode(prompts[i]) for i in chosen],
        "max_new_tokens": [MAX_NEW_TOKENS[task.dataset]] * n,
        "temperature": [1.0 if task.id.startswith("sampling/") else 0.0] * n,
    }


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """One list of valid token ids per prompt, not empty, not too long, nothing after the end of the sequence."""
    from stepmark.backbones.lm import EOS, VOCABULARY

    if not isinstance(outputs, list) or len(outputs) != len(batch["prompt"]):
        raise BadOutput(f"run must return a list of {len(batch['prompt'])} lists of token ids")
    for ids, limit in zip(outputs, batch["max_new_tokens"], strict=True):
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < len(VOCABULARY) for i in ids):
            raise BadOutput(f"every output must be a list of ints in [0, {len(VOCABULARY)})")
        if not 1 <= len(ids) <= limit:
            raise BadOutput(f"an output has {len(ids)} tokens; allowed are 1 to {limit}")
        if EOS in ids[:-1]:
            raise BadOutput("an output goes on after its end-of-sequence token")


def solved(task: Task, prompt: Sequence[int], output: Sequence[int]) -> bool:
    """Whether an output is complete and right: its answer (stories: a text of the grammar)."""
    from stepmark.backbones.lm import EOS, decode
    from stepmark.datasets.stories import valid

    if not output or output[-1] != EOS:
        return False
    question, text = decode(list(prompt)), decode(list(output))
    if task.dataset == "stories":
        return bool(valid(question, text))
    return text.rpartition("ans ")[2] == _answers(task.dataset)[question]


def _answers(dataset: str) -> dict[str, str]:
    data = load_split(dataset, "test")
    return dict(zip(data["prompt"], data["answer"], strict=True))


def agreement(network: nn.Module, prompt: Sequence[int], output: Sequence[int]) -> int:
    """How many leading tokens of `output` are those of plain greedy decoding.

    One forward over prompt and output, without a cache: token i is greedy if it has the greatest logit after all
    tokens before it, and by induction the prefix up to the first other token is the greedy continuation.
    """
    device = next(network.parameters()).device
    with torch.no_grad():
        logits = network(torch.tensor([[*prompt, *output[:-1]]], device=device)).logits[0, len(prompt) - 1 :].float()
    taken = logits.gather(1, torch.tensor(output, device=device)[:, None])[:, 0]
    wrong = (taken < logits.amax(1) - TIE).nonzero()
    return int(wrong[0]) if len(wrong) else len(output)


def token_deviation(network: nn.Module, prompt: Sequence[int], output: Sequence[int]) -> tuple[Tensor, float]:
    """How far the words of an output are from those its own distributions promise.

    Returns the sum over positions of onehot(token) - p, [V], and the sum over positions and words of p (1 - p). For
    tokens drawn from p the first is a martingale whose summed variance is the expectation of the second, wherever a
    budget or the end of the text stops it.
    """
    device = next(network.parameters()).device
    with torch.no_grad():
        logits = network(torch.tensor([[*prompt, *output[:-1]]], device=device)).logits[0, len(prompt) - 1 :]
    p = logits.double().softmax(-1)
    counted = torch.bincount(torch.tensor(output, device=device), minlength=p.shape[1])
    return (counted - p.sum(0)).cpu(), float((p * (1 - p)).sum())


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: list[list[int]],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all prompts, from the token ids alone.

    accuracy: share of prompts whose text is complete and right. exact_match: share of outputs that are plain greedy
    decoding's, as a prefix where the budget ended. first_divergence: mean number of leading tokens that are. tokens:
    mean number of new tokens. token_bias (sampling): squared deviation of the word counts from what the target's own
    distributions promise, over its expectation for exact samples: about 1 if lossless, greater if words are favoured.
    """
    harness_only("scoring")
    prompts = batch["prompt"]
    lengths = np.array([len(ids) for ids in outputs], dtype=float)
    right = np.array([solved(task, p, ids) for p, ids in zip(prompts, outputs, strict=True)], dtype=float)
    found = {"accuracy": _mean(right, resample), "tokens": _mean(lengths, resample)}
    if "token_bias" in task.metrics:
        pairs = [token_deviation(networks["target"], p, o) for p, o in zip(prompts, outputs, strict=True)]
        deviation, expected = torch.stack([d for d, _ in pairs]).numpy(), np.array([e for _, e in pairs])
        bias = [float((deviation[rows].sum(0) ** 2).sum() / expected[rows].sum()) for rows in resample]
        value = float((deviation.sum(0) ** 2).sum() / expected.sum())
        return found | {"token_bias": Score(value, bias)}
    agreeing = np.array(
        [agreement(networks["target"], p, o) for p, o in zip(prompts, outputs, strict=True)], dtype=float
    )
    found["exact_match"] = _mean((agreeing == lengths).astype(float), resample)
    found["first_divergence"] = _mean(agreeing, resample)
    return found


def _mean(values: NDArray[np.float64], resample: NDArray[np.int64]) -> Score:
    return Score(float(values.mean()), values[resample].mean(axis=1).tolist())


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """None: everything costly here is a network."""
    return {}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """One target forward over one position, what plain decoding pays for a token."""
    target = networks["target"]
    target(torch.tensor([batch["prompt"][0][-1:]], device=next(target.parameters()).device), use_cache=False)
    return 1


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """The decoder layers: all of them once are one evaluation. A network without any is counted by its forward."""
    return list(getattr(getattr(network, "model", None), "layers", []))


# -- cache, forward passes, single layers ---------------------------------------------------------------------------


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
        """Input embeddings [1, T, D]."""
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
        """Forget all tokens but the first `length`."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back from {self.length} to {length} tokens")
        self.length = length


# -- early exit -----------------------------------------------------------------------------------------------------


class ExitAdapter(nn.Module):
    """From the hidden states of a shallow layer to the output embedding: h -> norm(h + attention(norm(h))).

    The adapter of Kangaroo (Liu et al. 2024, section 3.1): one attention layer of the target's own shape and two
    norms, no feed-forward part. The output head is the target's.
    """

    def __init__(self, model: nn.Module) -> None:
        """Untrained, for the target `model`; the second norm starts as the target's last one."""
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

        super().__init__()
        config: Any = model.config
        self.input_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = LlamaAttention(config, layer_idx=0)
        self.output_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output_norm.load_state_dict(cast(Any, model).model.norm.state_dict())

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D], ready for the output head; arguments as in `run_layers`."""
        attended, _ = self.attention(
            self.input_norm(hidden), position_embeddings=rotary, attention_mask=mask, past_key_values=cache
        )
        return self.output_norm(hidden + attended)


def train_exit_adapter(
    adapter: nn.Module,
    model: nn.Module,
    depth: int,
    batches: Sequence[tuple[Tensor, Tensor]],
    steps: int,
    progress: Callable[[Iterable[int], str], Iterable[int]],
) -> float:
    """Train an adapter after `depth` layers: cross-entropy between the target's distribution and the early exit's.

    The target runs once over each batch; the adapter then learns from the stored states, batch after batch.

    Args:
        batches: (ids, labels), int64 [B, L]; positions with a label below 0 do not count.

    Returns: mean over tokens of sum_v min(p, q), the rate of acceptance in sampling, at the last step.
    """
    from stepmark.backbones.lm import Muon

    target: Any = model
    stored = []
    for i in progress(range(len(batches)), "hidden states"):
        ids, labels = (part.to(target.device) for part in batches[i])
        with torch.no_grad():
            early = target.model.embed_tokens(ids)
            rotary = target.model.rotary_emb(early, torch.arange(ids.shape[1], device=ids.device)[None])
            for layer in target.model.layers[:depth]:
                early = layer(early, attention_mask=None, position_embeddings=rotary)
            hidden = early
            for layer in target.model.layers[depth:]:
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
            p = target.lm_head(target.model.norm(hidden)[labels >= 0]).softmax(-1)
        stored.append((early, rotary, labels >= 0, p))
    optimisers: list[torch.optim.Optimizer] = [
        Muon([w for w in adapter.parameters() if w.ndim == 2], lr=1e-2),
        torch.optim.AdamW([w for w in adapter.parameters() if w.ndim != 2], lr=1e-2, weight_decay=0.0),
    ]
    overlap = 0.0
    for step in progress(range(steps), "early-exit adapter"):
        early, rotary, wanted, p = stored[step % len(stored)]
        log_q = target.lm_head(adapter(early, rotary)[wanted]).log_softmax(-1)
        (-(p * log_q).sum(-1).mean()).backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = 1e-2 * min(1.0, (step + 1) / 20) * (1 - step / steps)
            optimiser.step()
            optimiser.zero_grad()
        overlap = float(torch.minimum(p, log_q.detach().exp()).sum(-1).mean())
    return overlap


class EarlyExitDecoder(Decoder):
    """A decoder whose first `depth` layers, an adapter and the output head write the drafts.

    Hidden states of drafted tokens are kept, so that verification (`forward`) runs the layers after `depth` only: k
    drafted tokens and their verification take 1 + k depth / layers evaluations. The adapter has a cache of its own.
    """

    def __init__(self, model: nn.Module, capacity: int, depth: int, adapter: nn.Module) -> None:
        super().__init__(model, capacity)
        self.depth, self.adapter = depth, adapter
        self.ahead = 0  # slots from `length` on that the first layers have run over
        self.adapted = 0  # slots that the adapter has run over
        self._early = self.embed([0]).new_empty(1, capacity, self.model.config.hidden_size)
        self._adapter_cache = KeyValueCache(1, capacity)

    def _shallow(self, ids: Sequence[int]) -> None:
        start = self.length + self.ahead
        self._early[:, start : start + len(ids)] = self.run(self.embed(ids), start, self.layers[: self.depth])
        self.ahead += len(ids)

    def exit_logits(self, token: int) -> Tensor:
        """Logits [V] of the early exit after one more token; costs depth / layers evaluations."""
        self._shallow([token])
        start, stop = self.adapted, self.length + self.ahead
        mask = self._causal[start:stop, :stop][None, None] if 0 < start < stop - 1 else None
        self._adapter_cache.start = start
        rotary = self._cos[:, start:stop], self._sin[:, start:stop]
        hidden = self.adapter(self._early[:, start:stop], rotary, mask, self._adapter_cache)
        self.adapted = stop
        return self.model.lm_head(hidden[:, -1])[0]

    def forward(self, ids: Sequence[int], last: int | None = None) -> Tensor:
        """As in `Decoder`; the first layers are run only over those of `ids` that `exit_logits` has not seen."""
        if len(ids) > self.ahead:
            self._shallow(ids[self.ahead :])
        start, stop = self.length, self.length + len(ids)
        hidden = self.run(self._early[:, start:stop], start, self.layers[self.depth :])
        self.length, self.ahead = stop, 0
        return self.logits(hidden if last is None else hidden[:, -last:])

    def rollback(self, length: int) -> None:
        """As in `Decoder`, and what was run ahead of `length` is forgotten."""
        super().rollback(length)
        self.ahead, self.adapted = 0, min(self.adapted, length)


# -- draft and verify -----------------------------------------------------------------------------------------------


def verify_greedy(draft: Sequence[int], greedy: Sequence[int]) -> list[int]:
    """Longest agreeing prefix of a draft, and the target's own token after it.

    `greedy` are the target's greedy tokens after the context, after draft[:1], ...: one more than the draft has.
    """
    kept = 0
    while kept < len(draft) and draft[kept] == greedy[kept]:
        kept += 1
    return [*draft[:kept], greedy[kept]]


def draw(p: Tensor, u: float) -> int:
    """The token whose cumulative probability first exceeds u in [0, 1); p [V] need not be normalised."""
    cumulative = p.double().cumsum(0)
    token = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    return token if token < len(p) else int(p.nonzero()[-1])


def verify_sampling(draft: Sequence[int], p: Tensor, q: Tensor, u: Sequence[float]) -> list[int]:
    """Speculative sampling: the tokens kept of a draft, and one more; each is distributed as the target's.

    Leviathan et al. 2023, algorithm 1: keep x with probability min(1, p(x)/q(x)); at the first rejection draw from
    norm(max(0, p - q)); after a fully kept draft draw from p.

    Args:
        p: target's distributions [len(draft) + 1, V]. q: the draft's [len(draft), V]. u: len(draft) + 1 uniforms.
    """
    if draft:
        index = torch.tensor(list(draft), device=p.device)[:, None]
        ratio = (p[:-1].gather(1, index) / q.gather(1, index))[:, 0].tolist()
    for i in range(len(draft)):
        if u[i] >= ratio[i]:
            residual = (p[i] - q[i]).clamp(min=0)
            return [*draft[:i], draw(residual if residual.any() else p[i], u[-1])]
    return [*draft, draw(p[-1], u[-1])]


Step = tuple[list[int], list[int]]


def steps_of(decode: Callable[[], Any], method: Any, spent: Callable[[], float]) -> tuple[list[int], list[Step]]:
    """Let a method decode one prompt and listen. Harness only.

    Returns: the new tokens, and what each step drafted and wrote; a step writes the kept part of its draft and one token
    more. Drafts are seen where `verify_greedy` or `verify_sampling` check them. Of several that are checked between two
    evaluations, the one that is kept furthest counts; an evaluation after which none is checked wrote one token. A tree
    is seen where one branch of it stays in the cache; its draft is that branch and then the tokens of other nodes. []
    where the steps do not add up to the text, as of methods that check by other means.

    Args:
        decode: runs the method on a batch of one. spent: evaluations so far.
    """
    steps: list[Step] = []
    trees: list[Step] = []  # without the token more
    times: list[float] = []
    grown: list[float] = []
    asked: dict[int, list[int]] = {}
    here, there = globals(), method.run.__globals__
    embed, compact = Decoder.embed, KeyValueCache.compact

    def listening(verify: Callable[..., list[int]]) -> Callable[..., list[int]]:
        def heard(draft: Sequence[int], *rest: Any) -> list[int]:
            new = verify(draft, *rest)
            if not times or spent() > times[-1]:
                steps.append((list(draft), new))
                times.append(spent())
            elif len(new) > len(steps[-1][1]):
                steps[-1] = list(draft), new
            return new

        return heard

    def embedding(decoder: Decoder, ids: Sequence[int]) -> Tensor:
        asked[id(decoder.cache)] = list(ids)
        return embed(decoder, ids)

    def compacting(cache: KeyValueCache, start: int, kept: Sequence[int]) -> None:
        nodes, stay = asked.get(id(cache), []), [slot - start for slot in kept]
        if not steps and stay[:1] == [0] and stay[-1] < len(nodes) and (not grown or spent() > grown[-1]):
            grown.append(spent())  # a draft model's own cache, which follows, is no step
            branch = [nodes[node] for node in stay[1:]]
            others = dict.fromkeys(nodes[node] for node in range(1, len(nodes)) if node not in stay)
            trees.append(([*branch, *others], branch))
        compact(cache, start, kept)

    before = [
        (names, key, value)
        for names in (here, there)
        for key, value in list(names.items())
        if value is verify_greedy or value is verify_sampling
    ]
    try:
        for names, key, value in before:
            names[key] = listening(value)
        Decoder.embed, KeyValueCache.compact = embedding, compacting  # type: ignore[method-assign]
        written: list[int] = list(decode()[0])
    finally:
        for names, key, value in before:
            names[key] = value
        Decoder.embed, KeyValueCache.compact = embed, compact  # type: ignore[method-assign]
    for found in (list(_branches(written, trees)), steps, list(_filled(written, steps, times))):
        if found and [token for _, new in found for token in new][: len(written)] == written:
            return written, found
    return written, []


def _branches(written: list[int], trees: Sequence[Step]) -> Iterable[Step]:
    """The steps of trees: after the token of the prompt's own forward, each branch and the target's token after it."""
    if trees:
        yield [], written[:1]
    at = 1
    for draft, branch in trees:
        yield draft, (branch + written[at + len(branch) : at + len(branch) + 1])[: len(written) - at]
        at += len(branch) + 1


def _filled(written: list[int], steps: Sequence[Step], times: Sequence[float]) -> Iterable[Step]:
    """The steps, and for each evaluation between two of them one that drafted nothing."""
    at, before = 0, 0.0
    for (draft, new), time in zip(steps, times, strict=True):
        for _ in range(round(time - before) - 1):
            yield [], written[at : at + 1]
            at += 1
        yield draft, new
        at, before = at + len(new), time
    yield from (([], [token]) for token in written[at:])


Propose = Callable[[list[int], int], tuple[list[int], "Tensor | None"]]


def speculate(
    target: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    budget: float,
    temperature: float,
    propose: Propose,
    rng: torch.Generator | None = None,
) -> list[int]:
    """Draft-and-verify decoding of one prompt; lossless for any `propose`.

    Args:
        budget: evaluations the target may spend on this prompt, including what `propose` spends on it.
        propose: (all tokens so far, how many it may draft at most) -> (draft, its distributions [len(draft), V], or
            None for a certain draft, q(x) = 1). With an empty draft the step is plain decoding.
        rng: needed above temperature 0.

    Returns: new token ids.
    """
    tokens = list(prompt)
    end = len(prompt) + max_new_tokens
    logits = target.forward(tokens, last=1)
    draft: list[int] = []
    q: Tensor | None = None
    while True:
        if temperature == 0:
            new = verify_greedy(draft, logits.argmax(-1).tolist())
        else:
            u = torch.rand(len(draft) + 1, generator=rng, device=target.device).tolist()
            p = (logits.double() / temperature).softmax(-1)
            if q is None:
                q = nn.functional.one_hot(torch.tensor(draft, device=p.device, dtype=torch.long), p.shape[1]).to(p)
            new = verify_sampling(draft, p, q.to(p), u)
        if target.eos in new:
            new = new[: new.index(target.eos) + 1]
        target.rollback(min(target.length, len(tokens) + len(new) - 1))
        tokens += new
        if tokens[-1] == target.eos or len(tokens) >= end or target.spent + 1 > budget + 1e-9:
            return tokens[len(prompt) : end]
        draft, q = propose(tokens, end - len(tokens) - 1)
        if target.spent + 1 > budget + 1e-9:
            return tokens[len(prompt) :]
        logits = target.forward([tokens[-1], *draft])


def prompt_lookup(tokens: Sequence[int], longest: int, length: int) -> list[int]:
    """Draft by lookup: what followed the most recent earlier occurrence of the longest n-gram that ends the text.

    Args:
        longest: greatest n tried, down to 1. length: tokens to draft at most.
    """
    end = len(tokens)
    for n in range(min(longest, end - 1), 0, -1):
        tail = tokens[end - n :]
        for i in range(end - n - 1, -1, -1):
            if tokens[i : i + n] == tail:
                return list(tokens[i + n : i + n + length])
    return []
