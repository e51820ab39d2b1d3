"""Records: one JSON line per cell, written whole or not at all, read as untrusted input.

`leaderboard/results/<suite version>/<machine>/<track>/<method>.jsonl`. Numbers are finite or null; a figure that could
not be measured is null and its reason stands beside it.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationError,
)

SCHEMA_VERSION = 1
LONGEST_LINE = 2_000_000

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_]{0,63}$")]
TaskId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_]{0,63}/[a-z0-9][a-z0-9_]{0,63}$")]
MachineId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{0,95}$")]
Line = Annotated[str, StringConstraints(max_length=2000)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16,64}$")]
Figure = Annotated[float, Field(allow_inf_nan=False)]


def _packed(values: list[float]) -> list[float]:
    """The same numbers in a quarter of the memory: a site holds a hundred thousand records at once."""
    return cast("list[float]", array("d", values))


_AsList = PlainSerializer(list, return_type=list[float])
Figures = Annotated[list[Figure], AfterValidator(_packed), _AsList]
Resamples = Annotated[list[Figure], Field(max_length=2000), AfterValidator(_packed), _AsList]


class RecordError(Exception):
    """A record file cannot be read. One line that names file and line."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Quality(_Strict):
    """A metric over all items and over the paired bootstrap resamples of the items."""

    value: Figure
    resamples: Resamples


class Latency(_Strict):
    """Wall time of one `run` call of `items` items, interleaved with the baseline in rounds. Milliseconds."""

    items: int
    median_ms: Figure
    iqr_ms: Figure
    p95_ms: Figure
    samples_ms: Figures
    cuda_ms: Figure | None = None
    baseline: Name | None = None
    baseline_median_ms: Figure | None = None
    baseline_samples_ms: Figures | None = None
    speedup: Figure | None = None
    speedup_low: Figure | None = None
    speedup_high: Figure | None = None


class Memory(_Strict):
    """Peak above the loaded state during one `run` call, MiB, and how it was read."""

    peak_mib: Figure
    how: Line
    state_mib: Figure


class Energy(_Strict):
    """Joules of one `run` call, idle power beside it, and the sensor."""

    joules: Figure
    idle_watts: Figure | None
    window_s: Figure
    sensor: Line


class Offline(_Strict):
    """What `prepare` cost: wall seconds, evaluations by handle, size of what it left, shared trainings included.

    `seed`: the seed of the training; None where no random numbers were drawn, so that all seeds share it.
    """

    seconds: Figure
    evaluations: dict[Name, Figure]
    state_mib: Figure
    seed: Annotated[int, Field(ge=0, le=10**6)] | None = None


class Record(_Strict):
    """One cell: a method on a task at a rung with a seed, on a machine."""

    schema_version: Literal[1] = 1
    suite: Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z.+-]{1,32}$")]
    track: Name
    method: Name
    task: TaskId
    rung: Annotated[int, Field(ge=0, le=10**12)]
    seed: Annotated[int, Field(ge=0, le=10**6)]
    tier: Literal["smoke", "embedded", "hub"]
    machine: MachineId
    status: Literal["ok", "flagged", "failed", "skipped"]
    message: Line | None = None
    flags: list[Line] = []
    counts: dict[Name, Figure] = {}
    handles: dict[Name, dict[Name, Figure]] = {}
    reported: dict[Name, Figure] = {}
    quality: dict[Name, Quality] = {}
    latency: Latency | None = None
    memory: Memory | None = None
    energy: Energy | None = None
    offline: Offline | None = None
    reasons: dict[Name, Line] = {}
    outputs: Digest | None = None
    digests: dict[Name, Digest] = {}
    environment: dict[Name, Line] = {}
    command: Line
    created: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{7,40}(-dirty)?$")] | None = None

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """(method, task, rung, seed, tier): what a resumed suite looks for."""
        return (self.method, self.task, self.rung, self.seed, self.tier)


def path_of(root: Path, record: Record) -> Path:
    """Where a record belongs below the results folder."""
    return root / record.suite / record.machine / record.track / f"{record.method}.jsonl"


def _finite_only(token: str) -> Any:
    raise ValueError(f"{token} is not allowed; write null and a reason")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the same key stands twice in one object")
    return found


def _plainly(line: str) -> Record | None:
    """A record that is written as `append` writes it, in a third of the time; None leaves the line to a closer look.

    The parser behind this one lets a key stand twice. With no space before a colon every key is one `":`, so that as
    many of these as the record has keys leave no room for a second one.
    """
    if '" ' in line or '"\t' in line or '"\r' in line:
        return None
    try:
        record = Record.model_validate_json(line)
    except ValueError:
        return None
    # A field that this count does not know makes the numbers differ, which costs time and nothing else.
    tables: tuple[Mapping[str, Any], ...] = (
        record.counts, record.handles, record.reported, record.quality, record.reasons, record.digests,
    )  # fmt: skip
    parts = [part for part in (record.latency, record.memory, record.energy, record.offline) if part is not None]
    keys = len(record.model_fields_set) + sum(map(len, tables)) + len(record.environment)
    keys += sum(map(len, record.handles.values())) + 2 * len(record.quality)
    keys += sum(len(part.model_fields_set) for part in parts)
    keys += len(record.offline.evaluations) if record.offline else 0
    return record if keys == line.count('":') and "schema_version" in record.model_fields_set else None


def parse(line: str, where: str) -> Record:
    """One record from its line; `where` (file:line) begins the error message.

    Raises:
        RecordError: not JSON, not finite, a foreign schema version, missing or unknown fields, wild values.
    """
    if len(line) > LONGEST_LINE:
        raise RecordError(f"{where}: the line is {len(line)} characters long, at most {LONGEST_LINE} are read")
    plain = _plainly(line)
    if plain is not None:
        return plain
    try:
        data = json.loads(line, parse_constant=_finite_only, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: not a JSON record ({error}); restore the file or remove the line") from None
    if not isinstance(data, dict):
        raise RecordError(f"{where}: a record is an object, this is a {type(data).__name__}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise RecordError(
            f"{where}: schema version {str(data.get('schema_version'))[:20]!r}, this Stepmark reads {SCHEMA_VERSION}; "
            "read it with the version that wrote it"
        )
    try:
        return Record.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:80]
        raise RecordError(f"{where}: field {place}: {first['msg']}") from None


def read(path: Path) -> Iterator[Record]:
    """Every record of a file. A torn last line (a killed writer) is left out; any other fault is a `RecordError`."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        place = path.read_bytes()[: error.start].count(b"\n") + 1
        raise RecordError(f"{path}:{place}: not UTF-8 text") from None
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        if line.strip():
            yield parse(line, f"{path}:{number}")


def read_all(root: Path) -> list[Record]:
    """Every record below a results folder, later ones replacing earlier ones of the same cell and machine.

    Raises:
        RecordError: also when a record lies in a folder that its own fields do not name.
    """
    found: dict[tuple[Any, ...], Record] = {}
    for path in sorted(root.rglob("*.jsonl")):
        for record in read_once(path):
            if path_of(root, record) != path:
                raise RecordError(f"{path}: holds a record that belongs in {path_of(root, record).relative_to(root)}")
            found[(record.suite, record.machine, *record.key)] = record
    return list(found.values())


def read_once(path: Path) -> tuple[Record, ...]:
    """The records of a file, which is parsed again only after it has changed."""
    state = path.stat()
    return _read_once(path, (state.st_mtime_ns, state.st_size, state.st_ino))


@lru_cache(maxsize=4096)
def _read_once(path: Path, state: tuple[int, ...]) -> tuple[Record, ...]:
    """`state` stands for the bytes of the file."""
    return tuple(read(path))


def append(path: Path, record: Record) -> None:
    """Add one record: whole (one write, flushed to disk) or not at all.

    A torn line that a killed writer left at the end of the file is cut off first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = record.model_dump_json(exclude_none=False).encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
        end = _whole_length(handle)
        os.ftruncate(handle, end)
        os.lseek(handle, end, os.SEEK_SET)
        written = 0
        while written < len(line):
            written += os.write(handle, line[written:])
        os.fsync(handle)
    finally:
        os.close(handle)


def _whole_length(handle: int) -> int:
    size = os.fstat(handle).st_size
    position = size
    while position > 0:
        step = min(65536, position)
        block = os.pread(handle, step, position - step)
        newline = block.rfind(b"\n")
        if newline >= 0:
            return position - step + newline + 1
        position -= step
    return 0


def keys(path: Path) -> dict[tuple[str, str, int, int, str], Record]:
    """The cells that a file already holds."""
    return {record.key: record for record in read(path)} if path.exists() else {}
