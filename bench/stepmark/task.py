"""Tasks and datasets: frozen, versioned literals, and the one door through which data is loaded.

`Task`s stand as literals in `tracks/<track>/`, `Dataset`s in `datasets/<id>.py`; both are read with `ast` for
listings. `load_split` is sealed while a method's code runs, so that a plugin cannot reach the test split.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NoReturn

_RIGHT = {"accuracy": "higher", "answered": "higher"}
REASONED: dict[str, dict[str, str]] = {  # metrics by language of the reasoning track
    "problems": {**_RIGHT, "valid": "higher", "written": "lower"},
    "countdown": {**_RIGHT, "written": "lower"},
    "deduction": {"valid": "higher", **_RIGHT, "steps": "higher", "straight": "higher", "written": "lower"},
}
# By track, how tasks are scored that somebody brings: a board shows their records without what was brought.
SCORED: dict[str, dict[str, Any]] = {
    "image": {"unit": "NFE", "metrics": {"endpoint_error": "lower", "reference_error": "lower"}},
    "decoding": {
        "unit": "target forwards",
        "metrics": {"first_divergence": "higher", "exact_match": "higher", "tokens": "higher", "tie": "lower"},
    },
    "reasoning": {"unit": "generated tokens", "metrics": REASONED["problems"]},
}
DRAWN: dict[str, Any] = {"unit": "target forwards", "metrics": {"tokens": "higher", "token_bias": "lower"}}
DRAWN_ID = re.compile(r"_at[0-9]+(p[0-9]+)?(_|$)")  # in the id of a checkpoint's task: texts drawn at a temperature
REASONED_ID = re.compile(rf"_({'|'.join(REASONED)})(?=_|$)")  # and which questions it asks


def scored_as(track: str, task: str) -> dict[str, Any]:
    """Unit and metrics of a checkpoint's task, by its track and id."""
    if track == "reasoning" and (found := REASONED_ID.search(task)):
        return SCORED[track] | {"metrics": REASONED[found[1]]}
    return DRAWN if track == "decoding" and DRAWN_ID.search(task) else SCORED[track]


DTYPES = ("float32", "bfloat16", "float16")  # what networks that somebody brings may be computed in


class BadOutput(Exception):
    """A method returned something that its track does not accept. One line, says what is wrong."""


class Sealed(Exception):
    """A plugin reached for data or metrics that only the harness may see."""


class Skip(Exception):
    """Raised by `skip`: the method does not apply here. The reason is shown in the record and on the site."""


def skip(reason: str) -> NoReturn:
    """Say that this method does not apply to this task, tier or device, and why (one line)."""
    raise Skip(reason)


@dataclass(frozen=True)
class Dataset:
    """One workload. `digests` maps a split's name to the sha256 of its contents, checked whenever it is loaded."""

    id: str
    version: int
    summary: str
    licence: str
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A frozen problem: dataset, backbones, ladder, metrics and protocol.

    Attributes:
        id: `<kind>/<name>`, unique over all tracks.
        version: raised whenever anything that can move a figure changes.
        backbones: role -> backbone id: what a method finds in `session.networks`.
        judges: role -> backbone id: networks of the metrics, which no method sees.
        reference: role whose single evaluation is the unit of NFE-equivalents; None where there is no network.
        bounded: handles whose rows count against the rung; `("*",)` is every network of the cell.
        unit: what a rung counts, for people ("NFE", "target forwards", ...).
        rungs: the ladder. One `run` call may spend rung x items of its batch.
        metrics: name -> "lower" | "higher" (which is better); the first is the headline.
        n, batch, seeds: items scored, items per `run` call, paired noise seeds.
        smoke_n, smoke_rungs: the same at tier smoke.
        probe: items of the call that is counted in FLOPs and audited.
        rounds, seconds: least rounds and seconds of the latency pass.

    Tasks that are not literals of a track, but made from what somebody brings (`stepmark.hub`), say how they differ:
        module: the module of inputs, check and score; "": the one whose TASKS holds the task.
        words: options of the command line that choose it; "": --task ID.
        checkpoint: sha256 of all that was brought (networks, guidance, prompts ...): figures of two checkpoints are never
            compared. "": none.
        origin: what was brought, in a line.
        price: rows of a network that one evaluation takes.
        absent: role -> why a method that asks for it is skipped, "*" for any other; {}: asking is a fault.
        untrained: why nothing can be trained; "": there is a train split.
        follows: the dataset whose settings methods keep to; "": its own.
        shown: whether outputs are kept to look at.
    """

    id: str
    version: int
    summary: str
    dataset: str
    unit: str
    rungs: tuple[int, ...]
    metrics: dict[str, str]
    n: int
    batch: int
    backbones: dict[str, str] = field(default_factory=dict)
    judges: dict[str, str] = field(default_factory=dict)
    reference: str | None = None
    bounded: tuple[str, ...] = ("*",)
    seeds: int = 3
    smoke_n: int = 8
    smoke_rungs: tuple[int, ...] = ()
    probe: int = 16
    rounds: int = 5
    seconds: float = 0.3
    module: str = ""
    words: str = ""
    checkpoint: str = ""
    origin: str = ""
    price: int = 1
    absent: dict[str, str] = field(default_factory=dict)
    untrained: str = ""
    follows: str = ""
    shown: bool = True

    def ladder(self, tier: str) -> tuple[int, ...]:
        """The rungs walked at this tier."""
        return (self.smoke_rungs or self.rungs[:2]) if tier == "smoke" else self.rungs

    def items(self, tier: str) -> int:
        """How many items are scored at this tier."""
        return self.smoke_n if tier == "smoke" else self.n


@dataclass(frozen=True)
class Score:
    """A metric over all items, and over each bootstrap resample of the items (paired between methods)."""

    value: float
    resamples: list[float]


def digest_of(data: Mapping[str, Any]) -> str:
    """sha256 over tensors (shape, dtype, bytes), arrays, lists and scalars, in the order of the sorted keys."""
    sha = hashlib.sha256()

    def feed(value: Any) -> None:
        if hasattr(value, "detach"):
            value = value.detach().cpu().contiguous().numpy()
        if hasattr(value, "tobytes") and hasattr(value, "dtype"):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.tobytes())
        elif isinstance(value, Mapping):
            for key in sorted(value):
                sha.update(str(key).encode())
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            sha.update(f"[{len(value)}]".encode())
            for item in value:
                feed(item)
        else:
            sha.update(repr(value).encode())

    feed(data)
    return sha.hexdigest()


_method_running = 0


@contextlib.contextmanager
def sealed() -> Iterator[None]:
    """While inside, only the train split can be loaded: the harness wraps every call into a plugin with this."""
    global _method_running
    _method_running += 1
    try:
        yield
    finally:
        _method_running -= 1


def seal() -> None:
    """As `sealed`, for good: in the processes of methods."""
    global _method_running
    _method_running += 1


def harness_only(what: str) -> None:
    """Raise `Sealed` if a plugin's code is running: tracks call it first in `inputs` and `score`."""
    if _method_running:
        raise Sealed(f"{what} is out of a method's reach; use session.train in prepare and the batch given to run")


def load_split(dataset: str, name: str) -> dict[str, Any]:
    """The named split of `datasets/<dataset>.py`, checked against its digest.

    Raises:
        Sealed: a plugin asked for anything but the train split.
        ValueError: the data differ from the digest in the file.
    """
    if name != "train":
        harness_only(f"split {name!r} of dataset {dataset!r}")
    return _load(dataset, name)


@lru_cache(maxsize=32)
def _load(dataset: str, name: str) -> dict[str, Any]:
    module = importlib.import_module(f"stepmark.datasets.{dataset}")
    data = module.split(name)
    expected = module.DATASET.digests.get(name)
    found = digest_of(data)
    if expected is not None and expected != found:
        raise ValueError(
            f"dataset {dataset} v{module.DATASET.version}, split {name}: digest {found[:12]} is not {expected[:12]}; "
            "raise the version and the digest if the change is meant, else restore the file"
        )
    return data
