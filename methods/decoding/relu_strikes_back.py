"""Relufication: a pre-trained model becomes one of sparse activations (Mirzadeh et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stepmark.backbones.lm import EOS, batches, encode, fit
from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.models import RectifiedNorm, rectify, write_greedily


class ReluStrikesBack(Method):
    """Relufication in two stages; what meets a zero activation is neither read nor multiplied.

    Stage 1 (section 4.1 of the paper): the gate of each feed-forward block becomes ReLU, FFN(x) = W_down (relu(W_gate x)
    * W_up x), and the model is trained on briefly. Stage 2 (section 4.2): a ReLU is put after the norms in front of
    attention and feed-forward, so that the inputs of the query, key, value, gate and up projections are sparse too, and
    the model is trained on again. While it writes, one token at a time, a projection reads only the columns of its
    weights that meet an input other than zero, and only the rows of W_up whose gate is open: an identity, not an
    approximation, counted in the FLOPs of the calls themselves.

    Differs from the paper: the prompt is read densely, as different tokens open different neurons, and its share of the
    work is far greater in short texts. Training goes on for 450 steps on completions of the task's own train split,
    with Muon; `silu_tuned` has the same steps without a change. Shifted ReLUs and the reuse of neurons over neighbouring
    tokens (sections 5.1 and 5.3) are left out.
    """

    paper = Paper(
        id="relu_strikes_back",
        title="ReLU Strikes Back: Exploiting Activation Sparsity in Large Language Models",
        authors="Iman Mirzadeh, Keivan Alizadeh, Sachin Mehta, Carlo C Del Mundo, Oncel Tuzel, Golnoosh Samei, "
        "Mohammad Rastegari, Mehrdad Farajtabar",
        year=2023,
        arxiv="2310.04564",
    )
    tasks = ("converted/stories", "converted/words")
    baselines = ("autoregressive", "silu_tuned", "topk_activations")
    claims = (
        Claim(
            "3 * nfe_equivalent[relu_strikes_back,96] <= nfe_equivalent[autoregressive,96]",
            says="a third of the computation per text",
        ),
        Claim(
            "1.5 * nfe_equivalent[relu_strikes_back,96] <= nfe_equivalent[autoregressive,96]",
            says="at most two thirds of the computation per text",
        ),
        Claim(
            "accuracy[relu_strikes_back,96] >= accuracy[silu_tuned,96] - 0.03",
            says="stories are as often right as those of the model with SiLU, trained on for as long",
        ),
        Claim(
            "accuracy[relu_strikes_back,40] >= accuracy[silu_tuned,40] - 0.03",
            says="word problems are solved as often as by the model with SiLU, trained on for as long",
            task="converted/words",
        ),
        Claim(
            "accuracy[relu_strikes_back,40] > accuracy[topk_activations,40]",
            says="better than cutting the activations of the model with SiLU to their greatest",
            task="converted/words",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The target with ReLUs in its gates and after its norms."""
        return {"student": rectify(session.clone("target"))}

    def prepare(self, session: Session) -> None:
        """Stage 1, then stage 2."""
        student, data = session.networks["student"], session.train
        chosen = list(zip(data["prompt"], data["target"], strict=True))[: session.scale(16_000, 8)]
        rows = [(encode(prompt), [*encode(target), EOS]) for prompt, target in chosen]
        stream = batches(rows, session.scale(1500, 150), session.seed)
        for stage, steps in ((1, session.scale(150, 1)), (2, session.scale(300, 1))):
            for part in student.modules():
                if isinstance(part, RectifiedNorm):
                    part.on = stage == 2
            fit(student, session.progress, steps=steps, lr=2e-3, seed=session.seed, stream=stream)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        return write_greedily(session.networks["student"], batch, rung)
