"""Analogies, procedures and programs: each question has one answer, and what is said of a text is so."""

from __future__ import annotations

import math
import random
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from stepmark.datasets import analogies, procedures, traces
from stepmark.datasets.deduction import NAMES

from stepmark.backbones import analogists, proceduralists
from stepmark.backbones.reasoners import EOS, PAD, UNKNOWN, decode, encode
from stepmark.tracks.reasoning import carrying, check, inferring, score
from stepmark.tracks.reasoning.carry import TASKS as CARRY
from stepmark.tracks.reasoning.infer import TASKS as INFER

torch.set_num_threads(1)
NEW = {task.id: task for task in (*INFER, *CARRY)}
DATASETS: dict[str, Any] = {"analogies": analogies, "procedures": procedures, "traces": traces}


# -- analogies -----------------------------------------------------------------------------------------------------


def test_operations_do_what_they_are_called() -> None:
    made = {name: "".join(analogies.applied(tuple("ajc"), name)) for name in analogies.OPERATIONS["letters"]}
    assert made == {"turn": "cja", "up": "bad", "rotate": "jca", "swap": "jac", "double": "ajcc", "drop": "aj"}
    for relation in analogies.OPERATIONS["people"]:
        assert analogies.states(("alma",), (relation,)) == [(analogies.facts()["alma", relation],)]
    assert analogies.states(tuple("ace"), ("drop", "up")) == [("a", "c"), ("b", "d")]


@pytest.mark.parametrize("kind", analogies.KINDS)
def test_pairs_leave_one_answer_and_a_rule_is_no_longer_than_it_must_be(kind: str) -> None:
    rng = random.Random(10)
    rules = analogies.rules(kind)
    names = [(name,) for name in NAMES]
    things = [analogies.thing(rng, kind) for _ in range(40)] if kind == "letters" else names
    effects = {tuple(analogies.states(thing, rule)[-1] for thing in things): rule for rule in reversed(rules)}
    assert len(effects) == len(rules) and [len(rule) for rule in rules] == sorted(len(rule) for rule in rules)
    for number in range(12):
        depth, choice = 1 + number % 3, number % 2 == 0
        asked = analogies.question(rng, kind, depth, choice)
        text = analogies.told(asked)
        rule = analogies.rule_of(text)
        fitting = [each for each in rules if analogies.fits(each, asked.pairs)]
        assert analogies.read(text) == asked and len(rule) == depth == min(map(len, fitting))
        assert {analogies.states(asked.thing, each)[-1] for each in fitting} == {analogies.answer(text)}
        if choice:
            assert len(set(asked.options)) == 4 and analogies.answer(text) in asked.options
        good = analogies.solution(asked, rule, "<rules>")
        assert analogies.check(text, good) == analogies.Checked(True, True, True)
        assert analogies.check(text, f"no {' '.join(rules[0])} . {good}").fits
        assert analogies.check(text, analogies.solution(asked, rule, "<dir>")) == analogies.Checked(True, False, False)
        other = next(each for each in rules if each not in fitting)
        wrong = analogies.check(text, analogies.solution(asked, other, "<rules>"))
        assert not wrong.fits and wrong.carried
        spoilt = good.replace(" . ", " a . ", 1) if kind == "letters" else good.replace(" . ", " . alma . ", 1)
        assert not analogies.check(text, spoilt).carried
        assert UNKNOWN not in encode(f"{text} <rules> {good}")


@pytest.mark.parametrize("text", ["", "a c", "a : c ?", "a : alma ; c ?", "alma boris : a ; c ?", "ac : ca ; c ?"])
def test_what_is_no_analogy_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a question"):
        analogies.read(text)


def test_answers_count_for_their_kind_depth_and_form() -> None:
    """Two letters' rules of one and of three operations, with a choice, and people's of one: the easy ones are right."""
    rng = random.Random(4)
    rows = []
    for kind, depth, choice in (("letters", 1, False), ("letters", 3, True), ("people", 1, False)):
        asked = analogies.question(rng, kind, depth, choice)
        text = analogies.told(asked)
        rule = analogies.rule_of(text) if depth == 1 else ("drop",)
        rows.append(analogies.judged(text, analogies.solution(asked, rule, "<rules>")))
    there = [{name for name, value in row.items() if not math.isnan(value)} for row in rows]
    always = {"accuracy", "answered", "fits"}
    assert there == [{*always, "letters_easy", "free"}, {*always, "letters_hard", "choice"},
                     {*always, "people_easy", "free"}]  # fmt: skip
    assert [row["accuracy"] for row in rows] == [row["fits"] for row in rows] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", analogies.KINDS)
def test_what_a_rule_gives_fits_into_what_is_left_for_it(kind: str) -> None:
    """On one thing alone, and with the rule and its answer behind a question."""
    rng, longest = random.Random(2), 0
    for rule in analogies.rules(kind):
        thing = analogies.thing(rng, kind)
        prompt = decode(inferring.alone(thing, encode(f"{' '.join(rule)} :")))
        assert prompt == f"{' '.join(thing)} ? <rules> {' '.join(rule)} :"
        alone = analogies.Question((), thing)
        text = analogies.solution(alone, rule, "<rules>").partition(": ")[2]
        assert len(encode(text)) + 1 <= inferring.longest(thing) and len(rule) + 1 <= inferring.RULE
        longest = max(longest, len(rule) + 1 + len(encode(text)) + 1)
    assert longest <= 40
    asked = analogies.question(rng, kind, 2, True)
    found = inferring.pairs_of(encode(analogies.told(asked)))
    assert found == [(one, " ".join(other)) for one, other in asked.pairs]


# -- procedures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "solution"),
    [
        ("sort d a c b", "a d c b ; a b d c ; a b c d ; end"),
        ("sort a b", "end"),
        ("rotate 3 a b c", "b c a ; c a b ; a b c ; end"),
        ("delete b b a b", "a b ; a ; end"),
        ("delete b b", "none ; end"),
        ("replace b c b a b", "c a b ; c a c ; end"),
        ("count b a b b", "0 ; 1 ; 2 ; end"),
        ("sum 4 7 9", "1 ; 0 ; end"),
        ("gather a b a c b a", "a a b c b a ; a a a b c b ; a a a b b c ; end"),
        ("edits a b : turn first c last last", "b a ; a ; a c ; a ; none ; end"),
    ],
)
def test_procedures_go_through_the_states_that_were_worked_out_by_hand(prompt: str, solution: str) -> None:
    assert procedures.solution(prompt, "<states>") == solution
    assert procedures.solution(prompt, "<last>") == " ; ".join(solution.split(" ; ")[-2:])


@pytest.mark.parametrize("kind", procedures.KINDS)
def test_a_state_in_the_place_of_the_start_leaves_the_same_to_do(kind: str) -> None:
    rng = random.Random(11)
    for steps in (1, 2, 5, 9, 17, 25):
        asked = procedures.prompt(rng, kind, steps)
        gold = procedures.states(asked)
        assert len(gold) == steps and UNKNOWN not in encode(procedures.solution(asked, "<states>"))
        assert len(procedures.solution(asked, "<states>").split()) <= procedures.LONGEST
        for k in range(steps):
            left = procedures.onward(asked, gold[k])
            assert (left is None) == (kind == "count")
            if left is None:
                break
            assert procedures.states(left) == gold[k + 1 :]
            asked = left


def test_states_are_counted_up_to_the_first_wrong_one() -> None:
    question = "rotate 3 a b c d"
    seen = procedures.judged(question, "b c d a ; c d a a ; d a b c ; end")
    assert (seen["prefix"], seen["accuracy"], seen["valid"], seen["answered"]) == (1 / 3, 1.0, 0.0, 1.0)
    assert seen["prefix_short"] == 1 / 3 and math.isnan(seen["prefix_long"])
    more = procedures.judged(question, "b c d a ; c d a b ; d a b c ; a b c d ; end")
    assert (more["prefix"], more["accuracy"], more["valid"]) == (3 / 4, 0.0, 0.0)
    assert procedures.judged(question, "d a b c ; end")["accuracy"] == 1.0
    endless = procedures.judged(question, "b c d a ; c d a b ; d a b c")
    assert (endless["prefix"], endless["valid"], endless["answered"]) == (1.0, 0.0, 0.0)


def test_lengths_are_short_medium_and_long_as_the_paper_has_them() -> None:
    cells = {2: "short", 6: "short", 7: "medium", 16: "medium", 17: "long", 25: "long"}
    for steps, cell in cells.items():
        asked = procedures.prompt(random.Random(steps), "sum", steps)
        seen = procedures.judged(asked, procedures.solution(asked, "<states>"))
        assert {name for name, value in seen.items() if "_" in name and value == 1.0} == {
            f"accuracy_{cell}", f"prefix_{cell}"}  # fmt: skip


def test_states_one_after_the_other_are_a_text() -> None:
    assert carrying.told(["a b", "b"], True) == [*encode("a b ; b ; end"), EOS]
    assert carrying.told(["a b", "b"], False) == encode("a b ; b")
    assert carrying.told([], False) == [EOS] and carrying.told([], True) == [*encode("end"), EOS]


# -- programs ------------------------------------------------------------------------------------------------------


def test_statements_do_what_they_say_and_a_line_is_told_of_each() -> None:
    program = ("x = 3 ; y = x + 1 2 ; l = 2 , 5 ; push l y ; z = l at 3 ; pop l ; if x > 3 do x = x - 1 done ; "
               "if x < 4 do x = x - 1 done ; while x < 6 do x = x + 2 done ; push l 4 ; m = 7 ; pop m")  # fmt: skip
    lines, values = traces.run(program)
    assert lines == ["x 3", "y 1 5", "l 2 , 5", "l 2 , 5 , 1 5", "z 1 5", "l 2 , 5", "x 2", "x 4", "x 6",
                     "l 2 , 5 , 4", "m 7", "m none"]  # fmt: skip
    assert values == {"x": 6, "y": 15, "l": [2, 5, 4], "z": 15, "m": []}
    assert traces.solution(program, "l", "<last>") == "ans 2 , 5 , 4"


@pytest.mark.parametrize(
    "program",
    [
        "x = 1 ; x = x - 2",
        "x = 9 9 ; x = x + 1",
        "x = y",
        "pop l",
        "l = 1 ; x = l at 2",
        "x = l + 1",
        "x = 1 ; while x < 2 do x = 1 done",
    ],
)
def test_what_cannot_be_carried_out_is_stuck(program: str) -> None:
    with pytest.raises(traces.Stuck):
        traces.run(program)


def test_programs_have_as_many_lines_as_they_are_asked_for() -> None:
    rng = random.Random(12)
    for lines in (2, 3, 7, 12, 18, 24):
        for _ in range(4):
            source = traces.program(rng, lines)
            trace, values = traces.run(source)
            name = rng.choice(sorted(values))
            text = traces.solution(source, name, "<trace>")
            assert len(trace) == lines and traces.check(f"{source} ? {name}", text) == (lines, lines, True)
            assert UNKNOWN not in encode(f"{source} ? {name} <trace> {text}")


# -- what is learnt ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [analogists.drawn, proceduralists.drawn])
@pytest.mark.parametrize("done", [0.0, 0.2, 0.9])
def test_what_models_are_trained_on_is_in_their_words_and_has_a_target(drawn: Any, done: float) -> None:
    rng = random.Random(f"{drawn.__module__} {done}")
    for _ in range(25):
        ids, wanted = drawn(rng, done)
        assert UNKNOWN not in ids and PAD not in ids and len(ids) == len(wanted) < 700 and any(wanted[1:])
        assert EOS not in ids[:-1]


def test_rules_that_are_learnt_fit_and_those_that_are_told_to_have_failed_do_not() -> None:
    rng, longest, failed, alone, direct = random.Random(1), 0, 0, 0, 0
    for _ in range(160):
        ids, wanted = analogists.drawn(rng, 0.9)
        start = wanted.index(True)
        assert wanted == [k >= start for k in range(len(ids))] and ids[-1] == EOS
        prompt, text = decode(ids[:start]), decode(ids[start:-1])
        question, form, given = prompt.partition(" <rules>")
        if not form:
            direct += 1
            question = prompt.removesuffix(" <dir>")
            assert analogies.check(question, text).right and text.startswith("ans ")
        elif given.endswith(":"):
            alone += 1
            asked, rule = analogies.read(question), tuple(given.split()[:-1])
            assert not asked.pairs
            assert f"{given.strip()} {text}" == analogies.solution(asked, rule, "<rules>")
        else:
            assert analogies.check(question, text) == analogies.Checked(True, True, True)
            refused = [tuple(part.split()[1:]) for part in given.split(" .") if part.strip()]
            assert not any(analogies.fits(rule, analogies.read(question).pairs) for rule in refused)
            failed += bool(refused)
            longest = max(longest, len(refused))
    assert failed > 10 and alone > 20 and direct > 20 and longest == 3


def test_problems_that_are_learnt_are_one_kind_to_a_row_and_rightly_solved() -> None:
    rng, kinds = random.Random(3), set[str]()
    for _ in range(120):
        ids, wanted = proceduralists.drawn(rng, 0.5)
        items = decode(ids[:-1]).split(" | ")
        assert 1 <= len(items) <= 3 and ids[-1] == EOS and wanted[-1]
        asked = []
        for item in items:
            form = next(form for form in ("<states>", "<trace>", "<last>") if form in item)
            prompt, text = item.split(f" {form} ") if f" {form} " in item else (item.removesuffix(form), "")
            source, program, name = prompt.partition(" ? ")
            solve = traces.solution(source, name, form) if program else procedures.solution(prompt, form)
            assert text == solve
            asked.append((bool(program), len(encode(text))))
            kinds.add("program" if program else prompt.split()[0])
        assert len({programs for programs, _ in asked}) == 1
        assert sum(wanted) == sum(length for _, length in asked) + 1
    assert kinds == {*procedures.KINDS, "program"}


# -- splits and the track ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASETS)
def test_splits_are_of_the_lengths_and_kinds_that_they_say(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source = DATASETS[name]
    monkeypatch.setattr(source, "SIZES", {"train": 48, "test": 96})
    for split in ("train", "test"):
        rows = source.split(split)
        assert all(len(column) == source.SIZES[split] for column in rows.values())
        for question, prompt, target, answer in zip(
            rows["question"], rows["prompt"], rows["target"], rows["answer"], strict=True
        ):
            assert prompt.startswith(question) and source.judged(question, target)["accuracy"] == 1.0
            assert target.split("ans ")[-1].removesuffix(" ; end").endswith(answer)
            kept = question.partition(" ? ")[0] if name == "traces" else question
            assert (zlib.crc32(kept.encode()) % 10 == 0) == (split == "test")
    levels = [source.split(split)["level"] for split in ("train", "test")]
    if name == "analogies":
        assert all(sorted(each) == [1] * 16 * k + [2] * 16 * k + [3] * 16 * k for k, each in enumerate(levels, 1))
        assert rows["kind"].count("people") == sum(rows["choice"]) == 48
    elif name == "procedures":
        assert max(levels[0]) <= 10 and all(rows["kind"].count(kind) == 12 for kind in procedures.KINDS)
        assert [sum(level in steps for level in levels[1]) for steps in (range(2, 7), range(7, 17), range(17, 26))] == [
            32, 32, 32]  # fmt: skip
    else:
        assert max(levels[0]) <= 12 and sum(level > 12 for level in levels[1]) == 48


def example_of(name: str) -> tuple[str, str]:
    """A question of a task and a text that is right."""
    rng = random.Random(name)
    if name.startswith("infer"):
        given = analogies.question(rng, "letters", 3, False)
        text = analogies.told(given)
        return text, analogies.solution(given, analogies.rule_of(text), "<rules>")
    if name == "carry/procedures":
        text = procedures.prompt(rng, "sort", 20)
        return text, procedures.solution(text, "<states>")
    source = traces.program(rng, 14)
    asked_for = min(traces.run(source)[1])
    return f"{source} ? {asked_for}", traces.solution(source, asked_for, "<trace>")


@pytest.mark.parametrize("name", NEW)
def test_right_texts_are_worth_all_and_none_is_worth_nothing(name: str) -> None:
    task = NEW[name]
    question, text = example_of(name)
    for said, worth in ((text, 1.0), ("", 0.0)):
        source = DATASETS[task.dataset]
        seen = source.judged(question, said)
        assert {*seen, "written"} >= set(task.metrics) and task.id in source.ASKED
        assert all(value in (worth, 0.0) or math.isnan(value) for value in seen.values())
        assert seen[next(iter(task.metrics))] == seen["accuracy"] == seen["answered"] == worth
    ids = [*encode(text), EOS]
    check(task, {"question": [encode(question)]}, [ids])


def test_a_mean_is_over_the_questions_of_its_length() -> None:
    """Of 3, 9 and 20 steps, the first and the last carried out."""
    task, asked, texts = NEW["carry/procedures"], [], []
    for steps, fine in ((3, True), (9, False), (20, True)):
        prompt = procedures.prompt(random.Random(steps), "rotate", steps)
        asked.append(encode(prompt))
        texts.append([*encode(procedures.solution(prompt, "<states>") if fine else "end"), EOS])
    found = score(task, {"question": asked}, texts, {}, np.array([[0, 1, 2], [1, 1, 1], [0, 0, 2]]))
    assert found["accuracy"].value == 2 / 3 and found["accuracy"].resamples == [2 / 3, 0.0, 1.0]
    assert found["prefix_long"].value == 1.0 and found["prefix_long"].resamples == [1.0, 0.0, 1.0]
    assert found["accuracy_medium"].value == 0.0 and found["accuracy_short"].value == 1.0
