"""Benchmarks and analyses of the reasoning track: grades are those worked out by hand, and each arm does what it is named for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stepmark.datasets import analogies, deduction, navigation, procedures, traces
from tests.rigs.reasoning import Scripted, Session, load, module_of, run, session_of, tiny

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, encode
from stepmark.tracks.reasoning.populations import texts_that_fit

torch.set_num_threads(1)

A, B, C = deduction.CONCEPTS[:3]
FACTS = f"alma is {A} {A} is {B} {B} is {C} dora is {B} ? alma is {C}"

# -- l0-bench --------------------------------------------------------------------------------------------------------------

PROGRAM = "x = 3 ; y = x + 4 ; while x < 7 do x = x + 2 done ? y"
RIGHT, NEAR, FAR = "x 3 ; y 7 ; x 5 ; x 7 ; ans 7", "x 3 ; y 7 ; x 5 ; x 8 ; ans 7", "x 3 ; y 8 ; x 5 ; x 7 ; ans 8"


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


def test_traces_are_graded_whole_and_by_their_length() -> None:
    for text, valid, prefix, answer in ((RIGHT, 1, 1, 1), (NEAR, 0, 0.75, 1), (FAR, 0, 0.25, 0)):
        found = traces.judged(PROGRAM, text)
        assert (found["valid"], found["prefix"], found["accuracy"]) == (valid, prefix, answer)
        assert found["valid_few"] == valid and found["valid_many"] != found["valid_many"]
    for lines in (6, 7, 12, 13):
        source = traces.program(random.Random(lines), lines)
        name = sorted(traces.run(source)[1])[0]
        found = traces.judged(f"{source} ? {name}", traces.solution(source, name, "<trace>"))
        there = {key for key, value in found.items() if value == 1 and key.startswith("valid_")}
        cells = {6: {"few", "trained"}, 7: {"many", "trained"}, 12: {"many", "trained"}, 13: {"longer"}}
        assert there == {f"valid_{cell}" for cell in cells[lines]}


def test_votes_over_traces_and_over_answers_differ_where_wrong_traces_share_an_answer() -> None:
    """Of the traces 0.32 are one with answer 8; four of 0.17 each share the answer 7."""
    others = [RIGHT, NEAR, NEAR.replace("x 5", "x 6"), NEAR.replace("x 3", "x 4")]
    model = texts_by_chance("<trace>", {FAR: 0.32, **dict.fromkeys(others, 0.17)})

    def outcome(name: str) -> Counter[str]:
        session = session_of(1, model=model)
        texts = run(load(name), session, [PROGRAM] * 12, 512)
        assert session.spent <= 12 * 512
        return Counter(text.rpartition("ans ")[2] for text in texts)

    assert outcome("l0_answer_vote")["7"] >= 10
    assert outcome("l0_vote")["8"] >= 6


def test_a_vote_is_of_sixteen_at_most_and_what_is_cut_has_none() -> None:
    """Traces of 6 tokens behind a row that gives their first; those without an end are drawn more often than the one."""
    short, endless = "x 3 ; ans 3", " ".join(["x"] * 12)
    model = texts_by_chance("<trace>", {short: 1.0})
    session = session_of(1, model=model)
    for name in ("l0_vote", "l0_answer_vote"):
        assert run(load(name), session, [PROGRAM] * 2, 1024) == [f"0 {short}"] * 2
        assert session.spent == 2 * (1 + 16 * 6)
        model = texts_by_chance("<trace>", {endless: 0.7, short: 0.3})
        texts = run(load(name, MOST=12), session_of(2, model=model), [PROGRAM] * 4, 1024)
        assert texts == [f"1 {short}"] * 4


def test_a_text_more_is_begun_while_there_is_room_for_the_longest() -> None:
    """Texts of 5 tokens behind a row that gives their first: 1 + 4 k rows, and one more each if it is to be judged."""
    model = Scripted(lambda text: {"<eos>": 1.0} if text.endswith("3 3 3 3") else {"3": 1.0})
    for rung, aside, most, count in (
        (5, 0, 9, 1),
        (8, 0, 9, 1),
        (9, 0, 9, 2),
        (100, 0, 9, 9),
        (100, 1, 99, 19),
        (11, 1, 9, 2),
    ):
        session = session_of(model=model)
        session.ledger.reset(limit=1e6)
        with torch.no_grad():
            found = texts_that_fit(
                session, Chains(model, [encode("tom")] * 2), rung, 64, temperature=0.7, most=most, aside=aside
            )
        assert [len(texts) for texts in found] == [count] * 2 and all(len(text) == 5 for text in found[0])
        assert session.spent + 2 * aside * count <= 2 * rung


def test_examples_are_whole_worked_programs_drawn_anew_for_each_question() -> None:
    model = Scripted(lambda text: {"<eos>": 1.0})
    session = session_of(2, model=model)
    session.train = {
        "prompt": [f"x = {k} ? x <trace>" for k in range(9)],
        "target": [f"x {k} ; ans {k}" for k in range(9)],
    }
    method = load("l0_shots")
    session.state = dict(method.prepare(session))
    run(method, session, [PROGRAM] * 60, 64)
    drawn = Counter[str]()
    for text in model.asked:
        first, second, own = text.split(" | ")
        assert own == f"{PROGRAM} <trace>" and first != second
        for shown in (first, second):
            assert shown in {f"x = {k} ? x <trace> x {k} ; ans {k}" for k in range(9)}
            drawn[shown] += 1
    assert len(drawn) == 9
    assert load("l0_bench").prepare(session) == {}


def test_every_size_and_format_is_asked_for() -> None:
    roles = {role: Scripted(lambda text: {"<eos>": 1.0}) for role in ("model", "small", "large")}
    for name, role, form in (
        ("l0_bench", "model", "<trace>"), ("l0_small", "small", "<trace>"), ("l0_large", "large", "<trace>"),
        ("l0_direct", "model", "<last>"),
    ):  # fmt: skip
        before = {each: len(model.asked) for each, model in roles.items()}
        run(load(name), session_of(**roles), [PROGRAM], 64)
        assert roles[role].asked[-1] == f"{PROGRAM} {form}"
        assert [each for each, model in roles.items() if len(model.asked) > before[each]] == [role]


# -- procbench -------------------------------------------------------------------------------------------------------------


def carrier(slips: int = 0) -> Scripted:
    """A model that carries procedures out, one letter or digit wrong in states from step `slips` on of a text, if any."""

    def says(text: str) -> dict[str, float]:
        form = next((form for form in ("<states>", "<last>") if form in text), "")
        if not form:
            return {}
        asked, _, own = text.partition(f" {form}")
        parts = procedures.solution(asked, form).split(" ; ")
        if slips and len(parts) > slips:
            parts[slips - 1 : -1] = ["j j j"] * (len(parts) - slips)
        words = [*" ; ".join(parts).split(), "<eos>"]
        said = own.split()
        return {words[len(said)]: 1.0}

    return Scripted(says)


@pytest.mark.parametrize("kind", procedures.KINDS)
def test_one_step_a_call_carries_the_state_on_and_gives_what_one_text_gives(kind: str) -> None:
    """The model's second state of a text is wrong; asked one step at a time it never comes to one."""
    questions = [procedures.prompt(random.Random(k), kind, steps) for k, steps in enumerate((1, 2, 5, 9))]
    gold = [procedures.solution(asked, "<states>") for asked in questions]
    session = session_of(model=carrier())
    assert run(load("procbench"), session, questions, 1024) == gold
    assert run(load("procbench_steps"), session, questions, 1024) == gold
    slipping = session_of(model=carrier(slips=2))
    found = run(load("procbench"), slipping, questions, 1024)
    assert [a == b for a, b in zip(found, gold, strict=True)] == [True, False, False, False]
    stepped = run(load("procbench_steps"), slipping, questions, 1024)
    assert [a == b for a, b in zip(stepped, gold, strict=True)] == [True, *[kind != "count"] * 3]


def test_steps_cost_their_words_and_end_with_the_rung() -> None:
    asked = "rotate 5 a b c d"
    session = session_of(model=carrier())
    for rung in (10, 17, 64):
        text = run(load("procbench_steps"), session, [asked], rung)[0]
        assert session.spent == min(rung, 5 * 5 + 2)
        assert procedures.said(text) == procedures.states(asked)[: rung // 5]
        assert text.endswith("end") == (rung == 64)
    assert run(load("procbench_direct"), session, [asked], 64) == ["b c d a ; end"]


def test_states_that_are_none_end_a_walk_through_steps() -> None:
    """Whatever a model says, no more is asked than the rung has, and nothing is taken for a state that is not one."""
    for seed in range(3):
        session = session_of(seed, model=tiny(seed))
        questions = [procedures.prompt(random.Random(k), kind, 4) for k, kind in enumerate(procedures.KINDS)]
        texts = run(load("procbench_steps"), session, questions, 100)
        assert session.spent <= 100 * len(questions) and len(texts) == len(questions)


# -- logidynamics ------------------------------------------------------------------------------------------------------------


def analogist(
    rules: dict[str, float], refusing: bool = False, alone: Callable[[Any, str], str] | None = None
) -> Scripted:
    """A model that draws rules by chance and carries them out; `refusing`: none that has failed. `alone`: what it says
    that a rule gives where there are no pairs, by the thing."""

    def says(text: str) -> dict[str, float]:
        question, there, own = text.partition(" <rules>")
        if not there:
            return {["ans", "a", "<eos>"][len(text.partition(" <dir>")[2].split())]: 1.0}
        said, failed = own.split(), set[str]()
        while said[:1] == ["no"]:
            if "." not in said:
                return {}
            end = said.index(".")
            failed.add(" ".join(said[1:end]))
            said = said[end + 1 :]
        if ":" in said:
            rule, asked = " ".join(said[: said.index(":")]), analogies.read(question)
            if rule not in rules:
                return {"<eos>": 1.0}
            if alone and not asked.pairs:
                words = [*f"{rule} : {alone(asked.thing, rule)}".split(), "<eos>"]
            else:
                words = [*analogies.solution(asked, tuple(rule.split()), "<rules>").split(), "<eos>"]
            return {words[len(said)]: 1.0}
        left = {r: p for r, p in rules.items() if r.split()[: len(said)] == said and not (refusing and r in failed)}
        chances = Counter[str]()
        for r, p in left.items():
            chances[[*r.split(), ":"][len(said)]] += p / sum(left.values())  # type: ignore[assignment]
        return dict(chances)

    return Scripted(says)


PAIRS = "a c d : d c a , b e f g : g f e b ; c h a ?"  # turn; a h c


def test_rules_are_held_against_the_pairs_and_the_one_that_brings_them_out_answers() -> None:
    """Rules by chance: one that fits in ten. Verified, or refined, it is found; any rule, or the greedy one, is not it."""
    rules = {"up": 0.6, "swap": 0.3, "turn": 0.1}
    for name, least, most in (
        ("logi_verified", 5, 10), ("logi_refined", 10, 10), ("logi_any", 0, 4), ("logidynamics", 0, 0),
    ):  # fmt: skip
        session = session_of(3, model=analogist(rules, refusing=name == "logi_refined"))
        texts = run(load(name), session, [PAIRS] * 10, 300)
        assert session.spent <= 300 * 10
        right = sum(analogies.check(PAIRS, text).right for text in texts)
        assert least <= right <= most, name
        assert all(analogies.named(text) is not None for text in texts)


def test_a_rule_that_failed_is_told_and_one_that_held_ends_the_inquiry() -> None:
    model = analogist({"up": 0.5, "turn": 0.5}, refusing=True)
    session = session_of(5, model=model)
    texts = run(load("logi_refined"), session, [PAIRS] * 12, 512)
    assert all(analogies.check(PAIRS, text).fits for text in texts)
    assert f"{PAIRS} <rules> no up ." in model.asked
    assert not any("no turn" in text for text in model.asked)
    assert "a c d ? <rules> up :" in model.asked and "b e f g ? <rules> turn :" in model.asked


def test_below_its_price_no_rule_is_tried_and_the_greedy_one_answers() -> None:
    for rung in (16, 64):
        session = session_of(1, model=analogist({"up": 0.6, "turn": 0.4}))
        one = run(load("logidynamics"), session, [PAIRS] * 3, rung)
        assert run(load("logi_verified"), session, [PAIRS] * 3, rung) == one and session.spent <= 3 * rung


def test_votes_are_over_answers() -> None:
    """Three rules of which each is rarer than a fourth give one answer."""
    shared = "a c d : d c a , b e f g : g f e b ; c c c ?"
    session = session_of(3, model=analogist(warmed({"up": 0.4, "turn": 0.2, "rotate": 0.2, "swap": 0.2})))
    texts = run(load("logi_rules_vote"), session, [shared] * 8, 512)
    assert sum(text.endswith("ans c c c") for text in texts) >= 6 and session.spent <= 8 * 512


def test_a_vote_at_once_has_as_many_tokens() -> None:
    session = session_of(3, model=analogist({"turn": 1.0}))
    assert run(load("logi_direct"), session, [PAIRS] * 2, 64) == ["ans a"] * 2 and session.spent == 2 * 3
    assert run(load("logi_direct_vote"), session, [PAIRS] * 2, 65) == ["ans a"] * 2
    assert session.spent == 2 * (1 + 32 * 2)  # each text behind the row that gives its first token


def named(name: str, model: Scripted, rung: int, count: int = 10, question: str = "") -> Counter[str]:
    """How often each rule is the one that is carried out in the end."""
    session = session_of(7, model=model)
    texts = run(load(name), session, [question or PAIRS] * count, rung)
    assert session.spent <= rung * count
    return Counter(text.partition(" :")[0] for text in texts)


def test_whether_a_rule_fits_is_the_models_own_word() -> None:
    """It thinks that of a thing alone up gives what turn does, and turn what it should not."""
    model = analogist({"up": 0.3, "turn": 0.7}, alone=lambda thing, rule: (
        f"ans {' '.join(thing[::-1])}" if rule == "up" else f"ans {' '.join(thing)}"
    ))  # fmt: skip
    for name in ("logi_verified", "logi_refined"):
        assert named(name, model, 300, 4) == {"up": 4}
    cut = analogist({"turn": 1.0}, alone=lambda thing, rule: " ".join(["a"] * 40))  # never comes to an answer
    session = session_of(1, model=cut)
    run(load("logi_verified"), session, [PAIRS], 128)
    assert session.spent == 2 + (4 * 3 + 9) + (4 * 4 + 9) + 9


def test_where_no_rule_brings_out_all_the_one_that_brings_out_most_is_taken() -> None:
    """The first pair may be one of swap, the second is not."""
    question = "a a c : a a c , b e f g : g f e b ; c h a ?"
    rules = {"up": 0.4, "swap": 0.2, "rotate": 0.4}
    assert named("logi_verified", analogist(rules), 300, 4, question) == {"swap": 4}


def test_any_rule_is_taken_by_its_chance() -> None:
    found = named("logi_any", analogist({"up": 0.5, "turn": 0.3, "rotate": 0.2}), 64, count=120)
    assert all(abs(found[rule] / 120 - p) < 0.12 for rule, p in (("up", 0.5), ("turn", 0.3), ("rotate", 0.2)))


def test_a_rule_its_verification_and_the_answer_are_paid_for_and_a_rule_is_held_against_the_pairs_once() -> None:
    """turn : is 2 rows, what it gives of 3 letters 9, of 4 letters 11."""
    model = analogist({"turn": 1.0})
    session = session_of(1, model=model)
    assert run(load("logi_verified"), session, [PAIRS] * 2, 512) == ["turn : a h c . ans a h c"] * 2
    assert session.spent == 2 * (2 + 9 + 11 + 9)
    wrong = analogist({"up": 1.0})
    run(load("logi_verified"), session_of(1, model=wrong), [PAIRS], 256)
    assert wrong.asked.count("a c d ? <rules> up :") == 1


def test_the_last_three_that_failed_are_told_in_their_order() -> None:
    model = analogist({"up": 0.3, "swap": 0.2, "rotate": 0.2, "double": 0.2, "drop": 0.1}, refusing=True)
    run(load("logi_refined"), session_of(2, model=model), [PAIRS], 512)
    tried, most = list[str](), 0
    for text in model.asked:
        if text.startswith("a c d ? <rules>") and text.endswith(":"):
            tried.append(text.partition("<rules> ")[2].removesuffix(" :"))
        elif text.startswith(f"{PAIRS} <rules> no") and text.endswith("."):
            assert text == f"{PAIRS} <rules> {' '.join(f'no {rule} .' for rule in tried[-3:])}"
            most = max(most, len(tried))
    assert most >= 4


@pytest.mark.parametrize("name", ["logidynamics", "logi_direct", "logi_any", "logi_rules_vote", "logi_direct_vote",
                                  "logi_verified", "logi_refined"])  # fmt: skip
def test_every_rung_is_kept_by_a_model_that_says_anything(name: str) -> None:
    people = "alma : boris , carlo : dora , gus : hanna ; ivan ? jana | kurt | lena | milo"
    for rung in (16, 128, 200):
        session = session_of(rung, model=tiny(3))
        texts = run(load(name), session, [PAIRS, people] * 2, rung)
        assert 0 < session.spent <= 4 * rung and len(texts) == 4


# -- sys2bench -----------------------------------------------------------------------------------------------------------------

SUM = "tom has 3 pears . tom finds 4 pears . how many pears does tom have ?"
STEPS = {"3 + 4 = 7 . ans 7": 0.3, "3 + 4 = 8 . ans 8": 0.45, "4 - 3 = 1 . ans 1": 0.25}


def session_on(dataset: str, seed: int, model: Any) -> Session:
    session = session_of(seed, model=model)
    ids = {"deduction": "deduce/chains", "navigation": "navigate/paths", "problems": "solve/problems"}
    session.task = SimpleNamespace(dataset=dataset, id=ids.get(dataset, "solve/game24"))
    return session


def test_a_path_gives_each_node_the_mean_of_what_follows_and_the_next_goes_where_most_may_be_hoped() -> None:
    """Of several paths the best counts."""
    module = module_of("sys2bench")
    root = module.Node([])
    one, other = module.Node([1], 0.8, root), module.Node([2], 0.6, root)
    root.children = [one, other]
    leaf = module.Node([1, 3], 0.2, one)
    module.backed_up(leaf)
    assert (root.visits, one.visits, leaf.visits) == (1, 1, 1)
    assert (one.best, leaf.best) == pytest.approx((0.5, 0.2)) and module.mean_reward(leaf) == pytest.approx(0.5)
    assert (one.bound(), other.bound()) == pytest.approx((0.5, 0.6))  # ln 1 = 0: an untried one has its reward
    module.backed_up(other)
    module.backed_up(module.Node([2, 3], 0.0, other))  # worse
    assert other.bound() == pytest.approx(0.6 + (torch.tensor(3.0).log().item() / 2) ** 0.5)
    assert one.bound() == pytest.approx(0.5 + torch.tensor(3.0).log().item() ** 0.5)


def test_a_new_path_goes_on_to_the_child_of_the_greatest_reward_and_a_level_keeps_the_best() -> None:
    module, root = module_of("sys2bench"), module_of("sys2bench").Node([])
    root.children = [module.Node([k], reward, root) for k, reward in ((5, 0.2), (6, 0.9), (7, 0.5))]
    for name, kept in (("sys2bench", [6]), ("sys2bench_tree", [6, 7])):
        search = module.Search(root, [root])
        load(name).advance(search)
        assert [node.text for node in search.frontier] == [[k] for k in kept]


def test_what_is_left_is_enough_to_write_a_chain_to_its_end() -> None:
    """Three steps of 20 tokens and an answer: a search step takes 59 rows, where its samples are all the same, and is judged
    once; 128 hold one such step and the rest."""
    words = [*(["3"] * 19 + ["."]) * 3, "ans", "7", "<eos>"]

    def says(text: str) -> dict[str, float]:
        if text.endswith("<score>"):
            return {"5": 1.0}
        _, there, own = text.partition("<cot>")
        return {words[len(own.split())]: 1.0} if there else {}

    session = session_on("problems", 1, Scripted(says))
    for name in ("sys2bench", "sys2bench_tree"):
        assert run(load(name), session, [SUM], 128)[0].endswith(". ans 7") and session.spent == 59 + 43


def test_rewards_of_the_model_lead_the_search_on_problems() -> None:
    """The likeliest step is wrong. Right digits lead to 7, wrong ones to 1, chance to any of the three."""
    base = texts_by_chance("<cot>", STEPS)

    def scored(good: str) -> Scripted:
        def says(text: str) -> dict[str, float]:
            if text.endswith("<score>"):
                assert f"{SUM} <verify>" in text
                return {"9" if f"= {good}" in text else "1": 1.0}
            return base.says(text)

        return Scripted(says)

    def answers(name: str, good: str, rung: int = 160) -> Counter[str]:
        session = session_on("problems", 4, scored(good))
        texts = run(load(name), session, [SUM] * 16, rung)
        assert session.spent <= 16 * rung
        return Counter(text.rpartition("ans ")[2] for text in texts)

    for name in ("sys2bench", "sys2bench_tree"):
        assert answers(name, "7")["7"] >= 8 and answers(name, "1")["1"] >= 7
        assert answers(name, "7", rung=64)["8"] == 16  # a greedy chain
    assert answers("sys2bench_coin", "7")["7"] < 8


def test_what_a_step_is_worth_is_the_models_word_on_the_state_behind_it() -> None:
    """Countdown and walks: 1 for sure, a half for likely, nothing for impossible or for what is no move; what ends a text is
    worth what stood before. Proofs: the mean probability of the words of the step."""
    module, method = module_of("sys2bench"), load("sys2bench")
    way = navigation.told(navigation.Question(((A, B), (B, C)), True, A, C))
    cases = {
        "navigation": (way, {f"{A} -> {B} .": 0.5, f"{B} -> {C} .": 0.0, "tom .": 0.0}),
        "countdown": (
            "4 , 6 , 8 -> 2",
            {"4 + 8 = 1 2 left 6 , 1 2 .": 0.5, "4 + 6 = 1 0 left 8 , 1 0 .": 1.0, "4 .": 0.0},
        ),
    }
    words = {f"{B} -> {C} ? {B} -> {C}": "likely", "6 , 1 2 -> 2": "likely", "8 , 1 0 -> 2": "sure"}
    for dataset, (question, wanted) in cases.items():
        model = Scripted(lambda text: {words.get(text.removesuffix(" <value>"), "tom"): 1.0})
        session = session_on(dataset, 1, model)
        session.ledger.reset(limit=1e6)
        root = module.Node([])
        search = module.Search(root, [root])
        nodes = [module.Node(encode(text), 0.9, root) for text in wanted]
        nodes.append(module.Node([*nodes[0].text, EOS], 0.9, nodes[0]))
        with torch.no_grad():
            method.reward(session, [encode(f"{question} <cot>")], [search], [(0, node) for node in nodes[:-1]])
            method.reward(session, [encode(f"{question} <cot>")], [search], [(0, nodes[-1])])
        assert [node.reward for node in nodes] == pytest.approx([*wanted.values(), nodes[0].reward], abs=1e-3)
        assert search.spent == session.spent == len(model.asked)
    proofs = session_on(
        "deduction", 1, Scripted(lambda text: {"yes": 0.25, ".": 0.25} if "yes" in text else {"yes": 0.81})
    )
    proofs.ledger.reset(limit=1e6)
    root = module.Node([])
    search = module.Search(root, [root])
    with torch.no_grad():
        method.expand(proofs, [encode("tom")], [search], [(0, root, 3)])
    for child in root.children:
        likely = [0.81 if k == 0 else 0.25 for k in range(len(child.text))]
        if set(child.text) <= {*encode("yes .")}:
            assert child.reward == pytest.approx(torch.tensor(likely).log().mean().exp().item(), rel=0.01)
    assert len({tuple(child.text) for child in root.children}) == len(root.children)
    assert proofs.spent == search.spent


@pytest.mark.parametrize("dataset", ["problems", "countdown", "navigation", "deduction"])
def test_no_search_spends_more_than_its_rung_whatever_the_model_says(dataset: str) -> None:
    questions = {
        "problems": SUM, "countdown": "4 , 6 , 8 -> 2", "deduction": FACTS,
        "navigation": navigation.told(navigation.question(random.Random(1), 4, 3, True)),
    }  # fmt: skip
    for name in ("sys2bench", "sys2bench_tree", "sys2bench_coin"):
        for rung in (16, 200):
            session = session_on(dataset, 2, tiny(6))
            texts = run(load(name), session, [questions[dataset]] * 2, rung)
            assert 0 < session.spent <= 2 * rung and len(texts) == 2
