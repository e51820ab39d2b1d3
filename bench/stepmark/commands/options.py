"""Options that several commands share, and what they mean once they are parsed."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from stepmark import devices, plugins
from stepmark.places import results_folder, writable_cache
from stepmark.task import DTYPES

if TYPE_CHECKING:
    from stepmark.hub import Choice
    from stepmark.suite import Selection


# What is said beside everything that this tier writes.
SMOKE = "a few items, enough to see that a method works. What they give is no measurement, and nothing to compare by"


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Which cells, and where their records lie."""
    parser.add_argument(
        "--tier",
        choices=["smoke", "embedded", "hub"],
        help="default: embedded, or hub with --backbone; smoke is a few items, to see that a method works, not how well",
    )
    for name, text in (("method", "ID"), ("track", "TRACK"), ("task", "KIND/NAME")):
        parser.add_argument(f"--{name}", action="append", default=[], metavar=text, help="may be given several times")
    parser.add_argument("--variants", action="store_true", help="with --method: the variants of these methods too")
    parser.add_argument(
        "--rung", action="append", type=int, default=[], metavar="N", help="of the task's; with --backbone any"
    )
    parser.add_argument("--seed", action="append", type=int, default=[], metavar="N")
    add_results(parser)


def add_results(parser: argparse.ArgumentParser) -> None:
    """Where records lie."""
    parser.add_argument("--results", type=Path, help="folder of the records")


def results_of(arguments: argparse.Namespace, tier: str = "embedded") -> Path:
    """The folder of the records that are to be read.

    Raises:
        FileNotFoundError: the one that was named is not there.
    """
    if arguments.results is not None and not arguments.results.is_dir():
        raise FileNotFoundError(f"--results {arguments.results}: there is no such folder")
    return arguments.results or results_folder(tier)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """A checkpoint folder, and how it is asked."""
    group = parser.add_argument_group(
        "a checkpoint of your own (tier hub)",
        "A folder in one of Hugging Face's formats, with weights in safetensors; nothing is downloaded and no code of\n"
        "the folder is run. Image networks of diffusers (UNets of Stable Diffusion and its XL, transformers of DiT, PixArt,\n"
        "Stable Diffusion 3, Flux, AuraFlow, Sana, Lumina 2 and Qwen-Image; alone with a scheduler_config.json, or as a\n"
        "whole pipeline) are followed to where their own ODE leads: endpoint_error is the distance from there. Language\n"
        "models, every decoder of transformers whose cache is one of its own, write greedily: first_divergence is how many\n"
        "tokens of plain greedy decoding a budget buys; or, with --temperature, they draw. Methods that need training data\n"
        "are skipped.",
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
        "rows of the network and counts as 2 NFE: rung 20 is ten steps. A network that is told its guidance (FLUX.1 dev, "
        "latent consistency models) is given W, and takes one row. Default 1, no guidance",
    )
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help='one prompt a line, or JSON lines such as {"prompt": "Once", "kind": "story"}, read by the tokenizer (and '
        "text encoder) of the folder. Without it: made-up embeddings for images; for texts prompts of our own, or random "
        "tokens where the folder has no tokenizer",
    )
    group.add_argument(
        "--chat", action="store_true", help="texts: each prompt is a user's message in the folder's chat template"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="texts: draw them at this temperature; tokens is how many a budget buys, token_bias whether they are drawn "
        "from the model's own distributions (about 1 where they are). Default 0, greedy",
    )
    group.add_argument(
        "--reasoning",
        choices=("problems", "countdown", "deduction"),
        help="texts: ask the questions of the reasoning track in English, with worked examples, and run its methods: word "
        "problems, countdown and the Game of 24, or deduction from rules. Methods that need a trained head, a verifier or a "
        "second size are skipped",
    )
    group.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights and of what is computed")
    group.add_argument("--draft", metavar="FOLDER", help="texts: a small model of the same vocabulary, for speculative")
    group.add_argument(
        "--items", type=int, metavar="N", help="samples or prompts that are scored (default 16, or all prompts)"
    )
    group.add_argument(
        "--new-tokens", type=int, metavar="N", help="texts: tokens written to a prompt at most (default 64)"
    )


def tier_of(arguments: argparse.Namespace) -> str:
    """The tier asked for, or the one that goes without saying."""
    own = getattr(arguments, "backbone", None) is not None
    quick = getattr(arguments, "quick", False)
    tier = arguments.tier or ("smoke" if quick else "hub" if own else "embedded")
    if own and tier == "embedded":
        raise ValueError(
            "--backbone brings its own tasks: leave out --tier embedded (hub is meant; smoke is a quick look)"
        )
    return str(tier)


def ready(arguments: argparse.Namespace) -> None:
    """Of a command that runs methods: is the device there, can the cache be written? On Ray the nodes have the device.

    Raises:
        ValueError: no; in one line that says what to do.
    """
    if getattr(arguments, "list", False) or getattr(arguments, "no_run", False) or not hasattr(arguments, "device"):
        return
    if arguments.device is not None and getattr(arguments, "engine", "local") == "local":  # None: what a record names
        devices.named(arguments.device)
    writable_cache()


def workers_of(arguments: argparse.Namespace) -> int:
    """How many workers were asked for: as many as there are devices for, where 0 was said. One, where Ray has them."""
    if getattr(arguments, "engine", "local") != "local":
        return 1
    from stepmark import engine

    return engine.workers_of(arguments.device, arguments.workers)


def choice_of(arguments: argparse.Namespace) -> Choice | None:
    """The checkpoint that was chosen, if one was."""
    from stepmark.hub import Choice

    if arguments.backbone is None:
        names = ("prompts", "draft", "items", "new_tokens", "reasoning")
        said = ["--" + name.replace("_", "-") for name in names if getattr(arguments, name) is not None]
        said += ["--guidance"] if arguments.guidance != 1 else []
        said += ["--chat"] if arguments.chat else []
        said += ["--temperature"] if arguments.temperature else []
        said += ["--dtype"] if arguments.dtype != DTYPES[0] else []
        if said:
            raise ValueError(f"{said[0]} is for a checkpoint of your own: add --backbone FOLDER")
        return None
    if any(n is not None and n < 1 for n in (arguments.items, arguments.new_tokens)):
        raise ValueError("--items and --new-tokens are at least 1")
    if not math.isfinite(arguments.guidance):
        raise ValueError("--guidance is a number, such as 4")
    if not 0 <= arguments.temperature < math.inf:
        raise ValueError("--temperature is a number from 0 on, such as 0.7")
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
        dtype=arguments.dtype,
        chat=arguments.chat,
        temperature=arguments.temperature,
        reasoning=arguments.reasoning,
    )


def methods_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The methods that were named, with their variants where those were asked for."""
    named = list(arguments.method)
    if arguments.variants and not named:
        raise ValueError("--variants is for --method ID: without it every method and variant is meant")
    if arguments.variants:
        named += [info.id for info in plugins.methods().values() if info.base in arguments.method]
    return tuple(dict.fromkeys(named))


def selection_of(arguments: argparse.Namespace) -> Selection:
    """The cells that were chosen."""
    from stepmark.suite import Selection

    return Selection(
        tier=arguments.tier,
        methods=methods_of(arguments),
        tracks=tuple(arguments.track),
        tasks=tuple(arguments.task),
        rungs=tuple(arguments.rung),
        seeds=tuple(arguments.seed),
        quick=getattr(arguments, "quick", False),
    )
