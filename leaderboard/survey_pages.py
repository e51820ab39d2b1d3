"""What a survey's page shows of `surveys.py`, and the list of surveys on docs/taxonomy.md. Liveness is computed."""

from __future__ import annotations

from collections.abc import Sequence

from stepmark.leaderboard import markup
from stepmark.leaderboard.coverage import Covered
from stepmark.leaderboard.markup import chip, esc, heading, link
from stepmark.leaderboard.pages import Board, element, words
from stepmark.leaderboard.surveys import Survey, orders, place, places, surveys


def section(found: Board, survey: Survey) -> list[str]:
    """How a survey orders the papers of its track: each axis with its branches and who stands in them.

    What is live stands open, the rest is folded below it.
    """
    own = next(each for each in found.covered if each.entry.id == survey.id)
    rows = [each for each in found.covered if orders(own.entry, each.entry)]
    parts = [
        "## How it orders the papers",
        element("p", esc(survey.says), "sm-lead"),
        element("p", f"The branches, told in our own words, and the papers of the track {esc(words(own.entry.track))} in "
                "them. There is nothing to run in a survey: it is live as soon as a paper that stands in it is. "
                f"{_said(rows)}"),
        element("p", _share(survey, rows), "sm-note"),
    ]  # fmt: skip
    for axis in survey.axes:
        parts.append(f"### {heading(axis.title)}")
        for branch in axis.branches:
            mine = [each for each in rows if place(axis, each.entry) == branch.id]
            stop = "" if branch.title.endswith("?") else "."
            head = f"<p><b>{esc(branch.title)}{stop}</b> {esc(branch.description)}</p>"
            parts.append(element("div", head + _papers(mine)))
        lost = [each for each in rows if place(axis, each.entry) is None]
        if lost:
            parts.append(element("div", "<p><b>No place.</b> No branch tells of these.</p>" + _papers(lost)))
    return parts


def listing(found: Board) -> str:
    """The surveys that order papers: each with its page, what it orders by, and how many of each branch are live."""
    covered = {each.entry.id: each for each in found.covered}
    items = []
    for survey in surveys():
        own = covered.get(survey.id)
        if own is None:
            continue
        rows = [each for each in found.covered if orders(own.entry, each.entry)]
        year = f", {esc(own.entry.year)}" if own.entry.year else ""
        axes = [f"<br>{esc(survey.says)}"]
        for axis in survey.axes:
            counted = []
            for branch in axis.branches:
                mine = [each for each in rows if place(axis, each.entry) == branch.id]
                counted.append(f"{esc(branch.title)} ({len(_live(mine))}/{len(mine)})")
            axes.append(f'<br><span class="sm-range">{esc(axis.title)}: {"; ".join(counted)}</span>')
        items.append(f"<li>{link(f'papers/{survey.id}.html', own.entry.title)}{year} {_chip(own)}{''.join(axes)}</li>")
    if not items:
        return '<p class="sm-note">No survey of the catalogue.</p>'
    return f"<ul>{''.join(items)}</ul>"


def _live(rows: Sequence[Covered]) -> list[Covered]:
    return [each for each in rows if each.status == "live"]


def _said(rows: Sequence[Covered]) -> str:
    live = len(_live(rows))
    if not rows:
        return "The catalogue holds no paper of this track yet."
    if not live:
        return f"Of {_counted(len(rows))} none is live yet."
    return f"Of {_counted(len(rows))} {live} {'is' if live == 1 else 'are'} live."


def _share(survey: Survey, rows: Sequence[Covered]) -> str:
    """The share of papers that have exactly one place: one on every axis."""
    if not rows:
        return ""
    whole = sum(None not in places(survey, each.entry) for each in rows)
    cells = "" if len(survey.axes) == 1 else f" on each of the {len(survey.axes)} axes"
    return f"{whole} of {_counted(len(rows))} ({100 * whole // len(rows)} %) have exactly one place{cells}."


def _papers(rows: Sequence[Covered]) -> str:
    """Who stands in a branch: what is live in the open, the others folded, first those that have a plugin."""
    if not rows:
        return '<p class="sm-note">No paper of the catalogue stands here.</p>'
    live = _live(rows)
    idle = sorted((each for each in rows if each.status != "live"), key=lambda each: each.status == "no plugin yet")
    parts = [f"<ul>{_items(live)}</ul>"] if live else []
    if idle:
        counted = f"{len(idle)} more, not live yet" if live else f"{_counted(len(idle))}, none live yet"
        parts.append(f"<details data-search-exclude><summary>{counted}</summary><ul>{_items(idle)}</ul></details>")
    return "".join(parts)


def _counted(n: int) -> str:
    return "1 paper" if n == 1 else f"{n} papers"


def _items(rows: Sequence[Covered]) -> str:
    items = []
    for each in rows:
        year = f", {esc(each.entry.year)}" if each.entry.year else ""
        items.append(f"<li>{link(f'../papers/{each.entry.id}.html', each.entry.title)}{year} {_chip(each)}</li>")
    return "".join(items)


def _chip(each: Covered) -> str:
    return chip(each.status, markup.COVERAGE_MOOD[each.status])
