"""The task that is made from a folder with a language model: decoding of prompts from a file, or of random tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepmark.hub import prompts as texts
from stepmark.hub.choice import NEW_TOKENS, PREFIX, Choice, Made, Part
from stepmark.hub.folders import IMAGE_CLASSES, network_in, read_json
from stepmark.task import DTYPES, Task, scored_as

RUNGS, ITEMS = (8, 16, 32, 64), 16
RANDOM_PROMPT = 24  # tokens of a prompt where none is given
PADDING = 512  # by how much two tables of one vocabulary may differ, being padded differently
ORIGINAL = "original_max_position_embeddings"
FAMILY = ("greedy/", "recall/")  # of these the batches are what a checkpoint's task gives
DRAWING = ("sampling/",)  # and of these where texts are drawn


def text_config(part: Part) -> dict[str, Any]:
    """The configuration of a language model, of the one inside where a model also sees images."""
    inner = part.config.get("text_config")
    return part.config | (inner if isinstance(inner, dict) else {})


def ends(part: Part) -> list[int]:
    """End-of-sequence tokens: of generation_config.json, which `generate` obeys, else of config.json."""
    path = part.folder / "generation_config.json"
    said = read_json(path) if path.is_file() else {}
    found = said.get("eos_token_id", text_config(part).get("eos_token_id"))
    return [] if found is None else [found] if isinstance(found, int) else [int(token) for token in found]


def end(part: Part) -> int:
    """The token that ends a text; -1, which is none, where there is no such token."""
    return next(iter(ends(part)), -1)


def vocabulary(made: Made) -> int:
    """Tokens that the target, and the draft model beside it, can write.

    Raises:
        ValueError: the vocabularies differ by more than padding.
    """
    sizes = {role: int(text_config(part).get("vocab_size") or 0) for role, part in made.parts.items()}
    for role, size in sizes.items():
        if size < 2:
            raise ValueError(f"{made.parts[role]}/config.json names no vocab_size; save the model again")
    if max(sizes.values()) - min(sizes.values()) > PADDING:
        raise ValueError(
            f"--draft has {sizes['draft']} tokens, the target {sizes['target']}: a draft model must share the vocabulary"
        )
    return min(sizes.values())


def longest(part: Part) -> int:
    """Positions that a model can see at once."""
    config = text_config(part)
    limits = [config.get("max_position_embeddings") or config.get("n_positions")]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):  # angles that change with the text's length
        limits += [rope.get(ORIGINAL), config.get(ORIGINAL)]
    return min((int(limit) for limit in limits if limit), default=2**31)


def prompts_of(choice: Choice) -> Path | None:
    """The file of prompts: the one that was given; our own for a language model with a tokenizer; None: random tokens."""
    if choice.prompts:
        return Path(choice.prompts)
    folder = Path(choice.folder)
    return texts.OWN if not (folder / "model_index.json").is_file() and texts.has_tokenizer(folder) else None


def scored(choice: Choice) -> list[texts.Prompt]:
    """The prompts that are scored; [] where they are random tokens."""
    return [prompt for prompt in _read(choice) if prompt.use != "calibration"]


def calibration(choice: Choice) -> list[texts.Prompt]:
    """Prompts for methods that look at some beforehand: of the file that was given those that are marked, else our own,
    none of which is scored; [] where prompts are random tokens."""
    found = _read(choice)
    own = texts.read(texts.OWN) if found else []
    return next((kept for each in (found, own) if (kept := [p for p in each if p.use == "calibration"])), [])


def _read(choice: Choice) -> list[texts.Prompt]:
    file = prompts_of(choice)
    return texts.read(file) if file else []


def encoded(made: Made, prompt: texts.Prompt) -> list[int]:
    """Token ids of a prompt; of our own no more than the models have room for.

    Raises:
        ValueError: the tokenizer is not the model's.
    """
    part = made.parts["target"]
    ids = texts.encode(part.folder, prompt.text, made.choice.chat)
    if not ids or max(ids) >= vocabulary(made):
        raise ValueError(f"{part}: the tokenizer makes {ids[:8]} of {prompt.text[:40]!r}; it belongs to another model")
    return ids if made.choice.prompts else ids[: max(1, min(map(longest, made.parts.values())) - made.new_tokens)]


def fit(made: Made) -> None:
    """Raise ValueError where a text is too long for a model, or no text of this one."""
    found = [encoded(made, prompt) for prompt in scored(made.choice)]
    length, room = max(map(len, found), default=RANDOM_PROMPT), made.new_tokens
    for role, each in made.parts.items():
        if length + room > longest(each):
            raise ValueError(
                f"{role}: {length} tokens of a prompt and {room} new ones are more than the {longest(each)} that it sees "
                "at once; give shorter prompts or --new-tokens"
            )


def made_from(choice: Choice, part: Part) -> Made:
    """The task of decoding with a language model.

    Raises:
        FileNotFoundError, ValueError: it cannot be measured, or not as it was chosen. One line that names the mend.
    """
    if choice.guidance != 1:
        raise ValueError(f"--guidance is for images; {part.kind} writes text")
    parts = {"target": part}
    if choice.draft:
        if not Path(choice.draft).is_dir():
            raise FileNotFoundError(f"--draft {choice.draft} is no folder; give a checkpoint with the same vocabulary")
        parts["draft"] = network_in(Path(choice.draft))
        if parts["draft"].kind in IMAGE_CLASSES:
            raise ValueError(f"--draft {choice.draft} makes images; give a language model")
    if choice.chat and prompts_of(choice) is None:
        raise ValueError(f"--chat reads prompts with a tokenizer, and {choice.folder} has none")
    beside = f", drafts by {parts['draft'].folder.name}" if choice.draft else ""
    short = f" in {choice.dtype}" if choice.dtype != DTYPES[0] else ""
    chat = " in its chat template" if choice.chat else ""
    how = f"Sampling at temperature {choice.temperature:g}" if choice.temperature else "Greedy decoding"
    rungs = choice.rungs or RUNGS
    given = scored(choice)
    if choice.prompts and not given:
        raise ValueError(f"--prompts {choice.prompts} holds prompts for calibration alone")
    items = min(choice.items or len(given), len(given)) if choice.prompts else choice.items or ITEMS
    items = min(items, len(given) or items)
    source = "prompts of random tokens"
    if given:
        whose = f"of {Path(choice.prompts).name}" if choice.prompts else "of our own"
        source = f"{items} prompts {whose}"
    task = Task(
        id=choice.id,
        version=1,
        summary=f"{how} of {part.kind} in {Path(choice.folder).name}{short}, {source}{chat}{beside}",
        dataset="checkpoint",
        backbones={role: f"{PREFIX}{role}" for role in parts},
        reference="target",
        bounded=("target",),
        rungs=rungs,
        n=items,
        batch=1,  # one prompt at a time, so that times are a prompt's and have percentiles
        probe=1,
        rounds=12,
        seeds=1,
        smoke_n=min(items, 2),
        smoke_rungs=rungs[:1],
        module="stepmark.hub.decoding",
        follows="stories",  # which is free text too
        **scored_as("decoding", choice.id),
    )
    family = DRAWING if choice.temperature else FAMILY
    return Made(choice, "decoding", task, parts, {}, "text", family, choice.new_tokens or NEW_TOKENS)
