"""The tour: a handful of comparisons that show in minutes what the suite is about (`make bench`, `stepmark tour`).

Which comparisons stands in `COMPARISONS` and nowhere else. Each is measured at tier embedded on the machine at hand, noise
seed 0, and what is said of it is computed from its records. They go to a folder of their own: nobody publishes a tour.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from stepmark import plugins
from stepmark.admission import left_out
from stepmark.devices import kind_of
from stepmark.meter.machine import machine_id
from stepmark.names import unknown
from stepmark.places import results_folder
from stepmark.record import Record, read_all
from stepmark.stats import centred, paired_test
from stepmark.task import Task
from stepmark.verify import compare

ALPHA = 0.05
LEAST = 1.05  # ratios nearer to one are no saving worth a word


@dataclass(frozen=True)
class Stop:
    """One comparison: a method and what it is measured against, on the rungs of one task.

    `costs` are counts of the records, beside evaluations and time, that the method is there to save: name -> word.
    """

    id: str
    says: str
    method: str
    baseline: str
    task: str
    rungs: tuple[int, ...]
    costs: tuple[tuple[str, str], ...] = ()


COMPARISONS = (
    Stop(
        "sampler",
        "a fast sampler, for nothing",
        method="unipc",
        baseline="ddim",
        task="class_to_image/digits_eps",
        rungs=(4, 8, 10, 16),
    ),
    Stop(
        "student",
        "a student, trained once to do in one step what its teacher does in many",
        method="consistency_distillation",
        baseline="euler",
        task="class_to_image/digits_flow",
        rungs=(1, 4, 16),
    ),
    Stop(
        "speculative",
        "speculative decoding: a small model drafts, the large one checks",
        method="speculative",
        baseline="autoregressive",
        task="greedy/sums_deep",
        rungs=(8, 16, 64),
    ),
    Stop(
        "cache",
        "a key/value cache in eight bits, asked for facts of a long text",
        method="kv_int8",
        baseline="autoregressive",
        task="recall/needles",
        rungs=(16,),
        costs=(("kv_bytes", "bytes of cache"),),
    ),
    Stop(
        "coverage",
        "a test that tells a wrong posterior from an exact one, by draws alone",
        method="tarp",
        baseline="hpd_coverage",
        task="coverage/linear_gaussian",
        rungs=(50, 500, 2000),
    ),
)

Figures = Mapping[tuple[str, int], Record]  # (method, rung) -> the record of noise seed 0


def chosen(names: Sequence[str]) -> list[Stop]:
    """The stops of these names, in the order of the tour; all if none is named.

    Raises:
        KeyError: one line that says which there are.
    """
    known = [stop.id for stop in COMPARISONS]
    for name in names:
        if name not in known:
            raise KeyError(unknown("stop", name, known))
    return [stop for stop in COMPARISONS if not names or stop.id in names]


def folder() -> Path:
    """Where the records of the tour go: a private folder, beside that of the other records that are not published."""
    return results_folder("smoke").with_name("tour")


def figures(records: Sequence[Record], stop: Stop) -> dict[tuple[str, int], Record]:
    """The records of a stop that gave figures, at tier embedded and noise seed 0, all of one place: of the device of the
    machine that has most of the stop's cells, and of such the one that was measured last; of a cell the record made last.
    What the board leaves out takes no part.
    """
    known, methods = plugins.tasks(), plugins.methods()
    sound = [
        r
        for r in records
        if r.task == stop.task
        and r.method in {stop.method, stop.baseline}
        and r.rung in stop.rungs
        and (r.seed, r.tier, r.status) == (0, "embedded", "ok")
        and not left_out(r, known, methods)
    ]
    places: dict[tuple[str, ...], dict[tuple[str, int], Record]] = {}
    for r in sorted(sound, key=lambda r: r.created):
        places.setdefault((r.suite, r.machine, r.device, r.checkpoint), {})[r.method, r.rung] = r
    return max(places.values(), key=lambda cells: (len(cells), max(r.created for r in cells.values())), default={})


# what the figures say ------------------------------------------------------------------------------------------------


def not_worse(mine: Record, other: Record, metric: str, higher: bool) -> bool:
    """Whether the paired test over items finds no loss in the metric."""
    tables = [r.quality[metric] for r in (mine, other)]
    if len({len(each.resamples) for each in tables}) != 1 or not tables[0].resamples:
        gain = tables[0].value - tables[1].value
        return gain >= 0 if higher else gain <= 0
    ours, theirs = (centred(each.resamples, each.value) for each in tables)
    found = paired_test(ours, theirs)
    return found.p > ALPHA or (found.difference >= 0 if higher else found.difference <= 0)


def at(stop: Stop, found: Figures, task: Task) -> tuple[int, int]:
    """(rung of the method, rung of the baseline) at which the two are set side by side.

    The best the baseline does that the method reaches with fewer evaluations, and the cheapest rung of the method that
    reaches it; without such a pair the largest rung that both have.

    Raises:
        ValueError: there is no rung that both have.
    """
    metric, direction = next(iter(task.metrics.items()))
    higher = direction == "higher"
    mine, other = (
        {rung: r for (name, rung), r in found.items() if name == who} for who in (stop.method, stop.baseline)
    )
    pairs = [
        (r, s)
        for r, a in mine.items()
        for s, b in other.items()
        if a.counts["nfe"] * LEAST < b.counts["nfe"] and not_worse(a, b, metric, higher)
    ]
    if pairs:
        value = {s: other[s].quality[metric].value * (1 if higher else -1) for _, s in pairs}
        best = max(value.values())
        # Of equally good rungs of the baseline the cheapest: nobody would pay for the others.
        top = min((s for s in value if value[s] == best), key=lambda s: (other[s].counts["nfe"], s))
        return min((r for r, s in pairs if s == top), key=lambda r: (mine[r].counts["nfe"], r)), top
    both = mine.keys() & other.keys()
    if not both:
        raise ValueError(f"{stop.method} and {stop.baseline} have no rung of {stop.task} in common")
    return max(both), max(both)


def per_item(record: Record) -> float | None:
    """Median milliseconds an item."""
    return record.latency.median_ms / record.latency.items if record.latency else None


def savings(stop: Stop, mine: Record, other: Record) -> dict[str, float]:
    """How many times less the method spends: evaluations, the stop's own costs, time. Above one is a saving."""
    pairs = {word: (mine.counts.get(n), other.counts.get(n)) for n, word in (("nfe", "evaluations"), *stop.costs)}
    pairs["time"] = (per_item(mine), per_item(other))
    return {word: b / a for word, (a, b) in pairs.items() if a and b}


def sentence(stop: Stop, found: Figures, task: Task) -> str:
    """What the comparison says, in words and numbers of the records."""
    r, s = at(stop, found, task)
    mine, other = found[stop.method, r], found[stop.baseline, s]
    metric, direction = next(iter(task.metrics.items()))
    a, b = mine.quality[metric].value, other.quality[metric].value
    values = f"{metric} {a:.3g} against {b:.3g}, {direction} is better"
    higher = direction == "higher"
    if r != s:
        head = f"{stop.method} at {r:,} {task.unit} reaches what {stop.baseline} reaches at {s:,} ({values})"
    else:
        reaches, passes = not_worse(mine, other, metric, higher), not not_worse(other, mine, metric, higher)
        verb = "is better than" if passes else "is as good as" if reaches else "is worse than"
        head = f"{stop.method} {verb} {stop.baseline} at {r:,} {task.unit} ({values})"
    return f"{head}: {', '.join(phrase(word, ratio) for word, ratio in savings(stop, mine, other).items())}."


def published_time(stop: Stop, found: Figures, published: Figures, task: Task) -> str:
    """How much faster the same pair of cells is in the published records; "" where they lack one of them."""
    r, s = at(stop, found, task)
    mine, other = published.get((stop.method, r)), published.get((stop.baseline, s))
    ratio = savings(stop, mine, other).get("time") if mine and other else None
    return "" if ratio is None else f" There it is {phrase('time', ratio)}."


def phrase(word: str, ratio: float) -> str:
    """`2.0x fewer evaluations`, `1.9x as fast`, `the same evaluations`."""
    if word == "time":
        slower = f"{1 / ratio:.1f}x slower"
        return f"{ratio:.1f}x as fast" if ratio >= LEAST else slower if ratio * LEAST <= 1 else "as fast"
    if ratio >= LEAST:
        return f"{ratio:.1f}x fewer {word}"
    return f"{1 / ratio:.1f}x more {word}" if ratio * LEAST <= 1 else f"as many {word}"


def agreement(found: Figures, published: Figures) -> tuple[bool | None, str]:
    """Whether the figures measured here agree with the published ones, and a sentence. None: nothing to compare with.

    Judged as `verify` judges another machine: quality inside the interval widened by its own width, counts within 2 %.
    Times are shown as ratios and never judged.
    """
    shared = [key for key in found if key in published]
    if not shared:
        return None, "There is no published record to compare with."
    wrong = []
    changed = False
    for key in shared:
        # Also on the machine that published: nobody's tour has to repeat another run's every bit.
        seen = compare(published[key], found[key].model_copy(update={"machine": "tour"}))
        wrong += [f"{key[0]} at {key[1]:,}: {text}" for text in seen.differs]
        changed |= any(text.startswith("changed") for text in seen.notes)
    if not wrong:
        return True, f"Agrees with the published record{'s' if len(shared) > 1 else ''} ({len(shared)})."
    since = ", whose code has changed since" if changed else ""
    return False, f"Does not agree with the published record{since}: {'; '.join(wrong[:2])}."


def table(stop: Stop, found: Figures, published: Figures, task: Task) -> list[tuple[str, ...]]:
    """Rows of text: what was measured here, the published figure beside it; times as ratios to one cell of the same place."""
    metric = next(iter(task.metrics))
    costs = [("nfe", "evaluations"), *stop.costs]
    head: tuple[str, ...] = ("method", task.unit, f"{metric} here", "published")
    for _, word in costs:
        head += (f"{word} here", "published")
    rows: list[tuple[str, ...]] = [(*head, "ms an item", "relative time", "published")]
    order = [(name, rung) for name in (stop.baseline, stop.method) for rung in stop.rungs if (name, rung) in found]
    slowest = next((key for key in reversed(order) if key[0] == stop.baseline), None)
    for key in order:
        here, there = found[key], published.get(key)
        row: tuple[str, ...] = (
            key[0],
            f"{key[1]:,}",
            figure(here.quality[metric].value),
            figure(quality_of(there, metric)),
        )
        for name, _ in costs:
            row += (figure(here.counts.get(name)), figure(there.counts.get(name) if there else None))
        share = [figure(_share(side.get(key), side.get(slowest) if slowest else None)) for side in (found, published)]
        rows.append((*row, figure(per_item(here)), *share))
    return rows


def quality_of(record: Record | None, metric: str) -> float | None:
    """A metric of a record, if there is one."""
    return record.quality[metric].value if record is not None and metric in record.quality else None


def _share(record: Record | None, whole: Record | None) -> float | None:
    a, b = (per_item(r) if r else None for r in (record, whole))
    return a / b if a and b else None


def figure(x: float | None) -> str:
    """A number in three digits; a dash for none."""
    return "-" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


# measuring and merging -----------------------------------------------------------------------------------------------


def measure(
    stop: Stop, results: Path, device: str, workers: int, again: bool, told: Callable[[Record], None]
) -> list[Record]:
    """Run what a stop still lacks; every record of it that is there afterwards.

    Each worker has a core of its own, so that the method and its baseline are measured at the same time.
    """
    from stepmark import suite

    selection = suite.Selection(
        "embedded", methods=(stop.method, stop.baseline), tasks=(stop.task,), rungs=stop.rungs, seeds=(0,)
    )
    options = suite.Options(results=results, device=device, workers=workers, again=again, announce=lambda text: None)
    for record in suite.walk(selection, options):
        told(record)
    return [r for r in read_all(results) if (r.machine, r.device) == (machine_id(device), kind_of(device))]


@contextmanager
def with_published(results: Path, published: Path) -> Iterator[Path]:
    """A temporary results folder that holds the published records and those of the tour.

    Of a file that both have the published lines come first: where the tour repeats a cell on the machine that published
    it, the site sees two records of it, as after any repetition.
    """
    with TemporaryDirectory(prefix="stepmark-tour-") as name:
        merged = Path(name) / "results"
        shutil.copytree(published, merged, ignore=_no_files)
        for path in sorted(p for p in results.rglob("*") if p.is_file() and not p.is_symlink()):
            target = merged / path.relative_to(results)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copyfile(path, target)
            elif path.suffix == ".jsonl":
                have = target.read_text(encoding="utf-8").splitlines(keepends=True)
                new = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line not in have]
                target.write_text("".join(have + new), encoding="utf-8")
        yield merged


def _no_files(folder: str, names: Sequence[str]) -> list[str]:
    """Of the names in a folder those that are neither files nor folders, and that no copy should wait for."""
    paths = [Path(folder) / name for name in names]
    return [path.name for path in paths if path.is_symlink() or not (path.is_file() or path.is_dir())]


def task_of(stop: Stop) -> Task:
    """The task of a stop."""
    return plugins.tasks()[stop.task][1]
