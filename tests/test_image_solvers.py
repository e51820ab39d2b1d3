"""Reference solvers: order of convergence on exact scores, limits in which they become others, and diffusers."""

from __future__ import annotations

import importlib
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepmark import backbones, plugins
from stepmark.tracks.image import metrics, schedules, solvers

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")


def module_of(method: str) -> Any:
    """The module of a plugin, wherever below its track it stands."""
    path = plugins.methods()[method].path.relative_to(plugins.method_folders()[0])
    return importlib.import_module(".".join(("stepmark.methods", *path.with_suffix("").parts)))


def method_of(method: str) -> Any:
    """A method or variant, as the harness makes it."""
    return plugins.load_class(plugins.methods()[method])()


unipc, deis = module_of("unipc"), module_of("deis")


def session(network: nn.Module) -> Any:
    """What these solvers need of a session."""
    return SimpleNamespace(networks={"teacher": network})


def batch_of(n: int, shape: tuple[int, ...] = (1, 8, 8), classes: int = 10) -> dict[str, Tensor]:
    """Noise and balanced conditions."""
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(3))
    return {"noise": noise, "condition": torch.arange(n) % classes}


def across(solver: str, network: nn.Module, n: int) -> Tensor:
    """From t = 0.8 to 0.2 in n steps equal in log-SNR, from the same points, the first two steps by Heun."""
    points = batch_of(64, (2,), 2)
    denoise, x = solvers.Denoiser(network, points["condition"]), points["noise"].double()
    schedule = denoise.schedule
    ends = [schedule.log_snr(t) for t in (0.8, 0.2)]
    times = [schedule.time(ends[0] + (ends[1] - ends[0]) * i / n) for i in range(n + 1)]
    past: list[tuple[float, Tensor]] = []
    before = x
    for i, (t, s) in enumerate(pairwise(times)):
        x0, eps = denoise(x, t)
        if solver == "unic" and i > 2:
            x = unipc.unipc_step(schedule, before, past, t, 2, ahead=x0)
        past = [*past, (t, x0 if solver.startswith("uni") else eps)][-3:]
        before = x
        if i < 2:
            for a, b in pairwise(np.linspace(t, s, 9).tolist()):
                x = solvers.heun_step(denoise, x, a, b)
        elif solver.startswith("uni"):
            x = unipc.unipc_step(schedule, x, past[-2:], s, 2)
        else:
            weights = deis.exponential_weights(schedule, [u for u, _ in past], s)
            x = schedule.alpha(s) * (
                x / schedule.alpha(t) + sum(w * e for w, (_, e) in zip(weights, past, strict=True))
            )
    return x


@pytest.mark.parametrize(("solver", "order"), [("unip", 2), ("unic", 3), ("deis", 3)])
def test_order_of_convergence(solver: str, order: int) -> None:
    network = backbones.load("mixtures_eps").double()
    coarse, middle, fine = (across(solver, network, n) for n in (40, 80, 160))
    ratio = (coarse - middle).norm(dim=1).mean() / (middle - fine).norm(dim=1).mean()
    assert np.log2(ratio.item()) == pytest.approx(order, abs=0.3)


def test_first_order_is_ddim() -> None:
    network, batch = backbones.load("digits_eps_a"), batch_of(10)
    plain = module_of("ddim").DDIM().run(session(network), batch, 5)
    method = deis.DEIS()
    method.order = 1
    torch.testing.assert_close(method.run(session(network), batch, 5), plain, rtol=1e-4, atol=1e-4)
    step = unipc.unipc_step(schedules.Schedule("epsilon"), batch["noise"], [(0.6, plain)], 0.4)
    eps = (batch["noise"] - schedules.Schedule("epsilon").alpha(0.6) * plain) / schedules.Schedule("epsilon").sigma(0.6)
    torch.testing.assert_close(step, solvers.ddim_step(schedules.Schedule("epsilon"), plain, eps, 0.4))


def test_weights_integrate_polynomials_exactly() -> None:
    """Noise that is a quadratic in log rho along the path is integrated without error, a cubic is not."""
    schedule = schedules.Schedule("epsilon")
    times, s = [0.9, 0.7, 0.6], 0.4
    logs = [-schedule.log_snr(t) for t in times]
    weights = deis.exponential_weights(schedule, times, s)

    def integral(power: int) -> float:
        grid = np.linspace(logs[-1], -schedule.log_snr(s), 20001)
        return float(np.trapezoid(grid**power * np.exp(grid), grid))

    for power in range(3):
        assert sum(w * x**power for w, x in zip(weights, logs, strict=True)) == pytest.approx(integral(power), rel=1e-6)
    assert sum(w * x**3 for w, x in zip(weights, logs, strict=True)) != pytest.approx(integral(3), rel=1e-2)


def _theirs(scheduler: Any, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    x = batch["noise"]
    for t in scheduler.timesteps:
        output = network(x, t.expand(len(x)).float(), batch["condition"])
        x = scheduler.step(output, t, x).prev_sample
    return x


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_unipc_equals_diffusers(n: int) -> None:
    from diffusers import UniPCMultistepScheduler

    network, batch = backbones.load("digits_eps_a"), batch_of(20)
    scheduler = UniPCMultistepScheduler(
        1000, 1e-4, 0.02, "linear", solver_order=2, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(n)
    theirs = _theirs(scheduler, network, batch)
    ours = unipc.UniPC().run(session(network), batch, n)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_deis_equals_diffusers_before_the_last_step() -> None:
    """Their last step ends at the first training timestep, ours at the data: the states before it agree."""
    from diffusers import DEISMultistepScheduler

    network, batch = backbones.load("digits_eps_a"), batch_of(20)
    scheduler = DEISMultistepScheduler(
        1000, 1e-4, 0.02, "linear", solver_order=3, timestep_spacing="trailing", lower_order_final=False
    )
    scheduler.set_timesteps(10)
    x = batch["noise"]
    asked: list[Tensor] = []

    class Spy(nn.Module):
        prediction = "epsilon"

        def forward(self, y: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            asked.append(y)
            return network(y, t, condition)

    for t in scheduler.timesteps:
        theirs, output = x, network(x, t.expand(len(x)).float(), batch["condition"])
        x = scheduler.step(output, t, x).prev_sample
    deis.DEIS().run(session(Spy()), batch, 10)
    torch.testing.assert_close(asked[-1], theirs, rtol=1e-3, atol=1e-3)


def test_edm_heun_spends_its_rung_on_the_karras_grid() -> None:
    """Second order on the exact scores: the error to the exact end falls by about four when the evaluations double."""
    network, batch = backbones.load("mixtures_eps"), batch_of(200, (2,), 2)
    exact = metrics.exact_endpoints(network, batch["noise"], batch["condition"], 512)
    method, errors, calls = method_of("edm_heun"), [], []

    class Counting(nn.Module):
        prediction = "epsilon"

        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            calls.append(1)
            return network(x, t, condition)

    for rung in (1, 2, 3, 8, 65, 129):
        calls.clear()
        out = method.run(session(Counting()), batch, rung)
        assert len(calls) == rung
        errors.append(float((out - exact).norm(dim=1).median()))
    assert 3 < errors[-2] / errors[-1] < 6


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp", "unipc", "deis"])
def test_on_equal_steps_a_solver_with_its_own_grid_is_the_plain_one(name: str) -> None:
    network, batch = backbones.load("digits_eps_a"), batch_of(10)
    ours = session(network)
    assert method_of(name).prepare(ours) is None, "a solver on equal steps has nothing to prepare"
    expected = method_of(name).run(ours, batch, 6)
    ours.state = {"times_6": torch.tensor(schedules.uniform_times(6), dtype=torch.float64)}
    assert torch.equal(method_of(f"{name}_best_grid").run(ours, batch, 6), expected)
    ours.state = {"times_6": torch.tensor(schedules.leading_times(6), dtype=torch.float64)}
    assert not torch.allclose(method_of(f"{name}_best_grid").run(ours, batch, 6), expected)


def test_the_best_grid_is_the_one_that_ends_nearest() -> None:
    """Every grid is tried by hand on other noises: the chosen one is the best or as good as the best."""
    network = backbones.load("mixtures_eps")
    method = method_of("ddim_best_grid")
    label = torch.arange(400) % 2
    ours = SimpleNamespace(
        networks={"teacher": network},
        train={"x0": torch.zeros(400, 2), "condition": label},
        device=torch.device("cpu"),
        rng=torch.Generator().manual_seed(1),
        scale=lambda embedded, smoke: embedded,
        progress=lambda items, name: items,
        task=SimpleNamespace(rungs=(4, 8), smoke_rungs=()),
    )
    state = method.prepare(ours)
    batch = batch_of(400, (2,), 2)
    denoise = solvers.Denoiser(network, batch["condition"])
    exact = metrics.exact_endpoints(network, batch["noise"], batch["condition"], 256)
    for rung in (4, 8):
        errors = {
            tuple(grid): float((method.solve(denoise, batch["noise"], grid) - exact).square().mean())
            for grid in solvers.common_grids(denoise.schedule, rung).values()
        }
        assert errors[tuple(state[f"times_{rung}"].tolist())] <= 1.1 * min(errors.values())
        assert min(errors.values()) < 0.9 * errors[tuple(schedules.uniform_times(rung))]
        assert all(len(grid) == rung + 1 and grid[-1] == 0 for grid in errors)
        assert all(a > b for grid in errors for a, b in pairwise(grid))
