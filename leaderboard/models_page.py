"""The page of real models: what methods did on checkpoints that somebody brought, one table a checkpoint and machine.

Figures of different checkpoints say nothing of each other, and what a folder's task should give is known to nobody: there
are no groups and no verdicts here. What is sure is the checkpoint's digest, the machine and the command.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepmark.leaderboard import markup, pace
from stepmark.leaderboard.markup import Cell, Line, chip, esc, estimate, link, number, table
from stepmark.leaderboard.pages import Board, element, method_cell, reasons, record_cell, shown_notes, slug
from stepmark.leaderboard.rows import Row, headline, split

from stepmark.admission import from_folders
from stepmark.task import Task

ABOUT = (
    "The board stands on models that are small enough to be shipped and to be run again on any machine. Here the same "
    "plugins, untouched, run on checkpoints that somebody brought in a folder."
)
EMPTY = "No records of checkpoints yet. <code>make real-model</code> runs some methods on one that can be had by name."
ARROWS = {"higher": "↑", "lower": "↓"}
HINTS = {
    "tok/forward": "Acceptance length: tokens written over forwards of the target, the prefill among them.",
    "ms/token": "Of whole texts, prompt by prompt, over the tokens that they have.",
    "p95 ms/token": "95th percentile over the timed prompts.",
    "speed-up/token": "Milliseconds per token of the baseline over those of the method, in the same rounds.",
    "first token ms": "The record at rung 1, which is the prefill alone.",
    "NFE-eq": "FLOPs over those of one forward of the model over one position, output head included.",
}


def page(found: Board) -> list[str]:
    """All checkpoints with their tables."""
    rows = found.ledger.brought
    guide = link("own-language-models.html", "How to run it on a model of your own")
    parts = [element("p", f"{ABOUT} {guide}.")]
    if not rows:
        return [*parts, element("div", f"<p>{EMPTY}</p>", "sm-empty")]
    known = from_folders(r for row in rows for r in row.records.values())
    for (place, task_id), mine in split(rows, "place", "task").items():
        parts += _checkpoint(found, mine, known[task_id][1], f"{slug(task_id)}-{place.checkpoint[:8]}-{place.machine}")
    return parts


def _checkpoint(found: Board, rows: Sequence[Row], task: Task, anchor: str) -> list[str]:
    """One task of one checkpoint in one place."""
    place, first = rows[0].place, rows[0].first
    said = first.environment.get("checkpoint", task.id)
    libraries = ", ".join(
        f"{name} {first.environment[name]}" for name in ("torch", "transformers") if name in first.environment
    )
    pairs = [
        ("Task", f"<code>{esc(task.id)}</code>; rungs are {esc(task.unit)}"),
        ("Digest of the networks", f"<code>{esc(place.checkpoint)}</code>"),
        ("Machine", esc(f"{place.machine}, {place.device}" + (f"; {libraries}" if libraries else ""))),
        ("Command", markup.code(first.command)),
    ]
    return [
        f"## {markup.heading(said)} {{ #{anchor} }}",
        markup.definitions(pairs),
        _table(found, rows, task),
        "".join(element("p", esc(note), "sm-note") for note in reasons(rows)),
    ]


def _table(found: Board, rows: Sequence[Row], task: Task) -> str:
    texts = pace.shown(rows)
    with_energy = any(row.joules is not None for row in rows)
    head = ["Method", "Rung", *(f"{name} {ARROWS[better]}" for name, better in task.metrics.items()), "NFE", "NFE-eq"]
    costs = (
        [name for name in pace.HEAD if with_energy or not name.startswith("J/")] if texts else ["ms/item", "Speed-up"]
    )
    head += [*costs, "Peak MiB", "Status", "Record"]
    lines = []
    for row in sorted(rows, key=lambda each: (each.rung, *_merit(each, task), each.method)):
        notes = "".join(f'<br><span class="sm-range">{esc(note)}</span>' for note in shown_notes(row))
        if texts:
            paid = dict(zip(pace.HEAD, pace.figures(pace.pace(row, rows)), strict=True))
            cells = [number(paid[name], unit="×" if name.startswith("speed-up") else "") for name in costs]
        else:
            cells = [estimate(row.latency_ms, why=row.reason("latency")), estimate(row.speedup, "×")]
        lines.append(
            Line(
                [
                    method_cell(found, row.method, "methods/"),
                    number(row.rung),
                    *(estimate(row.quality.get(name)) for name in task.metrics),
                    number(row.nfe),
                    number(row.nfe_equivalent, row.reason("nfe_equivalent")),
                    *cells,
                    number(row.memory_mib, row.reason("memory")),
                    Cell(chip(row.status, markup.STATUS_MOOD[row.status]) + notes, row.status),
                    record_cell(found, row),
                ],
                row.rung,
                not row.ranked,
            )
        )
    return table(head, lines, f"Figures on {task.id}", hints={name: HINTS[name] for name in head if name in HINTS})


def _merit(row: Row, task: Task) -> tuple[bool, float]:
    metric, higher = headline(task)
    if metric not in row.quality:
        return True, 0.0
    return False, -row.quality[metric].value if higher else row.quality[metric].value
