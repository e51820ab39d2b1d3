"""Navigation: ways are the shortest there are, every wrong move is seen, and searches go where the model says."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest
import torch
from stepmark.datasets import navigation
from stepmark.datasets.navigation import Question, told
from tests.rigs.reasoning import Scripted, load, module_of, run, session_of, tiny

from stepmark.backbones import navigators
from stepmark.backbones.reasoners import SIZE, UNKNOWN, WORDS, encode
from stepmark.tracks.reasoning import inputs, navigate
from stepmark.tracks.reasoning.walks import TASKS

torch.set_num_threads(1)

A, B, C, D, E, F = navigation.CONCEPTS[:6]
(TASK,) = TASKS
# A to B to C to F, A to D to E (a dead end), and E leads on to D again.
WAYS = Question(((B, C), (A, D), (C, F), (A, B), (D, E)), True, A, F)
BOTH = Question(WAYS.edges, False, A, F)


def fewest(asked: Question) -> int | None:
    """Fewest moves by trying all walks, the shorter ones first."""
    waiting = deque([(asked.start, (asked.start,))])
    while waiting:
        place, way = waiting.popleft()
        if place == asked.goal:
            return len(way) - 1
        for a, b in [*asked.edges, *([] if asked.directed else [(b, a) for a, b in asked.edges])]:
            if a == place and b not in way:
                waiting.append((b, (*way, b)))
    return None


# -- the grammar -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7])
def test_a_question_is_as_far_as_it_is_asked_to_be_and_its_solution_is_a_shortest_way(
    length: int, directed: bool
) -> None:
    rng = random.Random(length)
    for dead in (0, 3, *[6] * 20):
        asked = navigation.question(rng, length, dead, directed)
        text, walk = told(asked), navigation.solution(asked, rng)
        assert navigation.read(text) == asked and len(asked.edges) == length + dead
        assert fewest(asked) == navigation.distance(asked) == length == walk.count(".")
        assert navigation.check(text, walk) == navigation.Checked((True,) * length, True, True, True)
        assert UNKNOWN not in encode(f"{text} <cot> {walk} <propose> <value> {' '.join(navigation.VALUES)} none")


@pytest.mark.parametrize(
    ("asked", "walk", "moves", "ends", "shortest"),
    [
        (WAYS, f"{A} -> {B} . {B} -> {C} . {C} -> {F} .", (1, 1, 1), True, True),
        (WAYS, f"{A} -> {B} . {B} -> {C} .", (1, 1), False, False),
        (WAYS, f"{A} -> {F} .", (0,), True, False),  # no such edge
        (WAYS, f"{A} -> {B} . {C} -> {F} .", (1, 0), True, False),  # from where the walk does not stand
        (WAYS, f"{B} -> {C} . {C} -> {F} .", (0, 1), True, False),  # from elsewhere than the start
        (WAYS, f"{A} - {B} . {B} -> {C} . {C} -> {F} .", (0, 1, 1), True, False),  # with another sign
        (WAYS, f"{A} -> {D} . {D} -> {A} . {A} -> {B} . {B} -> {C} . {C} -> {F} .", (1, 0, 1, 1, 1), True, False),
        (
            BOTH,
            f"{A} - {D} . {D} - {A} . {A} - {B} . {B} - {C} . {C} - {F} .",
            (1, 1, 1, 1, 1),
            True,
            False,
        ),  # a detour
        (BOTH, f"{A} - {B} . {B} - {C} . {C} - {F} . {F} - {C} .", (1, 1, 1, 1), False, False),  # past the goal
        (WAYS, "none .", (0,), False, False),
        (WAYS, "", (), False, False),
    ],
)
def test_a_walk_is_what_is_made_of_its_moves(
    asked: Question, walk: str, moves: tuple[int, ...], ends: bool, shortest: bool
) -> None:
    seen = navigation.check(told(asked), walk)
    assert (seen.moves, seen.ends, seen.shortest) == (tuple(map(bool, moves)), ends, shortest)
    assert seen.arrives == (ends and all(moves))
    found = navigation.judged(told(asked), walk)
    assert found == {
        "accuracy": float(seen.arrives),
        "shortest": float(shortest),
        "valid": float(bool(moves) and all(moves)),
        "answered": float(ends),
    }
    assert {*found, "written"} == {*TASK.metrics}


@pytest.mark.parametrize("directed", [True, False])
def test_states_leave_out_what_was_left_and_are_called_by_how_far_it_is(directed: bool) -> None:
    rng, counts = random.Random(3), Counter[str]()
    for _ in range(200):
        asked = navigation.question(rng, rng.randint(2, 5), 5, directed)
        state = navigation.somewhere(rng, asked)
        assert state == asked or not any(asked.start in edge for edge in state.edges)
        moves = fewest(state)
        word = navigation.value(state)
        assert word == ("impossible" if moves is None else "sure" if moves < 3 else "likely")
        proposed = navigation.proposal(state, rng)
        assert proposed == "none ." or navigation.check(state, proposed).moves == (True,)
        assert (proposed == "none .") == (not navigation.neighbours(state))
        counts[word] += 1
    assert min(counts[word] for word in navigation.VALUES) > 10


@pytest.mark.parametrize(
    "text", ["", f"{A} -> {B}", f"{A} -> {B} ? {A} - {B}", f"{A} -> ? {A} -> {B}", f"3 -> {B} ? {A} -> {B}"]
)
def test_what_is_no_question_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a question"):
        navigation.read(text)


def test_splits_hold_what_they_say_and_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(navigation.SIZES, "train", 140)
    splits = {name: navigation.split(name) for name in ("paths", "train")}
    for name, rows in splits.items():
        assert len(set(rows["question"])) == navigation.SIZES[name]
        columns = (rows[k] for k in ("question", "target", "level", "dead"))
        for question, walk, level, dead in zip(*columns, strict=True):
            asked = navigation.read(question)
            assert navigation.distance(asked) == level and len(asked.edges) == level + dead
            assert navigation.check(question, walk).shortest
        assert set(Counter(rows["level"]).values()) == {navigation.SIZES[name] // 5}
        assert sum(" -> " in question for question in rows["question"]) * 2 == navigation.SIZES[name]
    assert set(splits["paths"]["question"]).isdisjoint(splits["train"]["question"])


# -- training texts ----------------------------------------------------------------------------------------------------


def test_training_texts_grow_and_their_targets_are_right() -> None:
    rng = random.Random(5)
    assert len(WORDS) <= SIZE
    for level, (longest, dead) in enumerate(navigators.LEVELS):
        seen = Counter[str]()
        for _ in range(150):
            ids, wanted = navigators.walked(rng, level)
            words = [WORDS[i] for i in ids]
            assert UNKNOWN not in ids and words[-1] == "<eos>" and len(ids) == len(wanted)
            edges, *parts = " ".join(words[:-1]).split("? ")
            for part in parts:
                form = next(form for form in navigators.FORMS if form in part)
                ends, _, text = part.partition(f" {form} ")
                asked = navigation.read(f"{edges}? {ends}")
                seen[form] += 1
                if form == "<value>":
                    assert text.strip() == navigation.value(asked)
                elif form == "<propose>":
                    open_ones = navigation.neighbours(asked)
                    assert navigation.check(asked, text.strip()).moves == (bool(open_ones),)
                else:
                    checked = navigation.check(asked, text.strip())
                    assert checked.shortest and len(checked.moves) <= longest and len(asked.edges) <= longest + dead
            targets = [word for word, counts in zip(words, wanted, strict=True) if counts]
            assert not {"?", *navigators.FORMS} & set(targets)
        assert set(seen) == set(navigators.FORMS)


def test_edges_are_recalled_from_where_they_lead_from() -> None:
    rng, turned = random.Random(1), 0
    for _ in range(60):
        ids, wanted = navigators.recalled(rng, 7)
        words = [WORDS[i] for i in ids]
        at = words.index("?")
        sign, edges = words[1], {tuple(words[i : i + 3 : 2]) for i in range(0, at, 3)}
        assert not any(wanted[:at])
        again = [tuple(words[i : i + 3 : 2]) for i in range(at + 1, len(words), 4)]
        for edge in again:
            assert edge in edges or (sign == "-" and edge[::-1] in edges)
            turned += edge not in edges
        assert [w for w, counts in zip(words, wanted, strict=True) if counts][::2] == [edge[1] for edge in again]
    assert turned > 20


def test_what_is_drawn_gets_harder() -> None:
    rng = random.Random(2)

    def edges(done: float) -> float:
        texts = [[WORDS[i] for i in navigators.drawn(rng, done)[0]] for _ in range(150)]
        walks = [text for text in texts if any(form in text for form in navigators.FORMS)]
        return sum(text.index("?") for text in walks) / len(walks)

    assert edges(0.0) < edges(0.2) < edges(0.9)


# -- methods -----------------------------------------------------------------------------------------------------------


def walker(moves: dict[str, dict[str, float]], values: dict[str, str] | None = None) -> Scripted:
    """A model that moves from a place to others by chance, in any format, and calls places in a word."""

    def says(text: str) -> dict[str, float]:
        words = text.split()
        form = next((i for i in range(len(words) - 1, -1, -1) if words[i] in navigators.FORMS), 0)
        if not form:
            return {}
        start, sign, goal = words[form - 3 : form]
        own = words[form + 1 :]
        if words[form] == "<value>":
            return {(values or {})[start]: 1.0}
        if own and own[-1] == "." and (words[form] == "<propose>" or own[-2] == goal):
            return {"<eos>": 1.0}
        place = own[-2] if own and own[-1] == "." else start
        last = len(own) % 4
        return {place: 1.0} if last == 0 else {sign: 1.0} if last == 1 else moves[own[-2]] if last == 2 else {".": 1.0}

    return Scripted(says)


def test_a_tree_keeps_the_places_that_are_called_best_and_stops_at_the_goal() -> None:
    """The dead end is proposed more often; only the words tell. What was left is not in the prompt any more."""
    moves = {A: {D: 0.6, B: 0.4}, B: {C: 1.0}, C: {F: 1.0}, D: {E: 1.0}, E: {D: 1.0}}
    worth = {B: "likely", C: "sure", D: "impossible", E: "impossible"}
    model = walker(moves, worth)
    session = session_of(1, model=model)
    way = f"{A} -> {B} . {B} -> {C} . {C} -> {F} ."
    for rung in (256, 512):
        assert run(load("tree_of_walks", widest=1), session, [told(WAYS)] * 3, rung) == [way] * 3
        assert session.spent <= 3 * rung
    assert f"{C} -> {F} {D} -> {E} ? {C} -> {F} <propose>" in model.asked
    assert f"{B} -> {C} {C} -> {F} {D} -> {E} ? {B} -> {F} <value>" in model.asked
    assert not any(f"? {F} -> {F}" in text for text in model.asked)
    turned = walker(moves, {B: "impossible", C: "impossible", D: "sure", E: "sure"})
    assert run(load("tree_of_walks", widest=1), session_of(1, model=turned), [told(WAYS)], 512)[0].startswith(
        f"{A} -> {D}"
    )


def test_the_first_move_to_the_goal_ends_a_tree_whatever_the_words_say() -> None:
    near = Question(((A, B), (A, F), (B, F)), True, A, F)
    model = walker({A: {B: 0.5, F: 0.5}, B: {F: 1.0}}, {B: "sure", F: "impossible"})
    assert run(load("tree_of_walks"), session_of(1, model=model), [told(near)] * 3, 512) == [f"{A} -> {F} ."] * 3
    assert not any(text.endswith("<value>") for text in model.asked)


def test_a_tree_of_chance_is_right_as_often_as_a_coin() -> None:
    session = session_of(3, model=walker({A: {D: 0.5, B: 0.5}, B: {C: 1.0}, C: {F: 1.0}, D: {E: 1.0}, E: {D: 1.0}}))
    texts = run(load("tree_of_walks_coin", widest=1), session, [told(WAYS)] * 40, 128)
    share = sum(navigation.check(WAYS, text).arrives for text in texts) / 40
    assert share == pytest.approx(0.5, abs=0.2)


def test_a_tree_is_as_wide_as_its_rung_and_never_spends_more() -> None:
    module = module_of("tree_of_walks")
    fits = [
        next((b for b in range(5, 0, -1) if module.most(navigate.MOVES + 1, 1, b, b, navigate.longest) <= rung), 0)
        for rung in (16, 64, 128, 256, 512)
    ]
    assert fits == [0, 1, 2, 3, 4]
    questions = [told(navigation.question(random.Random(k), 5, 6, directed=bool(k % 2))) for k in range(3)]
    session = session_of(2, task="navigate/paths", model=tiny(3))
    for rung in (16, 128):
        for name in ("tree_of_walks", "walk_vote", "chain_of_thought"):
            assert all(text is not None for text in run(load(name), session, questions, rung))
            assert 0 < session.spent <= 3 * rung, name


@pytest.mark.parametrize(
    ("clause", "place"),
    [(f"{A} -> {B} .", B), (f"{A} -> {F} .", F), (f"{A} - {B} .", None), (f"{B} -> {C} .", None), (f"{A} -> {B}", None),
     (f"{A} -> {A} .", None), ("none .", None)],
)  # fmt: skip
def test_a_move_leads_where_it_says_if_it_is_one_from_here(clause: str, place: str | None) -> None:
    state, goal = navigate.start(encode(told(WAYS)))
    found = navigate.behind(encode(clause), state)
    assert (found and found.question.start) == place and goal == F
    assert len(state) == navigate.MOVES + 1 and (found is None or len(found) == (1 if place == F else navigate.MOVES))


def test_walks_that_say_to_arrive_have_a_vote_each() -> None:
    """By chance 3 in 10 walk right, 2 jump to the goal, and 5 end in a dead end, all alike, which have none."""

    def says(text: str) -> dict[str, float]:
        own = text.partition("<cot>")[2].split()
        walks = {B: f"{A} -> {B} . {B} -> {C} . {C} -> {F} . <eos>", F: f"{A} -> {F} . <eos>", D: f"{A} -> {D} . <eos>"}
        if len(own) == 2:
            chances = {B: 0.35**0.7, F: 0.15**0.7, D: 0.5**0.7}  # at temperature 0.7 as said
            return {word: p / sum(chances.values()) for word, p in chances.items()}
        return {(walks[own[2]] if len(own) > 2 else f"{A} -> ").split()[len(own)]: 1.0}

    session = session_of(4, model=Scripted(says))
    found = run(load("walk_vote"), session, [told(WAYS)] * 12, 256)
    assert found.count(f"{A} -> {B} . {B} -> {C} . {C} -> {F} .") >= 10 and not any(f"{D} ." in text for text in found)


def test_questions_of_a_task_are_its_splits() -> None:
    given = inputs(TASK, 4, torch.Generator().manual_seed(0), torch.device("cpu"))["question"]
    known = {tuple(encode(question)) for question in navigation.split("paths")["question"]}
    assert {tuple(each) for each in given} <= known and len(given) == 4


def test_a_smoke_training_takes_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(navigators, "measure", lambda network: {})
    recipe = navigators.RECIPES["navigator"]
    network = recipe.build()
    before = network.llama.model.layers[1].mlp.up_proj.weight.clone()
    with torch.random.fork_rng():
        report = navigators.train_navigator(network, lambda steps, _: steps, steps=3, seed=1)
    assert report["tokens"] > 2_000 and not torch.equal(before, network.llama.model.layers[1].mlp.up_proj.weight)
