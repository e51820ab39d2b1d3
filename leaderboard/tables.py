"""`stepmark show` and `stepmark compare`: rows and comparisons as aligned text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from stepmark.leaderboard import pace
from stepmark.leaderboard.comparisons import comparisons, in_a_sentence
from stepmark.leaderboard.estimates import figure, with_interval
from stepmark.leaderboard.groups import assign_groups
from stepmark.leaderboard.rows import Row, headline, homes, lenders, newest, rows_of, split

from stepmark import plugins
from stepmark.admission import LeftOut, from_folders, sorted_out
from stepmark.record import Record

MOST_REASONS = 10  # why records are left out that a table tells


def show(records: Sequence[Record], metrics: Sequence[str] = (), seeds: int | None = None) -> str:
    """An aligned table per task and machine: best first at each rung, groups instead of ranks. Newest suite, any tier.

    `metrics`: these, where a task has them, and groups by the first of them (default: the first of each task). `seeds`:
    how many were asked for, where those of the task are not all wanted. What the board leaves out is named below.
    """
    known = from_folders(records) | plugins.tasks()
    taken, others = sorted_out(records, known)
    current = newest(taken)
    found = rows_of(current, known, homes((r.device, r.machine) for r in current))
    for row in found:
        row.seeds = row.seeds if seeds is None else min(row.seeds, seeds)
    methods = plugins.methods()
    blocks: list[str] = []
    for (place, task_id), mine in split(found, "place", "task").items():
        task = known[task_id][1]
        shown = [name for name in metrics if name in task.metrics] if metrics else [headline(task)[0]]
        if not shown:
            continue
        assign_groups(mine, known, shown[0])

        def order(
            row: Row, metric: str = shown[0], higher: bool = task.metrics[shown[0]] == "higher"
        ) -> tuple[Any, ...]:
            value = row.quality[metric].value if metric in row.quality else 0.0
            return (row.rung, row.group or 10**6, -value if higher else value, row.method)

        better = [f"{metric} ({task.metrics[metric]} is better)" for metric in shown]
        head = ("rung", "group", "method", *better, "NFE", "NFE-eq", "ms/item", "speed-up", "peak MiB", "status")
        texts = pace.shown(mine)  # on a checkpoint: what a token costs stands beside
        head = (*head[:-1], *(pace.HEAD if texts else ()), head[-1])
        body = [
            (
                str(row.rung),
                str(row.group or "-"),
                ("  " if row.method in methods and methods[row.method].base else "") + row.method,
                *(with_interval(row.quality.get(metric)) for metric in shown),
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
        if origin := mine[0].first.environment.get("checkpoint"):  # two folders of one name make two tables
            title += f"\n{_printable(origin)}"
        elsewhere = [lenders(mine)] if lenders(mine) else []
        blocks.append("\n".join([title, *lines, *elsewhere]))
    return "\n\n".join([*blocks, *left_out(others)]) or "no records"


def left_out(others: Sequence[LeftOut]) -> list[str]:
    """What the board does not take in, in a block of lines; [] if there is nothing."""
    if not others:
        return []
    counted = Counter((each.record.method, each.why) for each in others)
    lines = [
        f"  {name}: {why}" + (f" ({n} records)" if n > 1 else "")
        for (name, why), n in counted.most_common(MOST_REASONS)
    ]
    more = [f"  and {len(counted) - MOST_REASONS} further reasons"] if len(counted) > MOST_REASONS else []
    records = f"{len(others)} record{'s' if len(others) > 1 else ''}"
    return ["\n".join([f"left out, neither ranked nor compared: {records}", *map(_printable, lines), *more])]


def compare(records: Sequence[Record], a: str, b: str, track: str | None = None, metric: str | None = None) -> str:
    """Paired tests of two methods as an aligned table, with a plain sentence at the end. `metric`: this one, on the tasks
    that have it (default: the first of each task).

    Raises:
        ValueError: a method without records, or the same method twice.
    """
    found = comparisons(records, a, b, track, metric)
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
            metric or headline(known[c.task][1])[0],
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
