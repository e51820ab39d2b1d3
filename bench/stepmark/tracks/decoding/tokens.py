"""Track decoding, tasks of tokenisation: equal models that differ in how a text becomes tokens, hence in steps.

A batch is {"demonstrations": lists of lines, "text": a line up to its colon, "labels": four ways to end it}. Every second
item has no demonstrations. `run` returns {"log_likelihood": float [B, 4] in nats, of each whole line `line(text, label)`,
its end included, after the demonstrations that were read; "tokens": int64 [B, 4], how many tokens each line is}. The label
that makes its line likeliest is the answer. A rung is a number of tokens: as many may go through the model for an item, in
demonstrations, text and labels together, and the oldest demonstrations that do not fit are left out. An evaluation of a
model is one token.

Whatever the tokens, a line's likelihood is that of the text itself, markers included: bits over characters of the text
compare models of any vocabulary. Lines are drawn from a grammar whose entropy is known, and no model that has not seen
them can find them much likelier than it: outputs that claim so are rejected.
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

TASKS = (
    Task(
        id="tokenisation/dialects",
        version=1,
        summary="Lines in four languages: their likelihood, and which of four labels ends them, without and with "
        "demonstrations",
        dataset="dialects",
        unit="tokens",
        rungs=(80, 160, 320),
        metrics={
            "bits_per_character": "lower",
            "tokens": "lower",
            "zero_shot": "higher",
            "few_shot": "higher",
            "sums": "higher",
        },
        n=256,
        batch=8,
        seeds=1,
        smoke_n=4,
        smoke_rungs=(160,),
        probe=2,
    ),
)

SLACK = 20.0  # nats by which lines of a batch may be likelier than the grammar's: happens with probability e^-20


def line(text: str, label: str) -> str:
    """A text and its label as one line of a document."""
    return f"{text} {label}\n"


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` questions of the test split, every second one without its demonstrations."""
    harness_only("the test split")
    data = load_split(task.dataset, "test")
    chosen = torch.randperm(len(data["text"]), generator=generator)[:n].tolist()
    found = {key: [data[key][i] for i in chosen] for key in ("demonstrations", "text", "labels")}
    return found | {"demonstrations": [lines if i % 2 else [] for i, lines in enumerate(found["demonstrations"])]}


def _answers(task: Task, texts: Sequence[str]) -> tuple[list[int], list[str]]:
    """Number of the right label, and the question, of each text of the test split."""
    data = load_split(task.dataset, "test")
    known = dict(zip(data["text"], zip(data["answer"], data["question"], strict=True), strict=True))
    return [known[text][0] for text in texts], [known[text][1] for text in texts]


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """Finite log-likelihoods [B, 4] of at most 0, numbers of tokens [B, 4], and nothing too likely to be true.

    Of lines x drawn from p, every model q that has not seen them has E[q(x) / p(x)] <= 1, so that the product over a
    batch exceeds e^20 with probability e^-20 at most (Markov's inequality), however good the model is.
    """
    from stepmark.datasets.dialects import surprise

    shape = (len(batch["text"]), len(batch["labels"][0]))
    for name in ("log_likelihood", "tokens"):
        found = outputs.get(name) if isinstance(outputs, Mapping) else None
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            raise BadOutput(f"run must return a tensor {name} of shape {shape}")
    likely, tokens = outputs["log_likelihood"], outputs["tokens"]
    if not likely.is_floating_point() or not bool(torch.isfinite(likely).all()) or bool((likely > 0).any()):
        raise BadOutput("a log-likelihood is not finite, or above 0")
    if tokens.is_floating_point() or bool((tokens < 1).any()):
        raise BadOutput("a line has less than one token")
    right, _ = _answers(task, batch["text"])
    excess = 0.0
    for row, answer, lines in zip(likely.double().tolist(), right, batch["demonstrations"], strict=True):
        excess += row[answer] + surprise(told=bool(lines))
    if excess > SLACK:
        raise BadOutput(f"the lines are {excess:.0f} nats likelier than under the grammar that they are drawn from")


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: Mapping[str, Tensor],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all questions, from the likelihoods of the lines alone.

    bits_per_character: bits of the lines with their right labels over their characters, where nothing stands before.
    tokens: mean number of tokens of those lines, of all questions. zero_shot, few_shot: share of right answers without
    and with demonstrations. sums: share of right answers of calculations, either way.
    """
    harness_only("scoring")
    right, questions = _answers(task, batch["text"])
    likely, tokens = outputs["log_likelihood"].double().cpu().numpy(), outputs["tokens"].cpu().numpy()
    rows = np.arange(len(right))
    cold = np.array([not lines for lines in batch["demonstrations"]], dtype=float)
    sums = np.array([question == "sum" for question in questions], dtype=float)
    hit = (likely.argmax(1) == np.array(right)).astype(float)
    bits = -likely[rows, right] / math.log(2)
    characters = np.array(
        [len(line(t, labels[i])) for t, labels, i in zip(batch["text"], batch["labels"], right, strict=True)]
    )
    every = np.ones(len(right))
    return {
        "bits_per_character": _ratio(cold * bits, cold * characters, resample),
        "tokens": _ratio(tokens[rows, right].astype(float), every, resample),
        "zero_shot": _ratio(cold * hit, cold, resample),
        "few_shot": _ratio((1 - cold) * hit, 1 - cold, resample),
        "sums": _ratio(sums * hit, sums, resample),
    }


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64], resample: NDArray[np.int64]) -> Score:
    """Sum over sum, over all items and over each resample; 0 where a resample has no item of the kind."""
    parts = above[resample].sum(1) / np.maximum(below[resample].sum(1), 1e-12)
    return Score(float(above.sum() / max(below.sum(), 1e-12)), parts.tolist())


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """Never called: the task has no network of its own."""
    raise ValueError(f"{task.id} has no reference network")


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """The layers: a token through all of them is one evaluation."""
    return list(getattr(network, "layers", []))
