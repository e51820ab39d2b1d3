"""Bounds on the likelihood: of masked diffusion, and of latent thoughts, whose inference climbs to the exact one."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from rigs.decoding import load, module_of
from rigs.masked import A, B, C, exact_denoiser, rng, session_of, texts, thought_decoder
from scipy import stats
from torch import Tensor, nn

from stepmark.backbones import mdlm
from stepmark.task import load_split

pytestmark = pytest.mark.usefixtures("one_thread")


# -- masked diffusion -------------------------------------------------------------------------------------------------


def test_the_bound_of_masked_diffusion_is_exact_for_an_exact_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum over sizes and sets of masks by enumeration: with true posteriors it is -log p, with others more."""
    language = {(A, A, B): 0.5, (B, B, A): 0.3, (A, B, C): 0.2}
    exact = exact_denoiser(language)
    for temperature in (1.0, 2.0):
        monkeypatch.setattr(mdlm, "logits", lambda model, ids: (exact(ids) / temperature).log_softmax(-1))
        excess = 0.0
        for text, p in language.items():
            total = 0.0
            for count in (1, 2, 3):
                sets = list(itertools.combinations(range(3), count))
                for chosen in sets:
                    masked = torch.tensor([[i in chosen for i in range(3)]])
                    loss = mdlm.word_losses(nn.Identity(), torch.tensor([text]), masked)
                    total += float(loss) / len(sets)  # x L, and the mean over L sizes
            assert temperature > 1 or total == pytest.approx(-math.log(p), abs=1e-9)
            excess += p * (total + math.log(p))
        assert temperature == 1 or excess > 0.01


def test_masks_are_chosen_evenly() -> None:
    masked = mdlm.mask_some(torch.zeros(9000, 4, dtype=torch.long), torch.full((9000,), 2), rng())
    assert bool((masked.sum(1) == 2).all())
    counts = Counter(map(tuple, masked.tolist()))
    assert len(counts) == 6 and stats.chisquare(list(counts.values())).pvalue > 1e-3
    assert sorted(mdlm.spread(64, rng()).tolist()) == list(range(1, 65))


# -- latent thoughts --------------------------------------------------------------------------------------------------


def test_inference_climbs_to_the_exact_likelihood_of_a_linear_gaussian() -> None:
    """x = W z + noise with orthogonal columns: the posterior is diagonal, so that the best bound is log p(x) itself."""
    latent = module_of("latent_thought_lm")
    generator = rng(3)
    w = torch.linalg.qr(torch.randn(6, 3, generator=generator)).Q * torch.tensor([2.0, 1.0, 0.5])
    x, variance = torch.randn(40, 6, generator=generator) @ torch.diag(torch.ones(6) * 1.5), 0.25
    exact = torch.distributions.MultivariateNormal(torch.zeros(6), w @ w.T + variance * torch.eye(6)).log_prob(x)

    def elbo(mean: Tensor, log_variance: Tensor) -> Tensor:
        """The bound without Monte Carlo."""
        fit = torch.distributions.Normal(mean @ w.T, variance**0.5).log_prob(x).sum(1)
        spread = (w.square().sum(0) * log_variance.exp()).sum(1) / (2 * variance)
        return fit - spread - latent.divergence(mean, log_variance)

    def bound(mean: Tensor, log_variance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = mean.requires_grad_(True), log_variance.requires_grad_(True)
        z = mean + (0.5 * log_variance).exp() * noise
        fit = torch.distributions.Normal(z @ w.T, variance**0.5).log_prob(x).sum(1)
        value = fit - latent.divergence(mean, log_variance)
        gradients = torch.autograd.grad(value.sum(), (mean, log_variance))
        return value.detach(), gradients[0], gradients[1]

    found = []
    for steps in (0, 1, 4, 16, 64):
        mean, log_variance, _ = latent.infer(bound, torch.Size((40, 3)), steps, 0.1, rng(1), 0.0, 1.0, False)
        value = elbo(mean.detach(), log_variance.detach())
        assert bool((value <= exact + 1e-4).all())
        found.append(float(value.mean()))
    assert found == sorted(found)
    posterior = torch.linalg.inv(torch.eye(3) + w.T @ w / variance)
    best = elbo(x @ w / variance @ posterior, posterior.diagonal().log() + torch.zeros(40, 3))
    assert torch.allclose(best, exact, atol=1e-4)  # the closed form closes the gap
    assert found[-1] > found[0] + 0.95 * (float(exact.mean()) - found[0])


def test_inference_starts_narrow_slows_down_and_holds_its_noise() -> None:
    """The constants of the official code, seen on a bound of gradient 1: each step of Adam is then the rate itself."""
    latent = module_of("latent_thought_lm")
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def bound(mean: Tensor, log_variance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append((mean, log_variance, noise))
        return mean.sum((1, 2)), torch.ones_like(mean), torch.ones_like(mean)

    mean, log_variance, noise = latent.infer(bound, torch.Size((50, 4, 8)), 16, 0.3, rng(4))
    means, variances = torch.stack([m for m, _, _ in seen]), torch.stack([v for _, v, _ in seen])
    assert float(means[0].abs().max()) == 0
    assert float(variances[0].mean()) == pytest.approx(-5, abs=0.02)
    assert float(variances[0].std()) == pytest.approx(0.1, abs=0.01)
    assert all(torch.equal(e, noise) for _, _, e in seen)
    rates = torch.diff(torch.cat([means, mean[None]]).mean((1, 2, 3)))
    expected = [0.3 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 16)) / 2) for k in range(16)]
    assert rates.tolist() == pytest.approx(expected, rel=1e-4)
    assert float((log_variance - variances[0]).mean()) == pytest.approx(sum(expected), rel=1e-4)
    assert float(log_variance.max()) < -1.5  # why the first rate is twice theirs: the prior's 0 is out of their reach
    seen.clear()
    latent.infer(bound, torch.Size((2, 4, 8)), 3, 0.3, rng(4), held=False)
    assert not torch.equal(seen[0][2], seen[1][2])


def test_training_climbs_on_the_draw_that_inference_held() -> None:
    """The slow step reads the same z as the last fast one; the bound that `run` gives is at a draw of its own."""
    method = load("latent_thought_lm")
    decoder = thought_decoder(1, 2, 4, 8).train().requires_grad_(True)
    climbed: list[Tensor] = []
    bounds: list[Tensor] = []
    decoder.register_forward_pre_hook(lambda m, args: climbed.append(args[3]))
    plain = decoder.log_likelihood
    decoder.log_likelihood = lambda tokens, z: bounds.append(z) or plain(tokens, z)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    inferred = method.infer
    method.infer = lambda *args: found.append(inferred(*args)) or found[-1]
    session = SimpleNamespace(
        networks={"decoder": decoder},
        rng=rng(1),
        device=torch.device("cpu"),
        train={"text": load_split("stories64", "test")["text"]},
        scale=lambda full, small: small,
        progress=lambda steps, words: steps,
    )
    type(method).prepare(method, session)
    assert len(climbed) == len(bounds) == 2 * 3  # 2 slow steps, 2 fast ones each, all of them counted
    assert torch.equal(climbed[0], climbed[1]) and not torch.equal(climbed[1], climbed[3])
    for slow, (mean, log_variance, noise) in zip(bounds[2::3], found, strict=True):
        assert torch.equal(slow, mean + (0.5 * log_variance).exp() * noise)
    assert torch.equal(found[0][2], climbed[0])
    climbed.clear()
    method.run(session, {"tokens": texts()[:2]}, 3)
    assert torch.equal(climbed[0], climbed[1]) and not torch.equal(climbed[1], climbed[2])


def test_without_inference_the_decoder_is_a_language_model() -> None:
    """The autoregressive arm: an exact likelihood over all words before, at one evaluation whatever the rung."""
    method = load("latent_thought_ar")
    decoder = thought_decoder(1, 2, 4, method.window)
    session = session_of("likelihood/stories64", decoder=decoder)
    session.ledger.reset(limit=4)
    found = method.run(session, {"tokens": texts()[:4]}, 33)
    assert torch.allclose(found.float(), -decoder.log_likelihood(texts()[:4], torch.zeros(4, 1, 2, 4)), atol=1e-4)
    assert bool(decoder.seen.tril().equal(torch.ones(64, 64, dtype=torch.bool).tril()))
    assert load("latent_thought_window").window == load("latent_thought_lm").window


def test_the_thought_decoder_sees_a_window_and_its_own_vectors() -> None:
    decoder = thought_decoder(2, 3, 32, 4, gain=5)
    tokens, z = texts()[:2], torch.randn(2, 2, 3, 32, generator=rng())
    changed = tokens.clone()
    changed[:, 0] = A
    with torch.no_grad():
        inner = decoder.gpt.transformer

        def losses(ids: Tensor, thoughts: Tensor) -> Tensor:
            kept: list[Tensor] = []
            hook = inner.ln_f.register_forward_hook(lambda m, a, out: kept.append(out))
            decoder.log_likelihood(ids, thoughts)
            hook.remove()
            return kept[0]

        difference = (losses(tokens, z) - losses(changed, z)).abs().amax((0, 2))
        assert float(difference[0]) == 0 and float(difference[1:8].min()) > 0
        assert float(difference[8:].max()) < 1e-5  # 2 layers x (window 4 - 1) words further, and no more
        moved = z.clone()
        moved[:, 1] += 1
        assert float((losses(tokens, z) - losses(tokens, moved)).abs().amax((0, 2)).min()) > 0
    mean, log_variance, noise = (0.3 * torch.randn(z.shape, generator=rng(s)) for s in (1, 2, 3))
    _, by_mean, by_variance = decoder(tokens, mean, log_variance, noise)
    step = 1e-2
    for gradient, index in ((by_mean, 0), (by_variance, 1)):
        direction = gradient / gradient.norm()
        ends = []
        for sign in (-1, 1):
            moved_by = [mean, log_variance]
            moved_by[index] = moved_by[index] + sign * step * direction
            ends.append(float(decoder(tokens, *moved_by, noise)[0].sum()))
        assert (ends[1] - ends[0]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.05)
