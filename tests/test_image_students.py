"""Students and generators trained in prepare: each against what is known exactly, before and after its training."""

from __future__ import annotations

from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from rigs.images import DIGITS, POINTS, batch_of, method_of, module_of, session_of
from torch import Tensor, nn

from stepmark import plugins
from stepmark.method import Skip
from stepmark.tracks.image import schedules, solvers, training

torch.set_num_threads(1)

slim, c2ot, ot_cfm, points, asbm, dsbm = (
    module_of(name) for name in ("slimflow", "c2ot", "ot_cfm", "flow_matching_points", "asbm", "dsbm")
)


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
    """A flow that is straight already is its own one-step student: only the stored pairs are left in the loss. Its two steps
    meet somewhere in [0.2, 0.8].
    """
    asked: list[Tensor] = []

    class Straight(nn.Module):
        prediction = "flow"

        def __init__(self, bend: float) -> None:
            super().__init__()
            self.bend = nn.Parameter(torch.tensor(bend))

        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            """Towards zero along straight lines, v = x / t, or bent away from them."""
            asked.append(t)
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
        assert asked[1].unique() == asked[2].unique() == asked[4].unique() == 1  # after the one call of the reflow
        assert 0.2 <= asked[3].min() < 0.3 and 0.7 < asked[3].max() <= 0.8
        asked.clear()
        method.anneal, method.guided = 0.0, False  # the naive way
        method.prepare(session)
        assert losses[3] < 1e-4, "the stored pairs are straight whatever the flow"
        asked.clear()
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
    for name in ("slimflow", "slimflow_annealed", "slimflow_naive", "slimflow_guided", "slimflow_direct"):
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
    for name in ("slimflow", "slimflow_annealed"):
        assert found[name][0] == pytest.approx(away, rel=0.1)
        assert all(later < earlier for earlier, later in pairwise(found[name][:7]))
        assert max(found[name][6:]) < 1e-6
    assert max(found["slimflow_naive"] + found["slimflow_guided"]) < 1e-6


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


def test_fields_are_trained_on_the_pairings_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same draws: conditions are kept by one, and the cheapest pairing of all is the other's; the third is random."""
    batch, found = batch_of(60, (2,), 2), {}
    data = torch.randn(60, 2, generator=torch.Generator().manual_seed(5)) + 3.0 * batch["condition"][:, None]
    for module, name in ((c2ot, "C2OT"), (ot_cfm, "OTCFM"), (points, "FlowMatchingPoints")):
        method, asked = getattr(module, name)(), []
        session = session_of(POINTS, method)
        monkeypatch.setattr(module, "fit_coupled", lambda *given, asked=asked, **_: asked.append(given))
        method.prepare(session)
        ((_, field, couple, _),) = asked
        assert field is session.networks["field"]
        found[name] = couple(batch["noise"], data, batch["condition"])
    away = {name: float((data - batch["noise"][order]).square().sum()) for name, order in found.items()}
    assert torch.equal(found["FlowMatchingPoints"], torch.arange(60))
    assert away["OTCFM"] < away["C2OT"] < away["FlowMatchingPoints"]
    kept = {name: torch.equal(batch["condition"][order], batch["condition"]) for name, order in found.items()}
    assert kept["C2OT"] and not kept["OTCFM"]


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


def test_the_critic_sees_where_a_transition_starts_and_when() -> None:
    """In both losses: of a critic that reads nothing but x_t and t both are known where every path starts at 2."""

    class Start(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Parameter(torch.zeros(2).double())

        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return x[:, 2:].sum(1, keepdim=True) - t[:, None] + self.idle.sum()

    class Origin(Start):
        def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            return self.idle.expand(len(x), 2)

    rng, softplus = torch.Generator().manual_seed(0), torch.nn.functional.softplus
    pairs = (torch.ones(8, 2).double(), torch.full((8, 2), 2.0).double(), torch.zeros(8, dtype=torch.int64))
    side = asbm.Projection(Origin(), Start(), 1e-2)
    loss, penalty = side.critic_loss(pairs, 1, EPSILON, rng)
    real = torch.tensor(2.0 + 2.0 - 1.0)
    assert float(loss.detach()) == pytest.approx(float(softplus(-real) + softplus(real)), rel=1e-5)
    assert float(penalty) == 0
    assert float(side.generator_loss(pairs, 1, EPSILON, rng)) == pytest.approx(float(softplus(-real)), rel=1e-5)


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

    def fit(side: Any, pairs: Any, count: int, steps: int, epsilon: float, rng: torch.Generator) -> None:
        rounds.append((id(side), *pairs()[:2]))
        assert (count, steps, epsilon) == (1, 4, 1.0) and rng is session.rng
        nn.init.constant_(next(side.average.parameters()), float(len(rounds)))

    def shifted(network: nn.Module, x: Tensor, *_: Any) -> Tensor:
        return x + 100.0

    monkeypatch.setattr(asbm.Projection, "fit", fit)
    monkeypatch.setattr(asbm, "transport", shifted)
    method.prepare(session)
    assert [side == rounds[0][0] for side, *_ in rounds] == [True, False, True]
    assert (next(session.networks["generator"].parameters()) == 3).all()  # the average of the forward side is what runs

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
