"""How fast the kernels are on this GPU: `python -m stepmark.kernels.bandwidth`.

Both kernels do a few operations a byte, so that memory is what limits them. For each shape the table gives the bytes
that have to move over the median time, the same as a share of a plain device copy measured beforehand, and the time of
the torch reference, eager and under torch.compile, over the kernel's. Between rounds the cache is flushed. Results are
compared with the reference before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
STEPS = ((64, 4, 64, 64), (256, 4, 128, 128), (16, 16, 16, 128, 128))  # latents: images, large ones, videos
TOKENS = ((32, 256, 1152), (64, 1024, 1152), (16, 4096, 3072))  # DiT-XL at 256 and 512 pixels, a wider one
HEADER = f"{'kernel':<14}{'shape':<28}{'ms':>9}{'GB/s':>8}{'of copy':>9}{'eager x':>10}{'compiled x':>12}"


def cases(device: str, steps: tuple = STEPS, tokens: tuple = TOKENS) -> Iterator[tuple[str, str, tuple]]:
    """(kernel, shape and type in words, arguments)."""
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for shape in steps:
            x = torch.randn(shape, device=device, dtype=dtype)
            output = torch.randn((2 * shape[0], *shape[1:]), device=device, dtype=dtype)
            yield "sampler_step", f"{'x'.join(map(str, shape))} {name}", (x, output, 4.0, 0.97, -0.11)
        for shape in tokens:
            x = torch.randn(shape, device=device, dtype=dtype)
            modulation = torch.randn(shape[0], 6 * shape[2], device=device, dtype=dtype)
            shift, scale = modulation.chunk(6, 1)[:2]
            yield "adaptive_norm", f"{'x'.join(map(str, shape))} {name}", (x, scale, shift)


def report(
    device: str,
    milliseconds: Callable[..., float],
    compiled: Callable[..., Any],
    copied: int = 1 << 28,
    **shapes: tuple,
) -> str:
    """The table. `milliseconds` times a call, `compiled` compiles a function; `copied` numbers are copied."""
    from stepmark.kernels import adaptive_norm, reference, sampler_step

    modules = {"sampler_step": sampler_step, "adaptive_norm": adaptive_norm}
    copy = copy_rate(device, milliseconds, copied)
    lines = [f"device copy: {copy:.0f} GB/s", HEADER]
    for name, words, arguments in cases(device, **shapes):
        kernel, plain = getattr(modules[name], name), getattr(reference, name)
        tolerance = TOLERANCE[arguments[0].dtype]
        exact = plain(*(part.float() if isinstance(part, torch.Tensor) else part for part in arguments))
        torch.testing.assert_close(kernel(*arguments).float(), exact, rtol=tolerance, atol=tolerance)
        del exact
        own, eager, inductor = (milliseconds(lambda f=f: f(*arguments)) for f in (kernel, plain, compiled(plain)))
        rate = modules[name].traffic(*arguments) / own / 1e6
        lines.append(
            f"{name:<14}{words:<28}{own:>9.4f}{rate:>8.0f}{rate / copy:>9.1%}{eager / own:>10.2f}{inductor / own:>12.2f}"
        )
    return "\n".join(lines)


def copy_rate(device: str, milliseconds: Callable[..., float], n: int) -> float:
    """GB/s, read and written, of copying n numbers of float32."""
    source = torch.empty(n, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def main() -> None:
    """Print the table, or that there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("stepmark.kernels.bandwidth needs a GPU (CUDA or ROCm); there is none here")
    from triton.testing import do_bench

    print(torch.cuda.get_device_name())
    print(
        report(
            "cuda",
            lambda call: do_bench(call, warmup=50, rep=200, return_mode="median"),
            lambda function: torch.compile(function, dynamic=False),
        )
    )


if __name__ == "__main__":
    main()
