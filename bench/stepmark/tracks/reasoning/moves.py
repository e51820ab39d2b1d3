"""What methods share on countdown: states and moves of a text, and a model asked for moves (<propose>) or a word (<value>).

What is read from a text is what the model says there. `solves` and `true_word` alone check it, exactly, from the question: a
solution can be known for one without knowing an answer. A method that uses one of them has to say so.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import STOP, WORDS, decode, encode
from stepmark.datasets import countdown
from stepmark.session import Session

State = tuple[int, ...]  # what is left, ascending
WORDS_OF_VALUE = countdown.VALUES  # impossible, likely, sure
VALUES = [WORDS.index(word) for word in WORDS_OF_VALUE]


def start(question: Sequence[int]) -> tuple[State, int]:
    """The state that a question begins with, and its target."""
    return countdown.read(decode(question))


def solves(question: Sequence[int], text: Sequence[int]) -> bool:
    """An exact check: whether all moves of a text are allowed, and leave the target alone."""
    return countdown.check(decode(question), decode(text))[1]


def true_word(state: State, target: int) -> str:
    """An exact search: the word for a state that the model was taught to say."""
    return countdown.value(state, target)


def last(text: Sequence[int]) -> State | None:
    """The state that the last move of a text says to leave; None where it is no move."""
    return countdown.left(decode(text))


def longest(numbers: int) -> int:
    """Tokens of a move with its full stop, in a state of so many numbers, where all have two digits."""
    return 3 * numbers + 6


def whole(numbers: int) -> int:
    """Tokens of all moves from a state of so many numbers on, at most."""
    return sum(longest(left) for left in range(2, numbers + 1))


def behind(clause: Sequence[int], numbers: int) -> State | None:
    """The state that a move says to leave; None where it is no whole move, or does not leave one number less."""
    found = countdown.read_move(decode(clause)) if clause and clause[-1] == STOP else None
    return found[1] if found is not None and len(found[1]) == numbers - 1 else None


def asked(states: Sequence[tuple[State, int]], form: str) -> list[list[int]]:
    """Prompts that ask for a move in states and their targets, or for a word on them."""
    return [encode(f"{countdown.told(state, target)} {form}") for state, target in states]


def clauses(
    session: Session, prompts: Sequence[Sequence[int]], times: Sequence[int], limits: Sequence[int], temperature: float
) -> tuple[list[list[list[int]]], list[int]]:
    """Different clauses behind each prompt, up to a full stop or a limit, in so many samples; and the rows that each took."""
    owner = [i for i, count in enumerate(times) for _ in range(count)]
    chains = Chains(session.networks["model"], prompts).take(owner)
    new = chains.write(stop=(STOP,), limit=[limits[i] for i in owner], temperature=temperature, generator=session.rng)
    found: list[dict[tuple[int, ...], None]] = [{} for _ in prompts]
    rows = [int(count > 0) for count in times]  # the prompt's row gives all first tokens
    for i, clause in zip(owner, new, strict=True):
        rows[i] += len(clause) - 1
        found[i][tuple(clause)] = None
    return [[list(clause) for clause in each] for each in found], rows


def proposed(
    session: Session, states: Sequence[tuple[State, int]], times: Sequence[int], temperature: float
) -> tuple[list[list[tuple[list[int], State]]], list[int]]:
    """Moves (clause, state behind it) that the model proposes in each state, in so many samples, equal ones once; and the
    rows that each state took."""
    limits = [longest(len(state)) for state, _ in states]
    written, rows = clauses(session, asked(states, "<propose>"), times, limits, temperature)
    found = []
    for (state, _), different in zip(states, written, strict=True):
        after = [(clause, behind(clause, len(state))) for clause in different]
        found.append([(clause, left) for clause, left in after if left is not None])
    return found, rows


def values(session: Session, states: Sequence[tuple[State, int]]) -> Tensor:
    """Probabilities [B, 3] by which the model calls states impossible, likely or sure: a row for each."""
    return values_behind(session, asked(states, "<value>"))


def values_behind(session: Session, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Probabilities [B, 3] of impossible, likely and sure behind prompts: a row for each."""
    return Chains(session.networks["model"], prompts).read()[:, VALUES].softmax(-1)


def stands(question: Sequence[int], text: Sequence[int]) -> tuple[State, int] | None:
    """The state that the last move of a text says to leave, and the target; None where it is no move."""
    state, target = last(text), start(question)[1]
    return None if state is None else (state, target)


def called(session: Session, prompts: Sequence[Sequence[int]], samples: int, temperature: float) -> list[list[int]]:
    """Token ids of a word behind each prompt, in so many samples: a row for each prompt."""
    chains = Chains(session.networks["model"], prompts)
    chains.read()
    drawn = chains.take([i for i in range(len(prompts)) for _ in range(samples)]).write(
        limit=1, temperature=temperature, generator=session.rng
    )
    return [[token for word in drawn[i : i + samples] for token in word] for i in range(0, len(drawn), samples)]


def words(session: Session, states: Sequence[tuple[State, int]], samples: int, temperature: float) -> list[list[int]]:
    """Token ids of the words by which the model calls each state, in so many samples: a row for each state."""
    return called(session, asked(states, "<value>"), samples, temperature)
