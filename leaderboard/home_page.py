"""The home page: what methods save, where to look, how far the catalogue is covered, when it was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stepmark.leaderboard import charts, markup, picker
from stepmark.leaderboard.estimates import factor
from stepmark.leaderboard.fronts import LEAST, SAVED, Offer, Saving
from stepmark.leaderboard.markup import Cell, Line, chip, esc, estimate, link, number, table
from stepmark.leaderboard.pages import NFE, NFE_EQUIVALENT, NOTHING, Board, element, slug, words
from stepmark.leaderboard.rows import Row, place_of

COLUMNS = {
    "unit": "Fewest evaluations",
    "nfe_equivalent": "Fewest NFE-equivalents",
    "latency_ms": "Least time",
    "memory_mib": "Least memory",
    "joules": "Least energy",
}
HINTS = {
    "Fewest evaluations": NFE,
    "Fewest NFE-equivalents": NFE_EQUIVALENT,
    "Least time": "Milliseconds per item on this machine, median over rounds.",
    "Least memory": "The peak of one call above the loaded state.",
    "Least energy": "Joules per item.",
    "Baseline at its best": "The method that most others are compared with, at the rung where its first metric is best.",
}
HOW = (
    "How many times less a method costs than the baseline at its best rung, while it keeps the quality: a paired "
    "bootstrap test at 5 % finds no loss in the task's first metric. Each axis has a winner of its own, and a dash where "
    f"nothing saves {100 * (LEAST - 1):.0f} % or where the interval of the saving holds 1. In brackets 95 % intervals. "
    "The baseline itself may win, at a lower rung. Flagged records take no part, nor do variants of a method. What most "
    "methods have run on comes first."
)
MACHINES = " Of each task the machine with most records is shown; the track pages have them all."


def page(found: Board) -> list[str]:
    """What methods save, the picker, coverage, and when it was measured."""
    live = sum(c.status == "live" for c in found.covered)
    idle = sum(c.status == "not run" for c in found.covered)
    total = len(found.covered)
    boasts: Counter[str] = sum((c.boasts for c in found.covered), Counter())
    states: Counter[str] = sum((c.states for c in found.covered), Counter())
    parts = [
        element(
            "div",
            f"<p>These are the pages of suite version {esc(found.snapshot)} as they were released. "
            f"{link('../../index.html', 'The current ones')} may say something else.</p>",
            "sm-empty",
        )
        if found.snapshot
        else "",
        element(
            "p",
            "How much quality does each inference step, millisecond, megabyte and joule buy? Stepmark runs methods "
            "that save inference steps on fixed tasks, counts everything itself, walks a ladder of budgets, and "
            "publishes what it measured, with intervals, beside what the papers claim.",
            "sm-lead",
        ),
        "[Quick start](quickstart.md){ .md-button .md-button--primary } [How we measure](how-we-measure.md)"
        "{ .md-button } [Add a method](add-a-method.md){ .md-button }",
    ]
    if any(found.offer(task_id, found.places_of(task_id)[0]) for tasks in found.sought.values() for task_id in tasks):
        parts += ["## Find a method", picker.BOX, picker.SCRIPTS]
    parts.append("## What methods save")
    parts += _savings(found) if found.rows else [NOTHING]
    parts += ["## Coverage of the papers", _facts(
        [
            (total, "papers in the catalogue"),
            (live, "live: with records, or a survey of such"),
            (idle, "with a plugin, not run"),
            (total - live - idle, "without a plugin yet"),
        ]
    )]  # fmt: skip
    share = [(100 * n / total if total else 0.0) for n in (live, idle)]
    parts.append(
        f'<div class="sm-bar" role="img" aria-label="{live} of {total} papers live, {idle} not run">'
        f'<span class="live" style="width:{share[0]:.2f}%"></span>'
        f'<span class="idle" style="width:{share[1]:.2f}%"></span>'
        "</div>"
    )
    told = (("Headline claims, what the abstracts boast of", boasts), ("All claims that the plugins state", states))
    for what, counted in told:
        if counted:
            parts.append(element("p", f"{what}: {markup.tally(counted, markup.VERDICT_MOOD)}"))
    parts.append("[All papers and their status](papers.md)")
    parts.append("## When and where it was measured")
    parts.append(_measured(found) if found.records else NOTHING)
    return parts


def _facts(facts: Sequence[tuple[object, str]]) -> str:
    return '<div class="sm-facts">' + "".join(f"<div><b>{esc(n)}</b>{esc(t)}</div>" for n, t in facts) + "</div>"


def _savings(found: Board) -> list[str]:
    """Per track, those looked for first on top: a small chart, and the best method per axis on every task."""
    parts = []
    for track, tasks in found.sought.items():
        lines = [(task_id, deal) for task_id in tasks if (deal := found.offer(task_id, found.places_of(task_id)[0]))]
        if lines:
            address = link(f"tracks/{track}.html", "All its methods and ladders")
            chart = _chart(found, lines[0][0])
            parts += [f"### {words(track)}", chart, _table(found, track, lines), element("p", address + ".", "sm-note")]
    if not parts:
        return [element("div", "<p>No baseline has been measured yet, so nothing can be compared.</p>", "sm-empty")]
    more = any(len(found.places_of(task_id)) > 1 for tasks in found.sought.values() for task_id in tasks)
    return [element("p", HOW + (MACHINES if more else ""), "sm-note"), *parts]


def _table(found: Board, track: str, lines: Sequence[tuple[str, Offer]]) -> str:
    """A line per task: the baseline at its best, and for each axis the method that saves most and keeps the quality."""
    offered = {task_id: {axis: deal.saving(axis) for axis in SAVED} for task_id, deal in lines}
    axes = [axis for axis in SAVED if any(savings[axis] for savings in offered.values())]
    body = []
    for task_id, deal in lines:
        where = f"tracks/{track}.html#{slug(task_id)}"
        title = found.titles[task_id]
        several = f"<br>{esc(deal.baseline.place)}" if len(found.places) > 1 else ""
        cells = [
            Cell(f'{link(where, title)}<br><span class="sm-range">{esc(task_id)}{several}</span>', title),
            Cell(
                '<span class="sm-phone">Baseline at its best: </span>' + _at(deal.baseline, deal), deal.baseline.method
            ),
            *[_saved(found, offered[task_id][axis], deal, COLUMNS[axis]) for axis in axes],
        ]
        body.append(Line(cells, weak=not any(offered[task_id].values())))
    head = ("Task", "Baseline at its best", *(COLUMNS[axis] for axis in axes))
    return table(head, body, f"What methods save: {words(track).lower()}", hints=HINTS)


def _at(row: Row, deal: Offer) -> str:
    """A row in words: its method, its rung, its quality."""
    name = link(f"methods/{row.method}.html", row.method)
    value = estimate(row.quality[deal.metric]).html
    return f'{name} at {row.rung}<br><span class="sm-figure">{esc(deal.metric)} {value}</span>'


def _saved(found: Board, saving: Saving | None, deal: Offer, head: str) -> Cell:
    """A saving in words; where a phone has no room for columns its heading stands before it."""
    if saving is None:
        return Cell('<span class="sm-nothing">–</span>', "")
    much, spread = factor(saving.factor)
    state = found.standings[(saving.row.method, saving.row.task)]
    doubt = f" {chip(state.state, markup.TRUST_MOOD[state.state], state.said)}" if state.state == "disputed" else ""
    much = f'<span class="sm-phone">{head}: </span><b>{much}</b> <span class="sm-range">{spread}</span>{doubt}'
    return Cell(f"{much}<br>{_at(saving.row, deal)}", saving.factor.value)


def _chart(found: Board, task_id: str) -> str:
    """The ladders of a track's first task, small: what is on the front and the baseline; the others faint behind."""
    track, task = found.tasks[task_id]
    rows = found.of_task(task_id, found.places_of(task_id)[0])
    leading = found.leading(rows, task, ("unit",))
    styles = charts.style([*leading, *(name for name in found.order(rows) if name not in leading)])
    svg = charts.curve(rows, task, "unit", styles, leading=leading)
    if not svg:
        return ""
    caption = (
        f"{link(f'tracks/{track}.html#{slug(task_id)}', found.titles[task_id])}: what each evaluation buys. The broad line "
        "is the Pareto front; the methods on it and the baseline have colour."
    )
    names = charts.legend(styles, leading[:1], False, leading)
    return f'<figure class="sm-first" data-search-exclude>{svg}<figcaption>{element("p", caption)}{names}</figcaption></figure>'


def _measured(found: Board) -> str:
    lines: list[Line] = []
    for place in sorted({place_of(r) for r in found.records}):
        mine = [r for r in found.records if place_of(r) == place]
        newest = max(mine, key=lambda r: r.created)
        devices = sorted({r.device for r in mine})
        commits = sorted({r.commit or "outside a checkout" for r in mine})
        status = Counter(r.status for r in mine)
        lines.append(
            Line(
                [
                    Cell(esc(place), place.machine),
                    markup.text(", ".join(devices)),
                    markup.text(newest.suite),
                    markup.text(min(r.created for r in mine)[:10]),
                    markup.text(newest.created[:10]),
                    number(len(mine)),
                    Cell(markup.tally(status, markup.STATUS_MOOD)),
                    markup.text(", ".join(commits[:3]) + (f" and {len(commits) - 3} more" if len(commits) > 3 else "")),
                ]
            )
        )
    head = ("Machine", "Device", "Suite", "First", "Last", "Records", "Status", "Commits")
    blocks = [table(head, lines, "Machines")]
    for place in sorted({place_of(r) for r in found.records}):
        newest = max((r for r in found.records if place_of(r) == place), key=lambda r: r.created)
        facts = [(k.replace("_", " "), esc(v)) for k, v in sorted(newest.environment.items())]
        if facts:
            blocks.append(f"<details><summary>{esc(place)}: environment</summary>{markup.definitions(facts)}</details>")
    return "\n".join(blocks)
