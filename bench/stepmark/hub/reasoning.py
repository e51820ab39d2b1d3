"""Track reasoning, tasks of checkpoint folders: questions of the track in English, to a language model that somebody brings.

What `run` receives and returns is as of the track: questions in words, texts as ids. Ids from `SIZE` on are tokens of the
checkpoint, and what they say in words is read back by rules (`spoken.Speech`). Rungs count as in the track: a row for each
token that is sampled, and for each piece that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stepmark.backbones.reasoners import EOS, SIZE, STOP, encode
from stepmark.hub.reasoning_tasks import TEXTS
from stepmark.hub.source import current
from stepmark.hub.text_tasks import vocabulary
from stepmark.task import BadOutput, Score, Task, harness_only, load_split
from stepmark.tracks.reasoning import score as scored


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` questions of the language that was chosen: {"question": lists of ids}."""
    harness_only("the test split")
    asked = load_split(task.follows, "test")["question"]
    chosen = torch.randperm(len(asked), generator=generator)[:n].tolist()
    return {"question": [encode(asked[i]) for i in chosen]}


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """One list of valid ids per question, not empty, not too long, nothing after the end of the sequence."""
    size = SIZE + vocabulary(current())
    if not isinstance(outputs, list) or len(outputs) != len(batch["question"]):
        raise BadOutput(f"run must return a list of {len(batch['question'])} lists of token ids")
    for ids in outputs:
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < size for i in ids):
            raise BadOutput(f"every output must be a list of ints in [0, {size})")
        if not 1 <= len(ids) <= TEXTS:
            raise BadOutput(f"an output has {len(ids)} tokens; allowed are 1 to {TEXTS}")
        if EOS in ids[:-1]:
            raise BadOutput("an output goes on after its end-of-sequence token")


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: list[list[int]],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """As in the track, of the words that the texts are read back as."""
    return scored(replace(task, dataset=task.follows), batch, outputs, networks, resample)


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """None: everything costly here is a network."""
    return {}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """The model over one token of one text."""
    model = networks["model"]
    model(torch.tensor([[STOP]], device=next(model.parameters()).device))
    return 1


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """None: a network is counted by its forward."""
    return []
