"""What each class of image networks is called with, read from config.json alone: widths, shapes, clocks, refusals.

A class is a row of `KINDS`; `image_networks.Network` calls a network as its row says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stepmark.hub.choice import Part


@dataclass(frozen=True)
class Kind:
    """How the networks of a class are called.

    Attributes:
        width: keys of the width of text embeddings; the first that is there counts. None: it takes no text.
        pooled: the key of the width of a vector beside them, for the whole prompt.
        tokens: length of the embeddings that stand in for prompts: as many as its pipeline gives by default.
        mask: the argument that says which tokens are words. masked: it must be given.
        clock: "steps", a timestep; "unit", a thousandth of it; "reversed", from 0 at the noise to 1 at the data, and what
            is predicted points there too.
        packed: a token is a patch of 2 x 2 latents, put together by the pipeline and not by the network.
        flow: it predicts velocities, whatever a scheduler beside it says.
        distilled: the key that is set where guidance is an input of the network.
        needs: endings of the text encoders that its prompts are read with; (): any. reads: whether prompts can be read.
        only: values of the configuration beside which it asks for conditions that cannot be made up.
    """

    width: tuple[str, ...] = ()
    pooled: str = ""
    tokens: int = 77
    mask: str = "encoder_attention_mask"
    masked: bool = False
    clock: str = "steps"
    packed: bool = False
    flow: bool = False
    distilled: str = ""
    needs: tuple[str, ...] = ()
    reads: bool = True
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


JOINT, POOLED, UNSET = ("joint_attention_dim",), "pooled_projection_dim", (None, False)
KINDS = {
    "UNet2DModel": Kind(only={"class_embed_type": (None,)}),
    "UNet2DConditionModel": Kind(
        width=("cross_attention_dim",),
        distilled="time_cond_proj_dim",
        only={
            "encoder_hid_dim_type": (None,),
            "class_embed_type": (None,),
            "addition_embed_type": (None, "text_time"),
        },
    ),
    "DiTTransformer2DModel": Kind(),
    "PixArtTransformer2DModel": Kind(width=("caption_channels", "cross_attention_dim")),
    "SD3Transformer2DModel": Kind(width=JOINT, pooled=POOLED, tokens=77 + 256, flow=True, needs=("", "_2")),
    "FluxTransformer2DModel": Kind(
        width=JOINT,
        pooled=POOLED,
        tokens=512,
        clock="unit",
        packed=True,
        flow=True,
        distilled="guidance_embeds",
        needs=("", "_2"),
    ),
    "AuraFlowTransformer2DModel": Kind(width=JOINT, tokens=256, clock="unit", flow=True, needs=("",)),
    "SanaTransformer2DModel": Kind(
        width=("caption_channels",),
        tokens=300,
        masked=True,
        flow=True,
        reads=False,
        only={"guidance_embeds": UNSET},  # Sprint: of another kind of path
    ),
    "Lumina2Transformer2DModel": Kind(
        width=("cap_feat_dim",), tokens=256, masked=True, clock="reversed", flow=True, reads=False
    ),
    "QwenImageTransformer2DModel": Kind(
        width=JOINT,
        mask="encoder_hidden_states_mask",
        masked=True,
        clock="unit",
        packed=True,
        flow=True,
        reads=False,
        only=dict.fromkeys(("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"), UNSET),
    ),
}


def text_width(part: Part) -> int:
    """Width of the text embeddings that a network takes; 0 where it takes none."""
    keys = KINDS[part.kind].width
    if not keys:
        return 0
    default = 1280 if part.kind == "UNet2DConditionModel" else None
    width = next((part.config[key] for key in keys if part.config.get(key)), default)
    width = width[0] if isinstance(width, list) and len(set(width)) == 1 else width
    if width is None:
        raise ValueError(f"{part}/config.json lacks {keys[0]}, the width of text embeddings; write it there")
    if not isinstance(width, int):
        raise ValueError(f"{part}: text embeddings of several widths ({width}) cannot be measured")
    return width


def pooled_width(part: Part) -> int:
    """Width of the vector for the whole prompt that a network takes beside text embeddings; 0 where it takes none."""
    config, key = part.config, KINDS[part.kind].pooled
    if config.get("addition_embed_type") == "text_time":
        return int(config["projection_class_embeddings_input_dim"]) - 6 * int(config["addition_time_embed_dim"])
    if not key:
        return 0
    if not isinstance(config.get(key), int):
        raise ValueError(f"{part}/config.json lacks {key}, the width of pooled text embeddings; write it there")
    return int(config[key])


def classes_of(part: Part) -> int:
    """Rows of a network's table of classes, the null condition among them; 0 where it takes none."""
    if part.kind == "DiTTransformer2DModel":
        return int(part.config.get("num_embeds_ada_norm") or 1000) + 1
    return int(part.config.get("num_class_embeds") or 0) if part.kind == "UNet2DModel" else 0


def distilled(part: Part) -> bool:
    """Whether guidance is a number that the network is given: an evaluation is then one row."""
    key = KINDS[part.kind].distilled
    return bool(key and part.config.get(key))


def sized(part: Part, vae: dict[str, Any]) -> Part:
    """The network with a sample_size, in its own or else by `vae`, the configuration of the decoder beside it ({}: none).

    Raises:
        ValueError: neither says it. One line that names the mend.
    """
    if part.config.get("sample_size") or not KINDS[part.kind].packed:
        return part
    pixels, blocks = vae.get("sample_size"), vae.get("block_out_channels")
    if isinstance(pixels, int) and isinstance(blocks, list) and blocks:
        return replace(part, config=part.config | {"sample_size": pixels // 2 ** (len(blocks) - 1)})
    raise ValueError(
        f"{part}/config.json says no sample_size, nor does a vae/ beside it: write there the side of the latents, such "
        'as "sample_size": 128 for 1024 pixels'
    )


def shape_of(part: Part) -> tuple[int, int, int]:
    """Of an image, or of the latents that stand for it: channels, height, width.

    Raises:
        ValueError: config.json does not say it, or it is not what the network gives. One line that names the mend.
    """
    config, packed = part.config, KINDS[part.kind].packed
    for key in ("sample_size", "in_channels"):
        if not config.get(key):
            raise ValueError(f"{part}/config.json lacks {key}, the shape of a sample; write it there")
    takes, gives = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if part.kind == "QwenImageTransformer2DModel":
        gives *= int(config.get("patch_size") or 2) ** 2  # said of a latent, not of a token
    if gives != takes and (packed or gives != 2 * takes):  # twice as many: a variance beside the prediction
        raise ValueError(
            f"{part} takes {takes} channels and gives {gives}: models that are shown more than the "
            "sample (inpainting, depth) cannot be measured"
        )
    size = config["sample_size"]
    height, width = size if isinstance(size, list) else (size, size)
    if packed and (takes % 4 or height % 2 or width % 2):
        raise ValueError(f"{part}: {takes} channels at sample_size {size} are no patches of 2 x 2 latents")
    return takes // 4 if packed else takes, height, width


def refuse(part: Part, guidance: float) -> None:
    """Say of a network what cannot be given to it."""
    for key, known in KINDS[part.kind].only.items():
        if part.config.get(key) not in known:
            raise ValueError(f"{part}: {key} {part.config[key]!r} asks for conditions that cannot be made up")
    if part.kind == "UNet2DConditionModel" and part.config.get("num_class_embeds"):
        raise ValueError(f"{part}: classes beside text (num_class_embeds) cannot be made up")
    if guidance != 1 and not text_width(part) and not classes_of(part):
        raise ValueError(f"{part} takes no condition; leave out --guidance")


def encoders(folder: Path) -> dict[str, tuple[Path, Path]]:
    """(tokenizer, text encoder) folders of a pipeline, by the ending of their names."""
    pairs = {end: (folder / f"tokenizer{end}", folder / f"text_encoder{end}") for end in ("", "_2", "_3")}
    return {end: pair for end, pair in pairs.items() if all(each.is_dir() for each in pair)}
