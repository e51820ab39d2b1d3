"""The static site: every page and data file is written from records, then MkDocs builds them. Nothing asks a network.

    pages = build(results=Path("leaderboard/results"), out=Path("build/site"))

Records are untrusted: each text passes through `markup.esc`, and pages are HTML inside Markdown, which is left alone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from stepmark.leaderboard import (
    changes,
    compare_page,
    downloads,
    ledger,
    markup,
    paper_pages,
    release,
    sample_pages,
    taxonomy,
    track_pages,
)
from stepmark.leaderboard.estimates import figure
from stepmark.leaderboard.markup import Cell, Line, chip, esc, estimate, link, number, table
from stepmark.leaderboard.pages import (
    NOTHING,
    Board,
    crumbs,
    curves,
    element,
    figures,
    record_cell,
    slug,
    trust_cell,
    verdict_counts,
    words,
)
from stepmark.leaderboard.rows import Place, Row, best, headline, split
from stepmark.leaderboard.trust import disputes
from stepmark.leaderboard.verdicts import tally

from stepmark import plugins, samples
from stepmark.plugins import MethodInfo
from stepmark.record import Record

MARKER = ".stepmark-site"  # a folder that holds it was made here and may be cleared
ASSETS = Path(__file__).with_name("assets")
DATA = ".data"  # below the written pages: MkDocs passes by what begins with a dot, and copies nothing of it
PARTS = "parts"
MANY = 2000  # rows from which on the data files are worth a process
SET = "From the docstring of the source; letters, indices and powers are set from its plain text."


def build(
    results: Path,
    out: Path,
    tier: str | None = None,
    source: Path | None = None,
    repository: str | None = None,
    strict: bool = True,
    snapshot: str | None = None,
) -> Path:
    """Write the pages, build them, return the path of the home page.

    `tier` limits the records (default: all but smoke). `source` is the folder of the written pages (default: beside
    `out`, for build/site it is build/site-src). `repository` is the address that links to files lead to; by default
    what a CI run says of itself. Released versions are unpacked below versions/, unless the pages are themselves the
    `snapshot` of one.

    Raises:
        RecordError: a record cannot be read. ValueError: a folder that is not ours would be cleared, no checkout, or
            MkDocs warned. ModuleNotFoundError: the `site` extra is missing.
    """
    root = plugins.checkout()
    if root is None:
        raise ValueError("the site is built from a checkout: clone the repository and run stepmark site there")
    out = out.resolve()
    source = (source or out.with_name(f"{out.name}-src")).resolve()
    for folder in (out, source):
        _clear(folder)
    if repository is None and os.environ.get("GITHUB_REPOSITORY"):
        repository = f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{os.environ['GITHUB_REPOSITORY']}"
    data = source / DATA
    objections = disputes(Path(__file__).with_name("disputes.jsonl"))
    found = Board(
        ledger=ledger.read(results, tier, objections, data / PARTS),
        methods=plugins.methods(),
        tasks=plugins.tasks(),
        repository=repository,
        samples=samples.read_all(results),
        releases=release.summary(results),
        snapshot=snapshot,
    )
    # The data files need no page and the pages need none of them.
    with ledger.beside(lambda: write_data(found, data), ledger.cores() > 1 and len(found.rows) > MANY):
        aside = write(found, source, root)
        _mkdocs(root / "mkdocs.yml", source, out, strict)
    aside.append(_downloads_table(data))
    _fill(out, aside)
    shutil.rmtree(data / PARTS)
    data.rename(out / "data")
    if snapshot is None:
        release.unpack_sites(results, out)
    (out / MARKER).touch()
    return out / "index.html"


def _clear(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ValueError(f"{folder} holds files that stepmark site did not write; choose or empty another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def _mkdocs(config: Path, source: Path, out: Path, strict: bool) -> None:
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build as mkdocs_build
    from mkdocs.config import load_config
    from mkdocs.exceptions import MkDocsException

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    heard: list[str] = []
    handler = Keep(logging.WARNING)
    logger = logging.getLogger("mkdocs")
    logger.addHandler(handler)
    propagated, logger.propagate = logger.propagate, False
    try:
        loaded = load_config(str(config), docs_dir=str(source), site_dir=str(out), strict=strict)
        loaded.plugins.on_startup(command="build", dirty=False)
        mkdocs_build(loaded)
    except (MkDocsException, SystemExit) as error:
        raise ValueError(f"mkdocs: {'; '.join(heard) or error}") from None
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def write(found: Board, source: Path, root: Path) -> list[str]:
    """Every page and its drawings, into `source`; what `_fill` puts into the built pages."""
    shutil.copytree(ASSETS, source / "assets")
    for path in sorted((root / "docs").iterdir()):
        if path.suffix in {".md", ".svg"}:
            shutil.copy(path, source / path.name)
    written = (root / "docs" / "taxonomy.md").read_text(encoding="utf-8")
    (source / "taxonomy.md").write_text(taxonomy.fill(written, found), encoding="utf-8")
    aside: list[str] = []

    def page(path: str, title: str, parts: Sequence[str], toc: bool = False) -> None:
        _page(source / path, title, parts, ("navigation",) if toc else ("navigation", "toc"), aside)

    page("index.md", "Stepmark", _home(found))
    page("tracks/index.md", "Tracks", track_pages.index(found), toc=True)
    for track in found.tracks():
        page(f"tracks/{track}.md", words(track), track_pages.track_page(found, track, source / DATA))
    page("methods/index.md", "Methods", _methods(found))
    for name in sorted({*found.methods, *found.by_method}):
        page(f"methods/{name}.md", name, _method(found, name), toc=True)
    page("changes.md", "Changes", changes.page(found), toc=True)
    page("tasks/index.md", "Tasks", _tasks(found))
    for task_id in found.tasks:
        page(f"tasks/{slug(task_id)}.md", task_id, _task(found, task_id), toc=True)
    page("papers.md", "Papers", paper_pages.index(found))
    related, nodes = paper_pages.relatives(found.covered), taxonomy.nodes()
    for each in found.covered:
        entry = each.entry
        parts = paper_pages.paper_page(found, each, related[entry.id], nodes)
        page(f"papers/{entry.id}.md", entry.title, parts)
    page("downloads.md", "Downloads", _downloads(found), toc=True)
    page("compare.md", "Compare", compare_page.page(found))
    track_pages.write_assets(source / "assets")
    for info in found.methods.values():
        path = source / "source" / f"{info.id}.py.txt"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(info.path, path)
    return aside


def write_data(found: Board, data: Path) -> None:
    """Every data file, into `data`."""
    data.mkdir(parents=True, exist_ok=True)
    for track in found.tracks():
        track_pages.write_data(found, track, data)
    compare_page.write_data(found, data)
    files = downloads.merge(data / PARTS, found.ledger.files, data)
    (data / PARTS / "files.json").write_text(json.dumps(files), encoding="utf-8")
    shutil.copy(Path(__file__).with_name("catalogue.jsonl"), data / "catalogue.jsonl")


# What no search should find need not pass through Markdown, the theme and the index, each of which reads it letter by
# letter: it leaves a mark, and takes its place when the page is built. `markup.esc` lets no record write such a mark.
ASIDE = re.compile(
    r'<div class="sm-scroll"[^>]* data-search-exclude>\n.*?</table>\n</div>|<figure data-search-exclude>.*?</figure>',
    re.DOTALL,
)
MARK = "<!-- stepmark {} -->"
LAST = MARK.format("last")


def _page(path: Path, title: str, parts: Sequence[str], hide: Sequence[str], aside: list[str]) -> None:
    def leave(found: re.Match[str]) -> str:
        aside.append(found[0])
        return MARK.format(len(aside) - 1)

    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = "hide:\n" + "".join(f"  - {name}\n" for name in hide) if hide else ""
    top = f"---\ntitle: {json.dumps(esc(title))}\n{hidden}---\n\n# {markup.heading(title)}\n\n"
    text = ASIDE.sub(leave, "\n\n".join(p for p in parts if p))
    path.write_text(f"{top}{text}\n", encoding="utf-8")


def _fill(out: Path, aside: Sequence[str]) -> None:
    """Put what was left aside, the last of it where it says `LAST`, into the built pages."""
    marks = re.compile(MARK.format(r"(\d+|last)"))
    for path in sorted(out.rglob("*.html")):
        text = path.read_text(encoding="utf-8")
        filled = marks.sub(lambda found: aside[-1 if found[1] == "last" else int(found[1])], text)
        if filled != text:
            path.write_text(filled, encoding="utf-8")


# home -------------------------------------------------------------------------------------------


def _home(found: Board) -> list[str]:
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
    for place in sorted({Place(r.machine, r.tier) for r in found.records}):
        mine = [r for r in found.records if Place(r.machine, r.tier) == place]
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
    for place in sorted({Place(r.machine, r.tier) for r in found.records}):
        newest = max((r for r in found.records if Place(r.machine, r.tier) == place), key=lambda r: r.created)
        facts = [(k.replace("_", " "), esc(v)) for k, v in sorted(newest.environment.items())]
        if facts:
            blocks.append(f"<details><summary>{esc(place)}: environment</summary>{markup.definitions(facts)}</details>")
    return "\n".join(blocks)


# tracks -----------------------------------------------------------------------------------------


def _methods(found: Board) -> list[str]:
    lines = []
    for name in sorted({*found.methods, *found.by_method}):
        info = found.methods.get(name)
        rows = found.by_method.get(name, [])
        states = tally(found.verdicts[name]) if info else Counter()
        track = info.track if info else rows[0].track
        paper = f"{info.paper.authors.split(',')[0]}, {info.paper.year}" if info and info.paper else ""
        lines.append(
            Line(
                [
                    Cell(link(f"{name}.html", name), name),
                    markup.text(info.title if info else "not in this checkout"),
                    Cell(link(f"../tracks/{track}.html", words(track)) if track in found.tracks() else esc(track)),
                    markup.text(paper),
                    number(len({row.task for row in rows if row.measured})),
                    verdict_counts(states),
                ]
            )
        )
    head = ("Method", "What it does", "Track", "Paper", "Tasks measured", "Claims")
    return [table(head, lines, "Methods")] if lines else [element("p", "No method has been written yet.")]


def _method(found: Board, name: str) -> list[str]:
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
        parts += ["## Claims", paper_pages.claims_table(found, info, "../")] if info.claims else []
        parts += ["## What it is", markup.docstring(info.doc), element("p", SET, "sm-note")]
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
        if others:
            parts.append(_elsewhere(found, task_id, {other: by_place[other] for other in others}))
        shown += by_place[place]
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
    paper = info.paper
    pairs: list[tuple[str, str]] = []
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
    files = [link(f"../source/{info.id}.py.txt", "the file as it was read for this page")]
    root = plugins.checkout()
    if found.repository and root is not None and info.path.is_relative_to(root):
        files.append(link(f"{found.repository}/blob/HEAD/{info.path.relative_to(root)}", "in the repository"))
    pairs.append(("Source", f"<code>methods/{info.track}/{info.id}.py</code>: {', '.join(files)}"))
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


# tasks ------------------------------------------------------------------------------------------


def _tasks(found: Board) -> list[str]:
    lines = []
    for task_id, (track, task) in found.tasks.items():
        metric, _ = headline(task)
        live = {row.method for row in found.rows if row.task == task_id and row.measured}
        lines.append(
            Line(
                [
                    Cell(link(f"{slug(task_id)}.html", task_id), task_id),
                    Cell(link(f"../tracks/{track}.html", words(track)), track),
                    markup.text(task.summary),
                    markup.text(metric),
                    markup.text(task.unit),
                    markup.text(", ".join(map(str, task.rungs))),
                    number(len(live)),
                ]
            )
        )
    return [table(("Task", "Track", "What is asked", "First metric", "Unit", "Rungs", "Live methods"), lines, "Tasks")]


def _task(found: Board, task_id: str) -> list[str]:
    track, task = found.tasks[task_id]
    dataset = plugins.datasets().get(task.dataset)
    data = f"{task.dataset}"
    if dataset:
        data = f"{dataset.id} v{dataset.version}: {dataset.summary}; licence {dataset.licence}"
    networks = ", ".join(f"{role} = {name}" for role, name in task.backbones.items()) or "none"
    judges = ", ".join(f"{role} = {name}" for role, name in task.judges.items()) or "none"
    bounded = "every network" if task.bounded == ("*",) else ", ".join(task.bounded)
    runners = [m.id for m in found.methods.values() if task_id in m.tasks]
    metrics = [f"{m} ({d} is better)" for m, d in task.metrics.items()]
    pairs = [
        ("Version", esc(task.version)),
        ("Data", esc(data)),
        ("Ladder", f"{', '.join(map(str, task.rungs))} {esc(task.unit)}"),
        ("Counts against the rung", esc(bounded)),
        (
            "Unit of NFE-equivalents",
            esc(f"one evaluation of {task.reference} per item" if task.reference else "none: no network"),
        ),
        ("Metrics, the first ranks", esc(", ".join(metrics))),
        ("Items, items per call, seeds", f"{task.n}, {task.batch}, {task.seeds}"),
        ("Networks a method gets", esc(networks)),
        ("Networks of the metrics", esc(judges)),
        ("Figures", link(f"../tracks/{track}.html#{slug(task_id)}", f"track {words(track).lower()}")),
        ("Methods", ", ".join(link(f"../methods/{m}.html", m) for m in runners) or "none yet"),
    ]
    return [
        crumbs(("index.html", "Tasks"), (f"../tracks/{track}.html", words(track)), (f"{slug(task_id)}.html", task_id)),
        element("p", esc(task.summary) + "."),
        markup.definitions(pairs),
    ]


# papers and downloads ---------------------------------------------------------------------------


def _downloads(found: Board) -> list[str]:
    return [
        element("p", "Every record of every suite version, as the harness wrote it. JSON holds all of it, bootstrap "
              "resamples and raw timings included; CSV is one line per record with 95 % intervals over its items."),
        LAST if any(found.ledger.files.values()) else NOTHING,
        element("p", f"The catalogue of papers: {link('data/catalogue.jsonl', 'catalogue.jsonl')}."),
    ]  # fmt: skip


def _downloads_table(data: Path) -> str:
    """The table of the files, whose sizes are known when they have been written."""
    lines = []
    for each in json.loads((data / PARTS / "files.json").read_text(encoding="utf-8")):
        file = downloads.File(*each)
        sizes = (("csv", file.csv / 1024), ("json", file.json / 1024))
        links = [Cell(f"{link(f'data/{file.track}.{e}', e.upper())} ({n:,.0f} KiB)", n) for e, n in sizes]
        lines.append(Line([Cell(esc(words(file.track)), file.track), number(file.records), *links]))
    return table(("Track", "Records", "CSV", "JSON"), lines, "Downloads")


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sys.argv[2])))
