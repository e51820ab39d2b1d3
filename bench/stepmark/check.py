"""`stepmark check`: the contract suite for one plugin, answering in plain words.

What is read from the source comes first (it costs nothing), then the plugin runs at tier smoke, audited. `scaffold`
writes the file that `stepmark new` starts an author with.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stepmark import plugins
from stepmark.audit import static_findings
from stepmark.method import Claim
from stepmark.places import results_folder
from stepmark.plugins import MethodInfo

if TYPE_CHECKING:
    from stepmark.claims import Verdict

TRIVIAL = 5.0  # a factor by which few methods beat another

COUNTS = {
    "nfe",
    "nfe_equivalent",
    "flops",
    "latency_ms",
    "memory_mib",
    "kv_bytes",
    "kv_read_bytes",
    "ranks",
    "rank_flops",
    "rounds",
    "sent_bytes",
    "sent_messages",
    "speedup",
}


def static(info: MethodInfo) -> Iterator[str]:
    """Faults that the source shows: names that do not exist, claims that cannot be evaluated, forbidden reach."""
    from stepmark.claims import ClaimError, parse

    tasks, methods = plugins.tasks(), plugins.methods()
    if len(info.doc.strip().splitlines()) < 3:
        yield "the docstring says too little: what the method does, its equations with their numbers, what differs and why"
    for task in info.tasks:
        if task not in tasks:
            yield f"tasks: {task!r} is not there; known in track {info.track}: " + ", ".join(
                t for t, (track, _) in tasks.items() if track == info.track
            )
        elif tasks[task][0] != info.track:
            yield f"tasks: {task!r} belongs to track {tasks[task][0]}; move the file to methods/{tasks[task][0]}/"
    for baseline in info.baselines:
        if baseline not in methods:
            yield f"baselines: there is no method {baseline!r} (stepmark list methods)"
        elif not set(info.tasks) & set(methods[baseline].tasks):
            yield f"baselines: {baseline} runs on none of this method's tasks"
    reference = info.base is not None or "baselines" in info.path.parts
    if not reference and info.paper is not None and info.baselines and not info.claims:
        yield "claims is empty; state what the paper claims, so that it can be checked"
    for claim in info.claims:
        task_id = claim.task or (info.tasks[0] if info.tasks else "")
        if task_id not in tasks:
            yield f"claim {claim.check!r}: there is no task {task_id!r}"
            continue
        problem = tasks[task_id][1]
        try:
            references = parse(claim.check).references()
        except ClaimError as error:
            yield f"claim {claim.check!r}: {error}"
            continue
        for metric, method, rungs in references:
            if method not in methods:
                yield f"claim {claim.check!r}: there is no method {method!r}"
            elif task_id not in methods[method].tasks:
                yield f"claim {claim.check!r}: {method} does not run on {task_id}"
            ends = [rungs] if isinstance(rungs, int) else [end for end in (rungs.first, rungs.last) if end is not None]
            for rung in ends:
                if rung not in problem.rungs:
                    yield f"claim {claim.check!r}: rung {rung} is not on the ladder of {task_id}: {problem.rungs}"
            if metric not in problem.metrics and metric not in COUNTS and not metric.startswith(_handles(task_id)):
                yield f"claim {claim.check!r}: {task_id} has no metric {metric!r}; it has {', '.join(problem.metrics)}"
    yield from static_findings(info.path)


def headline(info: MethodInfo) -> Iterator[str]:
    """Whether a paper of the catalogue states what its abstract boasts of, or says why it does not."""
    from stepmark.leaderboard.coverage import catalogue

    if info.base is not None or info.paper is None or info.unclaimed or any(claim.headline for claim in info.claims):
        return
    if info.paper.id in {entry.id for entry in catalogue()} and "baselines" not in info.path.parts:
        yield (
            "no claim is the headline: state what the abstract boasts of with headline=True, even where it fails, or say "
            'why there is none with unclaimed="..."'
        )


def narrow(info: MethodInfo) -> Iterator[str]:
    """Warnings of claims that stand at one rung of a longer ladder, where a winner can be picked."""
    from stepmark.claims import ClaimError, Span, parse

    for claim in info.claims:
        problem = plugins.tasks().get(claim.task or info.tasks[0], ("", None))[1]
        with contextlib.suppress(ClaimError):
            rungs = {reference.rung for reference in parse(claim.check).references()}
            if problem and len(problem.rungs) > 1 and len(rungs) == 1 and not isinstance(next(iter(rungs)), Span):
                yield f"claim {claim.check!r} stands at one rung of {len(problem.rungs)}: does it hold at each ([..,*])?"


def weak(claim: Claim, verdict: Verdict) -> Iterator[str]:
    """Warnings of what the records show: a claim that any method would meet, or one that n and seeds cannot tell."""
    if verdict.state == "inconclusive" and verdict.fraction is not None and 0.05 < verdict.fraction < 0.95:
        yield f"claim {claim.check!r}: its items and seeds cannot tell (it holds in {verdict.fraction:.0%} of the draws)"
    sizes = [abs(value) for value in verdict.values.values()]
    alike = len({name.partition("[")[0] for name in verdict.values}) == 1
    if verdict.holds and alike and len(sizes) == 2 and max(sizes) > TRIVIAL * min(sizes):
        yield f"claim {claim.check!r} holds by more than a factor of five: would a dumb control meet it too?"


def warnings(info: MethodInfo) -> list[str]:
    """What a reader should look at twice: nothing that keeps a plugin out."""
    from stepmark import admission
    from stepmark.leaderboard.rows import cells
    from stepmark.leaderboard.verdicts import verdicts

    found = list(narrow(info))
    results = results_folder("embedded")
    if info.claims and results.is_dir():
        rows = cells([r for r in admission.read(results)[0] if r.tier == "embedded"], plugins.tasks())
        for claim, by_place in verdicts(info, rows):
            found += [text for verdict in by_place.values() for text in weak(claim, verdict)]
    return list(dict.fromkeys(found))


def _handles(task: str) -> tuple[str, ...]:
    """Prefixes of per-item counts, `<handle>_evaluations` and the like."""
    return tuple(f"{role}_" for role in plugins.tasks()[task][1].backbones) or ("simulator_",)


def running(info: MethodInfo, device: str = "cpu", every_task: bool = True, fresh: bool = True) -> Iterator[str]:
    """Faults that show when the plugin runs at tier smoke: failures, wrong outputs, and what the audit flags."""
    from stepmark.cell import Cell
    from stepmark.run import measure

    for task_id in info.tasks if every_task else info.tasks[:1]:
        task = plugins.tasks()[task_id][1]
        for rung in task.ladder("smoke"):
            cell = Cell(info.id, task_id, rung, 0, "smoke")
            record = measure(cell, device, timing=False, show_progress=False)
            place = f"{task_id} at rung {rung}"
            if record.status == "failed":
                yield f"{place}: {record.message}"
                break
            yield from (f"{place}: {flag}" for flag in record.flags)
        else:
            if fresh and record.status != "skipped" and task_id == info.tasks[0]:
                other = _fresh_outputs(cell, device)
                if other != record.outputs:
                    yield f"{place}: a fresh process gave other outputs ({other}); something is left over between runs"


def _fresh_outputs(cell: object, device: str) -> str:
    code = (
        "import json, sys; from stepmark import hub; from stepmark.cell import Cell; from stepmark.run import measure; "
        "hub.restore(); c = json.loads(sys.argv[1]); "
        "print(measure(Cell(**c), sys.argv[2], False, False).outputs)"
    )
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    arguments = [sys.executable, "-c", code, json.dumps(vars(cell)), device]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-200:]


def check(path: Path, device: str = "cpu", run: bool = True) -> list[str]:
    """Everything wrong with the plugin at `path`, in plain words; [] when it keeps the contract."""
    path = path.resolve()
    if not path.exists():
        return [f"{path} is not there; give the file of a method, methods/<track>/<id>.py"]
    track = plugins.track_above(path)
    root = next((parent.parent for parent in path.parents if parent.name == track), path.parent.parent)
    if root not in plugins.method_folders():
        folders = [str(root), *filter(None, os.environ.get("STEPMARK_METHODS", "").split(os.pathsep))]
        os.environ["STEPMARK_METHODS"] = os.pathsep.join(folders)
    try:
        infos = plugins.read_methods(path)
        plugins.methods()
    except plugins.PluginError as error:
        return [str(error)]
    findings: list[str] = []
    for info in infos:
        own = [*static(info), *headline(info)]
        if run and not any(finding.startswith(("tasks:", "baselines:")) for finding in own):
            own += running(info, device)
        findings += [finding if info.base is None else f"variant {info.id}: {finding}" for finding in own]
    return list(dict.fromkeys(findings))


def warned(path: Path) -> list[str]:
    """Warnings of every method and variant in a file; [] where it cannot be read, which `check` says."""
    try:
        return [text for info in plugins.read_methods(path.resolve()) for text in warnings(info)]
    except (plugins.PluginError, OSError):
        return []


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

    paper = Paper(id="{id}", title="...", authors="...", year={year}, arxiv=None, code=None)
    tasks = ("{task}",)
    baselines = ("{baseline}",)
    claims = (Claim("{metric}[{id},{rung}] {better} {metric}[{baseline},{rung}]", says="better at {rung} {unit}"),)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> {returns}:
        """One call of the track: at most `rung` {unit} per item of `batch`."""
        raise ValueError("fill in run; the inputs and outputs of the track are described in tracks/{track}/__init__.py")
'''


def scaffold(target: Path) -> Path:
    """Write a new plugin for `methods/<track>/<id>.py` (suffix optional) that passes the check once `run` is filled in.

    Raises:
        ValueError: not such a path, an unknown track, a bad or taken id.
    """
    import datetime

    target = target if target.suffix == ".py" else target.with_name(target.name + ".py")
    track, name = plugins.track_above(target.resolve()), target.stem
    if track not in plugins.tracks():
        raise ValueError(
            f"{target}: the folder must be a track ({', '.join(plugins.tracks())}), such as methods/image/{name}"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]{1,63}", name):
        raise ValueError(f"{name!r} is no id: use small letters, digits and _, such as my_sampler")
    if target.exists() or name in plugins.methods():
        raise ValueError(f"there is a method {name!r} already; choose another id")
    task = next(t for owner, t in plugins.tasks().values() if owner == track)
    metric, better = next(iter(task.metrics.items()))
    baseline = next((m.id for m in plugins.methods().values() if m.track == track and task.id in m.tasks), "baseline")
    text = TEMPLATE.format(
        title=name.replace("_", " ").capitalize(),
        name="".join(part.capitalize() for part in name.split("_")),
        id=name,
        year=datetime.date.today().year,
        task=task.id,
        baseline=baseline,
        metric=metric,
        better="<" if better == "lower" else ">",
        rung=task.rungs[0],
        unit=task.unit,
        track=track,
        returns={"image": "Tensor", "decoding": "list[list[int]]"}.get(track, "Any"),
    )
    if "-> Tensor" not in text:
        text = text.replace("from torch import Tensor\n\n", "")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target
