"""What a token costs: of rows whose outputs are texts, figures per token that was written.

At equal budgets a method that writes more in the same forwards takes longer, and its speed-up at that rung says nothing of
what a reader waits for. Here time and energy are over the tokens that the timed calls wrote, prompt by prompt; in records of
before these were kept, over the mean of all items.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from stepmark.leaderboard.estimates import figure, sane
from stepmark.leaderboard.rows import Row


@dataclass(frozen=True)
class Pace:
    """None: not read.

    Attributes:
        tokens_per_forward: acceptance length, tokens written over target forwards, the prefill among them.
        ms_per_token, joules_per_token: of whole texts, over their tokens.
        p95_ms_per_token: 95th percentile over the timed calls, each over its tokens.
        speedup: milliseconds per token of the baseline over those of the method.
        first_ms: time to the first token, from the record at rung 1, which is the prefill alone.
    """

    tokens_per_forward: float | None
    ms_per_token: float | None
    p95_ms_per_token: float | None
    joules_per_token: float | None
    speedup: float | None
    first_ms: float | None


HEAD = ("tok/forward", "ms/token", "p95 ms/token", "J/token", "speed-up/token", "first token ms")


def pace(row: Row, rows: Iterable[Row]) -> Pace:
    """The pace of a row; `rows` hold its baseline, and the same method at rung 1."""
    latency = row.timed.latency if row.timed else None
    beside = {(r.method, r.rung): r for r in rows if (r.place, r.task) == (row.place, row.task)}
    base = beside.get((latency.baseline, row.rung)) if latency and latency.baseline else None
    first = beside.get((row.method, 1))
    energy = row.timed.energy if row.timed else None
    mean = row.quality["tokens"].value if "tokens" in row.quality else None
    own = their = p95 = None
    if latency:
        own = _ms_per_token(latency.samples_ms, latency.tokens, mean, latency.items)
        p95 = _p95(latency.samples_ms, latency.tokens)
        others = base.quality["tokens"].value if base and "tokens" in base.quality else None
        their = _ms_per_token(latency.baseline_samples_ms or [], latency.baseline_tokens, others, latency.items)
    return Pace(
        tokens_per_forward=_over(mean, row.nfe),
        ms_per_token=own,
        p95_ms_per_token=p95,
        joules_per_token=_over(energy.joules / latency.items if energy and latency else None, mean),
        speedup=_over(their, own),
        first_ms=first.latency_ms.value if first and first.latency_ms else None,
    )


def _ms_per_token(samples: Sequence[float], tokens: Sequence[int], mean: float | None, items: int) -> float | None:
    """Milliseconds of all calls over the tokens that they wrote; where these were not kept, of the median call over the
    mean tokens of its items."""
    if tokens and len(tokens) == len(samples):
        return _over(math.fsum(samples), float(sum(tokens)))
    return _over(median(samples), mean * items) if samples and mean else None


def _p95(samples: Sequence[float], tokens: Sequence[int]) -> float | None:
    if not tokens or len(tokens) != len(samples) or not all(tokens):
        return None
    return sane(float(np.quantile(np.array(samples) / np.array(tokens), 0.95)))


def _over(a: float | None, b: float | None) -> float | None:
    return sane(a / b) if a is not None and b else None


def figures(found: Pace) -> tuple[float | None, ...]:
    """The figures in the order of `HEAD`."""
    return (
        found.tokens_per_forward,
        found.ms_per_token,
        found.p95_ms_per_token,
        found.joules_per_token,
        found.speedup,
        found.first_ms,
    )


def cells(found: Pace) -> tuple[str, ...]:
    """The figures as text, in the order of `HEAD`."""
    texts = [figure(value) for value in figures(found)]
    at = HEAD.index("speed-up/token")
    texts[at] = "-" if found.speedup is None else f"{texts[at]}x"
    return tuple(texts)


def shown(rows: Sequence[Row]) -> bool:
    """Whether rows are of texts on somebody's checkpoint, where a token is what is paid for."""
    return any("tokens" in row.quality and row.place.checkpoint for row in rows)
