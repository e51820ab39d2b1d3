"""The task that is made from a folder with an image network: what is asked, and on which conditions."""

from __future__ import annotations

from pathlib import Path

from stepmark.hub.choice import PREFIX, Choice, Made, Part
from stepmark.hub.folders import schedule_in
from stepmark.task import DTYPES, SCORED, Task

RUNGS, ITEMS = (2, 4, 8, 16, 32, 64), 16
PROMPTS = 16  # number of embeddings that stand in for prompts
# Of these the batches and the networks' outputs are what a checkpoint's task gives.
FAMILIES = {
    "flow": ("sampling/mixtures_flow", "class_to_image/digits_flow", "attributes_to_image/shapes16"),
    "noise": ("sampling/mixtures_eps", "class_to_image/digits_eps"),
}


def encoders(folder: Path) -> list[tuple[Path, Path]]:
    """(tokenizer, text encoder) folders of a pipeline."""
    pairs = [(folder / f"tokenizer{n}", folder / f"text_encoder{n}") for n in ("", "_2")]
    return [pair for pair in pairs if all(each.is_dir() for each in pair)]


def text_width(part: Part) -> int:
    """Width of the text embeddings that a network takes; 0 where it takes none."""
    config = part.config
    if part.kind == "PixArtTransformer2DModel":
        width = config.get("caption_channels") or config.get("cross_attention_dim")
    elif part.kind == "UNet2DConditionModel":
        width = config.get("cross_attention_dim", 1280)
        width = width[0] if isinstance(width, list) and len(set(width)) == 1 else width
    else:
        return 0
    if not isinstance(width, int):
        raise ValueError(f"{part}: text embeddings of several widths ({width}) cannot be measured")
    return width


def classes_of(part: Part) -> int:
    """Rows of a network's table of classes, the null condition among them; 0 where it takes none."""
    if part.kind == "DiTTransformer2DModel":
        return int(part.config.get("num_embeds_ada_norm") or 1000) + 1
    return int(part.config.get("num_class_embeds") or 0) if part.kind == "UNet2DModel" else 0


def conditions(made: Made) -> int:
    """How many conditions there are beside the null one, which is the last; 1 where the network takes none."""
    part = made.parts["teacher"]
    return (len(made.choice.lines()) or PROMPTS) if text_width(part) else max(classes_of(part) - 1, 1)


def _refuse(part: Part, guidance: float) -> None:
    """Say of a network what cannot be given to it."""
    given = {
        "encoder_hid_dim_type": (None,),
        "class_embed_type": (None,),
        "addition_embed_type": (None, "text_time"),
    }
    for key, known in given.items():
        if part.kind.startswith("UNet") and part.config.get(key) not in known:
            raise ValueError(f"{part}: {key} {part.config[key]!r} asks for conditions that cannot be made up")
    if part.kind == "UNet2DConditionModel" and part.config.get("num_class_embeds"):
        raise ValueError(f"{part}: classes beside text (num_class_embeds) cannot be made up")
    if guidance != 1 and not text_width(part) and not classes_of(part):
        raise ValueError(f"{part} takes no condition; leave out --guidance")


def _summary(choice: Choice, part: Part, kind: str) -> str:
    """The task in one line: network, prediction, guidance and conditions."""
    _refuse(part, choice.guidance)
    folder, lines = Path(choice.folder), choice.lines()
    if text_width(part):
        what = f"{PROMPTS} made-up conditions, standard-normal embeddings"
        if lines:
            if not encoders(folder):
                raise ValueError(
                    f"{folder} has no tokenizer/ and text_encoder/ to read --prompts with; give the folder of the "
                    "whole pipeline, or leave --prompts out: standard-normal embeddings take their place"
                )
            what = f"{len(lines)} prompts of {Path(str(choice.prompts)).name}"
    elif lines:
        raise ValueError(f"{part} takes no text; leave out --prompts")
    else:
        rows = classes_of(part)
        what = f"{rows - 1} classes" if rows else "no condition"
    guided = f" guided by {choice.guidance:g}" if choice.guidance != 1 else ""
    said = {"flow": "flow", "epsilon": "noise prediction", "v": "v prediction", "sample": "data prediction"}[kind]
    short = f" in {choice.dtype}" if choice.dtype != DTYPES[0] else ""
    return f"Follow {part.kind} in {folder.name}{short} ({said}){guided} to where its own ODE leads, {what}"


def made_from(choice: Choice, part: Part) -> Made:
    """The task of following an image network.

    Raises:
        FileNotFoundError, ValueError: it cannot be measured, or not as it was chosen. One line that names the mend.
    """
    for option, value in (("--draft", choice.draft), ("--new-tokens", choice.new_tokens)):
        if value is not None:
            raise ValueError(f"{option} is for language models; {part.kind} makes images")
    if choice.chat:
        raise ValueError(f"--chat is for language models; {part.kind} makes images")
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
    scheduler, kind = schedule_in(Path(choice.folder), part)
    price = 1 if choice.guidance == 1 else 2
    rungs = choice.rungs or (RUNGS if price == 1 else RUNGS[1:])
    if any(rung % price for rung in rungs):
        raise ValueError("with guidance an evaluation takes two rows of the network: give even rungs")
    items = choice.items or ITEMS
    task = Task(
        id=choice.id,
        version=1,
        summary=_summary(choice, part, kind),
        dataset="checkpoint",
        backbones={"teacher": f"{PREFIX}teacher"},
        reference="teacher",
        rungs=rungs,
        n=items,
        batch=min(items, 8),
        probe=min(items, 4),
        seeds=1,
        smoke_n=min(items, 2),
        smoke_rungs=rungs[1:2] or rungs,
        module="stepmark.hub.image",
        price=price,
        **SCORED["image"],
    )
    family = FAMILIES["flow" if kind == "flow" else "noise"]
    return Made(choice, "image", task, {"teacher": part}, scheduler, kind, family)
