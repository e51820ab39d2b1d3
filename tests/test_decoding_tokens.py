"""Tokenisation: every text survives, likelihoods are those of the whole text, and demonstrations are read and paid for."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stepmark.methods.decoding import mgpt
from stepmark.methods.decoding.mgpt import (
    BEGIN,
    MARKER,
    STEPS,
    VOCABULARY,
    LanguageModel,
    Scheme,
    Tokens,
    learn_tokens,
    mark_capitals,
    read,
    restore_capitals,
)
from torch import Tensor
from torch.nn import functional as F

from stepmark import plugins
from stepmark.meter.counts import Ledger, watch
from stepmark.task import BadOutput, load_split
from stepmark.tracks.decoding import tokens as decoding_tokens
from stepmark.tracks.decoding.attention import States
from stepmark.tracks.decoding.tokens import line

TASK = decoding_tokens.TASKS[0]
METHODS = {
    "mgpt": Scheme(),
    "case_tokens": Scheme(capitals=True),
    "arithmetic_tokens": Scheme(capitals=True, digits=True),
    "combined_tokens": Scheme(capitals=True, digits=True, punctuation=True),
    "char_tokens": Scheme(characters=True),
}
HOSTILE = (
    "",
    "Anna sold 12+7 horses in Rome: animals\n",
    "ANNA  aNNa\t\r\n  12345-67=8.9e10 ...!?",
    MARKER,
    f"a{MARKER}{MARKER}B{MARKER}b{MARKER}",
    f"{MARKER}A {MARKER * 3}z",
    "Straße ẞ İstanbul ıI ǅ ǆ \u212a \u00c5 ΣΑΣ σας Ǆ ﬁ",
    "日本語 हिन्दी עברית \U0001f600\u200d\U0001f469 e\u0301 \ufeff\u2028\x00\x7f",
    "<|endoftext|> <0x41> <0xE0> </s> Ġthe ĊÄ ▁x",
    "ბავშვი Ბ Фежево Ωδη",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokens() -> dict[str, Tokens]:
    """Of each method, learnt from a part of the train split and stored once."""
    texts = load_split("dialects", "train")["document"][:600]
    return {name: Tokens.stored(Tokens(learn_tokens(scheme, texts)).store()) for name, scheme in METHODS.items()}


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    return decoding_tokens.inputs(TASK, 6, torch.Generator().manual_seed(0), torch.device("cpu"))


def session_of(tokens: Tokens, model: LanguageModel | None = None) -> Any:
    """A session for `read` with an untrained model, and its ledger."""
    if model is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LanguageModel()
    ledger = Ledger()
    watch(ledger, "lm", model.eval().requires_grad_(False), decoding_tokens.layers(TASK, "lm", model))
    state = {"tokenizer": tokens.store()}
    return SimpleNamespace(networks={"lm": model}, state=state, device=torch.device("cpu"), ledger=ledger)


def recomputed(model: LanguageModel, before: Sequence[int], ids: Sequence[int]) -> float:
    """log p(ids | before) with a forward of its own for every token, nothing kept."""
    total = 0.0
    for i, token in enumerate(ids):
        logits = model(torch.tensor([BEGIN, *before, *ids[:i]]))[-1].double().tolist()
        total += logits[token] - math.log(math.fsum(map(math.exp, logits)))
    return total


# -- the texts ----------------------------------------------------------------------------------------------------


def test_lines_are_of_one_grammar_and_their_labels_follow() -> None:
    from stepmark.datasets import dialects

    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    orders = Counter[str]()
    for number, question in itertools.product(range(4), dialects.QUESTIONS):
        words = dialects.dictionary(number)
        role = {word: role for role, known in words.items() for word in known}
        assert len(role) == sum(dialects.ROLES.values())
        rng = random.Random(0)
        for _ in range(150):
            text, label, labels = dialects.example(rng, number, question)
            assert len(set(labels)) == 4
            assert labels.count(label) == 1
            first, sign, second = re.findall(r"\d+|[-+]", text)
            said = [role[word] for word in text[:-1].lower().split() if word in role]
            orders[" ".join("thing" if r in {"animal", "tool"} else r for r in said)] += 1
            assert len(said) == 5
            if question == "sum":
                assert int(label) == (int(first) + int(second) if sign == "+" else int(first) - int(second))
            else:
                about = {"thing": {"animal", "tool"}, "place": {"north", "south"}}[question]
                (kind,) = about & set(said)
                found[f"{number} {kind}", question].add(label)
            # Capitals: the first word, names and places; all nouns in one language, none in another.
            capital = {word.lower(): word != word.lower() for word in text[:-1].split() if word.isalpha()}
            for word, high in capital.items():
                noun = role[word] in {"animal", "tool"} and number == dialects.CAPITAL_NOUNS
                first_word = text.lower().split()[0] == word
                assert high == (number < 3 and (noun or first_word or role[word] in {"name", "north", "south"}))
    assert all(len(labels) == 1 for labels in found.values())
    assert len({next(iter(labels)) for labels in found.values()}) == 16
    assert len(found) == 16
    assert len({order.replace("north", "place").replace("south", "place") for order in orders}) == 3


def test_surprise_is_the_entropy_of_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from stepmark.datasets import dialects

    small = {"name": 2, "verb": 1, "animal": 1, "tool": 1, "north": 1, "south": 1, "in": 1, "label": 4}
    monkeypatch.setattr(dialects, "ROLES", small)
    monkeypatch.setattr(dialects, "FIRST", range(11, 12))
    monkeypatch.setattr(dialects, "SECOND", range(2, 4))
    dialects.dictionary.cache_clear()
    rng = random.Random(0)
    lines = Counter(" ".join(dialects.example(rng, 0, "place")[:2]) for _ in range(9600))
    every = Counter(dialects.example(rng, rng.randrange(4), rng.choice(dialects.QUESTIONS))[:2] for _ in range(30_000))
    told, cold = dialects.surprise(told=True), dialects.surprise(told=False)
    dialects.dictionary.cache_clear()
    assert len(lines) == round(math.exp(told)) == 96
    assert len(every) == round(math.exp(cold)) == 1152
    expected = 9600 / 96
    assert sum((count - expected) ** 2 / expected for count in lines.values()) < 95 + 5 * math.sqrt(2 * 95)


def test_no_question_has_two_answers_and_demonstrations_share_its_language() -> None:
    data = load_split("dialects", "test")
    assert len(set(data["text"])) == len(data["text"])
    known = {each for document in load_split("dialects", "train")["document"] for each in document.splitlines()}
    for text, labels, answer, demonstrations in zip(
        data["text"], data["labels"], data["answer"], data["demonstrations"], strict=True
    ):
        assert line(text, labels[answer])[:-1] not in known
        assert len(demonstrations) == 4
        last = {each.rstrip().rpartition(" ")[2] for each in demonstrations}
        assert all(label.isdigit() for label in last) or last <= set(labels)


# -- tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_text_survives_its_tokens(tokens: dict[str, Tokens], name: str) -> None:
    drawn = random.Random(name)
    letters = [*"aAzZ09+-. \n\t", MARKER, "ß", "İ", "\u0130", "Ω", "я", "Я", "ბ", "日", "\U0001f600", "\u0301", "\x00"]
    texts = [*HOSTILE, *("".join(drawn.choices(letters, k=12)) for _ in range(300))]
    for text in [*texts, *load_split("dialects", "test")["text"][:50]]:
        ids = tokens[name].encode(text)
        assert tokens[name].decode(ids) == text
        assert all(0 <= i < BEGIN for i in ids)


def test_marked_capitals_come_back_and_markers_double() -> None:
    assert mark_capitals("Anna BE 7") == f"{MARKER}anna {MARKER}b{MARKER}e 7"
    assert mark_capitals(f"{MARKER}a") == f"{MARKER}{MARKER}a"
    assert mark_capitals("ẞİ\u212a") == "ẞİ\u212a"
    for text in HOSTILE:
        assert restore_capitals(mark_capitals(text)) == text


def test_a_marker_is_one_token_and_costs_it(tokens: dict[str, Tokens]) -> None:
    one = tokens["case_tokens"]
    marker = one.tokenizer.token_to_id(MARKER)
    for small, capital in (("фежево", "Фежево"), ("ab", "Ab")):
        assert one.encode(capital) == [marker, *one.encode(small)]
    assert one.encode("AB").count(marker) == 2
    word = load_split("dialects", "train")["document"][0].split()[0]  # capitalised, thus seen in no other form
    assert len(tokens["mgpt"].encode(word)) <= len(one.encode(word)) - 1


def test_cuts_are_where_the_strategies_put_them(tokens: dict[str, Tokens]) -> None:
    text = load_split("dialects", "train")["document"][0].splitlines()[0] + "\n"
    number = re.search(r" \d\d", text)
    assert number is not None
    pieces = {name: [each.decode([i]) for i in each.encode(text)] for name, each in tokens.items()}
    assert number[0] in pieces["mgpt"]
    assert number[0] in pieces["case_tokens"]
    for name in ("arithmetic_tokens", "combined_tokens", "char_tokens"):
        assert [p for p in pieces[name] if any(c.isdigit() or c in "+-" for c in p)] == re.findall(r"[\d+-]", text)
    marks = [c for c in text if not c.isalnum()]
    assert [p for p in pieces["combined_tokens"] if not p.isalnum() and p != MARKER] == marks
    assert any(len(p) > 1 and p[0] == " " for p in pieces["arithmetic_tokens"])
    assert pieces["char_tokens"] == list(text)


def test_tokens_are_learnt_the_same_again() -> None:
    texts = load_split("dialects", "train")["document"][:150]
    for scheme in METHODS.values():
        assert torch.equal(Tokens(learn_tokens(scheme, texts)).store(), Tokens(learn_tokens(scheme, texts)).store())


# -- the model ----------------------------------------------------------------------------------------------------


def test_nothing_looks_ahead_and_states_stand_for_the_text(tokens: dict[str, Tokens]) -> None:
    model = session_of(tokens["mgpt"]).networks["lm"]
    ids = torch.tensor([BEGIN, 5, 300, 7, 9, 11])
    whole = model(ids)
    other = model(torch.cat((ids[:4], torch.tensor([1, 2]))))
    torch.testing.assert_close(other[:4], whole[:4])
    assert not torch.allclose(other[4], whole[4])
    states = States()
    parts = torch.cat((model(ids[:3], states), model(ids[3:4], states), model(ids[4:], states)))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    rows = model(torch.stack((ids, ids.flip(0))))
    torch.testing.assert_close(rows[0], whole, atol=1e-5, rtol=1e-5)


def test_likelihoods_of_all_strings_add_up_to_one(tokens: dict[str, Tokens], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mgpt, "VOCABULARY", 4)
    monkeypatch.setattr(mgpt, "BEGIN", 3)
    spelling = SimpleNamespace(encode=lambda text: ["abcd".index(c) for c in text])
    monkeypatch.setattr(Tokens, "stored", lambda state: spelling)
    monkeypatch.setattr(mgpt, "line", lambda text, label: text + label)
    session = session_of(tokens["mgpt"], LanguageModel())
    strings = ["".join(letters) for letters in itertools.product("abcd", repeat=3)]
    for given in ([], ["ab", "dcb"]):
        one = {"demonstrations": [given], "text": [""], "labels": [strings]}
        found = read(session, one, 10_000)["log_likelihood"][0]
        assert float(found.exp().sum()) == pytest.approx(1.0, abs=1e-6)
        begun = read(session, one | {"text": ["c"], "labels": [["a", "b", "c", "d"]]}, 99)["log_likelihood"]
        third = [i for i, string in enumerate(strings) if string[0] == "c"]
        assert float(begun.exp().sum()) == pytest.approx(float(found[third].exp().sum()), rel=1e-5)


# -- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_lines_are_as_likely_as_recomputed_alone(tokens: dict[str, Tokens], batch: dict[str, Any], name: str) -> None:
    session, own = session_of(tokens[name]), tokens[name]
    found = read(session, batch, 320)
    alone = [read(session, {key: value[i : i + 1] for key, value in batch.items()}, 320) for i in range(2)]
    for i in range(2):
        torch.testing.assert_close(alone[i]["log_likelihood"][0], found["log_likelihood"][i])
        before = [t for each in batch["demonstrations"][i] for t in own.encode(each)]
        for column, label in enumerate(batch["labels"][i][:2]):
            ids = own.encode(f"{batch['text'][i]} {label}\n")
            assert int(found["tokens"][i, column]) == len(ids)
            expected = recomputed(session.networks["lm"], before, ids)
            assert float(found["log_likelihood"][i, column]) == pytest.approx(expected, abs=1e-3)


def test_demonstrations_are_read_whole_nearest_first_and_paid_for(
    tokens: dict[str, Tokens], batch: dict[str, Any]
) -> None:
    own = tokens["mgpt"]
    session = session_of(own)
    one = {key: value[1:2] for key, value in batch.items()}
    lines = one["demonstrations"][0]
    assert len(lines) == 4
    lengths = [len(own.encode(each)) for each in lines]

    def spent(rung: int, given: list[str]) -> tuple[Tensor, float]:
        session.ledger.reset()
        found = read(session, one | {"demonstrations": [given]}, rung)["log_likelihood"]
        return found, session.ledger.spent

    cold, least = spent(10_000, [])
    ids = [own.encode(line(one["text"][0], label)) for label in one["labels"][0]]
    common = next(i for i in range(99) if len({row[i] for row in ids}) > 1)
    assert least == 1 + common + sum(len(row) - common - 1 for row in ids)
    seen = [cold]
    for kept in range(1, 5):
        exact = int(least) + sum(lengths[-kept:])
        found, cost = spent(exact, lines)
        assert cost == exact
        torch.testing.assert_close(found, spent(10_000, lines[-kept:])[0])
        torch.testing.assert_close(spent(exact - 1, lines)[0], seen[-1])
        assert not torch.allclose(found, seen[-1], atol=1e-4)
        seen.append(found)
    other = spent(10_000, [lines[0].replace(lines[0][0], "x"), *lines[1:]])[0]
    assert not torch.allclose(other, seen[-1], atol=1e-5)
    with pytest.raises(ValueError, match=f"has {int(least)} tokens, the rung allows {int(least) - 1}"):
        spent(int(least) - 1, [])


@pytest.mark.parametrize("name", METHODS)
def test_every_question_fits_the_least_rung_and_all_demonstrations_the_greatest(
    tokens: dict[str, Tokens], name: str
) -> None:
    data, own = load_split("dialects", "test"), tokens[name]
    for text, labels, lines in list(zip(data["text"], data["labels"], data["demonstrations"], strict=True))[:150]:
        ids = [own.encode(line(text, label)) for label in labels]
        common = next(i for i in range(99) if len({row[i] for row in ids}) > 1)
        need = 1 + common + sum(len(row) - common - 1 for row in ids)
        assert need <= TASK.rungs[0]
        assert need + sum(len(own.encode(each)) for each in lines) <= TASK.rungs[-1]


# -- metrics ------------------------------------------------------------------------------------------------------


def scored(batch: dict[str, Any], likely: Tensor, counts: Tensor) -> dict[str, Any]:
    outputs = {"log_likelihood": likely, "tokens": counts}
    return decoding_tokens.score(TASK, batch, outputs, {}, np.arange(len(likely))[None])


def test_bits_are_those_of_the_whole_text_markers_included(tokens: dict[str, Tokens], batch: dict[str, Any]) -> None:
    data = load_split("dialects", "test")
    right = {text: labels[i] for text, labels, i in zip(data["text"], data["labels"], data["answer"], strict=True)}
    for own in tokens.values():
        model = LanguageModel()
        torch.nn.init.zeros_(model.embed.weight)  # every token has probability 1 / VOCABULARY
        found = read(session_of(own, model), batch, 320)
        lines = [line(text, right[text]) for text in batch["text"]]
        counts = [len(own.encode(each)) for each in lines]
        bits = sum(counts[::2]) * math.log2(VOCABULARY) / sum(map(len, lines[::2]))
        values = scored(batch, found["log_likelihood"], found["tokens"])
        assert values["bits_per_character"].value == pytest.approx(bits)
        assert values["bits_per_character"].resamples == pytest.approx([bits])
        assert values["tokens"].value == pytest.approx(sum(counts) / len(counts))


def test_accuracies_are_of_their_own_questions() -> None:
    many: dict[str, Any] = decoding_tokens.inputs(TASK, 40, torch.Generator().manual_seed(1), torch.device("cpu"))
    data = load_split("dialects", "test")
    rows = [data["text"].index(text) for text in many["text"]]
    answers = torch.tensor([data["answer"][i] for i in rows])
    sums = torch.tensor([data["question"][i] == "sum" for i in rows])
    assert [bool(lines) for lines in many["demonstrations"]] == [False, True] * 20
    few = torch.arange(40) % 2 == 1
    for right, expected in ((few, (0.0, 1.0)), (~few, (1.0, 0.0)), (sums, None)):
        chosen = torch.where(right, answers, (answers + 1) % 4)
        values = scored(many, F.one_hot(chosen, 4).double() - 90.0, torch.ones(40, 4, dtype=torch.long))
        if expected:
            assert (values["zero_shot"].value, values["few_shot"].value) == expected
            assert values["sums"].value == pytest.approx(float((sums & right).sum() / sums.sum()))
        else:
            assert values["sums"].value == 1.0
            assert values["few_shot"].value == pytest.approx(float((sums & few).sum() / 20))


def test_outputs_too_good_to_be_true_are_rejected(batch: dict[str, Any]) -> None:
    from stepmark.datasets.dialects import surprise

    floor = torch.tensor([[-surprise(told=bool(lines))] * 4 for lines in batch["demonstrations"]])
    counts = torch.ones(len(floor), 4, dtype=torch.long)
    decoding_tokens.check(TASK, batch, {"log_likelihood": floor, "tokens": counts})
    decoding_tokens.check(TASK, batch, {"log_likelihood": floor + 19 / len(floor), "tokens": counts})
    bad: list[tuple[Any, str]] = [
        ({"log_likelihood": floor + 21 / len(floor), "tokens": counts}, "21 nats likelier"),
        ({"log_likelihood": floor[:3], "tokens": counts}, "shape"),
        ({"log_likelihood": floor}, "tokens"),
        ([floor, counts], "shape"),
        ({"log_likelihood": floor * float("nan"), "tokens": counts}, "not finite"),
        ({"log_likelihood": -floor, "tokens": counts}, "above 0"),
        ({"log_likelihood": floor, "tokens": counts * 0}, "less than one"),
    ]
    for outputs, why in bad:
        with pytest.raises(BadOutput, match=why):
            decoding_tokens.check(TASK, batch, outputs)


# -- training -----------------------------------------------------------------------------------------------------


def prepared(name: str, steps: int = 2) -> tuple[Any, dict[str, Tensor]]:
    """(session, state) of a method, prepared in a few short steps."""
    plugin: Any = plugins.load_class(plugins.methods()[name])()
    ledger = Ledger()
    session: Any = SimpleNamespace(
        train={"document": load_split("dialects", "train")["document"][:60]},
        scale=lambda embedded, smoke: steps if embedded == STEPS else smoke,
        seed=0,
        device=torch.device("cpu"),
        progress=lambda each, _: each,
        ledger=ledger,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        session.networks = plugin.networks(session)
    watch(ledger, "lm", session.networks["lm"], decoding_tokens.layers(TASK, "lm", session.networks["lm"]))
    return session, plugin.prepare(session)


def test_strategies_differ_in_their_tokens_alone() -> None:
    text = HOSTILE[1]
    positions, sizes = set(), set()
    for name, scheme in METHODS.items():
        session, state = prepared(name)
        expected = learn_tokens(scheme, session.train["document"][:40])
        assert Tokens.stored(state["tokenizer"]).encode(text) == Tokens(expected).encode(text)
        positions.add(session.ledger.entries["lm"].as_dict()["positions"])
        sizes.add(sum(parameter.numel() for parameter in session.networks["lm"].parameters()))
    assert len(positions) == len(sizes) == 1
    assert sizes.pop() <= 1_000_000


def test_training_reads_documents_behind_their_beginnings_line_by_line() -> None:
    """Windows of one stream, each read once an epoch: BEGIN, then the tokens of each line by itself; the next are told."""
    read, told = list[Tensor](), list[Tensor]()
    embed, losses = torch.nn.Embedding.forward, F.cross_entropy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Embedding, "forward", lambda self, ids: read.append(ids) or embed(self, ids))
        patch.setattr(F, "cross_entropy", lambda found, after: told.append(after) or losses(found, after))
        session, state = prepared("mgpt", 30)
    own = Tokens.stored(state["tokenizer"])
    stream = [
        token
        for text in session.train["document"][:40]
        for token in (BEGIN, *(i for each in text.splitlines(keepends=True) for i in own.encode(each)))
    ]
    count = (len(stream) - 1) // 40
    after = {tuple(stream[i * 40 : i * 40 + 40]): stream[i * 40 + 1 : i * 40 + 41] for i in range(count)}
    rows = [tuple(row) for ids in read for row in ids.tolist()]
    assert [row for part in told for row in part.view(-1, 40).tolist()] == [after[row] for row in rows]
    epoch = min(len(after), len(rows))
    assert len(set(rows[:epoch])) == epoch > 60, "a window comes again before all have been read"


def test_training_is_deterministic_and_learns() -> None:
    ids = [i for each in load_split("dialects", "train")["document"][:5] for i in (BEGIN, *_ids(each))]
    rows = torch.tensor(ids[:40])[None]
    losses = []
    for steps in (2, 25, 25):
        session, state = prepared("mgpt", steps)
        assert state["tokenizer"].dtype == torch.uint8
        logits = session.networks["lm"].eval()(rows[:, :-1])
        losses.append(float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).detach()))
    assert losses[1] == losses[2]
    assert losses[1] < losses[0] - 0.5


def _ids(text: str) -> list[int]:
    own = Tokens(learn_tokens(Scheme(), load_split("dialects", "train")["document"][:40]))
    return [i for each in text.splitlines(keepends=True) for i in own.encode(each)]
