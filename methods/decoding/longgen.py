"""LongGen: a third of the layers see everything, the others sinks and a window (Ge et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stepmark.backbones.lm import EOS, Muon, batches, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.held_cache import BandCache, HeldDecoder, write_held

SINKS, WINDOW = 4, 64


class LongGen(Method):
    """LongGen: a language model becomes a hybrid of full and sparse attention by a little training on long texts.

    Section 3 of the paper: the middle third of the layers keeps full attention, the layers below and above see the first
    4 tokens and the last 64 only (its window and attention-sink pattern), and the whole model is trained on with the
    loss of language modelling. When it runs, sparse layers hold what they may see and nothing else, and they read a
    text in work linear in its length. Distances are those of the text; unlike StreamingLLM nothing is moved, because
    the model has been trained with what it sees.

    Its control `sink_window_trained` has no full layers: every layer sees the first 4 tokens and the last 64, and the model is
    trained on so for as many steps on the same texts. Information travels 64 tokens per layer at most, so that six layers
    reach back 378 tokens: what stands further away is out of reach. `full_attention_trained` is trained on as it is: what
    the same steps on the same texts do for full attention.

    An answer has 13 tokens, so that only the last rung says whether it is right.

    Differs from the paper: the model already reads texts of this length, so that neither the context nor the base of the
    rotary embedding is extended here, only the architecture changes; the training is 150 steps on a few hundred texts
    with the loss on the answers; the blockwise pattern is left out. Training reads whole texts under dense masks, so that
    the training time that the paper saves (1.55 times as fast) is not saved here and not claimed.

    What limits it here: in the prefill alone the cache shrinks by a little less than 60 %. What is held is counted at the
    start of a layer, so that the last one, which is sparse, has no part in it yet.
    """

    paper = Paper(
        id="longgen",
        title="A Little Goes a Long Way: Efficient Long Context Training and Inference with Partial Contexts",
        authors="Suyu Ge, Xihui Lin, Yunan Zhang, Jiawei Han, Hao Peng",
        year=2024,
        arxiv="2410.01485",
    )
    tasks = ("recall/needles",)
    baselines = ("full_attention_trained", "autoregressive", "sink_window_trained", "sink_window")
    trainings = 3
    claims = (
        Claim(
            "kv_bytes[longgen,*] <= 0.4 * kv_bytes[full_attention_trained,*] "
            "and 1.67 * latency_ms[longgen,1] <= latency_ms[full_attention_trained,1] "
            "and 1.41 * (latency_ms[longgen,16] - latency_ms[longgen,1]) "
            "<= latency_ms[full_attention_trained,16] - latency_ms[full_attention_trained,1] "
            "and accuracy[longgen,16] >= accuracy[full_attention_trained,16] - 0.05",
            says="the cache shrinks by 60 % (the paper's 62 %), the prefill is 1.67 times as fast and what follows it 1.41 "
            "times, recall stays that of full attention after as much training",
            headline=True,
            setting="attention is two fifths of a prefill of 1000 words, and nearly all of one of the paper's 128 000, to which "
            "its training also lengthens the context: here the model reads 1000 words already",
        ),
        Claim(
            "kv_bytes[longgen,*] <= 0.4 * kv_bytes[full_attention_trained,*] "
            "and accuracy[longgen,16] >= accuracy[full_attention_trained,16] - 0.05",
            says="the cache shrinks by 60 % or more, recall stays that of full attention after as much training",
        ),
        Claim(
            "accuracy[longgen,16] >= accuracy[sink_window_trained,16] + 0.2 "
            "and accuracy[longgen,16] >= accuracy[sink_window,16] + 0.2",
            says="some layers must see everything: without them training does not bring recall",
        ),
        Claim(
            "flops[longgen,*] <= 0.8 * flops[full_attention_trained,*] "
            "and latency_ms[longgen,1] < latency_ms[full_attention_trained,1]",
            says="the prefill takes less work and less time",
        ),
    )

    full = "middle"  # the layers that see everything: the "middle" third, "all", or "none"
    variants = (
        Variant(
            "sink_window_trained",
            says="sinks and a window in all layers, trained so: what sparse attention alone can learn to recall",
            full="none",
            baselines=(),
        ),
        Variant(
            "full_attention_trained",
            says="full attention in all layers, trained on for as many steps on the same texts",
            full="all",
            baselines=("autoregressive",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The target, to be trained on."""
        return {"student": session.clone("target")}

    def prepare(self, session: Session) -> None:
        """Train with the attention that it will run with."""
        data, count = session.train, session.scale(len(session.train["prompt"]), 2)
        pairs = list(zip(data["prompt"], data["target"], strict=True))[:count]
        rows = [(encode(prompt), [*encode(target), EOS]) for prompt, target in pairs]
        student, steps = session.networks["student"], session.scale(150, 1)
        train_band(student, rows, self.full_layers(student), SINKS, WINDOW, steps, session.seed, session.progress)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""

        def decoder(model: nn.Module, length: int, capacity: int) -> Decoder:
            cache = BandCache(len(model.model.layers), SINKS, WINDOW, full=self.full_layers(model))
            return HeldDecoder(model, capacity, cache)

        return write_held(session, batch, rung, decoder, "student")

    def full_layers(self, model: nn.Module) -> range:
        """The middle third, all or none."""
        depth = len(model.model.layers)
        return {"middle": range(depth // 3, depth - depth // 3), "all": range(depth), "none": range(0)}[self.full]


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
