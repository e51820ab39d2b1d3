"""Triton kernel of a sampler's step: classifier-free guidance and the solver's update in one pass over memory.

Eager torch reads and writes the samples several times for what is four additions and multiplications an element. Here
every array is touched once: x and the two halves of the network's output are read, x' is written,

    x' = a x + b (null + w (conditional - null))

which holds DDIM, Euler and every solver whose update is linear in x and the output. Sums are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _kernel(x_at, output_at, to, n, guidance, a, b, GUIDED: tl.constexpr, BLOCK: tl.constexpr):
    # Offsets of a block of 64-bit: a batch of videos has more than 2^31 numbers.
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    x = tl.load(x_at + place, mask=inside).to(tl.float32)
    found = tl.load(output_at + place, mask=inside).to(tl.float32)
    if GUIDED:
        conditional = tl.load(output_at + n + place, mask=inside).to(tl.float32)
        found += guidance * (conditional - found)
    tl.store(to + place, (a * x + b * found).to(to.dtype.element_ty), mask=inside)


def sampler_step(x: Tensor, output: Tensor, guidance: float, a: float, b: float) -> Tensor:
    """As `reference.sampler_step`, for float32, float16 and bfloat16."""
    x, output = x.contiguous(), output.contiguous()
    rows = len(x) if guidance == 1.0 else 2 * len(x)
    if output.shape != (rows, *x.shape[1:]):
        raise ValueError(f"output is {list(output.shape)}, must be {[rows, *x.shape[1:]]} for x {list(x.shape)}")
    to = torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        _kernel[grid](x, output, to, x.numel(), float(guidance), float(a), float(b), guidance != 1.0, BLOCK)
    return to


def traffic(x: Tensor, output: Tensor, guidance: float, a: float, b: float) -> int:
    """Bytes that have to move: x and output in, x' out."""
    return 2 * x.nbytes + output.nbytes
