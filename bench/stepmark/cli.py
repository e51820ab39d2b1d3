"""The command line: `stepmark COMMAND --help` teaches each command. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stepmark import __version__, plugins
from stepmark.places import results_folder

if TYPE_CHECKING:
    from stepmark.backbones.checkpoint import Choice
    from stepmark.record import Record


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 fine, 1 something was found wrong, 2 wrong use."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.action(arguments)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not _expected(error):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"stepmark: {' '.join(str(text).split())}", file=sys.stderr)
        return 2


def _expected(error: Exception) -> bool:
    """Errors that say in one line what to mend; anything else is a fault of ours and shows its trace."""
    return type(error).__name__ in {
        "PluginError",
        "RecordError",
        "ClaimError",
        "DeviceBusy",
        "ChildProcessError",
        "KeyError",
        "ValueError",
        "FileNotFoundError",
        "ModuleNotFoundError",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stepmark",
        description="How much quality does each inference step, millisecond, megabyte and joule buy?",
        epilog="First steps: `stepmark list`, then `stepmark run --tier smoke --method ddim`, then `stepmark show`.",
    )
    parser.add_argument("--version", action="version", version=f"stepmark {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, action: object, text: str, more: str = "") -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {more}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(action=action)
        return made

    found = command("list", _list, "list methods, tasks, datasets, backbones or tracks")
    found.add_argument(
        "what", nargs="?", choices=["all", "methods", "tasks", "datasets", "backbones", "tracks"], default="all"
    )

    found = command(
        "run",
        _run,
        "run cells of the suite and write their records",
        "Cells that already have a record of the\nsame digests are left alone: repeat the command to resume a stopped run.\n\n"
        "With --backbone FOLDER the methods run on a checkpoint of yours instead:\n"
        "  stepmark run --backbone FOLDER                    every method that applies\n"
        "  stepmark run --backbone FOLDER --tier smoke       the same on two items, to see whether it works\n"
        "  stepmark run --backbone FOLDER --method unipc --rung 10 --rung 20 --guidance 4",
    )
    _selection(found)
    _checkpoint(found)
    found.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    found.add_argument("--engine", choices=["local", "ray"], default="local", help="where cells run")
    found.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes, each pinned to a core (or GPU) of its own; 0: one for each core. "
        "Cores share caches: time what you publish with 1 (default)",
    )
    found.add_argument("--address", help="of a running Ray cluster; without it a local one is started")
    found.add_argument(
        "--quick",
        action="store_true",
        help="each method on one task of each kind only, the one that most methods share; tier smoke unless said",
    )
    found.add_argument("--no-timing", action="store_true", help="skip latency, memory and energy")
    found.add_argument("--again", action="store_true", help="run also what has a record already")
    found.add_argument(
        "--via", choices=["lm-eval"], help="run language methods under lm-eval on the same tasks instead"
    )
    found.add_argument("--limit", type=int, default=None, help="with --via: items per task")
    found.add_argument("--quiet", action="store_true", help="no table at the end")

    found = command("check", _check, "check one plugin against the contract and say what is wrong and where")
    found.add_argument("path", type=Path, nargs="+", help="methods/<track>/<id>.py")
    found.add_argument("--device", default="cpu")
    found.add_argument("--no-run", action="store_true", help="read the source only")

    found = command("new", _new, "start a new plugin from a template")
    found.add_argument("path", type=Path, help="methods/<track>/<id>")

    found = command("show", _show, "print the leaderboard as an aligned table")
    _selection(found)
    _results(found)

    found = command("compare", _compare, "compare two methods by paired tests")
    found.add_argument("a")
    found.add_argument("b")
    found.add_argument("--track", help="only this track")
    found.add_argument("--tier", choices=["smoke", "embedded", "hub"], default="embedded")
    _results(found)

    found = command(
        "verify", _verify, "run recorded cells again and say what agrees", "Exit status 1 when something does not."
    )
    found.add_argument("record", nargs="?", help="a record file, or FILE:LINE for one record of it")
    found.add_argument("--sample", type=int, metavar="N", help="instead: N published records, drawn over the methods")
    found.add_argument("--seed-of-sample", type=int, default=0, metavar="S", help="another S draws others (default 0)")
    found.add_argument("--tier", choices=["smoke", "embedded", "hub"], default="embedded", help="with --sample")
    found.add_argument("--device", default="cpu")
    _results(found)
    _checkpoint(found)

    found = command(
        "samples",
        _samples,
        "make the pictures and texts of the method pages for recorded cells that lack them",
        "Only the first batch of a cell of seed 0\nis run again, on the machine that wrote its record.",
    )
    _selection(found)
    found.add_argument("--device", default="cpu")
    found.add_argument("--prepare", action="store_true", help="also where the prepared state is not in the cache")

    found = command(
        "release",
        _release,
        "freeze the records, the lock, the catalogue and the site of this suite version",
        "Raise the version in\npyproject.toml and bench/stepmark/__init__.py afterwards: what is released stays as it is.",
    )
    found.add_argument(
        "--force", action="store_true", help="also with stale records or a changed tree; the manifest says so"
    )
    found.add_argument("--check", action="store_true", help="only compare the releases with their manifests")
    _results(found)

    found = command("site", _site, "build the static site from the records")
    _results(found)
    found.add_argument("--out", type=Path, help="folder of the built site (default build/site)")
    found.add_argument("--tier", choices=["smoke", "embedded", "hub"], default="embedded")

    found = command("backbones", _backbones, "list or retrain the embedded reference models")
    found.add_argument("do", choices=["list", "train"], nargs="?", default="list")
    found.add_argument("id", nargs="*", help="with train: which (minutes each on one core)")
    return parser


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a checkpoint of your own (tier hub)",
        "A folder in one of Hugging Face's formats, with weights in safetensors; nothing is downloaded and no code of\n"
        "the folder is run. Image networks (UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel,\n"
        "PixArtTransformer2DModel, alone with a scheduler_config.json or as a whole pipeline) are followed to where their\n"
        "own ODE leads: endpoint_error is the distance from there. Language models (Llama, Mistral, Qwen2, Qwen3 ...)\n"
        "write greedily: first_divergence is how many tokens of plain greedy decoding a budget buys. Methods that need\n"
        "training data are skipped.",
    )
    group.add_argument(
        "--backbone", metavar="FOLDER", help="the checkpoint; may be the unet/ or transformer/ of a pipeline"
    )
    group.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="W",
        help="images: what is sampled is guided by scale W, null + W (conditional - null). An evaluation then takes two "
        "rows of the network and counts as 2 NFE: rung 20 is ten steps. Default 1, no guidance",
    )
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line, read by the tokenizer (and text encoder) of the folder. Without it: made-up embeddings "
        "for images, random tokens for texts",
    )
    group.add_argument("--draft", metavar="FOLDER", help="texts: a small model of the same vocabulary, for speculative")
    group.add_argument(
        "--items", type=int, metavar="N", help="samples or prompts that are scored (default 16, or all prompts)"
    )
    group.add_argument(
        "--new-tokens", type=int, metavar="N", help="texts: tokens written to a prompt at most (default 64)"
    )


def _selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tier",
        choices=["smoke", "embedded", "hub"],
        help="default: embedded, or hub with --backbone; smoke is a quick look",
    )
    for name, text in (("method", "ID"), ("track", "TRACK"), ("task", "KIND/NAME")):
        parser.add_argument(f"--{name}", action="append", default=[], metavar=text, help="may be given several times")
    parser.add_argument(
        "--rung", action="append", type=int, default=[], metavar="N", help="of the task's; with --backbone any"
    )
    parser.add_argument("--seed", action="append", type=int, default=[], metavar="N")
    if not any(action.dest == "results" for action in parser._actions):
        parser.add_argument("--results", type=Path, help="folder of the records")


def _results(parser: argparse.ArgumentParser) -> None:
    if not any(action.dest == "results" for action in parser._actions):
        parser.add_argument("--results", type=Path, help="folder of the records")


def _columns(rows: Sequence[tuple[str, ...]], indent: str = "  ") -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _list(arguments: argparse.Namespace) -> int:
    wanted = arguments.what
    methods = plugins.methods() if wanted in {"all", "tracks", "methods"} else {}
    blocks: list[str] = []
    if wanted in {"all", "tracks"}:
        rows: list[tuple[str, ...]] = [
            (track, f"{sum(m.track == track for m in methods.values())} methods") for track in plugins.tracks()
        ]
        blocks.append("tracks\n" + _columns(rows))
    if wanted in {"all", "methods"} and methods:
        order = sorted(methods.values(), key=lambda m: (m.track, bool(m.baselines), m.id))
        blocks.append("methods\n" + _columns([(m.id, m.track, m.title[:90]) for m in order]))
    if wanted in {"all", "tasks"} and plugins.tasks():
        rows = [(t.id, track, f"v{t.version}", t.unit, t.summary[:80]) for track, t in plugins.tasks().values()]
        blocks.append("tasks\n" + _columns(rows))
    if wanted in {"all", "datasets"}:
        rows = [(d.id, f"v{d.version}", d.summary[:90]) for d in plugins.datasets().values()]
        blocks.append("datasets\n" + _columns(rows))
    if wanted == "backbones":
        return _backbones(argparse.Namespace(do="list", id=[]))
    print("\n\n".join(blocks))
    return 0


def _tier(arguments: argparse.Namespace) -> str:
    """The tier asked for, or the one that goes without saying."""
    own = getattr(arguments, "backbone", None) is not None
    quick = getattr(arguments, "quick", False)
    tier = arguments.tier or ("smoke" if quick else "hub" if own else "embedded")
    if own and tier == "embedded":
        raise ValueError(
            "--backbone brings its own tasks: leave out --tier embedded (hub is meant; smoke is a quick look)"
        )
    return str(tier)


def _choice(arguments: argparse.Namespace) -> Choice | None:
    """The checkpoint that was chosen, if one was."""
    from stepmark.backbones.checkpoint import Choice

    if arguments.backbone is None:
        names = ("prompts", "draft", "items", "new_tokens")
        said = ["--" + name.replace("_", "-") for name in names if getattr(arguments, name) is not None]
        said += ["--guidance"] if arguments.guidance != 1 else []
        if said:
            raise ValueError(f"{said[0]} is for a checkpoint of your own: add --backbone FOLDER")
        return None
    if any(n is not None and n < 1 for n in (arguments.items, arguments.new_tokens)):
        raise ValueError("--items and --new-tokens are at least 1")
    if not math.isfinite(arguments.guidance):
        raise ValueError("--guidance is a number, such as 4")
    rungs = tuple(sorted({*getattr(arguments, "rung", [])}))
    if any(rung < 1 for rung in rungs):
        raise ValueError("--rung is at least 1")
    return Choice(
        folder=arguments.backbone,
        guidance=arguments.guidance,
        prompts=arguments.prompts,
        draft=arguments.draft,
        items=arguments.items,
        new_tokens=arguments.new_tokens,
        rungs=rungs,
    )


def _chosen(arguments: argparse.Namespace) -> object:
    from stepmark.suite import Selection

    return Selection(
        tier=arguments.tier,
        methods=tuple(arguments.method),
        tracks=tuple(arguments.track),
        tasks=tuple(arguments.task),
        rungs=tuple(arguments.rung),
        seeds=tuple(arguments.seed),
        quick=getattr(arguments, "quick", False),
    )


def _run(arguments: argparse.Namespace) -> int:
    arguments.tier = _tier(arguments)
    choice = _choice(arguments)
    if choice is None:
        if arguments.tier == "hub":
            raise ValueError("tier hub measures a checkpoint of yours: add --backbone FOLDER")
        return _run_lm_eval(arguments) if arguments.via == "lm-eval" else _run_cells(arguments)
    if arguments.via:
        raise ValueError("--via lm-eval runs Stepmark's own tasks; leave out --backbone")
    from stepmark.backbones import checkpoint

    with checkpoint.using(choice) as made:
        if any(task != made.task.id for task in arguments.task):
            raise ValueError(f"--backbone makes one task, {made.task.id}; leave out --task")
        arguments.task = [made.task.id]
        for name in arguments.method:
            info = plugins.methods().get(name)
            if info is not None and made.task.id not in info.tasks:
                raise ValueError(
                    f"{name} does not apply to {made.task.id}: it names no task of the kind "
                    f"{', '.join(sorted(made.family)[:3])} ..."
                )
        print(f"{made.task.id}: {made.task.summary}", file=sys.stderr)
        return _run_cells(arguments)


def _run_cells(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from stepmark import engine, suite

    chosen = _chosen(arguments)
    assert isinstance(chosen, suite.Selection)
    results = arguments.results or results_folder(arguments.tier)
    cells = suite.cells(chosen)
    if not cells:
        raise ValueError("the selection holds no cell; see: stepmark list")
    todo = len(cells) if arguments.again else len(suite.pending(cells, results))
    options = suite.Options(
        results=results,
        device=arguments.device,
        engine=arguments.engine,
        workers=arguments.workers or engine.available(arguments.device),
        address=arguments.address,
        timing=not arguments.no_timing,
        again=arguments.again,
        announce=lambda text: print(text, file=sys.stderr),
    )
    made = []
    tqdm.monitor_interval = 0
    with tqdm(total=todo, unit="cell", dynamic_ncols=True, smoothing=0.1) as bar:
        for record in suite.walk(chosen, options):
            made.append(record)
            bar.set_postfix_str(f"{record.method} on {record.task}, rung {record.rung}")
            bar.update()
            if record.status in {"failed", "flagged"}:
                text = record.message or "; ".join(record.flags)
                bar.write(
                    f"{record.status}: {record.method} on {record.task}, rung {record.rung}: {text}", file=sys.stderr
                )
    if not arguments.quiet:
        _show(arguments)
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
    print(_columns(rows, ""))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from stepmark.check import check

    wrong = 0
    for path in arguments.path:
        findings = check(path, arguments.device, not arguments.no_run)
        wrong += bool(findings)
        print(f"{path}: " + ("keeps the contract" if not findings else f"{len(findings)} to mend"))
        for finding in findings:
            print(f"  - {finding}")
    return 1 if wrong else 0


def _new(arguments: argparse.Namespace) -> int:
    from stepmark.check import scaffold

    path = scaffold(arguments.path)
    print(f"wrote {path}; fill it in, then: stepmark check {path}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from stepmark.leaderboard.tables import show
    from stepmark.record import read_all

    arguments.tier = _tier(arguments)
    results = arguments.results or results_folder(arguments.tier)
    records = [
        r
        for r in read_all(results)
        if r.tier == arguments.tier
        and (not arguments.method or r.method in arguments.method)
        and (not arguments.track or r.track in arguments.track)
        and (not arguments.task or r.task in arguments.task)
    ]
    print(show(records) if records else f"no records below {results}; write some with: stepmark run")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from stepmark.leaderboard.tables import compare
    from stepmark.record import read_all

    results = arguments.results or results_folder(arguments.tier)
    records = [r for r in read_all(results) if r.tier == arguments.tier]
    print(compare(records, arguments.a, arguments.b, arguments.track))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    choice = _choice(arguments)
    if choice is None:
        return _verified(arguments)
    from stepmark.backbones import checkpoint

    with checkpoint.using(choice):
        return _verified(arguments)


def _verified(arguments: argparse.Namespace) -> int:
    if (arguments.record is None) == (arguments.sample is None):
        raise ValueError("give a record file, FILE:LINE, or --sample N")
    if arguments.sample is not None:
        return _verify_sample(arguments)
    from stepmark import record
    from stepmark.verify import verify

    name, colon, line = arguments.record.rpartition(":")
    path, number = (Path(name), int(line)) if colon and line.isdigit() else (Path(arguments.record), None)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; records lie in leaderboard/results/<version>/<machine>/<track>/")
    records = list(record.read(path))
    if number is not None:
        if not 1 <= number <= len(records):
            raise ValueError(f"{path} has {len(records)} records; give a line between 1 and {len(records)}")
        records = [records[number - 1]]
    wrong = 0
    for each in records:
        found = verify(each, arguments.device)
        wrong += bool(found.differs)
        print(
            f"{each.method} on {each.task}, rung {each.rung}, seed {each.seed}: "
            + ("differs" if found.differs else "agrees")
        )
        for text in found.differs:
            print(f"  - {text}")
        for text in (*found.agrees, *found.notes):
            print(f"    {text}")
    print(f"{len(records) - wrong} of {len(records)} records agree")
    return 1 if wrong else 0


def _verify_sample(arguments: argparse.Namespace) -> int:
    from stepmark.record import read_all
    from stepmark.verify import draw, verify

    results = arguments.results or results_folder(arguments.tier)
    chosen = draw(
        [r for r in read_all(results) if r.tier == arguments.tier], arguments.sample, arguments.seed_of_sample
    )
    if not chosen:
        raise ValueError(f"no record of tier {arguments.tier} below {results} can be run again here")
    rows: list[tuple[str, ...]] = [("method", "task", "rung", "seed", "record", "verdict", "what")]
    wrong = 0
    for record in chosen:
        found = verify(record, arguments.device)
        wrong += bool(found.differs)
        what = "; ".join(found.differs or found.agrees)
        rows.append(
            (record.method, record.task, str(record.rung), str(record.seed), record_name(record),
             "differs" if found.differs else "agrees", "".join(c if c.isprintable() else "?" for c in what)[:160])
        )  # fmt: skip
    print(_columns(rows, ""))
    print(f"{len(chosen) - wrong} of {len(chosen)} records agree (sample {arguments.seed_of_sample})")
    return 1 if wrong else 0


def record_name(record: Record) -> str:
    """The id that a dispute quotes."""
    from stepmark.leaderboard.rows import record_id

    return record_id(record)


def _samples(arguments: argparse.Namespace) -> int:
    from stepmark import samples, suite
    from stepmark.meter.machine import machine_id
    from stepmark.record import read_all

    arguments.tier = _tier(arguments)

    chosen = _chosen(arguments)
    assert isinstance(chosen, suite.Selection)
    suite.check_selection(chosen)
    results = arguments.results or results_folder(arguments.tier)
    records = [
        r
        for r in read_all(results)
        if r.tier == arguments.tier
        and r.suite == __version__
        and r.machine == machine_id()
        and (not chosen.methods or r.method in chosen.methods)
        and (not chosen.tracks or r.track in chosen.tracks)
        and (not chosen.tasks or r.task in chosen.tasks)
        and (not chosen.rungs or r.rung in chosen.rungs)
    ]
    made, left = samples.refresh(
        records, results, arguments.device, arguments.prepare, lambda text: print(text, file=sys.stderr)
    )
    print(f"{made} samples written below {results}" + (f", {left} could not be made" if left else ""))
    return 0


def _release(arguments: argparse.Namespace) -> int:
    from stepmark.leaderboard import release

    results = arguments.results or results_folder("embedded")
    if arguments.check:
        faults = release.check_all(results)
        for fault in faults:
            print(fault)
        print("every release agrees with its manifest" if not faults else f"{len(faults)} to mend")
        return 1 if faults else 0
    manifest = release.freeze(results, force=arguments.force)
    print(f"released {manifest.suite}: {manifest.records} records, digest {manifest.digest}")
    for text in manifest.forced:
        print(f"forced: {text}")
    return 0


def _site(arguments: argparse.Namespace) -> int:
    from stepmark.leaderboard import site

    results = arguments.results or results_folder(arguments.tier)
    root = plugins.checkout() or Path.cwd()
    tier = None if arguments.tier == "embedded" else arguments.tier
    page = site.build(results, arguments.out or root / "build" / "site", tier)
    print(f"the site is in {page}")
    return 0


def _backbones(arguments: argparse.Namespace) -> int:
    from stepmark import backbones

    if arguments.do == "list":
        entries = backbones.manifest()
        rows = [("id", "parameters", "trained in", "what")]
        for name, recipe in sorted(backbones.recipes().items()):
            entry = entries.get(name)
            seconds = f"{entry['seconds']:.0f} s" if entry else ("analytic" if recipe.train is None else "not trained")
            rows.append((name, f"{entry['params']:,}" if entry else "-", seconds, recipe.summary))
        print(_columns(rows, ""))
        return 0
    if not arguments.id:
        raise ValueError("name the backbones to train, such as: stepmark backbones train digits_flow_a")
    for name in arguments.id:
        print(f"{name}: {backbones.train(name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
