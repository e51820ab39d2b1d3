"""Track decoding, tasks of shared work: how soon is a list of questions answered where several workers write at once?

A prompt lists questions that can be answered in any order. The workers are one target: their next tokens come from one
forward, a position for each of them. A rung counts target forwards as on the other tasks, so that it is the number of
steps one after the other that a list may take; what workers cost beside each other shows in `target_positions`, FLOPs
and time.

`run` receives {"prompt": lists of token ids, "max_new_tokens": ints, "temperature": floats (0: greedy)} and returns one
list of token ids per prompt: the texts of the workers, one after the other, at most `max_new_tokens` in all. A worker's
text begins with its name in the cache, which is given and not returned, and may end with the end-of-sequence token.

The target has been trained on texts of one worker and of two. `source` is what it was before: it looks names up in a text
but has seen no list. A `student` made from it by texts of single workers shows what sharing is without training for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stepmark.task import BadOutput, Score, Task, harness_only, load_split
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding import reference_call as reference_call

TASKS = (
    Task(
        id="parallel/friend_lists",
        version=2,
        summary="Eight questions in one prompt, 6-layer target that can share them out among two workers",
        dataset="friend_lists",
        backbones={"target": "lm_workers", "source": "lm_recall"},
        reference="target",
        bounded=("target", "student"),
        unit="target forwards",
        rungs=(8, 16, 24, 32, 64),
        metrics={"accuracy": "higher", "complete": "higher", "repeated": "lower"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=1,
        smoke_rungs=(6,),
        probe=1,
    ),
)

MAX_NEW_TOKENS = 100


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` prompts of the test split."""
    from stepmark.backbones.lm import encode

    harness_only("the test split")
    prompts = load_split(task.dataset, "test")["prompt"]
    chosen = torch.randperm(len(prompts), generator=generator)[:n].tolist()
    return {
        "prompt": [encode(prompts[i]) for i in chosen],
        "max_new_tokens": [MAX_NEW_TOKENS] * n,
        "temperature": [0.0] * n,
    }


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """One list of valid token ids per prompt, not empty, not too long."""
    from stepmark.backbones.lm import VOCABULARY

    if not isinstance(outputs, list) or len(outputs) != len(batch["prompt"]):
        raise BadOutput(f"run must return a list of {len(batch['prompt'])} lists of token ids")
    for ids, limit in zip(outputs, batch["max_new_tokens"], strict=True):
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < len(VOCABULARY) for i in ids):
            raise BadOutput(f"every output must be a list of ints in [0, {len(VOCABULARY)})")
        if not 1 <= len(ids) <= limit:
            raise BadOutput(f"an output has {len(ids)} tokens; allowed are 1 to {limit}")


def answers(text: str) -> list[tuple[str, str]]:
    """(number of the question, friends) of every solution that a text holds whole, in its order.

    A solution begins with a number and a name and ends with a full stop.
    """
    return re.findall(r"(\d) \w+ ([^\d.]*) \.", text)


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: list[list[int]],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all prompts, from the token ids alone.

    accuracy: share of the questions answered rightly; of several answers to one question the first counts. complete:
    share of the lists of which every answer is right. repeated: share of the solutions begun that had been begun before.
    """
    from stepmark.backbones.lm import VOCABULARY

    harness_only("scoring")
    data = load_split(task.dataset, "test")
    truth = dict(zip(data["prompt"], data["answer"], strict=True))
    rows = []
    for prompt, ids in zip(batch["prompt"], outputs, strict=True):
        wanted = truth[" ".join(VOCABULARY[i] for i in prompt)].split(" , ")
        text = " ".join(VOCABULARY[i] for i in ids)
        found = dict(reversed(answers(text)))
        right = sum(found.get(str(number)) == friends for number, friends in enumerate(wanted, start=1))
        begun = re.findall(r"\d", text)
        rows.append((right / len(wanted), right == len(wanted), 1 - len(set(begun)) / max(1, len(begun))))
    table = np.array(rows, dtype=float)
    return {
        name: Score(float(table[:, i].mean()), table[resample, i].mean(axis=1).tolist())
        for i, name in enumerate(("accuracy", "complete", "repeated"))
    }
