"""The page that compares any two methods, with the same tests as `stepmark compare`, computed at build time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from stepmark.leaderboard.comparisons import STATES, Comparison, contrasts
from stepmark.leaderboard.groups import ALPHA
from stepmark.leaderboard.markup import chip, esc, link
from stepmark.leaderboard.pages import NOTHING, Board, element, words
from stepmark.leaderboard.rows import headline
from stepmark.leaderboard.track_pages import script, short

HEAD = (
    "Task", "Machine", "Rung", "Metric", "Difference", "95 % interval", "p (Holm)", "Effect size", "Better",
    "Latency ratio",
)  # fmt: skip
NUMBERS = {"Rung", "Difference", "95 % interval", "p (Holm)", "Effect size", "Latency ratio"}
HINTS = {
    "p (Holm)": "Two-sided p of the paired bootstrap test, Holm-corrected over all lines of the table.",
    "Effect size": "The mean difference in standard deviations of the paired differences of single items.",
    "Latency ratio": "Milliseconds per item of the first method over those of the second, at the same rung.",
}
DIGITS = 9  # of a figure in the data: more than any table shows


def page(found: Board) -> list[str]:
    """The page; its table is filled by a script from the files that `write_data` writes."""
    tracks = comparable(found)
    if not tracks:
        return [NOTHING if not found.rows else element("p", "No two methods have been measured on one task yet.")]
    head = "".join(
        f'<th scope="col"{" class=n" if name in NUMBERS else ""}>'
        + (f'<abbr title="{esc(HINTS[name])}">{esc(name)}</abbr>' if name in HINTS else esc(name))
        + "</th>"
        for name in HEAD
    ).replace(">Difference<", "><span data-difference>Difference</span><")
    better = "First and second method at the same rung of the same task on the same machine, in the task's first metric"
    return [
        element(
            "p",
            f"{better}. A line counts for a method if a paired bootstrap test, Holm-corrected over all lines at "
            f"{ALPHA:.0%}, tells the two apart; what is flagged or failed at some seed takes no part; "
            + link("how-we-measure.html", "how the tests work")
            + ". The address of the page keeps the choice.",
        ),
        '<noscript><p class="sm-empty">Choosing needs a script. In a terminal: '
        "<code>stepmark compare FIRST SECOND</code>.</p></noscript>",
        '<div class="sm-compare" data-search-exclude>'
        '<div class="sm-filter" data-choices></div>'
        '<p data-result aria-live="polite"></p>'
        '<div class="sm-scroll" tabindex="0" role="region" aria-label="Paired tests">'
        f'<table class="sm-table"><thead><tr>{head}</tr></thead><tbody></tbody></table></div>'
        '<p class="sm-note">The same in a terminal: <code data-command>stepmark compare</code>. Data: '
        + ", ".join(link(f"data/compare-{track}.js", words(track)) for track in tracks)
        + f". {chip('tied')} means that the test finds no difference.</p>"
        "</div>",
        "".join(
            f'<script defer src="{each}"></script>'
            for each in ("data/compare.js", "assets/pieces.js", "assets/compare.js")
        ),
    ]


def comparable(found: Board) -> dict[str, list[str]]:
    """Track -> its measured methods by name, where there are two."""
    methods: dict[str, set[str]] = {}
    for row in found.rows:
        if row.measured:
            methods.setdefault(row.track, set()).add(row.method)
    return {track: sorted(names) for track, names in sorted(methods.items()) if len(names) > 1}


def track_data(found: Board, track: str) -> dict[str, Any]:
    """Every pair of methods of a track, the first by name first, tests as lists in the order of the terminal; and how
    many were left out, as [method, status, how many].
    """
    names = comparable(found)[track]
    number = {name: i for i, name in enumerate(names)}
    rows = [row for row in found.rows if row.track == track and row.measured]
    tasks = {task: i for i, task in enumerate(sorted({row.task for row in rows}))}
    places = {place: i for i, place in enumerate(sorted({row.place for row in rows}))}
    tiers: dict[str, Any] = {}
    left: dict[str, Any] = {}
    for tier in sorted({place.tier for place in places}):
        mine = [row for row in rows if row.place.tier == tier]
        tiers[tier], left[tier] = {}, {}
        for (a, b), contrast in contrasts(mine, list(combinations(names, 2)), found.tasks).items():
            pair = f"{number[a]},{number[b]}"
            if contrast.tests:
                tiers[tier][pair] = [_packed(test, a, tasks[test.task], places[test.place]) for test in contrast.tests]
            if contrast.left_out:
                left[tier][pair] = [[number[m], state, n] for (m, state), n in sorted(contrast.left_out.items())]
    return {
        "methods": names,
        "tasks": [{"name": task, "metric": headline(found.tasks[task][1])[0]} for task in tasks],
        "places": [str(place) for place in places],
        "tiers": tiers,
        "left": left,
    }


def _packed(test: Comparison, a: str, task: int, place: int) -> list[Any]:
    figures = (test.difference, test.low, test.high, test.p, test.effect, test.latency_ratio)
    won = 0 if test.winner is None else 1 if test.winner == a else -1
    return [task, place, test.rung, *[short(x, DIGITS) for x in figures], won]


def _start(pairs: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[str]:
    """The two methods that the page shows if it is asked for none: those with most comparisons."""
    best = max(pairs, key=lambda pair: len(pairs[pair]), default="0,1")
    return [names[int(i)] for i in best.split(",")]


def write_data(found: Board, folder: Path) -> None:
    """A file that says what can be compared and how it is said, and one per track that holds the tests."""
    tracks = []
    for track, names in comparable(found).items():
        data = track_data(found, track)
        # The tier that the terminal takes if it is told none comes first.
        tiers = sorted(data["tiers"], key=lambda tier: (tier != "embedded", tier))
        start = _start(data["tiers"][tiers[0]], names)
        tracks.append({"name": track, "title": words(track), "methods": names, "tiers": tiers, "start": start})
        (folder / f"compare-{track}.js").write_text(script(f"stepmarkComparisons_{track}", data), encoding="utf-8")
    if tracks:
        content = {"alpha": f"{ALPHA:.0%}", "states": STATES, "tracks": tracks}
        (folder / "compare.js").write_text(script("stepmarkComparisons", content), encoding="utf-8")
