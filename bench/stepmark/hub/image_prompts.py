"""The conditions of an image network as tables: prompts as its pipeline encodes them, or made-up embeddings.

A table is {"embeddings": [rows, L, D]}, with "mask" [rows, L] and "pooled" [rows, P] where the network takes them; the
last row is the null condition.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stepmark.hub.choice import Made, Part
from stepmark.hub.folders import read_json
from stepmark.hub.image_kinds import KINDS, encoders, pooled_width, text_width
from stepmark.hub.image_tasks import PROMPTS
from stepmark.hub.pretrained import opened

CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
T5 = ("T5EncoderModel", "UMT5EncoderModel")
WORDS = 77  # tokens that CLIP reads at most
AT_ONCE = 8  # texts that an encoder reads at a time: T5 of the large pipelines fills a device


def made_up(part: Part) -> dict[str, Tensor]:
    """Standard-normal embeddings in the place of prompts, always the same; zeros are the null condition."""
    kind, draw = KINDS[part.kind], torch.Generator().manual_seed(0)
    rows = torch.randn(PROMPTS, kind.tokens, text_width(part), generator=draw)
    found = {"embeddings": torch.cat([rows, torch.zeros_like(rows[:1])])}
    if width := pooled_width(part):
        pooled = torch.randn(PROMPTS, width, generator=draw)
        found["pooled"] = torch.cat([pooled, torch.zeros_like(pooled[:1])])
    if kind.masked:
        found["mask"] = torch.ones(PROMPTS + 1, kind.tokens, dtype=torch.long)
    return found


@torch.no_grad()
def encoded(made: Made, lines: list[str], device: str) -> dict[str, Tensor]:
    """The prompts and the empty one, by the pipeline's own tokenizers and text encoders.

    Raises:
        ValueError: they are others than the network was trained with. One line that names the mend.
    """
    part = made.parts["teacher"]
    pipeline = _Pipeline(made.folder, [*lines, ""], device)
    by = {"SD3Transformer2DModel": _sd3, "FluxTransformer2DModel": _flux, "AuraFlowTransformer2DModel": _aura_flow}
    found = by.get(part.kind, _plain)(pipeline, part)
    gives = tuple(found[name].shape[-1] if name in found else 0 for name in ("embeddings", "pooled"))
    if gives != (text_width(part), pooled_width(part)):
        raise ValueError(
            f"{made.folder}: its text encoders give {gives[0]} numbers a token and {gives[1]} a prompt, the network takes "
            f"{text_width(part)} and {pooled_width(part)}; leave out --prompts"
        )
    return {name: rows.cpu() for name, rows in found.items()}


class _Pipeline:
    """Texts, read by one encoder of a pipeline after another; no more than one is in memory."""

    def __init__(self, folder: Path, texts: list[str], device: str) -> None:
        self.texts, self.device, self.pairs = texts, device, encoders(folder)
        index = folder / "model_index.json"
        self.index = read_json(index) if index.is_file() else {}

    def read(
        self, end: str, known: tuple[str, ...], length: int | None = None, masked: bool = False
    ) -> dict[str, Tensor]:
        """What an encoder says of the texts: "last", its last hidden states [rows, L, D]; "mask" [rows, L], which tokens
        are words; of CLIP "before", the hidden states of the last layer but one, and "pooled" [rows, P].

        Args:
            length: to which texts are padded and cut; None: what the tokenizer says, as far as CLIP reads.
            masked: padding is not looked at. An encoder whose configuration asks for it is masked in any case.
        """
        import transformers

        words, encoder = self.pairs[end]
        tokenizer = opened(transformers.AutoTokenizer, words, trust_remote_code=False)
        name = (read_json(encoder / "config.json").get("architectures") or [""])[0]
        if name not in known:
            raise ValueError(f"{encoder}: {name or 'no class'} cannot be used; leave out --prompts")
        model = opened(getattr(transformers, name), encoder, use_safetensors=True, dtype=torch.float32)
        model = model.to(self.device).eval()
        length = length or min(tokenizer.model_max_length, WORDS)
        masked = masked or bool(model.config.to_dict().get("use_attention_mask"))
        parts: list[dict[str, Tensor]] = []
        for first in range(0, len(self.texts), AT_ONCE):
            some = self.texts[first : first + AT_ONCE]
            ids = tokenizer(some, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            ids = ids.to(self.device)
            mask = ids.attention_mask
            out = model(ids.input_ids, attention_mask=mask if masked else None, output_hidden_states=name in CLIP)
            said = {"last": out.last_hidden_state, "mask": mask}
            if name in CLIP:
                said["before"] = out.hidden_states[-2]
                said["pooled"] = out.pooler_output if name == "CLIPTextModel" else out.text_embeds
            parts.append(said)
        return {key: torch.cat([said[key] for said in parts]) for key in parts[0]}


def _plain(pipeline: _Pipeline, part: Part) -> dict[str, Tensor]:
    """Stable Diffusion, Stable Diffusion XL (two encoders, and a vector of the one with a projection) and PixArt."""
    if part.config.get("addition_embed_type") == "text_time":
        both = [pipeline.read(end, CLIP) for end in pipeline.pairs]
        found = {"embeddings": torch.cat([each["before"] for each in both], -1), "pooled": both[-1]["pooled"]}
        if pipeline.index.get("force_zeros_for_empty_prompt", True):
            for rows in found.values():
                rows[-1] = 0
        return found
    first = next(iter(pipeline.pairs))
    if part.kind != "PixArtTransformer2DModel":
        return {"embeddings": pipeline.read(first, (*CLIP, "T5EncoderModel"))["last"]}
    length = 300 if "Sigma" in str(pipeline.index.get("_class_name")) else 120
    said = pipeline.read(first, T5, length, masked=True)
    return {"embeddings": said["last"], "mask": said["mask"]}


def _sd3(pipeline: _Pipeline, part: Part) -> dict[str, Tensor]:
    """Stable Diffusion 3: two CLIPs beside each other, zeros up to the width of T5, and T5's tokens behind them."""
    wide = text_width(part)
    clip = [pipeline.read(end, CLIP[1:]) for end in ("", "_2")]
    both = torch.cat([each["before"] for each in clip], -1)
    if both.shape[-1] > wide:
        raise ValueError(
            f"{part}: its two CLIPs give {both.shape[-1]} numbers a token, the network takes {wide}; leave out --prompts"
        )
    both = torch.nn.functional.pad(both, (0, wide - both.shape[-1]))
    # many leave out T5, by far the largest part, and the pipeline then takes zeros
    there = "_3" in pipeline.pairs
    long = pipeline.read("_3", T5[:1], 256)["last"] if there else both.new_zeros(len(both), 256, wide)
    if long.shape[-1] != wide:
        raise ValueError(f"{part}: its T5 gives {long.shape[-1]} numbers a token, the network takes {wide}")
    return {"embeddings": torch.cat([both, long], 1), "pooled": torch.cat([each["pooled"] for each in clip], -1)}


def _flux(pipeline: _Pipeline, part: Part) -> dict[str, Tensor]:
    """Flux: T5's tokens, and CLIP's vector for the whole prompt."""
    pooled = pipeline.read("", CLIP[:1])["pooled"]
    return {"embeddings": pipeline.read("_2", T5[:1], KINDS[part.kind].tokens)["last"], "pooled": pooled}


def _aura_flow(pipeline: _Pipeline, part: Part) -> dict[str, Tensor]:
    """AuraFlow: T5's tokens, zeros in the place of padding."""
    said = pipeline.read("", T5, KINDS[part.kind].tokens, masked=True)
    return {"embeddings": said["last"] * said["mask"][..., None]}
