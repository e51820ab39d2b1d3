"""Low-rank adapters of a network (LoRA, Hu et al. 2022) as tensors by the names that the library PEFT gives them: trained on one
network, kept, and put on another.

Names are those of the wrapped model of diffusers, `base_model.model.<layer>.lora_A.weight` and `.lora_B.weight`, so that with
`config` beside them the tensors are what PEFT reads (`adapter_model.safetensors`, `adapter_config.json`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

RANK = 8
ALPHA = 8  # PEFT's own: what it adds is alpha / rank times B A
PREFIX = "base_model.model."
TARGETS = (  # layers by the end of their names: those of the authors' code of LCM-LoRA
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


class Adapted(nn.Module):
    """A linear or convolutional layer and its adapter: base(x) + (alpha / rank) B(A(x)), B zero at first."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, rng: torch.Generator) -> None:
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        like: dict[str, Any] = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A: nn.Module
        self.lora_B: nn.Module
        if isinstance(base, nn.Conv2d):
            how = (base.kernel_size, base.stride, base.padding)
            self.lora_A = nn.Conv2d(base.in_channels, rank, *how, **like)  # type: ignore[arg-type]
            self.lora_B = nn.Conv2d(rank, base.out_channels, 1, **like)
        else:
            self.lora_A = nn.Linear(base.in_features, rank, **like)
            self.lora_B = nn.Linear(rank, base.out_features, **like)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5), generator=rng)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.lora_B(self.lora_A(x))


def inner(network: Any) -> Any:
    """The model of diffusers in a network of the track."""
    found = getattr(network, "unet", None)
    return network.transformer if found is None else found


def adapt(
    network: nn.Module,
    rng: torch.Generator,
    rank: int = RANK,
    alpha: float = ALPHA,
    within: str = "",
    targets: Sequence[str] = TARGETS,
) -> nn.Module:
    """The network, changed in place: adapters on all layers that `targets` names and whose names begin with `within`; nothing
    else can learn any more."""
    network.requires_grad_(False)
    model = inner(network)
    for name, layer in list(model.named_modules()):
        aimed = any(name == target or name.endswith(f".{target}") for target in targets)
        if aimed and name.startswith(within):
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Adapted(layer, rank, alpha, rng))
    return network


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """The adapters of an adapted network, by PEFT's names."""
    layers = [(name, layer) for name, layer in inner(network).named_modules() if isinstance(layer, Adapted)]
    return {
        f"{PREFIX}{name}.{part}.weight": getattr(layer, part).weight.detach().clone()
        for name, layer in layers
        for part in ("lora_A", "lora_B")
    }


@torch.no_grad()
def merge(network: nn.Module, adapter: Mapping[str, Tensor], alpha: float = ALPHA, weight: float = 1.0) -> None:
    """Add `weight` times an adapter to the weights of a plain network, in place: W + weight (alpha / rank) B A.

    Raises:
        AttributeError: the network has no such layer.
    """
    model = inner(network)
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            b = adapter[name.replace(".lora_A.", ".lora_B.")]
            layer = model.get_submodule(name.removeprefix(PREFIX).removesuffix(".lora_A.weight"))
            product = b.flatten(1) @ a.flatten(1)  # of convolutions A has the kernel, and B is one of 1x1
            layer.weight.add_(product.view_as(layer.weight), alpha=weight * alpha / len(a))


def config(rank: int = RANK, alpha: float = ALPHA) -> dict[str, Any]:
    """What `adapter_config.json` beside the tensors says, as far as it differs from what PEFT takes by itself."""
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(TARGETS), "bias": "none"}
