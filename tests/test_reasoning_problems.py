"""Word problems and countdown: read, solved and checked exactly; what chooses among chains chooses what it should."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from stepmark.datasets import countdown, long_problems, problems
from tests.rigs.reasoning import Judge, Scripted, load, run, session_of, tiny

from stepmark.backbones.chains import Chains
from stepmark.backbones.graders import Grader
from stepmark.backbones.reasoners import EOS, STOP, Verifier, built, decode, encode
from stepmark.backbones.solvers import auroc
from stepmark.backbones.solvers import judged as judged_example
from stepmark.tracks import reasoning
from stepmark.tracks.reasoning import oracles, populations
from stepmark.tracks.reasoning.solve import TASKS

torch.set_num_threads(1)

FOUR = "tom has 3 pears . tom finds 4 pears . how many pears does tom have ?"


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_every_format_tells_the_same_solution(steps: int) -> None:
    rng = random.Random(steps)
    for _ in range(20):
        question = problems.problem(rng, steps)
        found = problems.read(question)
        assert len(found.steps) == steps
        for form in problems.FORMATS:
            text = problems.solution(question, form, rng)
            assert problems.answer_of(text) == found.answer
            assert "<unk>" not in decode(encode(f"{question} {form} {text}"))
        for form in ("<cot>", "<prose>"):
            assert problems.check(question, problems.solution(question, form)).valid
        assert problems.check(question, problems.as_clauses(problems.solution(question, "<table>"))).valid


def test_gains_and_losses_go_in_any_order_but_not_across_a_multiplication() -> None:
    question = (
        "tom has 9 pears . tom finds 4 pears . tom eats 2 pears . then the pears of tom double . tom finds 1 pears . "
    )
    question += "how many pears does tom have ?"
    told = problems.read(question)
    orders = {tuple(step.right for step in problems.reordered(told, random.Random(seed))) for seed in range(40)}
    assert orders == {(4, 2, 2, 1), (2, 4, 2, 1)}
    assert problems.check(question, "9 - 2 = 7 . 7 + 4 = 1 1 . 1 1 * 2 = 2 2 . 2 2 + 1 = 2 3 . ans 2 3").valid
    early = problems.check(question, "9 * 2 = 1 8 . 1 8 + 4 = 2 2 . 2 2 - 2 = 2 0 . 2 0 + 1 = 2 1 . ans 2 3")
    assert early.right and not early.valid and not early.steps[0]
    twice = problems.check(question, "9 + 4 = 1 3 . 1 3 + 4 = 1 7 . 1 7 * 2 = 3 4 . 3 4 + 1 = 3 5 . ans 2 3")
    assert twice.steps == (True, False, False, False)
    for seed in range(60):
        rng = random.Random(seed)
        asked = problems.problem(rng, 5)
        for form in ("<cot>", "<prose>"):
            assert problems.check(asked, problems.solution(asked, form, rng)).valid
        assert problems.check(asked, problems.as_clauses(problems.solution(asked, "<table>", rng))).valid


def test_wrong_steps_are_seen_wherever_they_stand() -> None:
    rng = random.Random(0)
    for _ in range(100):
        question = problems.problem(rng, rng.randint(2, 5))
        steps = list(problems.read(question).steps)
        k = rng.randrange(len(steps))
        for wrong in (problems.slip(steps[k], rng), problems.misread(question, steps[k:], rng)):
            if wrong is None:
                continue
            told = [*steps[:k], wrong, *steps[k + 1 :]]
            text = " ".join([*(f"{step.clause} ." for step in told), "ans", problems.spaced(steps[-1].result)])
            seen = problems.check(question, text)
            assert seen.right and not seen.valid and [i for i, fine in enumerate(seen.steps) if not fine] == [k]
        short = problems.check(question, " ".join(f"{step.clause} ." for step in steps[:-1]))
        assert not short.right and not short.valid and all(short.steps)


def test_a_hidden_number_follows_from_the_rest_and_the_answer() -> None:
    rng = random.Random(1)
    for _ in range(100):
        question = problems.problem(rng, rng.randint(1, 5))
        for number, (start, length) in enumerate(problems.places(question)):
            words = question.split()
            back = problems.backward(question, number)
            if back is not None:
                assert problems.answer_of(back) == int("".join(words[start : start + length]))
                assert all(problems.worked(a, sign, b) == c for a, sign, b, c in problems.clauses(back))
            assert "X" in problems.masked(question, number).split()


@pytest.mark.parametrize(
    "question", ["tom has 3 pears . how many coins does tom have ?", "tom eats 3 pears . how many pears does tom have ?",
                 "tom has 3 pears . tom eats 5 pears . how many pears does tom have ?", "tom likes pears . ?"],
)  # fmt: skip
def test_what_is_no_question_is_refused(question: str) -> None:
    with pytest.raises(ValueError, match=r"nobody said|leaves the numbers|not a"):
        problems.read(question)


def test_moves_are_checked_where_they_stand() -> None:
    good = "4 + 8 = 1 2 left 6 , 1 2 . 1 2 / 6 = 2 left 2 ."
    assert countdown.check("4 , 6 , 8 -> 2", good) == ((True, True), True)
    for wrong in (good.replace("1 2 left", "1 3 left"), good.replace("left 6 ,", "left 5 ,"), good.replace("4 +", "5 +"),
                  "6 - 8 = 2 left 2 , 4 ." , good[: good.index(" . 1")] + " ."):  # fmt: skip
        assert not countdown.check("4 , 6 , 8 -> 2", wrong)[1]


def test_states_are_worth_what_can_be_reached_from_them() -> None:
    assert countdown.value((2,), 2) == "sure" and countdown.value((3,), 2) == "impossible"
    assert (
        countdown.value((3, 8), 24) == "sure"
        and countdown.value((1, 5, 13, 13), 60) != "sure"
        and countdown.value((1, 1), 24) == "impossible"
    )
    rng = random.Random(0)
    for _ in range(30):
        state, target = countdown.question(rng, 4)
        assert countdown.check(countdown.told(state, target), countdown.solution(state, target, rng))[1]
        assert countdown.value(state, target) != "impossible"


@torch.no_grad()
def test_a_verifier_reads_no_further_than_the_place_that_it_judges() -> None:
    verifier = built(Verifier, 32, 2, 3)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = verifier(ids)
    assert whole.shape == (2, 9) and torch.allclose(verifier(ids[:, :5]), whole[:, :5], atol=1e-5)


def test_a_grader_hears_how_likely_each_token_and_its_sentence_were_behind_what_stands_before() -> None:
    grader = built(Grader, 32, 2, 3)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 3] = STOP
    heard: list[torch.Tensor] = []
    grader.surprise.register_forward_hook(lambda _, given, __: heard.append(given[0].detach()))
    whole = grader(ids)
    assert whole.shape == (2, 9) and torch.allclose(grader(ids[:, :5]), whole[:, :5], atol=1e-5)
    for row in range(2):
        sentence: list[tuple[float, float]] = []
        for end in range(9):
            said = short = entropy = 0.0
            if end:
                with torch.no_grad():
                    expected = grader.reader.llama(input_ids=ids[row : row + 1, :end]).logits[0, -1].log_softmax(-1)
                said = float(expected[ids[row, end]])
                short = said - float(expected.max())
                entropy = float(torch.distributions.Categorical(logits=expected).entropy())
            sentence.append((said, short))
            wanted = [said, short, entropy, min(s for _, s in sentence), sum(s for s, _ in sentence)]
            assert heard[0][row, end].tolist() == pytest.approx(wanted, abs=1e-4)
            if ids[row, end] == STOP:
                sentence = []
    whole.sum().backward()
    learning = {name.partition(".")[0] for name, each in grader.named_parameters() if each.grad is not None}
    assert learning == {"state", "surprise", "judge", "head"}


@torch.no_grad()
def test_a_batch_in_parts_is_its_questions_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part may spend the rung for its questions and no more; where all fit side by side there is one part."""
    session, asked = (
        session_of(model=tiny(7)),
        [f"{name} has 3 coins ." for name in ("tom", "ben", "sue", "max", "sam")],
    )
    parts: list[tuple[int, float]] = []

    def solve(part: object, batch: dict[str, list[list[int]]], rung: int) -> list[list[int]]:
        parts.append((len(batch["question"]), part.limit))  # type: ignore[attr-defined]
        assert part.spent == 0 and rung == 20  # type: ignore[attr-defined]
        chains = Chains(session.networks["model"], batch["question"])
        chains.write(limit=20, temperature=1.0, generator=part.rng)  # type: ignore[attr-defined]
        assert 0 < part.spent <= part.limit  # type: ignore[attr-defined]
        return [chains.written(i) for i in range(len(chains))]

    batch = {"question": [encode(text) for text in asked]}
    session.ledger.reset(limit=100, items=5)
    assert len(populations.in_parts(session, batch, 20, 100, solve)) == 5 and parts == [(5, 100)]
    parts.clear()
    session.ledger.reset(limit=100, items=5)
    session.rng.manual_seed(0)
    found = populations.in_parts(session, batch, 20, 150, solve)
    assert parts == [(3, 60), (2, 40)]
    session.rng.manual_seed(0)
    monkeypatch.setattr(populations, "SIDE", 1)
    session.ledger.reset(limit=100, items=5)
    alone_each = populations.in_parts(session, batch, 20, 1, solve)
    session.rng.manual_seed(0)
    one_by_one = []
    for text in asked:
        session.ledger.reset(limit=20, items=1)
        one_by_one += populations.in_parts(session, {"question": [encode(text)]}, 20, 1, solve)
    assert alone_each == one_by_one and len(found) == 5


def test_an_answer_is_one_that_can_be_read_right_or_wrong() -> None:
    for judge, question, answered, not_answered in (
        (problems.judged, FOUR, ("ans 8", "| 1 | finds | 3 + 4 | 7 ans 9"),
         ("", "3 + 4 = 7 .", "ans", "ans so", "ans 7 .", "ans 1 2 3 4 5")),
        (countdown.judged, "4 , 6 -> 2 4", ("4 + 6 = 1 0 left 1 0 .", "4 * 6 = 2 5 left 2 4"),
         ("", "4 * 6 = 2 4 .", "4 left 4 , 6 .", "ans 2 4")),
    ):  # fmt: skip
        assert [judge(question, text)["answered"] for text in answered] == [1.0] * len(answered)
        assert [judge(question, text)["answered"] for text in not_answered] == [0.0] * len(not_answered)
        assert all(judge(question, text)["accuracy"] == 0.0 for text in (*answered, *not_answered))
    for task in TASKS:
        source = reasoning._dataset(task)
        question = "4 , 6 -> 2 4" if task.dataset == "countdown" else FOUR
        assert {*source.judged(question, ""), "written"} >= set(task.metrics)
        assert source.ASKED[task.id] in source.DATASET.digests


def test_a_text_is_worth_its_answer_and_its_steps_in_any_format() -> None:
    deep = "tom has 3 pears . " + "tom finds 4 pears . " * 5 + "how many pears does tom have ?"
    for text, right, valid in (
        ("ans 7", 1.0, 0.0), ("ans 8", 0.0, 0.0), ("3 + 4 = 7 . ans 7", 1.0, 1.0), ("3 + 4 = 8 . ans 7", 1.0, 0.0),
        ("| 1 | finds | 3 + 4 | 7 ans 7", 1.0, 1.0), ("3 + 4 = 7 . so 7 . </think> ans 7", 1.0, 1.0),
    ):  # fmt: skip
        found = problems.judged(FOUR, text)
        assert (found["accuracy"], found["valid"]) == (right, valid) and math.isnan(found["deep"])
    assert problems.judged(deep, "ans 2 3")["deep"] == 1.0 and problems.judged(deep, "ans 2 4")["deep"] == 0.0
    assert countdown.judged("4 , 6 -> 2 4", "4 * 6 = 2 4 left 2 4 .") == {"accuracy": 1.0, "answered": 1.0}


def test_deep_questions_are_those_of_five_steps_and_a_mean_is_over_these() -> None:
    rng = random.Random(4)
    asked = [problems.problem(rng, steps) for steps in (2, 5, 5, 3, 5)]
    texts = [[*encode(problems.solution(question, "<cot>")), EOS] for question in asked]
    texts[2] = [*encode("ans 1 0 0"), EOS]
    batch = {"question": [encode(question) for question in asked]}
    found = reasoning.score(TASKS[0], batch, texts, {}, np.array([[0, 1, 2, 3, 4], [0, 0, 3, 3, 3], [1, 1, 2, 2, 4]]))
    assert found["deep"].value == pytest.approx(2 / 3) and found["deep"].resamples == pytest.approx([2 / 3, 0.0, 3 / 5])
    assert found["accuracy"].value == pytest.approx(4 / 5)


def test_splits_are_of_the_levels_that_they_say_and_share_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    for source, sizes in (
        (problems, {"train": 60, "test": 40}),
        (long_problems, {"train": 60, "test": 40}),
        (countdown, {"train": 60, "test": 40, "game24": 12}),
    ):
        monkeypatch.setattr(source, "SIZES", sizes)
        rows = {name: source.split(name) for name in sizes}
        for name, found in rows.items():
            assert {len(column) for column in found.values()} == {sizes[name]}
        assert not {*rows["train"]["question"]} & {*rows["test"]["question"]}
    assert {*rows["game24"]["level"]} == {4} and {*rows["game24"]["answer"]} == {"2 4"}
    numbers = {name: {countdown.read(question)[0] for question in found["question"]} for name, found in rows.items()}
    assert not numbers["train"] & (numbers["test"] | numbers["game24"])
    for source, levels in ((problems, {2, 3, 4, 5}), (long_problems, {3, 4, 5})):
        found = source.split("test")
        assert {*found["level"]} == levels
        for question, target, answer, level in zip(
            *(found[name] for name in ("question", "target", "answer", "level")), strict=True
        ):
            assert problems.check(question, target).valid and len(problems.read(question).steps) == level
            assert problems.answer_of(f"ans {answer}") == problems.read(question).answer
    trained = {*problems.split("train")["question"], *long_problems.split("train")["question"]}
    assert not trained & {*problems.split("test")["question"], *long_problems.split("test")["question"]}


def test_what_a_step_is_worth_is_told_by_a_digit() -> None:
    """7 to 9 where the last step is due and right, less three behind a wrong one; else 4 to 6, or 0 to 2."""
    rng, seen = random.Random(6), set()
    for _ in range(300):
        steps = rng.randint(1, 5)
        question = problems.problem(rng, steps)
        prompt, digit = judged_example(rng, question, rng.randint(1, steps))
        text = prompt.partition("<verify> ")[2].removesuffix(" <score>")
        found = problems.check(question, text).steps
        left, sign, right, result = problems.clauses(text)[-1]
        worked = problems.worked(left, sign, right) == result
        if all(found):
            assert digit in "789"
        elif all(found[:-1]):
            assert digit in ("456" if worked else "012"), (prompt, digit)
        seen.add((all(found), all(found[:-1]), worked))
    assert len(seen) >= 4


def test_the_area_under_a_curve_counts_pairs() -> None:
    said, truth = torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert auroc(said, truth) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert math.isnan(auroc(said, torch.ones(4)))


def test_oracles_know_whole_chains_their_beginnings_and_openings() -> None:
    question = encode("tom has 3 pears . tom finds 4 pears . tom eats 2 pears . how many pears does tom have ?")
    for text, whole, fine in (
        ("3 + 4 = 7 .", False, True), ("3 + 4 = 7 .", True, False), ("3 + 4 = 7 . 7 - 2 = 5 . ans 5", True, True),
        ("3 + 4 = 8 .", False, False), ("3 + 4 = 7 . 7 - 2 = 5 . ans 6", True, False), ("ans 5", True, True),
    ):  # fmt: skip
        assert oracles.sound(question, encode(text), whole) == fine
    assert decode(oracles.opening(question)) == "3 + 4 = 7 ."
    assert decode(oracles.opening(question, None)) == "3 + 4 = 7 . 7 - 2 = 5 ."
    slips = {decode(oracles.opening(question, seed=seed)) for seed in range(40)}
    assert len(slips) > 3 and all(slip.startswith("3 + 4 = ") and slip != "3 + 4 = 7 ." for slip in slips)
    assert decode(oracles.opening(question, None, 3)).startswith("3 + 4 = 7 . 7 - 2 = ")
    assert not oracles.sound(question, oracles.opening(question, None, 3), False)


# -- reference points ------------------------------------------------------------------------------------------------


def digits(text: str) -> dict[str, float]:
    """``d . ans d``, a digit of 1 to 4 as likely as any."""
    own = text.partition("<cot>")[2].split()
    if not own:
        return dict.fromkeys("1234", 0.25)
    return {[".", "ans", own[0], "<eos>"][len(own) - 1]: 1.0}


def solving(seed: int = 0, **networks: object) -> object:
    return session_of(seed, task="solve/problems", **networks)  # type: ignore[arg-type]


def test_a_vote_is_of_the_answer_that_most_chains_give() -> None:
    """A model that is right three times in five."""

    def says(text: str) -> dict[str, float]:
        own = text.partition("<cot>")[2].strip()
        return {"ans": 1.0} if not own else {"7": 0.6, "8": 0.4} if own == "ans" else {"<eos>": 1.0}

    session = solving(model=Scripted(says))
    assert run(load("self_consistency"), session, [FOUR] * 3, 2000) == ["ans 7"] * 3
    assert session.spent <= 2000 * 3


def test_verifiers_choose_the_chain_that_they_like_or_weigh_its_vote() -> None:
    """3 is liked nine times as much as the others: it is chosen, and it wins the weighted vote unless it is too rare."""
    liked = {"1": 0.1, "2": 0.1, "3": 0.9, "4": 0.1}
    judge = Judge(lambda text: liked.get(text.split()[-1], 0.0) if "ans" in text else 0.0)
    session = solving(1, model=Scripted(digits), outcome=judge)
    assert run(load("best_of_n"), session, [FOUR] * 3, 300) == ["3 . ans 3"] * 3
    assert run(load("weighted_vote"), session, [FOUR] * 3, 300) == ["3 . ans 3"] * 3
    assert len({*run(load("random_of_n"), session, [FOUR] * 12, 64)}) > 1
    rare = Scripted(lambda text: {"3": 0.02, "1": 0.98} if text.endswith("<cot>") else digits(text))
    session = solving(1, model=rare, outcome=judge)
    assert run(load("weighted_vote", temperature=1.0), session, [FOUR] * 3, 300) == ["1 . ans 1"] * 3


def test_the_right_chain_or_the_likeliest_is_chosen_of_those_of_a_vote() -> None:
    """One chain in four is right, and it is the least likely one; the first of them all is any of them."""

    def says(text: str) -> dict[str, float]:
        own = text.partition("<cot>")[2].split()
        if not own:
            return {"7": 0.25, "8": 0.75}
        return {[".", "ans", own[0], "<eos>"][len(own) - 1]: 1.0}

    session = solving(1, model=Scripted(says))
    right = run(load("oracle_of_n"), session, [FOUR] * 6, 700)
    spent = session.spent
    assert right == ["7 . ans 7"] * 6
    assert run(load("likeliest_of_n"), session, [FOUR] * 6, 700) == ["8 . ans 8"] * 6 and session.spent == spent
    run(load("random_of_n"), session, [FOUR] * 6, 700)
    assert session.spent == 6 * 5  # a chain each
    cut = Scripted(lambda text: {"7": 1.0})
    assert run(load("oracle_of_n"), solving(model=cut), [FOUR], 40) == [" ".join(["7"] * 40)]


def test_a_beam_is_kept_by_what_the_verifier_says_or_by_its_likelihood() -> None:
    liked = {"1 .": 0.1, "2 .": 0.3, "3 .": 0.9, "4 .": 0.2}
    judge = Judge(lambda text: liked.get(text[-3:], 0.5))
    session = solving(2, model=Scripted(digits), process=judge)
    texts = run(load("step_beam"), session, [FOUR] * 24, 512)
    best = {digit: sum(text.endswith(digit) for text in texts) for digit in "1234"}
    assert best["3"] >= 10 and best["1"] <= 1  # 1 - .75^4 = .68 of four first steps hold a 3
    odd = Scripted(lambda text: {"1": 0.5, "2": 0.3, "3": 0.2} if text.endswith("<cot>") else digits(text))
    likely = run(load("likelihood_beam", temperature=1.0), solving(2, model=odd), [FOUR] * 8, 512)
    assert sum(text.endswith("1") for text in likely) >= 6  # 1 - .5^4 = .94 of them hold a 1


def test_a_beam_is_as_wide_as_its_rung_and_narrows_where_it_runs_out() -> None:
    """At 128 one beam in four ways, at 512 four beams of the sixteen; a text is brought to its end at any rung."""
    widths: list[int] = []

    class Watched(Scripted):
        def forward(self, ids: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
            widths.append(len(ids))
            return super().forward(ids, *rest, **named)  # type: ignore[arg-type]

    def says(text: str) -> dict[str, float]:
        own = text.partition("<cot>")[2].split()
        if len(own) >= 24:
            return {["ans", "7", "<eos>"][len(own) - 24]: 1.0}
        return {".": 1.0} if len(own) % 8 == 7 else dict.fromkeys("123456789", 1 / 9)

    for rung, widest in ((64, 3), (128, 4), (512, 16)):
        widths.clear()
        session = solving(model=Watched(says))
        (text,) = run(load("likelihood_beam", temperature=1.0), session, [FOUR], rung)
        assert text.endswith("ans 7") and max(widths) == widest and session.spent <= rung


def test_the_formats_are_asked_for() -> None:
    model = Scripted(lambda text: {"7": 1.0})
    session = solving(model=model)
    for name, form in (("chain_of_thought", "<cot>"), ("direct_answer", "<dir>"), ("full_thinking", "<think>")):
        (text,) = run(load(name), session, [FOUR], 3)
        assert text == "7 7 7" and session.spent == 3
        assert model.asked[-1].startswith(f"{FOUR} {form} ")
