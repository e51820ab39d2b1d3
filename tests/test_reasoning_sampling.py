"""Texts drawn side by side: particles, first steps, beams that judge themselves, foresight, by models that say what is known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from stepmark.datasets import problems
from tests.rigs.reasoning import Judge, Scripted, load, module_of, run, session_of, tiny

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import Verifier, built, encode
from stepmark.tracks.reasoning import populations
from stepmark.tracks.reasoning.populations import drawn, write_to_ends

torch.set_num_threads(1)
QUESTION = "tom has 3 pears . tom finds 4 pears . how many pears does tom have ?"
ALL = (
    "particle_filtering_its particle_subtrees particle_best_of_n particle_exact step_beam likelihood_beam first_step_pruning "
    "first_step_random first_step_spoilt self_eval_guided_decoding self_eval_exact phi_decoding phi_no_foresight"
).split()


def telling(says: Callable[[str], dict[str, float]]) -> Scripted:
    """A model that goes on with what stands behind the format; a step is judged by `says` of all from <verify> on."""

    def whole(text: str) -> dict[str, float]:
        for form in ("<cot>", "<think>", "<verify>"):
            if form in text:
                own = text.partition(form)[2].strip()
                if form == "<verify>":
                    return says(f"{form} {own}") if own.endswith("<score>") else {"<eos>": 1.0}
                return says(own)
        return {"<eos>": 1.0}

    return Scripted(whole)


def line(*words: str) -> Callable[[str], dict[str, float]]:
    """A text whose words come one after the other; alternatives, split by |, are equally likely. `%` is the first word."""
    table = [word.split("|") for word in words]

    def says(own: str) -> dict[str, float]:
        before = own.split()
        if len(before) >= len(table):
            return {"<eos>": 1.0}
        options = table[len(before)]
        options = [before[0] if option == "%" else option for option in options]
        return {option: 1 / len(options) for option in options}

    return says


# -- what they share -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_every_rung_is_kept_to_by_texts_that_never_end(name: str) -> None:
    """The worst for a budget: steps of any length, few ends."""
    verifier = built(Verifier, 32, 2, 5)
    session = session_of(model=tiny(3, depth=1), process=verifier)
    for rung in (32, 192):
        found = run(load(name), session, [QUESTION] * 2, rung)
        assert all(1 <= len(text.split()) <= 320 for text in found)
        assert rung / 4 < session.spent / 2 <= rung


@torch.no_grad()
def test_draws_without_replacement_follow_the_weights_one_after_the_other() -> None:
    session = session_of()
    pairs = Counter(tuple(drawn(session, [0.6, 0.3, 0.1], 2)) for _ in range(3000))
    for (a, b), wanted in {(0, 1): 0.6 * 0.75, (1, 0): 0.3 * 6 / 7, (2, 0): 0.1 * 2 / 3}.items():
        assert pairs[a, b] / 3000 == pytest.approx(wanted, abs=0.03)


@torch.no_grad()
def test_texts_wait_for_their_turn_where_the_rung_is_short() -> None:
    """Of three texts of eight tokens, 20 tokens write two to their ends and begin no third."""
    session = session_of(model=telling(line("1", ".", "2", ".", "3", ".", "4")))
    chains = Chains(session.networks["model"], [[*encode(f"{QUESTION} <cot>")]] * 3)
    session.ledger.reset(limit=20, items=1)
    write_to_ends(session, chains, [0, 0, 0], 0.7)
    assert [len(chains.written(i)) for i in range(3)] == [8, 8, 4] and session.spent == 20


# -- particles -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_particles_are_drawn_by_the_odds_that_they_are_right() -> None:
    """softmax of logits: P(i) ~ r / (1 - r), with replacement; not r, not the products over steps."""
    method, session = load("particle_filtering_its"), session_of(model=telling(line("1")), process=Judge(likes))
    chains = Chains(session.networks["model"], [encode(f"<cot> {step} .") for step in "123"])
    value = [5.0, 0.0, -5.0]
    method.weigh(session, {}, chains, [0, 0, 0], [0, 1, 2], value)
    counts = Counter(method.survivors(session, value, 6000))
    odds = [0.9 / 0.1, 0.5 / 0.5, 0.2 / 0.8]
    assert [counts[i] / 6000 for i in range(3)] == pytest.approx([odd / sum(odds) for odd in odds], abs=0.02)


def likes(text: str) -> float:
    """A step 1 is .9, a 2 .5, all others .2."""
    return {"1": 0.9, "2": 0.5}.get(text.split()[-2], 0.2) if len(text.split()) > 1 else 0.5


@torch.no_grad()
def test_one_particle_is_a_sampled_chain_and_deterministic_search_keeps_the_best() -> None:
    session = session_of(seed=4, task="solve/problems", model=tiny(3), process=built(Verifier, 32, 2, 5))
    alone = run(load("particle_filtering_its"), session, [QUESTION], 32)
    session.rng.manual_seed(4)
    assert alone[0].startswith(
        run(load("self_consistency"), session, [QUESTION], 32)[0]
    )  # whose last token is not spent
    weights = [1.3, -1.2, 2.1, 0.3, 0.1, 3.0, -3.0, 0.0]
    assert load("particle_subtrees").survivors(session, weights, 6) == [2] * 4 + [5] * 2
    assert load("particle_subtrees").survivors(session, weights, 3) == [2] * 3
    assert load("particle_best_of_n").survivors(session, weights, 8) == list(range(8))


@torch.no_grad()
def test_a_particle_that_has_ended_keeps_its_weight_and_the_best_that_gives_an_answer_is_taken() -> None:
    session = session_of(model=telling(line("1")), process=Judge(likes))
    method = load("particle_filtering_its")
    chains = Chains(session.networks["model"], [encode("<cot>")] * 3)
    for i, text in enumerate(("1 .", "2 . ans 2 <eos>", "5 . ans 2 <eos>")):
        chains.put(i, encode(text))
    value = [0.0, 0.1, 0.5]
    method.weigh(session, {}, chains, [0, 0, 0], range(3), value)
    assert value == pytest.approx([math.log(9), 0.1, 0.5]) and session.ledger.entries["process"].rows == 1
    # 1 is liked best and never ends; of those that do, 2 is liked better than 3
    endless = telling(lambda own: line("1|2|3", ".", "ans", "%")(own) if not own.startswith("1") else {"1": 1.0})
    session = session_of(model=endless, process=Judge(likes))
    assert {text[-1] for text in run(load("particle_best_of_n"), session, ["how many ?"] * 8, 512)} == {"2"}


@torch.no_grad()
def test_an_exact_check_draws_right_particles_alone() -> None:
    session = session_of(model=telling(line("1")))
    chains = Chains(session.networks["model"], [encode(f"{QUESTION} <cot>")] * 2)
    chains.put(0, encode("3 + 4 = 8 ."))
    chains.put(1, encode("3 + 4 = 7 ."))
    method, value = load("particle_exact"), [0.0, 0.0]
    method.weigh(session, {"question": [encode(QUESTION)]}, chains, [0, 0], [0, 1], value)
    assert method.survivors(session, value, 8) == [1] * 8


@torch.no_grad()
@pytest.mark.parametrize("name", ["particle_filtering_its", "self_eval_exact", "first_step_pruning", "step_beam"])
def test_questions_in_parts_are_answered_as_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(populations, "SIDE", 1)
    session = session_of(5, model=tiny(3, depth=1), process=built(Verifier, 32, 2, 5))
    questions = [QUESTION, QUESTION.replace("3", "5")]
    together = run(load(name), session, questions, 128)
    session.rng.manual_seed(5)
    assert together == [run(load(name), session, [question], 128)[0] for question in questions]


@torch.no_grad()
def test_particles_go_on_from_what_the_verifier_likes() -> None:
    """Two steps, each right once in five: eight particles find both where one of them is right at each step,
    (1 - .8^8)^2 = .69 of the time; eight texts that are not resampled 1 - .96^8 = .28 of it."""

    def says(own: str) -> dict[str, float]:
        words = own.split()
        if len(words) in (0, 2):
            return {"1": 0.2, "5": 0.8}
        return {".": 1.0} if len(words) in (1, 3) else {"ans": 1.0} if len(words) == 4 else {
            words[2] if words[0] == "1" else "5": 1.0} if len(words) == 5 else {"<eos>": 1.0}  # fmt: skip

    def right(text: str) -> float:
        return 0.001 if "5" in text.partition("<cot>")[2] else 0.999

    shares = {}
    for name in ("particle_filtering_its", "particle_best_of_n"):
        session = session_of(model=telling(says), process=Judge(right))
        found = run(load(name, temperature=1.0), session, ["?"] * 20, 256)
        shares[name] = sum(text.endswith("ans 1") for text in found) / 20
    assert shares["particle_filtering_its"] > 0.5 > 0.45 > shares["particle_best_of_n"]


# -- first steps -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_best_quarter_of_first_steps_is_completed_and_nothing_else_is_paid_for() -> None:
    """16 first steps of two tokens (the prompt is read once), 4 rests of three: 1 + 16 + 4 x 3 rows."""
    model = telling(line("1|2|3|4|5", ".", "ans", "%"))
    answers = {}
    for name in ("first_step_pruning", "first_step_random"):
        session = session_of(model=model, process=Judge(lambda text: {"3 .": 0.9, "4 .": 0.1}.get(text[-3:], 0.5)))
        found = [run(load(name), session, ["how many ?"], 256)[0] for _ in range(8)]
        answers[name] = Counter(text.split()[-1] for text in found)
        assert session.spent == 1 + 16 + 4 * 3
    assert answers["first_step_pruning"]["3"] >= 7 and max(answers["first_step_random"].values()) <= 5


@torch.no_grad()
def test_first_steps_that_are_right_are_kept_by_a_bound() -> None:
    """Of 16 first steps four in ten are right, as many as of each wrong one; four are kept, of which all are right in most
    questions (.93), and a vote of all would be lost half the time."""

    def says(own: str) -> dict[str, float]:
        words = own.split()
        if len(words) == 4:
            return {"7": 0.4, "6": 0.4, "5": 0.2}
        return {[*"3 + 4 =".split(), "", ".", "ans", words[4] if len(words) > 4 else "", "<eos>"][len(words)]: 1.0}

    session = session_of(model=telling(says))
    found = run(load("first_step_exact", temperature=1.0), session, [QUESTION] * 12, 256)
    assert found.count("3 + 4 = 7 . ans 7") >= 11


@torch.no_grad()
def test_first_steps_that_are_put_in_are_right_or_wrongly_worked() -> None:
    session = session_of(model=telling(lambda own: line("3", "+", "4", "=", "7", ".", "ans", "7")(own)))
    given = run(load("first_step_given"), session, [QUESTION] * 2, 128)
    assert given == ["3 + 4 = 7 . ans 7"] * 2
    for text in run(load("first_step_spoilt"), session, [QUESTION] * 8, 128):
        left, sign, right, result = problems.clauses(text)[0]
        assert (left, sign, right) == (3, "+", 4) and result != 7
    two = QUESTION.replace("how", "tom eats 2 pears . how")
    session = session_of(model=telling(lambda own: {"<eos>": 1.0}))
    for text in run(load("last_step_spoilt"), session, [two] * 4, 128):
        (*_, one), (left, sign, right, result) = problems.clauses(text)
        assert one == 7 and (left, sign, right) == (7, "-", 2) and result != 5


# -- beams that judge themselves -------------------------------------------------------------------------------------


def two_steps(sure: dict[str, float]) -> Scripted:
    """Step ``1 + 1 = 2 .`` or ``3 .``, equally likely; a step is right with the probability that `sure` gives."""

    def says(own: str) -> dict[str, float]:
        if own.startswith("<verify>"):
            asked = own.removeprefix("<verify>").removesuffix("<score>").strip()
            return {"8": sure[asked] / 2, "7": sure[asked] / 2, "6": (1 - sure[asked]) / 2, "1": (1 - sure[asked]) / 2}
        if not own:
            return {"1": 0.5, "3": 0.5}
        whole = "1 + 1 = 2 . ans 1" if own[0] == "1" else "3 . ans 3"
        return {(whole.removeprefix(own).split() or ["<eos>"])[0]: 1.0}

    return telling(says)


@pytest.mark.parametrize(("long", "short", "best"), [(0.6, 0.7, "1"), (0.5, 0.7, "3")])
@torch.no_grad()
def test_a_step_is_worth_its_likelihood_by_tokens_and_its_confidence(long: float, short: float, best: str) -> None:
    """(.5^(1/6) x .6)^.5 > (.5^(1/2) x .7)^.5 > (.5^(1/6) x .5)^.5: neither part alone, nor a product over the tokens,
    gives both."""
    session = session_of(model=two_steps({"1 + 1 = 2 .": long, "3 .": short}))
    method = load("self_eval_beam", BEAM=32, samples=16)
    assert {text[-1] for text in run(method, session, ["how many ?"] * 3, 48)} == {best}


@torch.no_grad()
def test_beams_are_drawn_by_the_exponential_of_their_worth() -> None:
    """Of two candidates that differ, one is kept, by exp(E / tau): not by E, not by E^(1 / tau), not the best."""
    method, session = load("self_eval_guided_decoding"), session_of()
    counts = Counter(method.pruned(session, [0.9, 0.1], 1, 0.5)[0] for _ in range(2000))
    assert counts[0] / 2000 == pytest.approx(1 / (1 + math.exp(-0.8 / 0.5)), abs=0.03)
    assert method.pruned(session, [0.1, 0.9, 0.5], 2, 0.001) == [1, 2]
    session = session_of(model=two_steps({"1 + 1 = 2 .": 0.1, "3 .": 0.95}))
    found = run(load("self_eval_guided_decoding", temperature=1.0), session, ["how many ?"] * 100, 64)
    one, other = (0.5 ** (1 / 6) * 0.1) ** 0.5, (0.5 ** (1 / 2) * 0.95) ** 0.5
    kept = 1 / (1 + math.exp((one - other) / 0.5))  # of the pairs that differ, a half
    assert sum(text[-1] == "3" for text in found) / 100 == pytest.approx(0.25 + kept / 2, abs=0.08)


@torch.no_grad()
def test_worth_is_carried_over_steps_and_candidates_that_are_the_same_are_judged_once() -> None:
    worth = module_of("self_eval_guided_decoding").worth
    assert worth(math.log(0.9 * 0.6), 2) == pytest.approx(math.sqrt(0.54)) and worth(0.0, 0) == 1.0
    session = session_of(model=telling(line("1", ".", "ans", "1")))
    assert run(load("self_eval_guided_decoding"), session, ["how many ?"], 128) == ["1 . ans 1"]
    # 2 beams: 4 candidates of one prompt, judged as one; 4 of the one beam left, whose end is not judged
    assert session.spent == (1 + 4 + 1) + (1 + 4 * 2)
    session = session_of(model=telling(two_rounds))
    assert run(load("self_eval_beam"), session, ["how many ?"], 256)[0].startswith("1 ")


@torch.no_grad()
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_the_temperature_of_the_draws_falls_with_each_step(factor: float) -> None:
    session = session_of(model=telling(line("1|2", ".", "3|4", ".", "5|6", ".", "ans", "1")))
    method, seen = load("self_eval_guided_decoding", decay=factor), list[float]()
    pruned = method.pruned

    def watched(session: object, scores: list[float], width: int, tau: float) -> list[int]:
        seen.append(tau)
        return pruned(session, scores, width, tau)  # type: ignore[no-any-return]

    method.pruned = watched
    run(method, session, ["how many ?"], 128)
    assert seen[:3] == pytest.approx([0.5 * factor**k for k in range(3)])


@torch.no_grad()
def test_beams_vote_by_what_they_are_worth() -> None:
    """Two beams that doubt themselves give 7, one that does not gives 8: it is worth more than both."""

    def says(own: str) -> dict[str, float]:
        if own.startswith("<verify>"):
            sure = 0.95 if own.split()[1] == "3" else 0.1
            return {"8": sure, "1": 1 - sure}
        words = own.split()
        if not words:
            return dict.fromkeys("123", 1 / 3)
        return {[".", "ans", "8" if words[0] == "3" else "7", "<eos>"][len(words) - 1]: 1.0}

    session = session_of(model=telling(says))
    found = run(load("self_eval_guided_decoding"), session, ["how many ?"] * 12, 192)
    assert sum(text.endswith("ans 8") for text in found) >= 8  # of six first steps one is a 3 in .91 of the questions


def two_rounds(own: str) -> dict[str, float]:
    """A text of 1 is surer at its first step, one of 2 at its second; by both together the first is."""
    if own.startswith("<verify>"):
        sure = {"1 .": 0.9, "2 .": 0.5, "1 . 1 .": 0.6, "2 . 2 .": 0.8}[own.removeprefix("<verify> ")[:-8]]
        return {"8": sure, "1": 1 - sure}
    return line("1|2", ".", "%", ".", "ans", "%")(own)


# -- foresight -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_steps_are_chosen_by_what_follows_them() -> None:
    """Two first steps, equally likely; behind 1 the model is unsure of all, behind 2 of nothing."""

    def says(own: str) -> dict[str, float]:
        words = own.split()
        if own.startswith("1") and len(words) in (2, 3, 4):
            return dict.fromkeys(("6", "7", "8"), 1 / 3)
        return line("1|2", ".", "3", "4", "5", ".", "ans", "%")(own)

    ends = {}
    for name in ("phi_decoding", "phi_random"):  # M = 1, N = 3: one of 2 is among them at 7 of 8
        session = session_of(model=telling(says))
        found = run(load(name, CANDIDATE=80), session, ["how many ?"] * 12, 256)
        ends[name] = Counter(text[-1] for text in found)
    assert ends["phi_decoding"]["2"] >= 9 > 8 >= ends["phi_random"]["2"]


@torch.no_grad()
def test_an_advantage_is_what_a_foresight_gains_over_that_of_its_beam() -> None:
    """One token is a draw of two, all others are certain: F is log .5 over the tokens behind the step, 7 and then 5 of them,
    and 0 once the token stands in the step itself."""
    session = session_of(model=telling(line("1", ".", "2", ".", "3|4", ".", "ans", "5")))
    method, seen = load("phi_no_pruning"), list[list[float]]()
    value = method.value

    def watched(session: object, gains: list[float], tails: object, needed: int) -> object:
        seen.append(list(gains))
        return value(session, gains, tails, needed)

    method.value = watched
    run(method, session, ["how many ?"], 128)
    first, second = math.log(0.5) / 7, math.log(0.5) / 5
    assert seen[:3] == [pytest.approx([gain] * 2, abs=1e-4) for gain in (first, second - first, -second)]


@torch.no_grad()
def test_value_is_the_mean_of_advantage_and_alignment_among_steps_that_are_better() -> None:
    session, method = session_of(), load("phi_decoding")
    tails = [encode(text) for text in ["ans 1 2"] * 5 + ["5 - 3 ."] * 2 + ["so 9"] + ["ans 1 2"] * 3]
    weights, share = method.value(session, [0.1] * 8 + [-0.1] * 3, tails, 4)
    sizes = torch.tensor([5.0] * 5 + [2.0] * 2 + [1.0]) / 8
    assert share == 5 / 8 and weights[8:] == [0.0] * 3
    assert weights[:8] == pytest.approx((0.5 / 8 + sizes.softmax(0) / 2).tolist(), abs=1e-6)
    gains = [0.2, 0.1, -0.1, -0.3]
    weights, share = method.value(session, gains, tails[:4], 3)
    assert share == 0 and weights == pytest.approx((torch.tensor(gains) / 0.1).softmax(0).tolist(), abs=1e-6)


@torch.no_grad()
def test_clusters_are_of_words_and_numbers() -> None:
    """12 is another word than 1 and 2; words of all texts weigh little."""
    session, clustered = session_of(), module_of("phi_decoding").clustered
    texts = [
        encode(text) for text in ("1 2 . ans 1 2", "1 2 . ans 1 2", "1 . ans 2", "2 1 . ans 2 1", "1 2 . ans 1 2 .")
    ]
    for _ in range(20):
        labels = clustered(session, texts, 3)
        assert labels[0] == labels[1] == labels[4] and len({labels[0], labels[2], labels[3]}) == 3
    assert set(clustered(session, texts[:1] * 4, 3)) == {0}


@torch.no_grad()
def test_unlikely_steps_are_not_simulated() -> None:
    method = load("phi_decoding")
    assert method.unlikely({0: -0.1, 1: -0.1, 2: -0.1, 3: -2.0, 5: -0.3, 6: -0.3}, [[0, 1, 2, 3], [4, 5, 6]], 2) == {3}
    assert method.unlikely(dict(enumerate([-1.0, -0.1, -0.1, -0.1])), [[0, 1, 2, 3]], 4) == set()
    assert method.unlikely({0: -0.3, 1: -0.3, 2: -0.3}, [[0, 1, 2]], 1) == set()
    assert load("phi_no_pruning").unlikely({0: -0.1, 1: -0.1, 2: -0.1, 3: -2.0}, [[0, 1, 2, 3]], 2) == set()


@torch.no_grad()
def test_foresight_stops_where_it_says_nothing_new() -> None:
    """M = N = 2 at 256 tokens: a round is a read of each forked beam, its steps and what follows them; then 2 beams are
    completed. Steps that are the same stop it in round 2; so does one cluster, though the steps differ."""
    session = session_of(model=telling(line("1", ".", "2", ".", "3", ".", "4", ".", "ans", "5")))
    assert run(load("phi_decoding"), session, ["how many ?"], 256) == ["1 . 2 . 3 . 4 . ans 5"]
    first, second, completion = 1 + 4 + 4 * 9, 2 + 4 + 4 * 7, 2 * 7
    assert session.spent == first + second + completion
    run(load("phi_no_pruning"), session, ["how many ?"], 256)
    assert session.spent > first + second + completion
    session = session_of(model=telling(line("1", ".", "2|3", ".", "4", ".", "ans", "5")))
    run(load("phi_decoding", temperature=1.0), session, ["how many ?"] * 4, 256)
    assert session.spent == 4 * ((1 + 4 + 4 * 7) + (2 + 4 + 4 * 5) + 2 * 5)
