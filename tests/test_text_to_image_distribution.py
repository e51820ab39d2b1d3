"""One-step students of text to image: distributions matched by two scores, decoders in parallel, reflow, consistency in
continuous time with an adversary.
"""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from rigs.images import Gaussian, idle_session, module_of
from torch import Tensor, nn

from stepmark import backbones, plugins
from stepmark.backbones.scenes import FlowPainter, Painter, scaled_linear
from stepmark.meter.counts import watch
from stepmark.method import Skip
from stepmark.session import Session
from stepmark.tracks.image.schedules import add_noise, schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_coefficients, ddim_step
from stepmark.tracks.text_to_image import distribution
from stepmark.tracks.text_to_image.distribution import Prompts, Scores, dmd_weight, from_noise, towards
from stepmark.tracks.text_to_image.inside import encoded

torch.set_num_threads(1)

EPS, FREE, FLOW = "text_to_image/scenes_eps", "free/scenes_eps", "text_to_image/scenes_flow"
swiftbrush, tiue, sdxs, instaflow, sana = (
    module_of(name) for name in ("swiftbrush", "tiue", "sdxs", "instaflow", "sana_sprint")
)


def words(ids: Tensor) -> Tensor:
    """States of captions that say nothing."""
    return torch.zeros(len(ids), 32, 64)


class Bell(nn.Module):
    """The exact noise prediction for data N(mean, deviation^2), and one third of the caption's first number on top of the mean:
    guidance of scale 3 adds all of it.
    """

    prediction = "epsilon"

    def __init__(self, mean: float = 0.0, deviation: float = 1.0) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_deviation = nn.Parameter(torch.tensor(deviation).log())
        self.alphas_cumprod, self.words = scaled_linear(), words

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.zeros_like(condition)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        schedule = schedule_of(self)
        time = (t + 1) / schedule.steps
        alpha, sigma = (each(time).view(-1, 1, 1, 1) for each in (schedule.alpha, schedule.sigma))
        mean = self.mean + condition[:, 0, 0].view(-1, 1, 1, 1) / 3
        variance = (2 * self.log_deviation).exp()
        return sigma * (x - alpha * mean) / (alpha.square() * variance + sigma.square())


def training(task: str, method: Any = None, **networks: nn.Module) -> Session:
    """A session in which a training may begin, as long as at tier embedded, with the networks of a method where given."""
    session = idle_session(task, **networks)
    session.begin("networks", 1)
    for name, network in (method.networks(session) if method else {}).items():
        session.networks[name] = watch(session._ledger, name, network)
    session.advance("prepare")
    session.scale = lambda embedded, smoke: embedded  # type: ignore[method-assign]
    return session


class Said:
    """Stands for the captions and the latents of the train split."""

    x0 = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    tokens, states = torch.zeros(64, 32, dtype=torch.int64), torch.zeros(64, 32, 64)

    def __init__(self, session: Session) -> None:
        self._rng = session.rng

    def batch(self, n: int) -> Any:
        rows = torch.randint(64, (n,), generator=self._rng)
        return self.tokens[rows], self.states[rows]


class Seen(Said):
    def batch(self, n: int) -> Any:
        rows = torch.randint(64, (n,), generator=self._rng)
        return self.x0[rows], self.tokens[rows], self.states[rows]


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here draws the pictures of the train split, which takes seconds."""
    for module, name, stand_in in (
        *((module, "Prompts", Said) for module in (swiftbrush, tiue, distribution)),
        *((module, "Latents", Seen) for module in (sdxs, instaflow, sana)),
    ):
        monkeypatch.setattr(module, name, stand_in)


def method_of(name: str, **attributes: Any) -> Any:
    """A method or variant of the modules above, in which names may be exchanged, with some attributes changed."""
    info = plugins.methods()[name]
    found = getattr(module_of(info.base or name), info.class_name)()
    for key, value in (info.overrides | attributes).items():
        assert hasattr(found, key)
        setattr(found, key, value)
    return found


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# the two scores ---------------------------------------------------------------------------------


def test_the_pull_is_the_difference_of_the_guided_noises_by_the_variance() -> None:
    """Of unit variance the noise is sigma (x - alpha mean): sigma^2 (eps_teacher - eps_fake) = sigma^3 alpha (own - wanted) at
    every x, with the caption's part whole by guidance; where no score is learnt, eps itself stands in for eps_fake.
    """
    session = training(EPS, teacher=Bell(mean=2.0))
    scores, x = Scores(session), 5 * drawn(6, 4, 8, 8)
    scores.fake.mean.data.fill_(0.5)
    t, asked = torch.linspace(0.05, 0.95, 6), torch.zeros(6, 32, 64)
    asked[:, 0, 0] = torch.arange(6.0)
    alpha, sigma = (each(t).view(-1, 1, 1, 1) for each in (scores.schedule.alpha, scores.schedule.sigma))
    found = scores.pull(x, asked, t)
    torch.testing.assert_close(found, (sigma**3 * alpha * (0.5 - 2.0)).expand_as(x), rtol=1e-3, atol=1e-3)
    scores.own_guidance = 1.0  # now the fake score has a third of the caption, the teacher all of it
    gap = 0.5 - 2.0 + (1 / 3 - 1) * asked[:, 0, 0].view(-1, 1, 1, 1)
    found = scores.pull(x, asked, t)
    torch.testing.assert_close(found, (sigma**3 * alpha * gap).expand_as(x), rtol=1e-3, atol=2e-3)
    alone = Scores(session, own=False)
    state = session.rng.get_state()
    found = alone.pull(x, torch.zeros(6, 32, 64), t)
    session.rng.set_state(state)
    eps = torch.randn(x.shape, generator=session.rng)
    wanted = sigma**2 * (sigma * (alpha * x + sigma * eps - 2 * alpha) - eps)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_student_that_the_two_scores_agree_about_is_left_alone_and_weights_scale_the_pull() -> None:
    session = training(EPS, teacher=Bell(mean=1.0, deviation=0.5))
    scores, x, t = Scores(session), drawn(4, 4, 8, 8), torch.full((4,), 0.4)
    asked = torch.zeros(4, 32, 64)
    assert scores.pull(x, asked, t).abs().max() == 0
    scores.fake.mean.data.fill_(3.0)
    state = session.rng.get_state()
    plain = scores.pull(x, asked, t)
    scores.weight = dmd_weight
    session.rng.set_state(state)
    even = scores.pull(x, asked, t)
    session.rng.set_state(state)
    x_t = add_noise(scores.schedule, x, torch.randn(x.shape, generator=session.rng), t)
    x0 = Denoiser(session.networks["teacher"], asked, 3.0)(x_t, 0.4)[0]
    level = scores.schedule.alpha(0.4) * scores.schedule.sigma(0.4)
    torch.testing.assert_close(even, plain / level / (x - x0).abs().mean((1, 2, 3), keepdim=True), rtol=1e-4, atol=1e-5)
    x.requires_grad_(True)
    towards(x, plain).backward()
    torch.testing.assert_close(x.grad, plain / plain.numel())


def test_the_learnt_score_comes_to_know_what_the_student_makes() -> None:
    session = training(EPS, teacher=Bell())
    scores = Scores(session, rate=0.05)
    for _ in range(150):
        scores.learn(1.5 + 0.5 * torch.randn(8, 4, 8, 8, generator=session.rng), torch.zeros(8, 32, 64))
    assert scores.fake.mean.item() == pytest.approx(1.5, abs=0.1)
    assert scores.fake.log_deviation.exp().item() == pytest.approx(0.5, abs=0.1)
    assert session.networks["teacher"].mean == 0


@pytest.mark.parametrize("name", ["swiftbrush", "swiftbrush_sds"])
def test_the_student_gets_the_spread_of_its_teacher_only_with_a_score_of_its_own(name: str) -> None:
    """Data N(1, 0.5^2). The student begins as the mean of all pictures, N(1, 0.02^2). With a score of its own it ends with
    their deviation; without one, at the mean.
    """
    method = method_of(name, updates=300, batch=16, rate=0.02, fake_rate=0.1)
    session = training(EPS, method, teacher=Bell(mean=1.0, deviation=0.5))
    method.prepare(session)
    made = from_noise(session.networks["student"], drawn(64, 4, 8, 8), torch.zeros(64, 32, 64)).detach()
    assert float(made.mean()) == pytest.approx(1.0, abs=0.1)
    if name == "swiftbrush":
        assert float(made.std()) == pytest.approx(0.5, abs=0.1)
    else:
        assert float(made.std()) < 0.05


def test_both_scores_are_guided_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy that has not learnt yet is the teacher. For captions that guidance hears it pulls nowhere; the noise does."""
    monkeypatch.setattr(Said, "states", torch.ones(64, 32, 64))
    losses: dict[str, float] = {}
    for name, student in (("swiftbrush", Bell(2.0)), ("swiftbrush_sds", Bell(2.0)), ("tiue_no_kl", Steady())):
        session = training(EPS, teacher=Bell(), student=student)
        for module in (swiftbrush, tiue):
            monkeypatch.setattr(
                module,
                "fit",
                lambda session, student, loss, *_, name=name, **__: losses.__setitem__(name, loss().item()),
            )
        method_of(name, batch=4).prepare(session)
    assert losses["swiftbrush"] == losses["tiue_no_kl"] == 0 < losses["swiftbrush_sds"]


# halves of a UNet, and decoders at once ---------------------------------------------------------


@pytest.fixture(scope="module")
def painter() -> nn.Module:
    return backbones.load("scenes_eps")


@torch.no_grad()
def test_one_pass_is_the_network_with_one_encoder_half_for_all_times(painter: Any) -> None:
    """At one time it is the network itself; at four, the decoder half of each on the encoder half of the first."""
    x, states = drawn(2, 4, 8, 8), drawn(2, 32, 64, seed=1)
    whole = painter(x, torch.full((2,), 499.0), states)
    torch.testing.assert_close(tiue.OnePass(painter, [0.5])(x, states)[0], whole, rtol=1e-4, atol=1e-5)
    times = [0.751, 0.501, 0.251, 0.001]
    noises = tiue.OnePass(painter, times)(x, states)
    half = encoded(painter, x, torch.full((2,), 750.0), states)
    for noise, t in zip(noises, times, strict=True):
        alone = tiue.decoded_from(painter.unet, *half, torch.full((2,), 1000 * t - 1), states)
        torch.testing.assert_close(noise, alone, rtol=1e-3, atol=1e-5)
    assert (noises[1] - painter(x, torch.full((2,), 500.0), states)).abs().max() > 1e-3


@torch.no_grad()
def test_half_of_a_pass_is_counted_as_an_evaluation_of_the_network_that_is_asked() -> None:
    """It stops behind the middle, and leaves nothing in the network."""
    torch.manual_seed(0)
    session, ran_on = idle_session(EPS, teacher=Painter()), list[Any]()
    unet: Any = session.networks["teacher"].unet
    unet.up_blocks[0].register_forward_hook(lambda *_: ran_on.append(None))
    up, kept = encoded(session.networks["teacher"], drawn(3, 4, 8, 8), torch.full((3,), 300.0), drawn(3, 32, 64))
    assert session._ledger.evaluations()["teacher"] == 3 and not ran_on
    assert up.shape == (3, 64, 4, 4) and [tuple(each.shape[1:]) for each in kept] == [(64, 8, 8)] * 2 + [(64, 4, 4)] * 2
    assert not any(part._forward_hooks for part in (unet.conv_in, *unet.down_blocks, unet.mid_block))


def test_the_picture_is_linear_in_the_noise_and_the_four_predictions() -> None:
    """z S + sum of E_i eps_i, with the coefficients of DDIM; of the noise that is in a picture it gives that picture."""
    schedule, times = schedule_of(Bell()), [0.751, 0.501, 0.251, 0.001]
    z, noises = drawn(3, 4, 8, 8).double(), drawn(4, 3, 4, 8, 8, seed=1).double()
    total, rest = 1.0, torch.zeros_like(z)
    for noise, t, s in zip(noises, times, [*times[1:], 0.0], strict=True):
        a, b = ddim_coefficients(schedule, t, s)
        total, rest = a * total, a * rest + b * noise
    torch.testing.assert_close(tiue.joined(schedule, z, noises, times), total * z + rest, rtol=1e-6, atol=1e-6)
    x0 = drawn(3, 4, 8, 8, seed=2).double()
    mixed = schedule.alpha(0.751) * x0 + schedule.sigma(0.751) * noises[0]
    torch.testing.assert_close(tiue.joined(schedule, mixed, noises[:1].expand(4, -1, -1, -1, -1), times), x0)


def test_noises_are_asked_to_be_like_noise_each_by_itself() -> None:
    """By hand for mean 2 and variance 4 of one and 0 and 1 of the other; the least is at the second."""
    base = drawn(1, 4, 8, 8).double()
    base = (base - base.mean()) / base.std()
    found = tiue.divergence(torch.cat([2 + 2 * base, base]))
    assert float(found) == pytest.approx(-0.5 * (1 + math.log(4) - 4 - 4))
    both = tiue.divergence(torch.cat([base + 1, base - 1]))  # together of mean 0
    assert float(both) == pytest.approx(1.0)


def test_a_pass_is_offered_where_the_budget_pays_for_it(painter: Any) -> None:
    method = method_of("tiue")
    session = idle_session(FREE, teacher=painter)
    student = method.networks(session)["student"]
    assert student.times == [0.751, 0.501, 0.251, 0.001]
    session.networks["student"] = student
    batch = {"noise": drawn(2, 4, 8, 8), "condition": torch.ones(2, 32, dtype=torch.int64)}
    for rung in (1, 2):
        with pytest.raises(Skip):
            method.run(session, batch, rung)
    found = method.run(session, batch, 4)
    with torch.no_grad():
        noises = student(batch["noise"], painter.words(batch["condition"]))
    torch.testing.assert_close(found, tiue.joined(student.schedule, batch["noise"], noises, student.times))


class Steady(nn.Module):
    """Stands for the one-pass student: noises that add a and b to what it is given."""

    times = (0.751, 0.501, 0.251, 0.001)

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.tensor(value)) for value in (0.5, 0.5))

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        return (self.scale * x + self.shift).expand(4, *x.shape)


def test_the_divergence_is_part_of_the_loss_and_the_score_learns_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first loss, taken apart: with and without the divergence they differ by a tenth of it."""
    losses: dict[str, float] = {}
    for name in ("tiue", "tiue_no_kl"):
        session = training(FREE, teacher=Bell(), student=Steady())
        calls: list[Tensor] = []
        monkeypatch.setattr(Scores, "learn", lambda self, x, states: calls.append(x))
        monkeypatch.setattr(
            tiue, "fit", lambda session, student, loss, *_, **__: losses.__setitem__(name, loss().item())
        )
        method_of(name, batch=4).prepare(session)
        assert len(calls) == 1
    session.begin("prepare", 1)
    Said(session).batch(4)
    noise = torch.randn(4, 4, 8, 8, generator=session.rng)
    apart = 4 * float(tiue.divergence(0.5 * noise + 0.5))
    assert losses["tiue"] - losses["tiue_no_kl"] == pytest.approx(0.1 * apart, rel=1e-3)


def test_the_picture_is_pulled_through_all_four_noises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull of 1 everywhere: the slope of what is added to every noise is how far it moves the picture, by DDIM's steps."""
    slopes: list[float] = []

    def first(session: Session, student: Any, loss: Any, *_: Any, **__: Any) -> None:
        loss().backward()
        slopes.append(student.shift.grad.item())

    monkeypatch.setattr(Scores, "pull", lambda self, x, states, t: torch.ones_like(x))
    monkeypatch.setattr(tiue, "fit", first)
    method_of("tiue_no_kl", batch=4).prepare(training(FREE, teacher=Bell(), student=Steady()))
    moved = 0.0
    for t, s in pairwise((*Steady.times, 0.0)):
        a, b = ddim_coefficients(schedule_of(Bell()), t, s)
        moved = a * moved + b
    assert slopes == pytest.approx([moved], rel=1e-3)


# smaller, and in segments -----------------------------------------------------------------------


@torch.no_grad()
def test_the_small_network_has_lost_the_middle_and_its_finest_attention(painter: Any) -> None:
    """It hears captions on the coarse maps alone, and its first maps no longer depend on them."""
    session = idle_session(EPS, teacher=painter)
    student = method_of("sdxs").networks(session)["student"]
    x, t = drawn(2, 4, 8, 8), torch.full((2,), 300.0)
    one, other = drawn(2, 32, 64, seed=1), drawn(2, 32, 64, seed=2)
    fine = [encoded(student, x, t, states)[1][1] for states in (one, other)]
    torch.testing.assert_close(*fine, rtol=0, atol=0)
    assert (student(x, t, one) - student(x, t, other)).abs().max() > 1e-4
    assert (encoded(painter, x, t, one)[1][1] - encoded(painter, x, t, other)[1][1]).abs().max() > 1e-4
    counts = [sum(p.numel() for p in network.unet.parameters()) for network in (student, painter)]
    assert counts[0] < 0.7 * counts[1] and painter.unet.mid_block is not None


def test_similarity_is_one_of_the_same_alone_and_that_of_the_formula() -> None:
    """Of two constants only the means speak: (2 a b + c1) / (a^2 + b^2 + c1), and 1; a sign turned round makes it negative, and
    the unit of the maps does not count.
    """
    x = drawn(3, 4, 8, 8).double()
    torch.testing.assert_close(sdxs.similarity(x, x), torch.ones(3).double())
    a, b = torch.full((1, 4, 8, 8), 2.0).double(), torch.full((1, 4, 8, 8), 3.0).double()
    c1 = 0.01**2 * 9
    assert float(sdxs.similarity(a, b)) == pytest.approx(0.5 + 0.5 * (12 + c1) / (13 + c1), rel=1e-4)
    assert float(sdxs.similarity(-x, x).max()) < 0 < float(sdxs.similarity(0.5 * x, x).min()) < 1
    torch.testing.assert_close(sdxs.similarity(7 * x, 7 * (x + 0.1)), sdxs.similarity(x, x + 0.1), rtol=1e-5, atol=1e-6)


def test_features_are_matched_only_by_the_same_picture(painter: Any) -> None:
    x, states = drawn(2, 4, 8, 8), drawn(2, 32, 64, seed=1)
    again = x.clone().requires_grad_(True)
    same = sdxs.unlike(painter, again, x, states)
    same.sum().backward()
    assert same.abs().max() < 1e-5 and again.grad.abs().max() < 1e-3
    assert sdxs.unlike(painter, x + 0.3 * drawn(2, 4, 8, 8, seed=3), x, states).min() > 0.01


def test_each_segment_has_its_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha falls from 0.9 to 0.5: above it the pull, below it the distance by a weight that falls from 1 to a quarter."""
    session = training(EPS, teacher=Bell(mean=2.0))
    scores, x = Scores(session), drawn(8, 4, 8, 8).requires_grad_(True)
    scores.fake.mean.data.fill_(0.5)
    monkeypatch.setattr(sdxs, "unlike", lambda teacher, x, aim, states: (x - aim).flatten(1).sum(1))
    t = torch.linspace(0.1, 0.95, 8)
    monkeypatch.setattr(scores, "times", lambda n: t)
    aim, states = torch.zeros(8, 4, 8, 8), torch.zeros(8, 32, 64)
    level = scores.schedule.sigma(t) ** 3 * scores.schedule.alpha(t)
    for progress, alpha, weight in ((0.0, 0.9, 1.0), (0.5, 0.7, 0.625), (1.0, 0.5, 0.25)):
        x.grad = None
        method_of("sdxs").segmented(scores, x, aim, states, progress).backward()
        pulled = level * (0.5 - 2.0) / x.numel()
        wanted = torch.where(t > alpha, pulled, torch.full_like(t, weight / 8)).view(-1, 1, 1, 1).expand_as(x)
        torch.testing.assert_close(x.grad, wanted, rtol=2e-3, atol=2e-6)
    for name, wanted in (("sdxs_scores", level * -1.5 / x.numel()), ("sdxs_features", torch.full_like(t, 1 / 8))):
        x.grad = None
        method_of(name).segmented(scores, x, aim, states, 0.5).backward()
        torch.testing.assert_close(x.grad, wanted.view(-1, 1, 1, 1).expand_as(x), rtol=2e-3, atol=2e-6)


def test_variants_make_as_many_updates_and_the_small_network_learns_to_do_as_the_teacher(
    painter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []

    def counted(session: Session, network: nn.Module, loss: Any, updates: int, *_: Any, **__: Any) -> None:
        seen.append((updates, loss().item()))

    monkeypatch.setattr(sdxs, "fit", counted)
    small = sdxs.small
    monkeypatch.setattr(sdxs, "small", _shrunk)
    for name, stages in (("sdxs", [120, 160]), ("sdxs_features", [120, 160]), ("sdxs_scores", [280])):
        method = method_of(name, n=2, solver_steps=1, batch=2)
        method.prepare(training(EPS, method, teacher=painter))
        assert [updates for updates, _ in seen] == stages
        seen.clear()
    monkeypatch.setattr(sdxs, "shrink", lambda painter: painter)  # a network that has lost nothing has nothing to learn
    small(training(EPS, teacher=painter), 1, 4, 1e-3)
    assert seen[-1][1] == pytest.approx(0.0, abs=1e-6)


def test_the_small_network_learns_the_noise_and_what_leaves_the_blocks(
    painter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both paint nothing the maps are left; where only what follows them differs, by 1, the noise is."""
    losses: list[float] = []
    monkeypatch.setattr(sdxs, "fit", lambda session, network, loss, *_, **__: losses.append(loss().item()))
    mute = deepcopy(painter)
    nn.init.zeros_(mute.unet.conv_out.weight), nn.init.zeros_(mute.unet.conv_out.bias)
    sdxs.small(training(EPS, teacher=mute), 1, 4, 1e-3)

    def brighter(network: Any) -> Any:
        network.unet.conv_out.bias.data.add_(1.0)
        return network

    monkeypatch.setattr(sdxs, "shrink", brighter)
    sdxs.small(training(EPS, teacher=painter), 1, 4, 1e-3)
    assert losses[0] > 1e-3
    assert losses[1] == pytest.approx(1.0, rel=1e-3)


def test_pictures_to_be_matched_are_the_guided_teachers_of_their_noises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that lie near a third of the caption's 1 come to lie near all of it under guidance; of data N(0, 1) every step is
    linear, so that a picture and its noise go together.
    """
    monkeypatch.setattr(Said, "states", torch.ones(64, 32, 64))
    have = sdxs.pairs(training(EPS, teacher=Bell(deviation=0.02)), 4, 8)
    torch.testing.assert_close(have["x0"], torch.ones_like(have["x0"]), rtol=0, atol=0.1)
    have = sdxs.pairs(training(EPS, teacher=Bell()), 4, 8)
    both = torch.stack([have["x0"].flatten(), have["eps"].flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.999


def _shrunk(session: Session, *_: Any) -> dict[str, Tensor]:
    return sdxs.shrink(session.clone("teacher")).state_dict()


# reflow -----------------------------------------------------------------------------------------


class Halving(nn.Module):
    """The straight flow for pairs with x0 = eps / 2: x_t = (1 + t) / 2 eps."""

    prediction = "flow"

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return x / (1 + t.view(-1, 1, 1, 1))


class Bent(Gaussian):
    """`Gaussian` with captions: a third of their first number on top, all of it with guidance of scale 3."""

    def __init__(self) -> None:
        super().__init__()
        self.words = words

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.zeros_like(condition)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, *_: Tensor) -> Tensor:
        return super().forward(x, t, condition) + condition[:, 0, 0].view(-1, 1, 1, 1) / 3


def test_reflow_has_no_loss_where_the_pairs_lie_on_straight_paths() -> None:
    """The exact map of N(0, 1) to N(0, 1/4) is x0 = eps / 2. Its straight flow has no loss and makes it in one step; the flow
    that made the pairs has, and so have pairs that do not belong together.
    """
    session = training(FLOW, teacher=Bent())
    have = instaflow.coupled(session, session.networks["teacher"], 64, 64, 3.0)
    eps, x0 = have["eps"], have["x0"]
    torch.testing.assert_close(x0, eps / 2, rtol=0.03, atol=0.02)
    t, states, network = torch.linspace(0.01, 0.99, 64), torch.zeros(64, 32, 64), Halving()
    assert float(instaflow.straight(network, eps, eps / 2, t, states)) < 1e-10
    torch.testing.assert_close(from_noise(network, eps, states), eps / 2)
    assert float(instaflow.straight(session.networks["teacher"], eps, eps / 2, t, states)) > 0.01
    assert float(instaflow.straight(network, eps, eps.roll(1, 0) / 2, t, states)) > 0.1


def test_pairs_are_made_under_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caption of 1 moves the guided end by all of the push, the end of scale 1.5 by half, in Euler steps by hand."""
    monkeypatch.setattr(Said, "states", torch.ones(64, 32, 64))
    session, ends = training(FLOW, teacher=Bent()), {}
    for guidance in (1.5, 3.0):
        have = instaflow.coupled(session, session.networks["teacher"], 4, 8, guidance)
        x = have["eps"]
        for k in range(8):
            x = x - (Gaussian()(x, torch.full((4,), 1 - k / 8), x) + guidance / 3) / 8
        torch.testing.assert_close(have["x0"], x, rtol=1e-4, atol=1e-4)
        ends[guidance] = float((x - have["eps"] / 2).mean())
    assert ends[1.5] == pytest.approx(ends[3.0] / 2, abs=0.05)


class Straight(Halving):
    """`Halving` with captions, which it does not hear."""

    def __init__(self) -> None:
        super().__init__()
        self.words = words

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.zeros_like(condition)


def test_the_second_flow_and_the_students_learn_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pairs x0 = eps / 2 the network whose paths are these lines has no loss in any training; of others it has."""
    losses: list[float] = []
    eps, states = drawn(4, 4, 8, 8), torch.zeros(4, 32, 64)
    monkeypatch.setattr(instaflow, "coupled", lambda *_: {"eps": eps})
    monkeypatch.setattr(
        instaflow, "fit", lambda session, network, loss, *_, **__: losses.append(float(loss().detach()))
    )
    for share, right in ((0.5, True), (0.4, False)):
        monkeypatch.setattr(instaflow, "drawing", lambda *_, share=share: lambda: (eps, share * eps, states))
        for name, trainings in (("instaflow", 2), ("instaflow_direct", 1), ("instaflow_reflow", 1)):
            method = method_of(name, batch=4)
            method.prepare(training(FLOW, method, teacher=Straight()))
            assert len(losses) == trainings
            assert all(loss < 1e-9 if right else loss > 1e-3 for loss in losses)
            losses.clear()


def test_the_rival_halves_the_steps_of_its_predecessor_the_guided_teacher_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight steps for sixteen, four for eight, two, one; at times from which a step of the length does not leave [0, 1]."""
    asked: list[tuple[float, float]] = []

    class Pushed(Bent):
        """At 0 its velocity is what it was pushed, and what a caption of 1 adds: a third, and all of it under guidance."""

        def __init__(self) -> None:
            super().__init__()
            self.push = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor, condition: Tensor, *_: Tensor) -> Tensor:
            return super().forward(x, t, condition) + self.push

    def noted(predecessor: Any, x: Tensor, t: Tensor, length: float) -> Tensor:
        steps = t / length
        assert float(steps.min()) >= 1 and float(t.max()) <= 1
        torch.testing.assert_close(steps, steps.round())
        asked.append((length, float(predecessor(torch.zeros_like(x), t).mean())))
        return torch.zeros_like(x)

    def trained(session: Session, network: Any, loss: Any, *_: Any, **__: Any) -> None:
        loss()
        network.push.data.add_(1.0)

    monkeypatch.setattr(Seen, "states", torch.ones(64, 32, 64))
    monkeypatch.setattr(instaflow, "halved", noted)
    monkeypatch.setattr(instaflow, "fit", trained)
    method = method_of("instaflow_progressive", batch=16)
    method.prepare(training(FLOW, method, teacher=Pushed()))
    assert [length for length, _ in asked] == [1 / 8, 1 / 4, 1 / 2, 1.0]
    assert [velocity for _, velocity in asked] == pytest.approx([1.0, 1 / 3 + 1, 1 / 3 + 2, 1 / 3 + 3])


def test_two_steps_of_the_predecessor_are_one_of_the_target() -> None:
    x, t = drawn(4, 4, 8, 8), torch.tensor([1.0, 0.75, 0.5, 0.25])
    flow = Gaussian()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return flow(x, t, x)

    end = x
    for k in range(2):
        end = end - velocity(end, t - k / 8) / 8
    torch.testing.assert_close(x - instaflow.halved(velocity, x, t, 0.25) / 4, end)


def test_arms_make_as_many_updates_from_where_they_should_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 in all; the student of InstaFlow begins as the second flow and learns its guided ends, that of the direct arm begins as
    the teacher and learns the teacher's.
    """
    made: list[tuple[int, float]] = []
    asked: list[tuple[float, int, float]] = []
    coupled = instaflow.coupled

    def counted(session: Session, network: Any, loss: Any, updates: int, *_: Any, **__: Any) -> None:
        made.append((updates, loss().item()))
        network.push.data.add_(1.0)  # what a training leaves

    class Pushed(Bent):
        def __init__(self) -> None:
            super().__init__()
            self.push = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor, condition: Tensor, *_: Tensor) -> Tensor:
            return super().forward(x, t, condition) + self.push

    def noted(session: Session, network: Any, n: int, steps: int, guidance: float) -> dict[str, Tensor]:
        asked.append((guidance, steps, network.push.item()))
        return coupled(session, network, 4, steps, guidance)

    monkeypatch.setattr(instaflow, "fit", counted)
    monkeypatch.setattr(instaflow, "coupled", noted)
    for name, stages, pairs, pushes in (
        ("instaflow", [350, 250], [(3.0, 16, 0.0), (1.5, 8, 1.0)], 2),
        ("instaflow_direct", [600], [(3.0, 16, 0.0)], 1),
        ("instaflow_reflow", [350], [(3.0, 16, 0.0)], 1),
        ("instaflow_progressive", [150] * 4, [], 4),
    ):
        method = method_of(name, batch=4)
        session = training(FLOW, method, teacher=Pushed())
        method.prepare(session)
        assert [updates for updates, _ in made] == stages and asked == pairs
        assert session.networks["student"].push.item() == pushes and session.networks["teacher"].push.item() == 0
        made.clear(), asked.clear()


def test_one_evaluation_makes_a_picture_and_the_second_flow_takes_what_it_gets() -> None:
    network = FlowPainter(24, 1).requires_grad_(False)
    batch = {"noise": drawn(2, 4, 8, 8), "condition": torch.ones(2, 32, dtype=torch.int64)}
    for name, spent in (("instaflow", 1), ("instaflow_reflow", 8)):
        session = idle_session(FLOW, student=network)
        session.begin("run", 1, 16)
        found = method_of(name).run(session, batch, 8)
        assert session.spent == 2 * spent
        session.begin("run", 1)
        denoise, x = Denoiser(network, batch["condition"]), batch["noise"]
        for t, s in zip(uniform_times(spent)[:-1], uniform_times(spent)[1:], strict=True):
            x = ddim_step(denoise.schedule, *denoise(x, t), s)
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)
        network = FlowPainter(24, 1).requires_grad_(False)


# consistency in continuous time -----------------------------------------------------------------


class Mixture(nn.Module):
    """The exact velocity for data of two points, -1 and 2, with weights 0.3 and 0.7: eps - x0 given x_s."""

    prediction = "flow"

    def forward(self, x: Tensor, s: Tensor, condition: Tensor) -> Tensor:
        s = s.view(-1, 1, 1, 1)
        points = x.new_tensor([-1.0, 2.0])
        logits = x.new_tensor([0.3, 0.7]).log() - ((x[..., None] - (1 - s[..., None]) * points) / s[..., None]) ** 2 / 2
        x0 = (logits.softmax(-1) * points).sum(-1)
        return (x - x0) / s


def test_the_conversion_of_the_flow_is_exact() -> None:
    """What is expected of cos(t) eps - sin(t) x0 given x_t = cos(t) x0 + sin(t) eps, for data of two points, in closed form."""
    t, x = torch.linspace(0.02, sana.LAST, 40).double(), 2 * drawn(40, 4, 8, 8).double()
    found = sana.TrigFlow(Mixture(), False)(x, t, x)
    cos, sin = (each.view(-1, 1, 1, 1, 1) for each in (t.cos(), t.sin()))
    points = x.new_tensor([-1.0, 2.0])
    logits = x.new_tensor([0.3, 0.7]).log() - ((x[..., None] - cos * points) / sin) ** 2 / 2
    x0 = (logits.softmax(-1) * points).sum(-1)
    eps = (x - cos[..., 0] * x0) / sin[..., 0]
    torch.testing.assert_close(found, cos[..., 0] * eps - sin[..., 0] * x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sana.ended(x, t, found), x0, rtol=1e-8, atol=1e-8)


class Settled(nn.Module):
    """A flow network that `TrigFlow` makes F(x, t) = -tan(t / 2) x of, whose consistency function is x itself at every time: the
    solution for data N(0, 1), of which no point moves.
    """

    prediction = "flow"

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.zeros_like(condition)

    def forward(self, x: Tensor, s: Tensor, condition: Tensor) -> Tensor:
        s = s.view(-1, 1, 1, 1)
        half = torch.atan2(s, 1 - s) / 2
        return (-half.tan() * x - (1 - 2 * s) * x) / (1 - 2 * s + 2 * s**2)


def test_a_consistent_function_is_not_pushed() -> None:
    """Data N(0, 1): dx/dt = 0 under the teacher, f(x, t) = x is consistent, and the derivative that forward differentiation
    gives leaves no tangent. Where the path moves something is left.
    """
    network = sana.TrigFlow(Settled(), False)
    x, t = drawn(8, 4, 8, 8).double(), torch.linspace(0.1, 1.5, 8).double()
    f, still = network(x, t, x), torch.zeros_like(x)
    torch.testing.assert_close(f, -(t / 2).tan().view(-1, 1, 1, 1) * x)
    torch.testing.assert_close(sana.ended(x, t, f), x)
    change = sana.changing(network, x, t, x, still)
    assert sana.tangent(f, change, still, x, t, 1.0).abs().max() < 1e-9
    first = -t.cos().square().view(-1, 1, 1, 1) * (f - x)  # before r grows only the velocity of the teacher is learnt
    torch.testing.assert_close(sana.tangent(f, change, x, x, t, 0.0), first)
    assert sana.tangent(f, sana.changing(network, x, t, x, x), x, x, t, 1.0).abs().max() > 0.05


def test_forward_differentiation_goes_through_the_transformer() -> None:
    """cos t sin t dF/dt along a path, against a difference of two evaluations."""
    torch.manual_seed(0)
    network = sana.TrigFlow(FlowPainter(24, 2).requires_grad_(False), True).double()
    x, t, states = drawn(2, 4, 8, 8).double(), torch.tensor([0.3, 1.2]).double(), drawn(2, 32, 64, seed=1).double()
    slope, h = drawn(2, 4, 8, 8, seed=2).double(), 1e-3
    found = sana.changing(network, x, t, states, slope)
    ahead, behind = (network(x + k * slope, t + k, states) for k in (h, -h))
    wanted = (t.cos() * t.sin()).view(-1, 1, 1, 1) * (ahead - behind) / (2 * h)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_the_loss_pushes_towards_the_tangent_by_its_normed_length() -> None:
    """With the consistent student of N(0, 1) there is nothing to learn; with another the gradient in F is -2 w g / D, and u has
    its least at -log of the error.
    """
    method, u = method_of("sana_sprint"), nn.Linear(2, 1).double()
    nn.init.zeros_(u.weight), nn.init.constant_(u.bias, 0.3)
    session = training(FLOW, teacher=Settled())
    session.dtype = torch.float64
    x0, states, still = drawn(4, 4, 8, 8).double(), torch.zeros(4, 32, 64).double(), Still()
    settled = sana.TrigFlow(Settled(), False)
    calm = method.consistency(session, settled, still, u, x0, states, 1.0)
    assert calm.item() == pytest.approx(-0.3, abs=1e-9)
    student = Turned()
    session.begin("prepare", 1)
    method.consistency(session, student, still, u, x0, states, 1.0).backward()
    session.begin("prepare", 1)
    t = method.times(session, 4, 0.2, 1.6)
    x = sana.noised(x0, sana.noise_like(x0, session.rng), t)
    f = student(x, t, states).detach()
    g = sana.tangent(f, sana.changing(student, x, t, states, torch.zeros_like(x)), torch.zeros_like(x), x, t, 1.0)
    length = g.flatten(1).norm(dim=1)
    each = -2 * (g * x).flatten(1).sum(1) / (length + 0.1) / g[0].numel() / t.tan() * math.exp(0.3)
    assert float(student.turn.grad) == pytest.approx(float(each.mean()), rel=1e-6)
    error = (length / (length + 0.1)) ** 2 / g[0].numel() / t.tan()
    assert float(u.bias.grad) == pytest.approx(float((math.exp(0.3) * error - 1).mean()), rel=1e-6)


class Still(nn.Module):
    """A teacher of TrigFlow under which nothing moves."""

    painter = Settled()

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Turned(nn.Module):
    """F = turn x."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.tensor(0.4).double())

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        return self.turn * x


def test_times_of_training_are_those_of_the_paper() -> None:
    """log(tan t / 2) has the mean and deviation that are asked for, and sigma_data one half in the authors' scale."""
    session = training(FLOW, teacher=Settled())
    t = method_of("sana_sprint").times(session, 20_000, 0.2, 1.6)
    level = (t.tan() * 0.5).log()
    assert float(level.mean()) == pytest.approx(0.2, abs=0.05) and float(level.std()) == pytest.approx(1.6, abs=0.05)
    assert float(t.min()) > 0 and float(t.max()) <= sana.LAST


def test_the_adversary_is_content_where_real_is_above_one_and_fake_below() -> None:
    assert float(sana.hinge(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -5.0]))) == 0
    assert float(sana.hinge(torch.tensor([0.0, 1.0]), torch.tensor([1.0, -1.0]))) == pytest.approx(0.5 * (0.5 + 1.0))


def test_who_is_shown_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adversary sees the student's pictures and real ones with the caption of another as false, and real ones with their own
    as true; the student is pushed up what the adversary says of it, by half, and half of its times are pi/2.
    """
    method = method_of("sana_sprint_ladd", batch=64, updates=1, dense_updates=1)
    painter = FlowPainter(24, 6).requires_grad_(False)
    session = training(FLOW, method, teacher=painter)
    marked = torch.arange(64.0).view(-1, 1, 1, 1).expand(64, 4, 8, 8)
    monkeypatch.setattr(
        Seen, "batch", lambda self, n: (marked, None, marked[:, 0, :, :1].flatten(1)[:, :1, None].expand(-1, 32, 64))
    )
    monkeypatch.setattr(sana, "densified", _undone)
    shown: list[tuple[Tensor, Tensor]] = []
    given: list[tuple[Tensor, Tensor]] = []

    def judged(eyes: Any, heads: nn.ModuleDict, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        shown.append((x, states[:, 0, 0]))
        return heads["1"].last.bias.sum() + x.flatten(1).mean(1, keepdim=True)

    def asked(module: Any, args: Any) -> None:
        given.append((args[1], args[2][:, 0, 0]))

    monkeypatch.setattr(sana, "judged", judged)
    monkeypatch.setattr(sana, "noised", lambda x0, eps, t: x0)
    monkeypatch.setattr(sana, "ended", lambda x, t, f: -x + 0 * f)
    monkeypatch.setattr(
        sana, "hinge", lambda real, fake: given.append(("hinge", real, fake)) or (real.mean() - fake.mean())
    )
    losses: list[float] = []
    monkeypatch.setattr(sana, "fit", lambda session, both, loss, *_, **__: losses.append(loss().item()))
    session.networks["student"].register_forward_pre_hook(asked)
    method.prepare(session)
    (made, one), (other, two), (real, three), (last, four) = shown
    number = marked[:, 0, 0, 0]
    assert all(torch.equal(states, number) for states in (one, two, three, four))
    assert torch.equal(made, -marked) and torch.equal(other, marked.roll(1, 0)) and torch.equal(real, marked)
    assert losses[0] == pytest.approx(-0.5 * last.mean().item(), rel=0.05, abs=0.1)
    (_, true, false), *_ = (each for each in given if len(each) == 3)
    assert (
        true.shape == (64, 1)
        and false.shape == (128, 1)
        and true.mean() > 0 > false[:64].mean()
        and false[64:].mean() > 0
    )
    times = [each[0] for each in given if len(each) == 2]
    assert all(0.3 < float((t == sana.LAST).float().mean()) < 0.7 for t in times) and len(times) == 2


def test_the_derivative_comes_in_over_the_first_quarter_of_the_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of("sana_sprint_scm", batch=2, updates=8, dense_updates=1)
    session = training(FLOW, method, teacher=FlowPainter(24, 6).requires_grad_(False))
    parts: list[float] = []
    monkeypatch.setattr(sana, "densified", _undone)
    monkeypatch.setattr(method, "consistency", lambda *given: parts.append(given[-1]) or torch.zeros(()))
    monkeypatch.setattr(sana, "fit", lambda session, both, loss, n, *_, **__: [loss() for _ in range(n)])
    method.prepare(session)
    assert parts == [0.0, 0.5, *[1.0] * 6]


def _undone(session: Session, *_: Any) -> dict[str, Tensor]:
    return session.networks["teacher"].state_dict()


def test_heads_look_at_the_blocks_of_a_network_that_stays_as_it_is() -> None:
    eyes = sana.TrigFlow(FlowPainter(24, 6).requires_grad_(False), True)
    heads = nn.ModuleDict({str(n): sana.Head(24) for n in (1, 3, 5)})
    x, t, states = drawn(2, 4, 8, 8).requires_grad_(True), torch.tensor([0.5, 1.0]), drawn(2, 32, 64, seed=1)
    found = sana.judged(eyes, heads, x, t, states)
    assert found.shape == (2, 48)
    (found[:, :16].sum()).backward()
    assert x.grad.abs().max() > 0 and heads["1"].last.bias.grad is not None and heads["3"].last.bias.grad == 0
    assert all(p.grad is None for p in eyes.parameters())
    assert not any(block._forward_hooks for block in eyes.painter.transformer.transformer_blocks)


def test_one_two_and_four_steps_noise_what_was_found_anew() -> None:
    """Of data at one point the network says so at once, whatever it is asked; times are pi/2, 1.3 for two, else even."""
    told: list[float] = []
    seen: list[Tensor] = []

    class Point(nn.Module):
        painter = type("Words", (), {"words": staticmethod(words)})

        def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
            told.append(float(t[0]))
            seen.append(x)
            return (t.cos().view(-1, 1, 1, 1) * x - 0.7) / t.sin().view(-1, 1, 1, 1)

    batch = {"noise": drawn(2, 4, 8, 8), "condition": torch.ones(2, 32, dtype=torch.int64)}
    for rung, times in (
        (1, [1.0]),
        (2, [1.0, 1.3 / sana.LAST]),
        (4, [1.0, 0.75, 0.5, 0.25]),
        (32, [1.0, 0.75, 0.5, 0.25]),
    ):
        told.clear(), seen.clear()
        session = idle_session(FLOW, student=Point())
        session.begin("run", 1, 2 * rung)
        found = method_of("sana_sprint").run(session, batch, rung)
        torch.testing.assert_close(found, torch.full_like(found, 0.7), rtol=1e-4, atol=1e-5)
        assert session.spent == 2 * len(times)
        assert [t / sana.LAST for t in told] == pytest.approx(times)
        session.begin("run", 1)
        for x, t in zip(seen[1:], told[1:], strict=True):
            fresh = torch.randn(x.shape, generator=session.rng)
            torch.testing.assert_close(x, 0.7 * math.cos(t) + math.sin(t) * fresh, rtol=1e-4, atol=1e-5)


# all of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swiftbrush", "tiue", "sdxs", "instaflow", "sana_sprint"])
def test_an_untrained_picture_costs_one_row(name: str) -> None:
    """At tier smoke: prepared with an update or two, and one row a picture; what was not to be trained is as it was."""
    flow = name in ("instaflow", "sana_sprint")
    torch.manual_seed(0)
    network: nn.Module = (FlowPainter(24, 6) if flow else Painter()).requires_grad_(False)
    method = method_of(name)
    session = training(FLOW if flow else EPS, method, teacher=network)
    session.scale = lambda embedded, smoke: smoke  # type: ignore[method-assign]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    first = {key: value.clone() for key, value in session.networks["student"].state_dict().items()}
    method.prepare(session)
    after = session.networks["student"].state_dict()
    assert any(not torch.equal(after[key], first[key]) for key in first)
    assert all(torch.equal(network.state_dict()[key], before[key]) for key in before)
    batch = {"noise": drawn(2, 4, 8, 8), "condition": torch.ones(2, 32, dtype=torch.int64)}
    rung = 4 if name == "tiue" else 1
    session.begin("run", 1, 2 * rung)
    found = method.run(session, batch, rung)
    assert session.spent == 2 and found.shape == batch["noise"].shape and bool(found.isfinite().all())


def test_prompts_are_captions_without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    session = training(EPS, teacher=Bell())
    tokens = torch.arange(5 * 32).view(5, 32)
    monkeypatch.setattr(Session, "train", {"tokens": tokens})
    prompts = Prompts(session)
    drawn_tokens, states = prompts.batch(7)
    assert drawn_tokens.shape == (7, 32) and states.shape == (7, 32, 64)
    assert all(row.tolist() in tokens.tolist() for row in drawn_tokens)
