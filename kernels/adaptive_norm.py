"""Triton kernel of the adaptive layer norm of diffusion transformers: normalise and modulate in one pass over memory.

    y = (x - mean) / sqrt(variance + eps) * (1 + scale) + shift,     mean and variance over the D channels of a token

A token is held in registers from its reading to its writing, so that x is read once and y written once. scale and shift
are read in place: they are usually slices of one wide projection, which torch would copy or stride over. Sums are in
float32, and the variance is that of the centred values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # numbers of x in one program: several tokens where they are narrow


@triton.jit
def _kernel(
    x_at, scale_at, shift_at, to, tokens, shared, scale_stride, shift_stride, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < tokens) & (column < WIDTH)
    x = tl.load(x_at + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1)[:, None] / WIDTH
    centred = tl.where(column < WIDTH, x - mean, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / WIDTH
    item = row // shared
    scale = tl.load(scale_at + item * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_at + item * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
    found = centred * (1 / tl.sqrt(variance + eps)) * (1 + scale) + shift
    tl.store(to + row * WIDTH + column, found.to(to.dtype.element_ty), mask=inside)


def _rows(part: Tensor, x: Tensor) -> Tensor:
    """Modulation as rows [B or B * L, D] with channels next to each other: a view where there is one."""
    items, length, width = x.shape
    wanted = ((items, width), (items, 1, width), (items, length, width))
    if part.shape not in wanted:
        raise ValueError(f"modulation is {list(part.shape)}, must be one of {[list(w) for w in wanted]}")
    part = part.reshape(-1, width)
    return part if part.stride(-1) == 1 else part.contiguous()


def adaptive_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """As `reference.adaptive_norm`, for float32, float16 and bfloat16."""
    x, scale, shift = x.contiguous(), _rows(scale, x), _rows(shift, x)
    if len(scale) != len(shift):
        raise ValueError(f"scale has {len(scale)} rows and shift {len(shift)}; give both by item or both by token")
    to = torch.empty_like(x)
    if x.numel():
        tokens, width = x.numel() // x.shape[-1], x.shape[-1]
        columns = triton.next_power_of_2(width)
        rows = max(1, TILE // columns)
        shared = tokens // len(scale)  # tokens that share a row of the modulation
        _kernel[(triton.cdiv(tokens, rows),)](
            x, scale, shift, to, tokens, shared, scale.stride(0), shift.stride(0), float(eps),
            WIDTH=width, ROWS=rows, COLUMNS=columns, num_warps=4 if columns <= TILE else 8,
        )  # fmt: skip
    return to


def traffic(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> int:
    """Bytes that have to move: x and the modulation in, y out."""
    return 2 * x.nbytes + scale.nbytes + shift.nbytes
