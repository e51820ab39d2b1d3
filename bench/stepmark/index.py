"""The index of plugins: what every method's file says, kept on disk so that listing a thousand of them is instant.

It hangs on the size and the time of change of each file and on the code that reads them. Delete it freely.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stepmark.literals import MethodInfo
from stepmark.method import Claim, Paper
from stepmark.places import PACKAGE, cache_folder

State = tuple[int, int, int]
READERS = ("index.py", "literals.py", "method.py", "plugins.py", "syntax.py")


def state_of(path: Path) -> State:
    """What stands for the bytes of a file."""
    found = os.stat(path)
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def _place() -> Path:
    return cache_folder() / "index.json"


def _readers() -> list[list[int]]:
    return [list(state_of(PACKAGE / name)) for name in READERS]


def load() -> dict[Path, tuple[State, tuple[MethodInfo, ...]]]:
    """path -> (state, what the file says); {} where there is no index, or one of other code."""
    try:
        kept = json.loads(_place().read_bytes())
        if kept["readers"] != _readers():
            return {}
        return {Path(path): (tuple(state), tuple(map(info_of, infos))) for path, state, infos in kept["files"]}
    except (OSError, ValueError, KeyError, TypeError, SyntaxError):
        return {}


def save(known: Mapping[Path, tuple[State, tuple[MethodInfo, ...]]]) -> None:
    """Write the index whole or not at all. Where the cache cannot be written, listing is slower, and that is all."""
    files = [
        (str(path), state, [plain_of(info) for info in infos])
        for path, (state, infos) in known.items()
        if path.exists()
    ]
    with contextlib.suppress(OSError):
        _place().parent.mkdir(parents=True, exist_ok=True)
        temporary = _place().with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"readers": _readers(), "files": files}), encoding="utf-8")
        temporary.replace(_place())


def plain_of(info: MethodInfo) -> dict[str, Any]:
    """What a file says of a method, as JSON can carry it."""
    return {**asdict(info), "path": str(info.path), "overrides": repr(info.overrides)}


def info_of(plain: Mapping[str, Any]) -> MethodInfo:
    """And back."""
    paper = plain["paper"]
    return MethodInfo(
        **{
            **plain,
            "path": Path(plain["path"]),
            "paper": paper and Paper(**paper),
            "tasks": tuple(plain["tasks"]),
            "baselines": tuple(plain["baselines"]),
            "claims": tuple(Claim(**claim) for claim in plain["claims"]),
            "overrides": ast.literal_eval(plain["overrides"]),
        }
    )
