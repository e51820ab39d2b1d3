"""Track reasoning: how much accuracy does each generated token buy?

A rung is a number of generated tokens per question: rows of calls of the language models, one for each token that is
sampled, and one for each piece of text that a model is given and whose continuation or likelihood is asked for (the row
that reads a prompt gives the first token). One call may serve many texts: its rows are what counts, and how many calls
follow each other is what a user waits for. All else is counted in NFE-equivalents, calls of the task's model over one token.

`run` receives {"question": lists of token ids} and returns one list of token ids per question: the text that answers it,
without its prompt, at most `LONGEST` tokens, nothing after the end-of-sequence token. How it is asked for is the
method's choice: a question is followed by a word that chooses a format, which the task's dataset tells, and the text may be
in any of those that hold an answer. Where several texts were written, the one that holds the answer chosen is returned.

`session.networks`: "model", the language model of the task, a `Reasoner` of `stepmark.backbones.reasoners` that is driven by
`stepmark.backbones.chains.Chains`. `session.train` holds "question", "prompt", "target", "answer", "level": lists of texts.

A dataset of this track says which of its splits a task asks (`ASKED`: task -> split) and what a text is worth (`judged`):
the checker stands beside the grammar, and another dataset changes nothing of this one's tasks. It may say besides how long a
text may be (`LONGEST`), of which tasks so many questions in a row belong together (`TOGETHER`: task -> how many), and what is
to be said of them together (`compared`, which adds to what was found of each).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stepmark.task import BadOutput, Score, Task, harness_only, load_split

LONGEST = 400

TASKS = (
    Task(
        id="deduce/chains",
        version=1,
        summary="True or false by 1 to 5 rules of the prompt, 2 or 4 statements that lead nowhere",
        dataset="deduction",
        backbones={"model": "deducer"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "valid": "higher",
            "accuracy": "higher",
            "answered": "higher",
            "steps": "higher",
            "straight": "higher",
            "misled": "lower",
            "detoured": "higher",
            "valid_depth1": "higher",
            "valid_depth5": "higher",
            "valid_dead2": "higher",
            "valid_dead4": "higher",
            "written": "lower",
        },
        n=200,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="deduce/dense",
        version=1,
        summary="True or false by 3 rules of the prompt, 6 or 8 statements that lead nowhere",
        dataset="deduction",
        backbones={"model": "deducer"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(64, 128, 256, 512),
        metrics={
            "valid": "higher",
            "accuracy": "higher",
            "answered": "higher",
            "steps": "higher",
            "straight": "higher",
            "misled": "lower",
            "detoured": "higher",
            "written": "lower",
        },
        n=160,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="deduce/deep",
        version=1,
        summary="True or false by 6 rules of the prompt, one more than the model has seen",
        dataset="deduction",
        backbones={"model": "deducer"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(64, 128, 256, 512),
        metrics={
            "valid": "higher",
            "accuracy": "higher",
            "answered": "higher",
            "steps": "higher",
            "straight": "higher",
            "misled": "lower",
            "detoured": "higher",
            "written": "lower",
        },
        n=160,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
)


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` distinct questions of the task's split: {"question": lists of ids}."""
    from stepmark.backbones.reasoners import encode

    harness_only("the test split")
    source = _dataset(task)
    asked = load_split(task.dataset, source.ASKED[task.id])["question"]
    each = getattr(source, "TOGETHER", {}).get(task.id, 1)
    blocks = torch.randperm(len(asked) // each, generator=generator)[: -(-n // each)].tolist()
    chosen = [each * i + k for i in blocks for k in range(each)][:n]
    return {"question": [encode(asked[i]) for i in chosen]}


def _dataset(task: Task) -> Any:
    """The module of a task's dataset."""
    return importlib.import_module(f"stepmark.datasets.{task.dataset}")


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """One list of valid token ids per question, not empty, not too long, nothing after the end of the sequence."""
    from stepmark.backbones.reasoners import EOS, WORDS

    longest = getattr(_dataset(task), "LONGEST", LONGEST)
    if not isinstance(outputs, list) or len(outputs) != len(batch["question"]):
        raise BadOutput(f"run must return a list of {len(batch['question'])} lists of token ids")
    for ids in outputs:
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < len(WORDS) for i in ids):
            raise BadOutput(f"every output must be a list of ints in [0, {len(WORDS)})")
        if not 1 <= len(ids) <= longest:
            raise BadOutput(f"an output has {len(ids)} tokens; allowed are 1 to {longest}")
        if EOS in ids[:-1]:
            raise BadOutput("an output goes on after its end-of-sequence token")


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: list[list[int]],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Means over the questions of what the dataset's `judged` finds; a metric may be of some questions only, and its mean is
    over those (0 where there are none). Where it finds counts of true by given classes, the mean is a macro F1 of them all.

    accuracy: share whose text ends in the right answer. answered: share whose text gives an answer that can be read, right
    or wrong, so that accuracy / answered is how often an answer is right. valid: share whose every step is right as well and
    the last one settles the question: a coin is right half the time, but never valid. steps: share of a text's steps that
    are valid; straight: that lie on the proof. misled: share whose first step off the proof is a valid one; detoured: of all,
    misled and yet valid. Names with depth and dead: `valid` among questions of so many rules, or so many statements that
    lead nowhere. written: tokens of the text that is returned, not of those that were written on the way.
    """
    from stepmark.backbones.reasoners import decode

    harness_only("scoring")
    source = _dataset(task)
    questions = [decode(question) for question in batch["question"]]
    rows = [
        source.judged(question, decode(ids)) | {"written": float(len(ids))}
        for question, ids in zip(questions, outputs, strict=True)
    ]
    if hasattr(source, "compared"):
        source.compared(questions, rows)
    found = {}
    for name in task.metrics:
        values = np.array([row[name] for row in rows], dtype=float)
        if values.ndim == 3:
            found[name] = Score(macro_f1(values.sum(0)), [macro_f1(values[drawn].sum(0)) for drawn in resample])
            continue
        there = ~np.isnan(values)
        counts, totals = there[resample].sum(axis=1), np.where(there, values, 0.0)[resample].sum(axis=1)
        mean = float(values[there].mean()) if there.any() else 0.0
        found[name] = Score(mean, (totals / np.maximum(counts, 1)).tolist())
    return found


def macro_f1(table: NDArray[np.float64]) -> float:
    """Mean over classes of F1, from counts [C, C + 1] of true by given classes, the last column for none of them."""
    count = len(table)
    hits, true, given = np.diag(table[:, :count]), table.sum(1), table[:, :count].sum(0)
    return float((2 * hits / np.maximum(1, true + given)).mean())


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """None: everything costly here is a network."""
    return {}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """The model over one token of one text."""
    model = networks["model"]
    model(torch.tensor([batch["question"][0][-1:]], device=next(model.parameters()).device))
    return 1


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """None: a network is counted by its forward."""
    return []
