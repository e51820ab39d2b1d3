"""Exclusion of options: what is told of each, what contradicts, and what is left."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from stepmark.datasets import closed_world, knowledge
from tests.rigs.knowing import gold, judge, some, told, writer
from tests.rigs.reasoning import Scripted, load, run, session_of, tiny

from stepmark.backbones.reasoners import encode

torch.set_num_threads(1)

FACTS = closed_world.world().facts
A = closed_world.KINDS["town"][0]


def verdicts_by(chances: dict[str, tuple[float, float, float]]) -> Scripted:
    """All live in one place; verdicts (impossible, likely, sure) on each option by their chances."""

    def says(text: str) -> dict[str, float]:
        words = text.partition("<exclude>")[2].split()
        if words and words[-1] == "home":
            return {A: 1.0}
        if len(words) > 2 and words[-2] == "home" and words[-3] in chances:
            return dict(zip(("impossible", "likely", "sure"), chances[words[-3]], strict=True))
        return {"<eos>": 1.0}

    return Scripted(says)


def test_the_model_writes_the_elimination_and_its_answer_itself() -> None:
    """The answer is the text's, whatever its relations say; where the rung ends it is cut."""
    question = some("options", 1)[0]
    whole = knowledge.solution(question, "<exclude>").rpartition(" ")[0] + f" {question.others[0]}"
    model = writer(lambda prompt: {whole: 1.0})
    session = session_of(model=model)
    assert run(load("iep_written"), session, told([question]), 32) == [whole] and session.spent == 27
    assert run(load("iep_written"), session, told([question]), 16) == [" ".join(whole.split()[:16])]
    assert model.asked[0] == f"{knowledge.told(question)} <exclude>"


@pytest.mark.parametrize(
    ("chances", "answer"),
    [
        # boris is the surest, but excluded; carlo is the surest of the others, though dora is likelier not excluded
        ({"boris": (0.5, 0.05, 0.45), "carlo": (0.3, 0.35, 0.35), "dora": (0.05, 0.7, 0.25)}, "carlo"),
        # all are excluded: the one of which it is least so
        ({"boris": (0.6, 0.0, 0.4), "carlo": (0.9, 0.05, 0.05), "dora": (0.5, 0.45, 0.05)}, "dora"),
    ],
)
def test_what_contradicts_is_excluded_and_of_the_rest_the_surest_taken(
    chances: dict[str, tuple[float, float, float]], answer: str
) -> None:
    question = "alma mate | boris | carlo | dora | fiona ?"
    session = session_of(model=verdicts_by(chances | {"fiona": (0.8, 0.1, 0.1)}))
    (text,) = run(load("iep_inferential_exclusion"), session, [question], 16)
    assert text.endswith(f"ans {answer}") and session.spent == 9
    for who, own in chances.items():
        verdict = ("impossible", "likely", "sure")[own.index(max(own))]
        assert f"{who} home {A} {verdict} ." in text
    alone = {text.split()[-1] for text in run(load("iep_guess"), session, [question] * 40, 16)}
    assert alone == ({"carlo", "dora"} if answer == "carlo" else {"dora"})
    (text,) = run(load("iep_surest"), session, [question], 16)
    assert text.endswith("ans boris") and session.spent == 9


def test_a_model_that_knows_the_laws_writes_the_whole_elimination() -> None:
    questions = some("options", 12)
    model = writer(lambda prompt: {gold(prompt): 1.0})
    session = session_of(model=model)
    texts = run(load("iep_inferential_exclusion"), session, told(questions), 16)
    assert texts == [knowledge.solution(question, "<exclude>") for question in questions]
    assert [judge(q, text)["relations"] for q, text in zip(questions, texts, strict=True)] == [1.0] * 12
    assert run(load("iep_with_cot"), session, told(questions), 16) == texts and session.spent == 12 * 16
    fact = closed_world.told_facts(knowledge.steps(questions[0]))
    assert f"{fact} -> {knowledge.told(questions[0])} <exclude> {questions[0].subject}" in " | ".join(model.asked)


def test_controls_of_exclusion_leave_out_one_thing_each() -> None:
    """Two of four are excluded by what the model says; at random, each of the four is kept as often as another."""
    question = some("options", 1, level=2)[0]
    model = writer(lambda prompt: {gold(prompt): 1.0})
    session = session_of(3, model=model)
    right, check = knowledge.answer(question), closed_world.CHECKS[question.path[0]]
    fits = [o for o in question.others if FACTS[o, check] == FACTS[question.subject, check]]
    given = Counter(text.split()[-1] for text in run(load("iep_guess"), session, told([question]) * 40, 16))
    assert set(given) == set(fits) and len(fits) == 2 and min(given.values()) > 9
    given = Counter(text.split()[-1] for text in run(load("iep_random"), session, told([question]) * 80, 16))
    assert given[right] == pytest.approx(40, abs=16) and set(given) > {right}
    alone = some("options", 1, level=3)[0]  # one option is left: any of the four
    given = Counter(text.split()[-1] for text in run(load("iep_random"), session, told([alone]) * 80, 16))
    assert given[knowledge.answer(alone)] == pytest.approx(20, abs=13)
    (text,) = run(load("iep_likelihood"), session, told([question]), 16)
    assert text == f"ans {right}" and session.spent == 1


@pytest.mark.parametrize(
    "name",
    "iep_inferential_exclusion iep_written iep_with_cot iep_surest iep_guess iep_random iep_likelihood".split(),
)
def test_every_rung_has_an_answer_and_is_kept(name: str) -> None:
    """Words at random: nothing is a fact, nothing ends."""
    for rung in (16, 64):
        session = session_of(task="know/options", model=tiny(3, depth=1))
        found = run(load(name), session, told(some("options", 2)), rung)
        assert all(len(encode(text)) <= 400 for text in found) and 0 < session.spent <= 2 * rung
