"""Analyses of sampling and verifying: what is returned and paid for, by models and verifiers known exactly."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tests.rigs.reasoning import Judge, Scripted, load, module_of, run, session_of, tiny

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, encode
from stepmark.tracks.reasoning.solve import TASKS, check, score

torch.set_num_threads(1)

QUESTION = "tom has 3 pears . tom finds 4 pears . how many pears does tom have ?"


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


# -- bag of tricks ----------------------------------------------------------------------------------------------------

STEPS = {"3 + 4 = 7 . ans 7": 0.3, "3 + 4 = 8 . ans 8": 0.45, "4 - 3 = 1 . ans 1": 0.25}


def warmed(chances: dict[str, float], temperature: float = 0.7) -> dict[str, float]:
    """What a model must say so that texts drawn at a temperature have these chances."""
    found = {text: chance**temperature for text, chance in chances.items()}
    return {text: p / sum(found.values()) for text, p in found.items()}


def texts_by_chance(form: str, chances: dict[str, float]) -> Scripted:
    """A model that draws its whole text with its first word: numbers from 0 on say which one it will be."""
    texts = list(chances)

    def says(text: str) -> dict[str, float]:
        _, there, behind = text.rpartition(form)
        own = behind.split()
        if not there:
            return {}
        if not own:
            return warmed({str(k): chances[each] for k, each in enumerate(texts)})
        words = [*texts[int(own[0])].split(), "<eos>"]
        return {words[len(own) - 1]: 1.0}

    return Scripted(says)


def tricks(
    name: str, judge: Judge | None = None, scores: dict[str, str] | None = None, rung: int = 120
) -> Counter[str]:
    base = texts_by_chance("<cot>", STEPS)

    def says(text: str) -> dict[str, float]:
        if text.endswith("<score>"):
            return {(scores or {})[text.split()[-3]]: 1.0}
        return base.says(text)

    session = session_of(3, model=Scripted(says), **({"outcome": judge} if judge else {}))
    session.state = {"temperature": torch.tensor(0.7), "top_p": torch.tensor(1.0)}
    texts = run(load(name, CHAIN=16), session, [QUESTION] * 8, rung)
    assert session.spent <= 8 * rung
    return Counter(text.rpartition("ans ")[2] for text in texts)


def test_the_judge_chooses_and_without_one_chance_does() -> None:
    likes = Judge(lambda text: 0.9 if text.endswith("ans 1") or "= 1" in text else 0.2)
    assert tricks("itc_bag_of_tricks", likes)["1"] == 8
    assert tricks("itc_self", scores={"7": "3", "8": "2", "1": "9"})["1"] == 8
    assert tricks("itc_exact")["7"] == 8
    assert len(tricks("itc_random")) > 1


def test_the_temperature_is_the_one_at_which_what_is_chosen_is_right_most_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then top-p at that temperature; of equally good ones the larger."""
    module, seen = module_of("itc_bag_of_tricks"), list[tuple[float, float]]()
    right, wrong = ([*encode(text), EOS] for text in ("3 + 4 = 7 . ans 7", "ans 8"))
    share = {(0.7, 1.0): 3, (0.6, 1.0): 3, (0.8, 1.0): 2, (0.7, 0.95): 2, (0.7, 0.9): 4, (0.7, 0.8): 4}

    def fits(session: Any, first: Chains, *args: Any, **kwargs: Any) -> list[list[list[int]]]:
        at = (kwargs["temperature"], kwargs["top_p"])
        seen.append(at)
        return [[right] if k < share.get(at, 1) else [wrong] for k in range(len(first))]

    monkeypatch.setitem(module.tuned_for.__globals__, "texts_that_fit", fits)
    session = session_of(model=tiny(1))
    session.train = {"question": [QUESTION] * 9, "answer": ["7"] * 9}
    found = module.tuned_for(session, "exact", 5)
    assert {name: float(value) for name, value in found.items()} == pytest.approx({"temperature": 0.7, "top_p": 0.9})
    assert [t for t, _ in seen[:6]] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5] and {p for _, p in seen[:6]} == {1.0}
    assert seen[6:] == [(0.7, p) for p in (1.0, 0.95, 0.9, 0.8)]
    assert {name: float(value) for name, value in load("itc_untuned").prepare(session).items()} == {
        "temperature": 1.0, "top_p": 1.0
    }  # fmt: skip
