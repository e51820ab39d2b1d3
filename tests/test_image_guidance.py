"""Guidance and what is distilled from it: the guided sampler, adapters, and students of one evaluation a step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from rigs.images import DIGITS, GUIDED, Gaussian, batch_of, idle_session, method_of, module_of, session_of
from torch import Tensor, nn

from stepmark import backbones
from stepmark.cell import track_of
from stepmark.method import Skip
from stepmark.session import Session
from stepmark.tracks.image import fusing, schedules, solvers, training
from stepmark.tracks.image import guided as image_guided

torch.set_num_threads(1)

guided, agd, cfg = (module_of(name) for name in ("guided_distillation", "agd", "ddim_cfg"))


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
    method = method_of(name)
    session, batch = session_of(GUIDED, method), batch_of(6, (1, 8, 8), 10)
    told: list[Tensor] = []
    for network in session.networks.values():
        network.register_forward_pre_hook(lambda module, args: told.append(args[-1]))
    session.begin("run", 1, 24)
    method.run(session, batch | {"guidance": torch.arange(6.0)}, 4)
    assert len(told) == 4
    assert all(torch.equal(scale, torch.arange(6.0) + offset) for scale in told)


def test_a_student_that_is_told_no_scale_takes_the_weight_of_the_paper() -> None:
    method = method_of("guided_distillation")
    session, batch, told = session_of(DIGITS, method), batch_of(6, (1, 8, 8), 10), []
    for network in session.networks.values():
        network.register_forward_pre_hook(lambda module, args: told.append(args[-1]))
    session.begin("run", 1, 24)
    method.run(session, batch, 4)
    assert len(told) == 4 and all(torch.equal(w, torch.full((6,), 0.3)) for w in told)


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


@torch.no_grad()
def test_a_student_whose_weight_input_is_trained_heeds_it() -> None:
    torch.manual_seed(0)
    student, batch = guided.WeightedUNet(backbones.load("digits_flow_a")), batch_of(1, (1, 8, 8), 10)
    told = batch["noise"], torch.tensor([0.5]), batch["condition"]
    assert torch.equal(student(*told, torch.tensor([1.0])), student(*told, torch.tensor([4.0])))
    nn.init.normal_(student.weight[-1].weight)
    assert (student(*told, torch.tensor([1.0])) - student(*told, torch.tensor([4.0]))).abs().max() > 1e-3


def test_each_stage_asks_at_its_times_and_tells_everybody_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 at any time, where what is left at first is |w (x0(c) - x0())|^2 with the truncated weight: `WeightedUNet`
    heeds no weight yet. Then n steps on their own grid, from the predecessor at the same weight.
    """
    session, method, losses, asked = session_of(DIGITS), guided.GuidedDistillation(), [], []
    session.scale = lambda embedded, smoke: embedded  # type: ignore[method-assign]
    for name, network in method.networks(session).items():
        network.register_forward_pre_hook(
            lambda _, args, name=name: asked.append((name, *args, torch.is_grad_enabled()))
        )
        session.networks[name] = network
    monkeypatch.setattr(guided, "fit", lambda session, network, loss, *_: losses.append(loss()))
    method.prepare(session)
    (_, x, t, condition, w, _), stages = asked[0], iter(asked[1:])
    assert 0 <= float(w.min()) < 0.5 and 3.5 < float(w.max()) <= 4 and len(t.unique()) == 64
    with torch.no_grad():
        named, null = (session.networks["teacher"](x, t, c) for c in (condition, torch.full_like(condition, 10)))
    gap, column = (named - null).square().mean((1, 2, 3)), t * w
    wanted = (((1 - t) / t).square().clamp(min=1) * column.square() * gap).mean()
    torch.testing.assert_close(losses[0].detach(), wanted, rtol=1e-3, atol=1e-5)
    losses[0].backward()
    assert all(p.grad is None for p in session.networks["teacher"].parameters())
    for n in (16, 8, 4, 2, 1):
        calls = [next(stages) for _ in range(3)]
        assert [(name, learns) for name, *_, learns in calls] == [(f"student_{2 * n}", False)] * 2 + [
            (f"student_{n}", True)
        ]
        (x, t, condition, w), (_, later, *second), third = (call[1:5] for call in calls)
        steps = set((t * n).tolist())
        assert steps <= set(range(1, n + 1)) and len(steps) > 0.8 * n
        torch.testing.assert_close(later, t - 1 / (2 * n))
        for told in (second, third[2:]):
            assert torch.equal(told[0], condition) and torch.equal(told[1], w)
        assert torch.equal(third[0], x) and torch.equal(third[1], t)
    assert next(stages, None) is None


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


@torch.no_grad()
def test_an_adapter_attends_from_every_pixel_to_its_tokens() -> None:
    """Cross-attention written out pixel by pixel, on weights that are not zero."""
    torch.manual_seed(0)
    adapter, features, tokens = agd.GuidanceAdapter(6, 4), torch.randn(2, 6, 2, 3), torch.randn(2, 3, 4)
    nn.init.normal_(adapter.out.weight)
    query, key, value, out = (getattr(adapter, name).weight for name in ("query", "key", "value", "out"))
    found = adapter(features, tokens)
    for item, row, column in ((0, 0, 0), (1, 1, 2), (1, 0, 1)):
        score = torch.stack([(query @ features[item, :, row, column]) @ (key @ token) / 2 for token in tokens[item]])
        read = sum(weight * (value @ token) for weight, token in zip(score.softmax(0), tokens[item], strict=True))
        torch.testing.assert_close(found[item, :, row, column], out @ read)


@torch.no_grad()
def test_adapters_are_told_time_condition_and_scale_and_what_they_say_reaches_the_output() -> None:
    """Each of the three inputs moves one token and no other, and with weights the scale moves the prediction."""
    torch.manual_seed(0)
    adapted = agd.AdaptedUNet(backbones.load("digits_flow_a"))
    for adapter in adapted.adapters:
        nn.init.normal_(adapter.out.weight)
    seen: list[Tensor] = []
    adapted.adapters[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    told = [torch.tensor([0.5]), torch.tensor([3]), torch.tensor([2.0])]
    others = [torch.tensor([0.6]), torch.tensor([4]), torch.tensor([5.0])]
    x = batch_of(1, (1, 8, 8), 10)["noise"]
    plain = adapted(x, *told)
    for k, other in enumerate(others):
        moved = adapted(x, *(other if i == k else told[i] for i in range(3)))
        assert (seen[0] != seen[-1]).any(2)[0].tolist() == [i == k for i in range(3)]
        assert (moved - plain).abs().max() > 1e-3


@torch.no_grad()
def test_there_is_an_adapter_behind_every_residual_block_and_each_reaches_the_output() -> None:
    torch.manual_seed(0)
    teacher = backbones.load("digits_flow_a")
    blocks = [part.out_channels for part in teacher.unet.modules() if type(part).__name__ == "ResnetBlock2D"]
    adapted = agd.AdaptedUNet(teacher)
    assert [adapter.out.out_features for adapter in adapted.adapters] == blocks
    told = batch_of(1, (1, 8, 8), 10)["noise"], torch.tensor([0.5]), torch.tensor([3]), torch.tensor([2.0])
    plain = adapted(*told)
    for adapter in adapted.adapters:
        nn.init.normal_(adapter.out.weight)
        assert (adapted(*told) - plain).abs().max() > 1e-4
        nn.init.zeros_(adapter.out.weight)
    assert torch.equal(adapted(*told), plain)


@pytest.mark.parametrize(("name", "source"), [("agd", "states_of_sampling"), ("agd_noised_data", "states_of_data")])
def test_the_first_loss_is_what_guidance_adds_to_the_conditional_prediction(
    name: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Untrained adapters predict v(c); the target is v() + w (v(c) - v()): |(w - 1) (v(c) - v())|^2 is left, on states
    of guided sampling, or of noised data in the ablation.
    """
    method, kept, found = agd.AGD(), [], []
    method.noised_data = method_of(name).noised_data
    session, original, draw = session_of(GUIDED, method), getattr(agd, source), torch.Generator()

    def first_loss(session: Session, network: nn.Module, loss: Any, *_: Any) -> None:
        draw.set_state(session.rng.get_state())
        found.append(loss().detach())

    monkeypatch.setattr(agd, source, lambda *arguments: kept.append(original(*arguments)) or kept[-1])
    monkeypatch.setattr(agd, "fit", first_loss)
    method.prepare(session)
    x, t, condition, scale, _ = kept[0]
    assert len(x) == 8 * 3 and sorted(t.unique().tolist()) == pytest.approx([1 / 3, 2 / 3, 1])  # 8 paths of 3 steps
    assert float(scale.min()) >= 1 and float(scale.max()) <= 6
    with torch.no_grad():
        named, null = (session.networks["teacher"](x, t, c) for c in (condition, torch.full_like(condition, 10)))
    pull = (scale - 1).square() * (named - null).square().mean((1, 2, 3))
    pick = torch.randint(len(x), (method.batch,), generator=draw)
    torch.testing.assert_close(found[0], pull[pick].mean(), rtol=1e-4, atol=1e-6)


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
    many = agd.states_of_sampling(session, 200, 1, (1.0, 6.0))[3]
    assert 1 <= float(many.min()) < 1.2 and 5.8 < float(many.max()) <= 6
    with torch.no_grad():
        torch.testing.assert_close(target, fusing.guided_rows(session.networks["teacher"], x, t, condition, scale))
    assert method_of("agd_noised_data").noised_data and not agd.AGD().noised_data


class Shrinking(nn.Module):
    """eps = x / 2, so that x0 = (1 - sigma / 2) x / alpha."""

    prediction = "epsilon"

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize(("name", "temperature"), [("sg_minority", 1.0), ("pushed_at_random", 1.3)])
def test_a_guided_step_is_the_ancestral_one_and_the_scaled_direction_times_its_variance(
    name: str, temperature: float
) -> None:
    """Two steps with a weight of 3, the first guided, written out by hand: only the noises of the chain are multiplied."""
    schedule, batch = schedules.Schedule("epsilon"), batch_of(6, (2,), 1)
    session = idle_session("minority/rare_eps", teacher=Shrinking(), guide=module_of("sg_minority").Guide())
    method = method_of(name, weight=3.0, temperature=temperature)
    session.begin("run", 1)
    first, noise = (torch.randn(6, 2, generator=session.rng) for _ in range(2))
    session.begin("run", 1)
    found = method.run(session, batch, 4 if name == "sg_minority" else 2)

    def guess(x: Tensor, t: float) -> Tensor:
        return (1 - schedule.sigma(t) / 2) / schedule.alpha(t) * x

    x = temperature * batch["noise"]
    x0 = guess(x, 1.0)
    again = guess(schedule.alpha(0.2) * x0 + schedule.sigma(0.2) * first, 0.2)
    push = x0 - again if name == "sg_minority" else first  # the slope of |x0 - again|, but for its length
    push = push / push.abs().amax(1, keepdim=True)
    (alpha, sigma), (a, s) = ((schedule.alpha(t), schedule.sigma(t)) for t in (1.0, 0.5))
    variance = (s / sigma) ** 2 * (1 - (alpha / a) ** 2)
    mean = a * x0 + (s**2 - variance) ** 0.5 * x / 2
    x = mean + 3 * variance * push + temperature * variance**0.5 * noise
    torch.testing.assert_close(found, guess(x, 0.5), rtol=1e-3, atol=1e-3)
