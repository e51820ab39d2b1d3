"""Image networks of checkpoint folders, with the same face as the embedded teachers, and their conditions.

Called as `network(x, t, condition)` with x [B, C, H, W] in the network's own space (often latents; no decoder is
needed), t float [B] and condition int64 [B]: a class, or a row of a table of text embeddings. The last row stands for
"no condition". Whatever the network predicts, the wrapper gives noise, or for flows the velocity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepmark.hub.choice import Made, Part
from stepmark.hub.folders import read_json
from stepmark.hub.image_tasks import PROMPTS, classes_of, encoders, text_width
from stepmark.hub.pretrained import first_line, opened, whole
from stepmark.method import Skip, skip

TOKENS = 77  # length of the embeddings that stand in for prompts
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
        whole, x = (
            x,
            x.to(next(self.model.parameters()).dtype),
        )  # solvers stay in float32, whatever the network computes in
        given: dict[str, Any] = {"timestep": time, "return_dict": False}
        name = type(self.model).__name__
        if self.columns:
            given["encoder_hidden_states"] = self.table_embeddings[condition].to(x.dtype)
        if "mask" in self.columns:
            given["encoder_attention_mask"] = self.table_mask[condition]
        if name == "PixArtTransformer2DModel":
            given["added_cond_kwargs"] = self._sizes(x)
        elif "pooled" in self.columns:
            height, width = (8 * side for side in x.shape[-2:])  # pixels of the latents
            times = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)
            given["added_cond_kwargs"] = {"text_embeds": self.table_pooled[condition].to(x.dtype), "time_ids": times}
        elif self.classes:
            given["class_labels"] = condition
        out = self.model(x, **given)[0]
        return out[:, : x.shape[1]].to(whole.dtype)  # a learned variance comes after the prediction

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
    pipeline = read_json(index) if index.is_file() else {}
    texts = [*lines, ""]
    states, found = [], {}
    both = part.config.get("addition_embed_type") == "text_time"
    for words, encoder in encoders(made.folder):
        tokenizer = opened(transformers.AutoTokenizer, words, trust_remote_code=False)
        name = (read_json(encoder / "config.json").get("architectures") or [""])[0]
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


def load_model(part: Part, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The diffusers model of a folder, all of its weights or an error."""
    import diffusers

    options = {"variant": part.variant} if part.variant else {}
    model, info = opened(
        getattr(diffusers, part.kind),
        part.folder,
        use_safetensors=True,
        torch_dtype=dtype,
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
        raise ValueError(f"scheduler_config.json: {first_line(error)}") from error


def build(made: Made, device: str) -> Network:
    """The network of a choice, with its conditions, in eval mode without gradients."""
    part = made.parts["teacher"]
    table: dict[str, Tensor] = {}
    if text_width(part):
        lines = made.choice.lines()
        table = encoded(made, lines, device) if lines else made_up(part)
    abar, steps = None, int(made.scheduler.get("num_train_timesteps") or 1000)
    if made.kind != "flow":
        abar = torch.cumprod(1 - betas(made.scheduler), 0).clamp(min=LEAST_ABAR)
        steps = len(abar)
    model = load_model(part, getattr(torch, made.choice.dtype))
    network = Network(model, made.kind, steps, abar, table, classes_of(part), made.choice.guidance)
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
        raise ValueError(f"{made.folder}: the network cannot be called: {first_line(error)}") from error
    if out.shape != x.shape or not bool(out.isfinite().all()):
        raise ValueError(
            f"{made.folder}: the network gives {tuple(out.shape)} for {tuple(x.shape)}, or no finite numbers"
        )
