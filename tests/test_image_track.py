"""Image track: solvers against theory and against diffusers, exact scores, conversions, metrics and verifier."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stepmark.datasets import digits, mixtures, shapes16
from stepmark.methods.image.baselines.ddim import DDIM
from stepmark.methods.image.baselines.dpm_solver_pp import DPMSolverPP
from stepmark.methods.image.baselines.euler import Euler
from stepmark.methods.image.baselines.heun import Heun
from torch import Tensor, nn

from stepmark import backbones, plugins
from stepmark.backbones import unet
from stepmark.stats import bootstrap_indices
from stepmark.task import BadOutput, digest_of
from stepmark.tracks import image
from stepmark.tracks.image import metrics, schedules, solvers

FLOW, VP = schedules.Schedule("flow"), schedules.Schedule("epsilon")
TASKS = {task.id: task for task in image.TASKS}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def mixture(prediction: str) -> unet.MixtureDenoiser:
    return unet.MixtureDenoiser(mixtures.WEIGHTS, mixtures.MEANS, mixtures.COVARIANCES, prediction)


def points(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise, torch.arange(n) % 2


@pytest.fixture(scope="module")
def tiny() -> dict[str, unet.ConditionalUNet]:
    """Small untrained UNets: numerics do not need a good model."""
    return {kind: unet._build(5, 8, 1, (8, 16), 10, kind).eval().requires_grad_(False) for kind in ("flow", "epsilon")}


# --- exact denoisers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prediction", "t"), [("flow", 0.3), ("flow", 0.9), ("epsilon", 0.05), ("epsilon", 0.6)])
def test_exact_denoiser_is_the_gradient_of_the_log_density(prediction: str, t: float) -> None:
    network, schedule = mixture(prediction), schedules.Schedule(prediction)
    noise, condition = points(64)
    x = (0.7 * noise).requires_grad_(True)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    # the density of x_t is the mixture with means alpha mu and covariances alpha^2 S + sigma^2 I
    means = alpha * mixtures.MEANS[condition]
    covariance = alpha**2 * mixtures.COVARIANCES[condition] + sigma**2 * torch.eye(2, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(means, covariance)
    log_density = torch.logsumexp(mixtures.WEIGHTS[condition].log() + normal.log_prob(x[:, None]), 1).sum()
    (score,) = torch.autograd.grad(log_density, x)
    x0, eps = solvers.Denoiser(network, condition)(x.detach(), t)
    torch.testing.assert_close(eps, -sigma * score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x0, (x.detach() + sigma**2 * score) / alpha, rtol=1e-9, atol=1e-9)


def test_dataset_density_matches_torch_distributions_and_its_own_samples() -> None:
    data = mixtures.split("test")
    x, condition = data["x0"].double(), data["condition"]
    normal = torch.distributions.MultivariateNormal(mixtures.MEANS[condition], mixtures.COVARIANCES[condition])
    expected = torch.logsumexp(mixtures.WEIGHTS[condition].log() + normal.log_prob(x[:, None]), 1)
    torch.testing.assert_close(mixtures.log_density(x, condition), expected, rtol=1e-9, atol=1e-9)
    for k in range(2):  # first and second moments of 4000 samples within five standard errors
        own, weight, mean = x[condition == k], mixtures.WEIGHTS[k], mixtures.MEANS[k]
        centre = (weight[:, None] * mean).sum(0)
        covariance = (weight[:, None, None] * (mixtures.COVARIANCES[k] + mean[:, :, None] * mean[:, None, :])).sum(0)
        covariance = covariance - torch.outer(centre, centre)
        error = covariance.diagonal().sqrt() / len(own) ** 0.5
        assert ((own.mean(0) - centre).abs() < 5 * error).all()
        torch.testing.assert_close(torch.cov(own.T), covariance, rtol=0.1, atol=0.02)


# --- schedules and conversions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_schedule_identities(schedule: schedules.Schedule) -> None:
    times = torch.linspace(0.002, 0.998, 37, dtype=torch.float64)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    total = alpha + sigma if schedule.flow else alpha**2 + sigma**2
    torch.testing.assert_close(total, torch.ones_like(times), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(schedule.log_snr(times), (alpha / sigma).log())
    torch.testing.assert_close(schedule.time(schedule.log_snr(times)), times, rtol=1e-9, atol=1e-9)
    assert (schedule.log_snr(times).diff() < 0).all()
    for t in (0.002, 0.4, 0.998):  # floats and tensors agree
        tensor = torch.tensor([t], dtype=torch.float64)
        for name in ("alpha", "sigma", "log_snr", "network_time"):
            assert getattr(schedule, name)(t) == pytest.approx(getattr(schedule, name)(tensor).item(), rel=1e-12)
        assert schedule.time(schedule.log_snr(t)) == pytest.approx(t, rel=1e-9)
    assert (schedule.alpha(0.0), schedule.sigma(0.0)) == (1.0, 0.0)


def test_vp_schedule_is_ddpms_at_its_timesteps() -> None:
    from diffusers import DDPMScheduler

    abar = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    torch.testing.assert_close(VP.alpha(t) ** 2, abar.double(), rtol=2e-5, atol=0)
    torch.testing.assert_close(VP.network_time(t), torch.arange(1000, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v", "flow"])
def test_prediction_conversions_invert_each_other(kind: str) -> None:
    draw = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    schedule = FLOW if kind == "flow" else VP
    alpha, sigma = schedule.alpha(0.37), schedule.sigma(0.37)
    output = schedules.from_x0_eps(kind, x0, eps, alpha, sigma)
    back = schedules.to_x0_eps(kind, output, alpha * x0 + sigma * eps, alpha, sigma)
    torch.testing.assert_close(back, (x0, eps), rtol=1e-10, atol=1e-10)


def test_unknown_prediction_is_named() -> None:
    with pytest.raises(ValueError, match="'score' is not known"):
        schedules.Schedule("score")


def test_grids() -> None:
    assert schedules.uniform_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [round(VP.network_time(t)) for t in schedules.uniform_times(4)[:-1]] == [999, 749, 499, 249]
    assert [round(VP.network_time(t)) for t in schedules.leading_times(4)[:-1]] == [750, 500, 250, 0]
    assert schedules.quadratic_times(4) == [1.0, 0.5625, 0.25, 0.0625, 0.0]
    assert schedules.shift_times([1.0, 0.5, 0.0], 3.0) == [1.0, 0.75, 0.0]
    for schedule in (FLOW, VP):
        even = [schedule.log_snr(t) for t in schedules.log_snr_times(schedule, 9)[:-1]]
        assert np.diff(even) == pytest.approx(np.full(8, np.diff(even)[0]), rel=1e-6)
        ratio = [np.exp(-schedule.log_snr(t) / 7) for t in schedules.karras_times(schedule, 9)[:-1]]
        assert np.diff(ratio) == pytest.approx(np.full(8, np.diff(ratio)[0]), rel=1e-6)
        for times in (schedules.log_snr_times(schedule, 6), schedules.karras_times(schedule, 6)):
            assert len(times) == 7
            assert times[-1] == 0.0
            assert all(t > s for t, s in pairwise(times))
    snapped = schedules.snap_times(VP, [0.99951, 0.33333, 0.0001, 0.0])
    assert [t * 1000 for t in snapped] == pytest.approx([1000, 333, 1, 0])
    assert schedules.snap_times(FLOW, [0.33333, 0.0]) == [0.33333, 0.0]


# --- order of convergence on the exact mixtures ----------------------------------------------------------------------


def _solve(solver: str, prediction: str, n: int, window: tuple[float, float]) -> Tensor:
    """Across the window of times in n steps equal in log-SNR, away from both ends, where every order shows."""
    denoise = solvers.Denoiser(mixture(prediction), points(16)[1])
    x, schedule = points(16)[0], denoise.schedule
    low, high = (schedule.log_snr(t) for t in window)
    times = [schedule.time(low + (high - low) * i / n) for i in range(n + 1)]
    past: list[tuple[float, Tensor]] = []
    for i, (t, s) in enumerate(pairwise(times)):
        if solver == "euler":
            x = solvers.euler_step(x, denoise.output(x, t), t, s)
        elif solver == "heun":
            x = solvers.heun_step(denoise, x, t, s)
        elif solver == "ddim":
            x = solvers.ddim_step(schedule, *denoise(x, t), s)
        else:
            past = [*past[-2:], (t, denoise(x, t)[0])]
            order = int(solver[-1])
            if order == 3 and i < 2:  # a first step of order 1 would cap the order of the whole at 2
                for u, v in pairwise([t + (s - t) * k / 16 for k in range(17)]):
                    x = solvers.heun_step(denoise, x, u, v)
            else:
                x = solvers.dpm_solver_pp_step(schedule, x, past, s, order)
    return x


@pytest.mark.parametrize(
    ("solver", "prediction", "order"),
    [
        ("euler", "flow", 1),
        ("ddim", "flow", 1),
        ("ddim", "epsilon", 1),
        ("heun", "flow", 2),
        ("heun", "epsilon", 2),
        ("dpm++1", "epsilon", 1),
        ("dpm++2", "flow", 2),
        ("dpm++2", "epsilon", 2),
        ("dpm++3", "flow", 3),
    ],
)
def test_order_of_convergence(solver: str, prediction: str, order: int) -> None:
    window = (0.9, 0.35) if prediction == "flow" else (0.7, 0.2)
    coarse, middle, fine = (_solve(solver, prediction, n, window) for n in (48, 96, 192))
    ratio = (coarse - middle).norm(dim=1).mean() / (middle - fine).norm(dim=1).mean()
    assert np.log2(ratio.item()) == pytest.approx(order, abs=0.25)
    # and it converges to the solution, which another solver knows
    other = _solve("dpm++2" if solver == "heun" else "heun", prediction, 192, window)
    assert (fine - other).norm(dim=1).mean() < (0.03 if order == 1 else 0.002)


# --- against diffusers on the same network ---------------------------------------------------------------------------


def _theirs(scheduler: object, network: nn.Module, x: Tensor, condition: Tensor, flow: bool) -> tuple[Tensor, int]:
    """diffusers' loop; the network is given the exact time, which some flow schedulers round for the caller."""
    calls = 0
    for i, timestep in enumerate(scheduler.timesteps):
        level = scheduler.sigmas[i] if flow else timestep
        output = network(x, torch.full((len(x),), float(level), dtype=x.dtype), condition)
        x, calls = scheduler.step(output, timestep, x, return_dict=False)[0], calls + 1
    return x, calls


def _session(network: nn.Module) -> SimpleNamespace:
    return SimpleNamespace(networks={"teacher": network})


def _noise(n: int = 8) -> dict[str, Tensor]:
    return {"noise": torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(3)), "condition": torch.arange(n)}


def test_ddim_equals_diffusers(tiny: dict[str, unet.ConditionalUNet]) -> None:
    from diffusers import DDIMScheduler

    batch = _noise()
    scheduler = DDIMScheduler(
        1000, 1e-4, 0.02, "linear", clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    for rung in (1, 4, 10):
        scheduler.set_timesteps(rung)
        theirs, calls = _theirs(scheduler, tiny["epsilon"], batch["noise"], batch["condition"], flow=False)
        assert calls == rung
        ours = DDIM().run(_session(tiny["epsilon"]), batch, rung)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_euler_equals_diffusers(tiny: dict[str, unet.ConditionalUNet]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    batch = _noise()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=schedules.uniform_times(6)[:-1])
    theirs, _ = _theirs(scheduler, tiny["flow"], batch["noise"], batch["condition"], flow=True)
    torch.testing.assert_close(Euler().run(_session(tiny["flow"]), batch, 6), theirs, rtol=1e-5, atol=1e-5)


def test_heun_equals_diffusers(tiny: dict[str, unet.ConditionalUNet]) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    batch, n = _noise(), 4
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(n)
    # same steps on our grid: sigma, and again sigma of the next time for the second evaluation of each step
    times = schedules.uniform_times(n)
    doubled = torch.tensor([times[0], *[t for t in times[1:-1] for _ in range(2)], 0.0])
    scheduler.sigmas, scheduler.timesteps = doubled, doubled[:-1] * 1000
    theirs, calls = _theirs(scheduler, tiny["flow"], batch["noise"], batch["condition"], flow=True)
    assert calls == 2 * n - 1
    torch.testing.assert_close(Heun().run(_session(tiny["flow"]), batch, 2 * n - 1), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_equals_diffusers_on_noise_prediction(order: int, tiny: dict[str, unet.ConditionalUNet]) -> None:
    from diffusers import DPMSolverMultistepScheduler

    batch, n = _noise(), 10
    scheduler = DPMSolverMultistepScheduler(
        1000, 1e-4, 0.02, "linear", solver_order=order, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(n)
    theirs, _ = _theirs(scheduler, tiny["epsilon"], batch["noise"], batch["condition"], flow=False)
    if order == 2:
        ours = DPMSolverPP().run(_session(tiny["epsilon"]), batch, n)
    else:
        ours = _dpm(tiny["epsilon"], batch, schedules.uniform_times(n), order)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_equals_diffusers_on_flows(order: int, tiny: dict[str, unet.ConditionalUNet]) -> None:
    from diffusers import DPMSolverMultistepScheduler

    batch, n = _noise(), 8
    scheduler = DPMSolverMultistepScheduler(
        solver_order=order, prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(n)
    theirs, _ = _theirs(scheduler, tiny["flow"], batch["noise"], batch["condition"], flow=True)
    ours = _dpm(tiny["flow"], batch, scheduler.sigmas.tolist(), order)  # their grid starts at 0.999
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def _dpm(network: nn.Module, batch: dict[str, Tensor], times: list[float], order: int) -> Tensor:
    denoise, x = solvers.Denoiser(network, batch["condition"]), batch["noise"]
    past: list[tuple[float, Tensor]] = []
    for i, (t, s) in enumerate(pairwise(times)):
        past = [*past, (t, denoise(x, t)[0])]
        # diffusers lowers the order towards the end of short runs
        x = solvers.dpm_solver_pp_step(denoise.schedule, x, past, s, min(order, len(times) - 1 - i))
    return x


# --- methods keep to their budget, guidance --------------------------------------------------------------------------


@pytest.mark.parametrize("method", [DDIM, Euler, Heun, DPMSolverPP])
def test_methods_spend_exactly_the_rung(method: type, tiny: dict[str, unet.ConditionalUNet]) -> None:
    for task_id in method.tasks:
        if task_id not in TASKS or task_id.startswith("attributes"):
            continue  # of another part of the track, or the same network class as digits
        kind = "epsilon" if "_eps" in task_id else "flow"
        plane = task_id.startswith("sampling")
        network = mixture(kind) if plane else tiny[kind]
        batch = dict(zip(("noise", "condition"), points(4), strict=True)) if plane else _noise(4)
        rows: list[int] = []
        handle = network.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(len(args[0])))
        for rung in {1, 3, *TASKS[task_id].rungs[:6]}:
            rows.clear()
            out = method().run(_session(network), batch, rung)
            assert sum(rows) == 4 * rung
            image.check(TASKS[task_id], batch, out)
        handle.remove()


def test_guidance_is_the_extrapolation_from_the_null_condition(tiny: dict[str, unet.ConditionalUNet]) -> None:
    network, batch, rows = tiny["flow"], _noise(4), []
    handle = network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    guided = solvers.Denoiser(network, batch["condition"], guidance=2.5).output(batch["noise"], 0.8)
    assert rows == [8]
    handle.remove()
    time = torch.full((4,), 0.8)
    conditional = network(batch["noise"], time, batch["condition"])
    null = network(batch["noise"], time, network.null_condition(batch["condition"]))
    torch.testing.assert_close(guided, null + 2.5 * (conditional - null), rtol=1e-5, atol=1e-5)


OURS = (
    "time_shift_sampler", "autodiffusion", "imm", "reflow", "simple_reflow", "ddim_quadratic", "ddt_fifth",
    "slimflow_naive", "parastep_processes", "naive_patches", "imm_target_blind", "edm_heun", "unipc_best_grid",
)  # fmt: skip


@pytest.mark.parametrize("method", OURS)
def test_source_keeps_the_contract(method):
    from stepmark.check import static

    assert list(static(plugins.methods()[method])) == []


# --- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2000, 300, 40])
def test_frechet_distance_agrees_with_clean_fid(n: int) -> None:
    from cleanfid.fid import frechet_distance

    rng = np.random.default_rng(n)
    mix = rng.standard_normal((64, 64)) / 8
    ours, theirs = rng.standard_normal((n, 64)) @ mix + 0.1, rng.standard_normal((2000, 64))
    first, second = metrics.moments(ours), metrics.moments(theirs)
    expected = frechet_distance(*first, *second)
    assert float(metrics.frechet_distance(*first, *second)) == pytest.approx(expected, rel=1e-6)


def test_resampled_frechet_distance_is_the_plain_one_on_each_resample() -> None:
    rng = np.random.default_rng(0)
    features, reference = rng.standard_normal((200, 8)) + 3, metrics.moments(rng.standard_normal((500, 8)))
    resample = bootstrap_indices(200, 5, 1)
    expected = [float(metrics.frechet_distance(*metrics.moments(features[row]), *reference)) for row in resample]
    assert metrics.frechet_resampled(features, reference, resample) == pytest.approx(expected, rel=1e-9)


def test_sliced_w2_against_known_distances() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 2))
    assert metrics.sliced_w2(x, x)[0] == pytest.approx(0, abs=1e-12)
    # a shift by (a, b) moves every projection by a constant: the mean square over directions is (a^2 + b^2) / 2
    assert metrics.sliced_w2(x + np.array([3.0, 4.0]), x)[0] == pytest.approx(5 / 2**0.5, rel=1e-6)
    resample = bootstrap_indices(400, 3, 2)
    expected = [metrics.sliced_w2(x[row] * 2, x)[0] for row in resample]
    assert metrics.sliced_w2(x * 2, x, resample) == pytest.approx(expected, rel=1e-9)


def test_exact_endpoints_are_converged() -> None:
    noise, condition = points(32)
    for prediction in ("flow", "epsilon"):
        network = mixture(prediction)
        coarse, fine = (metrics.exact_endpoints(network, noise, condition, steps) for steps in (256, 512))
        assert (coarse - fine).norm(dim=1).mean() < 1e-3


def test_scores_of_exact_samples_are_better_than_noise_and_resamples_surround_them() -> None:
    task = TASKS["sampling/mixtures_flow"]
    batch = image.inputs(task, 200, torch.Generator().manual_seed(0), torch.device("cpu"))
    resample = bootstrap_indices(200, 20, 0)
    exact = metrics.exact_endpoints(mixture("flow"), batch["noise"], batch["condition"]).float()
    good, bad = (image.score(task, batch, out, {}, resample) for out in (exact, batch["noise"]))
    assert good["endpoint_error"].value < 1e-4 < 0.5 < bad["endpoint_error"].value
    assert good["sliced_w2"].value < 0.5 * bad["sliced_w2"].value
    assert len(good["sliced_w2"].resamples) == 20
    assert min(bad["endpoint_error"].resamples) < bad["endpoint_error"].value < max(bad["endpoint_error"].resamples)


def test_alignment_counts_what_the_verifier_reads() -> None:
    task = TASKS["attributes_to_image/shapes16"]
    batch = image.inputs(task, 24, torch.Generator().manual_seed(0), torch.device("cpu"))
    images = shapes16.draw_images(batch["condition"], np.random.default_rng(0))
    images[:6] = -1.0  # nothing to be seen
    judges = {"classifier": backbones.recipe("shapes16_classifier").build()}
    got = image.score(task, batch, images, judges, bootstrap_indices(24, 10, 0))["alignment"]
    assert got.value == pytest.approx(18 / 24)
    assert len(got.resamples) == 10


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:-1], "shape"),
        (lambda x: x.long(), "floating-point"),
        (lambda x: [x], "list"),
        (lambda x: torch.where(torch.arange(len(x))[:, None] == 1, float("nan"), x), "2 values"),
    ],
)
def test_bad_outputs_are_refused(spoil: object, message: str) -> None:
    batch = dict(zip(("noise", "condition"), points(4), strict=True))
    with pytest.raises(BadOutput, match=message):
        image.check(TASKS["sampling/mixtures_flow"], batch, spoil(batch["noise"]))


# --- datasets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [digits, mixtures, shapes16], ids=lambda module: module.DATASET.id)
def test_datasets_are_the_committed_ones(dataset: object) -> None:
    assert dataset.DATASET.digests
    for name, digest in dataset.DATASET.digests.items():
        assert digest_of(dataset.split(name)) == digest


def test_digits_split_is_balanced_and_disjoint() -> None:
    train, test, reference = (digits.split(name) for name in ("train", "test", "reference"))
    assert len(train["x0"]) + len(test["x0"]) == len(reference["x0"]) == 1797
    assert test["condition"].bincount().min() >= 29
    assert train["x0"].min() == -1
    assert train["x0"].max() == 1


def test_verifier_reads_every_rendered_image() -> None:
    data = shapes16.split("test")
    assert torch.equal(shapes16.read_attributes(data["x0"]), data["condition"])


def test_verifier_refuses_what_is_no_shape() -> None:
    data = shapes16.split("test")
    images, condition = data["x0"][:60], data["condition"][:60]
    bar = torch.full_like(images, -1.0)
    bar[:, 0, 7:9, 2:14] = 1.0  # red, large enough, of none of the three shapes
    unreadable = {
        "black": torch.full_like(images, -1.0),
        "white": torch.ones_like(images),
        "noise": torch.randn(images.shape, generator=torch.Generator().manual_seed(0)),
        "two colours": torch.maximum(images, images.flip(2).roll(1, 1)),
        "bar": bar,
    }
    for name, wrong in unreadable.items():
        read = shapes16.read_attributes(wrong)
        assert (read == condition).all(1).float().mean() < 0.1, name
    mild = images + 0.02 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(shapes16.read_attributes(mild), condition)
