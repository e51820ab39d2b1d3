"""Image networks of checkpoint folders, with the same face as the embedded teachers.

Called as `network(x, t, condition)` with x [B, C, H, W] in the network's own space (often latents; no decoder is
needed), t float [B] and condition int64 [B]: a class, or a row of a table of text embeddings. The last row stands for
"no condition". Whatever the network predicts, the wrapper gives noise, or for flows the velocity. Networks whose tokens
are patches that their pipeline puts together (Flux) get them here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from stepmark.hub.choice import Made, Part
from stepmark.hub.image_kinds import KINDS, classes_of, distilled, text_width
from stepmark.hub.image_prompts import encoded, made_up
from stepmark.hub.pretrained import first_line, opened, whole
from stepmark.method import Skip, skip

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
        told: the model was distilled to take guidance as a number, and costs no second row.
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
        told: bool = False,
    ) -> None:
        super().__init__()
        self.role = "unet" if type(model).__name__.startswith("UNet") else "transformer"
        self.add_module(self.role, model)
        self.takes, self.kind, self.steps, self.classes = KINDS[type(model).__name__], kind, steps, classes
        self.guidance = 1.0 if told else guidance
        self.told: float | None = guidance if told else None
        config: Any = model.config
        self.time_scale = float(config.get("timestep_scale", 1))
        if told and self.takes.distilled == "time_cond_proj_dim":
            row = waves(guidance - 1, int(config["time_cond_proj_dim"]))
            self.register_buffer("told_as", row, persistent=False)
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
        # solvers stay in float32, whatever the network computes in
        latents = x.to(next(self.model.parameters()).dtype)
        given: dict[str, Any] = {"timestep": self._clock(t), "return_dict": False}
        given |= self._conditions(latents, condition) | self._beside(latents)
        if self.takes.packed:
            height, width = (side // 2 for side in x.shape[-2:])
            tokens = pixel_unshuffle(latents, 2).flatten(2).mT
            out = pixel_shuffle(self.model(tokens, **given)[0].mT.unflatten(2, (height, width)), 2)
        else:
            out = self.model(latents, **given)[0]
        out = out[:, : x.shape[1]].to(x.dtype)  # a learned variance comes after the prediction
        return -out if self.takes.clock == "reversed" else out

    def _clock(self, t: Tensor) -> Tensor:
        """What the network takes for time."""
        if self.kind != "flow":
            return t
        if self.takes.clock == "steps":
            return t * self.steps * self.time_scale
        if self.takes.clock == "reversed":
            return 1 - t
        return t * (self.steps / 1000)  # of which the network makes thousands itself

    def _conditions(self, x: Tensor, condition: Tensor) -> dict[str, Any]:
        """The rows of the table that are asked for."""
        if not self.columns:
            return {"class_labels": condition} if self.classes else {}
        given: dict[str, Any] = {"encoder_hidden_states": self.table_embeddings[condition].to(x.dtype)}
        if "mask" in self.columns:
            given[self.takes.mask] = self.table_mask[condition]
        if "pooled" in self.columns:
            pooled = self.table_pooled[condition].to(x.dtype)
            if self.takes.pooled:
                return given | {"pooled_projections": pooled}
            height, width = (8 * side for side in x.shape[-2:])  # pixels of the latents
            times = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)
            given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": times}
        return given

    def _beside(self, x: Tensor) -> dict[str, Any]:
        """What a network is told beside its condition: sizes, places of tokens, a distilled guidance."""
        name, given, height, width = type(self.model).__name__, dict[str, Any](), *x.shape[-2:]
        if name == "PixArtTransformer2DModel":
            given["added_cond_kwargs"] = self._sizes(x)
        if name == "QwenImageTransformer2DModel":
            given["img_shapes"] = [[(1, height // 2, width // 2)]] * len(x)
        if name == "FluxTransformer2DModel":
            given["img_ids"] = places(height // 2, width // 2, x.device)
            given["txt_ids"] = given["img_ids"].new_zeros(self.table_embeddings.shape[1], 3)
        if self.told is not None and name == "FluxTransformer2DModel":
            given["guidance"] = x.new_full((len(x),), self.told, dtype=torch.float32)
        elif self.told is not None:
            given["timestep_cond"] = self.told_as.to(x.dtype).expand(len(x), -1)
        return given

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


def places(height: int, width: int, device: torch.device) -> Tensor:
    """Where the tokens of an image stand, row by row: (0, row, column) [height * width, 3]."""
    at = torch.zeros(height, width, 3, device=device)
    at[..., 1] = torch.arange(height, device=device)[:, None]
    at[..., 2] = torch.arange(width, device=device)
    return at.flatten(0, 1)


def waves(value: float, width: int) -> Tensor:
    """A number as sines and cosines [width], the way latent consistency models take their guidance less one."""
    half = width // 2
    angles = 1000 * value * torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))


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
    network = Network(model, made.kind, steps, abar, table, classes_of(part), made.choice.guidance, distilled(part))
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
