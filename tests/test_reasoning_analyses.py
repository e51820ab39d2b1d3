"""Analyses of sampling and verifying: what is accepted, returned and paid for, by models and verifiers known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.rigs.reasoning import Judge, Scripted, load, run, session_of

from stepmark.backbones.reasoners import EOS, encode
from stepmark.tracks.reasoning import TASKS, check, judged, score

torch.set_num_threads(1)

QUESTION = "tom has 3 pears . tom finds 4 pears . how many pears does tom have ?"
SHORT = "tom"  # scripted models answer whatever is asked
CHANCES = {"7": 0.4, "8": 0.3, "9": 0.3}  # right, wrong but accepted, wrong and rejected


def answers(text: str) -> dict[str, float]:
    """``3 . ans 7``, or another answer, at temperature 0.7 with the chances above."""
    own = text.partition("<cot>")[2].split()
    if len(own) < 3:
        return {["3", ".", "ans"][len(own)]: 1.0}
    warmed = {word: chance**0.7 for word, chance in CHANCES.items()}
    return {word: p / sum(warmed.values()) for word, p in warmed.items()} if own[-1] == "ans" else {"<eos>": 1.0}


def fooled(text: str) -> float:
    return 0.1 if "ans 9" in text else 0.8


def test_more_attempts_are_answered_more_often_and_no_better() -> None:
    """TP / (TP + FP) = 4/7 of what is accepted is right at any rung; 1 - 0.3^K of the questions are answered."""
    method, count = load("inference_scaling_flaws", CHAIN=5), 400
    for rung, attempts in ((5, 1), (10, 2), (14, 3)):  # a row for the prompt, four for a chain of five tokens
        session = session_of(rung, small=Scripted(answers), outcome=Judge(fooled))
        found = run(method, session, [SHORT] * count, rung)
        said = [text for text in found if text]
        assert set(said) <= {"3 . ans 7", "3 . ans 8"}
        assert len(said) / count == pytest.approx(1 - 0.3**attempts, abs=0.06)
        assert said.count("3 . ans 7") / len(said) == pytest.approx(4 / 7, abs=0.07)
        assert session.spent <= rung * count


def test_what_is_paid_and_what_ends_the_attempts() -> None:
    """Rows: a prompt once, then tokens less one an attempt; a question that is answered stops costing."""
    session = session_of(small=Scripted(answers), outcome=Judge(lambda text: 0.9))
    run(load("inference_scaling_flaws", CHAIN=5), session, [SHORT] * 4, 100)
    assert session.spent == 4 * 5 and session.ledger.entries["outcome"].rows == 4
    never = session_of(small=Scripted(answers), outcome=Judge(lambda text: 0.5))
    assert run(load("inference_scaling_flaws", CHAIN=5), never, [SHORT] * 4, 23) == [""] * 4  # 0.5 is not above 0.5
    assert never.spent == 4 * (1 + 5 * 4) and never.ledger.entries["outcome"].rows == 4 * 5


def test_controls_accept_what_they_should() -> None:
    roles = {"small": Scripted(answers), "model": Scripted(answers), "large": Scripted(answers)}

    def one(name: str, count: int = 200, **judges: Judge) -> list[str]:
        session = session_of(1, **roles, **judges)
        return run(load(name, CHAIN=5), session, [SHORT] * count, 60)

    for name in ("single_small", "single_model", "single_large"):
        found = one(name)
        assert [found.count(f"3 . ans {n}") / 200 for n in "789"] == pytest.approx([0.4, 0.3, 0.3], abs=0.1)
    coin = one("coin_resampling")
    assert coin.count("3 . ans 7") / 200 == pytest.approx(0.4, abs=0.1) and "" not in coin
    strict = one("strict_resampling", 20, outcome=Judge(lambda text: 0.95 if "ans 9" in text else 0.85))
    assert set(strict) == {"3 . ans 9"}


def test_of_a_process_verifier_the_worst_step_counts() -> None:
    """At its full stop, whichever step it is, and not what is said of the answer."""

    def says(text: str) -> dict[str, float]:
        own = text.partition("<cot>")[2].split()
        return {[*"3 . 4 . ans 7 <eos>".split()][len(own)]: 1.0}

    def judge(*steps: float) -> Judge:
        return Judge(lambda text: steps[text.count(".") - 1] if text.endswith(".") else 0.5 + 0.4 * (min(steps) < 0.5))

    for steps, accepted in (((0.9, 0.9), True), ((0.9, 0.1), False), ((0.1, 0.9), False)):
        session = session_of(small=Scripted(says), process=judge(*steps))
        found = run(load("process_resampling"), session, [SHORT] * 2, 40)
        assert found == (["3 . 4 . ans 7"] * 2 if accepted else [""] * 2)


def test_a_cut_chain_is_no_answer() -> None:
    endless = Scripted(lambda text: {"3": 1.0})
    session = session_of(large=endless)
    assert run(load("single_large"), session, [SHORT], 30) == [""] and session.spent == 30


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 . ans 7", True),
        ("ans 4 2", True),
        ("ans 1 2 3 4 5", False),
        ("ans 4 so", False),
        ("ans", False),
        ("3 .", False),
    ],
)
def test_what_is_accepted_is_what_is_counted_as_answered(text: str, number: bool) -> None:
    """A text whose answer is no number is not accepted, whatever a verifier says, as the metric does not count it."""
    words = [*text.split(), "<eos>"]
    model = Scripted(lambda said: {words[len(said.partition("<cot>")[2].split())]: 1.0})
    session = session_of(small=model, outcome=Judge(lambda said: 0.9))
    assert run(load("inference_scaling_flaws"), session, [SHORT], 64) == [text if number else ""]
    assert judged(TASKS[0], QUESTION, text)["answered"] == float(number)


def test_shares_and_utility_are_read_off_the_recorded_metrics() -> None:
    """Of ten questions five are answered rightly and three wrongly: utility is 0.5 - 0.3 c."""
    outputs = [[*encode("3 + 4 = 7 . ans 7"), EOS]] * 5 + [[*encode("ans 4 2"), EOS]] * 3 + [[EOS]] * 2
    batch = {"question": [encode(QUESTION)] * 10}
    check(TASKS[0], batch, outputs)
    found = {
        name: each.value for name, each in score(TASKS[0], batch, outputs, {}, np.zeros((1, 10), dtype=int)).items()
    }
    assert found["answered"] == pytest.approx(0.8) and found["accuracy"] == pytest.approx(0.5)
    for c in (1, 2):
        utility = (1 + c) * found["accuracy"] - c * found["answered"]
        assert utility == pytest.approx(0.5 - 0.3 * c)
