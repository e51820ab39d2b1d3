"""What a token costs: of rows whose outputs are texts, figures per token that was written.

At equal budgets a method that writes more in the same forwards takes longer, and its speed-up at that rung says nothing of
what a reader waits for. Here time and energy are over the tokens. Latency is read on the first batch, tokens are counted
over all items: the mean of the latter stands for the former.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stepmark.leaderboard.estimates import figure, sane
from stepmark.leaderboard.rows import Row


@dataclass(frozen=True)
class Pace:
    """None: not read.

    Attributes:
        tokens_per_forward: acceptance length, tokens written over target forwards, the prefill among them.
        ms_per_token, joules_per_token: of a whole text, over its tokens.
        speedup: milliseconds per token of the baseline over those of the method.
        first_ms: time to the first token, from the record at rung 1, which is the prefill alone.
        p95: 95th percentile of the rounds over their median.
    """

    tokens_per_forward: float | None
    ms_per_token: float | None
    joules_per_token: float | None
    speedup: float | None
    first_ms: float | None
    p95: float | None


HEAD = ("tok/forward", "ms/token", "J/token", "speed-up/token", "first token ms", "p95/median")


def pace(row: Row, rows: Iterable[Row]) -> Pace:
    """The pace of a row; `rows` hold its baseline, and the same method at rung 1."""
    latency = row.timed.latency if row.timed else None
    beside = {(r.method, r.rung): r for r in rows if (r.place, r.task) == (row.place, row.task)}
    base = beside.get((latency.baseline, row.rung)) if latency and latency.baseline else None
    first = beside.get((row.method, 1))
    energy = row.timed.energy if row.timed else None
    tokens = _tokens(row)
    speedup = None
    if row.speedup and base and tokens and (others := _tokens(base)):
        speedup = row.speedup.value * tokens / others
    return Pace(
        tokens_per_forward=_over(tokens, row.nfe),
        ms_per_token=_over(row.latency_ms.value if row.latency_ms else None, tokens),
        joules_per_token=_over(energy.joules / latency.items if energy and latency else None, tokens),
        speedup=sane(speedup),
        first_ms=first.latency_ms.value if first and first.latency_ms else None,
        p95=_over(latency.p95_ms, latency.median_ms) if latency else None,
    )


def _tokens(row: Row) -> float | None:
    return row.quality["tokens"].value if "tokens" in row.quality else None


def _over(a: float | None, b: float | None) -> float | None:
    return sane(a / b) if a is not None and b else None


def cells(found: Pace) -> tuple[str, ...]:
    """The figures as text, in the order of `HEAD`."""
    return (
        figure(found.tokens_per_forward),
        figure(found.ms_per_token),
        figure(found.joules_per_token),
        "-" if found.speedup is None else f"{figure(found.speedup)}x",
        figure(found.first_ms),
        figure(found.p95),
    )


def shown(rows: Sequence[Row]) -> bool:
    """Whether rows are of texts on somebody's checkpoint, where a token is what is paid for."""
    return any("tokens" in row.quality and row.place.checkpoint for row in rows)
