"""Method pages: the table of all methods, and a page for each with all that was recorded of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from stepmark.leaderboard import changes, claims_page, markup, paper_pages, sample_pages
from stepmark.leaderboard.estimates import figure
from stepmark.leaderboard.markup import Cell, Line, chip, esc, estimate, link, number, table
from stepmark.leaderboard.pages import (
    Board,
    crumbs,
    curves,
    element,
    figures,
    method_cell,
    record_cell,
    slug,
    trust_cell,
    verdict_counts,
    words,
)
from stepmark.leaderboard.rows import Place, Row, best, headline, lenders, split
from stepmark.leaderboard.verdicts import tally

from stepmark import plugins
from stepmark.plugins import MethodInfo
from stepmark.record import Record

SET = "From the docstring of the source; letters, indices and powers are set from its plain text."


def index(found: Board) -> list[str]:
    """The table of all methods, variants below theirs."""
    lines = []
    for name in sorted({*found.methods, *found.by_method}, key=found.kin):
        info = found.methods.get(name)
        rows = found.by_method.get(name, [])
        states = tally(found.verdicts[name]) if info else Counter()
        track = info.track if info else rows[0].track
        paper = f"{info.paper.authors.split(',')[0]}, {info.paper.year}" if info and info.paper else ""
        lines.append(
            Line(
                [
                    method_cell(found, name, ""),
                    markup.text(info.title if info else "not in this checkout"),
                    Cell(link(f"../tracks/{track}.html", words(track)) if track in found.tracks() else esc(track)),
                    markup.text(paper),
                    number(len({row.task for row in rows if row.measured})),
                    verdict_counts(states),
                ],
                variant=found.is_variant(name),
            )
        )
    head = ("Method", "What it does", "Track", "Paper", "Tasks measured", "Claims")
    return [table(head, lines, "Methods")] if lines else [element("p", "No method has been written yet.")]


def page(found: Board, name: str) -> list[str]:
    """One method: where it comes from, its claims and equations, its ladders, and how to repeat them."""
    info = found.methods.get(name)
    rows = found.by_method.get(name, [])
    track = info.track if info else rows[0].track
    parts = [crumbs(("index.html", "Methods"), (f"../tracks/{track}.html", words(track)), (f"{name}.html", name))]
    if info is None:
        parts.append(
            element("div", "<p>This method's file is not in this checkout; only its records are.</p>", "sm-empty")
        )
    else:
        parts.append(_reference(found, info))
        parts += ["## Claims", claims_page.of_method(found, info, "../")] if info.claims else []
        if info.base is None:
            parts += ["## What it is", markup.docstring(info.doc), element("p", SET, "sm-note")]
        variants = found.variants(name)
        if variants:
            parts += ["## Variants", paper_pages.variants_table(found, variants, "")]
    parts.append("## Ladder curves")
    if not rows:
        parts.append(element("div", "<p>Not run yet.</p>", "sm-empty"))
    shown: list[Row] = []  # in full: those of one place, the best covered, on each task
    for (task_id,), mine in split(rows, "task").items():
        by_place = {place: of_place for (place,), of_place in split(mine, "place").items()}
        place, *others = [place for place in found.places_of(task_id) if place in by_place]
        task = found.tasks[task_id][1]
        against = [name, *(info.baselines if info else ())]
        beside = [row for row in found.of_task(task_id, place) if row.method in against]
        suffix = f" on {place}" if len(found.places) > 1 else ""
        parts.append(f"### {task_id}{markup.heading(suffix)} {{ #{slug(task_id)} }}")
        standing = trust_cell(found, mine[0]).html
        why = paper_pages.why(found.standings[(name, task_id)])
        parts.append(element("p", f"Trust: {standing} {esc(why)}"))
        present = [name for name in against if any(row.method == name for row in beside)]
        parts.append(curves(found, beside, task, present, ("unit", "latency_ms")))
        parts.append(figures(found, by_place[place], task, ids=True))
        if elsewhere := lenders(by_place[place]):
            parts.append(element("p", esc(elsewhere), "sm-note"))
        if others:
            parts.append(_elsewhere(found, task_id, {other: by_place[other] for other in others}))
        shown += by_place[place]
    if others := Counter(why for r, why in found.ledger.left_out if r.method == name):
        said = "; ".join(f"{why} ({n})" for why, n in others.most_common(3))
        stand = link("../downloads.html", "downloads")
        parts.append(
            element("p", f"Records left out, neither ranked nor compared: {esc(said)}. They stand in the {stand}.")
        )
    parts += sample_pages.section(found, found.samples, name)
    if rows:
        parts += ["## History", changes.history(found.versions, name)]
        parts += ["## Counts", _counts(shown), "## Offline cost", _offline(rows), "## Repeat it", _repeat(found, shown)]
        parts += ["## Digests", _digests(found, shown)]
        if len(shown) < len(rows):
            note = "Counts, commands and digests of the other machines stand in the {}."
            parts.append(element("p", note.format(link("../downloads.html", "downloads")), "sm-note"))
    return parts


def _elsewhere(found: Board, task_id: str, by_place: Mapping[Place, Sequence[Row]]) -> str:
    """A line per further place: the method's best rung there, and where the rest is."""
    track, task = found.tasks[task_id]
    metric, higher = headline(task)
    lines = []
    for place, mine in by_place.items():
        ranked = [row for row in mine if row.ranked and metric in row.quality]
        top = best(ranked, metric, higher) if ranked else None
        status = Counter(row.status for row in mine)
        lines.append(
            Line(
                [
                    Cell(esc(place), str(place)),
                    number(len(mine)),
                    estimate(top.quality[metric] if top else None),
                    number(top.rung if top else None),
                    estimate(top.latency_ms if top else None),
                    Cell(markup.tally(status, markup.STATUS_MOOD)),
                ]
            )
        )
    head = ("Machine", "Rungs", f"Best {metric}", "at rung", "ms/item there", "Status")
    data = f"../data/ladders-{slug(task_id)}"
    where = (
        f"Every rung on these machines: {link(f'../tracks/{track}.html#{slug(task_id)}', 'the track page')}, "
        f"{link(f'{data}.csv', 'CSV')}, {link(f'{data}.json', 'JSON')}."
    )
    return f"{table(head, lines, f'Other machines on {task_id}')}\n{element('p', where, 'sm-note')}"


def _reference(found: Board, info: MethodInfo) -> str:
    base = found.methods.get(info.base or "")
    paper = info.paper or (base.paper if base else None)
    pairs: list[tuple[str, str]] = []
    if info.base is not None:
        changed = ", ".join(f"<code>{esc(name)} = {esc(repr(value))}</code>" for name, value in info.overrides.items())
        whole = f"{link(f'{info.base}.html', info.base)}: {esc(info.says)}"
        pairs.append(("Variant of", whole + (f" ({changed})" if changed else "")))
    if paper:
        where = [link(f"https://arxiv.org/abs/{paper.arxiv}", f"arXiv:{paper.arxiv}")] if paper.arxiv else []
        where += [link(paper.url, paper.url)] if paper.url else []
        where += [link(f"https://github.com/{paper.code}", f"official code: {paper.code}")] if paper.code else []
        known = any(each.entry.id == paper.id for each in found.covered)
        title = link(f"../papers/{paper.id}.html", paper.title) if known else esc(paper.title)
        pairs.append(("Paper", f"{esc(paper.authors)}: <i>{title}</i>, {esc(paper.year)}"))
        pairs += [("Links", ", ".join(where))] if where else []
    else:
        pairs.append(("Paper", "none: a reference method of the track"))
    pairs.append(("Compared with", ", ".join(link(f"{b}.html", b) for b in info.baselines) or "none: it is a baseline"))
    files = [link(f"../source/{info.base or info.id}.py.txt", "the file as it was read for this page")]
    root = plugins.checkout()
    inside = root is not None and info.path.is_relative_to(root)
    path = info.path.relative_to(root).as_posix() if root and inside else f"methods/{info.track}/{info.path.name}"
    if found.repository and inside:
        files.append(link(f"{found.repository}/blob/HEAD/{path}", "in the repository"))
    pairs.append(("Source", f"<code>{esc(path)}</code>: {', '.join(files)}"))
    return markup.definitions(pairs)


def _counts(rows: Sequence[Row]) -> str:
    lines = []
    several = len({row.place for row in rows}) > 1
    others = {row.id: _further(row.first) for row in rows}
    further = any(others.values())
    for row in rows:
        r = row.first
        if not r.counts:
            continue
        handles = "; ".join(
            f"{name}: " + ", ".join(f"{figure(v)} {k.replace('_', ' ')}" for k, v in sorted(kinds.items()))
            for name, kinds in sorted(r.handles.items())
        )
        said = ", ".join(f"{figure(v)} {k}" for k, v in sorted(r.reported.items()))
        flagged = any("reports" in flag for flag in r.flags)
        mark = f"{esc(said)} {chip('differs', 'bad') if flagged else chip('matches', 'good')}" if said else "–"
        lines.append(
            Line(
                [
                    Cell(esc(row.task), row.task),
                    number(row.rung),
                    *([markup.text(row.place)] if several else []),
                    number(r.counts.get("nfe")),
                    number(r.counts.get("flops")),
                    number(r.counts.get("flops_outside")),
                    *([markup.text(others[row.id] or "–")] if further else []),
                    markup.text(handles or "–"),
                    Cell(mark),
                ],
                row.rung,
            )
        )
    head = (
        "Task",
        "Rung",
        *(["Machine"] if several else []),
        "NFE/item",
        "FLOPs/item",
        "of them outside handles",
        *(["Also counted"] if further else []),
        "All items, by handle",
        "It reports, per call",
    )
    return table(head, lines, "Counts") if lines else element("p", "Nothing was counted.")


def _further(r: Record) -> str:
    """The counts that have no column of their own and are not among those of the handles. Untrusted text."""
    of_handles = {f"{name}_{kind}" for name, kinds in r.handles.items() for kind in kinds}
    known = {"nfe", "nfe_equivalent", "flops", "flops_outside"} | of_handles
    return "; ".join(f"{k.replace('_', ' ')} {figure(v)}" for k, v in sorted(r.counts.items()) if k not in known)


def _offline(rows: Sequence[Row]) -> str:
    lines = []
    for (task, place), mine in split(rows, "task", "place").items():
        cost = next((row.first.offline for row in mine if row.first.offline), None)
        if cost is None:
            continue
        spent = ", ".join(f"{figure(v)} of {k}" for k, v in sorted(cost.evaluations.items())) or "none"
        cells = [
            Cell(esc(task), task),
            markup.text(place),
            number(cost.seconds),
            markup.text(spent),
            number(cost.state_mib),
        ]
        lines.append(Line(cells))
    head = ("Task", "Machine", "Seconds", "Evaluations", "State MiB")
    return table(head, lines, "Offline cost") if lines else element("p", "No offline stage has been recorded.")


def _repeat(found: Board, rows: Sequence[Row]) -> str:
    lines = [markup.code("\n".join(dict.fromkeys(row.first.command for row in rows)))]
    said = "Something wrong? Open an issue of the form “Disputed number” with the record's id from the tables above."
    if found.repository:
        said += " A click on an id opens the form."
    return "".join([*lines, element("p", said)])


def _digests(found: Board, rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        r = row.first
        parts = ", ".join(f"{k} {v[:12]}" for k, v in sorted(r.digests.items()))
        cells = [
            Cell(esc(row.task), row.task),
            number(row.rung),
            markup.text(row.place.machine),
            record_cell(found, row),
            markup.text(r.created),
            markup.text(r.commit or "–"),
            markup.text((r.outputs or "–")[:12]),
            markup.text(parts or "–"),
        ]
        lines.append(Line(cells, row.rung))
    return table(("Task", "Rung", "Machine", "Record", "Created", "Commit", "Outputs", "Sources"), lines, "Digests")
