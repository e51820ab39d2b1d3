"""Language models of checkpoint folders, for a `Decoder` that drives the layers itself, and their prompts.

Any causal language model of transformers whose layers are called like Llama's: whether they are is not looked up but
tried when the model is loaded (`drives`).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepmark.backbones.checkpoint_image import opened, whole

if TYPE_CHECKING:
    from stepmark.backbones.checkpoint import Made, Part

KNOWN = "Llama, Mistral, Qwen2 and Qwen3"
RANDOM_PROMPT = 24  # tokens of a prompt where none is given
PADDING = 512  # by how much two tables of one vocabulary may differ, being padded differently


class Head(nn.Module):
    """An output head over the first `size` tokens, whose end-of-sequence tokens are one: the first of `ends`."""

    def __init__(self, head: nn.Module, size: int, ends: list[int]) -> None:
        super().__init__()
        self.head, self.size, self.ends = head, size, ends

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., size]: the greatest of the ends at the first of them, the others never."""
        logits = self.head(hidden)[..., : self.size]
        if len(self.ends) < 2:
            return logits
        greatest = logits[..., self.ends].amax(-1)
        logits = logits.clone()
        logits[..., self.ends] = float("-inf")
        logits[..., self.ends[0]] = greatest
        return logits


def ends(part: Part) -> list[int]:
    """End-of-sequence tokens: of generation_config.json, which `generate` obeys, else of config.json."""
    path = part.folder / "generation_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
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
    part, lines = made.parts["target"], made.lines()
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
    room = new_tokens(made)
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


def new_tokens(made: Made) -> int:
    """Tokens written to a prompt at most."""
    from stepmark.backbones.checkpoint import NEW_TOKENS

    return made.choice.new_tokens or NEW_TOKENS


def build(made: Made, role: str, device: str) -> nn.Module:
    """A language model in float32, in eval mode without gradients, ready for a `Decoder`."""
    import transformers

    part = made.parts[role]
    rope = part.config.get("rope_parameters") or part.config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        raise ValueError(f"{part}: positions that hang on the length of the text (rope_type dynamic) cannot be driven")
    size = vocabulary(made)
    model, info = opened(
        transformers.AutoModelForCausalLM,
        part.folder,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        attn_implementation="sdpa",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are told in `info`
        **({"variant": part.variant} if part.variant else {}),
    )
    whole(part.folder, info)
    stops = [token for token in ends(made.parts["target"]) if token < size]
    model.config.eos_token_id = end(made.parts["target"])
    model = model.to(device).eval().requires_grad_(False)
    if not drives(model):
        raise ValueError(
            f"{part}: {part.kind} is not driven layer by layer as Llama is ({KNOWN} are); it cannot be measured"
        )
    if len(stops) > 1 or size < int(part.config["vocab_size"]):
        model.lm_head = Head(model.lm_head, size, stops)
    return model


@torch.no_grad()
def drives(model: Any) -> bool:
    """Whether a `Decoder`, in two passes with a cache, gives the logits of one call of the model."""
    from stepmark.tracks.decoding.decoder import Decoder

    ids = [(7 * i + 3) % model.config.vocab_size for i in range(12)]
    try:
        decoder = Decoder(model, len(ids))
        found = torch.cat([decoder.forward(ids[:5]), decoder.forward(ids[5:11]), decoder.forward(ids[11:])])
    except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError):
        return False
    expected = model(torch.tensor([ids], device=decoder.device)).logits[0]
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max().clamp(min=1))
