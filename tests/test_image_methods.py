"""The image methods do what their papers say: update rules, losses and searches against known answers."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stepmark import backbones, plugins
from stepmark.cell import track_of
from stepmark.meter.counts import Ledger, watch
from stepmark.session import Session
from stepmark.task import load_split
from stepmark.tracks.image.metrics import exact_endpoints, sliced_w2
from stepmark.tracks.image.schedules import Schedule, add_noise, uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step
from stepmark.tracks.image.training import follow

torch.set_num_threads(1)


def module_of(method: str) -> Any:
    """The module of a plugin, wherever below its track it stands."""
    path = plugins.methods()[method].path.relative_to(plugins.method_folders()[0])
    return importlib.import_module(".".join(("stepmark.methods", *path.with_suffix("").parts)))


def session_of(task: str, tier: str = "smoke", **networks: nn.Module) -> Session:
    """A session on a task, with other networks where given; every network is counted in `session._ledger`."""
    ledger = Ledger()
    spec = track_of(task)[1]
    have = networks or {"teacher": backbones.load(spec.backbones["teacher"])}
    watched = {role: watch(ledger, role, network) for role, network in have.items()}
    return Session(spec, tier, torch.device("cpu"), torch.float32, watched, {}, ledger, show_progress=False)


def method_of(method: str, **attributes: Any) -> Any:
    """An instance of a method with some class attributes changed on the instance."""
    found = plugins.load_class(plugins.methods()[method])()
    for name, value in attributes.items():
        assert hasattr(found, name), f"{method} has no {name}"
        setattr(found, name, value)
    return found


def noise_of(task: str, n: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch of noise and balanced conditions."""
    shape = (2,) if task.startswith("sampling") else (1, 8, 8)
    draw = torch.Generator().manual_seed(seed)
    condition = torch.arange(n) % (2 if task.startswith("sampling") else 10)
    return {"noise": torch.randn(n, *shape, generator=draw), "condition": condition}


def ran(session: Session, method: Any, batch: dict[str, Tensor], rung: int) -> tuple[Tensor, float]:
    """Output of one run call and the evaluations per item it took."""
    session.begin("run", 5, rung * len(batch["noise"]))
    with torch.no_grad():
        out = method.run(session, batch, rung)
    return out, session.spent / len(batch["noise"])


class Recorder(nn.Module):
    """A network that returns a scaled copy of its input and keeps the times it was asked at."""

    prediction = "epsilon"

    def __init__(self, scale: float = 0.7) -> None:
        super().__init__()
        self.scale, self.times = scale, []

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.times.append(t.clone())
        return self.scale * x


# --- time shift ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["sampling/mixtures_eps", "class_to_image/digits_eps"])
@pytest.mark.parametrize("rung", [1, 3, 10])
def test_time_shift_without_a_window_is_ddim_bit_for_bit(task, rung):
    session, batch = session_of(task), noise_of(task, 20)
    plain, _ = ran(session, method_of("ddim"), batch, rung)
    still, spent = ran(session, method_of("time_shift_sampler", window=0), batch, rung)
    assert torch.equal(plain, still)
    assert spent == rung


def test_time_shift_of_second_order_without_a_window_is_dpm_solver():
    session, batch = session_of("class_to_image/digits_eps"), noise_of("class_to_image/digits_eps", 10)
    plain, _ = ran(session, method_of("dpm_solver_pp"), batch, 5)
    still, _ = ran(session, method_of("time_shift_sampler", window=0, order=2), batch, 5)
    moved, spent = ran(session, method_of("time_shift_sampler", order=2), batch, 5)
    assert torch.equal(plain, still)
    assert not torch.equal(plain, moved)
    assert spent == 5


def test_time_shift_costs_no_evaluation():
    session, batch = session_of("class_to_image/digits_eps"), noise_of("class_to_image/digits_eps", 20)
    plain, spent = ran(session, method_of("ddim"), batch, 10)
    moved, shifted = ran(session, method_of("time_shift_sampler"), batch, 10)
    assert spent == shifted == 10
    assert not torch.equal(plain, moved)


@pytest.mark.parametrize("n", [0, 3, 250, 600, 997, 999])
def test_chosen_timestep_is_the_argmin_over_the_window(n):
    module, schedule = module_of("time_shift_sampler"), Schedule("epsilon")
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(n)) * torch.linspace(0.05, 1.3, 30)[:, None]
    chosen = module.shifted_timesteps(schedule, x, n, 40)
    for image, tau in zip(x, chosen.tolist(), strict=True):
        variance = image.double().flatten().var().item()
        window = range(max(0, n - 20), min(999, n + 20) + 1)
        errors = {k: abs(variance - schedule.sigma((k + 1) / 1000) ** 2) for k in window}
        assert tau in window
        assert errors[tau] == pytest.approx(min(errors.values()), abs=1e-12)


def test_chosen_timestep_moves_with_the_noise_that_is_there():
    module, schedule = module_of("time_shift_sampler"), Schedule("epsilon")
    unit = torch.randn(16, 1, 128, 128, generator=torch.Generator().manual_seed(1))
    unit = unit / unit.flatten(1).std(1).view(-1, 1, 1, 1)
    sigma = schedule.sigma(501 / 1000)
    assert (module.shifted_timesteps(schedule, sigma * unit, 500, 100) == 500).all()
    assert (module.shifted_timesteps(schedule, 1.01 * sigma * unit, 500, 100) > 500).all()
    assert (module.shifted_timesteps(schedule, 0.99 * sigma * unit, 500, 100) < 500).all()


def test_time_shift_changes_only_what_the_network_is_told_and_only_above_the_cutoff():
    network = Recorder()
    session = session_of("class_to_image/digits_eps", teacher=network)
    batch = noise_of("class_to_image/digits_eps", 12)
    plain, _ = ran(session, method_of("ddim"), batch, 10)
    asked, network.times = network.times, []
    moved, _ = ran(session, method_of("time_shift_sampler", window=80, cutoff=450), batch, 10)
    # the network ignores its time, so the coefficients of the solver must be those of the grid
    torch.testing.assert_close(moved, plain, rtol=0, atol=0)
    for grid, told in zip(asked, network.times, strict=True):
        n = grid[0].item()
        assert (told - n).abs().max() <= 40
        assert bool((told != n).any()) == (450 < n < 999)


def test_a_state_is_looked_at_after_its_step_and_told_in_the_next():
    """The timestep told is that of the very state it is told with, over the last step's noise and no other."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Keeper(Recorder):
        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            seen.append((x.clone(), t.clone()))
            return super().forward(x, t, condition)

    module, task = module_of("time_shift_sampler"), "class_to_image/digits_eps"
    session, batch = session_of(task, teacher=Keeper()), noise_of(task, 12)
    ran(session, method_of("time_shift_sampler", window=80, cutoff=0), batch, 10)
    for due, (x, told) in zip(range(899, 0, -100), seen[1:], strict=True):
        assert torch.equal(told, module.shifted_timesteps(Schedule("epsilon"), x, due, 80).float())
    assert (seen[0][1] == 999).all()


def test_the_released_form_shifts_where_steps_end_and_not_what_is_told():
    """Against the step written out: abar of the timestep that fits the state before it, from the second step on."""
    network, rung = Recorder(0.4), 5
    task = "class_to_image/digits_eps"
    session, batch = session_of(task, teacher=network), noise_of(task, 12)
    found, spent = ran(session, method_of("time_shift_released", cutoff=300), batch, rung)
    assert spent == rung
    assert [t.unique().tolist() for t in network.times] == [pytest.approx([n]) for n in (999, 799, 599, 399, 199)]
    schedule = Schedule("epsilon")
    noise_levels = [schedule.sigma((tau + 1) / 1000) ** 2 for tau in range(1000)]
    for image, out in zip(batch["noise"].double(), found.double(), strict=True):
        x = image
        for step, (n, after) in enumerate(itertools.pairwise([999, 799, 599, 399, 199, -1])):
            end = after
            if step > 0 and after > 300:  # a window of 80 timesteps, 0.4 of a step
                end = min(range(after - 40, after + 41), key=lambda tau: abs(float(x.var()) - noise_levels[tau]))
            level = noise_levels[end] if end >= 0 else 0.0
            eps = 0.4 * x
            x = (1 - level) ** 0.5 * (x - noise_levels[n] ** 0.5 * eps) / (
                1 - noise_levels[n]
            ) ** 0.5 + level**0.5 * eps
        torch.testing.assert_close(out, x, rtol=1e-3, atol=1e-4)


def test_the_control_shifts_every_sample_alike():
    network, task = Recorder(), "class_to_image/digits_eps"
    session = session_of(task, teacher=network)
    ran(session, method_of("time_shift_constant"), noise_of(task, 12), 10)
    assert [t.unique().tolist() for t in network.times] == [
        pytest.approx([n]) for n in (999, 919, 819, 719, 619, 519, 419, 319, 199, 99)
    ]


# --- AutoDiffusion ------------------------------------------------------------------------------------------


def assert_legal(candidate: Any, k: int, steps: int, layers: int, cut: int) -> None:
    timesteps = [n for n, _ in candidate]
    assert len(timesteps) == k
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert all(0 <= n < steps for n in timesteps)
    for _, skipped in candidate:
        assert len(set(skipped)) == len(skipped) <= cut
        assert all(0 <= index < layers for index in skipped)


@pytest.mark.parametrize("steps", [7, 1000])
def test_children_keep_to_the_budget(steps):
    module, rng, k = module_of("autodiffusion"), np.random.default_rng(0), 6
    parent = module.repair([(n, ()) for n in range(k)], rng, steps)
    other = module.repair([(n, (0,)) for n in range(k)], rng, steps)
    seen = set()
    for _ in range(200):
        child = module.mutate(parent, rng, steps, 0.5, 9, 2)
        both = module.cross(child, other, rng, steps)
        for each in (child, both):
            assert_legal(each, k, steps, 9, 2)
            seen.add(each)
        parent = child
    assert len(seen) > 50


def test_mutation_changes_about_the_share_asked_for():
    module, rng = module_of("autodiffusion"), np.random.default_rng(1)
    parent = tuple((n, ()) for n in range(900, 0, -100))
    kept = [len(set(parent) & set(module.mutate(parent, rng, 1000, 0.25, 0, 0))) / 9 for _ in range(400)]
    assert 0.70 < np.mean(kept) < 0.80
    assert module.mutate(parent, rng, 1000, 0.0, 9, 2) == parent


def toy_fitness(seed: int, n: int = 48) -> Callable[[Any], float]:
    """Mean distance of DDIM on the exact mixture network from the exact endpoints of the same noise."""
    module, network = module_of("autodiffusion"), backbones.load("mixtures_eps")
    batch = noise_of("sampling/mixtures_eps", n, seed)
    exact = exact_endpoints(network, batch["noise"], batch["condition"], steps=64)
    denoise = Denoiser(network, batch["condition"])

    def fitness(candidate: Any) -> float:
        times = [*((t + 1) / 1000 for t, _ in candidate), 0.0]
        with torch.no_grad():
            out = module.sample(denoise, batch["noise"], times, [()] * len(candidate))
        return float((out - exact).norm(dim=1).mean())

    return fitness


def test_search_never_gets_worse_beats_uniform_steps_and_looks_where_it_was_good():
    """In so few dimensions the luckiest of as many random schedules is about as good; most of what is bred is better."""
    module, k = module_of("autodiffusion"), 4
    rng = np.random.default_rng(3)
    search, held_out = toy_fitness(10), toy_fitness(11, 200)
    uniform = module.repair([(round(1000 * t) - 1, ()) for t in uniform_times(k)[:-1]], rng, 1000)
    start = [uniform, *(module.mutate(uniform, rng, 1000, 1.0, 0, 0) for _ in range(9))]
    known, history = module.evolve(search, start, rng, generations=10, population=12)
    assert all(later <= earlier for earlier, later in itertools.pairwise(history))
    assert history[-1] < history[0]
    assert history[-1] == min(known.values())
    for candidate in known:
        assert_legal(candidate, k, 1000, 0, 0)
    found = min(known, key=lambda c: known[c])
    random, _ = module.evolve(search, start, rng, generations=10, population=12, blind=True)
    assert len(random) == len(known) == 10 + 9 * 12
    assert len(set(random) & set(known)) == len(start)
    assert held_out(found) <= held_out(uniform)
    assert np.median(list(known.values())) < 0.9 * np.median(list(random.values()))


def test_leaving_out_layers_saves_flops_and_leaving_out_none_changes_nothing():
    module = module_of("autodiffusion")
    network, batch = backbones.load("digits_eps_a"), noise_of("class_to_image/digits_eps", 6)
    layers = module.layers_of(network)
    assert len(layers) == 9
    time = torch.full((6,), 400.0)

    def evaluate(skipped: tuple[int, ...]) -> tuple[Tensor, int]:
        with torch.no_grad(), module.without(network, skipped), FlopCounterMode(display=False) as flops:
            out = network(batch["noise"], time, batch["condition"])
        return out, flops.get_total_flops()

    with torch.no_grad():
        plain = network(batch["noise"], time, batch["condition"])
    whole, cost = evaluate(())
    assert torch.equal(whole, plain)
    for index in range(len(layers)):
        other, less = evaluate((index,))
        assert less < cost, index
        assert not torch.equal(other, plain), index
        assert torch.isfinite(other).all()
    assert evaluate((1, 4))[1] < min(evaluate((1,))[1], evaluate((4,))[1])
    assert torch.equal(evaluate(())[0], plain)


def test_a_layer_left_out_hands_on_its_shortcut_and_comes_back_after_an_error():
    module = module_of("autodiffusion")
    network = backbones.load("digits_eps_a")
    block = next(part for part in module.layers_of(network) if getattr(part, "conv_shortcut", None) is not None)
    index = [part is block for part in module.layers_of(network)].index(True)
    x = torch.randn(2, block.conv_shortcut.in_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    with module.without(network, (index,)):
        assert torch.equal(block(x, None), block.conv_shortcut(x))
    with pytest.raises(TypeError), module.without(network, (index,)):
        network(x)  # its other arguments are missing
    assert "forward" not in vars(block)


def test_autodiffusion_runs_what_it_found():
    task = "class_to_image/digits_eps"
    session, method, batch = session_of(task), method_of("autodiffusion"), noise_of(task, 10)
    session.begin("prepare", 3)
    state = method.prepare(session)
    assert set(state) == {"timesteps_4", "kept_4"}
    assert state["kept_4"].shape == (4, 9)
    session.state = state
    found, spent = ran(session, method, batch, 4)
    assert spent == 4
    module, network = module_of("autodiffusion"), backbones.load("digits_eps_a")
    schedule, x = Schedule("epsilon"), batch["noise"]
    times = [*((n + 1) / 1000 for n in state["timesteps_4"].tolist()), 0.0]
    for (t, s), kept in zip(itertools.pairwise(times), state["kept_4"].tolist(), strict=True):
        with torch.no_grad(), module.without(network, [i for i, on in enumerate(kept) if not on]):
            x = ddim_step(schedule, *Denoiser(network, batch["condition"])(x, t), s)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    uniform, _ = ran(session, method, batch, 2)
    plain, _ = ran(session, method_of("ddim"), batch, 2)
    assert torch.equal(uniform, plain)  # a rung that was not searched


# --- IMM ----------------------------------------------------------------------------------------------------


def test_mmd_is_zero_for_equal_sets_and_counts_every_pair():
    module, draw = module_of("imm"), torch.Generator().manual_seed(0)
    y, target = (torch.randn(3, 4, 1, 2, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor([0.5, 2.0, 9.0], dtype=torch.float64)
    assert module.mmd(y, y, scale).abs().max() < 1e-12
    assert module.mmd(y, y.flip(1), scale).abs().max() < 1e-12  # a set, not a sequence
    for group in range(3):
        expected = 0.0
        for (a, b), sign in {(0, 0): 1, (1, 1): 1, (0, 1): -2}.items():
            for i, j in itertools.product(range(4), repeat=2):
                distance = ((y, target)[a][group, i] - (y, target)[b][group, j]).norm().clamp(min=1e-4)
                expected += sign * (-scale[group] * distance / 4).exp().item() / 16
        assert module.mmd(y, target, scale)[group].item() == pytest.approx(expected, abs=1e-12)
    assert (module.mmd(y, target, scale) > 0).all()


def test_mmd_of_samples_has_the_expectation_of_its_pieces():
    """Cross pairs are unbiased; within a set the M diagonal pairs of M^2 have kernel 1."""
    module, draw, m = module_of("imm"), torch.Generator().manual_seed(2), 4
    a, b = (shift + torch.randn(4000, m, 3, generator=draw, dtype=torch.float64) for shift in (0.0, 0.7))
    scale = torch.full((4000,), 3.0, dtype=torch.float64)

    def mean_kernel(x: Tensor, y: Tensor) -> float:
        return (-(x - y).norm(dim=1)).exp().mean().item()  # scale / D = 1

    x, x2 = (torch.randn(200_000, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    within, between = mean_kernel(x, x2), mean_kernel(x, x2 + 0.7)
    expected = 2 * (1 / m + (1 - 1 / m) * within) - 2 * between
    assert module.mmd(a, b, scale).mean().item() == pytest.approx(expected, abs=0.005)


def test_one_particle_gives_the_consistency_loss():
    module, draw = module_of("imm"), torch.Generator().manual_seed(3)
    y, target = (torch.randn(5, 1, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    y.requires_grad_(True)
    scale = torch.full((5,), 1.5, dtype=torch.float64)
    loss = module.mmd(y, target, scale)
    distance = (y - target).flatten(1).norm(dim=1)
    torch.testing.assert_close(loss, 2 * ((-scale * 1e-4 / 6).exp() - (-scale * distance / 6).exp()))
    (gradient,) = torch.autograd.grad(loss.sum(), y)
    alignment = torch.cosine_similarity(gradient.flatten(1), (y - target).detach().flatten(1))
    torch.testing.assert_close(alignment, torch.ones(5, dtype=torch.float64))


def test_map_to_its_own_time_is_the_identity_and_interpolation_is_consistent():
    module, draw = module_of("imm"), torch.Generator().manual_seed(4)
    torch.manual_seed(0)
    network = module.TwoTimeUNet(8, 1, (16, 32), 10)
    x, x0 = torch.randn(2, 6, 1, 8, 8, generator=draw, dtype=torch.float64)
    t, condition = torch.linspace(0.05, 0.99, 6, dtype=torch.float64), torch.arange(6)
    with torch.no_grad():
        there = module.push(network, x.float(), t.float(), t.float(), condition)
        away = module.push(network, x.float(), t.float(), 0.5 * t.float(), condition)
    assert torch.equal(there, x.float())
    assert not torch.equal(away, x.float())
    r, s = 0.7 * t, 0.2 * t
    twice = module.interpolate(module.interpolate(x, x0, t, r), x0, r, s)
    torch.testing.assert_close(twice, module.interpolate(x, x0, t, s))
    eps = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    flow = Schedule("flow")
    torch.testing.assert_close(module.interpolate(add_noise(flow, x0, eps, t), x0, t, r), add_noise(flow, x0, eps, r))


def test_second_time_reaches_the_network():
    module = module_of("imm")
    torch.manual_seed(0)
    for network, shape in ((module.TwoTimeUNet(8, 1, (16, 32), 10), (1, 8, 8)), (module.TwoTimeMLP(2), (2,))):
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).expand(2, *shape)
        t, s = torch.full((2,), 0.8), torch.tensor([0.1, 0.7])
        with torch.no_grad():
            out = network(x, t, s, torch.zeros(2, dtype=torch.int64))
        assert out.shape == x.shape
        assert not torch.allclose(out[0], out[1])


def test_middle_lies_between_and_lowers_eta_by_a_constant():
    module = module_of("imm")
    t = torch.linspace(0.01, 0.994, 300, dtype=torch.float64)
    for share in (0.0, 0.3, 0.95):
        r = module.middle(t, share * t, 5, 0.994)
        assert (r >= share * t).all()
        assert (r < t).all()
    r = module.middle(t, torch.zeros_like(t), 5, 0.994)
    lowered = t / (1 - t) - r / (1 - r)
    free = r > 0
    assert 30 < int(free.sum()) < 300
    torch.testing.assert_close(lowered[free], torch.full_like(lowered[free], 0.994 / 0.006 / 32))


def test_imms_loss_is_algorithm_1_pair_by_pair(monkeypatch):
    """What the network is asked tells groups, times and data; weight, kernel and held targets are written out by hand."""
    module, calls, found = module_of("imm"), [], []

    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.3))

        def forward(self, z: Tensor, t: Tensor, s: Tensor, condition: Tensor) -> Tensor:
            x = z * ((1 - t) ** 2 + t**2).sqrt()[:, None]
            calls.append((x.detach(), t, s, condition, torch.is_grad_enabled()))
            return self.a * (2 * x).sin() * (1 + t + 3 * s)[:, None]

    def first_loss(session: Session, network: nn.Module, loss: Callable[[], Tensor], *_: Any, **__: Any) -> None:
        value = loss()
        found.extend((value.item(), *torch.autograd.grad(value, [network.a])))

    session, method = session_of("sampling/mixtures_flow"), module.IMM()
    method.points = {"k": 3, "batch": 40, "steps": 1, "rate": 0.0}
    session.begin("prepare", 1)
    network = session.networks["generator"] = Bent()
    monkeypatch.setattr(module, "fit", first_loss)
    method.prepare(session)
    (x_r, r, s, label, learns), (x_t, t, s2, label2, learns2) = calls
    assert (learns, learns2) == (False, True) and torch.equal(s, s2) and torch.equal(label, label2)
    for shared in (r, s, t, label):
        groups = shared.view(10, 4)
        assert (groups == groups[:, :1]).all() and len(groups[:, 0].unique()) == (2 if shared is label else 10)
    assert (s < t).all() and torch.equal(r, module.middle(t, s, 3, 0.994))
    ratio = (r / t)[:, None]
    x0 = (x_r - ratio * x_t) / ((1 - r)[:, None] - (1 - t)[:, None] * ratio)  # both have the same noise
    for point, kind, gap in zip(x0, label, t - r, strict=True):
        apart = (session.train["x0"][session.train["condition"] == kind] - point).norm(dim=1).min()
        assert apart < 1e-4 / gap  # a training point of the class
    y = x_t - (t - s)[:, None] * network(((1 - t) ** 2 + t**2).rsqrt()[:, None] * x_t, t, s, label)
    held = x_r - (r - s)[:, None] * network(((1 - r) ** 2 + r**2).rsqrt()[:, None] * x_r, r, s, label).detach()
    total = torch.zeros(())
    for rows in torch.arange(40).view(10, 4):
        time = t[rows[0]].double().requires_grad_()
        snr = 2 * torch.log((1 - time) / time)
        (slope,) = torch.autograd.grad(snr, time)
        weight = 0.5 * torch.sigmoid(4 - snr) * -slope * (1 - time) / ((1 - time) ** 2 + time**2)
        for i, j in itertools.product(rows.tolist(), repeat=2):
            for (a, b), sign in {(y[i], y[j]): 1, (held[i], held[j]): 1, (y[i], held[j]): -2}.items():
                distance = (a - b).square().sum().clamp(min=1e-8).sqrt() / 2 / (t - s)[i]
                total = total + sign * weight.detach().float() * (-distance).exp() / 16 / 10
    assert found[0] == pytest.approx(total.item(), rel=1e-3)
    torch.testing.assert_close(found[1], torch.autograd.grad(total, [network.a])[0], rtol=1e-3, atol=1e-5)


def test_imm_pushes_noise_from_each_time_to_the_next():
    asked = []

    class One(nn.Module):
        def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Tensor) -> Tensor:
            asked.append((float(t[0]), float(s[0])))
            return torch.ones_like(x)

    session, batch = session_of("sampling/mixtures_flow"), noise_of("sampling/mixtures_flow", 6)
    session.networks["generator"] = One()
    out = method_of("imm").run(session, batch, 3)
    assert np.allclose(asked, [(0.994, 1.988 / 3), (1.988 / 3, 0.994 / 3), (0.994 / 3, 0)])
    torch.testing.assert_close(out, batch["noise"] - 0.994)


def test_imm_trained_for_a_moment_beats_two_euler_steps():
    task = "sampling/mixtures_flow"
    session = session_of(task)
    method = method_of("imm", points={"k": 4, "batch": 256, "steps": 400, "rate": 4e-3})
    session.begin("prepare", 1)
    torch.manual_seed(0)
    session.networks |= {name: watch(session._ledger, name, net) for name, net in method.networks(session).items()}
    session.scale = lambda embedded, smoke: embedded  # type: ignore[method-assign]
    method.prepare(session)
    batch = noise_of(task, 1000, 7)
    truth = session.train["x0"][session.train["condition"] == 0].double().numpy()
    two, spent = ran(session, method, batch, 2)
    euler, _ = ran(session, method_of("euler"), batch, 2)
    assert spent == 2

    def distance(points: Tensor) -> float:
        return float(sliced_w2(points[batch["condition"] == 0].double().numpy(), truth)[0])  # eight on a circle

    assert distance(two) < 0.8 * distance(euler)


def test_flow_matching_of_the_same_network_learns_velocities_and_follows_them(monkeypatch):
    """Data at one point c have the velocity (x - c) / t: no loss is left, and any number of steps leads to c."""
    module, losses = module_of("imm"), []

    class Towards(nn.Module):
        def forward(self, z: Tensor, t: Tensor, s: Tensor, condition: Tensor) -> Tensor:
            assert torch.equal(t, s)
            x = z * ((1 - t) ** 2 + t**2).sqrt()[:, None]
            return (x - 0.7) / t[:, None]

    session, method = session_of("sampling/mixtures_flow"), module.IMM()
    method.velocity = method_of("imm_flow_matching").velocity
    session.begin("prepare", 1)
    session.networks["generator"] = Towards()
    train = {"x0": torch.full((100, 2), 0.7), "condition": torch.arange(100) % 2}
    monkeypatch.setattr(Session, "train", property(lambda self: train))
    monkeypatch.setattr(module, "fit", lambda session, network, loss, *_, **__: losses.append(loss().item()))
    method.prepare(session)
    assert losses[0] < 1e-6
    for rung in (1, 4):
        out = method.run(session, noise_of("sampling/mixtures_flow", 6), rung)
        torch.testing.assert_close(out, torch.full((6, 2), 0.7), rtol=1e-4, atol=1e-4)


# --- ReFlow and Simple ReFlow -------------------------------------------------------------------------------


class Straight(nn.Module):
    """A flow whose paths are straight: v is the same everywhere, so that x0 = eps - v."""

    prediction = "flow"

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.linspace(-1, 1, 64).view(1, 8, 8))

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.v.expand_as(x) + 0 * x


@pytest.mark.parametrize("method", ["reflow", "simple_reflow", "simple_reflow_plain", "simple_reflow_backward"])
def test_the_coupling_of_a_straight_flow_is_reproduced(method):
    task = "class_to_image/digits_flow"
    teacher = Straight()
    session = session_of(task, teacher=teacher)
    plugin = method_of(method)
    session.begin("prepare", 1)
    student = plugin.networks(session)["student"]
    session.networks["student"] = watch(session._ledger, "student", student)
    assert student is not teacher
    with torch.no_grad():
        assert torch.equal(student.v, teacher.v)  # it starts from the teacher
    plugin.prepare(session)
    # nothing is left to learn, up to the optimiser's weight decay
    torch.testing.assert_close(student.v, teacher.v, rtol=1e-3, atol=1e-3)
    batch = noise_of(task, 6)
    for rung in (1, 2, 9):
        out, spent = ran(session, plugin, batch, rung)
        torch.testing.assert_close(out, batch["noise"] - teacher.v, rtol=1e-2, atol=5e-3)
        assert spent == rung


def test_reflow_learns_the_coupling_of_a_curved_flow():
    """A student of one parameter on a linear flow: least squares on the pairs has a closed form."""

    class Linear(nn.Module):
        prediction = "flow"

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return self.a * x

    session = session_of("class_to_image/digits_flow", teacher=Linear())
    plugin = method_of("reflow", pairs=200, solver_steps=10, steps=150, rate=0.02)
    session.scale = lambda embedded, smoke: embedded  # type: ignore[method-assign]
    session.begin("prepare", 1)
    session.networks |= plugin.networks(session)
    plugin.prepare(session)
    # Ten steps of Heun's method: x0 = end * eps, so that v = (1 - end) eps along x_t = (end + t (1 - end)) eps.
    end = (1 - 0.15 + 0.15**2 / 2) ** 10
    t = np.linspace(0, 1, 10001)
    path = end + t * (1 - end)
    expected = (1 - end) * path.mean() / (path**2).mean()
    assert session.networks["student"].a.item() == pytest.approx(expected, abs=0.02)
    assert abs(expected - 1.5) > 0.3


def test_normalised_loss_is_free_of_scale():
    module = module_of("simple_reflow")
    residual = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pulls = []
    for scale in (1e-1, 1.0, 1e2):
        scaled = (scale * torch.logspace(-1, 1, 8).double().view(-1, 1, 1, 1) * residual).requires_grad_(True)
        loss = module.normalised_loss(scaled, 1.0)
        assert loss.item() == pytest.approx(1.0, abs=1e-3)
        (gradient,) = torch.autograd.grad(loss, scaled)
        pulls.append((gradient * scaled).flatten(1).sum(1))
    for pull in pulls:  # every sample pulls alike: d loss / d log(size) is 2 / B
        torch.testing.assert_close(pull, torch.full((8,), 0.25, dtype=torch.float64), rtol=1e-3, atol=1e-6)
    zero = torch.zeros(2, 1, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(module.normalised_loss(zero, 1.0), zero)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_high_pass_removes_constants_keeps_a_checkerboard_and_can_be_undone():
    module = module_of("simple_reflow")
    flat = torch.full((2, 3, 8, 8), 1.7, dtype=torch.float64)
    assert module.high_pass(flat).abs().max() < 1e-12
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1).double().expand(1, 2, 8, 8)
    torch.testing.assert_close(module.high_pass(board), board)
    basis = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    for emphasis in (1.0, 10.0):
        matrix = (basis + emphasis * module.high_pass(basis)).view(64, 64)
        values = torch.linalg.eigvals(matrix).real
        assert values.min() > 1 - 1e-9  # invertible: the minimiser of the loss is unchanged
        assert values.max() == pytest.approx(1 + emphasis, abs=1e-9)


def test_training_times_have_exponential_density():
    module = module_of("simple_reflow")
    times = module.exponential_times(5000, 10.0, torch.Generator().manual_seed(0)).double().numpy()
    assert kstest(times, lambda t: (10**t - 1) / 9).pvalue > 0.01
    assert kstest(times, "uniform").pvalue < 1e-6
    assert times.min() >= 0
    assert times.max() <= 1


@pytest.mark.parametrize("n", [1, 2, 9, 50])
def test_sigmoid_grid_falls_from_one_to_zero(n):
    module = module_of("simple_reflow")
    for kappa in (0.01, 4.0, 20.0):
        times = module.sigmoid_times(n, kappa)
        assert len(times) == n + 1
        assert (times[0], times[-1]) == (1.0, 0.0)
        assert all(later < earlier for earlier, later in itertools.pairwise(times))
        assert times == pytest.approx([1 - t for t in reversed(times)], abs=1e-9)  # both ends alike
    assert module.sigmoid_times(n, 1e-4) == pytest.approx(uniform_times(n), abs=1e-6)
    if n == 9:
        steps = -np.diff(module.sigmoid_times(n, 10.0))
        assert steps[0] < steps[4] > steps[-1]  # small steps at the ends


def test_forward_pairs_invert_and_generate_the_data_again():
    module = module_of("simple_reflow")
    network = backbones.load("digits_flow_a")
    data = load_split("digits", "train")
    x0, condition = data["x0"][:40], data["condition"][:40]
    denoise, times = Denoiser(network, condition), uniform_times(20)
    with torch.no_grad():
        eps = follow(denoise, x0, times[::-1])
        again = follow(denoise, eps, times)
    session = session_of("class_to_image/digits_flow")
    session.begin("prepare", 1)
    pairs = module.inverted_pairs(session, 40, 20)
    torch.testing.assert_close(pairs["eps"], eps, rtol=1e-4, atol=1e-4)
    assert torch.equal(pairs["x0"], x0) and torch.equal(pairs["condition"], condition)
    assert (again - x0).square().mean().sqrt() < 0.1
    assert (x0 - x0.flip(0)).square().mean().sqrt() > 0.5
    assert 0.7 < eps.std().item() < 1.2


def test_projected_noises_have_gaussian_moments_and_move_no_more_than_they_must():
    module, draw = module_of("simple_reflow"), torch.Generator().manual_seed(5)
    mixing = torch.randn(6, 6, generator=draw)
    noise = (torch.randn(4000, 6, generator=draw) @ mixing + 2).view(4000, 1, 2, 3)
    flat = module.project(noise).flatten(1).double()
    torch.testing.assert_close(flat.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cov(flat.T), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-4)
    # the squared displacement is the Frechet distance of the two Gaussians, the least there is
    from stepmark.tracks.image.metrics import frechet_distance

    source = noise.flatten(1).double()
    moved = (flat - source).square().sum(1).mean()
    least = frechet_distance(source.mean(0).numpy(), torch.cov(source.T).numpy(), np.zeros(6), np.eye(6))
    assert moved.item() == pytest.approx(float(least), rel=2e-3)
    white = module.project(flat.view(4000, 1, 2, 3).float()).flatten(1).double()
    torch.testing.assert_close(white, flat, rtol=0, atol=1e-3)


# --- the contract -------------------------------------------------------------------------------------------

OURS = (
    "time_shift_sampler", "autodiffusion", "imm", "reflow", "simple_reflow", "ddim_quadratic", "ddt_fifth",
    "slimflow_naive", "parastep_processes", "naive_patches", "imm_target_blind", "edm_heun", "unipc_best_grid",
)  # fmt: skip


@pytest.mark.parametrize("method", OURS)
def test_source_keeps_the_contract(method):
    from stepmark.check import static

    assert list(static(plugins.methods()[method])) == []


@pytest.mark.parametrize("method", ["reflow", "simple_reflow", "imm"])
def test_training_changes_the_student_and_not_the_teacher(method):
    task = "class_to_image/digits_flow"
    session, plugin = session_of(task), method_of(method)
    teacher = {k: v.clone() for k, v in session.networks["teacher"].state_dict().items()}
    session.begin("prepare", 1)
    torch.manual_seed(0)
    own = plugin.networks(session)
    before = {k: v.clone() for net in own.values() for k, v in net.state_dict().items()}
    session.networks |= {name: watch(session._ledger, name, net) for name, net in own.items()}
    assert plugin.prepare(session) is None
    after = {k: v for net in own.values() for k, v in net.state_dict().items()}
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(teacher[k], v) for k, v in session.networks["teacher"].state_dict().items())
    out, spent = ran(session, plugin, noise_of(task, 10), 4)
    assert torch.isfinite(out).all()
    assert spent == 4


def test_quadratic_ddim_spends_its_steps_near_the_data():
    network = Recorder()
    session = SimpleNamespace(networks={"teacher": network})
    method_of("ddim_quadratic").run(session, noise_of("class_to_image/digits_eps", 4), 4)
    assert [t[0].item() for t in network.times] == pytest.approx([999, 562, 249, 61], abs=1)
