"""Track reasoning: how much accuracy does each generated token buy?

A rung is a number of generated tokens per question: rows of calls of the language models, one for each token that is
sampled, and one for each piece of text that a model is given and whose continuation or likelihood is asked for (the row
that reads a prompt gives the first token). One call may serve many texts: its rows are what counts, and how many calls
follow each other is what a user waits for. Verifiers are not language models: what they read counts apart, and with all
else in NFE-equivalents, calls of the task's model over one token.

`run` receives {"question": lists of token ids} and returns one list of token ids per question: the text that answers it,
without its prompt, at most `LONGEST` tokens, nothing after the end-of-sequence token. How it is asked for is the
method's choice: a question is followed by a word that chooses a format (`stepmark.datasets.problems`, `.countdown`,
`.deduction`), and the text may be in any of those that hold an answer. Where several texts were written, the one that
holds the answer chosen is returned.

`session.networks`: "model", the language model of the task; on problems and countdown "small" and "large" as well, of the
same words and data (all `Reasoner`s of `stepmark.backbones.reasoners`, driven by `stepmark.backbones.chains.Chains`), and
on problems "process" and "outcome", `Verifier`s. `session.train` holds "question", "prompt", "target", "answer", "level":
lists of texts.
"""

from __future__ import annotations

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
        id="solve/problems",
        version=1,
        summary="Arithmetic word problems of 2 to 5 steps",
        dataset="problems",
        backbones={
            "model": "reasoner",
            "small": "reasoner_small",
            "large": "reasoner_large",
            "process": "reasoner_process",
            "outcome": "reasoner_outcome",
        },
        reference="model",
        bounded=("model", "small", "large"),
        unit="generated tokens",
        rungs=(32, 64, 128, 256, 512, 1024),
        metrics={"accuracy": "higher", "valid": "higher", "written": "lower"},
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="solve/problems_deep",
        version=1,
        summary="Arithmetic word problems of 6 steps, one more than any model has seen",
        dataset="problems",
        backbones={
            "model": "reasoner",
            "small": "reasoner_small",
            "large": "reasoner_large",
            "process": "reasoner_process",
            "outcome": "reasoner_outcome",
        },
        reference="model",
        bounded=("model", "small", "large"),
        unit="generated tokens",
        rungs=(64, 128, 256, 512, 1024),
        metrics={"accuracy": "higher", "valid": "higher", "written": "lower"},
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="solve/countdown",
        version=1,
        summary="Countdown with three and four numbers",
        dataset="countdown",
        backbones={"model": "reasoner", "small": "reasoner_small", "large": "reasoner_large"},
        reference="model",
        bounded=("model", "small", "large"),
        unit="generated tokens",
        rungs=(32, 64, 128, 256, 512, 1024),
        metrics={"accuracy": "higher", "written": "lower"},
        n=300,
        batch=30,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="solve/game24",
        version=1,
        summary="Game of 24 with sets of numbers that no model has seen",
        dataset="countdown",
        backbones={"model": "reasoner", "small": "reasoner_small", "large": "reasoner_large"},
        reference="model",
        bounded=("model", "small", "large"),
        unit="generated tokens",
        rungs=(64, 128, 256, 512, 1024, 2048),
        metrics={"accuracy": "higher", "written": "lower"},
        n=120,
        batch=20,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="deduce/chains",
        version=1,
        summary="True or false by 1 to 5 rules of the prompt, 2 or 4 others that lead nowhere",
        dataset="deduction",
        backbones={"model": "deducer"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "valid": "higher",
            "accuracy": "higher",
            "steps": "higher",
            "straight": "higher",
            "written": "lower",
        },
        n=400,
        batch=40,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
    Task(
        id="deduce/dense",
        version=1,
        summary="True or false by 3 rules of the prompt, 6 or 8 others that lead nowhere",
        dataset="deduction",
        backbones={"model": "deducer"},
        reference="model",
        bounded=("model",),
        unit="generated tokens",
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "valid": "higher",
            "accuracy": "higher",
            "steps": "higher",
            "straight": "higher",
            "written": "lower",
        },
        n=300,
        batch=30,
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
        rungs=(16, 64, 128, 256, 512),
        metrics={
            "valid": "higher",
            "accuracy": "higher",
            "steps": "higher",
            "straight": "higher",
            "written": "lower",
        },
        n=300,
        batch=30,
        seeds=3,
        smoke_n=2,
        smoke_rungs=(64,),
        probe=4,
    ),
)

SPLITS = {"solve/problems_deep": "deep", "solve/game24": "game24", "deduce/dense": "dense", "deduce/deep": "deep"}


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` distinct questions of the task's split: {"question": lists of ids}."""
    from stepmark.backbones.reasoners import encode

    harness_only("the test split")
    asked = load_split(task.dataset, SPLITS.get(task.id, "test"))["question"]
    chosen = torch.randperm(len(asked), generator=generator)[:n].tolist()
    return {"question": [encode(asked[i]) for i in chosen]}


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """One list of valid token ids per question, not empty, not too long, nothing after the end of the sequence."""
    from stepmark.backbones.reasoners import EOS, WORDS

    if not isinstance(outputs, list) or len(outputs) != len(batch["question"]):
        raise BadOutput(f"run must return a list of {len(batch['question'])} lists of token ids")
    for ids in outputs:
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < len(WORDS) for i in ids):
            raise BadOutput(f"every output must be a list of ints in [0, {len(WORDS)})")
        if not 1 <= len(ids) <= LONGEST:
            raise BadOutput(f"an output has {len(ids)} tokens; allowed are 1 to {LONGEST}")
        if EOS in ids[:-1]:
            raise BadOutput("an output goes on after its end-of-sequence token")


def judged(task: Task, question: str, text: str) -> dict[str, float]:
    """What `score` means of, for one text."""
    from stepmark.datasets import countdown, deduction, problems

    if task.dataset == "countdown":
        return {"accuracy": float(countdown.check(question, text)[1])}
    if task.dataset == "deduction":
        proof = deduction.check(question, text)
        count = max(1, len(proof.steps))
        shares = {"steps": sum(proof.steps) / count, "straight": sum(proof.straight) / count}
        return {"accuracy": float(proof.right), "valid": float(proof.valid), **shares}
    seen = problems.check(question, problems.as_clauses(text) if text.startswith("|") else text)
    return {"accuracy": float(seen.right), "valid": float(seen.valid)}


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: list[list[int]],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Means over the questions.

    accuracy: share whose text ends in the right answer (countdown: whose moves are all allowed and leave the target).
    valid: share whose every step is right and in its place as well (deduction: valid, and the last one settles the question;
    a coin is right half the time, but never valid). written: tokens of the text that is returned, not of those that were
    written on the way. Of deduction alone, steps: share of a text's steps that are valid; straight: that lie on the proof.
    """
    from stepmark.backbones.reasoners import decode

    harness_only("scoring")
    rows = [
        judged(task, decode(question), decode(ids)) | {"written": float(len(ids))}
        for question, ids in zip(batch["question"], outputs, strict=True)
    ]
    found = {}
    for name in task.metrics:
        values = np.array([row[name] for row in rows])
        found[name] = Score(float(values.mean()), values[resample].mean(axis=1).tolist())
    return found


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
