"""Track decoding, tasks of another language: what does a tokenizer cost that knows only the stems of its words?

The target has not seen the language of the prompts. It knows the stems, and its tokenizer splits every word in them, so
that a text takes many forwards. A method may give copies of the target more tokens and adapt them on the first texts of
the train split: a rung is how many, one copy for each. Inputs and outputs are those of the track, in the target's own
tokens: what is written in longer tokens is spelled out. The completion follows from the prompt, so that there is one
right answer, and it is written to its end; `nfe` is the forwards that it takes.

What it can tell, measured (`right_pieces` after 640 / 1280 texts, about): tokens that start as the mean of their pieces
.85 / .98, random ones .78 / .97, FOCUS .73 / .90, all of them at one average .74 / .86, no new tokens .86 / .93. After
2560 texts, tried before anything was claimed, mean and random starts had all right. So a start is felt up to 1280 texts
and no longer. With version 1, a language of letters whose completions were copies, mean and random starts wrote every
text right after 320.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        version=2,
        summary="Completions in a language of few texts that is spelled stem by stem, 4-layer target of another one",
        dataset="bilingual",
        backbones={"target": "lm_target"},
        reference="target",
        unit="texts to adapt on",
        rungs=(320, 640, 1280),
        metrics={"right_pieces": "higher", "accuracy": "higher", "tokens": "higher"},
        n=96,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(320,),
        probe=1,
    ),
)

MAX_NEW_TOKENS = 32


def words_of(ids: Sequence[int]) -> list[tuple[int, ...]]:
    """A text in the target's tokens, cut into words: one or two stems and all that follows up to the next or to a stop."""
    from stepmark.backbones.lm import VOCABULARY
    from stepmark.datasets.bilingual import ALONE, STEMS

    words: list[list[str]] = []
    for token in (VOCABULARY[i] for i in ids):
        if words and words[-1][0] in STEMS and (words[-1][-1] in STEMS if token in STEMS else token not in ALONE):
            words[-1].append(token)
        else:
            words.append([token])
    number = {word: i for i, word in enumerate(VOCABULARY)}
    return [tuple(number[token] for token in word) for word in words]


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

    right_pieces: mean share of the completion's tokens, its end included, that an output has at their places. accuracy:
    share of outputs that are the completion. tokens: mean number of tokens of the target's vocabulary.
    """
    from stepmark.backbones.lm import EOS, decode, encode

    harness_only("scoring")
    data = load_split(task.dataset, "test")
    answers = dict(zip(data["prompt"], data["target"], strict=True))
    rows = []
    for prompt, ids in zip(batch["prompt"], outputs, strict=True):
        wanted = [*encode(answers[decode(list(prompt))]), EOS]
        same = sum(a == b for a, b in zip(ids, wanted, strict=False))
        rows.append((same / len(wanted), float(ids == wanted), float(len(ids))))
    values = np.array(rows)
    means = values[resample].mean(axis=1)
    return {
        name: Score(float(values[:, i].mean()), means[:, i].tolist())
        for i, name in enumerate(("right_pieces", "accuracy", "tokens"))
    }
