"""Methods of track bayes: each proof fails for a wrong implementation of the paper, and every method keeps the contract."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from stepmark.datasets import wearable
from torch import Tensor, nn

from stepmark import plugins
from stepmark import run as runs
from stepmark.cell import Cell
from stepmark.method import Method
from stepmark.task import load_split
from stepmark.tracks import bayes
from stepmark.tracks.bayes import coverage, linear, noising, problems, trials

TASKS = {task.id: task for task in (*bayes.TASKS, *coverage.TASKS)}
CPU = torch.device("cpu")
composed: Any = importlib.import_module("stepmark.methods.bayes.compositional_score_sbi")
METHODS = {name: info for name, info in plugins.methods().items() if info.track == "bayes"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def method(name: str) -> Method:
    return plugins.load_class(METHODS[name])()


def module(name: str) -> Any:
    return importlib.import_module(f"stepmark.methods.bayes.{name}")


def session(task: str, seed: int = 0, **networks: nn.Module) -> Any:
    """What `run` needs of a session, with uncounted handles."""
    return SimpleNamespace(
        task=TASKS[task],
        rng=generator(seed),
        seed=seed,
        device=CPU,
        networks=networks,
        simulators=(coverage if task.startswith("coverage/") else bayes).handles(TASKS[task], CPU),
    )


def quality(task: str, batch: dict[str, Tensor], draws: Tensor) -> dict[str, float]:
    bayes.check(TASKS[task], batch, draws)
    count = len(draws)
    return {k: v.value for k, v in bayes.score(TASKS[task], batch, draws, {}, np.arange(count)[None]).items()}


# Compositional scores -----------------------------------------------------------------------------------------------------


class Numbering(nn.Module):
    """Stands in for the encoder: keeps the exact posterior of every set, and returns the number of the set."""

    def __init__(self, model: problems.Problem) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        assert size is None or bool((size == x.shape[1]).all())
        self.posterior = self.model.posterior(x)
        return torch.arange(len(x))[:, None].float()


class ExactScore(nn.Module):
    """Stands in for the network: the exact score of the diffused posterior of the set whose number is the context."""

    def __init__(self, task: str, encoder: Numbering, subset: int = 1) -> None:
        super().__init__()
        self.encoder = encoder
        data = load_split(TASKS[task].dataset, "train")
        self.covariance = composed._residual_covariance(data[f"theta_{subset}"], data[f"x_{subset}"].mean(1))
        self.variances = torch.linalg.eigvalsh(self.covariance)

    def forward(self, theta: Tensor, t: Tensor, context: Tensor) -> Tensor:
        # As GaussianMixture.score, with the matrices of each set inverted once instead of once a row.
        law = self.encoder.posterior.diffused(float(t[0]))
        index = context[:, 0].long()
        residual = theta.double()[:, None] - law.means[index]
        weighted = (torch.linalg.inv(law.covariances)[index] @ residual[..., None]).squeeze(-1)
        log_probs = (law.log_weights - 0.5 * torch.logdet(law.covariances))[index] - 0.5 * (residual * weighted).sum(-1)
        return -(log_probs.softmax(-1)[..., None] * weighted).sum(-2).to(theta)


def exact_networks(task: str, subset: int = 1) -> tuple[ExactScore, Numbering]:
    encoder = Numbering(problems.problem(TASKS[task]))
    return ExactScore(task, encoder, subset), encoder


def exact_run(name: str, task: str, rung: int, sets: int = 6, seed: int = 0) -> dict[str, float]:
    """Scores of a method's `run` with exact scores in place of its networks."""
    batch = bayes.inputs(TASKS[task], sets, generator(seed + 1), CPU)
    score, encoder = exact_networks(task, getattr(method(name), "subset", 1) or 1)
    context = session(task, seed, score=score, encoder=encoder)
    return quality(task, batch, method(name).run(context, batch, rung))


@pytest.mark.parametrize(
    "task",
    ["posterior/gaussian_n10", "posterior/mixture_n10", "posterior/gaussian10_n30", "posterior/two_clusters_n10"],
)
@pytest.mark.parametrize("subset", [1, 5])
def test_bridging_score_is_the_posteriors_at_zero(task: str, subset: int) -> None:
    """(1 - K) grad log p + sum of the subsets' scores equals the exact score of all observations; at T it is -K theta."""
    batch = bayes.inputs(TASKS[task], 4, generator(), CPU)
    model = problems.problem(TASKS[task])
    x = batch["x"]
    n, d = x.shape[1:]
    k = n // subset
    posterior = model.posterior(x)
    theta = posterior.sample(7, generator(1))
    prior = model.prior.to(torch.float64).score(theta)
    exact = torch.stack([posterior.score(theta[:, s]) for s in range(7)], dim=1)
    factors = model.posterior(x.reshape(4, k, subset, d))

    def scores(t: float) -> Tensor:
        law = factors.diffused(t)
        wide = problems.GaussianMixture(law.log_weights[:, None], law.means[:, None], law.covariances[:, None])
        return wide.score(theta[:, :, None])

    assert torch.allclose(composed.compose_scores(scores(0.0), prior, 0.0), exact, atol=1e-6, rtol=1e-5)
    assert torch.allclose(composed.compose_scores(scores(1.0), prior, 1.0), -k * theta, atol=0.02 * k)
    # The stand-in for a network used below is that score too.
    score, encoder = exact_networks(task)
    numbers = encoder(x.reshape(4 * k, subset, d)).reshape(4, k, 1)
    assert torch.allclose(composed.set_scores(score, theta, 0.3, numbers.double()), scores(0.3), atol=1e-8)


@pytest.mark.parametrize(
    ("name", "task", "rung"),
    [
        ("compositional_score_sbi", "posterior/gaussian_n30", 480_000),
        ("compositional_score_sbi", "posterior/mixture_n10", 200_000),
        ("compositional_score_sbi", "posterior/two_clusters_n10", 200_000),
        ("compositional_score_sbi_partial", "posterior/gaussian_n30", 120_000),
    ],
)
def test_langevin_with_exact_scores_reaches_the_posterior(name: str, task: str, rung: int) -> None:
    found = exact_run(name, task, rung)
    assert found["mmd"] < 0.09 and found["mean_error"] < 0.22 and found["spread_error"] < 0.2, found


def test_reverse_sde_with_summed_exact_scores_does_not() -> None:
    """However many steps: about half the variance is left. The integrator is not to blame: one factor comes out right."""
    few, many = (exact_run("naive_sum_reverse_sde", "posterior/gaussian_n30", 3_000 * steps) for steps in (100, 300))
    langevin = exact_run("compositional_score_sbi", "posterior/gaussian_n30", 480_000)
    for found in (few, many):
        assert found["spread_error"] > 0.2 and found["spread_error"] > 2 * langevin["spread_error"], found
        assert found["mmd"] > 1.5 * langevin["mmd"] and found["mmd"] > 0.1, (found, langevin)

    task = "posterior/gaussian_n1"
    batch = bayes.inputs(TASKS[task], 24, generator(), CPU)
    exact, encoder = exact_networks(task)
    context = encoder(batch["x"])[:, None]
    alone = composed.reverse_sde(
        lambda theta, t: composed.set_scores(exact, theta, t, context)[:, :, 0],
        torch.randn(24, linear.DRAWS, 2, generator=generator(1)),
        300,
        float(exact.variances.mean()),
        1,
        6.0,
        generator(2),
    )
    assert quality(task, batch, alone)["spread_error"] < 0.11
    assert quality(task, batch, alone)["mmd"] < 0.06


@pytest.mark.parametrize("task", ["posterior/gaussian_n30", "posterior/mixture_n10"])
def test_reverse_diffusion_with_the_exact_set_score_reaches_the_posterior(task: str) -> None:
    found = exact_run("npse_set", task, 20_000, sets=16)
    assert found["mmd"] < 0.07 and found["mean_error"] < 0.18 and found["spread_error"] < 0.2, found


def test_a_wrong_prior_correction_is_noticed() -> None:
    """Leaving the (1 - n) prior term out counts the prior n times: the proof above can fail."""
    task = "posterior/gaussian_n30"
    batch = bayes.inputs(TASKS[task], 6, generator(1), CPU)
    exact, encoder = exact_networks(task)
    numbers = encoder(batch["x"].reshape(180, 1, 2)).reshape(6, 30, 1)
    times, sizes, repeats = composed.bridging_schedule(200, exact.covariance, 30)
    draws = composed.annealed_langevin(
        lambda theta, t: composed.set_scores(exact, theta, t, numbers).sum(2),
        torch.randn(6, linear.DRAWS, 2, generator=generator(2)) / 30**0.5,
        times,
        sizes,
        repeats,
        generator(3),
    )
    found = quality(task, batch, draws)
    assert found["mmd"] > 0.15 and found["mean_error"] > 0.4, found


def test_schedules_keep_to_their_steps() -> None:
    covariance = torch.tensor([[0.4, 0.2], [0.2, 0.4]])
    for steps in (1, 3, 32, 96, 960):
        times, sizes, repeats = composed.bridging_schedule(steps, covariance, 30)
        assert len(times) == len(sizes) and len(times) * repeats <= steps < (len(times) + 1) * repeats
        assert times == sorted(times, reverse=True) and times[-1] == pytest.approx(composed.T_MIN)
        # Stable and short in every direction: below the covariance that 30 factors leave, at both ends of the path.
        for size, t in zip(sizes, times, strict=True):
            a = noising.alpha_bar(t)
            room = (a * covariance + (1 - a) * torch.eye(2)) / 30 - size
            assert float(torch.linalg.eigvalsh(size).min()) > 0 and float(torch.linalg.eigvalsh(room).min()) > 0


# Monte Carlo baselines ----------------------------------------------------------------------------------------------------


def test_importance_weights_estimate_the_evidence_without_bias() -> None:
    """Mean of the weights over many batches of 20 proposals, against log p(theta) + log p(x | theta) - log p(theta | x)."""
    task = "posterior/mixture_n10"
    x = bayes.inputs(TASKS[task], 1, generator(), CPU)["x"]
    model = problems.problem(TASKS[task])
    theta = torch.zeros(1, 2, dtype=torch.float64)
    log_likelihood = model.log_likelihood(theta.expand(10, 2), x[0].double()).sum()
    prior = model.prior.to(torch.float64).log_prob(theta)
    evidence = float(prior + log_likelihood - model.posterior(x).log_prob(theta))
    _, log_weights = module("baselines.importance_sampling").weighted_proposals(
        session(task), x.expand(4_000, -1, -1), 200
    )
    estimates = (log_weights.double() - evidence).exp().mean(-1)
    assert log_weights.shape == (4_000, 20)
    assert abs(float(estimates.mean()) - 1) < 4 * float(estimates.std()) / 4_000**0.5
    assert float(estimates.std()) > 0.1


def test_systematic_resampling_keeps_expected_counts() -> None:
    weights = torch.tensor([[0.503, 0.297, 0.2, 0.0], [0.0, 0.0, 1.0, 0.0]])
    index = module("baselines.importance_sampling").systematic_resample(weights, 100, generator())
    counts = torch.stack([row.bincount(minlength=4) for row in index])
    assert bool(((counts - 100 * weights).abs() < 1).all())
    assert not torch.equal(index[0], index[0].sort().values)


@pytest.mark.parametrize("name", ["importance_sampling", "rejection"])
def test_exact_samplers_reach_the_posterior_with_budget(name: str) -> None:
    task = "posterior/mixture_n10"
    batch = bayes.inputs(TASKS[task], 12, generator(), CPU)
    found = [quality(task, batch, method(name).run(session(task), batch, rung)) for rung in (1_000, 60_000)]
    assert found[1]["mmd"] < 0.07 and found[1]["mean_error"] < 0.16, found[1]
    assert found[0]["mmd"] > 2 * found[1]["mmd"]


def test_rejection_accepts_at_the_rate_and_with_the_law_of_the_posterior() -> None:
    """Pooled over copies of one data set: marginals pass a Kolmogorov-Smirnov test against exact draws."""
    task = "posterior/gaussian_n1"
    x = bayes.inputs(TASKS[task], 1, generator(4), CPU)["x"].expand(30, -1, -1)
    draws = method("rejection").run(session(task), {"x": x}, 3_000)
    exact = problems.problem(TASKS[task]).posterior(x[:1]).sample(3_000, generator(5))[0]
    pooled = draws.flatten(0, 1)
    for direction in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, -1.0])):
        p = stats.ks_2samp((pooled @ direction).numpy(), (exact.float() @ direction).numpy()).pvalue
        assert p > 0.01
    assert len(pooled.unique(dim=0)) == 3_000  # budget enough: nothing repeated


def test_abc_narrows_with_the_budget() -> None:
    task = "posterior/gaussian_n10"
    batch = bayes.inputs(TASKS[task], 8, generator(), CPU)
    coarse, fine = (
        quality(task, batch, method("abc_rejection").run(session(task), batch, rung)) for rung in (3_200, 96_000)
    )
    assert fine["mmd"] < 0.6 * coarse["mmd"] and fine["mean_error"] < 0.5 * coarse["mean_error"]


# Coverage tests -----------------------------------------------------------------------------------------------------------


def rejections(name: str, simulations: int, models: int, seed: int = 0) -> dict[str, float]:
    task = "coverage/linear_gaussian"
    batch = coverage.inputs(TASKS[task], models, generator(seed), CPU)
    outputs = method(name).run(session(task, seed), batch, simulations)
    coverage.check(TASKS[task], batch, outputs)
    found = outputs["p_value"].gather(1, coverage.kinds(batch["estimators"]).argsort(1))
    return dict(zip(linear.ESTIMATORS, (found <= 0.05).double().mean(0).tolist(), strict=True))


REFERENCES: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "a point": lambda theta, x, rng: torch.full_like(theta, 0.7),
    "far away": lambda theta, x, rng: torch.full_like(theta, 40.0),
    "a function of x": lambda theta, x, rng: x[..., :4].sin() * 3,
    "random": lambda theta, x, rng: torch.randn(theta.shape, generator=rng),
}


def p_values(reference_of: Callable[[Tensor, Tensor, torch.Generator], Tensor], seed: int = 0) -> Tensor:
    """TARP's p-values [64, E] for 200 simulations each."""
    task = TASKS["coverage/linear_gaussian"]
    rng, calls = generator(seed), coverage.handles(task, CPU)
    batch = coverage.inputs(task, 64, rng, CPU)
    theta, x = linear.simulate_pairs(calls, rng, batch["design"], 200)
    reference = reference_of(theta, x, rng)
    found = module("tarp").ball_test(calls, rng, theta, x, batch, reference, torch.ones(4), 49)["p_value"]
    return found.gather(1, coverage.kinds(batch["estimators"]).argsort(1))


@pytest.mark.parametrize("name", list(REFERENCES))
def test_expected_coverage_of_the_exact_posterior_is_uniform_for_any_reference(name: str) -> None:
    """p-values of many repetitions are themselves uniform: ECP(c) = c whatever the law of the reference point."""
    p = p_values(REFERENCES[name])[:, 0]
    assert stats.kstest(p.numpy(), "uniform").pvalue > 0.01


def test_a_reference_that_knows_the_answer_breaks_the_test() -> None:
    """The one thing a reference point may not depend on is theta*: then even the exact posterior fails."""
    p = p_values(lambda theta, x, rng: theta + 0.3 * torch.randn(theta.shape, generator=rng))[:, 0]
    assert float((p <= 0.05).double().mean()) > 0.9


def test_tarp_sees_the_bias_that_hpd_coverage_and_ranks_do_not() -> None:
    tarp, hpd, sbc = (rejections(name, 400, 48) for name in ("tarp", "hpd_coverage", "sbc"))
    assert tarp["exact"] <= 0.17 and hpd["exact"] <= 0.17 and sbc["exact"] <= 0.17
    assert tarp["blind"] >= 0.9 and hpd["blind"] <= 0.17 and sbc["blind"] <= 0.17
    assert tarp["prior"] >= 0.9 and hpd["prior"] <= 0.17 and sbc["prior"] <= 0.17
    assert min(tarp["overconfident"], tarp["underconfident"]) >= 0.8
    assert min(hpd["overconfident"], hpd["underconfident"], sbc["shifted"]) >= 0.9


def test_only_references_that_depend_on_x_find_an_estimator_that_ignores_x() -> None:
    uniform = rejections("tarp_uniform", 400, 48, seed=1)
    assert uniform["prior"] <= 0.17 and uniform["exact"] <= 0.17
    assert uniform["blind"] >= 0.9


@pytest.mark.parametrize(("name", "pull"), [("tarp", 0.5), ("tarp_uniform", 0.0)])
def test_reference_points_are_uniform_on_the_box_around_a_share_of_the_posterior_mean(name: str, pull: float) -> None:
    batch, given = coverage.inputs(TASKS["coverage/linear_gaussian"], 2, generator(), CPU), []
    plugin = method(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plugin.run.__globals__, "ball_test", lambda *arguments: given.append(arguments))
        plugin.run(session("coverage/linear_gaussian"), batch, 2000)
    x, _, reference, width = given[0][3:7]
    mean = x @ linear._estimator(batch["design"], "exact")[0].mT
    centred = (mean - mean.mean(1, keepdim=True)).flatten()
    assert float(centred @ reference.flatten() / (centred @ centred)) == pytest.approx(pull, abs=0.1)
    free = reference - pull * mean
    for k in range(4):
        place = ((free[..., k] - free[..., k].mean()) / width[k] + 0.5).flatten()
        assert stats.kstest(place.numpy(), "uniform").statistic < 0.04


def test_tarp_spends_its_pilot_from_the_rung() -> None:
    spent: list[int] = []
    context = session("coverage/linear_gaussian")
    plain = context.simulators["simulator"]
    context.simulators["simulator"] = lambda theta, *rest: spent.append(len(theta)) or plain(theta, *rest)
    batch = coverage.inputs(TASKS["coverage/linear_gaussian"], 3, generator(), CPU)
    tested: list[int] = []
    plugin = method("tarp")
    judged = plugin.run.__globals__["ball_test"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            plugin.run.__globals__, "ball_test", lambda *given: tested.append(given[2].shape[1]) or judged(*given)
        )
        plugin.run(context, batch, 60)
    assert sum(spent) == 180 and tested == [48], "a fifth of them fit the reference points, and are not tested"


# Effects ------------------------------------------------------------------------------------------------------------------


def series(people: int, days: int, seed: int, bend: float = 1.0) -> tuple[dict[str, Tensor], np.ndarray]:
    """Observational series and the effects; `bend` 0: the outcome is linear in what a ridge regresses on."""
    rng = np.random.default_rng(seed)
    parameters = wearable.parameters(people, rng, bend)
    x, y = wearable.series(parameters, days, rng, coin=False)
    batch = {"treatment": torch.from_numpy(x), "outcome": torch.from_numpy(y)}
    return batch, wearable.recurring_effect(parameters)


def errors(name: str, batch: dict[str, Tensor], truth: np.ndarray, rung: int) -> np.ndarray:
    found: Any = method(name).run(session("effect/wearable"), batch, rung)
    assert bool((found["low"] <= found["high"]).all())
    return found["effect"].numpy() - truth


def test_motr_recovers_the_interventional_effect() -> None:
    """From long linear series the error vanishes, carry-over and confounding notwithstanding; the naive one stays."""
    batch, truth = series(16, 6_000, seed=1, bend=0.0)
    motr, naive = (errors(name, batch, truth, 12) for name in ("motr", "naive_difference"))
    assert abs(motr.mean()) < 0.02 and np.abs(motr).max() < 0.1
    assert naive.mean() > 0.2
    # There lagged regression is as good: such people cannot tell the two apart.
    regression = errors("lagged_regression", batch, truth, 1)
    assert abs(np.sqrt((motr**2).mean()) - np.sqrt((regression**2).mean())) < 0.015


def test_only_an_outcome_model_that_bends_recovers_the_effect_of_people_who_do() -> None:
    """Long series: regression, weights and trials with a linear twin keep a bias; the forest's is a fraction of it."""
    batch, truth = series(12, 6_000, seed=1)
    forest = abs(errors("motr_forest", batch, truth, 4).mean())
    for name in ("lagged_regression", "propensity_weighting", "motr"):
        assert abs(errors(name, batch, truth, 4).mean()) > max(0.04, 1.5 * forest), name


@pytest.mark.parametrize("name", ["motr", "motr_forest", "lagged_regression", "propensity_weighting"])
def test_adjusting_for_the_past_removes_most_of_the_bias(name: str) -> None:
    # A forest of 222 days shrinks every effect by half: it needs more of them.
    batch, truth = series(16, 1_500, seed=2) if name == "motr_forest" else series(48, 222, seed=2)
    rung = 64 if name.startswith("motr") else 1
    adjusted, naive = errors(name, batch, truth, rung), errors("naive_difference", batch, truth, 1)
    assert abs(adjusted.mean()) < 0.5 * abs(naive.mean())
    assert np.sqrt((adjusted**2).mean()) < np.sqrt((naive**2).mean())


@pytest.mark.parametrize("name", ["motr", "motr_forest"])
def test_virtual_trials_toss_fair_coins_and_keep_the_law_of_the_residuals(name: str) -> None:
    """Where neither treatment nor the past matters, a virtual trial is the person's own outcomes, reshuffled."""
    rng = np.random.default_rng(3)
    y = 7 + rng.exponential(1.0, (2, 2_000)) - 1
    x = (rng.random((2, 2_000)) < 0.3).astype(float)
    kept: dict[str, Tensor] = {}

    def spy(start: Tensor, treatment: Tensor, noise: Tensor, step: Callable[..., Tensor]) -> Tensor:
        kept.update(start=start, treatment=treatment, outcome=trials.virtual_trial(start, treatment, noise, step))
        return kept["outcome"]

    context = session("effect/wearable")
    context.simulators = {"trial": spy}
    batch = {"treatment": torch.from_numpy(x), "outcome": torch.from_numpy(y)}
    found: Any = method(name).run(context, batch, 5)
    tossed = kept["treatment"].reshape(2, 5, -1)
    assert abs(float(tossed.mean()) - 0.5) < 0.02  # not the 0.3 of the data
    lagged = torch.corrcoef(torch.stack([tossed[..., 1:].flatten(), tossed[..., :-1].flatten()]))[0, 1]
    assert abs(float(lagged)) < 0.03
    for person in range(2):
        simulated = kept["outcome"].reshape(2, -1)[person].numpy()
        own = y[person] if name == "motr_forest" else (y[person] - y[person].mean()) / y[person].std(ddof=1)
        # A forest predicts some of the noise of its training days, which blurs the law; a ridge does not.
        assert stats.ks_2samp(simulated, own).statistic < (0.15 if name == "motr_forest" else 0.05)
    assert bool((found["effect"].abs() < 0.15).all())
    outcome = kept["outcome"].reshape(2, 5, -1)
    each = [
        [float(y[t == 1].mean() - y[t == 0].mean()) for y, t in zip(outcome[i], tossed[i], strict=True)]
        for i in range(2)
    ]
    scale = 1.0 if name == "motr_forest" else torch.from_numpy(y.std(1, ddof=1))
    for end, share in (("low", 0.025), ("high", 0.975)):
        assert torch.allclose(found[end], torch.from_numpy(np.quantile(each, share, axis=1)) * scale, atol=1e-9), end


def test_motr_does_not_let_the_past_choose_the_treatment() -> None:
    """Treatment and yesterday's outcome are dependent in the data, independent in the virtual trials."""
    batch, _ = series(4, 222, seed=4)
    kept: list[Tensor] = []
    context = session("effect/wearable")

    def spy(start: Tensor, treatment: Tensor, noise: Tensor, step: Callable[..., Tensor]) -> Tensor:
        outcome = trials.virtual_trial(start, treatment, noise, step)
        kept.extend([treatment[:, 1:].flatten(), outcome[:, :-1].flatten()])
        return outcome

    context.simulators = {"trial": spy}
    method("motr").run(context, batch, 60)
    assert abs(float(torch.corrcoef(torch.stack(kept))[0, 1])) < 0.02
    observed = torch.stack([batch["treatment"][:, 1:].flatten(), batch["outcome"][:, :-1].flatten()])
    assert float(torch.corrcoef(observed)[0, 1]) > 0.3


def test_regression_and_weights_equal_reference_implementations() -> None:
    import statistics

    from sklearn.linear_model import LogisticRegression

    batch, _ = series(1, 222, seed=5)
    x, y = batch["treatment"][0].numpy(), batch["outcome"][0].numpy()
    design = np.stack([np.ones(221), x[1:], x[:-1], y[:-1]], axis=-1)
    regression: Any = method("lagged_regression").run(session("effect/wearable"), batch, 1)
    expected = np.linalg.lstsq(design, y[1:], rcond=None)[0][1]
    assert float(regression["effect"]) == pytest.approx(float(expected), abs=1e-8)

    features = np.stack([x[:-1], y[:-1] - y.mean()], axis=-1)
    chance = LogisticRegression(C=1.0, tol=1e-10, max_iter=500).fit(features, x[1:]).predict_proba(features)[:, 1]
    chance = chance.clip(0.02, 0.98)
    treated, untreated = x[1:] / chance, (1 - x[1:]) / (1 - chance)
    expected = (treated * y[1:]).sum() / treated.sum() - (untreated * y[1:]).sum() / untreated.sum()
    weighted: Any = method("propensity_weighting").run(session("effect/wearable"), batch, 1)
    assert float(weighted["effect"]) == pytest.approx(float(expected), abs=1e-3)

    naive: Any = method("naive_difference").run(session("effect/wearable"), batch, 1)
    difference = statistics.fmean(y[x == 1]) - statistics.fmean(y[x == 0])
    half = 1.96 * np.sqrt(y[x == 1].var(ddof=1) / (x == 1).sum() + y[x == 0].var(ddof=1) / (x == 0).sum())
    assert float(naive["effect"]) == pytest.approx(difference, abs=1e-9)
    assert float(naive["high"] - naive["effect"]) == pytest.approx(float(half), abs=1e-9)


# The contract -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METHODS))
def test_smoke_cell_is_ok_and_keeps_to_its_rung(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path))
    task = TASKS[METHODS[name].tasks[0]]
    rung = task.ladder("smoke")[0]
    record = runs.measure(Cell(name, task.id, rung, 0, "smoke"), timing=False, show_progress=False)
    assert (record.status, record.message, record.flags) == ("ok", None, [])
    assert set(record.quality) == set(task.metrics)
    assert record.counts["nfe"] <= rung


def test_rows_of_the_score_network_are_what_the_rung_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F-NPSE at 9600 evaluations per 100 draws and 30 observations: three Langevin steps, 9000 rows for each set."""
    monkeypatch.setenv("STEPMARK_CACHE", str(tmp_path))
    task = "posterior/gaussian_n30"
    record = runs.measure(Cell("compositional_score_sbi", task, 9_600, 0, "smoke"), timing=False, show_progress=False)
    assert record.counts["nfe"] == 9_000
