"""Records: one JSON line per cell, written whole or not at all, read as untrusted input.

`leaderboard/results/<suite version>/<machine>/<track>/<method>.jsonl`. Numbers are finite or null; a figure that could
not be measured is null and its reason stands beside it. What a line leaves out has its default.

The environment of a record (hardware, libraries, threads) is a file of its own, `<machine>/environments/<digest>.json`,
which many records name by its digest. Nothing is ever changed in such a file, and lines are only added to the others, so
that results of two branches merge line by line (`.gitattributes`); readers take the newest record of a cell wherever it
stands. Records of schema 1 are read as well; `stepmark migrate` rewrites them.

Whether a record that can be read belongs to the suite and is whole, `admission` says.
"""

from __future__ import annotations

import datetime as dt
import errno
import hashlib
import json
import os
import re
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WrapValidator,
)

from stepmark import disk
from stepmark.disk import RecordError, bytes_of, replace_whole
from stepmark.plugins import DIGITS

SCHEMA_VERSION = 2
LONGEST_LINE = 2_000_000
LONGEST_FILE = 256_000_000  # bytes: a thousand times what a method with many rungs leaves
MOST_NAMES = 256  # in one table of a record
YEARS_TO_COME = 10  # clocks may be wrong, and tests may travel
LONGEST_ENVIRONMENT = 100_000  # bytes
LARGEST_COUNT = 1e24
MOST_DIGITS = 22  # the largest power of ten that a floating-point number holds
LARGEST = 2**53  # up to here a floating-point number holds every integer
METHOD_FILE = re.compile(r"[a-z0-9][a-z0-9_]{0,63}\.jsonl")
MARKERS = re.compile(r"(<{7}|>{7}|\|{7})( .*)?|={7}")  # what git leaves where it could not merge
GLUED = re.compile(r'(?<=\})\s*(?=\{"schema_version")')  # two records in a line; in a text the quotes would be escaped
UNTIMED = "run without timing"  # the reason of a latency that was not asked for

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_]{0,63}$")]
TaskId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_]{0,63}/[a-z0-9][a-z0-9_]{0,63}$")]
MachineId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{0,95}$")]
Device = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,15}$")]
Line = Annotated[str, StringConstraints(max_length=2000)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16,64}$")]
Figure = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[float, Field(allow_inf_nan=False, ge=0, le=LARGEST_COUNT)]
Amount = Annotated[float, Field(allow_inf_nan=False, ge=0)]
Key = tuple[str, str, int, int, str, str, str]
Lookup = Callable[[str], dict[str, str]]


def _possible(created: str) -> str:
    """A date that there is. Of two records of a cell the later one counts: one of the far future would count for ever."""
    when = dt.datetime.strptime(created, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=dt.UTC)
    if when.year > YEARS_TO_COME + dt.datetime.now(dt.UTC).year:
        raise ValueError("a date of the far future")
    return created


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# numbers ----------------------------------------------------------------------------------------


def _packed(values: list[float]) -> list[float]:
    """The same numbers in a quarter of the memory: a site holds a hundred thousand records at once."""
    return cast("list[float]", array("d", values))


def short(values: Sequence[float]) -> list[Any]:
    """Figures that lie close together as `[digits, around, [differences]]`, from which `_read_short` makes the very
    same floating-point numbers; as they are where no number of digits does.

    A fourth number is the step that all differences are counted in, of shares of n items n-ths; 0: all figures are the same,
    and in the place of the differences stands how many there are.
    """
    numbers = np.array(values, dtype=np.float64)
    for digits in range(MOST_DIGITS + 1 if numbers.size else 0):
        scaled = np.rint(numbers * 10.0**digits)
        if np.abs(scaled).max() >= LARGEST:
            break
        if (scaled / 10.0**digits == numbers).all():
            integers = scaled.astype(np.int64)
            around = int(np.sort(integers)[integers.size // 2])
            step = int(np.gcd.reduce(integers - around))
            if step == 0:
                return [digits, around, [integers.size], 0]
            differences = ((integers - around) // step).tolist()
            return [digits, around, differences] if step == 1 else [digits, around, differences, step]
    return list(values)


def _read_short(value: Any, whole: Callable[[Any], list[float]]) -> list[float]:
    """What `short` wrote: figure b is (around + step x differences[b]) / 10^digits."""
    if not (type(value) is list and len(value) in (3, 4) and type(value[2]) is list):
        return _packed(whole(value))
    digits, around, differences, step = [*value, 1][:4]
    if not (type(digits) is int and 0 <= digits <= MOST_DIGITS and type(around) is int and abs(around) <= LARGEST):
        raise ValueError("digits lie between 0 and 22, the middle is an integer of at most 2^53")
    if not (type(step) is int and 0 <= step <= LARGEST and (step or len(differences) == 1)):
        raise ValueError("a step is an integer of at most 2^53; 0 stands behind one number, how many figures there are")
    try:
        if not set(map(type, differences)) <= {int}:
            raise TypeError  # true is no number
        integers = array("q", differences)  # three times as fast as an array of NumPy's made from a list
    except (TypeError, OverflowError):
        raise ValueError("differences are integers of 64 bits") from None
    if not 0 < (len(integers) if step else integers[0]) <= 2000:
        raise ValueError("there are at least one and at most 2000 differences")
    if step == 0:
        return array("d", [around / 10.0**digits]) * integers[0]  # type: ignore[return-value]
    whole_ones = np.frombuffer(integers, np.int64)
    if step > 1 and np.abs(whole_ones.astype(np.float64)).max() * step > LARGEST:
        raise ValueError("differences times their step are at most 2^53")
    numbers = (whole_ones * step + around) / 10.0**digits
    return cast("list[float]", array("d", numbers.tobytes()))


_AsList = PlainSerializer(list, return_type=list[float])
Times = Annotated[list[Amount], Field(max_length=100_000), AfterValidator(_packed), _AsList]
Written = Annotated[list[Annotated[int, Field(ge=0, le=10**9)]], Field(max_length=100_000)]
Resamples = Annotated[list[Figure], Field(max_length=2000), WrapValidator(_read_short), _AsList]


# environments -----------------------------------------------------------------------------------


def _named(value: Any, plainly: Callable[[Any], dict[str, str]], info: ValidationInfo) -> dict[str, str]:
    """An environment by its digest, where whoever reads says in which folder to look (`parse`)."""
    lookup, whole = info.context or (None, True)
    if isinstance(value, str) and lookup is not None:
        return cast("dict[str, str]", lookup(value))
    if not whole:
        raise ValueError("an environment that stands in the line itself is not what `append` writes")
    return plainly(value)


Environment = Annotated[dict[Name, Line], Field(max_length=MOST_NAMES), WrapValidator(_named)]
_ENVIRONMENT: TypeAdapter[dict[str, str]] = TypeAdapter(dict[Name, Line])


def environments(path: Path) -> Path:
    """Where the environments of a record file's records lie."""
    return path.resolve().parent.parent / "environments"


def environment_digest(environment: Mapping[str, str]) -> str:
    """What records name an environment by."""
    return hashlib.sha256(json.dumps(dict(environment), sort_keys=True).encode()).hexdigest()[:DIGITS]


def keep_environment(folder: Path, environment: Mapping[str, str]) -> str:
    """Write an environment that is not there yet, whole or not at all; its digest."""
    digest = environment_digest(environment)
    path = folder / f"{digest}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        replace_whole(path, json.dumps(dict(environment), sort_keys=True, indent=1, ensure_ascii=False) + "\n")
    return digest


@lru_cache(maxsize=65536)
def environment_of(folder: Path, digest: str) -> dict[str, str]:
    """The environment of this digest, read once and shared by all records that name it.

    Raises:
        RecordError: not there, or not what the digest says.
    """
    if not re.fullmatch(rf"[0-9a-f]{{{DIGITS}}}", digest):
        raise RecordError(f"field environment: a digest has {DIGITS} hex digits, this is {digest[:80]!r}")
    path = folder / f"{digest}.json"
    try:
        found = _ENVIRONMENT.validate_json(bytes_of(path, LONGEST_ENVIRONMENT), strict=True)
    except OSError:
        raise RecordError(
            f"its environment {path} is not there; restore the file, which belongs to the records"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise RecordError(f"{path}: {'.'.join(map(str, first['loc']))[:80]}: {first['msg']}") from None
    if environment_digest(found) != digest:
        raise RecordError(f"{path} has been changed: its digest is {environment_digest(found)}; restore the file")
    return found


# the schema -------------------------------------------------------------------------------------


class Quality(_Strict):
    """A metric over all items and over the paired bootstrap resamples of the items."""

    value: Figure
    resamples: Resamples = Field(default_factory=list)


class Latency(_Strict):
    """Wall time of one `run` call of `items` items, interleaved with the baseline in rounds. Milliseconds.

    `beside`: samples of further methods that were timed in the same rounds, since a claim of time names them. `tokens`,
    `baseline_tokens`: how many tokens the call of each round wrote; [] where outputs are no texts.
    """

    items: Annotated[int, Field(ge=0, le=10**9)]
    median_ms: Amount
    iqr_ms: Amount
    p95_ms: Amount
    samples_ms: Times
    cuda_ms: Amount | None = None
    baseline: Name | None = None
    baseline_median_ms: Amount | None = None
    baseline_samples_ms: Times | None = None
    speedup: Amount | None = None
    speedup_low: Amount | None = None
    speedup_high: Amount | None = None
    beside: dict[Name, Times] = Field(default_factory=dict, max_length=MOST_NAMES)
    tokens: Written = Field(default_factory=list)
    baseline_tokens: Written = Field(default_factory=list)


class Memory(_Strict):
    """Peak above the loaded state during one `run` call, MiB, and how it was read."""

    peak_mib: Amount
    how: Line
    state_mib: Amount


class Energy(_Strict):
    """Joules of one `run` call, idle power beside it, and the sensor."""

    joules: Amount
    idle_watts: Amount | None
    window_s: Amount
    sensor: Line


class Offline(_Strict):
    """What `prepare` cost: wall seconds, evaluations by handle, updates of optimisers, size of what it left, shared
    trainings included. `updates` is None in records of before they were counted.

    `seed`: the seed of the training; None where no random numbers were drawn, so that all seeds share it, and in records
    of before it was kept.
    """

    seconds: Amount
    evaluations: dict[Name, Count] = Field(default_factory=dict, max_length=MOST_NAMES)
    state_mib: Amount
    seed: Annotated[int, Field(ge=0, le=10**6)] | None = None
    updates: Count | None = None


class Record(_Strict):
    """One cell: a method on a task at a rung with a seed, on a device of a machine.

    `device` is its kind (cpu, cuda); which one, the environment says. `checkpoint` is the digest of the networks of a
    user's own that the task was made from; "" for the tasks of the suite.
    """

    schema_version: Literal[2] = 2
    suite: Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z.+-]{1,32}$")]
    track: Name
    method: Name
    task: TaskId
    rung: Annotated[int, Field(ge=0, le=10**12)]
    seed: Annotated[int, Field(ge=0, le=10**6)]
    tier: Literal["smoke", "embedded", "hub"]
    machine: MachineId
    device: Device = "cpu"
    checkpoint: Digest | Literal[""] = ""
    status: Literal["ok", "flagged", "failed", "skipped"]
    message: Line | None = None
    flags: list[Line] = Field(default_factory=list, max_length=MOST_NAMES)
    counts: dict[Name, Count] = Field(default_factory=dict, max_length=MOST_NAMES)
    handles: dict[Name, dict[Name, Count]] = Field(default_factory=dict, max_length=MOST_NAMES)
    reported: dict[Name, Figure] = Field(default_factory=dict, max_length=MOST_NAMES)
    quality: dict[Name, Quality] = Field(default_factory=dict, max_length=MOST_NAMES)
    latency: Latency | None = None
    memory: Memory | None = None
    energy: Energy | None = None
    offline: Offline | None = None
    reasons: dict[Name, Line] = Field(default_factory=dict, max_length=MOST_NAMES)
    outputs: Digest | None = None
    digests: dict[Name, Digest] = Field(default_factory=dict, max_length=MOST_NAMES)
    environment: Environment = Field(default_factory=dict)
    command: Line
    created: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"), AfterValidator(_possible)]
    commit: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{7,40}(-dirty)?$")] | None = None

    @property
    def untimed(self) -> bool:
        """Whether it was made without timing: the cell is still to be timed."""
        return self.latency is None and self.reasons.get("latency") == UNTIMED

    @property
    def key(self) -> Key:
        """(method, task, rung, seed, tier, device, checkpoint): what a resumed suite looks for."""
        return (self.method, self.task, self.rung, self.seed, self.tier, self.device, self.checkpoint)


def version_key(suite: str) -> tuple[int, ...]:
    """Order of suite versions."""
    return tuple(int(part) for part in re.findall(r"\d+", suite)[:4])


def path_of(root: Path, record: Record) -> Path:
    """Where a record belongs below the results folder."""
    return root / record.suite / record.machine / record.track / f"{record.method}.jsonl"


def check_place(root: Path, path: Path, record: Record) -> None:
    """Raise `RecordError` for a record that its own fields put elsewhere than into this file below `root`."""
    belongs = path_of(root, record)
    if belongs != path:
        raise RecordError(f"{path}: holds a record that belongs in {belongs.relative_to(root)}; move it there")


def files(root: Path) -> list[Path]:
    """The record files below a results folder.

    What editors, file systems and tools of merging leave beside them has no method's name (`._x.jsonl`, `x.jsonl.orig`,
    `x_LOCAL_7.jsonl`) and is passed by.

    Raises:
        RecordError: a link, or what has a record file's name and is none: a folder, FIFO, socket or device.
    """

    def refuse(error: OSError) -> None:
        if error.errno != errno.ENOENT or Path(error.filename) != root:
            raise RecordError(f"{error.filename}: {error.strerror}; records cannot be read")

    found: list[Path] = []
    for name, folders, names in os.walk(root, onerror=refuse):
        here = Path(name)
        depth = len(here.relative_to(root).parts)
        folders[:] = [each for each in folders if not each.startswith(".")]
        for each in (*folders, *names):
            named = METHOD_FILE.fullmatch(each) is not None
            kind = (here / each).lstat().st_mode
            if (named and not stat.S_ISREG(kind)) or (each in folders and stat.S_ISLNK(kind)):
                raise RecordError(
                    f"{here / each} is {disk.kind(kind)}, and records are read from files only; remove it"
                )
            if named:
                found.append(here / each)
        if depth == 2 and "samples" in folders:  # which are read by `samples`
            folders.remove("samples")
    return sorted(found)


def latest(records: Iterable[Record]) -> list[Record]:
    """The newest record of each cell, machine and suite version, whatever their order; of equally new ones the last.

    A repetition without timing does not take away the times of a record of the same sources and outcome.
    """
    found: dict[tuple[Any, ...], Record] = {}
    for record in records:
        cell = (record.suite, record.machine, *record.key)
        if cell not in found or _replaces(record, found[cell]):
            found[cell] = record
    return list(found.values())


def _replaces(record: Record, other: Record) -> bool:
    if (record.digests, record.status) == (other.digests, other.status) and record.untimed != other.untimed:
        return other.untimed
    return record.created >= other.created


# reading ----------------------------------------------------------------------------------------


def _finite_only(token: str) -> Any:
    raise ValueError(f"{token} is not allowed; write null and a reason")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the same key stands twice in one object")
    return found


def _plainly(line: str, lookup: Lookup | None) -> Record | None:
    """A record that is written as `append` writes it, in a third of the time; None leaves the line to a closer look.

    The parser behind this one lets a key stand twice. With no space before a colon every key is one `":`, so that as
    many of these as the record has keys leave no room for a second one.
    """
    if line.startswith('{"schema_version":1') or '" ' in line or '"\t' in line or '"\r' in line:
        return None
    try:
        record = Record.model_validate_json(line, strict=True, context=(lookup, False))
    except ValueError:
        return None
    # A field that this count does not know makes the numbers differ, which costs time and nothing else.
    tables: tuple[Mapping[str, Any], ...] = (
        record.counts, record.handles, record.reported, record.quality, record.reasons, record.digests,
    )  # fmt: skip
    parts = [part for part in (record.latency, record.memory, record.energy, record.offline) if part is not None]
    keys = len(record.model_fields_set) + sum(map(len, tables))
    keys += sum(map(len, record.handles.values())) + sum(len(q.model_fields_set) for q in record.quality.values())
    keys += sum(len(part.model_fields_set) for part in parts)
    keys += len(record.offline.evaluations) if record.offline else 0
    keys += len(record.latency.beside) if record.latency else 0
    return record if keys == line.count('":') and "schema_version" in record.model_fields_set else None


def parse(line: str, where: str, folder: Path | None = None) -> Record:
    """One record from its line; `where` (file:line) begins the error message, `folder` holds the environments.

    Raises:
        RecordError: not JSON, not finite, a foreign schema version, missing or unknown fields, wild values, an
            environment that is not there.
    """
    if len(line) > LONGEST_LINE:
        raise RecordError(f"{where}: the line is {len(line)} characters long, at most {LONGEST_LINE} are read")
    lookup = None if folder is None else partial(environment_of, folder)
    try:
        return _plainly(line, lookup) or _closely(line, lookup)
    except RecordError as error:
        raise RecordError(f"{where}: {error}") from None


def _closely(line: str, lookup: Lookup | None) -> Record:
    try:
        data = json.loads(line, parse_constant=_finite_only, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not a JSON record ({error}); restore the file or remove the line") from None
    if not isinstance(data, dict):
        raise RecordError(f"a record is an object, this is a {type(data).__name__}")
    version = data.get("schema_version")
    if type(version) is not int or version not in (1, SCHEMA_VERSION):
        raise RecordError(
            f"schema version {str(version)[:20]!r}, this Stepmark reads 1 and {SCHEMA_VERSION}; "
            "read it with the version that wrote it"
        )
    try:
        fields = _of_schema_1(data) if version == 1 else data
        return Record.model_validate(fields, strict=True, context=(lookup, True))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:80]
        raise RecordError(f"field {place}: {first['msg']}") from None


def _of_schema_1(data: dict[str, Any]) -> dict[str, Any]:
    """The same in schema 2: the device was a line of the environment, digests were whole.

    Which checkpoint a task was made from was not said; the networks' digests together tell one from another.
    """
    for name in ("device", "checkpoint"):
        if name in data:
            raise RecordError(f"field {name}: schema 1 has none")
    found = data | {"schema_version": SCHEMA_VERSION}
    environment, digests = data.get("environment", {}), data.get("digests", {})
    if not isinstance(environment, dict) or not isinstance(digests, dict):
        return found  # validation says which
    found["environment"] = {name: value for name, value in environment.items() if name != "device"}
    found["device"] = environment.get("device", "cpu")
    found["digests"] = {n: d[:DIGITS] if isinstance(d, str) and len(d) <= 64 else d for n, d in digests.items()}
    if str(data.get("task")).startswith("checkpoint/"):
        networks = sorted((name, str(digest)) for name, digest in digests.items() if name.startswith("backbone_"))
        found["checkpoint"] = hashlib.sha256(json.dumps(networks).encode()).hexdigest()[:DIGITS]
    return found


def lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that hold something, numbered, one record in each: without byte-order marks, foreign ends of lines and
    what git writes around a conflict, both sides of which are records.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip(" \t\ufeff")
        if not line or (line[0] in "<>|=" and MARKERS.fullmatch(line)):
            continue
        for each in GLUED.split(line) if line.count('{"schema_version"') > 1 else (line,):
            yield number, each


def read(path: Path) -> Iterator[Record]:
    """Every record of a file. A torn last line (a killed writer) is left out; any other fault is a `RecordError`."""
    content = bytes_of(path, LONGEST_FILE)
    if torn := disk.torn(content[content.rfind(b"\n") + 1 :]):
        content = content[:-torn]
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = content[: error.start].count(b"\n") + 1
        raise RecordError(f"{path}:{place}: not UTF-8 text") from None
    folder = environments(path)
    for number, line in lines(text):
        yield parse(line, f"{path}:{number}", folder)


def everything(root: Path) -> list[Record]:
    """Every record below a results folder, those included that a later one of their cell replaces.

    Raises:
        RecordError: also when a record lies in a folder that its own fields do not name.
    """
    found: list[Record] = []
    for path in files(root):
        for record in read_once(path):
            check_place(root, path, record)
            found.append(record)
    return found


def read_all(root: Path) -> list[Record]:
    """The newest record of each cell, machine and suite version below a results folder; raises as `everything` does."""
    return latest(everything(root))


def read_once(path: Path) -> tuple[Record, ...]:
    """The records of a file, which is parsed again only after it has changed."""
    state = path.stat()
    return _read_once(path, (state.st_mtime_ns, state.st_size, state.st_ino))


@lru_cache(maxsize=4096)
def _read_once(path: Path, state: tuple[int, ...]) -> tuple[Record, ...]:
    """`state` stands for the bytes of the file."""
    return tuple(read(path))


def keys(path: Path) -> dict[Key, Record]:
    """The cells that a file already holds."""
    return {record.key: record for record in latest(read(path))} if path.exists() else {}


# writing ----------------------------------------------------------------------------------------

ALWAYS = {"schema_version", "device"}  # said even where they are the default


def line_of(record: Record) -> str:
    """A record as a line of its file, without the line's end: defaults left out, the environment by its digest."""
    fields = record.model_dump(exclude_defaults=True, exclude={"environment"})
    for quality in fields.get("quality", {}).values():
        if "resamples" in quality:
            quality["resamples"] = short(quality["resamples"])
    fields |= {name: getattr(record, name) for name in ALWAYS}
    if record.environment:
        fields["environment"] = environment_digest(record.environment)
    ordered = {name: fields[name] for name in Record.model_fields if name in fields}
    return json.dumps(ordered, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def append(path: Path, record: Record) -> None:
    """Add one record: whole (one write, flushed to disk) or not at all; its environment first, where it is new.

    A torn line that a killed writer left at the end of the file is cut off; one that lacks nothing but its end is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if record.environment:
        keep_environment(environments(path), record.environment)
    disk.add_line(path, line_of(record).encode())
