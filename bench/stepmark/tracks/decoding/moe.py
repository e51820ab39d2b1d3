"""Track decoding, tasks of architectures: how soon does a language model learn, and what must it hold while it writes?

A rung is a number of training steps: `prepare` trains a model once and keeps its weights after each rung's steps. `run`
receives {"context": lists of token ids}, texts of the test split without their last word, and returns log-probabilities
[B, V] of the word that comes next. No model sees that word, so that none can look it up: the score is the exact
expectation of the loss under the tongue's own distribution of it. Contexts are read as in decoding, up to the last token at
once and that one from the state alone; `kv_bytes` is what the state of all layers holds then.

The texts are such that parameters matter: 16 x 60 rows of a table to be learnt by heart, of which 1600 steps leave much
unlearnt to state spaces. Measured, where the entropy is 1.28: after 400 steps MoE-Mamba has a loss of about 2.8 and Mamba
of 3.0, after 1600 steps of about 1.6 and 2.1; a Transformer with experts is then about a tenth of a nat above the
entropy. On `stories` before, Mamba was near the entropy after 240 steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import Score, Task, harness_only, load_split
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding.forced import check as check
from stepmark.tracks.decoding.forced import loss_and_excess

TASKS = (
    Task(
        id="learning/tongues",
        version=1,
        summary="The next word of a text in one of sixteen made-up tongues, as a model knows it after a number of "
        "training steps",
        dataset="tongues",
        unit="training steps",
        rungs=(400, 800, 1200, 1600),
        metrics={"loss": "lower", "excess": "lower", "allowed": "higher"},
        n=384,
        batch=8,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(400,),
        probe=1,
    ),
)


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` texts of the test split without their last word."""
    from stepmark.backbones.lm import encode

    harness_only("the test split")
    texts = load_split(task.dataset, "test")["text"]
    chosen = torch.randperm(len(texts), generator=generator)[:n].tolist()
    return {"context": [encode(texts[i])[:-1] for i in chosen]}


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all contexts, from the log-probabilities and the tables of the tongues alone.

    loss: expected -log q of the next word in nats, the word drawn from its tongue. excess: loss minus the tongue's own
    entropy, the least possible. allowed: probability given to the words that may come.
    """
    from stepmark.backbones.lm import VOCABULARY, decode
    from stepmark.datasets.tongues import following

    harness_only("scoring")
    number = {word: i for i, word in enumerate(VOCABULARY)}
    rows = []
    for context, log_q in zip(batch["context"], outputs.double().cpu().tolist(), strict=True):
        words = decode(list(context)).split()
        expected = following(words[0], words[-1])
        rows.append(
            (*loss_and_excess(expected, log_q, number), sum(math.exp(log_q[number[word]]) for word in expected))
        )
    values = np.array(rows)
    means = values[resample].mean(axis=1)
    names = ("loss", "excess", "allowed")
    return {name: Score(float(values[:, i].mean()), means[:, i].tolist()) for i, name in enumerate(names)}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """Never called: the task has no network of its own."""
    raise ValueError(f"{task.id} has no reference network")


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """The blocks: all of them once are one evaluation."""
    return list(getattr(network, "layers", []))
