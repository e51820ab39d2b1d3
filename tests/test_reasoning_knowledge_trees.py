"""Methods that search on what is known by heart: trees of explanations, And-Or programs."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from stepmark.datasets import closed_world, knowledge
from tests.rigs.knowing import judge, some, told, writer
from tests.rigs.reasoning import Scripted, load, module_of, run, session_of, tiny

from stepmark.backbones.reasoners import encode

torch.set_num_threads(1)

FACTS = closed_world.world().facts
PEOPLE, THINGS, TRADES = (closed_world.KINDS[kind] for kind in ("person", "thing", "trade"))
(A, B, C), (L, M) = closed_world.KINDS["town"][:3], closed_world.KINDS["land"][:2]


# -- maieutic --------------------------------------------------------------------------------------------------------


def test_satisfiability_is_exact() -> None:
    """Against all assignments, over clauses at random."""
    satisfied, rng = module_of("maieutic_prompting").satisfied, random.Random(0)
    for _ in range(60):
        names = [None, *(("alma", "home", str(k)) for k in range(rng.randrange(1, 7)))]
        found = []
        for _ in range(rng.randrange(2, 14)):
            chosen = rng.sample(names, min(len(names), rng.randrange(1, 4)))
            found.append(([(name, rng.random() < 0.5) for name in chosen], rng.choice((1.0, 2.0, rng.random()))))
        name = rng.choice(names)
        found.append(([(name, True), (name, False)], 9.0))  # nobody can violate it

        def cost(values: dict[Any, bool], found: Any = found) -> float:
            return sum(c for literals, c in found if all(values[name] != sign for name, sign in literals))

        every = [dict(zip(names, signs, strict=True)) for signs in itertools.product((True, False), repeat=len(names))]
        start = {name: rng.random() < 0.5 for name in names}
        values = {name: start[name] for name in names} | satisfied(found, start)
        assert cost(values) == pytest.approx(min(map(cost, every)))
        assert cost(start) > cost(values) or values == start  # nothing is turned without need
        as_before = [each for each in every if each[None] == start[None]]
        if min(map(cost, as_before)) == pytest.approx(min(map(cost, every))):
            assert values[None] == start[None]


def test_satisfiability_stays_cheap_where_all_is_believed() -> None:
    """Five relations of six values each, all believed, which 75 clauses forbid two by two: each keeps its likeliest."""
    satisfied = module_of("maieutic_prompting").satisfied
    facts = [[(str(group), "home", str(value)) for value in range(6)] for group in range(5)]
    found: list[Any] = [([(fact, False), (None, False)], 0.01) for own in facts for fact in own]
    for own in facts:
        found += [([(fact, True)], 0.6 + 0.05 * k) for k, fact in enumerate(own)]
        found += [([(one, False), (other, False)], 2.0) for one, other in itertools.combinations(own, 2)]
    begun = time.process_time()
    values = satisfied(found, {None: True} | {fact: True for own in facts for fact in own})
    assert [fact for fact, value in values.items() if fact and value] == [own[-1] for own in facts]
    assert values[None] is False and time.process_time() - begun < 2


CLAIM = knowledge.Question("claim", "alma", ("land",), (L,))
KNOWN, LIES = ("alma", "home", A), ("alma", "home", B)


def thinker(why: dict[str, dict[str, float]], held: dict[str, float], shown: dict[str, float]) -> Scripted:
    """`why`: "statement label" -> explanations; `held`: fact -> p(true), of its denial the rest, .5 both ways where it is not
    named; `shown`: facts -> p(true) of what is asked behind them."""

    def reply(prompt: str) -> dict[str, float]:
        behind, there, question = prompt.rpartition(" -> ")
        statement = question.partition(" ?")[0]
        if prompt.endswith("<why>"):
            own = {label: why.get(f"{statement} {label}", {}) for label in ("true", "false")}
            return {f"{label} {text}": p for label, texts in own.items() for text, p in texts.items()}
        p = shown[behind] if there else held.get(statement.replace(" isnt", ""), 0.5)
        p = 1 - p if "isnt" in statement and not there else p
        return {"ans true": p, "ans false": 1 - p}

    return writer(reply)


def test_an_integral_claim_needs_no_tree() -> None:
    session = session_of(model=thinker({}, {f"alma land {L}": 0.9}, {}))
    for name in ("maieutic_prompting", "maieutic_belief", "maieutic_majority"):
        texts = run(load(name), session, told([CLAIM, replace(CLAIM, sign=False)]), 64)
        assert texts == ["ans true", "ans false"] and session.spent == 4


def test_beliefs_and_not_the_number_of_explanations_decide() -> None:
    """Two explanations for "true", of facts that the model knows to be wrong; one for "false", of facts that it knows."""
    lies = {f"alma home {town} . {town} land {L} .": 0.5 for town in (B, C)}
    truth = f"alma home {A} . {A} land {M} ."
    why = {f"alma land {L} true": lies, f"alma land {L} false": {truth: 1.0}}
    held = {f"alma home {A}": 0.95, f"{A} land {M}": 0.9, f"alma home {B}": 0.1, f"alma home {C}": 0.1}
    held |= {f"{town} land {L}": 0.9 for town in (B, C)}
    shown = {truth: 0.1} | dict.fromkeys(lies, 0.9)
    for name, answer in (("maieutic_prompting", f"{truth} ans false"), ("maieutic_majority", "ans true")):
        model = thinker(why, held, shown)
        session = session_of(5, model=model)
        (text,) = run(load(name), session, told([CLAIM]), 512)
        assert text.endswith(answer), name
        kinds = len({prompt for prompt in model.asked if "->" in prompt})
        assert (
            kinds > 1 and session.spent == 2 + 3 * 2 * 9 + (2 * 2 + 1) * kinds
        )  # 8 words and the end, beliefs, one verdict
    session = session_of(5, model=thinker(why, held | {f"alma land {L}": 0.55}, shown))
    assert run(load("maieutic_belief"), session, told([CLAIM]), 512) == ["ans true"] and session.spent == 2


@pytest.mark.parametrize("grounded", [True, False])
def test_what_is_not_integral_is_explained_once_more_or_dropped(grounded: bool) -> None:
    """The one explanation is of a fact that is not integral; only where facts that are known speak for it does it count."""
    why = {
        f"alma land {L} true": {"alma": 1.0},
        f"alma land {L} false": {f"alma home {A} .": 1.0},
        f"alma home {A} true": {f"alma mate boris . boris home {A} .": 1.0},
        f"alma home {A} false": {f"alma home {B} .": 1.0},
    }
    sure = 0.95 if grounded else 0.6
    held = {"alma mate boris": sure, f"boris home {A}": sure, f"alma land {L}": 0.6}
    shown = {f"alma home {A} .": 0.2, f"alma mate boris . boris home {A} .": 0.9, f"alma home {B} .": 0.2}
    model = thinker(why, held, shown)
    session = session_of(0, model=model)
    (text,) = run(load("maieutic_prompting"), session, told([CLAIM]), 512)
    assert text == (f"alma home {A} . ans false" if grounded else "ans true")
    asked = [text for text in model.asked if text.endswith(("<why> true", "<why> false"))]
    assert asked.count(f"alma home {A} ? <why> true") == asked.count(f"alma home {A} ? <why> false") == 1
    assert asked.count(f"alma land {L} ? <why> false") == 3


def test_explanations_of_facts_are_drawn_colder() -> None:
    """Of two explanations one is four times as likely: at temperature 1 four fifths are that, at .5 all but a seventeenth."""
    often, seldom = (f"alma home {town} . {town} land {L} ." for town in (A, B))
    why = {f"alma land {L} {label}": {often: 0.8, seldom: 0.2} for label in ("true", "false")}
    why |= {f"alma home {A} {label}": {f"alma mate {who} .": p for who, p in zip(PEOPLE[1:3], (0.8, 0.2), strict=True)}
            for label in ("true", "false")}  # fmt: skip
    model = thinker(why, {f"alma home {B}": 0.9} | {f"{town} land {L}": 0.9 for town in (A, B)}, Always(0.5))
    session = session_of(3, model=model)
    run(load("maieutic_prompting"), session, told([CLAIM] * 60), 512)
    pairs = {f"alma land {L}": (f"home {A}", f"home {B}"), f"alma home {A}": (f"mate {PEOPLE[1]}", f"mate {PEOPLE[2]}")}
    rare = {}
    for statement, (first, second) in pairs.items():
        texts = [text for text in model.asked if text.startswith(f"{statement} ? <why>")]
        drawn = Counter(" ".join(text.split()[-2:]) for text in texts if text.split()[-3:-2] == ["alma"])
        rare[statement] = drawn[second] / (drawn[first] + drawn[second])
    assert rare[f"alma land {L}"] == pytest.approx(0.2, abs=0.07)  # of 360
    assert rare[f"alma home {A}"] == pytest.approx(1 / 17, abs=0.06)  # of 120


class Always(dict[str, float]):
    """The same for all keys."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def __missing__(self, key: str) -> float:
        return self.value


def test_clauses_are_weighed_by_belief_and_rivals_exclude_each_other() -> None:
    module = module_of("maieutic_prompting")
    tree = module.Tree(CLAIM, (0.5, 0.5), 0, {KNOWN: (0.9, 0.3), LIES: (0.05, 0.95)})
    tree.explained[None] = {(KNOWN,): False, (LIES,): True}
    found = module.clauses(tree)
    assert ([(KNOWN, False), (None, False)], 1.0) in found and ([(LIES, False), (None, True)], 1.0) in found
    assert [(c, pytest.approx(w)) for c, w in found if len(c) == 1] == [([(KNOWN, True)], 0.5), ([(LIES, False)], 0.9)]
    assert ([(KNOWN, False), (LIES, False)], 2.0) in found and len(found) == 5
    assert module.integral((0.73, 0.27)) and module.integral((0.27, 0.73)) and not module.integral((0.72, 0.28))
    tree.facts[KNOWN] = (0.7, 0.3)  # .4 is not integral
    assert module.clauses(tree) == [([(LIES, False), (None, True)], 1.0), ([(LIES, False)], pytest.approx(0.9))]
    mate = (
        "alma",
        "mate",
        "boris",
    )  # an explanation of what is not integral: it is in the clauses, what is believed of it not
    tree.facts[mate], tree.explained[KNOWN] = (1.0, 0.0), {(mate,): True}
    found = module.clauses(tree)
    assert ([(KNOWN, False), (None, False)], 1.0) in found and ([(mate, False), (KNOWN, True)], 1.0) in found
    assert [(c, pytest.approx(w)) for c, w in found if len(c) == 1] == [([(LIES, False)], 0.9), ([(mate, True)], 1.0)]


def test_a_question_has_its_rung_for_itself() -> None:
    """The first claim is settled by two rows, the others are not: none of them has more than its own, nor less."""
    told_so, told_not = f"alma home {A} .", f"alma home {B} ."
    why = {f"alma land {L} true": {told_so: 1.0}, f"alma land {L} false": {told_not: 1.0}}
    held = {f"alma home {A}": 0.9, f"alma home {B}": 0.1, f"dora land {L}": 0.95}
    model = thinker(why, held, {told_so: 0.9, told_not: 0.1})
    sure = replace(CLAIM, subject="dora")

    def spent(claims: list[knowledge.Question], rung: int) -> float:
        session = session_of(0, model=model)
        texts = run(load("maieutic_prompting"), session, told(claims), rung)
        assert texts == [f"{told_so} ans true" if claim == CLAIM else "ans true" for claim in claims]
        return session.spent

    pair = 2 * 5 + 2 * 2 + 2  # two explanations of 5 tokens, each with a fact and a verdict
    assert spent([CLAIM], 64) == 2 + pair
    assert spent([sure, CLAIM, sure, CLAIM], 64) == 2 * 2 + 2 * (2 + pair)
    assert spent([sure, CLAIM], 512) == 2 + 2 + pair + 2 * 10  # the same ones come again, and nothing new is asked


def test_a_tree_grows_while_there_is_room_for_a_pair() -> None:
    """Two explanations of 4 facts each, 17 tokens, 8 beliefs and a verdict: 52 rows, and the question takes two."""
    told_so, told_not = (" ".join(f"{who} home {A} ." for who in PEOPLE[k : k + 4]) for k in (0, 4))
    why = {f"alma land {L} true": {told_so: 1.0}, f"alma land {L} false": {told_not: 1.0}}
    for rung, rows in ((16, 2), (53, 2), (54, 54), (105, 54)):
        session = session_of(model=thinker(why, {}, {told_so: 0.9, told_not: 0.1}))
        assert run(load("maieutic_prompting"), session, told([CLAIM]), rung) == ["ans true"]
        assert session.spent == rows, rung
    beliefs = load("maieutic_coin").believed(session_of(1), [KNOWN] * 400)
    assert 0.2 < sum(abs(p - q) > 0.45 for p, q in beliefs) / 400 < 0.4  # .55 ** 2 of a square


@pytest.mark.parametrize(("left", "explained"), [(51, 0), (52, 1), (67, 1), (68, 2)])
def test_a_pair_waits_until_those_before_it_have_left_room(left: int, explained: int) -> None:
    """52 rows are kept for a pair, and it takes 16: two explanations of 5 tokens, each with a fact and a verdict."""
    module = module_of("maieutic_prompting")
    why = {
        f"{' '.join(fact)} {label}": {f"alma mate {PEOPLE[k]} .": 1.0}
        for fact, k in ((KNOWN, 3), (LIES, 5))
        for label, k in (("true", k), ("false", k + 1))
    }
    session = session_of(model=thinker(why, {}, {f"alma mate {who} .": 0.9 for who in PEOPLE[:9]}))
    session.ledger.reset(limit=1_000)
    tree = module.Tree(CLAIM, (0.5, 0.5), left)
    load("maieutic_prompting").grow(session, [(tree, KNOWN), (tree, LIES)], 0.5)
    assert list(tree.explained) == [KNOWN, LIES][:explained]
    assert left - tree.left == session.spent == 16 * explained


# -- And-Or ----------------------------------------------------------------------------------------------------------


def crafter(
    extra: dict[str, str] | None = None, knows: Callable[[closed_world.Fact], bool] = knowledge.holds
) -> Scripted:
    """A model that names all ways and their parts, and further ways, goal -> "trade: parts"; it believes what it knows."""
    extra = extra or {}

    def reply(prompt: str) -> dict[str, float]:
        words = prompt.split()
        if prompt.endswith("<ways>"):
            ways = [r.split()[1] for s, r in FACTS if s == words[0] and r.startswith("by ")]
            more = [extra[words[0]].partition(":")[0]] if words[0] in extra else []
            return {" , ".join([*more, *ways]): 1.0}
        if prompt.endswith("<parts>"):
            trade, _, parts = extra.get(words[0], "").partition(": ")
            parts = parts if trade == words[2] else FACTS[words[0], f"by {words[2]}"]
            return {parts.replace(" ", " , "): 1.0}
        claim = knowledge.read(prompt.removesuffix(" <dir>"))
        so = knows((claim.subject, claim.path[0], claim.others[0]))
        return {"ans true": 0.8 if so else 0.2, "ans false": 0.2 if so else 0.8}

    return writer(reply)


def test_a_program_of_right_clauses_has_the_closure_for_its_model() -> None:
    questions = [some("make", 1, seed, level=2 + seed % 3)[0] for seed in range(6)]
    session = session_of(model=crafter())
    for name in ("and_or_recursors", "and_or_unfiltered"):
        texts = run(load(name), session, told(questions), 1024)
        for question, text in zip(questions, texts, strict=True):
            seen = judge(question, text)
            assert seen["f1"] == 1.0 and set(knowledge.parse(text).facts) <= {(*k, v) for k, v in FACTS.items()}, name
            have = set(question.others)
            for fact in knowledge.parse(text).facts:  # parts before wholes
                assert fact is not None and have.issuperset(fact[2].split())
                have.add(fact[0])
    alone = crafter()
    run(load("and_or_recursors"), session_of(model=alone), told(questions[2:3]), 1024)
    assert set(Counter(text for text in alone.asked if text.endswith("<ways>")).values()) == {
        1
    }  # a goal is expanded once
    shallow = run(load("and_or_shallow"), session, told(questions), 1024)
    for question, text in zip(questions, shallow, strict=True):
        assert (
            (judge(question, text)["f1"] == 1.0)
            if THINGS.index(question.subject) < 3 * closed_world.LAYER
            else text == "ans"
        )


def test_the_oracle_keeps_out_what_is_made_up() -> None:
    """Everything is said to be made, by one trade more, of two raw things that are there; the goal cannot be made."""
    question = next(q for q in some("make", 40, level=2) if q.subject not in knowledge.answer(q).split())
    raw = " ".join(question.others[:2])
    extra = {
        t: f"{next(w for w in TRADES if (t, f'by {w}') not in FACTS)}: {raw}" for t in THINGS[closed_world.LAYER :]
    }
    session = session_of(7, model=crafter(extra))
    seen = {
        name: judge(question, run(load(name), session, told([question]), 1024)[0])
        for name in ("and_or_recursors", "and_or_unfiltered", "and_or_shuffled")
    }
    assert seen["and_or_recursors"]["f1"] == 1.0
    assert question.subject in seen["and_or_unfiltered"]["said"].split() and seen["and_or_unfiltered"]["recall"] == 1.0
    assert seen["and_or_shuffled"]["f1"] < 1.0
    # the way alone is not believed, or its parts alone are not
    for kind in ("way", "parts"):
        model = crafter(extra, lambda fact, kind=kind: knowledge.holds(fact) or (fact[1] == "by") == (kind == "parts"))
        (text,) = run(load("and_or_recursors"), session_of(7, model=model), told([question]), 1024)
        assert judge(question, text)["f1"] == 1.0, kind


def test_shuffled_verdicts_drop_as_many_lines() -> None:
    program = module_of("and_or_recursors").Program((), {}, [], 1_000)
    lines = [
        (program, [(thing, "by", trade)])
        for thing in closed_world.THINGS[closed_world.LAYER :]
        for trade in closed_world.KINDS["trade"]
    ]
    session = session_of(1, model=crafter())
    session.ledger.reset(limit=1e6)
    asked, dealt = (load(name).agreed(session, lines) for name in ("and_or_recursors", "and_or_shuffled"))
    assert sum(asked) == sum(dealt) == 2 * 32 and asked != dealt and program.left == 1_000 - 2 * len(lines)
    assert asked == [knowledge.holds(fact) for _, (fact,) in lines] and session.spent == 2 * len(lines)
    # one part that is not believed drops the whole line
    thing = THINGS[-1]
    relation = next(r for s, r in FACTS if s == thing and r.startswith("by "))
    part, other = FACTS[thing, relation].split()[0], THINGS[0]
    pair = [(program, [(thing, relation, part), (thing, relation, other)]), (program, [(thing, relation, part)])]
    assert load("and_or_recursors").agreed(session, pair) == [False, True]


def test_a_list_with_gaps_makes_no_clause() -> None:
    """Parts that run on, that are no things, or one thing twice, prove nothing; one thing alone does."""
    question = some("make", 1, level=2)[0]
    one, two, three = question.others[:3]

    def reply(prompt: str) -> dict[str, float]:
        if prompt.endswith("<ways>"):
            return {TRADES[0]: 1.0}
        return {text: 1.0} if prompt.endswith("<parts>") else {"ans true": 1.0}

    for text in (f"{one} , {two} , {three}", f"{one} , alma", f"{one} , {one}", f"{one} {two}", question.subject, one):
        session = session_of(model=writer(reply))
        (found,) = run(load("and_or_unfiltered"), session, told([question]), 64)
        proved = f"{question.subject} by {TRADES[0]} {one} . ans {question.subject}"
        assert found == (proved if text == one else "ans"), text


def test_lists_at_once_name_what_most_of_them_do() -> None:
    """One thing is in all lists, one in seven of ten, one in three of ten; a town is no thing."""
    question = some("make", 1, level=2)[0]
    one, two, three = THINGS[30], THINGS[20], THINGS[10]
    lists = {f"ans {one} {two} {A}": 0.7**0.7, f"ans {one} {three} {A}": 0.3**0.7}  # of which the root of .7 is drawn
    model = writer(lambda prompt: lists if prompt == f"{knowledge.told(question)} <dir>" else {})
    session = session_of(2, model=model)
    assert run(load("and_or_lists"), session, told([question]), 1024) == [f"ans {two} {one}"]
    assert session.spent == 1 + 30 * 4  # the first word comes with the prompt; there is room for 30 lists of 34 words
    other = some("make", 1, seed=1, level=3)[0]
    assert run(load("and_or_lists"), session, told([question, other]), 1024)[1] == "ans"  # of which it lists nothing
    run(load("and_or_lists"), session, told([question]), 67)
    assert session.spent == 5  # one list, for which the prompt and four words are read


def test_lists_are_drawn_almost_greedily() -> None:
    """Of two trades of odds 3 to 2, at temperature .2 the second comes in 1 of 1 + 1.5 ** 5."""
    module = module_of("and_or_recursors")
    program = module.Program((), {}, [], 1_000)
    session = session_of(4, model=writer(lambda prompt: {TRADES[0]: 0.6, TRADES[1]: 0.4}))
    session.ledger.reset(limit=1e6)
    found = Counter(tuple(words) for words in module.asked(session, [(program, f"{THINGS[30]} ? <ways>")] * 300, 6))
    assert found[TRADES[1],] / 300 == pytest.approx(1 / (1 + 1.5**5), abs=0.06) and program.left == 1_000 - 2 * 300


def busy(prompt: str) -> dict[str, float]:
    """Three trades and two parts of every goal, all agreed with: 6 words, 3 * (1 + 4 + 2)."""
    if prompt.endswith("<ways>"):
        return {" , ".join(TRADES[:3]): 1.0}
    if not prompt.endswith("<parts>"):
        return {"ans true": 1.0}
    k = THINGS.index(prompt.split()[0]) + TRADES.index(prompt.split()[2])
    return {f"{THINGS[k - 5]} , {THINGS[k - 4]}": 1.0}


def test_a_goal_takes_no_more_rows_than_are_kept_for_it() -> None:
    question = f"make {THINGS[30]} | {' | '.join(THINGS[:5])} ?"
    for rung, goals in ((26, 0), (27, 1), (53, 1), (54, 2)):
        session = session_of(model=writer(busy))
        run(load("and_or_recursors"), session, [question], rung)
        assert session.spent == 27 * goals, rung


def test_each_program_has_its_rung_for_itself() -> None:
    """A thing that cannot be made takes six rows, and leaves nothing to the others of its batch."""
    hard, easy = (f"make {THINGS[k]} | {' | '.join(THINGS[:5])} ?" for k in (30, 39))

    def reply(prompt: str) -> dict[str, float]:
        return {"alma": 1.0} if prompt.startswith(f"{THINGS[39]} ? ") else busy(prompt)

    texts = {}
    for questions in ([hard], [easy, hard, easy]):
        session = session_of(model=writer(reply))
        texts[len(questions)] = run(load("and_or_recursors"), session, questions, 81)
        assert session.spent == 3 * 27 + 2 * (len(questions) - 1)
    assert texts[3] == ["ans", texts[1][0], "ans"]


# -- all of them -----------------------------------------------------------------------------------------------------

NAMES = {
    "claim": "maieutic_prompting maieutic_belief maieutic_majority maieutic_coin",
    "make": "and_or_recursors and_or_unfiltered and_or_shuffled and_or_shallow and_or_lists",
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names.split()])
def test_every_rung_has_an_answer_and_is_kept(kind: str, name: str) -> None:
    """Words at random: nothing is a fact, nothing ends."""
    for rung in (64, 512):
        session = session_of(model=tiny(3, depth=1))
        found = run(load(name), session, told(some(kind, 2)), rung)
        assert all(1 <= len(encode(text)) <= 400 for text in found) and 0 < session.spent <= 2 * rung
