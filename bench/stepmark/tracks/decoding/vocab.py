"""Track decoding, tasks of another language: what does a tokenizer cost that knows only the letters of a text?

The target has not seen the language of the prompts, and its tokenizer splits every word in letters, so that a text takes
many forwards. A method may give a copy of the target (networks called `student` count as the target does) more tokens and
adapt it on the few texts of the train split. Inputs and outputs are those of the track, in the target's own tokens: what
is written in longer tokens is spelled out. The completion follows from the prompt, so that there is one right answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stepmark.task import Score, Task, harness_only, load_split
from stepmark.tracks.decoding import check as check
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding import reference_call as reference_call

TASKS = (
    Task(
        id="bilingual/stories",
        version=1,
        summary="Completions in a language of few texts that is spelled letter by letter, 4-layer target of another one",
        dataset="bilingual",
        backbones={"target": "lm_target"},
        reference="target",
        bounded=("target", "student"),
        unit="target forwards",
        rungs=(32, 72),
        metrics={"accuracy": "higher", "right_letters": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
)

MAX_NEW_TOKENS = 72


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` distinct prompts of the test split."""
    from stepmark.backbones.lm import encode

    harness_only("the test split")
    prompts = load_split(task.dataset, "test")["prompt"]
    chosen = torch.randperm(len(prompts), generator=generator)[:n].tolist()
    found = {"prompt": [encode(prompts[i]) for i in chosen]}
    return found | {"max_new_tokens": [MAX_NEW_TOKENS] * n, "temperature": [0.0] * n}


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: list[list[int]],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all prompts, from the token ids alone.

    accuracy: share of outputs that are the completion, end included. right_letters: mean share of the completion's
    tokens that an output begins with. tokens: mean number of tokens of the target's vocabulary.
    """
    from stepmark.backbones.lm import EOS, decode, encode

    harness_only("scoring")
    data = load_split(task.dataset, "test")
    answers = dict(zip(data["prompt"], data["target"], strict=True))
    rows = []
    for prompt, ids in zip(batch["prompt"], outputs, strict=True):
        wanted = [*encode(answers[decode(list(prompt))]), EOS]
        same = next(
            (i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), min(len(ids), len(wanted))
        )
        rows.append((float(ids == wanted), same / len(wanted), float(len(ids))))
    values = np.array(rows)
    means = values[resample].mean(axis=1)
    return {
        name: Score(float(values[:, i].mean()), means[:, i].tolist())
        for i, name in enumerate(("accuracy", "right_letters", "tokens"))
    }
