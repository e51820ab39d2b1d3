"""Locks between processes: a device that is timed, a state that is made, each by one process at a time.

A lock is the kernel's (`flock`), which frees it when its process ends, however it ends. Some file systems have none, as
network homes without a lock daemon: there the existence of a second file is the lock, with host and process in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


class Held(Exception):
    """Another process holds the lock: which, as far as it is known, and what to do where it may be gone."""


def folder() -> Path:
    """Where the locks of devices are: one place for all who measure on this machine, whatever their caches are.

    `$STEPMARK_LOCKS` names another; containers that share processors or a GPU may share such a folder.
    """
    if chosen := os.environ.get("STEPMARK_LOCKS"):
        return Path(chosen)
    return Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), "stepmark-locks")


def here() -> str:
    """Eight digits for the running system: the same in all its containers, another on any other machine that shares a
    folder with it."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        name = platform.node()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


@contextlib.contextmanager
def held(path: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock of a file, and say in it who does; wait so many seconds for another holder.

    Raises:
        Held: another process has not let go. ValueError: no lock can be had here, in one line.
    """
    try:
        handle = _opened(path)
    except OSError as error:
        raise ValueError(_cannot(path, error)) from None
    try:
        with _locked(handle, path, wait_s):
            with contextlib.suppress(OSError):  # another user's file may not be ours to write in
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()} {platform.node()}".encode(), 0)
            yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def briefly(handle: int, path: Path, wait_s: float = 60.0) -> Iterator[None]:
    """Hold the lock of an open file while something is written beside others. It takes them no minute: where the lock
    cannot be had, it is written without, for what has been measured must not be lost."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(Held, ValueError):
            stack.enter_context(_locked(handle, path, wait_s))
        yield


@contextlib.contextmanager
def _locked(handle: int, path: Path, wait_s: float) -> Iterator[None]:
    try:
        _flock(handle, wait_s)
    except OSError as error:
        if error.errno in BUSY:
            raise Held(_holder(path)) from None
        with _marked(path.with_name(f"{path.name}.held"), wait_s):
            yield
    else:
        yield


def _flock(handle: int, wait_s: float) -> None:
    """The kernel's lock. Raises OSError: of `BUSY` where another has it, else there is none on this file system."""
    limit = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in BUSY or time.monotonic() >= limit:
                raise
        time.sleep(0.05)


@contextlib.contextmanager
def _marked(path: Path, wait_s: float) -> Iterator[None]:
    """A file that is there while the lock is held. What a process of this host left behind when it was killed goes."""
    from filelock import SoftFileLock, Timeout

    lock = SoftFileLock(path, timeout=max(wait_s, 0.5))  # time to find out that a holder is dead
    try:
        lock.acquire(poll_interval=0.05)
    except Timeout:
        raise Held(f"{_holder(path)} (if it is gone, delete {path})") from None
    except OSError as error:
        raise ValueError(_cannot(path, error)) from None
    try:
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    """Who holds a lock, by what stands in its file."""
    try:
        pid, host = [*path.read_text(encoding="utf-8").split(), "", ""][:2]
    except (OSError, UnicodeDecodeError):
        pid = host = ""
    if not pid.isdigit():
        return "another process"
    return f"process {pid}" + (f" on {host}" if host and host != platform.node() else "")


def _cannot(path: Path, error: OSError) -> str:
    return (
        f"cannot lock {path} ({error.strerror or error}); "
        f"name a folder that can be written in {'STEPMARK_LOCKS' if path.parent == folder() else 'STEPMARK_CACHE'}"
    )


def _opened(path: Path) -> int:
    """A file that every user may lock: a folder as `/tmp` is one, no links followed."""
    try:
        path.parent.mkdir(parents=True)
    except FileExistsError:
        pass
    else:
        if path.parent == folder() and "STEPMARK_LOCKS" not in os.environ:
            path.parent.chmod(0o1777)
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:  # without O_CREAT, which systems refuse on files of others in such a folder
        return os.open(path, flags | os.O_RDWR)
    except FileNotFoundError:
        handle = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
        if stat.S_IMODE(os.stat(path.parent).st_mode) == 0o1777:
            with contextlib.suppress(OSError):
                os.fchmod(handle, 0o666)
        return handle
    except PermissionError:
        return os.open(path, flags | os.O_RDONLY)
