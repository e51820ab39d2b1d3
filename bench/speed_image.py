"""Sampling loops beside diffusers' scheduler loops, same network, same grid, in one run on one thread.

    python bench/speed_image.py [--rung 8] [--batch 1 64] [--rounds 15]

Each pair is compared sample by sample, warmed up, then timed in interleaved rounds with alternating order; printed is
the ratio of the processor seconds of the fastest rounds, theirs / ours (above 1: ours is faster), with the network and
with a network that costs nothing, which leaves the loop alone. Exits with 1 when a pair disagrees.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from stepmark.methods.image.baselines.ddim import DDIM
from stepmark.methods.image.baselines.dpm_solver_pp import DPMSolverPP
from stepmark.methods.image.baselines.euler import Euler
from stepmark.methods.image.baselines.heun import Heun
from torch import Tensor, nn

from stepmark import Method, backbones
from stepmark.tracks.image.schedules import uniform_times

Loop = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def ours(method: type[Method], rung: int) -> Loop:
    """Our method as the harness calls it."""
    return lambda network, batch: method().run(SimpleNamespace(networks={"teacher": network}), batch, rung)


def theirs(scheduler: object, prepare: Callable[[object], None], flow: bool) -> Loop:
    """diffusers' loop, `set_timesteps` included, as pipelines run it; flows get the exact level as their time."""

    @torch.no_grad()
    def loop(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        prepare(scheduler)
        x = batch["noise"]
        for i, timestep in enumerate(scheduler.timesteps):
            level = scheduler.sigmas[i] if flow else timestep
            time = level.to(x.dtype).expand(len(x))
            x = scheduler.step(network(x, time, batch["condition"]), timestep, x, return_dict=False)[0]
        return x

    return loop


def pairs(rung: int) -> dict[str, tuple[str, Loop, Loop]]:
    """name -> (backbone, ours, theirs) on the same grid of times; Heun needs an odd rung and takes the next lower."""
    odd = rung - 1 + rung % 2

    def heun_grid(scheduler: FlowMatchHeunDiscreteScheduler) -> None:
        steps = (odd + 1) // 2
        scheduler.set_timesteps(steps)
        times = uniform_times(steps)
        scheduler.sigmas = torch.tensor([times[0], *[t for t in times[1:-1] for _ in range(2)], 0.0])
        scheduler.timesteps = scheduler.sigmas[:-1] * 1000

    def dpm_flow_grid(scheduler: DPMSolverMultistepScheduler) -> None:
        scheduler.set_timesteps(rung)
        scheduler.sigmas = torch.tensor(uniform_times(rung))  # their own grid starts at 0.999

    ddim = DDIMScheduler(1000, clip_sample=False, beta_end=0.02, beta_start=1e-4, timestep_spacing="trailing")
    dpm = DPMSolverMultistepScheduler(
        1000, beta_end=0.02, beta_start=1e-4, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    dpm_flow = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero"
    )
    return {
        "DDIM, noise prediction": (
            "digits_eps_a",
            ours(DDIM, rung),
            theirs(ddim, lambda s: s.set_timesteps(rung), False),
        ),
        "DPM-Solver++ 2M, noise prediction": (
            "digits_eps_a",
            ours(DPMSolverPP, rung),
            theirs(dpm, lambda s: s.set_timesteps(rung), False),
        ),
        "Euler, flow": (
            "digits_flow_a",
            ours(Euler, rung),
            theirs(
                FlowMatchEulerDiscreteScheduler(),
                lambda s: s.set_timesteps(sigmas=uniform_times(rung)[:-1]),
                True,
            ),
        ),
        "Heun, flow": ("digits_flow_a", ours(Heun, odd), theirs(FlowMatchHeunDiscreteScheduler(), heun_grid, True)),
        "DPM-Solver++ 2M, flow": ("digits_flow_a", ours(DPMSolverPP, rung), theirs(dpm_flow, dpm_flow_grid, True)),
    }


class Free(nn.Module):
    """A network that costs nothing, so that only the loop is timed."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return x


def ratio(network: nn.Module, batch: dict[str, Tensor], mine: Loop, peer: Loop, rounds: int) -> float:
    """Processor seconds of the peer over mine, each in its fastest round: other load only ever makes a round slower."""
    fastest = {"mine": float("inf"), "peer": float("inf")}
    for number in range(rounds + 2):  # two rounds of warm-up
        for name in ("mine", "peer") if number % 2 else ("peer", "mine"):
            start = time.process_time()
            (mine if name == "mine" else peer)(network, batch)
            if number >= 2:
                fastest[name] = min(fastest[name], time.process_time() - start)
    return fastest["peer"] / fastest["mine"]


def main() -> int:
    """Print one row a sampler and batch size; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rung", type=int, default=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    print(f"theirs / ours at {options.rung} steps, diffusers' scheduler loop on the same network, one thread")
    for size in options.batch:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(size, 1, 8, 8, generator=generator)
        batch = {"noise": noise, "condition": torch.arange(size) % 10}
        for name, (backbone, mine, peer) in pairs(options.rung).items():
            network = backbones.load(backbone)
            apart = (mine(network, batch) - peer(network, batch)).abs().max().item()
            wrong = apart > 2e-3
            failed |= wrong
            whole = ratio(network, batch, mine, peer, options.rounds)
            alone = ratio(Free(str(network.prediction)), batch, mine, peer, options.rounds)
            print(
                f"batch {size:3d}  {name:34s} {whole:5.2f}x  loop alone {alone:5.2f}x  "
                f"largest difference {apart:.1e}{'  DISAGREES' if wrong else ''}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
