"""A user's own checkpoint folder as a source of tasks, for `stepmark run --backbone FOLDER`.

The folder is one of Hugging Face's formats, already on this machine: nothing is downloaded, no code of the folder is
run, weights are read from safetensors only. Images: the classes of diffusers that `image_kinds.KINDS` lists, alone or in a
pipeline. Texts: causal language models of transformers with a cache of
its own kind.

Nothing else in Stepmark knows of folders. While one is open, its task stands among the others, and what is different
about it stands in the fields of `Task`: its module, its words on the command line, the price of a row, what it lacks.

    choice.py, folders.py      what was chosen; what lies in a folder
    image_tasks.py, text_tasks.py, tasks.py, digests.py      the task that is made of it, from configurations alone
    prompts.py                 texts to go on with, and their tokens
    image_kinds.py, image_prompts.py      what each class of image networks is called with; its conditions
    image_networks.py, text_networks.py, pretrained.py       the networks
    presented.py, stage.py, layers.py, whole.py              a language model as the track drives one
    english.py, spoken.py      reasoning in English; its words and a checkpoint's tokens
    side_by_side.py, reasoning_networks.py      many texts on one model, as that track drives one
    reasoning_tasks.py         the task of that track
    image.py, decoding.py, reasoning.py      inputs, check and score of the tasks, as a track has them
    source.py                  the one that is open
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace

from stepmark.hub import reasoning_tasks, source, tasks, text_tasks
from stepmark.hub.choice import Choice, Made

__all__ = ["VARIABLE", "Choice", "Made", "restore", "using"]

VARIABLE = "STEPMARK_BACKBONE"  # tells the processes that this one starts what is open


@contextlib.contextmanager
def using(choice: Choice) -> Iterator[Made]:
    """Inside, there is the task of a checkpoint; processes that are started inside have it by `restore`.

    Raises:
        FileNotFoundError, ValueError: the folder cannot be used. One line that names the mend.
    """
    here = {name: os.path.abspath(path) for name in ("folder", "prompts", "draft") if (path := getattr(choice, name))}
    choice = replace(choice, **here)
    said, before = os.environ.get(VARIABLE), source.opened()
    made = tasks.made_from(choice)
    try:
        os.environ[VARIABLE] = json.dumps(asdict(choice))
        source.switch(made)
        if (
            made.track == "decoding"
        ):  # faults are told before anything is measured, and before weights are read if may be
            from stepmark.hub import text_networks

            for part in made.parts.values():
                text_networks.decided(part)
            text_tasks.fit(made)
        if made.track == "reasoning":
            from stepmark.hub import text_networks

            text_networks.decided(made.parts["target"])
            reasoning_tasks.fit(made, source.speech())
        for backbone in made.task.backbones.values():
            source.load(backbone)
        yield made
    finally:
        os.environ.pop(VARIABLE)
        os.environ |= {VARIABLE: said} if said is not None else {}
        source.switch(before)


def restore() -> None:
    """Open what the process that started this one has open; nothing where it has none.

    Raises:
        FileNotFoundError, ValueError: the folder cannot be used here.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        return
    try:
        fields = json.loads(value)
        choice = Choice(**{**fields, "rungs": tuple(fields["rungs"])})
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"${VARIABLE} is for Stepmark itself; unset it and give --backbone FOLDER") from None
    opened = source.opened()
    if opened is None or opened.choice != choice:
        source.switch(tasks.made_from(choice))
