"""Proofs of masked-diffusion methods: constants where they are used, prompts that stay, what a bound is made of."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rigs.decoding import load
from rigs.masked import A, exact_denoiser, rng, texts, thought_decoder, tiny
from stepmark.methods.diffusion_lm import flashdlm, remdm, sdtt
from torch import Tensor, nn

from stepmark.backbones.mdlm import LENGTH, MASK
from stepmark.task import load_split
from stepmark.tracks.diffusion_lm import blocks, sampling

pytestmark = pytest.mark.usefixtures("one_thread")


# -- ReMDM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["remdm", "remdm_cap", "remdm_rescale"])
def test_words_of_a_prompt_are_never_masked_again(name: str) -> None:
    """Whatever the schedule: what the denoiser is shown holds the prompt in every step, and masks behind it come back."""
    prompt, network, seen = texts(1)[0, :24], tiny(False), list[Tensor]()
    network.transformer.wte.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    session = SimpleNamespace(networks={"model": network}, rng=rng(1), device=torch.device("cpu"))
    with torch.no_grad():
        load(name).run(session, {"prompt": [prompt.tolist()], "length": [64]}, 96)
    assert len(seen) > 30
    assert all(torch.equal(x[0, :24], prompt) for x in seen)
    assert any(bool(((a != MASK) & (b == MASK)).any()) for a, b in itertools.pairwise(seen)), "nothing is masked again"


# -- FlashDLM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "budget"), [("surest", 16), ("left", 16), ("surest", 7), ("left", 7)])
def test_controls_of_flashdlm_spread_their_words_evenly_and_finish(rule: str, budget: int) -> None:
    """In each step the same number of words, give or take one, and the text is whole at the end of the budget."""
    counts, x = list[int](), torch.full((1, 64), MASK)
    x[:, :24] = texts(1)[:, :24]
    original = flashdlm.run_from_clean
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            flashdlm,
            "run_from_clean",
            lambda network, y, cache: counts.append(int((y == MASK).sum())) or original(network, y, cache),
        )
        fill = flashdlm.fill_surest if rule == "surest" else flashdlm.fill_from_the_left
        done = fill(tiny(False), x, budget, None)
    written = [before - after for before, after in zip(counts, [*counts[1:], 0], strict=True)]
    assert MASK not in done and len(counts) == budget
    assert max(written) - min(written) <= 1 and sum(written) == 40


def test_the_variants_of_flashdlm_write_by_their_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rule, with the cache or without, and whether the guide's word is written."""
    said = {}
    for name in ("flashdlm", "flashdlm_corrected", "guided_diffusion", "freecache", "left_to_right"):
        method, found = load(name), list[Any]()
        for fill in ("fill_surest", "fill_from_the_left", "fill_guided"):

            def spy(*given: Any, fill: str = fill, found: list[Any] = found) -> Tensor:
                x = next(part for part in given if isinstance(part, Tensor))
                caches = [part for part in given if type(part).__name__ == "FreeCache"]
                found.append((fill, bool(caches), given[-1] is True))
                return x.masked_fill(x == MASK, A)

            monkeypatch.setitem(method.run.__globals__, fill, spy)
        session = SimpleNamespace(networks={"model": tiny(False), "ar": tiny(True)}, device=torch.device("cpu"))
        method.run(session, {"prompt": [[A]], "length": [64]}, 8)
        (said[name],) = found
    assert said == {
        "flashdlm": ("fill_guided", True, False),
        "flashdlm_corrected": ("fill_guided", True, True),
        "guided_diffusion": ("fill_guided", False, False),
        "freecache": ("fill_surest", True, False),
        "left_to_right": ("fill_from_the_left", True, False),
    }


def test_the_guide_is_asked_before_the_last_step_and_reads_each_kept_word_once() -> None:
    """With a guide that never agrees a step is a word, and the last evaluation of the budget keeps all that is left of the
    draft unread; what the guide has read of words that stay is not read again."""
    model, guide, x = tiny(False), tiny(True), torch.full((1, 64), MASK)
    x[:, :24] = texts(1)[:, :24]
    read: list[tuple[int, int]] = []
    original = blocks.run_blocks

    def spy(network: nn.Module, ids: Tensor, start: int, cache: Any) -> Tensor:
        if network is guide:
            read.append((start, ids.shape[1]))
        return original(network, ids, start, cache)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(flashdlm, "run_blocks", spy)
        patch.setattr(flashdlm, "agreed", lambda draft, wished: 0)
        done = flashdlm.fill_guided(model, guide, x, 5, None, False)
    assert MASK not in done
    assert read == [(0, 64), *((24 + step, 40 - step) for step in range(1, 4))]


# -- latent thought model ---------------------------------------------------------------------------------------------


def test_a_bound_is_a_likelihood_at_a_draw_less_the_divergence() -> None:
    """log p(x | mean + sd noise) - KL(N(mean, sd^2) || N(0, 1)), sd being exp(log variance / 2)."""
    decoder = thought_decoder(2, 3, 8, 4)
    shape = (2, 2, 3, 8)
    mean, noise = torch.randn(shape, generator=rng(1)), torch.randn(shape, generator=rng(2))
    log_variance = torch.randn(shape, generator=rng(3))
    spread = (log_variance / 2).exp()
    q, prior = torch.distributions.Normal(mean, spread), torch.distributions.Normal(0.0, 1.0)
    divergence = torch.distributions.kl_divergence(q, prior).flatten(1).sum(1)
    likely = decoder.log_likelihood(texts(2), mean + spread * noise)
    found = decoder(texts(2), mean, log_variance, noise)[0]
    torch.testing.assert_close(found, likely - divergence, rtol=1e-5, atol=1e-3)
    slow = decoder(texts(2), mean, log_variance, noise, slow=True)
    torch.testing.assert_close(slow, likely, rtol=1e-5, atol=1e-3)


def test_latent_vectors_have_places() -> None:
    """As words have: two of a layer in each other's place are another thought."""
    decoder = thought_decoder(2, 3, 8, 4, gain=4)
    z = torch.randn(2, 2, 3, 8, generator=rng(1))
    with torch.no_grad():
        plain, swapped = (decoder.log_likelihood(texts(2), part) for part in (z, z[:, :, [1, 0, 2]]))
    assert float((plain - swapped).abs().min()) > 1e-2


@pytest.mark.parametrize("name", ["latent_thought_lm", "latent_thought_prior"])
def test_the_fast_learning_is_set_as_each_method_says(name: str) -> None:
    """The official code's: log variance about -5, a rate that falls to a tenth by a cosine, from 0.6 here, one draw of the
    noise. The other starts at the prior, at a constant rate of 0.3, with new noise in each step. Sixteen steps in training."""
    method, asked = load(name), list[tuple[Tensor, Tensor, Tensor]]()

    class Slope(nn.Module):
        """A bound of gradient 1, on which each step of Adam is the rate itself."""

        latents = (2, 4, 16)

        def __init__(self) -> None:
            super().__init__()
            self.gpt = nn.Module()
            self.gpt.transformer = nn.Module()
            self.gpt.transformer.h = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, tokens: Tensor, mean: Tensor, log_variance: Tensor, noise: Tensor, slow: bool = False) -> Any:
            if slow:
                return self.gpt.transformer.h[0].weight.sum() * torch.ones(len(tokens))
            asked.append((mean, log_variance, noise))
            return mean.sum((1, 2, 3)), torch.ones_like(mean), torch.ones_like(mean)

    session = SimpleNamespace(networks={"decoder": Slope()}, rng=rng(0), device=torch.device("cpu"))
    method.run(session, {"tokens": texts(8)}, 17)
    first, second, noises = zip(*asked, strict=True)
    assert len(asked) == 17  # sixteen steps and a fresh draw of the bound
    steps = [float((b - a).mean()) for a, b in itertools.pairwise(first)]
    official = name == "latent_thought_lm"
    if official:
        assert steps == pytest.approx(
            [0.6 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 16)) / 2) for k in range(16)], rel=1e-4
        )
        assert float(second[0].mean()) == pytest.approx(-5, abs=0.05)
        assert float(second[0].std()) == pytest.approx(0.1, abs=0.01)
    else:
        assert steps == pytest.approx([0.3] * 16, rel=1e-4)
        assert float(second[0].abs().max()) == 0
    assert float(first[0].abs().max()) == 0
    assert all(torch.equal(a, b) == official for a, b in itertools.pairwise(noises[:-1]))
    assert not torch.equal(noises[-1], noises[-2])
    asked.clear()
    session.train = {"text": load_split("stories64", "train")["text"][:4]}
    session.scale = lambda embedded, smoke: 2 if embedded == method.steps else embedded
    session.progress = lambda rounds, says: rounds
    with torch.enable_grad():
        type(method).prepare(method, session)
    assert len(asked) == 2 * 16


# -- SDTT -------------------------------------------------------------------------------------------------------------


def test_the_student_is_what_samples() -> None:
    """Not the model that it was copied from: its words are those of the student's own denoiser."""
    student, session_rng = tiny(False, 3), rng(4)
    session = SimpleNamespace(
        networks={"model": tiny(False, 1), "teacher": tiny(False, 2), "student": student},
        rng=session_rng,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        found = load("sdtt").run(session, {"prompt": [[], []], "length": [64, 64]}, 4)
        wanted = sampling.ancestral(sampling.denoiser(student), torch.full((2, 64), MASK), 4, rng(4))
    assert found == wanted.tolist()


def test_the_control_of_distillation_learns_from_every_share_of_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is the model's own bound: the texts of a batch have numbers of masks that cover 1 to 64 evenly."""
    counts: list[list[int]] = []

    def losses(student: nn.Module, text: Tensor, masked: Tensor) -> Tensor:
        counts.append(sorted(masked.sum(1).tolist()))
        return torch.stack([p.sum() for p in student.parameters()]).sum()[None]

    monkeypatch.setattr(sdtt, "word_losses", losses)
    method = sdtt.SDTT()
    method.distilled, method.steps, method.batch = False, 1, 32
    session = SimpleNamespace(
        networks={"student": tiny(False).requires_grad_(True)},
        rng=rng(3),
        device=torch.device("cpu"),
        train={"text": load_split("stories64", "train")["text"][:40]},
        scale=lambda embedded, smoke: embedded,
        progress=lambda steps, says: steps,
    )
    with torch.enable_grad():
        method.prepare(session)
    for row in counts:
        assert all(2 * i < count <= 2 * i + 2 for i, count in enumerate(row))
    assert len(counts) == 4 and LENGTH == 64


def test_a_loop_of_remdm_is_the_papers() -> None:
    """45 % of the steps write 90 % of the text, half of them hold it there, the last 5 % finish; words are masked again
    in the middle alone."""
    hidden: list[bool] = []
    original = remdm.remasking_step
    x = torch.full((200, 4), MASK)

    def spy(*given: Any) -> Tensor:
        after = original(*given)
        hidden.append(bool(((given[1] != MASK) & (after == MASK)).any()))
        return after

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remdm, "remasking_step", spy)
        done = remdm.remask_in_a_loop(exact_denoiser({(A, A + 1, A + 2, A): 1.0}), x, 100, 0.2, rng(1))
    assert MASK not in done
    assert [i for i, found in enumerate(hidden) if found] == list(range(45, 95))
