"""LongGen: a third of the layers see everything, the others sinks and a window (Ge et al., ICLR 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stepmark.backbones.lm import EOS, encode
from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.recall import BandCache, HeldDecoder, train_band, write_with

SINKS, WINDOW = 4, 64


class LongGen(Method):
    """LongGen: a language model becomes a hybrid of full and sparse attention by a little training on long texts.

    Section 3 of the paper: the middle third of the layers keeps full attention, the layers below and above see the first
    4 tokens and the last 64 only (its window and attention-sink pattern), and the whole model is trained on with the
    loss of language modelling. When it runs, sparse layers hold what they may see and nothing else, and they read a
    text in work linear in its length. Distances are those of the text; unlike StreamingLLM nothing is moved, because
    the model has been trained with what it sees.

    Differs from the paper: the model already reads texts of this length, so that neither the context nor the base of the
    rotary embedding is extended here, only the architecture changes; the training is 150 steps on a few hundred texts
    with the loss on the answers; the blockwise pattern is left out.
    """

    paper = Paper(
        id="longgen",
        title="A Little Goes a Long Way: Efficient Long Context Training and Inference with Partial Contexts",
        authors="Suyu Ge, Xihui Lin, Yunan Zhang, Jiawei Han, Hao Peng",
        year=2024,
        arxiv="2410.01485",
    )
    tasks = ("recall/needles",)
    baselines = ("autoregressive", "sink_window_trained", "sink_window")
    claims = (
        Claim(
            "kv_bytes[longgen,16] <= 0.45 * kv_bytes[autoregressive,16] "
            "and accuracy[longgen,16] >= accuracy[autoregressive,16] - 0.05",
            says="the cache shrinks by 55 % or more (the paper's 62 %), recall stays",
        ),
        Claim(
            "accuracy[longgen,16] > accuracy[sink_window_trained,16] and accuracy[longgen,16] > accuracy[sink_window,16]",
            says="some layers must see everything: without them training does not bring recall",
        ),
        Claim(
            "flops[longgen,1] <= 0.8 * flops[autoregressive,1] and latency_ms[longgen,1] < latency_ms[autoregressive,1]",
            says="the prefill takes less work and less time",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The target, to be trained on."""
        return {"student": session.clone("target")}

    def prepare(self, session: Session) -> None:
        """Train with the attention that it will run with."""
        rows = [
            (encode(prompt), [*encode(target), EOS])
            for prompt, target in zip(session.train["prompt"], session.train["target"], strict=True)
        ]
        rows = rows[: session.scale(len(rows), 2)]
        student = session.networks["student"]
        steps = session.scale(150, 1)
        train_band(student, rows, full_layers(student), SINKS, WINDOW, steps, session.seed, session.progress)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        model, outputs = session.networks["student"], []
        for prompt, room, temperature in zip(
            batch["prompt"], batch["max_new_tokens"], batch["temperature"], strict=True
        ):
            cache = BandCache(len(model.model.layers), SINKS, WINDOW, full=full_layers(model))
            target = HeldDecoder(model, len(prompt) + room, cache)
            outputs.append(write_with(target, prompt, room, rung, temperature, session.rng))
        return outputs


def full_layers(model: nn.Module) -> range:
    """The middle third."""
    depth = len(model.model.layers)
    return range(depth // 3, depth - depth // 3)
