"""Fronts, what methods save where they keep the baseline's best quality, and ladders as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stepmark.leaderboard.estimates import Estimate, sane
from stepmark.leaderboard.groups import not_worse
from stepmark.leaderboard.rows import Row, best, headline, split

from stepmark.plugins import MethodInfo
from stepmark.stats import hypervolume, pareto_front
from stepmark.task import Task

COSTS = ("unit", "nfe_equivalent", "latency_ms")  # along which a ladder climbs
SAVED = (*COSTS, "memory_mib", "joules")  # what a method may save
LEAST = 1.05  # a smaller factor is no saving worth a line
SAME = "same"
# What must be kept of the baseline's best value: all that a paired test can tell, or all but a share.
KEEP: dict[str, float | None] = {SAME: None, "5%": 0.05, "20%": 0.2}


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
class Saving:
    """A row that keeps what was asked, and how many times less than the baseline's best rung it costs on an axis.

    The interval of a ratio of latencies is the widest that the two intervals allow; what is counted has none.
    """

    row: Row
    factor: Estimate


@dataclass(frozen=True)
class Offer:
    """The baseline's best row on one task in one place, and by what must be kept (`KEEP`) the rows that keep it.

    `unbeaten` are all rows that it does not significantly beat, itself and variants too.
    """

    baseline: Row
    metric: str
    higher: bool
    keeping: dict[str, list[Row]]
    unbeaten: list[Row]

    def saving(self, axis: str, keep: str = SAME, able: Callable[[Row], bool] | None = None) -> Saving | None:
        """The cheapest row on an axis among those that keep what is asked and are `able` to serve; of equal cost the
        better one. None where it costs no less than the baseline's best row, by `LEAST` and by its interval.
        """
        sign = -1 if self.higher else 1
        priced = [
            (cost, sign * row.quality[self.metric].value, row.method, row.rung, row)
            for row in self.keeping[keep]
            if (cost := row.cost(axis)) is not None and cost > 0 and (able is None or able(row))
        ]
        row = min(priced, key=lambda each: each[:4])[-1] if priced else None
        factor = self.factor(row, axis) if row is not None else None
        return Saving(row, factor) if row and factor and factor.value >= LEAST and factor.low > 1 else None

    def factor(self, row: Row, axis: str) -> Estimate | None:
        """How many times less a row costs on an axis than the baseline's best row."""
        mine, other = row.cost(axis), self.baseline.cost(axis)
        if not mine or not other:
            return None
        ratio = other / mine
        own, base = row.latency_ms, self.baseline.latency_ms
        if axis != "latency_ms" or own is None or base is None or own.low <= 0:
            return Estimate(ratio, ratio, ratio)
        return Estimate(ratio, base.low / own.high, base.high / own.low)


def offer(candidates: Sequence[Row], task: Task, infos: Mapping[str, MethodInfo]) -> Offer | None:
    """What keeps the quality of the baseline's best rung on one task in one place; None where no baseline has figures.

    The paired test is not corrected for the number of candidates: here a correction would make keeping easier. Lower
    rungs of the baseline itself are candidates too. Variants are not: they are controls and ablations of a paper, some
    of which know what no method may know.
    """
    metric, higher = headline(task)
    name = anchor(candidates, infos)
    ranked = [row for row in candidates if row.ranked and metric in row.quality]
    own = [row for row in ranked if row.method == name]
    if not own:
        return None
    top = best(own, metric, higher)
    unbeaten = not_worse(ranked, top, metric, higher)
    able = [row for row in ranked if row is not top and (row.method not in infos or infos[row.method].base is None)]
    value = top.quality[metric].value
    may = {id(row) for row in able}
    keeping = {SAME: [row for row in unbeaten if id(row) in may]}
    for keep, share in KEEP.items():
        if share is not None:
            room = share * abs(value)
            keeping[keep] = [
                row
                for row in able
                if (row.quality[metric].value >= value - room if higher else row.quality[metric].value <= value + room)
            ]
    return Offer(top, metric, higher, keeping, unbeaten)


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


def ladders(
    candidates: Sequence[Row], task: Task, infos: Mapping[str, MethodInfo], deal: Offer | None = None
) -> list[Ladder]:
    """Every method's ladder on one task in one place, read against the baseline's. `deal` is `offer` of the same, for
    those who have it.
    """
    metric, higher = headline(task)
    against = yardstick(candidates, task, infos)
    ranked = [row for row in candidates if row.ranked and metric in row.quality]
    deal = deal or offer(candidates, task, infos)
    able = {id(row) for row in deal.unbeaten} if deal is not None else set()
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
