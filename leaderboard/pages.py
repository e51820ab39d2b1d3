"""What several pages of the site are made of: the board that they all read, and pieces larger than a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stepmark.leaderboard import charts, coverage, markup
from stepmark.leaderboard.coverage import Covered
from stepmark.leaderboard.fronts import COSTS, Ladder, Offer, Yardstick, anchor, front, ladders, offer, yardstick
from stepmark.leaderboard.ledger import Ledger
from stepmark.leaderboard.markup import Cell, Line, chip, esc, estimate, link, number, table
from stepmark.leaderboard.rows import Place, Row, Training, headline, index, places, split, training
from stepmark.leaderboard.trust import Standing, sources_now, stale
from stepmark.leaderboard.verdicts import Verdicts, verdicts

from stepmark.plugins import MethodInfo
from stepmark.record import Record
from stepmark.samples import SampleFile
from stepmark.task import Task


@dataclass
class Board:
    """All that the pages are made from."""

    ledger: Ledger
    methods: dict[str, MethodInfo]
    tasks: dict[str, tuple[str, Task]]
    repository: str | None = None
    samples: Sequence[SampleFile] = ()
    releases: Sequence[tuple[str, str, str]] = ()  # (suite version, day, digest), oldest first
    snapshot: str | None = None  # the suite version that these pages are frozen into

    @property
    def records(self) -> list[Record]:
        """Records of the newest version, without resamples."""
        return self.ledger.records

    @property
    def rows(self) -> list[Row]:
        """Rows of the newest version."""
        return self.ledger.rows

    @property
    def versions(self) -> dict[str, list[Row]]:
        """Rows of every suite version, oldest first."""
        return self.ledger.versions

    @property
    def standings(self) -> dict[tuple[str, str], Standing]:
        """Trust by (method, task), for all that were recorded."""
        return self.ledger.standings

    @cached_property
    def by_method(self) -> dict[str, list[Row]]:
        """Rows of each method."""
        return {method: mine for (method,), mine in split(self.rows, "method").items()}

    @cached_property
    def verdicts(self) -> dict[str, Verdicts]:
        """Every claim of every method with its verdict in every place."""
        have = index(self.rows)
        return {name: verdicts(info, self.by_method.get(name, []), have) for name, info in self.methods.items()}

    @cached_property
    def training(self) -> dict[str, Training]:
        """What each method needs before it can run."""
        return {method: training(mine) for method, mine in self.by_method.items()}

    @cached_property
    def covered(self) -> list[Covered]:
        """The catalogue with computed status."""
        return coverage.covered(coverage.catalogue(), self.methods, self.rows, self.verdicts)

    @cached_property
    def places(self) -> list[Place]:
        """Where figures were taken, the best covered first."""
        return places(self.rows)

    @cached_property
    def _by_task(self) -> dict[tuple[str, Place], list[Row]]:
        return split(self.rows, "task", "place")

    def of_task(self, task: str, place: Place) -> list[Row]:
        """Rows of a task in a place."""
        return self._by_task.get((task, place), [])

    @cached_property
    def _places_of(self) -> dict[str, list[Place]]:
        order = {place: i for i, place in enumerate(self.places)}
        found: dict[str, list[Place]] = {}
        for task, place in sorted(self._by_task, key=lambda key: order[key[1]]):
            found.setdefault(task, []).append(place)
        return found

    def places_of(self, task: str) -> list[Place]:
        """Where a task was measured, the best covered place of the site first."""
        return self._places_of.get(task, [])

    @cached_property
    def _ladders(self) -> dict[tuple[str, Place], list[Ladder]]:
        return {}

    def ladders(self, task: str, place: Place) -> list[Ladder]:
        """Every method's ladder on a task in a place: computed once."""
        if (task, place) not in self._ladders:
            rows = self.of_task(task, place)
            self._ladders[task, place] = ladders(rows, self.tasks[task][1], self.methods, self.offer(task, place))
        return self._ladders[task, place]

    @cached_property
    def _offers(self) -> dict[tuple[str, Place], Offer | None]:
        return {}

    def offer(self, task: str, place: Place) -> Offer | None:
        """What keeps the baseline's best quality on a task in a place: computed once."""
        if (task, place) not in self._offers:
            rows = self.of_task(task, place)
            self._offers[task, place] = offer(rows, self.tasks[task][1], self.methods)
        return self._offers[task, place]

    def yardstick(self, task: str, place: Place) -> Yardstick | None:
        """The baseline's ladder on a task in a place."""
        return yardstick(self.of_task(task, place), self.tasks[task][1], self.methods)

    @cached_property
    def _stale(self) -> dict[tuple[str, str], dict[str, str]]:
        """Digests of the sources as they are now, by (method, task): read once."""
        pairs = {(row.method, row.task) for row in self.rows if row.method in self.methods and row.task in self.tasks}
        return {(m, t): sources_now(self.methods[m], self.tasks[t][1]) for m, t in sorted(pairs)}

    def is_stale(self, row: Row) -> bool:
        """Whether the sources that a row was measured from have changed since."""
        return stale(row.first, self._stale.get((row.method, row.task), {}))

    @cached_property
    def tags(self) -> dict[str, list[str]]:
        """Method -> the tags of its paper in the catalogue."""
        return {info.id: each.entry.tags for each in self.covered for info in each.infos}

    def order(self, rows: Iterable[Row]) -> list[str]:
        """Methods of some rows: those compared with no other first, then by name, variants after their method."""
        present = {row.method for row in rows}
        return sorted(present, key=lambda name: (not self.is_baseline(self.family(name)), *self.kin(name)))

    def anchor(self, rows: Sequence[Row]) -> str | None:
        """The baseline of a task in one place."""
        return anchor(rows, self.methods)

    def leading(self, rows: Sequence[Row], task: Task, axes: Sequence[str] = COSTS) -> list[str]:
        """What a chart shows in colour: the baseline, then the methods on a front of these axes, by name."""
        metric, higher = headline(task)
        first = self.anchor(rows)
        ahead = {
            row.method for axis in axes for row in front(charts.drawable(rows, axis, metric), axis, metric, higher)
        }
        return ([first] if first else []) + sorted(ahead - {first})

    def family(self, name: str) -> str:
        """The method that a variant stands under; any other method stands for itself."""
        return (self.methods[name].base or name) if name in self.methods else name

    def kin(self, name: str) -> tuple[str, bool, str]:
        """What sorts methods by name so that variants follow their method."""
        return (self.family(name), self.is_variant(name), name)

    def is_variant(self, name: str) -> bool:
        """Whether a method is another setting of one in whose file it stands."""
        return self.family(name) != name

    def variants(self, name: str) -> list[MethodInfo]:
        """The variants of a method, in the order of its file."""
        return [info for info in self.methods.values() if info.base == name]

    def ranked(self, rows: Iterable[Row], task: Task) -> list[Row]:
        """Rows of a task in one place, best first at each rung. Variants stand below their method, which takes its own
        place; where it has no row at that rung, the best of them takes it.
        """
        metric, higher = headline(task)
        rows = list(rows)

        def merit(row: Row) -> tuple[float, float]:
            value = row.quality[metric].value if metric in row.quality else 0.0
            return (row.group or 10**6, -value if higher else value)

        heads: dict[tuple[int, str], tuple[bool, tuple[float, float]]] = {}
        for row in rows:
            key = (row.rung, self.family(row.method))
            mine = (self.is_variant(row.method), merit(row))
            heads[key] = min(heads.get(key, mine), mine)

        def place(row: Row) -> tuple[Any, ...]:
            family = self.family(row.method)
            return (row.rung, heads[row.rung, family][1], family, self.is_variant(row.method), merit(row), row.method)

        return sorted(rows, key=place)

    def is_baseline(self, name: str) -> bool:
        """Whether a method is compared with no other."""
        return name in self.methods and not self.methods[name].baselines

    def tracks(self) -> list[str]:
        """Tracks that have tasks, by name."""
        return sorted({track for track, _ in self.tasks.values()})

    @cached_property
    def titles(self) -> dict[str, str]:
        """Tasks under titles for people: the first clause of the summary, all of it where tasks of a track share it."""
        first = {name: re.split(r"[,;:] ", task.summary)[0] for name, (_, task) in self.tasks.items()}
        often = Counter((track, first[name]) for name, (track, _) in self.tasks.items())
        return {
            name: first[name] if often[track, first[name]] == 1 else task.summary
            for name, (track, task) in self.tasks.items()
        }

    @cached_property
    def sought(self) -> dict[str, list[str]]:
        """Track -> its measured tasks, in the order in which people look for them: what most methods have run on comes
        first, tracks and tasks alike. A track counts all its methods.
        """
        runs: dict[str, set[str]] = {}
        for row in self.rows:
            if row.measured:
                runs.setdefault(row.track, set()).add(row.method)
                runs.setdefault(row.task, set()).add(row.method)
        many = {name: len(methods) for name, methods in runs.items()}
        tracks = sorted((track for track in self.tracks() if track in many), key=lambda track: (-many[track], track))
        return {
            track: sorted(
                (name for name, (owner, _) in self.tasks.items() if owner == track and name in many),
                key=lambda name: (-many[name], list(self.tasks).index(name)),
            )
            for track in tracks
        }


def slug(task: str) -> str:
    """A task's name in addresses."""
    return task.replace("/", "-")


def words(name: str) -> str:
    """A track's name for people."""
    return " ".join("LM" if word == "lm" else word for word in name.replace("_", " ").capitalize().split(" "))


def crumbs(*steps: tuple[str, str]) -> str:
    """The way from the top to a page, as (address, label)."""
    return '<p class="sm-crumbs">' + " / ".join(link(address, label) for address, label in steps) + "</p>"


def element(tag: str, content: str, kind: str = "") -> str:
    """An element of raw HTML, which Markdown leaves alone."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{content}</{tag}>"


NOTHING = element(
    "div",
    "<p><b>No records yet.</b> Every figure on this site is computed from records, and none has been written. "
    "Run <code>make bench</code>, then <code>stepmark site</code>.</p>",
    "sm-empty",
)


def trust_cell(found: Board, row: Row) -> Cell:
    """The trust state of a method on a task."""
    state = found.standings[(row.method, row.task)]
    return Cell(chip(state.state, markup.TRUST_MOOD[state.state], state.said), state.state)


def record_cell(found: Board, row: Row) -> Cell:
    """The id of a row's record; where the repository is known, it opens the form that disputes it."""
    name = row.id
    if not found.repository:
        return Cell(f"<code>{name}</code>", name)
    address = f"{found.repository}/issues/new?template=disputed-number.yml&record={name}"
    return Cell(f'<a href="{esc(address)}" title="Dispute this record"><code>{name}</code></a>', name)


def method_cell(found: Board, name: str, up: str = "../methods/") -> Cell:
    """A method's name with its page; of a variant also whose it is and what it changes."""
    linked = link(f"{up}{name}.html", name)
    if not found.is_variant(name):
        return Cell(linked, name)
    said = f"A variant of {found.family(name)}: {found.methods[name].says}"
    return Cell(f'<span title="{esc(said)}">{linked}</span>', name)


def verdict_counts(states: Counter[str]) -> Cell:
    """How many claims got which verdict."""
    return Cell(markup.tally(states, markup.VERDICT_MOOD) or "–", float(states["reproduced"]))


def curves(
    found: Board,
    rows: Sequence[Row],
    task: Task,
    methods: Sequence[str],
    axes: Sequence[str],
    data: Path | None = None,
) -> str:
    """Ladder curves of some methods on a task in one place, with their legend.

    They stand in the page, where the legend can dim them; a page that has many keeps them as files below `data`, and
    has colour for the fronts and the baseline only.
    """
    styles = charts.style(methods)
    leading = None if data is None else found.leading(rows, task)
    figures = []
    for axis in axes:
        name = f"{slug(task.id)}-{axis}-{found.places.index(rows[0].place)}"
        svg = charts.curve(rows, task, axis, styles, leading=leading)
        if svg and data is None:
            figures.append(f"<figure data-search-exclude>{svg}</figure>")
        elif svg and data is not None:
            path = data / "charts" / f"{name}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(charts.as_file(svg), encoding="utf-8")
            alt = f"{headline(task)[0]} against {charts.SHORT[axis]} on {task.id}, {len(methods)} methods"
            image = f'<img src="../data/charts/{name}.svg" alt="{esc(alt)}" width="400" height="310">'
            figures.append(f"<figure data-search-exclude>{image}</figure>")
    if not figures:
        return ""
    baselines = [name for name in methods if found.is_baseline(name)]
    metric, _ = headline(task)
    drawn = {row.method for axis in axes for row in charts.drawable(rows, axis, metric)}
    shown = {name: look for name, look in styles.items() if name in drawn}
    names = charts.legend(shown, baselines, data is None, leading)
    return f'<div class="sm-charts">{names}<div class="sm-grid">{"".join(figures)}</div></div>'


OLDER = "the method, its track, the task or its data has changed since"
TIED = (
    "Rows at one rung in the same group are not told apart by a paired bootstrap test, Holm-corrected at 5 %; group 1 "
    "holds the best."
)
NFE = "Evaluations per item that count against the rung."
NFE_EQUIVALENT = "FLOPs spent per item, divided by the FLOPs of one evaluation of the task's reference network."


def shown_notes(row: Row) -> list[str]:
    """Messages and flags, cut to what a table can hold. Untrusted text."""
    return [note[:300] for note in row.notes[:4]]


def figures(found: Board, rows: Sequence[Row], task: Task, ids: bool = False) -> str:
    """The table of one task in one place, best first at each rung, with the reasons of what is null below it."""
    with_equivalents = any(row.nfe_equivalent is not None for row in rows)
    arrows = {"higher": "↑", "lower": "↓"}
    head = ["Rung"] if ids else ["Method", "Rung", "Group"]
    head += [f"{name} {arrows[direction]}" for name, direction in task.metrics.items()]
    head += ["NFE/item", *(["NFE-eq/item"] if with_equivalents else []), "ms/item", "Speed-up", "Peak MiB"]
    # What no row has costs no width; on a track page other machines, which the script shows, may have it.
    with_energy = not ids or any(row.joules is not None for row in rows)
    head += [*(["J/item"] if with_energy else []), "Status", *(["Record"] if ids else [])]

    lines = []
    for row in found.ranked(rows, task):
        state = chip(row.status, markup.STATUS_MOOD[row.status]) + (
            " " + chip("older source", "open", OLDER) if found.is_stale(row) else ""
        )
        notes = "".join(f'<br><span class="sm-range">{esc(note)}</span>' for note in shown_notes(row))
        name = method_cell(found, row.method)
        cells = [
            *([number(row.rung)] if ids else [name, number(row.rung), number(row.group)]),
            *[estimate(row.quality.get(m)) for m in task.metrics],
            number(row.nfe),
            *([number(row.nfe_equivalent, row.reason("nfe_equivalent"))] if with_equivalents else []),
            estimate(row.latency_ms, why=row.reason("latency")),
            estimate(row.speedup, "×", row.reason("speedup") or row.reason("latency")),
            number(row.memory_mib, row.reason("memory")),
            *([number(row.joules, row.reason("energy"))] if with_energy else []),
            Cell(state + notes, row.status),
        ]
        if ids:
            cells.append(record_cell(found, row))
        marks = (
            {} if ids else {"training": found.training[row.method], "tags": ",".join(found.tags.get(row.method, ()))}
        )
        lines.append(Line(cells, row.rung, not row.ranked, marks, not ids and found.is_variant(row.method)))
    hints = {"Group": TIED, "NFE/item": NFE, "NFE-eq/item": NFE_EQUIVALENT}
    return table(head, lines, f"Figures on {task.id}", picks=tuple(lines[0].marks) if lines else (), hints=hints) + (
        '<div class="sm-reasons">' + "".join(f'<p class="sm-note">{esc(note)}</p>' for note in reasons(rows)) + "</div>"
    )


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why figures are null, each reason once, and how those in time came about. Untrusted text."""
    lacking = {
        "latency": "latency_ms", "speedup": "speedup", "memory": "memory_mib", "energy": "joules",
        "nfe_equivalent": "nfe_equivalent",
    }  # fmt: skip
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
    return notes


# methods ----------------------------------------------------------------------------------------
