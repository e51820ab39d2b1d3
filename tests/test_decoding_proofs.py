"""Proofs of decoding methods: properties that the paper states and a near miss of the method does not have.

Each recomputes what a method does from its definition, in passes over whole texts, and looks at the moment too: which
text, which tree or which state a rule was applied to.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rigs.decoding import greedy_without_cache, last_logits, load, prompt_of, run, session_of, tiny
from torch import Tensor

from stepmark.backbones import lm
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.held_cache import BandCache, HeldDecoder
from stepmark.tracks.decoding.speculation import draw

pytestmark = pytest.mark.usefixtures("one_thread")


def blurred(model: Any, spread: float, seed: int) -> Any:
    """A model that mostly agrees with another."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for part in other.modules():
        part.__dict__.pop("forward", None)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return other


# -- LLMCad -----------------------------------------------------------------------------------------------------------


def trees_of(name: str, seed: int, **constants: Any) -> tuple[list[tuple[list[int], int, float, Any]], list[int], Any]:
    """The trees of a run: (text before it, most tokens deep, threshold, tree); the target's greedy text; the method."""
    method, seen = load(name, **constants), list[tuple[list[int], int, float, Any]]()
    kind, model = type(method), tiny(seed)
    prompt, grow = prompt_of(seed), kind.grow

    def spy(small: Any, tokens: list[int], most: int, alpha: float) -> Any:
        seen.append((list(tokens), most, alpha, grow(small, tokens, most, alpha)))
        return seen[-1][3]

    kind.grow = staticmethod(spy)
    session = session_of(target=model, draft=blurred(model, 0.04, seed))
    found = run(method, session, [prompt], 40, 1000)[0]
    kind.grow = grow
    return seen, [*prompt, *found], method


def test_llmcads_threshold_moves_after_a_check_and_by_the_branch_that_matched_best() -> None:
    """N_correct and N_all of equation 3 from the target's own text: tokens of the branch that it confirms, and not the
    target's own next one; all tokens of the surest branch through them, and not of the surest of all or the deepest."""
    kinds: Counter[str] = Counter()
    for seed in range(8):
        trees, text, _ = trees_of("llmcad", seed, BRANCH=0.1, ALPHA=0.01)
        for (before, _most, alpha, tree), (_, _, after, _) in itertools.pairwise(trees):
            last, correct = -1, 0
            while True:
                wanted = text[len(before) + correct]
                child = [n for n, p in enumerate(tree.parents) if p == last and tree.tokens[n] == wanted]
                if not child:
                    break
                last, correct = child[0], correct + 1
            ends = [n for n in range(len(tree.tokens)) if n not in tree.parents]
            through = [n for n in ends if last == -1 or last in tree.path(n)]
            if not through:
                continue
            surest, best = (max(part, key=lambda n: tree.sure[n]) for part in (ends, through))
            drafted = tree.depths[best]
            rise = alpha / 2 if correct == drafted else alpha * 2 ** ((drafted - correct) / drafted)
            assert after == pytest.approx(rise)
            kinds["whole"] += correct == drafted
            kinds["other branch"] += drafted != tree.depths[surest]
            kinds["not the deepest"] += drafted != max(tree.depths)
            kinds["part"] += 0 < correct < drafted
    assert min(kinds[kind] for kind in ("whole", "other branch", "not the deepest", "part")) > 0


def test_llmcads_trees_and_those_of_its_controls() -> None:
    """Branches of p >= 0.3, a threshold that starts at 0.01; the one control never moves it, the other has none and no
    branches: its chains end with the text or at 24 tokens. Nobody drafts behind an end of the sequence."""
    ended = full = doubtful = 0
    for seed in (0, 1):
        for name in ("llmcad", "tree_fixed_threshold", "chain_of_drafts"):
            trees, _text, _method = trees_of(name, seed)
            alphas = [alpha for _, _, alpha, _ in trees]
            assert alphas[0] == (0.0 if name == "chain_of_drafts" else 0.01)
            assert name == "llmcad" or len(set(alphas)) == 1
            for _, most, _, tree in trees:
                ends = [node for node, token in enumerate(tree.tokens) if token == 1]
                assert not set(ends) & set(tree.parents)
                ended += bool(ends)
                if name == "chain_of_drafts":
                    assert tree.parents == list(range(-1, len(tree.tokens) - 1))
                    assert len(tree.tokens) == min(24, most) or tree.tokens[-1] == 1
                    full += len(tree.tokens) == 24
                    doubtful += bool(tree.sure) and tree.sure[-1] < 0.01
    assert min(ended, full, doubtful) > 0
    names = load("llmcad").run.__globals__
    tree = names["Tree"]()
    tree.add(-1, torch.tensor([0.29, 0.31, 0.4]), 24, 3)
    tree.add(0, torch.tensor([0.2, 0.35, 0.45]), 24, 3)
    assert (tree.tokens, tree.parents) == ([2, 1, 2, 1], [-1, -1, 0, 0])  # by its own share, not by that of the branch
    assert tree.sure == pytest.approx([0.4, 0.31, 0.4 * 0.45, 0.4 * 0.35])


# -- LongGen ----------------------------------------------------------------------------------------------------------


def test_longgen_writes_what_passes_under_its_masks_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks of 4 and a window of 64 at the places of the text below and above the middle third, which sees everything."""
    rows: list[Tensor] = []
    logits = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, hidden: rows.append(logits(self, hidden)) or rows[-1])
    model, generator = tiny(1, layers=6), torch.Generator().manual_seed(1)
    ids = torch.randint(2, 13, (120,), generator=generator).tolist()
    for name, full in (("longgen", (2, 3)), ("sink_window_trained", ()), ("full_attention_trained", tuple(range(6)))):
        rows.clear()
        session = session_of(student=model)
        written = run(load(name), session, [ids], 6, 6)[0]
        session.ledger.reset()
        text = [*ids, *written[:-1]]
        at = torch.arange(len(text))
        band = (at <= at[:, None]) & ((at > at[:, None] - 64) | (at < 4))
        with torch.no_grad():
            hidden = model.model.embed_tokens(torch.tensor([text]))
            rotary = model.model.rotary_emb(hidden, at[None])
            for i, layer in enumerate(model.model.layers):
                mask = None if i in full else band[None, None]
                hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
            wanted = model.lm_head(model.model.norm(hidden))[0, len(ids) - 1 :]
        torch.testing.assert_close(torch.cat([row[-1:] for row in rows]), wanted, rtol=1e-3, atol=1e-3)


def test_longgen_prepares_on_answers_through_the_caches_that_it_runs_with() -> None:
    """The loss of its first step is that of the answers alone, read through the caches of the method."""
    generator = torch.Generator().manual_seed(2)
    words = [[lm.VOCABULARY[i] for i in torch.randint(6, 140, (80,), generator=generator)] for _ in range(2)]
    for name, full in (("longgen", (2, 3)), ("sink_window_trained", ())):
        method, losses, asked = load(name), list[float](), list[int]()
        names = type(method).prepare.__globals__
        train = names["train_band"]
        names["train_band"] = lambda *given, train=train, losses=losses: losses.append(train(*given))
        student = lm.build(32, 6, 0)
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.3, generator=generator)
        model = copy.deepcopy(student).eval().requires_grad_(False)
        session = SimpleNamespace(
            networks={"student": student},
            train={"prompt": [" ".join(row[:-8]) for row in words], "target": [" ".join(row[-8:]) for row in words]},
            scale=lambda embedded, smoke, asked=asked: asked.append(embedded) or smoke,
            seed=0,
            progress=lambda steps, says: steps,
        )
        with torch.enable_grad():
            method.prepare(session)
        total = 0.0
        for row in words:
            ids = [*lm.encode(" ".join(row)), lm.EOS]
            with torch.no_grad():
                decoder = HeldDecoder(model, 99, BandCache(6, 4, 64, full=full))
                found = decoder.forward(ids[:-1])[-9:].log_softmax(-1)
            total -= float(found[range(9), ids[-9:]].sum())
        assert losses == [pytest.approx(total / 18, rel=1e-4)]
        assert asked == [2, 150]  # texts, all there are, and steps


# -- HARP -------------------------------------------------------------------------------------------------------------


def test_harp_thinks_again_above_one_bit_and_draws_from_half_of_each_pass() -> None:
    """The paper's constants, theta = 1 bit, delta = 0.2, beta = 0.5, drawing at a temperature: every word from plain passes."""
    between = hesitated = 0
    for seed in range(2):
        model, prompt = tiny(seed), prompt_of(seed)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)  # surer, so that it hesitates by more than half a bit and less than one too
        for name, theta in (("harp", 1.0), ("harp_always", -1.0)):
            session = session_of(seed, target=model)
            got = run(load(name), session, [prompt], 20, 1000, temperature=0.7)[0]
            rng, tokens, again = torch.Generator().manual_seed(seed), list(prompt), 0
            spent = session.ledger.spent
            for token in got:
                logits = last_logits(model, tokens)
                log_p = logits.log_softmax(-1)
                bits = float(-(log_p.exp() * log_p).sum()) / 0.6931472
                between += 0.5 < bits < 1
                if bits > theta:
                    embedded = model.model.embed_tokens(torch.tensor([tokens]))
                    kept = torch.rand(embedded.shape, generator=rng) >= 0.2
                    with torch.no_grad():
                        other = model(inputs_embeds=embedded * kept, use_cache=False).logits[0, -1]
                    logits, again = (logits + other) / 2, again + 1
                u = float(torch.rand((), generator=rng))
                assert token == draw((logits / 0.7).softmax(-1), u)
                tokens.append(token)
            assert spent == len(got) + again
            hesitated += again
    assert min(between, hesitated) > 0


# -- Kangaroo ---------------------------------------------------------------------------------------------------------


def test_kangaroos_first_exit_is_as_deep_as_the_papers() -> None:
    """After 2 of 32 layers and 3 of 40, as in the paper; of a model of twelve after the first."""
    depth = load("kangaroo").run.__globals__["exit_depth"]
    for layers, exit_after in ((32, 2), (40, 3), (12, 1), (2, 1)):
        assert depth(SimpleNamespace(model=SimpleNamespace(layers=range(layers)))) == exit_after


def test_kangaroos_adapter_learns_the_targets_distribution_from_the_layer_that_it_will_read() -> None:
    """What it reads in training is what comes out of the layers before the exit, and the gradient by its logits is q - p
    (equation 3), at the places of the answers."""
    names = load("kangaroo").run.__globals__
    model = lm.build(32, 4, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.eval().requires_grad_(False)
    adapter = names["ExitAdapter"](model)
    read, said, pulled = list[Tensor](), list[Tensor](), list[Tensor]()
    adapter.register_forward_pre_hook(lambda _, given: read.append(given[0].detach()))

    def note(_: Any, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            said.append(output.detach())
            output.register_hook(pulled.append)

    model.lm_head.register_forward_hook(note)
    session = SimpleNamespace(
        networks={"target": model, "adapter": adapter},
        train={"prompt": ["tom has 1 2 pears", "anna saw a red kite"], "target": ["1 2 + 3 = 5", "near the hill ."]},
        scale=lambda embedded, smoke: smoke,
        seed=0,
        progress=lambda steps, says: steps,
    )
    with torch.enable_grad():
        names["train_adapter"](session)
    rows = [
        (lm.encode(prompt), [*lm.encode(text), lm.EOS])
        for prompt, text in zip(session.train["prompt"], session.train["target"], strict=True)
    ]
    ids, labels = next(lm.batches(rows, 300, 0))
    with torch.no_grad():
        whole = model(ids, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(read[0], whole.hidden_states[1], rtol=1e-4, atol=1e-4)
    wanted = labels >= 0
    assert int(wanted.sum()) == sum(len(text) for _, text in rows)
    p, q = whole.logits[wanted].softmax(-1), said[0].softmax(-1)
    assert q.shape == p.shape
    torch.testing.assert_close(pulled[0], (q - p) / len(p), rtol=1e-3, atol=1e-5)


def test_kangaroo_drafts_to_the_first_word_below_six_tenths_and_its_control_whatever_the_confidence() -> None:
    """Each draft of a run with the constants of the paper: eta = 0.6 and six words at most; the control asks no confidence."""
    near = low = 0
    for name, eta in (("kangaroo", 0.6), ("early_exit_fixed", 0.0)):
        for seed in range(3):
            method, model, sure = load(name), tiny(seed), list[float]()
            with torch.no_grad():
                model.lm_head.weight.mul_(2)
            names = method.run.__globals__
            exit_logits, speculate = names["EarlyExitDecoder"].exit_logits, names["speculate"]

            def spy(self: Any, token: int, of: Any = exit_logits, sure: list[float] = sure) -> Tensor:
                found: Tensor = of(self, token)
                sure.append(float(found.double().softmax(-1).max()))
                return found

            drafts: list[tuple[list[int], int, list[float]]] = []

            def watched(*given: Any, of: Any = speculate, sure: list[float] = sure, drafts: Any = drafts) -> Any:
                def asked(tokens: list[int], most: int) -> Any:
                    sure.clear()
                    draft, q = given[5](tokens, most)
                    drafts.append((draft, most, list(sure)))
                    return draft, q

                return of(*given[:5], asked, given[6])

            names["EarlyExitDecoder"].exit_logits, names["speculate"] = spy, watched
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                adapter = names["ExitAdapter"](model).eval().requires_grad_(False)
            run(method, session_of(target=model, adapter=adapter), [prompt_of(seed)], 40, 1000)
            for draft, most, tops in drafts:
                assert len(draft) == len(tops)
                assert all(top >= eta for top in tops[:-1])
                assert not draft or tops[-1] < eta or draft[-1] == 1 or len(draft) == min(6, most)
                near += bool(tops) and 0.4 < tops[-1] < 0.6
                low += name == "early_exit_fixed" and any(top < 0.6 for top in tops[:-1])
    assert min(near, low) > 0


# -- Draft & Verify ---------------------------------------------------------------------------------------------------


def test_draft_and_verify_begins_every_prompt_at_the_papers_threshold() -> None:
    """gamma = 0.6 and a rate of nought before the first step, of a second prompt as of the first."""
    method, given = load("self_speculative_decoding"), list[tuple[float, float, float]]()
    kind, adapted = type(method), method.adapted
    kind.adapted = staticmethod(lambda *asked: given.append(asked) or adapted(*asked))
    model = next(m for m in map(tiny, range(50)) if len(greedy_without_cache(m, prompt_of(2), 30)) == 30)
    session = session_of(target=model)
    session.state["skipped"] = torch.tensor([[0, 1], [0, 0], [1, 0]]).bool()
    run(method, session, [prompt_of(2)] * 2, 30, 1000)
    half = len(given) // 2
    assert half > 2 and given[:half] == given[half:]
    assert given[0][:2] == (0.6, 0.0)
    assert len({gamma for gamma, _, _ in given}) > 1


def test_masks_are_searched_by_evaluations_a_word_and_the_controls_do_not_search() -> None:
    """The cost of a mask is what decoding the prompts with it takes, over the words written; `random_search` keeps the best
    of the five first masks and as many more; `random_skips` skips as many sub-layers as were found, others."""
    method = load("self_speculative_decoding")
    names = method.run.__globals__
    kind, model = names["SelfSpeculativeDecoding"], lm.build(32, 4, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    session = session_of(target=model.eval().requires_grad_(False))
    session.train = {"prompt": ["tom has 1 2 pears .", "anna saw one red kite ."]}
    session.scale, session.seed = lambda embedded, smoke: {4: 2, 32: 12, 80: 6}[embedded], 0
    session.progress = lambda steps, says: steps
    tried: list[tuple[list[bool], int, float]] = []
    decode, costs, searches = kind.decode, list[tuple[list[bool], float]](), list[int]()

    def spy(self: Any, target: Any, prompt: Any, room: int, *given: Any) -> list[int]:
        found: list[int] = decode(self, target, prompt, room, *given)
        tried.append((given[2].flatten().tolist(), len(found), target.spent))
        return found

    def search(cost: Any, layers: int, tries: Any, rng: Any) -> Any:
        searches.append(layers)
        for mask in kind.beginnings(2 * layers, rng):
            costs.append((mask.tolist(), cost(mask)))
        return mask

    kind.decode, kind.search = spy, staticmethod(search)
    names["searched"](session, True)
    assert searches == [4] and len(costs) == 5
    for (mask, price), (same, *first), (_, *second) in zip(costs, tried[::2], tried[1::2], strict=True):
        assert mask == same and price == pytest.approx((first[1] + second[1]) / (first[0] + second[0]))
    tried.clear()
    kept = names["searched"](session, False)["skipped"].flatten().tolist()
    paid = {tuple(a[0]): (a[2] + b[2]) / (a[1] + b[1]) for a, b in zip(tried[::2], tried[1::2], strict=True)}
    assert searches == [4] and len(tried) == 2 * 11 and len(paid) > 8
    assert [mask for mask, *_ in tried[:10:2]] == [mask for mask, _ in costs], "it begins with other masks"
    assert paid[tuple(kept)] == min(paid.values()) < max(paid.values())

    found = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 1], [0, 0], [0, 0]]).bool()
    masks, asked = {}, {}
    for name in ("self_speculative_decoding", "random_search", "random_skips"):
        wanted = list[Any]()
        session.once = lambda function, bayes, wanted=wanted: (
            wanted.append((function.__name__, bayes)) or {"skipped": found}
        )
        masks[name], asked[name] = load(name).prepare(session)["skipped"], wanted
    assert asked == {
        "self_speculative_decoding": [("searched", True)],
        "random_search": [("searched", False)],
        "random_skips": [("searched", True)],
    }
    assert torch.equal(masks["self_speculative_decoding"], found) and torch.equal(masks["random_search"], found)
    assert masks["random_skips"].sum() == found.sum() and not torch.equal(masks["random_skips"], found)


# -- lookahead decoding -----------------------------------------------------------------------------------------------


def test_lookahead_keeps_the_longest_prefix_that_the_target_agrees_with() -> None:
    """Algorithm 3, against every n-gram by itself; the first to agree is not always the one that agrees longest."""
    method, later = load("lookahead_decoding", N=4), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        ngrams = torch.randint(2, (5, 3), generator=generator).tolist()
        table = {key: int(torch.randint(2, (), generator=generator)) for key in range(40)}

        def answer(text: list[int], table: dict[int, int] = table) -> int:
            return table[int("1" + "".join(map(str, text)), 2)]

        own = torch.eye(2)[[answer([])]]
        answers = torch.eye(2)[[answer(ngram[: k + 1]) for ngram in ngrams for k in range(3)]]
        agreeing = [next((k for k in range(3) if ngram[k] != answer(ngram[:k])), 3) for ngram in ngrams]
        kept, branch = method.verify_greedy(ngrams, own, answers)
        assert len(kept) - 1 == max(agreeing)
        assert max(agreeing) == 0 or agreeing[branch] == max(agreeing)
        assert kept == [*ngrams[branch][: len(kept) - 1], answer(ngrams[branch][: len(kept) - 1])]
        first = next((agreed for agreed in agreeing if agreed), 0)
        later += first < max(agreeing)
    assert later > 5


def test_lookahead_offers_all_ngrams_that_still_agree_and_runs_as_wide_as_the_papers() -> None:
    """Algorithm 4: of two that begin alike the second may be right where the first is not, at any place. The setting of the
    paper's 7B model: 15 columns, n-grams of 5, 15 of them, 120 positions with the last token."""
    method = load("lookahead_decoding", N=4)
    ngrams = [(0, 1, 1), (0, 2, 0), (0, 2, 1)]
    certain = torch.full((9, 3), -1e4)
    for row, token in enumerate([2, 0, 0, 2, 1, 0, 2, 1, 0]):  # after 0 comes 2, after 0 2 comes 1, after 0 2 1 comes 0
        certain[row, token] = 0.0
    own = torch.tensor([[0.0, -1e4, -1e4]])
    assert method.verify_sampling(ngrams, own, certain, [0.5] * 12) == ([0, 2, 1, 0], 2)
    for name, (w, n, g) in {"lookahead_decoding": (15, 5, 15), "lookahead_small": (5, 3, 5)}.items():
        mask, ahead = load(name).layout()
        assert len(mask) == w * (n - 1) - 1 + g * (n - 1)
        assert int(ahead[: w * (n - 1) - 1].max()) == w + n - 3 and int(ahead[w * (n - 1) - 1 :].max()) == n - 1


def test_lookahead_verifies_at_the_temperature_that_is_asked_for() -> None:
    """What decides on the n-grams of a step are the target's logits after the text and after each n-gram, over 0.5."""
    method, checked = load("lookahead_decoding", W=4, N=4, G=3), 0
    kind, verify = type(method), method.verify_sampling
    for seed in range(3):
        model, prompt = tiny(seed), prompt_of(seed)
        steps: list[tuple[list[Any], Tensor, Tensor, list[int]]] = []

        def spy(self: Any, ngrams: Any, own: Tensor, answers: Tensor, u: list[float], steps: Any = steps) -> Any:
            found = verify(ngrams, own, answers, u)
            steps.append((list(ngrams), own, answers, found[0]))
            return found

        kind.verify_sampling = spy
        session = session_of(seed, target=model)
        run(method, session, [prompt], 20, 1000, temperature=0.5)
        session.ledger.reset()
        text = list(prompt)
        for ngrams, own, answers, kept in steps:
            torch.testing.assert_close(own[0], last_logits(model, text) / 0.5, rtol=1e-3, atol=1e-3)
            for branch, ngram in enumerate(ngrams):
                for k in range(3):
                    wanted = last_logits(model, [*text, *ngram[: k + 1]]) / 0.5
                    torch.testing.assert_close(answers[3 * branch + k], wanted, rtol=1e-3, atol=1e-3)
                    checked += 1
            text += kept
    assert checked > 30


# -- Medusa -----------------------------------------------------------------------------------------------------------


def test_medusas_heads_read_the_last_state_of_the_token_that_was_kept_last(decoders: list[Decoder]) -> None:
    """Of the target's own last layer, normalised as before its output head, and of the kept branch: neither the root's nor
    that of the last node, whatever was kept."""
    tree = [(0,), (1,), (0, 0), (1, 1), (1, 0), (2,)]
    kept = set()
    for seed in range(3):
        model, prompt = tiny(seed), prompt_of(seed)
        asked: list[tuple[int, Tensor]] = []
        session = session_of(target=model)
        session.state["tree"] = torch.tensor([[*path, *[-1] * (4 - len(path))] for path in tree])
        truth = run(load("autoregressive"), session, [prompt], 30, 1000)[0]
        session.ledger.reset()

        def heads(hidden: Tensor, asked: Any = asked, prompt: Any = prompt, truth: Any = truth) -> Tensor:
            length = decoders[-1].length
            asked.append((length, hidden[0]))
            logits, done = torch.zeros(1, 4, 13), length + 1 - len(prompt)
            right = [*truth, 5, 5, 5, 5][done : done + 2]
            for k, token in enumerate(right[: len(asked) % 3]):  # nothing, one or two words right, of the second rank
                logits[0, k, [token, (token + 1) % 13]] = torch.tensor([1.0, 2.0])
            return logits

        session.networks["heads"] = heads
        found = run(load("medusa"), session, [prompt], 30, 1000)[0]
        session.ledger.reset()
        assert found == truth
        for length, hidden in asked:
            with torch.no_grad():
                states = model.model(torch.tensor([[*prompt, *truth][:length]]), use_cache=False).last_hidden_state
            torch.testing.assert_close(hidden, states[0, -1], rtol=1e-3, atol=1e-3)
        kept |= {after - before for (before, _), (after, _) in itertools.pairwise(asked)}
    assert kept == {1, 2, 3}
