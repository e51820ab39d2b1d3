"""Decoding methods that draft with the target itself: exact texts, caches and budgets of all, Draft & Verify, Kangaroo."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from rigs.decoding import greedy_without_cache, prompt_of, run, tiny, truth_of
from rigs.self_drafting import adapter_of, load, p_value, session_of
from stepmark.methods.decoding import kangaroo
from stepmark.methods.decoding.kangaroo import EarlyExitDecoder, train_exit_adapter
from torch import Tensor, nn

from stepmark import backbones
from stepmark.backbones import lm
from stepmark.task import load_split
from stepmark.tracks import decoding
from stepmark.tracks.decoding import metrics
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.speculation import speculate

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = (
    "jacobi",
    "lookahead_decoding",
    "lookahead_small",
    "self_speculative_decoding",
    "kangaroo",
    "early_exit_fixed",
)


@pytest.fixture(scope="module")
def target() -> nn.Module:
    return backbones.load("lm_target")


# -- lossless, greedy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_output_is_greedy_decoding_on_random_models(name: str) -> None:
    """Untrained targets, two query heads per key/value head, random masks and adapters, every budget."""
    tokens = forwards = 0.0
    lengths = set()
    for seed in range(8):
        model, prompt, truth = truth_of(seed)
        session = session_of(model, seed)
        lengths.add(len(truth))
        for budget in (1, 2, 5, 9, 1000):
            got = run(load(name), session, [prompt], 30, budget)[0]
            assert got == truth[: len(got)]
            assert session.ledger.spent <= budget + 1e-9
            assert len(got) >= 1
            if name in ("jacobi", "lookahead_decoding"):
                assert len(got) >= min(budget, len(truth)), "fewer than one token per forward"
        assert got == truth
        tokens, forwards = tokens + len(got), forwards + session.ledger.spent
    assert len(lengths) > 1, "no text ends by itself: the end of the sequence is not tried"
    if name in ("jacobi", "lookahead_decoding"):
        assert tokens > 1.1 * forwards, "nothing is ever accepted"


@pytest.mark.parametrize("name", METHODS)
def test_output_is_greedy_decoding_on_the_trained_target(name: str, target: nn.Module) -> None:
    session = session_of(target, skipped=torch.tensor([[0, 0], [1, 1], [0, 1], [1, 0]]).bool())
    method = load(name, W=7, N=5, G=7)
    for workload, count in (("sums", 2), ("words", 3), ("hops", 2), ("stories", 1)):
        prompts = [lm.encode(text) for text in load_split(workload, "test")["prompt"][20 : 20 + count]]
        room = decoding.MAX_NEW_TOKENS[workload]
        outputs = run(method, session, prompts, room, 1000)
        spent = session.ledger.spent
        for prompt, output in zip(prompts, outputs, strict=True):
            assert metrics.agreement(target, prompt, output) == len(output)
            assert output[-1] == lm.EOS or len(output) == room
        if name == "lookahead_decoding":
            assert spent < 0.9 * sum(map(len, outputs))


# -- lossless, sampled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lookahead_decoding", "self_speculative_decoding", "kangaroo", "early_exit_fixed"])
def test_sampled_texts_have_the_targets_distribution(name: str) -> None:
    """Whole runs at temperature 1: the last two of five tokens, against the enumeration of all texts."""
    vocabulary, length, n = 4, 5, 1500
    model = tiny(1, layers=2, vocabulary=vocabulary, eos=99)
    prompt = [2, 3, 2]
    texts = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
    with torch.no_grad():
        whole = torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts], 1)
        logp = model(whole[:, :-1], use_cache=False).logits[:, len(prompt) - 1 :].double().log_softmax(-1)
        p = logp.gather(2, texts[..., None])[..., 0].sum(1).exp()
    marginal = p.view(vocabulary**3, -1).sum(0).numpy()
    session = session_of(model, seed=3, skipped=torch.tensor([[0, 1], [1, 0]]).bool())
    outputs = run(load(name, W=3, N=3, G=3, GAMMA=3), session, [prompt] * n, length, 1000, temperature=1.0)
    assert p_value([tuple(o[-2:]) for o in outputs], marginal, vocabulary) > 1e-3
    assert session.ledger.spent < 1.1 * n * length or name in (
        "self_speculative_decoding",
        "kangaroo",
        "early_exit_fixed",
    )


# -- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", [2, 4, 7, 12])
def test_cache_after_rollback_is_what_recomputation_gives(name: str, budget: int, decoders: list[Decoder]) -> None:
    for seed in range(3):
        model, prompt = tiny(seed), prompt_of(seed)
        del decoders[:]
        output = run(load(name), session_of(model, seed), [prompt], 20, budget)[0]
        used = decoders[0]
        text = (prompt + output)[: used.length]
        assert len(text) >= len(prompt) + len(output) - 1
        fresh = Decoder(tiny(seed), len(text))
        with torch.no_grad():
            fresh.forward(text)
        for layer in range(3):
            for ours, theirs in zip(
                used.cache.states(layer, len(text)), fresh.cache.states(layer, len(text)), strict=True
            ):
                assert torch.allclose(ours, theirs, atol=1e-4)


# -- Draft & Verify ---------------------------------------------------------------------------------------------------


def test_skipped_sub_layers_add_nothing_and_come_back() -> None:
    """Drafting logits are those of a copy whose skipped sub-layers write zeros; afterwards the model is whole again."""
    method = load("self_speculative_decoding")
    model, ablated = tiny(4, layers=4), tiny(4, layers=4)
    skipped = torch.tensor([[0, 1], [1, 0], [1, 1], [0, 0]]).bool()
    for layer, (attention, mlp) in zip(ablated.model.layers, skipped.tolist(), strict=True):
        layer.self_attn.o_proj.weight *= not attention
        layer.mlp.down_proj.weight *= not mlp
    before = [(layer.self_attn, layer.mlp) for layer in model.model.layers]
    ids = prompt_of(3)
    with torch.no_grad():
        decoder = Decoder(model, 20)
        with method.skipping(decoder.layers, skipped) as layers:
            assert layers == [decoder.layers[0], decoder.layers[1], decoder.layers[3]]
            found = decoder.logits(decoder.run(decoder.embed(ids), 0, layers))
        assert torch.allclose(found, ablated(torch.tensor([ids]), use_cache=False).logits[0], atol=1e-5)
        with pytest.raises(RuntimeError, match="stop"), method.skipping(decoder.layers, skipped):
            raise RuntimeError("stop")
    assert [(layer.self_attn, layer.mlp) for layer in model.model.layers] == before


def test_self_speculation_costs_its_drafts_and_its_checks(
    decoders: list[Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer evaluations = layers x checks + layers entered x drafted tokens, by the harness's count."""
    passes: list[tuple[int, int]] = []
    forward = Decoder.run

    def spy(self: Decoder, hidden: Tensor, start: int, chosen: Any = None, *rest: Any) -> Tensor:
        passes.append((len(self.layers if chosen is None else chosen), hidden.shape[1]))
        return forward(self, hidden, start, chosen, *rest)

    monkeypatch.setattr(Decoder, "run", spy)
    skipped = torch.tensor([[1, 1], [0, 0], [0, 1], [1, 1]]).bool()
    session = session_of(tiny(6, layers=4), skipped=skipped)
    run(load("self_speculative_decoding"), session, [prompt_of(1)], 40, 1000)
    drafts = sum(entered == 2 for entered, _ in passes)
    checks = sum(entered == 4 for entered, _ in passes)
    assert drafts + checks == len(passes)
    assert min(drafts, checks) > 3
    assert session.ledger.entries["target"].layer_rows == 4 * checks + 2 * drafts
    # Every check runs over the last token and all that was drafted since the check before.
    assert sum(width for entered, width in passes if entered == 4) == len(prompt_of(1)) + (checks - 1) + drafts


def test_exit_threshold_follows_the_rate_of_acceptance() -> None:
    method = load("self_speculative_decoding")
    gamma, rate = method.adapted(0.6, 0.0, 1.0)
    assert (gamma, rate) == pytest.approx((0.9 * 0.6 + 0.1 * 0.61, 0.5))
    gamma, rate = method.adapted(0.6, 0.9, 0.95)
    assert (gamma, rate) == pytest.approx((0.9 * 0.6 + 0.1 * 0.59, 0.925))


@pytest.mark.parametrize(("threshold", "width"), [(1.1, 1), (-1.0, 12)])
def test_self_speculation_stops_drafting_below_the_threshold(
    threshold: float, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing skipped all drafts are kept, the rate handed on is 1, and gamma alone sets their length."""
    method = load("self_speculative_decoding", GAMMA=threshold)
    rates: list[float] = []
    adapted = method.adapted
    monkeypatch.setattr(
        type(method), "adapted", staticmethod(lambda g, r, now: rates.append(now) or (adapted(g, r, now)[0], r))
    )
    model = next(m for m in map(tiny, range(50)) if len(greedy_without_cache(m, prompt_of(0), 40)) == 40)
    session = session_of(model, skipped=torch.zeros(3, 2, dtype=torch.bool))
    output = run(method, session, [prompt_of(0)], 40, 1000)[0]
    assert len(output) == 40
    assert set(rates) == {1.0}
    cycles = -(-39 // (width + 1))
    drafted = 39 - cycles  # every cycle drafts all it gives but one
    assert session.ledger.spent == 1 + cycles + drafted


def test_the_adapted_threshold_is_the_one_that_ends_the_next_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one that nothing falls below to one that everything does: a long draft, then drafts of one token."""
    method = load("self_speculative_decoding", GAMMA=-1.0)
    given: list[float] = []
    monkeypatch.setattr(type(method), "adapted", staticmethod(lambda g, r, now: given.append(g) or (1.1, r)))
    model = next(m for m in map(tiny, range(50)) if len(greedy_without_cache(m, prompt_of(0), 40)) == 40)
    session = session_of(model, skipped=torch.zeros(3, 2, dtype=torch.bool))
    run(method, session, [prompt_of(0)], 40, 1000)
    assert given == [-1.0] + [1.1] * (len(given) - 1)
    # 1 + 13 tokens by the first draft and its check, then two tokens a check, the last one without a draft.
    assert len(given) == 1 + (40 - 14) // 2 - 1


def test_mask_search_finds_the_redundant_layers_and_beats_random_search() -> None:
    """Eight layers of which four are all but redundant: the best mask is known, random masks of as many tries miss it."""
    method = load("self_speculative_decoding")
    for seed in range(3):
        rng = np.random.default_rng(100 + seed)
        harm = np.repeat(rng.permutation(np.repeat([0.01, 0.5], 4)), 2) * rng.uniform(0.5, 1.5, 16)
        tried: list[bytes] = []

        def cost(mask: np.ndarray, harm: np.ndarray = harm, tried: list[bytes] = tried) -> float:
            """A draft that costs the layers entered; the chance of acceptance falls with the harm of what is skipped."""
            tried.append(mask.tobytes())
            share = 1 - mask.reshape(-1, 2).all(1).mean()
            accept = np.exp(-float(harm @ mask))
            return (1 + 6 * share) / sum(accept**k for k in range(7))

        found = method.search(cost, 8, range(40), np.random.default_rng(seed))
        assert len(set(tried)) == len(tried) == 45, "a mask was tried twice"
        assert np.array_equal(found, method.search(cost, 8, range(40), np.random.default_rng(seed)))
        best = min(cost(np.repeat(np.array(whole), 2)) for whole in itertools.product([False, True], repeat=8))
        random = min(cost(rng.random(16) < rng.random()) for _ in range(45))
        assert cost(found) <= 1.05 * best < 0.9 * random


# -- Kangaroo ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kangaroo", "early_exit_fixed"])
def test_early_exit_runs_no_layer_twice_over_a_token(name: str) -> None:
    """Each layer sees each drafted or accepted token once, the deep ones in the check only."""
    model = tiny(8, layers=4)
    session = session_of(model)
    seen: list[list[int]] = [[] for _ in range(4)]
    for i, layer in enumerate(model.model.layers):
        counted = layer.forward

        def spy(hidden: Tensor, *args: Any, i: int = i, counted: Any = counted, **kwargs: Any) -> Tensor:
            seen[i].append(hidden.shape[1])
            return counted(hidden, *args, **kwargs)

        layer.forward = spy
    prompt = prompt_of(4)
    method = load(name)
    method.sure = min(method.sure, 0.3)
    output = run(method, session, [prompt], 40, 1000)[0]
    for layer in model.model.layers:
        del layer.forward
    checks = seen[1][1:]
    drafted = sum(checks) - len(checks)
    assert drafted > len(checks)
    assert seen[1] == seen[2] == seen[3]
    assert sum(seen[0]) == sum(seen[1]) == len(prompt) + len(checks) + drafted
    assert set(seen[0][1:]) == {1}
    assert session.ledger.spent == pytest.approx(1 + len(checks) + drafted / 4)
    assert len(output) >= len(checks)


def test_confidence_ends_a_draft_and_gamma_bounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: dict[float, set[int]] = {}
    for eta in (-1.0, 1.1, 0.5):
        drafts: list[int] = []
        probabilities: list[list[float]] = []

        def spy(target: Any, prompt: Any, room: int, budget: Any, temperature: float, propose: Any, rng: Any) -> Any:
            def watched(tokens: list[int], most: int) -> Any:
                probabilities.append([])
                draft, q = propose(tokens, most)
                if most >= 6 and draft[-1] != target.eos:
                    drafts.append(len(draft))
                    sure = [top >= eta for top in probabilities[-1]]
                    assert all(sure[:-1])
                    assert len(draft) == len(sure)
                    assert not sure[-1] or len(draft) == 6
                return draft, q

            return speculate(target, prompt, room, budget, temperature, watched, rng)

        exit_logits = EarlyExitDecoder.exit_logits

        def spy_exit(self: EarlyExitDecoder, token: int, exit_logits: Any = exit_logits) -> Tensor:
            found = exit_logits(self, token)
            probabilities[-1].append(float(found.double().softmax(-1).max()))
            return found

        with monkeypatch.context() as patch:
            patch.setattr(EarlyExitDecoder, "exit_logits", spy_exit)
            patch.setattr(kangaroo, "speculate", spy)
            method = kangaroo.Kangaroo()
            method.sure = eta
            for seed in range(4):
                run(method, session_of(tiny(seed), seed), [prompt_of(seed)], 30, 1000)
        widths[eta] = set(drafts)
    assert widths[-1.0] == {6}
    assert widths[1.1] == {1}
    assert len(widths[0.5]) > 1


def test_early_exit_cache_equals_one_pass(target: nn.Module) -> None:
    """Token by token, with rollbacks and after checks, the exit answers as one pass over the whole text does."""
    adapter = adapter_of(target)
    prompt = lm.encode(load_split("words", "test")["prompt"][0])
    tail = lm.encode("tom finds 5 pears ; 3 + 5")

    def whole(tokens: list[int]) -> Tensor:
        inner: Any = target.model
        hidden = inner.embed_tokens(torch.tensor([tokens]))
        rotary = inner.rotary_emb(hidden, torch.arange(len(tokens))[None])
        hidden = inner.layers[0](hidden, attention_mask=None, position_embeddings=rotary)
        return target.lm_head(adapter(hidden, rotary))[0, -1]  # type: ignore[operator]

    with torch.no_grad():
        decoder = EarlyExitDecoder(target, 80, 1, adapter)
        decoder.forward(prompt)
        held = list(prompt)
        for kept, drafted in ((2, 4), (4, 4), (0, 3), (1, 1)):
            for j in range(drafted):
                assert torch.allclose(decoder.exit_logits(tail[j]), whole(held + tail[: j + 1]), atol=1e-4)
            decoder.forward(tail[: drafted + 1])
            held += tail[: kept + 1]
            decoder.rollback(len(held))
        assert torch.allclose(decoder.exit_logits(tail[0]), whole([*held, tail[0]]), atol=1e-4)


def test_an_adapter_adds_attention_to_what_the_shallow_layers_say(target: nn.Module) -> None:
    """norm(h + attention(norm h)): without attention the second norm alone, which starts as the target's last."""
    adapter: Any = adapter_of(target)
    inner: Any = target.model
    hidden = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0))
    rotary = inner.rotary_emb(hidden, torch.arange(5)[None])
    with torch.no_grad():
        attended, _ = adapter.attention(adapter.input_norm(hidden), position_embeddings=rotary, attention_mask=None)
        torch.testing.assert_close(adapter(hidden, rotary), inner.norm(hidden + attended))
        adapter.attention.o_proj.weight.zero_()
        torch.testing.assert_close(adapter(hidden, rotary), inner.norm(hidden))


def test_adapter_learns_the_targets_distribution(target: nn.Module) -> None:
    data = load_split("sums", "train")
    rows = [
        (lm.encode(p), [*lm.encode(t), lm.EOS]) for p, t in zip(data["prompt"][:200], data["target"][:200], strict=True)
    ]
    batches = list(itertools.islice(lm.batches(rows, 400, 0), 5))
    overlaps = []
    for steps in (1, 120):
        adapter = adapter_of(target).requires_grad_(True)
        before = [p.clone() for p in target.parameters()]
        overlaps.append(train_exit_adapter(adapter, target, 1, batches, steps, lambda r, _: r))
        assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
    assert overlaps[0] < 0.5
    assert overlaps[1] > overlaps[0] + 0.25


# -- budget -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_budget_of_many_prompts_is_kept_for_each(name: str, decoders: list[Decoder]) -> None:
    model = tiny(0)
    session = session_of(model)
    for budget in (1, 3, 6):
        del decoders[:]
        run(load(name), session, [prompt_of(seed) for seed in range(4)], 30, budget)
        assert len(decoders) == 4
        assert all(decoder.spent <= budget + 1e-9 for decoder in decoders)
        assert sum(decoder.spent for decoder in decoders) == pytest.approx(session.ledger.spent)
