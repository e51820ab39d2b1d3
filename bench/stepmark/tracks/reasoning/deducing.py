"""What methods share on deduction: questions about statements, searches that ask the model in turn, proofs put together.

Words that a method puts together cost nothing; a row is spent on each piece that the model reads and each word that it writes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple, TypeVar

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, WORDS, decode, encode
from stepmark.datasets.deduction import Question as Question
from stepmark.datasets.deduction import Statement as Statement
from stepmark.datasets.deduction import check, read
from stepmark.datasets.deduction import follows as follows
from stepmark.datasets.deduction import proof as proof
from stepmark.datasets.deduction import read_statements as read_statements
from stepmark.datasets.deduction import said as said
from stepmark.session import Session

LONGEST_PROOF = 8  # rules, two more than any question here needs
SPELT = ("true", "false")
VERDICTS = [WORDS.index(word) for word in SPELT]
T = TypeVar("T")


class Ask(NamedTuple):
    """What a search asks the model: a prompt, the most words of the reply, and words that end it."""

    prompt: str
    most: int
    stop: tuple[str, ...] = ()


def question_of(ids: Sequence[int]) -> Question:
    """A question from its token ids."""
    return read(decode(ids))


def sound(question: Question, text: str) -> bool:
    """Whether all of a proof is right, and its answer: worked out from the question, of use as a bound only."""
    return check(question, text).valid


def about(statements: Sequence[Statement], goal: Statement, form: str) -> str:
    """A prompt that asks for one fact about some statements."""
    asked = f"{form} {said(goal)}" if form in ("<holds>", "<rules>") else f"{said(goal)} {form}"
    return f"{' '.join(map(said, statements))} ? {asked}"


def single(text: str) -> Statement | None:
    """The one statement that a text consists of; None where it is anything else."""
    found = read_statements(text)
    return found[0] if found is not None and len(found) == 1 else None


def listed(text: str, statements: Sequence[Statement]) -> list[Statement]:
    """Those of the statements that a list names, each once, in the order of the list; the rest of it is dropped."""
    words = text.removesuffix("done").split()
    named = [single(" ".join(words[i : i + 3])) for i in range(0, len(words), 3)]
    return list(dict.fromkeys(s for s in named if s is not None and s in statements))


def told_proof(parts: Sequence[Sequence[Statement]]) -> str:
    """Steps in the format <proof>: a fact alone, or a rule and the new fact."""
    return " ".join(f"{' '.join(map(said, part))} ." for part in parts)


def whole_proof(parts: Sequence[Sequence[Statement]], verdict: str) -> list[int]:
    """Token ids of a proof with its answer and the end of the sequence."""
    return [*encode(f"{told_proof(parts)} ans {verdict}".strip()), EOS]


def verdicts(session: Session, questions: Sequence[Sequence[int]], proofs: Sequence[str]) -> list[str]:
    """The likelier of true and false behind each proof so far, or of an answer at once where it is empty: a row each."""
    if not questions:
        return []
    asked = [
        [*question, *encode(f"<proof> {proof} ans" if proof else "<dir> ans")]
        for question, proof in zip(questions, proofs, strict=True)
    ]
    said_so = Chains(session.networks["model"], asked).read()[:, VERDICTS].argmax(-1)
    return [SPELT[k] for k in said_so.tolist()]


def side_by_side(
    session: Session, searches: Sequence[Generator[Ask, str, T]], rooms: Sequence[int]
) -> tuple[list[T | None], list[int]]:
    """Run searches of several questions, whose asks are answered together, each by the likeliest words.

    Each may spend as many rows as there is room for, one for each word of a reply; the last reply is cut where they end,
    and a search that asks without any is closed. Returns what the searches return, None of those that were closed, and
    the rows that are left of each.
    """
    left, found = list(rooms), [None] * len(searches)
    waiting: dict[int, Ask] = {}

    def go_on(i: int, reply: str | None) -> None:
        try:
            waiting[i] = searches[i].send(reply)  # type: ignore[arg-type]
        except StopIteration as ended:
            found[i] = ended.value
            waiting.pop(i, None)

    for i in range(len(searches)):
        go_on(i, None)
    while waiting:
        for i in [i for i in waiting if left[i] < 1]:
            searches[i].close()
            del waiting[i]
        by_stop: dict[tuple[str, ...], list[int]] = {}
        for i, ask in waiting.items():
            by_stop.setdefault(ask.stop, []).append(i)
        for stop, chosen in by_stop.items():
            chains = Chains(session.networks["model"], [encode(waiting[i].prompt) for i in chosen])
            limits = [min(waiting[i].most, left[i]) for i in chosen]
            replies = chains.write(stop=encode(" ".join(stop)) if stop else (), limit=limits)
            for i, reply in zip(chosen, replies, strict=True):
                left[i] -= len(reply)
                go_on(i, decode(reply))
    return found, left
