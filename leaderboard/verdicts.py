"""From rows to the verdicts of claims: what the records say of each, and what has to be read beside it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from stepmark.leaderboard.estimates import figure
from stepmark.leaderboard.rows import Place, Row, index, places, shared_seeds

from stepmark import claims, plugins
from stepmark.claims import TIMES, Span
from stepmark.method import Claim
from stepmark.plugins import MethodInfo
from stepmark.record import Offline, Record
from stepmark.stats import bootstrap_medians

Verdicts = list[tuple[Claim, dict[Place, claims.Verdict]]]
Found = Mapping[tuple[Place, str, str, int], Row]
LATENCY_DRAWS = 100  # where a record has no quality resamples whose number could be followed
UNEQUAL = 1.25  # a ratio of offline costs from which on a verdict says that its arms differ
LONG = 1.0  # seconds of preparing that are a training, in records of before updates and seeds of trainings were kept


def claim_task(claim: Claim, info: MethodInfo) -> str:
    """The task a claim is evaluated on."""
    return claim.task or info.tasks[0]


def judge(claim: Claim, info: MethodInfo, place: Place, found: Found) -> claims.Verdict:
    """The verdict of a claim of a method from the rows of one place; `found` is `index(rows)`.

    A claim over several rungs holds where it holds at each. One that rests on a single training is at best inconclusive,
    and one whose setting is not the paper's is never *not reproduced*.
    """
    task = claim_task(claim, info)
    try:
        check = claims.parse(claim.check)
        rungs = {span: _rungs(check, span, task, place, found) for span in check.spans}
    except (claims.ClaimError, ValueError) as error:
        return claims.Verdict("not run", None, None, {}, 0, f"not run: {error}")
    check = check.at(rungs) if rungs else check
    references = check.references()
    rows = {r: found.get((place, task, r.method, r.rung)) for r in references if not isinstance(r.rung, Span)}
    if lacks := missing({(r.method, r.rung): row for r, row in rows.items()}, task, place):  # type: ignore[misc]
        return claims.Verdict("not run", None, None, {}, 0, f"not run: {lacks}")
    measured = [row for row in rows.values() if row]
    seeds = shared_seeds(measured)

    def look(metric: str, method: str, rung: int) -> list[NDArray[np.float64]] | str:
        row = found[place, task, method, rung]
        if not row.ranked:
            return f"{row.status}: {'; '.join(row.notes)[:300] or 'no message'}"
        if not seeds:
            have = {f"{each.method} has the seeds {_listed(each.measured)}" for each in measured}
            return f"no seed that all figures of the claim share: {', '.join(sorted(have))}"
        if metric in TIMES:
            mine = row if metric == "speedup" else found.get((place, task, info.id, rung))
            if mine is None or mine.timed is None or mine.timed.latency is None:
                owner = method if metric == "speedup" else info.id
                return f"{owner} was not timed there, {_run_by([owner], task, [rung], place)}"
            times = _times(metric, method, info.id, mine.timed, row)
            return times if isinstance(times, str) else [times] * len(seeds)
        figures = [_figure(row, row.of(s), metric) for s in seeds]
        reason = row.reason(metric.removesuffix("_mib")) or "not measured"
        return reason if any(f is None for f in figures) else [f for f in figures if f is not None]

    def point(metric: str, method: str, rung: int) -> float | None:
        row = found[(place, task, method, rung)]
        if metric in row.first.quality:
            return float(np.mean([row.of(s).quality[metric].value for s in seeds]))
        return None

    verdict = claims.verdict(check, look, points=point)
    if verdict.state == "not run":
        return verdict
    notes = []
    for span, each in rungs.items():
        notes.append(f"{span}: at each of the rungs {', '.join(map(str, each))}")
    arms = [arm(row, method, seeds) for (method, row) in {r.method: row for r, row in rows.items() if row}.items()]
    notes += [*spent(arms), *unequal(arms)]
    alone = [each.method for each in arms if each.trainings == 1]
    if alone:
        notes.append(f"one training of {', '.join(alone)}")
        if verdict.state in {"reproduced", "not reproduced"}:
            verdict = replace(
                verdict, state="inconclusive", text=f"inconclusive, for it rests on one training: {verdict.text}"
            )
    if claim.setting and verdict.state == "not reproduced":
        verdict = replace(
            verdict, state="setting differs", text=verdict.text.replace("not reproduced", "setting differs", 1)
        )
    if claim.setting:
        notes.append(f"not the paper's setting: {claim.setting}")
    return replace(verdict, notes=tuple(notes))


def _rungs(check: claims.Check, span: Span, task: str, place: Place, found: Found) -> list[int]:
    """The rungs that a span of a claim speaks of.

    Raises:
        ValueError: there is none.
    """
    ladder = plugins.tasks()[task][1].rungs if task in plugins.tasks() else ()
    rungs = span.rungs(ladder)
    if not rungs:
        raise ValueError(f"no rung of {task} lies in {span}: it has {_listed(ladder)}")
    if span.first is None:  # all that the methods have in common
        methods = dict.fromkeys(r.method for r in check.references() if r.rung == span)
        have = {name: {rung: found.get((place, task, name, rung)) for rung in rungs} for name in methods}
        shared = [rung for rung in rungs if all((row := rows[rung]) and row.measured for rows in have.values())]
        if not shared:
            wanted = {(name, rung): row for name, rows in have.items() for rung, row in rows.items()}
            raise ValueError(
                f"no rung at which all were measured: {missing(wanted, task, place) or unmeasured(wanted)}"
            )
        return shared
    return rungs


def missing(wanted: Mapping[tuple[str, int], Row | None], task: str, place: Place) -> str:
    """Which rungs and seeds of which methods have no record, and the command that runs them; "" where none is missing.

    `wanted`: rows by (method, rung), None where there is none.
    """
    said: list[str] = []
    lacking: dict[str, set[int]] = {}
    for method in dict.fromkeys(name for name, _ in wanted):
        rows = {rung: row for (name, rung), row in wanted.items() if name == method}
        absent = [rung for rung, row in rows.items() if row is None]
        said += [f"{method} has no record at {_rungs_of(absent)}"] if absent else []
        partly: dict[str, list[int]] = {}
        for rung, row in rows.items():
            if row is not None and row.status == "incomplete":
                without = _listed(seed for seed in range(row.seeds) if seed not in row.records)
                partly.setdefault(f"{len(row.records)} of {row.seeds} seeds, without {without}", []).append(rung)
        said += [f"{method} has {seeds} at {_rungs_of(rungs)}" for seeds, rungs in partly.items()]
        lacking[method] = {*absent, *(rung for rungs in partly.values() for rung in rungs)}
    if not said:
        return ""
    said += [other] if (other := unmeasured(wanted)) else []
    methods = [method for method, rungs in lacking.items() if rungs]
    return f"{'; '.join(said)}; {_run_by(methods, task, set().union(*lacking.values()), place)}"


def _run_by(methods: Iterable[str], task: str, rungs: Iterable[int], place: Place) -> str:
    known = plugins.tasks().get(task)
    words = [f"--method {method}" for method in methods]
    words.append((known[1].words if known else "") or f"--task {task}")
    words += [f"--rung {rung}" for rung in sorted(rungs)]
    words += [f"--tier {place.tier}"] if place.tier not in {"embedded", "hub"} else []
    words += [f"--device {place.device}"] if place.device != "cpu" else []
    return f"what is missing is run by: stepmark run {' '.join(words)}"


def unmeasured(wanted: Mapping[tuple[str, int], Row | None]) -> str:
    """What was run and gave no figure to judge by, in words."""
    rows = [row for row in wanted.values() if row is not None and row.status in {"failed", "flagged", "skipped"}]
    return "; ".join(
        f"{r.method} at rung {r.rung} is {r.status}: {'; '.join(r.notes)[:100] or 'no message'}" for r in rows
    )


def _rungs_of(rungs: Collection[int]) -> str:
    return f"{'rung' if len(rungs) == 1 else 'rungs'} {_listed(rungs)}"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


# times ------------------------------------------------------------------------------------------


def _times(metric: str, method: str, owner: str, timed: Record, row: Row) -> NDArray[np.float64] | str:
    """Resamples of a method's time at a rung, from the rounds of the claim's own method; or why there are none."""
    assert timed.latency is not None
    if (cores := _beside_others(timed)) is not None:
        return cores
    latency = timed.latency
    draws = max((table.size for tables in row.centred.values() for table in tables.values()), default=0)
    draws = draws if draws > 1 else LATENCY_DRAWS
    if metric == "speedup":
        samples, other = latency.samples_ms, latency.baseline_samples_ms
        if not other or len(other) != len(samples):
            return "its times were taken beside no baseline's"
        own = bootstrap_medians(np.asarray(samples)[None], draws)[0]
        return bootstrap_medians(np.asarray(other)[None], draws)[0] / np.maximum(own, 1e-9)
    found = latency.samples_ms if method == owner else latency.beside.get(method)
    if found is None and method == latency.baseline:
        found = latency.baseline_samples_ms
    if not found:
        return f"its times were not taken in turns with those of {owner}"
    return bootstrap_medians(np.asarray(found)[None], draws)[0] / latency.items


def _beside_others(record: Record) -> str | None:
    """Why a record's times are no times of a device that was alone; None where they are."""
    usable, cores = record.environment.get("usable_cores"), record.environment.get("logical_cores")
    if record.device == "cpu" and usable != cores:
        return f"timed on {usable} of {cores} cores, beside whatever ran on the others"
    return None


# arms -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """What one side of a claim cost before its first call, in the mean over its trainings; `trainings`: how many the
    verdict rests on, 0 where nothing was trained.
    """

    method: str
    evaluations: float
    updates: float | None
    seconds: float
    trainings: int


def arm(row: Row, method: str, seeds: Sequence[int]) -> Arm:
    """From the records of the seeds that a verdict rests on."""
    costs = [cost for s in seeds if (cost := row.of(s).offline) is not None]
    if not costs:
        return Arm(method, 0.0, 0.0, 0.0, 0)
    made = {cost.seed for cost in costs if _trains(cost)}
    updates = [cost.updates for cost in costs if cost.updates is not None]
    return Arm(
        method,
        float(np.mean([sum(cost.evaluations.values()) for cost in costs])),
        float(np.mean(updates)) if updates else None,
        float(np.mean([cost.seconds for cost in costs])),
        len(made),
    )


def _trains(cost: Offline) -> bool:
    """Whether another seed would have been another training."""
    return cost.seed is not None if cost.updates is not None else cost.seconds > LONG


def spent(arms: Sequence[Arm]) -> list[str]:
    """What each arm that was prepared at all has cost, in words."""
    told = []
    for each in arms:
        costs = [(each.evaluations, " evaluations"), (each.updates or 0.0, " updates"), (each.seconds, " s")]
        if each.trainings or each.seconds > LONG:
            told.append(f"{each.method} {', '.join(f'{figure(cost)}{unit}' for cost, unit in costs if cost)}")
    return [f"offline: {'; '.join(told)}"] if told else []


def unequal(arms: Sequence[Arm]) -> list[str]:
    """In words what differs by more than a quarter between the arms that were prepared at all."""
    found = []
    for name in ("evaluations", "updates", "seconds"):
        costs = {each.method: float(getattr(each, name) or 0) for each in arms if each.seconds > LONG}
        costs = {method: cost for method, cost in costs.items() if cost > 0}
        if len(costs) > 1 and max(costs.values()) > UNEQUAL * min(costs.values()):
            unit = " s" if name == "seconds" else f" offline {name}"
            found.append("unequal arms: " + ", ".join(f"{m} {figure(cost)}{unit}" for m, cost in costs.items()))
    return found


# other figures ----------------------------------------------------------------------------------


def _figure(row: Row, record: Record, metric: str) -> NDArray[np.float64] | None:
    """One seed's figure for a claim: resamples of a metric, length one for counts."""
    if metric in record.quality:
        return row.centred.get(metric, {}).get(record.seed)
    if metric in record.counts:
        return np.array([record.counts[metric]])
    single = {"memory_mib": row.memory_mib, "joules": row.joules, "rounds": rounds(record)}.get(metric)
    if single is None:  # FLOPs and NFE-equivalents are counted at one seed and are the same at all
        single = next((r.counts[metric] for r in row.measured.values() if metric in r.counts), None)
    return None if single is None else np.array([single])


def rounds(record: Record) -> float | None:
    """Network calls that follow each other in one `run` call: the depth of a method that evaluates several states of an
    item at once. None for a task that is not known, or where no network was called.
    """
    task = plugins.tasks().get(record.task, ("", None))[1]
    calls = sum(figures.get("calls", 0.0) for figures in record.handles.values())
    return calls / math.ceil(task.items(record.tier) / task.batch) if task and calls else None


def verdicts(info: MethodInfo, found: Sequence[Row], have: Found | None = None) -> Verdicts:
    """Every claim of a method with its verdict in every place that ran the method: best covered place first, those where
    the claim could not be judged last, for times may be of one machine and further seeds of another.

    `have` is `index(found)`, for those who ask for many methods.
    """
    have = index(found) if have is None else have
    where = places([row for row in found if row.method == info.id])
    judged = [(claim, {place: judge(claim, info, place, have) for place in where}) for claim in info.claims]
    return [(claim, dict(sorted(by.items(), key=lambda each: each[1].state == "not run"))) for claim, by in judged]


def tally(judged: Verdicts) -> Counter[str]:
    """How many claims of a method got which verdict, in the first place of each."""
    return Counter(next(iter(by.values())).state if by else "not run" for _, by in judged)


def headlines(judged: Verdicts) -> Verdicts:
    """What a paper's abstract boasts of, of all its claims."""
    return [(claim, by) for claim, by in judged if claim.headline]
