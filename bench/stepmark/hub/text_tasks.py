"""The task that is made from a folder with a language model: greedy decoding of prompts from a file, or of random tokens."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from stepmark.hub.choice import NEW_TOKENS, PREFIX, Choice, Made, Part
from stepmark.hub.folders import IMAGE_CLASSES, network_in, read_json
from stepmark.hub.pretrained import opened
from stepmark.task import SCORED, Task

RUNGS, ITEMS = (8, 16, 32, 64), 16
RANDOM_PROMPT = 24  # tokens of a prompt where none is given
PADDING = 512  # by how much two tables of one vocabulary may differ, being padded differently
FAMILY = ("greedy/", "recall/")  # of these the batches are what a checkpoint's task gives


def ends(part: Part) -> list[int]:
    """End-of-sequence tokens: of generation_config.json, which `generate` obeys, else of config.json."""
    path = part.folder / "generation_config.json"
    said = read_json(path) if path.is_file() else {}
    found = said.get("eos_token_id", part.config.get("eos_token_id"))
    return [] if found is None else [found] if isinstance(found, int) else [int(token) for token in found]


def end(part: Part) -> int:
    """The token that ends a text; -1, which is none, where there is no such token."""
    return next(iter(ends(part)), -1)


def vocabulary(made: Made) -> int:
    """Tokens that the target, and the draft model beside it, can write.

    Raises:
        ValueError: the vocabularies differ by more than padding.
    """
    sizes = {role: int(part.config.get("vocab_size") or 0) for role, part in made.parts.items()}
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
    config = part.config
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    limits = [limit for limit in (config.get("max_position_embeddings"), window) if limit]
    return min(map(int, limits), default=2**31)


def prompts(made: Made) -> list[list[int]]:
    """Token ids of the prompts of the file; [] where none was given.

    Raises:
        ValueError: there is no tokenizer, or a text is too long for a model.
    """
    part, lines = made.parts["target"], made.choice.lines()
    found: list[list[int]] = []
    if lines:
        if not (part.folder / "tokenizer.json").is_file() and not (part.folder / "tokenizer_config.json").is_file():
            raise ValueError(
                f"{part} has no tokenizer.json to read --prompts with; add it, or leave --prompts out for random tokens"
            )
        found = _tokenised(part.folder, tuple(lines))
        for line, ids in zip(lines, found, strict=True):
            if not ids or max(ids) >= vocabulary(made):
                raise ValueError(f"{part}: the tokenizer makes {ids[:8]} of {line[:40]!r}; it belongs to another model")
    room = made.new_tokens
    length = max(map(len, found), default=RANDOM_PROMPT)
    for role, each in made.parts.items():
        if length + room > longest(each):
            raise ValueError(
                f"{role}: {length} tokens of a prompt and {room} new ones are more than the {longest(each)} that it sees "
                "at once; give shorter prompts or --new-tokens"
            )
    return found


@lru_cache(maxsize=2)
def _tokenised(folder: Path, lines: tuple[str, ...]) -> list[list[int]]:
    import transformers

    tokenizer = opened(transformers.AutoTokenizer, folder, trust_remote_code=False)
    return [list(tokenizer(line).input_ids) for line in lines]


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
    lines = choice.lines()
    items = min(choice.items or len(lines), len(lines)) if lines else choice.items or ITEMS
    source = f"{len(lines)} prompts of {Path(choice.prompts).name}" if choice.prompts else "prompts of random tokens"
    beside = f", drafts by {parts['draft'].folder.name}" if choice.draft else ""
    rungs = choice.rungs or RUNGS
    task = Task(
        id=choice.id,
        version=1,
        summary=f"Greedy decoding of {part.kind} in {Path(choice.folder).name}, {source}{beside}",
        dataset="checkpoint",
        backbones={role: f"{PREFIX}{role}" for role in parts},
        reference="target",
        bounded=("target",),
        rungs=rungs,
        n=items,
        batch=min(items, 8),
        probe=1,
        seeds=1,
        smoke_n=min(items, 2),
        smoke_rungs=rungs[:1],
        module="stepmark.hub.decoding",
        follows="stories",  # which is free text too
        **SCORED["decoding"],
    )
    return Made(choice, "decoding", task, parts, {}, "text", FAMILY, choice.new_tokens or NEW_TOKENS)
