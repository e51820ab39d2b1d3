"""What a plugin's process may not do to anybody else's: the operating system sees to it, not the interpreter.

On Linux a process gives up, for itself and all that it starts, writing outside a folder of its own, TCP, and signals to
processes outside (Landlock; which of these, the kernel's version says). Elsewhere nothing is taken away, and what a method
does to files and sockets is only watched (`stepmark.audit`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import sys
from collections.abc import Iterable

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # system calls, the same on every architecture
_NO_NEW_PRIVILEGES, _DEATH_SIGNAL = 38, 1
_WRITES = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))  # write, remove and make files of every kind
_REFER, _TRUNCATE = 1 << 13, 1 << 14  # since versions 2 and 3
_ON_FILES = (1 << 1) | _TRUNCATE  # what a rule about a file, not a folder, may speak of
_TCP, _SCOPES = 0b11, 0b11  # bind and connect (4); abstract sockets and signals (6)


def end_with_parent() -> None:
    """This process is killed when the one that started it is gone (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def confined(writable: Iterable[str], network: bool) -> str:
    """From now on this process writes nowhere but below `writable`, and has no TCP unless `network`.

    Returns what could not be taken away, in words; "": nothing.
    """
    if sys.platform != "linux":
        return "files and sockets are only watched: Landlock is Linux's"
    kernel = ctypes.CDLL(None, use_errno=True)
    version = kernel.syscall(_CREATE, None, 0, 1)
    if version < 1:
        return "files and sockets are only watched: this kernel has no Landlock"
    files = _WRITES | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    tcp = _TCP if version >= 4 and not network else 0
    scopes = _SCOPES if version >= 6 and not network else 0
    attributes = struct.pack("<QQQ", files, tcp, scopes)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = kernel.syscall(_CREATE, attributes, len(attributes), 0)
    if rules < 0:
        return f"files and sockets are only watched: {os.strerror(ctypes.get_errno())}"
    for path in writable:
        with contextlib.suppress(FileNotFoundError):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = files if os.path.isdir(path) else files & _ON_FILES
            kernel.syscall(_ADD, rules, 1, struct.pack("<Qi", allowed, place), 0)
            os.close(place)
    kernel.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    done = kernel.syscall(_RESTRICT, rules, 0)
    os.close(rules)
    if done < 0:
        return f"files and sockets are only watched: {os.strerror(ctypes.get_errno())}"
    missing = ["moving files"] * (version < 2) + ["cutting files"] * (version < 3) + ["TCP"] * (version < 4)
    return f"not taken away by this kernel: {', '.join(missing)}" if missing else ""
