"""Track reasoning: texts are written, forked, cut and scored as one by one; problems are read, solved and checked exactly."""

from __future__ import annotations

import random

import pytest
import torch
from stepmark.datasets import countdown, deduction, problems
from tests.rigs.reasoning import Scripted, load, run, session_of, tiny

from stepmark.backbones.chains import Chains
from stepmark.backbones.deducers import looking_back
from stepmark.backbones.reasoners import EOS, Reasoner, Verifier, built, decode, encode
from stepmark.backbones.reasoners import _turn as turn
from stepmark.tracks.reasoning import TASKS, judged

torch.set_num_threads(1)


def alone(model: object, text: list[int]) -> torch.Tensor:
    """Logits [T, V] by the loop of transformers, without a cache."""
    with torch.no_grad():
        return model.llama(torch.tensor([text])).logits[0]  # type: ignore[attr-defined, no-any-return]


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


def test_wrong_steps_are_seen_wherever_they_stand() -> None:
    rng = random.Random(0)
    for _ in range(100):
        question = problems.problem(rng, rng.randint(2, 5))
        steps = list(problems.read(question).steps)
        k = rng.randrange(len(steps))
        for wrong in (problems.slip(steps[k], rng), problems.misread(question, k, rng)):
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
    assert judged(task, question, "ans 7") == {"accuracy": 1.0, "valid": 0.0}
    assert judged(task, question, "ans 8")["accuracy"] == 0.0
    assert judged(task, question, "3 + 4 = 7 . ans 7") == {"accuracy": 1.0, "valid": 1.0}
    assert decode([*encode("ans 7"), EOS]) == "ans 7"


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
        prompt, completion = deduction.module(rng, asked, "<select>")
        fact, rule = deduction.read_statements(completion) or []
        assert fact in (deduction.read_statements(prompt.partition(" ? ")[0]) or []) and rule in asked.rules
        assert deduction.follows(fact, rule) in [new for _, new in deduction.proof(asked)]
        prompt, completion = deduction.module(rng, asked, "<rules>")
        word = prompt.split()[-2]
        named = deduction.read_statements(completion.removesuffix("done").strip()) or []
        assert {rule for rule in asked.rules if rule[2] == word} == set(named)
        prompt, completion = deduction.whole(rng, asked)
        proof = prompt.partition("<proof> ")[2].removesuffix(" <whole>")
        assert completion == ("yes" if proof == deduction.solution(asked, "<proof>") else "no")


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
