"""Several drafts of one text, texts that follow a wish, and trees of drafts: the methods and the tasks of texts."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rigs.decoding import load
from stepmark.datasets import wishes
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stepmark.backbones import lm
from stepmark.meter.counts import Ledger, watch
from stepmark.task import BadOutput, load_split
from stepmark.tracks.decoding import texts as decoding_texts
from stepmark.tracks.decoding.speculation import draw
from stepmark.tracks.decoding.texts import choices, compliance, nucleus, story_likelihood, story_walk

TASKS = {task.id: task for task in decoding_texts.TASKS}
STORY = load_split("stories", "train")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny(seed: int, spread: float = 0.4, ends: bool = True) -> Any:
    """A random Llama over 13 words that never pads and may end; the greater the spread of its weights, the surer it is."""
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, spread, generator=generator)
        head = torch.nn.Linear(16, 13)
        head.weight.copy_(model.lm_head.weight)
        head.bias.copy_(torch.tensor([-1e4, 0.0 if ends else -1e4] + [0.0] * 11))
        model.lm_head = head
    return model.eval().requires_grad_(False)


def words_of(seed: int, length: int) -> list[int]:
    return torch.randint(2, 13, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def session_of(model: Any, seed: int = 0) -> Any:
    """What `run` sees, the target counted as the harness counts it."""
    ledger = Ledger(bounded=("target",))
    for part in model.modules():
        part.__dict__.pop("forward", None)
    watch(ledger, "target", model, list(model.model.layers))
    rng = torch.Generator().manual_seed(seed)
    return SimpleNamespace(networks={"target": model}, state={}, rng=rng, device=torch.device("cpu"), ledger=ledger)


def run(method: Any, session: Any, batch: dict[str, list[Any]], budget: int) -> list[list[int]]:
    session.ledger.reset(limit=budget * len(batch["prompt"]))
    with torch.no_grad():
        return method.run(session, batch, budget)  # type: ignore[no-any-return]


def plain_logits(model: Any, ids: list[int]) -> Tensor:
    """Next-token logits [V] after a text, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1]  # type: ignore[no-any-return]


# -- superposed decoding ----------------------------------------------------------------------------------------------


def superposed(texts: list[list[int]], **constants: Any) -> tuple[Any, dict[str, Tensor]]:
    method = load("superposed_decoding", **constants)
    return method, method.run.__globals__["count_runs"](texts)


def test_ngrams_are_interpolated_counts() -> None:
    """Against counting by hand: shares of what follows a context, contexts never seen left out."""
    texts = [words_of(seed, 40) for seed in range(30)]
    method, tables = superposed(texts)
    counted = Counter(tuple(row[i : i + n]) for row in texts for n in range(1, 7) for i in range(len(row) - n + 1))
    weights = (0.01, 0.04, 0.15, 0.18, 0.12)
    for text in (words_of(3, 12), texts[5][10:20], [7]):
        expected = []
        for token in range(13):
            p = 0.0
            for n, weight in enumerate(weights, start=1):
                context = tuple(text[-n:])
                if n <= len(text) and counted[context]:
                    p += weight * counted[(*context, token)] / counted[context]
            expected.append(p)
        found = method.run.__globals__["ngram_probabilities"](tables, text, torch.arange(13))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_one_draft_without_ngrams_is_greedy_decoding() -> None:
    """A mixture of one draft is its own embedding; n-grams that know nothing change no order."""
    method, tables = superposed([[200] * 8])
    compared = 0
    for seed in range(6):
        model, prompt = tiny(seed), words_of(seed, 5)
        session, expected = session_of(model), list(prompt)
        session.state = tables
        while len(expected) < 17:
            # A draft that ends is put aside and the best that has not ended goes on: greedy among the other words.
            logits = plain_logits(model, expected)
            logits[1] = -torch.inf
            expected.append(int(logits.argmax()))
        session.ledger.reset(limit=12)
        decode, decoder = type(method).decode, method.run.__globals__["Decoder"]
        with torch.no_grad():
            drafts = decode(decoder(model, 20), tables, prompt, 12, 1)
        if 1 not in drafts[0]:  # else the draft that ended was the likelier one
            assert drafts[0] == expected[5:]
            compared += 1
        assert session.ledger.spent == 12
    assert compared >= 3


def reference(
    model: Any, texts: list[list[int]], prompt: list[int], length: int, k: int, alpha: float = 0.54
) -> list[list[int]]:
    """Superposed decoding by its equations: every pass over the whole text, every draft with every word."""
    counted = Counter(tuple(row[i : i + n]) for row in texts for n in range(1, 7) for i in range(len(row) - n + 1))
    table = model.model.embed_tokens.weight
    embedded = table[torch.tensor(prompt)]
    drafts: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for step in range(length):
        with torch.no_grad():
            logits = model(inputs_embeds=embedded[None], use_cache=False).logits[0, -1].double()
        p = (logits / 0.06).softmax(0)
        top = p.topk(9).indices.tolist()
        grown = []
        for score, draft in drafts:
            text, rows = [*prompt, *draft], []
            for token in top:
                q = sum(
                    weight * counted[(*text[-n:], token)] / counted[tuple(text[-n:])]
                    for n, weight in enumerate((0.01, 0.04, 0.15, 0.18, 0.12), start=1)
                    if n <= len(text) and counted[tuple(text[-n:])]
                )
                log_p = (1 - alpha) * math.log(p[token] / sum(float(p[i]) for i in top))
                log_q = alpha * math.log(q) if q else -math.inf if alpha else 0.0
                rows.append((log_p, log_p + log_q, token))
            known = any(math.isfinite(with_ngrams) for _, with_ngrams, _ in rows)
            for alone, with_ngrams, token in rows:
                grown.append((score + (with_ngrams if known else alone - 200.0), [*draft, token]))
        grown = sorted(grown, key=lambda pair: -pair[0])[: 2 * k]
        ended += [pair for pair in grown if pair[1][-1] == 1]
        drafts = [pair for pair in grown if pair[1][-1] != 1][:k]
        if step < length - 1:
            shares = torch.tensor([score for score, _ in drafts]).softmax(0)
            mixed = sum(share * table[draft[-1]] for share, (_, draft) in zip(shares, drafts, strict=True))
            embedded = torch.cat([embedded, mixed[None]])
    pool = drafts + sorted(ended, key=lambda pair: pair[0])[-k:]
    return [draft for _, draft in sorted(pool, key=lambda pair: math.exp(-pair[0] / len(pair[1])))[:k]]


def test_superposed_drafts_are_those_of_the_equations() -> None:
    """Recomputed without caches: a wrong weight of a draft, wrong n-gram context or wrong slot changes the drafts."""
    texts = [[1 if word == 12 else word for word in words_of(seed, 60)] for seed in range(12)]
    method, tables = superposed(texts)
    different = ends = 0
    for seed in range(8):
        model, prompt = tiny(seed, spread=0.15), words_of(seed, 4 + seed)
        session = session_of(model)
        session.state = tables
        expected = reference(model, texts, prompt, 8, 3)
        batch = {"prompt": [prompt], "max_new_tokens": [8], "drafts": [3]}
        found = run(method, session, batch, 20)[0]
        assert found == [token for draft in expected for token in [*draft, *[0] * (8 - len(draft))]]
        assert session.ledger.spent == 8, "more than a pass for each position"
        different += len({tuple(draft) for draft in expected}) == 3
        ends += sum(draft[-1] == 1 for draft in expected)
        short = run(method, session, batch, 4)[0]
        assert [len([token for token in short[i : i + 8] if token]) <= 4 for i in (0, 8, 16)] == [True] * 3
        assert session.ledger.spent == 4
    assert different == 8
    assert ends > 0, "no draft ends: the end of a text is not tried"


def test_superposed_drafts_without_ngrams_are_those_of_the_equations_at_alpha_nought() -> None:
    for seed in range(4):
        model, prompt = tiny(seed, spread=0.15), words_of(seed, 5)
        session = session_of(model)
        session.state = superposed([words_of(seed, 60)])[1]
        expected = reference(model, [], prompt, 6, 3, alpha=0.0)
        batch = {"prompt": [prompt], "max_new_tokens": [6], "drafts": [3]}
        found = run(load("superposed_alone"), session, batch, 20)[0]
        assert found == [token for draft in expected for token in [*draft, *[0] * (6 - len(draft))]]


def test_runs_are_counted_in_prompts_and_texts_up_to_their_ends() -> None:
    pairs = list(zip(STORY["prompt"], STORY["target"], strict=True))[:50]
    session = SimpleNamespace(
        train={"prompt": [p for p, _ in pairs], "target": [t for _, t in pairs]}, scale=lambda embedded, smoke: 50
    )
    rows = [[*lm.encode(prompt), *lm.encode(text), lm.EOS] for prompt, text in pairs]
    method = load("superposed_decoding")
    code, tables = method.run.__globals__["code"], method.prepare(session)
    for n in range(1, 7):
        counted = Counter(code(row[i : i + n]) for row in rows for i in range(len(row) - n + 1))
        assert dict(zip(tables[f"codes{n}"].tolist(), tables[f"counts{n}"].tolist(), strict=True)) == counted


def test_drafts_of_the_ngrams_are_a_beam_of_the_interpolated_counts() -> None:
    """The control: scores are sums over the whole draft, every context is the text's own, and a draft that ended stays."""
    texts = [[5 + word if word < 11 else lm.EOS for word in words_of(seed, 40)] for seed in range(6)]
    _, tables = superposed(texts)
    counted = Counter(tuple(row[i : i + n]) for row in texts for n in range(1, 7) for i in range(len(row) - n + 1))
    ended = 0
    for seed in range(3):
        prompt = texts[seed][3 : 8 + seed]
        beam: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(5):
            grown = [pair for pair in beam if pair[1][-1:] == [lm.EOS]]
            for score, draft in beam:
                text = [*prompt, *draft]
                for token in range(len(lm.VOCABULARY)) if draft[-1:] != [lm.EOS] else ():
                    p = 1e-12
                    for n, weight in enumerate((0.01, 0.04, 0.15, 0.18, 0.12), start=1):
                        if n <= len(text) and counted[tuple(text[-n:])]:
                            p += weight * counted[(*text[-n:], token)] / counted[tuple(text[-n:])]
                    grown.append((score + math.log(p), [*draft, token]))
            beam = sorted(grown, key=lambda pair: -pair[0])[:3]
        session = session_of(tiny(0))
        session.state = tables
        found = run(load("ngram_drafts"), session, {"prompt": [prompt], "max_new_tokens": [5], "drafts": [3]}, 20)[0]
        assert found == [token for _, draft in beam for token in [*draft, *[lm.PAD] * (5 - len(draft))]]
        assert session.ledger.spent == 0
        ended += sum(draft[-1] == lm.EOS for _, draft in beam)
    assert ended


def test_nucleus_drafts_share_the_first_pass_and_the_budget() -> None:
    model, prompt = tiny(1), words_of(1, 6)
    session = session_of(model)
    batch = {"prompt": [prompt], "max_new_tokens": [10], "drafts": [3]}
    for budget, most in ((1, 1), (4, 2), (27, 9), (28, 10)):
        session.rng.manual_seed(0)
        texts = run(load("nucleus_drafts"), session, batch, budget)[0]
        drafts = [[token for token in texts[i : i + 10] if token] for i in (0, 10, 20)]
        assert all(len(draft) == most or (draft[-1] == 1 and len(draft) < most) for draft in drafts)
        assert session.ledger.spent == 1 + sum(len(draft) - 1 for draft in drafts) <= budget
        session.ledger.reset()
        for draft in drafts:
            for i, token in enumerate(draft):
                assert nucleus((plain_logits(model, [*prompt, *draft[:i]]) / 0.6).softmax(-1), 0.9)[token] > 0


def test_nucleus_drafts_are_drawn_at_the_papers_temperature() -> None:
    """First words of many drafts: their shares are those of the nucleus at 0.6, and not those at 1."""
    model, prompt = tiny(1, spread=0.2), words_of(1, 6)
    method, session = load("nucleus_drafts"), session_of(model)
    batch = {"prompt": [prompt], "max_new_tokens": [1], "drafts": [2000]}
    found = torch.bincount(torch.tensor(run(method, session, batch, 1)[0]), minlength=13) / 2000
    session.ledger.reset()
    cool, plain = (nucleus((plain_logits(model, prompt) / t).softmax(-1), 0.9) for t in (0.6, 1.0))
    assert (found - cool / cool.sum()).abs().sum() < 0.1 < 0.2 < (found - plain / plain.sum()).abs().sum()


# -- linear alignment -------------------------------------------------------------------------------------------------


def test_aligned_distribution_by_hand() -> None:
    """p proportional to p_with^(1 + r) / p_without^r, inside the nucleus of p_with and nowhere else."""
    function = load("linear_alignment").run.__globals__["aligned"]
    wished, plain = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.6, 0.1, 0.2, 0.1])
    raised = [0.5**3 / 0.6**2, 0.3**3 / 0.1**2, 0.0, 0.0]
    found = function(wished.log(), plain.log(), 2.0, 0.8)
    torch.testing.assert_close(found, torch.tensor(raised) / sum(raised))
    wider = function(wished.log(), plain.log(), 2.0, 0.81)
    assert (wider > 0).tolist() == [True, True, True, False]
    # Where the step leaves nothing of the nucleus, the nucleus as it is.
    far = function(torch.tensor([0.0, -1.0, -5.0]), torch.tensor([0.0, -1.0, -200.0]), 2.0, 0.9)
    torch.testing.assert_close(far, torch.tensor([math.e, 1.0, 0.0]) / (math.e + 1))


def test_alignment_at_ratio_nought_is_prompting() -> None:
    """The same words for the same draws, in twice the forwards."""
    for seed in range(3):
        model = tiny(seed, spread=0.2)
        batch = {
            "prompt": [words_of(seed + i, 6) for i in range(2)],
            "plain": [words_of(seed + i, 4) for i in range(2)],
            "max_new_tokens": [12, 12],
            "temperature": [1.0, 1.0],
        }
        found = []
        for name, constants, budget in (("wish_prompting", {}, 10), ("linear_alignment", {"ratio": 0.0}, 21)):
            session, method = session_of(model, seed), load(name)
            method.__dict__.update(constants)
            found.append(run(method, session, batch, budget))
            assert session.ledger.spent == sum(map(len, found[-1])) * (budget // 10)
            assert all(len(text) == 10 or text[-1] == 1 for text in found[-1])
        assert found[0] == found[1]
        other = run(load("linear_alignment"), session_of(model, seed), batch, 20)
        assert other != found[0], "the other prompt makes no difference"


def test_alignment_reads_the_text_after_each_prompt() -> None:
    """Every token recomputed without caches from the two prompts and the same draws."""
    function = load("linear_alignment").run.__globals__["aligned"]
    for seed in range(3):
        model, prompt, plain = tiny(seed, spread=0.2), words_of(seed, 7), words_of(seed + 50, 5)
        batch = {"prompt": [prompt], "plain": [plain], "max_new_tokens": [10], "temperature": [0.7]}
        for name in ("linear_alignment", "context_aware"):
            found = run(load(name), session_of(model, seed), batch, 1000)[0]
            rng, expected = torch.Generator().manual_seed(seed), []
            while len(expected) < 10 and 1 not in expected:
                wished, without = (plain_logits(model, [*start, *expected]) / 0.7 for start in (prompt, plain))
                wider = (1.5 * wished - 0.5 * without).softmax(-1)  # context-aware decoding: r = 0.5, all words
                p = wider if name == "context_aware" else function(wished, without, 2.0, 0.8)
                expected.append(draw(p, float(torch.rand((), generator=rng))))
            assert found == expected
        found = run(load("linear_alignment_greedy"), session_of(model, seed), batch, 1000)[0]
        for i, token in enumerate(found):
            pair = [plain_logits(model, [*start, *found[:i]]) / 0.7 for start in (prompt, plain)]
            assert token == int(function(*pair, 2.0, 0.8).argmax())


def test_nucleus_is_the_fewest_likeliest() -> None:
    p = torch.rand(40, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for mass in (0.1, 0.5, 0.9):
        kept = nucleus(p, mass)
        chosen = kept > 0
        assert torch.equal(kept[chosen], p[chosen])
        assert float(kept.sum()) >= mass > float(kept.sum() - kept[chosen].min())
        assert p[chosen].min() > p[~chosen].max()


# -- LLMCad -----------------------------------------------------------------------------------------------------------


def pair_session(target: Any, small: Any) -> Any:
    session = session_of(target)
    session.networks["draft"] = small
    return session


def greedy(model: Any, prompt: list[int], room: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + room and (len(tokens) == len(prompt) or tokens[-1] != 1):
        tokens.append(int(plain_logits(model, tokens).argmax()))
    return tokens[len(prompt) :]


def test_trees_of_any_small_model_give_greedy_decoding() -> None:
    """Drafts of an unrelated model, and of the target itself: the same text, in fewer passes the better they are."""
    saved = {"other": 0.0, "itself": 0.0}
    for seed in range(6):
        model, prompt = tiny(seed), words_of(seed, 3 + seed)
        truth = greedy(model, prompt, 24)
        for name, small in (("other", tiny(seed + 100, spread=0.3)), ("itself", tiny(seed))):
            session = pair_session(model, small)
            for budget in (1, 2, 5, 1000):
                batch = {"prompt": [prompt], "max_new_tokens": [24], "temperature": [0.0]}
                found = run(load("llmcad"), session, batch, budget)[0]
                assert found == truth[: len(found)]
                assert len(found) >= min(budget, len(truth)), "less than a token a pass"
                assert session.ledger.spent <= budget
            assert found == truth
            saved[name] += 1 - session.ledger.spent / len(truth)
    assert saved["itself"] > 6 * 0.5 > saved["other"] > 0


def test_confidences_of_a_tree_are_the_small_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recomputed without a cache from the text and the branch, also after branches were kept and others dropped;
    the branch furthest behind its share is written on until the surest falls below the threshold or the tree is full."""
    method = load("llmcad")
    kind, names = type(method), method.run.__globals__
    grow, trees = kind.grow, []
    monkeypatch.setitem(names, "BRANCH", 0.1)  # of thirteen words hardly ever one has 0.3 ...
    monkeypatch.setattr(kind, "first", 0.2)  # ... and a tree is full before its best branch falls to 0.01
    alphas: list[float] = []

    def spy(small: Any, tokens: list[int], most: int, alpha: float) -> Any:
        tree = grow(small, tokens, most, alpha)
        trees.append((list(tokens), most, alpha, tree))
        return tree

    monkeypatch.setattr(kind, "grow", staticmethod(spy))
    threshold = kind.threshold
    monkeypatch.setattr(
        kind,
        "threshold",
        staticmethod(lambda *given: alphas.append(threshold(*given)) or alphas[-1]),  # type: ignore[func-returns-value]
    )
    small = tiny(2, spread=0.3, ends=False)
    with torch.no_grad():
        pair = names["Decoder"](tiny(2, spread=0.31, ends=False), 80), names["Decoder"](small, 80)
        method.decode(*pair, words_of(2, 5), 40, 1000)
    assert [alpha for _, _, alpha, _ in trees] == [kind.first, *alphas[:-1]]
    branched = full = unsure = paced = 0
    for text, most, alpha, tree in trees:
        for node in range(len(tree.tokens)):
            path = tree.path(node)
            ids, sure = list(text), 1.0
            for step in path:
                sure *= float(plain_logits(small, ids).softmax(-1)[tree.tokens[step]])
                ids.append(tree.tokens[step])
            assert tree.sure[node] == pytest.approx(sure, rel=1e-4)
            assert tree.depths[node] == len(path) <= most
        read: list[int] = []
        for node in tree.slots:
            there = [n for n, parent in enumerate(tree.parents) if parent == -1 or parent in read]
            ends = [n for n in there if n not in read]
            assert max(tree.sure[n] for n in ends) >= alpha
            total, sure = sum(tree.depths[n] for n in ends), sum(tree.sure[n] for n in ends)
            lacking = {n: total * tree.sure[n] / sure - tree.depths[n] for n in ends if tree.depths[n] < most}
            assert lacking[node] == max(lacking.values())
            paced += tree.sure[node] < max(tree.sure[n] for n in lacking)
            read.append(node)
        waiting = [tree.sure[n] for n in range(len(tree.tokens)) if n not in tree.parents]
        branched += len(set(tree.parents)) < len(tree.parents)
        full += len(tree.tokens) == names["NODES"]
        unsure += bool(waiting) and max(waiting) < alpha
    assert min(branched, unsure, paced) > 0 < full


def test_threshold_falls_after_a_right_branch_and_rises_with_the_wrong_share() -> None:
    threshold = type(load("llmcad")).threshold
    assert threshold(0.2, 5, 5) == 0.1
    assert threshold(0.2, 0, 4) == pytest.approx(0.4)
    assert threshold(0.2, 3, 4) == pytest.approx(0.2 * 2**0.25)
    assert threshold(1.6, 0, 0) == 0.8, "a threshold above all confidence must come down again"


def test_the_threshold_moves_by_the_branch_that_matched_best() -> None:
    """Of a short branch and a long one it is the one through the last node kept; of several through it, or of all where
    nothing was kept, the surest."""
    names = load("llmcad").run.__globals__
    tree, length = names["Tree"](), names["LLMCad"].length_of_best
    for parent, depth, sure in (
        (-1, 1, 0.6),
        (-1, 1, 0.4),
        (0, 2, 0.5),
        (1, 2, 0.3),
        (3, 3, 0.2),
        (2, 3, 0.1),
        (2, 3, 0.4),
        (6, 4, 0.3),
    ):
        tree.tokens.append(2)
        tree.parents.append(parent)
        tree.depths.append(depth)
        tree.sure.append(sure)
    assert [length(tree, last) for last in (4, 3, 1, 5, 7, 2, -1)] == [3, 3, 3, 3, 4, 4, 4]
    assert length(names["Tree"](), -1) == 0


# -- the tasks --------------------------------------------------------------------------------------------------------


def test_likelihood_of_stories_is_that_of_their_grammar() -> None:
    """Every story of the grammar: the product of its free choices, and nothing of it is impossible."""
    for prompt, text in list(zip(STORY["prompt"], STORY["target"], strict=True))[:200]:
        opening, events = prompt.partition(" <story>")[0], text.count("oh my")
        log = -math.log(3 * 8) - events * math.log(5 * 8 * 10) - (events - 1) * math.log(8)
        log += math.log(0.3 if events == 2 else 0.7)
        words = [*text.split(), "<eos>"]
        found, impossible = story_likelihood(opening, [], words)
        assert found == pytest.approx(log)
        assert impossible == 0
        parts = [story_likelihood(opening, words[:cut], words[cut:])[0] for cut in (0, 30)]
        assert parts[1] + story_likelihood(opening, [], words[:30])[0] == pytest.approx(parts[0])


def test_a_slip_costs_one_word() -> None:
    prompt, text = STORY["prompt"][0], STORY["target"][0]
    opening, words = prompt.partition(" <story>")[0], text.split()
    whole, _ = story_likelihood(opening, [], words)
    animal = opening.split()[2]
    places = [i for i, word in enumerate(words) if word == animal]
    for place in places:
        slip = [*words[:place], "cave", *words[place + 1 :]]
        assert story_likelihood(opening, [], slip) == (pytest.approx(whole + math.log(1e-3)), 1)
    assert story_likelihood(opening, [], [*words, "<eos>", "the"])[1] == 1, "a word after the end"


def test_the_walk_offers_distributions() -> None:
    for prompt, text in list(zip(STORY["prompt"], STORY["target"], strict=True))[:20]:
        opening, words = prompt.partition(" <story>")[0], [*text.split(), "<eos>"]
        walk = story_walk(opening)
        offered = [next(walk)] + [walk.send(word) for word in words]
        assert all(sum(p.values()) == pytest.approx(1) for p in offered[:-1])
        assert all(word in p for word, p in zip(words, offered, strict=False))
        expected = [i for i, p in enumerate(offered[:-1]) if len(p) >= 3]
        assert choices(opening, words, 3) == expected
        assert all(offered[i].keys() & {"one", "river", "saw", "red", "kite"} for i in expected)


def test_wishes_are_followed_weakly() -> None:
    """The wished colour in three events of ten, the hero's favourite in four: the likeliest text does not comply.

    Without a wish each colour is in one event of eight, as each is the favourite of one hero. What is counted is told.
    """
    data = load_split("wishes", "train")
    pairs = list(zip(data["prompt"], data["target"], strict=True))
    wished = [compliance(prompt, text) for prompt, text in pairs if " let " in prompt]
    other = [compliance(f"{prompt} let golden <story>", text) for prompt, text in pairs if " let " not in prompt]
    favoured = [
        compliance(f"{prompt.split()[0]} . let {wishes.FAVOURITE[prompt.split()[0]]} <story>", text)
        for prompt, text in pairs
        if " let " in prompt
    ]
    assert np.mean(wished) == pytest.approx(0.25 + 0.75 * 0.55 / 8, abs=0.015)
    assert np.mean(favoured) == pytest.approx(0.75 * (0.45 + 0.55 / 8), abs=0.015)
    assert np.mean(other) == pytest.approx(1 / 8, abs=0.015)
    story = "near the hill anna saw a golden kite . oh my , what a golden kite , said anna . anna found a red ball . oh"
    assert compliance("anna . let golden <story>", story) == 0.5
    assert compliance("anna . let golden <story>", "the end") == 0.0


@pytest.mark.parametrize("name", ["drafts/stories", "preference/colours"])
def test_true_texts_score_best(name: str) -> None:
    """Texts of the grammar are all right, copies are not distinct, and nonsense is seen."""
    task = TASKS[name]
    batch: dict[str, Any] = decoding_texts.inputs(task, 6, torch.Generator().manual_seed(0), torch.device("cpu"))
    data = load_split(task.dataset, "test")
    resample = np.arange(6)[None]
    texts: list[list[int]] = []
    for prompt in batch["prompt"]:
        opening, _, told = lm.decode(prompt).partition(" <story>")
        kept = next(
            [*lm.encode(text), lm.EOS]
            for start, text in zip(data["prompt"], data["target"], strict=True)
            if start.partition(" <story>")[0] == opening and f"{text} ".startswith(f"{told.strip()} ".lstrip())
        )
        texts.append(kept[len(told.split()) :])
    if name == "drafts/stories":
        texts = [(text[:10] + [lm.PAD] * 10)[:10] * 3 for text in texts]
    decoding_texts.check(task, batch, texts)
    score = decoding_texts.score(task, batch, texts, {}, resample)
    assert set(score) == set(task.metrics)
    assert all(figure.value == pytest.approx(figure.resamples[0]) for figure in score.values())
    nonsense = [[5] * len(text) for text in texts]
    worse = decoding_texts.score(task, batch, nonsense, {}, resample)
    assert worse["perplexity"].value == pytest.approx(1e3)
    if name == "drafts/stories":
        assert score["grammatical"].value == 1
        assert score["distinct"].value == pytest.approx(1 / 3)
        assert score["best"].value == pytest.approx(score["perplexity"].value)
        assert worse["grammatical"].value == 0
        wrong = [[*texts[0][:-1]], [*texts[0], 5], [lm.PAD, *texts[0][1:]], [5, lm.EOS, *texts[0][2:]]]
    else:
        assert score["accuracy"].value == 1
        assert worse["accuracy"].value == 0
        assert worse["compliance"].value == 0
        wrong = [[], [5] * 97, [5, lm.EOS, 5], [5, 10**6]]
    for text in wrong:
        with pytest.raises(BadOutput):
            decoding_texts.check(task, batch, [text, *texts[1:]])
