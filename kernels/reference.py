"""What the kernels of this folder compute, in plain torch: used where they do not run, and what they are tested against.

Each function has the name and arguments of the kernel's module and function. Intermediate results have the type of the
arguments, as in the expressions that methods would write; the kernels keep them in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sampler_step(x: Tensor, output: Tensor, guidance: float, a: float, b: float) -> Tensor:
    """a x + b (null + guidance (conditional - null)): guidance and a linear solver's update.

    Args:
        x: [B, ...].
        output: the network's, [2B, ...], the B rows without condition first; [B, ...] where guidance is 1.
        guidance, a, b: numbers. Euler's step of a flow from t to s has a = 1, b = s - t.
    """
    if guidance != 1.0:
        null, conditional = output.chunk(2)
        output = torch.lerp(null, conditional, guidance)
    return (a * x + b * output).to(x.dtype)


def adaptive_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift: the modulated norm of a diffusion transformer (Peebles and Xie 2023).

    Args:
        x: tokens [B, L, D].
        scale, shift: [B, D] or [B, 1, D], one for all tokens of an item, or [B, L, D], one for each.
        eps: added to the variance.
    """
    scale, shift = (part[:, None] if part.dim() == 2 else part for part in (scale, shift))
    return (torch.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)
