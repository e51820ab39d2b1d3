"""The command line: `stepmark COMMAND --help` teaches each command. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stepmark import __version__
from stepmark.commands import catalogue, publish, records
from stepmark.commands import run as running
from stepmark.commands import tour as touring
from stepmark.commands.options import add_checkpoint, add_results, add_selection


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
        epilog="First steps: `stepmark list`, then `stepmark tour`, then `stepmark show`.",
    )
    parser.add_argument("--version", action="version", version=f"stepmark {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, action: Callable[[argparse.Namespace], int], text: str, more: str = ""
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {more}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(action=action)
        return made

    found = command("list", catalogue.list_plugins, "list methods, tasks, datasets, backbones or tracks")
    found.add_argument(
        "what", nargs="?", choices=["all", "methods", "tasks", "datasets", "backbones", "tracks"], default="all"
    )

    found = command(
        "run",
        running.run,
        "run cells of the suite and write their records",
        "Cells that already have a record of the\nsame digests are left alone: repeat the command to resume a stopped run.\n\n"
        "With --backbone FOLDER the methods run on a checkpoint of yours instead:\n"
        "  stepmark run --backbone FOLDER                    every method that applies\n"
        "  stepmark run --backbone FOLDER --tier smoke       the same on two items, to see whether it works\n"
        "  stepmark run --backbone FOLDER --method unipc --rung 10 --rung 20 --guidance 4",
    )
    add_selection(found)
    add_checkpoint(found)
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
        "--via",
        choices=["lm-eval"],
        help="run language methods under lm-eval on the same tasks instead, or on tasks of its own with --backbone",
    )
    found.add_argument("--limit", type=int, default=None, help="with --via: items per task")
    found.add_argument(
        "--lm-tasks",
        metavar="FOLDER",
        help="with --via lm-eval and --backbone: a folder of lm-eval's task files (*.yaml) with data on this machine; "
        "--task NAME chooses some. Without it --task names tasks that lm-eval itself brings",
    )
    found.add_argument("--quiet", action="store_true", help="no table at the end")

    found = command(
        "tour",
        touring.tour,
        "measure a handful of headline comparisons, beside the published figures",
        "At tier embedded, on this\nmachine, a few minutes; then the site with these records in it. Nothing of it is published.\n"
        "Stop it when you like: the same command goes on where it was.\n\n"
        "  stepmark tour --list          which comparisons there are\n"
        "  stepmark tour                 all of them (this is `make bench`)\n"
        "  stepmark tour sampler cache   two of them",
    )
    found.add_argument("stop", nargs="*", metavar="STOP", help="only these comparisons")
    found.add_argument("--list", action="store_true", help="only say which there are")
    found.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    found.add_argument(
        "--workers", type=int, default=0, metavar="N", help="1 or 2 processes, each with a core of its own (default 2)"
    )
    found.add_argument("--again", action="store_true", help="measure also what has been measured")
    found.add_argument("--no-site", action="store_true", help="only the figures")
    found.add_argument("--out", type=Path, help="folder of the built site (default build/site)")
    found.add_argument("--results", type=Path, help="folder of the records (default .stepmark/tour)")

    found = command("check", catalogue.check, "check one plugin against the contract and say what is wrong and where")
    found.add_argument("path", type=Path, nargs="+", help="methods/<track>/<id>.py")
    found.add_argument("--device", default="cpu")
    found.add_argument("--no-run", action="store_true", help="read the source only")

    found = command("new", catalogue.new, "start a new plugin from a template")
    found.add_argument("path", type=Path, help="methods/<track>/<id>")

    found = command("show", records.show, "print the leaderboard as an aligned table")
    add_selection(found)

    found = command("compare", records.compare, "compare two methods by paired tests")
    found.add_argument("a")
    found.add_argument("b")
    found.add_argument("--track", help="only this track")
    found.add_argument("--tier", choices=["smoke", "embedded", "hub"], default="embedded")
    add_results(found)

    found = command(
        "verify",
        records.verify,
        "run recorded cells again and say what agrees",
        "Exit status 1 when something does not.",
    )
    found.add_argument("record", nargs="?", help="a record file, or FILE:LINE for one record of it")
    found.add_argument("--sample", type=int, metavar="N", help="instead: N published records, drawn over the methods")
    found.add_argument("--seed-of-sample", type=int, default=0, metavar="S", help="another S draws others (default 0)")
    found.add_argument("--tier", choices=["smoke", "embedded", "hub"], default="embedded", help="with --sample")
    found.add_argument("--device", default="cpu")
    add_results(found)
    add_checkpoint(found)

    found = command(
        "samples",
        publish.samples,
        "make the pictures and texts of the method pages for recorded cells that lack them",
        "Only the first batch of a cell of seed 0\nis run again, on the machine that wrote its record.",
    )
    add_selection(found)
    found.add_argument("--device", default="cpu")
    found.add_argument("--prepare", action="store_true", help="also where the prepared state is not in the cache")

    found = command(
        "release",
        publish.release,
        "freeze the records, the lock, the catalogue and the site of this suite version",
        "Raise the version in\npyproject.toml and bench/stepmark/__init__.py afterwards: what is released stays as it is.",
    )
    found.add_argument(
        "--force", action="store_true", help="also with stale records or a changed tree; the manifest says so"
    )
    found.add_argument("--check", action="store_true", help="only compare the releases with their manifests")
    add_results(found)

    found = command("migrate", publish.migrate, "rewrite records of the first schema as records of the second")
    add_results(found)

    found = command("site", publish.site, "build the static site from the records")
    add_results(found)
    found.add_argument("--out", type=Path, help="folder of the built site (default build/site)")
    found.add_argument("--tier", choices=["smoke", "embedded", "hub"], default="embedded")

    found = command("backbones", catalogue.backbones, "list or retrain the embedded reference models")
    found.add_argument("do", choices=["list", "train"], nargs="?", default="list")
    found.add_argument("id", nargs="*", help="with train: which (minutes each on one core)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
