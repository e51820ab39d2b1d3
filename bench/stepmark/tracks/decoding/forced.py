"""Track decoding, tasks of teacher forcing: how well does a cache of fixed size tell the next word of somebody's text?

A rung is the number of tokens whose keys and values each layer may hold; a method may hold other things of the same bytes
instead (`kv_bytes` is what its caches hold, read by the harness from the tensors themselves). `run` receives {"context":
lists of token ids}, beginnings of stories of the test split, and returns log-probabilities [B, V] of the word that comes
next. The text is read token after token, as it is when a model of language is judged on a stream, and what a full cache
evicts is gone. No method sees the word that it tells; the score is the exact expectation under the grammar.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.task import BadOutput, Score, Task, harness_only, load_split
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding.texts import story_walk

TASKS = (
    Task(
        id="forced/stories",
        version=1,
        summary="The next word of a story of 100 words, told from a cache of few tokens, 4-layer target",
        dataset="stories",
        backbones={"target": "lm_target"},
        reference="target",
        bounded=(),
        unit="tokens held",
        rungs=(12, 16, 24),
        metrics={"loss": "lower", "excess": "lower", "copies": "higher"},
        n=48,
        batch=8,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(12,),
        probe=8,  # the first context may be shorter than what is held
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


def loss_and_excess(
    expected: Mapping[str, float], log_q: Sequence[float], number: Mapping[str, int]
) -> tuple[float, float]:
    """Expected -log q of the next word in nats, drawn with the probabilities `expected`, and the same less their entropy.
    `log_q` [V] by token id, `number` the id of a word.
    """
    loss = -sum(p * log_q[number[word]] for word, p in expected.items())
    return loss, loss + sum(p * math.log(p) for p in expected.values())


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
        loss, excess = loss_and_excess(expected, log_q, number)
        only = len(expected) == 1
        rows.append((loss, excess, math.exp(-loss) if only else 0.0, float(only)))
    values = np.array(rows)
    means = values[resample].mean(axis=1)
    found = {name: Score(float(values[:, i].mean()), means[:, i].tolist()) for i, name in enumerate(("loss", "excess"))}
    certain = values[:, 3].sum()
    ratios = means[:, 2] / np.maximum(means[:, 3], 1e-12)
    return found | {"copies": Score(float(values[:, 2].sum() / max(certain, 1)), ratios.tolist())}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """One target forward over one position, what reading a token takes."""
    target = networks["target"]
    target(torch.tensor([batch["context"][0][-1:]], device=next(target.parameters()).device), use_cache=False)
    return 1
