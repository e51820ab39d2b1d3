"""What is done with a few-step student: it is tuned by pairs, led by its teacher, helped out by it, and shares steps with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import lru_cache
from itertools import pairwise
from queue import Queue
from typing import Any

import pytest
import torch
from rigs.images import idle_session, method_of, module_of, ran
from torch import Tensor, nn
from torch.distributions import Normal

from stepmark import backbones
from stepmark.backbones.scenes import scaled_linear
from stepmark.backbones.scenes_judges import LOGITS
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of, uniform_times
from stepmark.tracks.scenes.captions import BACKGROUNDS, tokens
from stepmark.tracks.text_to_image.consistency import boundary, sample, sample_times
from stepmark.tracks.text_to_image.search import judged

torch.set_num_threads(1)

EPS, PASTEL = "text_to_image/scenes_eps", "text_to_image/scenes_pastel"
pso, hybrid = module_of("pso"), module_of("hybrid_sd")


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A train split of a dozen scenes, which take no time to draw."""
    draw = torch.Generator().manual_seed(2)
    text = [f"a circle on {BACKGROUNDS[i % 2]}" for i in range(12)]
    split = {"x0": torch.rand(12, 3, 32, 32, generator=draw) * 2 - 1, "tokens": tokens(text), "text": text}
    monkeypatch.setattr("stepmark.session.load_split", lambda *_: split)


# --- networks that are known exactly -----------------------------------------------------------------------------------


class Certain(nn.Module):
    """A network of noise that is sure of one picture, all of whose values are `value`, and leans on what it sees; keeps what it
    was asked."""

    prediction = "epsilon"

    def __init__(self, value: float, lean: float = 0.0) -> None:
        super().__init__()
        self.value, self.lean = nn.Parameter(torch.tensor(value)), lean
        self.alphas_cumprod = scaled_linear()
        self.asked: list[tuple[Tensor, float]] = []

    def words(self, ids: Tensor) -> Tensor:
        return ids.float()[:, :, None]

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.zeros_like(condition)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None) -> Tensor:
        self.asked.append((x.detach().clone(), float(t.flatten()[0])))
        schedule, t = schedule_of(self), (t.view(-1, 1, 1, 1) + 1) / 1000
        return (x - schedule.alpha(t) * (self.value + self.lean * x)) / schedule.sigma(t)


class Shown(nn.Module):
    """A decoder that changes nothing and keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, z: Tensor) -> Tensor:
        self.shown.append(z.clone())
        return z


class Taste(nn.Module):
    """A reader that believes in the first background the more, the brighter a picture is."""

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), LOGITS)
        logits[:, -len(BACKGROUNDS)] = 50 * x.mean((1, 2, 3))
        return logits


@lru_cache
def _built(name: str) -> nn.Module:
    return backbones.recipe(name).build()


def built(name: str) -> nn.Module:
    """A network with its first weights."""
    return deepcopy(_built(name))


def wishes(n: int, seed: int = 3) -> dict[str, Tensor]:
    """Noises, and captions that ask for the background that `Taste` looks for."""
    noise = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"noise": noise, "condition": tokens([f"a circle on {BACKGROUNDS[0]}"] * n)}


def toys(**others: nn.Module) -> Any:
    """A session with a teacher that draws nines, a student whose pictures hang on the noise, and a reward."""
    have = {"teacher": Certain(9.0), "student": Certain(0.0, lean=0.1), "vae": Shown(), "reward": Taste()}
    return idle_session(EPS, **(have | others))


def times_of(network: Any) -> list[float]:
    """Where a network was asked, as times in [0, 1]."""
    return [(t + 1) / 1000 for _, t in network.asked]


def liked(pictures: Tensor, condition: Tensor) -> Tensor:
    """What `Taste` thinks of pictures: [n]."""
    return judged(toys(), pictures, condition)[0]


# --- PSO ---------------------------------------------------------------------------------------------------------------


def test_the_loss_of_online_pairs_is_that_of_the_normal_likelihoods_of_its_moves() -> None:
    """All moves but the last, against the frozen student, with the ratio cut off; a tie pulls nowhere."""
    network, reference = Certain(0.12, 0.31), Certain(0.0, 0.3)
    session, states, schedule = toys(), torch.zeros(6, 1, 1), schedule_of(reference)
    session.begin("prepare", 4)
    points = pso.path(session, network, states)
    points[1][0] += 4  # far from where the networks lead, so that a ratio is cut off
    prefer = torch.tensor([1.0, -1.0, 0.0])
    losses, cuts = [], 0
    for (x, after), (t, s) in zip(pairwise(points[:-1]), pairwise(sample_times(4)), strict=True):
        ratios = []
        for each in (network, reference):
            with torch.no_grad():
                skip, out = boundary(schedule, torch.tensor([t]))
                end = skip * x + out * (each.value + each.lean * x)
            ratios.append(Normal(schedule.alpha(s) * end, schedule.sigma(s)).log_prob(after).flatten(1).mean(1))
        ratio = (ratios[0] - ratios[1]).exp()
        cuts += int((ratio.clamp(0.9, 1.1) != ratio).sum())
        first, second = ratio.clamp(0.9, 1.1).log().chunk(2)
        losses.append((1 + (-50.0 * prefer * (first - second)).exp()).log().mean())
    found = pso.moves_loss(network, reference, points, states, prefer)
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)
    assert 0 < cuts < 6
    tied = pso.moves_loss(network, reference, points, states, torch.zeros(3))
    assert float(tied.detach()) == pytest.approx(math.log(2))


def offline(value: float, target: Tensor, other: Tensor, t: Tensor, noise: Tensor) -> tuple[float, float]:
    """The loss of offline pairs and its slope along the picture that the network is sure of; the frozen one is sure of 0.1."""
    network = Certain(value)
    loss = pso.pair_loss(network, Certain(0.1), target, other, torch.zeros(len(t), 1, 1), t, noise)
    loss.backward()
    assert network.value.grad is not None
    return float(loss.detach()), float(network.value.grad)


def test_offline_pairs_pull_towards_the_target_as_far_as_the_frozen_student_lets_them() -> None:
    """A network that is sure of v errs by (alpha / sigma)^2 (x0 - v)^2: loss and slope are known."""
    draw, schedule = torch.Generator().manual_seed(6), schedule_of(Certain(0.0))
    target, other, noise = (torch.randn(5, 4, 8, 8, generator=draw) for _ in range(3))
    t = torch.tensor([*sample_times(4), 0.5])
    scale = (schedule.alpha(t) / schedule.sigma(t)).square()

    def gain(x0: Tensor, v: float) -> Tensor:
        return scale * ((x0 - 0.1).square() - (x0 - v).square()).flatten(1).mean(1)

    for v in (0.1, 0.13):
        margin = gain(target, v) - gain(other, v)
        wanted = (1 + (-200 * margin).exp()).log().mean()
        slope = -200 * (torch.sigmoid(-200 * margin) * 2 * scale * (target - other).flatten(1).mean(1)).mean()
        found = offline(v, target, other, t, noise)
        assert found == pytest.approx((float(wanted), float(slope)), rel=1e-3)


def test_what_both_pictures_have_in_common_pulls_nothing() -> None:
    """The loss of diffusion pulls to a picture that is the same in both; pairs do not."""
    draw = torch.Generator().manual_seed(7)
    same, noise = (torch.randn(3, 4, 8, 8, generator=draw) + mean for mean in (2, 0))
    t = torch.tensor([0.3, 0.5, 0.9])
    assert offline(0.3, same, same, t, noise) == pytest.approx((math.log(2), 0.0), abs=1e-5)
    network = Certain(0.3)
    pso.error(network, same, noise, t, torch.zeros(3, 1, 1)).mean().backward()
    assert network.value.grad is not None and float(network.value.grad) < -1


def test_the_target_of_a_pair_is_what_the_reward_likes_better() -> None:
    session, method = toys(), method_of("pso_offline")
    session.begin("prepare", 4)
    target, other, states = method.gathered(session, Certain(0.0, lean=0.1), style=False)
    asked = states[:, :, 0].long()
    assert bool((judged(session, target, asked) >= judged(session, other, asked)).all())
    assert not torch.equal(target, other)
    sides = {bool(v > 0) for v in method_of("pso_random").preferred(session, target.repeat(9, 1, 1, 1), other, asked)}
    assert sides == {True, False}


class Coded(Shown):
    """The same, with an encoder that takes every fourth pixel."""

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, :1]], 1)[..., ::4, ::4]


def test_of_a_style_the_target_is_a_picture_of_it_and_the_other_what_the_frozen_student_draws() -> None:
    session, reference = toys(vae=Coded()), Certain(0.0, lean=0.1)
    session.begin("prepare", 4)
    train = session.train
    target, other, states = method_of("pso").gathered(session, reference, style=True)
    assert len(target) == len(other) == 4
    encoded, captions = session.networks["vae"].encode(train["x0"]), reference.words(train["tokens"])
    for picture, caption in zip(target, states, strict=True):
        row = int((encoded - picture).abs().flatten(1).amax(1).argmin())
        assert torch.equal(encoded[row], picture) and torch.equal(captions[row], caption)
    session.begin("prepare", 4)
    torch.randperm(12, generator=session.rng)  # whose pictures
    assert torch.equal(other, pso.path(session, reference, states)[-1])


@pytest.mark.parametrize("name", ["pso", "pso_offline", "pso_diffusion"])
def test_a_student_is_tuned_in_its_attention_alone_at_its_own_times(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of a pair are noised alike; only the loss of diffusion goes to all times."""
    method, asked = method_of(name), []
    networks = {role: built(f"scenes_{part}") for role, part in PARTS.items()}
    session = idle_session(EPS, **networks)
    session.begin("prepare", 4)
    session.networks["student"] = session.clone("teacher")
    before = session.clone("teacher").state_dict()
    monkeypatch.setattr(session, "once", lambda *_: before)
    plain, inside = pso.error, type(method).prepare.__globals__

    def error(network: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, states: Tensor) -> Tensor:
        asked.append((noise, t))
        return plain(network, x0, noise, t, states)

    monkeypatch.setitem(inside, "error", error)
    method.updates = (1, 3)
    method.prepare(session)
    after = session.networks["student"].state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed and all(".attn" in key for key in changed)
    own = all(any(abs(v - t) < 1e-6 for t in sample_times(4)) for _, t in asked for v in t.tolist())
    assert own == (name != "pso_diffusion")
    if name == "pso_offline":
        assert all(torch.equal(*noise.chunk(2)) and torch.equal(*t.chunk(2)) for noise, t in asked)
    assert (name == "pso") == (not asked)
    assert all(len(t) == 4 for _, t in asked)  # two pairs, or as many rows


PARTS = {"teacher": "eps", "vae": "vae", "reward": "reward"}


# --- Distillation++ ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rung", [4, 8])
def test_the_teacher_leads_by_one_step_of_descent_on_the_loss_of_score_distillation(rung: int) -> None:
    """The student is asked next at what this step gives, noised; the teacher saw the student's first estimate at that time."""
    session, batch, method = toys(teacher=Certain(0.5, 0.2)), wishes(5), method_of("distillation_pp")
    student, teacher, schedule = session.networks["student"], session.networks["teacher"], schedule_of(Certain(0.0))
    _, spent = ran(session, method, batch, rung)
    assert spent == rung
    times = sample_times(rung - 2)
    assert times_of(student) == pytest.approx(times) and times_of(teacher) == pytest.approx([times[1]])
    s, draw = times[1], torch.Generator().manual_seed(5)
    alpha, sigma = schedule.alpha(s), schedule.sigma(s)
    first, second = (torch.randn(5, 4, 8, 8, generator=draw) for _ in range(2))
    x0 = 0.1 * batch["noise"]  # what the student predicts
    x_s = alpha * x0 + sigma * first
    torch.testing.assert_close(teacher.asked[0][0], x_s.repeat(2, 1, 1, 1), rtol=1e-4, atol=1e-4)
    estimate = 0.5 + 0.2 * x_s
    at = x0.clone().requires_grad_(True)
    ((alpha / sigma) ** 2 * (at - estimate).square()).sum().backward()
    assert at.grad is not None
    descended = x0 - 0.5 * method.weight * (sigma / alpha) ** 2 * at.grad
    torch.testing.assert_close(student.asked[1][0], alpha * descended + sigma * second, rtol=1e-3, atol=1e-3)


def test_without_a_look_it_is_the_student_with_two_evaluations_less() -> None:
    session, batch = toys(), wishes(3)
    found, spent = ran(session, method_of("distillation_pp_fewer"), batch, 8)
    session.begin("run", 5)
    student = session.networks["student"]
    torch.testing.assert_close(found, sample(student, batch, 6, session.rng, 3.0, schedule_of(student)))
    assert spent == 6 and not session.networks["teacher"].asked


def test_ablations_ask_elsewhere_and_the_control_asks_the_student() -> None:
    times = sample_times(6)
    for name, wanted in {"same": times[0], "late": times[5]}.items():
        session = toys()
        assert ran(session, method_of(f"distillation_pp_{name}"), wishes(3), 8)[1] == 8
        assert times_of(session.networks["teacher"]) == pytest.approx([wanted])
    session = toys()
    assert ran(session, method_of("distillation_pp_self"), wishes(3), 8)[1] == 8
    times = sample_times(7)
    assert times_of(session.networks["student"]) == pytest.approx([times[0], times[1], *times[1:]])
    assert not session.networks["teacher"].asked


# --- adaptive collaboration ----------------------------------------------------------------------------------------------


def collaboration(name: str, tau: float, rung: int = 16, n: int = 20) -> tuple[Tensor, Tensor, Tensor, float, Any]:
    """Pictures, those of the student alone, what the reward thinks of these, evaluations, and the session."""
    session, batch = toys(), wishes(n)
    session.state = {"threshold": torch.tensor(tau)}
    found, spent = ran(session, method_of(name), batch, rung)
    asked = list(session.networks["teacher"].asked)
    session.begin("run", 5)
    student = session.networks["student"]
    alone = sample(student, batch, 4, session.rng, 3.0, schedule_of(student))
    session.networks["teacher"].asked[:] = asked
    return found, alone, liked(alone, batch["condition"]), spent, session


@pytest.mark.parametrize("kind", ["all", "some", "none"])
def test_the_worst_below_the_threshold_are_refined_and_the_others_stand(kind: str) -> None:
    """As many as the batch can pay for, where more are below; the teacher here draws nines."""
    low = collaboration("adaptive_ts_collab", -1e9)[2].sort().values
    tau = {"all": 1e9, "some": float(low[3] + low[4]) / 2, "none": -1e9}[kind]
    found, alone, score, spent, _ = collaboration("adaptive_ts_collab", tau)
    count = {"all": 10, "some": 4, "none": 0}[kind]
    refined = (found - 9).abs().flatten(1).amax(1) < 1e-4
    assert refined.nonzero().flatten().tolist() == sorted(score.argsort()[:count].tolist())
    assert torch.equal(found[~refined], alone[~refined])
    assert spent == 6 + 20 * count / 20


def test_refining_starts_from_the_student_s_picture_at_the_rollback_time() -> None:
    _, alone, score, _, session = collaboration("adaptive_ts_collab", 1e9, rung=32)
    teacher = session.networks["teacher"]
    assert times_of(teacher) == pytest.approx(uniform_times(26, 0.7)[:-1])
    worst, schedule = score.argsort()[:10], schedule_of(teacher)
    session.begin("run", 5)
    sample(session.networks["student"], wishes(20), 4, session.rng, 3.0, schedule)  # whose noise comes first
    fresh = torch.randn(10, 4, 8, 8, generator=session.rng)
    wanted = schedule.alpha(0.7) * alone[worst] + schedule.sigma(0.7) * fresh
    torch.testing.assert_close(teacher.asked[0][0][:10], wanted)
    again = collaboration("adaptive_ts_collab_regenerate", 1e9, rung=32)[4].networks["teacher"]
    assert times_of(again) == pytest.approx(uniform_times(26)[:-1])
    torch.testing.assert_close(again.asked[0][0][:10], wishes(20)["noise"][worst])


def test_the_teacher_s_solver_is_that_of_the_baseline() -> None:
    """Regenerated pictures are to the last step those of second-order DPM-Solver++ from the same noise; half are left."""

    def session() -> Any:
        return toys(teacher=Certain(0.4, 0.3))

    batch, first = wishes(20), session()
    first.state = {"threshold": torch.tensor(1e9)}
    found, _ = ran(first, method_of("adaptive_ts_collab_regenerate"), batch, 32)
    wanted, _ = ran(session(), method_of("dpm_guided"), batch, 2 * 26)
    assert int(((found - wanted).abs().flatten(1).amax(1) < 1e-4).sum()) == 10


def test_the_controls_reject_by_lot_refine_all_or_try_again() -> None:
    found, alone, score, spent, session = collaboration("adaptive_ts_collab_random", 0.5, n=40)
    refined = (found - 9).abs().flatten(1).amax(1) < 1e-4
    assert not session.networks["vae"].shown and 10 <= int(refined.sum()) <= 20
    assert set(refined.nonzero().flatten().tolist()) != set(score.argsort()[: int(refined.sum())].tolist())
    assert spent == 4 + 24 * int(refined.sum()) / 40
    found, _, _, spent, _ = collaboration("adaptive_ts_collab_always", 1.0)
    assert spent == 16 and bool(((found - 9).abs() < 1e-4).all())
    found, alone, score, spent, session = collaboration("adaptive_ts_collab_redraw", 1e9)
    after = liked(found, wishes(20)["condition"])
    assert not session.networks["teacher"].asked and spent == 6 + 3 * 6 / 2
    assert bool((after >= score).all()) and bool((after > score)[score.argsort()[:10]].any())
    assert torch.equal(found[score.argsort()[10:]], alone[score.argsort()[10:]])


def test_the_threshold_is_the_median_of_the_student_s_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    session, method, scores = toys(), method_of("adaptive_ts_collab"), []
    session.begin("prepare", 4)
    monkeypatch.setattr(session, "once", lambda *_: session.networks["student"].state_dict())
    monkeypatch.setattr(session, "scale", lambda embedded, smoke: 9)
    plain = type(method).draw

    def draw(*arguments: Any) -> Any:
        scores.append(plain(*arguments)[1])
        return None, scores[-1]

    monkeypatch.setattr(type(method), "draw", draw)
    found = method.prepare(session)["threshold"]
    assert float(found) == float(torch.cat(scores).median()) and len(torch.cat(scores)) == 9


# --- Hybrid SD -----------------------------------------------------------------------------------------------------------


class Line:
    """Two ranks in two threads, and the bytes that each sends."""

    size = 2

    def __init__(self, rank: int, boxes: list[Queue[Tensor]], sent: list[int]) -> None:
        self.rank, self.boxes, self.sent = rank, boxes, sent

    def spread(self, what: Tensor, source: int) -> Tensor:
        if self.rank != source:
            return self.boxes[source].get(timeout=20)
        self.sent[self.rank] += what.numel() * what.element_size()
        self.boxes[source].put(what.clone())
        return what


def on_two(
    method: Any, session: Callable[[], Any], batch: dict[str, Tensor], rung: int
) -> tuple[Tensor, list[Any], list[int]]:
    """What rank 0 returns, the sessions of both ranks, and what each sent."""
    boxes: list[Queue[Tensor]] = [Queue(), Queue()]
    sent, sessions = [0, 0], [session(), session()]

    def run(rank: int) -> Tensor:
        sessions[rank].group = Line(rank, boxes, sent)
        return ran(sessions[rank], method, batch, rung)[0]

    with ThreadPoolExecutor(2) as threads:
        return next(iter(threads.map(run, range(2)))), sessions, sent


@pytest.mark.parametrize("name", ["hybrid_sd", "hybrid_sd_reversed"])
@pytest.mark.parametrize("rung", [4, 16, 32])
def test_on_two_processes_each_network_makes_its_part_of_one_path(name: str, rung: int) -> None:
    """Of two networks that are the same the picture is that of one, to the bit: nothing of the solver is lost on the way."""
    batch = wishes(3)
    found, sessions, sent = on_two(
        method_of(name), lambda: toys(teacher=Certain(0.4, 0.3), edge=Certain(0.4, 0.3)), batch, rung
    )
    assert torch.equal(found, ran(toys(teacher=Certain(0.4, 0.3)), method_of("dpm_guided"), batch, rung)[0])
    cloud = {4: 1, 16: 2, 32: 5}[rung]
    device = rung // 2 - cloud
    edge, teacher = sessions[0].networks["edge"], sessions[1].networks["teacher"]
    assert not sessions[0].networks["teacher"].asked and not sessions[1].networks["edge"].asked
    times, first = uniform_times(rung // 2)[:-1], name == "hybrid_sd"
    assert times_of(teacher) == pytest.approx(times[:cloud] if first else times[device:])
    assert times_of(edge) == pytest.approx(times[cloud:] if first else times[:device])
    assert sent == ([0, 3 * 2048] if first else [3 * 2048, 3 * 1024])
    alone = toys(teacher=Certain(0.4, 0.3), edge=Certain(0.4, 0.3))
    together, spent = ran(alone, method_of(name), batch, rung)
    assert torch.equal(together, found) and spent == rung


def test_single_networks_make_all_steps_or_only_those_of_the_cloud() -> None:
    batch = wishes(3)
    session = toys(teacher=Certain(0.4, 0.3), edge=Certain(0.1, 0.2))
    found, spent = ran(session, method_of("hybrid_sd_edge"), batch, 16)
    assert (
        torch.equal(found, ran(toys(teacher=Certain(0.1, 0.2)), method_of("dpm_guided"), batch, 16)[0]) and spent == 16
    )
    found, spent = ran(session, method_of("hybrid_sd_short"), batch, 32)
    assert (
        torch.equal(found, ran(toys(teacher=Certain(0.4, 0.3)), method_of("dpm_guided"), batch, 10)[0]) and spent == 10
    )


def painter() -> Any:
    return built("scenes_eps").requires_grad_(False)


def asked(network: nn.Module) -> Tensor:
    """What a network says to two latents."""
    draw = torch.Generator().manual_seed(1)
    return network(
        torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([300.0, 800.0]), torch.randn(2, 32, 64, generator=draw)
    )


def test_heads_that_give_nothing_can_be_cut_and_channels_are_kept_by_their_norm() -> None:
    network = painter()
    for name, layer in hybrid.units(network).items():
        if "attn" in name:
            layer.to_out[0].weight[:, 16:] = 0  # all but the first four of sixteen heads
    less = deepcopy(network)
    for name, layer in hybrid.units(less).items():
        if "attn" in name:
            hybrid.cut(layer, hybrid.share_of(layer, 0.25))
    torch.testing.assert_close(asked(less), asked(network), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in less.parameters()) < sum(p.numel() for p in network.parameters())
    block = next(layer for layer in hybrid.units(network).values() if hasattr(layer, "conv1"))
    strong = block.conv1.weight.flatten(1).norm(dim=1) >= block.conv1.weight.flatten(1).norm(dim=1).sort().values[-32]
    small = hybrid.cut(deepcopy(block), 32)
    for kept, whole in (
        (small.conv1, block.conv1),
        (small.time_emb_proj, block.time_emb_proj),
        (small.norm2, block.norm2),
    ):
        assert torch.equal(kept.weight, whole.weight[strong]) and torch.equal(kept.bias, whole.bias[strong])
    assert torch.equal(small.conv2.weight, block.conv2.weight[:, strong])


def trained() -> tuple[Session, dict[str, Tensor]]:
    session = idle_session(EPS, teacher=painter(), vae=built("scenes_vae"))
    session.begin("prepare", 4)
    return session, hybrid.pruned(session, 2)


def test_a_pruned_network_is_small_where_it_matters_least_and_fits_where_its_weights_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [name for name in hybrid.units(painter()) if not name.startswith("mid_block")]
    monkeypatch.setattr(hybrid, "scores", lambda session: {name: float(i) for i, name in enumerate(names)})
    session, weights = trained()
    fresh = hybrid.fitting(painter())
    fresh.load_state_dict(weights)
    assert all(torch.equal(value, weights[key]) for key, value in fresh.state_dict().items())
    shares = [hybrid.size(layer) / (16 if "attn" in name else 64) for name, layer in hybrid.units(fresh).items()]
    assert shares == [0.25] * 12 + [0.5] * 1 + [0.75] * 5
    assert asked(fresh).shape == (2, 4, 8, 8) and fresh.unet.mid_block is None
    moved = {key for key, value in painter().state_dict().items() if ".conv_" in key and (weights[key] != value).any()}
    assert {"unet.conv_in.weight", "unet.conv_out.weight"} <= moved  # what is left has learned
    session.networks["edge"] = fresh
    session.networks["edge"].load_state_dict(weights)  # once more, of the same size


def test_significance_is_how_far_pictures_move_without_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that gives nothing has none, and the network is whole again after every trial."""
    network = painter()
    idle = "up_blocks.1.attentions.1.transformer_blocks.0.attn1"
    hybrid.units(network)[idle].to_out[0].weight.zero_()
    session = idle_session(EPS, teacher=network)
    session.begin("prepare", 4)
    sizes: list[int] = []
    plain = hybrid.cut

    def cut(layer: Any, keep: int) -> Any:
        sizes.append(keep)
        return plain(layer, keep)

    monkeypatch.setattr(hybrid, "cut", cut)
    found = hybrid.scores(session)
    assert found.pop(idle) == pytest.approx(0, abs=1e-5) and min(found.values()) > 1e-4 and len(found) == 17
    assert sorted(set(sizes)) == [8, 32]
    whole, less = torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[3.0, 5.0], [3.0, 5.0]])
    assert hybrid.significance(whole, less) == pytest.approx(math.hypot(2, 4) + 1)


def test_it_learns_from_the_data_the_teacher_s_prediction_and_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the teacher has nothing to learn but the data; another has six things to."""
    losses: list[float] = []

    def descend(session: Session, learned: list[nn.Parameter], updates: int, rate: float) -> Any:
        for _ in range(updates):
            yield lambda loss: losses.append(float(loss.detach()))

    monkeypatch.setattr(hybrid, "descend", descend)
    plain, parts = hybrid.mse_loss, []

    def mse_loss(a: Tensor, b: Tensor) -> Tensor:
        parts.append((a, plain(a, b)))
        return parts[-1][1]

    monkeypatch.setattr(hybrid, "mse_loss", mse_loss)
    session = idle_session(EPS, teacher=painter(), vae=built("scenes_vae"))
    teacher: Any = session.networks["teacher"]
    same, other = painter(), painter()
    other.unet.down_blocks[0].resnets[0].conv2.bias += 0.1
    for edge in (same, other):
        parts.clear()
        session.begin("prepare", 4)
        hybrid.recover(session, edge, 1)
        values = sorted(float(value) for _, value in parts)
        assert losses[-1] == pytest.approx(sum(values)) and len(values) == 6
        assert [value == 0 for value in values[:-1]] == [edge is same] * 5 and values[-1] > 0.5  # the last: the noise
        assert sorted(a.shape[1] for a, _ in parts) == [4, 4, 64, 64, 64, 64]
    assert not teacher.unet.down_blocks[0]._forward_hooks
