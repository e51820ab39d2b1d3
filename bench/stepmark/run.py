"""One cell -> one record. Read it downwards: a process prepares, the passes measure, their parts become the record."""

from __future__ import annotations

import datetime as dt
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from stepmark import __version__, devices, passes, plugins, record, remote, samples
from stepmark.cell import Cell, digests, track_of
from stepmark.judge import Judge
from stepmark.meter import machine
from stepmark.meter.counts import BudgetExceeded
from stepmark.method import Skip
from stepmark.remote import MethodFailed, Worker
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
    devices.settle()
    remote.nursery()  # which imports for some seconds, while this process does
    task = track_of(cell.task)[1]
    shown: samples.Shown | None = None
    try:
        sources = digests(info, task)
    except PluginError as error:  # what listing does not read may not even parse
        return record.Record(**_heading(cell, task, {}, device), status="failed", message=_one_line(str(error))), None
    fields = _heading(cell, task, sources, device)
    try:
        mine = remote.ready(info, cell.task, cell.tier, device, cell.seed, show_progress, sources).worker()
        try:
            found, shown, beside = _walk(cell, mine, timing)
        finally:
            mine.close()
        if found["flags"]:
            remote.forget()  # whatever the plugin left behind must not reach the next cell
        fields["environment"] |= beside
    except Skip as reason:
        found = {"status": "skipped", "message": _one_line(str(reason))}
    except MethodFailed as error:
        found = {"status": "failed", "message": _one_line(str(error))}
    except (BudgetExceeded, BadOutput, Sealed) as error:
        found = {"status": "failed", "message": _one_line(f"{type(error).__name__}: {error}")}
    except Exception as error:
        found = {"status": "failed", "message": _one_line(f"{type(error).__name__}: {error}")}
    try:
        return record.Record(**fields, **found), shown
    except ValidationError as error:  # figures that a plugin reports may be no figures
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        message = _one_line(f"BadOutput: {place} of this cell's record: {fault['msg']}")
        return record.Record(**fields, status="failed", message=message), None


def _walk(cell: Cell, mine: Worker, timing: bool) -> tuple[dict[str, Any], samples.Shown | None, dict[str, str]]:
    """Pass by pass; the record's fields, what there is to look at, what its times have to be read beside."""
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
        found["flags"] += [flag for flag in part.flags if flag not in found["flags"]]
    found["status"] = "flagged" if found["flags"] else "ok"
    beside = {"processes": str(mine.ranks), "cores": str(machine.usable_cores())} if mine.ranks > 1 else {}
    if cell.seed or not judge.task.shown:
        return found, None, beside
    shown = samples.of_outputs(answers.inputs, answers.outputs, judge.track)
    return found, samples.marked(shown, mine, answers.inputs, cell.rung, cell.seed), beside


def _heading(cell: Cell, task: Task, sources: dict[str, str], device: str) -> dict[str, Any]:
    """What is known of a record without running anything."""
    environment = machine.environment(device) | {"threads": "1"}
    return {
        "suite": __version__,
        "track": plugins.tasks()[cell.task][0],
        "method": cell.method,
        "task": cell.task,
        "rung": cell.rung,
        "seed": cell.seed,
        "tier": cell.tier,
        "machine": machine.machine_id(device),
        "device": torch.device(device).type,
        "checkpoint": task.checkpoint[: plugins.DIGITS],
        "digests": sources,
        "environment": environment | ({"checkpoint": task.origin} if task.origin else {}),
        "command": cell.command(torch.device(device).type),
        "created": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(plugins.methods()[cell.method].path),
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1900]


@lru_cache(maxsize=1024)
def commit(plugin: Path) -> str | None:
    """Commit of the checkout, `-dirty` where it does not hold what runs: tracked files differ from it, or git is told not
    to look at them, or the plugin's file or some code of the harness is not in it. None outside a checkout.
    """
    root = plugins.checkout()
    if root is None:
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    code = [name for name in ("bench", "datasets", "kernels") if (root / name).is_dir()]
    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!leaderboard/results")
        dirty += git("ls-files", "--others", "--exclude-standard", "--", *(f"{name}/*.py" for name in code))
        hidden = git("ls-files", "-v", "--", "methods", *code).splitlines()
        dirty += "".join(line for line in hidden if not line.startswith("H "))
        own = plugin.resolve()
        if not own.is_relative_to(root.resolve()) or not git("ls-files", "--", str(own)):
            dirty += str(own)
        return git("rev-parse", "HEAD")[:12] + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None
