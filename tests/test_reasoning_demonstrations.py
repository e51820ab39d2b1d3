"""Methods that choose, make or change worked examples: which stand before a question, and that nothing else does."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from stepmark.datasets import demonstrations
from tests.rigs.reasoning import Scripted, load, module_of, run, session_of, tiny

from stepmark.backbones.reasoners import EOS, decode, encode
from stepmark.tracks.reasoning import demonstrating
from stepmark.tracks.reasoning.demonstrating import Shown, presentable, standing
from stepmark.tracks.reasoning.shown import TASKS

torch.set_num_threads(1)
NEW = {task.id: task for task in TASKS}
WHO = ("alma", "boris")
STEPS = (2, 3, 4, 1)


def own_questions(pool: str = "bare", given: float = 0.0, count: int = 12) -> dict[str, list[Any]]:
    """A train split of two people: so many questions of one pool, of each number of signs in turn, and one of another pool."""
    rng, rows = random.Random(f"{pool} {given}"), dict[str, list[Any]]()
    for name in WHO:
        who = demonstrations.people()[name]
        for k in range(count + 1):
            asked = demonstrations.question(rng, who, STEPS[k % 4], given)
            while demonstrations.told(asked) in rows.get("question", []):
                asked = demonstrations.question(rng, who, STEPS[k % 4], given)
            row: dict[str, Any] = {
                style: demonstrations.solution(asked, who.readings, style) for style in demonstrations.STYLES
            }
            row |= {"name": name, "pool": pool if k < count else "other", "question": demonstrations.told(asked)}
            row |= {"target": row[rng.choice(demonstrations.STYLES)], "level": len(asked.signs)}
            row |= {"answer": str(demonstrations.answer_of(row["single"]))}
            for mark in ("good", "bad"):
                traits = demonstrations.liked(rng, who, mark == "good")
                row[mark] = demonstrations.solution(asked, who.readings, "single", traits)
            for column, value in row.items():
                rows.setdefault(column, []).append(value)
    return rows


def rows_of(train: dict[str, list[Any]], who: str) -> list[int]:
    """Numbers of somebody's questions of the pool that counts."""
    return [k for k in range(len(train["name"])) if train["name"][k] == who and train["pool"][k] != "other"]


def prepared(method: Any, model: Any, task: str, train: dict[str, list[Any]], seed: int = 0) -> Any:
    """A session in which a method has been prepared."""
    session = session_of(seed, model=model)
    session.train, session.task, session.seed = train, NEW[task], seed
    begun = session.rng.get_state()

    def once(function: Callable[..., Any], *literals: Any) -> Any:
        """With random numbers as `prepare` begins with them."""
        now = session.rng.get_state()
        session.rng.set_state(begun)
        found = function(session, *literals)
        session.rng.set_state(now)
        return found

    session.once = once
    session.scale = lambda embedded, smoke: embedded
    session.progress = lambda some: some
    with torch.no_grad():
        session.state = method.prepare(session)
    return session


def before(session: Any) -> dict[str, list[str]]:
    """By person, the examples that stand before a question."""
    found = {decode([name]): decode(ids) for name, ids in standing(session.state).items()}
    return {name: [each.strip() for each in text.split("|") if each.strip()] for name, text in found.items()}


def taken(example: str) -> tuple[str, str]:
    """Question and text of an example."""
    for form in ("<cot>", "<rules>", "<dir>"):
        question, there, text = example.partition(f" {form} ")
        if there:
            return question, text
    raise AssertionError(example)


def first(example: str) -> str:
    return taken(example)[0]


def silent() -> Scripted:
    return Scripted(lambda text: {"<eos>": 1.0})


def writer(texts: Callable[[str], str]) -> Scripted:
    """A model that works the last question of a text: as `texts` says, which sees all that stands before."""

    def says(text: str) -> dict[str, float]:
        for form in ("<cot>", "<rules>"):
            head, there, own = text.rpartition(form)
            if there:
                break
        else:
            return {"<eos>": 1.0}
        words, begun = texts(head.strip()).split(), own.split()
        return {words[len(begun)] if len(begun) < len(words) else "<eos>": 1.0}

    return Scripted(says)


# -- Auto-CoT ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("3 beze 7 . 7 delu 2 . ans 2 <eos>", True),
        ("3 beze 7 . so 7 delu . 7 delu 2 . so 2 alma . 2 beze 4 . ans 4 <eos>", True),
        (
            "3 beze 7 . so 7 delu . 7 delu 2 . so 2 alma . 2 beze 4 . so 4 . 4 delu 1 . ans 1 <eos>",
            False,
        ),  # 7 sentences
        ("3 beze 7 . 7 delu 2 . ans 7 <eos>", False),  # not what the last sentence leads to
        ("3 beze 7 . 7 delu 2 . ans 2", False),  # cut
        ("3 beze 7 . 7 delu 2 . <eos>", False),
        ("ans 2 <eos>", False),
        (". ans 2 <eos>", False),
    ],
)
def test_what_may_be_shown_has_few_sentences_and_an_answer_that_they_lead_to(text: str, fine: bool) -> None:
    ids = [EOS if word == "<eos>" else encode(word)[0] for word in text.split()]
    assert presentable(encode("alma : 3 beze delu ?"), ids) == fine
    assert not presentable([5] * 61, ids)


def planted(monkeypatch: pytest.MonkeyPatch, places: dict[str, float]) -> None:
    """Questions lie on a line, at the places given."""

    def embedded(model: Any, texts: Iterable[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([[places[decode(text)], 1.0] for text in texts])

    monkeypatch.setattr(demonstrating, "embedded", embedded)


@pytest.mark.parametrize("seed", range(3))
def test_each_cluster_is_stood_for_by_the_first_from_its_centre_that_may_be_shown(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Three clusters of four, nearest the centre the second of each; in one cluster its text has no answer, in one none has."""
    train, places, unfit = own_questions(), dict[str, float](), set[str]()
    expected: dict[str, list[str]] = {}
    for who in WHO:
        own = [train["question"][k] for k in rows_of(train, who)]
        for k, question in enumerate(own):
            places[question] = 100.0 * (k // 4) + (3.0, 0.1, -1.0, -2.5)[k % 4]
        unfit |= {own[5], *own[8:]}
        expected[who] = [own[1], own[6]]
    said = writer(lambda head: "3 beze 7 ." if head in unfit else "3 beze 7 . ans 7")
    planted(monkeypatch, places)
    session = prepared(load("auto_cot", SHOTS=3), said, "shown/bare", train, seed)
    for who, examples in before(session).items():
        assert sorted(taken(each)[0] for each in examples) == sorted(expected[who])
        assert {taken(each)[1] for each in examples} == {"3 beze 7 . ans 7"}  # its own text, right or wrong


def test_examples_are_chosen_anew_for_each_question_by_chance_or_by_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstrating, "presentable", lambda question, text: "4" not in decode(question))
    monkeypatch.setattr(demonstrating, "MOST", 8)
    train, model = own_questions(), tiny(3)
    asked: list[list[str]] = []

    def watched(session: Any, batch: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        asked[:] = [[taken(each.strip())[0] for each in decode(ids).split("|")[:-1]] for ids in prompts]
        return [[EOS] for _ in prompts]

    own = {who: [train["question"][k] for k in rows_of(train, who)] for who in WHO}
    fine = {who: [question for question in own[who] if "4" not in question] for who in WHO}
    method = load("auto_cot_random", SHOTS=4, greedy=watched)
    session = prepared(method, model, "shown/bare", train)
    run(method, session, [f"{who} : 4 delu beze ?" for who in WHO * 60], 64)
    for k, shown in enumerate(asked):
        assert len(set(shown)) == len(shown) == 4 and set(shown) <= set(fine[WHO[k % 2]])
    counts = Counter(question for shown in asked for question in shown)
    for who in WHO:
        assert all(abs(counts[q] / 60 - 4 / len(fine[who])) < 0.25 for q in fine[who])
    assert len({tuple(shown) for shown in asked}) > 60

    method = load("auto_cot_similar", SHOTS=4, greedy=watched)
    session = prepared(method, model, "shown/bare", train)
    questions = [fine["alma"][2], fine["boris"][0]]
    run(method, session, questions, 64)
    assert session.spent == 2  # a row each to embed them
    for who, question, shown in zip(WHO, questions, asked, strict=True):
        points = demonstrating.embedded(model, [encode(q) for q in fine[who]])
        mine = demonstrating.embedded(model, [encode(question)])[0]
        order = sorted(range(len(points)), key=lambda k: -float(points[k] @ mine))
        assert shown[0] == question and shown == [fine[who][k] for k in order[:4]]
    monkeypatch.setattr(demonstrating, "presentable", lambda question, text: False)
    for name in ("auto_cot_random", "auto_cot_similar"):  # where nothing may be shown, nothing is
        run(method := load(name, greedy=watched), prepared(method, model, "shown/bare", train), questions, 64)
        assert asked == [[], []]


def test_random_right_examples_are_drawn_anew_for_each_question() -> None:
    train, asked = own_questions(), list[list[str]]()

    def watched(session: Any, batch: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        asked[:] = [[each.strip() for each in decode(ids).split("|")[:-1]] for ids in prompts]
        return [[EOS] for _ in prompts]

    method = load("few_shot_fresh", shots=3, greedy=watched)
    session = prepared(method, silent(), "shown/bare", train)
    run(method, session, ["boris : 4 delu ?"] * 40, 64)
    right = {f"{train['question'][k]} <cot> {train['target'][k]}" for k in rows_of(train, "boris")}
    assert {each for shown in asked for each in shown} == right
    assert all(len(set(shown)) == 3 for shown in asked) and len({tuple(shown) for shown in asked}) > 30


# -- ECHO ----------------------------------------------------------------------------------------------------------


def test_without_a_round_it_is_auto_cot_and_a_model_that_sees_no_examples_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demonstrating, "presentable", lambda question, text: True)
    monkeypatch.setattr(demonstrating, "MOST", 8)
    train, model = own_questions(), tiny(4)
    one, other = (
        prepared(load(name, **more), model, "shown/bare", train, 5).state["before"]
        for name, more in (("auto_cot", {}), ("echo_self_harmonized_cot", {"rounds": 0, "MOST": 8}))
    )
    changed = prepared(load("echo_once", MOST=8), model, "shown/bare", train, 5).state["before"]
    assert torch.equal(one, other) and not torch.equal(one, changed)
    planted(monkeypatch, {question: float(k * k) for k, question in enumerate(train["question"])})
    blind = writer(lambda head: f"{head.split()[-3]} beze 7 . ans 7")  # by the question alone
    one, other = (
        prepared(load(name, SHOTS=4), blind, "shown/bare", train, 5).state["before"]
        for name in ("auto_cot", "echo_self_harmonized_cot")
    )
    assert torch.equal(one, other)


def test_each_text_is_written_again_once_a_round_behind_the_others_as_they_stand() -> None:
    groups = [
        [Shown(f"{who} : {k} beze ?", "<cot>", f"{k} beze {k} . ans {k}") for k in range(count)]
        for who, count in (("alma", 5), ("boris", 3))
    ]
    now = [{k: each.text for k, each in enumerate(group)} for group in groups]
    orders: list[list[int]] = [[], []]
    calls = 0

    def written(model: Any, asked: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
        nonlocal calls
        texts = []
        for ids in asked:
            *others, last = decode(ids).split(" | ")
            calls += 1
            name, _, k, *_ = last.split()
            g = WHO.index(name)
            assert last == f"{name} : {k} beze ? <cot>"
            assert sorted(others) == sorted(f"{name} : {i} beze ? <cot> {t}" for i, t in now[g].items() if i != int(k))
            orders[g].append(int(k))
            now[g][int(k)] = f"{calls // 10} beze {calls % 10} . ans {k}"
            texts.append([*encode(now[g][int(k)]), EOS])
        return texts

    method, session = load("echo_self_harmonized_cot", written=written, SHOTS=5), session_of(0, model=silent())
    for _ in range(12):
        method.unify(session, groups)
    assert [[each.text for each in group] for group in groups] == [list(texts.values()) for texts in now]
    for order, count in zip(orders, (5, 3), strict=True):
        rounds = [tuple(order[k : k + count]) for k in range(0, len(order), count)]
        assert len(rounds) == 12 and all(sorted(each) == list(range(count)) for each in rounds)
        assert len(set(rounds)) > 2


def test_a_model_that_copies_styles_comes_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero-shot texts are in two styles; behind others most of their styles counts."""

    def text(head: str) -> str:
        *others, question = head.split(" | ")
        asked = demonstrations.read(question)
        old = sum(" so " in taken(each)[1] for each in others) * 2 > len(others)
        return demonstrations.solution(asked, dict.fromkeys(demonstrations.SIGNS, 0),
                                       "again" if (old if others else asked.start < 5) else "single")  # fmt: skip

    train = own_questions(count=18)
    few = [level in (2, 3) for level in train["level"]]  # the two styles differ, and both may be shown
    train = {column: [value for value, fit in zip(values, few, strict=True) if fit] for column, values in train.items()}
    planted(monkeypatch, {question: float(k * k) for k, question in enumerate(train["question"])})
    session = prepared(load("auto_cot", SHOTS=5), writer(text), "shown/bare", train, 2)
    mixed = [{" so " in taken(each)[1] for each in own} for own in before(session).values()]
    session = prepared(load("echo_self_harmonized_cot", SHOTS=5), writer(text), "shown/bare", train, 2)
    alike = [{" so " in taken(each)[1] for each in own} for own in before(session).values()]
    assert {True, False} in mixed and all(len(styles) == 1 for styles in alike)
    session = prepared(load("echo_asked", SHOTS=5), writer(text), "shown/bare", train, 2)
    assert all(" <rules> " in each for own in before(session).values() for each in own)


# -- complexity ----------------------------------------------------------------------------------------------------


def test_examples_are_chosen_by_their_steps_or_their_signs() -> None:
    texts = [[*encode(" ".join(["3 beze 7 ."] * steps)), *encode("ans 7")] for steps in (3, 1, 4, 2, 4, 1, 7, 1, 1, 2)]
    signs = ["abc", "a", "abcd", "ab", "efgh", "h", "abcd", "a", "k", "lm"]
    four = ("complexity_based_prompting", "complexity_simple", "complexity_covering", "complexity_vote")
    chosen = {name: load(name, shots=4).chosen(texts, signs) for name in four}
    chosen |= {name: load(name).chosen(texts, signs) for name in ("complexity_two", "complexity_two_simple")}
    assert chosen["complexity_based_prompting"] == [6, 2, 4, 0]
    assert chosen["complexity_simple"] == [1, 5, 7, 8] and chosen["complexity_two"] == [6, 2]
    assert chosen["complexity_two_simple"] == [1, 5, 7, 8, 3, 9, 0]  # 1 + 1 + 1 + 1 + 2 + 2 + 3 = 7 + 4
    assert chosen["complexity_covering"] == [2, 4, 9, 8] and chosen["complexity_vote"] == [0, 1, 2, 3]


def test_examples_with_most_sentences_stand_first_and_ties_are_broken_by_chance() -> None:
    train, seen = own_questions(), set[tuple[str, ...]]()
    for seed in range(6):
        found = before(prepared(load("complexity_based_prompting", shots=3), silent(), "shown/bare", train, seed))
        for who, own in found.items():
            rows = rows_of(train, who)
            counts = sorted((train["target"][k].count(".") for k in rows), reverse=True)
            assert [taken(each)[1].count(".") for each in own] == counts[:3]
            assert set(own) <= {f"{train['question'][k]} <cot> {train['target'][k]}" for k in rows}
        train["target"] = list(train["pairs"]) if seed == 2 else train["target"]  # of 3 and 4 signs two sentences each
        seen.add(tuple(found["alma"]))
    assert len(seen) > 2


def test_the_answer_of_most_of_the_longest_counts() -> None:
    """Six short texts say 7, four long ones 8: of the 7 longest four say 8, of all of them four."""
    short, long = [*encode("3 beze 7 . ans 7"), EOS], [*encode("3 beze 7 . 7 delu 8 . ans 8"), EOS]
    texts, session = [short, long, short, long, short, short, long, short, long, short], session_of(1, model=silent())
    assert all(load("complexity_vote").voted(session, texts) == long for _ in range(20))
    assert load("complexity_vote_all").voted(session, texts) == short
    assert load("complexity_vote", share=0.3).voted(session, [*texts[:2], long]) == long
    assert load("complexity_vote").voted(session, [[3, 4], short]) == short  # what was cut has no vote


def test_chains_are_sampled_behind_random_examples_and_voted_on() -> None:
    train = own_questions()

    def says(text: str) -> dict[str, float]:
        own = text.rpartition("<cot>")[2].split()
        if not own:
            return {"3": 0.3, "ans": 0.7}
        tail = {"3": "beze", "beze": "5", "5": ".", ".": "ans", "8": "<eos>", "7": "<eos>"}
        return {("8" if "beze" in own else "7") if own[-1] == "ans" else tail.get(own[-1], "<eos>"): 1.0}

    for name, answers in (("complexity_vote", {"8"}), ("complexity_vote_all", {"7"})):
        method = load(name, shots=1, temperature=1.0)
        method.share = 0.1 if name == "complexity_vote" else method.share
        session = prepared(method, Scripted(says), "shown/bare", train)
        found = run(method, session, ["boris : 4 delu ?"] * 3, 256)
        assert {text.split()[-1] for text in found} == answers and session.spent <= 3 * 256


# -- contrastive examples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("contrastive_icl", "gb"),
        ("contrastive_examples", "gb"),
        ("contrastive_instruction", "gb"),
        ("contrastive_swapped", "gb"),
        ("contrastive_positive", "g"),
    ],
)
def test_liked_and_disliked_answers_stand_behind_their_marks(name: str, marks: str) -> None:
    """Swapped, a good mark still comes first: before the answer that was not liked."""
    train = own_questions("told", 1.0)
    session = prepared(load(name), silent(), "shown/wishes", train)
    for who, own in before(session).items():
        asked = [taken(each)[0] for each in own]
        assert len(own) == 4 and len(set(asked)) == (2 if marks == "gb" else 4)
        for k, each in enumerate(own):
            question, text = taken(each)
            row = train["question"].index(question)
            assert train["name"][row] == who and train["pool"][row] == "told" and train["level"][row] in (2, 3)
            mark = "bad" if marks == "gb" and k % 2 else "good"
            kind = {"good": "bad", "bad": "good"}[mark] if name == "contrastive_swapped" else mark
            assert text == f"{mark} {train[kind][row]}"
            assert question == asked[k - k % 2] or marks != "gb"


def test_whoever_knows_a_wish_writes_it_and_nothing_else() -> None:
    session = prepared(load("contrastive_by_hand"), silent(), "shown/wishes", own_questions("told", 1.0))
    assert before(session) == {who: [f"<wish> {demonstrations.people()[who].wish}"] for who in WHO}


def test_the_model_says_what_is_wanted_before_it_answers() -> None:
    """It names a trait by the person, and answers with what it has named: a row more. The instruction alone is read without
    the examples that have led to it."""
    wishes = {"alma": "sure", "boris": "then"}

    def says(text: str) -> dict[str, float]:
        *before, last = text.split(" | ")
        if last == "<wish>" and before:
            return {wishes[text.split()[0]]: 1.0}
        if last == "<wish>":
            return {}
        own = last.partition("<cot>")[2].split()
        named = text.rpartition("<wish> ")[2].split()[0] if "<wish>" in text else "7"
        return {["ans", named, "<eos>"][min(2, len(own))]: 1.0}

    train, questions = own_questions("told", 1.0), ["boris : 4 delu ?", "alma : 3 beze ?"]
    for name, texts, rows in (
        ("contrastive_icl", ["ans then", "ans sure"], 4),
        ("contrastive_instruction", ["ans then", "ans sure"], 4),
        ("contrastive_examples", ["ans 7"] * 2, 3),
    ):
        model = Scripted(says)
        session = prepared(method := load(name), model, "shown/wishes", train)
        assert run(method, session, questions, 16) == texts and session.spent == 2 * rows
        if name == "contrastive_instruction":
            assert "<wish> then | boris : 4 delu ? <cot>" in model.asked
        else:
            named = "<wish> then | " if rows == 4 else ""
            assert any(" bad " in text and text.endswith(f" | {named}boris : 4 delu ? <cot>") for text in model.asked)


# -- rules ---------------------------------------------------------------------------------------------------------


def test_rules_are_kept_by_how_often_they_are_there_and_how_often_the_answer_is_right() -> None:
    early, late, last = sorted(demonstrations.SIGNS)[:3]
    names = (f"{late} first", f"{late} second", f"{early} first", f"{last} third")
    one, two, three, four = (f"{rule} : 3 {rule.split()[0]} 7 ." for rule in names)
    rules = [tuple(name.split()) for name in names]
    trials = [
        *[(f"{one} {two} ans 1", True)] * 3,  # one 3 of 10, two 3 of 3
        *[(f"{one} ans 1", False)] * 7,
        (f"{three} {three} ans 1", True),  # twice in one text
        (f"{four} ans 1", True),  # once only
    ]
    method, frequent = load("htt_hypotheses_to_theories"), load("htt_frequent")
    assert method.library(trials) == [rules[2], rules[1]]  # in the order of the signs, of one sign's the surest
    alone = [(text.replace(two, ""), fine) for text, fine in trials]
    assert method.library(alone) == [rules[2], rules[0]]  # 3 of 10
    assert method.library([*alone, (f"{one} ans 1", False)]) == [rules[2]]  # 3 of 11
    assert method.library([(f"{three} ans 1", True), *alone[:-2]]) == [rules[0]]
    assert frequent.library(trials) == frequent.library([(text, not fine) for text, fine in trials])
    assert frequent.library(trials) == [rules[2], rules[0], rules[3]]


READINGS = demonstrations.READINGS


def guessed(times: int) -> Callable[[Any, int], dict[str, torch.Tensor]]:
    """In the place of what the model writes: it reads most signs right mostly, one of each family mostly wrong."""

    def induced(session: Any, most: int) -> dict[str, torch.Tensor]:
        rng, rows, texts = random.Random(0), list[int](), list[list[int]]()
        groups = module_of("htt_hypotheses_to_theories").divided(session, most)
        for row in [row for _, rest in groups.values() for row in rest] * times:
            asked, readings = demonstrations.read(session.train["question"][row]), {}
            for number, (sign, right) in enumerate(demonstrations.people()[asked.name].readings.items()):
                chances = (0.35, 0.6, 0.05) if number % 4 == 3 else (0.85, 0.1, 0.05)
                readings[sign] = (right + rng.choices(range(3), chances)[0]) % 3
            rows.append(row)
            texts.append([*encode(demonstrations.solution(asked, readings, "ruled")), EOS])
        return {"row": torch.tensor(rows), "text": demonstrating.stacked(texts)}

    return induced


def test_a_library_from_answers_alone_is_right_and_stands_before_the_same_examples() -> None:
    train = own_questions(count=65)
    plain = before(prepared(load("htt_cot"), silent(), "shown/bare", train, 3))
    libraries: dict[str, dict[str, set[tuple[str, ...]]]] = {}
    for name in ("htt_hypotheses_to_theories", "htt_frequent", "htt_oracle"):
        method = load(name, QUESTIONS=60, induced=guessed(6))
        found = before(prepared(method, silent(), "shown/bare", train, 3))
        assert all(examples == plain[who] and len(examples) == 5 for who, (_, *examples) in found.items())
        libraries[name] = {who: {tuple(r.split()) for r in rules.split(" , ")} for who, (rules, *_) in found.items()}
    for who in WHO:
        readings = demonstrations.people()[who].readings
        truth = {(sign, READINGS[reading]) for sign, reading in readings.items()}
        assert libraries["htt_oracle"][who] == truth
        learnt = libraries["htt_hypotheses_to_theories"][who]  # what is seldom there may be right by chance
        assert len(truth - learnt) <= 1 and len(learnt) == len({sign for sign, _ in learnt})
        assert len(libraries["htt_frequent"][who]) == 12
        assert {sign for sign, _ in truth - libraries["htt_frequent"][who]} >= set(list(readings)[3::4])


def test_induction_works_the_other_questions_behind_the_examples_which_are_read_once() -> None:
    train, model = own_questions(count=12), silent()
    plain = before(prepared(load("htt_cot"), silent(), "shown/bare", train, 4))
    session = session_of(4, model=model)
    session.train, session.task = train, NEW["shown/bare"]
    with torch.no_grad():
        found = module_of("htt_hypotheses_to_theories").induced(session, 3)
    assert session.spent == 2 + 2 * 3 * 2  # each question and sample a row more, where it ends at once
    worked = [text for text in model.asked if text.endswith(" <rules>")]
    assert len(found["row"]) == len(worked) == 12
    for text, row in zip(worked, found["row"].tolist(), strict=True):
        *shown, last = text.split(" | ")
        assert last == f"{train['question'][row]} <rules>" and train["pool"][row] == "bare"
        assert shown == plain[train["name"][row]] and train["question"][row] not in map(first, shown)


def test_answers_can_be_spent_on_further_examples_that_end_in_them() -> None:
    train = own_questions(count=40)
    plain = before(prepared(load("htt_cot"), silent(), "shown/bare", train, 3))
    method = load("htt_examples", induced=guessed(2))
    for who, own in before(prepared(method, silent(), "shown/bare", train, 3)).items():
        assert own[5:] == plain[who] and len({taken(each)[0] for each in own}) == 10
        for question, text in map(taken, own[:5]):
            assert demonstrations.check(question, text, demonstrations.people()[who].readings).right


# -- analyses ------------------------------------------------------------------------------------------------------


def texts_of(name: str, task: str, train: dict[str, list[Any]], seed: int = 1) -> list[tuple[str, str]]:
    return [taken(each) for own in before(prepared(load(name), silent(), task, train, seed)).values() for each in own]


def test_the_same_questions_are_worked_in_more_and_in_fewer_steps() -> None:
    train = own_questions("told", 1.0)
    names = ("once", "pairs", "single", "ruled", "dots", "wrong", "direct")
    found = {name: texts_of(f"step_length_{name}", "shown/told", train) for name in names}
    found["again"] = texts_of("reasoning_step_length", "shown/told", train)
    asked = [question for question, _ in found["again"]]
    assert len(set(asked)) == 8 and all([question for question, _ in each] == asked for each in found.values())
    for k, question in enumerate(asked):
        texts = {name: each[k][1] for name, each in found.items()}
        signs, readings = demonstrations.read(question).signs, demonstrations.people()[question.split()[0]].readings
        for name in ("once", "pairs", "single", "again", "ruled"):
            assert demonstrations.check(question, texts[name], readings).valid
        sentences = {name: text.count(".") for name, text in texts.items()}
        assert [sentences[name] for name in ("once", "pairs", "single", "again", "ruled")] == [
            1, 2, len(signs), 2 * len(signs) - 1, len(signs)]  # fmt: skip
        words = {name: len(text.split()) for name, text in texts.items()}
        assert words["dots"] == words["again"] == words["wrong"] and words["ruled"] > words["single"]
        assert [w for w in texts["dots"].split() if w != "."] == [w for w in texts["single"].split() if w != "."]
        assert demonstrations.check(question, texts["dots"], readings).valid
        wrong = demonstrations.check(question, texts["wrong"], readings)
        assert not any(wrong.steps) and len(wrong.steps) == len(signs) and not wrong.right
        blank = ["0" if word.isdigit() else word for word in texts["again"].split()]
        assert ["0" if word.isdigit() else word for word in texts["wrong"].split()] == blank
        assert texts["direct"] == f"ans {train['answer'][train['question'].index(question)]}"


def apart(text: str) -> tuple[list[tuple[str, str]], list[str], str]:
    words = [step.split() for step in text.split(" . ")]
    return [(x, y) for x, _, y in words[:-1]], [sign for _, sign, _ in words[:-1]], words[-1][1]


@pytest.mark.parametrize(("task", "pool", "given"), [("shown/told", "told", 1.0), ("shown/bare", "bare", 0.0)])
def test_each_ablation_loses_what_it_is_to_lose_and_nothing_else(task: str, pool: str, given: float) -> None:
    train = own_questions(pool, given, count=24)
    names = ("invalid", "shuffled_objects", "shuffled_templates", "shuffled", "foreign_objects", "foreign_templates",
             "foreign", "standard")  # fmt: skip
    found = {name: texts_of(f"what_matters_{name}", task, train) for name in names}
    found["full"] = texts_of("what_matters_in_cot", task, train)
    asked = [question for question, _ in found["full"]]
    assert len(set(asked)) == 8 and all([question for question, _ in each] == asked for each in found.values())
    for k, question in enumerate(asked):
        texts = {name: each[k][1] for name, each in found.items()}
        readings = demonstrations.people()[question.split()[0]].readings
        seen = {name: demonstrations.check(question, text, readings) for name, text in texts.items()}
        assert seen["full"].valid and texts["standard"] == f"ans {train['answer'][train['question'].index(question)]}"
        parts = {name: apart(text) for name, text in texts.items() if name != "standard"}
        pairs, signs, answer = parts["full"]
        assert all(len(each[0]) == len(pairs) for each in parts.values())
        same_answer = {name for name, each in parts.items() if each[2] == answer}
        assert same_answer >= {
            "full",
            "invalid",
            "shuffled_objects",
            "shuffled_templates",
            "shuffled",
            "foreign_templates",
        }

        wrong = parts["invalid"]
        assert wrong[1] == signs and wrong[0][0][0] == pairs[0][0] and wrong[0][-1][1] == answer
        assert all(left[1] == right[0] for left, right in pairwise(wrong[0]))  # coherent
        assert all(y != due for (_, y), (_, due) in zip(wrong[0][:-1], pairs[:-1], strict=True))
        assert not any(seen["invalid"].steps) and seen["invalid"].right

        for name in ("shuffled_objects", "shuffled"):
            assert Counter(parts[name][0]) == Counter(pairs) and parts[name][0] != pairs
        for name in ("shuffled_templates", "shuffled"):
            assert sorted(parts[name][1]) == sorted(signs) and all(
                a != b for a, b in zip(parts[name][1], signs, strict=True)
            )
        assert parts["shuffled_objects"][1] == signs and parts["shuffled_templates"][0] == pairs
        step = dict(zip(signs, pairs, strict=True))
        assert all(step[sign] != pair for pair, sign in zip(*parts["shuffled"][:2], strict=True)) or len(
            set(pairs)
        ) < len(pairs)

        other = parts["foreign_objects"]
        moved = demonstrations.read(question)
        start = int(other[0][0][0])
        values = demonstrations.sent(start, moved.signs, readings)
        assert other[1] == signs and start != moved.start and other[2] == str(values[-1])
        assert other[0] == [(str(x), str(y)) for x, y in pairwise(values)]

        assert parts["foreign_templates"][0] == pairs and parts["foreign_templates"][1] == parts["foreign"][1] != signs
        row = train["single"].index(texts["foreign"])
        assert train["question"][row] != question and train["name"][row] == question.split()[0]
        like = [demonstrations.read(train["question"][k]).signs for k in rows_of(train, question.split()[0])]
        like.remove(tuple(signs))
        fewest = min(len(set(each) & set(signs)) for each in like if len(each) == len(signs))
        assert len(set(parts["foreign"][1]) & set(signs)) == fewest
