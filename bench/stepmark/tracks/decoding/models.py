"""Track decoding, tasks of other models: how much cheaper may the model itself become, and what does it still write?

Tasks `outliers/...` give a target that a method turns into a cheaper one of its own (integers): networks called
`student` count against the rung as the target does. Inputs, outputs and metrics are those of the track, so that
`exact_match` says how often the cheaper model writes what the target would have written. A few channels of the
normalised hidden states are far greater than the others, as in large models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stepmark.task import Task
from stepmark.tracks.decoding import check as check
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import inputs as inputs
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding import reference_call as reference_call
from stepmark.tracks.decoding import score as score
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import write_plainly

TASKS = (
    Task(
        id="outliers/words",
        version=1,
        summary="Greedy decoding of word problems, 4-layer target whose normalised states have outlier channels",
        dataset="words",
        backbones={"target": "lm_outliers"},
        reference="target",
        bounded=("target", "student"),
        unit="target forwards",
        rungs=(16, 40),
        metrics={"accuracy": "higher", "exact_match": "higher", "first_divergence": "higher", "tokens": "higher"},
        n=64,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
)


def write_greedily(model: nn.Module, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
    """New token ids per prompt by plain decoding with a model: prefill, then one token per forward."""

    def write(prompt: list[int], room: int, temperature: float) -> list[int]:
        return write_plainly(Decoder(model, len(prompt) + room), prompt, room, rung, temperature)

    return write_each(batch, write)
