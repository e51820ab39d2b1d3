"""Searches over trees of steps and of moves: which node is next, what is kept, what is learned, what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepmark.datasets import countdown
from tests.rigs.reasoning import Judge, Scripted, load, module_of, run, session_of, tiny

from stepmark.backbones.reasoners import EOS, Verifier, built, decode, encode
from stepmark.tracks.reasoning import best_first
from stepmark.tracks.reasoning.best_first import Node

torch.set_num_threads(1)

QUESTION = "tom has 3 pears . tom finds 4 pears . how many pears does tom have ?"


def sentences(weights: Callable[[str], dict[str, float]]) -> Callable[[str], dict[str, float]]:
    """A script that writes whole sentences: of what stands behind the last full stop (or the format) the next word follows."""

    def says(text: str) -> dict[str, float]:
        own = text.partition("<cot>")[2].strip()
        head, stop, tail = own.rpartition(" .")
        done, begun = (head + stop, tail.split()) if stop else ("", own.split())
        found: dict[str, float] = {}
        for sentence, weight in weights(done).items():
            words = sentence.split()
            if words[: len(begun)] == begun:
                word = words[len(begun)] if len(begun) < len(words) else "<eos>"
                found[word] = found.get(word, 0.0) + weight
        total = sum(found.values())
        return {word: weight / total for word, weight in found.items()} if found else {"<eos>": 1.0}

    return says


# Two first steps; behind "3 ." the worth falls, behind "4 ." it is kept. Digits name the steps.
TREE = {
    "": {"3 .": 0.5, "4 .": 0.5},
    "3 .": {"5 .": 0.5, "6 .": 0.5},
    "4 .": {"7 .": 0.5, "8 .": 0.5},
    "4 . 7 .": {"ans 7": 1.0},
    "4 . 8 .": {"ans 8": 1.0},
    "3 . 5 .": {"ans 5": 1.0},
    "3 . 6 .": {"ans 6": 1.0},
}
WORTH = {"3 .": 0.9, "4 .": 0.8, "3 . 5 .": 0.5, "3 . 6 .": 0.4, "4 . 7 .": 0.3, "4 . 8 .": 0.75}


def judge(worth: dict[str, float]) -> Judge:
    return Judge(lambda text: worth.get(text.partition("<cot> ")[2], 0.5))


def expanded(monkeypatch: pytest.MonkeyPatch, method: Any, session: Any, rung: int) -> tuple[str, list[str], int]:
    """(the text returned, the texts that were branched in their order, rows spent)."""
    order: list[str] = []
    original = best_first._children

    def watched(parent: Node, steps: Any) -> list[Node]:
        order.append(decode(parent.text))
        return original(parent, steps)

    monkeypatch.setattr(best_first, "_children", watched)
    (text,) = run(method, session, [QUESTION], rung)
    return text, order, int(session.spent)


def test_a_worse_step_makes_way_for_an_older_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """f: 3 = .1, 4 = .2, 3 5 = .4 + .5, 3 6 = .5 + .6, 4 7 = .5 + .7, 4 8 = .05 + .25."""
    session = session_of(3, model=Scripted(sentences(lambda done: TREE.get(done, {"no .": 1.0}))), process=judge(WORTH))
    text, order, _ = expanded(monkeypatch, load("a_star_decoding"), session, 1024)
    assert text == "4 . 8 . ans 8"
    assert order == ["", "3 .", "4 .", "4 . 8 ."]


def test_the_way_counts_twice_where_worth_is_lost() -> None:
    """c = max(0, h' - h): an improvement costs nothing and gives nothing back."""
    rule = load("a_star_decoding").rule
    parent = Node([], worth=0.8, carried=0.1)
    better, worse, ended = Node([3], worth=0.9), Node([4], worth=0.5), Node([5, EOS], worth=0.8)
    rule(parent, [better, worse, ended])
    assert (better.carried, worse.carried) == (pytest.approx(0.1), pytest.approx(0.4))
    assert [node.cost for node in (better, worse, ended)] == pytest.approx([0.2, 0.9, 0.3])
    load("a_star_greedy").rule(Node([], worth=0.8), [worse := Node([3], worth=0.5)])
    assert worse.cost == pytest.approx(0.5)


def test_a_tree_spends_what_it_says() -> None:
    """Rows of a tree over equal steps, counted by hand: equal steps are one node, the root's row gives all first tokens."""
    script = Scripted(sentences(lambda done: {"3 + 4 = 7 .": 1.0} if not done else {"ans 7": 1.0}))
    session = session_of(model=script, process=judge({}))
    assert run(load("a_star_decoding"), session, [QUESTION], 512) == ["3 + 4 = 7 . ans 7"]
    assert session.spent == (1 + 4 * 5) + (1 + 4 * 2)  # four branches of 6 tokens, then four of ans 7 <eos>
    assert run(load("a_star_decoding"), session, [QUESTION] * 2, 32) == ["3 + 4 = 7 . ans 7"] * 2
    assert session.spent == 2 * 9  # one chain each, a row a token
    rambling = session_of(model=Scripted(lambda text: {"1": 1.0}), process=judge({}))
    run(load("a_star_decoding"), rambling, [QUESTION], 256)
    assert 200 < rambling.spent <= 256


@pytest.mark.parametrize("seed", range(4, 8))
def test_the_nodes_that_are_kept_cost_least(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best_first, "FRONTIER", 1)
    session = session_of(
        seed, model=Scripted(sentences(lambda done: TREE.get(done, {"no .": 1.0}))), process=judge(WORTH)
    )
    session.ledger.reset(limit=1e6)
    batch, rule = {"question": [encode(QUESTION)]}, load("a_star_decoding").rule
    with torch.no_grad():
        (text,) = best_first.search(session, batch, 2000, 12, rule, "process")
    assert decode(text) == "3 . 5 . ans 5"


def test_an_exact_check_of_the_steps_goes_on_from_the_right_ones() -> None:
    """A right and a wrong first step, as likely: of four branches one is right in .94 of the questions."""
    script = {
        "": {"3 + 4 = 7 .": 0.5, "3 + 4 = 8 .": 0.5},
        "3 + 4 = 7 .": {"ans 7": 1.0},
        "3 + 4 = 8 .": {"ans 8": 1.0},
    }
    session = session_of(5, model=Scripted(sentences(lambda done: script.get(done, {"no .": 1.0}))))
    texts = run(load("a_star_exact"), session, [QUESTION] * 12, 512)
    assert sum(text == "3 + 4 = 7 . ans 7" for text in texts) >= 9


# -- moves ---------------------------------------------------------------------------------------------------------


def countdown_script(
    proposals: Callable[[str], dict[str, float]],
    values: Callable[[str], dict[str, float]],
    chains: Callable[[str, str], dict[str, float]] | None = None,
) -> Scripted:
    """`proposals`: state -> moves, `values`: state -> words, `chains`: (question, moves so far) -> next moves."""

    def says(text: str) -> dict[str, float]:
        for form in ("<propose>", "<value>", "<cot>"):
            state, there, own = text.partition(f" {form}")
            if there:
                break
        else:
            return {"<eos>": 1.0}
        if form == "<value>":
            return values(state)
        if form == "<cot>":
            assert chains is not None
            return sentences(lambda done: chains(state, done))(f"<cot>{own}")
        return sentences(lambda done: {} if done else proposals(state))(f"<cot>{own}")

    return Scripted(says)


def all_moves(state: str) -> dict[str, float]:
    numbers, _ = countdown.read(state)
    found = countdown.moves(numbers)
    return {countdown.said(*move): 1 / len(found) for move in found}


def exact(state: str) -> dict[str, float]:
    return {countdown.value(*countdown.read(state)): 1.0}


def test_a_tree_with_right_values_solves_and_one_with_wrong_values_does_not() -> None:
    questions = ["1 , 2 , 3 , 4 -> 24", "1 , 2 , 3 , 8 -> 40"]
    questions = [countdown.told(*countdown.read(question)) for question in questions]
    assert all(countdown.solvable(*countdown.read(question)) for question in questions)
    session = session_of(1, model=countdown_script(all_moves, exact))
    texts = run(load("tree_of_thoughts"), session, questions, 1024)
    assert [countdown.check(question, text)[1] for question, text in zip(questions, texts, strict=True)] == [True] * 2
    assert session.spent <= 1024 * 2
    turned = {"sure": "impossible", "impossible": "sure", "likely": "impossible"}
    lying = session_of(1, model=countdown_script(all_moves, lambda state: {turned[next(iter(exact(state)))]: 1.0}))
    texts = run(load("tree_of_thoughts"), lying, questions, 1024)
    assert not any(countdown.check(question, text)[1] for question, text in zip(questions, texts, strict=True))


def test_values_are_sums_of_words_and_the_best_of_a_level_are_kept() -> None:
    """Three words a state, 20, 1 and .001; ties stay in their order; a state is asked about once."""
    words = {"1 2 , 2 4 -> 2 4": "likely", "2 , 2 6 -> 2 4": "impossible", "5 , 9 -> 2 4": "sure"}
    asked: list[str] = []

    def value(state: str) -> dict[str, float]:
        asked.append(state)
        return {words[state]: 1.0} if state in words else exact(state)

    def propose(state: str) -> dict[str, float]:
        if state == "4 , 5 , 6 -> 2 4":
            return {
                "4 + 6 = 1 0 left 1 2 , 2 4 .": 0.2,
                "6 + 4 = 1 0 left 1 2 , 2 4 .": 0.2,
                "5 + 6 = 1 1 left 2 , 2 6 .": 0.3,
                "4 + 5 = 9 left 5 , 9 .": 0.3,
            }
        return {f"1 + 1 = 2 left {'2 4' if state.startswith('5') else '3'} .": 1.0}

    module = module_of("tree_of_thoughts")
    method = load("tree_of_thoughts", widest=2)
    session = session_of(0, model=countdown_script(propose, value))
    tree = module.Tree(24, 2, [([], (4, 5, 6))])
    session.ledger.reset(limit=1e6)
    with torch.no_grad():
        method.grow(session, [tree], 1000)
    assert tree.worth == {(12, 24): 3.0, (2, 26): pytest.approx(0.003), (5, 9): 60.0}
    assert [state for _, state in tree.kept] == [(5, 9), (12, 24)]
    assert sorted(asked) == sorted(words) and tree.spent == session.spent
    assert run(method, session, ["4 , 5 , 6 -> 2 4"], 400) == ["4 + 5 = 9 left 5 , 9 . 1 + 1 = 2 left 2 4 ."]


def test_a_tree_is_as_wide_as_its_rung_and_never_spends_more() -> None:
    module = module_of("tree_of_thoughts")
    fits = [
        next((b for b in range(5, 0, -1) if module.most(4, 1, b, b) <= rung), 0) for rung in (32, 64, 256, 512, 1024)
    ]
    assert fits == [0, 1, 2, 3, 5]
    model = countdown_script(all_moves, exact, lambda question, done: {"1 3 + 1 3 = 2 6 left 1 1 , 1 2 , 2 6 .": 1.0})
    session = session_of(2, model=model)
    questions = ["1 1 , 1 2 , 1 3 , 1 3 -> 2 4", "1 0 , 1 1 , 1 2 -> 3 3"]
    for rung in (32, 64, 128):
        for name in ("tree_of_thoughts", "checked_chains", "meta_reasoner"):
            assert all(run(load(name), session, questions, rung))
            assert session.spent <= 2 * rung


def test_proposals_take_what_the_rung_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + 18 k + 5 (1 + 15 k) + 5 (1 + 12 k) <= 2048 at k = 13; behind shorter moves than these there is room for more."""
    seen: list[tuple[int, list[int]]] = []
    moves = module_of("tree_of_thoughts").moves
    original = moves.proposed

    def watched(session: Any, states: Any, times: list[int], temperature: float) -> Any:
        seen.append((len(states), list(times)))
        return original(session, states, times, temperature)

    session = session_of(1, model=countdown_script(all_moves, exact))
    monkeypatch.setattr(moves, "proposed", watched)
    run(load("tree_of_thoughts"), session, ["1 , 2 , 3 , 4 -> 2 4"], 2048)
    assert seen[0] == (1, [13]) and len(seen) == 3
    assert all(len(set(times)) == 1 and times[0] >= 13 for _, times in seen[:2])
    assert all(times[0] <= 4 * (3 - level) * (4 - level) for level, (_, times) in enumerate(seen))


def test_the_text_that_the_check_passes_is_returned_where_there_is_one() -> None:
    module = module_of("tree_of_thoughts")
    right, wrong = encode("4 * 6 = 2 4 left 2 4 ."), encode("4 + 6 = 2 4 left 2 4 .")
    tree = module.Tree(24, 2, [(wrong, (24,)), (right, (24,))])
    question = encode("4 , 6 -> 2 4")
    assert load("tree_of_thoughts_any").answer(question, tree) == right
    assert load("tree_of_thoughts").answer(question, tree) == wrong


def test_a_chain_that_claims_too_much_is_trusted_or_checked() -> None:
    """Seven chains in ten say that 4 + 6 leaves the target: the word is taken by one control, seen through by the other."""
    right, wrong = "4 * 6 = 2 4 left 2 4 .", "4 + 6 = 2 4 left 2 4 ."

    def chain(question: str, done: str) -> dict[str, float]:
        return {} if done else {right: 0.3, wrong: 0.7}

    session = session_of(0, task="solve/game24", model=countdown_script(all_moves, exact, chain))
    questions = ["4 , 6 -> 2 4"] * 20
    trusted = run(load("trusted_chains"), session, questions, 512)
    spent = session.spent
    assert 0.1 < sum(text == right for text in trusted) / 20 < 0.5
    assert spent == 20 * (1 + len(encode(right)))  # a chain each with its end; the first token comes with the prompt
    assert run(load("checked_chains"), session, questions, 512) == [right] * 20
    assert spent < session.spent < 512 * 20


# -- the bandit ----------------------------------------------------------------------------------------------------


def test_a_bandit_is_ridge_regression_and_a_bonus_for_what_is_rare() -> None:
    module = module_of("meta_reasoner")
    draw, bandit = torch.Generator().manual_seed(0), module.Bandit()
    contexts = torch.rand(30, 9, generator=draw, dtype=torch.double)
    rewards = torch.rand(30, generator=draw, dtype=torch.double)
    for t in range(30):
        bandit.update(contexts[t], t % 3, float(rewards[t]))
    x = torch.rand(9, generator=draw, dtype=torch.double)
    for strategy in range(4):
        mine = [t for t in range(30) if t % 3 == strategy]
        gram = torch.eye(9, dtype=torch.double) + contexts[mine].T @ contexts[mine]
        theta = torch.linalg.solve(gram, contexts[mine].T @ rewards[mine])
        bound = theta @ x + 0.5 * torch.sqrt(x @ torch.linalg.solve(gram, x))
        assert float(bandit.scores(x)[strategy]) == pytest.approx(float(bound))


GAME = "2 , 3 , 4 -> 2 4"
GOOD, BAD = "2 * 3 = 6 left 4 , 6 .", "2 + 3 = 5 left 4 , 5 ."


def game(question: str, done: str) -> dict[str, float]:
    """The first move is good one time in three; behind it the second solves, behind the other it does not."""
    if not done:
        return {GOOD: 1 / 3, BAD: 2 / 3}
    return {"4 * 6 = 2 4 left 2 4 .": 1.0} if done == GOOD else {"4 * 5 = 2 0 left 2 0 .": 1.0}


def test_a_bandit_learns_to_leave_a_state_that_is_judged_impossible() -> None:
    """Taught on games where it pays to take a bad first move back and to go on behind a good one, it does both."""
    module = module_of("meta_reasoner")
    session = session_of(0, model=countdown_script(all_moves, exact, game))
    session.ledger.reset(limit=1e9)
    bandit = module.Bandit()
    with torch.no_grad():
        for _ in range(2):
            module.play(session, [encode(GAME)] * 10, 200, bandit, True, False)
        good = module.Game(24, [(2, 3, 4), (4, 6)], [0, 1], [[0.0] * 3, [0.0, 0.0, 1.0]], rounds=1)
        bad = module.Game(24, [(2, 3, 4), (4, 5)], [0, 1], [[0.0] * 3, [1.0, 0.0, 0.0]], rounds=1)
        offered = [module.CONTINUE, module.BACKTRACK]
        assert module.choose(session, bandit, good.report(), offered, False) == module.CONTINUE
        assert module.choose(session, bandit, bad.report(), offered, False) == module.BACKTRACK
    session.state = {"a": bandit.a, "b": bandit.b}
    texts = run(load("meta_reasoner"), session, [GAME] * 4, 400)
    assert all(countdown.check(GAME, text)[1] for text in texts)
    assert session.spent < 4 * 400


def test_strategies_do_what_they_say_and_rows_are_counted() -> None:
    """Each strategy once, from the same chain: what stands in the text then, and what it cost."""
    module = module_of("meta_reasoner")
    solved = "4 * 6 = 2 4 left 2 4 ."
    cases = {
        module.CONTINUE: (f"{GOOD} {solved}", [(2, 3, 4), (4, 6), (24,)], len(encode(solved))),
        module.BACKTRACK: (GOOD, [(2, 3, 4), (4, 6)], len(encode(GOOD)) + 1),
        module.RESTART: (GOOD, [(2, 3, 4), (4, 6)], len(encode(GOOD)) + 1),
    }
    sure = countdown_script(all_moves, exact, lambda question, done: game(question, done) if done else {GOOD: 1.0})
    for strategy, (text, states, rows) in cases.items():
        session = session_of(0, model=sure)
        session.ledger.reset(limit=1e6)
        chains = module.Chains(session.networks["model"], [encode(f"{GAME} <cot>")])
        played = module.Game(24, [(2, 3, 4)], [chains.starts[0]], [[0.0] * 3])
        with torch.no_grad():
            assert module.go_on(session, chains, [played], {0: module.CONTINUE}) == {0: True}
            before = session.spent
            assert played.spent == before == len(encode(GOOD)) + 1
            assert module.go_on(session, chains, [played], {0: strategy}) == {0: True}
        assert decode(chains.written(0)) == text
        assert played.states == states and played.ends[-1] == len(chains.texts[0])
        assert session.spent - before == rows == played.spent - before
    # of three moves that are proposed, one that leads on is made, whatever the model would write itself
    model = countdown_script(lambda state: {GOOD: 0.6, BAD: 0.4}, exact, lambda question, done: {BAD: 1.0})
    session = session_of(1, model=model)
    session.ledger.reset(limit=1e6)
    chains = module.Chains(session.networks["model"], [encode(f"{GAME} <cot>")] * 12)
    played = [module.Game(24, [(2, 3, 4)], [chains.starts[i]], [[0.0] * 3]) for i in range(12)]
    with torch.no_grad():
        module.go_on(session, chains, played, dict.fromkeys(range(12), module.EXPLORE))
    assert sum(each.states[-1] == (4, 6) for each in played) >= 9  # .6: 7 of 12; of three .94
    assert session.spent == sum(each.spent for each in played)


def test_a_report_is_worth_what_the_model_says_of_it_by_how_far_it_is() -> None:
    module = module_of("meta_reasoner")
    half = module.Game(24, [(2, 3, 4), (4, 6)], [0, 1], [[0.0] * 3, [0.1, 0.4, 0.5]], rounds=2)
    assert half.progress() == pytest.approx((0.5 + 0.2) / 2)
    assert half.report().tolist() == pytest.approx([1, 0.1, 0.4, 0.5, 0, 1, 0, 0, 0.2])
    assert half.offers(10_000) == [module.CONTINUE, module.BACKTRACK, module.EXPLORE]
    assert half.offers(module.whole(2) + 1) == [module.CONTINUE]
    dead = module.Game(24, [(2, 3, 4), (4, 5), (20,)], [0, 1, 2], [[0.0] * 3, [1.0, 0, 0], [1.0, 0, 0]], rounds=2)
    assert dead.offers(10_000) == [module.BACKTRACK, module.RESTART] and dead.offers(20) == [module.BACKTRACK]


def test_a_wrong_claim_ends_a_game_unless_it_is_checked() -> None:
    """Seven first moves in ten claim the target falsely: the word is taken, or seen through and taken back."""
    right, wrong = "4 * 6 = 2 4 left 2 4 .", "4 + 6 = 2 4 left 2 4 ."
    model = countdown_script(all_moves, exact, lambda question, done: {} if done else {right: 0.3, wrong: 0.7})
    for name, least, most in (("meta_reasoner", 1, 13), ("meta_reasoner_checked", 18, 20)):
        session = session_of(2, model=model)
        texts = run(load(name), session, ["4 , 6 -> 2 4"] * 20, 400)
        assert set(texts) <= {right, wrong} and least <= texts.count(right) <= most, name


@pytest.mark.parametrize("rung", [32, 128])
def test_every_rung_is_kept_by_a_model_that_says_anything(rung: int) -> None:
    """Texts that never come to a full stop, an answer or a move: something is returned, and no more is spent than allowed."""
    session = session_of(1, model=tiny(5), process=built(Verifier, 32, 2, 1))
    questions = {"problems": [QUESTION, QUESTION.replace("4", "5")], "countdown": [GAME, "1 , 2 , 3 , 4 -> 2 4"]}
    for name, kind in (
        ("a_star_decoding", "problems"),
        ("a_star_exact", "problems"),
        ("tree_of_thoughts", "countdown"),
        ("trusted_chains", "countdown"),
        ("random_strategy_checked", "countdown"),
    ):
        run(load(name), session, questions[kind], rung)
        assert 0 < session.spent <= 2 * rung
