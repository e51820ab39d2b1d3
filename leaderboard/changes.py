"""What moved between suite versions, and why: cells whose intervals no longer meet, and the digests that differ."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from stepmark.leaderboard import markup
from stepmark.leaderboard.estimates import Estimate
from stepmark.leaderboard.markup import Cell, Line, esc, estimate, link, number, table
from stepmark.leaderboard.pages import Board, element
from stepmark.leaderboard.rows import Place, Row, headline

from stepmark import plugins
from stepmark.record import Record

ACCOUNT = "CHANGELOG.md"  # of the checkout
# Of a record's environment: what may move a figure beside the sources, and how a page calls it.
LIBRARIES = ("torch", "numpy", "scipy", "scikit_learn", "diffusers", "transformers", "tokenizers")


@dataclass(frozen=True)
class Move:
    """A figure of a cell that left its interval from one suite version to the next, and what differs beneath it."""

    old: Row
    new: Row
    metric: str
    before: Estimate
    after: Estimate
    why: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """From one suite version to the next."""

    before: str
    after: str
    moves: list[Move]
    compared: int
    came: tuple[str, ...]
    left: tuple[str, ...]


def steps(versions: Mapping[str, Sequence[Row]]) -> list[Step]:
    """Every pair of consecutive versions, the newest first."""
    return [_step(a, versions[a], b, versions[b]) for a, b in pairwise(versions)][::-1]


def _step(before: str, old: Sequence[Row], after: str, new: Sequence[Row]) -> Step:
    moves, compared = [], 0
    earlier: dict[tuple[str | int, ...], list[Row]] = defaultdict(list)
    for row in old:
        if row.measured:
            earlier[row.task, row.method, row.rung, *row.place[1:]].append(row)
    for row in new:
        same = earlier[row.task, row.method, row.rung, *row.place[1:]] if row.own else []  # lent rows stand elsewhere
        other = next((each for each in same if each.place == row.place), next(iter(same), None))
        if other is None:
            continue
        compared += 1
        for metric, pair in _figures(other, row).items():
            if pair[1].low > pair[0].high or pair[1].high < pair[0].low:
                moves.append(Move(other, row, metric, *pair, differing(other.first, row.first)))
    was, now = ({row.method for row in rows if row.measured} for rows in (old, new))
    return Step(before, after, moves, compared, tuple(sorted(now - was)), tuple(sorted(was - now)))


def _figures(old: Row, new: Row) -> dict[str, tuple[Estimate, Estimate]]:
    found = {name: (old.quality[name], e) for name, e in new.quality.items() if name in old.quality}
    for name in ("nfe", "nfe_equivalent"):
        before, after = getattr(old, name), getattr(new, name)
        if before is not None and after is not None:
            slack = 1e-9 * max(abs(before), abs(after))
            found[name] = (Estimate(before, before - slack, before + slack), Estimate(after, after, after))
    if old.place == new.place and old.latency_ms and new.latency_ms:
        found["latency_ms"] = (old.latency_ms, new.latency_ms)
    return found


def differing(old: Record, new: Record) -> tuple[str, ...]:
    """What two records of a cell do not share: digests by name, the lock, libraries, the machine."""
    names = sorted({*old.digests, *new.digests})
    found = [name.replace("_", " ") for name in names if old.digests.get(name) != new.digests.get(name)]
    if old.environment.get("lock") != new.environment.get("lock"):
        changed = [
            f"{name} {old.environment.get(name, '?')} to {new.environment.get(name, '?')}"
            for name in LIBRARIES
            if old.environment.get(name) != new.environment.get(name)
        ]
        found.append("library lock" + (f" ({', '.join(changed)})" if changed else ""))
    if old.machine != new.machine:
        found.append("machine")
    return tuple(found)


# pages ------------------------------------------------------------------------------------------


def page(found: Board) -> list[str]:
    """All released versions with their permanent links, and what moved between versions."""
    up = "../" if found.snapshot else "versions/"
    lines = [
        Line(
            [Cell(link(f"{up}{suite}/index.html", suite), suite), markup.text(day), Cell(f"<code>{esc(digest)}</code>")]
        )
        for suite, day, digest in reversed(found.releases)
    ]
    parts = [
        element(
            "p",
            "A suite version freezes records, library lock, catalogue and pages. What is released keeps its address; "
            "the digest is over all of its files (<code>stepmark release --check</code> takes it again).",
        ),
        table(("Version", "Released", "Digest"), lines, "Released versions")
        if lines
        else element("p", "No version has been released yet."),
    ]
    changes = steps(found.versions)
    if not changes:
        parts.append(element("p", "There are records of one suite version only, so nothing can have moved.", "sm-note"))
    for step in changes:
        parts.append(f"## {markup.heading(step.before)} to {markup.heading(step.after)}")
        parts += [*told(step.after), *_step_parts(step)]
    return parts


def told(version: str, root: Path | None = None) -> list[str]:
    """What the changelog says of a version, as Markdown; nothing where there is no checkout or no such section."""
    root = root or plugins.checkout()
    if root is None or not (root / ACCOUNT).exists():
        return []
    sections = re.split(r"^## ", (root / ACCOUNT).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return next((text.split("\n", 1)[1].strip().split("\n") for text in sections if text.split()[0] == version), [])


def _step_parts(step: Step) -> list[str]:
    said = (
        f"{step.compared} cells are in both. {len(step.moves)} figures moved by more than their 95 % intervals: "
        "the intervals before and after do not meet. Milliseconds are compared on the same machine only."
    )
    parts = [element("p", said)]
    for names, text in ((step.came, "New methods"), (step.left, "Methods no longer measured")):
        if names:
            parts.append(element("p", f"{text}: {', '.join(map(esc, names))}."))
    if step.moves:
        lines = [
            Line(
                [
                    Cell(link(f"methods/{move.new.method}.html", move.new.method), move.new.method),
                    markup.text(move.new.task),
                    number(move.new.rung),
                    markup.text(move.metric),
                    estimate(move.before),
                    estimate(move.after),
                    markup.text("; ".join(move.why) or "nothing that a record holds"),
                    markup.text(move.new.place),
                ],
                move.new.rung,
            )
            for move in step.moves
        ]
        head = ("Method", "Task", "Rung", "Figure", step.before, step.after, "What differs", "Machine")
        parts.append(table(head, lines, f"Moved from {step.before} to {step.after}"))
    return parts


def history(versions: Mapping[str, Sequence[Row]], method: str) -> str:
    """The first metric of a method over suite versions, a column each; a sentence where there is one version."""
    mine = {suite: [row for row in rows if row.method == method and row.measured] for suite, rows in versions.items()}
    mine = {suite: rows for suite, rows in mine.items() if rows}
    if len(mine) < 2:
        said = f"Measured in suite version {esc(next(iter(mine)))} only." if mine else "Not measured in any version."
        return element("p", said)
    known = plugins.tasks()
    cells: dict[tuple[str, int, Place], dict[str, Row]] = {
        (row.task, row.rung, row.place): {} for rows in mine.values() for row in rows
    }
    for suite, rows in mine.items():
        for row in rows:
            cells[row.task, row.rung, row.place][suite] = row
    lines = []
    for (task, rung, place), found in sorted(cells.items()):
        metric, _ = headline(known[task][1])
        values = [
            estimate(found[suite].quality.get(metric)) if suite in found else number(None, "not measured")
            for suite in mine
        ]
        lines.append(Line([Cell(f"{esc(task)}: {esc(metric)}", task), number(rung), markup.text(place), *values], rung))
    return table(("Task and metric", "Rung", "Machine", *mine), lines, "History over suite versions")
