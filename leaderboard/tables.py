"""`stepmark show` and `stepmark compare`: rows and comparisons as aligned text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepmark.leaderboard import pace
from stepmark.leaderboard.comparisons import comparisons, in_a_sentence
from stepmark.leaderboard.estimates import figure, with_interval
from stepmark.leaderboard.groups import grouped
from stepmark.leaderboard.rows import Row, from_folders, headline, newest, split

from stepmark import plugins
from stepmark.record import Record


def show(records: Sequence[Record]) -> str:
    """An aligned table per task and machine: best first at each rung, groups instead of ranks. Newest suite, any tier."""
    known = from_folders(records) | plugins.tasks()
    found = grouped(newest(records), known)
    blocks: list[str] = []
    for (place, task_id), mine in split(found, "place", "task").items():
        task = known[task_id][1]
        metric, higher = headline(task)

        def order(row: Row, metric: str = metric, higher: bool = higher) -> tuple[Any, ...]:
            value = row.quality[metric].value if metric in row.quality else 0.0
            return (row.rung, row.group or 10**6, -value if higher else value, row.method)

        better = f"{metric} ({task.metrics[metric]} is better)"
        head = ("rung", "group", "method", better, "NFE", "NFE-eq", "ms/item", "speed-up", "peak MiB", "status")
        texts = pace.shown(mine)  # on a checkpoint: what a token costs stands beside
        head = (*head[:-1], *(pace.HEAD if texts else ()), head[-1])
        body = [
            (
                str(row.rung),
                str(row.group or "-"),
                row.method,
                with_interval(row.quality.get(metric)),
                figure(row.nfe),
                figure(row.nfe_equivalent),
                figure(row.latency_ms.value if row.latency_ms else None),
                f"{figure(row.speedup.value)}x" if row.speedup else "-",
                figure(row.memory_mib),
                *(pace.cells(pace.pace(row, mine)) if texts else ()),
                _printable(row.status + (f": {row.notes[0][:80]}" if row.notes else "")),
            )
            for row in sorted(mine, key=order)
        ]
        lines = _aligned(head, body, (1, 2, len(head) - 1))
        title = f"{task_id} v{task.version} on {place}; rungs in {task.unit}"
        if task.origin:
            title += f"\n{_printable(task.origin)}"
        blocks.append(f"{title}\n" + "\n".join(lines))
    unknown = sorted({r.task for r in records if r.task not in known})
    if unknown:
        blocks.append(f"left out: records of tasks that are not in this checkout ({', '.join(unknown)})")
    return "\n\n".join(blocks) or "no records"


def compare(records: Sequence[Record], a: str, b: str, track: str | None = None) -> str:
    """Paired tests of two methods as an aligned table, with a plain sentence at the end.

    Raises:
        ValueError: a method without records, or the same method twice.
    """
    found = comparisons(records, a, b, track)
    if not found.tests:
        return in_a_sentence(found, a, b, track)
    known = from_folders(records) | plugins.tasks()
    head = (
        "task", "machine", "rung", "metric", f"{a} - {b}", "95 % interval", "p (Holm)", "effect", "better",
        "latency ratio",
    )  # fmt: skip
    body = [
        (
            c.task,
            str(c.place),
            str(c.rung),
            headline(known[c.task][1])[0],
            figure(c.difference),
            f"[{figure(c.low)}, {figure(c.high)}]",
            f"{c.p:.3f}" if c.p >= 0.001 else "<0.001",
            figure(c.effect),
            c.winner or "tied",
            figure(c.latency_ratio),
        )
        for c in found.tests
    ]
    return "\n".join(_aligned(head, body, (0, 1, 3, 8))) + "\n\n" + in_a_sentence(found, a, b)


def _aligned(head: Sequence[str], body: Sequence[Sequence[str]], left: tuple[int, ...]) -> list[str]:
    table = (head, *body)
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]

    def cell(text: str, i: int) -> str:
        return text.ljust(widths[i]) if i in left else text.rjust(widths[i])

    return ["  ".join(cell(text, i) for i, text in enumerate(line)).rstrip() for line in table]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
