"""What a run is going to take, by what the published records say of the same cells: said before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepmark import devices, plugins
from stepmark.cell import Cell
from stepmark.places import results_folder
from stepmark.record import Record, RecordError, files, latest, read_once

if TYPE_CHECKING:
    from stepmark.suite import Options

WATCHED = 8  # calls' worth of time for those under counters, for memory, and for comparisons of calls
EACH = 0.3  # seconds of a cell around its calls: inputs, scores, resamples, the record
AUDIT = 0.7  # more of one of seed 0: counters and guard, another process of the method and comparisons with it
START = 6.0  # seconds before the first cell: the libraries, here and in the process that methods are forked from
LONGEST_ROUNDS = 8.0  # seconds, as in `passes.latency`


def sentence(cells: Sequence[Cell], options: Options) -> str:
    """How many cells, and about how long."""
    counted = f"{len(cells):,} cell{'s' if len(cells) > 1 else ''} to run"
    found = seconds(cells, _published({cell.method for cell in cells}, devices.kind_of(options.device)), options.timing)
    if found is None:
        return f"{counted}; no published record says how long these take"
    calls, preparing = (part / max(1, options.workers) for part in found)
    calls += START
    more = f", and up to {span(preparing)} for preparing what is not in the cache" if preparing >= 30 else ""
    return f"{counted}, about {span(calls)} by the published latencies, start and audit included{more}"


def seconds(cells: Sequence[Cell], published: Sequence[Record], timing: bool) -> tuple[float, float] | None:
    """(running, preparing) these cells one after the other; a cell that nobody has published takes what the others take
    on average. None where none of them is published.
    """
    tasks, running = plugins.tasks(), []
    times = {(r.method, r.task, r.rung): r.latency.median_ms / 1e3 / r.latency.items for r in published if r.latency}
    costs = {(r.method, r.task): r.offline.seconds for r in published if r.offline}
    trained = {(r.method, r.task) for r in published if r.offline and r.offline.seed is not None}
    for cell in cells:
        each = times.get((cell.method, cell.task, cell.rung))
        if each is None:
            continue
        task = tasks[cell.task][1]
        one = each * min(task.batch, task.items(cell.tier))
        spent = EACH + one * math.ceil(task.items(cell.tier) / task.batch)
        if cell.seed == 0:
            spent += AUDIT + WATCHED * one
            if timing and cell.tier != "smoke":
                spent += min(LONGEST_ROUNDS, 2 * max(task.rounds * one, task.seconds))
        running.append(spent)
    if not running:
        return None
    made = {(c.method, c.task, c.seed if (c.method, c.task) in trained else 0) for c in cells if c.tier != "smoke"}
    return sum(running) / len(running) * len(cells), sum(costs.get(key[:2], 0.0) for key in made)


def _published(methods: set[str], kind: str) -> list[Record]:
    """Records of these methods on such a device; what cannot be read says nothing here."""
    found: list[Record] = []
    for path in files(results_folder("embedded")):
        if path.stem in methods:
            try:
                found += [record for record in read_once(path) if record.device == kind]
            except (RecordError, OSError):
                continue
    return latest(found)


def span(seconds: float) -> str:
    """A stretch of time as it is said."""
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{max(1, round(seconds))} s"
