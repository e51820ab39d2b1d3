"""Consistency students of latent teachers: pairs, sampler, adapters, stochastic solvers, rewards, flows."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from rigs.images import idle_session, method_of, module_of, ran
from torch import Tensor, nn

from stepmark import backbones
from stepmark.backbones.scenes import scaled_linear
from stepmark.session import Session
from stepmark.tracks.image.schedules import Schedule, schedule_of, uniform_times
from stepmark.tracks.image.solvers import ddim_step
from stepmark.tracks.scenes.captions import texts, tokens
from stepmark.tracks.text_to_image import adapters, consistency, students
from stepmark.tracks.text_to_image.consistency import Pair, distil, draw, grid_times, predict, sample
from stepmark.tracks.text_to_image.rewards import log_probability
from stepmark.tracks.text_to_image.search import judged

torch.set_num_threads(1)

EPS, FREE, FLOW, PASTEL = (
    *("text_to_image/scenes_eps", "free/scenes_eps", "text_to_image/scenes_flow", "text_to_image/scenes_pastel"),
)
SAID = ("a red circle at top", "a blue square on black", "a green star at left as pastel", "a ring as pastel")
scott, rg_lcd, lcm_lora = (module_of(name) for name in ("scott", "rg_lcd", "lcm_lora"))


# networks that are known exactly ----------------------------------------------------------------


class Words(nn.Module):
    """States that say how many tokens a caption has, by their first number."""

    def forward(self, ids: Tensor) -> Tensor:
        return (ids > 0).sum(1).double().view(-1, 1, 1).expand(-1, 32, 64).clone()


class Spot(nn.Module):
    """The exact network of data that lie in one point: n / 10 for a caption of n tokens, -1 for the empty one.

    Told a scale w, it knows the point -1 + gain w (n / 10 + 1), which with gain = 1 is where guidance leads. It counts its rows.
    """

    def __init__(self, prediction: str = "epsilon", gain: float = 1.0, drift: float = 0.0) -> None:
        super().__init__()
        self.prediction, self.words, self.rows = prediction, Words(), 0
        if prediction == "epsilon":
            self.alphas_cumprod = scaled_linear()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.drift = nn.Parameter(torch.tensor(drift, dtype=torch.float64))

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, -10.0)

    def point(self, condition: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return (-1 + self.gain * scale * (condition[:, 0, 0] / 10 + 1) + self.drift).view(-1, 1, 1, 1)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None) -> Tensor:
        self.rows += len(x)
        schedule, point = schedule_of(self), self.point(condition, 1.0 if guidance is None else guidance)
        time = t.double() if schedule.flow else (t.double() + 1) / schedule.steps
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in (schedule.alpha(time), schedule.sigma(time)))
        eps = (x - alpha * point) / sigma.clamp(min=1e-12)
        return eps - point if schedule.flow else eps


class Slope(nn.Module):
    """A network of noise with one weight: eps = gain (1 + t / 1000) x."""

    prediction = "epsilon"

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain, self.alphas_cumprod = nn.Parameter(torch.tensor(gain, dtype=torch.float64)), scaled_linear()

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, guidance: Tensor) -> Tensor:
        return self.gain * (1 + t.view(-1, 1, 1, 1) / 1000) * x


class Bent(nn.Module):
    """A network of noise that depends on all that it is told, for equality with somebody else's sampler."""

    prediction = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        self.words, self.alphas_cumprod, self.told = Words(), scaled_linear(), torch.zeros(0)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, guidance: Tensor) -> Tensor:
        self.told = guidance
        return torch.tanh(x + t.view(-1, 1, 1, 1) / 1000 * condition[:, 0, 0].view(-1, 1, 1, 1)) / guidance[0]


class Squares(nn.Module):
    """An autoencoder of a sort: every fourth pixel, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, :1]], 1)[..., ::4, ::4]

    def forward(self, z: Tensor) -> Tensor:
        return self.weight * z[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3)


class Taste(nn.Module):
    """A reward's reader [B, 224] of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, 224).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A train split of 16 pictures."""
    said = list(SAID) * 4
    pictures = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(7)) * 2 - 1
    split = {"x0": pictures, "text": said, "tokens": tokens(said)}
    monkeypatch.setattr("stepmark.session.load_split", lambda *_: split)


def preparing(task: str, **networks: nn.Module) -> Session:
    """A session of doubles in prepare."""
    session = idle_session(task, **networks)
    session.dtype = torch.float64
    session.begin("networks", 1)
    session.advance("prepare")
    return session


def asked(n: int = 4, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Noise and captions."""
    noise = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return {"noise": noise, "condition": tokens((SAID * n)[:n])}


def pair_of(n: int = 4, dtype: torch.dtype = torch.float64, **changed: Any) -> Pair:
    """A pair of random numbers."""
    rng, batch = torch.Generator().manual_seed(3), asked(n, dtype)
    x = torch.randn(4, n, 4, 8, 8, generator=rng, dtype=dtype)
    states = torch.randn(n, 32, 64, generator=rng, dtype=dtype)
    t = torch.linspace(0.1, 0.9, n, dtype=dtype)
    pair = Pair(x[0], t, x[1], t - 0.02, states, batch["condition"], torch.full_like(t, 3.0), x[2], x[3])
    return replace(pair, **changed)


# pairs and training -----------------------------------------------------------------------------


def test_pictures_are_encoded_in_a_training_that_all_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents, captions and states of a batch belong together."""
    session, asked_for = preparing(EPS, teacher=Spot(), vae=Squares()), list[Any]()
    once = session.once
    monkeypatch.setattr(
        session, "once", lambda function, *said: asked_for.append((function.__name__, said)) or once(function, *said)
    )
    data = consistency.Latents(session)
    assert asked_for == [("encoded", (64,))]
    wanted, (x0, ids, states) = Squares().encode(session.train["x0"].double()), data.batch(5)
    rows = [int((wanted == each).flatten(1).all(1).nonzero()[0]) for each in x0]
    assert torch.equal(ids, session.train["tokens"][rows]) and torch.equal(states, Words()(ids))


def test_a_pair_is_that_of_the_authors_code() -> None:
    """Timesteps 20 k - 1, the one before it or timestep 0, and their solver on integer timesteps, with their w = scale - 1."""
    session, teacher = preparing(EPS, teacher=Spot(), vae=Squares()), Spot(gain=0.7, drift=0.2)
    schedule = schedule_of(teacher)
    data = consistency.Latents(session)
    pair = draw(session, data, teacher, schedule, grid_times(schedule), 200, (2.0, 5.0))
    start = torch.round(pair.t * 1000 - 1).long()
    assert set(start.tolist()) == set(range(19, 1000, 20))
    then = torch.where(start - 20 < 0, 0, start - 20)
    torch.testing.assert_close(pair.s * 1000 - 1, then.double(), atol=1e-4, rtol=0)
    abar = scaled_linear()
    alpha, sigma, a, b = ((c[i]).sqrt().view(-1, 1, 1, 1) for i in (start, then) for c in (abar, 1 - abar))
    torch.testing.assert_close(pair.x, alpha * pair.x0 + sigma * pair.eps)
    w = (pair.guidance - 1).view(-1, 1, 1, 1)
    assert 1 <= float(w.min()) < 1.2 and 3.8 < float(w.max()) <= 4
    cond, null = (teacher(pair.x, start.double(), c) for c in (pair.states, teacher.null_condition(pair.states)))
    eps = cond + w * (cond - null)
    torch.testing.assert_close(pair.ahead, (a * (pair.x - sigma * eps) / alpha + b * eps).detach())


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_the_boundary_is_the_authors_and_the_end_predicts_itself(kind: str) -> None:
    """c_skip and c_out of timesteps as in diffusers; at the end of the path whatever the network says is without effect."""
    from diffusers import LCMScheduler

    network = Spot(kind, drift=3.0)
    schedule, oracle = schedule_of(network), LCMScheduler()
    for step in (0, 1, 19, 500, 999):
        t = torch.tensor([step / 1000 if schedule.flow else (step + 1) / 1000], dtype=torch.float64)
        wanted = oracle.get_scalings_for_boundary_condition_discrete(torch.tensor(float(step), dtype=torch.float64))
        for found, value in zip(consistency.boundary(schedule, t), wanted, strict=True):
            assert float(found) == pytest.approx(float(value), abs=1e-9)
    x = asked()["noise"]
    first = torch.full((4,), max(consistency.first_time(schedule), 1e-12), dtype=torch.float64)
    states = network.words(asked()["condition"])
    torch.testing.assert_close(predict(network, x, first, states, None, schedule), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("task", "kind"), [(EPS, "epsilon"), (FLOW, "flow")])
def test_a_student_learns_where_its_guided_teacher_ends(task: str, kind: str) -> None:
    """All data lie in one point: guidance leads to -1 + w (c + 1), and a student that is told w finds it from pair to pair; one
    that is told none finds the one of its fixed scale."""
    session = preparing(task, teacher=Spot(kind), vae=Squares())
    session.tier = "embedded"  # for batches that are as large as asked for
    for told, gain, end in ((True, 0.6, 1.0), (False, 2.0, 3.0)):
        student = Spot(kind, gain=gain)
        student.drift.requires_grad_(False)
        scales = (2.0, 5.0) if told else (3.0, 3.0)
        distil(session, student, 100, rate=0.2, batch=16, scales=scales, told=told, grid=4, decay=0.0)
        assert student.gain.item() == pytest.approx(end, rel=0.05)  # data lie elsewhere, so that ends are a little off


@pytest.mark.parametrize("decay", [0.95, 0.0])
def test_the_target_is_the_prediction_of_the_average_at_the_second_time(decay: float) -> None:
    """In the second update the average holds 0.95 of the first weights and 0.05 of the second; with decay 0 the second alone."""
    session, student = preparing(EPS, teacher=Spot(), vae=Squares()), Slope(0.5)
    gains, seen = [0.5], []

    def after(found: Tensor, pair: Pair) -> None:
        gains.append(student.gain.item())
        seen.append((found, pair))

    distil(session, student, 2, rate=0.1, decay=decay, after=after)
    assert abs(gains[1] - gains[0]) > 0.05
    found, pair = seen[1]
    with torch.no_grad():
        own, average = Slope(gains[1]), Slope(decay * gains[0] + (1 - decay) * gains[1])
        schedule = schedule_of(own)
        wanted = predict(average, pair.ahead, pair.s, pair.states, pair.guidance, schedule)
        torch.testing.assert_close(pair.target, wanted)
        torch.testing.assert_close(found, predict(own, pair.x, pair.t, pair.states, pair.guidance, schedule))


def test_fine_tuning_asks_no_teacher_and_has_one_noise_for_both_points() -> None:
    session = preparing(PASTEL, teacher=Spot(), vae=Squares())
    teacher, schedule, pairs = session.networks["teacher"], schedule_of(session.networks["teacher"]), []
    distil(session, Spot(), 3, ahead=None, after=lambda _, pair: pairs.append(pair))
    assert teacher.rows == 0 and len(pairs) == 3
    for pair in pairs:
        a, b = (c(pair.s).view(-1, 1, 1, 1) for c in (schedule.alpha, schedule.sigma))
        torch.testing.assert_close(pair.ahead, a * pair.x0 + b * pair.eps)
        assert (pair.s < pair.t).all()


def test_the_control_learns_guidance_at_any_time_and_nothing_of_the_end() -> None:
    """eps of null + w (cond - null) is that of a student of gain 1; times are all thousand; DDIM follows what it has learned."""
    session, student, times = preparing(EPS, teacher=Spot(), vae=Squares()), Spot(gain=0.5), []
    student.drift.requires_grad_(False)
    student.register_forward_pre_hook(lambda _, given: times.append(given[1]))
    consistency.fold(session, student, 120, rate=0.05)
    assert student.gain.item() == pytest.approx(1.0, abs=0.03)
    assert len(torch.cat(times).unique()) > 300
    batch, schedule = asked(), schedule_of(student)
    found, x = consistency.follow(student, batch, 4, 3.0, schedule), batch["noise"]
    states, scale = student.words(batch["condition"]), torch.full((4,), 3.0, dtype=torch.float64)
    for t, s in pairwise(uniform_times(4)):
        eps = student(x, torch.full((4,), 1000 * t - 1, dtype=torch.float64), states, scale)
        x = ddim_step(schedule, (x - schedule.sigma(t) * eps) / schedule.alpha(t), eps, s)
    torch.testing.assert_close(found, x.detach())


ADAPTED = {"rate": 2e-3, "scales": (2.0, 4.0), "decay": 0.0, "told": False}  # of the adapter, which is told no scale
ARMS: dict[str, tuple[str, list[tuple[str, int, dict[str, Any]]], float]] = {  # task, trainings, the gain at their end
    "lcm": (EPS, [("distil", students.UPDATES, {})], 10),
    "lcm_folded": (EPS, [("fold", students.UPDATES, {})], 10),
    "lcm_every_step": (EPS, [("distil", students.UPDATES, {"grid": 1000})], 10),
    "lcm_of_base": (PASTEL, [("distil", students.UPDATES_OF_BASE, {"role": "base"})], 2),
    "lcm_finetuned": (
        PASTEL,
        [("distil", students.UPDATES_OF_BASE, {"role": "base"}), ("distil", 150, {"ahead": None})],
        3,
    ),
    "lcm_lora": (PASTEL, [("distil", students.UPDATES, ADAPTED | {"role": "base"})], 9),
    "pixart_delta": (FLOW, [("distil", 800, {"scales": (3.0, 3.0), "told": False})], 2),
    "pixart_delta_folded": (FLOW, [("fold", 800, {"scales": (3.0, 3.0), "told": False})], 2),
}


@pytest.mark.parametrize("name", ARMS)
def test_arms_are_trained_as_long_and_start_where_they_should(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training adds one to the gain of a network: 9 in the teacher, 1 in the base and in a student that nothing is loaded
    into. What is of the base alone learns from pictures that the base drew; fine-tuning goes on from there without a teacher."""
    task, wanted, end = ARMS[name]
    kind = "flow" if task == FLOW else "epsilon"
    session = preparing(task, teacher=Spot(kind, gain=9.0), base=Spot(kind))
    session.networks["student"] = Spot(kind)
    session.tier = "embedded"
    method, made = method_of(name), list[Any]()
    inside = type(method).prepare.__globals__

    def recorded(which: str) -> Any:
        def train(_: Session, student: Any, updates: int, **how: Any) -> None:
            student.gain.data += 1
            assert isinstance(how.pop("data", None), consistency.Drawn) == (how.get("role") == "base")
            made.append((which, updates, how))

        return train

    monkeypatch.setattr(students, "distil", recorded("distil"))
    for which in ("distil", "fold"):
        monkeypatch.setitem(inside, which, recorded(which))
    if name == "lcm_lora":  # which wants the layers of a UNet
        monkeypatch.setitem(inside, "adapt", lambda network, *_: network)
        monkeypatch.setitem(inside, "tensors", lambda network: {})
        monkeypatch.setitem(inside, "merge", lambda *_: None)
    method.prepare(session)
    assert made == wanted
    assert session.networks["student"].gain.item() == end


def test_pictures_that_a_network_draws_itself_end_where_guidance_leads_and_know_no_style() -> None:
    session = preparing(PASTEL, teacher=Spot(gain=9.0), base=Spot())
    data = consistency.Drawn(session, "base", 4, 2, 3.0)
    assert [text.removesuffix(" as pastel") for text in SAID] == texts(data.tokens)
    words = (data.tokens > 0).sum(1).double().view(-1, 1, 1, 1)
    torch.testing.assert_close(data.x0, (-1 + 3 * (words / 10 + 1)).expand_as(data.x0).detach())
    assert session.networks["teacher"].rows == 0 and session.networks["base"].rows == 4 * 2 * 2


# sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_sampling_is_that_of_the_schedulers_own_authors(steps: int) -> None:
    """Number by number diffusers' LCMScheduler, which they wrote, with the same noise."""
    from diffusers import LCMScheduler

    oracle: Any = LCMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    oracle.set_timesteps(steps)
    network, batch, rng = Bent(), asked(), torch.Generator().manual_seed(5)
    found = sample(network, batch, steps, rng, 3.0, schedule_of(network))
    assert network.told.tolist() == [3.0] * 4
    x, states, rng = batch["noise"], network.words(batch["condition"]), torch.Generator().manual_seed(5)
    for step in oracle.timesteps:
        eps = network(x, torch.full((4,), float(step)), states, torch.full((4,), 3.0, dtype=torch.float64))
        x = oracle.step(eps, step, x, generator=rng, return_dict=False)[0]
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "rung", "rows", "scale"),
    [
        *(("lcm", 4, 4, 3.0), ("lcm", 64, 50, 3.0), ("lcm_strong", 4, 4, 5.0), ("lcm_weak", 2, 2, 2.0)),
        *(("lcm_folded", 64, 64, 3.0), ("lcm_undistilled", 9, 8, 3.0), ("lcm_lora_absent", 8, 8, 3.0)),
        *(("scott", 2, 2, 3.0), ("rg_lcd", 2, 2, 3.0), ("pixart_delta_undistilled", 4, 4, 3.0)),
    ],
)
def test_what_a_rung_pays_for_ends_where_the_scale_leads(name: str, rung: int, rows: int, scale: float) -> None:
    """A student is told the scale, or guidance comes from outside and costs twice: both end in -1 + w (c + 1)."""
    method, kind = method_of(name), "flow" if name.startswith("pixart") else "epsilon"
    networks = {role: Spot(kind) for role in ("teacher", "student")}
    batch = asked()
    found, spent = ran(idle_session(EPS, **networks), method, batch, rung)
    assert spent == rows
    words = (batch["condition"] > 0).sum(1).double().view(-1, 1, 1, 1)
    torch.testing.assert_close(found, (-1 + scale * (words / 10 + 1)).expand_as(found), rtol=1e-4, atol=1e-4)


# adapters ---------------------------------------------------------------------------------------


def touched(network: Any) -> Any:
    """An adapted network whose adapters say something."""
    for part in network.modules():
        if isinstance(part, adapters.Adapted):
            nn.init.normal_(part.lora_B.weight, std=0.05, generator=torch.Generator().manual_seed(4))
    return network


@torch.no_grad()
def test_an_adapter_is_nothing_at_first_and_then_a_change_of_weights() -> None:
    """On the UNet with its linear, strided and 1x1 layers: adapted and merged say the same; its negative undoes a merger."""
    plain, batch = backbones.load("scenes_eps"), asked(2, torch.float32)
    told = batch["noise"], torch.tensor([10.0, 900.0]), plain.words(batch["condition"])
    adapted = adapters.adapt(backbones.load("scenes_eps"), torch.Generator().manual_seed(0), rank=4, alpha=2)
    before = plain(*told)
    assert torch.equal(adapted(*told), before)
    learned = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert learned and all(".lora_A." in name or ".lora_B." in name for name in learned)
    kept, wanted = adapters.tensors(touched(adapted)), adapted(*told)
    assert (wanted - before).abs().max() > 1e-2
    adapters.merge(plain, kept, alpha=2)
    torch.testing.assert_close(plain(*told), wanted, rtol=1e-4, atol=1e-4)
    adapters.merge(plain, kept, alpha=2, weight=-1.0)
    torch.testing.assert_close(plain(*told), before, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_kept_by_the_names_and_in_the_shapes_of_peft() -> None:
    """Those that PEFT 0.21 writes for this UNet and these layers: 114 pairs, 259 072 numbers."""
    kept = adapters.tensors(adapters.adapt(backbones.load("scenes_eps"), torch.Generator()))
    block = "base_model.model.down_blocks.0"
    shapes = {
        f"{block}.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight": (8, 64),
        f"{block}.attentions.0.transformer_blocks.0.ff.net.0.proj.lora_B.weight": (512, 8),
        f"{block}.downsamplers.0.conv.lora_A.weight": (8, 64, 3, 3),
        f"{block}.downsamplers.0.conv.lora_B.weight": (64, 8, 1, 1),
        "base_model.model.up_blocks.1.resnets.1.conv_shortcut.lora_A.weight": (8, 128, 1, 1),
        "base_model.model.mid_block.resnets.1.time_emb_proj.lora_A.weight": (8, 256),
    }
    assert {name: tuple(kept[name].shape) for name in shapes} == shapes
    assert len(kept) == 228 and sum(value.numel() for value in kept.values()) == 259_072
    assert not any("conv_in" in name or "time_embedding" in name or "conv_out" in name for name in kept)
    said = adapters.config()
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", 8, 8)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in kept} == {
        target.rpartition(".")[2] for target in said["target_modules"]
    }


def test_what_was_learned_on_the_base_is_added_to_the_style_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """theta = base + lambda_1 tau' + lambda_2 tau_LCM, and neither the tuned network nor a picture of its style is asked. The
    adapter is asked for while the student is as it was built, in all variants."""
    task, roles = PASTEL, {"teacher": "scenes_pastel", "base": "scenes_eps", "vae": "scenes_vae"}
    session = idle_session(task, **{role: backbones.load(backbone) for role, backbone in roles.items()})
    method, style = method_of("lcm_lora_mixed"), 0.8
    session.begin("networks", 1)
    session.networks["student"] = method.networks(session)["student"]
    session.advance("prepare")
    once, built = session.once, [p.clone() for p in session.networks["student"].parameters()]

    def shared(function: Any, *literals: Any) -> Any:
        assert all(torch.equal(p, q) for p, q in zip(session.networks["student"].parameters(), built, strict=True))
        return once(function, *literals)

    monkeypatch.setattr(session, "once", shared)
    seen: list[nn.Module] = []
    for role in ("teacher", "vae"):
        session.networks[role].register_forward_pre_hook(lambda network, _: seen.append(network))
    session.networks["vae"].encode = lambda x: seen.append(x)  # type: ignore[assignment]
    kept = method.prepare(session)
    assert not seen
    assert max(float(value.abs().max()) for key, value in kept.items() if "lora_B" in key) > 0
    path = "unet.mid_block.resnets.0.conv1.weight"
    own, tuned, base = (session.networks[role].state_dict()[path] for role in ("student", "teacher", "base"))
    key = "base_model.model.mid_block.resnets.0.conv1"
    a, b = (kept[f"{key}.lora_{part}.weight"] for part in "AB")
    change = torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)  # alpha / rank is 1
    torch.testing.assert_close(own, base + style * (tuned - base) + change)


def test_an_adapter_in_random_order_has_the_same_numbers() -> None:
    value = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1))
    found = lcm_lora.shuffled(value, torch.Generator().manual_seed(2))
    assert found.shape == value.shape and not torch.equal(found, value)
    assert torch.equal(found.flatten().sort().values, value.flatten().sort().values)


# stochastic solvers and the critic --------------------------------------------------------------


def stepped(spread: str, seed: int = 0) -> Tensor:
    """One step of ten random rows."""
    pair, schedule = pair_of(10), Schedule("epsilon", scaled_linear())
    rng = torch.Generator().manual_seed(seed)
    return scott.stochastic_step(schedule, pair.x, pair.x0, pair.t, pair.s, spread, rng)


def test_the_stochastic_step_is_ddim_without_noise_and_the_posterior_with_all_of_it() -> None:
    """phi(l) = l: alpha_s x0 + sigma_s eps. phi(l) = l^2: q(x_s | x_t, x0) of the Markov chain, by its mean and variance."""
    pair, schedule = pair_of(10), Schedule("epsilon", scaled_linear())
    (alpha, sigma), (a, b) = (
        (schedule.alpha(u).view(-1, 1, 1, 1), schedule.sigma(u).view(-1, 1, 1, 1)) for u in (pair.t, pair.s)
    )
    torch.testing.assert_close(
        stepped("ode"), a * pair.x0 + b * (pair.x - alpha * pair.x0) / sigma, rtol=1e-6, atol=1e-6
    )
    noise = torch.randn(pair.x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    decay = (alpha / a) ** 2
    mean = (a * (1 - decay) * pair.x0 + decay.sqrt() * b**2 * pair.x) / sigma**2
    torch.testing.assert_close(stepped("sde"), mean + b * ((1 - decay) / sigma**2).sqrt() * noise)
    quiet, held, loud = ((stepped(name) - stepped(name, 1)).abs().max() for name in ("ode", "er_sde_5", "sde"))
    assert quiet < 1e-6 < 0.01 < held < 0.5 * loud


@pytest.mark.parametrize("spread", ["ode", "er_sde_5", "sde"])
def test_stochastic_steps_have_the_noise_of_their_time(spread: str) -> None:
    """Three parts from 0.6 to 0.3 with guidance: around the guided point lies noise of variance one, part of it the old."""
    network, n = Spot(), 300
    schedule, rng = schedule_of(network), torch.Generator().manual_seed(1)
    states = network.words(tokens(SAID[:1] * n))
    t, s, scale = (torch.full((n,), value, dtype=torch.float64) for value in (0.6, 0.3, 3.0))
    old = torch.randn(n, 4, 8, 8, generator=rng, dtype=torch.float64)
    point = -1 + 3 * (states[0, 0, 0] / 10 + 1)
    x = schedule.alpha(0.6) * point + schedule.sigma(0.6) * old
    with torch.no_grad():
        found = scott.stochastic_ahead(spread, 3, rng)(network, x, t, s, states, scale, schedule)
    assert network.rows == 2 * 3 * n
    new = (found - schedule.alpha(0.3) * point) / schedule.sigma(0.3)
    assert float(new.mean()) == pytest.approx(0, abs=0.02) and float(new.std()) == pytest.approx(1, abs=0.02)
    level, then = ((1 / schedule.alpha(u) ** 2 - 1) ** 0.5 for u in (0.6, 0.3))
    shares = {"ode": 1.0, "sde": then / level}
    share = float((new * old).mean())
    if spread in shares:
        assert share == pytest.approx(shares[spread], abs=0.02)
    else:
        assert shares["sde"] + 0.05 < share < 0.98


@pytest.mark.parametrize(
    ("name", "parts", "noisy", "adversary"),
    [
        *(("scott", 3, True, 0.4), ("scott_ode", 3, False, 0.4), ("scott_loud", 3, True, 0.4)),
        *(("scott_one_part", 1, True, 0.4), ("scott_no_critic", 3, True, 0.0)),
    ],
)
def test_arms_differ_in_noise_in_parts_or_in_the_critic(
    name: str, parts: int, noisy: bool, adversary: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two guided rows a part; two fifths of what the critic says are added to the loss, and it learns after every update."""
    session = preparing(FREE, teacher=Spot())
    session.networks["student"] = Spot()
    teacher, method, given = Spot(), method_of(name), dict[str, Any]()
    inside = type(method).prepare.__globals__

    class Judge:
        def __init__(self, *_: Any) -> None:
            self.lessons = 0

        def fooled(self, found: Tensor, pair: Pair) -> Tensor:
            return found.sum()

        def learn(self, found: Tensor, pair: Pair) -> None:
            self.lessons += 1

    monkeypatch.setitem(inside, "Critic", Judge)
    monkeypatch.setitem(inside, "distil", lambda *_, **how: given.update(how))
    method.prepare(session)
    pair = pair_of(4)
    way = (teacher, pair.x, pair.t, pair.s, pair.states, pair.guidance, schedule_of(teacher))
    with torch.no_grad():
        first, second = given["ahead"](*way), given["ahead"](*way)
    assert teacher.rows == 2 * 2 * parts * 4
    assert (float((first - second).abs().max()) > 1e-4) == noisy
    assert (given["extra"] is None) == (given["after"] is None) == (not adversary)
    if adversary:
        assert float(given["extra"](pair.x, pair)) == pytest.approx(adversary * float(pair.x.sum()))
        given["after"](pair.x, pair)
        assert given["after"].__self__.lessons == 1


def test_the_critic_is_the_teacher_with_a_decoder_that_learns() -> None:
    """Only adapters of the decoder and the output learn, real from predicted; it has a slope and heeds time and caption."""
    session = preparing(EPS, teacher=backbones.load("scenes_eps"))
    before = {name: p.clone() for name, p in session.networks["teacher"].named_parameters()}
    critic = scott.Critic(session.clone("teacher"), session.rng, 5e-3)
    names = {name for name, p in critic.network.named_parameters() if p.requires_grad}
    outputs = {"unet.conv_out.weight", "unet.conv_out.bias"}
    assert names > outputs
    assert all(name.startswith("unet.up_blocks.") and ".lora_" in name for name in names - outputs)
    pair = pair_of(4, torch.float32)
    found = torch.zeros_like(pair.x)

    def margin() -> float:
        with torch.no_grad():
            return float((critic.opinion(pair.x0, pair) - critic.opinion(found, pair)).mean())

    first = margin()
    for _ in range(4):
        critic.learn(found, pair)
    assert margin() > first + 0.1
    climbed = found.clone().requires_grad_(True)
    loss = critic.fooled(climbed, pair)
    loss.backward()
    assert climbed.grad is not None and float(climbed.grad.abs().max()) > 0
    torch.testing.assert_close(loss.detach(), -critic.opinion(found, pair).mean().detach())
    for other in (replace(pair, t=pair.t / 2), replace(pair, states=pair.states + 1)):
        assert (critic.opinion(found, other) - critic.opinion(found, pair)).abs().max() > 1e-4
    for name, p in session.networks["teacher"].named_parameters():
        assert torch.equal(p, before[name])


# rewards ----------------------------------------------------------------------------------------


def test_preferences_are_learned_as_the_experts_and_only_differences_count() -> None:
    """By hand: KL of two coins, of heads sigma(e_i - e_j) from sigma(p_i - p_j), over three pairs, the mean of the captions."""
    expert = torch.tensor([[0.0, 2.0], [1.0, -1.0], [3.0, 0.5]], dtype=torch.float64)
    proxy = torch.tensor([[0.5, 0.0], [0.0, 1.0], [1.0, 4.0]], dtype=torch.float64)
    wanted = 0.0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for column in range(2):
            heads, own = (1 / (1 + math.exp(float(r[j, column] - r[i, column]))) for r in (expert, proxy))
            wanted += 0.5 * (heads * math.log(heads / own) + (1 - heads) * math.log((1 - heads) / (1 - own)))
    assert float(rg_lcd.preference_loss(proxy, expert)) == pytest.approx(wanted, rel=1e-9)
    shifted = rg_lcd.preference_loss(expert + torch.tensor([7.0, -3.0]), expert)
    assert float(shifted) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("name", "climbs"), [("rg_lcd", False), ("rg_lcd_direct", True)])
def test_the_student_climbs_the_proxy_and_the_expert_only_where_it_is_direct(name: str, climbs: bool) -> None:
    """The expert is asked with gradients in the ablation alone, and for the proxy about three candidates for each caption."""
    session = preparing(EPS, teacher=Spot(), vae=Squares(), reward=Taste())
    session.networks["student"] = Spot(gain=0.5)
    slopes, rows = [], []
    session.networks["reward"].register_forward_pre_hook(lambda *_: slopes.append(torch.is_grad_enabled()))
    session.networks["vae"].register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    method_of(name, few=3).prepare(session)
    assert slopes == [climbs] and rows == [4 if climbs else 9]


@pytest.mark.parametrize("name", ["rg_lcd", "rg_lcd_direct"])
def test_what_is_climbed_is_taken_from_the_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """L - beta R: R the proxy's of the student's predictions for their captions, or in the ablation the expert's."""
    torch.manual_seed(0)
    session = preparing(EPS, teacher=Spot(), vae=Squares(), reward=Taste())
    session.networks["student"] = Spot()
    method, given = method_of(name), dict[str, Any]()
    monkeypatch.setitem(type(method).prepare.__globals__, "distil", lambda *_, **how: given.update(how))
    method.prepare(session)
    pair = pair_of(4)
    with torch.no_grad():
        if name == "rg_lcd":
            reward = log_probability(given["after"].__self__.reader(pair.x), pair.tokens)
        else:
            assert "after" not in given
            reward = judged(session, pair.x, pair.tokens)
        found = given["extra"](pair.x, pair)
    assert found.item() == pytest.approx(-0.02 * reward.mean().item(), rel=1e-9)


def test_a_proxy_climbs_what_it_has_learned_of_the_expert() -> None:
    """After some lessons the proxy prefers as the expert does, which its first weights do not; its own reward has a slope."""
    torch.manual_seed(0)
    session = preparing(EPS, vae=Squares(), reward=Taste())
    proxy = rg_lcd.Proxy(session, rg_lcd.LatentReader().double(), 3e-3, 4)
    pair = pair_of(4)
    pair = replace(pair, target=pair.ahead)

    def gap() -> float:
        three, said = torch.cat([pair.x, pair.ahead, pair.x0]), pair.tokens.repeat(3, 1)
        own, expert = log_probability(proxy.reader(three), said), judged(session, three, said)
        return rg_lcd.preference_loss(own.view(3, -1), expert.view(3, -1)).item()

    first = gap()
    for _ in range(15):
        proxy.learn(pair.x, pair)
    assert gap() < 0.3 * first
    found = pair.x.clone().requires_grad_(True)
    proxy.reward(found, pair).mean().backward()
    assert found.grad is not None and float(found.grad.abs().max()) > 0


def test_the_control_keeps_the_picture_that_the_reward_likes_best() -> None:
    """Two steps, decoder and reader for each of two: eight evaluations. One candidate is the sampler alone."""
    torch.manual_seed(1)
    networks = {"teacher": Spot(), "student": Bent(), "vae": Squares(), "reward": Taste()}
    session, batch = idle_session(EPS, **networks), asked(6)
    method, student = method_of("rg_lcd_best_of"), networks["student"]
    found, spent = ran(session, method, batch, 8)
    assert spent == 8
    session.begin("run", 5)
    rng = session.rng
    candidates, values = [], []
    noise = batch["noise"]
    for _ in range(2):
        candidates.append(sample(student, batch | {"noise": noise}, 2, rng, 3.0, schedule_of(student)))
        with torch.no_grad():
            values.append(judged(session, candidates[-1], batch["condition"])[0])
        noise = torch.randn(noise.shape, generator=rng, dtype=noise.dtype)
    chosen = torch.stack(values).argmax(0)
    assert 0 < int(chosen.sum()) < 6
    torch.testing.assert_close(found, torch.stack(candidates)[chosen, torch.arange(6)])
    assert ran(session, method, batch, 4)[1] == 4


# a flow -----------------------------------------------------------------------------------------


def test_the_teachers_step_of_a_flow_is_eulers_at_one_scale() -> None:
    """z + (t' - t) (v() + w (v(c) - v())), w = 3 in every row, and f is read from the velocity, also at pure noise."""
    session, pairs = preparing(FLOW, teacher=Spot("flow"), vae=Squares()), []
    teacher, schedule = session.networks["teacher"], schedule_of(session.networks["teacher"])
    distil(
        session, Spot("flow"), 4, told=False, scales=(3.0, 3.0), after=lambda found, pair: pairs.append((found, pair))
    )
    for found, pair in pairs:
        assert pair.guidance.tolist() == [3.0] * 4
        with torch.no_grad():
            null, cond = (teacher(pair.x, pair.t, c) for c in (teacher.null_condition(pair.states), pair.states))
            wide = (pair.s - pair.t).view(-1, 1, 1, 1)
            torch.testing.assert_close(pair.ahead, pair.x + wide * (null + 3 * (cond - null)))
            torch.testing.assert_close(pair.t - pair.s, torch.full_like(pair.t, 0.02))
            s = 10 * 1000 * pair.t.view(-1, 1, 1, 1)
            skip, out = 0.25 / (s**2 + 0.25), s / (s**2 + 0.25).sqrt()
            own = Spot("flow")
            for parameter in own.parameters():
                parameter.requires_grad_(False)
            plain = predict(own, pair.x, pair.t, pair.states, None, schedule)
            wanted = skip * pair.x + out * (pair.x - pair.t.view(-1, 1, 1, 1) * own(pair.x, pair.t, pair.states))
            torch.testing.assert_close(plain, wanted)
        assert found.shape == pair.x.shape
    one = sample(Spot("flow"), asked(), 1, torch.Generator(), None, schedule)
    assert torch.isfinite(one).all()
