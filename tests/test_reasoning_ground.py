"""Track reasoning: texts are written, forked, cut and scored as one by one; questions are read, solved and checked exactly."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stepmark.datasets import deduction
from tests.rigs.reasoning import Scripted, load, run, session_of, tiny

from stepmark.backbones import words
from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import SIZE, WORDS, Reasoner, built, decode, encode, looking_back
from stepmark.backbones.reasoners import _turn as turn
from stepmark.task import BadOutput
from stepmark.tracks import reasoning
from stepmark.tracks.reasoning import TASKS

torch.set_num_threads(1)

A, B = deduction.CONCEPTS[:2]


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


def test_the_answer_of_most_texts_is_chosen_and_its_first_text_returned() -> None:
    """A model that says true three times in four, each time behind a fact of its own; cut texts have no vote."""
    question = f"{A} isnt {B} alma is {A} ? alma is {B}"

    def says(text: str) -> dict[str, float]:
        own = text.partition("<proof>")[2].split()
        if not own:
            return {"ans": 0.3, "boris": 0.3, "carlo": 0.4}
        if own[0] == "carlo" or own == ["boris"]:  # carlo's texts never end
            return {"is" if own[0] == "carlo" else "ans": 1.0}
        if own[-1] == "ans":
            return {"true": 1.0} if own[0] == "boris" else {"true": 0.5, "false": 0.5}
        return {"<eos>": 1.0}

    session = session_of(model=Scripted(says))
    found = run(load("self_consistency"), session, [question] * 6, 4000)
    assert session.spent <= 4000 * 6 and {text.split()[-1] for text in found} == {"true"}
    assert run(load("direct_answer"), session_of(model=Scripted(lambda _: {"ans": 1.0})), [question], 5) == [
        " ".join(["ans"] * 5)
    ]


def test_an_answer_is_one_that_can_be_read_right_or_wrong() -> None:
    question = "alma is bazi bazi is zota ben is lute ? alma is zota"
    for text in ("ans true", "alma is bazi . ans false"):
        assert deduction.judged(question, text)["answered"] == 1.0
    for text in ("", "true", "ans", "ans true false", "alma is bazi ."):
        assert deduction.judged(question, text)["answered"] == deduction.judged(question, text)["accuracy"] == 0.0
    for task in TASKS:
        assert {*deduction.judged(question, ""), "written"} >= set(task.metrics) and task.id in deduction.ASKED


def test_a_dataset_says_what_belongs_together_and_what_it_is_worth_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions 2 k and 2 k + 1 are twins; texts name a class, and a twin agrees that names the same."""
    asked = [f"{A} is {word}" for word in WORDS[20:60]]

    def judged(question: str, text: str) -> dict[str, object]:
        table = np.zeros((2, 3))
        table[asked.index(question) % 2, int(text)] = 1
        return {"table": table, "said": text, "even": 1.0 if asked.index(question) % 2 == 0 else float("nan")}

    def compared(questions: list[str], rows: list[dict[str, object]]) -> None:
        for i, row in enumerate(rows):
            row["agree"] = float(row["said"] == rows[i ^ 1]["said"])

    fake = SimpleNamespace(ASKED={"x/y": "pairs"}, TOGETHER={"x/y": 2}, LONGEST=3, judged=judged, compared=compared)
    monkeypatch.setattr(reasoning, "_dataset", lambda task: fake)
    monkeypatch.setattr(reasoning, "load_split", lambda dataset, split: {"question": asked})
    task = SimpleNamespace(id="x/y", dataset="fake", metrics=("table", "agree", "even", "written"))
    batch = reasoning.inputs(task, 12, torch.Generator().manual_seed(1), torch.device("cpu"))  # type: ignore[arg-type]
    places = [asked.index(decode(ids)) for ids in batch["question"]]
    assert len(set(places)) == 12 and all(
        b == a + 1 and a % 2 == 0 for a, b in zip(places[::2], places[1::2], strict=True)
    )

    texts = [encode(digit) for digit in "0 1 0 0 2 1 0 1 0 1 0 1".split()]
    resample = np.array([range(12), [0] * 6 + [1] * 6, [2] * 12])
    found = reasoning.score(task, batch, texts, {}, resample)  # type: ignore[arg-type]
    # Of six of the first class five are said and one is none; of six of the second five are said and one is the first.
    f1 = (2 * 5 / (6 + 6) + 2 * 5 / (6 + 5)) / 2
    assert found["table"].value == pytest.approx(f1) and found["table"].resamples == pytest.approx([f1, 1.0, 0.5])
    assert found["agree"].value == pytest.approx(2 / 12) and found["agree"].resamples == pytest.approx([2 / 12, 0, 1])
    assert found["even"].value == 1.0 and found["written"].value == 1.0
    with pytest.raises(BadOutput, match="1 to 3"):
        reasoning.check(task, batch, [[5] * 4] * 12)  # type: ignore[arg-type]


def test_ids_beyond_the_vocabulary_are_said_by_whose_they_are() -> None:
    ids = [*encode("tom has"), SIZE + 4, 1, 7]
    with pytest.raises(KeyError, match="--backbone"):
        decode(ids)
    words.lend(lambda own: " ".join(WORDS[i] if i < SIZE else "pears" for i in own))
    try:
        assert decode(ids) == "tom has pears"
    finally:
        words.lend(None)


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
        word = prompt.split()[-1]
        named = deduction.read_statements(completion.removesuffix("done").strip()) or []
        assert {rule for rule in asked.rules if rule[2] == word} == set(named)
        prompt, completion = deduction.module(rng, asked, "<follows>")
        fact, rule, new = deduction.read_statements(prompt.replace(" <follows>", "")) or []
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
        context, _, goal = prompt.partition(" ? <holds> ")
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
