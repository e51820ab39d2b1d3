"""A cell: the unit of work, of resuming and of a record. What its figures hang on, and the batches that it is made of.

Everything on the walk from the suite to a record knows this module; it knows none of them.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stepmark import backbones, plugins
from stepmark.names import unknown
from stepmark.plugins import MethodInfo
from stepmark.task import Task, digest_of


@dataclass(frozen=True)
class Cell:
    """One method on one task at one rung with one seed, at a tier."""

    method: str
    task: str
    rung: int
    seed: int
    tier: str = "embedded"

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """Of `Record.key` what hangs on neither device nor checkpoint."""
        return (self.method, self.task, self.rung, self.seed, self.tier)

    def command(self, device: str = "cpu") -> str:
        """The command that repeats this cell on a device of a kind."""
        known = plugins.tasks().get(self.task)
        what = (known[1].words if known else "") or f"--task {self.task}"
        where = "" if device == "cpu" else f" --device {device}"
        return f"stepmark run --method {self.method} {what} --rung {self.rung} --seed {self.seed} --tier {self.tier}{where}"


def track_of(task: str) -> tuple[ModuleType, Task]:
    """The module that holds a task's inputs, check and score, and the task.

    Raises:
        KeyError: one line that says what was perhaps meant.
    """
    known = plugins.tasks()
    if task not in known:
        said = unknown("task", task, known, "stepmark list tasks")
        raise KeyError(f"{said}; if a checkpoint folder makes it, name it by --backbone FOLDER")
    return importlib.import_module(plugins.track_module(task)), known[task][1]


def source_digest(*paths: Path) -> str:
    """sha256 over the bytes of files."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.read_bytes())
    return sha.hexdigest()


def digests(info: MethodInfo, task: Task) -> dict[str, str]:
    """Everything that can move a figure of a method on a task, by name."""
    found = plugins.source_digests(info, task)
    for role, backbone in sorted((task.backbones | task.judges).items()):
        found[f"backbone_{role}"] = backbones.digest(backbone)[: plugins.DIGITS]
    return found


# batches ----------------------------------------------------------------------------------------


def cut(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Items start..stop of a batch."""
    return {key: value[start:stop] for key, value in batch.items()}


def size_of(batch: Mapping[str, Any]) -> int:
    """Number of items of a batch."""
    return len(next(iter(batch.values())))


def join(parts: list[Any]) -> Any:
    """Outputs of consecutive batches as one: tensors are concatenated, lists extended, dicts joined by key."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {key: join([part[key] for part in parts]) for key in first}
    return [item for part in parts for item in part]


def fingerprint(outputs: Any) -> str:
    """Digest of outputs, bit for bit."""
    return digest_of({"outputs": outputs})
