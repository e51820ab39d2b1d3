"""Methods that end a thought: where it ends, what is written then, and what that costs, by models that say what is wanted."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stepmark.datasets import problems
from tests.rigs.reasoning import Scripted, Session, load, module_of, run, session_of, tiny
from torch import Tensor, nn

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, WORDS, decode, encode
from stepmark.tracks.reasoning.stopping import ANSWER, Thoughts, asked, eagerest, stated

torch.set_num_threads(1)

QUESTION = "how many"


def thinks(sentences: list[str], answers: Callable[[int], str | None], last: int = 10**6) -> Scripted:
    """Sentences in turn, ``</think>`` after `last` of them, then or wherever it is asked ``ans`` and what `answers` says of
    the number of full stops before, which does not end where it is None."""

    def says(text: str) -> dict[str, float]:
        own = text.partition("<think>")[2].split()
        if "</think>" in own:
            behind = own[own.index("</think>") + 1 :]
            if not behind:
                return {"ans": 1.0}
            said = answers(own[: own.index("</think>")].count("."))
            if said is None:
                return {"wait": 1.0}
            return {[*said.split(), "<eos>"][len(behind) - 1]: 1.0}
        done = own.count(".")
        since = len(own) - (max(k for k, word in enumerate(own) if word == ".") + 1 if done else 0)
        if done >= last and not since:
            return {"</think>": 1.0}
        return {sentences[done % len(sentences)].split()[since]: 1.0}

    return Scripted(says)


def preparing(session: Session, train: dict[str, list[Any]]) -> Session:
    """A session as `prepare` sees it, with a train split."""
    session.train = train
    session.scale = lambda embedded, smoke: embedded
    session.progress = lambda iterable, desc="": iterable
    session.once = lambda function, *literals: function(session, *literals)
    return session


# -- what they share --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_looking_at_a_thought_changes_nothing_and_is_paid_for() -> None:
    """A real network: states are those of the whole text, answers asked for are those of greedy decoding, the text goes on as
    if neither had been asked for, and the accounts hold what was spent."""
    model = tiny(3)
    session = session_of(model=model)
    questions = [[5, 6, 7], [9, 8, 7, 6, 5]]
    thoughts = Thoughts(model, questions, 60, states=True)
    thoughts.write([0, 1], session.rng, temperature=0, limit=6)
    states, before = thoughts.chains.states([1, 0]), [list(text) for text in thoughts.chains.texts]
    for state, text in zip(states, (before[1], before[0]), strict=True):
        assert torch.allclose(state, model(torch.tensor([text]), states=True)[0, -1], atol=1e-4)
    (asked_before, _), _ = thoughts.ask([0, 1], back=2)
    assert asked_before == Chains(model, [[*before[0][:-2], *encode("</think> ans")]]).write(limit=ANSWER)[0]
    assert thoughts.chains.texts == before
    (tokens, logprob), _ = thoughts.ask([0, 1])
    alone = Chains(model, [[*before[0], *encode("</think> ans")]])
    assert tokens == alone.write(limit=ANSWER)[0]
    assert logprob == pytest.approx(sum(alone.logprobs[0][-len(tokens) :]), abs=1e-4)
    assert thoughts.chains.texts == before
    session.ledger.reset()
    plain = Chains(model, before)
    plain.write(limit=5)
    spent = session.spent
    session.ledger.reset()
    left = list(thoughts.left)
    thoughts.write([0, 1], session.rng, temperature=0, limit=5)
    assert thoughts.chains.texts == plain.texts and session.spent == spent == sum(left) - sum(thoughts.left)


@torch.no_grad()
def test_accounts_are_what_is_spent() -> None:
    """Every way to spend, on texts that end at different times: charges and rows are one number."""
    model = thinks(["1 + 1 = 2 .", "so 2 ."], lambda n: "4 2" if n % 2 else "7", last=3)
    session = session_of(model=model)
    thoughts = Thoughts(model, [encode(QUESTION)] * 3, 50, ANSWER, states=True)  # type: ignore[arg-type]
    thoughts.write([0, 1], session.rng)
    thoughts.chains.states([1])
    thoughts.ask([0, 1])
    thoughts.settle(1, [*encode("4 2"), EOS])
    thoughts.write([2], session.rng, limit=3)
    thoughts.answer([2])
    while going := thoughts.thinking():
        thoughts.write(going, session.rng)
    texts = [decode(text) for text in thoughts.finish()]
    assert texts == [
        "1 + 1 = 2 . so 2 . 1 + 1 = 2 . </think> ans 4 2", "1 + 1 = 2 . </think> ans 4 2", "1 + 1 </think> ans 7"
    ]  # fmt: skip
    assert session.spent == 150 - sum(thoughts.left)
    # tokens, answers asked for, a state behind which nothing is written: 15 + 1 (</think>) + 4 + 3; 6 + 1 + 3; 3 + 2
    assert [50 - left for left in thoughts.left] == [23, 10, 5]


@torch.no_grad()
def test_a_state_that_is_looked_at_costs_nothing_where_the_text_goes_on() -> None:
    """Nor does one that has been read already; and looking does not change what is written."""
    model = thinks(["1 + 1 = 2 ."], lambda n: str(n))
    session = session_of(model=model)
    asked_of = [encode(QUESTION)] * 2
    plain, looking = (Thoughts(model, asked_of, 60, states=states) for states in (False, True))  # type: ignore[arg-type]
    for thoughts in (plain, looking):
        session.ledger.reset()
        for _ in range(3):
            thoughts.write([0, 1], session.rng)
            if thoughts is looking:
                for back, word in ((2, "2"), (0, "1"), (1, ".")):
                    assert [WORDS[i] for i in thoughts.chains.states([1, 0], back).argmax(-1).tolist()] == [word] * 2
        thoughts.write([0, 1], session.rng, limit=1)
        assert session.spent == 2 * 60 - sum(thoughts.left) == 2 * (3 * 6 + 1)
    assert plain.chains.texts == looking.chains.texts
    with pytest.raises(ValueError, match="keep no states"):
        plain.chains.states([0])


def test_only_a_sentence_that_ends_in_its_number_states_one() -> None:
    for text, number in (
        ("3 + 4 = 1 2 .", "1 2"), ("so 7 .", "7"), ("no 3 + 4 = 7 .", "7"), ("wait 3 + 4 = 7 yes .", None), ("7 .", None),
        ("3 + 4 = 7", None), ("", None), (".", None), ("has 7 .", None), ("= .", None),
    ):  # fmt: skip
        found = stated(encode(text))
        assert (None if found is None else decode(found)) == number


def test_the_value_that_ends_soonest_and_harms_nothing_is_taken() -> None:
    asked_for: list[float] = []

    def right(value: float) -> float:
        asked_for.append(value)
        return {4: 0.5, 3: 0.7, 2: 0.69, 1: 0.9}[int(value)]

    assert eagerest((4, 3, 2, 1), right, 0.69) == 3 and asked_for == [4, 3]
    assert eagerest((4, 3, 2, 1), right, 0.95) == 1
    rows = {"question": ["a", "tom", "ben", "sue", "max"], "answer": list("12345"), "level": [1, 2, 1, 3, 2]}
    assert asked(rows, 0, 2) == ([encode("tom"), encode("sue")], ["2", "4"]) and asked(rows, 2, 9)[1] == ["4", "5"]


WORDY = "1 + = . wait no so yes </think> 7".split()
RULES = (
    "thinkless_terminator", "full_thinking", "forced_thinking", "hard_truncation", "thinkless_random",
    "answer_convergence", "think_adjust", "convergence_point", "fixed_length_stop", "coin_stop", "learn_to_stop",
    "hidden_state_self_verification", "static_exit", "random_exit", "confidence_exit", "first_answer_exit", "overclocking",
    "cut_thinking",
)  # fmt: skip


class Fixed(nn.Module):
    """A probe or stopper that is never sure."""

    def forward(self, states: Tensor, memory: Tensor | None = None) -> Any:
        return torch.zeros(len(states), 1) if memory is None else (torch.zeros(len(states)), memory)


@pytest.mark.parametrize("name", RULES)
def test_every_rung_is_kept(name: str) -> None:
    """Babble at temperatures, tiny rungs and greater: nothing is overspent, nothing empty, and the limits of a text hold."""
    model = Scripted(lambda text: dict.fromkeys(WORDY, 0.099))
    session = session_of(model=model, probe=Fixed(), stopper=Fixed())
    session.state = {
        "knob": torch.tensor(2.0), "chunks": torch.tensor(2.0), "coin": torch.tensor(0.3), "length": torch.tensor(9.0),
        "added": torch.zeros(512),
    }  # fmt: skip
    for rung in (6, 32, 70):
        texts = run(load(name), session, [QUESTION] * 3, rung)
        assert all(1 <= len(encode(text)) <= min(400, rung + 2) for text in texts)
        assert session.spent <= 3 * rung


# -- ThinkLess --------------------------------------------------------------------------------------------------------


def test_thinkless_ends_a_thought_at_its_token() -> None:
    """One thought goes on, the other has ended by itself: the cut is at the token, mid-sentence, the cue brings the answer,
    and nothing is paid twice."""
    model = thinks(["1 + 1 = 2 ."], lambda n: str(n))
    found = run(load("thinkless_terminator", position=8), session := session_of(model=model), [QUESTION] * 2, 100)
    assert found == ["1 + 1 = 2 . 1 + </think> ans 1"] * 2
    assert session.spent == 2 * (8 + 2)  # the thought, then one row for the cue and the digit, one for the end
    assert run(load("thinkless_terminator", position=8), session, [QUESTION], 10) == ["1 + 1 = 2 . </think> ans 1"]
    assert run(load("thinkless_0"), session, [QUESTION], 10) == ["</think> ans 0"] and session.spent == 2
    short = thinks(["1 + 1 = 2 ."], lambda n: "4 2", last=1)
    session = session_of(model=short)
    assert run(load("thinkless_terminator", position=8), session, [QUESTION], 100) == ["1 + 1 = 2 . </think> ans 4 2"]
    assert session.spent == 6 + 1 + 4 and "ans" not in short.asked[-5].split()  # written by itself, the word too


def test_controls_of_thinkless_lack_what_they_should() -> None:
    model = thinks(["1 + 1 = 2 ."], lambda n: str(n))
    session = session_of(model=model)
    assert run(load("hard_truncation", position=7), session, [QUESTION], 50) == ["1 + 1 = 2 . 1"]
    assert session.spent == 7
    assert run(load("full_thinking"), session, [QUESTION], 9) == ["1 + 1 = 2 . 1 + 1"]
    assert run(load("forced_thinking"), session, [QUESTION], 9) == ["1 + 1 = 2 </think> ans 0"]
    assert load("hard_truncation").position == load("thinkless_terminator").position + ANSWER


def test_a_random_place_is_as_early_in_the_mean() -> None:
    """Thoughts that never end by themselves: from none to twice as many tokens, each number as likely."""
    session = session_of(model=thinks(["1 + 1 = 2 ."], lambda n: str(n % 10)))
    texts = [text.split() for text in run(load("thinkless_random", position=8), session, [QUESTION] * 300, 100)]
    lengths = [words.index("</think>") for words in texts]
    assert all(words[lengths[i] :][:2] == ["</think>", "ans"] for i, words in enumerate(texts))
    assert {*lengths} == {*range(17)} and sum(lengths) / 300 == pytest.approx(8, abs=1)


# -- answer convergence -----------------------------------------------------------------------------------------------

SETTLES = ["9", "1", "2", "2", None, "2", "3", "3", "3", "3", "3", "3"]  # by full stops


@pytest.mark.parametrize(("k", "sentences", "answer"), [(2, 3, "2"), (3, 8, "3"), (4, 9, "3")])
def test_the_same_answer_k_times_in_a_row_ends_a_thought(k: int, sentences: int, answer: str) -> None:
    """An answer that changes, or none, starts the count anew; the last answer asked for is the text's, and is free."""
    model = thinks(["1 + 1 ."], lambda n: SETTLES[n], last=10)
    session = session_of(model=model)
    session.state = {"knob": torch.tensor(float(k))}
    found = run(load("answer_convergence"), session, [QUESTION], 200)
    assert found == [" ".join(["1 + 1 ."] * sentences + ["</think> ans", answer])]
    unended = sum(SETTLES[n] is None for n in range(1, sentences + 1))
    assert session.spent == 4 * sentences + 2 * (sentences - unended) + ANSWER * unended


def test_hindsight_cuts_where_the_answer_stays() -> None:
    model = thinks(["1 + 1 ."], lambda n: SETTLES[n], last=10)
    session = session_of(model=model)
    session.state = {"knob": torch.tensor(0.0)}
    found = run(load("convergence_point"), session, [QUESTION], 200)
    assert found == [" ".join(["1 + 1 ."] * 6 + ["</think> ans 3"])]
    converged = module_of("answer_convergence").converged
    assert (
        converged(["1", "3", "2", "3", "3"], "3") == 3 and converged(["1", "2"], "3") == 2 and converged([], "3") == 0
    )


def test_the_raise_is_at_full_stops_alone() -> None:
    """Shares of thoughts that end within their first sentence and right behind it, counted."""

    def says(text: str) -> dict[str, float]:
        own = text.partition("<think>")[2].split()
        if "</think>" in own:
            return {"<eos>": 1.0}
        return (
            {".": 0.999}
            if own == ["1"]
            else {"1": 0.8, "</think>": 0.2}
            if own in ([], ["1", "."])
            else {"</think>": 1.0}
        )

    session = session_of(model=Scripted(says))
    session.state = {"knob": torch.tensor(1.5)}
    found = [text.split() for text in run(load("think_adjust"), session, [QUESTION] * 700, 40)]
    inside = sum(words[0] == "</think>" for words in found) / 700
    behind = sum(words[2] == "</think>" for words in found if len(words) > 2)
    behind /= sum(len(words) > 2 for words in found)
    odds = torch.tensor([0.2, 0.8]).log()
    plain, raised = ((odds + torch.tensor([b, 0.0])).div(0.6).softmax(0)[0] for b in (0.0, 1.5))
    assert inside == pytest.approx(float(plain), abs=0.04) and behind == pytest.approx(float(raised), abs=0.06)
    assert raised > 2 * plain


@torch.no_grad()
def test_rules_are_tuned_on_questions_that_nothing_else_is_learned_from() -> None:
    """Of the values tried the first that loses nothing: with two answers in a row the thought ends at a wrong one, with
    three at the right one. What controls need is of the thoughts so ended."""
    module = module_of("answer_convergence")
    for name in ("answer_convergence", "overclocking"):
        held = module_of(name).HELD
        assert held + 2 * module_of(name).TUNED_ON + 5 <= problems.SIZES["train"]
        assert held > 2 * max(module.LEARNED_FROM, module_of("overclocking").TRACES) + 5
    model = thinks(["1 + 1 ."], lambda n: SETTLES[n], last=10)
    rows = module.HELD + 9
    session = preparing(
        session_of(model=model), {"question": ["tom"] * rows, "answer": ["3"] * rows, "level": [2] * rows}
    )
    found = module.tuned(session, "consistency", 3)
    assert found["knob"] == 3 and found["length"] == 8 * 4
    assert float(found["coin"]) == pytest.approx(module.coin_for([10] * 3, 8), abs=1e-6)


class Counting(nn.Module):
    """A stopper that is sure after three sentences, which it counts in its memory; it keeps the words that states foretell."""

    def __init__(self) -> None:
        super().__init__()
        self.next: list[str] = []

    def forward(self, states: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        self.next += [WORDS[i] for i in states.argmax(-1).tolist()]
        memory = memory + 1
        return 4 * (memory[:, 0, 0] - 2.5), memory


def test_the_stopper_remembers_each_text_and_reads_its_last_state() -> None:
    """Of three texts the first ends by itself after a sentence; the others, with sentences of other lengths, after three of
    their own."""

    def says(text: str) -> dict[str, float]:
        question, _, own = text.partition("<think>")
        words = own.split()
        if "</think>" in words:
            return {{"</think>": "ans", "ans": "8"}.get(words[-1], "<eos>"): 1.0}
        if question.startswith("sue") and words[-1:] == ["."]:
            return {"</think>": 1.0}
        length = 2 if question.startswith("tom") else 3
        return {"." if len(words) % length == length - 1 else str(len(words) % length + 1): 1.0}

    session = session_of(model=Scripted(says), stopper=(stopper := Counting()))
    session.state = {"knob": torch.tensor(0.6)}
    found = run(load("learn_to_stop"), session, ["sue has", "tom has", "ben has"], 90)
    assert found == ["1 2 . </think> ans 8", "1 . 1 . 1 . </think> ans 8", "1 2 . 1 2 . 1 2 . </think> ans 8"]
    # Words, and the look at the last full stop, behind which the cue stands and nothing else.
    assert stopper.next == ["</think>", *["1"] * 6] and session.spent == (3 + 1 + 3) + (6 + 1 + 2) + (9 + 1 + 2)


def test_thoughts_are_labelled_by_where_their_own_answer_settles() -> None:
    model = thinks(["1 + 1 ."], lambda n: ["9", "1", "3", "3", None, "2", *"333"][n], last=8)
    train = {"question": ["tom has", "ben has", "sue has"], "answer": ["9"] * 3, "level": [1, 2, 3]}
    session = preparing(session_of(model=model), train)
    with torch.no_grad():
        seen = module_of("answer_convergence").watched(session, 2)
    assert seen["labels"].tolist() == [[0.0] * 5 + [1.0] * 3] * 2  # the answer is 3 from the sixth sentence on
    # The state is that at the full stop, which foretells the next sentence, and after the last one the end.
    foretold = [WORDS[i] for i in seen["states"][0].argmax(-1).tolist()]
    assert foretold == ["1"] * 7 + ["</think>"]


def test_controls_end_thoughts_as_soon_in_the_mean() -> None:
    """Closed forms and their inverses; the coin also by counting."""
    module = module_of("answer_convergence")
    lengths = [3, 10, 20, 47]
    assert module.length_for(lengths, sum(min(12, n) for n in lengths) / 4) == 12
    drawn, ends = torch.Generator().manual_seed(0), 0.0
    for n in lengths:
        tosses = torch.rand(20_000, n, generator=drawn) < 0.15
        tosses[:, -1] = True
        ends += float(tosses.int().argmax(1).add(1).float().mean()) / 4
    assert module.coin_for(lengths, ends) == pytest.approx(0.15, abs=0.003)


def test_a_stopper_learns_from_thoughts() -> None:
    """States that tell by their sign whether the answer has converged, after which it stays so: the LSTM says so."""
    module = module_of("answer_convergence")
    labels = torch.tensor([[0.0, 0, 1, 1, -1], [0, 1, 1, 1, 1], [0, 0, 0, 1, -1], [1, 1, -1, -1, -1]]).repeat(16, 1)
    states = (2 * labels - 1)[..., None] * torch.ones(3)
    session = preparing(session_of(), {})
    namespace = module.stopper.__globals__
    kept, namespace["watched"] = namespace["watched"], lambda session, count: {"states": states, "labels": labels}
    try:
        weights = module.stopper(session, 64, 60)
    finally:
        namespace["watched"] = kept
    network = module.Stopper(3)
    network.load_state_dict(weights)
    memory, right = torch.zeros(4, 2, 64), []
    for k in range(5):
        logits, memory = network(states[:4, k], memory)
        right += [(logits > 0)[i].item() == bool(labels[i, k]) for i in range(4) if labels[i, k] >= 0]
    assert all(right) and len(right) == 15


# -- self-verification ------------------------------------------------------------------------------------------------

TRACE = (
    "3 + 4 = 7 . wait 3 + 4 = 7 yes . wait 3 + 4 = 7 yes . 7 + 1 = 9 . no 7 + 1 = 8 . so 8 . wait 3 + 4 = 7 yes . so 8 . "
    "</think> ans 8"
)


def test_chunks_end_before_words_that_turn_back() -> None:
    """Not behind a step checked again; the number is the one stated last."""
    chunks = module_of("hidden_state_self_verification").chunks
    text = [5, 5, *encode(TRACE), EOS]
    words = TRACE.split()
    found = [(" ".join(words[:tokens][-3:]), number) for tokens, number in chunks(text, 2)]
    assert found == [("= 7 .", 7), ("= 9 .", 9), ("so 8 .", 8), ("so 8 .", 8)]


def recites(trace: str, marked: int) -> Scripted:
    """A thought word by word. Behind its first `marked` words, and nowhere else, "likely" has a chance of a hundredth."""
    words = trace.split()

    def says(text: str) -> dict[str, float]:
        done = len(text.partition("<think>")[2].split())
        word = [*words, "<eos>"][done]
        return {word: 0.99, "likely": 0.01} if done == marked else {word: 1.0}

    return Scripted(says)


class Knows(nn.Module):
    """A probe that is sure where the state gives "likely" a chance."""

    def forward(self, states: Tensor) -> Tensor:
        return torch.where(states[:, WORDS.index("likely")].exp() > 0.005, 4.0, -4.0)[:, None]


def test_a_probe_that_is_sure_gives_the_answer_just_stated() -> None:
    """The state is that of the full stop before the word that turns back, at chunks with an answer only. What is paid: the
    words up to it and the word that turned back; states and the answer are free."""
    until = TRACE.split().index("9") + 2
    session = session_of(model=recites(TRACE, until), probe=Knows())
    found = run(load("hidden_state_self_verification"), session, [QUESTION] * 2, 200)
    assert found == [" ".join([*TRACE.split()[:until], "</think> ans 9"])] * 2
    assert session.spent == 2 * (until + 1) and session.ledger.entries["probe"].rows == 4
    unsure = session_of(model=recites(TRACE, until + 1), probe=Knows())
    assert run(load("hidden_state_self_verification"), unsure, [QUESTION], 200) == [TRACE]
    assert unsure.spent == len(TRACE.split()) + 1


def test_controls_leave_where_they_should() -> None:
    words = TRACE.split()
    session = session_of(model=recites(TRACE, -1))
    session.state = {"chunks": torch.tensor(3.0), "coin": torch.tensor(0.0)}
    so = words.index("so") + 3
    third = " ".join([*words[:so], "</think> ans 8"])
    assert run(load("static_exit"), session, [QUESTION], 200) == [third]
    assert session.spent == so + 1
    assert run(load("first_answer_exit"), session, [QUESTION], 200) == [third]
    assert session.spent == so
    assert run(load("random_exit"), session, [QUESTION], 200) == [TRACE]
    assert session.spent == len(words) + 1  # words cut off and put back cost nothing
    session.state["coin"] = torch.tensor(1.0)
    assert run(load("random_exit"), session, [QUESTION], 200) == ["3 + 4 = 7 . </think> ans 7"]


def test_confidence_is_the_probability_of_the_answer() -> None:
    """0.9 x 0.9 is not enough, 0.95 x 0.95 is."""

    def model(chance: float) -> Scripted:
        def says(text: str) -> dict[str, float]:
            own = text.partition("<think>")[2]
            if "</think> ans" in own and "so" not in own:
                return {["4", "2", "<eos>"][len(own.partition("ans")[2].split())]: chance}
            return {"3 + 4 = 7 . wait so 8 . </think> ans 5 <eos>".split()[len(own.split())]: 1.0}

        return Scripted(says)

    for chance, leaves in ((0.94, False), (0.96, True)):  # of three tokens: 0.83 and 0.88
        found = run(load("confidence_exit"), session_of(model=model(chance)), [QUESTION], 100)[0]
        assert found.startswith("3 + 4 = 7 . </think> ans") == leaves
    assert found == "3 + 4 = 7 . </think> ans 7"  # the answer stated, not the one asked for


def test_the_probe_weighs_right_and_wrong_chunks_by_their_shares() -> None:
    """With nothing to see, the best bias is the logit of a / (1 + a), whatever the shares; with a sign to see, it is seen."""
    module = module_of("hidden_state_self_verification")
    session = preparing(session_of(), {})
    right = torch.tensor([1.0, 0, 0, 0, 0] * 50)
    held = torch.arange(250) % 4 == 3
    _, weights = module.fitted(session, torch.zeros(250, 3), right, 1.5, held)
    assert float(weights["bias"].sigmoid()) == pytest.approx(0.6, abs=0.03)
    session.scale = lambda embedded, smoke: 40
    good, weights = module.fitted(session, (2 * right - 1)[:, None] * torch.tensor([[0.0, 3.0, 0.0]]), right, 1.0, held)
    assert good == 1.0 and weights["weight"][0, 1] > 0.1


def test_controls_of_the_probe_are_matched_to_it() -> None:
    """Three thoughts by hand: the probe ends at 20 of 50 and at 30 of 60 tokens and never in the third, of 40."""
    module = module_of("hidden_state_self_verification")
    found = module.Chunks(
        torch.zeros(8, 2), torch.zeros(8), [0, 0, 0, 1, 1, 1, 2, 2], [10, 20, 50, 15, 30, 45, 25, 40], [50, 60, 40]
    )
    sure = [False, True, True, False, True, True, False, True]  # the last stands at the end, where nothing is left
    # 20 + 30 + 40 = 90 tokens: after one chunk 50, after two 20 + 30 + 40, after three 50 + 45 + 40.
    assert module.matched(found, sure) == (2, 2 / 5)


@torch.no_grad()
def test_chunks_are_labelled_by_their_number_and_keep_their_state() -> None:
    words = TRACE.split()
    session = preparing(
        session_of(model=recites(TRACE, -1)), {"question": ["tom"] * 2, "answer": ["8", "7"], "level": [2, 3]}
    )
    found = module_of("hidden_state_self_verification").labelled(session, 2)
    assert found.right.tolist() == [0, 0, 1, 1, 1, 0, 0, 0] and found.owner == [0] * 4 + [1] * 4
    assert found.lengths == [words.index("</think>")] * 2 and found.before[3] == found.lengths[0]
    assert [WORDS[i] for i in found.states.argmax(-1).tolist()] == ["wait", "no", "wait", "</think>"] * 2


# -- overclocking -----------------------------------------------------------------------------------------------------


def test_the_progress_vector_reads_shares_of_a_thought() -> None:
    """States that tell them exactly; the last one, from which the terminator is drawn, stands at 1."""
    module = module_of("overclocking")
    drawn = torch.Generator().manual_seed(0)
    states = []
    for n in (5, 9, 30):
        noise = torch.randn(n, 3, generator=drawn)
        states.append(torch.cat([noise, 4 * (torch.arange(1, n + 1)[:, None] / n) - noise[:, :1]], 1))
    theta, r2 = module.progress_vector(states)
    assert torch.allclose(theta, torch.tensor([0.25, 0.0, 0.0, 0.25]), atol=1e-4) and r2 == pytest.approx(1.0, abs=1e-5)
    assert float(states[1][-1] @ theta) == pytest.approx(1.0, abs=1e-4)
    text = [7, 7, 7, *encode("1 . </think> ans 7")]
    (found,) = module.thinking_states([torch.arange(len(text)), torch.arange(5)], [text, [7] * 5], [3, 3])
    assert found.tolist() == [2, 3, 4]  # of "1", "." and "</think>", the tokens before


@torch.no_grad()
def test_a_shift_of_the_state_is_what_is_added_to_the_logits() -> None:
    model = tiny(4)
    ids = torch.tensor([[5, 6, 7, 8]])
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0))
    moved = model.llama.lm_head(model(ids, states=True) + shift)
    found = model(ids) + module_of("overclocking").pushed(model, shift)
    assert torch.allclose(moved[..., : len(WORDS)], found[..., : len(WORDS)], atol=1e-3)


def test_a_thought_is_steered_and_its_answer_is_not() -> None:
    """Added to the terminator, thoughts end at once; added to another answer, the answer stays. Nothing added is what is
    written without, token for token, at every rung."""

    def says(text: str) -> dict[str, float]:
        own = text.partition("<think>")[2].split()
        if "ans" in own:
            return {"7": 0.6, "8": 0.4} if own[-1] == "ans" else {"<eos>": 1.0}
        return {"ans": 1.0} if "</think>" in own else {"1": 0.9, "</think>": 0.1} if len(own) < 9 else {"</think>": 1.0}

    session = session_of(model=Scripted(says))
    added = torch.zeros(512)
    added[WORDS.index("</think>")], added[WORDS.index("8")] = 9.0, 0.5
    session.state = {"added": added, "length": torch.tensor(4.4)}
    assert run(load("overclocking"), session, [QUESTION] * 8, 30) == ["</think> ans 7"] * 8
    cut = run(load("cut_thinking"), session, [QUESTION] * 8, 30)
    assert {len(text.split()) for text in cut} <= {3, 4, 5, 6, 7} and cut.count("1 1 1 1 </think> ans 7") > 3
    session.state = {"added": torch.zeros(512)}
    for rung in (5, 11, 30):
        texts = []
        for name in ("overclocking", "full_thinking"):
            session.rng.manual_seed(3)
            texts.append(run(load(name), session, [QUESTION] * 6, rung))
        assert texts[0] == texts[1] and max(len(text.split()) for text in texts[0]) == min(rung, 12)


def test_directions_of_the_controls() -> None:
    """Where embeddings are unit vectors, what is added is the shift itself: alpha theta with alpha |theta|^2 = delta."""
    model = Scripted(lambda text: {})
    model.llama.lm_head = SimpleNamespace(weight=torch.eye(512))  # type: ignore[assignment]
    session = preparing(session_of(model=model), {})
    theta = torch.randn(512, generator=torch.Generator().manual_seed(1))
    found = {"theta": theta, "delta": torch.tensor(0.4), "length": torch.tensor(20.0)}
    session.once = lambda function, *literals: found
    added = {
        name: load(name).prepare(session)["added"]
        for name in ("overclocking", "underclocking", "random_steering", "terminator_bonus")
    }
    assert float(added["overclocking"] @ theta) == pytest.approx(0.4, abs=1e-4)
    assert torch.allclose(added["underclocking"], -added["overclocking"])
    assert float(added["random_steering"].norm()) == pytest.approx(float(added["overclocking"].norm()), rel=1e-4)
    assert abs(float(torch.cosine_similarity(added["random_steering"], added["overclocking"], 0))) < 0.2
    end = WORDS.index("</think>")
    assert added["terminator_bonus"].nonzero()[:, 0].tolist() == [end]
    relative = added["overclocking"][end] - added["overclocking"][: len(WORDS)].mean()
    assert float(added["terminator_bonus"][end]) == pytest.approx(float(relative), abs=1e-5)


def test_the_strength_is_the_greatest_that_loses_nothing() -> None:
    """Pushed by delta, the model reads its progress greater by delta; answers are lost beyond 0.4 of a thought."""
    module, theta, pushes = module_of("overclocking"), torch.tensor([2.0, 0.0]), list[float]()

    def steered(session: Any, questions: list[Any], rung: int, added: Tensor, most: int = 300) -> list[list[int]]:
        pushes.append(float(added @ theta))
        return [[*encode(f"1 1 </think> ans {7 if pushes[-1] < 0.5 else 8}"), EOS] for _ in questions]

    module.tuned.__globals__.update(
        steered=steered, pushed=lambda model, direction: direction, progress_vector=lambda states: (theta, 0.9),
        thinking_states=lambda states, texts, starts: states, read_states=lambda model, texts: [torch.zeros(3, 2)],
    )  # fmt: skip
    rows = module.HELD + 9
    session = preparing(
        session_of(model=Scripted(lambda text: {})),
        {"question": ["tom"] * rows, "answer": ["7"] * rows, "level": [2] * rows},
    )
    seen = {"ids": torch.tensor([[5, 6, 7]]), "starts": torch.tensor([1]), "lengths": torch.tensor([3])}
    session.once = lambda function, *literals: seen
    found = module.tuned(session, 3, 6)
    assert pushes == pytest.approx([0.0, 6.4, 3.2, 1.6, 0.8, 0.4], abs=1e-4)
    assert float(found["delta"]) == pytest.approx(0.4) and found["length"] == 2
