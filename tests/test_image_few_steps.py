"""Tuned timesteps, bootstrapped and fine-tuned students, retrieved trajectories: each against what is known exactly."""

from __future__ import annotations

import importlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepmark import backbones, plugins
from stepmark.cell import track_of
from stepmark.meter.counts import Ledger, watch
from stepmark.session import Session
from stepmark.tracks.image import captions, schedules, solvers

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


def test_timesteps_are_tuned_on_training_images_at_the_beginning_of_the_grid() -> None:
    """The first states of the search are x0 and noise at t = 1, and it goes along the leading timesteps."""
    asked: list[tuple[Tensor, float]] = []

    class Keeper(Gaussian):
        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            asked.append((x.clone(), float(t[0])))
            return super().forward(x, t, condition)

    session, method = session_of("sampling/mixtures_eps", Keeper("epsilon")), aligner.TimestepAligner()
    session.begin("prepare", 5)
    data, draw = session.train["x0"], session.rng
    pick = torch.randperm(len(data), generator=draw)[:16]
    noise = torch.randn(16, 2, generator=draw)
    session.begin("prepare", 5)
    assert list(method.prepare(session)) == ["ratios_4"]
    schedule = schedules.Schedule("epsilon")
    torch.testing.assert_close(asked[0][0], schedule.alpha(1.0) * data[pick] + schedule.sigma(1.0) * noise)
    assert asked[0][1] == pytest.approx(750, abs=1e-3)
    assert [round(1000 * t) for t in method.times(session.networks["teacher"], 5)] == [801, 601, 401, 201, 1, 0]
    method.grid = "trailing"
    assert [round(1000 * t) for t in method.times(session.networks["teacher"], 5)] == [1000, 800, 600, 400, 200, 0]


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


class Straightened(nn.Module):
    """A student whose signal is y(eps, t) = eps - student(eps, t) = k (1 - t) eps."""

    prediction = "flow"

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return x - self.k * (1 - t).view(-1, *[1] * (x.dim() - 1)) * x


class ExactSignal(nn.Module):
    """The signal of the exact flow of N(0, 1/4): x_t = eps sqrt((1 - t)^2 / 4 + t^2), y_t = (x_t - t eps) / (1 - t)."""

    prediction = "flow"

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        t = t.view(-1, *[1] * (x.dim() - 1)).double()
        return x - (((1 - t) ** 2 / 4 + t**2).sqrt() - t) / (1 - t).clamp(min=1e-9) * x


def boot_loss(student: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """BOOT's loss of a student of the flow of N(0, 1/4), with the draws of seed 7."""
    found: list[Tensor] = []
    session = session_of("class_to_image/digits_flow", Flow("flow"))
    session.networks["student"] = student
    session.begin("prepare", 7)
    monkeypatch.setattr(boot, "fit", lambda session, network, loss, *_: found.append(loss()))
    boot.Boot().prepare(session)
    monkeypatch.undo()
    return found[0]


def test_boots_loss_ties_a_level_to_a_step_of_the_teacher_from_the_one_above(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out for a student of one number, with its slope: the target is held, the level below and the boundary learn.

    The teacher's guess at x_t is c(t) x_t with c = (1 - t) / 4 / ((1 - t)^2 / 4 + t^2), and 0 at the boundary.
    """
    k, delta = 0.3, 1 / 16
    student = Straightened(k)
    loss = boot_loss(student, monkeypatch)
    (slope,) = torch.autograd.grad(loss, student.k)
    session = session_of("class_to_image/digits_flow")
    session.begin("prepare", 7)
    labels, draw = session.train["condition"], session.rng
    torch.randint(len(labels), (64,), generator=draw)
    eps = torch.randn(64, 1, 8, 8, generator=draw).double().square().flatten(1).mean(1)
    t = delta + (1 - delta) * torch.rand(64, generator=draw).double()
    s = t - delta
    y = k * (1 - t)
    x0 = (1 - t) / 4 / ((1 - t) ** 2 / 4 + t**2) * ((1 - t) * y + t)
    target = x0 + (1 - t) * s / (t * (1 - s)) * (y - x0)
    gap = k * (1 - s) - target  # at the boundary the signal and the guess are both 0
    assert loss.item() == pytest.approx(float((gap.square() * eps).mean()), rel=1e-4)
    assert slope.item() == pytest.approx(float((2 * gap * (1 - s) * eps).mean()), rel=1e-4)


def test_boots_loss_vanishes_for_the_teachers_own_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the error of one step, and for no other student: neither one that stays where it starts nor one late by a quarter."""

    class Late(ExactSignal):
        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return super().forward(x, (t + 1 / 4).clamp(max=1.0), condition)

    class Raised(ExactSignal):
        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return super().forward(x, t, condition) - 0.5

    exact, late, raised = (float(boot_loss(student(), monkeypatch)) for student in (ExactSignal, Late, Raised))
    assert exact < 1e-4
    assert late > 5 * exact
    assert raised > 0.1  # the boundary tells a student that is off by the same everywhere


def test_a_sample_of_boot_is_the_end_of_the_trajectory_in_one_evaluation() -> None:
    """The flow of N(0, 1/4) leads from eps to eps / 2, at every rung."""
    session, batch = session_of("class_to_image/digits_flow"), batch_of(6, (1, 8, 8), 10)
    session.networks["student"] = watch(session._ledger, "student", ExactSignal())
    for rung in (1, 4):
        session.begin("run", 1, 6 * rung)
        torch.testing.assert_close(boot.Boot().run(session, batch, rung).float(), batch["noise"] / 2)
        assert session.spent == 6


# --- ReDi ------------------------------------------------------------------------------------------------------------


def prepared(session: Session, seed: int = 5, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """A prepared ReDi, and the start noise with the captions of the trajectories that it stored."""
    method = redi.ReDi()
    vars(method).update(settings)
    session.begin("prepare", seed)
    session.state = method.prepare(session)
    condition = captions.captions(40, torch.Generator().manual_seed(seed))
    noise = captions.start_noise().expand(40, *captions.SHAPE).clone()
    return method, {"noise": noise, "condition": condition}


def test_captions_are_blends_and_the_pure_ones_are_those_of_the_network() -> None:
    blend, named = backbones.load("shapes16_flow_blend"), backbones.load("shapes16_flow")
    asked = captions.captions(500, torch.Generator().manual_seed(0))
    torch.testing.assert_close(asked[:, :3].sum(1), torch.ones(500))
    torch.testing.assert_close(asked[:, 3:].sum(1), torch.ones(500))
    assert float(asked.min()) > 0
    torch.testing.assert_close(asked[:, :3].mean(0), torch.full((3,), 1 / 3), rtol=0, atol=0.05)
    names = torch.tensor([[0, 4], [2, 6]])
    pure = torch.zeros(2, 7).scatter_(1, names, 1.0)
    x = torch.randn(2, *captions.SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(blend(x, torch.full((2,), 0.6), pure), named(x, torch.full((2,), 0.6), names))


def test_all_queries_start_from_the_noise_of_the_knowledge_base_and_ask_for_other_things() -> None:
    spec = track_of("captions/shapes16")[1]
    batch = captions.inputs(spec, 8, torch.Generator().manual_seed(2), torch.device("cpu"))
    assert torch.equal(batch["noise"], captions.start_noise().expand(8, *captions.SHAPE))
    assert len(batch["condition"].unique(dim=0)) == 8


def test_half_of_the_steps_are_skipped_after_the_first_fifth() -> None:
    """S, k and v: k + S - v evaluations are the rung."""
    assert [redi.ReDi.cuts(rung) for rung in (2, 4, 8, 16)] == [(4, 1, 3), (8, 2, 6), (16, 3, 11), (32, 6, 22)]


@pytest.mark.parametrize("rung", [4])
def test_a_stored_trajectory_is_found_again(rung: int) -> None:
    """For a stored prompt the jump lands on its own trajectory: S steps for the price of half."""
    session = session_of("captions/shapes16")
    method, batch = prepared(session)
    batch = {name: part[:10] for name, part in batch.items()}
    whole = module_of("euler").Euler().run(session, batch, 2 * rung)
    session.begin("run", 1, rung * 10)
    torch.testing.assert_close(method.run(session, batch, rung), whole, rtol=1e-3, atol=1e-3)
    assert session.spent == rung * 10


def test_a_new_prompt_is_followed_after_the_jump_and_a_copy_is_not() -> None:
    """The copy is the end of the nearest trajectory; what follows the jump brings the picture nearer to its own end."""
    session = session_of("captions/shapes16")
    method, _ = prepared(session)
    asked = captions.captions(10, torch.Generator().manual_seed(77))
    batch = {"noise": captions.start_noise().expand(10, *captions.SHAPE).clone(), "condition": asked}
    whole = module_of("euler").Euler().run(session, batch, 8)
    ours = (method.run(session, batch, 4) - whole).flatten(1).norm(dim=1).mean()
    control, stored = prepared(session, copy=True)
    session.begin("run", 1, 20)
    made = control.run(session, batch, 4)
    assert session.spent == 2 * 10  # the first k steps alone
    session.begin("run", 1)
    ends = module_of("euler").Euler().run(session, stored, 8)
    cosine = torch.cosine_similarity(made.flatten(1)[:, None], ends.flatten(1)[None], dim=2).max(1).values
    assert float(cosine.min()) > 0.999
    assert float(ours) < 0.9 * float((made - whole).flatten(1).norm(dim=1).mean())


def kept(keys: Tensor, queries: Tensor, neighbours: int) -> float:
    """Share of the squared norm of the queries that a jump along a linear trajectory keeps."""
    landed = redi.combination(queries, keys, 0.5 * keys, neighbours)
    return 1 - float((landed - 0.5 * queries).square().sum() / (0.5 * queries).square().sum())


def test_neighbours_span_what_shares_their_noise_and_half_of_what_does_not() -> None:
    """Keys that begin with one noise and differ in a few directions span a query that does too, and the nearest alone is
    most of it. The nearest of 200 keys with noises of their own, alone or ten together, lose half of it or more.
    """
    draw = torch.Generator().manual_seed(0)
    shared, content = 4 * torch.randn(64, generator=draw), torch.randn(8, 64, generator=draw)
    keys, queries = (torch.randn(n, 8, generator=draw) @ content for n in (200, 50))
    assert kept(shared + keys, shared + queries, 10) > 0.999
    assert kept(shared + keys, shared + queries, 1) > 0.8
    own, asked = (torch.randn(n, 64, generator=draw) for n in (200, 50))
    assert 10 / 64 < kept(own, asked, 10) < 0.5
    assert kept(own, asked, 1) < 0.25


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


def test_squared_mmd_pair_by_pair_under_the_cubic_kernel() -> None:
    x, y = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        return float(
            np.mean([(p @ q / 3 + 1) ** 3 for i, p in enumerate(a) for j, q in enumerate(b) if not same or i != j])
        )

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert mmd.squared_mmd(x, y).item() == pytest.approx(expected)


def test_features_tell_classes_apart_and_stay_as_they_are() -> None:
    session = session_of("class_to_image/digits_eps")
    session.scale = lambda embedded, smoke: embedded
    session.begin("prepare", 3)
    torch.manual_seed(0)
    data, label = session.train["x0"], session.train["condition"]
    trunk = mmd.MMDFinetuning.features(session, data, label)
    assert not any(p.requires_grad for p in trunk.parameters())
    found = trunk(data[:400])
    centres = torch.stack([found[label[:400] == k].mean(0) for k in range(10)])
    assert (torch.cdist(found, centres).argmin(1) == label[:400]).float().mean() > 0.9


def test_samples_and_images_of_a_batch_have_the_same_labels() -> None:
    told, seen = [], []

    class Told(nn.Module):
        prediction = "epsilon"

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.9))

        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            told.append(condition)
            return self.w * x

    class Seen(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x

    session = session_of("class_to_image/digits_eps")
    session.networks["student"] = Told()
    session.begin("prepare", 3)
    label = torch.arange(500) % 10
    mmd.MMDFinetuning().finetune(session, Seen(), label[:, None].float() / 10 + torch.zeros(500, 4), label)
    assert len(told) == 4 * 3 and len(seen) == 2 * 3
    for k in range(3):
        assert torch.equal((10 * seen[2 * k + 1][:, 0]).round().long(), told[4 * k])
        assert not torch.equal(told[4 * k], told[4 * k].sort().values)


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
    times = mmd.MMDFinetuning.times(network, 4)
    assert [round(1000 * t) - 1 for t in times[:-1]] == [750, 500, 250, 0]  # the authors' timesteps
    samples = mmd.MMDFinetuning.sample(network, batch["noise"], batch["condition"], times)
    mmd.squared_mmd(samples, torch.randn(16, 4, generator=torch.Generator().manual_seed(1))).backward()
    assert network.calls == 4
    assert all(scale.grad is not None and scale.grad.abs() > 0 for scale in network.scales)
    network.calls = 0
    with torch.no_grad():
        plain = module_of("ddim").DDIM.solve(solvers.Denoiser(network, batch["condition"]), batch["noise"], times)
    assert torch.equal(plain, samples.detach())


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
    method.times = lambda network, n: schedules.uniform_times(n)
    data = 0.5 * torch.randn(500, 4, generator=torch.Generator().manual_seed(2))
    method.finetune(session, nn.Identity(), data, torch.zeros(500, dtype=torch.int64))


def test_the_control_is_the_same_sampler_untouched() -> None:
    session, batch = session_of("class_to_image/digits_eps"), batch_of(10, (1, 8, 8), 10)
    method = plugins.load_class(plugins.methods()["mmd_ddm_untuned"])()
    session.begin("prepare", 3)
    session.networks["student"] = method.networks(session)["student"]
    method.prepare(session)
    found = method.run(session, batch, 4)
    denoise = solvers.Denoiser(session.networks["teacher"], batch["condition"])
    with torch.no_grad():
        plain = module_of("ddim").DDIM.solve(denoise, batch["noise"], schedules.leading_times(4))
    torch.testing.assert_close(found, plain)


@torch.no_grad()
def test_the_tuned_network_is_the_one_that_samples() -> None:
    session, batch, student = session_of("class_to_image/digits_eps"), batch_of(10, (1, 8, 8), 10), Told(0.9, 0.0)
    session.networks["student"] = student
    plain = mmd.MMDFinetuning.sample(student, batch["noise"], batch["condition"], schedules.leading_times(6))
    session.begin("run", 3)
    for name in ("mmd_ddm", "mmd_ddm_untuned"):
        method = plugins.load_class(plugins.methods()[name])()
        assert torch.equal(method.run(session, batch, 6), plain)


def test_fine_tuning_learns_the_spread_and_leaves_alone_what_is_out_of_range() -> None:
    """One step from noise: samples are (x - sigma (w x + b)) / alpha. Beyond the range they are clamped and pull nothing,
    and no decay moves the weights either.
    """
    far = Told(1.0, -0.125)  # all near 20: without the clamp their gradients are large, but finite
    finetuned(far, 0.1, 3)
    assert (far.w.item(), far.b.item()) == (1.0, -0.125)
    schedule, near = schedules.Schedule("epsilon"), Told(0.998, 0.0)
    scale = [(1 - schedule.sigma(1.0) * near.w.item()) / schedule.alpha(1.0)]
    finetuned(near, 1e-4, 60)
    scale.append((1 - schedule.sigma(1.0) * near.w.item()) / schedule.alpha(1.0))
    assert abs(scale[0] - 0.5) > 0.1
    assert abs(scale[1] - 0.5) < 0.5 * abs(scale[0] - 0.5)
    assert near.w.grad.square() + near.b.grad.square() < 0.251  # clipped at 0.5


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
        t = t.view(-1, *[1] * (x.dim() - 1))
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
