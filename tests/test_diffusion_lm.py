"""Track diffusion_lm: the grammar's likelihood, samplers that mask again, caches and guides, scores."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from rigs.decoding import load
from rigs.masked import TASKS, A, B, C, V, exact_denoiser, rng, session_of, texts, tiny
from scipy import stats
from stepmark.datasets import stories64
from stepmark.methods.diffusion_lm import flashdlm, remdm
from stepmark.methods.diffusion_lm.baselines import forward_backward
from torch import Tensor, nn

from stepmark import backbones, plugins
from stepmark.backbones import mdlm
from stepmark.backbones.lm import VOCABULARY
from stepmark.task import BadOutput
from stepmark.tracks import diffusion_lm as track
from stepmark.tracks.diffusion_lm import MASK, blocks, sampling

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = sorted(name for name, info in plugins.methods().items() if info.track == "diffusion_lm")
WRITERS = [name for name in METHODS if "generation/stories64" in plugins.methods()[name].tasks]


# -- the grammar ------------------------------------------------------------------------------------------------------


def test_likelihood_sums_to_one_over_what_can_follow() -> None:
    """Of all texts that differ from a story in the words of the first event, the possible ones carry its probability."""
    ids = next(row for row in texts() if VOCABULARY[row[8]] == "one" and VOCABULARY[row[22]] in ("saw", "found"))
    colour, thing = ((ids == int(ids[i])).nonzero()[:, 0].tolist() for i in (24, 25))
    assert [VOCABULARY[i] for i in ids[18:24].tolist()][:2] == ["near", "the"]
    rows = []
    for c, t in itertools.product(stories64.COLOURS, stories64.THINGS):
        changed = ids.clone()
        changed[colour[:2]], changed[thing[:2]] = VOCABULARY.index(c), VOCABULARY.index(t)
        rows.append(changed)
    found = stories64.log_likelihood(torch.stack(rows), VOCABULARY)
    assert torch.allclose(found, found[:1].expand_as(found))  # uniform choices
    # 8 x 10 pairs, and the probability of the text without them
    without = -found[0] - math.log(8 * 10)
    rest = [8, 10, 6, 3, 8, 5, 8, 5, 8, 10]  # hero, animal, home, day, place, verb, place, verb, colour, thing
    third = "behind" in [VOCABULARY[i] for i in ids[62:].tolist()]
    assert float(without) == pytest.approx(sum(map(math.log, rest)) - math.log(0.7 if third else 0.3), abs=1e-9)


def test_likelihood_knows_what_a_story_is() -> None:
    ids = texts()[:400]
    exact = stories64.log_likelihood(ids, VOCABULARY)
    assert torch.isfinite(exact).all()
    spread = float(exact.std()) / math.sqrt(len(exact))
    assert abs(float(-exact.mean()) - stories64.entropy()) < 4 * spread  # entropy is the mean of -log p
    wrong = ids.clone()
    wrong[torch.arange(400), torch.randint(64, (400,), generator=rng())] = A
    noisy = stories64.log_likelihood(wrong, VOCABULARY, sampling.NOISE)
    assert not torch.isfinite(stories64.log_likelihood(wrong, VOCABULARY)).any()
    # One word that fits nowhere costs the channel's price, and where it was a choice, no more than that choice.
    price = math.log(V * (1 - sampling.NOISE) / sampling.NOISE + 1)
    lost = stories64.log_likelihood(ids, VOCABULARY, sampling.NOISE) - noisy
    assert float(lost.max()) <= price + 1e-9 and float(lost.min()) > price - math.log(10 / 0.3) - 1e-9


# -- drawing words ----------------------------------------------------------------------------------------------------


def test_words_are_drawn_from_the_nucleus_and_never_a_mask() -> None:
    found = torch.full((1, V), -torch.inf)
    found[0, [A, B, C, MASK]] = torch.tensor([0.6, 0.3, 0.1, 40.0]).log()
    p = sampling.word_probabilities(found)
    assert p[0, MASK] == 0 and torch.allclose(p[0, [A, B, C]], torch.tensor([0.6, 0.3, 0.1]).double(), atol=1e-6)
    for nucleus, kept in ((0.55, [1.0, 0, 0]), (0.85, [2 / 3, 1 / 3, 0]), (0.95, [0.6, 0.3, 0.1])):
        cut = sampling.word_probabilities(found, nucleus)[0, [A, B, C]]
        assert torch.allclose(cut, torch.tensor(kept).double(), atol=1e-6)
    u = torch.linspace(0, 1, 1001)[:-1]
    drawn = sampling.draw_words(p.expand(1000, V), u)
    assert [int((drawn == w).sum()) for w in (A, B, C)] == pytest.approx([600, 300, 100], abs=2)
    assert sampling.draw_words(p, torch.tensor([1.0])).item() == C  # rounding at the end hits the last possible word


# -- samplers ---------------------------------------------------------------------------------------------------------


def test_the_ancestral_sampler_draws_the_language_one_word_at_a_time() -> None:
    """With an exact denoiser the error is that of words written in the same step, and is known exactly."""
    language = {(A, A): 0.5, (B, B): 0.3, (A, B): 0.2}
    denoise = exact_denoiser(language)
    n = 6_000
    x = torch.full((n, 2), MASK)
    marginal = {(a, b): pa * pb for (a, pa), (b, pb) in itertools.product(((A, 0.7), (B, 0.3)), ((A, 0.5), (B, 0.5)))}
    for steps in (1, 2, 4):
        together = 1 / steps  # both words fall into the same one of `steps` equal intervals
        expected = {w: together * marginal[w] + (1 - together) * language.get(w, 0.0) for w in marginal}
        counts = Counter(map(tuple, sampling.ancestral(denoise, x, steps, rng(steps)).tolist()))
        observed = [counts[w] for w in marginal]
        assert sum(observed) == n
        keep = [w for w in marginal if expected[w] > 0]
        assert stats.chisquare([counts[w] for w in keep], [n * expected[w] for w in keep]).pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_step_that_masks_again_keeps_the_forward_marginals(share: float) -> None:
    """Exact enumeration: visible with probability alpha_t before, alpha_s after, whatever sigma."""
    for visible, then in ((0.1, 0.2), (0.3, 0.9), (0.6, 0.65), (0.9, 1.0)):
        sigma = share * sampling.greatest_sigma(visible, then)
        reveal, hide = sampling.moves(visible, then, sigma)
        assert -1e-12 <= reveal <= 1 + 1e-12 and 0 <= hide <= 1
        assert (1 - visible) * reveal + visible * (1 - hide) == pytest.approx(then, abs=1e-12)
    assert (
        sampling.moves(0.9, 0.92, sampling.greatest_sigma(0.9, 0.92) + 0.05)[0] > 1
    )  # beyond it there is no posterior


@pytest.mark.parametrize("schedule", ["cap", "rescale", "forward_backward"])
def test_schedules_keep_the_marginals_along_the_whole_run(schedule: str) -> None:
    """Where the words are certain, each position is visible with probability 1 - t at every t; sampled and exact."""
    sigma = {
        "cap": remdm.capped(0.2),
        "rescale": remdm.rescaled(0.5),
        "forward_backward": forward_backward.corrected,
    }[schedule]
    grid, n = sampling.times(8), 1500
    denoise = exact_denoiser({(A, B, C, A): 1.0})
    x = torch.full((n, 4), MASK)
    generator, hidden = rng(1), 0
    for t, s in itertools.pairwise(grid):
        value = sigma(1 - t, 1 - s)
        assert 0 <= value <= sampling.greatest_sigma(1 - t, 1 - s)
        before = x
        x = sampling.remasking_step(denoise, x, 1 - t, 1 - s, value, torch.zeros_like(x, dtype=torch.bool), generator)
        hidden += int(((before != MASK) & (x == MASK)).sum())
        share = float((x != MASK).double().mean())
        assert abs(share - (1 - s)) < 5 * math.sqrt(s * (1 - s) / x.numel()) + 1e-12
    assert hidden > 0.1 * x.numel()  # it does mask again
    assert torch.equal(x, torch.tensor([A, B, C, A]).expand_as(x))


def test_without_remasking_the_sampler_is_mdlm_bit_for_bit() -> None:
    denoise = sampling.denoiser(tiny(False))
    x = torch.full((3, 64), MASK)
    with torch.no_grad():
        for nucleus in (1.0, 0.9):
            plain = sampling.ancestral(denoise, x, 8, rng(4), nucleus)
            assert torch.equal(plain, sampling.remask(denoise, x, 8, remdm.capped(0.0), rng(4), nucleus))
            assert not torch.equal(plain, sampling.remask(denoise, x, 8, remdm.capped(0.1), rng(4), nucleus))


def test_the_ancestral_step_is_that_of_the_paper() -> None:
    """Against the categorical over words and mask of equation 7, by a chi-square test at one position."""
    p = torch.tensor([0.5, 0.3, 0.2])
    found = torch.full((V,), -torch.inf)
    found[[A, B, C]] = p.log()
    n, t, s = 20_000, 0.7, 0.45
    x = sampling.ancestral_step(lambda x: found.expand(*x.shape, V), torch.full((n, 1), MASK), t, s, rng(8))
    counts = [int((x == w).sum()) for w in (A, B, C, MASK)]
    expected = [n * (t - s) / t * float(q) for q in p] + [n * s / t]
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_remasking_repairs_a_wrong_word() -> None:
    """At constant alpha, words that are masked again come back as the others want them; without, nothing moves."""

    def majority(x: Tensor) -> Tensor:
        votes = torch.stack([(x == w).double().sum(1) for w in (A, B)], 1)
        found = torch.full((len(x), 1, V), -torch.inf, dtype=torch.float64)
        found[:, 0, [A, B]] = 3 * votes
        return found.expand(*x.shape, V)

    for sigma, left in ((0.0, 1.0), (0.1, 0.05)):
        x = torch.tensor([[A] * 7 + [B]]).repeat(200, 1)
        generator, fixed = rng(3), torch.zeros_like(x, dtype=torch.bool)
        for _ in range(60):
            x = sampling.remasking_step(majority, x, 0.9, 0.9, sigma, fixed, generator)
        assert float((x == B).any(1).double().mean()) <= left
        assert float((x == MASK).double().mean()) == pytest.approx(0.1 if sigma else 0.0, abs=0.03)


def test_a_loop_holds_alpha_and_finishes() -> None:
    plan = list(remdm.loop_schedule(100, 0.55, 0.05, 0.9))
    assert plan[0][0] == 0 and plan[-1][1] == pytest.approx(1)
    assert all(a[1] == pytest.approx(b[0]) for a, b in itertools.pairwise(plan))
    looping = [alpha for alpha, _, loop in plan if loop]
    assert 48 <= len(looping) <= 51 and set(looping) == {0.9}
    denoise = exact_denoiser({(A, B, C, A): 1.0})
    shares: list[float] = []
    hidden: list[float] = []
    original = sampling.remasking_step

    def spy(*args: Any) -> Tensor:
        x = original(*args)
        shares.append(float((x != MASK).double().mean()))
        hidden.append(float(((args[1] != MASK) & (x == MASK)).double().mean()))
        return x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remdm, "remasking_step", spy)
        x = remdm.remask_in_a_loop(denoise, torch.full((1500, 4), MASK), 100, 0.05, rng(2))
    assert shares == pytest.approx([then for _, then, _ in plan], abs=0.03)  # as many words as alpha says, throughout
    assert sum(hidden) == pytest.approx(0.05 * 0.9 * len(looping), rel=0.05)  # eta of the visible words in each turn
    assert torch.equal(x, torch.tensor([A, B, C, A]).expand_as(x))


@pytest.mark.parametrize(
    ("name", "few", "many"),
    [
        ("remdm", 0.04, 0.02),
        ("remdm_scaled", 0.64, 0.32),
        ("remdm_cap", 0.64, 0.128),
        ("remdm_rescale", 0.72, 0.24),
    ],
)
def test_eta_is_the_papers_for_the_schedule_and_the_number_of_steps(name: str, few: float, many: float) -> None:
    """The published constants, or sixteen times those for a sixteenth of the words; the loop from one step a word on."""
    used: dict[int, tuple[str, float]] = {}

    def remask(denoise: Any, x: Tensor, steps: int, sigma: Any, generator: Any, nucleus: float) -> Tensor:
        assert nucleus == 0.9
        # Where a quarter is visible everything may be masked again, where half is, a half.
        greatest = sampling.greatest_sigma(0.5, 0.75)
        kind = "rescale" if sigma(0.5, 0.75) < min(greatest, sigma(0.25, 0.25)) else "cap"
        used[steps] = kind, sigma(0.25, 0.25)
        assert sigma(0.5, 0.75) == pytest.approx(
            sigma(0.25, 0.25) * greatest if kind == "rescale" else min(greatest, sigma(0.25, 0.25))
        )
        return x.masked_fill(x == MASK, A)

    def loop(denoise: Any, x: Tensor, steps: int, eta: float, generator: Any, nucleus: float) -> Tensor:
        assert nucleus == 0.9
        used[steps] = "loop", eta
        return x.masked_fill(x == MASK, A)

    method = load(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(method.run.__globals__, "remask", remask)
        patch.setitem(method.run.__globals__, "remask_in_a_loop", loop)
        for steps in (4, 63, 64, 256):
            method.run(session_of(model=tiny(False)), {"prompt": [[]], "length": [64]}, steps)
    late = "loop" if method.schedule == "loop" else method.schedule
    early = "rescale" if method.schedule == "rescale" else "cap"
    assert [kind for kind, _ in used.values()] == [early, early, late, late]
    assert [eta for _, eta in used.values()] == pytest.approx([few, few, many, many])


@pytest.mark.parametrize("name", WRITERS)
def test_writers_keep_the_budget_spend_nothing_idle_and_repeat(name: str) -> None:
    method = load(name)
    networks: dict[str, nn.Module] = {"model": tiny(False), "ar": tiny(True)}
    if name.startswith("sdtt"):
        networks["student"] = tiny(False, 3)
    outputs = []
    for _ in range(2):
        session = session_of(seed=5, **networks)
        batch = {"prompt": [[], []], "length": [64, 64]}
        session.ledger.reset(limit=64 * 2)
        with torch.no_grad():
            outputs.append(method.run(session, batch, 64))
        track.check(TASKS["generation/stories64"], batch, outputs[-1])
    assert outputs[0] == outputs[1]
    spent = session.ledger.spent / 2
    if name.startswith(("mdlm_", "sdtt")):
        assert 34 < spent < 48  # of 64 steps, 64 (1 - 1/e) = 40 move a mask
    elif name == "ar_lm":
        assert spent == 64 and session.ledger.entries["ar"].as_dict()["positions"] == 2 * 64
    with torch.no_grad():  # prompts stay
        session = session_of("completion/stories64", **networks)
        prompt = texts()[0, :24].tolist()
        batch = {"prompt": [prompt], "length": [64]}
        written = method.run(session, batch, 64)
    assert len(written[0]) == 40 and MASK not in written[0]


# -- caches and guides ------------------------------------------------------------------------------------------------


def test_a_pass_over_some_positions_is_exact_while_nothing_changes() -> None:
    """FreeCache: the same text gives the same logits; a changed rest gives others, for the beginning is kept as it was."""
    model = tiny(False)
    x = texts()[:1].clone()
    x[:, 30:] = MASK
    with torch.no_grad():
        cache = flashdlm.FreeCache(model)
        whole = mdlm.logits(model, x)
        assert torch.allclose(flashdlm.run_from_clean(model, x, cache), whole, atol=1e-5)
        again = flashdlm.run_from_clean(model, x, cache)
        assert torch.equal(again[:, :30], torch.zeros_like(again[:, :30]))
        assert torch.allclose(again[:, 30:], whole[:, 30:], atol=1e-4)
        y = x.clone()
        y[:, 30:40] = texts()[1, 30:40]
        kept, fresh = flashdlm.run_from_clean(model, y, cache)[:, 39:], mdlm.logits(model, y)[:, 39:]
        assert float((kept - fresh).abs().max()) > 1e-3
        assert mdlm.logits(model, y)[:, :5].sub(whole[:, :5]).abs().max() > 1e-3  # it looks both ways


@pytest.mark.parametrize("name", ["flashdlm", "flashdlm_corrected", "left_to_right", "freecache"])
def test_no_kept_key_or_value_is_that_of_a_mask(name: str) -> None:
    """Whatever a pass takes from the cache was computed for the word that stands there, at each step of each rule."""
    method, model, guide = load(name), tiny(False), tiny(True)
    original, starts = blocks.run_blocks, []
    ran_for = torch.full((64,), -1)  # the word for which keys and values of a position were last computed

    def spy(network: Any, ids: Tensor, start: int, cache: Any) -> Tensor:
        if network is model:
            starts.append(start)
            text = seen[-1]
            assert torch.equal(ran_for[:start], text[0, :start]) and MASK not in ran_for[:start]
            ran_for[start:] = ids[0]
        return original(network, ids, start, cache)

    seen: list[Tensor] = []
    passed = method.run.__globals__["run_from_clean"]

    def run(network: Any, x: Tensor, cache: Any) -> Tensor:
        seen.append(x)
        return passed(network, x, cache)

    session = session_of("completion/stories64", model=model, ar=guide)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        globals_of = method.run.__globals__
        patch.setitem(globals_of, "run_blocks", spy)
        patch.setitem(globals_of, "run_from_clean", run)
        method.run(session, {"prompt": [texts()[0, :24].tolist()], "length": [64]}, 40)
    assert len(starts) > 3 and starts[:2] == [0, 24] and starts == sorted(starts)
    for before, after, start in zip(seen, seen[1:], starts[1:], strict=False):
        assert start == flashdlm.first_mask(before) <= flashdlm.first_mask(after)  # nothing clean runs a third time


def test_the_causal_model_with_a_cache_is_the_one_without() -> None:
    model, x = tiny(True), texts()[:2]
    with torch.no_grad():
        cache, whole = blocks.new_cache(model), mdlm.logits(model, x)
        parts, start = [], 0
        for length in (1, 7, 1, 20, 35):
            parts.append(blocks.run_blocks(model, x[:, start : start + length], start, cache))
            start += length
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_guide_decides_how_much_and_what_only_where_it_corrects(corrected: bool) -> None:
    assert [flashdlm.agreed([1, 2, 3], g) for g in ([1, 2, 3], [1, 2, 9], [9, 2, 3])] == [3, 2, 0]
    model, guide = tiny(False), tiny(True)
    x = torch.full((1, 64), MASK)
    x[:, :24] = texts()[:1, :24]
    steps: list[tuple[Tensor, Tensor]] = []
    original = flashdlm.run_from_clean

    def spy(network: Any, y: Tensor, cache: Any) -> Tensor:
        found = original(network, y, cache)
        steps.append((y, sampling.word_probabilities(found).argmax(-1)))
        return found

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(flashdlm, "run_from_clean", spy)
        done = flashdlm.fill_guided(model, guide, x, 40, None, corrected)
    steps.append((done, done))
    assert len(steps) > 3
    for (y, draft), (after, _) in itertools.pairwise(steps):
        start, stop = flashdlm.first_mask(y), flashdlm.first_mask(after)
        text = torch.where(y == MASK, draft, y)
        before = torch.cat([torch.full((1, 1), mdlm.START), text[:, :-1]], 1)
        with torch.no_grad():
            wished = sampling.word_probabilities(mdlm.logits(guide, before)).argmax(-1)
        agrees = (wished == text)[0, start:].tolist()
        same = agrees.index(False) if False in agrees else len(agrees)
        assert torch.equal(after[:, start : start + same], draft[:, start : start + same])
        if corrected and same < len(agrees):
            assert stop == start + same + 1 and after[0, stop - 1] == wished[0, stop - 1]
        else:
            assert stop - start == max(1, same) or after is done
            assert torch.equal(after[:, start:stop], draft[:, start:stop])  # the model's own words


def test_the_control_writes_as_many_words_from_the_left() -> None:
    model, x = tiny(False), torch.full((1, 64), MASK)
    x[:, :24] = texts()[:1, :24]
    firsts: list[int] = []
    original = flashdlm.run_from_clean

    def spy(network: Any, y: Tensor, cache: Any) -> Tensor:
        firsts.append(flashdlm.first_mask(y))
        return original(network, y, cache)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(flashdlm, "run_from_clean", spy)
        done = flashdlm.fill_from_the_left(model, x, 8, None)
    assert firsts == list(range(24, 64, 5)) and MASK not in done


def test_an_agreeing_guide_ends_in_one_step_and_positions_are_saved() -> None:
    model, guide = tiny(False), tiny(True, 1)
    prompt = texts()[0, :24].tolist()
    batch = {"prompt": [prompt], "length": [64]}
    spent = {}
    for name in ("guided_diffusion", "flashdlm", "freecache", "dlm_confidence"):
        session = session_of("completion/stories64", model=model, ar=guide)
        session.ledger.reset(limit=40)
        with torch.no_grad():
            track.check(TASKS["completion/stories64"], batch, load(name).run(session, batch, 40))
        spent[name] = session.ledger.entries["model"].as_dict()
    assert spent["freecache"]["evaluations"] == spent["dlm_confidence"]["evaluations"] == 40
    assert spent["dlm_confidence"]["positions"] == 40 * 64
    assert spent["flashdlm"]["positions"] < 0.65 * 64 * spent["flashdlm"]["evaluations"]
    assert spent["guided_diffusion"]["positions"] == 64 * spent["guided_diffusion"]["evaluations"]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        method = load("flashdlm")
        patch.setitem(method.run.__globals__, "agreed", lambda draft, wished: len(draft))
        session = session_of("completion/stories64", model=model, ar=guide)
        method.run(session, batch, 40)
    assert session.ledger.entries["model"].evaluations == 1


def test_confident_unmasking_takes_the_surest_masks() -> None:
    found = torch.zeros(1, 4, V)
    for i, sure in enumerate((5.0, 9.0, 7.0, 20.0)):
        found[0, i, A + i] = sure
    x = torch.tensor([[MASK, MASK, MASK, C]])
    assert blocks.unmask_confident(found, x, 2).tolist() == [[MASK, A + 1, A + 2, C]]


# -- the track --------------------------------------------------------------------------------------------------------


def test_the_backbones_know_the_language() -> None:
    ids = texts()[:48]
    session = session_of("likelihood/stories64", model=backbones.load("mdlm_stories"), ar=backbones.load("ar_stories"))
    floor = stories64.entropy() / 64
    nll = {}
    for name in ("ar_lm", "mdlm_bound"):
        with torch.no_grad():
            bound = load(name).run(session, {"tokens": ids}, 4)
        track.check(TASKS["likelihood/stories64"], {"tokens": ids}, bound)
        scored = track.score(TASKS["likelihood/stories64"], {"tokens": ids}, bound, {}, np.arange(48)[None])
        nll[name] = scored["nll"].value
        assert scored["excess"].value == pytest.approx(nll[name] - floor, abs=0.02)
    assert floor - 0.01 < nll["ar_lm"] < floor + 0.05
    assert floor < nll["mdlm_bound"] < floor + 0.15
    assert session.ledger.entries["model"].evaluations == 4 * 48 and session.ledger.entries["ar"].evaluations == 48


def test_scores_of_right_and_wrong_texts() -> None:
    task = TASKS["generation/stories64"]
    resample = np.arange(40)[None].repeat(2, 0)

    def scored(rows: Tensor) -> dict[str, float]:
        batch = {"prompt": [[]] * len(rows), "length": [64] * len(rows)}
        found = track.score(task, batch, rows.tolist(), {}, resample)
        assert all(s.resamples == pytest.approx([s.value] * 2) for s in found.values())
        return {name: s.value for name, s in found.items()}

    right = scored(texts()[:40])
    assert right["valid"] == 1 and right["gen_ppl"] == pytest.approx(
        math.exp(stories64.entropy() / 64 + 0.0099), rel=0.02
    )
    shuffled = texts()[:40, torch.randperm(64, generator=rng())]
    wrong = scored(shuffled)
    assert wrong["valid"] == 0 and wrong["gen_ppl"] > 50 * right["gen_ppl"]
    assert wrong["entropy"] == pytest.approx(right["entropy"])
    same = scored(texts()[:1].expand(40, 64))
    assert same["valid"] == 1 and same["entropy"] < right["entropy"] - 0.2


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ([[1] * 39], "39 words"),
        ([[1] * 39 + [MASK]], "mask"),
        ([[1] * 40, [1] * 40], "list of 1"),
        ([[1.0] * 40], "list of ints"),
        ([[V] * 40], "list of ints"),
    ],
)
def test_bad_texts_are_refused(outputs: Any, said: str) -> None:
    with pytest.raises(BadOutput, match=said):
        track.check(TASKS["completion/stories64"], {"prompt": [[5] * 24], "length": [64]}, outputs)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_bounds_are_refused(value: float) -> None:
    batch = {"tokens": torch.zeros(2, 64, dtype=torch.long)}
    with pytest.raises(BadOutput):
        track.check(TASKS["likelihood/stories64"], batch, torch.tensor([1.0, value]))
    with pytest.raises(BadOutput):
        track.check(TASKS["likelihood/stories64"], batch, torch.ones(3))


def test_inputs_are_texts_of_the_test_split() -> None:
    split = {tuple(row) for row in texts().tolist()}
    for name, task in TASKS.items():
        found = track.inputs(task, 5, rng(1), torch.device("cpu"))
        rows = found["tokens"].tolist() if "tokens" in found else found["prompt"]
        again = track.inputs(task, 5, rng(1), torch.device("cpu"))
        assert str(again) == str(found)
        if name.startswith("generation/"):
            assert rows == [[]] * 5
        else:
            length = len(rows[0])
            assert {tuple(row) for row in rows} <= {row[:length] for row in split}
