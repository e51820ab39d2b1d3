"""`stepmark run`: cells of the suite, on a checkpoint folder, or under lm-eval."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from stepmark import plugins
from stepmark.commands.options import choice_of, selection_of, tier_of, workers_of
from stepmark.commands.records import show
from stepmark.commands.table import columns
from stepmark.places import results_folder

if TYPE_CHECKING:
    from stepmark.hub import Made


def run(arguments: argparse.Namespace) -> int:
    """Cells of the suite; `--backbone` and `--via` say of what and by whom."""
    arguments.tier = tier_of(arguments)
    choice = choice_of(arguments)
    if arguments.limit is not None and not arguments.via:
        raise ValueError("--limit is for --via lm-eval; a checkpoint's items are --items N")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError("--limit is at least 1")
    if arguments.lm_tasks and not (arguments.via and choice):
        raise ValueError(
            "--lm-tasks is for --via lm-eval on a checkpoint of your own: add --via lm-eval --backbone FOLDER"
        )
    if choice is None:
        if arguments.tier == "hub":
            raise ValueError("tier hub measures a checkpoint of yours: add --backbone FOLDER")
        return _run_lm_eval(arguments) if arguments.via == "lm-eval" else _run_cells(arguments)
    from stepmark import hub

    with hub.using(choice) as made:
        if arguments.via:
            return _run_lm_eval_own(arguments, made)
        if any(task != made.task.id for task in arguments.task):
            raise ValueError(f"--backbone makes one task, {made.task.id}; leave out --task")
        arguments.task = [made.task.id]
        for name in arguments.method:
            info = plugins.methods().get(name)
            if info is not None and made.task.id not in info.tasks:
                raise ValueError(
                    f"{name} does not apply to {made.task.id}: it names no task of the kind "
                    f"{', '.join(made.family)} ..."
                )
        print(f"{made.task.id}: {made.task.summary}", file=sys.stderr)
        return _run_cells(arguments)


def _run_cells(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from stepmark import forecast, suite

    def announce(text: str) -> None:
        print(text, file=sys.stderr)

    if arguments.engine == "ray" and arguments.workers != 1:
        raise ValueError("--workers is for --engine local: on Ray as many cells run as the cluster has room for")
    if arguments.engine != "ray" and arguments.address:
        raise ValueError("--address is that of a Ray cluster: add --engine ray")
    chosen = selection_of(arguments)
    results = arguments.results or results_folder(arguments.tier)
    cells = suite.cells(chosen)
    absent = suite.unmet(chosen, cells)
    if not cells:
        raise ValueError(f"the selection holds no cell: {'; '.join(absent) or 'see stepmark list'}")
    for text in absent:
        announce(f"left out: {text}")
    options = suite.Options(
        results=results,
        device=arguments.device,
        engine=arguments.engine,
        workers=workers_of(arguments),
        address=arguments.address,
        timing=not arguments.no_timing,
        again=arguments.again,
        lacking=arguments.lacking,
        announce=announce,
    )
    todo = suite.todo(cells, options)
    if len(todo) < len(cells):
        announce(f"{len(cells) - len(todo)} of {len(cells)} cells are done already")
    if todo:
        announce(forecast.sentence(todo, options))
    made = []
    tqdm.monitor_interval = 0
    with tqdm(total=len(todo), unit="cell", dynamic_ncols=True, smoothing=0.1) as bar:
        for record in suite.measure(todo, options):
            made.append(record)
            bar.set_postfix_str(f"{record.method} on {record.task}, rung {record.rung}")
            bar.update()
            if record.status in {"failed", "flagged"}:
                text = record.message or "; ".join(record.flags)
                bar.write(
                    f"{record.status}: {record.method} on {record.task}, rung {record.rung}: {text}", file=sys.stderr
                )
    if not arguments.quiet:
        show(arguments)
    bad = [r for r in made if r.status == "failed"]
    print(f"\n{len(made)} records written below {results}" + (f", {len(bad)} of them failed" if bad else ""))
    return 1 if bad else 0


def _run_lm_eval(arguments: argparse.Namespace) -> int:
    from stepmark.method import Skip
    from stepmark.via_lm_eval import evaluate

    known, methods = plugins.tasks(), plugins.methods()
    for name in arguments.method or []:
        if name not in methods:
            raise KeyError(f"no method {name!r}; see: stepmark list methods")
    for task in arguments.task or []:
        if task not in known or known[task][0] not in {"decoding", "diffusion_lm"}:
            raise ValueError(
                f"lm-eval is for texts, and {task} has none: choose a task of track decoding or diffusion_lm"
            )
    tasks = arguments.task or [t for t, (track, _) in known.items() if track in {"decoding", "diffusion_lm"}]
    rows: list[tuple[str, ...]] = [("task", "method", "rung", "metric", "value", "evaluations", "items")]
    for name in arguments.method or methods:
        for task in [t for t in tasks if t in methods[name].tasks]:
            for rung in arguments.rung or known[task][1].rungs[-1:]:
                n = arguments.limit or known[task][1].items(arguments.tier)
                try:
                    found = evaluate(name, task, rung, n, arguments.device, arguments.tier)
                except Skip as reason:
                    rows.append((task, name, str(rung), "skipped", str(reason), "", str(n)))
                    continue
                (results,) = found["results"].values()
                metric, value = next(
                    (key.partition(",")[0], figure) for key, figure in results.items() if isinstance(figure, float)
                )
                forwards = "; ".join(f"{key} {count / n:.1f}" for key, count in found["counts"].items() if count)
                rows.append((task, name, str(rung), metric, f"{value:.3f}", f"{forwards} an item", str(n)))
    print(columns(rows, ""))
    return 0


def _run_lm_eval_own(arguments: argparse.Namespace, made: Made) -> int:
    """lm-eval's own tasks on a checkpoint."""
    from stepmark.hub.prompts import has_tokenizer
    from stepmark.method import Skip

    if made.track == "reasoning":
        raise ValueError("--via lm-eval has tasks of its own; leave out --reasoning")
    if made.track != "decoding":
        raise ValueError(f"lm-eval is for texts, and {made.folder} makes images")
    if not has_tokenizer(made.parts["target"].folder):
        raise ValueError(f"--via lm-eval reads texts, and {made.folder} has no tokenizer.json; add it")
    from stepmark.via_lm_eval import evaluate_own, own_tasks

    if not arguments.task and not arguments.lm_tasks:
        raise ValueError(
            "which of lm-eval's tasks? Give --task NAME, or --lm-tasks FOLDER with task files of yours (*.yaml)"
        )
    manager = own_tasks(arguments.lm_tasks)
    tasks = arguments.task or sorted(manager.all_tasks)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"lm-eval knows no task {unknown[0]!r}; see: lm-eval ls tasks, or give --lm-tasks FOLDER")
    if not tasks:
        raise ValueError(f"--lm-tasks {arguments.lm_tasks} holds no task file (*.yaml)")
    suited = [i.id for i in plugins.methods().values() if made.task.id in i.tasks]
    rows: list[tuple[str, ...]] = [("task", "method", "metric", "value", "evaluations", "ms a token")]
    for name in arguments.method or suited:
        if name not in suited:
            raise ValueError(f"{name} does not apply to {made.task.id}")
        for task in tasks:
            for rung in arguments.rung or [made.new_tokens]:
                try:
                    found = evaluate_own(
                        name, made.task.id, [task], manager, rung, arguments.limit, arguments.device, arguments.tier
                    )
                except Skip as reason:
                    rows.append((task, name, "skipped", str(reason), "", ""))
                    continue
                n = sum(each["effective"] for each in found["n-samples"].values())
                forwards = "; ".join(f"{key} {count / n:.1f}" for key, count in found["counts"].items() if count)
                speed = "" if found["ms_per_token"] is None else f"{found['ms_per_token']:.1f}"
                for key, figure in next(iter(found["results"].values())).items():
                    if isinstance(figure, float) and "stderr" not in key:
                        cost = f"{forwards} an item" if forwards else "none: likelihoods are the target's"
                        rows.append((task, name, key.removesuffix(",none"), f"{figure:.3f}", cost, speed))
    print(columns(rows, ""))
    return 0
