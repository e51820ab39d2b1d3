"""The command line: `stepmark COMMAND --help` teaches each command. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from stepmark import __version__, plugins
from stepmark.commands import catalogue, publish, records
from stepmark.commands import run as running
from stepmark.commands import tour as touring
from stepmark.commands.options import add_checkpoint, add_results, add_selection, ready
from stepmark.names import meant, unknown

START = """\
Stepmark: how much quality does each inference step, millisecond, megabyte and joule buy?

  stepmark list                               what there is: tracks, methods, tasks, datasets
  stepmark show                               the published figures
  stepmark tour                               measure five comparisons yourself, in some minutes
  stepmark run --quick                        every method once, small
  stepmark run --method ddim                  one method in full; stop and resume as you like
  stepmark new methods/image/my_sampler       start a method of your own ...
  stepmark check methods/image/my_sampler.py  ... and hear what is wrong with it
  stepmark site                               the leaderboard as a site, from disk

Every command explains itself: stepmark COMMAND --help. All commands: stepmark --help"""

MOST = 5  # plugins that are left out, of which each is named

# Modules that only an extra brings -> the extra.
EXTRAS = {
    "ray": "ray",
    "lm_eval": "lm-eval",
    "zeus": "energy",
    "pandas": "frame",
    "mkdocs": "site",
    "material": "site",
    "vl_convert": "site",
    "pyarrow": "site",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and names what was perhaps meant."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: {message} (see: {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 fine, 1 something was found wrong, 2 wrong use."""
    arguments = _parsed(sys.argv[1:] if argv is None else argv)
    try:
        ready(arguments)
        status = arguments.action(arguments)
        sys.stdout.flush()  # here, where a reader that has gone is no fault
        return status
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not _expected(error):
            raise
        print(f"stepmark: {_said(error)}", file=sys.stderr)
        return 2
    finally:
        left_out = [" ".join(text.split()) for text in plugins.left_out()]
        for text in [*left_out[:MOST], *([f"and {len(left_out) - MOST} more"] if len(left_out) > MOST else [])]:
            print(f"stepmark: warning, left out: {text}", file=sys.stderr)


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; a word that is not known ends the program with what was perhaps meant."""
    parser, commands = _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        parser.error(unknown("command", argv[0], commands))
    arguments, beyond = parser.parse_known_args(argv)
    if beyond:
        asked = commands.get(argv[0], parser)
        options = re.findall(r"--[a-z-]+", asked.format_help())
        guess = meant(beyond[0].partition("=")[0], options) if beyond[0].startswith("-") else ""
        asked.error(f"{beyond[0]!r} is not understood" + (f"; {guess}" if guess else ""))
    return arguments


def _start(arguments: argparse.Namespace) -> int:
    print(START)
    return 0


def _expected(error: Exception) -> bool:
    """Errors that say in one line what to mend; anything else is a fault of ours and shows its trace."""
    return isinstance(error, (OSError, UnicodeDecodeError)) or type(error).__name__ in {
        "PluginError",
        "RecordError",
        "ClaimError",
        "DeviceBusy",
        "KeyError",
        "ValueError",
        "ModuleNotFoundError",
    }


def _said(error: Exception) -> str:
    """An expected error as one line."""
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
        mend = (
            f"pip install -e '.[{extra}]' in the checkout" if plugins.checkout() else f"pip install 'stepmark[{extra}]'"
        )
        return f"{error.name} is not installed; it comes with the extra {extra}: {mend}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())


def _parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and that of each command."""
    parser = Parser(
        prog="stepmark",
        description="How much quality does each inference step, millisecond, megabyte and joule buy?",
        epilog="First steps: stepmark list, then stepmark tour, then stepmark show. A method of your own: stepmark new.",
    )
    parser.add_argument("--version", action="version", version=f"stepmark {__version__}")
    parser.set_defaults(action=_start)
    commands = parser.add_subparsers(metavar="COMMAND")
    made: dict[str, Parser] = {}

    def command(name: str, action: Callable[[argparse.Namespace], int], text: str, more: str = "") -> Parser:
        found = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {more}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        found.set_defaults(action=action)
        made[name] = found
        return found

    found = command(
        "list",
        catalogue.list_plugins,
        "list methods, tasks, datasets, backbones or tracks",
        "One line for each, so that it can be\nsearched: stepmark list methods | grep decoding\n\n"
        "  stepmark list            everything, short\n"
        "  stepmark list tasks      the tasks with their rungs, seeds and metrics, and which way is better",
    )
    found.add_argument(
        "what",
        nargs="?",
        type=_one_of("all", "methods", "tasks", "datasets", "backbones", "tracks"),
        default="all",
        help="all (default), methods, tasks, datasets, backbones or tracks",
    )

    found = command(
        "run",
        running.run,
        "run cells of the suite and write their records",
        "Cells that already have a record of the\nsame digests are left alone: repeat the command to resume a stopped run.\n\n"
        "With --backbone FOLDER the methods run on a checkpoint of yours instead:\n"
        "  stepmark run --backbone FOLDER                    every method that applies\n"
        "  stepmark run --backbone FOLDER --tier smoke       the same on two items, to see whether it works\n"
        "  stepmark run --backbone FOLDER --method unipc --rung 10 --rung 20 --guidance 4\n"
        "  stepmark run --backbone FOLDER --reasoning problems    word problems, by the methods that reason in words",
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
    repeat = found.add_mutually_exclusive_group()
    repeat.add_argument("--again", action="store_true", help="run also what has a record already")
    repeat.add_argument(
        "--lacking",
        action="store_true",
        help="leave alone also what any other machine has a record of: to share a board out over machines",
    )
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

    found = command(
        "check",
        catalogue.check,
        "check plugins against the contract and say what is wrong and where",
        "The source is read first; then\n"
        "every task of a plugin runs on a few items, at several rungs, audited. A minute or so for each task; what it\n"
        "is at stands on stderr. Exit status 1 when something is to mend. What is only a warning keeps nobody out.\n\n"
        "  stepmark check methods/image/my_sampler.py            before a pull request\n"
        "  stepmark check --no-run methods/image/my_sampler.py   the source only, at once",
    )
    found.add_argument("path", type=Path, nargs="+", help="methods/<track>/<id>.py")
    found.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    found.add_argument("--no-run", action="store_true", help="read the source only")

    found = command(
        "new",
        catalogue.new,
        "start a new plugin from a template",
        "The folder above the file is its track, the name of\nthe file its id. Any folder will do: STEPMARK_METHODS says where "
        "yours is.\n\nIn this repository the file is named after its paper's id in leaderboard/catalogue.jsonl;\n"
        "what is nobody's row there, a reference point, stands in methods/<track>/baselines/ and has no\npaper and no headline: "
        "--baseline writes it there.\n\n"
        "  stepmark new methods/image/my_sampler\n"
        "  stepmark new methods/image/my_midpoint --baseline\n"
        "  stepmark new methods/decoding/my_drafter --task greedy/stories",
    )
    found.add_argument("path", type=Path, help="methods/<track>/<id>")
    found.add_argument("--task", metavar="KIND/NAME", help="which task it starts with (stepmark list tasks)")
    found.add_argument(
        "--baseline",
        action="store_true",
        help="a reference point that is no paper's: paper = None, in the folder baselines of its track",
    )

    found = command(
        "show",
        records.show,
        "print the leaderboard as an aligned table",
        "A table for each task and machine, the published records\nunless --results says others. Groups are methods that a "
        "paired test does\nnot tell apart; variants of a paper's method are indented.\n\n"
        "  stepmark show --task class_to_image/digits_flow\n  stepmark show --method ddim --variants\n"
        "  stepmark show --task greedy/stories --metric tokens --metric accuracy",
    )
    add_selection(found)
    found.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="this metric, on the tasks that have it, instead of the first of each task (stepmark list tasks); may be given "
        "several times, the first makes the groups",
    )

    found = command(
        "compare",
        records.compare,
        "compare two methods by paired tests",
        "Wherever both have figures at the same rung; p values are\nHolm's, over all of these tests.\n\n"
        "  stepmark compare ddim heun\n  stepmark compare medusa speculative --track decoding\n"
        "  stepmark compare medusa speculative --metric tokens",
    )
    found.add_argument("a", metavar="METHOD", help="a method that has records (stepmark show)")
    found.add_argument("b", metavar="METHOD", help="another")
    found.add_argument("--track", help="only this track")
    found.add_argument(
        "--metric",
        metavar="NAME",
        help="this metric, on the tasks that have it, instead of the first of each task (stepmark list tasks)",
    )
    found.add_argument("--tier", choices=["smoke", "embedded", "hub"], default="embedded")
    add_results(found)

    found = command(
        "verify",
        records.verify,
        "run recorded cells again and say what agrees",
        "Exit status 1 when something does not.\n\n"
        "  stepmark verify FILE:3                 one record\n"
        "  stepmark verify --sample 12 --keep     twelve records; what was measured becomes records of this machine\n"
        "  stepmark verify --slice 3/7 --keep     a seventh of all records",
    )
    found.add_argument("record", nargs="?", help="a record file, or FILE:LINE for one record of it")
    found.add_argument("--sample", type=int, metavar="N", help="instead: N published records, drawn over the methods")
    found.add_argument("--seed-of-sample", type=int, default=0, metavar="S", help="another S draws others (default 0)")
    found.add_argument(
        "--slice", metavar="K/N", help="instead: the K-th of N parts of all records; together they are the whole board"
    )
    found.add_argument(
        "--keep",
        action="store_true",
        help="write what was measured, times included, as records of this machine: a second machine that agrees makes "
        "figures reproduced, one that does not makes them disputed",
    )
    found.add_argument("--into", type=Path, metavar="FOLDER", help="with --keep: write there, not beside the records")
    found.add_argument("--no-timing", action="store_true", help="with --keep: skip latency, memory and energy")
    found.add_argument(
        "--tier", choices=["smoke", "embedded", "hub"], default="embedded", help="with --sample and --slice"
    )
    found.add_argument("--device", help="cuda:1 ...; of the kind that the record names (default)")
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
    found.add_argument(
        "--carry",
        action="store_true",
        help="after the version was raised: take records whose sources have not changed since into the new version",
    )

    found = command(
        "site",
        publish.site,
        "build the static site from the records",
        "Plain files that work from disk, without a server or a network.",
    )
    add_results(found)
    found.add_argument("--out", type=Path, help="folder of the built site (default build/site)")
    found.add_argument("--tier", choices=["smoke", "embedded", "hub"], default="embedded")

    found = command("backbones", catalogue.backbones, "list or retrain the embedded reference models")
    found.add_argument("do", choices=["list", "train"], nargs="?", default="list")
    found.add_argument("id", nargs="*", help="with train: which (minutes each on one core)")
    return parser, made


def _one_of(*words: str) -> Callable[[str], str]:
    """A type of argument: one of these words."""

    def word(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(unknown("list", text, words))
        return text

    return word


if __name__ == "__main__":
    sys.exit(main())
