"""Checkpoint folders: a task made at run time from a model that the user has, for `stepmark run --backbone FOLDER`.

The folder is one of Hugging Face's formats, already on this machine: nothing is downloaded, no code of the folder is
run, weights are read from safetensors only. What the command line chose stands in `$STEPMARK_BACKBONE`, so that worker
processes make the same task. Images: diffusers' UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel and
PixArtTransformer2DModel, alone or in a pipeline (`checkpoint_image`). Texts: causal language models of transformers whose
layers are called like Llama's (`checkpoint_text`).

This module reads configurations and digests; the networks themselves are built in the other two.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepmark.task import CHECKPOINT, CHECKPOINT_METRICS, Task

if TYPE_CHECKING:
    import torch
    from torch import nn

    from stepmark.plugins import MethodInfo

VARIABLE = "STEPMARK_BACKBONE"
IMAGE_CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
IMAGE_RUNGS, IMAGE_ITEMS = (2, 4, 8, 16, 32, 64), 16
TEXT_RUNGS, TEXT_ITEMS, NEW_TOKENS = (8, 16, 32, 64), 16, 64


# -- what was chosen ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What the command line said of a checkpoint. None: not said.

    Attributes:
        folder, draft: the checkpoint, and the draft model beside it (texts).
        guidance: scale of classifier-free guidance (images); 1 is none.
        prompts: a file with one prompt a line.
        items, new_tokens: items scored; tokens written to a prompt at most.
        rungs: the ladder.
    """

    folder: str
    guidance: float = 1.0
    prompts: str | None = None
    draft: str | None = None
    items: int | None = None
    new_tokens: int | None = None
    rungs: tuple[int, ...] = ()

    @property
    def words(self) -> str:
        """The options of the command line that say the same; folders and files by their names only."""
        named = {"backbone": self.folder, "prompts": self.prompts, "draft": self.draft}
        said = [f"--{option} {Path(path).name}" for option, path in named.items() if path]
        said += [f"--guidance {self.guidance:g}"] if self.guidance != 1 else []
        said += [f"--items {self.items}"] if self.items else []
        return " ".join([*said, *([f"--new-tokens {self.new_tokens}"] if self.new_tokens else [])])


@contextlib.contextmanager
def using(choice: Choice) -> Iterator[Made]:
    """Inside, in this process and in those it starts, there is the task of a checkpoint, whose networks are loaded.

    Raises:
        FileNotFoundError, ValueError: the folder cannot be used. One line that names the mend.
    """
    here = {name: os.path.abspath(path) for name in ("folder", "prompts", "draft") if (path := getattr(choice, name))}
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = json.dumps(asdict(replace(choice, **here)))
    _forget()
    try:
        made = current()
        for backbone in made.task.backbones.values():
            load(backbone)
        if made.track == "decoding":
            from stepmark.backbones.checkpoint_text import prompts

            prompts(made)
        yield made
    finally:
        if before is None:
            os.environ.pop(VARIABLE)
        else:
            os.environ[VARIABLE] = before
        _forget()


def _forget() -> None:
    """Let go of networks."""
    for cached in (_made, _whole, _file_digest):
        cached.cache_clear()


# -- from a folder to a task ----------------------------------------------------------------------------------------


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
        kind: what an image network predicts: "flow", "epsilon", "v" or "sample".
        family: tasks of Stepmark's own whose methods apply.
        price: rows of the network that one evaluation takes: with guidance two, which the budget counts.
    """

    choice: Choice
    track: str
    task: Task
    parts: dict[str, Part]
    scheduler: dict[str, Any]
    kind: str
    family: frozenset[str]
    price: int = 1

    @property
    def folder(self) -> Path:
        """The folder that was named."""
        return Path(self.choice.folder)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image, or of the latents that stand for it: channels, height, width."""
        config = self.parts["teacher"].config
        size = config["sample_size"]
        height, width = size if isinstance(size, list) else (size, size)
        return config["in_channels"], height, width

    def suits(self, info: MethodInfo) -> bool:
        """Whether a method names a task of the same family."""
        return info.track == self.track and not self.family.isdisjoint(info.tasks)

    def lines(self) -> list[str]:
        """The prompts of the file; [] where none was given."""
        if self.choice.prompts is None:
            return []
        path = Path(self.choice.prompts)
        if not path.is_file():
            raise FileNotFoundError(f"--prompts {path} is no file; give a text file with one prompt a line")
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not found:
            raise ValueError(f"--prompts {path} is empty; write one prompt a line")
        return found


def current() -> Made:
    """What `$STEPMARK_BACKBONE` names.

    Raises:
        KeyError: it is not set. FileNotFoundError, ValueError: the folder cannot be used.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        raise KeyError("this task is made from a checkpoint folder: name it by --backbone FOLDER")
    return _made(value)


@lru_cache(maxsize=4)
def _made(value: str) -> Made:
    try:
        fields = json.loads(value)
        choice = Choice(**{**fields, "rungs": tuple(fields["rungs"])})
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"${VARIABLE} is for Stepmark itself; unset it and give --backbone FOLDER") from None
    folder = Path(choice.folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--backbone {folder} is no folder; download the checkpoint first, Stepmark itself asks no network"
        )
    part = _part(folder)
    return _image(choice, part) if part.kind in IMAGE_CLASSES else _text(choice, part)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give a folder that save_pretrained wrote")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; download it again")
    return found


def _part(folder: Path) -> Part:
    """The network in a folder, or in the unet/ or transformer/ of a pipeline."""
    if (folder / "model_index.json").is_file():
        inside = [folder / name for name in ("unet", "transformer") if (folder / name).is_dir()]
        if not inside:
            raise FileNotFoundError(f"{folder} is a pipeline without unet/ or transformer/; only those can be measured")
        folder = inside[0]
    config = _json(folder / "config.json")
    kind = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    if not isinstance(kind, str):
        raise ValueError(f"{folder}/config.json names no class (_class_name or architectures); save the model again")
    if kind not in IMAGE_CLASSES and not kind.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(f"{folder}: {kind} cannot be measured; {', '.join(IMAGE_CLASSES)} and ...ForCausalLM can")
    stem = "diffusion_pytorch_model" if kind in IMAGE_CLASSES else "model"
    for variant in (None, "fp16"):
        name = stem if variant is None else f"{stem}.{variant}"
        index = folder / f"{stem}.safetensors.index.{'json' if variant is None else f'{variant}.json'}"
        if index.is_file():
            shards = sorted(set(_json(index).get("weight_map", {}).values()))
            lacking = [shard for shard in shards if not (folder / shard).is_file()]
            if lacking or not shards:
                raise FileNotFoundError(
                    f"{folder}: {index.name} names {', '.join(lacking) or 'no file'}; download it again"
                )
            return Part(folder, kind, config, tuple(folder / shard for shard in shards), variant)
        if (folder / f"{name}.safetensors").is_file():
            return Part(folder, kind, config, (folder / f"{name}.safetensors",), variant)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        raise ValueError(
            f"{folder}: weights are in {pickled[0]}, a format that can run code when it is loaded; load it where you "
            "trust it, and save_pretrained(..., safe_serialization=True)"
        )
    raise FileNotFoundError(f"{folder} holds no {stem}.safetensors; download the weights too")


def _name(choice: Choice) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", Path(choice.folder).name.lower()).strip("_")[:48] or "folder"
    scale = f"{choice.guidance:g}".replace(".", "p").replace("-", "m")
    return f"{CHECKPOINT}{name}" + (f"_w{scale}" if choice.guidance != 1 else "")


def _fixed_tasks(track: str) -> list[Task]:
    """The tasks in the main module of a track."""
    from stepmark import plugins

    fixed = [task for owner, task in plugins.fixed_tasks().values() if owner == track]
    return [task for task in fixed if plugins.track_file(task.id).stem == track]


def _image(choice: Choice, part: Part) -> Made:
    for option, value in (("--draft", choice.draft), ("--new-tokens", choice.new_tokens)):
        if value is not None:
            raise ValueError(f"{option} is for language models; {part.kind} makes images")
    config = part.config
    for key in ("sample_size", "in_channels"):
        if not config.get(key):
            raise ValueError(f"{part}/config.json lacks {key}, the shape of a sample; write it there")
    outputs = config.get("out_channels") or config["in_channels"]
    if outputs not in (config["in_channels"], 2 * config["in_channels"]):
        raise ValueError(
            f"{part} takes {config['in_channels']} channels and gives {outputs}: models that are shown more than the "
            "sample (inpainting, depth) cannot be measured"
        )
    scheduler, kind = _schedule(Path(choice.folder), part)
    price = 1 if choice.guidance == 1 else 2
    rungs = choice.rungs or (IMAGE_RUNGS if price == 1 else IMAGE_RUNGS[1:])
    if any(rung % price for rung in rungs):
        raise ValueError("with guidance an evaluation takes two rows of the network: give even rungs")
    from stepmark.backbones.checkpoint_image import summary

    track = "image"
    word = "flow" if kind == "flow" else "eps"
    family = frozenset(t.id for t in _fixed_tasks(track) if word in t.backbones.get("teacher", "").split("_"))
    items = choice.items or IMAGE_ITEMS
    task = Task(
        id=_name(choice),
        version=1,
        summary="",
        dataset="checkpoint",
        backbones={"teacher": f"{CHECKPOINT}teacher"},
        reference="teacher",
        unit="NFE",
        rungs=rungs,
        metrics=dict(CHECKPOINT_METRICS[track]),
        n=items,
        batch=min(items, 8),
        probe=min(items, 4),
        seeds=1,
        smoke_n=min(items, 2),
        smoke_rungs=rungs[1:2] or rungs,
    )
    made = Made(choice, track, task, {"teacher": part}, scheduler, kind, family, price)
    return replace(made, task=replace(_described(made), summary=summary(made), origin=summary(made)))


def _schedule(folder: Path, part: Part) -> tuple[dict[str, Any], str]:
    """The configuration of the noise schedule, and what the network predicts."""
    places = [
        part.folder / "scheduler_config.json",
        part.folder / "scheduler" / "scheduler_config.json",
        part.folder.parent / "scheduler" / "scheduler_config.json",
    ]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{folder} has no scheduler/scheduler_config.json, which says what the network was trained on; add it"
        )
    config = _json(path)
    name = str(config.get("_class_name", ""))
    if name.startswith(("EDM", "ScoreSdeVe", "KarrasVe", "CMStochastic", "Cosine", "VQDiffusion")):
        raise ValueError(f"{path}: {name} is no schedule of steps beta or of straight paths; it cannot be measured")
    kinds = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}
    said = "flow_prediction" if "FlowMatch" in name else config.get("prediction_type", "epsilon")
    if said not in kinds:
        raise ValueError(f"{path}: prediction_type {said!r} is not known; it is one of {', '.join(kinds)}")
    return config, kinds[said]


def _text(choice: Choice, part: Part) -> Made:
    from stepmark import plugins

    if choice.guidance != 1:
        raise ValueError(f"--guidance is for images; {part.kind} writes text")
    parts = {"target": part}
    if choice.draft:
        if not Path(choice.draft).is_dir():
            raise FileNotFoundError(f"--draft {choice.draft} is no folder; give a checkpoint with the same vocabulary")
        parts["draft"] = _part(Path(choice.draft))
        if parts["draft"].kind in IMAGE_CLASSES:
            raise ValueError(f"--draft {choice.draft} makes images; give a language model")
    track = "decoding"
    kinds = ("greedy/", "recall/")  # of these the batches are what a checkpoint's task gives
    family = frozenset(t for t, (owner, _) in plugins.fixed_tasks().items() if owner == track and t.startswith(kinds))
    made = Made(choice, track, _UNKNOWN, parts, {}, "text", family)
    lines = made.lines()
    items = min(choice.items or len(lines), len(lines)) if lines else choice.items or TEXT_ITEMS
    source = f"{len(lines)} prompts of {Path(choice.prompts).name}" if choice.prompts else "prompts of random tokens"
    beside = f", drafts by {parts['draft'].folder.name}" if choice.draft else ""
    task = Task(
        id=_name(choice),
        version=1,
        summary=f"Greedy decoding of {part.kind} in {Path(choice.folder).name}, {source}{beside}",
        dataset="checkpoint",
        backbones={role: f"{CHECKPOINT}{role}" for role in parts},
        reference="target",
        bounded=("target",),
        unit="target forwards",
        rungs=choice.rungs or TEXT_RUNGS,
        metrics=dict(CHECKPOINT_METRICS[track]),
        n=items,
        batch=min(items, 8),
        probe=1,
        seeds=1,
        smoke_n=min(items, 2),
        smoke_rungs=(choice.rungs or TEXT_RUNGS)[:1],
    )
    made = replace(made, task=task)
    return replace(made, task=replace(_described(made), origin=task.summary))


def _described(made: Made) -> Task:
    """How the task differs from those of tracks."""
    return replace(
        made.task,
        module=f"stepmark.tracks.{made.track}_checkpoint",
        words=made.choice.words,
        price=made.price,
        absent={
            "draft": "needs a draft model: give one with --draft FOLDER",
            "*": "needs a network that a checkpoint folder does not bring",
        },
        untrained="needs training data, and a checkpoint folder brings none",
        follows="stories" if made.track == "decoding" else "",
        shown=False,
    )


_UNKNOWN = Task(f"{CHECKPOINT}unknown", 1, "", "checkpoint", "", (), {}, 0, 0)


# -- networks and digests -------------------------------------------------------------------------------------------


def load(backbone: str, device: torch.device | str = "cpu") -> nn.Module:
    """The network behind `checkpoint/<role>`: a new module each time, with the same tensors, which are loaded once."""
    whole = _whole(os.environ.get(VARIABLE, ""), backbone, str(device))
    return deepcopy(whole, {id(tensor): tensor for tensor in chain(whole.parameters(), whole.buffers())})


@lru_cache(maxsize=4)
def _whole(value: str, backbone: str, device: str) -> nn.Module:
    """`value`: the choice that it belongs to."""
    made, role = current(), backbone.removeprefix(CHECKPOINT)
    if made.track == "image":
        from stepmark.backbones import checkpoint_image

        return checkpoint_image.build(made, device)
    from stepmark.backbones import checkpoint_text

    return checkpoint_text.build(made, role, device)


def digest(backbone: str) -> str:
    """sha256 over configuration, weights and noise schedule of `checkpoint/<role>`, and the guidance."""
    made = current()
    part = made.parts[backbone.removeprefix(CHECKPOINT)]
    sha = hashlib.sha256(json.dumps([part.config, made.scheduler, made.choice.guidance], sort_keys=True).encode())
    for path in (*part.weights, part.folder / "generation_config.json"):
        if path.is_file():
            sha.update(f"{path.name} {_digest_of_file(path)}".encode())
    return sha.hexdigest()


def digest_of_inputs() -> str:
    """sha256 over what the items are made from: this code, the prompts, and what encodes them."""
    made = current()
    here = Path(__file__)
    paths = [here, here.with_name("checkpoint_image.py"), here.with_name("checkpoint_text.py")]
    if made.choice.prompts:
        encoders = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
        inside = [p for name in encoders for p in sorted((made.folder / name).glob("*")) if p.is_file()]
        paths += [Path(made.choice.prompts), *inside, *sorted(made.folder.glob("tokenizer*.json"))]
    sha = hashlib.sha256(f"{made.choice.new_tokens}".encode())
    for path in paths:
        sha.update(f"{path.name} {_digest_of_file(path)}".encode())
    return sha.hexdigest()


def _digest_of_file(path: Path) -> str:
    state = path.stat()
    return _file_digest(path, (state.st_mtime_ns, state.st_size, state.st_ino))


@lru_cache(maxsize=256)
def _file_digest(path: Path, state: tuple[int, ...]) -> str:
    """`state` stands for the bytes of the file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
