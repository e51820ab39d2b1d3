"""Ladder curves as SVG, drawn at build time: no script, no font and no network at reading time."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from stepmark.leaderboard.estimates import figure
from stepmark.leaderboard.fronts import front
from stepmark.leaderboard.rows import Row

from stepmark.task import Task

# Okabe and Ito's colours, told apart by most colour-blind readers on light and on dark ground, in two brightnesses.
COLOURS = (
    "#2b8cc4", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#5c6bc0", "#8a6d3b", "#7a5fb5", "#2f9e44", "#c2255c",
    "#1098ad", "#b8860b",
)  # fmt: skip
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
# With each turn through the colours the shapes move on by one: no two of 72 methods look alike.
LOOKS = [(colour, SHAPES[(i + turn) % len(SHAPES)]) for turn in range(len(SHAPES)) for i, colour in enumerate(COLOURS)]
MARKS = {"circle": "●", "square": "■", "triangle-up": "▲", "diamond": "◆", "cross": "✚", "triangle-down": "▼"}
POINTS = {
    "circle": "M4.4,0A4.4,4.4 0 1 1 -4.4,0A4.4,4.4 0 1 1 4.4,0Z",
    "square": "M-3.9,-3.9H3.9V3.9H-3.9Z",
    "triangle-up": "M0,-5L5,3.9H-5Z",
    "diamond": "M0,-5.4L4.6,0L0,5.4L-4.6,0Z",
    "cross": "M-1.7,-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
    "triangle-down": "M0,5L5,-3.9H-5Z",
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BELOW, PADDING = 400, 310, 62, 10, 10, 44, 12  # of a drawing, in its own units
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
    return {name: LOOKS[i % len(LOOKS)] for i, name in enumerate(methods)}


def legend(
    styles: dict[str, tuple[str, str]],
    baselines: Sequence[str] = (),
    buttons: bool = True,
    leading: Sequence[str] | None = None,
) -> str:
    """The legend as HTML: a button per method (script dims the others), or plain names; baselines marked. Where methods
    are `leading`, the others are only counted.
    """
    others = 0 if leading is None else sum(name not in leading for name in styles)
    opening, end = ('button type="button"', "button") if buttons else ("span", "span")
    items = [
        f'<{opening} data-method="{html.escape(name)}"><span aria-hidden="true" style="color:{colour}">'
        f"{MARKS[shape]}</span> {html.escape(name)}{' (baseline)' if name in baselines else ''}</{end}>"
        for name, (colour, shape) in styles.items()
        if leading is None or name in leading
    ]
    if others:
        items.append(f"<span>{others} more without colour</span>")
    return f'<div class="sm-legend" role="group" aria-label="Methods">{"".join(items)}</div>'


def drawable(rows: Sequence[Row], axis: str, metric: str) -> list[Row]:
    """Rows that have a place on a chart with a logarithmic cost axis."""
    return [row for row in rows if metric in row.quality and 0 < (row.cost(axis) or 0) < math.inf]


def curve(
    rows: Sequence[Row],
    task: Task,
    axis: str,
    styles: dict[str, tuple[str, str]],
    metric: str | None = None,
    leading: Sequence[str] | None = None,
) -> str:
    """Quality against a cost axis for one place: a line per method, intervals, Pareto front; "" without two points.

    Points off the front are faint, flagged ones hollow. Each point says its figures when it is pointed at. Where methods
    are `leading`, the others stand behind them without colour, interval and words.
    """
    metric = metric or next(iter(task.metrics))
    higher = task.metrics[metric] == "higher"
    shown = drawable(rows, axis, metric)
    if len(shown) < 2:
        return ""
    best = front(shown, axis, metric, higher)
    values = [row.quality[metric].value for row in shown]
    logarithmic = min(values) > 0 and max(values) > 8 * min(values)
    floor = min(values) / 2 if logarithmic else -math.inf  # an interval that reaches further down ends at the edge
    ends = [max(end, floor) for row in shown for end in (row.quality[metric].low, row.quality[metric].high)]
    x = Scale([row.cost(axis) or 0.0 for row in shown], True, (LEFT + PADDING, WIDTH - RIGHT - PADDING))
    y = Scale(ends, logarithmic, (HEIGHT - BELOW, TOP))

    def at(row: Row) -> tuple[float, float]:
        return x(row.cost(axis) or 0.0), y(row.quality[metric].value)

    parts = [*_axes(x, y, AXES[axis].format(unit=task.unit), f"{metric} ({'higher' if higher else 'lower'} is better)")]
    if len(best) > 1:
        corners = [at(best[0])]
        for row in best[1:]:
            corners += [(at(row)[0], corners[-1][1]), at(row)]
        parts.append(f'<path d="{_path(corners)}" fill="none" stroke="currentColor" stroke-width="5" opacity="0.16"/>')
    on_front = {id(row) for row in best}
    faint, lines, rules, points = [], [], [], []
    for name, (colour, shape) in styles.items():
        mine = sorted((row for row in shown if row.method == name), key=lambda row: row.cost(axis) or 0.0)
        if leading is not None and name not in leading:
            faint.append(_faint(name, [at(row) for row in mine]))
            continue
        if len(mine) > 1:
            look = f'fill="none" stroke="{colour}" stroke-width="1.4" opacity="0.45"'
            lines.append(f'<path data-method="{name}" d="{_path([at(row) for row in mine])}" {look}/>')
        for row in mine:
            strength = "" if id(row) in on_front else ' opacity="0.45"'
            across, up = at(row)
            e = row.quality[metric]
            look = f'stroke="{colour}" stroke-width="1.4"{strength}'
            rules.append(
                f'<line data-method="{name}" x1="{across:.1f}" x2="{across:.1f}" y1="{y(max(e.low, floor)):.1f}" '
                f'y2="{y(e.high):.1f}" {look}/>'
            )
            label = html.escape(_label(row, task, axis, metric))
            points.append(
                f'<path data-method="{name}" aria-label="{label}" role="img" transform="translate({across:.1f},{up:.1f})" '
                f'd="{POINTS[shape]}" fill="{colour if row.ranked else "transparent"}" {look}><title>{label}</title></path>'
            )
    title = html.escape(f"{metric} against {SHORT[axis]} on {task.id}, {len({row.method for row in shown})} methods")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
    return "".join([head, f"<title>{title}</title>", *parts, *faint, *lines, *rules, *points, "</svg>"])


class Scale:
    """From figures to places on the page; on a linear scale the ends are round numbers."""

    def __init__(self, values: Sequence[float], logarithmic: bool, ends: tuple[float, float]) -> None:
        self.logarithmic, self.ends = logarithmic, ends
        self.low, self.high = min(values), max(values)
        if self.low == self.high:  # one value stands in the middle
            off = abs(self.low) / 2 or 1.0
            self.low, self.high = self.low - off, self.high + off
        if not logarithmic:
            step = self._step()
            self.low, self.high = math.floor(self.low / step) * step, math.ceil(self.high / step) * step

    def __call__(self, value: float) -> float:
        a, b, v = (
            (math.log10(x) for x in (self.low, self.high, value)) if self.logarithmic else (self.low, self.high, value)
        )
        return self.ends[0] + (v - a) / (b - a) * (self.ends[1] - self.ends[0])

    def _step(self) -> float:
        """The round number that parts the scale into about five."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        return next(power * n for n in (1, 2, 5, 10) if power * n >= 0.999 * rough)

    def ticks(self) -> list[float]:
        """Round numbers along the scale: about six, of powers of ten first where it is logarithmic."""
        if not self.logarithmic:
            step = self._step()
            first = round(self.low / step)
            return [(first + i) * step for i in range(round((self.high - self.low) / step) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
            every = 1 if len(powers) < 10 else len(powers) // 5
            marks = [d * 10.0**p for p in powers[::every] for d in digits]
            found = [mark for mark in marks if self.low * 0.999 <= mark <= self.high * 1.001]
            if len(found) >= 4:
                break
        return found or [self.low, self.high]


def _path(corners: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{across:.1f},{up:.1f}" for across, up in corners)


def _faint(name: str, places: Sequence[tuple[float, float]]) -> str:
    """A ladder without colour: its line, and its points as dots."""
    if not places:
        return ""
    dots = "".join(f"M{across:.1f},{up:.1f}h0" for across, up in places)
    look = f'data-method="{name}" fill="none" stroke="currentColor" stroke-linecap="round"'
    line = f'<path {look} d="{_path(places)}" stroke-width="1" opacity="0.1"/>' if len(places) > 1 else ""
    return f'{line}<path {look} d="{dots}" stroke-width="4" opacity="0.15"/>'


def _axes(x: Scale, y: Scale, across: str, up: str) -> list[str]:
    """Lines, ticks, numbers and titles; numbers that would touch are left out."""
    base, ink = HEIGHT - BELOW, 'stroke="currentColor"'
    text = 'fill="currentColor" font-family="sans-serif"'
    found = [f'<path d="M{LEFT},{TOP}V{base}H{WIDTH - RIGHT}" fill="none" {ink} opacity="0.5"/>']
    free = -math.inf
    for tick in x.ticks():
        place, word = x(tick), f"{tick:.6g}"
        found.append(f'<path d="M{place:.1f},{base}v5" {ink} opacity="0.5"/>')
        if place - 3.3 * len(word) > free:
            found.append(
                f'<text x="{place:.1f}" y="{base + 17}" text-anchor="middle" font-size="11" {text}>{word}</text>'
            )
            free = place + 3.3 * len(word) + 4
    free = math.inf
    for tick in y.ticks():
        place, word = y(tick), f"{tick:.6g}"
        found.append(f'<path d="M{LEFT - 5},{place:.1f}H{WIDTH - RIGHT}" {ink} opacity="0.12"/>')
        if place + 6 < free:
            found.append(
                f'<text x="{LEFT - 8}" y="{place + 4:.1f}" text-anchor="end" font-size="11" {text}>{word}</text>'
            )
            free = place - 6
    middle = (TOP + base) / 2
    found.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle" font-size="12" {text}>'
        f"{html.escape(across)}</text>"
    )
    found.append(
        f'<text transform="translate(12,{middle})rotate(-90)" text-anchor="middle" font-size="12" {text}>'
        f"{html.escape(up)}</text>"
    )
    return found


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
