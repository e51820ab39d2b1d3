"""The checkpoint that is open in this process, as a source of tasks (`stepmark.plugins`) and of networks.

Tasks and networks are looked up by name where they are needed; here the names of an open checkpoint are entered, and
taken out again. One checkpoint is open at a time.
"""

from __future__ import annotations

import importlib
from copy import deepcopy
from functools import lru_cache
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from stepmark import backbones, plugins
from stepmark.backbones import words
from stepmark.hub import digests, prompts, text_tasks
from stepmark.hub.choice import PREFIX, Made
from stepmark.plugins import MethodInfo
from stepmark.task import Task

if TYPE_CHECKING:
    import torch
    from torch import nn

    from stepmark.hub.spoken import Speech


LM = "stepmark.backbones.lm"


class Checkpoint:
    """A `plugins.Source` of one task."""

    restorer = "stepmark.hub"

    def __init__(self, made: Made) -> None:
        self.made = made

    def tasks(self) -> dict[str, tuple[str, Task]]:
        """The task by its id, with its track."""
        return {self.made.task.id: (self.made.track, self.made.task)}

    def suits(self, info: MethodInfo) -> list[str]:
        """The task, where a method names one of the same family."""
        apt = info.track == self.made.track and any(task.startswith(self.made.family) for task in info.tasks)
        return [self.made.task.id] if apt else []

    def inputs_digest(self, task: Task) -> str:
        """sha256 over what the items are made from."""
        return digests.of_inputs(self.made)


class Words:
    """The tokenizer of a checkpoint, as `backbones.lm` asks for one: what methods encode is in the words of their target."""

    def __init__(self, made: Made) -> None:
        self.made = made

    def __call__(self) -> Words:
        return self

    def encode(self, text: str) -> SimpleNamespace:
        """`ids`: token ids of a prompt."""
        return SimpleNamespace(ids=text_tasks.encoded(self.made, prompts.Prompt(text)))


_open: Checkpoint | None = None
_words: Any = None  # the tokenizer of Stepmark's own models, while another one takes its place


def switch(made: Made | None) -> None:
    """Close the checkpoint that is open, let go of its networks, and open another (None: none)."""
    global _open, _words
    if _words is not None:
        before: Any = importlib.import_module(LM)
        before.tokenizer, _words = _words, None
    if _open is not None:
        plugins.remove_source(_open)
        backbones.remove_source(PREFIX)
        _whole.cache_clear()
        speech.cache_clear()
        words.lend(None)
    _open = None if made is None else Checkpoint(made)
    if _open is not None:
        plugins.add_source(_open)
        backbones.add_source(PREFIX, load, digest)
    if made is not None and made.track == "reasoning":
        words.lend(lambda ids: speech().say(ids))
    if made is not None and made.track == "decoding" and text_tasks.scored(made.choice):
        lm: Any = importlib.import_module(LM)
        _words, lm.tokenizer = lm.tokenizer, Words(made)


def opened() -> Made | None:
    """What is open; None: nothing."""
    return None if _open is None else _open.made


def current() -> Made:
    """What is open.

    Raises:
        KeyError: nothing is.
    """
    if _open is None:
        raise KeyError("this task is made from a checkpoint folder: name it by --backbone FOLDER")
    return _open.made


@lru_cache(maxsize=1)
def speech() -> Speech:
    """How the tokenizer of what is open speaks its language of the reasoning track.

    Raises:
        ValueError: it cannot.
    """
    from stepmark.hub.spoken import Speech

    return Speech(current(), str(current().choice.reasoning))


def load(backbone: str, device: torch.device | str = "cpu") -> nn.Module:
    """The network behind `checkpoint/<role>`: a new module each time, with the same tensors, which are loaded once."""
    whole = _whole(backbone.removeprefix(PREFIX), str(device))
    return deepcopy(whole, {id(tensor): tensor for tensor in chain(whole.parameters(), whole.buffers())})


@lru_cache(maxsize=4)
def _whole(role: str, device: str) -> nn.Module:
    made = current()
    if made.track == "image":  # imported here: torch and the libraries of models take seconds
        from stepmark.hub import image_networks

        return image_networks.build(made, device)
    if made.track == "reasoning":
        from stepmark.hub import reasoning_networks

        return reasoning_networks.build(made, speech(), device)
    from stepmark.hub import text_networks

    return text_networks.build(made, role, device)


def digest(backbone: str) -> str:
    """sha256 of the network behind `checkpoint/<role>`."""
    return digests.of_network(current(), backbone.removeprefix(PREFIX))
