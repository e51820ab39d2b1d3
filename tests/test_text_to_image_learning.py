"""Students that learn from rewards: their steps are what they are said to be, and likelihoods pull the right way."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from rigs.images import idle_session, module_of
from torch import Tensor, nn
from torch.distributions import Normal
from torch.optim.optimizer import register_optimizer_step_post_hook

from stepmark.backbones.scenes import scaled_linear
from stepmark.backbones.scenes_judges import LOGITS
from stepmark.tracks.image.schedules import schedule_of, uniform_times
from stepmark.tracks.image.solvers import euler_step
from stepmark.tracks.scenes.captions import BACKGROUNDS, tokens
from stepmark.tracks.text_to_image.consistency import sample
from stepmark.tracks.text_to_image.policies import likelihood_ratio

torch.set_num_threads(1)

grpo, rlcm = module_of("flow_grpo"), module_of("rlcm")


class Gaussian(nn.Module):
    """The exact flow of data that are normal with mean `middle` and deviation `width`, whatever the caption."""

    prediction = "flow"

    def __init__(self, middle: float, width: float) -> None:
        super().__init__()
        self.middle = nn.Parameter(torch.tensor(middle))
        self.width = width

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * self.width**2 + t**2
        away = x - (1 - t) * self.middle
        return (t - (1 - t) * self.width**2) / variance * away - self.middle


@torch.no_grad()
def drawn(network: nn.Module, n: int, steps: int, level: float) -> Tensor:
    """Where the stochastic sampler leads noise [n, 1, 8, 8]; level 0: the flow's own ODE."""
    draw = torch.Generator().manual_seed(0)
    x, states = torch.randn(n, 1, 8, 8, generator=draw), torch.zeros(n, 1, 1)
    for t, s in pairwise(uniform_times(steps)):
        mean, spread = grpo.stochastic_step(network, x, t, s, states, 1 - 1 / steps, level)
        x = mean + spread * torch.randn(x.shape, generator=draw)
    return x


def test_the_stochastic_sampler_has_the_laws_of_the_flow() -> None:
    network = Gaussian(0.7, 0.4)
    for level in (0.0, 0.7):
        found = drawn(network, 100, 200, level)
        assert float(found.mean()) == pytest.approx(0.7, abs=0.03)
        assert float(found.std()) == pytest.approx(0.4, abs=0.02)
    assert not torch.equal(drawn(network, 4, 8, 0.0), drawn(network, 4, 8, 0.7))


def test_without_noise_a_step_is_eulers() -> None:
    network = Gaussian(0.2, 0.5).requires_grad_(False)
    x, states = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(3, 1, 1)
    mean, spread = grpo.stochastic_step(network, x, 0.75, 0.5, states, 0.75, 0.0)
    assert spread == 0
    torch.testing.assert_close(mean, euler_step(x, network(x, torch.full((3,), 0.75), states), 0.75, 0.5))


def test_the_ratio_is_that_of_the_normal_likelihoods() -> None:
    draw = torch.Generator().manual_seed(2)
    after, mean, before = (torch.randn(5, 4, 8, 8, generator=draw) for _ in range(3))
    spread = 0.8
    change = Normal(mean, spread).log_prob(after) - Normal(before, spread).log_prob(after)
    torch.testing.assert_close(likelihood_ratio(after, mean, before, spread), change.flatten(1).mean(1).exp())


def test_advantages_are_of_the_group_and_scaled_by_all() -> None:
    reward = torch.tensor([[0.0, 1.0], [10.0, 13.0]])
    found = grpo.advantages(reward)
    spread = float(reward.std(unbiased=False))
    torch.testing.assert_close(found, torch.tensor([[-0.5, 0.5], [-1.5, 1.5]]) / (spread + 1e-4))


def pulled(advantage: float, drift: float, beta: float = 0.0) -> float:
    """Slope of the loss along the mean of the data, for a student that has drifted from where it drew; paths of 4 steps."""
    method = grpo.FlowGRPO()
    method.steps, method.beta = 4, beta
    frozen, student = Gaussian(0.0, 0.5).requires_grad_(False), Gaussian(drift, 0.5)
    draw, states = torch.Generator().manual_seed(3), torch.zeros(6, 1, 1)
    path, before = [torch.randn(6, 1, 8, 8, generator=draw)], []
    for t, s in pairwise(uniform_times(4)):
        mean, spread = grpo.stochastic_step(frozen, path[-1], t, s, states, 0.75)
        before.append(mean)
        path.append(mean + spread * 0.5)  # every step went up by as much
    loss = method.policy(student, frozen, path, before, states, torch.full((6,), advantage))
    loss.backward()
    assert student.middle.grad is not None
    return float(student.middle.grad)


def test_steps_of_good_pictures_become_likelier_and_those_of_bad_ones_less() -> None:
    """All steps went up: a student that draws higher is likelier to make them."""
    assert pulled(1.0, 0.0) < 0 < pulled(-1.0, 0.0)
    assert pulled(1.0, 0.0) == pytest.approx(-pulled(-1.0, 0.0))


def test_what_has_become_likelier_enough_pulls_no_more() -> None:
    assert pulled(1.0, 0.05) == 0  # beyond the clip on the side that the advantage wants
    assert pulled(-1.0, 0.05) > 0  # on the other side it pulls back


def test_the_frozen_flow_holds_the_student() -> None:
    """Without an advantage only the divergence is left: its slope leads back, and is none where the two agree."""
    assert pulled(0.0, 0.05, beta=1.0) > 0 > pulled(0.0, -0.05, beta=1.0)
    assert pulled(0.0, 0.0, beta=1.0) == pytest.approx(0, abs=1e-7)
    assert math.isclose(pulled(0.0, 0.1, beta=1.0), 2 * pulled(0.0, 0.05, beta=1.0), rel_tol=1e-4)


class Numbers(nn.Module):
    """Captions as they are written."""

    def forward(self, ids: Tensor) -> Tensor:
        return ids.float()[:, :, None]


def test_the_divergence_is_that_of_the_velocities() -> None:
    """The paper's, without the length of the step, over all steps but the last; ratios are 1 and do not add."""
    method = grpo.FlowGRPO()
    method.steps, method.beta = 4, 1.0
    frozen, student = Gaussian(0.0, 0.5).requires_grad_(False), Gaussian(0.05, 0.5)
    draw, states, times = torch.Generator().manual_seed(4), torch.zeros(6, 1, 1), uniform_times(4)
    path, before, wanted = [torch.randn(6, 1, 8, 8, generator=draw) for _ in range(5)], [], []
    with torch.no_grad():
        for x, (t, s) in zip(path, pairwise(times), strict=False):
            before.append(grpo.stochastic_step(student, x, t, s, states, 0.75)[0])
            rate, at = 0.7 * math.sqrt(t / (1 - min(t, 0.75))), torch.full((6,), t)
            gap = (student(x, at, states) - frozen(x, at, states)).square().mean()
            wanted.append((t - s) ** 2 / 2 * (rate * (1 - t) / (2 * t) + 1 / rate) ** 2 * gap)
    found = method.policy(student, frozen, path, before, states, torch.zeros(6))
    torch.testing.assert_close(found.detach(), torch.stack(wanted[:3]).mean(), rtol=1e-4, atol=1e-8)


class Speaks(Gaussian):
    """The same with an encoder of captions that has nothing to say."""

    def __init__(self) -> None:
        super().__init__(0.0, 0.4)
        self.words = Numbers()


def test_pictures_that_are_liked_more_than_their_group_have_the_advantage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of two captions and two pictures of each: either half has one of every group, and the brighter pulls."""
    split = {"tokens": tokens([f"a circle on {BACKGROUNDS[0]}"] * 4)}
    monkeypatch.setattr("stepmark.session.load_split", lambda *_: split)
    seen: list[tuple[Tensor, Tensor, int]] = []

    def policy(self: Any, student: Any, teacher: Any, path: Any, before: Any, states: Any, advantage: Tensor) -> Tensor:
        seen.append((path[-1].clamp(-1, 1).mean((1, 2, 3)), advantage, len(before)))
        return 1e-3 * student.middle

    monkeypatch.setattr(grpo.FlowGRPO, "policy", policy)
    session = idle_session("text_to_image/scenes_flow", teacher=Speaks(), vae=nn.Identity(), reward=Taste(1.0))
    session.begin("prepare", 4)
    session.networks["student"] = session.clone("teacher")
    grpo.FlowGRPO().prepare(session)
    (light, up, steps), (other, down, _) = seen
    assert steps == 4 and torch.equal(up > 0, light > other) and bool((up != 0).all())
    torch.testing.assert_close(up, -down)
    teacher, student = session.networks["teacher"], session.networks["student"]
    assert float(teacher.middle) == 0 and float(student.middle) < 0


class Certain(nn.Module):
    """A network of noise that is sure of one picture, all of whose values are `value` (and lean on what it sees)."""

    prediction = "epsilon"

    def __init__(self, value: float, lean: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.lean = lean
        self.alphas_cumprod, self.words = scaled_linear(), Numbers()

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None) -> Tensor:
        schedule = schedule_of(self)
        t = (t + 1) / 1000
        picture = self.value + self.lean * x
        return (x - schedule.alpha(t).view(-1, 1, 1, 1) * picture) / schedule.sigma(t).view(-1, 1, 1, 1)


class Idle:
    """What `draw` needs of a session."""

    def __init__(self, seed: int) -> None:
        self.rng, self.device = torch.Generator().manual_seed(seed), torch.device("cpu")


def test_a_game_is_the_sampler_of_the_consistency_model() -> None:
    network = Certain(0.3, lean=0.2).requires_grad_(False)
    states = torch.zeros(3, 32, 1)
    path, means = rlcm.RLCM().draw(Idle(4), network, states)
    assert len(path) == 5 and len(means) == 4
    session = Idle(4)
    noise = torch.randn(3, 4, 8, 8, generator=session.rng)
    batch = {"noise": noise, "condition": torch.zeros(3, 32, dtype=torch.int64)}
    found = sample(network, batch, 4, session.rng, 3.0, schedule_of(network))
    torch.testing.assert_close(path[-1], found)
    torch.testing.assert_close(path[-1], means[-1])  # the last move has no noise


def test_a_move_of_ddpo_keeps_the_laws_of_the_path() -> None:
    """From exact points of a path to a certain picture, the next points have the path's mean and deviation."""
    network = Certain(0.5).requires_grad_(False)
    schedule, draw = schedule_of(network), torch.Generator().manual_seed(5)
    t, s = 0.75, 0.5
    x = schedule.alpha(t) * 0.5 + schedule.sigma(t) * torch.randn(50, 4, 8, 8, generator=draw)
    mean, spread = rlcm.ancestral_move(network, x, t, s, torch.zeros(50, 32, 1))
    found = mean + spread * torch.randn(x.shape, generator=draw)
    assert float(found.mean()) == pytest.approx(schedule.alpha(s) * 0.5, abs=0.02)
    assert float(found.std()) == pytest.approx(schedule.sigma(s), rel=0.02)
    assert 0 < spread < schedule.sigma(s)


@pytest.mark.parametrize("game", ["consistency", "diffusion"])
def test_moves_that_led_to_rewards_become_likelier(game: str) -> None:
    method = rlcm.RLCM()
    method.game, method.steps = game, 4
    student, states = Certain(0.0), torch.zeros(6, 32, 1)
    path, before = [torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(6))], []
    for number in range(4):
        before.append(method.move(student, path[-1], number, states)[0].detach())
        path.append(before[-1] + 0.2)  # every move went up by as much

    def slope(advantage: float, drift: float) -> float:
        student.value.data.fill_(drift)
        student.value.grad = None
        method.policy(student, path, before, states, torch.full((6,), advantage)).backward()
        assert student.value.grad is not None
        return float(student.value.grad)

    assert slope(1.0, 0.0) < 0 < slope(-1.0, 0.0)
    assert slope(1.0, 0.1) == 0  # beyond the clip, on the side that the advantage wants
    assert slope(-1.0, 0.1) > 0


def test_rewards_are_standardised_within_their_caption() -> None:
    found = rlcm.standardised(torch.tensor([[0.0, 1.0], [10.0, 30.0]]))
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]), rtol=1e-3, atol=0)


class Taste(nn.Module):
    """A reader that believes in the first background the more, the brighter a picture is, or the darker."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), LOGITS)
        logits[:, -len(BACKGROUNDS)] = self.sign * 50 * x.mean((1, 2, 3))
        return logits


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_student_comes_to_draw_what_the_reward_likes_in_one_update_a_round(
    sign: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From sixteen games a round the value moves where the reward is; the rate falls by a third over all rounds."""
    text = [f"a circle on {BACKGROUNDS[0]}"] * 4
    monkeypatch.setattr("stepmark.session.load_split", lambda *_: {"tokens": tokens(text), "text": text})
    networks = {role: Certain(0.0, lean=0.3) for role in ("teacher", "student")}
    session = idle_session("text_to_image/scenes_eps", **networks, vae=nn.Identity(), reward=Taste(sign))
    session.begin("prepare", 4)
    session.scale = lambda embedded, smoke: embedded  # type: ignore[method-assign]
    student = session.networks["student"]
    monkeypatch.setattr(session, "once", lambda *_: student.state_dict())
    method, rates = rlcm.RLCM(), []
    method.rounds, method.captions = 3, 2
    hook = register_optimizer_step_post_hook(lambda optimiser, *_: rates.append(optimiser.param_groups[0]["lr"]))
    try:
        method.prepare(session)
    finally:
        hook.remove()
    assert rates == pytest.approx([5e-5, 5e-5 * 8 / 9, 5e-5 * 7 / 9])
    assert sign * networks["student"].value.item() > 1e-5
    assert networks["teacher"].value.item() == 0
