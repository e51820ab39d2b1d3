"""The home page: what methods save, where to look, how far the catalogue is covered, when it was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stepmark.leaderboard import markup
from stepmark.leaderboard.markup import Cell, Line, esc, estimate, link, number, table
from stepmark.leaderboard.pages import NOTHING, Board, element, slug, trust_cell
from stepmark.leaderboard.rows import Row, headline, place_of


def page(found: Board) -> list[str]:
    live = sum(c.status == "live" for c in found.covered)
    idle = sum(c.status == "not run" for c in found.covered)
    total = len(found.covered)
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
        "## What the best method buys",
    ]
    parts += _bargains(found) if found.rows else [NOTHING]
    parts += ["## Coverage of the papers", _facts(
        [
            (total, "papers in the catalogue"),
            (live, "live: a plugin with records"),
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
    if states:
        counts = markup.tally(states, markup.VERDICT_MOOD)
        parts.append(element("p", f"Claims that the plugins of these papers state: {counts}"))
    parts.append("[All papers and their status](papers.md)")
    parts.append("## When and where it was measured")
    parts.append(_measured(found) if found.records else NOTHING)
    return parts


def _facts(facts: Sequence[tuple[object, str]]) -> str:
    return '<div class="sm-facts">' + "".join(f"<div><b>{esc(n)}</b>{esc(t)}</div>" for n, t in facts) + "</div>"


def _bargains(found: Board) -> list[str]:
    lines: list[Line] = []
    more = False
    for task_id, (track, task) in found.tasks.items():
        metric, _ = headline(task)
        places = found.places_of(task_id)
        more = more or len(places) > 1

        def at_rung(row: Row, metric: str = metric) -> Cell:
            name = link(f"methods/{row.method}.html", row.method)
            value = estimate(row.quality[metric]).html
            return Cell(f"{name} at {row.rung}<br>{esc(metric)} {value}", row.method)

        for place in places[:1]:
            deal = found.bargain(task_id, place)
            if deal is None:
                continue
            task_cell = Cell(link(f"tracks/{track}.html#{slug(task_id)}", task_id), task_id)
            match = at_rung(deal.row) if deal.row else Cell("none reaches it for less", "")
            factors = [number(deal.factor(axis), unit="×") for axis in ("unit", "nfe_equivalent", "latency_ms")]
            trust = trust_cell(found, deal.row or deal.baseline)
            where = [markup.text(place)] if len(found.places) > 1 else []
            cells = [task_cell, *where, at_rung(deal.baseline), match, *factors, trust]
            lines.append(Line(cells, weak=deal.row is None))
    if not lines:
        return [element("div", "<p>No baseline has been measured yet, so nothing can be compared.</p>", "sm-empty")]
    head = ("Task", *(["Machine"] if len(found.places) > 1 else []), "Baseline at its best", "Cheapest that matches it",
            "Evaluations saved", "NFE-eq. saved", "Time saved", "Trust")  # fmt: skip
    return [
        table(head, lines, "What the best method per task buys"),
        element(
            "p",
            "A method matches if a paired bootstrap test at 5 % finds no loss in the task's first metric against the "
            "baseline's best rung. Values carry 95 % intervals. Time is the ratio of medians per "
            "item on the same machine. A flagged record takes no part."
            + (" Of each task the machine with most records is shown; the track pages have them all." if more else ""),
            "sm-note",
        ),
    ]


def _measured(found: Board) -> str:
    lines: list[Line] = []
    for place in sorted({place_of(r) for r in found.records}):
        mine = [r for r in found.records if place_of(r) == place]
        newest = max(mine, key=lambda r: r.created)
        devices = sorted({r.environment.get("device", "?") for r in mine})
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
