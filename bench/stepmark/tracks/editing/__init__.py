"""Track editing: how well is a picture changed as asked, and nothing else, with a budget of network evaluations?

A rung is a number of function evaluations (NFE) per picture, over all networks that `run` calls; the autoencoder counts, both
ways. What is shown is in the batch as latents too, for which nobody pays: only pictures that a method makes itself cost it an
evaluation each (`session.networks["vae"].encode`), every frame of a clip one. `run` receives noise, the source and what is
asked, and returns latents float [B, 4, 8, 8] (of clips [B, 8, 4, 8, 8]), which the harness decodes. What is in the batch,
beside "noise" in the shape of the answer, by kind of task:

    editing        "source" [B, 3, 32, 32]; "source_condition" and "condition" int64 [B, 32], captions before and after
    instructions   "source"; "instruction" int64 [B, 32]
    moving         "source"; "condition", its caption; "mask" bool [B, 32, 32], where the object shows; "shift" [B, 2], how far it
                   is to be moved (rows, columns; pixels)
    removing       "source"; "mask", where the object shows
    parts          "source"; "source_condition" and "condition", in which one half has another colour; "part" int64 [B]: the
                   upper (0) or the lower half
    tryon          "agnostic" [B, 3, 32, 32], a figure without its garment; "garment", the flat one; "mask", where it is blank
    swapping       "target", a figure in some garment; "identity", another figure in the garment that it is to wear
    clips          "source" [B, 8, 3, 32, 32]; "mask" bool [B, 8, 32, 32], where the object shows that is to be removed

and of every picture its latents by the shipped autoencoder, float [B, 4, 8, 8]:

    editing, instructions, moving, removing, parts   "source_latents"
    tryon          "agnostic_latents", "garment_latents"
    swapping       "target_latents", "identity_latents"
    clips          "source_latents" [B, 8, 4, 8, 8]; "blanked_latents", of the clip with 0 where the mask is

The renderer knows the answer. `psnr` is to the true picture after the edit, in decibels of a range of 2, `inside` that of the
pixels which the edit changes, and `kept` the mean absolute error of all others; all against the picture and not against what
the autoencoder makes of it, so that a perfect editor has the autoencoder's error. `edit` is the share of pictures in which the
eye sees the scene that was asked for. A copy of the source keeps everything and edits nothing: every verdict needs both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.backbones import load
from stepmark.datasets import tryon32
from stepmark.datasets.clips32 import FRAMES
from stepmark.datasets.edits32 import KINDS
from stepmark.datasets.scenes32 import scenes_of
from stepmark.task import Score, Task, harness_only, load_split
from stepmark.tracks.image import check as as_images
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.scenes.captions import BACKGROUNDS, COLOURS, LENGTH, Caption, read, texts, tokens, write
from stepmark.tracks.scenes.drawing import masks, pixels, render
from stepmark.tracks.scenes.metrics import caption_accuracy
from stepmark.tracks.scenes.parser import parse
from stepmark.tracks.text_to_image import decoded

# fmt: off
TASKS = (
    Task(
        id="editing/scenes", version=1, dataset="edits32",
        summary="Change a scene as a second caption says: eight kinds of edit, exact truth",
        backbones={"teacher": "scenes_eps", "vae": "scenes_vae"}, judges={"vae": "scenes_vae"}, reference="teacher",
        unit="NFE", rungs=(2, 4, 8, 16, 32, 64, 128), metrics={"edit": "higher", "kept": "lower", "psnr": "higher"},
        n=200, batch=100, seeds=3, smoke_n=6, smoke_rungs=(8,),
    ),
    Task(
        id="instructions/scenes", version=1, dataset="edits32",
        summary="Change a scene as an instruction says: eight kinds of edit, exact truth",
        backbones={"teacher": "scenes_eps", "vae": "scenes_vae"}, judges={"vae": "scenes_vae"}, reference="teacher",
        unit="NFE", rungs=(4, 8, 16, 32, 64), metrics={"edit": "higher", "kept": "lower", "psnr": "higher"},
        n=200, batch=100, seeds=3, smoke_n=6, smoke_rungs=(8,),
    ),
    Task(
        id="moving/scenes", version=1, dataset="edits32",
        summary="Move an object by so many pixels and fill the hole",
        backbones={"teacher": "scenes_eps", "vae": "scenes_vae"}, judges={"vae": "scenes_vae"}, reference="teacher",
        unit="NFE", rungs=(9, 16, 32, 65, 128), metrics={"psnr": "higher", "inside": "higher", "kept": "lower"},
        n=100, batch=100, seeds=3, smoke_n=6, smoke_rungs=(9,),
    ),
    Task(
        id="removing/scenes", version=1, dataset="edits32",
        summary="Take an object away",
        backbones={"teacher": "scenes_eps", "vae": "scenes_vae"}, judges={"vae": "scenes_vae"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 16, 32, 64), metrics={"inside": "higher", "edit": "higher", "kept": "lower"},
        n=100, batch=100, seeds=3, smoke_n=6, smoke_rungs=(1, 8),
    ),
    Task(
        id="parts/scenes", version=1, dataset="parts32",
        summary="Give one half of an object another colour",
        backbones={"teacher": "scenes_parts", "vae": "scenes_vae"}, judges={"vae": "scenes_vae"}, reference="teacher",
        unit="NFE", rungs=(8, 16, 32, 64, 128), metrics={"edit": "higher", "kept": "lower", "inside": "higher"},
        n=200, batch=100, seeds=3, smoke_n=6, smoke_rungs=(32,),
    ),
    Task(
        id="tryon/figures", version=1, dataset="tryon32",
        summary="Dress a figure in a garment that is shown flat",
        backbones={"teacher": "scenes_eps", "vae": "scenes_vae"}, judges={"vae": "scenes_vae"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 16, 28, 50), metrics={"inside": "higher", "psnr": "higher", "kept": "lower"},
        n=200, batch=100, seeds=3, smoke_n=6, smoke_rungs=(1, 8),
    ),
    Task(
        id="swapping/figures", version=1, dataset="tryon32",
        summary="Dress a figure in what another figure wears",
        backbones={"teacher": "scenes_eps", "vae": "scenes_vae"}, judges={"vae": "scenes_vae"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 4, 8, 16, 25, 50), metrics={"inside": "higher", "psnr": "higher", "kept": "lower"},
        n=200, batch=100, seeds=3, smoke_n=6, smoke_rungs=(1, 8),
    ),
    Task(
        id="clips/scenes", version=1, dataset="clips32",
        summary="Take an object out of clips of eight frames",
        backbones={"teacher": "scenes_eps", "vae": "scenes_vae"}, judges={"vae": "scenes_vae"}, reference="teacher",
        unit="NFE", rungs=(1, 2, 6, 12, 25, 50, 100), metrics={"inside": "higher", "worst": "higher", "kept": "lower"},
        n=40, batch=20, seeds=3, smoke_n=2, smoke_rungs=(2, 12),
    ),
)
# fmt: on
LATENT = (4, 8, 8)
SHOWN = {"tryon": "agnostic", "swapping": "target"}  # by kind, the picture that is changed where it is not "source"
ONLY = {"moving": "move", "removing": "remove"}  # of the kinds of edit
ENCODED = {  # by kind, of what there are latents, and which field of the test split it is; elsewhere of the source
    "parts": {"source": "x0"},
    "tryon": {"agnostic": "agnostic", "garment": "garment"},
    "swapping": {"target": "person"},
    "clips": {"source": "x0", "blanked": "blanked"},
}


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """What `run` receives, as at the top of this file: n held-out examples, and noise standard normal; drawn on the CPU."""
    harness_only("the test inputs")
    kind, data = task.id.partition("/")[0], load_split(task.dataset, "test")
    pool = torch.arange(len(data["x0"]))
    if kind in ONLY:
        pool = pool[data["kind"] == KINDS.index(ONLY[kind])]
    rows = pool[torch.randperm(len(pool), generator=generator)[:n]]
    shape = (len(rows), *((FRAMES,) if kind == "clips" else ()), *LATENT)
    found = {"noise": torch.randn(shape, generator=generator)}
    if kind == "parts":
        found |= _recoloured(data, rows, generator)
    elif kind == "clips":
        found |= {"source": data["x0"][rows], "mask": data["mask"][rows]}
    elif kind == "tryon":
        found |= {name: data[name][rows] for name in ("agnostic", "garment", "mask")}
    elif kind == "swapping":
        found |= {"target": data["person"][rows], "identity": _others(data["attributes"][rows], generator)}
    else:
        found["source"] = data["source"][rows]
        said = {"editing": ("source_tokens", "tokens"), "instructions": ("instruction_tokens",), "moving": ("tokens",)}
        names = {"source_tokens": "source_condition", "tokens": "condition", "instruction_tokens": "instruction"}
        found |= {names[each]: data[each][rows] for each in said.get(kind, ())}
        if kind == "moving":
            found["condition"] = data["source_tokens"][rows]
            found["shift"] = _moved(data, rows)
        if kind in ONLY:
            found["mask"] = _where(data, rows)
    vae = task.backbones["vae"]
    for name, pictures in ENCODED.get(kind, {"source": "source"}).items():
        found[f"{name}_latents"] = _split_latents(vae, task.dataset, pictures)[rows]
    if kind == "swapping":
        found["identity_latents"] = _latents(vae, found["identity"])
    return {name: value.to(device) for name, value in found.items()}


@lru_cache(maxsize=16)
def _split_latents(vae: str, dataset: str, name: str) -> Tensor:
    """A field of pictures of a test split, or "blanked", its clips without what is to be removed, as latents [N, ..., 4, 8, 8]:
    once in a process."""
    data = load_split(dataset, "test")
    pictures = data["x0"].masked_fill(data["mask"].unsqueeze(-3), 0.0) if name == "blanked" else data[name]
    return _latents(vae, pictures)


@torch.no_grad()
def _latents(vae: str, pictures: Tensor) -> Tensor:
    """Latents [n, ..., 4, 8, 8] of pictures [n, ..., 3, 32, 32], on the CPU."""
    encode = _autoencoder(vae).encode
    parts = [encode(part) for part in pictures.flatten(0, -4).split(100)]
    return torch.cat(parts).unflatten(0, pictures.shape[:-3])


@lru_cache(maxsize=1)
def _autoencoder(vae: str) -> Any:
    return load(vae)


def _recoloured(data: Mapping[str, Any], rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    part = torch.randint(2, (len(rows),), generator=generator)
    captions = [read(data["text"][row]) for row in rows.tolist()]
    wanted = []
    for caption, which in zip(captions, part.tolist(), strict=True):
        thing = caption.objects[0]
        free = [colour for colour in range(len(COLOURS)) if colour not in (thing.colour, thing.lower)]
        colour = free[int(torch.randint(len(free), (), generator=generator))]
        thing = replace(thing, lower=colour) if which else replace(thing, colour=colour)
        wanted.append(replace(caption, objects=(thing,)))
    return {
        "source": data["x0"][rows],
        "source_condition": data["tokens"][rows],
        "condition": tokens([write(caption) for caption in wanted]),
        "part": part,
    }


def _others(attributes: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures of other figures in garments of those attributes [n, 4]."""
    n = len(attributes)
    background = torch.randint(len(BACKGROUNDS), (n,), generator=generator).numpy()
    skin = torch.randint(len(tryon32.SKIN), (n,), generator=generator).numpy()
    low, high = torch.tensor([14.0, 11.0, 3.75]), torch.tensor([19.0, 21.0, 5.0])
    figure = (low + (high - low) * torch.rand(n, 3, generator=generator)).numpy()
    return pixels(tryon32.dressed(background, skin, figure, attributes.numpy())[0])


def _moved(data: Mapping[str, Any], rows: Tensor) -> Tensor:
    which, each = data["which"][rows], torch.arange(len(rows))
    return (data["geometry"][rows] - data["source_geometry"][rows])[each, which, :2]


def _where(data: Mapping[str, Any], rows: Tensor) -> Tensor:
    """Where the edited objects show in the sources, bool [n, 32, 32]."""
    source = {"objects": data["source_objects"][rows], "geometry": data["source_geometry"][rows]}
    shown = masks(scenes_of(source | {"background": data["background"][rows]}))
    return torch.from_numpy(shown[np.arange(len(rows)), data["which"][rows].numpy()] > 0)


def check(task: Task, batch: Mapping[str, Tensor], outputs: Any) -> None:
    """Latents must be one finite floating tensor shaped like the noise. Raises BadOutput."""
    as_images(task, batch, outputs)


def truth(task: Task, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, list[Caption]]:
    """The pictures after the edit [n, ..., 3, 32, 32], where they may differ from the source [n, ..., 32, 32], and what they
    show (of figures and clips nothing is said)."""
    harness_only("the true edits")
    kind, data = task.id.partition("/")[0], load_split(task.dataset, "test")
    if kind == "parts":
        return _halves_truth(data, _rows(data["x0"], batch["source"]), batch)
    if kind == "clips":
        rows = _rows(data["x0"], batch["source"])
        return data["without"][rows], data["mask"][rows], []
    if kind in SHOWN:
        name = {"tryon": "agnostic", "swapping": "person"}[kind]
        rows = _rows(data[name], batch[SHOWN[kind]])
        return data["x0"][rows], data["mask"][rows], []
    rows = _rows(data["source"], batch["source"])
    return data["x0"][rows], data["mask"][rows], [read(data["text"][row]) for row in rows.tolist()]


def _rows(pictures: Tensor, shown: Tensor) -> Tensor:
    """Which pictures of a split are shown [n]."""
    places = {picture.numpy().tobytes(): row for row, picture in enumerate(pictures)}
    return torch.tensor([places[picture.numpy().tobytes()] for picture in shown.cpu().float()])


def _halves_truth(
    data: Mapping[str, Any], rows: Tensor, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, list[Caption]]:
    captions = [read(text) for text in texts(batch["condition"].cpu())]
    keys = ("objects", "geometry", "background", "lower")
    scenes = scenes_of({name: data[name][rows] for name in keys})
    colours = [np.array([getattr(c.objects[0], name) for c in captions])[:, None] for name in ("colour", "lower")]
    wanted = [np.where(scenes.there, new, old) for new, old in zip(colours, (scenes.colour, scenes.lower), strict=True)]
    part = data["masks"][rows][torch.arange(len(rows)), batch["part"].cpu()]
    return render(replace(scenes, colour=wanted[0], lower=wanted[1])), part > 0, captions


def score(
    task: Task,
    batch: Mapping[str, Tensor],
    outputs: Tensor,
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """psnr, inside: decibels, mean over the pictures; the error is that of all pixels, or of those that the edit may change.
    kept: mean absolute error of the others, in units of pictures, whose range is 2. edit: share of pictures in which the eye
    sees what was asked for and nothing else. worst: of clips, `inside` of the worst frame.
    """
    harness_only("the metrics")
    latents = outputs.detach().cpu()
    wanted, mask, captions = truth(task, batch)
    pictures = decoded(networks["vae"], latents.flatten(0, -4)).unflatten(0, latents.shape[:-3])
    error = (pictures - wanted).double()
    changed = mask.unsqueeze(-3).expand_as(error)
    found = {
        "psnr": _decibels(error.square().flatten(1).mean(1)),
        "inside": _decibels(_mean(error.square(), changed, 1)),
        "kept": _mean(error.abs(), ~changed, 1).numpy(),
    }
    if captions and "edit" in task.metrics:
        reading = parse(pictures, parts=task.dataset == "parts32")
        found["edit"] = caption_accuracy(captions, reading)["whole"]
    if "worst" in task.metrics:
        frames = [_decibels(_mean(e.square(), c, 1)) for e, c in zip(error.unbind(1), changed.unbind(1), strict=True)]
        found["worst"] = np.min(frames, 0)
    return {name: Score(float(found[name].mean()), found[name][resample].mean(1).tolist()) for name in task.metrics}


def _mean(value: Tensor, where: Tensor, start: int) -> Tensor:
    """Mean over the elements that count, by picture; 0 where none does."""
    return (value * where).flatten(start).sum(1) / where.flatten(start).sum(1).clamp(min=1)


def _decibels(error: Tensor) -> NDArray[np.float64]:
    """Of mean squared errors [n] of a range of 2; no more than 60."""
    return (10 * torch.log10(4 / error.clamp(min=4e-6))).numpy()


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """No simulators here."""
    return {}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Tensor]) -> int:
    """One evaluation of the teacher for every picture of the batch; returns their number."""
    noise, teacher = batch["noise"], networks["teacher"]
    if "condition" in batch:
        captions = batch["condition"]
    else:
        captions = teacher.null_condition(torch.zeros(len(noise), LENGTH, dtype=torch.int64, device=noise.device))
    x = noise[:, 0] if noise.dim() == 5 else noise
    Denoiser(teacher, captions).output(x, 1.0)
    return len(x)


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """Rows of the forward are counted, not layers."""
    return []
