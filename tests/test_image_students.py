"""Students and generators trained in prepare: each against what is known exactly, before and after its training."""

from __future__ import annotations

import importlib
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stepmark import backbones, plugins
from stepmark.cell import track_of
from stepmark.meter.counts import Ledger, watch
from stepmark.method import Skip
from stepmark.session import Session
from stepmark.tracks.image import fusing, schedules, solvers, training
from stepmark.tracks.image import guided as image_guided

torch.set_num_threads(1)


def module_of(method: str) -> Any:
    """The module of a plugin, wherever below its track it stands."""
    path = plugins.methods()[method].path.relative_to(plugins.method_folders()[0])
    return importlib.import_module(".".join(("stepmark.methods", *path.with_suffix("").parts)))


def method_of(method: str) -> Any:
    """A method or variant, as the harness makes it."""
    return plugins.load_class(plugins.methods()[method])()


guided, agd, slim, c2ot, ot_cfm, points, asbm, dsbm, cfg = (
    module_of(name)
    for name in (
        "guided_distillation", "agd", "slimflow", "c2ot", "ot_cfm", "flow_matching_points", "asbm", "dsbm", "ddim_cfg",
    )
)  # fmt: skip
DIGITS, GUIDED, POINTS = "class_to_image/digits_flow", "guided/digits_flow", "sampling/mixtures_flow"


def session_of(task: str, method: Any = None, seed: int = 1) -> Session:
    """A smoke session on a task, with the untrained networks of a method where given, at the start of prepare."""
    spec, ledger = track_of(task)[1], Ledger()
    teacher = watch(ledger, "teacher", backbones.load(spec.backbones["teacher"]))
    session = Session(spec, "smoke", torch.device("cpu"), torch.float32, {"teacher": teacher}, {}, ledger, False)
    session.begin("prepare", seed)
    torch.manual_seed(seed)
    for name, network in (method.networks(session) if method else {}).items():
        session.networks[name] = watch(ledger, name, network)
    return session


def batch_of(n: int, shape: tuple[int, ...], classes: int, seed: int = 3) -> dict[str, Tensor]:
    """Noise and balanced conditions."""
    noise = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))
    return {"noise": noise, "condition": torch.arange(n) % classes}


class Gaussian(nn.Module):
    """The exact velocity of data N(0, 1/4)."""

    prediction = "flow"

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, *_: Tensor) -> Tensor:
        t = t.view(-1, *[1] * (x.dim() - 1))
        return (t - (1 - t) / 4) / ((1 - t) ** 2 / 4 + t**2) * x


# --- guidance --------------------------------------------------------------------------------------------------------


def test_a_guided_step_costs_two_and_is_that_of_the_formula() -> None:
    """Eight evaluations are four Euler steps along (1 + w) v(c) - w v(), written out by hand."""
    session, batch = session_of(DIGITS), batch_of(10, (1, 8, 8), 10)
    session.begin("run", 1, 80)
    found = cfg.DDIMWithGuidance().run(session, batch, 8)
    assert session.spent == 80
    teacher, x, condition = session.networks["teacher"], batch["noise"], batch["condition"]
    session.begin("run", 1)
    with torch.no_grad():
        for k in range(4):
            t = torch.full((10,), 1 - k / 4)
            v = 1.3 * teacher(x, t, condition) - 0.3 * teacher(x, t, torch.full_like(condition, 10))
            x = x - v / 4
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    with pytest.raises(Skip):
        cfg.DDIMWithGuidance().run(session, batch, 1)


class Pushed(nn.Module):
    """The exact velocity of data N(0, 1/4), and one third of the condition on top: guidance of scale 3 adds all of it."""

    prediction = "flow"

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.zeros_like(condition)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return Gaussian()(x, t, condition) + condition.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) / 3


def test_the_guided_end_is_that_of_the_guided_ode() -> None:
    """With s(t)^2 = (1 - t)^2 / 4 + t^2 the ode of `Pushed` is dx/dt = (s' / s) x + c: x(0) = x / 2 - c / 2 int 1 / s."""
    x, condition = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.arange(4)
    t = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    push = 0.5 * (1 / ((1 - t) ** 2 / 4 + t**2).sqrt()).mean()
    exact = 0.5 * x - push * condition.view(-1, 1, 1, 1)
    torch.testing.assert_close(image_guided.guided_endpoints(Pushed(), x, condition, 3.0), exact, rtol=2e-3, atol=2e-3)
    plain = image_guided.guided_endpoints(Pushed(), x, condition, 1.0)
    assert (plain - exact)[3].norm() > 1


def test_who_ignores_guidance_ends_elsewhere_and_finer_steps_end_nearer() -> None:
    """On the task itself: unguided Euler is no nearer with more steps, the guided sampler twice as near with twice as many."""
    spec = track_of(GUIDED)[1]
    batch = image_guided.inputs(spec, 10, torch.Generator().manual_seed(2), torch.device("cpu"))
    assert batch["guidance"].tolist() == [3.0] * 10
    networks, rows = {"classifier": backbones.load("digits_classifier")}, np.arange(10)[None]
    euler, error = module_of("euler").Euler(), {}
    for method in (cfg.DDIMWithGuidance(), euler):
        for rung in (8, 16, 32):
            session = session_of(GUIDED)
            session.begin("run", 1, 10 * rung)
            found = image_guided.score(spec, batch, method.run(session, batch, rung), networks, rows)["endpoint_error"]
            assert found.resamples == pytest.approx([found.value])
            error[type(method).__name__, rung] = found.value
    own = {rung: error["DDIMWithGuidance", rung] for rung in (8, 16, 32)}
    assert own[16] < 0.65 * own[8] and own[32] < 0.65 * own[16]
    assert error["Euler", 32] > 0.9 * error["Euler", 8]
    assert error["Euler", 32] > 4 * own[32]
    exact = {"noise": batch["noise"], "condition": batch["condition"]}
    ends = image_guided.guided_endpoints(backbones.load("digits_flow_a"), **exact, scale=3.0, steps=32)
    coarse = image_guided.score(spec, batch, ends, networks, rows)["endpoint_error"].value
    assert 0 < coarse < 0.2 * own[32]  # a reference with half of the steps stands where this one does


@torch.no_grad()
def test_each_item_is_guided_by_the_scale_that_it_asks_for() -> None:
    session, batch = session_of(GUIDED), batch_of(6, (1, 8, 8), 10)
    scale = torch.tensor([1.0, 3.0, 3.0, 5.0, 2.0, 0.0])
    session.begin("run", 1, 48)
    found = cfg.DDIMWithGuidance().run(session, batch | {"guidance": scale}, 8)
    session.begin("run", 1)
    for row in range(6):
        x, condition = batch["noise"][row : row + 1], batch["condition"][row : row + 1]
        denoise = solvers.Denoiser(session.networks["teacher"], condition, float(scale[row]))
        for t, s in pairwise(schedules.uniform_times(4)):
            x = solvers.ddim_step(denoise.schedule, *denoise(x, t), s)
        torch.testing.assert_close(found[row : row + 1], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "offset"), [("agd", 0), ("agd_noised_data", 0), ("guided_distillation", -1)])
def test_students_are_told_the_scale_in_their_own_convention(name: str, offset: int) -> None:
    """Adapters learn null + w (cond - null); distillation in two stages (1 + w) cond - w null."""
    method = plugins.load_class(plugins.methods()[name])()
    session, batch = session_of(GUIDED, method), batch_of(6, (1, 8, 8), 10)
    told: list[Tensor] = []
    for network in session.networks.values():
        network.register_forward_pre_hook(lambda module, args: told.append(args[-1]))
    session.begin("run", 1, 24)
    method.run(session, batch | {"guidance": torch.arange(6.0)}, 4)
    assert len(told) == 4
    assert all(torch.equal(scale, torch.arange(6.0) + offset) for scale in told)


@pytest.mark.parametrize("backbone", ["digits_flow_a", "digits_eps_a"])
def test_a_ddim_step_is_linear_in_the_sample_and_the_output(backbone: str) -> None:
    schedule, rng = schedules.schedule_of(backbones.load(backbone)), torch.Generator().manual_seed(3)
    x, output = torch.randn(2, 5, 1, 8, 8, generator=rng)
    for t, s in ((1.0, 0.75), (0.5, 0.2), (0.25, 0.0)):
        x0, eps = schedules.to_x0_eps(schedule.prediction, output, x, schedule.alpha(t), schedule.sigma(t))
        a, b = solvers.ddim_coefficients(schedule, t, s)
        torch.testing.assert_close(a * x + b * output, solvers.ddim_step(schedule, x0, eps, s), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_rows_are_guided_each_by_its_own_scale_and_time() -> None:
    teacher, batch = backbones.load("digits_flow_a"), batch_of(6, (1, 8, 8), 10)
    scale, t = torch.tensor([1.0, 1.0, 2.5, 2.5, 4.0, 0.0]), torch.tensor([0.3, 0.9, 0.3, 0.9, 0.5, 0.5])
    found = fusing.guided_rows(teacher, batch["noise"], t, batch["condition"], scale)
    for row in range(6):
        x, condition = batch["noise"][row : row + 1], batch["condition"][row : row + 1]
        own = solvers.Denoiser(teacher, condition, float(scale[row])).output(x, float(t[row]))
        torch.testing.assert_close(found[row : row + 1], own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
def test_the_progressive_target_leads_where_two_steps_lead(prediction: str) -> None:
    """One DDIM step with the target from t reaches the end of two steps, at s > 0 and at s = 0."""
    schedule, draw = schedules.Schedule(prediction), torch.Generator().manual_seed(0)
    x, end = (torch.randn(5, 1, 8, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    t, s = torch.tensor([1.0, 0.75, 0.5, 0.5, 0.25]).double(), torch.tensor([0.75, 0.5, 0.25, 0.0, 0.0]).double()
    t, s = t.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)
    x0 = guided.progressive_target(schedule, x, t, end, s)
    eps = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
    torch.testing.assert_close(schedule.alpha(s) * x0 + schedule.sigma(s) * eps, end)


def test_students_that_learn_nothing_sample_like_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is ignored at first, weights are handed down from stage to stage, and the longest fitting is used."""
    method, batch = guided.GuidedDistillation(), batch_of(10, (1, 8, 8), 10)
    session = session_of(DIGITS, method)
    monkeypatch.setattr(method, "rate", 0.0)
    with torch.no_grad():  # the head of a chain: what it starts with must reach its end
        session.networks["student_32"].base.unet.conv_out.bias.add_(0.25)
        session.networks["teacher"].unet.conv_out.bias.add_(0.25)
    method.prepare(session)
    for rung, steps in ((1, 1), (2, 2), (9, 8), (50, 50)):
        session.begin("run", 1, 10 * rung)
        found = method.run(session, batch, rung)
        assert session.spent == 10 * steps
        session.begin("run", 1)
        plain = module_of("euler").Euler().run(session, batch, steps)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_a_halved_student_is_trained_on_two_steps_of_its_predecessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an exact linear flow the loss at the start is |one step - two steps|^2 in x0, times the truncated SNR."""
    session, method, losses = session_of(DIGITS), guided.GuidedDistillation(), []
    session.networks |= {"student_4": Gaussian(), "student_2": Gaussian()}
    monkeypatch.setattr(guided, "fit", lambda session, network, loss, *_: losses.append(float(loss())))
    x, t = batch_of(6, (1, 8, 8), 10)["noise"].double(), torch.tensor([1.0, 0.5] * 3).double()
    method.halve(session, 2, lambda: (x, t, torch.zeros(6, dtype=torch.int64), torch.zeros(6).double()))
    wanted = []
    for row, start in zip(x, t.tolist(), strict=True):
        denoise, end = solvers.Denoiser(Gaussian(), torch.zeros(1, dtype=torch.int64)), row[None]
        x0 = denoise(end, start)[0]
        for now, then in pairwise([start, start - 0.25, start - 0.5]):
            end = solvers.ddim_step(denoise.schedule, *denoise(end, now), then)
        velocity = (row[None] - end) / 0.5
        wanted.append(max((1 - start) ** 2 / start**2, 1) * (x0 - (row[None] - start * velocity)).square().mean())
    assert losses[0] == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-6)
    assert losses[0] > 1e-4


def test_untrained_adapters_change_nothing_and_only_they_can_learn() -> None:
    method, batch = agd.AGD(), batch_of(10, (1, 8, 8), 10)
    session = session_of(GUIDED, method)
    adapted = session.networks["adapted"]
    session.begin("run", 1, 40)
    found = method.run(session, batch | {"guidance": torch.full((10,), 3.0)}, 4)
    assert session.spent == 40
    session.begin("run", 1)
    assert torch.equal(found, module_of("ddim").DDIM().run(session, batch, 4))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith(("embed.", "adapters.")) for name in trained)
    share = sum(p.numel() for n, p in adapted.named_parameters() if n in trained) / sum(
        p.numel() for p in session.networks["teacher"].parameters()
    )
    assert 0.01 < share < 0.05


def test_adapters_learn_guidance_on_the_states_of_guided_sampling() -> None:
    """The stored states are those of the guided sampler, and a few updates bring the network nearer to its output."""
    method = agd.AGD()
    session, batch = session_of(GUIDED, method), batch_of(10, (1, 8, 8), 10)
    scale = torch.full((10,), 3.0)
    teacher, adapted = session.networks["teacher"], session.networks["adapted"]
    x, t, condition, scales, target = agd.guided_trajectories(teacher, batch["noise"], batch["condition"], scale, 3)
    denoise, state = solvers.Denoiser(teacher, batch["condition"], 3.0), batch["noise"]
    with torch.no_grad():
        for k, (now, then) in enumerate(pairwise(schedules.uniform_times(3))):
            torch.testing.assert_close(x[10 * k : 10 * k + 10], state, rtol=1e-4, atol=1e-4)
            assert torch.allclose(t[10 * k : 10 * k + 10], torch.tensor(now))
            state = solvers.ddim_step(denoise.schedule, *denoise(state, now), then)

    def loss() -> Tensor:
        return (adapted(x, t, condition, scales) - target).square().mean()

    before = loss().item()
    training.fit(session, adapted, loss, 25, 1e-2, ema=0.0)
    assert loss().item() < 0.8 * before


def test_the_ablation_stores_as_many_states_at_the_same_times_but_of_noised_data() -> None:
    session = session_of(GUIDED)
    kept = agd.states_of_sampling(session, 5, 4, (1.0, 6.0)), agd.states_of_data(session, 5, 4, (1.0, 6.0))
    assert [part.shape for part in kept[0]] == [part.shape for part in kept[1]]
    assert torch.equal(kept[0][1].sort().values, kept[1][1].sort().values)
    x, t, condition, scale, target = kept[1]
    data, label = session.train["x0"], session.train["condition"]
    draw = torch.Generator().manual_seed(0)
    session.rng.set_state(draw.get_state())
    again = agd.states_of_data(session, 5, 4, (1.0, 6.0))
    pick = torch.randint(len(data), (20,), generator=draw)
    noise, when = torch.randn(data[pick].shape, generator=draw), again[1].view(-1, 1, 1, 1)
    torch.testing.assert_close(again[0], (1 - when) * data[pick] + when * noise)
    assert torch.equal(again[2], label[pick])
    assert 1 <= float(scale.min()) < 3 < float(scale.max()) <= 6
    with torch.no_grad():
        torch.testing.assert_close(target, fusing.guided_rows(session.networks["teacher"], x, t, condition, scale))
    assert plugins.load_class(plugins.methods()["agd_noised_data"])().noised_data and not agd.AGD().noised_data


# --- one step from pairs ---------------------------------------------------------------------------------------------


def test_pairs_are_the_ends_of_the_teachers_chain() -> None:
    session = session_of(DIGITS)
    pairs = training.teacher_pairs(session, 12, 4)
    assert session._ledger.entries["teacher"].rows == 12 * 8
    denoise, x = solvers.Denoiser(session.networks["teacher"], pairs["condition"]), pairs["eps"]
    with torch.no_grad():
        for t, s in pairwise(schedules.uniform_times(4)):
            x = solvers.heun_step(denoise, x, t, s)
    torch.testing.assert_close(x, pairs["x0"], rtol=1e-4, atol=1e-4)
    assert abs(float(pairs["eps"].mean())) < 0.1


def test_students_of_one_teacher_learn_from_the_same_pairs() -> None:
    """Plain and simple reflow and one-step regression ask for the same training by name, and name the same numbers."""
    asked = {}
    for name in ("reflow", "simple_reflow", "simple_reflow_plain", "simple_reflow_backward", "one_step_regression"):
        method, calls = method_of(name), []
        session = session_of(DIGITS, method)

        def once(function: Any, *literals: Any, session: Any = session, calls: list[Any] = calls) -> dict[str, Tensor]:
            calls.append((function.__name__, *literals))
            return blank_pairs(literals[0])

        session.once = once  # type: ignore[method-assign]
        session.scale = lambda embedded, smoke: smoke if smoke == 4 else embedded  # the pairs in full, few updates
        method.prepare(session)
        asked[name] = calls
    assert all(calls[0] == ("teacher_pairs", 6000, 10) for calls in asked.values())
    assert [call[0] for call in asked["simple_reflow"]] == ["teacher_pairs", "inverted_pairs"]
    assert asked["simple_reflow_plain"] == asked["simple_reflow"]
    assert len(asked["simple_reflow_backward"]) == 1


def blank_pairs(n: int) -> dict[str, Tensor]:
    """Pairs of noise with empty pictures."""
    batch = batch_of(n, (1, 8, 8), 10)
    return {"eps": batch["noise"], "x0": torch.zeros_like(batch["noise"]), "condition": batch["condition"]}


def test_annealed_noise_is_gaussian_on_the_whole_way() -> None:
    """From random pairs at beta = 1 to the teacher's at 0, with unit variance and correlation sqrt(1 - beta^2)."""
    draw = torch.Generator().manual_seed(0)
    eps, fresh = (torch.randn(200_000, generator=draw, dtype=torch.float64) for _ in range(2))
    assert torch.equal(slim.annealed(eps, fresh, 0.0), eps)
    assert torch.equal(slim.annealed(eps, fresh, 1.0), fresh)
    for beta in (0.2, 0.6, 0.9):
        noise = slim.annealed(eps, fresh, beta)
        assert float(noise.var()) == pytest.approx(1, abs=0.02)
        assert float((noise * eps).mean()) == pytest.approx((1 - beta**2) ** 0.5, abs=0.02)


def test_distillation_is_guided_by_two_steps_of_the_annealed_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow that is straight already is its own one-step student: only the stored pairs are left in the loss."""

    class Straight(nn.Module):
        prediction = "flow"

        def __init__(self, bend: float) -> None:
            super().__init__()
            self.bend = nn.Parameter(torch.tensor(bend))

        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            """Towards zero along straight lines, v = x / t, or bent away from them."""
            return x / t.view(-1, 1, 1, 1).clamp(min=1e-3) * (1 + self.bend * (1 - t.view(-1, 1, 1, 1)))

    found = {}
    for bend in (0.0, 0.5):
        method, losses = slim.SlimFlow(), []
        session = session_of(DIGITS)
        session.networks["student"] = Straight(bend)
        noise = batch_of(64, (1, 8, 8), 10)["noise"]
        pairs = {"eps": noise, "x0": torch.zeros_like(noise), "condition": torch.zeros(64, dtype=torch.int64)}
        session.once = lambda *_, pairs=pairs: pairs  # type: ignore[method-assign]
        monkeypatch.setattr(slim, "fit", lambda session, network, loss, *_, losses=losses: losses.append(loss().item()))
        method.prepare(session)
        found[bend] = losses[1]
        method.anneal, method.guided = 0.0, False  # the naive way
        method.prepare(session)
        assert losses[3] < 1e-4, "the stored pairs are straight whatever the flow"
    assert found[0.0] < 1e-4
    assert found[0.5] > 0.1


def test_annealing_leads_from_random_pairs_to_the_teachers_and_the_naive_way_begins_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network that knows the one stored noise has no loss on the teacher's pairs, and on random ones a loss of the
    variance of eps_b - eps, 2 - 2 sqrt(1 - b^2): the annealed way starts with all of it and ends with none.
    """
    noise = batch_of(1, (1, 8, 8), 10)["noise"].expand(64, -1, -1, -1)
    pairs = {"eps": noise, "x0": torch.zeros_like(noise), "condition": torch.zeros(64, dtype=torch.int64)}

    class Known(nn.Module):
        prediction = "flow"

        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return noise[:1].expand_as(x)

    found: dict[str, list[float]] = {}
    monkeypatch.setattr(
        slim, "fit", lambda session, network, loss, steps, *_: stages.append([loss().item() for _ in range(steps)])
    )
    for name in ("slimflow", "slimflow_naive", "slimflow_direct"):
        stages: list[list[float]] = []
        method, session = slim.SlimFlow(), session_of(DIGITS)
        vars(method).update(plugins.methods()[name].overrides)
        session.networks["student"] = Known()
        session.once = lambda *_: pairs  # type: ignore[method-assign]
        session.scale = lambda embedded, smoke: (64, 10) if isinstance(embedded, tuple) else smoke
        method.prepare(session)
        found[name] = stages[0]
        assert len(stages) == (1 if name == "slimflow_direct" else 2)
        assert name != "slimflow_direct" or len(stages[0]) == 10 + 4
    away = float(noise[0].square().mean()) + 1  # of a fresh noise from the stored one
    assert found["slimflow"][0] == pytest.approx(away, rel=0.1)
    assert all(later < earlier for earlier, later in pairwise(found["slimflow"][:7]))
    assert max(found["slimflow"][6:]) < 1e-6
    assert max(found["slimflow_naive"]) < 1e-6


@pytest.mark.parametrize("name", ["one_step_regression", "slimflow", "slimflow_naive", "slimflow_direct"])
def test_one_evaluation_whatever_the_budget(name: str) -> None:
    method = method_of(name)
    session, batch = session_of(DIGITS, method), batch_of(10, (1, 8, 8), 10)
    student = session.networks["student"].eval().requires_grad_(False)
    teacher = sum(p.numel() for p in session.networks["teacher"].parameters())
    assert name == "one_step_regression" or sum(p.numel() for p in student.parameters()) < 0.3 * teacher
    session.begin("run", 1, 10)
    found = method.run(session, batch, 1)
    assert session.spent == 10
    session.begin("run", 1)
    one = torch.ones(10)
    torch.testing.assert_close(found, batch["noise"] - student(batch["noise"], one, batch["condition"]))


# --- couplings -------------------------------------------------------------------------------------------------------


def test_conditional_transport_is_the_cheapest_pairing_that_keeps_conditions() -> None:
    """Against all pairings of six points; without conditions a cheaper one breaks them."""
    draw = torch.Generator().manual_seed(2)
    eps, x0 = (torch.randn(6, 2, generator=draw) for _ in range(2))
    condition = torch.tensor([0, 1, 0, 1, 1, 0])

    def cost(order: Any) -> float:
        return float((x0 - eps[list(order)]).square().sum())

    every = list(permutations(range(6)))
    keeping = [order for order in every if torch.equal(condition[list(order)], condition)]
    assert cost(c2ot.C2OT.couple(eps, x0, condition).tolist()) == pytest.approx(min(map(cost, keeping)))
    assert cost(ot_cfm.OTCFM.couple(eps, x0, condition).tolist()) == pytest.approx(min(map(cost, every)))
    assert min(map(cost, every)) < min(map(cost, keeping))


def test_noise_stays_gaussian_given_the_condition() -> None:
    """Each condition keeps exactly the noises drawn for it; plain transport gives the inner data the inner noises."""
    draw = torch.Generator().manual_seed(0)
    eps, condition = torch.randn(800, 2, generator=draw), torch.arange(800) % 2
    x0 = torch.randn(800, 2, generator=draw) * torch.where(condition == 0, 0.1, 2.0)[:, None]
    ours, plain = c2ot.C2OT.couple(eps, x0, condition), ot_cfm.OTCFM.couple(eps, x0, condition)
    for order in (ours, plain):
        assert torch.equal(order.sort().values, torch.arange(800))
    inner = condition == 0
    assert torch.equal(ours[inner].sort().values, inner.nonzero().flatten())
    assert float(eps[plain[inner]].square().mean()) < 0.7
    assert float(eps[ours[inner]].square().mean()) > 0.9


def test_a_field_trained_on_a_pairing_follows_it() -> None:
    """Where the noise named for each datum is its shifted self, the velocity is the shift at every point and time."""
    session, field, shift = session_of(POINTS), training.PointField(2), torch.tensor([1.0, -0.5])

    def couple(eps: Tensor, x0: Tensor, condition: Tensor) -> Tensor:
        eps.copy_(x0.roll(1, 0) + shift)  # the noise of datum j is number j + 1
        return torch.arange(len(eps)).roll(-1)

    training.fit_coupled(session, field, couple, 80, batch=64, pool=128, rate=3e-3)
    data, condition = (session.train[key][:200] for key in ("x0", "condition"))
    with torch.no_grad():
        found = field(data + 0.3 * shift, torch.full((200,), 0.3), condition)
    assert float((found - shift).norm(dim=1).mean()) < 0.2


# --- Schroedinger bridges --------------------------------------------------------------------------------------------

MEAN, SPREAD, EPSILON = 0.7, 0.3, 0.2


def posterior(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x0 ~ N(0.7, 0.09) at the point x_t of its bridge to an independent standard normal."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2 + EPSILON * t * (1 - t)
    gain = (1 - t) * SPREAD**2 / variance
    return MEAN + gain * (x - (1 - t) * MEAN), SPREAD**2 - gain * (1 - t) * SPREAD**2


class ExactGenerator(nn.Module):
    """G(x_t, t, z): a draw of x0 given x_t."""

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        x, z = x.chunk(2, 1)
        mean, variance = posterior(x, t[:, None])
        return mean + variance.sqrt() * z


class ExactDrift(nn.Module):
    """v(x_t, t) = (x_t - E[x0 | x_t]) / t."""

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return (x - posterior(x, t[:, None])[0]) / t[:, None]


def test_exact_transitions_keep_the_law_of_every_time() -> None:
    """Four random transitions with the exact posterior end in the data's law; the exact mean needs many steps."""
    rng, label = torch.Generator().manual_seed(0), torch.zeros(100_000, dtype=torch.int64)
    noise = torch.randn(100_000, 2, generator=rng, dtype=torch.float64)
    ends = asbm.transport(ExactGenerator(), noise, label, 4, EPSILON, rng)
    assert float(ends.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(ends.std()) == pytest.approx(SPREAD, abs=0.005)
    many, few = (dsbm.transport(ExactDrift(), noise[:20_000], label[:20_000], n, EPSILON, rng) for n in (100, 4))
    assert float(many.std()) == pytest.approx(SPREAD, abs=0.02)
    assert float(few.std()) < 0.85 * SPREAD


def test_neighbouring_points_are_those_of_a_brownian_bridge() -> None:
    """Given the ends, x_s and x_t have covariance e s (1 - t), and means on the line between the ends."""
    rng, n = torch.Generator().manual_seed(0), 200_000
    x0, x1 = torch.full((n, 1), -1.0).double(), torch.full((n, 1), 2.0).double()
    x_s, x_t, t, s, _ = asbm.bridge_transition((x0, x1, torch.zeros(n)), 4, EPSILON, rng)
    for k in (1, 2, 3, 4):
        here = (t * 4).round() == k
        times = torch.tensor([(k - 1) / 4, k / 4]).double()
        assert float(here.double().mean()) == pytest.approx(0.25, abs=0.01)
        both = torch.stack([x_s[here, 0], x_t[here, 0]])
        torch.testing.assert_close(both.mean(1), -1 + 3 * times, rtol=0, atol=0.01)
        wanted = EPSILON * torch.minimum(times[:, None], times) * (1 - torch.maximum(times[:, None], times))
        torch.testing.assert_close(both.cov(), wanted, rtol=0, atol=0.002)
    assert torch.equal(x_s[s == 0], x0[s == 0])


def test_the_critic_is_punished_for_its_slope_and_the_generator_follows_it() -> None:
    """A linear critic has the losses written down by hand, and moves the generator up its slope."""

    class Linear(nn.Module):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return self.weight * x[:, :1] + 0 * t[:, None]

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return self.place.expand(len(x), 2)

    rng = torch.Generator().manual_seed(0)
    pairs = (torch.ones(64, 2).double(), torch.zeros(64, 2).double(), torch.zeros(64, dtype=torch.int64))
    side = asbm.Projection(Constant(), Linear(0.0), 1e-2)
    loss, penalty = side.critic_loss(pairs, 1, EPSILON, rng)
    assert float(loss) == pytest.approx(2 * torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    assert float(penalty) == 0
    side = asbm.Projection(Constant(), Linear(3.0), 1e-2)
    loss, penalty = side.critic_loss(pairs, 1, EPSILON, rng)
    softplus = torch.nn.functional.softplus
    assert float(loss) == pytest.approx(float(softplus(torch.tensor(-3.0)) + softplus(torch.tensor(0.0))), rel=1e-5)
    assert float(penalty) == pytest.approx(0.01 / 2 * 9)
    side.fit(lambda: pairs, 150, 1, EPSILON, rng)  # one transition to data that are all at (1, 1)
    assert float(side.generator.place[0]) > 0.5
    assert float(side.generator.place[1]) == 0


def test_four_transitions_are_counted_and_fewer_are_refused() -> None:
    method, batch = asbm.ASBM(), batch_of(20, (2,), 2)
    session = session_of(POINTS, method)
    method.prepare(session)
    for rung in (4, 16):
        session.begin("run", 1, 80)
        method.run(session, batch, rung)
        assert session.spent == 80
    with pytest.raises(Skip):
        method.run(session, batch, 2)


def test_each_side_learns_from_the_ends_that_the_other_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward leads noise to data, backward data to noise. What one makes is at time 1 of the other, with the law it started
    from at time 0, pair by pair; the first pairs are data with independent noise.
    """
    method, session, rounds = asbm.ASBM(), session_of(POINTS, asbm.ASBM()), []
    session.scale = lambda embedded, smoke: 2000 if isinstance(embedded, int) else (1, 1, 1)
    data = session.train["x0"]

    def fit(side: Any, pairs: Any, *_: Any) -> None:
        rounds.append((id(side), *pairs()[:2]))

    def shifted(network: nn.Module, x: Tensor, *_: Any) -> Tensor:
        return x + 100.0

    monkeypatch.setattr(asbm.Projection, "fit", fit)
    monkeypatch.setattr(asbm, "transport", shifted)
    method.prepare(session)
    assert [side == rounds[0][0] for side, *_ in rounds] == [True, False, True]

    def is_data(x: Tensor) -> bool:
        return float((x[:50, None] - data).norm(dim=2).min(1).values.max()) < 1e-6

    (_, first, noise), (_, second, reached), (_, third, back) = rounds
    assert is_data(first) and not is_data(noise) and float(noise.std()) == pytest.approx(1, abs=0.1)
    # backward: from where forward came (noise) at its time 0 to what forward made of the same points at its time 1
    torch.testing.assert_close(reached, second + 100.0)
    assert not is_data(second) and float(second.std()) == pytest.approx(1, abs=0.1)
    # and forward again: from data at its time 0, to what backward made of them at its time 1
    torch.testing.assert_close(back, third + 100.0)
    assert is_data(third)
