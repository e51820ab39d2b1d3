"""`stepmark list`, `check`, `new`, `backbones`: what there is, and what an author adds to it."""

from __future__ import annotations

import argparse
import shlex
import sys

from stepmark import plugins
from stepmark.commands.options import SMOKE
from stepmark.commands.table import columns, screen
from stepmark.names import unknown


def list_plugins(arguments: argparse.Namespace) -> int:
    """Tracks, methods, tasks and datasets, aligned; a terminal gets lines of its own width."""
    wanted, most = arguments.what, screen()
    methods = plugins.methods() if wanted in {"all", "tracks", "methods"} else {}
    blocks: list[str] = []
    if wanted in {"all", "tracks"}:
        rows: list[tuple[str, ...]] = [
            (
                track,
                f"{sum(m.track == track and m.base is None for m in methods.values())} methods",
                f"{sum(m.track == track and m.base is not None for m in methods.values())} variants",
            )
            for track in plugins.tracks()
        ]
        blocks.append("tracks\n" + columns(rows, most=most))
    if wanted in {"all", "methods"} and methods:
        # Reference points first, and a variant below its method.
        heads = {m.id: m if m.base is None else methods[m.base] for m in methods.values()}
        order = sorted(
            methods.values(),
            key=lambda m: (m.track, bool(heads[m.id].baselines), heads[m.id].id, m.base is not None, m.id),
        )
        indent = {m.id: "  " if m.base else "" for m in order}
        rows = [(indent[m.id] + m.id, m.track, m.title) for m in order]
        blocks.append("methods\n" + columns(rows, most=most))
    if wanted == "all":
        rows = [(t.id, track, f"v{t.version}", t.unit, t.summary) for track, t in plugins.tasks().values()]
        blocks.append("tasks\n" + columns(rows, most=most))
    if wanted == "tasks":
        head = ("task", "track", "version", "seeds", "rungs", "in", "metrics, the first ranks; what is asked")
        rows = [
            (
                t.id,
                track,
                f"v{t.version}",
                str(t.seeds),
                " ".join(map(str, t.rungs)),
                t.unit,
                ", ".join(f"{name} ({better})" for name, better in t.metrics.items()) + f"; {t.summary}",
            )
            for track, t in plugins.tasks().values()
        ]
        blocks.append(columns([head, *rows], "", most))
    if wanted in {"all", "datasets"}:
        rows = [(d.id, f"v{d.version}", d.summary) for d in plugins.datasets().values()]
        blocks.append("datasets\n" + columns(rows, most=most))
    if wanted == "backbones":
        return backbones(argparse.Namespace(do="list", id=[]))
    print("\n\n".join(blocks))
    return 0


def check(arguments: argparse.Namespace) -> int:
    """What is wrong with plugins, line by line."""
    from stepmark import check as contract

    wrong = 0
    if not arguments.no_run:
        print(f"runs are of tier smoke: {SMOKE}", file=sys.stderr)
    for path in arguments.path:
        findings = contract.check(path, arguments.device, not arguments.no_run, contract.aloud)
        wrong += bool(findings)
        print(f"{path}: " + ("keeps the contract" if not findings else f"{len(findings)} to mend"))
        for finding in findings:
            print(f"  - {finding}")
        for warning in contract.warned(path, contract.aloud):
            print(f"  warning: {warning}")
    return 1 if wrong else 0


def new(arguments: argparse.Namespace) -> int:
    """A plugin to fill in."""
    from stepmark.leaderboard.coverage import blank
    from stepmark.scaffold import folder_of, scaffold

    path = scaffold(arguments.path, arguments.task, arguments.baseline)
    print(f"wrote {path}; fill it in, then: stepmark check {path}")
    folder = folder_of(path)
    if (line := blank(path)) is not None:
        print(
            f"{path.stem} is no paper of leaderboard/catalogue.jsonl. Add its line, whose fields CONTRIBUTING.md describes, "
            f"or start what is nobody's paper with --baseline:\n  {line}"
        )
    if folder not in plugins.method_folders():
        print(
            f"{folder} is none of the folders that stepmark reads methods from. To run this one, say where it is:\n"
            f"  export STEPMARK_METHODS={shlex.quote(str(folder))}"
        )
    return 0


def backbones(arguments: argparse.Namespace) -> int:
    """The embedded reference models: list them, or train some again."""
    from stepmark import backbones

    if arguments.do == "list":
        entries = backbones.manifest()
        rows = [("id", "parameters", "trained in", "what")]
        for name, recipe in sorted(backbones.recipes().items()):
            entry = entries.get(name)
            seconds = f"{entry['seconds']:.0f} s" if entry else ("analytic" if recipe.train is None else "not trained")
            rows.append((name, f"{entry['params']:,}" if entry else "-", seconds, recipe.summary))
        print(columns(rows, "", screen()))
        return 0
    if not arguments.id:
        raise ValueError("name the backbones to train, such as: stepmark backbones train digits_flow_a")
    for name in arguments.id:
        if name not in backbones.recipes():
            raise KeyError(unknown("backbone", name, backbones.recipes(), "stepmark backbones list"))
    for name in arguments.id:
        print(f"{name}: {backbones.train(name)}")
    return 0
