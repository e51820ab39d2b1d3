"""Samples on a method's page: pictures, points and texts, rung by rung beside the baseline's from the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from stepmark.leaderboard import markup
from stepmark.leaderboard.markup import Cell, Line, esc, number, table
from stepmark.leaderboard.pages import Board, element
from stepmark.leaderboard.rows import Row, split

from stepmark.samples import Mark, Pictures, Points, Sample, SampleFile, Shown, Texts, source_of

SIZE, RANGE = 96, 4.0  # of a scatter plot: pixels, and how far its axes go
SHORT = 3  # words of a rejected draft that are still shown in the text
COLOURS = ("#2b8cc4", "#d55e00", "#009e73", "#cc79a7")


def section(found: Board, files: Sequence[SampleFile], name: str) -> list[str]:
    """The samples of a method where its records stand; [] if there are none."""
    info = found.methods.get(name)
    wanted = {name, *(info.baselines if info else ())}
    have = {
        (file.machine, sample.tier, sample.device, file.method, sample.task, sample.rung): sample
        for file in files
        if file.method in wanted
        for sample in file.samples
    }
    parts = []
    rows = [row for row in found.rows if row.method == name and row.measured]
    for (task_id, place), mine in split(rows, "task", "place").items():
        present = {row.method for row in found.of_task(task_id, place)}
        base = next((b for b in (info.baselines if info else ()) if b in present), None)
        lines = []
        for row in sorted(mine, key=lambda row: row.rung):
            own = have.get((place.machine, place.tier, place.device, name, task_id, row.rung))
            if own is None:
                continue
            cells = [number(row.rung), _cell(own, row, name)]
            if base is not None:
                other = have.get((place.machine, place.tier, place.device, base, task_id, row.rung))
                beside = next(
                    (r for r in found.of_task(task_id, place) if (r.method, r.rung) == (base, row.rung)), None
                )
                cells.append(_cell(other, beside, base) if other and beside else Cell("–", ""))
            lines.append(Line(cells, row.rung))
        if lines:
            head = ("Rung", name, *([f"{base} (baseline)"] if base else []))
            parts += [f"### {markup.heading(task_id)}: samples", table(head, lines, f"Samples on {task_id}")]
    if parts:
        note = (
            "The first items of seed 0, from the same inputs in both columns. They are there to be looked at; "
            "the figures above are over all items."
        )
        if any("<u title=" in part for part in parts):
            note += (
                " Underlined words were drafted and kept, words struck out were drafted and rejected (a number in brackets: so "
                "many of them), those in bold are the target's own: one for each time that it was asked."
            )
        parts = ["## Samples", element("p", note, "sm-note"), *parts]
    return parts


def _cell(sample: Sample, row: Row, method: str) -> Cell:
    shown = picture(sample.shown, f"{method} at rung {sample.rung} on {sample.task}")
    old = row.first.seed != 0 or sample.source != source_of(row.first.digests)
    return Cell(shown + ('<br><span class="sm-range">of other sources than the figures</span>' if old else ""), "")


def picture(shown: Shown, what: str) -> str:
    """A sample as HTML. Everything in it is untrusted and was checked on reading."""
    if isinstance(shown, Pictures):
        text = f"{shown.count} samples of {what}"
        return (
            f'<img class="sm-strip" src="data:image/png;base64,{shown.png}" alt="{esc(text)}" '
            f'width="{shown.count * shown.width}" height="{shown.height}" loading="lazy">'
        )
    if isinstance(shown, Texts):
        pairs = "".join(
            f'<p class="sm-sample"><span class="sm-range">{esc(prompt)}</span> {_text(text, pieces)}</p>'
            for (prompt, text), pieces in zip_longest(shown.pairs, shown.marks[: len(shown.pairs)], fillvalue=[])
        )
        return pairs or "–"
    return _scatter(shown, what)


def _text(text: str, pieces: Sequence[tuple[str, Mark]]) -> str:
    """What was written; of methods that draft with the drafts marked."""
    if not pieces:
        return f"<b>{esc(text)}</b>"
    return " ".join(_piece(words, mark) for words, mark in pieces)


def _piece(words: str, mark: Mark) -> str:
    """A piece of a text. Of a tree, or a long draft that was rejected, the number of its words: the text is what counts."""
    if mark == "own":
        return f"<b>{esc(words)}</b>"
    if mark == "kept":
        return f'<u title="drafted and kept">{esc(words)}</u>'
    count = len(words.split())
    if count <= SHORT:
        return f'<s title="drafted and rejected">{esc(words)}</s>'
    return f'<span class="sm-range" title="drafted and rejected: {esc(words)}">[{count}]</span>'


def _scatter(shown: Points, what: str) -> str:
    dots = []
    for (x, y), group in zip(shown.points, shown.classes, strict=False):
        across, down = (SIZE / 2 * (1 + max(-1.0, min(1.0, v / RANGE))) for v in (x, -y))
        dots.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="1.2" fill="{COLOURS[group % len(COLOURS)]}"/>')
    text = f"{len(dots)} points of {what}, axes from {-RANGE:g} to {RANGE:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE} {SIZE}" width="{SIZE}" height="{SIZE}" '
        f'role="img" aria-label="{esc(text)}"><rect width="{SIZE}" height="{SIZE}" fill="none" stroke="currentColor" '
        f'stroke-opacity="0.3"/>{"".join(dots)}</svg>'
    )
