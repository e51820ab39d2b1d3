"""Arithmetic around an evaluation that a kernel does in one pass where there is a GPU, and guidance row by row."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn


def fused(kernel: str, x: Tensor, *arguments: Any) -> Tensor:
    """A function of `stepmark.kernels` by its name: in Triton on a GPU where no gradient is wanted, else in plain torch.

    "sampler_step": x, output, guidance, a, b; "adaptive_norm": x, scale, shift, eps (see `kernels/reference.py`).
    """
    module = "reference"
    if x.is_cuda and not torch.is_grad_enabled() and importlib.util.find_spec("triton"):
        module = kernel
    return getattr(importlib.import_module(f"stepmark.kernels.{module}"), kernel)(x, *arguments)


def guided_rows(network: nn.Module, x: Tensor, t: Tensor, condition: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance with a time t [B] and scale [B] of its own for every row: null + scale (cond - null)."""
    twice = torch.cat([network.null_condition(condition), condition])
    null, conditional = network(torch.cat([x, x]), torch.cat([t, t]), twice).chunk(2)
    return torch.lerp(null, conditional, scale.view(-1, *[1] * (x.dim() - 1)))
