"""Task pages: what is asked, on what data, how it is scored, and who answers."""

from __future__ import annotations

from collections.abc import Iterable

from stepmark.leaderboard import markup
from stepmark.leaderboard.markup import Cell, Line, esc, link, number, table
from stepmark.leaderboard.pages import Board, crumbs, element, slug, words
from stepmark.leaderboard.rows import headline

from stepmark import plugins


def index(found: Board) -> list[str]:
    """The table of all tasks."""
    lines = []
    for task_id, (track, task) in found.tasks.items():
        metric, _ = headline(task)
        live = {row.method for row in found.rows if row.task == task_id and row.measured}
        lines.append(
            Line(
                [
                    Cell(link(f"{slug(task_id)}.html", task_id), task_id),
                    Cell(link(f"../tracks/{track}.html", words(track)), track),
                    markup.text(task.summary),
                    markup.text(metric),
                    markup.text(task.unit),
                    markup.text(", ".join(map(str, task.rungs))),
                    number(len(live)),
                ]
            )
        )
    return [table(("Task", "Track", "What is asked", "First metric", "Unit", "Rungs", "Live methods"), lines, "Tasks")]


def page(found: Board, task_id: str) -> list[str]:
    """One task and its protocol."""
    track, task = found.tasks[task_id]
    dataset = plugins.datasets().get(task.dataset)
    data = f"{task.dataset}"
    if dataset:
        data = f"{dataset.id} v{dataset.version}: {dataset.summary}; licence {dataset.licence}"
    networks = ", ".join(f"{role} = {name}" for role, name in task.backbones.items()) or "none"
    judges = ", ".join(f"{role} = {name}" for role, name in task.judges.items()) or "none"
    bounded = "every network" if task.bounded == ("*",) else ", ".join(task.bounded)
    runners = sorted((m.id for m in found.methods.values() if task_id in m.tasks), key=found.kin)
    metrics = [f"{m} ({d} is better)" for m, d in task.metrics.items()]
    pairs = [
        ("Version", esc(task.version)),
        ("Data", esc(data)),
        ("Ladder", f"{', '.join(map(str, task.rungs))} {esc(task.unit)}"),
        ("Counts against the rung", esc(bounded)),
        (
            "Unit of NFE-equivalents",
            esc(f"one evaluation of {task.reference} per item" if task.reference else "none: no network"),
        ),
        ("Metrics, the first ranks", esc(", ".join(metrics))),
        ("Items, items per call, seeds", f"{task.n}, {task.batch}, {task.seeds}"),
        ("Networks a method gets", esc(networks)),
        ("Networks of the metrics", esc(judges)),
        ("Figures", link(f"../tracks/{track}.html#{slug(task_id)}", f"track {words(track).lower()}")),
        ("Methods", _linked(name for name in runners if not found.is_variant(name)) or "none yet"),
    ]
    if variants := _linked(name for name in runners if found.is_variant(name)):
        pairs.append(("Their variants", variants))
    return [
        crumbs(("index.html", "Tasks"), (f"../tracks/{track}.html", words(track)), (f"{slug(task_id)}.html", task_id)),
        element("p", esc(task.summary) + "."),
        markup.definitions(pairs),
    ]


def _linked(names: Iterable[str]) -> str:
    return ", ".join(link(f"../methods/{name}.html", name) for name in names)
