"""The picker of the home page: a task, what must be kept, what should be saved; the answer is a method at a rung.

Every answer is computed here, by the rules of the tables below it (`fronts.Offer`); the script looks it up in data that
lie beside the page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepmark.leaderboard.estimates import Estimate, factor
from stepmark.leaderboard.fronts import KEEP, SAVED, Offer
from stepmark.leaderboard.pages import Board, slug, words
from stepmark.leaderboard.rows import Row
from stepmark.leaderboard.track_pages import LESS, script, short

KEPT = {  # how the choice says what must be kept
    keep: "all that a paired test can tell" if share is None else f"all but {100 * share:.0f} % of it"
    for keep, share in KEEP.items()
}
HEADS = {
    "unit": "NFE/item",
    "nfe_equivalent": "NFE-eq/item",
    "latency_ms": "ms/item",
    "memory_mib": "Peak MiB",
    "joules": "J/item",
}
PREPARED = {"any": "training is fine", "none": "nothing trained"}

BOX = (
    '<div class="sm-picker" data-picker data-search-exclude><noscript><p class="sm-note">Choosing needs a script. The '
    "tables below give the same answers for a method that keeps all that a paired test can tell.</p></noscript></div>"
)
SCRIPTS = "".join(
    f'<script defer src="{each}"></script>' for each in ("data/picker.js", "assets/pieces.js", "assets/picker.js")
)


def data(found: Board) -> dict[str, Any]:
    """Every question with its answer, by track and task in the order of the home page."""
    tracks = []
    for track, tasks in found.sought.items():
        asked = [block for task_id in tasks if (block := _task(found, task_id)) is not None]
        if asked:
            tracks.append({"name": track, "title": words(track), "tasks": asked})
    return {"keep": KEPT, "less": LESS, "heads": HEADS, "prepared": PREPARED, "tracks": tracks}


def _task(found: Board, task_id: str) -> dict[str, Any] | None:
    place = found.places_of(task_id)[0]
    deal = found.offer(task_id, place)
    if deal is None:
        return None
    rows: dict[int, Row] = {id(deal.baseline): deal.baseline}
    answers: dict[str, list[Any]] = {}
    for keep in KEPT:
        for axis in SAVED:
            for prepared in PREPARED:
                saving = deal.saving(axis, keep, None if prepared == "any" else lambda row: _untrained(found, row))
                if saving is not None:
                    rows.setdefault(id(saving.row), saving.row)
                    answers[f"{keep} {axis} {prepared}"] = [list(rows).index(id(saving.row)), *factor(saving.factor)]
    task = found.tasks[task_id][1]
    return {
        "id": task_id,
        "title": found.titles[task_id],
        "unit": task.unit,
        "metric": deal.metric,
        "better": task.metrics[deal.metric],
        "place": str(place),
        "page": f"tracks/{found.tasks[task_id][0]}.html#{slug(task_id)}",
        "rows": [_row(found, row, deal) for row in rows.values()],
        "answers": answers,
    }


def _untrained(found: Board, row: Row) -> bool:
    return found.training[row.method] != "trained"


def _row(found: Board, row: Row, deal: Offer) -> dict[str, Any]:
    info = found.methods.get(row.method)
    return {
        "method": row.method,
        "says": info.title if info else "",
        "rung": row.rung,
        "quality": _triple(row.quality[deal.metric]),
        "training": found.training[row.method],
        "offline_s": short(row.offline_s),
        "costs": {axis: short(row.cost(axis)) for axis in SAVED if row.cost(axis) is not None},
        "ms": _triple(row.latency_ms) if row.latency_ms else None,
        "trust": found.standings[(row.method, row.task)].state,
        "command": row.first.command[:500],
    }


def _triple(e: Estimate) -> list[float | int | None]:
    return [short(x) for x in e]


def write_data(found: Board, folder: Path) -> None:
    """The script that holds `data`."""
    (folder / "picker.js").write_text(script("stepmarkPicker", data(found)), encoding="utf-8")
