"""Records as strangers may send them: files that are none, strays, marks of a merge, numbers that are no numbers."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepmark import disk
from stepmark import record as records
from stepmark.record import Record, RecordError


def line(**changes: Any) -> str:
    """A record's line with some fields changed."""
    base: dict[str, Any] = {
        "schema_version": 2, "suite": "0.1.0", "track": "image", "method": "euler", "task": "sampling/mixtures_flow",
        "rung": 4, "seed": 0, "tier": "smoke", "machine": "epyc-2c-00000000", "status": "ok", "counts": {"nfe": 4.0},
        "quality": {"fd": {"value": 1.0, "resamples": [1.0, 1.5]}}, "command": "stepmark run",
        "created": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    return json.dumps(base | changes)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The file of a method that holds one record, in its place below `tmp_path`."""
    record = records.parse(line(environment={"cpu": "a"}), "here:1")
    path = records.path_of(tmp_path, record)
    records.append(path, record)
    return path


# what is no file --------------------------------------------------------------------------------


def _socket(path: Path) -> None:
    at = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(at)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a FIFO": lambda path: os.mkfifo(path),
    "a socket": _socket,
    "a folder": lambda path: path.mkdir(),
    "a link": lambda path: path.symlink_to("/dev/zero"),
    "a link ": lambda path: path.symlink_to("euler.jsonl"),
    "a link  ": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_file_is_refused_and_never_opened(place: Path, tmp_path: Path, kind: str) -> None:
    path = place.with_name("ddim.jsonl")
    FOREIGN[kind](path)
    cell = records.parse(line(method="ddim"), "here:1")
    for act in (
        lambda: records.read_all(tmp_path),
        lambda: list(records.read(path)),
        lambda: records.append(path, cell),
    ):
        with pytest.raises(RecordError, match=r"ddim\.jsonl") as caught:
            act()
        assert "\n" not in str(caught.value)
    with pytest.raises(RecordError, match=kind.strip()):
        records.files(tmp_path)


def test_a_device_is_no_file() -> None:
    with pytest.raises(RecordError, match="is a device"):
        disk.bytes_of(Path("/dev/zero"), 100)


def test_a_linked_folder_is_refused(place: Path, tmp_path: Path) -> None:
    (place.parent.parent / "decoding").symlink_to("/")
    with pytest.raises(RecordError, match="decoding is a link"):
        records.read_all(tmp_path)


def test_an_environment_is_a_plain_file_of_some_size(place: Path, tmp_path: Path) -> None:
    (path,) = records.environments(place).iterdir()
    path.unlink()
    for make, words in (
        (lambda: path.symlink_to("/dev/zero"), "is a link"),
        (lambda: os.mkfifo(path), "is a FIFO"),
        (lambda: path.write_bytes(b" " * 200_000), "larger than"),
    ):
        make()
        records.environment_of.cache_clear()
        with pytest.raises(RecordError, match=words):
            list(records.read(place))
        path.unlink()


def test_an_enormous_file_is_refused_unread(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.open("r+b") as stream:
        stream.truncate(2**40)  # a sparse file: nothing of it is on the disk
    with pytest.raises(RecordError, match="is larger than"):
        records.read_all(tmp_path)


def test_a_stray_file_stops_nothing(place: Path, tmp_path: Path) -> None:
    for name in (
        "._euler.jsonl", ".euler.jsonl.swp", "euler.jsonl.orig", "euler.jsonl~", "#euler.jsonl#", "Thumbs.db",
        ".DS_Store", "euler_LOCAL_17.jsonl", "euler (copy).jsonl", "euler.sync-conflict-1.jsonl", "desktop.ini",
    ):  # fmt: skip
        for folder in (place.parent, place.parent.parent, tmp_path):
            (folder / name).write_bytes(b"\x00\xff no record\n")
    os.mkfifo(place.with_name("._ddim.jsonl"))
    (tmp_path / ".git").symlink_to("/")
    assert [r.method for r in records.read_all(tmp_path)] == ["euler"]


# what a merge, another system or a killed writer leaves ------------------------------------------


def rungs(path: Path) -> list[int]:
    return [r.rung for r in records.read(path)]


A, B, C = (line(rung=rung) for rung in (1, 2, 4))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{A}\n<<<<<<< HEAD\n{B}\n=======\n{C}\n>>>>>>> theirs\n", [1, 2, 4]),
        (f"{A}\n<<<<<<< HEAD\n{B}\n||||||| 0123abc\n{A}\n=======\n{C}\n>>>>>>> a: b\n", [1, 2, 1, 4]),
        (f"<<<<<<< HEAD\r\n{B}\r\n=======\r\n{C}\r\n>>>>>>> theirs", [2, 4]),
        (f"{A}\r\n{B}\r\n", [1, 2]),
        (f"{A}\r{B}\r", [1, 2]),
        (f"\ufeff{A}\n{B}\n", [1, 2]),
        (f"{A}\n\ufeff{B}\n\n \n", [1, 2]),
        (f"{A}{B}\n{C}", [1, 2, 4]),
        (f"{A}\n{B} {C}", [1, 2, 4]),
        (f"{A}\n{B}{C[:50]}", [1, 2]),
        (f"\ufeff{A}", [1]),
        (f"{A}\n{A}\n", [1, 1]),
        ("", []),
        ("\ufeff", []),
    ],
)
def test_records_are_read_whatever_stands_around_them(tmp_path: Path, text: str, found: list[int]) -> None:
    path = tmp_path / "euler.jsonl"
    path.write_text(text, newline="")
    assert rungs(path) == found
    records.append(path, records.parse(line(rung=64), "here:1"))
    assert rungs(path) == [*found, 64]  # nothing that could be read is cut away


def test_a_text_that_looks_like_a_mark_or_a_record_stays_a_text(tmp_path: Path) -> None:
    message = 'x }{"schema_version": 2} <<<<<<< HEAD ======='
    path = tmp_path / "euler.jsonl"
    path.write_text(line(status="failed", message=message) + "\n")
    assert [r.message for r in records.read(path)] == [message]


@pytest.mark.parametrize("text", ["<<<<<<<HEAD", "====", "======= x", "> x"])
def test_what_only_looks_like_a_mark_is_no_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "euler.jsonl"
    path.write_text(f"{A}\n{text}\n{B}\n")
    with pytest.raises(RecordError, match=r"euler\.jsonl:2: not a JSON record"):
        rungs(path)


# numbers ----------------------------------------------------------------------------------------

LATENCY = {"items": 1, "median_ms": 1.0, "iqr_ms": 0.0, "p95_ms": 1.0, "samples_ms": [1.0]}


def wrong() -> Iterator[dict[str, Any]]:
    """Fields with one value each that is not what it should be."""
    for value in (True, "4", [4], {}, -1, 1e300, 10**400):
        yield {"counts": {"nfe": value}}
        yield {"handles": {"teacher": {"calls": value}}}
    for value in (True, "4", 4.5, -1, 10**13):
        yield {"rung": value}
        yield {"seed": value}
        yield {"latency": LATENCY | {"items": value}}
    for value in (True, "1", -1.0, None):
        yield {"latency": LATENCY | {"median_ms": value}}
        yield {"latency": LATENCY | {"samples_ms": [1.0, value]}}
        yield {"latency": LATENCY | {"beside": {"heun": [value]}}}
        yield {"memory": {"peak_mib": value, "how": "x", "state_mib": 0.0}}
        yield {"energy": {"joules": value, "idle_watts": None, "window_s": 1.0, "sensor": "x"}}
        yield {"offline": {"seconds": value, "state_mib": 0.0}}
        yield {"offline": {"seconds": 0.0, "state_mib": 0.0, "evaluations": {"teacher": value}}}
    for value in (True, "1", None, 10**400):
        yield {"quality": {"fd": {"value": value}}}
        yield {"quality": {"fd": {"value": 1.0, "resamples": [value, 1.0]}}}
        yield {"quality": {"fd": {"value": 1.0, "resamples": [2, 5, [value]]}}}
    yield {"schema_version": True}
    yield {"counts": {f"count_{i}": 1.0 for i in range(300)}}
    yield {"quality": {f"metric_{i}": {"value": 1.0} for i in range(300)}}
    yield {"flags": ["x"] * 300}


@pytest.mark.parametrize("fields", list(wrong()), ids=lambda fields: json.dumps(fields)[:60])
def test_what_is_no_such_number_is_refused_by_both_readers(fields: dict[str, Any]) -> None:
    for text in (line(**fields), json.dumps(json.loads(line(**fields)), separators=(",", ":"))):
        with pytest.raises(RecordError, match=r"^here:1: ") as caught:
            records.parse(text, "here:1")
        assert len(str(caught.value)) < 300


# which record of a cell counts -------------------------------------------------------------------


def test_a_repetition_without_timing_takes_no_times_away() -> None:
    timed = records.parse(line(latency=LATENCY), "here:1")
    change = {"latency": None, "reasons": {"latency": records.UNTIMED}, "created": "2026-02-01T00:00:00Z"}
    bare = timed.model_copy(update=change)
    other = bare.model_copy(update={"digests": {"method": "ab" * 8}})
    flagged = bare.model_copy(update={"status": "flagged"})

    def counts(*found: Record) -> Record:
        (one,) = records.latest(found)
        return one

    assert counts(timed, bare) is timed
    assert counts(bare, timed) is timed
    assert counts(timed, other) is other  # of other sources
    assert counts(timed, flagged) is flagged
