"""Dynamic memory sparsification: each head learns which tokens to evict, some time after it has decided (2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones.lm import EOS, encode
from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.held_cache import HeldCache, HeldDecoder, attend, write_held

WINDOW = 32  # tokens between the decision to evict and the eviction
RATIO = 8.0  # how many times fewer entries training aims at
OFFSET, TAU = 5.0, 0.3  # keeps evictions rare at first; temperature of the relaxed decisions


class DMS(Method):
    """DMS, the cache compression of hyper-scaling: learned, delayed eviction for each head and token.

    From the input h_t of a layer an eviction logit w h_t - 5 is read for each key head (section 3.2). Where it is
    positive, the pair (k_t, v_t) is evicted when it is w = 32 tokens old, not at once: until then the model can carry on
    what it needs of it. In training the decision is relaxed to a_t = sigmoid((logit + noise) / tau) with logistic noise,
    log(1 - a_t) is added to the attention logits of queries w or more tokens later, and the loss is the divergence of the
    student's distribution from the target's own plus max(0, alpha - mean a), where alpha = 1 - 1 / ratio and the
    ratio grows linearly from 1 to 8 in the first 70 % of training and stays (equations 3 and 4). When it runs, slots are
    really freed: heads hold different numbers of tokens.

    Differs from the paper: as in the authors' public recipe the model is frozen and only the small networks that decide
    are trained, reading a normalised h_t, not one neuron of the keys; divergence on the answers, all that the model was
    trained to write; tau is larger, the steps fewer and the window shorter, as texts are. Hyper-scaling, spending the
    saving on longer or more chains, is not part of this task: what is judged is recall at a share of the bytes.
    """

    paper = Paper(
        id="dms_hyper_scaling",
        title="Inference-Time Hyper-Scaling with KV Cache Compression",
        authors="Adrian Łańcucki, Konrad Staniszewski, Piotr Nawrot, Edoardo M. Ponti",
        year=2025,
        arxiv="2506.05345",
        code="NVIDIA/Model-Optimizer",
    )
    tasks = ("recall/needles",)
    baselines = ("autoregressive", "h2o")
    claims = (
        Claim(
            "kv_bytes[dms_hyper_scaling,16] <= 0.25 * kv_bytes[autoregressive,16] "
            "and accuracy[dms_hyper_scaling,16] >= accuracy[autoregressive,16] - 0.05",
            says="four or more times fewer bytes (the paper's 8 times), recall stays",
        ),
        Claim(
            "kv_bytes[dms_hyper_scaling,16] <= 1.1 * kv_bytes[h2o,16] "
            "and accuracy[dms_hyper_scaling,16] > accuracy[h2o,16]",
            says="learned eviction answers more than training-free eviction that holds as much",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """What reads the decisions, untrained: no evictions."""
        config: Any = session.networks["target"].config
        return {"evictor": Evictor(config.num_hidden_layers, config.hidden_size, config.num_key_value_heads)}

    def prepare(self, session: Session) -> None:
        """Distil the frozen target into itself with a sparser cache."""
        model, evictor = session.networks["target"], session.networks["evictor"]
        rows = [
            (encode(prompt), [*encode(target), EOS])
            for prompt, target in zip(session.train["prompt"], session.train["target"], strict=True)
        ]
        optimiser = torch.optim.Adam(evictor.parameters(), lr=1e-2)
        steps = session.scale(300, 1)
        for step in session.progress(range(steps), "eviction"):
            prompt, answer = rows[step % len(rows)]
            text, count = prompt + answer[:-1], len(answer)
            with torch.no_grad():
                truth = HeldDecoder(model, len(text), HeldCache(len(model.model.layers))).forward(text, count)
            soft = SoftCache(len(model.model.layers), evictor, session.rng)
            written = HeldDecoder(model, len(text), soft).forward(text, count).log_softmax(-1)
            divergence = (written.exp() * (written - truth.log_softmax(-1))).sum(-1).mean()
            ratio = 1 + (RATIO - 1) * min(1.0, (step + 1) / (0.7 * steps))
            missing = (1 - 1 / ratio - torch.cat(soft.decisions).mean()).clamp(min=0)
            optimiser.zero_grad()
            (divergence + missing).backward()
            optimiser.param_groups[0]["lr"] = 1e-2 * min(1.0, 2 * (1 - step / steps))
            optimiser.step()

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""

        def decoder(model: nn.Module, length: int, capacity: int) -> Decoder:
            cache = EvictingCache(len(model.model.layers), session.networks["evictor"], WINDOW)
            return HeldDecoder(model, capacity, cache)

        return write_held(session, batch, rung, decoder)


class Evictor(nn.Module):
    """Eviction logits of all layers: a linear map of the layer's normalised input for each key head."""

    def __init__(self, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(depth, width, heads))
        self.bias = nn.Parameter(torch.zeros(depth, heads))

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        """[heads, T] of hidden states [1, T, D]: positive means that the token is to go."""
        normal = nn.functional.rms_norm(hidden[0], hidden.shape[-1:])
        return (normal @ self.weight[layer] + self.bias[layer]).T - OFFSET


class SoftCache(HeldCache):
    """Training: everything is held, and fades by its relaxed decision once it is `WINDOW` tokens old."""

    def __init__(self, depth: int, evictor: nn.Module, rng: torch.Generator) -> None:
        super().__init__(depth)
        self.evictor, self.rng = evictor, rng
        self.decisions: list[Tensor] = []
        self.logits = torch.zeros(0)

    def before(self, layer: int, hidden: Tensor) -> None:
        """Decide, with logistic noise: the difference of two Gumbel draws."""
        logits = self.evictor(hidden, layer)
        u = torch.rand(logits.shape, generator=self.rng, device=logits.device).clamp(1e-6, 1 - 1e-6)
        self.logits = (logits + u.logit()) / TAU
        self.decisions.append(self.logits.sigmoid())

    def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Outputs [H, T, d] of a whole text."""
        age = self.now[:, None] - self.now
        fading = nn.functional.logsigmoid(-self.logits)[:, None]  # log(1 - a)
        return attend(queries, keys, values, age >= 0, torch.where(age >= WINDOW, fading, 0.0))[0]


class EvictingCache(HeldCache):
    """Each head holds what it has not evicted: lists, for each layer and head, of keys, values, positions, decisions."""

    def __init__(self, depth: int, evictor: nn.Module, window: int) -> None:
        super().__init__(depth)
        self.evictor, self.window = evictor, window
        self.heads: list[list[tuple[Tensor, ...]]] = [[] for _ in range(depth)]
        self.doomed = torch.zeros(0, dtype=torch.bool)  # decisions [H, T] on the tokens that run

    def before(self, layer: int, hidden: Tensor) -> None:
        """Decide."""
        self.doomed = self.evictor(hidden, layer) > 0

    def attend_from(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Outputs [H, T, d] of the tokens at `now`; then what the next token may not see is freed."""
        before, after, outputs, t = self.heads[layer], [], [], self.now[:, None]
        for head, asking in enumerate(queries.unflatten(0, (len(keys), -1))):
            entries: tuple[Tensor, ...] = (keys[head], values[head], self.now.int(), self.doomed[head])
            if before:
                entries = tuple(torch.cat(pair) for pair in zip(before[head], entries, strict=True))
            k, v, at, doomed = entries
            seen = (at <= t) & ~(doomed & (t - at >= self.window))
            outputs.append(attend(asking, k[None], v[None], seen[None])[0])
            stays = ~(doomed & (t[-1] + 1 - at >= self.window))
            after.append(tuple(part[stays] for part in entries))
        self.heads[layer] = after
        return torch.cat(outputs)
