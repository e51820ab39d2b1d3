"""From rows to the verdicts of claims."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from stepmark.leaderboard.rows import Place, Row, index, places

from stepmark import claims, plugins
from stepmark.method import Claim
from stepmark.plugins import MethodInfo
from stepmark.record import Record
from stepmark.stats import bootstrap_medians

Verdicts = list[tuple[Claim, dict[Place, claims.Verdict]]]
LATENCY_DRAWS = 100  # where a record has no quality resamples whose number could be followed


def claim_task(claim: Claim, info: MethodInfo) -> str:
    """The task a claim is evaluated on."""
    return claim.task or info.tasks[0]


def judge(claim: Claim, task: str, place: Place, found: Mapping[tuple[Place, str, str, int], Row]) -> claims.Verdict:
    """The verdict of a claim from the rows of one place; `found` is `index(rows)`."""
    try:
        check = claims.parse(claim.check)
    except claims.ClaimError as error:
        return claims.Verdict("not run", None, None, {}, 0, f"not run: {error}")
    references = check.references()
    needed = [found.get((place, task, r.method, r.rung)) for r in references]
    seeds = sorted(set.intersection(*(set(row.measured) if row else set() for row in needed)))

    def look(metric: str, method: str, rung: int) -> list[NDArray[np.float64]] | str:
        row = found.get((place, task, method, rung))
        if row is None:
            return "no record"
        if not row.ranked:
            return f"{row.status}: {'; '.join(row.notes)[:300] or 'no message'}"
        if not seeds:
            return "no noise seed that all figures of the claim share"
        figures = [_figure(row, row.measured[s], metric) for s in seeds]
        reason = row.reason(metric.removesuffix("_ms").removesuffix("_mib")) or "not measured"
        return reason if any(f is None for f in figures) else [f for f in figures if f is not None]

    def point(metric: str, method: str, rung: int) -> float | None:
        row = found[(place, task, method, rung)]
        if metric in row.first.quality:
            return float(np.mean([row.measured[s].quality[metric].value for s in seeds]))
        exact = {"latency_ms": row.latency_ms, "speedup": row.speedup}.get(metric)
        return exact.value if exact else None

    return claims.verdict(check, look, points=point)


def _figure(row: Row, record: Record, metric: str) -> NDArray[np.float64] | None:
    """One seed's figure for a claim: resamples of a metric or of a timing, length one for counts."""
    if metric in record.quality:
        return row.centred.get(metric, {}).get(record.seed)
    if metric in record.counts:
        return np.array([record.counts[metric]])
    if metric in {"latency_ms", "speedup"} and row.timed is not None:
        draws = max((tables[record.seed].size for tables in row.centred.values() if record.seed in tables), default=0)
        figures = _latency_resamples(row.timed, draws if draws > 1 else LATENCY_DRAWS, metric == "speedup")
        return figures if np.isfinite(figures).all() else None
    single = {"memory_mib": row.memory_mib, "joules": row.joules, "rounds": rounds(record)}.get(metric)
    if single is None:  # FLOPs and NFE-equivalents are counted at one seed and are the same at all
        single = next((r.counts[metric] for r in row.measured.values() if metric in r.counts), None)
    return None if single is None else np.array([single])


def _latency_resamples(record: Record, draws: int, against_baseline: bool = False) -> NDArray[np.float64]:
    """Bootstrap of the median ms per item [draws], or of the speed-up over the baseline's paired rounds."""
    latency = record.latency
    assert latency is not None
    own = np.asarray(latency.samples_ms or [latency.median_ms])
    medians = bootstrap_medians(own[None], draws)[0]
    if against_baseline:
        other = np.asarray(latency.baseline_samples_ms or [])
        if other.size != own.size:
            return np.full(draws, latency.speedup if latency.speedup is not None else np.nan)
        return bootstrap_medians(other[None], draws)[0] / np.maximum(medians, 1e-9)
    return medians / latency.items


def rounds(record: Record) -> float | None:
    """Network calls that follow each other in one `run` call: the depth of a method that evaluates several states of an
    item at once. None for a task that is not known, or where no network was called.
    """
    task = plugins.tasks().get(record.task, ("", None))[1]
    calls = sum(figures.get("calls", 0.0) for figures in record.handles.values())
    return calls / math.ceil(task.items(record.tier) / task.batch) if task and calls else None


def verdicts(
    info: MethodInfo, found: Sequence[Row], have: Mapping[tuple[Place, str, str, int], Row] | None = None
) -> Verdicts:
    """Every claim of a method with its verdict in every place that ran the method, best covered place first.

    `have` is `index(found)`, for those who ask for many methods.
    """
    have = index(found) if have is None else have
    where = places([row for row in found if row.method == info.id])
    return [
        (claim, {place: judge(claim, claim_task(claim, info), place, have) for place in where}) for claim in info.claims
    ]


def tally(judged: Verdicts) -> Counter[str]:
    """How many claims of a method got which verdict in its best covered place."""
    return Counter(next(iter(by.values())).state if by else "not run" for _, by in judged)
