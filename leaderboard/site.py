"""The static site: every page and data file is written from records, then MkDocs builds them. Nothing asks a network.

    pages = build(results=Path("leaderboard/results"), out=Path("build/site"))

Records are untrusted: each text passes through `markup.esc`, and pages are HTML inside Markdown, which is left alone.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TextIO

import numpy as np
from stepmark.leaderboard import (
    board,
    changes,
    compare_page,
    markup,
    paper_pages,
    release,
    sample_pages,
    taxonomy,
    track_pages,
)
from stepmark.leaderboard.board import Place, Row
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

from stepmark import plugins, samples
from stepmark.plugins import MethodInfo
from stepmark.record import Record, read_all

MARKER = ".stepmark-site"  # a folder that holds it was made here and may be cleared
ASSETS = Path(__file__).with_name("assets")
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
    everything = board.history(results)
    records = board.current(read_all(results), tier)
    found = Board(
        records=records,
        everything=everything,
        rows=board.rows(records),
        methods=plugins.methods(),
        tasks=plugins.tasks(),
        objections=board.disputes(Path(__file__).with_name("disputes.jsonl")),
        repository=repository,
        samples=samples.read_all(results),
        releases=release.summary(results),
        snapshot=snapshot,
    )
    write(found, source, root)
    _mkdocs(root / "mkdocs.yml", source, out, strict)
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


def write(found: Board, source: Path, root: Path) -> None:
    """Every page and data file, into `source`."""
    shutil.copytree(ASSETS, source / "assets")
    for path in sorted((root / "docs").iterdir()):
        if path.suffix in {".md", ".svg"}:
            shutil.copy(path, source / path.name)
    written = (root / "docs" / "taxonomy.md").read_text(encoding="utf-8")
    (source / "taxonomy.md").write_text(taxonomy.fill(written, found), encoding="utf-8")
    _page(source / "index.md", "Stepmark", _home(found), hide=("navigation", "toc"))
    _page(source / "tracks" / "index.md", "Tracks", track_pages.index(found), hide=("navigation",))
    for track in found.tracks():
        _page(
            source / "tracks" / f"{track}.md",
            words(track),
            track_pages.track_page(found, track, source),
            hide=("navigation", "toc"),
        )
    _page(source / "methods" / "index.md", "Methods", _methods(found), hide=("navigation", "toc"))
    versions = changes.by_version(found)
    for name in sorted({*found.methods, *(row.method for row in found.rows)}):
        _page(source / "methods" / f"{name}.md", name, _method(found, name, versions), hide=("navigation",))
    _page(source / "changes.md", "Changes", changes.page(found, versions), hide=("navigation",))
    _page(source / "tasks" / "index.md", "Tasks", _tasks(found), hide=("navigation", "toc"))
    for task_id in found.tasks:
        _page(source / "tasks" / f"{slug(task_id)}.md", task_id, _task(found, task_id), hide=("navigation",))
    _page(source / "papers.md", "Papers", paper_pages.index(found), hide=("navigation", "toc"))
    related, nodes = paper_pages.relatives(found.covered), taxonomy.nodes()
    for each in found.covered:
        entry = each.entry
        parts = paper_pages.paper_page(found, each, related[entry.id], nodes)
        _page(source / "papers" / f"{entry.id}.md", entry.title, parts, hide=("navigation", "toc"))
    _page(source / "downloads.md", "Downloads", _downloads(found, source), hide=("navigation",))
    _page(source / "compare.md", "Compare", compare_page.page(found), hide=("navigation", "toc"))
    for track in found.tracks():
        track_pages.write_data(found, track, source / "data")
    compare_page.write_data(found, source / "data")
    track_pages.write_assets(source / "assets")
    for info in found.methods.values():
        path = source / "source" / f"{info.id}.py.txt"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(info.path, path)


def _page(path: Path, title: str, parts: Sequence[str], hide: Sequence[str] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = "hide:\n" + "".join(f"  - {name}\n" for name in hide) if hide else ""
    top = f"---\ntitle: {json.dumps(esc(title))}\n{hidden}---\n\n# {markup.heading(title)}\n\n"
    text = top + "\n\n".join(p for p in parts if p) + "\n"
    path.write_text(text, encoding="utf-8")


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
        counts = ", ".join(f"{n} {chip(state, markup.VERDICT_MOOD[state])}" for state, n in sorted(states.items()))
        parts.append(element("p", f"Claims that the plugins of these papers state: {counts}."))
    parts.append("[All papers and their status](papers.md)")
    parts.append("## When and where it was measured")
    parts.append(_measured(found) if found.records else NOTHING)
    return parts


def _facts(facts: Sequence[tuple[object, str]]) -> str:
    return '<div class="sm-facts">' + "".join(f"<div><b>{esc(n)}</b>{esc(t)}</div>" for n, t in facts) + "</div>"


def _bargains(found: Board) -> list[str]:
    lines: list[Line] = []
    for task_id, (track, task) in found.tasks.items():
        metric, _ = board.headline(task)

        def at_rung(row: Row, metric: str = metric) -> Cell:
            name = link(f"methods/{row.method}.html", row.method)
            value = estimate(row.quality[metric]).html
            return Cell(f"{name} at {row.rung}<br>{esc(metric)} {value}", row.method)

        for place in found.places:
            deal = board.bargain(found.of_task(task_id, place), task, found.methods)
            if deal is None:
                continue
            task_cell = Cell(link(f"tracks/{track}.html#{slug(task_id)}", task_id), task_id)
            match = at_rung(deal.row) if deal.row else Cell("none reaches it for less", "")
            factors = [number(deal.factor(axis), unit="×") for axis in ("unit", "nfe_equivalent", "latency_ms")]
            trust = trust_cell(found, deal.row or deal.baseline)
            cells = [task_cell, markup.text(place), at_rung(deal.baseline), match, *factors, trust]
            lines.append(Line(cells, weak=deal.row is None))
    if not lines:
        return [element("div", "<p>No baseline has been measured yet, so nothing can be compared.</p>", "sm-empty")]
    head = ("Task", "Machine", "Baseline at its best", "Cheapest that matches it", "Evaluations saved",
            "NFE-eq. saved", "Time saved", "Trust")  # fmt: skip
    return [
        table(head, lines, "What the best method per task buys"),
        element(
            "p",
            "A method matches if a paired bootstrap test at 5 % finds no loss in the task's first metric against the "
            "baseline's best rung. Values carry 95 % intervals. Time is the ratio of medians per "
            "item on the same machine. A flagged record takes no part.",
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
                    Cell(", ".join(f"{n} {chip(s, markup.STATUS_MOOD[s])}" for s, n in status.most_common())),
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
    for name in sorted({*found.methods, *(row.method for row in found.rows)}):
        info = found.methods.get(name)
        states = board.tally(info, found.rows) if info else Counter()
        track = info.track if info else next(row.track for row in found.rows if row.method == name)
        paper = f"{info.paper.authors.split(',')[0]}, {info.paper.year}" if info and info.paper else ""
        lines.append(
            Line(
                [
                    Cell(link(f"{name}.html", name), name),
                    markup.text(info.title if info else "not in this checkout"),
                    Cell(link(f"../tracks/{track}.html", words(track)) if track in found.tracks() else esc(track)),
                    markup.text(paper),
                    number(len({row.task for row in found.rows if row.method == name and row.measured})),
                    verdict_counts(states),
                ]
            )
        )
    head = ("Method", "What it does", "Track", "Paper", "Tasks measured", "Claims")
    return [table(head, lines, "Methods")] if lines else [element("p", "No method has been written yet.")]


def _method(found: Board, name: str, versions: Mapping[str, Sequence[Row]]) -> list[str]:
    info = found.methods.get(name)
    rows = [row for row in found.rows if row.method == name]
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
    for (task_id, place), mine in board.split(rows, "task", "place").items():
        task = found.tasks[task_id][1]
        against = [name, *(info.baselines if info else ())]
        shown = [row for row in found.of_task(task_id, place) if row.method in against]
        suffix = f" on {place}" if len(found.places) > 1 else ""
        anchor = f"{slug(task_id)}-{found.places.index(place)}" if found.places.index(place) else slug(task_id)
        parts.append(f"### {task_id}{suffix} {{ #{anchor} }}")
        standing = trust_cell(found, mine[0]).html
        why = paper_pages.why(found.standings[(name, task_id)])
        parts.append(element("p", f"Trust: {standing} {esc(why)}"))
        if place == found.places[0]:
            present = [name for name in against if any(row.method == name for row in shown)]
            parts.append(curves(found, shown, task, present, ("unit", "latency_ms")))
        parts.append(figures(found, mine, task, ids=True))
    parts += sample_pages.section(found, found.samples, name)
    if rows:
        parts += ["## History", changes.history(versions, name)]
        parts += ["## Counts", _counts(rows), "## Offline cost", _offline(rows), "## Repeat it", _repeat(found, rows)]
        parts += ["## Digests", _digests(found, rows)]
    return parts


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
    for row in rows:
        r = row.first
        if not r.counts:
            continue
        handles = "; ".join(
            f"{name}: " + ", ".join(f"{board.figure(v)} {k.replace('_', ' ')}" for k, v in sorted(kinds.items()))
            for name, kinds in sorted(r.handles.items())
        )
        said = ", ".join(f"{board.figure(v)} {k}" for k, v in sorted(r.reported.items()))
        flagged = any("reports" in flag for flag in r.flags)
        mark = f"{esc(said)} {chip('differs', 'bad') if flagged else chip('matches', 'good')}" if said else "–"
        lines.append(
            Line(
                [
                    Cell(esc(row.task), row.task),
                    number(row.rung),
                    markup.text(row.place.machine),
                    number(r.counts.get("nfe")),
                    number(r.counts.get("flops")),
                    number(r.counts.get("flops_outside")),
                    markup.text(handles or "–"),
                    Cell(mark),
                ],
                row.rung,
            )
        )
    head = (
        "Task",
        "Rung",
        "Machine",
        "NFE",
        "FLOPs/item",
        "of them outside handles",
        "All items, by handle",
        "It reports, per call",
    )
    return table(head, lines, "Counts") if lines else element("p", "Nothing was counted.")


def _offline(rows: Sequence[Row]) -> str:
    lines = []
    for (task, place), mine in board.split(rows, "task", "place").items():
        cost = next((row.first.offline for row in mine if row.first.offline), None)
        if cost is None:
            continue
        spent = ", ".join(f"{board.figure(v)} of {k}" for k, v in sorted(cost.evaluations.items())) or "none"
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
        metric, _ = board.headline(task)
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


FIELDS = (
    "id", "suite", "machine", "tier", "track", "method", "task", "rung", "seed", "status", "message", "flags",
    "latency_items", "latency_median_ms", "latency_iqr_ms", "latency_p95_ms", "latency_cuda_ms", "baseline",
    "baseline_median_ms", "speedup", "speedup_low", "speedup_high", "memory_peak_mib", "memory_how",
    "memory_state_mib", "energy_joules", "energy_idle_watts", "energy_window_s", "energy_sensor", "offline_seconds",
    "offline_state_mib", "commit", "created", "command",
)  # fmt: skip


def as_csv(records: Sequence[Record]) -> str:
    """Records as a flat table; see `write_csv`."""
    stream = StringIO()
    write_csv(records, stream)
    return stream.getvalue()


def _intervals(records: Sequence[Record]) -> dict[tuple[int, str], tuple[float, float]]:
    """95 % intervals by (place in `records`, metric), as `percentile_interval` gives them, many at a time."""
    alike: dict[int, list[tuple[int, str]]] = {}
    for i, r in enumerate(records):
        for name, quality in r.quality.items():
            if quality.resamples:
                alike.setdefault(len(quality.resamples), []).append((i, name))
    found: dict[tuple[int, str], tuple[float, float]] = {}
    for keys in alike.values():
        for start in range(0, len(keys), 4096):
            some = keys[start : start + 4096]
            table = np.array([records[i].quality[name].resamples for i, name in some])
            with np.errstate(over="ignore"):  # a hostile record may hold figures whose difference overflows
                low, high = np.quantile(table, [0.025, 0.975], axis=1)
            found |= {key: (float(a), float(b)) for key, a, b in zip(some, low, high, strict=True)}
    return found


def write_csv(records: Sequence[Record], stream: TextIO) -> None:
    """Records as a flat table: one column per figure, metrics with their 95 % interval, null as an empty cell."""
    metrics = sorted({name for r in records for name in r.quality})
    counts = sorted({name for r in records for name in r.counts})
    extra = [f"{m}{end}" for m in metrics for end in ("", "_low", "_high")] + [f"count_{c}" for c in counts]
    writer = csv.DictWriter(stream, [*FIELDS, *extra], lineterminator="\n")
    writer.writeheader()
    intervals = _intervals(records)
    for i, r in enumerate(records):
        line: dict[str, object] = {
            "id": board.record_id(r),
            **{name: getattr(r, name) for name in FIELDS if name in type(r).model_fields},
            "flags": "; ".join(r.flags),
        }
        for part, prefix in (
            (r.latency, "latency"),
            (r.memory, "memory"),
            (r.energy, "energy"),
            (r.offline, "offline"),
        ):
            for key, value in (part.model_dump() if part else {}).items():
                column = key if key in FIELDS else f"{prefix}_{key}"
                if column in FIELDS:
                    line[column] = value
        for name, quality in r.quality.items():
            low, high = intervals.get((i, name), (None, None))
            line |= {name: quality.value, f"{name}_low": low, f"{name}_high": high}
        line |= {f"count_{name}": value for name, value in r.counts.items()}
        writer.writerow({key: _plain(value) for key, value in line.items()})


def _plain(value: object) -> object:
    """A spreadsheet runs text that begins like a formula: such text gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and value[:1] in {"=", "+", "-", "@", "\t", "\r"} else value


def _downloads(found: Board, source: Path) -> list[str]:
    folder = source / "data"
    folder.mkdir(exist_ok=True)
    lines = []
    every = read_order(found.everything)
    for track in sorted({r.track for r in every}):
        mine = [r for r in every if r.track == track]
        # Line by line: all records of a track as one text would be most of the memory of a build.
        with (folder / f"{track}.csv").open("w", encoding="utf-8", newline="") as stream:
            write_csv(mine, stream)
        with (folder / f"{track}.json").open("w", encoding="utf-8") as stream:
            for i, r in enumerate(mine):
                stream.write(("[\n" if i == 0 else ",\n") + r.model_dump_json())
            stream.write("\n]\n")
        sizes = [(folder / f"{track}.{end}").stat().st_size / 1024 for end in ("csv", "json")]
        lines.append(
            Line(
                [
                    Cell(esc(words(track)), track),
                    number(len(mine)),
                    *[
                        Cell(f"{link(f'data/{track}.{e}', e.upper())} ({size:,.0f} KiB)", size)
                        for e, size in zip(("csv", "json"), sizes, strict=True)
                    ],
                ]
            )
        )
    shutil.copy(Path(__file__).with_name("catalogue.jsonl"), folder / "catalogue.jsonl")
    return [
        element("p", "Every record of every suite version, as the harness wrote it. JSON holds all of it, bootstrap "
              "resamples and raw timings included; CSV is one line per record with 95 % intervals over its items."),
        table(("Track", "Records", "CSV", "JSON"), lines, "Downloads") if lines else NOTHING,
        element("p", f"The catalogue of papers: {link('data/catalogue.jsonl', 'catalogue.jsonl')}."),
    ]  # fmt: skip


def read_order(records: Iterable[Record]) -> list[Record]:
    """Records in one order, whatever files they came from."""
    return sorted(records, key=lambda r: (r.suite, r.machine, r.track, r.method, r.task, r.seed, r.rung, r.created))


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sys.argv[2])))
