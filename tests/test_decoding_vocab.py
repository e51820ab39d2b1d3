"""A grown tokenizer: merges are those of byte-pair encoding, new embeddings start where their papers say, texts survive."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stepmark.methods.decoding.vocab_expansion_lowres import (
    NEW_TOKENS,
    Tokens,
    expanded,
    learn_merges,
    sparsemax,
    words_of,
    write_spelled,
)

from stepmark import plugins
from stepmark.backbones import lm
from stepmark.task import load_split
from stepmark.tracks.decoding import vocab as decoding_vocab

SIZE = len(lm.VOCABULARY)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def letters(text: str) -> list[int]:
    return lm.encode(text)


def train_texts(count: int) -> list[list[int]]:
    data = load_split("bilingual", "train")
    pairs = zip(data["prompt"][:count], data["target"][:count], strict=True)
    return [[*letters(prompt), *letters(target), lm.EOS] for prompt, target in pairs]


def started(method: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Tokens]:
    """(target, student as a method initialises it, its tokens): all of prepare but the adaptation."""
    target = lm.build(32, 1, seed=1).eval().requires_grad_(False)
    session: Any = SimpleNamespace(
        networks={"target": target},
        train=load_split("bilingual", "train"),
        scale=lambda embedded, smoke: smoke,
        clone=lambda name: lm.build(32, 1, seed=1),
        rng=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
    )
    plugin: Any = plugins.load_class(plugins.methods()[method])()
    monkeypatch.setitem(plugin.prepare.__globals__, "adapt", lambda session, texts: None)
    session.networks |= plugin.networks(session)
    merges = plugin.prepare(session)["merges"]
    return target, session.networks["student"], Tokens(merges.tolist(), SIZE)


def test_every_word_of_the_language_has_a_spelling_of_its_own() -> None:
    from stepmark.datasets import bilingual

    spelled = list(bilingual.dictionary().values())
    assert len(set(spelled)) == len(spelled)
    for one in spelled:
        assert not any(other.startswith(one) for other in spelled if other != one)
    english = "anna the fox saw a red kite ."
    words = [" ".join(lm.VOCABULARY[i] for i in word) for word in words_of(letters(bilingual.translate(english)))]
    named = bilingual.dictionary()
    assert words == [
        named["anna"],
        f"{named['fox']} {bilingual.SUFFIX}",
        named["saw"],
        named["a"],
        named["kite"],
        named["red"],
        ".",
    ]


def test_merges_take_the_most_frequent_pair_within_words() -> None:
    texts = [letters("0 5 6 0 5 6 0 5 7 1 6"), letters("0 5 6 .")]
    (a, b, c, d, e) = letters("0 5 6 7 1")
    merges = learn_merges(texts, 3, SIZE)
    # "0 5" stands four times, then "05 6" three times, then two pairs once; "6 0" and "7 1" cross words.
    assert merges == [(a, b), (SIZE, c), (e, c)]
    tokens = Tokens(merges, SIZE)
    assert tokens.letters[SIZE + 1] == (a, b, c)
    assert tokens.encode(texts[0]) == [SIZE + 1, SIZE + 1, SIZE, d, SIZE + 2]
    with pytest.raises(ValueError, match="give 4 new tokens"):
        learn_merges(texts, 9, SIZE)


def test_texts_survive_and_take_at_most_half_the_tokens() -> None:
    texts = train_texts(300)
    tokens = Tokens(learn_merges(texts, NEW_TOKENS, SIZE), SIZE)
    unseen = [letters(text) for text in load_split("bilingual", "test")["target"][:20]]
    for text in unseen:
        assert tokens.spell(tokens.encode(text)) == text
    assert sum(len(tokens.encode(text)) for text in unseen) <= 0.5 * sum(map(len, unseen))


def test_new_embeddings_are_the_mean_of_all_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    target, student, tokens = started("vocab_expansion_lowres", monkeypatch)
    old, new = target.model.embed_tokens.weight, student.model.embed_tokens.weight.detach()
    assert torch.equal(new[:SIZE], old)
    assert max(map(len, tokens.letters.values())) > 2  # where the mean of letters is not that of a merge's two halves
    for token, pieces in tokens.letters.items():
        torch.testing.assert_close(new[token], sum(old[i] for i in pieces) / len(pieces))
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_random_embeddings_have_the_spread_of_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    target, student, _ = started("random_expansion", monkeypatch)
    old, new = target.model.embed_tokens.weight, student.model.embed_tokens.weight[SIZE:].detach()
    assert new.shape == (NEW_TOKENS, old.shape[1])
    assert (new.mean(0) - old.mean(0)).norm() < 0.5 * old.std(0).norm()
    assert float((new.std(0) / old.std(0)).mean()) == pytest.approx(1.0, abs=0.1)


def test_similar_embeddings_are_sparse_sums_of_the_shared_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    target, student, _ = started("focus_expansion", monkeypatch)
    old, new = target.model.embed_tokens.weight, student.model.embed_tokens.weight[SIZE:].detach()
    shared = old[letters("0 1 2 3 4 5 6 7 8 9 . , <story> <eos>")]
    weights = torch.linalg.lstsq(shared.t(), new.t()).solution
    torch.testing.assert_close(shared.t() @ weights, new.t(), atol=1e-4, rtol=0)
    torch.testing.assert_close(weights.sum(0), torch.ones(NEW_TOKENS), atol=1e-3, rtol=0)
    assert float(weights.min()) > -1e-3
    assert float((weights < 1e-3).float().mean()) > 0.3  # not one of them has a share in every token


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    found = sparsemax(torch.tensor([[2.0, 0.5, 0.1], [0.3, 0.2, 0.1], [0.9, 0.4, -2.0]]))
    wanted = torch.tensor([[1.0, 0.0, 0.0], [0.3 + 0.4 / 3, 0.2 + 0.4 / 3, 0.1 + 0.4 / 3], [0.75, 0.25, 0.0]])
    torch.testing.assert_close(found, wanted)


def test_more_rows_leave_the_old_tokens_as_they_were() -> None:
    model = lm.build(32, 1, seed=2).eval().requires_grad_(False)
    ids = torch.tensor([letters("0 5 6 . 1 7")])
    before = model(ids).logits
    after = expanded(model, 3)(ids).logits
    torch.testing.assert_close(after[..., :SIZE], before)
    assert torch.equal(after[..., SIZE:], torch.zeros_like(after[..., SIZE:]))


def test_writing_spells_what_greedy_decoding_in_new_tokens_gives() -> None:
    tokens = Tokens(learn_merges(train_texts(30), NEW_TOKENS, SIZE), SIZE)
    model: Any = expanded(lm.build(32, 1, seed=3), NEW_TOKENS).eval().requires_grad_(False)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(0))
    prompt = letters(load_split("bilingual", "train")["target"][0])
    ids = tokens.encode(prompt)
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 5 and ids[-1] != lm.EOS:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert max(ids[start:]) >= SIZE
    batch = {"prompt": [prompt], "max_new_tokens": [99], "temperature": [0.0]}
    assert write_spelled(model, tokens, batch, 5) == [tokens.spell(ids[start:])]
    assert write_spelled(model, tokens, batch | {"max_new_tokens": [1]}, 5) == [tokens.spell(ids[start:])[:1]]


def test_the_right_completion_and_half_of_it() -> None:
    task = decoding_vocab.TASKS[0]
    batch: dict[str, Any] = decoding_vocab.inputs(task, 4, torch.Generator().manual_seed(0), torch.device("cpu"))
    data = load_split("bilingual", "test")
    answers = dict(zip(data["prompt"], data["target"], strict=True))
    right = [[*letters(answers[lm.decode(prompt)]), lm.EOS] for prompt in batch["prompt"]]
    assert max(map(len, right)) <= decoding_vocab.MAX_NEW_TOKENS
    decoding_vocab.check(task, batch, right)
    resample = np.arange(4)[None]
    found = decoding_vocab.score(task, batch, right, {}, resample)
    assert (found["accuracy"].value, found["right_letters"].value) == (1.0, 1.0)
    assert found["right_letters"].resamples == [1.0]
    half = decoding_vocab.score(task, batch, [ids[: len(ids) // 2] for ids in right], {}, resample)
    assert half["accuracy"].value == 0.0
    assert 0.45 < half["right_letters"].value <= 0.5
