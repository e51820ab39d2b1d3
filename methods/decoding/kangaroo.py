"""Kangaroo: drafts from a shallow part of the target, with a double early exit (Liu et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from stepmark.backbones.lm import EOS, Muon, batches, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, KeyValueCache, write_each
from stepmark.tracks.decoding.speculation import draft_while_sure, speculate

GAMMA = 6  # tokens drafted at most


class Kangaroo(Method):
    """Kangaroo: the first layers of the target, an adapter and the target's own output head write the drafts.

    First exit: with f_l the first l layers, A the adapter and W the output head, the draft is
    q(. | x) = softmax(W A(f_l(x))). A is one attention layer with two norms and no feed-forward part, trained so that
    q follows the full model's p on the train split (equation 3: minimise -sum_t sum_v p_t(v) log q_t(v)).
    Second exit: drafting stops after the first token with max q < eta (equation 4), or after gamma tokens. The layers
    after l then run once over the hidden states f_l of all drafted tokens, which were kept: the shallow layers do not
    run again. Greedy tokens are kept while they match, sampled ones by the rule of speculative sampling, so that the
    output is the target's own. k drafted tokens and their check take 1 + k l / L evaluations of L layers, the adapter's
    attention beside them.

    Differs from the paper: the adapter's last norm starts as the target's, and Muon trains its matrices, for seconds
    and on texts of the task. A low-confidence token stays in the draft, as in the official code: it is paid for.

    Its control `early_exit_fixed` has no second exit: gamma tokens are drafted per step, however sure they are; the rest and
    the training of the adapter are the same.

    The other half of the paper's comparison with Medusa, 88.7 % fewer parameters, is not claimed: with a vocabulary of this
    size Medusa's heads are small.

    What limits the second exit here: on sums drafts are hardly ever wrong, so that it changes nothing: the headline does
    not turn on it, and what it is worth is asked on stories alone. There several words are often equally good, so that
    the right draft has q < eta and drafting stops for nothing: drafts of fixed length take fewer evaluations. eta is the
    paper's, and is not tuned.
    """

    paper = Paper(
        id="kangaroo",
        title="Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting",
        authors="Fangcheng Liu, Yehui Tang, Zhenhua Liu, Yunsheng Ni, Kai Han, Yunhe Wang",
        year=2024,
        arxiv="2404.18911",
        code="Equationliu/Kangaroo",
    )
    tasks = (
        "greedy/sums_deep",
        "greedy/words_deep",
        "greedy/stories_deep",
        "greedy/sums",
        "greedy/words",
        "greedy/stories",
        "sampling/stories",
    )
    baselines = ("autoregressive", "early_exit_fixed", "speculative", "medusa")
    trainings = 3
    claims = (
        Claim(
            "exact_match[kangaroo,*] >= 1 and 1.4 * latency_ms[kangaroo,64] <= latency_ms[autoregressive,64]",
            says="the output is greedy decoding's, at 1.4 times the speed or more (the paper's 1.4 to 1.7)",
            headline=True,
        ),
        Claim(
            "exact_match[kangaroo,*] >= 1 and 1.4 * latency_ms[kangaroo,96] <= latency_ms[autoregressive,96]",
            says="the same on stories, where drafts are wrong more often",
            task="greedy/stories_deep",
        ),
        Claim(
            "exact_match[kangaroo,*] >= 1 and latency_ms[kangaroo,64] <= latency_ms[medusa,64] "
            "and nfe_equivalent[kangaroo,64] <= nfe_equivalent[medusa_chain,64]",
            says="no slower than Medusa, with one layer of attention in place of its heads, and for no more arithmetic than "
            "when that verifies a single sequence, as in the paper",
        ),
        Claim(
            "exact_match[kangaroo,*] >= 1 and tokens[kangaroo,*] >= tokens[early_exit_fixed,*] "
            "and target_layer_evaluations[kangaroo,96] <= target_layer_evaluations[early_exit_fixed,96] "
            "and latency_ms[kangaroo,96] <= latency_ms[early_exit_fixed,96]",
            says="stopping where the draft is unsure pays, in layers and in time, against drafts of fixed length",
            task="greedy/stories_deep",
            setting="several words are often equally good, so that a right draft has less than the confidence of 0.6 asked for",
        ),
        Claim(
            "token_bias[kangaroo,*] <= 2 and target_layer_evaluations[kangaroo,96] < "
            "target_layer_evaluations[autoregressive,96]",
            says="sampled texts are distributed as the target's, in fewer layer evaluations",
            task="sampling/stories",
        ),
    )

    sure = 0.6  # eta: confidence below which drafting stops
    variants = (
        Variant(
            "early_exit_fixed",
            says="early-exit drafting of fixed length: the draft without its confidence exit",
            sure=0.0,
            baselines=("autoregressive",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The adapter, untrained."""
        return {"adapter": ExitAdapter(session.networks["target"])}

    def prepare(self, session: Session) -> None:
        """Train the adapter."""
        session.networks["adapter"].load_state_dict(session.once(train_adapter))

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        model, adapter = session.networks["target"], session.networks["adapter"]

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            target = EarlyExitDecoder(model, len(prompt) + room, exit_depth(model), adapter)
            cost = target.depth / len(target.layers)

            def propose(tokens: list[int], most: int) -> tuple[list[int], Tensor | None]:
                def after(draft: list[int]) -> Tensor | None:
                    left = target.spent + cost + 1 <= rung
                    return target.exit_logits(draft[-1] if draft else tokens[-1]) if left else None

                return draft_while_sure(after, min(GAMMA, most), target.eos, temperature, session.rng, self.sure)

            return speculate(target, prompt, room, rung, temperature, propose, session.rng)

        return write_each(batch, write)


def exit_depth(model: nn.Module) -> int:
    """Layers before the first exit: 2 of 32 and 3 of 40 as in the paper, 1 of 12."""
    return max(1, len(model.model.layers) // 13)


def train_adapter(session: Session) -> dict[str, Tensor]:
    """Train the network `adapter` on completions of the train split; its weights."""
    texts = list(zip(session.train["prompt"], session.train["target"], strict=True))
    rows = [(encode(prompt), [*encode(text), EOS]) for prompt, text in texts[: session.scale(len(texts), 100)]]
    stored = list(islice(batches(rows, session.scale(1500, 300), session.seed), session.scale(40, 2)))
    adapter, target = session.networks["adapter"], session.networks["target"]
    train_exit_adapter(adapter, target, exit_depth(target), stored, session.scale(400, 6), session.progress)
    return adapter.state_dict()


class ExitAdapter(nn.Module):
    """From the hidden states of a shallow layer to the output embedding: h -> norm(h + attention(norm(h))).

    Section 3.1: one attention layer of the target's own shape and two norms, no feed-forward part. The output head is the
    target's.
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
