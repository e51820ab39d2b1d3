"""One cell -> one record. Read it downwards: the runner prepares, the passes measure, their parts become the record."""

from __future__ import annotations

import datetime as dt
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from stepmark import __version__, passes, plugins, record, runner, samples
from stepmark.cell import Cell, digests, track_of
from stepmark.judge import Judge
from stepmark.meter import machine
from stepmark.meter.counts import BudgetExceeded
from stepmark.method import Skip
from stepmark.runner import Runner
from stepmark.syntax import PluginError
from stepmark.task import BadOutput, Sealed, Task


def measure(cell: Cell, device: str = "cpu", timing: bool = True, show_progress: bool = True) -> record.Record:
    """All passes of one cell. Never raises for what a plugin does: a failure is a record with its message.

    Timing, memory and energy are read at seed 0 only, where `timing` is set: other seeds repeat the quality.
    """
    return measured(cell, device, timing, show_progress)[0]


def measured(
    cell: Cell, device: str = "cpu", timing: bool = True, show_progress: bool = True
) -> tuple[record.Record, samples.Shown | None]:
    """As `measure`, and what the cell gave to look at (seed 0 only)."""
    info = plugins.methods().get(cell.method)
    if info is None:
        raise KeyError(f"no method {cell.method!r}; see: stepmark list methods")
    torch.set_num_threads(1)
    task = track_of(cell.task)[1]
    shown: samples.Shown | None = None
    try:
        sources = digests(info, task)
    except PluginError as error:  # what listing does not read may not even parse
        return record.Record(**_heading(cell, task, {}, device), status="failed", message=_one_line(str(error))), None
    fields = _heading(cell, task, sources, device)
    try:
        mine = runner.ready(info, cell.task, cell.tier, device, cell.seed, show_progress, sources)
        found, shown, beside = _walk(cell, mine, timing)
        fields["environment"] |= beside
    except Skip as reason:
        found = {"status": "skipped", "message": _one_line(str(reason))}
    except (BudgetExceeded, BadOutput, Sealed) as error:
        found = {"status": "failed", "message": _one_line(f"{type(error).__name__}: {error}")}
    except Exception as error:
        place = _place(error, info.path)
        found = {"status": "failed", "message": _one_line(f"{type(error).__name__}: {error} {place}")}
    return record.Record(**fields, **found), shown


def _walk(cell: Cell, mine: Runner, timing: bool) -> tuple[dict[str, Any], samples.Shown | None, dict[str, str]]:
    """Pass by pass; the record's fields, what there is to look at, what its times have to be read beside."""
    mine.renew()
    judge = Judge(cell.task, mine.device)

    part, answers = passes.quality(mine, judge, cell)
    parts = [part]
    if cell.seed == 0:
        parts.append(passes.counts(mine, judge, cell, answers))
    if why := passes.timeless(mine, cell, timing):
        parts.append(passes.Part(reasons=dict.fromkeys(("latency", "memory", "energy"), why)))
    else:
        parts += [each(mine, judge, cell, answers) for each in (passes.latency, passes.memory, passes.energy)]

    found: dict[str, Any] = {"counts": {}, "reasons": {}, "flags": []}
    for part in parts:
        found |= part.fields
        found["counts"] |= part.counts
        found["reasons"] |= part.reasons
        found["flags"] += part.flags
    found["status"] = "flagged" if found["flags"] else "ok"
    if found["flags"]:
        runner.forget()  # whatever the plugin left behind must not reach the next cell
    beside = {"processes": str(mine.ranks), "cores": str(machine.usable_cores())} if mine.ranks > 1 else {}
    if cell.seed or not judge.task.shown:
        return found, None, beside
    shown = samples.of_outputs(answers.inputs, answers.outputs, judge.track)
    return found, samples.marked(shown, mine, answers.inputs, cell.rung, cell.seed), beside


def _heading(cell: Cell, task: Task, sources: dict[str, str], device: str) -> dict[str, Any]:
    """What is known of a record without running anything."""
    environment = machine.environment() | {"threads": "1"}
    return {
        "suite": __version__,
        "track": plugins.tasks()[cell.task][0],
        "method": cell.method,
        "task": cell.task,
        "rung": cell.rung,
        "seed": cell.seed,
        "tier": cell.tier,
        "machine": machine.machine_id(),
        "device": torch.device(device).type,
        "checkpoint": task.checkpoint[: plugins.DIGITS],
        "digests": sources,
        "environment": environment | ({"checkpoint": task.origin} if task.origin else {}),
        "command": cell.command,
        "created": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1900]


def _place(error: BaseException, path: Path) -> str:
    """(file:line) of the innermost frame inside the plugin."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            place = f"({path.name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Commit of the checkout, `-dirty` when tracked files differ from it; None outside a checkout."""
    root = plugins.checkout()
    if root is None:
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!leaderboard/results")
        return git("rev-parse", "HEAD")[:12] + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None
