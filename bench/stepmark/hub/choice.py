"""What somebody chose on the command line, and what was made of it: data that the rest of the package passes around."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepmark.hub import prompts
from stepmark.task import DRAWN_ID, DTYPES, REASONED_ID, Task

PREFIX = "checkpoint/"  # begins the ids of tasks that are made from a folder, and of their backbones
NEW_TOKENS = 64  # written to a prompt at most, where nothing else is said


@dataclass(frozen=True)
class Choice:
    """What the command line said of a checkpoint. None: not said.

    Attributes:
        folder, draft: the checkpoint, and the draft model beside it (texts).
        guidance: scale of classifier-free guidance (images); 1 is none.
        prompts: a file of prompts. chat: each is a user's message, in the chat template of the folder (texts).
        temperature: texts are drawn at it; 0 is greedy.
        items, new_tokens: items scored; tokens written to a prompt at most.
        rungs: the ladder.
        dtype: what weights are loaded as and computed in, as torch calls it.
        reasoning: questions of the reasoning track are asked, of this language (`english.LANGUAGES`).
    """

    folder: str
    guidance: float = 1.0
    prompts: str | None = None
    draft: str | None = None
    items: int | None = None
    new_tokens: int | None = None
    rungs: tuple[int, ...] = ()
    dtype: str = "float32"
    chat: bool = False
    temperature: float = 0.0
    reasoning: str | None = None

    @property
    def words(self) -> str:
        """The options of the command line that say the same; folders and files by their names only."""
        named = {"backbone": self.folder, "prompts": self.prompts, "draft": self.draft}
        said = [f"--{option} {Path(path).name}" for option, path in named.items() if path]
        said += [f"--guidance {self.guidance:g}"] if self.guidance != 1 else []
        said += [f"--reasoning {self.reasoning}"] if self.reasoning else []
        said += ["--chat"] if self.chat else []
        said += [f"--temperature {self.temperature:g}"] if self.temperature else []
        said += [f"--dtype {self.dtype}"] if self.dtype != DTYPES[0] else []
        said += [f"--items {self.items}"] if self.items else []
        return " ".join([*said, *([f"--new-tokens {self.new_tokens}"] if self.new_tokens else [])])

    @property
    def id(self) -> str:
        """Of the task: readable, unique only together with its checkpoint. Names in other scripts end in a digest."""
        said = Path(self.folder).name
        name = re.sub(r"[^a-z0-9]+", "_", said.lower()).strip("_")[:48]
        taken = DRAWN_ID.search(name) or REASONED_ID.search(name)  # nothing in a name is to look like an option
        if not name or not said.isascii() or taken:
            name = REASONED_ID.sub("_", DRAWN_ID.sub("_", name))[:39]
            name = f"{name}_{hashlib.sha256(said.encode()).hexdigest()[:8]}".strip("_")
        scale = f"{self.guidance:g}".replace(".", "p").replace("-", "m").replace("+", "")
        guided = f"_w{scale}" if self.guidance != 1 else ""
        long = f"_t{self.new_tokens}" if self.new_tokens not in (None, NEW_TOKENS) else ""
        short = f"_{self.dtype}" if self.dtype != DTYPES[0] else ""
        drawn = "_at" + f"{self.temperature:g}".replace(".", "p") if self.temperature else ""
        reasoned = f"_{self.reasoning}" if self.reasoning else ""
        return f"{PREFIX}{name}{guided}{reasoned}{long}{'_chat' if self.chat else ''}{drawn}{short}"

    def lines(self) -> list[str]:
        """The prompts of the file; [] where none was given.

        Raises:
            FileNotFoundError, ValueError: there is no such file, or nothing in it.
        """
        if self.prompts is None:
            return []
        return [prompt.text for prompt in prompts.read(Path(self.prompts))]


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint: its folder, class, configuration and weights."""

    folder: Path
    kind: str
    config: dict[str, Any]
    weights: tuple[Path, ...]
    variant: str | None = None

    def __str__(self) -> str:
        return str(self.folder)


@dataclass(frozen=True)
class Made:
    """What was made of a choice: a task of a track, and the networks behind its backbones.

    Attributes:
        parts: role -> network. scheduler: the configuration of the noise schedule (images).
        kind: what an image network predicts: "flow", "epsilon", "v" or "sample"; "text" of a language model.
        family: how the ids begin of tasks of Stepmark's own whose methods apply.
        new_tokens: tokens written to a prompt at most; 0 of images.
        shape: of an image, or of the latents that stand for it: channels, height, width; () of texts.
    """

    choice: Choice
    track: str
    task: Task
    parts: dict[str, Part]
    scheduler: dict[str, Any]
    kind: str
    family: tuple[str, ...]
    new_tokens: int = 0
    shape: tuple[int, ...] = ()

    @property
    def folder(self) -> Path:
        """The folder that was named."""
        return Path(self.choice.folder)
