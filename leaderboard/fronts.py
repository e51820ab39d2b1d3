"""Fronts, and ladders as a whole: what the baseline's best rung costs, what matches it, the area of a ladder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stepmark.leaderboard.estimates import sane
from stepmark.leaderboard.groups import not_worse
from stepmark.leaderboard.rows import Place, Row, best, headline, split

from stepmark.plugins import MethodInfo
from stepmark.stats import hypervolume, pareto_front
from stepmark.task import Task

COSTS = ("unit", "nfe_equivalent", "latency_ms")


def front(candidates: Sequence[Row], axis: str, metric: str, higher: bool) -> list[Row]:
    """Ranked rows that no other beats on both cost and quality, cheapest first."""
    priced = [(row, row.cost(axis)) for row in candidates if row.ranked and metric in row.quality]
    have = [row for row, cost in priced if cost is not None]
    points = [(cost, row.quality[metric].value) for row, cost in priced if cost is not None]
    return [have[i] for i in pareto_front(points, ("lower", "higher" if higher else "lower"))]


def anchor(candidates: Sequence[Row], infos: Mapping[str, MethodInfo]) -> str | None:
    """The baseline of a task: of the methods compared with no other, the one that most others name."""
    present = sorted({row.method for row in candidates if row.ranked})
    plain = [name for name in present if name in infos and not infos[name].baselines]
    named = Counter(b for name in present if name in infos for b in infos[name].baselines[:1])
    return max(plain, key=lambda name: (named[name], name), default=None)


@dataclass(frozen=True)
class Bargain:
    """The cheapest row that the baseline's best row does not significantly beat; `row` is None if there is none."""

    task: str
    place: Place
    baseline: Row
    row: Row | None

    def factor(self, axis: str) -> float | None:
        """How many times cheaper on a cost axis."""
        if self.row is None:
            return None
        mine, other = self.row.cost(axis), self.baseline.cost(axis)
        return other / mine if mine and other else None


def bargain(candidates: Sequence[Row], task: Task, infos: Mapping[str, MethodInfo]) -> Bargain | None:
    """What the best method buys on one task in one place; None where no baseline has been measured.

    A method matches the baseline if the paired test at `ALPHA` finds no loss in the headline metric. The test is not
    corrected for the number of candidates: here a correction would make matching easier.
    """
    metric, higher = headline(task)
    name = anchor(candidates, infos)
    ranked = [row for row in candidates if row.ranked and metric in row.quality and row.nfe]
    own = [row for row in ranked if row.method == name]
    if not own:
        return None
    top = best(own, metric, higher)
    cheaper = [row for row in ranked if row.method != name and (row.nfe or 0) < (top.nfe or 0)]
    matches = not_worse(cheaper, top, metric, higher)
    order = sorted(matches, key=lambda row: (row.nfe_equivalent or row.nfe or 0.0, row.nfe or 0.0, row.method))
    return Bargain(task.id, top.place, top, order[0] if order else None)


# ladders as a whole -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Yardstick:
    """What the ladders of a task in one place are read against: the baseline's own ladder.

    `best` is the baseline's best row and `worst` its worst value; `dearest` is its largest cost on each axis. Quality
    is normalised to 0 at `worst` and 1 at the best value; (`dearest`, 0) is the reference point of the hypervolume.
    """

    best: Row
    metric: str
    higher: bool
    worst: float
    dearest: dict[str, float | None]

    def normalised(self, value: float) -> float | None:
        """Quality on the baseline's own scale; None where the baseline's ladder is flat."""
        span = self.best.quality[self.metric].value - self.worst
        return sane((value - self.worst) / span) if span else None


@dataclass(frozen=True)
class Ladder:
    """A method's whole ladder on one task in one place. Both figures are by cost axis, None where there is none.

    `matching`: cheapest cost of a row that the baseline's best row does not significantly beat (paired test at
    `ALPHA`). `area`: hypervolume, in decades of cost times the baseline's own range of quality.
    """

    method: str
    best: Row
    matching: dict[str, float | None]
    area: dict[str, float | None]


def yardstick(candidates: Sequence[Row], task: Task, infos: Mapping[str, MethodInfo]) -> Yardstick | None:
    """The baseline's ladder in one place; None where no baseline has been measured."""
    metric, higher = headline(task)
    name = anchor(candidates, infos)
    own = [row for row in candidates if row.method == name and row.ranked and metric in row.quality]
    if not own:
        return None
    values = [row.quality[metric].value for row in own]
    dearest = {axis: max((c for row in own if (c := row.cost(axis))), default=None) for axis in COSTS}
    return Yardstick(best(own, metric, higher), metric, higher, min(values) if higher else max(values), dearest)


def ladders(candidates: Sequence[Row], task: Task, infos: Mapping[str, MethodInfo]) -> list[Ladder]:
    """Every method's ladder on one task in one place, read against the baseline's."""
    metric, higher = headline(task)
    against = yardstick(candidates, task, infos)
    ranked = [row for row in candidates if row.ranked and metric in row.quality]
    matches = not_worse(ranked, against.best, metric, higher) if against is not None else []
    able = {id(row) for row in matches}
    found: list[Ladder] = []
    for (method,), mine in sorted(split(ranked, "method").items()):
        matching: dict[str, float | None] = dict.fromkeys(COSTS)
        area: dict[str, float | None] = dict.fromkeys(COSTS)
        if against is not None:
            same = [row for row in mine if id(row) in able]
            for axis in COSTS:
                matching[axis] = min((c for row in same if (c := row.cost(axis)) is not None and c > 0), default=None)
                area[axis] = _area(mine, axis, against)
        found.append(Ladder(method, best(mine, metric, higher), matching, area))
    return found


def _area(mine: Sequence[Row], axis: str, against: Yardstick) -> float | None:
    """Hypervolume of a ladder beside the yardstick; None where a cost is missing or the baseline's ladder is flat."""
    reference = against.dearest[axis]
    points = [(row.cost(axis), against.normalised(row.quality[against.metric].value)) for row in mine]
    whole = [(cost, value) for cost, value in points if cost is not None and cost > 0 and value is not None]
    if not reference or reference <= 0 or len(whole) < len(points):
        return None
    return hypervolume(whole, (reference, 0.0))
