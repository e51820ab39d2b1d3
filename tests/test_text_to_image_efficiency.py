"""Text to image: fixes without training, caches, integers and small adapters."""

from __future__ import annotations

import itertools
from copy import deepcopy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from rigs.images import idle_session, method_of, module_of, ran
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stepmark import backbones
from stepmark.backbones.scenes import scaled_linear
from stepmark.meter.counts import watch
from stepmark.session import Session
from stepmark.tracks.image.schedules import schedule_of, uniform_times
from stepmark.tracks.image.solvers import ddim_coefficients, ddim_step
from stepmark.tracks.scenes.captions import VOCABULARY, tokens
from stepmark.tracks.text_to_image.adapters import merge
from stepmark.tracks.text_to_image.sampling import GuidedByCaption

torch.set_num_threads(1)

EPS, FLOW, PASTEL = "text_to_image/scenes_eps", "text_to_image/scenes_flow", "text_to_image/scenes_pastel"
oms, zero, speedup, ecad, mixdq, lora = (
    module_of(name) for name in ("oms", "t2i_zero", "speedupnet", "ecad", "mixdq", "lora_guided_distill")
)
TEXTS = ["a small red circle and a blue square at top", "a star on white"]


def words(ids: Tensor) -> Tensor:
    """States of captions that say nothing."""
    return torch.zeros(len(ids), 32, 64)


class Bell(nn.Module):
    """The exact noise prediction for data N(2, 1/4), whatever the caption."""

    prediction = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        self.alphas_cumprod, self.words = scaled_linear(), words

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.zeros_like(condition)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        schedule = schedule_of(self)
        alpha, sigma = (each((t + 1) / schedule.steps).view(-1, 1, 1, 1) for each in (schedule.alpha, schedule.sigma))
        return sigma * (x - 2 * alpha) / (alpha**2 / 4 + sigma**2)


class Constant(Bell):
    """eps = 1 everywhere: paths on which one step of DDIM is as good as many."""

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return torch.ones_like(x)


def training(task: str, method: Any = None, **networks: nn.Module) -> Session:
    """A smoke session in which `prepare` may begin, with the untrained networks of a method where given."""
    session = idle_session(task, **networks)
    session.begin("networks", 1)
    for name, network in (method.networks(session) if method else {}).items():
        session.networks[name] = watch(session._ledger, name, network)
    session.advance("prepare")
    return session


def batch_of(texts: list[str], seed: int = 3) -> dict[str, Tensor]:
    noise = torch.randn(len(texts), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"noise": noise, "condition": tokens(texts)}


@pytest.fixture(scope="module")
def teacher() -> Any:
    return backbones.load("scenes_eps")


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A train split of a few captions."""
    texts = [*TEXTS, "a red circle as pastel and no blue star", "a cross and no plain ring"]
    data = {"text": texts, "tokens": tokens(texts), "x0": torch.zeros(4, 3, 32, 32)}
    monkeypatch.setattr(Session, "train", property(lambda self: data))


# One More Step -------------------------------------------------------------------------------------------------------


def test_one_more_step_leaves_the_noise_that_the_schedule_has() -> None:
    one, none, alpha = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 0.0683
    assert float(oms.one_more_step(one, none, none, alpha, 0.3)) == pytest.approx(alpha)
    for share in (0.0, 0.3, 1.0):
        old, fresh = (oms.one_more_step(none, *pair, alpha, share) for pair in ((one, none), (none, one)))
        assert float(old**2 + fresh**2) == pytest.approx(1 - alpha**2)
        assert float(fresh**2) == pytest.approx(share * (1 - alpha**2))


def test_a_right_prediction_of_the_mean_ends_at_the_mean_and_noise_alone_does_not() -> None:
    """The mean of a Gaussian goes its way alpha_t m under DDIM, exactly; it starts on it with OMS alone."""

    class Knows(nn.Module):
        def forward(self, x: Tensor, states: Tensor) -> Tensor:
            return torch.full_like(x, -2.0)  # v = -x0

    session = idle_session(EPS, teacher=Bell(), step=Knows())
    batch = {"noise": torch.zeros(2, 4, 8, 8), "condition": torch.zeros(2, 32, dtype=torch.int64)}
    found, spent = ran(session, method_of("oms", share=0.0), batch, 8)
    assert spent == 1 + 2 * 3
    torch.testing.assert_close(found, torch.full_like(found, 2.0))
    plain, _ = ran(session, method_of("ddim_guided"), batch, 8)
    assert (plain - 2).abs().min() > 0.01


def test_the_further_step_has_a_guidance_weight_of_its_own() -> None:
    class Says(nn.Module):
        def forward(self, x: Tensor, states: Tensor) -> Tensor:
            return states[:, :1, :1, None].expand_as(x)

    session, x = idle_session(EPS, teacher=Bell(), step=Says()), torch.zeros(2, 4, 8, 8)
    states = torch.cat([torch.full((2, 32, 64), 1.0), torch.full((2, 32, 64), 3.0)])
    for scale, wanted in ((1.0, -3.0), (2.0, -5.0), (0.0, -1.0)):
        found = method_of("oms", scale=scale).predicted(session, x, states)
        torch.testing.assert_close(found, torch.full_like(x, wanted))


def test_the_step_learns_the_data_from_noise_that_does_not_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its input is noise of variance 1 with nothing of x0 in it, and an output of -x0 has no loss."""

    class Said:
        x0 = 5 + torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(7))
        tokens, states = torch.zeros(8, 32, dtype=torch.int64), torch.zeros(8, 32, 64)

        def __init__(self, session: Session) -> None:
            pass

        def batch(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
            return self.x0, self.tokens, self.states

    seen: list[Tensor] = []

    class Off(nn.Module):
        def forward(self, x: Tensor, states: Tensor) -> Tensor:
            seen.append(x)
            return 3 - Said.x0

    monkeypatch.setattr(oms, "Latents", Said)
    monkeypatch.setattr(oms, "fit", lambda session, network, loss, *_, **__: losses.append(float(loss())))
    losses: list[float] = []
    session = training(EPS, teacher=Bell(), step=Off())
    oms.OneMoreStep().prepare(session)
    assert losses == pytest.approx([9.0])
    assert seen[0].std() == pytest.approx(1, abs=0.1) and abs(float(seen[0].mean())) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([seen[0].flatten(), Said.x0.flatten()]))[0, 1])) < 0.1


def test_controls_start_from_the_mean_and_from_pictures_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    class Numbered:
        x0 = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 4, 8, 8)

        def __init__(self, session: Session) -> None: ...

        def batch(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
            return self.x0, self.x0, self.x0

    monkeypatch.setattr(oms, "Latents", Numbered)
    x, states = torch.zeros(400, 4, 8, 8), torch.zeros(800, 32, 64)
    for name in ("oms_mean", "oms_random"):
        method = method_of(name)
        session = training(EPS, method, teacher=Bell())
        session.state = dict(method.prepare(session))
        found = method.predicted(session, x, states)
        if name == "oms_mean":
            torch.testing.assert_close(found, torch.full_like(x, 2.5))
        else:
            assert set(found.flatten(1).unique(dim=1).flatten().tolist()) == set(range(6))


# Multi-Concept T2I-Zero ----------------------------------------------------------------------------------------------


def test_words_are_assigned_to_their_objects_by_the_grammar() -> None:
    said = {
        "a small red circle in front of a star at top left and a blue object on white": (
            "0000...11111.222..",
            "small red circle star blue object",
        ),
        "a cross with red top and blue bottom at left left of a ring and no green star": (
            "0000000000..11....",
            "cross red blue ring",
        ),
        "a plain square": ("000", "plain square"),
    }
    owner, names = zero.objects_of(tokens(said), zero.LOOKS)
    for row, (text, (whose, naming)) in enumerate(said.items()):
        found = "".join("." if i < 0 else str(i) for i in owner[row].tolist())
        length = len(text.split())
        assert found[1 : 1 + length] == whose[:length].ljust(length, "."), text
        assert set(found[0] + found[1 + length :]) == {"."}
        ids = tokens([text])[0]
        assert " ".join(VOCABULARY[int(i)] for i in ids[names[row]]) == naming
    nouns = zero.objects_of(tokens(["a small red circle"]), zero.NOUNS)[1]
    assert nouns[0].nonzero().flatten().tolist() == [4]


def test_correction_is_the_weighted_mean_of_the_words_of_the_same_object_and_of_no_other() -> None:
    owner, names = zero.objects_of(tokens(TEXTS[:1]), zero.LOOKS)
    states = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(1)) + 0.7
    similar = zero.similarities(states)

    def found(given: Tensor) -> Tensor:
        return zero.corrected(given, owner, names, zero.similarities(given), 0.3, 2.0)[0]

    after, seen = found(states), similar[0].tolist()
    for i in range(32):
        if not names[0, i]:
            assert torch.equal(after[i], states[0, i])
            continue
        weight = {
            j: seen[i][j] * np.exp(-((i - j) ** 2) / 8)
            for j in range(32)
            if owner[0, j] == owner[0, i] and seen[i][j] >= 0.3
        }
        wanted = sum(w * states[0, j] for j, w in weight.items()) / sum(weight.values())
        torch.testing.assert_close(after[i], wanted, rtol=1e-4, atol=1e-5)
    assert (after[names[0]] - states[0, names[0]]).abs().max() > 0.1
    moved = states.clone()
    moved[0, owner[0] != 0] += torch.randn(64)  # everything that is not said of the first object
    mine = names[0] & (owner[0] == 0)
    torch.testing.assert_close(found(moved)[mine], after[mine])


def test_of_concepts_the_strongest_keeps_a_pixel_and_other_words_always_speak() -> None:
    maps = torch.rand(2, 16, 32, generator=torch.Generator().manual_seed(2))
    concepts = torch.zeros(2, 3, 32, dtype=torch.bool)
    concepts[0, 0, [2, 3]], concepts[0, 1, [6, 7]], concepts[1, 2, 5] = True, True, True
    found = zero.kept(maps, concepts)
    assert found[1].all() and found[0][:, [i for i in range(32) if i not in (2, 3, 6, 7)]].all()
    line = torch.exp(-0.5 * torch.tensor([1.0, 0.0, 1.0]))
    line = line / line.sum()
    for pixel in range(16):
        strength = []
        for mine in ([2, 3], [6, 7]):
            plane = maps[0][:, mine].sum(1).view(4, 4)
            y, x = divmod(pixel, 4)
            around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            mirrored = [(abs(y + dy), abs(x + dx)) for dy, dx in around]
            inside = [(6 - a if a > 3 else a, 6 - b if b > 3 else b) for a, b in mirrored]
            pairs = zip(around, inside, strict=True)
            strength.append(sum(float(line[1 + dy] * line[1 + dx] * plane[p]) for (dy, dx), p in pairs))
        first = strength[0] > strength[1]
        assert found[0, pixel, [2, 3, 6, 7]].tolist() == [first, first, not first, not first]
    assert 0 < found[0, :, 2].sum() < 16


def test_suppression_leaves_captions_of_one_object_and_the_network_alone(teacher: Any) -> None:
    session, batch = idle_session(EPS, teacher=teacher), batch_of(TEXTS)
    before = [layer.processor for layer in speedup.cross_attentions(teacher)]
    found, spent = ran(session, method_of("t2i_zero_suppression"), batch, 4)
    plain, _ = ran(session, method_of("ddim_guided"), batch, 4)
    assert spent == 4 and before == [layer.processor for layer in speedup.cross_attentions(teacher)]
    torch.testing.assert_close(found[1], plain[1], rtol=1e-3, atol=1e-3)
    assert (found[0] - plain[0]).abs().max() > 1e-2


def test_the_half_without_a_caption_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rows of a guided step the first half is asked nothing; of the second, states are corrected and objects compared."""
    kept: list[Any] = []
    monkeypatch.setattr(zero, "Suppression", lambda concepts, rng: kept.append(concepts))
    monkeypatch.setattr(zero, "corrected", lambda states, *_: states + 1)
    asked: list[Tensor] = []

    class Hears(Constant):
        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            asked.append(condition)
            return super().forward(x, t, condition)

    ran(idle_session(EPS, teacher=Hears()), zero.T2IZero(), batch_of(TEXTS), 2)
    named = [[int(each.sum()) for each in row] for row in kept[0]]
    assert named == [[0, 0, 0], [0, 0, 0], [3, 2, 0], [1, 0, 0]]
    assert not asked[0][:2].any() and (asked[0][2:] == 1).all()


@torch.no_grad()
def test_what_is_suppressed_gives_nothing_to_the_sum(teacher: Any) -> None:
    """Attention of one layer written out, with the weights of silent words set to 0 and not given to others."""
    attn = speedup.cross_attentions(teacher)[0]
    torch.manual_seed(0)
    hidden, states = torch.randn(1, 16, 64), torch.randn(1, 32, 64)
    concepts = torch.zeros(1, 3, 32, dtype=torch.bool)
    concepts[0, 0, 2], concepts[0, 1, 5] = True, True
    found = zero.Suppression(concepts, None)(attn, hidden, states)
    query, key, value = (
        part.view(len(part), attn.heads, -1).transpose(0, 1)
        for part in (attn.to_q(hidden)[0], attn.to_k(states)[0], attn.to_v(states)[0])
    )
    maps = (query @ key.transpose(1, 2) / query.shape[2] ** 0.5).softmax(2)
    maps = maps * zero.kept(maps.mean(0, keepdim=True), concepts)
    wanted = attn.to_out[0]((maps @ value).transpose(0, 1).reshape(1, 16, 64))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# SpeedUpNet ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_untrained_adapters_change_nothing_where_both_prompts_are_one(teacher: Any) -> None:
    """Guidance does nothing there either: null + w (conditional - null) of two that are the same."""
    session = idle_session("negative/scenes_eps", teacher=teacher)
    session.networks["adapters"] = speedup.SpeedUpNet().networks(session)["adapters"]
    batch = batch_of(TEXTS)
    plain, _ = ran(session, method_of("ddim_unguided"), batch, 3)
    found, spent = ran(session, method_of("speedupnet"), batch | {"negative": batch["condition"]}, 3)
    assert spent == 3
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3)
    other = batch | {"negative": tokens(["a blue cross", "a ring"])}
    heard, _ = ran(session, method_of("speedupnet"), other, 3)
    assert (heard - plain).abs().max() > 1e-2
    deaf, _ = ran(session, method_of("speedupnet_deaf"), other, 3)
    without, _ = ran(session, method_of("speedupnet"), batch, 3)
    assert torch.equal(deaf, without) and not torch.equal(deaf, heard)


@torch.no_grad()
def test_an_adapter_takes_the_negative_off_and_adds_the_positive_at_the_norm_of_the_layer(teacher: Any) -> None:
    attn = speedup.cross_attentions(teacher)[0]
    torch.manual_seed(0)
    adapter = speedup.Offset(attn)
    for parameter in adapter.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    hidden, told, unwanted = torch.randn(2, 5, 64), torch.randn(2, 32, 64), torch.randn(2, 32, 64)

    def attend(key: nn.Module, value: nn.Module, states: Tensor) -> Tensor:
        parts, width = [], 64 // attn.heads
        for head in range(attn.heads):
            mine = slice(width * head, width * (head + 1))
            score = attn.to_q(hidden)[..., mine] @ key(states)[..., mine].transpose(1, 2) / width**0.5
            parts.append(score.softmax(2) @ value(states)[..., mine])
        return torch.cat(parts, 2)

    own = attend(attn.to_k, attn.to_v, told)
    found, prompts = adapter(attn, hidden, torch.cat([told, unwanted], 1)), []
    for kind, states in (("negative", unwanted), ("positive", told)):
        out = attend(getattr(adapter, f"{kind}_key"), getattr(adapter, f"{kind}_value"), states)
        level = torch.stack([own[i].norm() / out[i].norm() for i in range(2)]).view(2, 1, 1)
        prompts.append(getattr(adapter, f"{kind}_gain") * level * out + getattr(adapter, f"{kind}_shift"))
    torch.testing.assert_close(found, attn.to_out[0](own - prompts[0] + prompts[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("captions")
def test_paths_are_those_of_guidance_away_from_the_negative_prompt(teacher: Any) -> None:
    session = training(EPS, teacher=teacher)
    known = speedup.paths(session, teacher, 2, 3.0)
    told, unwanted = known["prompts"].split(32, 1)
    times, schedule = uniform_times(16), schedule_of(teacher)
    with torch.no_grad():
        for i in (0, 7):
            time = torch.full((2,), schedule.network_time(times[i]))
            x = known["x"][i]
            no, yes = teacher(x, time, unwanted), teacher(x, time, told)
            torch.testing.assert_close(known["eps"][i], no + 3 * (yes - no), rtol=1e-3, atol=1e-4)
    for i, (t, s) in enumerate(pairwise(times)):
        a, b = ddim_coefficients(schedule, t, s)
        wanted = a * known["x"][i] + b * known["eps"][i]
        torch.testing.assert_close(known["x"][i + 1], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("captions")
@pytest.mark.parametrize("consistent", [True, False])
def test_one_step_is_to_land_where_several_do(consistent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a constant eps one step lands where several land, so that it alone has no loss, at every length."""
    session, losses, lengths = training(EPS, teacher=Constant()), [], set()
    monkeypatch.setattr(speedup, "cross_attentions", lambda network: [])
    original, said = speedup.landing, {}

    def landing(schedule: Any, x: Tensor, eps: Tensor, t: Tensor, s: Tensor) -> Tensor:
        lengths.update((t - s).tolist())
        return original(schedule, x, eps, t, s)

    monkeypatch.setattr(speedup, "landing", landing)
    monkeypatch.setattr(speedup, "accelerated", lambda base, adapters, x, t, prompts: torch.full_like(x, said["eps"]))
    monkeypatch.setattr(
        speedup, "fit", lambda session, network, loss, *_, **__: losses.append([float(loss()) for _ in range(8)])
    )
    for said["eps"] in (1.0, 1.5):
        speedup.adapt(session, consistent, 3.0, 4, 4, 1e-3, 1, 1)
    right, wrong = losses[:2], losses[2:]
    assert max(itertools.chain(*right)) < 1e-6
    assert wrong[0] == pytest.approx([0.25] * 8)
    assert lengths == ({1 / 4, 1 / 8} if consistent else set())
    assert min(wrong[1]) > 1e-3


@pytest.mark.usefixtures("captions")
def test_adapters_are_trained_on_the_base_and_used_on_another_network(teacher: Any) -> None:
    class Silent(nn.Module):
        def forward(self, *_: Any) -> Tensor:
            raise AssertionError("not to be asked here")

    method = speedup.SpeedUpNet()
    session = training(PASTEL, method, base=teacher, teacher=Silent())
    before = {name: value.clone() for name, value in session.networks["adapters"].state_dict().items()}
    own = {name: value.clone() for name, value in teacher.state_dict().items()}
    method.prepare(session)
    moved = [name for name, value in session.networks["adapters"].state_dict().items() if (value != before[name]).any()]
    assert len(moved) == len(before)
    assert all(torch.equal(value, own[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    other = idle_session(PASTEL, base=Silent(), teacher=deepcopy(teacher), adapters=session.networks["adapters"])
    found, spent = ran(other, method, batch_of(TEXTS), 64)
    assert spent == 8 and found.isfinite().all()


# ECAD ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer() -> Any:
    return backbones.load("scenes_flow")


@torch.no_grad()
def test_the_cost_of_a_schedule_is_what_is_counted(transformer: Any) -> None:
    x, t, states = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 32, 64)
    lines = torch.rand(3, 6, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    everything, nothing = torch.ones(6, 3, dtype=torch.bool), torch.zeros(6, 3, dtype=torch.bool)
    counted = []
    with ecad.caching(transformer) as cache:
        for cache.plan in (everything, nothing, *lines):
            with FlopCounterMode(display=False) as flops:
                transformer(x, t, states)
            counted.append(flops.get_total_flops())
    most, least, *found = counted
    shares = [(each - least) / (most - least) for each in found]
    assert shares == pytest.approx([float(ecad.cost(line[None], 96)) for line in lines], rel=1e-9)
    assert float(ecad.cost(lines, 96)) == pytest.approx(sum(shares) / 3)


@torch.no_grad()
def test_what_is_not_computed_is_what_it_was_when_it_last_was(transformer: Any) -> None:
    """Three steps written out, with outputs put back by hooks; and all of it computed is the plain sampler, bit for bit."""
    session, batch = idle_session(FLOW, teacher=transformer), batch_of(TEXTS)
    everything = ecad.every(3, 6, 1)
    plain, _ = ran(session, method_of("ddim_guided"), batch, 6)
    session.begin("run", 5)
    assert torch.equal(ecad.sample(transformer, batch, everything), plain)
    plan = everything.clone()
    plan[1:, 2, 1], plan[2, 0, 0], plan[1, 5, 2] = False, False, False
    blocks, kept = transformer.transformer.transformer_blocks, {}
    denoise, x = GuidedByCaption(transformer, batch, 3.0), batch["noise"]
    for step, (t, s) in enumerate(pairwise(uniform_times(3))):
        hooks = []
        for i, j in itertools.product(range(6), range(3)):

            def swap(module: Any, given: Any, out: Tensor, place: tuple[int, int] = (i, j), step: int = step) -> Tensor:
                kept[place] = out if plan[step][place] else kept[place]
                return kept[place]

            hooks.append(getattr(blocks[i], ecad.PARTS[j]).register_forward_hook(swap))
        x = ddim_step(denoise.schedule, *denoise(x, t), s)
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(ecad.sample(transformer, batch, plan), x)
    assert (x - plain).abs().max() > 1e-5
    assert all("forward" not in part.__dict__ for block in blocks for part in block.modules())


def test_fronts_and_the_room_in_them() -> None:
    """The example of two objectives by hand: three fronts, distances as sums of the neighbours' over the range."""
    points = torch.tensor([[1.0, 5.0], [2.0, 3.0], [4.0, 2.0], [5.0, 1.0], [2.0, 5.0], [4.0, 4.0], [6.0, 6.0]])
    assert ecad.ranks(points).tolist() == [0, 0, 0, 0, 1, 1, 2]
    room = ecad.crowding(points[:4])
    assert room[[0, 3]].isinf().all()
    assert room[1:3].tolist() == pytest.approx([3 / 4 + 3 / 4, 3 / 4 + 2 / 4])
    assert ecad.fitness_order(points).tolist()[2:4] == [1, 2] and ecad.fitness_order(points)[-1] == 6


def test_evolution_keeps_what_is_fit_and_finds_more_of_it_than_chance() -> None:
    """Bits of known worth and known price: of as many genomes, far nearer to the best for half of the price."""
    draw = torch.Generator().manual_seed(0)
    worth, price = torch.rand(2, 40, generator=draw, dtype=torch.float64)

    def evaluate(genomes: Tensor) -> Tensor:
        return torch.stack([genomes.double() @ price, -(genomes.double() @ worth)], 1)

    start = torch.rand(20, 40, generator=draw) < 0.5
    seen, scores = ecad.evolve(evaluate, start, 30, 0.02, draw)
    assert len(seen) == 20 * 31 and torch.equal(seen[:20], start)
    torch.testing.assert_close(scores, evaluate(seen))
    chance = torch.rand(len(seen), 40, generator=draw) < torch.rand(len(seen), 1, generator=draw)
    budget = float(price.sum()) / 2
    found, luck = (each[each[:, 0] <= budget, 1].min() for each in (scores, evaluate(chance)))
    order = (worth / price).argsort(descending=True)
    best = worth[order][price[order].cumsum(0) <= budget].sum()
    assert -found > -luck and (best + found) < 0.4 * (best + luck)


def test_children_are_of_the_fitter_of_two_crossed_between_two_points_and_flipped_at_a_rate() -> None:
    """Of a fitter parent of zeros and another of ones: that of ones comes in only where both of two drawn are it."""
    draw = torch.Generator().manual_seed(3)
    both = torch.stack([torch.zeros(12), torch.ones(12)]).bool()
    found = ecad.children(both, 8000, 0.0, draw)
    assert float(found.float().mean()) == pytest.approx(1 / 4, abs=0.03)
    changes = (found[:, 1:] != found[:, :-1]).sum(1)
    assert sorted(changes.unique().tolist()) == [0, 1, 2]
    flipped = ecad.children(both[1:].expand(4, 12), 2000, 0.1, draw)
    assert float(flipped.float().mean()) == pytest.approx(0.9, abs=0.01)


@pytest.mark.usefixtures("captions")
@pytest.mark.parametrize("name", ["ecad", "ecad_random_search"])
def test_the_best_schedule_within_the_budget_is_taken(
    name: str, transformer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward for reading captions late: nobody within the budget has more, and the first step computes everything."""
    seen: list[Tensor] = []

    def reward(self: Any, session: Session) -> Any:
        return lambda plan: seen.append(plan) or float(plan[4:, :, 1].sum())

    method = ecad.ECAD()
    method.plan = method_of(name).plan
    monkeypatch.setattr(ecad.ECAD, "reward", reward)
    session = training(FLOW, teacher=transformer)
    session.scale = lambda embedded, smoke: embedded  # type: ignore[method-assign]
    plan, budget = method.search(session, 8), float(ecad.cost(ecad.every(8, 6, 3), 96))
    assert len(seen) == 140 and plan[0].all() and all(each[0].all() for each in seen)
    assert float(ecad.cost(plan, 96)) <= budget + 1e-9
    within = [float(each[4:, :, 1].sum()) for each in seen if float(ecad.cost(each, 96)) <= budget + 1e-9]
    assert float(plan[4:, :, 1].sum()) == max(within)
    assert any(torch.equal(each, ecad.every(8, 6, 3)) for each in seen) == (name == "ecad")


def test_longer_sampling_takes_every_line_twice() -> None:
    state = {"plan_8": torch.rand(8, 6, 3) < 0.5, "plan_16": torch.rand(16, 6, 3) < 0.5}
    assert torch.equal(ecad.stretched(state, 32)[::2], state["plan_16"])
    assert torch.equal(ecad.stretched(state, 32)[1::2], state["plan_16"])
    assert torch.equal(ecad.stretched(state, 8), state["plan_8"])


# MixDQ ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_lie_packed_and_come_back(bits: int) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(bits))
    integers, steps = mixdq.to_integers(weight, bits)
    packed = mixdq.pack(integers, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == weight.numel() * bits // 8
    assert torch.equal(mixdq.unpack(packed, bits), integers.flatten())
    assert integers.abs().amax(1).tolist() == [2 ** (bits - 1) - 1] * 6
    assert ((integers * steps[:, None] - weight.flatten(1)).abs() <= steps[:, None] / 2 + 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Conv2d(8, 6, 3, stride=2, padding=1)])
def test_an_integer_layer_computes_with_what_it_stores(layer: Any) -> None:
    """8 bits and inputs on the grid lose nothing but the weights' own rounding; what is loaded has its size."""
    torch.manual_seed(0)
    x = torch.randint(-100, 155, (4, 8) if isinstance(layer, nn.Linear) else (2, 8, 8, 8)).float()
    low, high = torch.tensor(-100.0), torch.tensor(155.0)
    found = mixdq.IntegerLayer(layer)
    assert torch.equal(found(x), layer(x))
    found.store(layer.weight, 4, low, high, None)
    assert {name for name, _ in found.named_parameters()} == {"packed", "steps", "low", "high", "bias"}
    again = mixdq.IntegerLayer(layer)
    again.load_state_dict(found.state_dict())
    assert torch.equal(again(x), found(x))
    rough = x + 0.4 * torch.rand_like(x)
    torch.testing.assert_close(found(rough), found(x))
    layer.weight.copy_(mixdq.coarse(layer, 4))
    torch.testing.assert_close(found(x), layer(x), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found(x.clamp(max=90)), layer(x.clamp(max=90)), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found(x + 1000), layer(torch.full_like(x, 155.0)), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_a_first_token_that_stands_out_spoils_the_others_unless_it_is_computed_beforehand() -> None:
    torch.manual_seed(0)
    layer, states = nn.Linear(8, 6), torch.randn(3, 32, 8)
    states[:, 0] = 500 * torch.randn(8)
    others, wanted = states[:, 1:], layer(states)
    aware, alike = mixdq.IntegerLayer(layer), mixdq.IntegerLayer(layer)
    aware.store(layer.weight, 8, others.min(), others.max(), layer(states[:1, 0])[0])
    alike.store(layer.weight, 8, states.min(), states.max(), None)
    torch.testing.assert_close(aware(states)[:, 0], wanted[:, 0])
    errors = [float((each(states) - wanted)[:, 1:].square().mean()) for each in (aware, alike)]
    assert errors[0] < 1e-3 and errors[1] > 100 * errors[0]


def test_bits_are_allotted_as_trying_all_would_allot_them() -> None:
    draw = torch.Generator().manual_seed(0)
    for mean, choices in ((4.0, (2, 4, 8)), (3.1, (2, 4, 8)), (5.5, (4, 8))):
        scores, sizes = torch.rand(5, 3, generator=draw), [100, 300, 50, 700, 220]
        found = mixdq.allocate(scores, sizes, mean, choices)

        def worth(bits: Any, scores: Tensor = scores) -> float:
            return sum(float(scores[i, mixdq.BITS.index(b)]) for i, b in enumerate(bits))

        possible = [
            bits
            for bits in itertools.product(choices, repeat=5)
            if sum(b * n for b, n in zip(bits, sizes, strict=True)) <= mean * sum(sizes) + 1e-6
        ]
        assert tuple(found) in possible
        assert worth(found) == pytest.approx(max(map(worth, possible)))


def test_of_the_ratios_that_is_taken_whose_pictures_are_nearest() -> None:
    """Pictures are the weights themselves here, so that what each ratio loses is seen."""
    torch.manual_seed(0)
    seen: list[Tensor] = []

    class Weights:
        layers = {f"{place}.{part}.x": nn.Linear(8, 8) for place in "abc" for part in ("ff", "conv")}
        pictures = torch.zeros(())

        def drawn(self) -> Tensor:
            seen.append(torch.cat([layer.weight.detach().flatten() for layer in self.layers.values()]))
            return seen[-1]

    trial: Any = Weights()
    trial.pictures = trial.drawn()
    session = idle_session(EPS, teacher=Bell())
    session.scale = lambda embedded, smoke: embedded  # type: ignore[method-assign]
    known = {name: torch.rand(6, 3).sort(1).values for name in ("content", "quality")}
    bits = mixdq.MixDQ().allotted(session, trial, known)
    errors = [float((each - trial.pictures).square().mean()) for each in seen[1:]]
    layers = list(trial.layers.values())
    with mixdq.instead(layers, [mixdq.coarse(layer, bits[name]) for name, layer in trial.layers.items()]):
        assert float((trial.drawn() - trial.pictures).square().mean()) == min(errors) < 0.9 * max(errors)
    assert len(errors) > 3 and sum(bits.values()) <= 4 * 6


def test_two_groups_share_the_bits_that_there_are() -> None:
    found = mixdq.splits(300, 700, 5.0)
    assert len(found) > 5
    for content, quality in found:
        assert 300 * content + 700 * quality == pytest.approx(5000)
        assert 2 <= content <= 8 and 4 <= quality <= 8


def test_measures_of_what_is_lost() -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert mixdq.sqnr(1.1 * x, x) == pytest.approx(20, abs=1e-3)
    assert mixdq.ssim(x, x) == pytest.approx(1)
    assert mixdq.ssim(-x, x) < 0
    grey = torch.full((1, 3, 8, 8), 0.0)  # 0.5 of [0, 1]
    light = (2 * 0.5 * 0.75 + 1e-4) / (0.5**2 + 0.75**2 + 1e-4)
    assert mixdq.ssim(grey + 0.5, grey) == pytest.approx(light, abs=1e-5)


@pytest.fixture(scope="module")
def decoder() -> Any:
    return backbones.load("scenes_vae")


class Loud(nn.Module):
    """An encoder of captions whose first token stands out."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        states = self.encoder(ids)
        return torch.cat([torch.full_like(states[:, :1], 50.0), states[:, 1:]], 1)


@torch.no_grad()
@pytest.mark.usefixtures("captions")
def test_a_trial_looks_at_all_steps(teacher: Any, decoder: Any) -> None:
    """Outputs are compared at the states of every step, and ranges are the extremes over all of them; the first token is none."""
    teacher = deepcopy(teacher)
    teacher.words = Loud(teacher.words)
    session = training(EPS, teacher=teacher, vae=decoder)
    trial = mixdq.Trial(session, teacher, 2, 3)
    schedule = schedule_of(teacher)
    x, t, states, guidance = trial.inputs
    assert len(x) == 2 * 3 and len(t.unique()) == 3 and float(t.max()) == schedule.steps - 1
    assert set(guidance.tolist()) == {3.0}
    assert trial.content() == pytest.approx(1, abs=1e-5) and trial.quality() > 60
    assert float(trial.low["conv_in"]) == pytest.approx(float(x.min()))
    assert float(trial.high["conv_in"]) == pytest.approx(float(x.max()))
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert float(trial.high[key]) == pytest.approx(float(states[:, 1:].max()))
    with mixdq.instead([teacher.unet.conv_out], [mixdq.coarse(teacher.unet.conv_out, 2)]):
        coarse = trial.quality()
    assert coarse < trial.quality() - 20
    rounded = trial.rounded(key, states)
    assert torch.equal(rounded[:, 0], states[:, 0]) and (rounded - states)[:, 1:].abs().max() > 0


@pytest.mark.usefixtures("captions")
def test_every_layer_is_put_into_every_number_of_bits_alone(
    teacher: Any, decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer of each group: more bits are better, content is asked of content, and weights are afterwards their own."""
    names = ["conv_out", "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"]
    layers = {name: teacher.unet.get_submodule(name) for name in names}
    own = [layer.weight.clone() for layer in layers.values()]
    monkeypatch.setattr(mixdq, "layers_of", lambda network: layers)
    monkeypatch.setattr(mixdq, "float_student", lambda session: teacher)
    session = training(EPS, teacher=teacher, vae=decoder)
    found = mixdq.sensitivity(session, 2, 2)
    session.begin("prepare", 1)
    trial = mixdq.Trial(session, teacher, 2, 2)
    for i, layer in enumerate(layers.values()):
        assert found["quality"][i].diff().min() > 3
        assert torch.equal(layer.weight, own[i]) and not layer._forward_pre_hooks
        with mixdq.instead([layer], [mixdq.coarse(layer, 4)]):
            assert float(found["quality"][i, 1]) == pytest.approx(trial.quality(), rel=1e-4)
            if i == 1:
                assert float(found["content"][i, 1]) == pytest.approx(trial.content(), rel=1e-4)
    assert not found["content"][0].any() and found["content"][1].min() > 0
    assert found["content"][1].diff().min() > 0
    assert 0 < float(found["inputs"][1]) <= 1 < float(found["inputs"][0])


@pytest.mark.usefixtures("captions")
@pytest.mark.parametrize("name", ["mixdq", "mixdq_uniform_w4a8"])
def test_a_prepared_student_holds_no_more_bits_than_it_may(
    name: str, teacher: Any, decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights of the UNet are integers of at most the mean bits, and what was stored comes back as it was."""
    method, attributes = mixdq.MixDQ(), method_of(name)
    method.bits, method.how, method.aware = attributes.bits, attributes.how, attributes.aware
    session = training(EPS, method, teacher=teacher, vae=decoder)
    monkeypatch.setattr(mixdq, "float_student", lambda session: session.clone("teacher").requires_grad_(False))
    layers, known = mixdq.layers_of(teacher), {}
    scores = torch.rand(len(layers), 3, generator=torch.Generator().manual_seed(1)).sort(1).values
    known = {"quality": scores, "content": scores, "inputs": scores[:, 2]}
    monkeypatch.setattr(session, "once", lambda function, *_: known)
    method.prepare(session)
    student: Any = session.networks["student"]
    parts = {n: p for n, p in student.unet.named_modules() if isinstance(p, mixdq.IntegerLayer)}
    assert parts.keys() == layers.keys() and not any("weight" in p._parameters for p in parts.values())
    weights = sum(layer.weight.numel() for layer in layers.values())
    bits = sum(8 * p.packed.numel() for p in parts.values())
    assert bits <= 4 * weights
    kinds = {8 * p.packed.numel() // p.shape.numel() for p in parts.values()}
    assert kinds == ({2, 4, 8} if name == "mixdq" else {4})
    assert {8 * p.packed.numel() // p.shape.numel() for n, p in parts.items() if not mixdq.is_content(n)} <= {4, 8}
    floats = sum(1 for p in parts.values() if not p.high > p.low)
    assert floats == (2 if name == "mixdq" else 0)
    firsts = {n for n, p in parts.items() if "first" in p._parameters}
    assert len(firsts) == (14 if name == "mixdq" else 0) and all(mixdq.hears_captions(n) for n in firsts)
    again = method.networks(session)["student"]
    again.load_state_dict(student.state_dict())
    batch, (x, t, states) = batch_of(TEXTS), (torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), torch.randn(2, 32, 64))
    with torch.no_grad():
        assert torch.equal(again(x, t, states), student(x, t, states))
    assert torch.equal(again.words(batch["condition"]), teacher.words(batch["condition"]))


# LoRA-enhanced distillation ------------------------------------------------------------------------------------------


def test_only_adapters_and_the_matrix_of_the_scale_can_learn(teacher: Any) -> None:
    session = training(EPS, teacher=teacher)
    student = lora.adapted(session)
    moving = {name for name, p in student.named_parameters() if p.requires_grad}
    told = {"unet.time_embedding.cond_proj.weight"}
    assert told < moving and all(".lora_" in name and ".attn" in name for name in moving - told)
    assert len(moving) == 1 + 2 * 8 * 7  # A and B, of eight projections of seven blocks
    share = sum(p.numel() for p in student.parameters() if p.requires_grad) / sum(
        p.numel() for p in teacher.parameters()
    )
    assert share < 0.05
    x, t, states = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 300.0]), torch.randn(2, 32, 64)
    with torch.no_grad():
        for scale in (2.0, 5.0):
            assert torch.equal(student(x, t, states, torch.full((2,), scale)), teacher(x, t, states))


def test_the_student_that_samples_is_the_one_that_learned(teacher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of any numbers, merged into a copy of the teacher, say what they said beside it, also of the scale."""
    method, kept = lora.LoRAGuidedDistill(), []

    def scramble(session: Session, student: Any, updates: int, **options: Any) -> None:
        assert set(options) == {"rate"}  # data, scales, batch and that the scale is told are those of `lcm_folded`
        torch.manual_seed(0)
        for p in student.parameters():
            if p.requires_grad:
                p.data.add_(0.05 * torch.randn_like(p))
        kept.append(student)

    monkeypatch.setattr(lora, "fold", scramble)
    session = training(EPS, method, teacher=teacher)
    session.state = dict(method.prepare(session))
    x, t, states = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 300.0]), torch.randn(2, 32, 64)
    with torch.no_grad():
        low, high = (
            [network(x, t, states, torch.full((2,), scale)) for network in (kept[0], session.networks["student"])]
            for scale in (2.0, 5.0)
        )
        plain = teacher(x, t, states)
    for learned, merged in (low, high):
        torch.testing.assert_close(merged, learned, rtol=1e-3, atol=1e-3)
    assert (low[0] - high[0]).abs().max() > 1e-3 and (low[0] - plain).abs().max() > 1e-2
    fresh = session.clone("teacher")
    merge(fresh, {name: value for name, value in session.state.items() if name != lora.TOLD})
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(fresh.state_dict()[key], session.networks["student"].state_dict()[key])


def test_as_many_steps_as_with_guidance_take_half_of_the_evaluations(teacher: Any) -> None:
    session = idle_session(EPS, teacher=teacher, student=teacher)
    batch = batch_of(TEXTS)
    whole, spent = ran(session, method_of("lora_guided_distill"), batch, 4)
    same, half = ran(session, method_of("lora_same_steps"), batch, 8)
    assert torch.equal(whole, same) and spent == half == 4


def test_the_sampler_tells_the_student_the_scale() -> None:
    told: list[float] = []

    class Told(Constant):
        def forward(self, x: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None) -> Tensor:
            told.extend([] if guidance is None else guidance.tolist())
            return super().forward(x, t, condition)

    ran(idle_session(EPS, student=Told()), method_of("lora_guided_distill"), batch_of(TEXTS), 3)
    assert told == [3.0] * 6
