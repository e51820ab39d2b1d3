"""Networks trained to cross a flow in few steps, IMM, ReFlow and Simple ReFlow: losses, couplings, times."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rigs.images import idle_session, method_of, module_of, noise_of, ran
from scipy.stats import kstest
from torch import Tensor, nn

from stepmark import backbones
from stepmark.meter.counts import watch
from stepmark.session import Session
from stepmark.task import load_split
from stepmark.tracks.image.metrics import sliced_w2
from stepmark.tracks.image.schedules import Schedule, add_noise, uniform_times
from stepmark.tracks.image.solvers import Denoiser
from stepmark.tracks.image.training import follow

torch.set_num_threads(1)


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

    session, method = idle_session("sampling/mixtures_flow"), module.IMM()
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

    session, batch = idle_session("sampling/mixtures_flow"), noise_of("sampling/mixtures_flow", 6)
    session.networks["generator"] = One()
    out = method_of("imm").run(session, batch, 3)
    assert np.allclose(asked, [(0.994, 1.988 / 3), (1.988 / 3, 0.994 / 3), (0.994 / 3, 0)])
    torch.testing.assert_close(out, batch["noise"] - 0.994)


def test_imm_trained_for_a_moment_beats_two_euler_steps():
    task = "sampling/mixtures_flow"
    session = idle_session(task)
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

    session, method = idle_session("sampling/mixtures_flow"), module.IMM()
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
    session = idle_session(task, teacher=teacher)
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


class Known(nn.Module):
    """A flow whose velocity is a learnt picture, more of it the later; keeps the times at which it is asked."""

    prediction = "flow"

    def __init__(self) -> None:
        super().__init__()
        self.v, self.times = nn.Parameter(torch.linspace(-1, 1, 64).view(1, 8, 8)), []

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.times.append(t)
        return self.v.expand_as(x) + (t**2)[:, None, None, None]


@pytest.mark.parametrize("method", ["simple_reflow", "simple_reflow_backward", "simple_reflow_plain"])
def test_the_choices_reach_training_and_sampling_and_their_control_makes_none(method, monkeypatch):
    """Loss, training times, grid and solver, each as it is used; by pairs that are all alike."""
    plugin, module, network, found = method_of(method), module_of("simple_reflow"), Known(), []
    plain, batch = method == "simple_reflow_plain", noise_of("class_to_image/digits_flow", 6)
    session = idle_session("class_to_image/digits_flow", teacher=network, student=network)
    noise = batch["noise"][:1].expand(64, -1, -1, -1)
    session.once = lambda *_: {"eps": noise, "x0": 0 * noise, "condition": torch.arange(64) % 10}
    used = type(plugin).prepare.__globals__
    monkeypatch.setitem(used, "project", lambda eps: eps)

    def losses(session: Session, student: nn.Module, loss: Callable[[], Tensor], *_: Any) -> None:
        value = loss()
        found.extend((value.detach(), *torch.autograd.grad(value, [network.v])))
        for _ in range(30):
            loss()

    monkeypatch.setitem(used, "fit", losses)
    session.begin("prepare", 1)
    plugin.prepare(session)
    v = network.v.detach().clone().requires_grad_()
    residual = v + (network.times[0] ** 2)[:, None, None, None] - noise
    if plain:
        expected = residual.square().mean()
    else:
        size = (residual + module.high_pass(residual)).square().mean((1, 2, 3))
        expected = (size / size.detach()).mean()
    torch.testing.assert_close(found, [expected.detach(), *torch.autograd.grad(expected, [v])], rtol=1e-4, atol=1e-5)
    mean = 1 / 2 if plain else 10 / 9 - 1 / np.log(10)  # of times of density 10^t
    assert torch.cat(network.times).mean().item() == pytest.approx(mean, abs=0.03)

    network.times.clear()
    out, _ = ran(session, plugin, batch, 9)
    times = uniform_times(9) if plain else module.sigmoid_times(9, 8.0)
    assert [float(t[0]) for t in network.times] == pytest.approx(times[:-1], abs=1e-6)
    session.begin("run", 5)
    denoise = Denoiser(network, batch["condition"])
    with torch.no_grad():
        second = module_of("dpm_solver_pp").DPMSolverPP.solve(denoise, batch["noise"], times)
        steps = [(s - t) * (network.v + t**2) for t, s in itertools.pairwise(times)]
    euler = batch["noise"] + torch.stack(steps).sum(0)
    right, wrong = (euler, second) if plain else (second, euler)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-4)
    assert (out - wrong).abs().max() > 0.01


def test_reflow_learns_the_coupling_of_a_curved_flow():
    """A student of one parameter on a linear flow: least squares on the pairs has a closed form."""

    class Linear(nn.Module):
        prediction = "flow"

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(1.5))

        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return self.a * x

    session = idle_session("class_to_image/digits_flow", teacher=Linear())
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
    session = idle_session("class_to_image/digits_flow")
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


# --- what training changes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["reflow", "simple_reflow", "imm"])
def test_training_changes_the_student_and_not_the_teacher(method):
    task = "class_to_image/digits_flow"
    session, plugin = idle_session(task), method_of(method)
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
