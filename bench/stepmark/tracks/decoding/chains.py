"""Track decoding, tasks of several chains: what is a budget of reads from the cache worth, if more chains fit into it?

The target writes its way to an answer at a high temperature, where a single text often slips, and as many texts as the
rung has room for: a rung counts target forwards, and `chains_of` says how many texts of the greatest length they are.
The answer that most of the finished texts give is the answer. What a text costs beside its forwards shows in
`kv_read_bytes`, what the attention of all layers reads from the cache, and in `kv_bytes`, the most that is held.

`run` returns, for each prompt, a list of `chains_of(rung)` lists of new token ids, each as the track wants them.

Ground, measured with full caches: at temperature 1 to 1.5 nearly every text of the 4-layer target is right and there is
nothing to gain; at 1.8 about one in three is. A model that is wrong for want of knowledge (the 1-layer one) gains nothing from
a vote at any temperature.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stepmark.session import Session
from stepmark.task import BadOutput, Score, Task, harness_only, load_split
from stepmark.tracks import decoding
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding import reference_call as reference_call
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import write_plainly

TASKS = (
    Task(
        id="scaling/sums",
        version=1,
        summary="Column additions by the vote of several texts at temperature 1.8, 4-layer target",
        dataset="sums",
        backbones={"target": "lm_target"},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=(64, 128, 256),
        metrics={"accuracy": "higher", "single": "higher"},
        n=32,
        batch=4,
        seeds=3,
        smoke_n=1,
        smoke_rungs=(64,),
        probe=2,
    ),
)

MAX_NEW_TOKENS, TEMPERATURE = 64, 1.8


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` distinct prompts of the test split."""
    found = decoding.inputs(task, n, generator, device)
    return found | {"max_new_tokens": [MAX_NEW_TOKENS] * n, "temperature": [TEMPERATURE] * n}


def chains_of(rung: int) -> int:
    """How many texts of the greatest length a rung has room for."""
    return max(1, rung // MAX_NEW_TOKENS)


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """For each prompt one or more texts, each as the track wants its outputs."""
    if not isinstance(outputs, list) or not all(isinstance(texts, list) and texts for texts in outputs):
        raise BadOutput("run must return a list of texts, lists of token ids, for every prompt")
    if len(outputs) != len(batch["prompt"]):
        raise BadOutput(f"run must return texts for {len(batch['prompt'])} prompts, not {len(outputs)}")
    rows = [(prompt, limit, text) for prompt, limit, texts in zip(
        batch["prompt"], batch["max_new_tokens"], outputs, strict=True) for text in texts]  # fmt: skip
    each = {"prompt": [row[0] for row in rows], "max_new_tokens": [row[1] for row in rows]}
    decoding.check(task, each, [row[2] for row in rows])


def answer_of(text: Sequence[int]) -> str | None:
    """The answer that a finished text ends with, or None."""
    from stepmark.backbones.lm import EOS, decode

    words = decode(list(text))
    return words.rpartition("ans ")[2] if text and text[-1] == EOS and "ans " in words else None


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: list[list[list[int]]],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """accuracy: share of prompts whose most frequent answer is right (ties: the one that came first; texts without an
    answer have no vote). single: share of texts that are right."""
    from stepmark.backbones.lm import decode

    harness_only("scoring")
    data = load_split(task.dataset, "test")
    truth = dict(zip(data["prompt"], data["answer"], strict=True))
    rows = []
    for prompt, texts in zip(batch["prompt"], outputs, strict=True):
        right, found = truth[decode(list(prompt))], [answer_of(text) for text in texts]
        votes = Counter(answer for answer in found if answer is not None).most_common(1)
        rows.append((float(bool(votes) and votes[0][0] == right), found.count(right) / len(found)))
    table = np.array(rows)
    return {
        name: Score(float(table[:, i].mean()), table[resample, i].mean(axis=1).tolist())
        for i, name in enumerate(("accuracy", "single"))
    }


def write_chains(
    session: Session, batch: Mapping[str, Any], rung: int, decoder: Callable[[nn.Module, int, int], Decoder]
) -> list[list[list[int]]]:
    """Texts of every prompt by plain sampling, each on a cache of its own. `decoder`: as in `write_held`."""
    model = session.networks["target"]

    def write(prompt: list[int], room: int, temperature: float) -> Any:
        return [
            write_plainly(decoder(model, len(prompt), len(prompt) + room), prompt, room, room, temperature, session.rng)
            for _ in range(chains_of(rung))
        ]

    return cast("list[list[list[int]]]", write_each(batch, write))
