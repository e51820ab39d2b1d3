"""Worked examples: each question has one answer, what is said of a text is so, and what a model is taught of it too."""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from stepmark.datasets import demonstrations
from tests.rigs.reasoning import Scripted, load, run, session_of

from stepmark.backbones import demonstrators, lessons, wishers
from stepmark.backbones.reasoners import EOS, PAD, UNKNOWN, WORDS, decode, encode
from stepmark.tracks.reasoning import check, demonstrating, score
from stepmark.tracks.reasoning.demonstrating import Shown
from stepmark.tracks.reasoning.shown import TASKS

torch.set_num_threads(1)
NEW = {task.id: task for task in TASKS}


def asked_of(
    rng: random.Random, steps: int, given: float = 0.5, name: str = "alma"
) -> tuple[Any, demonstrations.Person]:
    """A question about one of the people of the splits, and who they are."""
    who = demonstrations.people()[name]
    return demonstrations.question(rng, who, steps, given), who


# -- signs ---------------------------------------------------------------------------------------------------------


def test_one_example_tells_which_reading_is_meant() -> None:
    """Each reading is a permutation, and at no digit do two readings of a sign agree."""
    tables = demonstrations.tables()
    assert len(demonstrations.SIGNS) == 12 == len({sign for family in demonstrations.FAMILIES for sign in family})
    for sign in demonstrations.SIGNS:
        for reading in range(3):
            assert sorted(tables[sign, reading]) == list(range(10))
        for one, other in combinations(range(3), 2):
            assert all(a != b for a, b in zip(tables[sign, one], tables[sign, other], strict=True))


def test_people_keep_to_the_usual_reading_three_times_in_five() -> None:
    rng, counts = random.Random(0), [0, 0, 0]
    for _ in range(300):
        for reading in demonstrations.person(rng, "alma").readings.values():
            counts[reading] += 1
    assert [count / 3600 for count in counts] == pytest.approx([0.6, 0.2, 0.2], abs=0.03)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
def test_every_style_tells_the_same_answer_and_can_be_read_back(steps: int) -> None:
    rng = random.Random(steps)
    for _ in range(15):
        asked, who = asked_of(rng, steps)
        text = demonstrations.told(asked)
        assert demonstrations.read(text) == asked and len(set(asked.signs)) == steps
        answers = set()
        for style in demonstrations.STYLES:
            worked = demonstrations.solution(asked, who.readings, style)
            seen = demonstrations.check(text, worked, who.readings)
            lines = {"once": 1, "pairs": math.ceil(steps / 2)}.get(style, steps)
            assert seen.valid and seen.right and seen.steps == (True,) * lines
            assert demonstrations.shared(asked, worked, who.readings) == pytest.approx(2 * lines / (steps + lines))
            assert UNKNOWN not in encode(f"{text} <cot> {worked}")
            answers.add(demonstrations.answer_of(worked))
            rules = demonstrations.rules_of(worked)
            assert [sign for sign, _ in rules] == (list(asked.signs) if style == "ruled" else [])
        direct = demonstrations.check(asked, demonstrations.solution(asked, who.readings, "direct"), who.readings)
        assert len(answers) == 1 and direct.right and not direct.valid


def test_what_is_wrong_is_seen_wherever_it_stands() -> None:
    rng = random.Random(1)
    for _ in range(40):
        asked, who = asked_of(rng, rng.randint(2, 4))
        values = demonstrations.sent(asked.start, asked.signs, who.readings)
        place = rng.randrange(len(asked.signs))
        slips = {place: (values[place + 1] + rng.randint(1, 9)) % 10}
        wrong = demonstrations.check(
            asked, demonstrations.solution(asked, who.readings, "single", slips=slips), who.readings
        )
        assert not wrong.right and wrong.steps == tuple(k < place for k in range(len(asked.signs)))
        single = demonstrations.solution(asked, who.readings, "single")
        parts = single.split(" . ")
        assert not demonstrations.check(asked, " . ".join(parts[1:]), who.readings).valid  # a step left out
        assert not demonstrations.check(asked, f"{parts[0]} . {single}", who.readings).valid  # one twice
        ruled = demonstrations.solution(asked, who.readings, "ruled")
        sign, reading = demonstrations.rules_of(ruled)[0]
        other = next(each for each in demonstrations.READINGS if each != reading)
        turned = demonstrations.check(asked, ruled.replace(f"{sign} {reading}", f"{sign} {other}"), who.readings)
        assert turned.right and not turned.valid and not turned.steps[0]
        again = demonstrations.solution(asked, who.readings, "again")
        odd = again.replace(f"so {values[1]} ", f"so {(values[1] + 1) % 10} ", 1)
        assert demonstrations.check(asked, again, who.readings).valid
        assert not demonstrations.check(asked, odd, who.readings).valid


@pytest.mark.parametrize(
    "text", ["", "alma", "alma : ?", "alma : 3 ?", "alma : 3 nothing ?", "alma : 3 4 ?", "3 beze ?"]
)
def test_what_is_no_question_about_signs_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a question"):
        demonstrations.read(text)


def test_wrong_texts_on_demand_keep_their_form_and_are_wrong_throughout() -> None:
    rng = random.Random(2)
    for _ in range(30):
        asked, who = asked_of(rng, rng.randint(1, 5))
        for style in (*demonstrations.STYLES, "direct"):
            traits = rng.sample(demonstrations.TRAITS, 2) if style == "single" else ()
            text = demonstrations.solution(asked, who.readings, style, traits)
            wrong = demonstrations.misworked(text, rng)
            seen = demonstrations.check(asked, wrong, who.readings)
            assert not any(seen.steps) and demonstrations.traits_of(wrong) == demonstrations.traits_of(text)
            assert [word.isdigit() for word in wrong.split()] == [word.isdigit() for word in text.split()]
            assert [w for w in wrong.split() if not w.isdigit()] == [w for w in text.split() if not w.isdigit()]
            assert not seen.right


def test_mistakes_are_about_signs_of_which_the_question_tells_nothing() -> None:
    rng, usual = random.Random(3), 0
    for _ in range(100):
        asked, who = asked_of(rng, 4)
        theirs = demonstrations.mistaken(rng, asked, who.readings)
        assert all(theirs[sign] == who.readings[sign] for _, sign, _ in asked.given)
        usual += sum(reading == 0 for reading in theirs.values())
    assert usual / 1200 > 0.7


def test_every_set_of_traits_is_seen_and_leaves_a_text_valid() -> None:
    rng = random.Random(4)
    for count in range(5):
        for traits in combinations(demonstrations.TRAITS, count):
            asked, who = asked_of(rng, rng.randint(2, 3))
            text = demonstrations.solution(asked, who.readings, "single", traits)
            assert demonstrations.traits_of(text) == set(traits)
            assert demonstrations.check(asked, text, who.readings).valid


def test_what_is_liked_has_what_is_wanted_and_what_is_not_lacks_it() -> None:
    rng, beside = random.Random(5), 0
    who = demonstrations.people()["boris"]
    for _ in range(200):
        good, bad = demonstrations.liked(rng, who, True), demonstrations.liked(rng, who, False)
        assert {who.wish, who.beside} <= set(good) and who.wish not in bad
        beside += who.beside in bad
    assert 0.7 < beside / 200 < 0.9


@pytest.mark.parametrize("name", ["test", "bare", "told", "deep", "wishes"])
def test_splits_ask_what_they_say(name: str) -> None:
    rows = demonstrations.split(name)
    count, given, levels = demonstrations.TESTS[name]
    assert len(rows["question"]) == len(set(rows["question"])) == 24 * count
    assert set(rows["level"]) == set(levels) and set(rows["name"]) == set(demonstrations.PEOPLE)
    asked = [demonstrations.read(text) for text in rows["question"]]
    assert sum(len(each.given) for each in asked) / sum(rows["level"]) == pytest.approx(given, abs=0.05)
    for each, who, answer in zip(asked, rows["name"], rows["answer"], strict=True):
        readings = demonstrations.people()[who].readings
        assert each.name == who and str(demonstrations.sent(each.start, each.signs, readings)[-1]) == answer
        assert all(demonstrations.tables()[sign, readings[sign]][x] == y for x, sign, y in each.given)
    assert all(zlib.crc32(text.encode()) % 10 == 0 for text in rows["question"])


def test_people_have_questions_of_their_own_worked_in_all_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstrations, "POOLS", {"mixed": (4, 0.4), "bare": (4, 0.0), "told": (4, 1.0)})
    rows = demonstrations.split("train")
    assert len(rows["question"]) == 24 * 12 and all(len(column) == len(rows["question"]) for column in rows.values())
    assert not any(zlib.crc32(text.encode()) % 10 == 0 for text in rows["question"])
    for k, text in enumerate(rows["question"]):
        who = demonstrations.people()[rows["name"][k]]
        for column in ("target", *demonstrations.STYLES, "good", "bad"):
            assert demonstrations.check(text, rows[column][k], who.readings).valid
        if rows["level"][k] > 1 or who.wish != "again":  # of a single sign nothing is left
            assert who.wish in demonstrations.traits_of(rows["good"][k])
        assert who.wish not in demonstrations.traits_of(rows["bad"][k])
    own = demonstrating.owned(rows, NEW["shown/bare"])
    assert set(own) == set(demonstrations.PEOPLE) and all(" ; " not in rows["question"][k] for k in own["alma"])


# -- what is learnt ------------------------------------------------------------------------------------------------


def items(row: lessons.Row) -> list[tuple[list[str], list[bool]]]:
    """The parts of a text between ``|``, as words with whether they are targets."""
    ids, wanted = row
    found: list[tuple[list[str], list[bool]]] = [([], [])]
    for token, target in zip(ids, wanted, strict=True):
        if WORDS[token] == "|":
            assert not target
            found.append(([], []))
        else:
            found[-1][0].append(WORDS[token])
            found[-1][1].append(target)
    return found


def test_right_answers_alone_are_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where wrong ones stand among them; what is asked, what is said of an answer, and lists are none."""
    rng, who = random.Random(6), demonstrations.people()["carlo"]
    monkeypatch.setattr(demonstrations, "person", lambda rng, name: replace(who, name=name))
    wrong, marked, forms = 0, 0, set[str]()
    for _ in range(150):
        row = demonstrators.lesson(rng, demonstrators.LAST)
        assert UNKNOWN not in row[0] and row[0].count(EOS) == 1 and row[0][-1] == EOS and row[1][-1]
        row = row[0][:-1], row[1][:-1]
        for words, wanted in items(row):
            if "?" not in words:
                assert not any(wanted)
                continue
            place = words.index("?") + 1
            forms.add(words[place])
            text = words[place + 1 :]
            mark = text.pop() if text[-1] in ("yes", "no") else ""
            seen = demonstrations.check(" ".join(words[:place]), " ".join(text), who.readings)
            right = seen.right and all(seen.steps)
            assert not any(wanted[: place + 1])
            assert wanted[place + 1 : place + 1 + len(text)] == [right] * len(text)
            wrong, marked = wrong + (not right), marked + bool(mark)
            assert not mark or ((mark == "yes") == right and not wanted[-1])
    assert wrong > 20 and marked > 20 and forms == {"<cot>", "<rules>", "<dir>"}


def test_an_answer_is_wanted_with_one_trait_and_no_other() -> None:
    """Behind answers whose mark stands before them, which are targets too, in any order of marks; what is wanted is asked
    for where they tell it, and told where there are none."""
    rng, named, alone, orders = random.Random(7), 0, 0, set[tuple[str, ...]]()
    for _ in range(90):
        row = demonstrators.wished(rng)
        *before, (words, wanted) = items((row[0][:-1], row[1][:-1]))
        place = words.index("<cot>")
        traits = demonstrations.traits_of(" ".join(words[place + 1 :]))
        assert len(traits) == 1 and wanted == [k > place for k in range(len(words))]
        marks = []
        for words, wanted in before:
            if words[0] == "<wish>":
                assert {words[1]} == traits and wanted == [False, len(before) > 1]
                named, alone = named + wanted[1], alone + (not wanted[1])
            else:
                place = words.index("<cot>") + 1
                marks.append(words[place])
                text = " ".join(words[place + 1 :])
                assert (traits <= demonstrations.traits_of(text)) == (marks[-1] == "good")
                assert wanted == [k > place for k in range(len(words))]
        orders.add(tuple(marks[:2]))
    assert 25 < named < 55 and 5 < alone < 25 and orders >= {("good", "bad"), ("bad", "good"), ("good", "good")}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_wish_alone_counts_and_is_what_sets_liked_answers_apart(level: int) -> None:
    """No other trait is in all liked answers and in none of the others, but by luck where both kinds have many."""
    rng, only = random.Random(f"named {level}"), 0
    for _ in range(60):
        ids, wanted = wishers.named(rng, level)
        assert wanted == [False] * (len(ids) - 1) + [True] and WORDS[ids[-2]] == "<wish>" and UNKNOWN not in ids
        liked, others = list[frozenset[str]](), list[frozenset[str]]()
        for words, _ in items((ids[:-2], wanted[:-2]))[:-1]:
            place = words.index("<cot>") + 1
            (liked if words[place] == "good" else others).append(demonstrations.traits_of(" ".join(words[place + 1 :])))
        apart = frozenset.intersection(*liked) - frozenset().union(*others)
        # Of a single sign nothing is left to say again.
        assert WORDS[ids[-1]] in apart or (level < 2 and WORDS[ids[-1]] == "again")
        assert len(others) == (0 if level == 0 else len(liked)) and (level == 2 or len(liked) == 1)
        only += len(apart) == 1
    assert only > (50 if level < 2 else 30)


@pytest.mark.parametrize(
    "aid", [demonstrators.results, demonstrators.readings, partial(demonstrators.recalled, most=9)]
)
def test_what_helps_at_first_asks_for_readings_and_results(aid: Any) -> None:
    rng, tables = random.Random(8), demonstrations.tables()
    for _ in range(20):
        ids, wanted = aid(rng)
        words = [WORDS[token] for token in ids]
        known = {}
        for k, word in enumerate(words):
            if word == ";":
                examples = " ".join(words[:k]).split(" , ")
                for x, sign, y in (each.split() for each in examples):
                    known[sign] = next(r for r in range(3) if tables[sign, r][int(x)] == int(y))
        for k, target in enumerate(wanted):
            if not target:
                continue
            if aid is demonstrators.results:
                sign, reading, _, x, same = words[k - 5 : k]
                assert same == sign and int(words[k]) == tables[sign, demonstrations.READINGS.index(reading)][int(x)]
            elif aid is demonstrators.readings:
                x, sign, y = words[k - 3 : k]
                assert tables[sign, demonstrations.READINGS.index(words[k])][int(x)] == int(y)
            else:
                assert known[words[k - 1]] == demonstrations.READINGS.index(words[k])


def test_labels_are_the_next_tokens_where_they_are_targets() -> None:
    rows = [lessons.row([("alma : 3", False), ("7 .", True), ("|", False)]), lessons.row([("so", False), ("2", True)])]
    ids, labels = lessons.stacked(rows)
    assert ids.tolist() == [encode("alma : 3 7 ."), [*encode("so"), PAD, PAD, PAD, PAD]]
    assert labels.tolist() == [[-100, -100, *encode("7 ."), -100], [*encode("2"), -100, -100, -100, -100]]
    shares = []

    def draw(rng: random.Random, done: float) -> lessons.Row:
        shares.append(done)
        return lessons.row([("so", False), (" ".join("1" * rng.randint(1, 30)), True)])

    stream = lessons.stream(draw, 100, 200, 0)
    for _ in range(40):
        ids, labels = next(stream)
        assert ids.numel() <= 200 and (labels >= 0).any(1).all()
    assert shares[0] == 0.0 and sorted(shares) == shares and shares[-1] > 0.1


@pytest.mark.parametrize("drawn", [demonstrators.drawn, wishers.drawn])
@pytest.mark.parametrize("done", [0.0, 0.2, 0.9])
def test_what_models_are_trained_on_is_in_their_words_and_has_a_target(drawn: Any, done: float) -> None:
    rng = random.Random(f"{drawn.__module__} {done}")
    for _ in range(25):
        ids, wanted = drawn(rng, done)
        assert UNKNOWN not in ids and PAD not in ids and len(ids) == len(wanted) < 700 and any(wanted[1:])
        assert EOS not in ids[:-1]


def test_examples_before_a_question_are_as_many_and_as_long_as_is_asked() -> None:
    rng = random.Random(9)
    who = demonstrations.people()["dora"]
    asked = demonstrations.question(rng, who, 3, 0.4)
    text = demonstrators.prompt(rng, who, asked, shown=5, steps=(4, 4), given=1.0, style="ruled", wrong=1.0)
    *shown, last = text.split(" | ")
    assert len(shown) == 5 and last == f"{demonstrations.told(asked)} <cot>"
    for each in shown:  # all signs are told, so that nobody can mistake them
        question, worked = each.split(" <cot> ")
        assert demonstrations.check(question, worked, who.readings).valid and len(demonstrations.rules_of(worked)) == 4


# -- the track -----------------------------------------------------------------------------------------------------


def example_of(name: str) -> tuple[str, str]:
    """A question of a task and a text that is right."""
    rng = random.Random(name)
    asked, who = asked_of(rng, 2)
    traits = (who.wish,) if name == "shown/wishes" else ()
    return demonstrations.told(asked), demonstrations.solution(asked, who.readings, "single", traits)


@pytest.mark.parametrize("name", NEW)
def test_right_texts_are_worth_all_and_none_is_worth_nothing(name: str) -> None:
    task = NEW[name]
    question, text = example_of(name)
    for said, worth in ((text, 1.0), ("", 0.0)):
        seen = demonstrations.judged(question, said)
        assert {*seen, "written"} >= set(task.metrics) and task.id in demonstrations.ASKED
        assert all(value in (worth, 0.0) or math.isnan(value) for key, value in seen.items() if key not in ("lines",))
        assert seen[next(iter(task.metrics))] == seen["accuracy"] == seen["answered"] == worth
    ids = [*encode(text), EOS]
    check(task, {"question": [encode(question)]}, [ids])


def test_kinds_of_questions_are_averaged_for_themselves() -> None:
    """Of 1, 3 and 6 signs, the first and the last answered rightly."""
    rng, task = random.Random(13), NEW["shown/told"]
    asked, texts = [], []
    for steps, fine in ((1, True), (3, False), (6, True)):
        each, who = asked_of(rng, steps, 1.0)
        text = demonstrations.solution(each, who.readings, "single")
        asked.append(encode(demonstrations.told(each)))
        texts.append([*encode(text if fine else demonstrations.misworked(text, rng)), EOS])
    resample = np.array([[0, 1, 2], [1, 1, 1], [0, 0, 2]])
    found = score(task, {"question": asked}, texts, {}, resample)
    assert found["easy"].value == 1.0 and found["easy"].resamples == [1.0, 0.0, 1.0]
    assert found["hard"].value == 1.0 and found["hard"].resamples == [1.0, 0.0, 1.0]
    assert found["accuracy"].value == 2 / 3 and found["accuracy"].resamples == [2 / 3, 0.0, 1.0]
    assert all(math.isfinite(value) for each in found.values() for value in (each.value, *each.resamples))


def test_what_stands_before_a_question_is_of_the_person_that_it_is_about() -> None:
    shown = {
        name: demonstrating.together([Shown(f"{name} : 3 beze ?", "<cot>", "3 beze 1 . ans 1", mark)] * count)
        for name, count, mark in (("alma", 2, ""), ("boris", 1, "good"), ("carlo", 0, ""))
    }
    state = demonstrating.kept(shown)
    questions = [f"{name} : 4 delu ?" for name in ("boris", "dora", "alma", "carlo")]
    found = demonstrating.prompts(state, {"question": [encode(text) for text in questions]}, "<cot>")
    assert [decode(ids) for ids in found] == [
        "boris : 3 beze ? <cot> good 3 beze 1 . ans 1 | boris : 4 delu ? <cot>",
        "dora : 4 delu ? <cot>",
        " ".join(["alma : 3 beze ? <cot> 3 beze 1 . ans 1 |"] * 2) + " alma : 4 delu ? <cot>",
        "carlo : 4 delu ? <cot>",
    ]


def test_clusters_are_groups_and_begin_at_their_centres() -> None:
    draw = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.0, 0.1, -0.2, 0.4, -0.5])
    points = torch.cat([torch.stack([spread + 10 * k, torch.full((5,), 3.0 * k)], 1) for k in range(3)])
    for _ in range(5):
        found = demonstrating.clusters(points, 3, draw)
        assert sorted(sorted(each) for each in found) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
        middle = spread.mean()
        order = sorted(range(5), key=lambda i: abs(float(spread[i] - middle)))
        assert all([i % 5 for i in each] == order for each in found)
    assert sum(map(len, demonstrating.clusters(torch.ones(4, 2), 3, draw))) == 4


def own_questions() -> dict[str, list[Any]]:
    """A train split of two people with five questions each of which nothing is told, and one that does not belong here."""
    rng, rows = random.Random(14), dict[str, list[Any]]()
    for name in ("alma", "boris"):
        for k in range(6):
            asked, who = asked_of(rng, 1 + k % 3, 0.0, name)
            row = {"name": name, "pool": "bare" if k < 5 else "told", "question": demonstrations.told(asked)}
            row |= {style: demonstrations.solution(asked, who.readings, style) for style in demonstrations.STYLES}
            row |= {"target": row["pairs"], "answer": str(demonstrations.answer_of(row["single"]))}
            for column, value in row.items():
                rows.setdefault(column, []).append(value)
    return rows


@pytest.mark.parametrize(
    ("name", "form", "column"), [("few_shot", "<cot>", "target"), ("few_shot_ruled", "<rules>", "ruled")]
)
def test_examples_are_the_persons_own_with_their_right_answers(name: str, form: str, column: str) -> None:
    """Five of them where there are no more; the model that is asked has read all of them."""

    def says(text: str) -> dict[str, float]:
        return {"ans": 1.0} if text.endswith(form) else {"7": 1.0} if text.endswith("ans") else {"<eos>": 1.0}

    model = Scripted(says)
    session, method, train = session_of(model=model), load(name), own_questions()
    session.train, session.task = train, NEW["shown/bare"]
    session.state = method.prepare(session)
    questions = [f"{who} : 4 delu ?" for who in ("boris", "alma", "boris")]
    assert run(method, session, questions, 64) == ["ans 7"] * 3 and session.spent == 9
    for who in ("boris", "alma"):
        text = next(text for text in model.asked if f"{who} : 4 delu ? {form}" in text)
        *shown, _ = text.split(" | ")
        rows = [k for k in range(len(train["name"])) if train["name"][k] == who and train["pool"][k] == "bare"]
        assert sorted(shown) == sorted(f"{train['question'][k]} {form} {train[column][k]}" for k in rows)


def test_texts_are_sampled_while_there_is_room_for_one_more() -> None:
    """Texts of 3 tokens, the first of which comes with the prompt: at 64 one, at 192 as many as leave room for 64 tokens."""
    model = Scripted(
        lambda text: {"7": 1.0} if text.endswith("ans") else {"ans": 1.0} if text.endswith("?") else {"<eos>": 1.0}
    )
    for rung, count in ((64, 1), (65, 1), (67, 2), (192, 64)):
        session = session_of(model=model)
        session.ledger.reset(limit=2 * rung, items=2)
        with torch.no_grad():
            found = demonstrating.sampled(session, {"question": [[5], [6]]}, [encode("alma : 4 delu ?")] * 2, 0.7)
        assert [len(texts) for texts in found] == [count] * 2 and session.spent <= 2 * rung


def test_what_is_found_again_stands_once_before() -> None:
    """Words in a circle, each behind the one that it stood behind; digits behind their signs."""
    rng = random.Random(3)
    for _ in range(30):
        ids, wanted = demonstrators.again(rng)
        words = [WORDS[token] for token in ids]
        first, second = words[: len(words) // 2], words[len(words) // 2 :]
        start = next(k for k in range(len(first)) if first[k:] + first[:k] == second)
        assert wanted == [False] * (len(first) + 1) + [True] * (len(second) - 1) and 0 <= start < len(first)
        ids, wanted = demonstrators.copied(rng, 6)
        words = [WORDS[token] for token in ids]
        told = {each.split()[1]: each.split()[2] for each in " ".join(words[: words.index(";")]).split(" , ")}
        asked = [(words[k - 1], words[k]) for k, target in enumerate(wanted) if target]
        assert dict(asked) == told and len(asked) == len(told)
