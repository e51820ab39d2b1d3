"""Track bayes: exact references, metrics, counted handles, the wrong estimators and the structural model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from stepmark.datasets import wearable
from stepmark.methods.bayes import compositional_score_sbi as composed
from torch import Tensor

from stepmark import plugins
from stepmark.meter.counts import BudgetExceeded, Ledger, watch_function
from stepmark.task import BadOutput, Sealed, load_split, sealed
from stepmark.tracks import bayes
from stepmark.tracks.bayes import coverage, linear, metrics, noising, problems, trials
from stepmark.tracks.bayes.problems import GaussianMixture

TASKS = {task.id: task for task in (*bayes.TASKS, *coverage.TASKS)}
POSTERIORS = [name for name in TASKS if name.startswith("posterior/")]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_tasks_are_literals_whose_metrics_score_returns() -> None:
    read = {name: task for name, (track, task) in plugins.tasks().items() if track == "bayes"}
    assert read == TASKS
    for task in TASKS.values():
        track = coverage if task.id.startswith("coverage/") else bayes
        batch = track.inputs(task, 4, generator(), CPU)
        if task.id.startswith("posterior/"):
            outputs: object = torch.randn(4, linear.DRAWS, batch["x"].shape[-1], generator=generator())
        elif task.id.startswith("coverage/"):
            outputs = {
                k: torch.rand(4, len(linear.ESTIMATORS), generator=generator()) for k in ("statistic", "p_value")
            }
        else:
            outputs = {k: torch.full((4,), v) for k, v in (("effect", 0.2), ("low", 0.0), ("high", 0.4))}
        track.check(task, batch, outputs)
        found = track.score(task, batch, outputs, {}, np.array([[0, 1, 2, 3], [0, 0, 1, 1]]))
        assert list(found) == list(task.metrics)
        for value in found.values():
            assert math.isfinite(value.value) and len(value.resamples) == 2
            assert value.resamples[0] == pytest.approx(value.value, abs=1e-12)


@pytest.mark.parametrize("name", sorted({task.dataset for task in bayes.TASKS}))
def test_datasets_match_their_digests(name: str) -> None:
    for split in ("train", "test"):
        assert all(bool(torch.isfinite(v).all()) for v in load_split(name, split).values())


@pytest.mark.parametrize("name", ["gaussian_mean", "gaussian10_mean", "mixture_mean", "two_clusters"])
def test_every_training_layout_spends_the_same_simulations(name: str) -> None:
    data = load_split(name, "train")
    for m in (1, 5, 10, 30):
        count, each, _ = data[f"x_{m}"].shape
        assert each == m and count == len(data[f"theta_{m}"])
        assert 10_000 - m < count * each <= 10_000


@pytest.mark.parametrize("name", ["posterior/gaussian_n10", "posterior/mixture_n10", "posterior/gaussian10_n30"])
def test_data_follow_the_declared_model(name: str) -> None:
    """Noise covariance and prior of the data are those that the exact posterior is computed from."""
    task = TASKS[name]
    model = problems.problem(task)
    data = load_split(task.dataset, "test")
    residual = (data["x"] - data["theta"][:, None]).flatten(0, 1)
    assert torch.allclose(residual.mT.cov(), model.noise, atol=0.04 * float(model.noise.max()))
    mean, covariance = model.prior.moments()
    theta = load_split(task.dataset, "train")["theta_1"]
    assert torch.allclose(theta.mean(0), mean, atol=0.08)
    assert torch.allclose(theta.mT.cov(), covariance, atol=0.1)


@pytest.mark.parametrize("name", ["posterior/gaussian_n10", "posterior/mixture_n10", "posterior/two_clusters_n10"])
def test_exact_posterior_is_prior_times_likelihood(name: str) -> None:
    """Against brute force: the normalised product on a grid, for density, mean and the score's finite differences."""
    task = TASKS[name]
    model = problems.problem(task)
    x = bayes.inputs(task, 1, generator(3), CPU)["x"].double()
    posterior = model.posterior(x)
    mean, covariance = (value[0] for value in posterior.moments())
    reach = 6 * covariance.diagonal().max().sqrt()
    axis = torch.linspace(-1, 1, 241, dtype=torch.float64) * reach
    grid = mean + torch.cartesian_prod(axis, axis)
    likelihood = sum(model.log_likelihood(grid, x[0, j].expand_as(grid)) for j in range(x.shape[1]))
    log_product = model.prior.to(torch.float64).log_prob(grid) + likelihood
    cell = float(axis[1] - axis[0]) ** 2
    exact = (log_product - log_product.logsumexp(0)).exp() / cell
    found = posterior.log_prob(grid).exp()
    assert float((found - exact).abs().max()) < 1e-3 * float(exact.max())
    assert torch.allclose((exact[:, None] * grid).sum(0) * cell, mean, atol=1e-3)

    theta = mean + 0.3 * torch.randn(5, 2, generator=generator(1), dtype=torch.float64)
    theta.requires_grad_(True)
    gradient = torch.autograd.grad(posterior.log_prob(theta).sum(), theta)[0]
    assert torch.allclose(posterior.score(theta), gradient, atol=1e-8)


def test_two_clusters_are_simulated_weighted_and_set_as_declared() -> None:
    """Data, simulator and likelihood agree: moments about theta, and the mean of p(x | theta') / p(x | theta) is 1."""
    model = problems.problem(TASKS["posterior/two_clusters_n30"])
    data = load_split("two_clusters", "test")
    weights = model.log_weights.exp()
    centre = weights @ model.offsets
    spread = model.noise + (model.offsets - centre).mT @ ((model.offsets - centre) * weights[:, None])
    theta = torch.tensor([[0.4, -0.2]]).expand(40_000, 2)
    simulated_x = model.simulate(theta, generator())
    for residual in ((data["x"] - data["theta"][:, None]).flatten(0, 1), simulated_x - theta):
        assert torch.allclose(residual.mean(0), centre, atol=0.04)
        assert torch.allclose(residual.mT.cov(), spread, atol=0.06)
    other = theta + torch.tensor([0.3, 0.2])
    ratio = (model.log_likelihood(other, simulated_x) - model.log_likelihood(theta, simulated_x)).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 200


def test_a_regression_is_exact_on_gaussians_and_far_off_on_two_clusters() -> None:
    """What a network has to learn: nothing there, a good deal here."""
    found = {}
    method = plugins.load_class(plugins.methods()["linear_posterior"])()
    for name in ("posterior/gaussian_n30", "posterior/two_clusters_n30", "posterior/two_clusters_n10"):
        task = TASKS[name]
        session = SimpleNamespace(task=task, rng=generator(), train=load_split(task.dataset, "train"))
        session.state = method.prepare(session)
        batch = bayes.inputs(task, 64, generator(1), CPU)
        found[name] = bayes.score(task, batch, method.run(session, batch, 1), {}, np.arange(64)[None])["mmd"].value
    assert found["posterior/gaussian_n30"] < 0.1, found
    assert min(found["posterior/two_clusters_n30"], found["posterior/two_clusters_n10"]) > 0.18, found


def test_mixture_draws_have_the_moments_and_the_diffused_law() -> None:
    task = TASKS["posterior/mixture_n10"]
    posterior = problems.problem(task).posterior(bayes.inputs(task, 3, generator(), CPU)["x"])
    draws = posterior.sample(40_000, generator(1))
    mean, covariance = posterior.moments()
    assert torch.allclose(draws.mean(1), mean, atol=0.03)
    for found, expected in zip(draws, covariance, strict=True):
        assert torch.allclose(found.mT.cov(), expected, atol=0.03)
    t = 0.2
    a = noising.alpha_bar(t)
    noised = a**0.5 * draws + (1 - a) ** 0.5 * torch.randn(draws.shape, generator=generator(2), dtype=draws.dtype)
    expected_mean, expected_covariance = posterior.diffused(t).moments()
    assert torch.allclose(noised.mean(1), expected_mean, atol=0.03)
    assert torch.allclose(noised[0].mT.cov(), expected_covariance[0], atol=0.03)


def test_squared_mmd_is_unbiased_and_equals_the_sample_estimate() -> None:
    """Zero on average for exact draws; for others, what an independent sample of the target gives."""
    task = TASKS["posterior/mixture_n10"]
    target = problems.problem(task).posterior(bayes.inputs(task, 64, generator(), CPU)["x"])
    values = torch.cat([metrics.squared_mmd(target.sample(100, generator(k)), target) for k in range(8)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / len(values) ** 0.5
    assert float(values.std()) > 0

    one = GaussianMixture(target.log_weights[:1], target.means[:1], target.covariances[:1])
    draws = one.sample(400, generator(9)) * 1.3 + 0.4
    other = one.sample(6_000, generator(10))
    expected = 0.0
    for h in (0.5, 1.0, 2.0):

        def kernel(a: Tensor, b: Tensor, h: float = h) -> Tensor:
            return torch.exp(-torch.cdist(a, b).square() / (2 * h * h))

        n, m = draws.shape[1], other.shape[1]
        among = (kernel(draws[0], draws[0]).sum() - n) / (n * (n - 1))
        within = (kernel(other[0], other[0]).sum() - m) / (m * (m - 1))
        expected += float(among + within - 2 * kernel(draws[0], other[0]).mean()) / 3
    assert float(metrics.squared_mmd(draws, one)) == pytest.approx(expected, abs=0.004)
    assert expected > 0.02


def test_posterior_metrics_rank_wrong_draws_behind_exact_ones() -> None:
    task = TASKS["posterior/gaussian_n10"]
    batch = bayes.inputs(task, 32, generator(), CPU)
    posterior = problems.problem(task).posterior(batch["x"])
    mean, _ = posterior.moments()
    exact = posterior.sample(linear.DRAWS, generator(1))
    wrong = {
        "narrow": mean[:, None] + 0.6 * (exact - mean[:, None]),
        "wide": mean[:, None] + 1.6 * (exact - mean[:, None]),
        "shifted": exact + 0.7 * exact.std(1, keepdim=True),
        "collapsed": mean[:, None].expand_as(exact),
    }
    resample = np.arange(32)[None]
    good = {k: v.value for k, v in bayes.score(task, batch, exact.float(), {}, resample).items()}
    assert good["mmd"] < 0.05 and good["mean_error"] < 0.13 and good["spread_error"] < 0.08
    for name, draws in wrong.items():
        bad = {k: v.value for k, v in bayes.score(task, batch, draws.float(), {}, resample).items()}
        assert bad["mmd"] > 3 * max(good["mmd"], 0.03), name
        assert bad["sliced_w2"] > 1.3 * good["sliced_w2"], name
        culprit = "mean_error" if name == "shifted" else "spread_error"
        assert bad[culprit] > 3 * good[culprit], name
    # 0.6 and 1.6 times the spread read as such
    narrow = bayes.score(task, batch, wrong["narrow"].float(), {}, resample)["spread_error"].value
    assert narrow == pytest.approx(-math.log(0.6), abs=0.06)


def test_batches_hold_no_answers_and_hang_on_the_seed() -> None:
    for task in TASKS.values():
        first, again, other = (bayes.inputs(task, 5, generator(seed), CPU) for seed in (1, 1, 2))
        assert not {"theta", "effect"} & set(first)
        key = next(iter(first))
        assert torch.equal(first[key], again[key]) and not torch.equal(first[key], other[key])
        assert all(len(value) == 5 for value in first.values())


def test_answers_are_out_of_a_methods_reach() -> None:
    task = TASKS["posterior/gaussian_n10"]
    batch = bayes.inputs(task, 2, generator(), CPU)
    model = problems.problem(task)
    with sealed():
        for reach in (
            lambda: model.posterior(batch["x"]),
            lambda: bayes.inputs(task, 2, generator(), CPU),
            lambda: bayes.score(task, batch, torch.zeros(2, linear.DRAWS, 2), {}, np.zeros((1, 2), dtype=int)),
            lambda: load_split("wearable", "test"),
        ):
            with pytest.raises(Sealed):
                reach()
        assert problems.problem(task).prior.log_weights.shape == (1,)


@pytest.mark.parametrize(
    ("task", "outputs", "message"),
    [
        ("posterior/gaussian_n1", torch.zeros(2, linear.DRAWS - 1, 2), "expected shape"),
        ("posterior/gaussian_n1", torch.full((2, linear.DRAWS, 2), math.nan), "NaN"),
        ("posterior/gaussian_n1", torch.zeros(2, linear.DRAWS, 2, dtype=torch.int64), "floating point"),
        ("posterior/gaussian_n1", None, "expected a tensor"),
        ("coverage/linear_gaussian", torch.zeros(2, 6), "expects a dict"),
        ("coverage/linear_gaussian", {"statistic": torch.zeros(2, 6), "p_value": torch.full((2, 6), 1.5)}, "outside"),
        ("effect/wearable", {"effect": torch.zeros(2), "low": torch.ones(2), "high": torch.zeros(2)}, "above high"),
        ("effect/wearable", {"effect": torch.zeros(2), "low": torch.zeros(2)}, "high: expected a tensor"),
    ],
)
def test_bad_outputs_are_named(task: str, outputs: object, message: str) -> None:
    batch = bayes.inputs(TASKS[task], 2, generator(), CPU)
    with pytest.raises(BadOutput, match=message):
        bayes.check(TASKS[task], batch, outputs)


def test_likelihood_rows_are_counted_against_the_rung() -> None:
    task = TASKS["posterior/gaussian_n10"]
    ledger = Ledger(bounded=task.bounded)
    calls = {name: watch_function(ledger, name, f) for name, f in bayes.handles(task, CPU).items()}
    ledger.reset(10)
    theta = torch.zeros(6, 2)
    calls["log_likelihood"](theta, theta)
    assert ledger.spent == 6
    with pytest.raises(BudgetExceeded):
        calls["simulator"](theta, generator())
    with pytest.raises(ValueError, match="one of each per row"):
        bayes.handles(task, CPU)["log_likelihood"](theta, theta[:3])


def test_likelihood_and_simulator_agree() -> None:
    model = problems.problem(TASKS["posterior/gaussian_n1"])
    theta = torch.tensor([[0.5, -1.0]])
    draws = model.simulate(theta.expand(50_000, 2), generator())
    assert torch.allclose(draws.mean(0), theta[0], atol=0.02)
    assert torch.allclose(draws.mT.cov(), model.noise, atol=0.03)
    reference = stats.multivariate_normal(theta[0].numpy(), model.noise.numpy()).logpdf(draws[:50].numpy())
    found = model.log_likelihood(theta.expand(50, 2), draws[:50]).numpy()
    assert np.allclose(found, reference, atol=1e-4)


# Coverage ---------------------------------------------------------------------------------------------------------------


def simulated(count: int, models: int = 4, seed: int = 0) -> SimpleNamespace:
    rng = generator(seed)
    design = coverage.inputs(TASKS["coverage/linear_gaussian"], models, rng, CPU)["design"]
    theta, x = linear.simulate_pairs(bayes.handles(TASKS["coverage/linear_gaussian"], CPU), rng, design, count)
    return SimpleNamespace(design=design, theta=theta, x=x, rng=rng)


@pytest.mark.parametrize("name", ["exact", "blind", "prior"])
def test_calibrated_on_average(name: str) -> None:
    """theta* - mean has the covariance that the estimator claims: HPD regions and ranks are right on average."""
    data = simulated(20_000)
    gain, shift, covariance = linear._estimator(data.design, name)
    error = data.theta - data.x @ gain.mT - shift[:, None]
    for found, expected in zip(error, covariance, strict=True):
        assert torch.allclose(found.mT.cov(), expected, atol=0.05)


def test_estimators_stand_in_an_order_of_their_own_for_every_model() -> None:
    """Whoever answers by the place of a column is right by chance only, and the score puts columns back in their places."""
    task = TASKS["coverage/linear_gaussian"]
    batch = coverage.inputs(task, 200, generator(), CPU)
    places = coverage.kinds(batch["estimators"])
    assert torch.equal(places.sort(1).values, torch.arange(6).expand(200, 6))
    assert all(0.05 < float((places[:, 0] == k).double().mean()) < 0.3 for k in range(6))
    right = {"statistic": places.double(), "p_value": (places == 0).double()}
    by_place = {"statistic": places.double(), "p_value": torch.eye(6)[0].expand(200, 6)}
    rows = np.arange(200)[None]
    assert coverage.score(task, batch, right, {}, rows)["power"].value == 1.0
    assert coverage.score(task, batch, right, {}, rows)["false_alarm"].value == 0.0
    assert coverage.score(task, batch, by_place, {}, rows)["false_alarm"].value > 0.7


def test_only_the_exact_estimator_is_uncorrelated_with_its_mean() -> None:
    """The bias of `blind`: what is left of theta still depends on what the estimator said."""
    data = simulated(20_000)
    for name, low, high in (("exact", 0.0, 0.03), ("blind", 0.2, 1.0)):
        gain, _, _ = linear._estimator(data.design, name)
        mean = data.x @ gain.mT
        slope = (mean * (data.theta - mean)).mean((1, 2)) / mean.square().mean((1, 2))
        assert bool(((low <= slope.abs()) & (slope.abs() <= high)).all()), name


def test_exact_estimator_is_the_posterior_of_the_simulator() -> None:
    """Its mean is the least-squares predictor of theta from x, and its density that of its draws."""
    data = simulated(20_000)
    gain, _, covariance = linear._estimator(data.design, "exact")
    for b in range(4):
        fitted = torch.linalg.lstsq(data.x[b], data.theta[b]).solution.mT
        assert torch.allclose(gain[b], fitted, atol=0.06)
    draws = linear.estimator_draws(data.x[:, :2], data.design, "exact", 5, data.rng)
    found = linear.estimator_log_density(draws, data.x[:, :2], data.design, "exact")
    mean = (data.x[:, :2] @ gain.mT)[1, 0].numpy()
    reference = stats.multivariate_normal(mean, covariance[1].numpy()).logpdf(draws[1, 0].numpy())
    assert np.allclose(found[1, 0].numpy(), reference, atol=1e-3)
    with pytest.raises(ValueError, match="no estimator"):
        linear.estimator_draws(data.x, data.design, "nonesuch", 5, data.rng)


def test_uniformity_is_the_exact_kolmogorov_smirnov_test() -> None:
    f = torch.rand(3, 40, generator=generator(5)) ** torch.tensor([[1.0], [1.3], [3.0]])
    statistic, p_value = metrics.uniformity(f)
    for k in range(3):
        reference = stats.kstest(f[k].double().numpy(), "uniform", method="exact")
        assert float(statistic[k]) == pytest.approx(reference.statistic, abs=1e-6)
        assert float(p_value[k]) == pytest.approx(reference.pvalue, rel=1e-3)


# Effects ----------------------------------------------------------------------------------------------------------------


def test_effect_is_what_a_long_coin_toss_trial_measures() -> None:
    rng = np.random.default_rng(0)
    people = wearable.parameters(40, rng)
    x, y = wearable.series(people, 6_000, rng, coin=True)
    trial = np.array([y[i, x[i] == 1].mean() - y[i, x[i] == 0].mean() for i in range(40)])
    error = trial - wearable.recurring_effect(people)
    assert abs(error.mean()) < 0.01 and error.std() < 0.04
    x, y = wearable.series(people, 6_000, rng, coin=False)
    observed = np.array([y[i, x[i] == 1].mean() - y[i, x[i] == 0].mean() for i in range(40)])
    assert (observed - wearable.recurring_effect(people)).mean() > 0.2  # confounded


def test_a_person_bends_as_no_regression_on_the_four_does() -> None:
    """Least squares on 1, X, X_lag, Y_lag, X Y_lag leaves structure behind in the mean, and none once `bend` is 0."""
    rng = np.random.default_rng(7)
    x, x_lag, y_lag = (rng.integers(2, size=4_000), rng.integers(2, size=4_000), rng.normal(size=4_000))
    design = np.stack([np.ones(4_000), x, x_lag, y_lag, x * y_lag], axis=-1)
    for bend, low, high in ((0.0, 0.0, 1e-12), (1.0, 0.1, 1.0)):
        people = wearable.parameters(5, np.random.default_rng(8), bend)
        for i in range(5):
            mean = wearable.outcome_mean({k: v[i] for k, v in people.items()}, x, x_lag, y_lag)
            left = mean - design @ np.linalg.lstsq(design, mean, rcond=None)[0]
            assert low <= left.std() <= high, (bend, i)


def test_tasks_show_their_days() -> None:
    short, long = (
        bayes.inputs(TASKS[f"effect/{name}"], 3, generator(), CPU) for name in ("wearable", "wearable_years")
    )
    assert short["outcome"].shape == (3, 222) and long["outcome"].shape == (3, 2190)
    assert torch.equal(long["treatment"][:, :222], short["treatment"])


def test_structural_noise_is_standardised_and_skewed() -> None:
    noise = wearable.noise((400_000,), np.random.default_rng(1))
    assert abs(noise.mean()) < 0.01 and abs(noise.var() - 1) < 0.01 and stats.skew(noise) < -0.3


def test_virtual_trial_feeds_outcomes_and_treatments_back() -> None:
    rng = generator(2)
    start, treatment = torch.randn(3, 2, generator=rng), torch.randint(2, (3, 7), generator=rng).float()
    noise = torch.randn(3, 7, generator=rng)
    found = trials.virtual_trial(start, treatment, noise, lambda x, x_lag, y_lag: 0.3 * x - 0.2 * x_lag + 0.5 * y_lag)
    for i in range(3):
        x_lag, y_lag = (float(v) for v in start[i])
        for t in range(7):
            y_lag = 0.3 * float(treatment[i, t]) - 0.2 * x_lag + 0.5 * y_lag + float(noise[i, t])
            x_lag = float(treatment[i, t])
            assert float(found[i, t]) == pytest.approx(y_lag, abs=1e-5)


def test_effect_metrics_read_bias_error_and_coverage() -> None:
    task = TASKS["effect/wearable"]
    batch = bayes.inputs(task, 50, generator(), CPU)
    truth = load_split("wearable", "test")["effect"][batch["person"]]
    outputs = {"effect": truth + 0.1, "low": truth - 0.1, "high": truth + 0.3}
    outputs["low"][:10] = truth[:10] + 0.05
    found = {k: v.value for k, v in bayes.score(task, batch, outputs, {}, np.arange(50)[None]).items()}
    assert found["rmse"] == pytest.approx(0.1, abs=1e-5) and found["abs_bias"] == pytest.approx(0.1, abs=1e-5)
    assert found["coverage"] == pytest.approx(0.8)
    assert found["interval_width"] == pytest.approx(0.4 - 0.2 * 0.15, abs=1e-5)


# Score models -----------------------------------------------------------------------------------------------------------


def test_set_encoder_ignores_order_and_padding() -> None:
    torch.manual_seed(0)
    encoder = composed.SetEncoder(2)
    x = torch.randn(3, 5, 2, generator=generator())
    size = torch.tensor([5, 3, 1])
    found = encoder(x, size)
    assert torch.allclose(found[0], encoder(x[:1, [4, 2, 0, 3, 1]])[0], atol=1e-6)
    assert torch.allclose(found[1], encoder(x[1:2, :3])[0], atol=1e-6)
    changed = x.clone()
    changed[1, 3:] = 9.0
    assert torch.allclose(found[1], encoder(changed, size)[1], atol=1e-6)
    assert not torch.allclose(found[1], encoder(x)[1], atol=1e-3)  # the size matters


def test_score_networks_are_small() -> None:
    for name in POSTERIORS:
        networks = composed.score_networks(TASKS[name])
        assert sum(p.numel() for net in networks.values() for p in net.parameters()) < 30_000


def test_score_matching_learns_the_exact_score() -> None:
    """After seconds of training the error is a fraction of the score; an untrained network's is not."""
    task = TASKS["posterior/gaussian_n1"]
    torch.manual_seed(0)
    networks = composed.score_networks(task)
    network, encoder = networks["score"], networks["encoder"]
    data = load_split(task.dataset, "train")
    x = load_split(task.dataset, "test")["x"][:128, :1]

    def error(t: float) -> float:
        law = problems.problem(task).posterior(x).diffused(t)
        theta = law.sample(1, generator(3))[:, 0]
        exact = law.score(theta)
        with torch.no_grad():
            found = network(theta.float(), torch.full((128,), t), encoder(x)).double()
        return float((found - exact).norm() / exact.norm())

    before = [error(t) for t in (0.02, 0.1, 0.4)]
    composed.fit_score(network, encoder, data["theta_1"], data["x_1"], generator(1), range(200), 200)
    after = [error(t) for t in (0.02, 0.1, 0.4)]
    assert max(after) < 0.35, after
    assert all(b > 1.5 * a for a, b in zip(after, before, strict=True)), (before, after)
    # eigenvalues of the posterior covariance, 0.2 / 1.2 and 1.8 / 2.8
    assert torch.allclose(network.variances, torch.tensor([1 / 6, 9 / 14]), atol=0.03)
