"""What methods share on deduction: questions about statements, searches that ask the model in turn, proofs put together.

Words that a method puts together cost nothing; a row is spent on each piece that the model reads and each word that it writes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeVar

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


class Choose(NamedTuple):
    """What a search has the model choose: the statement of greatest log-likelihood behind a prompt is the reply."""

    prompt: str
    options: tuple[Statement, ...]

    @property
    def cost(self) -> int:
        """Rows: of the prompt, which is read once, and of each option; of one option alone, of both together."""
        return len(self.options) + (len(self.options) > 1)


# Yields one ask, several that are answered at once (by a list), or a choice, and is sent the words of the reply.
Search = Generator[Ask | list[Ask] | Choose, Any, T]


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


def likeliest(chains: Chains, options: Sequence[Sequence[Statement]]) -> tuple[Chains, list[Statement]]:
    """Of each text, the statement of greatest log-likelihood behind it, and the texts with it put behind them."""
    owner = [i for i, each in enumerate(options) for _ in each]
    forked = chains.take(owner)
    scores = forked.score(range(len(owner)), [encode(said(s)) for each in options for s in each])
    best, start = [], 0
    for each in options:
        best.append(max(range(start, start + len(each)), key=lambda k: sum(scores[k])))
        start += len(each)
    flat = [s for each in options for s in each]
    return forked.take(best), [flat[k] for k in best]


def implications(question: Question) -> Search[list[Statement | None]]:
    """What the model says that each rule gives for the being that is asked about, three rows a rule; None: no statement."""
    who = question.goal[0]
    replies = yield [Ask(f"{who} is {rule[0]} {said(rule)} <infer>", 3) for rule in question.rules]
    return [single(reply) for reply in replies]


def side_by_side(
    session: Session, searches: Sequence[Search[T]], rooms: Sequence[int]
) -> tuple[list[T | None], list[int]]:
    """Run searches of several questions, whose asks are answered together, each by the likeliest words.

    Each may spend as many rows as there is room for, one for each word of a reply; the last reply is cut where they end. A
    search is closed that asks without any, for a choice that they do not pay, or for several replies whose longest they do
    not. Returns what the searches return, None of those that were closed, and the rows that are left of each.
    """
    model = session.networks["model"]
    left = list(rooms)
    found: list[T | None] = [None] * len(searches)
    waiting: dict[int, Ask | list[Ask] | Choose] = {}

    def go_on(i: int, reply: Any) -> None:
        try:
            waiting[i] = searches[i].send(reply)
        except StopIteration as ended:
            found[i] = ended.value
            waiting.pop(i, None)

    for i in range(len(searches)):
        go_on(i, None)
    while waiting:
        for i in [i for i, asked in waiting.items() if left[i] < _least(asked)]:
            searches[i].close()
            del waiting[i]
        choices = {i: asked for i, asked in waiting.items() if isinstance(asked, Choose)}
        written = {i: asked for i, asked in waiting.items() if not isinstance(asked, Choose)}
        if choices:
            chains = Chains(model, [encode(asked.prompt) for asked in choices.values()])
            _, best = likeliest(chains, [asked.options for asked in choices.values()])
            for (i, asked), statement in zip(choices.items(), best, strict=True):
                left[i] -= asked.cost
                go_on(i, said(statement))
        by_stop: dict[tuple[str, ...], list[tuple[int, Ask]]] = {}
        for i, words in written.items():
            for ask in words if isinstance(words, list) else [words]:
                by_stop.setdefault(ask.stop, []).append((i, ask))
        replies: dict[int, list[str]] = {i: [] for i in written}
        for stop, asks in by_stop.items():
            chains = Chains(model, [encode(ask.prompt) for _, ask in asks])
            limits = [min(ask.most, left[i]) for i, ask in asks]
            for (i, _), reply in zip(
                asks, chains.write(stop=encode(" ".join(stop)) if stop else (), limit=limits), strict=True
            ):
                left[i] -= len(reply)
                replies[i].append(decode(reply))
        for i, words in written.items():
            go_on(i, replies[i] if isinstance(words, list) else replies[i][0])
    return found, left


def _least(asked: Ask | list[Ask] | Choose) -> int:
    """Rows below which a search is closed."""
    if isinstance(asked, Choose):
        return asked.cost
    return max(1, sum(ask.most for ask in asked)) if isinstance(asked, list) else 1
