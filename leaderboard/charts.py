"""Ladder curves as SVG, drawn at build time from Vega-Lite: no script, no font and no network at reading time."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any

import vl_convert
from stepmark.leaderboard.board import Row, figure, front

from stepmark.task import Task

# Okabe and Ito's colours, told apart by most colour-blind readers on light and on dark ground, in two brightnesses.
COLOURS = (
    "#2b8cc4", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#5c6bc0", "#8a6d3b", "#7a5fb5", "#2f9e44", "#c2255c",
    "#1098ad", "#b8860b",
)  # fmt: skip
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
MARKS = {"circle": "●", "square": "■", "triangle-up": "▲", "diamond": "◆", "cross": "✚", "triangle-down": "▼"}
INK = "#010203"  # stands for the colour of the text around the chart until `_adapt` replaces it
AXES = {
    "unit": "spent per item ({unit})",
    "nfe_equivalent": "NFE-equivalents per item",
    "latency_ms": "ms per item",
    "memory_mib": "peak memory of a call, MiB",
    "joules": "J per item",
    "offline_s": "seconds of preparation, once",
}
SHORT = {
    "unit": "budget",
    "nfe_equivalent": "NFE-equivalents",
    "latency_ms": "latency",
    "memory_mib": "memory",
    "joules": "energy",
    "offline_s": "offline cost",
}
STATIC = ("unit", "nfe_equivalent", "latency_ms")  # drawn for readers without script and for print


def style(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Method -> (colour, shape), the same in every chart of a task."""
    return {name: (COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]) for i, name in enumerate(methods)}


def legend(styles: dict[str, tuple[str, str]], baselines: Sequence[str] = (), buttons: bool = True) -> str:
    """The legend as HTML: a button per method (script dims the others), or plain names; baselines marked."""
    opening, end = ('button type="button"', "button") if buttons else ("span", "span")
    items = [
        f'<{opening} data-method="{html.escape(name)}"><span aria-hidden="true" style="color:{colour}">'
        f"{MARKS[shape]}</span> {html.escape(name)}{' (baseline)' if name in baselines else ''}</{end}>"
        for name, (colour, shape) in styles.items()
    ]
    return f'<div class="sm-legend" role="group" aria-label="Methods">{"".join(items)}</div>'


def drawable(rows: Sequence[Row], axis: str, metric: str) -> list[Row]:
    """Rows that have a place on a chart with a logarithmic cost axis."""
    return [row for row in rows if metric in row.quality and 0 < (row.cost(axis) or 0) < math.inf]


def curve(
    rows: Sequence[Row], task: Task, axis: str, styles: dict[str, tuple[str, str]], name: str, metric: str | None = None
) -> str:
    """Quality against a cost axis for one place: a line per method, intervals, Pareto front; "" without two points.

    Points off the front are faint, flagged ones hollow. `name` is a prefix for ids inside the page.
    """
    metric = metric or next(iter(task.metrics))
    higher = task.metrics[metric] == "higher"
    shown = drawable(rows, axis, metric)
    if len(shown) < 2:
        return ""
    best = front(shown, axis, metric, higher)
    on_front = {(row.method, row.rung) for row in best}
    data = [
        {
            "method": row.method,
            "cost": row.cost(axis),
            "value": row.quality[metric].value,
            "low": row.quality[metric].low,
            "high": row.quality[metric].high,
            "front": (row.method, row.rung) in on_front,
            "flagged": not row.ranked,
            "label": _label(row, task, axis, metric),
        }
        for row in shown
    ]
    logarithmic = min(d["low"] for d in data) > 0 and max(d["high"] for d in data) > 8 * min(d["low"] for d in data)
    present = [m for m in styles if any(d["method"] == m for d in data)]
    title = f"{metric} ({'higher' if higher else 'lower'} is better)"
    x = {
        "field": "cost",
        "type": "quantitative",
        "title": AXES[axis].format(unit=task.unit),
        "scale": {"type": "log", "nice": False, "padding": 12},
        "axis": {"tickCount": 5, "format": "~g", "labelOverlap": "greedy", "grid": False},
    }
    y = {
        "field": "value",
        "type": "quantitative",
        "title": title,
        "scale": {"type": "log", "nice": False} if logarithmic else {"zero": False, "nice": True},
        "axis": {"tickCount": 6, "format": "~g", "labelOverlap": "greedy"},
    }
    by_method = {"field": "method", "type": "nominal", "legend": None}
    colour = by_method | {"scale": {"domain": present, "range": [styles[m][0] for m in present]}}
    shape = by_method | {"scale": {"domain": present, "range": [styles[m][1] for m in present]}}
    faint = {"condition": {"test": "datum.front", "value": 1}, "value": 0.45}
    hollow = {"condition": {"test": "datum.flagged", "value": "transparent"}, **colour}
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "line", "strokeWidth": 1.4, "opacity": 0.45},
            "encoding": {
                "x": x, "y": y, "color": colour, "order": {"field": "cost"}, "description": {"field": "method"},
            },
        },
        {
            "mark": {"type": "rule", "strokeWidth": 1.4},
            "encoding": {
                "x": x, "y": y | {"field": "low"}, "y2": {"field": "high"}, "color": colour, "opacity": faint,
                "description": {"field": "method"},
            },
        },
        {
            "mark": {"type": "point", "size": 62, "strokeWidth": 1.4},
            "encoding": {
                "x": x, "y": y, "color": colour, "shape": shape, "fill": hollow, "opacity": faint,
                "description": {"field": "label"},
            },
        },
    ]  # fmt: skip
    if len(best) > 1:
        steps = {
            "data": {"values": [{"cost": row.cost(axis), "value": row.quality[metric].value} for row in best]},
            "mark": {
                "type": "line",
                "interpolate": "step-after",
                "aria": False,
                "strokeWidth": 5,
                "opacity": 0.16,
                "color": INK,
            },
            "encoding": {"x": x, "y": y, "order": {"field": "cost"}},
        }
        layers.insert(0, steps)
    chart = {
        "data": {"values": data},
        "width": 330,
        "height": 250,
        "background": "transparent",
        "layer": layers,
        "config": {
            "font": "sans-serif",
            "view": {"stroke": None},
            "axis": {
                "labelColor": INK, "titleColor": INK, "domainColor": INK, "tickColor": INK, "gridColor": INK,
                "gridOpacity": 0.12, "domainOpacity": 0.5, "tickOpacity": 0.5, "labelFontSize": 11,
                "titleFontSize": 12, "titleFontWeight": "normal",
            },
        },
    }  # fmt: skip
    text = f"{metric} against {SHORT[axis]} on {task.id}, {len(present)} methods"
    return _adapt(vl_convert.vegalite_to_svg(chart), name, text)


def as_file(svg: str) -> str:
    """A curve as a file of its own: it knows no page, so that its ink follows the reader's scheme."""
    ink = "<style>svg{color:#333}@media screen and (prefers-color-scheme:dark){svg{color:#ddd}}</style>"
    return svg.replace("<title>", f"{ink}<title>", 1)


def _label(row: Row, task: Task, axis: str, metric: str) -> str:
    e = row.quality[metric]
    unit = {"unit": task.unit, "latency_ms": "ms"}.get(axis, SHORT[axis])
    state = "" if row.ranked else f", {row.status}"
    spread = f"{figure(e.value)} ({figure(e.low)} to {figure(e.high)})"
    return f"{row.method}, rung {row.rung}: {metric} {spread} at {figure(row.cost(axis))} {unit}{state}"


def _adapt(svg: str, name: str, title: str) -> str:
    """Make Vega's SVG fit a page: fluid width, text in the page's colour, unique ids, a title, tooltips."""
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'\bid="(?!")', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    # A point's label becomes its tooltip; the name of its method serves the legend.
    svg = re.sub(
        r'<path aria-label="(([a-z0-9_]+)[^"]*)"([^>]*?)(?:/>|></path>)',
        r'<path data-method="\2" aria-label="\1"\3><title>\1</title></path>',
        svg,
    )
    svg = re.sub(r'<line aria-label="([a-z0-9_]+)"([^>]*?)(?:/>|></line>)', r'<line data-method="\1"\2></line>', svg)
    opening = re.match(r"<svg[^>]*>", svg)
    assert opening is not None
    box = re.search(r'viewBox="[^"]*"', opening[0])
    assert box is not None
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box[0]} role="img" aria-label="{html.escape(title)}">'
    body = svg[opening.end() :].replace("\n", " ")
    return f"{head}<title>{html.escape(title)}</title>{body}"
