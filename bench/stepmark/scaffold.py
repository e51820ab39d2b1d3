"""`stepmark new`: the file that an author starts with, valid but for what only its author knows."""

from __future__ import annotations

import datetime
import os
import re
from collections import Counter
from pathlib import Path

from stepmark import plugins
from stepmark.names import meant, unknown
from stepmark.task import Task

LEFT_OVER = (  # lines of the template's docstring, which `check` asks to replace
    "one line that says what it does.",
    "the update rule with the paper's equation or algorithm numbers.",
    "what, and why (delete this line if nothing does).",
)

TEMPLATE = '''"""{title}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stepmark import Claim, Method, Paper
from stepmark.session import Session


class {name}(Method):
    """{title}: one line that says what it does.

    Algorithm: the update rule with the paper's equation or algorithm numbers.

    Differs from the paper: what, and why (delete this line if nothing does).
    """

    # The catalogue's id; what is nobody's paper is a reference point: stepmark new --baseline.
    paper = Paper(id="{id}", title="...", authors="...", year={year}, arxiv=None, code=None)
    tasks = ("{task}",)  # stepmark list tasks
    baselines = ("{baseline}",)
    claims = (
        Claim(
            "{check}",
            says="{says}",
            headline=True,
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> {returns}:
        """One call of the track: at most `rung` {unit} per item of `batch`."""
        raise ValueError(
            "fill in run; docs/add-a-method.md has examples, stepmark.tracks.{track} says what it gets and returns"
        )
'''

# What the file of a reference point says otherwise: it has no paper, so that nothing is a headline of one.
OF_A_BASELINE = (
    ("from stepmark import Claim, Method, Paper", "from stepmark import Claim, Method"),
    ("\n    Differs from the paper: what, and why (delete this line if nothing does).\n", ""),
    ("            headline=True,\n", ""),
)


def scaffold(target: Path, task_id: str | None = None, baseline: bool = False) -> Path:
    """Write a new plugin for `methods/<track>/<id>.py` (suffix optional). With `baseline`, or below a folder of that name,
    it is a reference point without a paper, and stands in `methods/<track>/baselines/`.

    Raises:
        ValueError: not such a path, an unknown track, a bad or taken id. KeyError: no such task in this track.
    """
    target = target if target.suffix == ".py" else target.with_name(target.name + ".py")
    track, name = plugins.track_above(target.resolve()), target.stem
    if track not in plugins.tracks():
        guess = meant(track, plugins.tracks())
        raise ValueError(
            f"{target}: the folder must be a track ({', '.join(plugins.tracks())}), such as methods/image/{name}"
            + (f"; {guess}" if guess else "")
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]{1,63}", name):
        raise ValueError(f"{name!r} is no id: use small letters, digits and _, such as my_sampler")
    among = among_baselines(target)
    if baseline and not among:
        placed = folder_of(target) / track / "baselines" / target.name
        target = placed if target.is_absolute() else Path(os.path.relpath(placed))
    if target.exists() or name in plugins.methods():
        raise ValueError(f"there is a method {name!r} already; choose another id")
    of_track = {t.id: t for owner, t in plugins.tasks().values() if owner == track}
    if task_id is not None and task_id not in of_track:
        raise KeyError(f"{unknown('task', task_id, of_track, 'stepmark list tasks')}, in track {track}")
    task = of_track[task_id or next(iter(of_track))]
    check, says = first_claim(task, name, usual_baseline(task.id))
    text = TEMPLATE.format(
        title=name.replace("_", " ").capitalize(),
        name="".join(part.capitalize() for part in name.split("_")),
        id=name,
        year=datetime.date.today().year,
        task=task.id,
        baseline=usual_baseline(task.id),
        check=check,
        says=says,
        unit=task.unit,
        track=track,
        returns={"image": "Tensor", "decoding": "list[list[int]]"}.get(track, "Any"),
    )
    if baseline or among:
        for here, there in OF_A_BASELINE:
            text = text.replace(here, there)
        text = re.sub(r"    # The catalogue's id;.*\n    paper = .*\n", "    paper = None\n", text)
    if "-> Tensor" not in text:
        text = text.replace("from torch import Tensor\n\n", "")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return target


def folder_of(path: Path) -> Path:
    """The folder of methods that a plugin lies in: the one that holds its track's folder."""
    path = path.resolve()
    track = plugins.track_above(path)
    return next((parent.parent for parent in path.parents if parent.name == track), path.parent.parent)


def among_baselines(path: Path) -> bool:
    """Whether a plugin lies among the reference points of its track, wherever the folder of methods itself lies."""
    return "baselines" in path.resolve().relative_to(folder_of(path)).parts


def first_claim(task: Task, name: str, baseline: str) -> tuple[str, str]:
    """The claim that a new file starts with, and what it says: one that can hold at each of its rungs, and fail.

    Where texts are scored when they are finished (`accuracy`), nobody has one at the least budgets and all have the same at
    the greatest: what stands there is how far the text has come, at the rungs between.
    """
    metric, better = next(iter(task.metrics.items()))
    span, says = "*", "better at every budget"
    if metric == "accuracy" and task.unit == "target forwards":
        between = [rung for rung in task.rungs if 1 < rung < task.rungs[-1]]
        written = next((each for each in ("first_divergence", "tokens") if task.metrics.get(each) == "higher"), None)
        if len(between) > 1 or (between and written):
            span = str(between[0]) if len(between) == 1 else f"{between[0]}..{between[-1]}"
            says = "better at every budget but the greatest, at which all may be done"
        metric = written or metric
    sign = "<" if better == "lower" else ">"
    return f"{metric}[{name},{span}] {sign} {metric}[{baseline},{span}]", says


def usual_baseline(task_id: str) -> str:
    """What most methods on a task are compared with, of what runs on it; else a reference point of the task."""
    there = {m.id: m for m in plugins.methods().values() if task_id in m.tasks}
    named = Counter(b for m in there.values() if m.base is None for b in m.baselines if b in there)
    references = [m.id for m in there.values() if not m.baselines]
    return next((b for b, _ in named.most_common(1)), next(iter(references), next(iter(there), "")))
