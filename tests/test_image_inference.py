"""Evaluations spent otherwise than step after step: in rounds, on a search, on guidance, on a further time input."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from rigs.images import batch_of, module_of
from torch import Tensor, nn

from stepmark import backbones, plugins
from stepmark.cell import track_of
from stepmark.meter.counts import Ledger, watch
from stepmark.session import Session
from stepmark.task import digest_of
from stepmark.tracks.image import schedules, solvers

torch.set_num_threads(1)

SCHEDULE = schedules.Schedule("epsilon")


def session_of(task: str, network: nn.Module | None = None, **more: nn.Module) -> Session:
    """A smoke session on a task, with another teacher where given and further networks."""
    spec, ledger = track_of(task)[1], Ledger()
    networks = {"teacher": network or backbones.load(spec.backbones["teacher"])} | more
    watched = {name: watch(ledger, name, part) for name, part in networks.items()}
    session = Session(spec, "smoke", torch.device("cpu"), torch.float32, watched, {}, ledger, False)
    session.begin("run", 1)
    return session


class Clock(nn.Module):
    """A network that sees nothing but the time."""

    prediction = "epsilon"

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return (t / 150).cos()[:, None].expand_as(x)


class Gaussian(nn.Module):
    """The exact noise prediction of data N(0, 1/4), eps = gain(t) x: every sampler is a number. Keeps what it was asked."""

    prediction = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def gain(t: float) -> float:
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        return sigma / (alpha**2 / 4 + sigma**2)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.asked.append((x.clone(), t.clone()))
        times, place = t.unique(return_inverse=True)
        gains = torch.tensor([self.gain((float(time) + 1) / 1000) for time in times], dtype=x.dtype)
        return gains[place].view(-1, *[1] * (x.dim() - 1)) * x


# --- ParaStep --------------------------------------------------------------------------------------------------------

parastep = module_of("parastep")


def test_where_states_do_not_matter_rounds_give_the_sequential_samples() -> None:
    """64 steps in 20 rounds, bit for bit those of 64 rounds: every prediction is fresh and replayed in its place."""
    batch, session = batch_of(10, (2,), 2), session_of("sampling/mixtures_eps", Clock())
    whole = module_of("ddim").DDIM().run(session, batch, 64)
    session.begin("run", 1, 640)
    torch.testing.assert_close(parastep.ParaStep().run(session, batch, 64), whole, rtol=1e-6, atol=1e-6)
    assert session.spent == 640
    assert session._ledger.snapshot()["teacher"]["calls"] == 5 + math.ceil(59 / 4) <= 0.4 * 64


def test_one_worker_is_ddim_bit_for_bit() -> None:
    batch, session = batch_of(10, (2,), 2), session_of("sampling/mixtures_eps")
    alone = parastep.ParaStep()
    alone.workers = 1
    whole = module_of("ddim").DDIM().run(session, batch, 12)
    assert torch.equal(alone.run(session, batch, 12), whole)
    assert not torch.equal(parastep.ParaStep().run(session, batch, 12), whole)


def test_a_round_reuses_then_predicts_then_replays() -> None:
    """On a linear network all states are multiples of the noise: against the numbers of the algorithm, step by step."""
    network, batch = Gaussian(), batch_of(3, (2,), 1)
    session, method, rung = session_of("sampling/mixtures_eps", network), parastep.ParaStep(), 11
    found = method.run(session, batch, rung)
    schedule, times = SCHEDULE, schedules.uniform_times(rung)

    def step(x: float, eps: float, t: float, s: float) -> float:
        x0 = (x - schedule.sigma(t) * eps) / schedule.alpha(t)
        return schedule.alpha(s) * x0 + schedule.sigma(s) * eps

    x, eps, asked, done = 1.0, 0.0, [], 0
    while done < rung:
        part = list(pairwise(times))[done : done + (1 if done < 5 else 4)]
        guess, fresh = x, []
        for k, (t, s) in enumerate(part):  # a worker takes its steps one by one
            fresh.append(network.gain(t) * guess)
            asked.append((guess, schedule.network_time(t)))
            guess = step(guess, eps, t, s) if k + 1 < len(part) else guess
        for (t, s), eps in zip(part, fresh, strict=True):
            x = step(x, eps, t, s)
        done += len(part)
    torch.testing.assert_close(found, x * batch["noise"], rtol=1e-4, atol=1e-5)
    rows = [(state, float(time)) for states, now in network.asked for state, time in zip(states, now, strict=True)]
    for k, (factor, time) in enumerate(asked):
        assert rows[3 * k][1] == pytest.approx(time, abs=1e-3)
        torch.testing.assert_close(rows[3 * k][0], factor * batch["noise"][0], rtol=1e-4, atol=1e-5)


# --- minorities ------------------------------------------------------------------------------------------------------

minority = module_of("sg_minority")


def test_the_guide_is_the_gradient_with_the_reconstruction_held_fixed() -> None:
    """Against central differences of |x0(x) - x0'| with one and the same x0', scaled to a largest entry of one."""
    network = backbones.load("rare_eps")
    draw = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(12, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    denoise = solvers.Denoiser(network, torch.zeros(12, dtype=torch.long))
    level = 0.2  # low enough for the reconstruction to depend on x0, so that it matters whether it is held fixed
    x0, eps, push = minority.Guide()(x, 0.4, level, noise, denoise)
    torch.testing.assert_close((x0, eps), denoise(x, 0.4))
    schedule = denoise.schedule
    again = denoise(schedule.alpha(level) * x0 + schedule.sigma(level) * noise, level)[0]

    def loss(state: Tensor) -> Tensor:
        return (denoise(state, 0.4)[0] - again).norm(dim=1)

    small = 1e-5 * torch.eye(2, dtype=torch.float64)
    slope = torch.stack([(loss(x + step) - loss(x - step)) / 2e-5 for step in small], 1)
    torch.testing.assert_close(push, slope / slope.abs().amax(1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_without_weight_it_is_the_ancestral_chain_bit_for_bit() -> None:
    batch, session = batch_of(40, (2,), 1), session_of("minority/rare_eps", guide=minority.Guide())
    method = minority.SelfGuidedMinority()
    assert method.steps(64) == 45
    method.weight = 0.0
    assert method.steps(64) == 64  # nothing else to pay for
    plain = module_of("ancestral").Ancestral().run(session, batch, 64)
    session.begin("run", 1)
    assert torch.equal(method.run(session, batch, 64), plain)


def test_guidance_finds_the_rare_among_the_data_and_pays_for_it() -> None:
    batch, session = batch_of(2000, (2,), 1), session_of("minority/rare_eps", guide=minority.Guide())
    session.begin("run", 1, 64 * 2000)
    found = minority.SelfGuidedMinority().run(session, batch, 64)
    asked = session._ledger.evaluations()
    assert asked == {"teacher": 2000 * (45 + 9), "guide": 2000 * 9}  # a pass backwards is an evaluation
    others = []
    for name in ("ancestral", "warm_ancestral", "pushed_outward", "pushed_at_random"):
        session.begin("run", 1, 64 * 2000)
        others.append(plugins.load_class(plugins.methods()[name])().run(session, batch, 64))
    task, rows = track_of("minority/rare_eps")[1], np.arange(2000)[None]
    figures = [track_of(task.id)[0].score(task, batch, points, {}, rows) for points in (found, *others)]
    guided, usual, warm, outward, shaken = ({name: score.value for name, score in each.items()} for each in figures)
    assert 0.004 < usual["minority_share"] < 0.03
    assert guided["minority_share"] > 3 * usual["minority_share"]
    assert guided["precision"] > 0.9
    assert guided["neighbour_distance"] > usual["neighbour_distance"]
    # of every kind; who pushes outwards finds as many, but never those that lie inside
    assert guided["rarest_share"] > 1.5 * max(each["rarest_share"] for each in (usual, warm, outward, shaken))
    assert outward["minority_share"] > guided["minority_share"] and outward["rarest_share"] < 0.002


def test_ancestral_steps_draw_from_the_posterior() -> None:
    """On Gaussian data the chain keeps the variance of the data, and forgets the noise that it began with."""
    batch, session = batch_of(4000, (2,), 1), session_of("minority/rare_eps", Gaussian())
    found = module_of("ancestral").Ancestral().run(session, batch, 800)
    assert float(found.std()) == pytest.approx(0.5, rel=0.02)
    start = torch.stack([found.flatten(), batch["noise"].flatten()])
    assert abs(float(torch.corrcoef(start)[0, 1])) < 0.05


def test_rare_points_are_as_rare_as_said_and_lie_apart() -> None:
    from stepmark.datasets import rare

    for name, digest in rare.DATASET.digests.items():
        assert digest_of(rare.split(name)) == digest
    points = rare.split("train")["x0"]
    share = float((rare.component_of(points) >= rare.COMMON).double().mean())
    assert share == pytest.approx(rare.SHARE, abs=4 * (rare.SHARE / len(points)) ** 0.5)
    # 98.9 % of a Gaussian in the plane is within three deviations; where components overlap, more
    assert 0.987 < float((rare.distances(points).min(1).values < 3).double().mean()) < 1


# --- brightness ------------------------------------------------------------------------------------------------------

zero_snr = module_of("zero_terminal_snr")


def test_the_rescaled_schedule_is_diffusers_own() -> None:
    """It ends in pure noise, keeps its first timestep, and agrees with `rescale_betas_zero_snr` of diffusers."""
    from diffusers import DDIMScheduler

    teacher = backbones.load("shades_eps")
    found = zero_snr.signal_of(teacher, True)
    betas = 1 - teacher.alphas_cumprod / torch.cat([torch.ones(1).double(), teacher.alphas_cumprod[:-1]])
    scheduler = DDIMScheduler(1000, trained_betas=betas.tolist(), rescale_betas_zero_snr=True)
    torch.testing.assert_close(found**2, scheduler.alphas_cumprod.double(), rtol=1e-3, atol=1e-6)
    assert found[-1] == 0 and float(found[0] ** 2) == pytest.approx(float(teacher.alphas_cumprod[0]))
    assert float(teacher.alphas_cumprod[-1]) > 0.05
    for n in (5, 7, 25):
        for spacing in ("trailing", "leading"):
            scheduler.config.timestep_spacing = spacing
            scheduler.set_timesteps(n)
            assert getattr(zero_snr, f"{spacing}_timesteps")(n, 1000) == scheduler.timesteps.tolist()


def test_guidance_is_scaled_back_to_the_conditional_deviation() -> None:
    draw = torch.Generator().manual_seed(2)
    null, conditional = (torch.randn(6, 1, 8, 8, generator=draw) for _ in range(2))
    guided = null + 5 * (conditional - null)
    torch.testing.assert_close(zero_snr.rescaled_guidance(null, conditional, 5.0, 0.0), guided)
    whole = zero_snr.rescaled_guidance(null, conditional, 5.0, 1.0)
    torch.testing.assert_close(whole.flatten(1).std(1), conditional.flatten(1).std(1))
    part = zero_snr.rescaled_guidance(null, conditional, 5.0, 0.7)
    torch.testing.assert_close(part, 0.7 * whole + 0.3 * guided)


class Named(nn.Module):
    """v = gain x, another gain for what has no name (-1)."""

    def __init__(self, null: float, conditional: float) -> None:
        super().__init__()
        self.null, self.conditional = null, conditional

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, -1)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return torch.where(condition < 0, self.null, self.conditional).view(-1, 1, 1, 1) * x


def test_guidance_leads_away_from_what_has_no_name_and_costs_two_rows() -> None:
    """Of gains .1 and .3, w = 5 makes 1.1; wholly scaled back it is the conditional one again."""
    batch, times = batch_of(4, (1, 8, 8), 3), zero_snr.trailing_timesteps(5, 1000)
    x, kinds = batch["noise"], batch["condition"]
    signal = zero_snr.signal_of(backbones.load("shades_eps"), True)
    for share, gain in ((0.0, 1.1), (1.0, 0.3)):
        guided = zero_snr.sample_v(Named(0.1, 0.3), signal, x, kinds, times, 5.0, share)
        torch.testing.assert_close(guided, zero_snr.sample_v(Named(0, gain), signal, x, kinds, times, 1.0, 0.0))
    session = session_of("class_to_image/shades", student=Named(0.1, 0.3))
    session.begin("run", 1, 5 * 4)
    plugins.load_class(plugins.methods()["zero_terminal_snr_guided"])().run(session, batch, 5)
    assert session._ledger.evaluations()["student"] == session.spent == 4 * 4


class Flat(nn.Module):
    """The exact v of pictures that are flat and of brightness N(0, 1/4), on a given schedule."""

    def __init__(self, signal: Tensor) -> None:
        super().__init__()
        self.signal = signal

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        alpha = self.signal[t.long()].view(-1, 1, 1, 1).to(x.dtype)
        variance = 1 - alpha**2
        mean = x.mean((1, 2, 3), keepdim=True) * alpha / 4 / (alpha**2 / 4 + variance / 64)
        x0 = mean.expand_as(x)
        eps = (x - alpha * x0) / variance.sqrt()
        return alpha * eps - variance.sqrt() * x0


def test_only_a_schedule_that_ends_in_noise_gives_the_brightness_of_the_data() -> None:
    """With exact networks: the flawed schedule narrows the spread of brightness, the fixed one keeps it."""
    teacher = backbones.load("shades_eps")
    flawed, fixed = teacher.alphas_cumprod.sqrt(), zero_snr.signal_of(teacher, True)
    (noise, kinds), steps = batch_of(4000, (1, 8, 8), 3).values(), zero_snr.trailing_timesteps(100, 1000)
    spread = [
        float(zero_snr.sample_v(Flat(signal), signal, noise, kinds, steps, 1.0, 0.0).mean((1, 2, 3)).std())
        for signal in (flawed, fixed)
    ]
    assert spread[1] == pytest.approx(0.5, rel=0.06)
    assert spread[0] < 0.85 * spread[1]


class FlatNoise(nn.Module):
    """What `Flat` predicts, as noise."""

    prediction = "epsilon"

    def __init__(self, signal: Tensor) -> None:
        super().__init__()
        self.v, self.alphas_cumprod = Flat(signal), signal**2

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        alpha = self.v.signal[t.long()].view(-1, 1, 1, 1).to(x.dtype)
        return (1 - alpha**2).sqrt() * x + alpha * self.v(x, t, condition)


def test_begun_where_training_ended_the_flawed_schedule_keeps_the_brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control without training: with an exact network the spread of brightness is whole, where pure noise narrows it."""
    network = FlatNoise(backbones.load("shades_eps").alphas_cumprod.sqrt())
    shades = torch.randn(5000, 1, 1, 1, generator=torch.Generator().manual_seed(5)).expand(-1, 1, 8, 8) / 2
    monkeypatch.setattr(Session, "train", property(lambda _: {"x0": shades}))
    spread = {}
    for name in ("ddim_offset", "ddim"):
        session, method = session_of("class_to_image/shades", network), plugins.load_class(plugins.methods()[name])()
        session.state = method.prepare(session) or {}
        found = method.run(session, batch_of(4000, (1, 8, 8), 3), 50)
        spread[name] = float(found.mean((1, 2, 3)).std())
    assert spread["ddim_offset"] == pytest.approx(0.5, rel=0.06)
    assert spread["ddim"] < 0.85 * spread["ddim_offset"]


def test_the_control_is_trained_alike_but_for_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw for draw the same training and sampling: given the fixed schedule, the control is `zero_terminal_snr` itself."""
    teacher, losses, samples = backbones.load("shades_eps"), [], []
    assert torch.allclose(zero_snr.signal_of(teacher, False), teacher.alphas_cumprod.sqrt())
    control, method = (
        plugins.load_class(plugins.methods()[name]) for name in ("trailing_finetuned", "zero_terminal_snr")
    )

    def both(plugin: Any) -> None:
        session = session_of("class_to_image/shades", student=teacher)
        session.begin("prepare", 7)
        names = type(plugin).prepare.__globals__
        monkeypatch.setitem(
            names, "fit", lambda session, network, loss, *_, **options: losses.append((loss(), options))
        )
        plugin.prepare(session)
        session.begin("run", 7, 50)
        samples.append(plugin.run(session, batch_of(10, (1, 8, 8), 3), 5))

    both(control())
    both(method())
    monkeypatch.setattr(control, "repaired", True)
    both(control())
    assert torch.equal(samples[2], samples[1]) and losses[2] == losses[1]
    assert not torch.allclose(samples[0], samples[1]) and losses[0][0] != losses[1][0]
    assert losses[0][1] == losses[1][1]
    bare = plugins.load_class(plugins.methods()["leading_finetuned"])
    both(bare())
    assert losses[3] == losses[0] and not torch.allclose(samples[3], samples[0])
    monkeypatch.setattr(bare, "grid", "trailing")
    both(bare())
    assert torch.equal(samples[4], samples[0])


class Knowing(nn.Module):
    """The exact v of one picture that is c all over, on a schedule told as sqrt(abar); nothing else has a loss of zero."""

    prediction = "epsilon"

    def __init__(self, signal: Tensor, c: float) -> None:
        super().__init__()
        self.signal, self.c, self.weight = signal, c, nn.Parameter(torch.zeros(()))

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        alpha = self.signal[t.long()].view(-1, 1, 1, 1)
        sigma = (1 - alpha**2).sqrt()
        return (alpha * (x.double() - alpha * self.c) / sigma - sigma * self.c).to(x.dtype) + self.weight


@pytest.mark.parametrize("repaired", [True, False])
def test_the_student_learns_v_on_its_schedule(repaired: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, c = backbones.load("shades_eps"), 0.7
    signal = zero_snr.signal_of(teacher, repaired)
    session = session_of("class_to_image/shades", teacher, student=Knowing(signal, c))
    session.begin("prepare", 7)
    flat = {"x0": torch.full((5, 1, 8, 8), c), "condition": torch.arange(5) % 3}
    monkeypatch.setattr(Session, "train", property(lambda _: flat))
    losses: list[Tensor] = []
    monkeypatch.setattr(zero_snr, "fit", lambda session, network, loss, *_, **options: losses.append(loss()))
    zero_snr.finetune_v(session, repaired)
    assert losses[0].item() < 1e-6


def test_the_grid_alone_is_ddim_that_begins_below_the_last_timestep() -> None:
    """The last control: the untouched teacher, told 800, 600 ... 0 where the trailing grid begins at 999."""
    control = plugins.load_class(plugins.methods()["ddim_leading"])()
    network, batch = Gaussian(), batch_of(3, (1, 8, 8), 3)
    session = session_of("class_to_image/shades", network)
    assert control.networks(session) == {} and control.prepare(session) is None
    found = control.run(session, batch, 5)
    assert [float(t[0]) for _, t in network.asked] == pytest.approx([800, 600, 400, 200, 0], abs=1e-3)
    x = batch["noise"]
    for t, s in pairwise([0.801, 0.601, 0.401, 0.201, 0.001, 0.0]):
        eps = network.gain(t) * x
        x = SCHEDULE.alpha(s) * (x - SCHEDULE.sigma(t) * eps) / SCHEDULE.alpha(t) + SCHEDULE.sigma(s) * eps
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def test_pictures_of_shades_are_what_they_say() -> None:
    from stepmark.datasets import shades as data

    for name, digest in data.DATASET.digests.items():
        assert digest_of(data.split(name)) == digest
    pictures = data.split("train")
    background = pictures["x0"].flatten(1).mode(1).values
    assert float(background.std()) == pytest.approx(3**-0.5, rel=0.02)
    marked = (pictures["x0"] != background.view(-1, 1, 1, 1)).sum((1, 2, 3))
    assert torch.equal(marked, torch.tensor([9, 5, 8])[pictures["condition"]])
    assert pictures["x0"].abs().max() <= 1
    (track, task), rows = track_of("class_to_image/shades"), np.arange(2000)[None]
    real = track.score(task, {}, data.split("reference")["x0"][:2000], {}, rows)
    grey = track.score(task, {}, 0.5 * data.split("reference")["x0"][:2000], {}, rows)
    away = float(data.split("reference")["x0"].mean((1, 2, 3)).abs().mean()) / 2
    assert real["w1_brightness"].value < 0.02
    assert grey["w1_brightness"].value == pytest.approx(away, abs=0.01)
    assert real["w1_brightness"].resamples == [real["w1_brightness"].value]


# --- told where to jump ----------------------------------------------------------------------------------------------


jumps = module_of("imm_inference_first")


class GaussianFlow(nn.Module):
    """The exact velocity of data N(0, 1/4): x_s = x_t deviation(s) / deviation(t), along lines that bend."""

    prediction = "flow"

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        t = t.view(-1, 1)
        return (t - (1 - t) / 4) / ((1 - t) ** 2 / 4 + t**2) * x


def deviation(t: Tensor) -> Tensor:
    """Standard deviation of x_t."""
    return ((1 - t) ** 2 / 4 + t**2).sqrt()


class Exact(nn.Module):
    """u* of the Gaussian flow."""

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Tensor) -> Tensor:
        return ((1 - deviation(s) / deviation(t)) / (t - s))[:, None] * x


def test_jumps_with_the_exact_mean_velocity_are_exact_on_any_grid() -> None:
    batch = batch_of(50, (2,), 2)
    noise, condition = batch["noise"].double(), batch["condition"]
    for grid in ([1.0, 0.0], [1.0, 0.7, 0.1, 0.0]):
        torch.testing.assert_close(jumps.take_jumps(Exact(), noise, condition, grid), noise / 2)
    denoise, times = solvers.Denoiser(GaussianFlow(), condition), schedules.quadratic_times(96)
    paths = jumps.flow_paths(denoise, noise, times)
    scale = deviation(torch.tensor(times, dtype=torch.float64))
    torch.testing.assert_close(paths, scale[:, None, None] * noise, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["imm_inference_first", "imm_target_blind"])
def test_jumps_are_of_equal_length(name: str) -> None:
    asked: list[tuple[float, float]] = []

    class Asked(Exact):
        def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Tensor) -> Tensor:
            asked.append((float(t[0]), float(s[0])))
            return super().forward(x, t, s, condition)

    session, batch = session_of("sampling/mixtures_flow", jumps=Asked()), batch_of(6, (2,), 2)
    session.begin("run", 1, 6 * 4)
    found = plugins.load_class(plugins.methods()[name])().run(session, batch, 4)
    torch.testing.assert_close(found, batch["noise"] / 2)
    assert asked == [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]


@torch.no_grad()
def test_the_method_is_told_where_a_jump_ends_and_its_control_is_not() -> None:
    session, x = session_of("sampling/mixtures_flow"), torch.ones(2, 2)
    session.begin("prepare", 1)
    for name, heeds in (("imm_inference_first", True), ("imm_target_blind", False)):
        network = plugins.load_class(plugins.methods()[name])().networks(session)["jumps"]
        out = network(x, torch.full((2,), 0.8), torch.tensor([0.1, 0.7]), torch.zeros(2, dtype=torch.int64))
        assert torch.allclose(out[0], out[1]) != heeds


def test_told_the_target_a_network_learns_the_jump_and_untold_the_mean_of_all() -> None:
    """After the same regression on a known flow: one is near u*, the other near its mean over s."""
    session, steps = session_of("sampling/mixtures_flow", GaussianFlow()), 300
    session.tier = "embedded"
    networks = {}
    for aware in (True, False):
        session.begin("prepare", 4)
        torch.manual_seed(0)
        networks[aware] = jumps.JumpMLP(2, aware, width=64)
        jumps.fit_jumps(session, networks[aware], steps, batch=256)
    grid = torch.tensor(schedules.quadratic_times(96))
    batch, x = batch_of(400, (2,), 2, seed=8), None
    for first in (0, 30):
        t = grid[first].expand(400)
        x = batch["noise"] * deviation(grid[first])
        late = torch.arange(first + 1, len(grid))
        weights = torch.where(late == first + 1, 1.0, 2.0)  # a pair of different places is drawn in two orders
        exact = torch.stack([Exact()(x, t, grid[k].expand(400), batch["condition"]) for k in late])
        mean = (weights[:, None, None] * exact).sum(0) / weights.sum()
        with torch.no_grad():
            told, untold = (
                torch.stack([networks[aware](x, t, grid[k].expand(400), batch["condition"]) for k in late])
                for aware in (True, False)
            )
        assert torch.equal(untold, untold[:1].expand_as(untold))
        assert (untold[0] - mean).square().mean() < 0.1 * (exact - mean).square().mean()
        assert (told - exact).square().mean() < 0.2 * (untold - exact).square().mean()
