"""Locks: one holder at a time, on file systems that have none too, and nobody waits for a process that is gone."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepmark import engine, locks, prepared


def refused(number: int) -> Any:
    """A `flock` as a network home without a lock daemon has it."""

    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock


NONE = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL]


@pytest.mark.parametrize("number", [None, *NONE], ids=lambda number: errno.errorcode.get(number, "flock"))
def test_one_at_a_time_whether_or_not_the_file_system_has_locks(
    number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if number is not None:
        monkeypatch.setattr(fcntl, "flock", refused(number))
    path = tmp_path / "a" / "one.lock"
    with locks.held(path), pytest.raises(locks.Held, match=f"^process {os.getpid()}"), locks.held(path):
        pass
    with locks.held(path):  # it was let go
        pass


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refused(errno.ENOLCK))
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    marker = tmp_path / "one.lock.held"
    marker.write_text(f"{done.pid}\n{platform.node()}\n")
    with locks.held(tmp_path / "one.lock"):
        assert marker.read_text().split()[0] == str(os.getpid())
    marker.write_text("7\nsome-other-host\n")  # of another host nobody can tell
    said = rf"process 7 on some-other-host \(if it is gone, delete {marker}\)"
    with pytest.raises(locks.Held, match=said), locks.held(tmp_path / "one.lock"):
        pass


def test_a_state_is_made_twice_rather_than_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refused(errno.EOPNOTSUPP))
    monkeypatch.setattr(prepared, "LONGEST_WAIT_S", 0.1)
    path = tmp_path / "toy.safetensors"
    for name in ("toy.lock.held", "toy-0.lock.held"):
        (tmp_path / name).write_text("7\nsome-other-host\n")
    made = prepared.kept(path, 0, lambda: prepared.State({}, True, prepared.Cost(0.0, {})))
    assert made.tensors == {} and prepared.find(path, 0)


def test_what_was_measured_is_written_whoever_holds_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    with open(path, "w") as one, open(path) as two:
        with locks.briefly(one.fileno(), path), locks.briefly(two.fileno(), path, 0.1):
            pass
        monkeypatch.setattr(fcntl, "flock", refused(errno.ENOLCK))
        monkeypatch.setattr(locks, "_marked", lambda path, wait_s: (_ for _ in ()).throw(ValueError("read only")))
        with locks.briefly(one.fileno(), path):
            one.write("kept")
    assert path.read_text() == "kept"


def test_locks_of_a_device_are_the_machines_not_the_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs with caches of their own time one device; two machines that share a folder have a device each."""
    monkeypatch.setenv("STEPMARK_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "one"))
    with engine.device_lock("cpu"):
        monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path / "two"))
        said = f"process {os.getpid()} is timing on cpu; wait"
        with pytest.raises(engine.DeviceBusy, match=said), engine.device_lock("cpu"):
            pass
        monkeypatch.setattr(locks, "here", lambda: "another0")
        with engine.device_lock("cpu"):
            pass
    monkeypatch.delenv("STEPMARK_LOCKS")
    assert locks.folder().name == "stepmark-locks" and locks.folder().parent.is_dir()
    assert not locks.folder().is_relative_to(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEPMARK_LOCKS", str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match=r"cannot lock .*; name a folder that can be written in STEPMARK_LOCKS") as one:
        list(engine.local([], "cpu", timing=True))
    assert "\n" not in str(one.value)


def test_a_lock_of_another_users_is_seen_and_links_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "one.lock", os.open
    path.write_text("12 elsewhere")

    def to_read_only(path: Any, flags: int, *more: Any, **names: Any) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "of somebody else's")
        return opened(path, flags, *more, **names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", to_read_only)
        with locks.held(path), pytest.raises(locks.Held, match="process 12 on elsewhere"), locks.held(path):
            pass
    with locks.held(path), pytest.raises(locks.Held), locks.held(path):
        pass
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="cannot lock"), locks.held(tmp_path / "link.lock"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
