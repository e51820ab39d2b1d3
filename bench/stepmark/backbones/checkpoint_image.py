"""Image networks of checkpoint folders, with the same face as the embedded teachers, and their conditions.

Called as `network(x, t, condition)` with x [B, C, H, W] in the network's own space (often latents; no decoder is
needed), t float [B] and condition int64 [B]: a class, or a row of a table of text embeddings. The last row stands for
"no condition". Whatever the network predicts, the wrapper gives noise, or for flows the velocity.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepmark.method import Skip, skip

if TYPE_CHECKING:
    from stepmark.backbones.checkpoint import Made, Part

TOKENS, PROMPTS = 77, 16  # length and number of the embeddings that stand in for prompts
LEAST_ABAR = 2.0**-24  # of schedules that end in pure noise: x0 must not be divided by nought
# What methods written for Stepmark's own UNet look for in a teacher.
OWN_PARTS = ("unet", "table", "embed", "kinds", "patch", "coordinates")


class NotHere(Skip, AttributeError):
    """A part that a checkpoint's network does not have: absent for who asks politely, else a reason to skip a method."""


class Network(nn.Module):
    """A diffusers model that gives noise ("epsilon") or velocity ("flow"), guided where a scale is set.

    With guidance w an evaluation is null + w (conditional - null) and takes two rows of the model, which is watched in
    place of this wrapper and so counts both.

    Args:
        kind: what the model predicts: "flow", "epsilon", "v" or "sample" (see `stepmark.tracks.image.to_x0_eps`).
        steps: training timesteps. abar: cumulative products of 1 - beta [steps], float64; None for flows.
        table: {"embeddings": [rows, L, D]}, with "mask" [rows, L] and "pooled" [rows, P] where the model takes them;
            {} for classes. The last row is the null condition.
        classes: rows of the model's own table of classes, the null condition among them; 0 where there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str,
        steps: int,
        abar: Tensor | None,
        table: dict[str, Tensor],
        classes: int,
        guidance: float = 1.0,
    ) -> None:
        super().__init__()
        self.role = "unet" if type(model).__name__.startswith("UNet") else "transformer"
        self.add_module(self.role, model)
        self.kind, self.steps, self.guidance, self.classes = kind, steps, guidance, classes
        self.prediction = "flow" if kind == "flow" else "epsilon"
        self.alphas_cumprod = abar
        self.columns = tuple(table)
        for name, rows in table.items():
            self.register_buffer(f"table_{name}", rows, persistent=False)
        if abar is not None:  # log abar at the timesteps, preceded by the data: linear in between, as in `Schedule`
            log_abar = torch.cat([torch.zeros(1, dtype=torch.float64), abar.log()])
            self.register_buffer("log_abar", log_abar, persistent=False)

    def __getattr__(self, name: str) -> Any:
        if name in OWN_PARTS and name not in self._modules:
            raise NotHere(f"works inside Stepmark's own UNet ({name}), which a checkpoint is not")
        return super().__getattr__(name)

    @property
    def model(self) -> nn.Module:
        """The diffusers model: what is counted."""
        model = self._modules[self.role]
        assert model is not None
        return model

    def null_condition(self, condition: Tensor) -> Tensor:
        """None for methods: the target of a checkpoint is fixed on the command line, guided or not."""
        skip("guides by itself; of a checkpoint the guidance is chosen by --guidance and part of what is sampled")

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Noise or velocity [B, C, H, W] at x [B, C, H, W], t float [B] in the network's time, condition int64 [B]."""
        if self.guidance == 1:
            return self._converted(self._evaluated(x, t, condition), x, t)
        null = torch.full_like(condition, self.classes - 1 if not self.columns else len(self.table_embeddings) - 1)
        rows = self._evaluated(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, condition]))
        unconditional, conditional = rows.chunk(2)
        return self._converted(torch.lerp(unconditional, conditional, self.guidance), x, t)

    def _evaluated(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        time = t * self.steps if self.kind == "flow" else t
        given: dict[str, Any] = {"timestep": time, "return_dict": False}
        name = type(self.model).__name__
        if self.columns:
            given["encoder_hidden_states"] = self.table_embeddings[condition]
        if "mask" in self.columns:
            given["encoder_attention_mask"] = self.table_mask[condition]
        if name == "PixArtTransformer2DModel":
            given["added_cond_kwargs"] = self._sizes(x)
        elif "pooled" in self.columns:
            height, width = (8 * side for side in x.shape[-2:])  # pixels of the latents
            times = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)
            given["added_cond_kwargs"] = {"text_embeds": self.table_pooled[condition], "time_ids": times}
        elif self.classes:
            given["class_labels"] = condition
        out = self.model(x, **given)[0]
        return out[:, : x.shape[1]]  # a learned variance comes after the prediction

    def _sizes(self, x: Tensor) -> dict[str, Tensor | None]:
        if not self.model.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (8 * side for side in x.shape[-2:])
        return {
            "resolution": x.new_tensor([height, width]).expand(len(x), -1),
            "aspect_ratio": x.new_tensor([height / width]).expand(len(x), -1),
        }

    def _converted(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.kind in ("flow", "epsilon"):
            return out
        place = (t.to(self.log_abar.dtype) + 1).clamp(0, self.steps)
        left = place.floor().long().clamp(max=self.steps - 1)
        log_abar = torch.lerp(self.log_abar[left], self.log_abar[left + 1], place - left)
        shape = (-1, *[1] * (x.dim() - 1))
        alpha = (0.5 * log_abar).exp().to(x.dtype).view(shape)
        sigma = (-torch.expm1(log_abar)).sqrt().to(x.dtype).view(shape)
        if self.kind == "v":
            return sigma * x + alpha * out
        return (x - alpha * out) / sigma.clamp(min=1e-6)


# -- conditions -----------------------------------------------------------------------------------------------------


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
    return (len(made.lines()) or PROMPTS) if text_width(part) else max(classes_of(part) - 1, 1)


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


def summary(made: Made) -> str:
    """The task in one line: network, prediction, guidance and conditions."""
    part, choice = made.parts["teacher"], made.choice
    _refuse(part, choice.guidance)
    lines = made.lines()
    if text_width(part):
        what = f"{PROMPTS} made-up conditions, standard-normal embeddings"
        if lines:
            if not encoders(made.folder):
                raise ValueError(
                    f"{made.folder} has no tokenizer/ and text_encoder/ to read --prompts with; give the folder of the "
                    "whole pipeline, or leave --prompts out: standard-normal embeddings take their place"
                )
            what = f"{len(lines)} prompts of {Path(str(choice.prompts)).name}"
    elif lines:
        raise ValueError(f"{part} takes no text; leave out --prompts")
    else:
        rows = classes_of(part)
        what = f"{rows - 1} classes" if rows else "no condition"
    guided = f" guided by {choice.guidance:g}" if choice.guidance != 1 else ""
    said = {"flow": "flow", "epsilon": "noise prediction", "v": "v prediction", "sample": "data prediction"}[made.kind]
    return f"Follow {part.kind} in {made.folder.name} ({said}){guided} to where its own ODE leads, {what}"


def made_up(part: Part) -> dict[str, Tensor]:
    """Standard-normal embeddings in the place of prompts, always the same; zeros are the null condition."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(PROMPTS, TOKENS, text_width(part), generator=draw)
    found = {"embeddings": torch.cat([rows, torch.zeros_like(rows[:1])])}
    if part.config.get("addition_embed_type") == "text_time":
        config = part.config
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        pooled = torch.randn(PROMPTS, width, generator=draw)
        found["pooled"] = torch.cat([pooled, torch.zeros_like(pooled[:1])])
    return found


@torch.no_grad()
def encoded(made: Made, lines: list[str], device: str) -> dict[str, Tensor]:
    """The prompts and the empty one, by the pipeline's own tokenizers and text encoders."""
    import transformers

    part = made.parts["teacher"]
    index = made.folder / "model_index.json"
    pipeline = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    texts = [*lines, ""]
    states, found = [], {}
    both = part.config.get("addition_embed_type") == "text_time"
    for words, encoder in encoders(made.folder):
        tokenizer = opened(transformers.AutoTokenizer, words, trust_remote_code=False)
        name = (json.loads((encoder / "config.json").read_text()).get("architectures") or [""])[0]
        if name not in ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"):
            raise ValueError(f"{encoder}: {name or 'no class'} cannot be used; leave out --prompts")
        model = opened(getattr(transformers, name), encoder, use_safetensors=True, dtype=torch.float32)
        model = model.to(device).eval()
        length = min(tokenizer.model_max_length, TOKENS)
        if name == "T5EncoderModel":
            length = 300 if "Sigma" in str(pipeline.get("_class_name")) else 120
        ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").to(device)
        masked = name == "T5EncoderModel" or model.config.to_dict().get("use_attention_mask")
        out = model(ids.input_ids, attention_mask=ids.attention_mask if masked else None, output_hidden_states=True)
        states.append(out.hidden_states[-2] if both else out[0])
        if both and name == "CLIPTextModelWithProjection":
            found["pooled"] = out.text_embeds
        if part.kind == "PixArtTransformer2DModel":
            found["mask"] = ids.attention_mask
    embeddings = torch.cat(states, -1) if both else states[0]
    if embeddings.shape[-1] != text_width(part) or both != ("pooled" in found):
        raise ValueError(
            f"{made.folder}: its text encoders give {embeddings.shape[-1]} numbers a token, the network takes "
            f"{text_width(part)}; leave out --prompts"
        )
    if both and pipeline.get("force_zeros_for_empty_prompt", True):
        embeddings[-1], found["pooled"][-1] = 0, 0
    return {name: rows.cpu() for name, rows in (found | {"embeddings": embeddings}).items()}


# -- loading --------------------------------------------------------------------------------------------------------


def opened(kind: Any, folder: Path, **options: Any) -> Any:
    """from_pretrained of a folder, offline and without code of its own; failures in one line."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        with _quiet():
            return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # many libraries, many kinds: a folder that cannot be read is the user's to mend
        raise ValueError(
            f"{folder} cannot be loaded ({_first_line(error)}); its files must be whole and of one model, and ask for no "
            "code of their own"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the libraries have to say about a folder is said by us, or not at all."""
    names = ("diffusers.utils.logging", "transformers.utils.logging")
    loggings: list[Any] = [sys.modules[name] for name in names if name in sys.modules]
    before = [(each, each.get_verbosity(), each.is_progress_bar_enabled()) for each in loggings]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for each in loggings:
                each.set_verbosity_error()
                each.disable_progress_bar()
            yield
    finally:
        for each, verbosity, bars in before:
            each.set_verbosity(verbosity)
            if bars:
                each.enable_progress_bar()


def _first_line(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"{type(error).__name__}: {line.split('. ')[0][:250]}"


def whole(folder: Path, info: dict[str, Any]) -> None:
    """Raise ValueError, in one line, where the weights of a folder are not those that its configuration asks for."""
    names = ("missing_keys", "unexpected_keys", "mismatched_keys")
    found = {name: sorted(map(str, info.get(name) or [])) for name in names}
    computed = ("inv_freq", "position_ids")  # old files hold tables that models now compute
    found["unexpected_keys"] = [key for key in found["unexpected_keys"] if not key.endswith(computed)]
    if found["mismatched_keys"]:
        raise ValueError(
            f"{folder}: {found['mismatched_keys'][0]}: other shapes than config.json asks for; they belong to different models"
        )
    if found["missing_keys"]:
        raise ValueError(
            f"{folder}: the weights lack {found['missing_keys'][0]} and {len(found['missing_keys']) - 1} more that "
            "config.json asks for; download them again"
        )
    if found["unexpected_keys"]:
        raise ValueError(
            f"{folder}: the weights hold {found['unexpected_keys'][0]}, of which config.json knows nothing"
        )


def load_model(part: Part) -> nn.Module:
    """The diffusers model of a folder as float32, all of its weights or an error."""
    import diffusers

    options = {"variant": part.variant} if part.variant else {}
    model, info = opened(
        getattr(diffusers, part.kind),
        part.folder,
        use_safetensors=True,
        torch_dtype=torch.float32,
        output_loading_info=True,
        **options,
    )
    whole(part.folder, info)
    return model


def betas(config: dict[str, Any]) -> Tensor:
    """beta of the training timesteps of a schedule of diffusers, float64 [N]."""
    from diffusers import DDPMScheduler

    names = [
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    ]
    given = {name: config[name] for name in names if config.get(name) is not None}
    try:
        made: Any = DDPMScheduler(**given)
        return made.betas.double()
    except Exception as error:
        raise ValueError(f"scheduler_config.json: {_first_line(error)}") from error


def build(made: Made, device: str) -> Network:
    """The network of a choice, with its conditions, in eval mode without gradients."""
    part = made.parts["teacher"]
    table: dict[str, Tensor] = {}
    if text_width(part):
        lines = made.lines()
        table = encoded(made, lines, device) if lines else made_up(part)
    abar, steps = None, int(made.scheduler.get("num_train_timesteps") or 1000)
    if made.kind != "flow":
        abar = torch.cumprod(1 - betas(made.scheduler), 0).clamp(min=LEAST_ABAR)
        steps = len(abar)
    network = Network(load_model(part), made.kind, steps, abar, table, classes_of(part), made.choice.guidance)
    network = network.to(device).eval().requires_grad_(False)
    _try(network, made, device)
    return network


@torch.no_grad()
def _try(network: Network, made: Made, device: str) -> None:
    """One evaluation, so that what does not fit together is said before anything is measured."""
    x = torch.zeros(1, *made.shape, device=device)
    first = torch.zeros(1, dtype=torch.long, device=device)
    try:
        out = network(x, torch.full((1,), 0.5, device=device), first)
    except Exception as error:
        raise ValueError(f"{made.folder}: the network cannot be called: {_first_line(error)}") from error
    if out.shape != x.shape or not bool(out.isfinite().all()):
        raise ValueError(
            f"{made.folder}: the network gives {tuple(out.shape)} for {tuple(x.shape)}, or no finite numbers"
        )
