"""Drafts from an early exit of the target itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from stepmark.tracks.decoding.decoder import Decoder, KeyValueCache


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
