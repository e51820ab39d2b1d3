"""Which smoke tests `make test` runs: of the methods that a published record vouches for, some at each commit, by turns.

A record of today's sources says more than a smoke test of the same method and task could: the cell went through every pass
at full size and left a whole record. So all are run that no such record vouches for, and of the others every N-th, at least
one of each task, which ones is told by the commit: the house is tried on every task at every commit, and who repeats a run
at a commit repeats the same tests. The suite may then hold any number of methods. `pytest bench/` runs all of them.
"""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from stepmark import plugins
from stepmark.cell import digests
from stepmark.record import LONGEST_FILE, bytes_of, files

Pair = tuple[str, str]  # a method and a task


def in_turn(pairs: Sequence[Pair], vouched: Collection[Pair], turns: int, turn: int) -> list[Pair]:
    """The pairs whose turn it is, in their order: all that are not vouched for, and of each task's others every `turns`-th,
    one at least.

    Raises:
        ValueError: fewer turns than one.
    """
    if turns < 1:
        raise ValueError(f"--turns is 1 (all) or more, not {turns}")
    by_task: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair in vouched:
            by_task[pair[1]].append(pair)
    chosen = set(pairs) - set(vouched)
    for those in by_task.values():
        chosen.update(those[turn % turns :: turns] or [those[turn % len(those)]])
    return [pair for pair in pairs if pair in chosen]


def vouched(results: Path) -> set[Pair]:
    """Methods and tasks of which there is a published record of today's sources that is ok."""
    methods, tasks = plugins.methods(), plugins.tasks()
    now: dict[Pair, dict[str, str]] = {}
    found: set[Pair] = set()
    for path in files(results):
        for line in bytes_of(path, LONGEST_FILE).splitlines():
            try:
                r = json.loads(line)
                pair, status, sources = (r["method"], r["task"]), r["status"], r["digests"]
            except (ValueError, KeyError, TypeError):
                continue  # of an older schema, or torn: it vouches for nothing
            if status != "ok" or pair in found or pair[0] not in methods or pair[1] not in methods[pair[0]].tasks:
                continue
            if pair[1] in tasks and pair not in now:
                now[pair] = digests(methods[pair[0]], tasks[pair[1]][1])
            if sources == now.get(pair):
                found.add(pair)
    return found


def turn_of(root: Path) -> int:
    """A number that the commit tells; 0 where there is none."""
    asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout[:8], 16)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return 0
