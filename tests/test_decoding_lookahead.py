"""Parallel guesses of the target itself: lookahead's mask, logits, pool, window and sampling rule, Jacobi's iterates."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from rigs.decoding import greedy_without_cache, prompt_of, run, tiny
from rigs.self_drafting import load, p_value, session_of
from torch import Tensor

from stepmark.tracks.decoding import speculation
from stepmark.tracks.decoding.decoder import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")


# -- lookahead: mask, logits, pool ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("w", "n", "g"), [(4, 4, 3), (3, 2, 2), (1, 3, 1), (5, 5, 2)])
def test_lookahead_mask_is_the_papers(w: int, n: int, g: int) -> None:
    """Built cell by cell from the definition: window cell (r, i) sees row 0 up to column i, then its column down to r."""
    method = load("lookahead_decoding", W=w, N=n, G=g)
    mask, positions = method.layout()
    cells: list[tuple[Any, ...]] = [("window", r, i) for r in range(n - 1) for i in range(w) if (r, i) != (0, 0)]
    cells += [("ngram", branch, depth) for branch in range(g) for depth in range(n - 1)]
    index = {cell: k for k, cell in enumerate(cells)}
    expected = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    for cell in cells:
        kind, a, b = cell
        if kind == "window":
            seen = [("window", 0, j) for j in range(1, b + 1)] + [("window", r, b) for r in range(1, a + 1)]
            assert positions[index[cell]] == a + b
        else:
            seen = [("ngram", a, depth) for depth in range(b + 1)]
            assert positions[index[cell]] == b + 1
        for other in seen:
            expected[index[cell], index[other]] = True
    assert torch.equal(mask, expected)


def test_lookahead_logits_equal_sequential_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every forward every cell answers as the model does, without a cache, after the tokens that the cell sees."""
    model = next(m for m in map(tiny, range(50)) if len(greedy_without_cache(m, prompt_of(7), 24)) == 24)
    seen: list[tuple[list[int], int, Tensor, Tensor]] = []
    answers: list[Tensor] = []
    embed, forward, logits = Decoder.embed, Decoder.run, Decoder.logits
    ids: list[list[int]] = []

    def spy_run(self: Decoder, hidden: Tensor, start: int, chosen: Any, positions: Tensor, mask: Tensor) -> Tensor:
        seen.append((ids[-1], start, positions.clone(), mask.clone()))
        out = forward(self, hidden, start, chosen, positions, mask)
        answers.append(logits(self, out))
        return out

    monkeypatch.setattr(Decoder, "embed", lambda self, new: ids.append(list(new)) or embed(self, new))
    monkeypatch.setattr(Decoder, "run", spy_run)
    prompt = prompt_of(7)
    output = run(load("lookahead_decoding"), session_of(model), [prompt], 24, 1000)[0]
    text = prompt + output
    checked = ngrams = 0
    with torch.no_grad():
        for (tokens, start, positions, mask), found in zip(seen, answers, strict=True):
            slots = [*range(start), *positions.tolist()]
            held = text[:start] + tokens
            for row in range(len(tokens)):
                keys = sorted((slots[k], held[k]) for k in mask[row].nonzero()[:, 0].tolist())
                assert [position for position, _ in keys] == list(range(int(positions[row]) + 1))
                alone = model(torch.tensor([[token for _, token in keys]]), use_cache=False).logits[0, -1]
                assert torch.allclose(found[row], alone, atol=1e-4)
                checked += 1
            ngrams += len(tokens) - 11 > 1
    assert checked > 150
    assert ngrams > 3, "the verification branch was never tried"


def test_lookahead_pool_is_the_brute_force_one() -> None:
    """Against the whole history: per first token the G n-grams seen last, in the order in which they were."""
    method = load("lookahead_decoding", W=5, N=4, G=3)
    generator = torch.Generator().manual_seed(0)
    pool: dict[int, list[tuple[int, ...]]] = {}
    history: list[tuple[int, ...]] = []
    for _ in range(40):
        window = torch.randint(3, (3, 5), generator=generator).tolist()
        new = torch.randint(3, (5,), generator=generator).tolist()
        method.remember(pool, window, new)
        history += [(window[0][i], window[1][i], window[2][i], new[i]) for i in range(5)]
        for first in range(3):
            latest: list[tuple[int, ...]] = []
            for ngram in reversed(history):
                if ngram[0] == first and ngram[1:] not in latest:
                    latest.append(ngram[1:])
            assert pool.get(first, []) == latest[:3][::-1]


def test_lookahead_window_moves_by_one_jacobi_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest row goes, the greedy answers to the youngest one come in, the last token of the text leads."""
    method = load("lookahead_decoding", W=4, N=4, G=3)
    steps: list[tuple[list[list[int]], list[int]]] = []
    answers: list[list[int]] = []
    original, logits = method.remember, Decoder.logits

    def spy(pool: Any, window: list[list[int]], new: list[int]) -> None:
        steps.append(([list(row) for row in window], list(new)))
        original(pool, window, new)

    def spy_logits(self: Decoder, hidden: Tensor) -> Tensor:
        found = logits(self, hidden)
        answers.append(found[8:12].argmax(-1).tolist())  # after the last token: 11 cells, of which 4 are the last row
        return found

    monkeypatch.setattr(type(method), "remember", staticmethod(spy))
    monkeypatch.setattr(Decoder, "logits", spy_logits)
    prompt = prompt_of(2)
    text = prompt + run(method, session_of(tiny(3)), [prompt], 20, 1000)[0]
    assert len(steps) > 3
    assert steps[0][0][0][0] == prompt[-1]
    for (window, new), (following, _), answer in zip(steps, steps[1:], answers, strict=False):
        assert new == answer
        assert following[0][1:] == window[1][1:]
        assert following[0][0] in text
        assert following[1] == window[2]
        assert all(a == b if b != 1 else a in text for a, b in zip(following[2], new, strict=True))


# -- lookahead: sampling ----------------------------------------------------------------------------------------------

Table = dict[tuple[int, ...], np.ndarray]


def tables(vocabulary: int, depth: int, seed: int) -> Table:
    """A random distribution after every prefix of up to `depth` tokens."""
    rng = np.random.default_rng(seed)
    prefixes = [p for k in range(depth + 1) for p in itertools.product(range(vocabulary), repeat=k)]
    return {prefix: rng.dirichlet(np.full(vocabulary, 0.8)) for prefix in prefixes}


def exact(table: Table, length: int) -> np.ndarray:
    """Probability of every text of that length."""
    vocabulary = len(table[()])
    return np.array(
        [
            np.prod([table[text[:k]][text[k]] for k in range(length)])
            for text in itertools.product(range(vocabulary), repeat=length)
        ]
    )


def no_zeroing(ngrams: Any, own: Tensor, answers: Tensor, u: list[float]) -> tuple[list[int], int]:
    """A wrong rule: what was rejected is left in p."""
    p = own[0].double().softmax(-1)
    for branch, ngram in enumerate(ngrams):
        if u.pop() < float(p[ngram[0]]):
            return [ngram[0], speculation.draw(answers[3 * branch].double().softmax(-1), u.pop())], branch
    return [speculation.draw(p, u.pop())], 0


@pytest.mark.parametrize("rule", ["right", "wrong"])
def test_lookahead_sampling_keeps_the_distribution(rule: str) -> None:
    """50,000 steps with five n-grams that share prefixes; tokens a step does not give are drawn exactly."""
    method = load("lookahead_decoding", W=4, N=4, G=5)
    table = tables(3, 3, seed=4)
    ngrams = [(0, 1, 2), (0, 1, 0), (2, 2, 2), (0, 2, 1), (2, 0, 1)]
    own = torch.tensor(table[()]).log()[None]
    answers = torch.stack([torch.tensor(table[ngram[: k + 1]]).log() for ngram in ngrams for k in range(3)])
    verify = method.verify_sampling if rule == "right" else no_zeroing
    generator = torch.Generator().manual_seed(1)
    rng = np.random.default_rng(2)
    uniforms = torch.rand(50_000, 20, generator=generator, dtype=torch.float64).tolist()
    texts = []
    kept_lengths: Counter[int] = Counter()
    for u in uniforms:
        kept, branch = verify(ngrams, own, answers, u)
        kept_lengths[len(kept)] += 1
        assert list(ngrams[branch][: len(kept) - 1]) == kept[:-1]
        while len(kept) < 4:
            kept.append(int(rng.choice(3, p=table[tuple(kept)])))
        texts.append(tuple(kept))
    p = p_value(texts, exact(table, 4), 3)
    assert p > 1e-3 if rule == "right" else p < 1e-12
    if rule == "right":
        assert set(kept_lengths) == {1, 2, 3, 4}


# -- Jacobi -----------------------------------------------------------------------------------------------------------


def test_jacobi_iterates_are_the_answers_to_the_last_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each forward is asked the answers of the one before, from the first that is not fixed yet, and fresh guesses."""
    asked: list[list[int]] = []
    answers: list[list[int]] = []
    forward = Decoder.forward

    def spy(self: Decoder, ids: list[int], last: int | None = None) -> Tensor:
        asked.append(list(ids))
        found = forward(self, ids, last)
        answers.append(found.argmax(-1).tolist())
        return found

    monkeypatch.setattr(Decoder, "forward", spy)
    prompt = prompt_of(3)
    output = run(load("jacobi"), session_of(tiny(2)), [prompt], 25, 1000)[0]
    text, fixed = prompt + output, len(prompt)
    for ids, answer, following in zip(asked, answers, asked[1:], strict=False):
        gained = 1
        while gained <= 5 and ids[-6 + gained] == answer[gained - 1]:
            gained += 1
        fixed += gained
        assert following[0] == text[fixed - 1]
        assert following[1 : 7 - gained] == answer[gained:]
        assert len(following) == 6
    assert len(asked) > 3
