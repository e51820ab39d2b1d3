"""LESS: an evicting cache with a small recurrent state for what was evicted (Dong et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones.lm import encode
from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.held_cache import HeavyHitterCache, HeldCache, HeldDecoder, write_held

HEAVY, RECENT = 0.1, 0.1  # of the prompt's tokens, as in h2o
RANK, HIDDEN = 8, 64  # of the feature maps
INSTEAD = 4  # entries of the cache that the state takes the place of: rank x (1 + 1 / head size) / 2, rounded down


class LESS(Method):
    """LESS: H2O, and a constant-size state for each head that absorbs the keys and values that H2O evicts.

    Whenever (k, v) is evicted, H <- H + psi(k)^T v and z <- z + psi(k)^T (equation 4). A query then attends to the
    kept tokens exactly and to the evicted ones through the state, under one normaliser (equation 3):

        a = (phi(q) H + sum over kept of exp(q k / sqrt(d)) v) / (phi(q) z + sum over kept of exp(q k / sqrt(d)))

    phi(q) = |gelu(gelu(q W1) W2)| and psi(k) = |u + (u W3) s2| with u = |s1| gelu(gelu(k U1) U2) are small
    networks for each layer and head, of rank 8; s1 and s2 start at 1e-4, so that the state starts out nearly silent.
    They are trained layer by layer with the model frozen, to give the full cache's attention output (squared error) from
    the layer's true queries, keys and values with the policy's mask. The cache holds 4 tokens fewer than `h2o`, whose
    bytes the state takes.

    Differs from the paper: the policy's mask in training is that of an eviction at some point of the text, with the next
    tokens as queries, as the prefill makes it, instead of one eviction per token; the error is that of each head's output,
    before the projection that joins the heads, relative to its size; seconds of training on a few texts.

    What limits it here: a needle is one exact fact among many, and a state of low rank that sums up all evicted tokens blurs
    them; the gain on language modelling, where an average of the past helps, is not what this task asks for.
    """

    paper = Paper(
        id="less_kv",
        title="Get More with LESS: Synthesizing Recurrence with KV Cache Compression for Efficient LLM Inference",
        authors="Harry Dong, Xinyu Yang, Zhenyu Zhang, Zhangyang Wang, Yuejie Chi, Beidi Chen",
        year=2024,
        arxiv="2402.09398",
        code="hdong920/LESS",
    )
    tasks = ("recall/needles",)
    baselines = ("h2o", "autoregressive")
    claims = (
        Claim(
            "kv_bytes[less_kv,16] <= 1.01 * kv_bytes[h2o,16] "
            "and accuracy[less_kv,16] - accuracy[h2o,16] >= 0.2 * (accuracy[autoregressive,16] - accuracy[h2o,16]) "
            "and accuracy[less_kv,16] > accuracy[h2o,16]",
            says="a fifth or more of the answers that H2O loses come back, at the same bytes",
        ),
        Claim(
            "first_divergence[less_kv,16] > first_divergence[h2o,16]",
            says="the text follows that of the full cache for longer than H2O's, at the same bytes",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """phi and psi of all layers and heads, untrained."""
        config: Any = session.networks["target"].config
        size = config.hidden_size // config.num_attention_heads
        return {
            "kernels": Kernels(config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, size)
        }

    def prepare(self, session: Session) -> None:
        """Record queries, keys and values of some texts, then train the feature maps, all layers side by side."""
        model, kernels = session.networks["target"], cast(Kernels, session.networks["kernels"])
        texts = [
            encode(f"{prompt} {target}")
            for prompt, target in zip(session.train["prompt"], session.train["target"], strict=True)
        ]
        lessons = []
        for text in texts[: session.scale(48, 1)]:
            seen = Recorder(len(model.model.layers))
            with torch.no_grad():
                HeldDecoder(model, len(text), seen).forward(text, last=1)
            lessons.append(lesson(seen, len(text), session.rng))
        steps = session.scale(600, 2)
        optimiser = torch.optim.Adam(kernels.parameters(), lr=3e-3)
        for step in session.progress(range(steps), "feature maps"):
            optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
            loss = kernels.error(*lessons[step % len(lessons)])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(kernels.parameters(), 1.0)
            optimiser.step()

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""

        def decoder(model: nn.Module, length: int, capacity: int) -> Decoder:
            heavy, recent = max(1, round(HEAVY * length) - INSTEAD), max(1, round(RECENT * length))
            cache = RecurrentCache(len(model.model.layers), heavy, recent, session.networks["kernels"])
            return HeldDecoder(model, capacity, cache)

        return write_held(session, batch, rung, decoder)


class RecurrentCache(HeavyHitterCache):
    """H2O whose evicted entries go into H [heads, rank, d] and z [heads, rank, 1] of their layer."""

    def __init__(self, depth: int, heavy: int, recent: int, kernels: nn.Module) -> None:
        super().__init__(depth, heavy, recent)
        self.kernels = kernels
        self.absorbed: list[tuple[Tensor, Tensor] | None] = [None] * depth

    def keep(self, layer: int, kept: Tensor) -> None:
        """Absorb what is not kept, then let go of it."""
        keys, values, _ = self.held(layer)
        gone = torch.ones_like(keys[..., :1]).scatter(1, kept[..., None], 0.0)
        features = self.kernels(layer, keys, "psi") * gone
        state, total = features.transpose(1, 2) @ values, features.sum(1)[..., None]
        before = self.absorbed[layer]
        self.absorbed[layer] = (state, total) if before is None else (before[0] + state, before[1] + total)
        super().keep(layer, kept)

    def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Outputs [H, T, d]; before anything was evicted those of full attention."""
        absorbed = self.absorbed[layer]  # before this pass evicts
        if absorbed is None:
            return super().attend_from(layer, queries, keys, values)
        self.append(layer, keys, values)
        held_keys, held_values, positions = self.held(layer)
        seen = positions[:, None] <= self.now[:, None]
        outputs, weights = combine(
            queries, held_keys, held_values, seen, self.kernels(layer, queries, "phi"), *absorbed
        )
        self.evict(layer, weights)
        return outputs


def combine(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, features: Tensor, state: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """Equation 3: outputs [H, T, d], and the softmax weights [H, T, n] over the kept tokens alone."""
    group = len(queries) // len(keys)
    keys, values, seen, state, total = (
        part.repeat_interleave(group, 0) for part in (keys, values, seen.expand(len(keys), -1, -1), state, total)
    )
    logits = (queries @ keys.transpose(1, 2) * queries.shape[2] ** -0.5).masked_fill(~seen, float("-inf"))
    top = logits.amax(-1, keepdim=True)
    kept, low = (logits - top).exp(), features * (-top).exp()
    mass = kept.sum(-1, keepdim=True)
    return (kept @ values + low @ state) / (mass + low @ total), kept / mass


class Kernels(nn.Module):
    """The feature maps phi (one for each query head) and psi (one for each key head) of every layer."""

    def __init__(self, depth: int, heads: int, shared: int, size: int) -> None:
        super().__init__()

        def uniform(*shape: int) -> nn.Parameter:
            bound = (3 / (shape[-2] + RANK)) ** 0.5
            return nn.Parameter(torch.empty(depth, *shape).uniform_(-bound, bound))

        self.w1, self.w2 = uniform(heads, size, HIDDEN), uniform(heads, HIDDEN, RANK)
        self.u1, self.u2 = uniform(shared, size, HIDDEN), uniform(shared, HIDDEN, RANK)
        self.w3 = uniform(shared, RANK, RANK)
        self.s1, self.s2 = (nn.Parameter(torch.full((depth, shared, 1, RANK), 1e-4)) for _ in range(2))

    def forward(self, layer: int | slice, states: Tensor, which: str) -> Tensor:
        """Non-negative features [.., T, rank] of queries (which = "phi") or keys ("psi") [.., T, d]."""
        if which == "phi":
            return F.gelu(F.gelu(states @ self.w1[layer]) @ self.w2[layer]).abs()
        u = self.s1[layer].abs() * F.gelu(F.gelu(states @ self.u1[layer]) @ self.u2[layer])
        return (u + u @ self.w3[layer] * self.s2[layer]).abs()

    def error(self, queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, gone: Tensor, truth: Tensor) -> Tensor:
        """Squared error of the combined outputs over that of silence, mean over layers. All tensors begin with [L]."""
        depth, heads = queries.shape[:2]
        features = self(slice(None), keys, "psi") * gone[..., None]
        state, total = features.transpose(-1, -2) @ values, features.sum(-2)[..., None]
        low = self(slice(None), queries, "phi")
        flat = [part.flatten(0, 1) for part in (queries, keys, values, seen, low, state, total)]
        outputs = combine(*flat)[0].unflatten(0, (depth, heads))
        error, size = ((part**2).sum((1, 2, 3)) for part in (outputs - truth, truth))
        return (error / size).mean()


class Recorder(HeldCache):
    """Full attention that notes queries, keys, values and the weights that each key got."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As full attention."""
        self.seen.append((queries, keys, values))
        return super().attend_from(layer, queries, keys, values)


def lesson(seen: Recorder, length: int, rng: torch.Generator, questions: int = 24) -> tuple[Tensor, ...]:
    """What `Kernels.error` takes: H2O evicts at a random point of the second half, the next tokens ask."""
    queries, keys, values = (torch.stack(part) for part in zip(*seen.seen, strict=True))
    # Half of the lessons ask from where the answers begin: the last tokens of the text.
    last = bool(torch.rand((), generator=rng, device=rng.device) < 0.5)
    point = torch.randint(length // 2, length - questions, (), generator=rng, device=rng.device)
    cut = length - questions if last else int(point)
    group = queries.shape[1] // keys.shape[1]
    at = torch.arange(length, device=keys.device)
    asking = queries[:, :, cut : cut + questions]
    shared_keys, shared_values = (part.repeat_interleave(group, 1) for part in (keys, values))

    def weights(q: Tensor, t: Tensor) -> Tensor:
        logits = q @ shared_keys.transpose(-1, -2) * q.shape[-1] ** -0.5
        return logits.masked_fill(at > t[:, None], float("-inf")).softmax(-1)

    scores = weights(queries[:, :, :cut], at[:cut]).sum(2).unflatten(1, (-1, group)).mean(2)[..., :cut]
    heavy, recent = round(HEAVY * cut) - INSTEAD, round(RECENT * cut)
    gone = torch.ones_like(keys[..., 0])
    gone.scatter_(2, scores[..., : cut - recent].topk(heavy).indices, 0.0)
    gone[..., cut - recent :] = 0.0
    t = at[cut : cut + questions]
    visible = (at <= t[:, None]) & (gone[..., None, :] == 0)
    return asking, keys, values, visible, gone, weights(asking, t) @ shared_values
