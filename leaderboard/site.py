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
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path

from stepmark.leaderboard import board, charts, markup
from stepmark.leaderboard.board import Covered, Place, Row, Standing
from stepmark.leaderboard.markup import Cell, Line, chip, esc, estimate, link, number, table

from stepmark import plugins
from stepmark.plugins import MethodInfo
from stepmark.record import Record, read_all
from stepmark.stats import percentile_interval
from stepmark.task import Task

MARKER = ".stepmark-site"  # a folder that holds it was made here and may be cleared
ASSETS = Path(__file__).with_name("assets")


@dataclass
class Board:
    """All that the pages are made from."""

    records: list[Record]
    everything: list[Record]
    rows: list[Row]
    methods: dict[str, MethodInfo]
    tasks: dict[str, tuple[str, Task]]
    objections: Mapping[str, board.Dispute]
    repository: str | None

    @cached_property
    def covered(self) -> list[Covered]:
        """The catalogue with computed status."""
        return board.coverage(board.catalogue(), self.methods, self.rows)

    @cached_property
    def places(self) -> list[Place]:
        """Where figures were taken, the best covered first."""
        return board.places(self.rows)

    @cached_property
    def standings(self) -> dict[tuple[str, str], Standing]:
        """Trust by (method, task), for all that were recorded."""
        pairs = sorted({(row.method, row.task) for row in self.rows})
        return {pair: board.standing(*pair, self.everything, self.objections) for pair in pairs}

    def of_task(self, task: str, place: Place) -> list[Row]:
        """Rows of a task in a place."""
        return [row for row in self.rows if row.task == task and row.place == place]

    def order(self, rows: Iterable[Row]) -> list[str]:
        """Methods of some rows: those compared with no other first, then by name."""
        present = {row.method for row in rows}
        return sorted(present, key=lambda name: (not self.is_baseline(name), name))

    def is_baseline(self, name: str) -> bool:
        """Whether a method is compared with no other."""
        return name in self.methods and not self.methods[name].baselines

    def tracks(self) -> list[str]:
        """Tracks that have tasks."""
        return sorted({track for track, _ in self.tasks.values()})


def build(
    results: Path,
    out: Path,
    tier: str | None = None,
    source: Path | None = None,
    repository: str | None = None,
    strict: bool = True,
) -> Path:
    """Write the pages, build them, return the path of the home page.

    `tier` limits the records (default: all but smoke). `source` is the folder of the written pages (default: beside
    `out`, for build/site it is build/site-src). `repository` is the address that links to files lead to; by default
    what a CI run says of itself.

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
    )
    write(found, source, root)
    _mkdocs(root / "mkdocs.yml", source, out, strict)
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
    _page(source / "index.md", "Stepmark", _home(found), hide=("navigation", "toc"))
    _page(source / "tracks" / "index.md", "Tracks", _tracks(found), hide=("navigation",))
    for track in found.tracks():
        _page(source / "tracks" / f"{track}.md", _words(track), _track(found, track), hide=("navigation", "toc"))
    _page(source / "methods" / "index.md", "Methods", _methods(found), hide=("navigation", "toc"))
    for name in sorted({*found.methods, *(row.method for row in found.rows)}):
        _page(source / "methods" / f"{name}.md", name, _method(found, name), hide=("navigation",))
    _page(source / "tasks" / "index.md", "Tasks", _tasks(found), hide=("navigation", "toc"))
    for task_id in found.tasks:
        _page(source / "tasks" / f"{_slug(task_id)}.md", task_id, _task(found, task_id), hide=("navigation",))
    _page(source / "papers.md", "Papers", _papers(found), hide=("navigation", "toc"))
    _page(source / "downloads.md", "Downloads", _downloads(found, source), hide=("navigation",))
    for info in found.methods.values():
        path = source / "source" / f"{info.id}.py.txt"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(info.path, path)


def _page(path: Path, title: str, parts: Sequence[str], hide: Sequence[str] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = "hide:\n" + "".join(f"  - {name}\n" for name in hide) if hide else ""
    text = f"---\ntitle: {json.dumps(title)}\n{hidden}---\n\n# {title}\n\n" + "\n\n".join(p for p in parts if p) + "\n"
    path.write_text(text, encoding="utf-8")


def _slug(task: str) -> str:
    return task.replace("/", "-")


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _crumbs(*steps: tuple[str, str]) -> str:
    return '<p class="sm-crumbs">' + " / ".join(link(address, label) for address, label in steps) + "</p>"


def _html(tag: str, content: str, kind: str = "") -> str:
    """An element of raw HTML, which Markdown leaves alone."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{content}</{tag}>"


NOTHING = _html(
    "div",
    "<p><b>No records yet.</b> Every figure on this site is computed from records, and none has been written. "
    "Run <code>make bench</code>, then <code>stepmark site</code>.</p>",
    "sm-empty",
)


# home -------------------------------------------------------------------------------------------


def _home(found: Board) -> list[str]:
    live = sum(c.status == "live" for c in found.covered)
    idle = sum(c.status == "not run" for c in found.covered)
    total = len(found.covered)
    states: Counter[str] = sum((c.states for c in found.covered), Counter())
    parts = [
        _html(
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
        parts.append(_html("p", f"Claims that the plugins of these papers state: {counts}."))
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
            task_cell = Cell(link(f"tracks/{track}.html#{_slug(task_id)}", task_id), task_id)
            match = at_rung(deal.row) if deal.row else Cell("none reaches it for less", "")
            factors = [number(deal.factor(axis), unit="×") for axis in ("unit", "nfe_equivalent", "latency_ms")]
            trust = _trust(found, deal.row or deal.baseline)
            cells = [task_cell, markup.text(place), at_rung(deal.baseline), match, *factors, trust]
            lines.append(Line(cells, weak=deal.row is None))
    if not lines:
        return [_html("div", "<p>No baseline has been measured yet, so nothing can be compared.</p>", "sm-empty")]
    head = ("Task", "Machine", "Baseline at its best", "Cheapest that matches it", "Evaluations saved",
            "NFE-eq. saved", "Time saved", "Trust")  # fmt: skip
    return [
        table(head, lines, "What the best method per task buys"),
        _html(
            "p",
            "A method matches if a paired bootstrap test at 5 % finds no loss in the task's first metric against the "
            "baseline's best rung. Values carry 95 % intervals. Time is the ratio of medians per "
            "item on the same machine. A flagged record takes no part.",
            "sm-note",
        ),
    ]


def _trust(found: Board, row: Row) -> Cell:
    """The trust state of a method on a task."""
    state = found.standings[(row.method, row.task)]
    return Cell(chip(state.state, markup.TRUST_MOOD[state.state], "; ".join(state.reasons)), state.state)


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


def _tracks(found: Board) -> list[str]:
    lines = []
    for track in found.tracks():
        tasks = [t for t, (owner, _) in found.tasks.items() if owner == track]
        plugs = [m for m in found.methods.values() if m.track == track]
        live = {row.method for row in found.rows if row.track == track and row.measured}
        cells = [
            Cell(link(f"{track}.html", _words(track)), track),
            number(len(tasks)),
            number(len(plugs)),
            number(len(live)),
        ]
        lines.append(Line(cells))
    elsewhere = Counter(c.entry.track for c in found.covered if c.entry.track not in found.tracks())
    waiting = ", ".join(f"{esc(_words(t).lower())} ({n})" for t, n in elsewhere.most_common())
    return [
        _html("p", "A track is a kind of problem: what a method is given, what it returns, how that is scored."),
        table(("Track", "Tasks", "Plugins", "Live methods"), lines, "Tracks"),
        _html("p", f"Tracks of the catalogue that have no task yet, with their papers: {waiting}.") if waiting else "",
    ]


def _track(found: Board, track: str) -> list[str]:
    tasks = [(task_id, task) for task_id, (owner, task) in found.tasks.items() if owner == track]
    parts = [_crumbs(("index.html", "Tracks"), (f"{track}.html", _words(track)))]
    jumps = " ".join(f'<a href="#{_slug(task_id)}">{esc(task_id)}</a>' for task_id, _ in tasks)
    parts.append(_html("p", jumps, "sm-jump"))
    parts.append(
        _html(
            "p",
            "Rows at one rung in the same group are not told apart by a paired bootstrap test (Holm-corrected at 5 %); "
            "group 1 holds the best. On the charts the broad step line is the Pareto front, points behind it are "
            "faint, flagged ones hollow. Hover over a point for its figures; click names to compare a few.",
            "sm-note",
        )
    )
    for task_id, task in tasks:
        parts += [f"## {task_id} {{ #{_slug(task_id)} }}"]
        page = link(f"../tasks/{_slug(task_id)}.html", "what is measured and how")
        parts.append(
            _html("p", f"{esc(task.summary)}. Rungs in {esc(task.unit)}: {esc(task.rungs)[1:-1]}. See {page}.")
        )
        here = [place for place in found.places if found.of_task(task_id, place)]
        if not here:
            parts.append(_html("div", "<p>No records of this task yet.</p>", "sm-empty"))
        for place in here:
            rows = found.of_task(task_id, place)
            if len(here) > 1 or place.tier != "embedded":
                parts.append(f"### On {place} {{ #{_slug(task_id)}-{place.machine.replace('.', '-')}-{place.tier} }}")
            else:
                parts.append(_html("p", f"Measured on {esc(place)}.", "sm-note"))
            parts.append(_deal(found, rows, task))
            parts.append(_charts(found, rows, task, found.order(rows), tuple(charts.AXES)))
            parts.append(_figures(found, rows, task))
    return parts


def _deal(found: Board, rows: Sequence[Row], task: Task) -> str:
    deal = board.bargain(rows, task, found.methods)
    if deal is None:
        return ""
    base = deal.baseline
    begin = f"The baseline {esc(base.method)} is best at rung {base.rung}. "
    if deal.row is None:
        return _html("p", begin + "No method matches that for fewer evaluations.")
    said = [f"{board.figure(f)}× fewer evaluations" for f in [deal.factor("unit")] if f]
    said += [f"{board.figure(f)}× fewer NFE-equivalents" for f in [deal.factor("nfe_equivalent")] if f]
    time = deal.factor("latency_ms")
    if time:
        said.append(f"{board.figure(time)}× less time" if time >= 1 else f"{board.figure(1 / time)}× more time")
    return _html("p", f"{begin}<b>{esc(deal.row.method)}</b> matches it at rung {deal.row.rung}: {', '.join(said)}.")


def _charts(found: Board, rows: Sequence[Row], task: Task, methods: Sequence[str], axes: Sequence[str]) -> str:
    """Ladder curves of some methods on a task in one place, with their legend."""
    styles = charts.style(methods)
    figures = []
    for axis in axes:
        name = f"{_slug(task.id)}-{axis}-{found.places.index(rows[0].place)}"
        svg = charts.curve(rows, task, axis, styles, name)
        if svg:
            figures.append(f"<figure data-search-exclude>{svg}</figure>")
    if not figures:
        return ""
    baselines = [name for name in methods if found.is_baseline(name)]
    shown = {m: s for m, s in styles.items() if any(f'data-method="{m}"' in figure for figure in figures)}
    return (
        f'<div class="sm-charts">{charts.legend(shown, baselines)}<div class="sm-grid">{"".join(figures)}</div></div>'
    )


def _figures(found: Board, rows: Sequence[Row], task: Task, ids: bool = False) -> str:
    """The table of one task in one place, best first at each rung, with the reasons of what is null below it."""
    metric, higher = board.headline(task)
    with_equivalents = any(row.nfe_equivalent is not None for row in rows)
    arrows = {"higher": "↑", "lower": "↓"}
    head = ["Rung"] if ids else ["Method", "Rung", "Group"]
    head += [f"{name} {arrows[direction]}" for name, direction in task.metrics.items()]
    head += ["NFE", *(["NFE-eq"] if with_equivalents else []), "ms/item", "Speed-up", "Peak MiB", "J/item", "Status"]
    head += ["Record"] if ids else []

    def order(row: Row) -> tuple[float, ...]:
        value = row.quality[metric].value if metric in row.quality else 0.0
        return (row.rung, row.group or 10**6, -value if higher else value)

    lines = []
    for row in sorted(rows, key=order):
        info = found.methods.get(row.method)
        old = board.stale(row.first, info, task)
        state = chip(row.status, markup.STATUS_MOOD[row.status]) + (
            " " + chip("older source", "open", "the method or the task has changed since") if old else ""
        )
        notes = "".join(f'<br><span class="sm-range">{esc(note[:300])}</span>' for note in row.notes[:4])
        name = Cell(link(f"../methods/{row.method}.html", row.method), row.method)
        cells = [
            *([number(row.rung)] if ids else [name, number(row.rung), number(row.group)]),
            *[estimate(row.quality.get(m)) for m in task.metrics],
            number(row.nfe),
            *([number(row.nfe_equivalent, row.reason("nfe_equivalent"))] if with_equivalents else []),
            estimate(row.latency_ms, why=row.reason("latency")),
            estimate(row.speedup, "×", row.reason("latency")),
            number(row.memory_mib, row.reason("memory")),
            number(row.joules, row.reason("energy")),
            Cell(state + notes, row.status),
        ]
        if ids:
            cells.append(Cell(f"<code>{board.record_id(row.first)}</code>"))
        lines.append(Line(cells, row.rung, not row.ranked))
    return table(head, lines, f"Figures on {task.id}") + _reasons(rows)


def _reasons(rows: Sequence[Row]) -> str:
    """Why figures are null, each reason once."""
    lacking = {"latency": "latency_ms", "memory": "memory_mib", "energy": "joules", "nfe_equivalent": "nfe_equivalent"}
    said: dict[str, None] = {}
    for row in rows:
        if row.measured:
            for name, attribute in lacking.items():
                reason = row.reason(name)
                if reason and getattr(row, attribute) is None:
                    said[f"{name.replace('_', '-')}: {reason}"] = None
    notes = [f"Null figures. {text}" for text in list(said)[:6]]
    timed = [row.timed.latency for row in rows if row.timed and row.timed.latency]
    if timed:
        items = ", ".join(map(str, sorted({each.items for each in timed})))
        baselines = ", ".join(sorted({each.baseline for each in timed if each.baseline}))
        how = f"ms/item: median over rounds of a call of {items} items, divided by them."
        if baselines:
            how += f" Speed-up: against {baselines} at the same rung, interleaved in the same run."
        notes.insert(0, how)
    return "".join(f'<p class="sm-note">{esc(note)}</p>' for note in notes)


# methods ----------------------------------------------------------------------------------------


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
                    Cell(link(f"../tracks/{track}.html", _words(track)) if track in found.tracks() else esc(track)),
                    markup.text(paper),
                    number(len({row.task for row in found.rows if row.method == name and row.measured})),
                    _verdict_counts(states),
                ]
            )
        )
    head = ("Method", "What it does", "Track", "Paper", "Tasks measured", "Claims")
    return [table(head, lines, "Methods")] if lines else [_html("p", "No method has been written yet.")]


def _verdict_counts(states: Counter[str]) -> Cell:
    ordered = [state for state in markup.VERDICT_MOOD if states[state]]
    return Cell(
        " ".join(f"{states[s]}\u00a0{chip(s, markup.VERDICT_MOOD[s])}" for s in ordered) or "–",
        float(states["reproduced"]),
    )


def _method(found: Board, name: str) -> list[str]:
    info = found.methods.get(name)
    rows = [row for row in found.rows if row.method == name]
    track = info.track if info else rows[0].track
    parts = [_crumbs(("index.html", "Methods"), (f"../tracks/{track}.html", _words(track)), (f"{name}.html", name))]
    if info is None:
        parts.append(
            _html("div", "<p>This method's file is not in this checkout; only its records are.</p>", "sm-empty")
        )
    else:
        parts.append(_reference(found, info))
        parts += ["## Claims", _claims(found, info)] if info.claims else []
        parts += ["## What it is", markup.docstring(info.doc)]
    parts.append("## Ladder curves")
    if not rows:
        parts.append(_html("div", "<p>Not run yet.</p>", "sm-empty"))
    for (task_id, place), mine in board.split(rows, "task", "place").items():
        task = found.tasks[task_id][1]
        against = [name, *(info.baselines if info else ())]
        shown = [row for row in found.of_task(task_id, place) if row.method in against]
        suffix = f" on {place}" if len(found.places) > 1 else ""
        anchor = f"{_slug(task_id)}-{found.places.index(place)}" if found.places.index(place) else _slug(task_id)
        parts.append(f"### {task_id}{suffix} {{ #{anchor} }}")
        standing = _trust(found, mine[0]).html
        why = "; ".join(found.standings[(name, task_id)].reasons)
        parts.append(_html("p", f"Trust: {standing} {esc(why)}"))
        if place == found.places[0]:
            present = [name for name in against if any(row.method == name for row in shown)]
            parts.append(_charts(found, shown, task, present, ("unit", "latency_ms")))
        parts.append(_figures(found, mine, task, ids=True))
    if rows:
        parts += ["## Counts", _counts(rows), "## Offline cost", _offline(rows), "## Repeat it", _repeat(found, rows)]
        parts += ["## Digests", _digests(rows)]
    return parts


def _reference(found: Board, info: MethodInfo) -> str:
    paper = info.paper
    pairs: list[tuple[str, str]] = []
    if paper:
        where = [link(f"https://arxiv.org/abs/{paper.arxiv}", f"arXiv:{paper.arxiv}")] if paper.arxiv else []
        where += [link(paper.url, paper.url)] if paper.url else []
        where += [link(f"https://github.com/{paper.code}", f"official code: {paper.code}")] if paper.code else []
        pairs.append(("Paper", f"{esc(paper.authors)}: <i>{esc(paper.title)}</i>, {esc(paper.year)}"))
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


def _claims(found: Board, info: MethodInfo) -> str:
    lines = []
    for claim, by_place in board.verdicts(info, found.rows):
        task = board.claim_task(claim, info)
        for place, verdict in by_place.items() or [(None, None)]:
            state = verdict.state if verdict else "not run"
            fraction = verdict.fraction if verdict else None
            values = ", ".join(f"{k} = {board.figure(v)}" for k, v in verdict.values.items()) if verdict else ""
            why = values or (verdict.text if verdict else "no records of this method")
            share = Cell("–", "", True) if fraction is None else Cell(f"{100 * fraction:.1f} %", fraction, True)
            lines.append(
                Line(
                    [
                        Cell(f"{esc(claim.says)}<br><code>{esc(claim.check)}</code>", claim.says),
                        Cell(chip(state, markup.VERDICT_MOOD[state]), state),
                        share,
                        markup.text(why),
                        Cell(link(f"../tasks/{_slug(task)}.html", task) if task in found.tasks else esc(task)),
                        markup.text(place or "–"),
                    ]
                )
            )
    head = ("The paper says", "Verdict", "Holds in", "Measured", "Task", "Machine")
    return table(head, lines, "Claims and verdicts") + (
        '<p class="sm-note">Reproduced: holds in at least 95 % of bootstrap resamples over seeds and items; not '
        "reproduced: in at most 5 %; else inconclusive.</p>"
    )


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
    return table(head, lines, "Counts") if lines else _html("p", "Nothing was counted.")


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
    return table(head, lines, "Offline cost") if lines else _html("p", "No offline stage has been recorded.")


def _repeat(found: Board, rows: Sequence[Row]) -> str:
    lines = [markup.code("\n".join(dict.fromkeys(row.first.command for row in rows)))]
    said = "Something wrong? Open an issue of the form “Disputed number” with the record's id from the tables above."
    if found.repository:
        address = f"{found.repository}/issues/new?template=disputed-number.yml"
        said += f' <a href="{esc(address)}">Open the form</a>.'
    return "".join([*lines, _html("p", said)])


def _digests(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        r = row.first
        parts = ", ".join(f"{k} {v[:12]}" for k, v in sorted(r.digests.items()))
        cells = [
            Cell(esc(row.task), row.task),
            number(row.rung),
            markup.text(row.place.machine),
            Cell(f"<code>{board.record_id(r)}</code>"),
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
                    Cell(link(f"{_slug(task_id)}.html", task_id), task_id),
                    Cell(link(f"../tracks/{track}.html", _words(track)), track),
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
        ("Figures", link(f"../tracks/{track}.html#{_slug(task_id)}", f"track {_words(track).lower()}")),
        ("Methods", ", ".join(link(f"../methods/{m}.html", m) for m in runners) or "none yet"),
    ]
    return [
        _crumbs(
            ("index.html", "Tasks"), (f"../tracks/{track}.html", _words(track)), (f"{_slug(task_id)}.html", task_id)
        ),
        _html("p", esc(task.summary) + "."),
        markup.definitions(pairs),
    ]


# papers and downloads ---------------------------------------------------------------------------


def _papers(found: Board) -> list[str]:
    lines = []
    for each in found.covered:
        entry, paper = each.entry, each.info.paper if each.info else None
        year = paper.year if paper else entry.year
        arxiv = paper.arxiv if paper and paper.arxiv else entry.arxiv
        title = link(f"methods/{each.info.id}.html", entry.title) if each.info else esc(entry.title)
        who = entry.byline or (paper.authors if paper else "")
        code = (paper.code if paper else None) or entry.code
        links = [link(f"https://arxiv.org/abs/{arxiv}", "arXiv")] if arxiv else []
        links += [link(f"https://github.com/{code}", "code")] if code else []
        lines.append(
            Line(
                [
                    Cell(title + (f'<br><span class="sm-range">{esc(who)}</span>' if who else ""), entry.title),
                    number(year),
                    markup.text(_words(entry.track)),
                    markup.text(entry.kind),
                    Cell(chip(each.status, markup.COVERAGE_MOOD[each.status]), each.status),
                    _verdict_counts(each.states),
                    markup.text(", ".join(entry.tags)),
                    Cell(" ".join(links) or "–"),
                ]
            )
        )
    known = {c.entry.id for c in found.covered}
    more = [m for m in found.methods.values() if m.paper and m.paper.id not in known]
    parts = [
        _html("p", "Every paper that Stepmark means to cover. The status is computed: <b>live</b> has a plugin with "
              "records, <b>not run</b> has a plugin without, the others wait for theirs."),
        table(("Paper", "Year", "Track", "Kind", "Status", "Claims", "Tags", "Links"), lines, "Papers", searched=True),
    ]  # fmt: skip
    if more:
        items = ", ".join(link(f"methods/{m.id}.html", m.id) for m in more)
        parts.append(_html("p", f"Also implemented, as baselines and relatives: {items}."))
    parts.append("Missing a paper? Its plugin is [one file](add-a-method.md).")
    return parts


FIELDS = (
    "id", "suite", "machine", "tier", "track", "method", "task", "rung", "seed", "status", "message", "flags",
    "latency_items", "latency_median_ms", "latency_iqr_ms", "latency_p95_ms", "latency_cuda_ms", "baseline",
    "baseline_median_ms", "speedup", "speedup_low", "speedup_high", "memory_peak_mib", "memory_how",
    "memory_state_mib", "energy_joules", "energy_idle_watts", "energy_window_s", "energy_sensor", "offline_seconds",
    "offline_state_mib", "commit", "created", "command",
)  # fmt: skip


def as_csv(records: Sequence[Record]) -> str:
    """Records as a flat table: one column per figure, metrics with their 95 % interval, null as an empty cell."""
    metrics = sorted({name for r in records for name in r.quality})
    counts = sorted({name for r in records for name in r.counts})
    extra = [f"{m}{end}" for m in metrics for end in ("", "_low", "_high")] + [f"count_{c}" for c in counts]
    stream = StringIO()
    writer = csv.DictWriter(stream, [*FIELDS, *extra], lineterminator="\n")
    writer.writeheader()
    for r in records:
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
            low, high = percentile_interval(quality.resamples) if quality.resamples else (None, None)
            line |= {name: quality.value, f"{name}_low": low, f"{name}_high": high}
        line |= {f"count_{name}": value for name, value in r.counts.items()}
        writer.writerow({key: _plain(value) for key, value in line.items()})
    return stream.getvalue()


def _plain(value: object) -> object:
    """A spreadsheet runs text that begins like a formula: such text gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and value[:1] in {"=", "+", "-", "@", "\t", "\r"} else value


def _downloads(found: Board, source: Path) -> list[str]:
    folder = source / "data"
    folder.mkdir()
    lines = []
    every = read_order(found.everything)
    for track in sorted({r.track for r in every}):
        mine = [r for r in every if r.track == track]
        (folder / f"{track}.csv").write_text(as_csv(mine), encoding="utf-8")
        text = "[\n" + ",\n".join(r.model_dump_json() for r in mine) + "\n]\n"
        (folder / f"{track}.json").write_text(text, encoding="utf-8")
        sizes = [(folder / f"{track}.{end}").stat().st_size / 1024 for end in ("csv", "json")]
        lines.append(
            Line(
                [
                    Cell(esc(_words(track)), track),
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
        _html("p", "Every record of every suite version, as the harness wrote it. JSON holds all of it, bootstrap "
              "resamples and raw timings included; CSV is one line per record with 95 % intervals over its items."),
        table(("Track", "Records", "CSV", "JSON"), lines, "Downloads") if lines else NOTHING,
        _html("p", f"The catalogue of papers: {link('data/catalogue.jsonl', 'catalogue.jsonl')}."),
    ]  # fmt: skip


def read_order(records: Iterable[Record]) -> list[Record]:
    """Records in one order, whatever files they came from."""
    return sorted(records, key=lambda r: (r.suite, r.machine, r.track, r.method, r.task, r.seed, r.rung, r.created))


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sys.argv[2])))
