"""PrOntoQA: grades are those worked out by hand, and each arm does what it is named for."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from stepmark.datasets import deduction
from tests.rigs.reasoning import Scripted, load, module_of, run, session_of, tiny

from stepmark.tracks.reasoning import TASKS

torch.set_num_threads(1)

A, B, C, D, E = deduction.CONCEPTS[:5]

# alma's way: A, B, C. At A nothing else is open, at B a rule that leads nowhere; dora's chain ends in C as well.
FORKED = f"{B} is {C} alma is {A} {B} is {E} dora is {D} {A} is {B} {D} isnt {C} ? alma is {C}"
FIRST, SECOND = f"alma is {A} .", f"{A} is {B} alma is {B} ."
THIRD, ASTRAY, END = f"{B} is {C} alma is {C} .", f"{B} is {E} alma is {E} .", "ans true"


@pytest.mark.parametrize(
    ("text", "steps", "straight", "misled", "valid"),
    [
        (f"{FIRST} {SECOND} {THIRD} {END}", 1, 1, 0, 1),
        (f"{FIRST} {SECOND} {ASTRAY} {THIRD} {END}", 1, 3 / 4, 1, 1),  # it comes back
        (f"{FIRST} {SECOND} {ASTRAY} {END}", 1, 2 / 3, 1, 0),
        (f"dora is {D} . {FIRST} {SECOND} {THIRD} {END}", 1, 3 / 4, 1, 1),  # what is true of another
        (f"{FIRST} {THIRD} {END}", 1 / 2, 1 / 2, 0, 0),  # a hop is skipped
        (f"{FIRST} {THIRD} {SECOND} {ASTRAY} {END}", 3 / 4, 1 / 2, 0, 0),  # astray after an invalid step
        (f"{FIRST} {SECOND} {ASTRAY} {E} is {C} alma is {C} . {END}", 3 / 4, 1 / 2, 1, 0),
        (END, 0, 0, 0, 0),
    ],
)
def test_grades_of_steps_are_those_worked_out_by_hand(
    text: str, steps: float, straight: float, misled: int, valid: int
) -> None:
    found = deduction.judged(FORKED, text)
    assert (found["steps"], found["straight"]) == pytest.approx((steps, straight))
    assert (found["misled"], found["detoured"], found["valid"]) == (misled, misled * valid, valid)


def test_grades_go_by_rules_and_by_statements_that_lead_nowhere() -> None:
    for depth in (1, 3, 5):
        for dead in (2, 4):
            asked = deduction.question(random.Random(depth + dead), depth, dead)
            found = deduction.judged(deduction.told(asked), deduction.solution(asked, "<proof>"))
            there = {name for name, value in found.items() if value == 1 and name.startswith("valid_")}
            assert there == {f"valid_dead{dead}", *({f"valid_depth{depth}"} - {"valid_depth3"})}
            assert sum(value != value for value in found.values()) == 4 - len(there)
    assert {*deduction.judged(FORKED, END), "written"} == {*TASKS[0].metrics}


def test_the_whole_text_is_the_models_and_the_same_as_a_proof_in_one_go() -> None:
    questions = [deduction.told(deduction.question(random.Random(k), 3, 2)) for k in range(3)]
    found = [run(load(name), session_of(model=tiny(4)), questions, 40) for name in ("prontoqa", "chain_of_thought")]
    assert found[0] == found[1] and len(set(found[0])) == 3


def test_where_ways_part_the_step_that_is_put_is_the_proofs_or_another_and_the_model_goes_on() -> None:
    """Up to there both texts are the proof; what is put costs nothing beside the prompt's row."""
    model = Scripted(lambda text: {"<eos>": 1.0})
    straight = f"alma is {A} {A} is {B} dora is {D} {D} isnt {B} {D} is {E} ? alma is {B}"  # alma's way has no fork
    for name, put in (("prontoqa_led", THIRD), ("prontoqa_misled", ASTRAY)):
        session = session_of(model=model)
        assert run(load(name), session, [FORKED, straight], 16) == [f"{FIRST} {SECOND} {put}", ""]
        assert model.asked[-2:] == [f"{FORKED} <proof> {FIRST} {SECOND} {put}", f"{straight} <proof>"]
        assert session.spent == 2


@pytest.mark.parametrize("seed", range(6))
def test_put_steps_are_valid_and_only_one_of_the_two_is_on_the_proof(seed: int) -> None:
    opening = module_of("prontoqa").opening
    asked = deduction.question(random.Random(seed), 3, 6)
    told: Any = module_of("prontoqa").told_proof
    on, off = (deduction.check(asked, told(opening(asked, side))) for side in (True, False))
    assert all(on.steps) and all(on.straight) and all(off.steps)
    assert off.straight == (*on.straight[:-1], False) if on.steps else off.steps == ()


def test_chance_takes_any_valid_step_as_often_and_the_model_gives_the_verdict_alone() -> None:
    def says(text: str) -> dict[str, float]:
        return {"true": 0.6, "false": 0.4} if text.endswith("ans") else {"is": 1.0}

    session = session_of(5, model=Scripted(says))
    found = run(load("prontoqa_random"), session, [FORKED] * 400, 16)
    assert session.spent == 400
    seen = [deduction.check(FORKED, text) for text in found]
    assert all(all(each.steps) for each in seen)
    firsts = Counter(text.partition(" .")[0] for text in found)
    assert {word: n / 400 for word, n in firsts.items()} == pytest.approx(
        {f"alma is {A}": 0.5, f"dora is {D}": 0.5}, abs=0.08
    )
    seconds = Counter(text.split(" . ")[1] for text in found if text.startswith(f"alma is {A} . "))
    assert seconds[f"dora is {D}"] / sum(seconds.values()) == pytest.approx(0.5, abs=0.1)
    for text in found:  # a text ends where the question is settled, and says nothing twice
        clauses = text.removesuffix(" . ans true").split(" . ")
        assert clauses[-1].endswith(f"alma is {C}") and len(set(clauses)) == len(clauses)
        assert not any(clause.endswith(f"alma is {C}") for clause in clauses[:-1])
    assert {each.valid for each in seen} == {True} and {all(each.straight) for each in seen} == {True, False}
