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
from collections.abc import Sequence
from pathlib import Path

from stepmark.leaderboard import (
    api_pages,
    changes,
    claims_page,
    compare_page,
    downloads,
    home_page,
    ledger,
    markup,
    method_pages,
    models_page,
    paper_pages,
    picker,
    release,
    surveys,
    task_pages,
    taxonomy,
    track_pages,
)
from stepmark.leaderboard.markup import Cell, Line, esc, link, number, table
from stepmark.leaderboard.pages import NOTHING, Board, element, slug, words
from stepmark.leaderboard.trust import disputes

from stepmark import plugins, samples
from stepmark.admission import LeftOut

MARKER = ".stepmark-site"  # a folder that holds it was made here and may be cleared
ASSETS = Path(__file__).with_name("assets")
DATA = ".data"  # below the written pages: MkDocs passes by what begins with a dot, and copies nothing of it
PARTS = "parts"
MOST = 200  # records left out that are named
MANY = 2000  # rows from which on the data files are worth a process


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

    page("index.md", "Stepmark", home_page.page(found))
    page("tracks/index.md", "Tracks", track_pages.index(found), toc=True)
    for track in found.tracks():
        page(f"tracks/{track}.md", words(track), track_pages.track_page(found, track, source / DATA))
    page("api/index.md", "API", api_pages.index(found), toc=True)
    for track in found.tracks():
        page(f"api/{track}.md", f"API: {words(track)}", api_pages.track_page(found, track), toc=True)
    page("methods/index.md", "Methods", method_pages.index(found))
    for name in sorted({*found.methods, *found.by_method}):
        page(f"methods/{name}.md", name, method_pages.page(found, name), toc=True)
    page("changes.md", "Changes", changes.page(found), toc=True)
    page("tasks/index.md", "Tasks", task_pages.index(found))
    for task_id in found.tasks:
        page(f"tasks/{slug(task_id)}.md", task_id, task_pages.page(found, task_id), toc=True)
    page("papers.md", "Papers", paper_pages.index(found))
    related, nodes, ordering = paper_pages.relatives(found.covered), taxonomy.nodes(), surveys.surveys()
    for each in found.covered:
        entry = each.entry
        parts = paper_pages.paper_page(found, each, related[entry.id], nodes, ordering)
        page(f"papers/{entry.id}.md", entry.title, parts)
    page("models.md", "Real models", models_page.page(found), toc=True)
    page("claims.md", "Claims", claims_page.page(found))
    page("downloads.md", "Downloads", _downloads(found), toc=True)
    page("compare.md", "Compare", compare_page.page(found))
    track_pages.write_assets(source / "assets")
    for info in found.methods.values():
        if info.base is not None:
            continue  # it stands in its method's file
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
    picker.write_data(found, data)
    # A release keeps its records beside it in the tree: its pages need not hold them once more.
    files = downloads.merge(data / PARTS, found.ledger.files, data, table_only=found.snapshot is not None)
    (data / PARTS / "files.json").write_text(json.dumps(files), encoding="utf-8")
    shutil.copy(Path(__file__).with_name("catalogue.jsonl"), data / "catalogue.jsonl")


# What no search should find need not pass through Markdown, the theme and the index, each of which reads it letter by
# letter: it leaves a mark, and takes its place when the page is built. `markup.esc` lets no record write such a mark.
ASIDE = re.compile(
    r'<div class="sm-scroll"[^>]* data-search-exclude>\n.*?</table>\n</div>|<figure[^>]* data-search-exclude>.*?</figure>',
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


# downloads ----------- ---------------------------------------------------------------------------


def _downloads(found: Board) -> list[str]:
    whole = (
        "JSON holds all of it, bootstrap resamples, raw timings and environments included; CSV is one line per record "
        "with 95 % intervals over its items, and Parquet the same table with types. "
        if found.snapshot is None
        else "CSV is one line per record with 95 % intervals over its items; the records themselves lie in the "
        f"repository, below <code>leaderboard/results/{esc(found.snapshot)}</code>. "
    )
    return [
        element("p", f"Every record of every suite version, as the harness wrote it. {whole}"
              f"{link('records.html', 'What a record holds')}, and how to get them all as a pandas table."),
        LAST if any(found.ledger.files.values()) else NOTHING,
        element("p", f"The catalogue of papers: {link('data/catalogue.jsonl', 'catalogue.jsonl')}."),
        *_left_out(found.ledger.left_out),
    ]  # fmt: skip


def _left_out(others: Sequence[LeftOut]) -> list[str]:
    """The records that the board does not take in; [] if there are none."""
    if not others:
        return []
    lines = [
        Line([Cell(esc(r.method), r.method), markup.text(r.task), number(r.rung), number(r.seed), markup.text(r.machine),
              markup.text(why)])
        for r, why in sorted(others, key=lambda each: (each.record.method, each.record.task, each.record.rung))[:MOST]
    ]  # fmt: skip
    more = f" The first {MOST} of {len(others):,} are named." if len(others) > MOST else ""
    return [
        "## Left out",
        element("p", "Records that are not of this suite or not whole. They stand in the files above; nothing is ranked, "
                f"grouped, compared or judged by them.{more}"),
        table(("Method", "Task", "Rung", "Seed", "Machine", "Why"), lines, "Left out"),
    ]  # fmt: skip


FORMATS = {"csv": "CSV", "parquet": "Parquet", "json": "JSON"}


def _downloads_table(data: Path) -> str:
    """The table of the files, whose sizes are known when they have been written."""
    lines = []
    for each in json.loads((data / PARTS / "files.json").read_text(encoding="utf-8")):
        file = downloads.File(*each)
        sizes = (("csv", file.csv / 1024), ("parquet", file.parquet / 1024), ("json", file.json / 1024))
        links = [
            Cell(f"{link(f'data/{file.track}.{e}', FORMATS[e])} ({n:,.0f} KiB)", n) if n else Cell("", 0)
            for e, n in sizes
        ]
        lines.append(Line([Cell(esc(words(file.track)), file.track), number(file.records), *links]))
    return table(("Track", "Records", "CSV", "Parquet", "JSON"), lines, "Downloads")


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sys.argv[2])))
