"""Track decoding, tasks of teacher forcing: how well does a cache of fixed size tell the next word of somebody's text?

A rung is the number of tokens whose keys and values each layer may hold; a method may hold other things of the same bytes
instead (`kv_bytes` is what its caches hold, read by the harness from the tensors themselves). `run` receives {"context":
lists of token ids}, beginnings of stories of the test split, and returns log-probabilities [B, V] of the word that comes
next. The text is read token after token, as it is when a model of language is judged on a stream, and what a full cache
evicts is gone. No method sees the word that it tells; the score is the exact expectation under the grammar.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stepmark.task import Task
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding.moe import check as check
from stepmark.tracks.decoding.moe import inputs as inputs
from stepmark.tracks.decoding.moe import score as score

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
        probe=1,
    ),
)


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """One target forward over one position, what reading a token takes."""
    target = networks["target"]
    target(torch.tensor([batch["context"][0][-1:]], device=next(target.parameters()).device), use_cache=False)
    return 1
