"""Methods of the reasoning track that ask otherwise: backwards, in tables, and step by step with a guidance."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from stepmark.datasets import problems
from tests.rigs.reasoning import Scripted, load, module_of, run, session_of, tiny

from stepmark.backbones.reasoners import decode, encode

torch.set_num_threads(1)

QUESTION = "tom has 3 pears . tom finds 1 4 pears . how many pears does tom have ?"


# -- self-verification ------------------------------------------------------------------------------------------------


def solver(answers: dict[str, float], fair: bool = True) -> Callable[[str], dict[str, float]]:
    """A model that answers at once, each answer with its probability, and works back what X must have been."""

    def says(text: str) -> dict[str, float]:
        if "<find>" in text:
            told = int(text.partition("? ans ")[2].partition(" <find>")[0].replace(" ", ""))
            hidden = told - 14 if "has X" in text else told - 3
            words = ["ans", *str(max(hidden, 0) if fair else 0), "<eos>"]
            return {words[len(text.partition("<find>")[2].split())]: 1.0}
        own = text.partition("<cot>")[2].split()
        if not own:
            return {"ans": 1.0}
        if len(own) == 1:
            return {"1": 1.0}
        return {answer[1]: p for answer, p in answers.items()} if len(own) == 2 else {"<eos>": 1.0}

    return says


def test_the_answer_that_tells_the_question_again_wins() -> None:
    """Seven chains of ten say 18, three 17, which is right: where both were written, 17 is given. Nothing else is spent."""
    for seed in range(6):
        model = Scripted(solver({"18": 0.7, "17": 0.3}))
        session = session_of(seed, model=model)
        (found,) = run(load("self_verification_cot", FORWARD=1.0), session, [QUESTION], 2000)
        # Which candidates there were shows in what was asked backwards.
        tried = {text.partition("? ans ")[2].partition(" <find>")[0] for text in model.asked if "<find>" in text}
        if tried:
            assert tried == {"1 7", "1 8"} and found == "ans 1 7"
            # Two candidates, two numbers, ten texts each: "ans d <eos>" or "ans d d <eos>", a prompt read once.
            words = sum(10 * (len(str(n)) + 1) + 1 for n in (3, 14, 4, 15))
            assert session.spent == 1 + 5 * 3 + words  # five chains of four tokens, the prompt read once
        else:
            assert found in ("ans 1 7", "ans 1 8")
            assert session.spent == 16


def test_both_candidates_are_asked_of_every_number_as_often() -> None:
    model = Scripted(solver({"18": 0.5, "17": 0.5}))
    session = session_of(1, model=model)
    run(load("self_verification_cot", FORWARD=1.0), session, [QUESTION] * 3, 400)
    asked = [text.partition(" <find>")[0] for text in model.asked if text.endswith("<find>")]
    assert {text.partition(" ?")[0] for text in asked} == {
        "tom has X pears . tom finds 1 4 pears . how many pears does tom have",
        "tom has 3 pears . tom finds X pears . how many pears does tom have",
    }
    assert len({asked.count(text) for text in set(asked)}) == 1


def test_where_nothing_is_found_again_the_first_candidate_stays() -> None:
    firsts = set()
    for seed in range(8):
        model = Scripted(solver({"18": 0.5, "17": 0.5}, fair=False))
        session = session_of(seed, model=model)
        (found,) = run(load("self_verification_cot", FORWARD=1.0, TIMES=1), session, [QUESTION], 2000)
        written = [text for text in model.asked if text.endswith(("ans 1 7", "ans 1 8"))]
        assert written[0].endswith(found)
        firsts.add(found)
    assert len(firsts) == 2


def test_a_small_rung_has_fewer_chains_and_half_of_it_goes_backwards() -> None:
    """Chains of 64 tokens that never end, while half of the rung is unspent: 1, 1, 2, 4, 5 of them."""
    for rung, count in ((32, 1), (100, 1), (130, 2), (500, 4), (1024, 5)):
        model = Scripted(lambda text: {"1": 1.0})
        session = session_of(model=model)
        run(load("self_verification_cot"), session, ["?"], rung)
        assert session.spent == 1 + count * (min(64, rung - 1) - 1)


def test_a_question_backwards_is_the_one_that_the_model_was_trained_with() -> None:
    names = module_of("self_verification_cot")
    rng = random.Random(0)
    for _ in range(40):
        question = problems.problem(rng, rng.randint(1, 5))
        ids, words = encode(question), question.split()
        found = names.places(ids)
        assert [(place.start, place.stop - place.start) for place in found] == problems.places(question)
        for number, place in enumerate(found):
            prompt = decode(names.backward(ids, place, encode("4 2")))
            assert prompt == problems.asked_back(question, number, 42) and "".join(words[place]).isdigit()


def test_controls_choose_by_votes_likelihood_or_a_coin() -> None:
    model = Scripted(solver({"18": 0.7, "17": 0.3}))
    session = session_of(0, model=model)
    votes, likely, coins = (
        run(load(f"self_verification_{choice}", FORWARD=1.0), session, ["?"] * 80, 500)
        for choice in ("vote", "likelihood", "coin")
    )
    assert not any("<find>" in text for text in model.asked)
    share = [sum(text == "ans 1 8" for text in texts) / len(texts) for texts in (votes, likely, coins)]
    # Five draws: a majority of 18s 0.84, at least one of them 0.998, a coin where both are there.
    both = 1 - 0.7**5 - 0.3**5
    assert share[0] == pytest.approx(0.837, abs=0.14)
    assert share[1] > 0.96
    assert share[2] == pytest.approx(0.7**5 + both / 2, abs=0.16)
    found = run(load("self_verification_exact", FORWARD=1.0), session, [QUESTION] * 80, 500)
    assert sum(text == "ans 1 7" for text in found) / 80 == pytest.approx(1 - 0.7**5, abs=0.12)


# -- tables -----------------------------------------------------------------------------------------------------------

ROW = "| 1 | finds | 3 + 1 4 | 1 7"


def tabulator(rows: int, end: str) -> Scripted:
    """A model that writes so many rows and then `end`, and answers 17 behind a whole row, 0 behind anything else."""

    def says(text: str) -> dict[str, float]:
        table, there, answer = text.partition("<table>")[2].partition(" ans")
        if there:
            full = [*("1 7" if table.endswith(" 1 7") else "0").split(), "<eos>"]
            return {full[len(answer.split())]: 1.0}
        words = [*(" ".join([ROW] * rows)).split(), end]
        return {words[len(table.split())]: 1.0}

    return Scripted(says)


def test_the_answer_is_asked_for_where_the_table_gives_none() -> None:
    """Ended without an answer, or cut by the rung: the end is taken away, "ans" put in from outside, the answer written."""
    session = session_of(model=tabulator(2, "<eos>"))
    assert run(load("tab_cot"), session, [QUESTION], 200) == [f"{ROW} {ROW} ans 1 7"]
    assert session.spent == 24 + 1 + 3
    assert run(load("tab_cot"), session, [QUESTION], 12 + 4) == [f"{ROW} ans 1 7"]
    assert session.spent == 12 + 3
    assert run(load("tab_cot"), session, [QUESTION], 11 + 4) == [f"{ROW.removesuffix(' 7')} ans 0"]


def test_a_table_with_its_answer_is_written_as_in_one_call() -> None:
    model = tabulator(2, "ans")
    session = session_of(model=model)
    found = run(load("tab_cot"), session, [QUESTION, QUESTION], 200)
    spent = session.spent
    assert found == run(load("chain_of_thought", form="<table>"), session, [QUESTION, QUESTION], 200)
    assert found == [f"{ROW} {ROW} ans 1 7"] * 2 and spent == session.spent == 2 * (24 + 1 + 3)


def test_tables_vote() -> None:
    """One table in three is right: the vote follows the rest. A rung of 100 tokens each has room for one."""

    def says(text: str) -> dict[str, float]:
        table, there, answer = text.partition("<table>")[2].partition(" ans")
        if there:
            return {"7" if "finds" in table else "8": 1.0} if not answer.strip() else {"<eos>": 1.0}
        return {"finds": 0.3, "loses": 0.7} if not table.strip() else {"ans": 1.0}

    short, session = "? ", session_of(3, model=Scripted(says))
    texts = run(load("tab_cot_vote", ROOM=40), session, [short] * 20, 150)
    assert sum(text == "loses ans 8" for text in texts) >= 19
    alone = run(load("tab_cot_vote", ROOM=40), session, [short] * 40, 42)
    assert 4 <= sum(text == "finds ans 7" for text in alone) <= 20
    assert session.spent == 4 * 40


# -- guidance ---------------------------------------------------------------------------------------------------------

DUE = ("finds", "loses", "done")
SOLVES = {"finds": "3 + 4 = 7 .", "loses": "7 - 2 = 5 .", "done": "ans 5 <eos>"}


def guided() -> Scripted:
    """A model that says what is due by the number of steps done, and works whatever the guidance says."""

    def says(text: str) -> dict[str, float]:
        steps, _, asked = text.partition("<guided>")[2].partition("<next>")
        reply, step, written = asked.partition("<step>")
        if not step:
            words = [DUE[min(steps.count("."), 2)], "<step>"]
            return {words[len(reply.split())]: 1.0}
        words = SOLVES[reply.strip()].split()
        return {words[len(written.split())]: 1.0}

    return Scripted(says)


def test_a_step_goes_by_its_guidance_which_is_then_forgotten() -> None:
    model = guided()
    session = session_of(model=model)
    assert run(load("step_guided_reasoning"), session, [QUESTION], 200) == ["3 + 4 = 7 . 7 - 2 = 5 . ans 5"]
    assert session.spent == 2 + 6 + 2 + 6 + 2 + 3  # "kind <step>", then the step
    assert all(text.count("<next>") == 1 and text.count("<step>") <= 1 for text in model.asked if "<next>" in text)
    assert f"{QUESTION} <guided> 3 + 4 = 7 . <next>" in model.asked


def test_guidance_of_others_is_followed_and_nobody_keeps_his_own() -> None:
    """Two questions of which one is told that it is done: its neighbour answers in its place."""

    def says(text: str) -> dict[str, float]:
        if "<next>" in text and "<step>" not in text and "has 3" in text:
            reply = text.partition("<next>")[2].split()
            return {["done", "<step>"][len(reply)]: 1.0}
        return guided().says(text)

    questions = [QUESTION, QUESTION.replace("3", "6")]
    session = session_of(model=Scripted(says))
    first, second = run(load("step_guided_shuffled"), session, questions, 200)
    assert second == "ans 5" and first.startswith("3 + 4 = 7 .")
    first, second = run(load("step_guided_reasoning"), session, questions, 200)
    assert first == "ans 5" and second == "3 + 4 = 7 . 7 - 2 = 5 . ans 5"


NAMES = (
    "self_verification_cot", "self_verification_coin", "self_verification_likelihood", "self_verification_vote",
    "self_verification_exact", "tab_cot", "tab_cot_prose", "tab_cot_vote", "tab_cot_prose_vote", "step_guided_reasoning",
    "step_guided_shuffled",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_rung_has_an_answer_and_is_kept(name: str) -> None:
    for rung in (1, 2, 5, 40):
        session = session_of(model=tiny(3))
        found = run(load(name), session, [QUESTION, "anna has 4 coins . how many coins does anna have ?"], rung)
        assert len(found) == 2 and all(len(encode(text)) <= 400 for text in found)
        assert session.spent <= 2 * rung
    assert decode(encode(QUESTION)) == QUESTION
