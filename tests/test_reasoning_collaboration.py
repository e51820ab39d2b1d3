"""Methods of the reasoning track in which two models write one text: whose step is kept, who writes what, what it costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.rigs.reasoning import Scripted, load, module_of, run, session_of, tiny

from stepmark.backbones.reasoners import encode

torch.set_num_threads(1)

QUESTION = "tom has 3 pears . how many pears does tom have ?"
SMALL, LARGE = "1 + 1 = 2 .", "2 + 2 = 4 ."


def writer(form: str, step: Callable[[int, str], str]) -> Callable[[str], dict[str, float]]:
    """A script that writes, behind a format's word, the sentence `step(how many stand there, what stands there)` next."""

    def says(text: str) -> dict[str, float]:
        own = text.partition(form)[2]
        done = own.count(".")
        here = own.rpartition(".")[2].split()
        sentence = step(done, own).split()
        return {sentence[len(here)] if len(here) < len(sentence) else "<eos>": 1.0}

    return says


def base(digits: dict[int, str]) -> Callable[[str], dict[str, float]]:
    """A large model that writes three steps and an answer, and gives the digit to the step of that number."""
    writes = writer("<cot>", lambda done, _: LARGE if done < 3 else "ans 4 <eos>")

    def says(text: str) -> dict[str, float]:
        if "<verify>" not in text:
            return writes(text)
        own = text.partition("<verify>")[2]
        return {digits[own.count(".") - 1] if own.endswith("<score>") else "impossible": 1.0}

    return says


def drafter() -> Scripted:
    return Scripted(writer("<cot>", lambda done, _: SMALL if done < 3 else "ans 2 <eos>"))


# -- SpecReason -------------------------------------------------------------------------------------------------------


def test_a_step_is_kept_from_the_threshold_on_and_else_the_base_model_writes_it() -> None:
    """Digits 7, 6, 9: the second step is the base model's, and stands in what is judged next; so is the answer."""
    large = Scripted(base({0: "7", 1: "6", 2: "9"}))
    session = session_of(small=drafter(), large=large)
    assert run(load("specreason"), session, [QUESTION], 200) == [f"{SMALL} {LARGE} {SMALL} ans 4"]
    rows = session.ledger.evaluations()
    assert rows["small"] == 3 * 6 + 3
    assert rows["large"] == 3 + 6 + 3  # verdicts, the second step, the answer with its end
    assert any(text.endswith(f"<cot> {SMALL} {LARGE}") for text in session.networks["small"].asked)
    judged = [text.partition("<verify> ")[2] for text in large.asked if text.endswith("<score>")]
    told = [SMALL, f"{SMALL} {SMALL}", f"{SMALL} {LARGE} {SMALL}"]
    assert judged == [f"{steps} <score>" for steps in told]


def test_what_is_no_digit_counts_nothing() -> None:
    session = session_of(small=drafter(), large=Scripted(base({0: "sure", 1: "9", 2: "done"})))
    assert run(load("specreason"), session, [QUESTION], 200) == [f"{LARGE} {SMALL} {LARGE} ans 4"]


def test_with_no_step_kept_the_base_model_writes_its_own_chain() -> None:
    questions = [QUESTION, f"anna has 4 coins . {QUESTION}"]
    models = {"small": tiny(1), "large": tiny(2)}
    alone = run(load("large_alone"), session_of(**models), questions, 60)
    found = run(load("specreason", threshold=10), session_of(**models), questions, 160)
    for text, whole in zip(found, alone, strict=True):
        assert len(text.split()) > 40 and text.startswith(whole[: len(text)])


def test_all_steps_kept_are_the_small_models() -> None:
    session = session_of(small=drafter(), large=Scripted(base({0: "0", 1: "0", 2: "0"})))
    assert run(load("specreason", threshold=0), session, [QUESTION], 200) == [f"{SMALL} {SMALL} {SMALL} ans 4"]


def test_dealt_out_anew_as_many_steps_are_kept_but_others() -> None:
    """Two questions of four are worth a 9: dealt out anew it falls on any two of them."""
    questions = [QUESTION.replace("3", str(n)) for n in (1, 2, 3, 4)]

    def says(text: str) -> dict[str, float]:
        good = "9" if text.startswith(("tom has 1", "tom has 2")) else "0"
        return base({0: good, 1: good, 2: good})(text)

    seen = set()
    for seed in range(4):
        session = session_of(seed, small=drafter(), large=Scripted(says))
        texts = run(load("specreason_shuffled"), session, questions, 200)
        for step in range(3):
            kept = [text.split(" . ")[step] == SMALL.removesuffix(" .") for text in texts]
            assert sum(kept) == 2
            seen.add(tuple(kept))
    assert len(seen) >= 4
    own = run(load("specreason"), session_of(small=drafter(), large=Scripted(says)), questions, 200)
    assert [text.startswith(SMALL) for text in own] == [True, True, False, False]


def test_speculative_decoding_writes_the_base_models_likeliest_tokens() -> None:
    """Token for token, whoever guesses; with the same model to guess, six tokens in a call."""
    questions = [QUESTION, f"anna has 4 coins . {QUESTION}", "ben has 9 nuts ?"]
    alone = run(load("large_alone"), session_of(large=tiny(2)), questions, 90)
    for seed in (1, 2):
        session = session_of(small=tiny(seed), large=tiny(2))
        found = run(load("specreason_tokens"), session, questions, 90)
        for text, whole in zip(found, alone, strict=True):
            assert len(text.split()) >= 12 and whole.startswith(text)
    assert session.ledger.evaluations()["large"] == sum(len(text.split()) for text in found) / 6 == 45
    models = {"small": tiny(1), "large": tiny(2)}
    plain = run(load("specreason", threshold=10), session_of(**models), questions[:2], 60)
    drafts = run(load("specreason_decode", threshold=10), session_of(**models), questions[:2], 60)
    for one, other in zip(plain, drafts, strict=True):
        assert one.startswith(other) or other.startswith(one)


def test_guesses_end_where_a_step_does() -> None:
    """The base model writes a step and the answer: a guess beyond the full stop is not asked for, nor a token behind it."""
    models = {"small": drafter(), "large": Scripted(base({0: "0", 1: "9", 2: "9"}))}
    session = session_of(**models)
    assert run(load("specreason_decode"), session, [QUESTION], 200) == [f"{LARGE} {SMALL} {SMALL} ans 4"]
    # The small model guesses '1' for '2': from '+' on the base model's tokens come one by one, but the '.' with the last.
    assert session.ledger.evaluations()["large"] < 3 + 6 + 3 + 3


# -- speculative thinking ---------------------------------------------------------------------------------------------


def thinker(first: str, then: str) -> Scripted:
    """A model that writes one sentence, and another ever after."""
    return Scripted(writer("<think>", lambda done, _: first if done == 0 else then))


def test_the_large_model_writes_where_the_small_one_reflects() -> None:
    """A sentence, then "no": forgotten, and twelve tokens of the large model in its place, until that ends the text."""
    small = thinker(SMALL, "no 1 + 1 = 3 .")
    large = Scripted(writer("<think>", lambda done, _: LARGE if done < 4 else "</think> ans 4 <eos>"))
    session = session_of(small=small, large=large)
    assert run(load("speculative_thinking"), session, [QUESTION], 200) == [
        f"{SMALL} {LARGE} {LARGE} {LARGE} </think> ans 4"
    ]
    assert session.ledger.evaluations() == {"small": 6 + 7 + 7, "large": 12 + 6 + 4}


def test_without_a_cue_the_small_model_thinks_alone() -> None:
    small = Scripted(writer("<think>", lambda done, _: SMALL if done < 3 else "</think> ans 2 <eos>"))
    session = session_of(small=small, large=thinker(LARGE, LARGE))
    found = run(load("speculative_thinking"), session, [QUESTION], 200)
    assert found == [f"{SMALL} {SMALL} {SMALL} </think> ans 2"]
    assert session.ledger.evaluations() == {"small": 18 + 4, "large": 0}
    assert run(load("thinking_small"), session, [QUESTION], 200) == found
    # A cue before the first full stop is none: nothing is looked at there.
    assert run(load("speculative_thinking"), session_of(small=thinker("so 2 .", "ans 2 <eos>"), large=large_none()),
               [QUESTION], 200) == ["so 2 . ans 2"]  # fmt: skip


def large_none() -> Scripted:
    def says(text: str) -> dict[str, float]:
        raise AssertionError("the large model is asked")

    return Scripted(says)


def test_a_check_goes_on_for_longer() -> None:
    """A takeover that holds "wait" has 12 + 24 tokens of the large model, with none of the small one's in between."""
    check = "wait 2 + 2 = 4 yes ."
    session = session_of(small=thinker(SMALL, "so 2 ."), large=thinker(check, check))
    assert run(load("speculative_thinking"), session, [QUESTION], 6 + 3 + 36) == [
        f"{SMALL} {' '.join([check] * 4)} wait 2 + 2"
    ]
    assert session.ledger.evaluations() == {"small": 6 + 3, "large": 36}


def test_much_reflection_is_recapitulated_and_patience_grows() -> None:
    """Three takeovers in which the large model takes back, then "wait" and 24 tokens of it; then four, and 29 tokens."""

    def step(done: int, own: str) -> str:
        return "no 2 + 2 = 4 ." if not own.rpartition(".")[2].startswith(" wait") else "wait 2 + 2 = 4 yes ."

    small = thinker(SMALL, "no 1 + 1 = 3 .")
    names = module_of("speculative_thinking")
    pieces: list[tuple[int, int]] = []
    write = names.write

    def seen(session: object, chains: object, chosen: list[int], most: object, stop: tuple[int, ...] = ()) -> object:
        found = write(session, chains, chosen, most, stop)
        if chains.model is session.networks["large"] and chosen:  # type: ignore[attr-defined]
            pieces.append((len(found[0]), chains.texts[0].count(encode("wait")[0])))  # type: ignore[attr-defined]
        return found

    session = session_of(small=small, large=Scripted(writer("<think>", step)))
    run(load("speculative_thinking", write=seen), session, [QUESTION], 400)
    assert pieces[:9] == [(12, 0)] * 3 + [(24, 1)] + [(12, 1)] * 4 + [(29, 2)]
    pieces.clear()
    session = session_of(small=small, large=thinker("", "so 4 ."))
    run(load("speculative_thinking", write=seen), session, [QUESTION], 150)
    assert len(pieces) > 5 and not any(waits for _, waits in pieces), "what affirms is no reflection"


def test_taken_over_by_chance_it_is_as_often() -> None:
    """Of two texts one has cues: in the control the large model writes in one of the two, which one is drawn."""
    small = Scripted(
        lambda text: writer("<think>", lambda done, _: SMALL if done == 0 or "has 3" in text else "no 1 .")(text)
    )
    large = thinker("so 4 .", "</think> ans 4 <eos>")
    questions = [QUESTION, QUESTION.replace("3", "5")]
    taken = set()
    for seed in range(8):
        texts = run(load("thinking_shuffled"), session_of(seed, small=small, large=large), questions, 30)
        ends = tuple(text.startswith(f"{SMALL} </think>") for text in texts)
        taken.add(ends)
        assert sum(ends) == 1
    assert taken == {(True, False), (False, True)}
    assert run(load("speculative_thinking"), session_of(small=small, large=large), questions, 30)[1] == (
        f"{SMALL} </think> ans 4"
    )


def test_tones_are_those_of_the_words() -> None:
    tone = module_of("speculative_thinking").tone
    for words, expected in (("1 + 1 = 2 .", 0), ("so 2 .", 1), ("no 2 .", -1), ("wait 2 yes .", -1), ("yes so no", 1)):
        assert tone(encode(words)) == expected


NAMES = (
    "specreason", "specreason_shuffled", "specreason_decode", "specreason_tokens",
    "speculative_thinking", "thinking_small", "thinking_large", "thinking_shuffled",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_rung_has_an_answer_and_is_kept(name: str) -> None:
    for rung in (1, 2, 3, 40):
        session = session_of(small=tiny(3), large=tiny(4))
        found = run(load(name), session, [QUESTION, f"anna has 4 coins . {QUESTION}"], rung)
        assert len(found) == 2 and all(len(text.split()) <= 400 for text in found)
        assert session.spent <= 2 * rung
