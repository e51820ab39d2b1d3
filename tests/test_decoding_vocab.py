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
    write_spelled,
)

from stepmark import plugins
from stepmark.backbones import lm
from stepmark.task import load_split
from stepmark.tracks.decoding import vocab as decoding_vocab
from stepmark.tracks.decoding.vocab import words_of

SIZE = len(lm.VOCABULARY)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def train_texts(count: int) -> list[list[int]]:
    data = load_split("bilingual", "train")
    pairs = zip(data["prompt"][:count], data["target"][:count], strict=True)
    return [[*lm.encode(prompt), *lm.encode(target), lm.EOS] for prompt, target in pairs]


def started(method: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Tokens]:
    """(target, student as a method initialises it, its tokens): all of prepare but the adaptation."""
    target = lm.build(128, 1, seed=1).eval().requires_grad_(False)
    session: Any = SimpleNamespace(
        networks={"target": target},
        train=load_split("bilingual", "train"),
        task=SimpleNamespace(rungs=(640,)),
        scale=lambda embedded, smoke: smoke,
        clone=lambda name: lm.build(128, 1, seed=1),
        rng=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
    )
    plugin: Any = plugins.load_class(plugins.methods()[method])()
    monkeypatch.setitem(plugin.prepare.__globals__, "adapt", lambda session, student, texts: None)
    session.networks |= plugin.networks(session)
    merges = plugin.prepare(session)["merges_640"]
    return target, session.networks["after_640"], Tokens(merges.tolist(), SIZE)


def test_words_are_stems_and_what_follows_them() -> None:
    text = "anna fox 0 forest in lives . <story> one day anna fox 0 river to went . river near anna fox 1 kite red 2 found ."
    words = [" ".join(lm.VOCABULARY[i] for i in word) for word in words_of(lm.encode(text))]
    assert words == [
        *("anna fox 0", "forest in lives", ".", "<story>", "one", "day", "anna fox 0", "river to went", "."),
        *("river near", "anna fox 1", "kite red 2 found", "."),
    ]


def test_a_completion_has_the_stems_of_its_prompt_in_other_words() -> None:
    """What was found stands in another case, so that it cannot be copied as one token; tests hold no training text."""
    data, train = load_split("bilingual", "test"), set(load_split("bilingual", "train")["prompt"])
    for prompt, target in zip(data["prompt"], data["target"], strict=True):
        before, after = (words_of(lm.encode(text)) for text in (prompt, target))
        (asked,) = [word for word in after if lm.VOCABULARY[word[-1]] == "what"]
        assert asked not in before
        assert [word[:2] for word in before].count(asked[:2]) == 1
        assert not set(lm.encode(target)) - set(lm.encode(prompt)) - set(lm.encode("oh my , 3 what 1 said then end"))
        assert prompt not in train


def test_merges_take_the_most_frequent_pair_within_words() -> None:
    texts = [lm.encode("anna fox 0 . anna fox 0 . anna fox 1 kite 0"), lm.encode("anna fox 0 .")]
    (a, b, c, d, e) = lm.encode("anna fox 0 1 kite")
    merges = learn_merges(texts, 3, SIZE)
    # "anna fox" stands four times, then "annafox 0" three times, then two pairs once; "0 anna" and "1 kite" cross words.
    assert merges == [(a, b), (SIZE, c), (e, c)]
    tokens = Tokens(merges, SIZE)
    assert tokens.pieces[SIZE + 1] == (a, b, c)
    assert tokens.encode(texts[0]) == [SIZE + 1, *lm.encode("."), SIZE + 1, *lm.encode("."), SIZE, d, SIZE + 2]
    with pytest.raises(ValueError, match="give 4 new tokens"):
        learn_merges(texts, 9, SIZE)


def test_texts_survive_and_take_fewer_tokens() -> None:
    texts = train_texts(320)
    tokens = Tokens(learn_merges(texts, NEW_TOKENS, SIZE), SIZE)
    unseen = [lm.encode(text) for text in load_split("bilingual", "test")["target"][:20]]
    for text in unseen:
        assert tokens.spell(tokens.encode(text)) == text
    assert sum(len(tokens.encode(text)) for text in unseen) <= 0.75 * sum(map(len, unseen))


def test_new_embeddings_are_the_mean_of_all_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    target, student, tokens = started("vocab_expansion_lowres", monkeypatch)
    old, new = target.model.embed_tokens.weight, student.model.embed_tokens.weight.detach()
    assert torch.equal(new[:SIZE], old)
    assert max(map(len, tokens.pieces.values())) > 2  # where the mean of pieces is not that of a merge's two halves
    for token, pieces in tokens.pieces.items():
        torch.testing.assert_close(new[token], sum(old[i] for i in pieces) / len(pieces))
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_random_embeddings_have_the_spread_of_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    target, student, _ = started("random_expansion", monkeypatch)
    old, new = target.model.embed_tokens.weight, student.model.embed_tokens.weight[SIZE:].detach()
    assert new.shape == (NEW_TOKENS, old.shape[1])
    assert (new.mean(0) - old.mean(0)).norm() < 0.5 * old.std(0).norm()
    assert float((new.std(0) / old.std(0)).mean()) == pytest.approx(1.0, abs=0.1)


def test_similar_embeddings_are_sparse_sums_of_the_shared_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    target, student, tokens = started("focus_expansion", monkeypatch)
    old, new = target.model.embed_tokens.weight, student.model.embed_tokens.weight[SIZE:].detach()
    encoded = {i for text in train_texts(40) for i in tokens.encode(text)}
    shared = old[sorted(i for i in encoded if i < SIZE)]
    weights = torch.linalg.lstsq(shared.t(), new.t()).solution
    torch.testing.assert_close(shared.t() @ weights, new.t(), atol=1e-4, rtol=0)
    torch.testing.assert_close(weights.sum(0), torch.ones(NEW_TOKENS), atol=1e-3, rtol=0)
    assert float(weights.min()) > -1e-3
    assert float((weights < 1e-3).float().mean()) > 0.3  # not one of them has a share in every token


def test_average_embeddings_tell_no_token_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    target, student, _ = started("average_expansion", monkeypatch)
    old, new = target.model.embed_tokens.weight, student.model.embed_tokens.weight[SIZE:].detach()
    torch.testing.assert_close(new, old.mean(0).expand_as(new))


def test_every_start_is_adapted_on_as_many_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts of the rung in one pass, the same for all; without new tokens in more, shorter tokens."""
    seen: dict[str, list[tuple[int, int]]] = {}
    for name in (
        "vocab_expansion_lowres",
        "random_expansion",
        "average_expansion",
        "focus_expansion",
        "source_vocabulary",
    ):
        plugin: Any = plugins.load_class(plugins.methods()[name])()
        used, taken = plugin.prepare.__globals__, seen.setdefault(name, [])
        monkeypatch.setitem(used, "batches", lambda rows, tokens, seed: [len(a) + len(b) for a, b in rows])
        monkeypatch.setitem(
            used, "fit", lambda *_, taken=taken, **given: taken.append((given["steps"], sum(given["stream"])))
        )
        session: Any = SimpleNamespace(
            train=load_split("bilingual", "train"),
            task=SimpleNamespace(rungs=(80, 160)),
            scale=lambda embedded, smoke: embedded,
            clone=lambda name: lm.build(32, 1, seed=1),
            rng=torch.Generator().manual_seed(0),
            device=torch.device("cpu"),
            seed=0,
            progress=None,
        )
        session.networks = plugin.networks(session)
        plugin.prepare(session)
    plain = seen.pop("source_vocabulary")
    assert plain == [(steps, sum(map(len, train_texts(texts)))) for steps, texts in ((10, 80), (20, 160))]
    (same,) = {tuple(each) for each in seen.values()}
    assert [steps for steps, _ in same] == [10, 20]
    assert all(few < 0.75 * many for (_, few), (_, many) in zip(same, plain, strict=True))


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    found = sparsemax(torch.tensor([[2.0, 0.5, 0.1], [0.3, 0.2, 0.1], [0.9, 0.4, -2.0]]))
    wanted = torch.tensor([[1.0, 0.0, 0.0], [0.3 + 0.4 / 3, 0.2 + 0.4 / 3, 0.1 + 0.4 / 3], [0.75, 0.25, 0.0]])
    torch.testing.assert_close(found, wanted)


def test_more_rows_leave_the_old_tokens_as_they_were() -> None:
    model = lm.build(32, 1, seed=2).eval().requires_grad_(False)
    ids = torch.tensor([lm.encode("0 5 6 . 1 7")])
    before = model(ids).logits
    after = expanded(model, 3)(ids).logits
    torch.testing.assert_close(after[..., :SIZE], before)
    assert torch.equal(after[..., SIZE:], torch.zeros_like(after[..., SIZE:]))


def test_writing_spells_what_greedy_decoding_in_new_tokens_gives() -> None:
    tokens = Tokens(learn_merges(train_texts(30), NEW_TOKENS, SIZE), SIZE)
    model: Any = expanded(lm.build(32, 1, seed=3), NEW_TOKENS).eval().requires_grad_(False)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(0))
    prompt = lm.encode(load_split("bilingual", "train")["prompt"][0])[:3]
    ids = tokens.encode(prompt)
    assert ids[-1] >= SIZE
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 5 and ids[-1] != lm.EOS:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert max(ids[start:]) >= SIZE
    spelled = tokens.spell(ids[start:])
    for most in (1, 4, 5):
        batch = {"prompt": [prompt], "max_new_tokens": [most], "temperature": [0.0]}
        assert write_spelled(model, tokens, batch) == [spelled[:most]]


def test_the_right_completion_and_half_of_it() -> None:
    task = decoding_vocab.TASKS[0]
    batch: dict[str, Any] = decoding_vocab.inputs(task, 4, torch.Generator().manual_seed(0), torch.device("cpu"))
    data = load_split("bilingual", "test")
    answers = dict(zip(data["prompt"], data["target"], strict=True))
    right = [[*lm.encode(answers[lm.decode(prompt)]), lm.EOS] for prompt in batch["prompt"]]
    assert max(map(len, right)) <= decoding_vocab.MAX_NEW_TOKENS
    decoding_vocab.check(task, batch, right)
    resample = np.arange(4)[None]
    found = decoding_vocab.score(task, batch, right, {}, resample)
    assert (found["accuracy"].value, found["right_pieces"].value) == (1.0, 1.0)
    assert found["right_pieces"].resamples == [1.0]
    slipped = [[ids[0], lm.encode("duck")[0], *ids[2:]] for ids in right]  # costs its own place and no other
    found = decoding_vocab.score(task, batch, slipped, {}, resample)
    assert (found["accuracy"].value, found["right_pieces"].value) == (0.0, pytest.approx(22 / 23))
    half = decoding_vocab.score(task, batch, [ids[:12] for ids in right], {}, resample)
    assert half["right_pieces"].value == pytest.approx(12 / 23)
