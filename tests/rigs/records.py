"""Records that nobody measured, whole enough for the board to take them in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stepmark import plugins
from stepmark.admission import RESAMPLES
from stepmark.record import Latency, Quality, Record


def whole(r: Record) -> Record:
    """The record with all that the board asks for and it does not say: further metrics, handles, medians of its times."""
    if r.task not in plugins.tasks():
        return r
    task = plugins.tasks()[r.task][1]
    command = f"stepmark run --method {r.method} --task {r.task} --rung {r.rung} --seed {r.seed} --tier {r.tier}"
    said: dict[str, Any] = {"command": command + ("" if r.device == "cpu" else f" --device {r.device}")}
    if r.status in {"ok", "flagged"}:
        bounded = "teacher" if task.bounded == ("*",) else next(iter(task.bounded), "")
        nfe = r.counts.get("nfe", float(r.rung)) if bounded else 0.0
        others = {m: Quality(value=0.5, resamples=[0.5] * RESAMPLES) for m in task.metrics if m not in r.quality}
        measured = {m: quality for m, quality in r.quality.items() if m in task.metrics}
        said |= {
            "outputs": r.outputs or "ab" * 16,
            "quality": measured | others,
            "counts": r.counts | {"nfe": nfe} | ({f"{bounded}_evaluations": nfe} if bounded else {}),
            "handles": {bounded: {"calls": 2.0, "evaluations": nfe * task.items(r.tier)}} if bounded else {},
            "latency": r.latency and _fitting(r.latency),
        }
    return r.model_copy(update=said)


def _fitting(times: Latency) -> Latency:
    """The times with medians and ratios that are theirs."""
    if not times.items:
        return times
    median = float(np.median(times.samples_ms))
    said: dict[str, Any] = {"median_ms": median}
    if times.baseline is not None:
        others = times.baseline_samples_ms or [x * (times.speedup or 1.0) for x in times.samples_ms]
        other = float(np.median(others))
        said |= {"baseline_samples_ms": others, "baseline_median_ms": other, "speedup": other / median}
        said |= {"speedup_low": 0.9 * other / median, "speedup_high": 1.1 * other / median}
    return times.model_copy(update=said)


def few_seeds(patch: pytest.MonkeyPatch, n: int) -> None:
    """Let every task ask for n seeds, so that a test need not write more."""
    tasks = {name: (track, replace(task, seeds=n)) for name, (track, task) in plugins.tasks().items()}
    patch.setattr(plugins, "tasks", lambda: tasks)
