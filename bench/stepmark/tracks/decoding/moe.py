"""Track decoding, tasks of architectures: how soon does a language model learn, and what must it hold while it writes?

A rung is a number of training steps: `prepare` trains a model once and keeps its weights after each rung's steps. `run`
receives {"context": lists of token ids}, beginnings of stories of the test split, and returns log-probabilities [B, V] of
the word that comes next. No model sees that word, so that none can look it up: the score is the exact expectation of the
loss under the grammar's own distribution of it. Contexts are read as in decoding, up to the last token at once and that
one from the state alone; `kv_bytes` is what the state of all layers holds then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import BadOutput, Score, Task, harness_only, load_split
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding.texts import story_walk

TASKS = (
    Task(
        id="learning/stories",
        version=1,
        summary="The next word of a story, as a model knows it after a number of training steps",
        dataset="stories",
        unit="training steps",
        rungs=(120, 240, 480),
        metrics={"loss": "lower", "excess": "lower", "copies": "higher"},
        n=192,
        batch=8,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(120,),
        probe=1,
    ),
)


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """Beginnings of `n` stories of the test split, each cut before any of its words or before its end."""
    from stepmark.backbones.lm import encode

    harness_only("the test split")
    data = load_split(task.dataset, "test")
    contexts = []
    for i in torch.randperm(len(data["prompt"]), generator=generator)[:n].tolist():
        words = data["target"][i].split()
        cut = int(torch.randint(len(words) + 1, (), generator=generator))
        contexts.append(encode(" ".join([data["prompt"][i], *words[:cut]])))
    return {"context": contexts}


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """Normalised log-probabilities [B, V]."""
    from stepmark.backbones.lm import VOCABULARY

    shape = (len(batch["context"]), len(VOCABULARY))
    if not isinstance(outputs, Tensor) or tuple(outputs.shape) != shape or not outputs.is_floating_point():
        raise BadOutput(f"run must return a float tensor of shape {shape}")
    if not bool(torch.isfinite(outputs).all()):
        raise BadOutput("a log-probability is not finite")
    if not torch.allclose(
        outputs.double().logsumexp(1), torch.zeros(len(outputs)).double().to(outputs.device), atol=1e-3
    ):
        raise BadOutput("the probabilities of the next word do not add up to 1")


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all contexts, from the log-probabilities and the grammar alone.

    loss: expected -log q of the next word in nats, the word drawn from the grammar. excess: loss minus the grammar's own
    entropy, the least possible. copies: probability given to the word where the grammar allows only one.
    """
    from stepmark.backbones.lm import VOCABULARY, decode

    harness_only("scoring")
    number = {word: i for i, word in enumerate(VOCABULARY)}
    rows = []
    for context, log_q in zip(batch["context"], outputs.double().cpu().tolist(), strict=True):
        opening, _, told = decode(list(context)).partition(" <story>")
        walk = story_walk(opening)
        expected = next(walk)
        for word in told.split():
            expected = walk.send(word)
        loss = -sum(p * log_q[number[word]] for word, p in expected.items())
        entropy = -sum(p * math.log(p) for p in expected.values())
        only = len(expected) == 1
        rows.append((loss, loss - entropy, math.exp(-loss) if only else 0.0, float(only)))
    values = np.array(rows)
    means = values[resample].mean(axis=1)
    found = {name: Score(float(values[:, i].mean()), means[:, i].tolist()) for i, name in enumerate(("loss", "excess"))}
    certain = values[:, 3].sum()
    ratios = means[:, 2] / np.maximum(means[:, 3], 1e-12)
    return found | {"copies": Score(float(values[:, 2].sum() / max(certain, 1)), ratios.tolist())}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """Never called: the task has no network of its own."""
    raise ValueError(f"{task.id} has no reference network")


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """The blocks: all of them once are one evaluation."""
    return list(getattr(network, "layers", []))
