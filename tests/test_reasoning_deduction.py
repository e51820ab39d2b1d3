"""Methods of the reasoning track on deduction: by modules forward and backward, from a mind map, verified step by step."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest
import torch
from stepmark.datasets import deduction
from tests.rigs.reasoning import Scripted, load, module_of, run, session_of, tiny

from stepmark.backbones.reasoners import encode
from stepmark.tracks.reasoning.deducing import Ask, side_by_side

torch.set_num_threads(1)

FORMS = "<dir> <proof> <select> <infer> <holds> <rules> <goal> <agree> <follows> <whole>".split()
EARLY = ("<holds>", "<rules>", "<follows>")  # stand before the last statement
A, B, C, D, E, G = deduction.CONCEPTS[:6]


@cache
def completion(form: str, before: str) -> str:
    """What is right in a format."""
    if form == "<infer>":
        fact, rule = deduction.read_statements(before) or []
        return deduction.said(deduction.follows(fact, rule) or fact)
    if form == "<follows>":
        fact, rule, new = deduction.read_statements(before) or []
        return "yes" if deduction.follows(fact, rule) == new else "no"
    if form == "<whole>":
        question, _, text = before.partition(" <proof> ")
        return "yes" if deduction.check(question, text).valid else "no"
    asked = deduction.read(before)
    who, sign, word = asked.goal
    if form == "<holds>":
        found = [f for f in asked.facts if (f[0], f[2]) == (who, word)]
        return f"{deduction.said(found[0])} {'true' if found[0][1] else 'false'}" if found else "unknown"
    if form == "<rules>":
        return " ".join([*(deduction.said(rule) for rule in asked.rules if rule[2] == word), "done"])
    if form == "<goal>":
        return f"{who} is {asked.statements[0][0]}"
    if form == "<agree>":
        return "yes" if asked.statements[0][1] == sign else "no"
    if form == "<select>":
        # The fact from which fewest rules lead to the goal; one of what the being is not, or off the way, leads nowhere.
        ways = []
        for fact in asked.facts:
            try:
                ways.append((fact, deduction.proof(deduction.Question((fact, *asked.rules), asked.goal))))
            except ValueError:
                continue
        fact, way = min(ways, key=lambda each: len(each[1]))
        return f"{deduction.said(fact)} {deduction.said(way[1][0])}"
    try:
        return deduction.solution(asked, form)
    except ValueError:
        return "ans true"


def knows(text: str) -> dict[str, float]:
    """A model without a fault."""
    words = text.split()
    at = max((i for i, word in enumerate(words) if word in FORMS), default=None)
    if at is None:
        return {"<eos>": 1.0}
    form, own = words[at], words[at + 1 :]
    if form in EARLY:
        if len(own) < 3:
            return {"<eos>": 1.0}
        words, own = [*words[:at], *own[:3], form], own[3:]
        at += 3
    if form == "<proof>" and own[-1:] == ["ans"]:
        return {"true" if len(own) < 4 or own[-4] == "is" else "false": 1.0}
    wanted = completion(form, " ".join(words[:at])).split()
    return {wanted[len(own)] if len(own) < len(wanted) else "<eos>": 1.0}


def prompts_of(model: Scripted) -> list[str]:
    """The prompts that a model was asked with, in their order."""
    return [t for t in model.asked if t.split()[-1] in FORMS or t.split()[-4] in EARLY]


def some(seed: int, depth: int, dead: int) -> deduction.Question:
    return deduction.question(random.Random(seed), depth, dead)


# -- selection and inference -------------------------------------------------------------------------------------------


def test_the_likeliest_statement_is_selected_not_the_likeliest_words() -> None:
    """Freely the model would select what is not there, of edgar (.5); by its first word a fact of dora's (.3 against .2), as a
    whole statement boris's (.2 x .9 against .3 x .1). The rule likewise."""
    question = f"{B} is {G} boris is {A} {A} isnt {G} dora is {B} ? boris is {G}"
    table = {
        "": {"edgar": 0.5, "dora": 0.3, "boris": 0.2}, "dora": {"is": 1.0}, "boris": {"is": 1.0},
        "dora is": {B: 0.1, C: 0.9}, "boris is": {A: 0.9, C: 0.1},
        f"boris is {A}": {B: 0.5, A: 0.3}, f"boris is {A} {B}": {"is": 0.1, "isnt": 0.9},
        f"boris is {A} {A}": {"is": 0.2, "isnt": 0.8}, f"boris is {A} {A} isnt": {G: 0.9},
        f"boris is {A} {B} is": {G: 1.0},
        "edgar": {"is": 1.0}, "edgar is": {A: 1.0}, f"edgar is {A}": {A: 1.0},
        f"edgar is {A} {A}": {"isnt": 1.0}, f"edgar is {A} {A} isnt": {G: 1.0},
    }  # fmt: skip

    def says(text: str) -> dict[str, float]:
        _, there, own = text.partition("<select>")
        return table.get(own.strip(), {"<eos>": 1.0}) if there else knows(text)

    model = Scripted(says)
    session = session_of(model=model)
    assert run(load("selection_inference"), session, [question], 64) == [
        f"boris is {A} . {A} isnt {G} boris isnt {G} . ans false"
    ]
    assert [p for p in prompts_of(model) if p.endswith("<infer>")] == [f"boris is {A} {A} isnt {G} <infer>"]
    assert session.spent == (1 + 2 + 2 + 3) + 1
    written = run(load("selection_inference_written"), session, [question], 64)[0]
    assert written == f"edgar is {A} . {A} isnt {G} edgar isnt {G} . ans false"
    assert not deduction.check(question, written).steps[0]


@pytest.mark.parametrize("depth", [1, 3])
def test_what_was_inferred_joins_the_statements_and_nothing_else_is_inferred_from(depth: int) -> None:
    asked = [some(seed, depth, 3) for seed in (1, 2)]
    questions = [deduction.told(question) for question in asked]
    model = Scripted(knows)
    session = session_of(model=model)
    found = run(load("selection_inference"), session, questions, 200)
    assert found == [deduction.solution(question, "<proof>") for question in asked]
    assert session.spent == 2 * (sum(1 + (2 + t) + (2 * depth + 3) + 3 for t in range(depth)) + 1)
    assert all(len(p.split()) == 7 for p in prompts_of(model) if p.endswith("<infer>"))
    way = [deduction.said(new) for _, new in deduction.proof(asked[0])][1:-1]
    contexts = [p.partition(" ?")[0] for p in prompts_of(model) if p.startswith(questions[0].split(" ?")[0])]
    assert contexts[0] == questions[0].split(" ?")[0]
    assert " ".join([contexts[0], *way]) in contexts


def test_negated_facts_and_detours_are_scored_like_all_others() -> None:
    """Questions with facts of what a being is not: each is an option, none of them is taken by a model without a fault."""
    denied = [q for q in (some(seed, 2, 6) for seed in range(40)) if not all(fact[1] for fact in q.facts)][:3]
    questions = [deduction.told(question) for question in denied]
    assert len(questions) == 3
    session = session_of(model=Scripted(knows))
    found = run(load("selection_inference"), session, questions, 128)
    assert found == [deduction.solution(question, "<proof>") for question in denied]
    assert session.spent == 3 * (sum(1 + (2 + 4 + 6 + t) + 3 for t in range(2)) + 1)


def test_chance_selects_any_pair_that_gives_something_new() -> None:
    """Of three facts and three rules two pairs fit, and each is drawn as often; nothing is scored."""
    question = f"{A} is {B} {B} is {C} dora is {A} {C} isnt {D} boris is {A} boris isnt {E} ? boris is {D}"
    model = Scripted(lambda text: {"boris": 1.0} if text.endswith("<infer>") else {"is": 1.0})
    session = session_of(3, model=model)
    run(load("selection_inference_random"), session, [question] * 300, 5)
    pairs = [text.removesuffix(" <infer>") for text in prompts_of(model) if text.endswith("<infer>")]
    assert len(pairs) == 300 and not any(text.endswith("<select>") for text in model.asked)
    assert set(pairs) == {f"{who} is {A} {A} is {B}" for who in ("dora", "boris")}
    assert sum(pair.startswith("dora ") for pair in pairs) / 300 == pytest.approx(1 / 2, abs=0.09)
    (stuck,) = run(load("selection_inference_random"), session, [f"{B} is {C} boris is {A} ? boris is {C}"], 64)
    assert stuck.startswith("ans ")  # nothing follows


def test_a_step_that_brings_nothing_new_is_the_last() -> None:
    question = deduction.told(some(1, 3, 2))

    def says(text: str) -> dict[str, float]:
        if "<infer>" not in text:
            return knows(text)
        fact = text.split()[:3]  # what was known is said again
        return {fact[len(text.partition("<infer>")[2].split())]: 1.0}

    session = session_of(model=Scripted(says))
    assert run(load("selection_inference"), session, [question], 512)[0] == completion("<dir>", question)
    assert session.spent == (1 + 2 + 8 + 3) + 1


# -- backward chaining -------------------------------------------------------------------------------------------------

TWO_WAYS = f"{C} is {D} {D} is {G} boris is {A} {B} isnt {G} dora is {C} {A} is {B} ? boris is {G}"


def test_backward_chaining_goes_down_one_branch_and_then_the_next() -> None:
    model = Scripted(knows)
    session = session_of(model=model)
    found = run(load("lambada"), session, [TWO_WAYS], 128)
    assert found == [f"boris is {A} . {A} is {B} boris is {B} . {B} isnt {G} boris isnt {G} . ans false"]
    told, first = TWO_WAYS.partition(" ?")[0], f"boris is {A} ? <holds> boris is"
    assert prompts_of(model) == [
        *(f"boris is {rule[0]} {deduction.said(rule)} <infer>" for rule in deduction.read(TWO_WAYS).rules),
        f"{told} ? <holds> boris is {G}", f"{first} {G}", f"{D} is {G} ? boris is {G} <goal>",
        f"{told} ? <holds> boris is {D}", f"{first} {D}", f"{C} is {D} ? boris is {D} <goal>",
        f"{told} ? <holds> boris is {C}", f"{first} {C}", f"{B} isnt {G} ? boris is {G} <goal>",
        f"{told} ? <holds> boris is {B}", f"{first} {B}", f"{A} is {B} ? boris is {B} <goal>",
        f"{told} ? <holds> boris is {A}", f"{first} {A}",
        f"{A} is {B} ? boris is {B} <agree>", f"{B} isnt {G} ? boris is {G} <agree>",
    ]  # fmt: skip
    assert session.spent == 4 * 3 + 4 * (3 + 1 + 3) + (3 + 4) + 1 + 1
    # One rule fewer in depth than there are, or a row fewer than it takes: nothing is known, and an answer is given at once.
    for method, rung in (("lambada", 49), ("shallow", 128)):
        search = load("lambada", depth=1) if method == "shallow" else load("lambada")
        assert run(search, session, [TWO_WAYS], rung) == ["ans false"]
    assert run(load("lambada"), session, [TWO_WAYS], 50) == found


def test_a_fact_counts_that_is_selected_among_all_and_verified_alone() -> None:
    """One that is likelier as a whole is selected; one of somebody else, or that the model says in other words, is none."""
    question = f"{A} is {G} dora is {G} boris is {A} boris isnt {G} ? boris is {G}"

    def says(text: str) -> dict[str, float]:
        words = text.split()
        if "<infer>" not in words and words[0] == A and "<holds>" in words:  # among all statements
            own = " ".join(words[words.index("<holds>") + 4 :])
            return {"": {"dora": 0.3, "boris": 0.2}, "boris": {"isnt": 0.9, "is": 0.1}, "dora": {"is": 0.1}}.get(
                own, knows(text)
            )
        return knows(text)

    session = session_of(model=Scripted(says))
    assert run(load("lambada"), session, [question], 64) == [f"boris isnt {G} . ans false"]
    for reply in (f"boris is {G} true", f"dora is {G} true unknown", "unknown"):

        def other(text: str, reply: str = reply) -> dict[str, float]:
            words = text.split()
            if words[0] != A and "<holds>" in words:
                own = words[words.index("<holds>") + 4 :]
                return {([*reply.split(), "<eos>"])[len(own)]: 1.0}
            return says(text)

        proved = run(load("lambada"), session_of(model=Scripted(other)), [question], 64)
        assert deduction.said(deduction.read(question).facts[2]) not in proved[0]


def test_any_two_rules_are_tried_where_nobody_is_asked() -> None:
    tried = set()
    for seed in range(30):
        model = Scripted(knows)
        run(load("lambada_any_rules"), session_of(seed, model=model), [TWO_WAYS], 128)
        asked = prompts_of(model)
        assert not [prompt for prompt in asked if "<infer>" in prompt]
        first = next(prompt for prompt in asked if prompt.endswith("<goal>"))  # of the two drawn for the goal itself
        assert first.endswith(f"? boris is {G} <goal>")
        tried.add(first.partition(" ?")[0])
    assert tried == {deduction.said(rule) for rule in deduction.read(TWO_WAYS).rules}


def test_circles_end_and_what_is_disproved_proves_nothing() -> None:
    model = Scripted(knows)
    session = session_of(model=model)
    circle = f"{A} is {G} {B} is {A} {A} is {B} dora is {C} ? boris is {G}"
    assert run(load("lambada"), session, [circle], 512) == ["ans true"]
    asked = prompts_of(model)
    assert len(asked) == len(set(asked)) == 3 * 3  # of each goal: is it known, which rules, what instead
    denied = f"boris isnt {A} {A} is {G} {B} is {G} boris is {B} ? boris is {G}"
    found = run(load("lambada"), session, [denied], 128)
    assert found == [f"boris is {B} . {B} is {G} boris is {G} . ans true"]


@pytest.mark.parametrize("name", ["lambada", "cop_deductive"])
def test_a_model_without_a_fault_proves_everything(name: str) -> None:
    asked = [some(seed, depth, 1) for seed, depth in enumerate((1, 3, 6))]
    session = session_of(model=Scripted(knows))
    found = run(load(name), session, [deduction.told(question) for question in asked], 128)
    assert found == [deduction.solution(question, "<proof>") for question in asked]


def test_searches_side_by_side_have_accounts_of_their_own() -> None:
    def search(form: str, times: int):  # type: ignore[no-untyped-def]
        heard = []
        for _ in range(times):
            heard.append((yield Ask(f"{A} is {B} ? boris is {B} {form}", 3)))
        return heard

    session = session_of(model=Scripted(knows))
    with torch.no_grad():
        found, left = side_by_side(session, [search("<goal>", 2), search("<agree>", 1), search("<goal>", 9)], [9, 9, 7])
    assert found == [[f"boris is {A}"] * 2, ["yes"], None]
    assert left == [3, 7, 0] and session.spent == 6 + 2 + 7  # "yes" and the end of the sequence


# -- mind maps ---------------------------------------------------------------------------------------------------------

DEAD = f"{C} is {D} {A} isnt {E} {D} is {G} {E} is {G} boris is {A} {B} isnt {G} dora is {C} {A} is {B} ? boris is {G}"
MAP = f"boris is {A} {A} is {B} {B} isnt {G}"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cop_deductive", MAP),
        ("cop_all_beings", f"dora is {C} {C} is {D} {D} is {G} {MAP}"),
        ("cop_unorganized", f"boris is {A} {B} isnt {G} {A} is {B}"),
        ("cop_unpruned", f"{MAP} {C} is {D} {A} isnt {E} {D} is {G} {E} is {G} dora is {C}"),
    ],
)
def test_the_map_is_told_from_its_leaf_to_its_root(name: str, told: str) -> None:
    model = Scripted(knows)
    session = session_of(model=model)
    proof = f"boris is {A} . {A} is {B} boris is {B} . {B} isnt {G} boris isnt {G} . ans false"
    assert run(load(name), session, [DEAD], 128) == [proof]
    assert prompts_of(model)[-1] == f"{told} ? boris is {G} <proof>"
    words = len(proof.split()) + 1
    assert session.spent == 6 * 3 + words


def test_the_map_goes_by_what_the_model_says_that_a_rule_gives() -> None:
    """Where it misreads a rule, the branch is cut, or grows where none is; nothing is said twice, and circles end."""

    def misreads(text: str) -> dict[str, float]:
        if text.partition(" <infer>")[0].endswith(f"{A} is {B}") and "<infer>" in text:
            return {f"boris is {E} <eos>".split()[len(text.partition("<infer>")[2].split())]: 1.0}
        return knows(text)

    model = Scripted(misreads)
    run(load("cop_deductive"), session_of(model=model), [DEAD], 128)
    assert prompts_of(model)[-1] == f"boris is {A} {A} is {B} {E} is {G} ? boris is {G} <proof>"
    (found,) = run(load("cop_path"), session_of(model=Scripted(misreads)), [DEAD], 128)
    assert found.startswith(f"boris is {A} . {A} is {B} boris is {B} . ans ")  # as far as it follows
    circle = f"{G} is {B} {B} is {A} {A} is {G} boris is {A} ? boris is {G}"
    model = Scripted(knows)
    run(load("cop_deductive"), session_of(model=model), [circle], 128)
    assert prompts_of(model)[-1] == f"boris is {A} {A} is {G} ? boris is {G} <proof>"


def test_where_there_is_no_map_the_question_stands_as_it_is() -> None:
    model = Scripted(knows)
    session = session_of(model=model)
    run(load("cop_deductive"), session, [DEAD], 64)
    assert prompts_of(model) == [f"{DEAD} <proof>"]
    (found,) = run(load("cop_path"), session, [DEAD], 64)
    assert found == deduction.solution(deduction.read(DEAD), "<proof>") and session.spent == 6 * 3 + 1
    asked = [p for seed in range(4) for p in _random_map(seed)]
    assert all(len(p.split()) == len(f"{MAP} ? boris is {G} <proof>".split()) for p in asked) and len(set(asked)) > 2


def _random_map(seed: int) -> list[str]:
    model = Scripted(knows)
    run(load("cop_random"), session_of(seed, model=model), [DEAD], 128)
    return prompts_of(model)[-1:]


# -- verified steps ----------------------------------------------------------------------------------------------------

SHORT = f"{A} isnt {G} boris is {A} {B} is {G} dora is {B} ? boris is {G}"
RIGHT = f"boris is {A} . {A} isnt {G} boris isnt {G} . ans false"
INVENTED = f"boris is {A} . {A} is {G} boris is {G} . ans true"  # a rule that is not there
MISTAKEN = f"boris is {A} . {A} isnt {G} boris is {G} . ans true"  # what does not follow
TURNED = f"boris is {A} . {A} isnt {G} boris isnt {G} . ans true"  # the wrong answer to a right proof
ELSEWHERE = f"boris is {A} . ans true"  # nothing about what is asked


def writes(wrong: str, share: float = 0.75) -> Callable[[str], dict[str, float]]:
    """A model that writes a wrong proof in so many of all texts, and judges without a fault."""

    def says(text: str) -> dict[str, float]:
        if {*text.split()[-1:], *text.split()[-4:-3]} & {"<follows>", "<agree>", "<whole>"}:
            return knows(text)
        own = text.partition("<proof>")[2].split()
        found: dict[str, float] = {}
        for proof, p in ((f"{wrong} <eos>".split(), share), (f"{RIGHT} <eos>".split(), 1 - share)):
            if proof[: len(own)] == own and len(own) < len(proof):
                found[proof[len(own)]] = found.get(proof[len(own)], 0.0) + p
        return {word: p / sum(found.values()) for word, p in found.items()} or {"<eos>": 1.0}

    return says


@pytest.mark.parametrize(
    ("wrong", "fooled"),
    [
        (INVENTED, {"unnumbered"}),
        (MISTAKEN, {"lookup"}),
        (TURNED, {"lookup"}),
        (ELSEWHERE, {"unnumbered"}),
    ],
)
def test_verified_proofs_win_over_those_that_are_written_more_often(wrong: str, fooled: set[str]) -> None:
    """Each fault is found by its own part, premises by their numbers and inferences by a verdict; a vote is fooled by all."""
    for name in ("natural_program", "natural_program_lookup", "natural_program_unnumbered", "self_consistency"):
        session = session_of(3, model=Scripted(writes(wrong)))
        (found,) = run(load(name), session, [SHORT], 400)
        assert session.spent <= 400
        assert found == (wrong if name.rpartition("_")[2] in fooled | {"consistency"} else RIGHT), name


def test_whole_proofs_are_verified_in_a_row_each() -> None:
    for name in ("natural_program_whole", "natural_program_exact"):
        model = Scripted(writes(MISTAKEN))
        session = session_of(3, model=model)
        assert run(load(name), session, [SHORT], 300) == [RIGHT]
        tests = [f"{SHORT} <proof> {proof} <whole>" for proof in (RIGHT, MISTAKEN)]
        asked = [p for p in prompts_of(model) if not p.endswith("<proof>")]
        assert sorted(asked) == (sorted(tests) if "whole" in name else [])


def test_a_verdict_sees_the_premises_alone_and_costs_a_row_once() -> None:
    model = Scripted(writes(MISTAKEN, 0.5))
    session = session_of(1, model=model)
    run(load("natural_program"), session, [SHORT], 240)
    tests = [p for p in prompts_of(model) if not p.endswith("<proof>")]
    assert sorted(tests) == sorted(
        [
            f"boris is {A} {A} isnt {G} <follows> boris isnt {G}",
            f"boris is {A} {A} isnt {G} <follows> boris is {G}",
            f"{A} isnt {G} ? boris is {G} <agree>",
        ]
    )
    proofs = sum(text.endswith(("ans true", "ans false")) for text in model.asked)
    assert proofs > 5 and session.spent == 1 + proofs * (len(RIGHT.split())) + 3
    # Where no proof is verified all of them vote.
    session = session_of(2, model=Scripted(writes(MISTAKEN, 1.0)))
    assert run(load("natural_program"), session, [SHORT], 240) == [MISTAKEN]


def test_three_verdicts_decide_by_majority() -> None:
    """P(yes) = .7 at temperature 1, q = .77 at .7: two of three with q^3 + 3 q^2 (1 - q) = .87, one alone with .77."""
    model = Scripted(lambda text: {"yes": 0.7, "no": 0.3})
    session, method = session_of(5, model=model), load("natural_program")
    proof = module_of("natural_program").Sampled([], "true", (("yes <follows>", True), ("no <follows>", False)))
    passed: dict[tuple[int, str], bool] = {}
    method.ask(session, [[proof, proof] for _ in range(300)], passed)
    assert session.spent == len(passed) == 600
    assert sum(passed.values()) / 600 == pytest.approx(0.866, abs=0.04)
    asked = deduction.read(SHORT)
    for said in ({"yes": True, "no": False}, {"yes": True, "no": True}, {"yes": False, "no": False}):
        verdicts = {(0, f"{word} <follows>"): value for word, value in said.items()}
        assert method.verified(session, asked, proof, 0, verdicts) == (said == {"yes": True, "no": False})


def test_a_coin_verifies_half_of_all_proofs_and_a_bound_the_right_ones() -> None:
    asked, session = deduction.read(SHORT), session_of(1)
    sampled = module_of("natural_program").Sampled
    proofs = [sampled(encode(proof), proof.split()[-1], ()) for proof in (RIGHT, MISTAKEN)]
    coin, bound = load("natural_program_coin"), load("natural_program_exact")
    tosses = [coin.verified(session, asked, proofs[k % 2], 0, {}) for k in range(400)]
    assert sum(tosses[::2]) / 200 == pytest.approx(0.5, abs=0.12) and sum(tosses[1::2]) / 200 == pytest.approx(
        0.5, abs=0.12
    )
    assert [bound.verified(session, asked, proof, 0, {}) for proof in proofs] == [True, False]
    for name in ("natural_program", "natural_program_coin", "natural_program_exact"):
        assert not load(name).verified(session, asked, sampled(encode("boris is"), None, ()), 0, {})


NAMES = (
    "selection_inference selection_inference_written selection_inference_random lambada lambada_any_rules "
    "cop_deductive cop_unpruned cop_all_beings cop_unorganized cop_random cop_path "
    "natural_program natural_program_whole natural_program_lookup natural_program_unnumbered natural_program_coin "
    "natural_program_exact"
).split()


@pytest.mark.parametrize("name", NAMES)
def test_every_rung_has_an_answer_and_is_kept(name: str) -> None:
    """Words at random: nothing is a statement, nothing ends."""
    questions = [deduction.told(some(seed, depth, 4)) for seed, depth in ((0, 2), (1, 5))]
    for rung in (1, 3, 16, 150):
        session = session_of(model=tiny(3, depth=1))
        found = run(load(name), session, questions, rung)
        assert all(1 <= len(encode(text)) <= 400 for text in found) and session.spent <= 2 * rung
