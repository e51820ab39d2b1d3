"""What figures on a checkpoint hang on, as digests: its networks, and what items are made from."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from stepmark import plugins
from stepmark.hub.choice import Made
from stepmark.hub.prompts import OWN
from stepmark.hub.text_tasks import prompts_of
from stepmark.places import PACKAGE, checkout
from stepmark.task import DTYPES

TOKENIZER = ("tokenizer*.json", "tokenizer.model", "chat_template*")
ENCODERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3")


def of_network(made: Made, role: str) -> str:
    """sha256 over configuration, weights and noise schedule of a network, and the guidance."""
    part = made.parts[role]
    sha = hashlib.sha256(
        json.dumps([part.config, made.scheduler, made.choice.guidance, *_said(made)], sort_keys=True).encode()
    )
    for path in (*part.weights, part.folder / "generation_config.json"):
        if path.is_file():
            sha.update(f"{path.name} {_of_file(path)}".encode())
    return sha.hexdigest()


def _said(made: Made) -> list[str]:
    """What was chosen of a network beside its files, where it is not what goes without saying."""
    return [] if made.choice.dtype == DTYPES[0] else [made.choice.dtype]


def of_prompts(made: Made) -> str:
    """sha256 over the prompts and what encodes them, how many tokens are written to each, and how they are chosen."""
    drawn = f" at {made.choice.temperature:g}" if made.choice.temperature else ""
    reasoned = f" {made.choice.reasoning}" if made.choice.reasoning else ""
    sha = hashlib.sha256(f"{made.new_tokens}{' chat' if made.choice.chat else ''}{drawn}{reasoned}".encode())
    file = prompts_of(made.choice)
    if file is not None:
        sha.update(_of_file(file).encode() + _of_file(OWN).encode())  # of our own some are looked at beforehand
        inside = [p for name in ENCODERS for p in sorted((made.folder / name).glob("*")) if p.is_file()]
        for path in [*inside, *sorted(p for name in TOKENIZER for p in made.folder.glob(name))]:
            sha.update(f"{path.name} {_of_file(path)}".encode())
    return sha.hexdigest()


def of_inputs(made: Made) -> str:
    """sha256 over what the items are made from: the code of this package, and of the questions, and the prompts."""
    code = plugins.code_digest(Path(__file__).with_name("__init__.py"))  # of a package: all of its files
    if made.choice.reasoning:
        questions = (checkout() or PACKAGE) / "datasets" / f"{made.choice.reasoning}.py"
        code += plugins.code_digest(questions)
    return hashlib.sha256(f"{code} {of_prompts(made)}".encode()).hexdigest()


def of_checkpoint(made: Made) -> str:
    """sha256 over all that was brought: networks of every role, guidance, prompts, how many items, length of the texts.

    Figures under two of these are never compared, whatever the folders are called: the items would be others.
    """
    networks = {role: of_network(made, role) for role in made.parts}
    said = json.dumps([networks, of_prompts(made), made.task.n], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _of_file(path: Path) -> str:
    state = path.stat()
    return _kept(path, (state.st_mtime_ns, state.st_size, state.st_ino))


@lru_cache(maxsize=256)
def _kept(path: Path, state: tuple[int, ...]) -> str:
    """`state` stands for the bytes of the file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
