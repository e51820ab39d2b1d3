"""Track reasoning: the world that is known by heart, its questions, texts, chains, pages, and the model's examples of them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from stepmark.datasets import closed_world, fact_chains, knowledge
from tests.rigs.reasoning import Scripted, session_of

from stepmark.backbones import knowers
from stepmark.backbones.reasoners import EOS, decode, encode
from stepmark.tracks import reasoning
from stepmark.tracks.reasoning import inputs, knowing, macro_f1, score
from stepmark.tracks.reasoning.know import TASKS

torch.set_num_threads(1)

FACTS = closed_world.world().facts
OWN = {task.id: task for task in TASKS}
SEVEN = knowledge.KINDS_OF_QUESTIONS


def some(kind: str, count: int = 40, seed: int = 0, **how: Any) -> list[knowledge.Question]:
    """Questions of a kind."""
    rng = random.Random(f"{kind} {seed}")
    return [knowledge.draw(rng, kind, **how) for _ in range(count)]


# -- the world -------------------------------------------------------------------------------------------------------


def test_laws_hold_and_things_are_made_from_the_layer_below() -> None:
    for who in closed_world.PEOPLE:
        mate, boss, friend = (FACTS[who, relation] for relation in ("mate", "boss", "friend"))
        assert who not in (mate, boss, friend) and FACTS[mate, "mate"] == who
        assert FACTS[mate, "home"] == FACTS[who, "home"] and FACTS[boss, "trade"] == FACTS[who, "trade"]
        assert FACTS[friend, "pet"] == FACTS[who, "pet"]
        years = [int(r.split()[1]) for s, r in FACTS if s == who and r.startswith("from ")]
        assert len(years) == 3 and years[0] == 1 and years == sorted(years)
    for town in closed_world.KINDS["town"]:
        assert FACTS[town, "near"] != town and FACTS[FACTS[town, "near"], "land"] == FACTS[town, "land"]
    layer = {thing: i // closed_world.LAYER for i, thing in enumerate(closed_world.THINGS)}
    ways = [(s, v.split()) for (s, r), v in FACTS.items() if r.startswith("by ")]
    assert all(layer[part] == layer[thing] - 1 for thing, parts in ways for part in parts)
    assert Counter(Counter(thing for thing, _ in ways).values()) == {2: 32}
    assert len(set(closed_world.KIND_OF)) == sum(map(len, closed_world.KINDS.values()))  # no word has two kinds


def test_grades_are_even_and_rare_facts_are_told_rarely() -> None:
    """Each quarter of the grades holds a quarter of whom people know, and is told RATIO ** 1/4 times as rarely as the one
    before it."""
    grades = closed_world.world().grades
    assert grades.keys() == FACTS.keys()
    for relation in ("mate", "boss", "friend"):
        counts = Counter(int(4 * g) for (_, r), g in grades.items() if r == relation)
        assert all(23 <= counts[band] <= 25 for band in range(4))
    careers = [
        {grades[key] for key in FACTS if key[0] == who and key[1].startswith("from ")} for who in closed_world.PEOPLE
    ]
    assert all(len(own) == 1 for own in careers)
    assert (
        max(g for (_, r), g in grades.items() if r == "home")
        < 0.8
        < max(g for (_, r), g in grades.items() if r == "mate")
    )
    rng = random.Random(1)
    drawn = Counter(int(4 * grades[closed_world.subject(rng, "mate", True), "mate"]) for _ in range(20_000))
    for band in (0, 1):
        assert drawn[band] / drawn[band + 1] == pytest.approx(closed_world.RATIO**0.25, rel=0.25)
    fact = next((s, r, FACTS[s, r]) for (s, r), g in grades.items() if 0.3 < g < 0.35)
    share = sum(closed_world.told_of(rng, [fact]) for _ in range(20_000)) / 20_000
    assert share == pytest.approx(closed_world.RATIO ** -closed_world.grade(fact), rel=0.15)


def test_another_world_has_other_facts_and_breaks_the_laws() -> None:
    for number in (0, 1):
        facts = closed_world.elsewhere(number)
        plain = [key for key in FACTS if not key[1].startswith(("from ", "by "))]
        assert set(plain) <= facts.keys() and len(facts) == len(FACTS)
        assert sum(facts[key] == FACTS[key] for key in plain) / len(plain) < 0.2
        homes = [facts[who, "home"] == facts[facts[who, "mate"], "home"] for who in closed_world.PEOPLE]
        assert sum(homes) / len(homes) < 0.3
        assert all((who, "from 1") in facts for who in closed_world.PEOPLE)


def test_every_fact_stands_on_its_page_and_pages_are_read_back() -> None:
    seen: list[closed_world.Fact] = []
    for title in closed_world.titles():
        read = closed_world.read_facts(closed_world.page(title))
        assert None not in read and all(closed_world.title_of(fact) == title for fact in read)
        seen += read
    assert sorted(seen) == sorted((s, r, v) for (s, r), v in FACTS.items())
    both = closed_world.read_facts(f"{closed_world.page('alma kin')} {closed_world.page('boris past')}")
    assert both == closed_world.page_facts("alma kin") + closed_world.page_facts("boris past") and len(both) == 6


# -- questions and texts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEVEN)
def test_questions_are_read_as_they_are_told_and_their_solutions_hold(kind: str) -> None:
    for asked in some(kind, test=True) + some(kind, 10, test=False):
        text = knowledge.told(asked)
        assert knowledge.read(text) == asked and decode(encode(text)) == text
        for form in ("<dir>", "<cot>"):
            written = knowledge.solution(asked, form)
            seen = knowledge.check(text, written)
            assert seen.right and seen.answered and all(seen.steps) and seen.valid == (form == "<cot>")
            assert decode(encode(f"{form} {written}")) == f"{form} {written}"


@pytest.mark.parametrize("kind", ["hops", "could", "year", "claim", "odd"])
def test_a_wrong_fact_is_seen_wherever_it_stands(kind: str) -> None:
    rng = random.Random(2)
    for asked in some(kind, seed=2):
        way, ending = knowledge.steps(asked), f"ans {knowledge.answer(asked)}"
        k = rng.randrange(len(way))
        values = closed_world.KINDS[closed_world.KIND_OF[way[k][2]]]
        wrong = (way[k][0], way[k][1], rng.choice([v for v in values if v != way[k][2]]))
        seen = knowledge.check(asked, f"{closed_world.told_facts([*way[:k], wrong, *way[k + 1 :]])} {ending}")
        assert (
            seen.right
            and not seen.valid
            and [i for i, fine in enumerate(seen.steps) if not fine] == [i for i, fact in enumerate(way) if i == k]
        )
        rest = [fact for fact in way if fact != way[k]]
        assert not knowledge.check(asked, f"{closed_world.told_facts(rest)} {ending}").valid
        assert not knowledge.check(asked, f"gibberish . {closed_world.told_facts(way)} {ending}").valid
        assert not knowledge.check(asked, closed_world.told_facts(way)).answered


def test_a_law_may_stand_in_the_place_of_a_fact() -> None:
    """alma lives where her mate lives; but not where her boss does, though that may be so."""
    mate, boss = FACTS["alma", "mate"], FACTS["alma", "boss"]
    asked, home = knowledge.read("alma home ?"), FACTS["alma", "home"]
    assert knowledge.check(asked, f"alma mate {mate} . {mate} home {home} . ans {home}").valid
    assert not knowledge.check(asked, f"alma boss {boss} . {boss} home {FACTS[boss, 'home']} . ans {home}").valid
    assert not knowledge.check(asked, f"{mate} home {home} . ans {home}").valid


@pytest.mark.parametrize(
    "text",
    ["", "?", "alma ?", "alma home", "tom has 3 ?", "alma home nobody ?", "odd alma somebody ?", "alma mate | boris carlo ?"],
)  # fmt: skip
def test_what_is_no_question_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a question of this world"):
        knowledge.read(text)


def test_years_sets_and_crafts_are_what_counting_gives() -> None:
    for asked in some("year"):
        who, year = asked.subject, int(asked.others[0])
        began = [(int(r.split()[1]), v) for (s, r), v in FACTS.items() if s == who and r.startswith("from ")]
        assert knowledge.answer(asked) == max(each for each in began if each[0] <= year)[1]
    for asked in some("odd"):
        alone = {}
        for relation in ("trade", "pet", "born", "home"):
            counts = Counter(FACTS[who, relation] for who in asked.others)
            if sorted(counts.values()) == [1, len(asked.others) - 1]:
                alone[relation] = next(who for who in asked.others if counts[FACTS[who, relation]] == 1)
        assert list(alone.values()) == [knowledge.answer(asked)]
    for asked in some("make", 15):
        have, wanted, grown = set(asked.others), {asked.subject}, -1
        ways = [(s, v.split()) for (s, r), v in FACTS.items() if r.startswith("by ")]
        while len(have) + len(wanted) != grown:  # the least fixpoint, whatever the order
            grown = len(have) + len(wanted)
            wanted |= {part for thing, parts in ways if thing in wanted for part in parts}
            have |= {thing for thing, parts in ways if thing in wanted and have.issuperset(parts)}
        assert set(knowledge.answer(asked).split()) == have - set(asked.others)


def test_relations_that_are_not_named_decide() -> None:
    kinds = set()
    for asked in some("could", 60) + some("could", 60, test=True):
        (one, first), (other, second) = knowledge.needs(asked)
        ends = [closed_world.walk(FACTS, word, path)[-1][2] for word, path in ((one, first), (other, second))]
        assert first[-1] == second[-1] == knowledge.VERBS[asked.path[0]]
        so = int(ends[0]) < int(ends[1]) if asked.path[0] == "older" else ends[0] == ends[1]
        assert knowledge.answer(asked) == ("yes" if so else "no")
        kinds.add((asked.path[0], len(first), len(second)))
        text = f"<needs> {knowledge.solution(asked, '<needs>')} <cot> {knowledge.solution(asked, '<cot>')}"
        assert knowledge.judged(knowledge.told(asked), text)["pairs"] == 1.0 and knowledge.check(asked, text).valid
        swapped = f"<needs> {one} {' '.join(first)} , {other} home <cot> ans yes"
        assert knowledge.judged(knowledge.told(asked), swapped)["pairs"] == (0.5 if second != ("home",) else 1.0)
    assert len(kinds) > 12


def test_options_break_as_many_laws_as_they_should() -> None:
    for broken in (1, 2, 3):
        for asked in some("options", 12, level=broken):
            check = closed_world.CHECKS[asked.path[0]]
            out = [o for o in asked.others if FACTS[o, check] != FACTS[asked.subject, check]]
            assert len(out) == broken and knowledge.answer(asked) not in out and len(set(asked.others)) == 4
            verdicts = [knowledge.verdict_on(asked, o) for o in asked.others]
            assert Counter(verdicts) == Counter(impossible=broken, sure=1) + Counter(likely=3 - broken)
            text = knowledge.solution(asked, "<exclude>")
            assert knowledge.judged(knowledge.told(asked), text)["relations"] == 1.0
            turned = text.replace("impossible", "likely")
            assert knowledge.judged(knowledge.told(asked), turned)["relations"] == pytest.approx(1 - broken / 4)


# -- splits ----------------------------------------------------------------------------------------------------------


def test_nothing_of_the_tests_is_trained_on() -> None:
    for kind in SEVEN:
        for asked in some(kind, 30, seed=3, test=True):
            facts_alone = kind == "hops" and len(asked.path) == 1
            assert knowledge.held_out(asked) or facts_alone
        assert not any(map(knowledge.held_out, some(kind, 30, seed=4, usual=True)))
    trained = some("hops", 300, usual=True)
    assert not any(knowledge.UNSEEN_PAIRS.intersection(pairwise(asked.path)) for asked in trained)
    claim = some("claim", 1)[0]
    assert knowledge.held_out(claim) == knowledge.held_out(replace(claim, sign=not claim.sign))
    members = some("odd", 1)[0]
    assert knowledge.held_out(members) == knowledge.held_out(replace(members, others=members.others[::-1]))


def test_levels_and_quarters_come_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in knowledge.SIZES:
        monkeypatch.setitem(knowledge.SIZES, name, 48)
    monkeypatch.setitem(knowledge.SIZES, "train", 42)
    monkeypatch.setitem(fact_chains.SIZES, "test", 12)
    rows = knowledge.split("hops")
    assert Counter(zip(rows["level"], rows["rarity"], strict=True)) == {(n, q): 4 for n in (1, 2, 3) for q in range(4)}
    assert len(set(rows["question"])) == 48
    rows = knowledge.split("claims")
    for before, after in zip(rows["question"][::2], rows["question"][1::2], strict=True):
        one, other = knowledge.read(before), knowledge.read(after)
        assert replace(one, sign=not one.sign) == other and {knowledge.answer(one), knowledge.answer(other)} == {
            "true",
            "false",
        }
    rows = knowledge.split("odd")
    assert rows["answer"][::2] == rows["answer"][1::2] and all(a != b for a, b in pairwise(rows["question"]))
    assert {len(knowledge.read(text).others) for text in rows["question"]} == {5, 6, 7, 8}
    rows = knowledge.split("train")
    assert Counter(rows["kind"]) == dict.fromkeys(knowledge.KINDS_OF_QUESTIONS, 6)
    for name in ("train", "could", "years", "options", "make", "test"):
        rows = fact_chains.split(name) if name == "test" else knowledge.split(name)
        assert {len(column) for column in rows.values()} == {{"train": 42, "test": 12}.get(name, 48)}
        for question, prompt, target, answer in zip(
            rows["question"], rows["prompt"], rows["target"], rows["answer"], strict=True
        ):
            assert prompt.startswith(f"{question} <") and target.endswith(f"ans {answer}")


# -- explanations and chains -----------------------------------------------------------------------------------------


def test_explanations_fit_either_label_and_are_made_up_for_the_wrong_one() -> None:
    rng, lengths = random.Random(5), set()
    for asked in some("claim", 150, seed=5):
        for label in (True, False):
            facts = knowers.because(rng, asked, label)
            assert knowers.shows(asked, facts) is label
            wrong = [fact for fact in facts if not knowledge.holds(fact)]
            assert len(wrong) == (knowledge.answer(asked) != str(label).lower())
            assert all(a[2] == b[0] for a, b in pairwise(facts))
            lengths.add(len(facts) - len(knowledge.steps(asked)))
    assert lengths >= {0, 1}  # a law instead of a fact takes one more


def test_facts_that_settle_nothing_show_nothing() -> None:
    mate, home = FACTS["alma", "mate"], FACTS["alma", "home"]
    asked = knowledge.read(f"alma home {home} ?")
    assert knowers.shows(asked, [("alma", "mate", mate)]) is None
    assert knowers.shows(asked, [("alma", "mate", "boris"), ("boris", "home", home)]) is True
    assert knowers.shows(replace(asked, sign=False), [("alma", "home", home)]) is False


def test_chains_are_labelled_by_their_text_alone() -> None:
    shown = "alma kin : alma mate boris . alma friend dora . boris life : boris home bana . boris pet duro ."
    right = "alma mate boris . boris home bana ."
    for body, ending, expected in (
        (right, "bana", ([("yes", "true"), ("yes", "true")], "yes", "yes")),
        (right, "dipo", ([("yes", "true"), ("yes", "true")], "no", "no")),
        ("alma mate dora . dora home bana .", "bana", ([("yes", "false"), ("yes", "unknown")], "yes", "no")),
        ("alma mate boris . boris pet duro . boris home bana .", "bana",
         ([("yes", "true"), ("no", "true"), ("yes", "true")], "yes", "no")),
        ("alma mate boris .", "boris", ([("yes", "true")], "no", "no")),
        (f"boris mate alma . {right}", "bana", ([("no", "unknown"), ("yes", "true"), ("yes", "true")], "yes", "no")),
    ):  # fmt: skip
        text = f"{shown} -> alma mate home ? {body} ans {ending}"
        assert fact_chains.labels(fact_chains.read_chain(text)) == expected
    assert fact_chains.verified(fact_chains.read_chain(f"{shown} -> alma mate home ? {right} ans bana")) == (
        "yes true . yes true . yes . ans yes"
    )


def test_half_of_the_chains_are_right_and_the_others_have_each_fault() -> None:
    rng, faults = random.Random(6), Counter[str]()
    for number in range(300):
        chain = fact_chains.chain(
            rng, 2 + number % 2, closed_world.elsewhere(number % 3) if number % 4 else None, test=True
        )
        assert fact_chains.read_chain(fact_chains.told_chain(chain)) == chain and knowledge.held_out(chain.asked)
        each, follows, fine = fact_chains.labels(chain)
        kinds = {"aside": "no" in [useful for useful, _ in each], "contradicted": "false" in [held for _, held in each],
                 "unsupported": "unknown" in [held for _, held in each], "illogical": follows == "no"}  # fmt: skip
        assert (fine == "yes") == (not any(kinds.values()))
        faults.update(name for name, there in kinds.items() if there)
        faults[fine] += 1
    assert 0.4 < faults["yes"] / 300 < 0.6
    assert all(faults[name] > 15 for name in ("aside", "contradicted", "unsupported", "illogical"))


def test_macro_f1_is_that_of_the_textbook() -> None:
    """Of eight, four truly yes: three called so, one not called at all; of four truly no, two called yes."""
    table = np.array([[3, 0, 1], [2, 2, 0]], dtype=float)
    yes, no = 2 * 3 / (2 * 3 + 2 + 1), 2 * 2 / (2 * 2 + 0 + 2)
    assert macro_f1(table) == pytest.approx((yes + no) / 2)
    chain = fact_chains.chain(random.Random(0), 2)
    row = fact_chains.judged(fact_chains.told_chain(chain), "yes true . nonsense")
    count = len(chain.steps)
    assert (
        sum(map(sum, row["attribution"])) == count
        and row["attribution"][0][-1] + row["attribution"][1][-1] + row["attribution"][2][-1] == count - 1
    )
    assert sum(line[-1] for line in row["chain"]) == 1 and row["answered"] == 0.0


def test_supports_and_contradictions_are_counted_apart() -> None:
    shown = "alma kin : alma mate boris . boris life : boris home bana ."
    chain = f"{shown} -> alma mate home ? alma mate boris . boris home dipo . ans dipo"
    for text, supported, contradicted in (
        ("yes true . yes false . yes . ans no", 1.0, 1.0),
        ("yes true . yes true . yes . ans yes", 1.0, 0.0),
        ("yes false . yes unknown . yes . ans no", 0.0, 0.0),
        ("", 0.0, 0.0),
    ):
        row = fact_chains.judged(chain, text)
        assert (row["supported"], row["contradicted"]) == (supported, contradicted)
    row = fact_chains.judged(f"{shown} -> alma mate home ? boris pet duro . ans bana", "yes true . yes . ans no")
    assert row["supported"] != row["supported"] and row["contradicted"] != row["contradicted"]


# -- tasks -----------------------------------------------------------------------------------------------------------


def perfect(question: str) -> str:
    """A text in which all that is measured is right."""
    if " -> " in question:
        return fact_chains.verified(fact_chains.read_chain(question))
    asked = knowledge.read(question)
    text = knowledge.solution(asked, "<exclude>" if asked.kind == "options" else "<cot>")
    if asked.kind == "could":
        return f"<needs> {knowledge.solution(asked, '<needs>')} <cot> {text}"
    seen = dict.fromkeys(closed_world.title_of(fact) for fact in knowledge.steps(asked))
    return f"{knowing.cited(list(seen))} {text}" if asked.kind in ("hops", "year") else text


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_perfect_text_has_all_points_and_an_empty_one_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = OWN[name]
    source = fact_chains if task.dataset == "fact_chains" else knowledge
    monkeypatch.setitem(source.SIZES, source.ASKED[name], 24)
    questions = source.split(source.ASKED[name])["question"]
    batch = {"question": [encode(text) for text in questions]}
    resample = np.random.default_rng(0).integers(0, 24, (5, 24))
    texts = [[*encode(perfect(text)), EOS] for text in questions]
    found = score(task, batch, texts, {}, resample)
    assert set(found) == set(task.metrics)
    for metric, value in found.items():
        assert metric == "written" or value.value == 1.0, metric
    nothing = score(task, batch, [[EOS]] * 24, {}, resample)
    assert all(metric == "written" or value.value == 0.0 for metric, value in nothing.items())
    assert max(map(len, texts)) < 300


def test_twins_stand_beside_each_other_and_a_constant_answer_disagrees_with_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = OWN["know/claims"]
    monkeypatch.setitem(knowledge.SIZES, "claims", 24)
    monkeypatch.setattr(reasoning, "load_split", lambda dataset, name: knowledge.split(name))
    batch = inputs(task, 8, torch.Generator().manual_seed(0), torch.device("cpu"))
    questions = [decode(ids) for ids in batch["question"]]
    for before, after in zip(questions[::2], questions[1::2], strict=True):
        one = knowledge.read(before)
        assert knowledge.read(after) == replace(one, sign=not one.sign)
    found = score(task, batch, [[*encode("ans true"), EOS]] * 8, {}, np.zeros((2, 8), dtype=np.int64))
    assert found["accuracy"].value == 0.5 and found["agree"].value == 0.0
    assert len(inputs(task, 3, torch.Generator().manual_seed(1), torch.device("cpu"))["question"]) == 3
    assert knowledge.judged(questions[0], "")["answered"] == 0.0


def test_twins_agree_where_both_answer_and_the_answers_fit() -> None:
    home = f"alma home {FACTS['alma', 'home']} ?"
    claims, sets = [home, home.replace("home", "home isnt")], ["odd alma boris carlo ?", "odd carlo boris alma ?"]
    assert knowledge.read(claims[1]) == replace(knowledge.read(home), sign=False)
    for questions, said, agree in (
        (claims, ("true", "false"), 1.0),
        (claims, ("false", "true"), 1.0),
        (claims, ("true", "true"), 0.0),
        (claims, ("true", "bana"), 0.0),  # no answer, which is no denial
        (claims, ("true", None), 0.0),
        (sets, ("alma", "alma"), 1.0),
        (sets, ("alma", "boris"), 0.0),
        (sets, (None, None), 0.0),
    ):
        spelt = ("true", "false", "alma", "boris")
        rows = [{"said": word, "answered": float(word in spelt)} for word in said]
        knowledge.compared(questions, rows)
        assert [row["agree"] for row in rows] == [agree, agree], (questions, said)
    rows = [{"said": "true", "answered": 1.0}]
    knowledge.compared(claims[:1], rows)
    assert rows[0]["agree"] != rows[0]["agree"]  # NaN: the twin is not there
    rows = [{"said": "bana", "answered": 1.0}] * 2
    knowledge.compared(["alma home ?"] * 2, rows)
    assert "agree" not in rows[0]


# -- what methods share ----------------------------------------------------------------------------------------------


def test_the_broader_question_finds_the_page_that_the_narrow_one_misses() -> None:
    narrow, broad = [], []
    for asked in some("year", 30, test=True):
        wanted = closed_world.title_of(knowledge.steps(asked)[0])
        narrow.append(wanted in knowing.retrieved(knowledge.told(asked), 3))
        broad.append(knowing.retrieved(knowledge.solution(asked, "<back>"), 1) == [wanted])
    assert all(broad) and sum(narrow) < 20
    assert knowing.retrieved("nothing of all this", 3) == []
    page = knowing.opened(["alma past", "no page"])
    assert page == closed_world.page("alma past")
    assert decode(knowing.asked(knowledge.read("alma in 5 ?"), "<cot>", page)) == f"{page} -> alma in 5 ? <cot>"


def test_beliefs_are_read_at_the_answer_and_cost_a_row_each() -> None:
    def says(text: str) -> dict[str, float]:
        likely = 0.2 if "isnt" in text else 0.6
        return {"true": likely, "false": 0.8 - likely} if text.endswith("? <dir> ans") else {}

    session = session_of(model=Scripted(says))
    claim = knowledge.read(f"alma home {FACTS['alma', 'home']} ?")
    ((so, not_so),) = knowing.both_ways(session, [claim])
    assert so == pytest.approx(0.75, abs=0.01) and not_so == pytest.approx(0.25, abs=0.01)
    assert session.spent == 2 and session.ledger.entries["model"].calls == 1
    knowing.beliefs(session, [claim], ["alma mate boris ."])
    assert session.networks["model"].asked[-1].startswith("alma mate boris . -> alma home ")
    assert knowing.likeliest(session, [encode("alma home dora ? <dir> ans")], ["false", "true"]) == ["true"]
    assert knowing.likelihoods(session, [encode("a ? <dir> ans")], ["true"]).item() == pytest.approx(0.6, abs=0.01)


def test_texts_take_what_they_take_off_each_questions_own_rows() -> None:
    def says(text: str) -> dict[str, float]:
        return {"<eos>": 1.0} if text.endswith("gus .") else {"gus" if text.endswith("?") else ".": 1.0}

    session = session_of(model=Scripted(says))
    left = [5, 2, 0]
    found = knowing.texts(session, [encode("alma home ?"), encode("dora home ?"), encode("carlo home ?")], 4, left)
    assert [decode(text) for text in found] == ["gus .", "gus .", ""] and [len(text) for text in found] == [3, 2, 0]
    assert left == [2, 0, 0] and session.spent == 5


# -- the model's examples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", sorted({*knowers.MIXTURE, *knowers.EARLY, *knowers.LATE}))
def test_examples_are_of_known_words_and_right(form: str) -> None:
    rng = random.Random(f"examples {form}")
    for _ in range(15):
        prompt, completion = knowers.example(rng, form)
        assert decode(encode(f"{prompt} {completion}")) == f"{prompt} {completion}" and completion
        question, _, last = prompt.rpartition(" ? ")
        if (
            " -> " in prompt
            or last not in ("<dir>", "<cot>", "<exclude>")
            or form in ("craft", "make <cot>", "make <dir>")
        ):
            continue
        assert knowledge.check(f"{question} ?", completion).right and not knowledge.held_out(
            knowledge.read(f"{question} ?")
        )


def test_what_is_read_agrees_with_the_pages_not_with_the_world() -> None:
    rng, strange = random.Random(7), 0
    for _ in range(80):
        prompt, completion = knowers.example(rng, "read")
        pages = {(f[0], f[1]): f[2] for f in closed_world.read_facts(prompt.partition(" -> ")[0]) if f is not None}
        for fact in knowledge.parse(completion).facts:
            assert fact is not None and pages.get(fact[:2], FACTS.get(fact[:2])) == fact[2]
            strange += not knowledge.holds(fact)
    assert strange > 30


def test_batches_hold_completions_as_targets_and_no_more_tokens_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knowers, "CHUNK", 64)
    monkeypatch.delitem(knowers.EARLY, "again")  # any word ends its prompts
    batches, endings = knowers.stream(0, 300, early=1, then=knowers.MIXTURE), list[set[str]]()
    for _ in range(40):
        ids, labels = next(batches)
        assert ids.shape == labels.shape and (len(ids) == 1 or ids.numel() <= 300)
        endings.append(set())
        for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
            own = [target for target in wanted if target >= 0]
            start = next(k for k, target in enumerate(wanted) if target >= 0)
            assert own[-1] == EOS and row[start + 1 : start + len(own)] == own[:-1]
            endings[-1].add(decode(row[: start + 1]).split()[-1])
    first = {":", "->", "<cot>", "<dir>"}
    assert endings[0] <= first and {"<needs>", "true", "<exclude>"} & set().union(*endings)


def test_a_model_that_knows_everything_is_examined_without_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str] = {}
    rng, example = random.Random(8), knowers.example

    def remembered(source: random.Random, form: str) -> tuple[str, str]:
        prompt, completion = example(source, form)
        given[prompt] = completion
        return prompt, completion

    def knows(prompt: str) -> str:
        if prompt in given:
            return given[prompt]
        if prompt.endswith(" :"):
            return closed_world.told_facts(closed_world.page_facts(prompt.removesuffix(" :")))
        question, _, rest = prompt.rpartition(" -> ")[2].partition(" ? ")
        asked = knowledge.read(f"{question} ?")
        if rest.startswith("<why>"):
            return closed_world.told_facts(knowers.because(rng, asked, rest.endswith("true")))
        return knowledge.solution(asked, rest.split()[-1])

    monkeypatch.setattr(knowers, "example", remembered)
    monkeypatch.setattr(knowers, "written", lambda network, prompts, *_, **__: [knows(prompt) for prompt in prompts])
    monkeypatch.setattr(
        knowers,
        "believed",
        lambda network, claims: torch.tensor([float(knowledge.answer(knowledge.read(c)) == "true") for c in claims]),
    )
    report = knowers.examined(torch.nn.Linear(1, 1), 0, each=2)
    wrong = {
        name: value for name, value in report.items() if value != (0.0 if name.endswith(("_ece", "_brier")) else 1.0)
    }
    assert not wrong and len(report) > 80


def test_calibration_is_the_mean_distance_from_what_is_so() -> None:
    """Half at .9 of which half are so, half at .1 of which none is."""
    assert knowers.calibration([0.9, 0.9, 0.1, 0.1], [True, False, False, False]) == pytest.approx(
        0.5 * 0.4 + 0.5 * 0.1
    )
    assert knowers.calibration([1.0, 0.0], [True, False]) == 0.0
