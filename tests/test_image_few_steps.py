"""Tuned timesteps, bootstrapped and fine-tuned students, retrieved trajectories: each against what is known exactly."""

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
from stepmark.cell import track_of
from stepmark.meter.counts import Ledger, watch
from stepmark.session import Session
from stepmark.tracks.image import schedules, solvers

torch.set_num_threads(1)


def module_of(method: str) -> Any:
    """The module of a plugin, wherever below its track it stands."""
    path = plugins.methods()[method].path.relative_to(plugins.method_folders()[0])
    return importlib.import_module(".".join(("stepmark.methods", *path.with_suffix("").parts)))


aligner, boot, redi, mmd, consistency = (
    module_of(name) for name in ("timestep_aligner", "boot", "redi", "mmd_ddm", "consistency_distillation")
)


def session_of(task: str, network: nn.Module | None = None) -> Session:
    """A smoke session on a task, with another teacher where given."""
    spec, ledger = track_of(task)[1], Ledger()
    teacher = watch(ledger, "teacher", network or backbones.load(spec.backbones["teacher"]))
    return Session(spec, "smoke", torch.device("cpu"), torch.float32, {"teacher": teacher}, {}, ledger, False)


def batch_of(n: int, shape: tuple[int, ...], classes: int, seed: int = 3) -> dict[str, Tensor]:
    """Noise and balanced conditions."""
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    return {"noise": noise, "condition": torch.arange(n) % classes}


class Gaussian(nn.Module):
    """The exact network of data N(0, 1/4): linear in x, so that every solver is a number."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.prediction = prediction
        self.times: list[float] = []

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        schedule = schedules.Schedule(self.prediction)
        time = float(t[0]) if schedule.flow else (float(t[0]) + 1) / 1000
        self.times.append(time)
        alpha, sigma = schedule.alpha(time), schedule.sigma(time)
        variance = alpha**2 / 4 + sigma**2
        eps, x0 = sigma / variance * x, alpha / 4 / variance * x
        return eps - x0 if schedule.flow else eps


# --- timestep aligner ------------------------------------------------------------------------------------------------


def test_untuned_steps_are_ddim_bit_for_bit() -> None:
    session, batch = session_of("class_to_image/digits_eps"), batch_of(10, (1, 8, 8), 10)
    plain, method = module_of("ddim").DDIM().run(session, batch, 5), aligner.TimestepAligner()
    method.grid = "trailing"
    session.begin("run", 1)
    assert torch.equal(method.run(session, batch, 5), plain)


@pytest.mark.parametrize(
    ("lowest", "highest", "found"), [(0.4, 2.0, 0.4), (1.7, 2.0, 1.7), (1.7, 1.25, 1.25), (1.0, 1.0, 1.0)]
)
def test_the_search_goes_downhill_from_one_as_far_as_it_goes(lowest: float, highest: float, found: float) -> None:
    """And stops in the first valley, as a gradient does: there is a deeper one at 0.1."""

    def loss(ratio: float) -> float:
        return min((ratio - lowest) ** 2, 20 * abs(ratio - 0.1) - 1)

    assert aligner.downhill(loss, highest, 0.02, 1e-4) == pytest.approx(found, abs=0.01)


def test_tuned_timesteps_minimise_the_change_of_direction_and_are_what_the_network_is_told() -> None:
    network, x = Gaussian("epsilon"), batch_of(64, (2,), 1)
    method, rung = aligner.TimestepAligner(), 5
    ratios = method.tune(network, x["noise"], x["condition"], rung)
    state = x["noise"].double()
    for (t, s), ratio in zip(list(pairwise(method.times(network, rung)))[:-1], ratios.tolist(), strict=False):

        def gap(r: float, state: Tensor = state, t: float = t, s: float = s) -> float:
            begin = method.noise(network, state, t, x["condition"])
            end = method.noise(network, method.step(network, state, t, s, r, x["condition"]), s, x["condition"])
            return float((begin - end).square().sum())

        grid = [gap(r) for r in np.linspace(ratio - 0.3, min(ratio + 0.3, 1 / t), 200)]
        assert gap(ratio) <= min(grid) + 1e-4 * max(grid)
        assert gap(ratio) <= gap(1.0)
        state = method.step(network, state, t, s, ratio, x["condition"])
    assert ratios[-1] == 1
    assert (ratios[:-1] - 1).abs().max() > 0.01
    session = session_of("sampling/mixtures_eps", network)
    session.state = {f"ratios_{rung}": ratios}
    network.times.clear()
    method.run(session, x, rung)
    assert network.times == pytest.approx(
        [r * t for r, t in zip(ratios.tolist(), method.times(network, rung), strict=False)]
    )


# --- BOOT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
def test_the_signal_ode_is_the_samplers_own(prediction: str) -> None:
    """Stepping the signal from the noise and adding the noise back gives the DDIM trajectory at every level."""
    network, batch = Gaussian(prediction), batch_of(8, (2,), 1)
    denoise, eps = solvers.Denoiser(network, batch["condition"]), batch["noise"].double()
    schedule, x = denoise.schedule, batch["noise"].double()
    y = torch.zeros_like(x) if schedule.flow else (x - schedule.sigma(1.0) * eps) / schedule.alpha(1.0)
    for t, s in pairwise(schedules.uniform_times(7)):
        x0, noise = denoise(x, t)
        y = boot.signal_step(schedule, y, x0, *(torch.full((8,), u, dtype=torch.float64) for u in (t, s)))
        x = solvers.ddim_step(schedule, x0, noise, s)
        torch.testing.assert_close(schedule.alpha(s) * y + schedule.sigma(s) * eps, x)


def test_an_untrained_student_meets_the_boundary() -> None:
    session = session_of("class_to_image/digits_flow")
    student, batch = boot.Boot().networks(session)["student"], batch_of(10, (1, 8, 8), 10)
    with torch.no_grad():
        ours = boot.Boot.signal(student, batch["noise"], torch.ones(10), batch["condition"])
        teachers = solvers.Denoiser(session.networks["teacher"], batch["condition"])(batch["noise"], 1.0)[0]
    torch.testing.assert_close(ours, teachers)


def test_no_image_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on images of nothing gives the same student, bit for bit."""
    weights = []
    for blank in (False, True):
        session = session_of("class_to_image/digits_flow")
        session.begin("prepare", 7)
        train = dict(session.train)
        if blank:
            train["x0"] = torch.full_like(train["x0"], float("nan"))
        monkeypatch.setattr(Session, "train", property(lambda self, train=train: train))
        session.networks["student"] = boot.Boot().networks(session)["student"]
        before = session.networks["student"].state_dict()["unet.conv_out.weight"].clone()
        boot.Boot().prepare(session)
        monkeypatch.undo()
        weights.append(session.networks["student"].state_dict()["unet.conv_out.weight"])
        assert not torch.equal(before, weights[-1])
    assert torch.equal(*weights)


# --- ReDi ------------------------------------------------------------------------------------------------------------


def prepared(session: Session, seed: int = 5) -> tuple[Any, dict[str, Tensor]]:
    """A prepared ReDi, and the noises and labels of the trajectories that it stored."""
    method = redi.ReDi()
    session.begin("prepare", seed)
    session.state = method.prepare(session)
    draw = torch.Generator().manual_seed(seed)
    label = load_labels(session)
    condition = label[torch.randint(len(label), (40,), generator=draw)]
    assert torch.equal(condition, session.state["condition"])
    return method, {"noise": torch.randn(40, 2, generator=draw), "condition": condition}


def load_labels(session: Session) -> Tensor:
    """Labels of the train split."""
    return session.train["condition"]


@pytest.mark.parametrize("rung", [2, 4])
def test_a_stored_trajectory_is_found_again(rung: int) -> None:
    """From a stored noise the jump lands on its own trajectory: S steps for the price of half."""
    session = session_of("sampling/mixtures_flow")
    method, batch = prepared(session)
    whole = module_of("euler").Euler().run(session, batch, 2 * rung)
    session.begin("run", 1, rung * 40)
    torch.testing.assert_close(method.run(session, batch, rung), whole, rtol=1e-3, atol=1e-3)
    assert session.spent == rung * 40


def test_on_a_linear_flow_the_jump_is_exact() -> None:
    """There values are linear in keys, so a query that the keys span lands where the whole sampler would."""
    session = session_of("sampling/mixtures_flow", Gaussian("flow"))
    method, _ = prepared(session)
    batch = batch_of(20, (2,), 2, seed=9)
    whole = module_of("euler").Euler().run(session, batch, 8)
    torch.testing.assert_close(method.run(session, batch, 4), whole, rtol=1e-3, atol=1e-4)
    nearest = redi.ReDi()
    nearest.neighbours = 1
    assert (nearest.run(session, batch, 4) - whole).abs().max() > 0.01


def kept(keys: Tensor, queries: Tensor) -> float:
    """Share of the squared norm of the queries that a jump along a linear trajectory keeps."""
    landed = redi.combination(queries, keys, 0.5 * keys, redi.ReDi.neighbours)
    return 1 - float((landed - 0.5 * queries).square().sum() / (0.5 * queries).square().sum())


def test_in_64_dimensions_neighbours_span_what_shares_their_noise_and_half_of_what_does_not() -> None:
    """Keys that begin with one noise and differ in a few directions span a query that does too. The nearest of 200 keys,
    as many as there are of a digit, with noises of their own lose half of it.
    """
    draw = torch.Generator().manual_seed(0)
    shared, content = torch.randn(64, generator=draw), torch.randn(8, 64, generator=draw)
    keys, queries = (torch.randn(n, 8, generator=draw) @ content for n in (200, 50))
    assert kept(shared + keys, shared + queries) > 0.999
    own, asked = (torch.randn(n, 64, generator=draw) for n in (200, 50))
    assert 10 / 64 < kept(own, asked) < 0.5
    assert kept(own[:, :8], asked[:, :8]) > 0.999  # in the plane, or in few dimensions, they span everything


# --- MMD fine-tuning -------------------------------------------------------------------------------------------------


def test_squared_mmd_is_unbiased() -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(12, 3, generator=draw), torch.randn(9, 3, generator=draw)) for _ in range(4000)]
    found = torch.stack([mmd.squared_mmd(x, y) for x, y in pairs])
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean()) < 4 * error
    # With the diagonals left in, as in the biased statistic, the same test fails by far.
    kernel = ((torch.stack([x for x, _ in pairs]).square().sum(-1) / 3 + 1) ** 3).mean() / 12
    assert kernel > 40 * error
    shifted = torch.stack([mmd.squared_mmd(x + 0.5, y) for x, y in pairs[:200]])
    assert shifted.mean() > 5 * shifted.std() / 200**0.5


def test_gradients_reach_every_step() -> None:
    class PerCall(nn.Module):
        prediction = "epsilon"

        def __init__(self) -> None:
            super().__init__()
            self.scales, self.calls = nn.ParameterList([torch.tensor(0.9) for _ in range(4)]), 0

        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            self.calls += 1
            return self.scales[self.calls - 1] * x

    network, batch = PerCall(), batch_of(16, (4,), 1)
    samples = mmd.MMDFinetuning.sample(network, batch["noise"], batch["condition"], 4)
    mmd.squared_mmd(samples, torch.randn(16, 4, generator=torch.Generator().manual_seed(1))).backward()
    assert network.calls == 4
    assert all(scale.grad is not None and scale.grad.abs() > 0 for scale in network.scales)
    plain = module_of("ddim").DDIM()
    network.calls = 0
    assert torch.equal(plain.run(SimpleNamespace(networks={"teacher": network}), batch, 4), samples.detach())


class Told(nn.Module):
    """A noise prediction of two numbers, w x + b."""

    prediction = "epsilon"

    def __init__(self, w: float, b: float) -> None:
        super().__init__()
        self.w, self.b = (nn.Parameter(torch.tensor(value)) for value in (w, b))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.w * x + self.b


def finetuned(student: nn.Module, rate: float, steps: int) -> None:
    """Fine-tune on images N(0, 1/4), seen as they are."""
    session = session_of("class_to_image/digits_eps")
    session.networks["student"] = student
    session.scale = lambda embedded, smoke: embedded
    session.begin("prepare", 3)
    method = mmd.MMDFinetuning()
    method.rate, method.steps, method.tuned = rate, steps, 1
    data = 0.5 * torch.randn(500, 4, generator=torch.Generator().manual_seed(2))
    method.finetune(session, nn.Identity(), data, torch.zeros(500, dtype=torch.int64))


def test_fine_tuning_learns_the_spread_and_leaves_alone_what_is_out_of_range() -> None:
    """One step from noise: samples are (x - sigma (w x + b)) / alpha. Beyond the range they are clamped and pull nothing,
    and no decay moves the weights either.
    """
    far = Told(0.5, -100.0)
    finetuned(far, 0.1, 3)
    assert (far.w.item(), far.b.item()) == (0.5, -100.0)
    schedule, near = schedules.Schedule("epsilon"), Told(0.998, 0.0)
    scale = [(1 - schedule.sigma(1.0) * near.w.item()) / schedule.alpha(1.0)]
    finetuned(near, 1e-4, 60)
    scale.append((1 - schedule.sigma(1.0) * near.w.item()) / schedule.alpha(1.0))
    assert abs(scale[0] - 0.5) > 0.1
    assert abs(scale[1] - 0.5) < 0.5 * abs(scale[0] - 0.5)


# --- consistency distillation ----------------------------------------------------------------------------------------


class EndPoint(nn.Module):
    """The network with which f(x, t) is the exact end of a Gaussian flow: x / (2 sqrt((1 - t)^2 / 4 + t^2))."""

    prediction = "flow"

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        t = t[:, None]
        return (x - x / (2 * ((1 - t) ** 2 / 4 + t**2).sqrt())) / t.clamp(min=1e-9)


class Flow(Gaussian):
    """The exact flow for a batch of different times."""

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        t = t[:, None]
        return (t - (1 - t) / 4) / ((1 - t) ** 2 / 4 + t**2) * x


def disagreement(student: nn.Module, step: float) -> float:
    """Loss of a student on the exact Gaussian flow."""
    draw = torch.Generator().manual_seed(0)
    t = step + (1 - step) * torch.rand(500, generator=draw, dtype=torch.float64)
    x = torch.randn(500, 2, generator=draw, dtype=torch.float64) * ((1 - t) ** 2 / 4 + t**2).sqrt()[:, None]
    label = torch.zeros(500, dtype=torch.int64)
    below = consistency.ode_step(Flow("flow"), x, t, t - step, label)
    ends = [consistency.endpoint(student, at, time, label) for at, time in ((x, t), (below, t - step))]
    return float((ends[0] - ends[1]).norm(dim=1).mean())


def test_the_exact_map_is_consistent_and_the_teachers_guess_is_not() -> None:
    assert disagreement(EndPoint(), 1 / 16) < 0.01 * disagreement(Flow("flow"), 1 / 16)
    assert disagreement(EndPoint(), 1 / 64) < disagreement(EndPoint(), 1 / 16) / 30, "the solver is not of second order"


def test_boundary_condition_and_sampling() -> None:
    session, batch = session_of("class_to_image/digits_flow"), batch_of(10, (1, 8, 8), 10)
    method = consistency.ConsistencyDistillation()
    session.networks["student"] = method.networks(session)["student"].requires_grad_(False)
    zero, one = torch.zeros(10), torch.ones(10)
    student, x = session.networks["student"], batch["noise"]
    assert torch.equal(consistency.endpoint(student, x, zero, batch["condition"]), x)
    session.begin("run", 3, 20)
    torch.testing.assert_close(method.run(session, batch, 1), consistency.endpoint(student, x, one, batch["condition"]))
    session.begin("run", 3, 20)
    twice = method.run(session, batch, 2)
    first = consistency.endpoint(student, x, one, batch["condition"])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    again = consistency.endpoint(student, (first + noise) / 2, one / 2, batch["condition"])
    torch.testing.assert_close(twice, again)
