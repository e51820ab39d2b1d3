"""Which timesteps a sampler visits, and is told: shifted, searched and quadratic ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rigs.images import idle_session, method_of, module_of, noise_of, ran, session_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stepmark import backbones
from stepmark.tracks.image.metrics import exact_endpoints
from stepmark.tracks.image.schedules import Schedule, uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step

torch.set_num_threads(1)


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
    session, batch = idle_session(task), noise_of(task, 20)
    plain, _ = ran(session, method_of("ddim"), batch, rung)
    still, spent = ran(session, method_of("time_shift_sampler", window=0), batch, rung)
    assert torch.equal(plain, still)
    assert spent == rung


def test_time_shift_of_second_order_without_a_window_is_dpm_solver():
    session, batch = idle_session("class_to_image/digits_eps"), noise_of("class_to_image/digits_eps", 10)
    plain, _ = ran(session, method_of("dpm_solver_pp"), batch, 5)
    still, _ = ran(session, method_of("time_shift_sampler", window=0, order=2), batch, 5)
    moved, spent = ran(session, method_of("time_shift_sampler", order=2), batch, 5)
    assert torch.equal(plain, still)
    assert not torch.equal(plain, moved)
    assert spent == 5


def test_time_shift_costs_no_evaluation():
    session, batch = idle_session("class_to_image/digits_eps"), noise_of("class_to_image/digits_eps", 20)
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
    session = idle_session("class_to_image/digits_eps", teacher=network)
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
    session, batch = idle_session(task, teacher=Keeper()), noise_of(task, 12)
    ran(session, method_of("time_shift_sampler", window=80, cutoff=0), batch, 10)
    for due, (x, told) in zip(range(899, 0, -100), seen[1:], strict=True):
        assert torch.equal(told, module.shifted_timesteps(Schedule("epsilon"), x, due, 80).float())
    assert (seen[0][1] == 999).all()


def test_the_released_form_shifts_where_steps_end_and_not_what_is_told():
    """Against the step written out: abar of the timestep that fits the state before it, from the second step on."""
    network, rung = Recorder(0.4), 5
    task = "class_to_image/digits_eps"
    session, batch = idle_session(task, teacher=network), noise_of(task, 12)
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
    session = idle_session(task, teacher=network)
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


def test_a_candidate_is_scored_as_it_would_run_against_the_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    session, method = session_of("class_to_image/digits_eps"), method_of("autodiffusion")
    own, data = type(method).scorer.__globals__, session.train["x0"]
    plain, masked = (((799, ()), (300, ())), ((799, (2,)), (300, (0, 7))))
    asked: list[tuple[Any, ...]] = []
    original = own["sample"]
    monkeypatch.setitem(own, "sample", lambda *given: asked.append(given) or original(*given))
    score = method.scorer(session, 24)
    assert score(masked) != score(plain)
    assert [call[3] for call in asked] == [[(2,), (0, 7)], [(), ()]]
    assert all(call[2] == pytest.approx([0.8, 0.301, 0.0]) for call in asked)
    assert torch.equal(asked[0][1], asked[1][1])
    assert asked[0][1].shape == (24, 1, 8, 8)
    monkeypatch.setitem(own, "sample", lambda *_: data)
    assert score(((500, ()),)) == pytest.approx(0, abs=1e-6)
    assert min(score(masked), score(plain)) > 1e-3  # as before: what was scored is not sampled again
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("name", "cut", "blind", "best"),
    [("autodiffusion", 2, False, 2), ("autodiffusion_steps", 0, False, 0), ("autodiffusion_random", 0, True, 0)],
)
def test_the_cheapest_is_taken_of_those_that_are_about_as_good(
    name: str, cut: int, blind: bool, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of made-up figures: whole and best, two that are within 2 % and leave out as much, one worse and cheaper still."""
    layers = ((), (1,), (1, 2), (3, 4), (5, 6, 7))
    made = [tuple((n, skipped) for n in (900, 600, 400, 100)) for skipped in layers]
    method, searches = method_of(name), []

    def evolve(_: Any, start: Any, *__: Any, **settings: Any) -> tuple[dict[Any, float], list[float]]:
        searches.append((start, settings))
        return dict(zip(made, (1.0, 1.005, 1.01, 1.015, 1.03), strict=True)), []

    monkeypatch.setitem(type(method).prepare.__globals__, "evolve", evolve)
    monkeypatch.setattr(method, "scorer", lambda *_: None)
    state = method.prepare(session_of("class_to_image/digits_eps"))
    kept = [[i not in layers[best] for i in range(9)]] * 4
    assert state["timesteps_4"].tolist() == [900, 600, 400, 100]
    assert state["kept_4"].tolist() == kept
    assert [settings["blind"] for _, settings in searches] == [blind, blind]
    assert searches[1][1]["cut"] == cut
    assert "cut" not in searches[0][1]
    assert searches[1][0] == made[:1]  # the second stage begins with the best of the first


def test_autodiffusion_runs_what_it_found():
    task = "class_to_image/digits_eps"
    session, method, batch = idle_session(task), method_of("autodiffusion"), noise_of(task, 10)
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


# --- quadratic steps ----------------------------------------------------------------------------------------


def test_quadratic_ddim_spends_its_steps_near_the_data():
    network = Recorder()
    session = SimpleNamespace(networks={"teacher": network})
    method_of("ddim_quadratic").run(session, noise_of("class_to_image/digits_eps", 4), 4)
    assert [t[0].item() for t in network.times] == pytest.approx([999, 562, 249, 61], abs=1)
