"""Prompts: from a file of somebody's, or our own where a folder brings a tokenizer and nobody gave any.

A file holds a prompt a line, or a JSON object a line, `{"prompt": "text with\\nnew lines", "kind": "code"}`; "kind" may be
left out. `prompts.jsonl` beside this module is of that form: stories, code, arithmetic, extraction and dialogue, short and
long. Its lines with `"use": "calibration"` are never scored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

OWN = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class Prompt:
    """A text to go on with. kind: "story", "code" ..., "": not said. use: "calibration", or "" for scoring."""

    text: str
    kind: str = ""
    use: str = ""


def read(path: Path) -> list[Prompt]:
    """The prompts of a file.

    Raises:
        FileNotFoundError, ValueError: there is no such file, nothing in it, or it is of no such form. One line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path} is no file; give a text file with one prompt a line, or JSON lines")
    state = path.stat()
    return list(_read(path, (state.st_mtime_ns, state.st_size)))


@lru_cache(maxsize=8)
def _read(path: Path, state: tuple[int, int]) -> tuple[Prompt, ...]:
    """`state` stands for the bytes of the file."""
    lines = _text(path).splitlines() if path.suffix != ".jsonl" else _text(path).split("\n")
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"--prompts {path} is empty; write one prompt a line")
    if path.suffix == ".jsonl" or all(line.startswith("{") and '"prompt"' in line for _, line in numbered):
        return tuple(_object(path, number, line) for number, line in numbered)
    return tuple(Prompt(line) for _, line in numbered)


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"--prompts {path}, line {number}: byte 0x{data[error.start]:02x} is no UTF-8; save the file as UTF-8 "
            f"(from Latin-1: iconv -f latin1 -t utf-8)"
        ) from None


def _object(path: Path, number: int, line: str) -> Prompt:
    where = f"--prompts {path}, line {number}"
    try:
        said = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{where} is no JSON ({error}); a line is such as " + '{"prompt": "Once", "kind": "story"}'
        ) from None
    if not isinstance(said, dict) or not isinstance(said.get("prompt"), str) or not said["prompt"].strip():
        raise ValueError(f'{where} has no "prompt"; a line is such as ' + '{"prompt": "Once", "kind": "story"}')
    return Prompt(said["prompt"], str(said.get("kind") or ""), str(said.get("use") or ""))


def spread(kinds: Sequence[str], order: Sequence[int], n: int) -> list[int]:
    """`n` of the items in `order`, as evenly over their kinds as can be: the first of every kind, then the second ..."""
    seen: dict[str, int] = {}
    ranks: list[tuple[int, int, int]] = []
    for item in order:
        ranks.append((seen.setdefault(kinds[item], 0), len(ranks), item))
        seen[kinds[item]] += 1
    return [item for *_, item in sorted(ranks)[:n]]


# -- tokens -------------------------------------------------------------------------------------------------------------


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder says how texts become tokens."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


@lru_cache(maxsize=2)
def tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    import transformers

    from stepmark.hub.pretrained import opened

    if not has_tokenizer(folder):
        raise ValueError(
            f"{folder} has no tokenizer.json to read --prompts with; add it, or leave --prompts out for random tokens"
        )
    return opened(transformers.AutoTokenizer, folder, trust_remote_code=False)


def encode(folder: Path, text: str, chat: bool = False) -> list[int]:
    """Token ids of a prompt, as the start of a text; in the folder's chat template as a user's message where `chat` is set.

    What a tokenizer appends to finished texts, an end-of-sequence token, is left out: a prompt is not finished.

    Raises:
        ValueError: there is no chat template.
    """
    made = tokenizer(folder)
    if chat:
        if not getattr(made, "chat_template", None):
            raise ValueError(f"{folder}: its tokenizer has no chat template; leave --chat out")
        message = [{"role": "user", "content": text}]
        text = made.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids, plain = (list(made(text, add_special_tokens=added).input_ids) for added in (not chat, False))
    ends = {made.eos_token_id, made.sep_token_id} - {None}
    while ids and ids[-1] in ends and (len(ids) < len(plain) or ids[len(ids) - len(plain) :] != plain):
        ids.pop()
    return ids


def going_on(folder: Path, text: str) -> list[int]:
    """Token ids of a text that goes on with another: nothing is put before it or after it."""
    return list(tokenizer(folder)(text, add_special_tokens=False).input_ids)


def decode(folder: Path, ids: Sequence[int]) -> str:
    """The text of token ids, special ones left out."""
    return str(tokenizer(folder).decode(list(ids), skip_special_tokens=True))
