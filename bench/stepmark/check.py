"""`stepmark check`: the contract suite for one plugin, answering in plain words.

What is read from the source comes first (it costs nothing), then the plugin runs at tier smoke, audited.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from stepmark import plugins
from stepmark.audit import static_findings
from stepmark.method import Claim
from stepmark.names import meant, unknown
from stepmark.places import checkout, results_folder
from stepmark.plugins import MethodInfo
from stepmark.scaffold import LEFT_OVER, among_baselines, folder_of
from stepmark.syntax import parse as parse_source

if TYPE_CHECKING:
    from stepmark.claims import Reference, Verdict

TRIVIAL = 5.0  # a factor by which few methods beat another
LISTED = "stepmark list methods"

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


def unfilled(info: MethodInfo) -> Iterator[str]:
    """What still stands there as the template, or nobody, left it."""
    if info.base is None and info.paper is not None:
        for name, value in (("title", info.paper.title), ("authors", info.paper.authors), ("id", info.paper.id)):
            if not value.strip(". \u2026"):
                yield f"paper: {name}={value!r} says nothing; fill it in, or write paper = None where there is no paper"
    if any(line in info.doc for line in LEFT_OVER):
        yield "the docstring is still the template's: say what the method does, and its update rule"
    for claim in info.claims:
        if not claim.says.strip(". \u2026"):
            yield f"claim {claim.check!r}: says={claim.says!r} says nothing; say the same in words"


def static(info: MethodInfo) -> Iterator[str]:
    """Faults that the source shows: names that do not exist, claims that cannot be evaluated, forbidden reach."""
    from stepmark.claims import ClaimError, parse

    tasks, methods = plugins.tasks(), plugins.methods()
    yield from unfilled(info)
    if len(info.doc.strip().splitlines()) < 3:
        yield "the docstring says too little: what the method does, its equations with their numbers, what differs and why"
    for task in info.tasks:
        if task not in tasks:
            of_track = [t for t, (track, _) in tasks.items() if track == info.track]
            yield f"tasks: {unknown('task', task, of_track, f'stepmark list tasks | grep {info.track}')}"
        elif tasks[task][0] != info.track:
            yield f"tasks: {task!r} belongs to track {tasks[task][0]}; move the file to methods/{tasks[task][0]}/"
    for baseline in info.baselines:
        if baseline not in methods:
            yield f"baselines: {unknown('method', baseline, methods, LISTED)}"
        elif baseline == info.id:
            yield f"baselines: {baseline} is the method itself; name what it is compared with"
        elif not set(info.tasks) & set(methods[baseline].tasks):
            yield f"baselines: {baseline} runs on none of this method's tasks"
    reference = info.base is not None or among_baselines(info.path)
    if not reference and info.paper is not None and info.baselines and not info.claims:
        yield "claims is empty; state what the paper claims, so that it can be checked"
    for claim in info.claims:
        task_id = claim.task or (info.tasks[0] if info.tasks else "")
        if task_id not in tasks:
            yield f"claim {claim.check!r}: {unknown('task', task_id, tasks, 'stepmark list tasks')}"
            continue
        problem = tasks[task_id][1]
        try:
            references = parse(claim.check).references()
        except ClaimError as error:
            yield f"claim {claim.check!r}: {error}"
            continue
        for metric, method, rungs in references:
            if method not in methods:
                yield f"claim {claim.check!r}: {unknown('method', method, methods, LISTED)}"
            elif task_id not in methods[method].tasks:
                yield f"claim {claim.check!r}: {method} does not run on {task_id}; {_both_run(info, claim, references)}"
            ends = [rungs] if isinstance(rungs, int) else [end for end in (rungs.first, rungs.last) if end is not None]
            for rung in ends:
                if rung not in problem.rungs:
                    yield f"claim {claim.check!r}: rung {rung} is not on the ladder of {task_id}: {problem.rungs}"
            if metric not in problem.metrics and metric not in COUNTS and not metric.startswith(_handles(task_id)):
                guess = meant(metric, [*problem.metrics, *COUNTS])
                said = guess or f"it has {', '.join(problem.metrics)}"
                yield f"claim {claim.check!r}: {task_id} has no metric {metric!r}; {said}"
    yield from static_findings(info.path)


def _both_run(info: MethodInfo, claim: Claim, references: Iterable[Reference]) -> str:
    """The mend of a claim on a task that one of its methods does not run on."""
    methods = plugins.methods()
    task_id = claim.task or info.tasks[0]
    asked = {each.method for each in references if each.method in methods}
    candidates = dict.fromkeys([*info.tasks, *plugins.tasks()])  # its own first
    shared = [task for task in candidates if all(task in methods[each].tasks for each in asked)]
    lacking = sorted(each for each in asked if task_id not in methods[each].tasks)
    mends = [f"add {task_id!r} to tasks"] if lacking == [info.id] else []
    mends += [f"write task={shared[0]!r}, where all that it names run"] if shared else []
    return ", or ".join(mends) or "name methods that share a task: these have none in common"


def headline(info: MethodInfo) -> Iterator[str]:
    """Whether a paper's method states what its abstract boasts of, or says why it does not."""
    if info.base is not None or info.paper is None or info.unclaimed or any(claim.headline for claim in info.claims):
        return
    if not among_baselines(info.path):
        yield (
            "no claim is the headline: state what the abstract boasts of with headline=True, even where it fails, or say "
            'why there is none with unclaimed="..."'
        )


def misplaced(info: MethodInfo) -> Iterator[str]:
    """Whether a file of this checkout stands where its row is looked for: a paper's under its id in the catalogue, whatever
    is nobody's row among the baselines."""
    from stepmark.leaderboard.coverage import catalogue

    root = checkout()
    if info.base is not None or root is None or not info.path.resolve().is_relative_to((root / "methods").resolve()):
        return
    rows, reference = {entry.id for entry in catalogue()}, among_baselines(info.path)
    if reference and info.id in rows:
        yield f"{info.id} is a paper of the catalogue, no reference point: move its file to methods/{info.track}/"
    elif not reference and info.id not in rows:
        yield (
            f"{info.id} is no id of leaderboard/catalogue.jsonl: name the file after its paper's id there, add the paper's "
            f"line, or move the file to methods/{info.track}/baselines/, where what is nobody's row stands"
        )
    elif not reference and (info.paper is None or info.paper.id != info.id):
        yield f"paper: write Paper(id={info.id!r}), as the file and the catalogue call it"


def narrow(info: MethodInfo) -> Iterator[str]:
    """Warnings of comparisons that stand at one rung of a longer ladder, where a winner can be picked."""
    from stepmark.claims import ClaimError, Span, parse

    for claim in info.claims:
        problem = plugins.tasks().get(claim.task or info.tasks[0], ("", None))[1]
        with contextlib.suppress(ClaimError):
            for part in parse(claim.check).comparisons():
                rungs = {reference.rung for reference in part.references()}
                if problem and len(problem.rungs) > 1 and len(rungs) == 1 and not isinstance(next(iter(rungs)), Span):
                    rung = next(iter(rungs))
                    yield (
                        f"claim {claim.check!r} stands at one rung, {rung}, of {len(problem.rungs)}: "
                        "does it hold at each ([..,*])?"
                    )


def weak(claim: Claim, verdict: Verdict) -> Iterator[str]:
    """Warnings of what the records show: a claim that any method would meet, or one that n and seeds cannot tell."""
    if verdict.state == "inconclusive" and verdict.fraction is not None and 0.05 < verdict.fraction < 0.95:
        yield f"claim {claim.check!r}: its items and seeds cannot tell (it holds in {verdict.fraction:.0%} of the draws)"
    for note in verdict.notes:
        if note.startswith("one training of"):
            yield f"claim {claim.check!r} rests on {note}: trainings = 3 in a class trains it three times"
    pairs = list(_pairs(verdict.values))
    if verdict.holds and pairs and all(max(pair) > TRIVIAL * min(pair) for pair in pairs):
        yield f"claim {claim.check!r} holds by more than a factor of five: would a dumb control meet it too?"


def _pairs(values: Mapping[str, float]) -> Iterator[list[float]]:
    """Sizes of the figures of one metric that a claim compares at a rung, of its only two where these are all; of figures
    that are not two by two none."""
    of: dict[tuple[str, str], list[float]] = {}
    for name, value in values.items():
        metric, _, rest = name.partition("[")
        of.setdefault((metric, "" if len(values) == 2 else rest.rpartition(",")[2]), []).append(abs(value))
    if all(len(sizes) == 2 for sizes in of.values()):
        yield from of.values()


def unlisted(info: MethodInfo) -> Iterator[str]:
    """A warning of a paper that the catalogue does not hold: it has no page and no headline is asked of it. Not where
    `misplaced` asks for the same."""
    from stepmark.leaderboard.coverage import catalogue

    if info.base is not None or info.paper is None or among_baselines(info.path):
        return
    if not any(misplaced(info)):
        known = {entry.id for entry in catalogue()}
        if info.paper.id not in known:
            yield (
                f"paper: there is no {info.paper.id!r} in leaderboard/catalogue.jsonl"
                + (f"; {guess}" if (guess := meant(info.paper.id, known)) else "; add a line, or take the id of one")
            )


def warnings(info: MethodInfo) -> list[str]:
    """What a reader should look at twice: nothing that keeps a plugin out."""
    from stepmark import admission
    from stepmark.leaderboard.rows import cells
    from stepmark.leaderboard.verdicts import verdicts

    found = [*unlisted(info), *narrow(info)]
    results = results_folder("embedded")
    if info.claims and results.is_dir():
        rows = cells([r for r in admission.read(results)[0] if r.tier == "embedded"], plugins.tasks())
        for claim, by_place in verdicts(info, rows):
            found += [text for verdict in by_place.values() for text in weak(claim, verdict)]
    return list(dict.fromkeys(found))


def _handles(task: str) -> tuple[str, ...]:
    """Prefixes of per-item counts, `<handle>_evaluations` and the like."""
    return tuple(f"{role}_" for role in plugins.tasks()[task][1].backbones) or ("simulator_",)


def further_rungs(info: MethodInfo, task_id: str) -> list[int]:
    """Rungs beyond the smoke ladder that are tried too: on a method's first task the least, the middle and the greatest
    (not of a variant, which is the same code), on any task those that its claims name for it."""
    from stepmark.claims import ClaimError, parse

    task = plugins.tasks()[task_id][1]
    whole = info.base is None and task_id == info.tasks[0]
    rungs = {task.rungs[0], task.rungs[len(task.rungs) // 2], task.rungs[-1]} if whole else set()
    for claim in info.claims:
        with contextlib.suppress(ClaimError):
            for _, method, said in parse(claim.check).references():
                if method == info.id and (claim.task or info.tasks[0]) == task_id:
                    ends = (said,) if isinstance(said, int) else (said.first, said.last)
                    rungs |= {end for end in ends if end is not None}
    return sorted(rungs & set(task.rungs) - set(task.ladder("smoke")))


Stage = Callable[[str], AbstractContextManager[None]]  # around what takes time: told what it is


def silent(what: str) -> AbstractContextManager[None]:
    """A stage of which nothing is said."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def aloud(what: str) -> Iterator[None]:
    """A stage as a line of stderr: what is being done, at once, and how long it took."""
    start = time.monotonic()
    print(f"{what} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f" {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def running(info: MethodInfo, device: str = "cpu", fresh: bool = True, stage: Stage = silent) -> Iterator[str]:
    """Faults that show when the plugin runs at tier smoke: failures, wrong outputs, and what the audit flags.

    Each task at the rungs of the smoke ladder and at `further_rungs`; of a variant, which is the same code, at those on
    its first task only. A rung that is skipped is passed over, and the fresh process repeats the first that is not, from
    the end of the smoke ladder on.
    """
    from stepmark.cell import Cell
    from stepmark.run import measure

    for number, task_id in enumerate(info.tasks):
        smoke = plugins.tasks()[task_id][1].ladder("smoke")
        beyond = further_rungs(info, task_id)
        repeated = not fresh or number > 0
        for rung in (*smoke, *beyond):
            cell = Cell(info.id, task_id, rung, 0, "smoke")
            place = f"{task_id} at rung {rung}"
            with stage(f"{info.id} on {place}, audited"):
                record = measure(cell, device, timing=False, show_progress=False)
            if record.status == "failed" and not (rung in beyond and _unprepared(record.message, rung)):
                if (record.message or "").startswith("PluginError: "):  # it cannot even be imported, on whichever task
                    yield (record.message or "").removeprefix("PluginError: ")
                    return
                yield f"{place}: {record.message}"
            if record.status == "failed" and rung in smoke:
                break
            if record.status == "skipped":
                continue
            yield from (f"{place}: {flag}" for flag in record.flags)
            if not repeated and rung in (smoke[-1], *beyond) and record.status != "failed":
                repeated = True
                with stage(f"{info.id} on {place}, again in a fresh process"):
                    other = _fresh_outputs(cell, device)
                if other != record.outputs:
                    yield f"{place}: a fresh process gave other outputs ({other}); something is left over between runs"


def _unprepared(message: str | None, rung: int) -> bool:
    """Whether a run failed for want of a state that `prepare` makes for each rung, at tier smoke for those of its ladder."""
    return re.match(rf"KeyError: '\w*_{rung}'", message or "") is not None


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


def check(path: Path, device: str = "cpu", run: bool = True, stage: Stage = silent) -> list[str]:
    """Everything wrong with the plugin at `path`, in plain words; [] when it keeps the contract. `stage`: who is told what
    is being done."""
    path = path.resolve()
    if not path.exists():
        return [f"{path} is not there; give the file of a method, methods/<track>/<id>.py"]
    if path.name == "__init__.py":
        path = path.parent  # a plugin that is a folder
    if path.suffix != ".py" and not (path / "__init__.py").is_file():
        return [f"{path} is no plugin; give the file of a method, methods/<track>/<id>.py"]
    try:
        for source in [path] if path.is_file() else sorted(path.rglob("*.py")):
            parse_source(source)
        infos = plugins.read_methods(path)
        if (track := infos[0].track) not in plugins.tracks():
            return [
                f"{path}: the folder above it is its track, and there is {unknown('track', track, plugins.tracks())}"
            ]
        root = folder_of(path)
        if not any(folder.is_dir() and folder.samefile(root) for folder in plugins.method_folders()):
            folders = [str(root), *filter(None, os.environ.get("STEPMARK_METHODS", "").split(os.pathsep))]
            os.environ["STEPMARK_METHODS"] = os.pathsep.join(folders)
        known = plugins.methods()
    except plugins.PluginError as error:
        return [str(error)]
    for info in infos:
        other = known.get(info.id)
        if other is None or not other.path.samefile(info.path):
            return [
                next((text for text in plugins.left_out() if str(path) in text), f"{path}: {info.id} is left out"),
            ]
    findings: list[str] = []
    for info in infos:
        with stage(f"{info.id}, the source"):
            own = [*static(info), *misplaced(info), *headline(info)]
        if run and not any(finding.startswith(("tasks:", "baselines:")) for finding in own):
            own += running(info, device, stage=stage)
        findings += [finding if info.base is None else f"variant {info.id}: {finding}" for finding in own]
    return list(dict.fromkeys(findings))


def warned(path: Path, stage: Stage = silent) -> list[str]:
    """Warnings of every method and variant in a file; [] where it cannot be read, which `check` says."""
    try:
        infos = plugins.read_methods(path.resolve())
        with stage(f"{path.stem}, its claims by the records"):
            return [text for info in infos for text in warnings(info)]
    except (plugins.PluginError, OSError):
        return []
