"""Search, steering and adaptive budgets at inference: which pictures are tried, who judges them, and what goes on."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from rigs.images import idle_session, method_of, module_of, ran
from torch import Tensor, nn

from stepmark.backbones.scenes import HEADS, scaled_linear
from stepmark.backbones.scenes_judges import KINDS, LOGITS, parted
from stepmark.method import Skip
from stepmark.tracks.image.schedules import Schedule, schedule_of, uniform_times
from stepmark.tracks.image.solvers import Denoiser, ddim_step
from stepmark.tracks.scenes.captions import BACKGROUNDS, COLOURS, PLACES, SHAPES, read, tokens, write
from stepmark.tracks.text_to_image import search
from stepmark.tracks.text_to_image.sampling import noisy_step

torch.set_num_threads(1)

EPS, FLOW, FREE = "text_to_image/scenes_eps", "text_to_image/scenes_flow", "free/scenes_eps"
fk, rbf, ppad, cvsg, adadiff = (
    module_of(name) for name in ("fk_steering", "rbf_flow", "ppad", "c_vsg", "adadiff_step_selection")
)


# --- networks that are known exactly -----------------------------------------------------------------------------------


class Toy(nn.Module):
    """Data of N(mean, 1/4), one independent value for each; the mean hangs on the words and their order, by `heed`."""

    def __init__(self, prediction: str = "epsilon", heed: float = 0.0) -> None:
        super().__init__()
        self.prediction, self.heed = prediction, heed
        if prediction == "epsilon":
            self.alphas_cumprod = scaled_linear()

    def words(self, ids: Tensor) -> Tensor:
        return ids[:, :, None].float()

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.zeros_like(condition)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        schedule = schedule_of(self)
        t = (t if schedule.flow else (t + 1) / schedule.steps).view(-1, 1, 1, 1)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        mean = self.heed * (condition[:, :, 0] * torch.arange(32)).mean(1).view(-1, 1, 1, 1) / 100
        x0 = mean + alpha / 4 / (alpha**2 / 4 + sigma**2) * (x - alpha * mean)
        eps = (x - alpha * x0) / sigma
        return eps - x0 if schedule.flow else eps


class Shown(nn.Module):
    """A decoder that changes nothing and keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, z: Tensor) -> Tensor:
        self.shown.append(z.clone())
        return z


class Taste(nn.Module):
    """A reader that believes in background k the more, the nearer the mean of a picture is to (k - 3.5) / 50."""

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), LOGITS)
        wanted = (torch.arange(len(BACKGROUNDS)) - 3.5) / 50
        logits[:, -len(BACKGROUNDS) :] = -2e4 * (x.mean((1, 2, 3))[:, None] - wanted).square()
        return logits


def wishes(n: int, seed: int = 3) -> dict[str, Tensor]:
    """Noises, and captions that differ in the background that `Taste` looks for."""
    text = [f"a circle on {BACKGROUNDS[i % len(BACKGROUNDS)]}" for i in range(n)]
    noise = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"noise": noise, "condition": tokens(text)}


def toys(task: str = EPS, **others: nn.Module) -> Any:
    networks = {"teacher": Toy("flow" if task == FLOW else "epsilon"), "vae": Shown(), "reward": Taste()}
    return idle_session(task, **(networks | others))


def liked(pictures: Tensor, condition: Tensor) -> Tensor:
    """What `Taste` thinks of pictures [n B, ...]: [n, B]."""
    return search.judged(toys(), pictures, condition)


def by_ddim(network: nn.Module, batch: dict[str, Tensor], steps: int) -> Tensor:
    """Plain pictures; guidance of scale 3 as the methods have it."""
    x, denoise = batch["noise"], Denoiser(network, network.words(batch["condition"]), 3.0)
    with torch.no_grad():
        for t, s in pairwise(uniform_times(steps)):
            x = ddim_step(denoise.schedule, *denoise(x, t), s)
    return x


def each_is_one_of(found: Tensor, pictures: Tensor) -> Tensor:
    """Which of the pictures [n, B, ...] every one found [B, ...] is: [B]."""
    same = (pictures - found).flatten(2).abs().amax(2) < 1e-5
    assert bool(same.any(0).all())
    return same.float().argmax(0)


# --- what they share ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_noisy_steps_keep_the_marginal_and_without_noise_are_ddim(prediction: str, eta: float) -> None:
    schedule = Schedule(prediction, scaled_linear())
    draw = torch.Generator().manual_seed(0)
    x0 = torch.full((200_000,), 0.5)
    eps = torch.randn(x0.shape, generator=draw)
    found = noisy_step(schedule, x0, eps, 0.7, 0.3, eta, draw)
    assert float(found.mean()) == pytest.approx(0.5 * schedule.alpha(0.3), abs=0.01)
    assert float(found.std()) == pytest.approx(schedule.sigma(0.3), rel=0.01)
    left = torch.corrcoef(torch.stack([found, eps]))[0, 1]  # what is left of the old noise
    fresh = eta**2 * (
        1 - math.exp(2 * (schedule.log_snr(0.7) - schedule.log_snr(0.3)))
    )  # of a Markov chain, if eta = 1
    assert float(left) == pytest.approx((1 - fresh) ** 0.5, abs=0.01)
    if eta == 0:
        torch.testing.assert_close(found, ddim_step(schedule, x0, eps, 0.3))


@pytest.mark.parametrize("task", [EPS, FLOW])
@pytest.mark.parametrize("rung", [16, 32, 64])
def test_best_of_n_spends_the_rung_and_returns_what_the_reward_likes_best(task: str, rung: int) -> None:
    session, batch = toys(task), wishes(24)
    found, spent = ran(session, method_of("best_of_n"), batch, rung)
    assert spent == rung
    (shown,) = session.networks["vae"].shown
    best = liked(shown, batch["condition"]).argmax(0)
    shown = shown.view(-1, 24, 4, 8, 8)
    assert torch.equal(each_is_one_of(found, shown), best) and len(best.unique()) == len(shown) == max(2, rung // 16)
    first = by_ddim(Toy("flow" if task == FLOW else "epsilon"), batch, {16: 3, 32: 7, 64: 7}[rung])
    torch.testing.assert_close(shown[0], first)  # of the noise that is given
    with pytest.raises(Skip):
        ran(session, method_of("best_of_n"), batch, 8)


def test_one_of_n_by_lot_asks_no_reward_and_is_liked_less() -> None:
    session, batch = toys(), wishes(80)
    best, _ = ran(session, method_of("best_of_n"), batch, 64)
    shown = session.networks["vae"].shown.pop().view(-1, 80, 4, 8, 8)
    found, spent = ran(session, method_of("random_of_n"), batch, 64)
    assert spent == 56 and not session.networks["vae"].shown
    assert sorted(each_is_one_of(found, shown).unique().tolist()) == [0, 1, 2, 3]
    assert liked(found, batch["condition"]).mean() < liked(best, batch["condition"]).mean()


# --- FK steering -------------------------------------------------------------------------------------------------------


class Modes(nn.Module):
    """The exact noise of the mixture 0.9 N(-2, 0.25) + 0.1 N(2, 0.25) of single numbers."""

    prediction = "epsilon"

    def __init__(self) -> None:
        super().__init__()
        self.alphas_cumprod = scaled_linear()

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        schedule = schedule_of(self)
        time = float(t.flatten()[0] + 1) / schedule.steps
        alpha, sigma = schedule.alpha(time), schedule.sigma(time)
        spread = 0.25 * alpha**2 + sigma**2
        logs = torch.stack([math.log(w) - (x - alpha * m) ** 2 / 2 / spread for w, m in ((0.9, -2.0), (0.1, 2.0))])
        means = torch.stack([m + 0.25 * alpha / spread * (x - alpha * m) for m in (-2.0, 2.0)])
        return (x - alpha * (logs.softmax(0) * means).sum(0)) / sigma


@pytest.mark.parametrize("potential", ["max", "difference", "sum"])
def test_particles_follow_the_tilted_law_of_a_mixture(potential: str) -> None:
    """p(x) e^(k x) of the mixture has weights in proportion to w e^(k m), and modes at m + k / 4."""
    rng, n = torch.Generator().manual_seed(0), 30_000
    denoise = Denoiser(Modes(), torch.zeros(n, 1, dtype=torch.int64))
    k = 0.8 if potential != "sum" else 0.4  # the sum of many rewards is a strong potential: fewer particles count
    noise = torch.randn(n, 1, 1, 1, generator=rng)
    x, reward, last = fk.steered(denoise, noise, 60, 15, lambda x0: x0.view(n, 1), potential, k, rng)
    torch.testing.assert_close(reward, x.view(n, 1))
    weight, x = last[:, 0].softmax(0), x.flatten()
    assert 1 / float(weight.square().sum()) > 1000
    up, down = 0.1 * math.exp(2 * k), 0.9 * math.exp(-2 * k)
    assert float(weight[x > 0].sum()) == pytest.approx(up / (up + down), abs=0.05)
    for side in (x > 0, x < 0):  # 60 steps are few enough to make the modes a little narrow
        mean = float((weight * x)[side].sum() / weight[side].sum())
        assert mean == pytest.approx(math.copysign(2, float(x[side][0])) + k / 4, abs=0.09)


def test_potentials_are_of_the_rewards_of_a_particle_s_own_line() -> None:
    """Two particles and scripted rewards: weights so strong that the ancestors are certain, and the last potential is known."""
    expected = {  # both descend from the first, then from the second (whose line was at 3 before)
        "max": [2.0 - 3.0 - 5.0, 4.0 - 3.0 - 5.0],
        "difference": [2.0 - 5.0, 4.0 - 5.0],
        "sum": [2.0 - 3.0 - 8.0, 4.0 - 3.0 - 8.0],
    }
    for potential, last in expected.items():
        given = iter(torch.tensor([[[3.0], [1.0]], [[0.0], [5.0]], [[2.0], [4.0]]]))
        rng = torch.Generator().manual_seed(1)
        denoise = Denoiser(Modes(), torch.zeros(2, 1, dtype=torch.int64))
        found = fk.steered(
            denoise, torch.randn(2, 1, 1, 1, generator=rng), 6, 2, lambda _: next(given), potential, 50.0, rng
        )
        torch.testing.assert_close(found[2].flatten(), 50 * torch.tensor(last))
        assert not torch.isclose(*found[0].flatten())  # copies of one particle part: steps have noise of their own


@pytest.mark.parametrize("rung", [32, 64])
def test_steering_fits_the_rung_and_returns_the_best_of_the_last_particles(rung: int) -> None:
    session, batch = toys(), wishes(24)
    method, particles = method_of("fk_steering"), rung // 16
    found, spent = ran(session, method, batch, rung)
    assert spent == rung == particles * (2 * 5 + 2 * 3)
    assert [len(part) for part in session.networks["vae"].shown] == [24 * particles] * 3
    shown = session.networks["vae"].shown[-1]
    best = liked(shown, batch["condition"]).argmax(0)
    which = each_is_one_of(found, shown.view(particles, 24, 4, 8, 8))
    if particles == 2:  # of two particles always more than one counts
        assert torch.equal(which, best)
    assert float((which == best).float().mean()) > 0.5
    with pytest.raises(Skip):
        ran(session, method, batch, 16)


def test_the_last_resampling_is_left_out_only_where_many_particles_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripted ends of four particles: where one has all the weight it is returned, else that of the highest reward."""
    ends = torch.arange(4.0).repeat_interleave(2).view(8, 1, 1, 1).expand(8, 4, 8, 8)
    reward = torch.tensor([[0.0, 0.0], [9.0, 9.0], [1.0, 1.0], [2.0, 2.0]])
    last = torch.tensor([[0.0, 0.0], [0.0, 0.1], [0.0, 0.2], [99.0, 0.3]])
    monkeypatch.setattr(fk, "steered", lambda *_: (ends, reward, last))
    found, _ = ran(toys(), fk.FKSteering(), wishes(2), 64)
    assert found[:, 0, 0, 0].tolist() == [3, 1]


# --- rollover budget forcing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["linear", "vp"])
def test_the_converted_velocity_and_a_short_step_are_the_paper_s(path: str) -> None:
    """u = (c' / c) x + c t' v(x / c, t) moves x as alpha' x0 + sigma' eps, and a short step is Euler-Maruyama's."""
    flow, s, h = Toy("flow").double(), 0.6, 1e-4
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slope = {}
    for name, of in (("path", rbf.interpolant), ("flow", rbf.converted)):
        (a, b), (c, d) = of(path, s - h), of(path, s + h)
        slope[name] = ((c - a) / 2 / h, (d - b) / 2 / h)
    t, c = rbf.converted(path, s)
    alpha, sigma = rbf.interpolant(path, s)
    assert alpha / sigma == pytest.approx((1 - t) / t)
    v = flow(x / c, torch.full((3,), t, dtype=torch.float64), torch.zeros(3, 32, 1, dtype=torch.float64))
    u = slope["flow"][1] / c * x + c * slope["flow"][0] * v
    x0, eps = x / c - t * v, x / c + (1 - t) * v
    torch.testing.assert_close(alpha * x0 + sigma * eps, x)
    torch.testing.assert_close(slope["path"][0] * x0 + slope["path"][1] * eps, u, rtol=1e-5, atol=1e-5)

    g, r, noise = 3 * s**2, s - h, torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    euler = x - h * (u + 0.5 * g**2 * eps / sigma) + g * h**0.5 * noise  # the score is - eps / sigma
    share, after = rbf.kept(path, s, r), rbf.interpolant(path, r)
    found = after[0] * x0 + after[1] * (share * eps + (1 - share**2) ** 0.5 * noise)
    torch.testing.assert_close(found, euler, rtol=0, atol=2e-4)
    assert (found - x - (euler - x)).abs().max() < 0.02 * (euler - x).abs().max()


@pytest.mark.parametrize("path", ["linear", "vp"])
def test_the_stochastic_walk_ends_in_the_data_s_law(path: str) -> None:
    """The standard deviation of the data is 1/2, met to the first order of the steps, and little is left of the noise."""
    states, error = torch.zeros(64, 32, 1), {}
    for steps in (30, 120):
        walk, rng = rbf.Walk(Toy("flow"), states, path, steps), torch.Generator().manual_seed(0)
        first = x = torch.randn(64, 4, 8, 8, generator=rng)
        with torch.no_grad():
            for number in range(steps):
                at = torch.full((64,), number)
                x = walk.step(*walk.predict(x, at), at, torch.randn(x.shape, generator=rng))
        error[steps] = 0.5 - float(x.std())
        assert abs(float(torch.corrcoef(torch.stack([x.flatten(), first.flatten()]))[0, 1])) < 0.6  # 1 along the ODE
    assert abs(error[120]) < 0.02 and abs(error[120]) < 0.4 * error[30]


def one_by_one(values: list[float], total: int, searched: int, rollover: bool) -> tuple[list[int], int]:
    """The search of one item as a loop over its candidates: at which step each was drawn, and the number of the one that the
    last step ends with. The first quota of the values are of the noises."""
    quota = total // (searched + 1)
    record, budget, step, used, best, at = max(values[:quota]), quota, 1, 0, -1, []
    for number in range(quota, total):
        at.append(step)
        used += 1
        best = number if best < 0 or values[number] > values[best] else best
        early = rollover and values[number] > record
        record = max(record, values[number])
        if step < searched and (early or used == budget):
            step, budget, used, best = step + 1, quota + (budget - used if early else 0), 0, -1
    return at, best


@pytest.mark.parametrize(("rollover", "rung"), [(True, 64), (False, 64), (True, 32)])
def test_budgets_roll_over_item_by_item(rollover: bool, rung: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With scripted rewards every item is at the step, and ends with the candidate, that the loop over one item says."""
    n, searched, total = 30, rung // 16, {32: 6, 64: 15}[rung]
    values = torch.rand(total, n, generator=torch.Generator().manual_seed(4))
    shown: list[Tensor] = []
    times: list[Tensor] = []
    ends: list[Tensor] = []
    predicted: list[tuple[Tensor, Tensor]] = []
    predict, step = rbf.Walk.predict, rbf.Walk.step

    def script(session: Any, x0: Tensor, condition: Tensor) -> Tensor:
        shown.extend(x0.view(-1, n, 4, 8, 8))
        return values[len(shown) - len(x0) // n : len(shown)]

    def watched(self: Any, x: Tensor, at: Tensor) -> Any:
        times.append(at.clone())
        predicted.append(predict(self, x, at))
        return predicted[-1]

    def stepped(self: Any, x0: Tensor, eps: Tensor, at: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            ends.append(x0.clone())
        return step(self, x0, eps, at, noise)

    monkeypatch.setattr(rbf, "judged", script)
    monkeypatch.setattr(rbf.Walk, "predict", watched)
    monkeypatch.setattr(rbf.Walk, "step", stepped)
    method, quota = rbf.RolloverBudgetForcing(), total // (searched + 1)
    method.rollover = rollover
    found, _ = ran(toys(FLOW), method, wishes(n), rung)
    assert torch.equal(found, predicted[-1][0])
    drawn, rolled = torch.stack(times[1 : 1 + total - quota]), 0
    for item in range(n):
        at, last = one_by_one(values[:, item].tolist(), total, searched, rollover)
        assert drawn[:, item].tolist() == at
        torch.testing.assert_close(ends[0][item], shown[last][item])
        rolled += at != one_by_one(values[:, item].tolist(), total, searched, not rollover)[0]
    assert rolled > 3
    assert [int(each[0]) for each in times[1 + total - quota :]] == list(range(searched + 1, 6))


@pytest.mark.parametrize("name", ["rbf_flow", "rbf_flow_linear", "rbf_flow_by_lot"])
@pytest.mark.parametrize("rung", [32, 64])
def test_rollover_fits_the_rung_and_only_lots_ask_no_reward(name: str, rung: int) -> None:
    session, batch = toys(FLOW), wishes(40)
    found, spent = ran(session, method_of(name), batch, rung)
    judgings = {32: 6, 64: 15}[rung]
    assert spent == {32: 30, 64: 62}[rung] - (2 * judgings if name == "rbf_flow_by_lot" else 0)
    assert sum(len(part) for part in session.networks["vae"].shown) == (0 if "lot" in name else 40 * judgings)
    if name != "rbf_flow_by_lot":
        lots, _ = ran(toys(FLOW), method_of("rbf_flow_by_lot"), batch, rung)
        assert liked(found, batch["condition"]).mean() > liked(lots, batch["condition"]).mean()
    with pytest.raises(Skip):
        ran(session, method_of(name), batch, 16)


# --- PPAD --------------------------------------------------------------------------------------------------------------


def certain(background: str, **things: str) -> Tensor:
    """Logits [224] of a reader who is sure of what lies where: `left="a small red plain circle"`."""
    logits = parted(torch.zeros(1, LOGITS))
    for name, kinds in HEADS.items():
        logits[name][0, :, kinds] = 20.0
    logits["background"][0, BACKGROUNDS.index(background)] = 20.0
    for place, words in things.items():
        (thing,) = read(words).objects
        for name, value in thing.named().items():
            logits[name][0, PLACES.index(place.replace("_", " ")), value] = 40.0
    assert list(logits) == [*KINDS, "background"]
    return torch.cat([part.flatten() for part in logits.values()])


def said(logits: Tensor, caption: str) -> tuple[list[int], str] | None:
    found = ppad.observed({name: part[0] for name, part in parted(logits[None]).items()}, read(caption))
    return None if found is None else (found[0], write(found[1]))


def test_the_observer_names_what_is_missing_wrong_or_too_much() -> None:
    seen = certain("navy", left="a small red plain circle", top_right="a large blue dotted star")
    assert said(seen, "a red circle at left and a large star at top right on navy") is None
    assert said(seen, "a star and a small object") is None  # wherever they lie
    assert said(seen, "a green circle at left and a small star on navy") == (
        [0, 1],
        "a red circle at left and a large star at top right",
    )
    assert said(seen, "a circle at left and a square at centre") == ([1], "a star at top right")
    assert said(seen, "a circle and a star on wine") == ([], "on navy")
    assert said(certain("navy"), "a circle at left on navy") == ([0], "")
    assert said(seen, "a blue object") == ([], "a circle at left")  # one too many, not the one that fits better


def test_what_is_wrong_is_named_first_and_relations_stay_true() -> None:
    three = read("a circle at left and a star at right and a cross at top")
    assert write(ppad.foremost(three, [2])) == "a cross at top and a circle at left and a star at right"
    related = read("a circle above a star and a cross")
    assert write(ppad.foremost(related, [1])) == "a star below a circle and a cross"
    assert write(ppad.foremost(related, [0, 1])) == write(ppad.foremost(related, [2])) == write(related)


class Sure(nn.Module):
    """A reader that sees the same in every picture."""

    def __init__(self, sees: Tensor) -> None:
        super().__init__()
        self.sees = sees

    def forward(self, x: Tensor) -> Tensor:
        return self.sees.expand(len(x), -1)


def lines(*captions: str) -> dict[str, Tensor]:
    noise = torch.randn(len(captions), 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return {"noise": noise, "condition": tokens(captions)}


@pytest.mark.parametrize("name", ["ppad", "ppad_unprompted", "ppad_unseen"])
def test_pictures_that_match_go_on_and_the_others_are_sent_back(name: str) -> None:
    """At rung 32: a match is DDIM of as many steps, the others are sent back once, by the update written out."""
    network = Toy(heed=1.0)
    session = toys(teacher=Toy(heed=1.0), reward=Sure(certain("black", left="a small blue plain circle")))
    batch = lines("a blue circle at left", "a star at top and a red circle at left", "a blue circle at left on wine")
    method = method_of(name)
    found, spent = ran(session, method, batch, 32)
    steps, looked = (13, 6) if name == "ppad_unseen" else (11, 5)
    assert method.plan(schedule_of(network), 32) == (uniform_times(steps), [looked])
    back = 3 if name == "ppad_unseen" else 2
    assert 3 * spent == pytest.approx(3 * 2 * steps + (12 if method.observer else 0) + 5 * back)

    if method.observer:
        torch.testing.assert_close(found[:1], by_ddim(network, {k: v[:1] for k, v in batch.items()}, steps))
    corrected = {
        "ppad": ("a star at top and a red circle at left", "a blue circle at left"),
    }.get(name, ("a star at top and a red circle at left", ""))
    times, rng, schedule = uniform_times(steps), torch.Generator().manual_seed(5), schedule_of(network)
    fresh = torch.randn(back, 4, 8, 8, generator=rng)[back - 2]
    x, plain = batch["noise"][1:2], network.words(batch["condition"][1:2])
    denoise = Denoiser(network, plain, 3.0)
    right, wrong = (network.words(tokens([each])) for each in corrected)
    if not corrected[1]:
        wrong = torch.zeros_like(right)
    for step, (t, s) in enumerate(pairwise(times)):
        if step == looked:
            u = times[step - 1]

            def eps(z: Tensor, time: float, states: Tensor) -> Tensor:
                return network(z, torch.full((1,), time * 1000 - 1), states)

            noise = eps(x, t, wrong)
            x = schedule.alpha(u) / schedule.alpha(t) * (x - schedule.sigma(t) * noise) + schedule.sigma(u) * noise
            noise = eps(x, u, wrong) + 5 * (eps(x, u, right) - eps(x, u, wrong))
            x0 = (x - schedule.sigma(u) * noise) / schedule.alpha(u)
            ratio = (schedule.alpha(u) / schedule.alpha(t)) ** 2
            v = (schedule.sigma(t) / schedule.sigma(u)) ** 2 * (1 - ratio)
            x = schedule.alpha(t) * x0 + (schedule.sigma(t) ** 2 - v) ** 0.5 * noise + v**0.5 * fresh
        x = ddim_step(schedule, *denoise(x, t), s)
    torch.testing.assert_close(found[1:2], x, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_sketch_looks_one_step_ahead_where_noise_prevails_and_is_nearer_to_the_end() -> None:
    network, method = Toy(heed=1.0), method_of("ppad")
    schedule = schedule_of(network)
    x, states = lines("a star", "a star")["noise"], network.words(tokens(["a star"] * 2))
    denoise = Denoiser(network, states, 3.0)
    for t, blurred in ((0.9, True), (0.2, False)):
        assert method.blurred(schedule, t) is blurred
        x0, eps = denoise(x, t)
        found, end = method.sketch(network, x0, eps, t, states), x
        for now, then in pairwise(uniform_times(100, t)):
            end = ddim_step(schedule, *denoise(end, now), then)
        assert torch.equal(found, x0) != blurred
        assert not blurred or (found - end).norm() < 0.9 * (x0 - end).norm()


@pytest.mark.parametrize(("rung", "spent"), [(32, 31), (64, 64)])
def test_looks_and_ways_back_fit_the_rung(rung: int, spent: int) -> None:
    """The dearest case: every picture is wrong at every look. Where all match at the first, nobody looks again."""
    batch = lines("a star at top", "a cross")
    refused = toys(reward=Sure(certain("black")))
    assert ran(refused, method_of("ppad"), batch, rung)[1] == spent
    assert [len(part) for part in refused.networks["vae"].shown] == [2] * (rung // 32)
    accepted = toys(reward=Sure(certain("black", top="a small red plain star")))
    batch = lines("a star at top", "a red star")
    assert ran(accepted, method_of("ppad"), batch, rung)[1] == {32: 26, 64: 52}[rung]
    with pytest.raises(Skip):
        ran(accepted, method_of("ppad"), batch, 16)


# --- c-VSG -------------------------------------------------------------------------------------------------------------


def test_the_vendi_score_counts_what_differs() -> None:
    unit = torch.eye(6)
    same, half = unit[:1].expand(4, 6), unit[[0, 0, 1, 1]]
    torch.testing.assert_close(cvsg.vendi(torch.stack([unit[:4], same, half])), torch.tensor([4.0, 1.0, 2.0]))
    angle = torch.tensor([[1.0, 0.0], [0.6, 0.8]])  # eigenvalues 0.8 and 0.2
    expected = math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    assert float(cvsg.vendi(angle[None])) == pytest.approx(expected)


class Reader(nn.Module):
    """Features of pictures that are smooth in them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, 5, generator=torch.Generator().manual_seed(7)) / 8)

    def features(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.weight.to(x.dtype)).sin()


def spreading(name: str, **networks: nn.Module) -> tuple[Any, Any]:
    """A session of a method of the kind, with exemplars of every caption that are the same four."""
    others = {"features": cvsg.Features(Reader()), "guide": cvsg.Guide()}
    session = toys(FREE, **(others | networks))
    real = torch.nn.functional.normalize(torch.randn(4, 5, generator=torch.Generator().manual_seed(8)), dim=1)
    session.state = {"exemplars": real.expand(6, 8, 4, 5)}
    return session, method_of(name)


def test_the_guide_climbs_the_criterion_and_stays_where_bank_and_context_are_one() -> None:
    network, reader = Toy().double(), cvsg.Features(Reader())
    networks = {"vae": Shown(), "features": reader}
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=draw)
    bank, real = (
        torch.nn.functional.normalize(torch.randn(2, n, 5, dtype=torch.float64, generator=draw), dim=2) for n in (3, 4)
    )
    plain, schedule = Denoiser(network, torch.zeros(2, 32, 1, dtype=torch.float64)), schedule_of(network)

    def criterion(x: Tensor) -> Tensor:
        share = schedule.sigma(0.6)
        return cvsg.gain(reader(share * plain(x, 0.6)[0] + (1 - share) * x), bank, real, 2.0)

    push = cvsg.Guide()(x, 0.6, plain, networks, (bank, real), 2.0)
    torch.testing.assert_close(push.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    with torch.no_grad():
        along = torch.randn(x.shape, dtype=x.dtype, generator=draw)
        slopes = [(criterion(x + 1e-4 * d) - criterion(x - 1e-4 * d)) / 2e-4 for d in (push, along)]
    steepest = slopes[0] / x.flatten(1).norm(dim=1) ** 2  # so long is the gradient for each unit of push
    torch.testing.assert_close(slopes[1], steepest * (push * along).flatten(1).sum(1), rtol=1e-4, atol=1e-7)
    assert bool((slopes[0] > 0).all())
    still = cvsg.Guide()(x, 0.6, plain, networks, (real, real), 1.0)
    assert float(still.abs().max()) < 1e-3


class Pushes(nn.Module):
    """A guide that pushes by one everywhere and keeps the banks and the exemplars that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.banks: list[tuple[float, Tensor]] = []
        self.real: list[tuple[Tensor, float]] = []

    def forward(self, x: Tensor, t: float, *others: Any) -> Tensor:
        self.banks.append((t, others[2][0].clone()))
        self.real.append((others[2][1][:, 0, 0], others[3]))
        return torch.ones_like(x)


@pytest.mark.parametrize(("rung", "steps", "guided"), [(32, 10, 2), (64, 21, 5)])
def test_pictures_are_pushed_from_those_of_their_caption_before_them(rung: int, steps: int, guided: int) -> None:
    session, method = spreading("c_vsg", guide=Pushes())
    session.state = {"exemplars": torch.arange(48.0).view(6, 8, 1, 1).expand(6, 8, 4, 5)}
    text = ["a red star"] * 3 + ["a blue ring"] * 2
    batch = lines(*text)
    found, spent = ran(session, method, batch, rung)
    # of the four evaluations of a guided step, three are of networks that `Pushes` does not ask
    assert 5 * spent == 5 * (2 * steps + 2) + 3 * guided
    assert method.steps(rung) == (1, steps) and 2 * steps + 4 * guided + 2 <= rung
    plain = by_ddim(Toy(), batch, steps)
    torch.testing.assert_close(found[[0, 3]], plain[[0, 3]])
    assert [time for time, _ in session.networks["guide"].banks] == [1 - 5 * i / steps for i in range(guided)] * 2
    features = session.networks["features"](found)
    first, second = (session.networks["guide"].banks[i * guided][1] for i in (0, 1))
    torch.testing.assert_close(first, features[[0, 3]][:, None])
    torch.testing.assert_close(second, features[None, :2])
    said = [8 * SHAPES.index(shape) + COLOURS.index(colour) for shape, colour in (("star", "red"), ("ring", "blue"))]
    real, beta = session.networks["guide"].real[0]
    assert real.tolist() == said and beta == 2
    x, denoise = batch["noise"][1:2], Denoiser(Toy(), torch.zeros(1, 32, 1), 3.0)
    for step, (t, s) in enumerate(pairwise(uniform_times(steps))):
        eps, schedule = denoise(x, t)[1], denoise.schedule
        x = x + (0.05 if step % 5 == 0 else 0)
        x = schedule.alpha(s) / schedule.alpha(t) * (x - schedule.sigma(t) * eps) + schedule.sigma(s) * eps
    torch.testing.assert_close(found[1:2], x)


@pytest.mark.parametrize("rung", [32, 64])
def test_guided_pictures_fit_the_rung_and_gain_more_than_random_pushes(rung: int) -> None:
    batch, value = lines(*["a red star"] * 8), {}
    for name in ("c_vsg", "c_vsg_at_random", "c_vsg_picked"):
        session, method = spreading(name)
        found, spent = ran(session, method, batch, rung)
        assert spent <= rung
        features = cvsg.Features(Reader())(found)[None]
        value[name] = float(cvsg.gain(features[:, -1], features[:, :-1], session.state["exemplars"][0, :1], 2.0))
    if rung == 64:
        assert value["c_vsg"] > value["c_vsg_at_random"]
    with pytest.raises(Skip):
        ran(*spreading("c_vsg"), batch, 16)


def test_the_picked_one_is_that_of_the_greatest_gain() -> None:
    session, method = spreading("c_vsg_picked")
    batch = lines("a red star", "a red star", "a blue ring")
    found, spent = ran(session, method, batch, 64)
    assert 3 * spent == 16 + 64 + 16
    shown = session.networks["vae"].shown[-1]
    read_out = session.networks["features"](shown)
    bank = session.networks["features"](found[:1]).expand(4, 1, 5)
    gains = cvsg.gain(read_out, bank, session.state["exemplars"][0, :1].expand(4, 4, 5), 2.0)
    torch.testing.assert_close(found[1], shown[int(gains.argmax())])


def test_exemplars_are_real_pictures_of_what_the_caption_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures whose mean says what they are of; those of two objects are none."""
    kinds = torch.cartesian_prod(torch.arange(6), torch.arange(8)).repeat(10, 1)
    objects = torch.full((480, 3, 5), -1)
    objects[:, 0, :2] = kinds
    objects[::2, 1, 0] = torch.where(
        torch.arange(240) < 24, 0, -1
    )  # the first 48 pictures: every other one has two objects
    x0 = torch.zeros(480, 3, 32, 32)
    x0[:, 0, 0, 0], x0[:, 0, 0, 1] = (kinds[:, 0] + 1).float(), (kinds[:, 1] + 1).float()

    class Corner(nn.Module):
        def features(self, x: Tensor) -> Tensor:
            return x[:, 0, 0, :2]

    session, method = spreading("c_vsg", features=cvsg.Features(Corner()))
    monkeypatch.setattr(type(session), "train", property(lambda self: {"x0": x0, "objects": objects}))
    found = method.prepare(session)["exemplars"]
    assert found.shape == (6, 8, 4, 2)
    shape, colour = torch.arange(6)[:, None, None] + 1, torch.arange(8)[None, :, None] + 1
    torch.testing.assert_close(found[..., 0] / found[..., 1], (shape / colour).expand(6, 8, 4))


# --- AdaDiff -----------------------------------------------------------------------------------------------------------


def test_the_reward_is_what_is_saved_where_the_picture_is_good_enough() -> None:
    quality = torch.tensor([[-3.0, -2.0, -1.0, -0.5], [-1.0, -1.5, -0.7, -2.0]])
    found = adadiff.rewards(quality, torch.tensor([2.0, 3.0, 5.0, 7.0]))
    torch.testing.assert_close(found, torch.tensor([[-1, -1, 1 - 5 / 7, 0.0], [1 - 2 / 7, -1, 1 - 5 / 7, -1]]))
    assert [adadiff.choices(rung)[-1] for rung in (16, 32, 64)] == [7, 15, 31]


class Law(nn.Module):
    """A policy that says the same of all captions."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, states: Tensor) -> Tensor:
        return self.logits.expand(len(states), -1)


def test_a_draw_is_held_against_the_greedy_choice() -> None:
    """The loss in the mean over draws, of which the greedy choice has none, and none pulls where all are worth the same."""
    logits, rng = torch.tensor([0.5, 0.0, -0.5]), torch.Generator().manual_seed(12)
    reward, law = torch.tensor([[0.2, -1.0, 0.6]]), logits.log_softmax(0)
    found = adadiff.reinforce(Law(logits), torch.zeros(1, 1), reward, rng, 40_000)
    assert float(found) == pytest.approx(-float((law.exp() * (reward[0] - 0.2) * law).sum()), abs=0.02)
    assert float(adadiff.reinforce(Law(logits), torch.zeros(1, 1), torch.full((1, 3), 0.6), rng)) == 0


class Worded(Toy):
    """States of captions as wide as those of the text encoder."""

    def __init__(self, heed: float = 0.0) -> None:
        super().__init__(heed=heed)
        self.table = torch.randn(100, 64, generator=torch.Generator().manual_seed(11))

    def words(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def taught(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Policies that were trained where a circle is best in two steps, and everything else in as many as there are."""
    condition = tokens([f"a {shape} on {ground}" for shape in ("circle", "star", "ring") for ground in BACKGROUNDS])
    session = toys(teacher=Worded())
    circle = tokens(["circle"])[0, 1]
    monkeypatch.setattr(type(session), "train", property(lambda self: {"tokens": condition}))
    monkeypatch.setattr(adadiff, "sampled", lambda network, states, x, steps: torch.full_like(x, steps))

    def script(session: Any, x0: Tensor, wish: Tensor) -> Tensor:
        n = x0[:, 0, 0, 0]
        return torch.where((wish == circle).any(1), -n, n)[None]

    monkeypatch.setattr(adadiff, "judged", script)
    session.begin("prepare", 2)
    torch.manual_seed(2)
    found = adadiff.policies(session, 24, 150, (64,))
    monkeypatch.undo()
    return found


def test_policies_learn_few_steps_for_what_is_easy_and_no_more_than_enough_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a circle two steps are best; of the rest the better half are those with more, and the first of these saves most."""
    found = taught(monkeypatch)
    words, heard = Worded().words, tokens(["a circle on navy", "a star on navy", "a ring on wine"])
    policy = adadiff.Policy(8)
    policy.load_state_dict({k.removeprefix("64."): v for k, v in found.items() if k.startswith("64.")})
    chosen = torch.tensor(adadiff.STEPS)[policy(words(heard)).argmax(1)].tolist()
    assert chosen[0] in (2, 3) and chosen[1:] == [11, 11]
    share = found["share_64"].tolist()
    assert share[0] + share[1] == pytest.approx(1 / 3) and share[4] == pytest.approx(2 / 3)
    assert float(found["mean_64"]) == pytest.approx(2 * share[0] + 3 * share[1] + 11 * share[4])


class Long(nn.Module):
    """A policy that gives the choice of number 0 to captions that begin with one word, and the last to the others."""

    def __init__(self, word: Tensor, kinds: int) -> None:
        super().__init__()
        self.word, self.kinds = word, kinds

    def forward(self, states: Tensor) -> Tensor:
        logits = torch.zeros(len(states), self.kinds)
        last = torch.where((states[:, 2] == self.word).all(1), 0, self.kinds - 1)
        return logits.scatter(1, last[:, None], 1.0)


def test_every_picture_takes_the_steps_that_were_chosen_for_its_caption() -> None:
    network = Worded(heed=0.1)
    session = toys(teacher=network, policy_64=Long(network.words(tokens(["star"]))[0, 1], 8))
    batch = lines("a star on navy", "a ring on navy", "a star on wine")
    found, spent = ran(session, method_of("adadiff_step_selection"), batch, 64)
    assert 3 * spent == 3 + 2 * (2 + 31 + 2)
    for steps, rows in ((2, [0, 2]), (31, [1])):
        part = {name: value[rows] for name, value in batch.items()}
        torch.testing.assert_close(found[rows], by_ddim(network, part, steps))
    with pytest.raises(Skip):
        ran(session, method_of("adadiff_step_selection"), batch, 8)


def test_the_controls_take_the_mean_or_the_shares_and_no_policy() -> None:
    session, batch = toys(), wishes(200)
    session.state = {"mean_64": torch.tensor(6.2), "share_64": torch.tensor([0.5, 0, 0, 0, 0.5, 0, 0, 0])}
    found, spent = ran(session, method_of("adadiff_fixed"), batch, 64)
    assert spent == 14  # 6.2 steps and the policy's evaluation are at most seven
    torch.testing.assert_close(found, by_ddim(Toy(), batch, 7))
    _, spent = ran(session, method_of("adadiff_at_random"), batch, 64)
    assert spent == pytest.approx(2 * (2 + 11) / 2, abs=2) and spent != 13 / 2
