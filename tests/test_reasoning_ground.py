"""Track reasoning: texts are written, forked, cut and scored as one by one; problems are read, solved and checked exactly."""

from __future__ import annotations

import random

import pytest
import torch
from stepmark.datasets import countdown, deduction, problems
from tests.rigs.reasoning import Judge, Scripted, load, run, session_of, tiny

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import looking_back
from stepmark.backbones.reasoners import EOS, WORDS, Reasoner, Verifier, built, decode, encode
from stepmark.backbones.reasoners import _turn as turn
from stepmark.tracks.reasoning import TASKS, judged, oracles, populations

torch.set_num_threads(1)


def alone(model: object, text: list[int]) -> torch.Tensor:
    """Logits [T, V] by the loop of transformers, without a cache; of ids that are no words yet there are none."""
    with torch.no_grad():
        logits = model.llama(torch.tensor([text])).logits[0]  # type: ignore[attr-defined]
    logits[:, len(WORDS) :] = -1e4
    return logits  # type: ignore[no-any-return]


@torch.no_grad()
def test_texts_side_by_side_are_those_that_are_written_alone() -> None:
    model = tiny(1)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 60, (n,), generator=draw).tolist() for n in (4, 15, 9)]
    chains = Chains(model, prompts)
    chains.write(limit=[3, 9, 6])
    forked = chains.take([2, 0, 2, 1])
    forked.cut(0, 6)
    forked.put(1, [5, 6, 7])
    (first, second) = forked.score([0, 3], [[4, 5], [9]])
    forked.write([3, 1], limit=[3, 5])
    for text, logprobs, start in zip(chains.texts, chains.logprobs, chains.starts, strict=True):
        truth = alone(model, text)
        for k in range(start, len(text)):
            assert text[k] == int(truth[k - 1].argmax())
            assert logprobs[k] == pytest.approx(float(truth[k - 1].log_softmax(-1)[text[k]]), abs=1e-4)
    truth = alone(model, forked.texts[0]).log_softmax(-1)
    assert first == pytest.approx([float(truth[5, 4]), float(truth[6, 5])], abs=1e-4)
    for i in range(4):
        assert torch.allclose(forked.read([i])[0], alone(model, forked.texts[i])[-1], atol=1e-4)
    assert len(second) == 1


@torch.no_grad()
def test_a_token_costs_a_row_and_a_fork_reads_its_beginning_once() -> None:
    model = tiny(2)
    session = session_of(model=model)
    chains = Chains(model, [[5, 6, 7], [8, 9, 10, 11]])
    chains.write(limit=4)
    assert session.spent == 8 and session.ledger.entries["model"].calls == 4
    session.ledger.reset()
    forked = chains.take([0, 0, 0, 1])
    assert session.spent == 1
    forked.write(limit=2)
    assert session.spent == 1 + 1 + 4  # the second text is read alone, then a row each; the last tokens are not read


@torch.no_grad()
def test_a_guess_is_checked_in_one_call() -> None:
    """Behind texts of which the next token is known, or not, or not all has been read; an empty guess where it is known costs
    nothing. What is kept of a guess need not be read again."""
    model = tiny(5)
    session = session_of(model=model)
    chains = Chains(model, [[5, 6, 7], [8, 9, 10, 11], [12, 13], [14, 15, 16]])
    chains.read([1, 3])
    chains.put(2, [20, 21])
    before, guesses = [list(text) for text in chains.texts], [[30, 31, 32], [33], [34, 35], []]
    session.ledger.reset()
    found = chains.check([2, 0, 3, 1], [guesses[i] for i in (2, 0, 3, 1)])
    assert session.ledger.entries["model"].calls == 1 and session.spent == 3 and chains.rows == [1, 2, 1, 1]
    for i, (likeliest, logprobs) in zip((2, 0, 3, 1), found, strict=True):
        assert chains.texts[i] == before[i] + guesses[i]
        truth, start = alone(model, chains.texts[i]), len(before[i]) - 1
        assert likeliest == truth[start:].argmax(-1).tolist()
        known = truth.log_softmax(-1)
        told = [float(known[start + k, token]) for k, token in enumerate(guesses[i])]
        assert logprobs == pytest.approx(told, abs=1e-4) == chains.logprobs[i][len(before[i]) :]
    session.ledger.reset()
    chains.read()
    assert session.spent == 0
    chains.cut(0, 4)
    chains.put(0, [40])
    chains.write([0], limit=1)
    assert session.spent == 1 and session.ledger.entries["model"].positions == 1
    assert chains.texts[0] == [5, 6, 7, 30, 40, int(alone(model, [5, 6, 7, 30, 40])[-1].argmax())]


@torch.no_grad()
def test_states_are_kept_through_forks_cuts_and_changes_of_place() -> None:
    """Texts that go on in turns and out of order, so that their rows change places all the time."""
    model, draw = tiny(6), torch.Generator().manual_seed(2)
    session = session_of(model=model)
    chains = Chains(model, [torch.randint(3, 60, (n,), generator=draw).tolist() for n in (4, 9, 6, 5, 7)], states=True)
    for chosen in ([4, 1], [3], [0, 2, 4], [2, 3]):
        chains.write(chosen, limit=2, temperature=1.0, generator=session.rng)
    forked = chains.take([3, 0, 3, 4])
    forked.cut(1, 5)
    forked.put(2, [7, 8])
    for texts in (chains, forked):
        for back in (0, 1, 2):
            chosen = [i for i in (2, 0, 3, 1) if not texts.ended(i)]
            for i, state in zip(chosen, texts.states(chosen, back), strict=True):
                truth = model(torch.tensor([texts.texts[i]]), states=True)[0]
                assert torch.allclose(state, truth[len(texts.texts[i]) - 1 - back], atol=1e-4)
    session.ledger.reset()
    chains.states([0, 1, 2, 3], back=1)
    assert session.spent == 0


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


@torch.no_grad()
def test_sampling_follows_the_probabilities_and_stops_where_it_is_told() -> None:
    model = Scripted(lambda text: {"yes": 0.6, ".": 0.3, "no": 0.1})
    session = session_of(model=model)
    chains = Chains(model, [[7]] * 1500)  # type: ignore[arg-type]
    chains.write(limit=1, temperature=1.0, generator=session.rng)
    counts = [sum(text[-1] == encode(word)[0] for text in chains.texts) / 1500 for word in ("yes", ".", "no")]
    assert counts == pytest.approx([0.6, 0.3, 0.1], abs=0.05)
    cooled = Chains(model, [[7]] * 1000)  # type: ignore[arg-type]
    cooled.write(limit=1, temperature=1.0, top_p=0.55, generator=session.rng)
    assert {text[-1] for text in cooled.texts} == {encode("yes")[0]}
    stopped = Chains(model, [[7]] * 200)  # type: ignore[arg-type]
    for new in stopped.write(limit=30, stop=encode("."), temperature=1.0, generator=session.rng):
        assert encode(".")[0] not in new[:-1]


@torch.no_grad()
def test_a_verifier_reads_no_further_than_the_place_that_it_judges() -> None:
    verifier = built(Verifier, 32, 2, 3)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = verifier(ids)
    assert whole.shape == (2, 9) and torch.allclose(verifier(ids[:, :5]), whole[:, :5], atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
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


def test_greedy_vote_and_verifier_choose_what_they_should() -> None:
    """A model that is right three times in five: the vote is, the verifier that likes the wrong answer is not."""
    question = "tom has 3 pears . tom finds 4 pears . how many pears does tom have ?"

    def says(text: str) -> dict[str, float]:
        own = text.partition("<cot> ")[2] if "<cot> " in text else ""
        if not own:
            return {"ans": 1.0}
        return {"7": 0.6, "8": 0.4} if own == "ans" else {"<eos>": 1.0}

    model = Scripted(says)
    session = session_of(model=model)
    assert run(load("self_consistency"), session, [question] * 3, 2000) == ["ans 7"] * 3
    assert session.spent <= 2000 * 3
    task = TASKS[0]
    assert judged(task, question, "ans 7") == {"accuracy": 1.0, "answered": 1.0, "valid": 0.0}
    assert judged(task, question, "ans 8") == {"accuracy": 0.0, "answered": 1.0, "valid": 0.0}
    assert judged(task, question, "3 + 4 = 7 . ans 7") == {"accuracy": 1.0, "answered": 1.0, "valid": 1.0}
    assert decode([*encode("ans 7"), EOS]) == "ans 7"


@pytest.mark.parametrize(
    ("number", "question", "answered", "not_answered"),
    [
        (0, "tom has 3 pears . tom finds 4 pears . how many pears does tom have ?", ("ans 8", "| 1 | finds | 3 + 4 | 7 ans 9"),
         ("", "3 + 4 = 7 .", "ans", "ans so", "ans 7 .", "ans 1 2 3 4 5")),
        (2, "4 , 6 -> 2 4", ("4 + 6 = 1 0 left 1 0 .", "4 * 6 = 2 5 left 2 4"),
         ("", "4 * 6 = 2 4 .", "4 left 4 , 6 .", "ans 2 4")),
        (4, "alma is bazi bazi is zota ben is lute ? alma is zota", ("ans true", "alma is bazi . ans false"),
         ("", "true", "ans", "ans true false", "alma is bazi .")),
    ],
)  # fmt: skip
def test_an_answer_is_one_that_can_be_read_right_or_wrong(
    number: int, question: str, answered: tuple[str, ...], not_answered: tuple[str, ...]
) -> None:
    task = TASKS[number]
    assert [judged(task, question, text)["answered"] for text in answered] == [1.0] * len(answered)
    assert [judged(task, question, text)["answered"] for text in not_answered] == [0.0] * len(not_answered)
    assert all(judged(task, question, text)["accuracy"] == 0.0 for text in not_answered)
    assert set(judged(task, question, "")) | {"written"} == set(task.metrics)


def test_oracles_know_whole_chains_their_beginnings_and_first_steps() -> None:
    question = encode("tom has 3 pears . tom finds 4 pears . tom eats 2 pears . how many pears does tom have ?")
    for text, whole, fine in (
        ("3 + 4 = 7 .", False, True), ("3 + 4 = 7 .", True, False), ("3 + 4 = 7 . 7 - 2 = 5 . ans 5", True, True),
        ("3 + 4 = 8 .", False, False), ("3 + 4 = 7 . 7 - 2 = 5 . ans 6", True, False), ("ans 5", True, True),
    ):  # fmt: skip
        assert oracles.sound(question, encode(text), whole) == fine
    assert decode(oracles.first_step(question)) == "3 + 4 = 7 ."
    slips = {decode(oracles.first_step(question, seed)) for seed in range(40)}
    assert len(slips) > 3 and all(slip.startswith("3 + 4 = ") and slip != "3 + 4 = 7 ." for slip in slips)


# -- reference points ------------------------------------------------------------------------------------------------

FOUR = "tom has 3 pears . tom finds 4 pears . how many pears does tom have ?"


def digits(text: str) -> dict[str, float]:
    """``d . ans d``, a digit of 1 to 4 as likely as any."""
    own = text.partition("<cot>")[2].split()
    if not own:
        return dict.fromkeys("1234", 0.25)
    return {[".", "ans", own[0], "<eos>"][len(own) - 1]: 1.0}


def test_verifiers_choose_the_chain_that_they_like_or_weigh_its_vote() -> None:
    """3 is liked nine times as much as the others: it is chosen, and it wins the weighted vote unless it is too rare."""
    liked = {"1": 0.1, "2": 0.1, "3": 0.9, "4": 0.1}
    judge = Judge(lambda text: liked.get(text.split()[-1], 0.0) if "ans" in text else 0.0)
    session = session_of(1, model=Scripted(digits), outcome=judge)
    assert run(load("best_of_n"), session, [FOUR] * 3, 300) == ["3 . ans 3"] * 3
    assert run(load("weighted_vote"), session, [FOUR] * 3, 300) == ["3 . ans 3"] * 3
    assert len({*run(load("random_of_n"), session, [FOUR] * 12, 64)}) > 1
    rare = Scripted(lambda text: {"3": 0.02, "1": 0.98} if text.endswith("<cot>") else digits(text))
    session = session_of(1, model=rare, outcome=judge)
    assert run(load("weighted_vote", temperature=1.0), session, [FOUR] * 3, 300) == ["1 . ans 1"] * 3


def test_a_beam_is_kept_by_what_the_verifier_says_or_by_its_likelihood() -> None:
    liked = {"1 .": 0.1, "2 .": 0.3, "3 .": 0.9, "4 .": 0.2}
    judge = Judge(lambda text: liked.get(text[-3:], 0.5))
    session = session_of(2, model=Scripted(digits), process=judge)
    texts = run(load("step_beam"), session, [FOUR] * 24, 1024)
    best = {digit: sum(text.endswith(digit) for text in texts) for digit in "1234"}
    assert best["3"] >= 10 and best["1"] <= 1  # 1 - .75^4 = .68 of four first steps hold a 3
    assert len({*run(load("random_beam"), session, [FOUR] * 12, 1024)}) > 1
    odd = Scripted(lambda text: {"1": 0.5, "2": 0.3, "3": 0.2} if text.endswith("<cot>") else digits(text))
    session = session_of(2, model=odd)
    likely = run(load("likelihood_beam", temperature=1.0), session, [FOUR] * 8, 1024)
    assert sum(text.endswith("1") for text in likely) >= 6  # 1 - .5^4 = .94 of them hold a 1


def test_proofs_are_checked_by_what_was_shown_before() -> None:
    rng = random.Random(2)
    for _ in range(60):
        asked = deduction.question(rng, rng.randint(2, 5), rng.randint(0, 4))
        text = deduction.told(asked)
        good = deduction.solution(asked, "<proof>")
        seen = deduction.check(text, good)
        assert seen.valid and seen.right and all(seen.straight) and deduction.read(text) == asked
        steps = good.split(" . ")
        assert not deduction.check(text, " . ".join([steps[0], *steps[2:]])).valid  # a step left out
        turned = (
            good.replace("ans true", "ans other").replace("ans false", "ans true").replace("ans other", "ans false")
        )
        assert not deduction.check(text, turned).right
        stranger = next(fact for fact in asked.facts if fact[0] != asked.goal[0])
        assert not deduction.check(text, good.replace(asked.goal[0], stranger[0])).valid
        aside = deduction.check(text, f"{deduction.said(stranger)} . {good}")
        assert aside.valid and not all(aside.straight)  # a detour is no fault


def test_a_question_is_taken_apart_into_what_is_true_of_it() -> None:
    rng = random.Random(3)
    for _ in range(60):
        asked = deduction.question(rng, rng.randint(1, 5), rng.randint(0, 4))
        prompt, completion = deduction.module(rng, asked, "<rules>")
        word = prompt.split()[-2]
        named = deduction.read_statements(completion.removesuffix("done").strip()) or []
        assert {rule for rule in asked.rules if rule[2] == word} == set(named)
        prompt, completion = deduction.module(rng, asked, "<follows>")
        fact, rule, new = deduction.read_statements(prompt.removesuffix(" <follows>")) or []
        assert completion == ("yes" if deduction.follows(fact, rule) == new else "no")
        prompt, completion = deduction.whole(rng, asked)
        proof = prompt.partition("<proof> ")[2].removesuffix(" <whole>")
        assert completion == ("yes" if proof == deduction.solution(asked, "<proof>") else "no")


def test_distractors_are_rules_and_facts_of_what_a_being_is_not() -> None:
    """They lead nowhere: no rule begins with their last word, and each hangs on a being or on a chain."""
    rng, facts, count = random.Random(4), 0, 0
    for _ in range(200):
        depth, dead = rng.randint(1, 5), rng.randint(0, 8)
        asked = deduction.question(rng, depth, dead)
        assert (
            len(asked.statements) == 2 * (depth + 1) + dead
            and len({s[2] for s in asked.statements}) >= 2 * depth + dead
        )
        starts = {s[0] for s in asked.statements}
        ends = [s for s in asked.statements if s[2] not in starts and s[2] != asked.goal[2]]
        assert len(ends) == dead and len(deduction.proof(asked)) == depth + 1
        facts += sum(s[0] in deduction.NAMES for s in ends)
        assert not any(s[1] for s in ends if s[0] in deduction.NAMES)
        count += dead
    assert 0.1 < facts / count < 0.24


def test_what_comes_next_is_selected_on_the_way_also_behind_a_detour() -> None:
    """Shown are the first facts of the proof in their order, and in some prompts a fact that a rule gives off it, the last;
    what is selected is the last fact of the proof that is shown, and the rule behind it."""
    rng, detours = random.Random(5), 0
    for _ in range(300):
        asked = deduction.question(rng, rng.randint(1, 5), rng.randint(2, 6))
        way = [new for _, new in deduction.proof(asked)]
        prompt, completion = deduction.module(rng, asked, "<select>")
        context, _, goal = prompt.partition(" ? ")
        told = deduction.read_statements(context) or []
        assert tuple(told[: len(asked.statements)]) == asked.statements
        assert goal == f"{deduction.said(asked.goal)} <select>"
        shown = told[len(asked.statements) :]
        on_the_way = [fact for fact in shown if fact in way]
        assert on_the_way == way[1 : 1 + len(on_the_way)] and len(shown) - len(on_the_way) <= 1
        fact, rule = deduction.read_statements(completion) or []
        assert fact == way[len(on_the_way)] and rule in asked.rules
        assert deduction.follows(fact, rule) == way[len(on_the_way) + 1]
        if len(shown) > len(on_the_way):
            detours += 1
            known = way[: len(on_the_way) + 1]
            assert shown[-1] in [deduction.follows(each, rule) for each in known for rule in asked.rules]
    assert 10 < detours < 120


def test_what_settles_a_goal_is_found_among_all_statements_or_among_what_was_shown() -> None:
    rng, kinds = random.Random(6), set()
    for _ in range(300):
        asked = deduction.question(rng, rng.randint(1, 5), rng.randint(2, 6))
        prompt, completion = deduction.module(rng, asked, "<holds>")
        context, _, goal = prompt.removesuffix(" <holds>").partition(" ? ")
        given = deduction.read_statements(context) or []
        ((who, sign, word),) = deduction.read_statements(goal) or []
        whole = tuple(given) == asked.statements
        assert sign and (whole or given == [new for _, new in deduction.proof(asked)][-len(given) :])
        found = [fact for fact in given if fact[0] == who and fact[2] == word]
        verdict = "unknown" if not found else f"{deduction.said(found[0])} {'true' if found[0][1] else 'false'}"
        assert completion == verdict
        kinds.add((whole, completion.split()[-1]))
    assert kinds == {(whole, word) for whole in (True, False) for word in ("unknown", "true", "false")}


def test_two_heads_of_the_first_layer_begin_by_looking_back() -> None:
    network = built(Reasoner, 128, 3, 31)
    looking_back(network)
    inner = network.llama.model
    with torch.no_grad():
        hidden = inner.embed_tokens(torch.randint(100, 280, (1, 20), generator=torch.Generator().manual_seed(0)))
        attention, x = inner.layers[0].self_attn, inner.layers[0].input_layernorm(hidden)
        cos, sin = inner.rotary_emb(hidden, torch.arange(20)[None])
        queries, keys = (
            turn(part(x).unflatten(-1, (-1, 32)), cos, sin) for part in (attention.q_proj, attention.k_proj)
        )
        scores = torch.einsum("bthd,bshd->bhts", queries, keys) * 32**-0.5
        seen = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -1e9).softmax(-1)
    for head, offset in enumerate((1, 2)):
        assert float(torch.stack([seen[0, head, t, t - offset] for t in range(4, 20)]).min()) > 0.6
