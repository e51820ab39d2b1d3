"""Track pages: ladder curves and tables of tie groups per task, with the data files that their script reads.

Without script a page shows the place with most records as drawings and tables. With it the same data, of every place,
make charts whose axis, metric and machine the reader chooses.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from stepmark.leaderboard import charts
from stepmark.leaderboard.estimates import factor, figure
from stepmark.leaderboard.fronts import COSTS, Ladder
from stepmark.leaderboard.markup import Cell, Line, esc, link, number, table
from stepmark.leaderboard.pages import (
    Board,
    crumbs,
    curves,
    element,
    figures,
    method_cell,
    reasons,
    shown_notes,
    slug,
    words,
)
from stepmark.leaderboard.paper_pages import trust_on_task
from stepmark.leaderboard.rows import Place, Row, headline, lenders

from stepmark.task import Task

WHOLE = ("Method", "Training", "Family", "Best", "at rung")  # headings before the two figures of each axis
MATCHING = (
    "Cost to quality: the cheapest cost at which a rung of the method is not significantly worse than the baseline's "
    "best rung (paired bootstrap test at 5 % of the first metric)."
)
AREA = (
    "Hypervolume: the area that the method's rungs dominate over log10 of cost and quality, where quality is 0 at the "
    "baseline's worst rung and 1 at its best, up to the baseline's dearest rung. More is better."
)
TRAINING = (
    "From the records of prepare: trained left a state of at least 0.01 MiB, calibrated spent evaluations or left a "
    "smaller state, none did neither."
)
COST_NAMES = {"unit": "NFE", "nfe_equivalent": "NFE-eq", "latency_ms": "ms"}


def index(found: Board) -> list[str]:
    """The page of all tracks."""
    lines = []
    for track in found.tracks():
        tasks = [t for t, (owner, _) in found.tasks.items() if owner == track]
        plugs = [m for m in found.methods.values() if m.track == track and m.base is None]
        live = {row.method for row in found.rows if row.track == track and row.measured}
        variants = {name for name in live if found.is_variant(name)}
        cells = [
            Cell(link(f"{track}.html", words(track)), track),
            number(len(tasks)),
            number(len(plugs)),
            number(len(live - variants)),
            number(len(variants)),
        ]
        lines.append(Line(cells))
    elsewhere = Counter(c.entry.track for c in found.covered if c.entry.track not in found.tracks())
    waiting = ", ".join(f"{esc(words(t).lower())} ({n})" for t, n in elsewhere.most_common())
    return [
        element("p", "A track is a kind of problem: what a method is given, what it returns, how that is scored."),
        table(("Track", "Tasks", "Plugins", "Live methods", "Live variants"), lines, "Tracks"),
        element("p", f"Tracks of the catalogue that have no task yet, with their papers: {waiting}.")
        if waiting
        else "",
    ]


def track_page(found: Board, track: str, data: Path) -> list[str]:
    """The page of one track; its drawings go to files below `data`, its scripts are those that `write_assets` and
    `write_data` put beside it.
    """
    tasks = [(task_id, task) for task_id, (owner, task) in found.tasks.items() if owner == track]
    parts = [crumbs(("index.html", "Tracks"), (f"{track}.html", words(track)))]
    jumps = " ".join(f'<a href="#{slug(task_id)}">{esc(task_id)}</a>' for task_id, _ in tasks)
    parts.append(element("p", jumps, "sm-jump"))
    parts.append(
        element(
            "p",
            "Rows at one rung in the same group are not told apart by a paired bootstrap test (Holm-corrected at 5 %); "
            "group 1 holds the best. On the charts the broad step line is the Pareto front; the methods on it and the "
            "baseline have colour, the others stand faint behind until you point at one or choose its name; flagged "
            "points are hollow. Click a point for the method's page; choose names to see a few alone, and 95 % intervals "
            "where you want them. " + link("../compare.html", "Compare two methods by paired tests") + ".",
            "sm-note",
        )
    )
    for task_id, task in tasks:
        parts += [f"## {task_id} {{ #{slug(task_id)} }}"]
        page = link(f"../tasks/{slug(task_id)}.html", "what is measured and how")
        parts.append(
            element("p", f"{esc(task.summary)}. Rungs in {esc(task.unit)}: {esc(task.rungs)[1:-1]}. See {page}.")
        )
        here = found.places_of(task_id)
        if not here:
            parts.append(element("div", "<p>No records of this task yet.</p>", "sm-empty"))
            continue
        rows = found.of_task(task_id, here[0])
        files = " and ".join(link(f"../data/ladders-{slug(task_id)}.{end}", end.upper()) for end in ("csv", "json"))
        more = f" and {len(here) - 1} more, which the charts and the files hold" if len(here) > 1 else ""
        block = [
            f'<div class="sm-task" data-task="{esc(task_id)}">',
            element(
                "p", f"Measured on <span data-place>{esc(here[0])}</span>{more}. Data of this task: {files}.", "sm-note"
            ),
            f"<div data-deal>{element('p', esc(deal_text(found, task_id, here[0])))}</div>",
            curves(found, rows, task, _methods(found, task_id), charts.STATIC, data),
            whole_ladders(found, task, here[0]),
            figures(found, rows, task),
            element("p", esc(lenders(rows)), "sm-note") if lenders(rows) else "",
            "</div>",
            trust_on_task(found, task_id),
        ]
        parts.append("\n".join(block))
    # In the order of the page, after it has been read: the data, the charts, what joins them.
    scripts = ("../assets/vega.js", f"../data/ladders-{track}.js", "../assets/pieces.js", "../assets/ladders.js")
    if any(found.places_of(task_id) for task_id, _ in tasks):
        parts.append("".join(f'<script defer src="{each}"></script>' for each in scripts))
    return parts


def _methods(found: Board, task_id: str) -> list[str]:
    """Every method on a task, whatever the place, so that each keeps its colour: those that lead in the first place come
    first, so that their colours differ.
    """
    here = found.places_of(task_id)
    leading = found.leading(found.of_task(task_id, here[0]), found.tasks[task_id][1])
    every = found.order(row for place in here for row in found.of_task(task_id, place))
    return [*leading, *(name for name in every if name not in leading)]


LESS = {
    "unit": "fewer evaluations",
    "nfe_equivalent": "fewer NFE-equivalents",
    "latency_ms": "less time",
    "memory_mib": "less memory",
    "joules": "less energy",
}


def deal_text(found: Board, task_id: str, place: Place) -> str:
    """What keeps the baseline's best quality for less, axis by axis, as a sentence; "" without a baseline. Plain text."""
    deal = found.offer(task_id, place)
    if deal is None:
        return ""
    said = []
    for axis, less in LESS.items():
        saving = deal.saving(axis)
        if saving is not None:
            said.append(f"{' '.join(filter(None, factor(saving.factor)))} {less} with {_at(saving.row)}")
    if not said:
        return f"The best of the baseline is {_at(deal.baseline)}. Nothing measured keeps that quality for less."
    return f"The best of the baseline is {_at(deal.baseline)}. What keeps that quality for less: {'; '.join(said)}."


def _at(row: Row) -> str:
    return f"{row.method} at rung {row.rung}"


def whole_ladders(found: Board, task: Task, place: Place) -> str:
    """The table of whole ladders in one place: a line per method, with how its two figures come about below it."""
    metric, _ = headline(task)
    lines = []
    for each in _kindred(found, task.id, place):
        tags = found.tags.get(each.method, [])
        training = found.training[each.method]
        cells = [
            method_cell(found, each.method),
            Cell(esc(training), training),
            Cell(f'<span class="sm-tags">{esc(", ".join(tags)) or "–"}</span>', ", ".join(tags)),
            number(each.best.quality[metric].value),
            number(each.best.rung),
            *[number(each.matching[axis], "no rung matches the baseline's best") for axis in COSTS],
            *[number(each.area[axis], "no reference, or a cost is missing") for axis in COSTS],
        ]
        marks = {"training": training, "tags": ",".join(tags)}
        lines.append(Line(cells, marks=marks, variant=found.is_variant(each.method)))
    if not lines:
        return ""
    head = [*WHOLE[:3], f"Best {metric}", WHOLE[4]]
    head += [f"{name} to match" for name in COST_NAMES.values()] + [
        f"Hypervolume, {name}" for name in COST_NAMES.values()
    ]
    hints = {"Training": TRAINING, "Family": "The tags of the method's paper in the catalogue."}
    hints |= {f"{name} to match": f"{MATCHING} Here in {name}." for name in COST_NAMES.values()}
    hints |= {f"Hypervolume, {name}": f"{AREA} Here over {name}." for name in COST_NAMES.values()}
    return (
        table(head, lines, f"Whole ladders on {task.id}", picks=("training", "tags"), hints=hints)
        + "<details><summary>How cost to quality and hypervolume are computed</summary>"
        + "".join(element("p", esc(text)) for text in (MATCHING, AREA, TRAINING))
        + f"<p data-yardstick>{esc(yardstick_text(found, task.id, place))}</p></details>"
    )


def _kindred(found: Board, task_id: str, place: Place) -> list[Ladder]:
    """The ladders of a task by name, those of variants below their method's."""
    return sorted(found.ladders(task_id, place), key=lambda each: found.kin(each.method))


def yardstick_text(found: Board, task_id: str, place: Place) -> str:
    """The reference point of the hypervolume, in figures. Plain text."""
    stick = found.yardstick(task_id, place)
    if stick is None:
        return "No baseline has been measured here, so neither figure can be computed."
    best = stick.best.quality[stick.metric].value
    costs = ", ".join(f"{figure(c)} {COST_NAMES[axis]}" for axis, c in stick.dearest.items() if c is not None)
    return (
        f"Here the baseline is {stick.best.method}: quality 0 is {stick.metric} {figure(stick.worst)}, quality 1 "
        f"is {figure(best)} at rung {stick.best.rung}; the reference point is quality 0 at {costs or 'no cost'}."
    )


# data -------------------------------------------------------------------------------------------


def task_data(found: Board, task_id: str) -> dict[str, Any]:
    """All rows of a task in every place, by column. Figures have six digits; null: not measured."""
    task = found.tasks[task_id][1]
    here = found.places_of(task_id)
    methods = _methods(found, task_id)
    rows = [row for place in here for row in found.ranked(found.of_task(task_id, place), task)]
    metric, _ = headline(task)
    latencies = [row.latency_ms for row in rows]
    speedups = [row.speedup for row in rows]
    columns: dict[str, list[Any]] = {
        "place": [here.index(row.place) for row in rows],
        "method": [methods.index(row.method) for row in rows],
        "rung": [row.rung for row in rows],
        "group": [row.group for row in rows],
        "status": [row.status for row in rows],
        "older": [int(found.is_stale(row)) for row in rows],
        "notes": [shown_notes(row) for row in rows],
        "unit": [short(row.nfe) for row in rows],
        "nfe_equivalent": [short(row.nfe_equivalent) for row in rows],
        "latency_ms": [short(e.value) if e else None for e in latencies],
        "latency_ms_low": [short(e.low) if e else None for e in latencies],
        "latency_ms_high": [short(e.high) if e else None for e in latencies],
        "speedup": [short(e.value) if e else None for e in speedups],
        "speedup_low": [short(e.low) if e else None for e in speedups],
        "speedup_high": [short(e.high) if e else None for e in speedups],
        "memory_mib": [short(row.memory_mib) for row in rows],
        "joules": [short(row.joules) for row in rows],
        "offline_s": [short(row.offline_s) for row in rows],
    }
    for name in task.metrics:
        for end in ("value", "low", "high"):
            estimates = [row.quality.get(name) for row in rows]
            columns[f"metric:{name}:{end}"] = [short(getattr(e, end)) if e else None for e in estimates]
    whole = [(i, each) for i, place in enumerate(here) for each in _kindred(found, task_id, place)]
    return {
        "task": task_id,
        "version": task.version,
        "unit": task.unit,
        "metrics": dict(task.metrics),
        "places": [{"name": str(p), "machine": p.where, "tier": p.tier} for p in here],
        "methods": methods,
        "anchors": [_index(methods, found.anchor(found.of_task(task_id, p))) for p in here],
        "says": [found.methods[name].says if name in found.methods else "" for name in methods],
        "bases": [base if (base := found.family(name)) != name else "" for name in methods],
        "baselines": [int(found.is_baseline(name)) for name in methods],
        "training": [found.training[name] for name in methods],
        "tags": [found.tags.get(name, []) for name in methods],
        "deals": [deal_text(found, task_id, p) for p in here],
        "yardsticks": [yardstick_text(found, task_id, p) for p in here],
        "reasons": [reasons(found.of_task(task_id, p)) for p in here],
        "rows": columns,
        "ladders": {
            "place": [i for i, _ in whole],
            "method": [methods.index(each.method) for _, each in whole],
            "best": [short(each.best.quality[metric].value) for _, each in whole],
            "rung": [each.best.rung for _, each in whole],
            **{f"matching:{axis}": [short(each.matching[axis]) for _, each in whole] for axis in COSTS},
            **{f"area:{axis}": [short(each.area[axis]) for _, each in whole] for axis in COSTS},
        },
    }


def _index(names: list[str], name: str | None) -> int | None:
    return names.index(name) if name in names else None


def short(x: float | None, digits: int = 6) -> float | int | None:
    """A figure cut to some digits, whole numbers without a point; None where it is no finite number."""
    if x is None or not math.isfinite(x):
        return None
    cut = float(f"{x:.{digits}g}")
    return int(cut) if cut == int(cut) and abs(cut) < 1e15 else cut


def script(variable: str, content: object) -> str:
    """A script that assigns JSON: unlike fetch, it can be loaded by a page that was opened from disk."""
    # ASCII without <: safe wherever it ends up, even if somebody pastes it into a page.
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f"window.{variable} = {text};\n"


def write_data(found: Board, track: str, folder: Path) -> None:
    """The data files of a track page: one script for the page; CSV and JSON per task for readers."""
    blocks = {}
    for task_id, (owner, _) in found.tasks.items():
        if owner == track and found.places_of(task_id):
            blocks[task_id] = task_data(found, task_id)
            name = folder / f"ladders-{slug(task_id)}"
            text = json.dumps(blocks[task_id], allow_nan=False, separators=(",", ":"))
            name.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
            name.with_suffix(".csv").write_text(as_csv(blocks[task_id]), encoding="utf-8")
    if blocks:
        content = {
            "axes": charts.AXES,
            "costs": COST_NAMES,
            "colours": [colour for colour, _ in charts.LOOKS],
            "shapes": [shape for _, shape in charts.LOOKS],
            "marks": charts.MARKS,
            "tasks": blocks,
        }
        (folder / f"ladders-{track}.js").write_text(script("stepmarkLadders", content), encoding="utf-8")


def as_csv(block: Mapping[str, Any]) -> str:
    """A task's rows as a flat table, places and methods by name. All text of it is Stepmark's own."""
    columns = {name: values for name, values in block["rows"].items() if name not in {"notes", "older"}}
    columns["place"] = [block["places"][i]["name"] for i in columns["place"]]
    columns["method"] = [block["methods"][i] for i in columns["method"]]
    names = {"unit": "nfe"} | {
        name: name.removeprefix("metric:").removesuffix(":value").replace(":", "_")
        for name in columns
        if name.startswith("metric:")
    }
    stream = StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([names.get(name, name) for name in columns])
    writer.writerows(zip(*columns.values(), strict=True))
    return stream.getvalue()


@cache
def chart_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, from the package that draws the static charts."""
    import vl_convert

    # The bundle is written as a module: in a page its short names would be everybody's.
    return f'(function () {{\n"use strict";\n{vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")}\n}})();\n'


def write_assets(folder: Path) -> None:
    """The chart library, which only pages with charts load."""
    (folder / "vega.js").write_text(chart_library(), encoding="utf-8")
