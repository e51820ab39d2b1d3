"""The Triton kernels against their references: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

# Triton looks at this when it is imported: conftest.py sets it first where there is no GPU.
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytest.importorskip("triton", reason="triton cannot be imported; there are wheels of it for Linux only")

from diffusers.models.normalization import AdaLayerNormZero  # noqa: E402
from stepmark.kernels import adaptive_norm, bandwidth, reference, sampler_step  # noqa: E402

from stepmark import backbones  # noqa: E402
from stepmark.tracks.image import fusing, schedules, solvers  # noqa: E402

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers on the device of these tests."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    """Equal up to float32 sums in another order and one rounding to the type of the result."""
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[found.dtype]
    torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=4e-6 + tolerance / 8)


# --- the sampler's step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 8, 8), (5, 1, 40, 41), (1, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_step_is_that_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype, guidance: float) -> None:
    """In all types and for sizes that fill no block, with the sum kept in float32 until the end."""
    x = random(*shape, dtype=dtype)
    output = random(shape[0] * (1 if guidance == 1 else 2), *shape[1:], seed=1, dtype=dtype)
    found = sampler_step.sampler_step(x, output, guidance, 0.9, -0.2)
    assert found.dtype == dtype
    assert found.shape == x.shape
    close(found, reference.sampler_step(x.float(), output.float(), guidance, 0.9, -0.2))


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["mixtures_flow", "mixtures_eps"])
def test_a_chain_of_steps_is_guided_ddim(backbone: str) -> None:
    """a and b from alpha and sigma: three steps end where the track's own denoiser and step lead."""
    network = backbones.load(backbone).to(DEVICE)
    network.null_condition = lambda condition: 1 - condition  # points have no unconditional branch
    condition = torch.arange(30, device=DEVICE) % 2
    denoise, x = solvers.Denoiser(network, condition, 1.5), random(30, 2)
    schedule, ours = denoise.schedule, x
    for t, s in pairwise(schedules.uniform_times(3)):
        time = torch.full((60,), schedule.network_time(t), device=DEVICE)
        rows = network(torch.cat([ours, ours]), time, denoise.condition)
        if schedule.flow:
            a, b = 1.0, s - t
        else:
            a = schedule.alpha(s) / schedule.alpha(t)
            b = schedule.sigma(s) - a * schedule.sigma(t)
        ours = sampler_step.sampler_step(ours, rows, 1.5, a, b)
        x = solvers.ddim_step(schedule, *denoise(x, t), s)
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def test_neither_input_is_written_to_and_views_are_read_right() -> None:
    wide, output = random(4, 6, 10), random(8, 6, 5, seed=1)
    x, before = wide[..., ::2], (wide.clone(), output.clone())
    close(sampler_step.sampler_step(x, output, 2.0, 0.5, 0.5), reference.sampler_step(x, output, 2.0, 0.5, 0.5))
    sampler_step.sampler_step(wide, output.repeat(1, 1, 2), 2.0, 0.5, 0.5)
    assert torch.equal(wide, before[0])
    assert torch.equal(output, before[1])
    assert sampler_step.sampler_step(x[:0], output[:0], 2.0, 1.0, 1.0).shape == (0, 6, 5)
    with pytest.raises(ValueError, match=r"output is \[8, 6, 5\], must be \[4, 6, 5\]"):
        sampler_step.sampler_step(x, output, 1.0, 1.0, 1.0)


# --- the adaptive layer norm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 16, 96), (3, 5, 33), (1, 2, 2500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per", ["item", "token"])
def test_a_norm_is_that_of_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, per: str) -> None:
    """For narrow and wide tokens, modulated by slices of one projection that are read in place."""
    items, length, width = shape
    x = random(*shape, dtype=dtype) * 3 + 1000  # a mean far from zero: a variance of squares would lose its digits
    modulation = random(items, 1 if per == "item" else length, 6 * width, seed=1, dtype=dtype)
    shift, scale = modulation.chunk(6, -1)[1:3]
    found = adaptive_norm.adaptive_norm(x, scale, shift)
    wanted = reference.adaptive_norm(x.double(), scale.double(), shift.double()).float()
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)
    if per == "item":
        assert torch.equal(adaptive_norm.adaptive_norm(x, scale[:, 0], shift[:, 0]), found)


def test_it_is_the_norm_of_a_transformer_block() -> None:
    """The modulated norm with which diffusers' DiT begins each block, as it slices scale and shift."""
    norm = AdaLayerNormZero(96, num_embeddings=10).to(DEVICE).eval()
    t, kind = torch.tensor([3, 400, 700, 999], device=DEVICE), torch.tensor([0, 3, 7, 10], device=DEVICE)
    x = random(4, 16, 96)
    with torch.no_grad():
        wanted = norm(x, t, kind, hidden_dtype=torch.float32)[0]
        shift, scale = norm.linear(norm.silu(norm.emb(t, kind, hidden_dtype=torch.float32))).chunk(6, 1)[:2]
    torch.testing.assert_close(adaptive_norm.adaptive_norm(x, scale, shift, 1e-6), wanted, rtol=1e-4, atol=1e-5)


def test_a_modulation_of_another_shape_is_refused() -> None:
    x = random(2, 3, 8)
    with pytest.raises(ValueError, match=r"modulation is \[3, 8\], must be one of"):
        adaptive_norm.adaptive_norm(x, random(3, 8), random(3, 8))
    with pytest.raises(ValueError, match="scale has 6 rows and shift 2"):
        adaptive_norm.adaptive_norm(x, random(2, 3, 8), random(2, 8))


# --- where they are used ---------------------------------------------------------------------------------------------


class OnGPU(Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


def test_tracks_take_the_kernel_on_a_gpu_and_the_reference_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    kernel = sampler_step.sampler_step
    monkeypatch.setattr(sampler_step, "sampler_step", lambda *a: called.append(a) or kernel(*a))
    x, output = random(4, 7).cpu(), random(8, 7, seed=1).cpu()
    arguments = (output, 2.0, 0.9, 0.1)
    wanted = reference.sampler_step(x, *arguments)
    with torch.no_grad():
        assert torch.equal(fusing.fused("sampler_step", x, *arguments), wanted)
    assert torch.equal(fusing.fused("sampler_step", x.as_subclass(OnGPU), *arguments), wanted)  # may need gradients
    assert not called
    with torch.no_grad():
        fusing.fused("sampler_step", x.to(DEVICE).as_subclass(OnGPU), output.to(DEVICE), 2.0, 0.9, 0.1)
    assert len(called) == 1


def test_the_benchmark_reports_bytes_over_time() -> None:
    """Where a copy and each kernel take a millisecond, the reference two, and three compiled."""
    times = iter([1.0, *(1.0, 2.0, 3.0) * 4])

    def milliseconds(call: Callable[[], Tensor]) -> float:
        call()
        return next(times)

    shapes = {"steps": ((500, 100),), "tokens": ((10, 5, 64),)}
    copy, _, *rows = bandwidth.report(DEVICE, milliseconds, lambda f: f, copied=10**6, **shapes).splitlines()
    assert copy == "device copy: 8 GB/s"
    step, norm = (row.split() for row in rows[2:])
    assert step == ["sampler_step", "500x100", "float32", "1.0000", "1", "10.0%", "2.00", "3.00"]  # 800 kB
    assert norm == ["adaptive_norm", "10x5x64", "float32", "1.0000", "0", "0.4%", "2.00", "3.00"]  # 30.7 kB


def test_without_a_gpu_the_benchmark_says_so_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^stepmark\.kernels.bandwidth needs a GPU .*; there is none here$"):
        bandwidth.main()
