"""Methods on what is known by heart: step back, likelihoods of sets, exclusion, verifiers, relations that are not named."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from stepmark.datasets import closed_world, fact_chains, knowledge
from tests.rigs.knowing import gold, judge, some, told, writer
from tests.rigs.reasoning import Scripted, load, module_of, run, session_of, tiny

from stepmark.backbones.reasoners import encode
from stepmark.tracks.reasoning.knowing import retrieved

torch.set_num_threads(1)

FACTS = closed_world.world().facts
PEOPLE, TRADES = closed_world.KINDS["person"], closed_world.KINDS["trade"]
A, B = closed_world.KINDS["town"][:2]


# -- baselines -------------------------------------------------------------------------------------------------------


def test_votes_take_as_many_short_chains_as_there_is_room_for() -> None:
    """Chains of 8 tokens, of which the prompt gives the first, are begun while there is room for another. Four in five say A."""
    question = some("year", 1)[0]
    right, wrong = (f"{question.subject} from 1 {town} . ans {town}" for town in (A, B))
    session = session_of(1, task="know/years", model=writer(lambda prompt: {right: 0.8, wrong: 0.2}))
    for rung, chains in ((16, 2), (128, 18)):
        assert run(load("short_vote"), session, told([question]), rung) == [right]
        assert session.spent == 1 + 7 * chains
    # Of two questions each has room of its own: a long text of one leaves the other's chains alone.
    other = next(each for each in some("year", 9) if each.subject != question.subject)
    long = f"{other.subject} from 1 {A} . " * 5 + f"ans {A}"
    model = writer(lambda prompt: {long: 1.0} if prompt.startswith(f"{other.subject} ") else {right: 1.0})
    session = session_of(1, task="know/years", model=model)
    assert run(load("short_vote"), session, told([question, other]), 30) == [right, long]
    assert session.spent == 1 + 7 * 4 + 1 + 27


# -- step back -------------------------------------------------------------------------------------------------------


def reads(prompt: str) -> dict[str, float]:
    """Knows what to look up, and nothing else: it answers by the pages before the question, or nothing."""
    shown, _, rest = prompt.rpartition(" -> ")
    if prompt.endswith("<back>"):
        return {gold(prompt): 1.0}
    if not prompt.endswith("<cot>"):
        return {}
    facts = {(f[0], f[1]): f[2] for f in closed_world.read_facts(shown) if f is not None}
    try:
        return {knowledge.solution(knowledge.read(rest.removesuffix(" <cot>")), "<cot>", facts): 1.0}
    except (KeyError, StopIteration):
        return {"ans alma": 1.0}


def test_a_step_back_finds_the_page_and_reads_both() -> None:
    """Of years the model can only read: it is right exactly where the page of the past is read."""
    questions = some("year", 24)
    session = session_of(model=writer(reads))
    texts = run(load("step_back_prompting"), session, told(questions), 64)
    for question, text in zip(questions, texts, strict=True):
        seen, (narrow,) = judge(question, text), retrieved(knowledge.told(question), 1)
        broad = f"{question.subject} past"
        assert seen["accuracy"] == seen["found"] == 1.0
        assert text.startswith(f"see {broad} ." + (f" see {narrow} ." if narrow != broad else ""))
        pages = [closed_world.page(title) for title in dict.fromkeys([broad, narrow])]
        assert f"{' '.join(pages)} -> {knowledge.told(question)} <cot>" in session.networks["model"].asked
    assert session.spent == 24 * (3 + 8)  # "alma past <eos>", then "alma from 4 gole . ans gole <eos>"

    texts = run(load("step_back_original"), session, told(questions), 64)
    found = [judge(question, text)["found"] for question, text in zip(questions, texts, strict=True)]
    assert [judge(q, text)["accuracy"] for q, text in zip(questions, texts, strict=True)] == found
    assert found == [f"{q.subject} past" in retrieved(knowledge.told(q), 2) for q in questions] and sum(found) < 18
    texts = run(load("step_back_wide"), session, told(questions), 64)
    assert all(
        judge(q, text)["found"] == 1.0 and text.count("see") == 4 for q, text in zip(questions, texts, strict=True)
    )


def test_a_step_back_without_a_store_reads_what_the_model_has_told() -> None:
    question = some("year", 1)[0]
    right = closed_world.told_facts(closed_world.page_facts(f"{question.subject} past"))
    model = writer(lambda prompt: {right: 1.0} if prompt.endswith(":") else reads(prompt))
    session = session_of(model=model)
    (text,) = run(load("step_back_recited"), session, told([question]), 64)
    assert judge(question, text)["valid"] == 1.0 and "see" not in text
    assert f"{question.subject} past : {right} -> {knowledge.told(question)} <cot>" in model.asked
    assert session.spent == 3 + len(encode(right)) + 1 + 8


def test_any_page_of_the_person_is_read_as_often_as_another() -> None:
    question = next(q for q in some("year", 9) if retrieved(knowledge.told(q), 1) != [f"{q.subject} past"])
    session = session_of(2, model=writer(reads))
    texts = run(load("step_back_any"), session, told([question]) * 80, 64)
    first = Counter(text.partition(" .")[0].split()[-1] for text in texts)
    assert set(first) == {"kin", "life", "work", "past"} and max(first.values()) < 40
    other = some("hops", 1, level=2)[0]
    (text,) = run(load("step_back_prompting"), session, told([other]), 64)
    assert text.startswith(f"see {closed_world.title_of(knowledge.steps(other)[0])} .")


# -- ThinkSum --------------------------------------------------------------------------------------------------------


def associations(table: dict[tuple[str, str], dict[str, float]]) -> Scripted:
    """A model of single associations: (who, relation) -> values."""

    def reply(prompt: str) -> dict[str, float]:
        who, relation, *_ = prompt.split()
        return {f"{who} {relation} {value} .": p for value, p in table.get((who, relation), {}).items()}

    return writer(reply)


def test_the_odd_ones_weight_is_a_sum_over_values_of_products() -> None:
    weighed = module_of("thinksum").weighed
    table = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for i in range(5):
        by_hand = sum(
            (1 - float(table[i, v])) * math.prod(float(table[j, v]) for j in range(5) if j != i) for v in range(7)
        )
        assert float(weighed(table, False).exp()[i]) == pytest.approx(by_hand, rel=1e-5)
    sure = torch.eye(7)[[2, 2, 3, 2, 2]]
    assert weighed(sure, True).tolist() == [3, 3, 5, 3, 3]  # four alike and one not; else two are not as they should be


def test_sets_are_solved_by_a_model_that_knows_each_fact_alone() -> None:
    questions = [some("odd", 1, seed, level=5 + seed % 4)[0] for seed in range(8)]
    known = {key: {value: 0.7, "alma": 0.3} for key, value in FACTS.items()}
    session = session_of(model=associations(known))
    texts = run(load("thinksum"), session, told(questions), 64)
    assert all(judge(q, text)["accuracy"] == 1.0 for q, text in zip(questions, texts, strict=True))
    assert session.spent == sum(4 * len(q.others) for q in questions)
    assert all(judge(q, text)["valid"] == 1.0 for q, text in zip(questions, texts, strict=True))
    asked = session.networks["model"].asked
    phrases = [
        f"{who} {r} ? <cot> {who} {r}" for q in questions for who in q.others for r in ("trade", "pet", "born", "home")
    ]
    assert sorted(asked) == sorted(phrases)
    run(load("thinksum"), session, told(questions[:1]), 16)
    assert session.spent == 15
    run(load("thinksum_any"), session, told(questions[:1]), 64)
    assert session.spent == 5


def test_likelihoods_forgive_what_counting_does_not() -> None:
    """By trade four of five are alike, but two of them are a little likelier to have another one; by pet, of which the model
    knows nothing, three seem alike by a hair."""
    members, (a, b, c, d), pets = PEOPLE[:5], TRADES[:4], closed_world.KINDS["pet"]
    likely = [{a: 1.0}, {a: 0.47, b: 0.53}, {a: 0.47, c: 0.53}, {a: 0.02, d: 0.98}, {a: 1.0}]
    table = {(who, "trade"): own for who, own in zip(members, likely, strict=True)}
    for k, who in enumerate(members):
        hair = pets[k if k in (2, 4) else 0]
        table[who, "pet"] = {pet: 0.09 if pet == hair else 0.08 for pet in pets}
        table[who, "born"], table[who, "home"] = {str(k + 1): 1.0}, {closed_world.KINDS["town"][k]: 1.0}
    session = session_of(model=associations(table))
    for order in itertools.islice(itertools.permutations(members), 0, 120, 17):
        (text,) = run(load("thinksum"), session, [f"odd {' '.join(order)} ?"], 64)
        assert text.endswith(f"ans {members[3]}")
    (text,) = run(load("thinksum_hard"), session, [f"odd {' '.join(members)} ?"], 64)
    assert text.endswith(f"ans {members[2]}")


# -- verifiers -------------------------------------------------------------------------------------------------------


def chains(count: int = 14) -> list[fact_chains.Chain]:
    """Chains of other worlds, right ones and ones with each fault, about as many."""
    rng, found, kinds = random.Random("methods chains"), list[fact_chains.Chain](), Counter[Any]()
    while len(found) < count:
        made = fact_chains.chain(rng, 2 + len(found) % 2, closed_world.elsewhere(len(found)), test=True)
        each, follows, _ = fact_chains.labels(made)
        kind = follows, *(frozenset(labels) for labels in zip(*each, strict=True))
        if kinds[kind] < 3:
            found.append(made)
            kinds[kind] += 1
    return found


def exact(cases: Sequence[fact_chains.Chain], wrong: str = "") -> Scripted:
    """A verifier that labels all links right, or all of a kind as those of a right chain; the prompts are put together anew."""
    table: dict[str, str] = {}
    for case in cases:
        each, follows, fine = fact_chains.labels(case)
        question = knowledge.told(case.asked)
        for k, (step, (useful, held)) in enumerate(zip(case.steps, each, strict=True)):
            before = "".join(f"{closed_world.said(other)} . " for other in case.steps[:k])
            table[f"{question} {before}{closed_world.said(step)} <agree>"] = useful
            table[f"{case.pages} -> {closed_world.said(step)} ? <holds>"] = held
        steps = " ".join(f"{closed_world.said(step)} ." for step in case.steps)
        table[f"{question} {steps} ans {case.answer} <follows>"] = follows
        table[f"{case.pages} -> {question} {steps} ans {case.answer} <whole>"] = fine
        table[f"{question} <cot>"] = f"ans {case.answer}" if fine == "yes" else "ans yes"
    right = {"agree": "yes", "holds": "true", "follows": "yes"}
    return writer(
        lambda prompt: {right[wrong] if wrong and wrong in prompt.split()[-1] else table.get(prompt, "dora"): 1.0}
    )


def test_an_exact_verifier_labels_every_link_and_the_weakest_decides() -> None:
    cases = chains()
    session = session_of(model=exact(cases))
    questions = [fact_chains.told_chain(case) for case in cases]
    assert run(load("reveal_bench"), session, questions, 16) == [fact_chains.verified(case) for case in cases]
    assert session.spent == sum(2 * len(case.steps) + 1 for case in cases)
    assert run(load("reveal_whole"), session, questions, 16) == [f"ans {fact_chains.labels(case)[2]}" for case in cases]
    assert session.spent == len(cases)
    assert run(load("reveal_answer"), session, questions, 16) == [
        f"ans {fact_chains.labels(case)[2]}" for case in cases
    ]
    model = writer(lambda prompt: {verified(prompt, cases): 1.0})
    assert run(load("reveal_written"), session_of(model=model), questions, 32) == [
        fact_chains.verified(case) for case in cases
    ]


def verified(prompt: str, cases: Sequence[fact_chains.Chain]) -> str:
    """The right labels of the chain that a prompt holds."""
    return next((fact_chains.verified(c) for c in cases if prompt == f"{fact_chains.told_chain(c)} <verify>"), "dora")


@pytest.mark.parametrize(("name", "word"), [("relevance", "agree"), ("attribution", "holds"), ("logic", "follows")])
def test_without_one_kind_of_link_just_its_faults_are_missed(name: str, word: str) -> None:
    cases = chains()
    questions = [fact_chains.told_chain(case) for case in cases]
    session = session_of(model=exact(cases))
    missed = run(load(f"reveal_no_{name}"), session, questions, 16)
    blind = run(load("reveal_bench"), session_of(model=exact(cases, word)), questions, 16)
    assert missed == blind and missed != [fact_chains.verified(case) for case in cases]
    assert not any(word in prompt.split()[-1] for prompt in session.networks["model"].asked)


def test_with_few_rows_logic_is_asked_for_first_and_then_attributions() -> None:
    case = next(case for case in chains() if len(case.steps) == 3)
    for rung, asked in ((3, {"<follows>": 1, "<holds>": 2}), (5, {"<follows>": 1, "<holds>": 3, "<agree>": 1})):
        model = exact([case])
        session = session_of(model=model)
        run(load("reveal_bench"), session, [fact_chains.told_chain(case)], rung)
        assert session.spent == rung and Counter(prompt.split()[-1] for prompt in model.asked) == asked


# -- relations that are not named ------------------------------------------------------------------------------------


def test_relations_facts_and_answers_are_told_apart() -> None:
    """The model names other relations than those needed, answers well behind the right ones, and better with facts."""
    questions = some("could", 20)
    model = writer(lambda prompt: {"alma home , dora home" if prompt.endswith("<needs>") else gold_behind(prompt): 1.0})
    session = session_of(model=model)

    def scores(name: str) -> tuple[float, float]:
        texts = run(load(name), session, told(questions), 64)
        rows = [judge(q, text) for q, text in zip(questions, texts, strict=True)]
        return sum(row["pairs"] for row in rows) / 20, sum(row["accuracy"] for row in rows) / 20

    own, given, facts, alone = map(
        scores, ("implicit_relations", "relations_gold", "relations_gold_facts", "relations_facts")
    )
    assert own == (0.0, 0.0) and given == (1.0, 0.0) and facts == (1.0, 1.0) and alone == (0.0, 0.0)
    question = questions[0]
    known, needed = closed_world.told_facts(knowledge.steps(question)), knowledge.solution(question, "<needs>")
    asked = model.asked
    assert f"{knowledge.told(question)} <needs> alma home , dora home <cot>" in asked
    assert f"{known} -> {knowledge.told(question)} <needs> {needed} <cot>" in asked
    assert f"{known} -> {knowledge.told(question)} <cot>" in asked


def gold_behind(prompt: str) -> str:
    """The right answer where both its relations and its facts stand in front, else the wrong one."""
    shown, _, rest = prompt.rpartition(" -> ")
    question = knowledge.read(rest.partition(" <")[0])
    told_all = shown == closed_world.told_facts(knowledge.steps(question))
    named = f"<needs> {knowledge.solution(question, '<needs>')} <cot>" in rest
    right = knowledge.answer(question)
    return f"ans {right if told_all and named else {'yes': 'no', 'no': 'yes'}[right]}"


def test_a_perfect_namer_has_all_pairs_and_one_that_goes_by_the_verb_those_of_people() -> None:
    questions = some("could", 30)
    session = session_of(model=writer(lambda prompt: {gold(prompt): 1.0}))
    texts = run(load("implicit_relations"), session, told(questions), 64)
    assert all(
        judge(q, text)["pairs"] == judge(q, text)["valid"] == 1.0 for q, text in zip(questions, texts, strict=True)
    )
    spent = [len(encode(text)) - 2 + 2 for text in texts]  # the formats are put in; both parts have an end of their own
    assert session.spent == sum(spent)
    texts = run(load("relations_usual"), session, told(questions), 64)
    for question, text in zip(questions, texts, strict=True):
        people = [closed_world.KIND_OF[word] == "person" for word in (question.subject, question.others[0])]
        assert judge(question, text)["pairs"] == sum(people) / 2


# -- all of them -----------------------------------------------------------------------------------------------------

NAMES = {
    "year": "step_back_prompting step_back_original step_back_wide step_back_recited step_back_any short_vote",
    "odd": "thinksum thinksum_hard thinksum_any",
    "could": "implicit_relations relations_gold relations_gold_facts relations_facts relations_usual",
    "chain": "reveal_bench reveal_whole reveal_written reveal_answer reveal_no_relevance reveal_no_attribution reveal_no_logic",
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names.split()])
def test_every_rung_has_an_answer_and_is_kept(kind: str, name: str) -> None:
    """Words at random: nothing is a fact, nothing ends."""
    questions = [fact_chains.told_chain(case) for case in chains(2)] if kind == "chain" else told(some(kind, 2))
    for rung in (4, 16) if kind == "chain" else (16, 64):
        session = session_of(task={"year": "know/years"}.get(kind, "know/options"), model=tiny(3, depth=1))
        found = run(load(name), session, questions, rung)
        assert all(len(encode(text)) <= 400 for text in found) and 0 < session.spent <= 2 * rung
