"""Files that anybody may have written: only plain ones are opened, read up to a limit, changed whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import cast

from stepmark import locks

BETWEEN = re.compile("[\\s\ufeff]*")


class RecordError(Exception):
    """A record file cannot be read. One line that names file and line."""


def kind(mode: int) -> str:
    """What a path leads to, in words."""
    words = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return words.get(stat.S_IFMT(mode), "a device")


def bytes_of(path: Path, most: int) -> bytes:
    """All of a file. A link could lead out of the folder, a FIFO waits and a device goes on for ever: none is opened.

    Raises:
        FileNotFoundError: nothing is there. RecordError: no regular file, too large, or not to be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        said = "is a link; give the file itself" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
        raise RecordError(f"{path} {said}") from None
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise RecordError(f"{path} is {kind(state.st_mode)}, and records are read from files only; remove it")
        content = b""
        if state.st_size <= most:
            with open(handle, "rb", closefd=False) as stream:
                content = stream.read(most + 1)
        if max(state.st_size, len(content)) > most:
            raise RecordError(f"{path} is larger than {most} bytes")
        return content
    finally:
        os.close(handle)


def replace_whole(path: Path, text: str) -> None:
    """Give a file this content: all of it, on disk, or none of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def torn(tail: bytes) -> int:
    """How many bytes at the end of a last line without its end are no whole object: what a killed writer left."""
    text, at = tail.decode("utf-8", "surrogateescape"), 0
    while (start := cast("re.Match[str]", BETWEEN.match(text, at)).end()) < len(text):
        try:
            at = json.JSONDecoder().raw_decode(text, start)[1]
        except (ValueError, RecursionError):
            return len(text[start:].encode("utf-8", "surrogateescape"))
    return 0


def add_line(path: Path, line: bytes) -> None:
    """Put a line at the end of a file: one write, flushed to disk.

    A torn line that a killed writer left there is cut off; one that lacks nothing but its end is kept.

    Raises:
        RecordError: no regular file, or not to be written.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        said = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise RecordError(f"{path} cannot be written: {said}") from None
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise RecordError(f"{path} is {kind(state.st_mode)}, and records are written to files only; remove it")
        with locks.briefly(handle, path):
            size = os.fstat(handle).st_size
            end = _whole_length(handle, size)
            tail = os.pread(handle, size - end, end)
            tail = tail[: len(tail) - torn(tail)]
            end += len(tail)
            line = (b"\n" if tail.strip() else b"") + line + b"\n"
            os.ftruncate(handle, end)
            os.lseek(handle, end, os.SEEK_SET)
            written = 0
            while written < len(line):
                written += os.write(handle, line[written:])
            os.fsync(handle)
    finally:
        os.close(handle)


def _whole_length(handle: int, size: int) -> int:
    """Up to and with the end of the last line that has one."""
    position = size
    while position > 0:
        step = min(65536, position)
        block = os.pread(handle, step, position - step)
        newline = block.rfind(b"\n")
        if newline >= 0:
            return position - step + newline + 1
        position -= step
    return 0
