"""Track decoding, tasks of recall: what may a key/value cache forget, and what need not be computed at all?

A long prompt states facts among sentences that say nothing of them, and asks for some of the facts at its end. A rung
counts target forwards as on the other tasks; rung 1 is the prefill alone. What a method saves shows in other counts:
`kv_bytes` (what its caches hold, read by the harness from the tensors themselves), positions run through the layers of
the target (`target_positions`, token-layers over layers), FLOPs and time.

Inputs and outputs are those of the track.
"""

from __future__ import annotations

from typing import Any

import torch

from stepmark.task import Task, harness_only, load_split
from stepmark.tracks.decoding import check as check
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding import reference_call as reference_call
from stepmark.tracks.decoding import score as score

TASKS = (
    Task(
        id="recall/needles",
        version=1,
        summary="Recall of 4 of 16 facts from a text of 1000 words, 6-layer target: what may a key/value cache forget?",
        dataset="needles",
        backbones={"target": "lm_recall"},
        reference="target",
        bounded=("target", "student"),  # a target that a method has trained on takes the target's place
        unit="target forwards",
        rungs=(1, 8, 16),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=1,
        smoke_rungs=(2,),
        probe=1,
    ),
)

MAX_NEW_TOKENS = 16


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` distinct prompts of the test split."""
    from stepmark.backbones.lm import encode

    harness_only("the test split")
    prompts = load_split(task.dataset, "test")["prompt"]
    chosen = torch.randperm(len(prompts), generator=generator)[:n].tolist()
    return {
        "prompt": [encode(prompts[i]) for i in chosen],
        "max_new_tokens": [MAX_NEW_TOKENS] * n,
        "temperature": [0.0] * n,
    }
