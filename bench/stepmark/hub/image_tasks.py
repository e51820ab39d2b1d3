"""The task that is made from a folder with an image network: what is asked, and on which conditions."""

from __future__ import annotations

from pathlib import Path

from stepmark.hub.choice import PREFIX, Choice, Made, Part
from stepmark.hub.folders import beside, read_json, schedule_in
from stepmark.hub.image_kinds import KINDS, classes_of, distilled, encoders, refuse, shape_of, sized, text_width
from stepmark.task import DTYPES, SCORED, Task

RUNGS, ITEMS = (2, 4, 8, 16, 32, 64), 16
PROMPTS = 16  # number of embeddings that stand in for prompts
# Of these the batches and the networks' outputs are what a checkpoint's task gives.
FAMILIES = {
    "flow": ("sampling/mixtures_flow", "class_to_image/digits_flow", "attributes_to_image/shapes16"),
    "noise": ("sampling/mixtures_eps", "class_to_image/digits_eps"),
}


def conditions(made: Made) -> int:
    """How many conditions there are beside the null one, which is the last; 1 where the network takes none."""
    part = made.parts["teacher"]
    return (len(made.choice.lines()) or PROMPTS) if text_width(part) else max(classes_of(part) - 1, 1)


def _check_prompts(folder: Path, part: Part) -> None:
    """Can prompts be read as the pipeline reads them? FileNotFoundError, ValueError in one line where not."""
    kind, there = KINDS[part.kind], encoders(folder)
    instead = "leave --prompts out: standard-normal embeddings take their place"
    if not kind.reads:
        raise ValueError(
            f"{part.kind} takes prompts from a language model that its pipeline gives instructions to; that is not done "
            f"here, {instead}"
        )
    lacking = [end for end in kind.needs if end not in there]
    if not there or lacking:
        end = lacking[0] if lacking else ""
        raise ValueError(
            f"{folder} has no tokenizer{end}/ and text_encoder{end}/ to read --prompts with; give the folder of the "
            f"whole pipeline, or {instead}"
        )
    index = folder / "model_index.json"
    named = read_json(index) if index.is_file() else {}
    for end in ("", "_2", "_3"):
        if isinstance(named.get(f"text_encoder{end}"), list) and named[f"text_encoder{end}"][0] and end not in there:
            raise FileNotFoundError(
                f"{index} names text_encoder{end}, and it or its tokenizer is not there; download it too, or {instead}"
            )


def _summary(choice: Choice, part: Part, kind: str) -> str:
    """The task in one line: network, prediction, guidance and conditions."""
    refuse(part, choice.guidance)
    folder, lines = Path(choice.folder), choice.lines()
    if text_width(part):
        what = f"{PROMPTS} made-up conditions, standard-normal embeddings"
        if lines:
            _check_prompts(folder, part)
            what = f"{len(lines)} prompts of {Path(str(choice.prompts)).name}"
    elif lines:
        raise ValueError(f"{part} takes no text; leave out --prompts")
    else:
        rows = classes_of(part)
        what = f"{rows - 1} classes" if rows else "no condition"
    guided = f" guided by {choice.guidance:g}" if choice.guidance != 1 else ""
    if distilled(part):
        guided = f" told guidance {choice.guidance:g}, an input that costs no second row,"
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
    for option, said in (("--chat", choice.chat), ("--temperature", choice.temperature)):
        if said:
            raise ValueError(f"{option} is for language models; {part.kind} makes images")
    part = sized(part, beside(part, "vae"))
    shape = shape_of(part)
    scheduler, kind = schedule_in(Path(choice.folder), part)
    if KINDS[part.kind].flow and kind != "flow":
        raise ValueError(
            f"{part}: {part.kind} predicts velocities, and its scheduler_config.json is none of flow matching; put the "
            "pipeline's own there"
        )
    price = 1 if choice.guidance == 1 or distilled(part) else 2
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
    return Made(choice, "image", task, {"teacher": part}, scheduler, kind, family, shape=shape)
