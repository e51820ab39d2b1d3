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


def proposed(
    session: Session, states: Sequence[tuple[State, int]], times: Sequence[int], temperature: float
) -> tuple[list[list[tuple[list[int], State]]], list[int]]:
    """Moves (clause, state behind it) that the model proposes in each state, in so many samples, equal ones once; and the
    rows that each state took."""
    owner = [i for i, count in enumerate(times) for _ in range(count)]
    chains = Chains(session.networks["model"], asked(states, "<propose>")).take(owner)
    limits = [longest(len(states[i][0])) for i in owner]
    new = chains.write(stop=(STOP,), limit=limits, temperature=temperature, generator=session.rng)
    found: list[dict[tuple[int, ...], State]] = [{} for _ in states]
    rows = [int(count > 0) for count in times]  # the prompt's row gives all first tokens
    for i, clause in zip(owner, new, strict=True):
        rows[i] += len(clause) - 1
        state = behind(clause, len(states[i][0]))
        if state is not None:
            found[i][tuple(clause)] = state
    return [[(list(clause), state) for clause, state in moves.items()] for moves in found], rows


def values(session: Session, states: Sequence[tuple[State, int]]) -> Tensor:
    """Probabilities [B, 3] by which the model calls states impossible, likely or sure: a row for each."""
    return Chains(session.networks["model"], asked(states, "<value>")).read()[:, VALUES].softmax(-1)


def words(session: Session, states: Sequence[tuple[State, int]], samples: int, temperature: float) -> list[list[int]]:
    """Token ids of the words by which the model calls each state, in so many samples: a row for each state."""
    chains = Chains(session.networks["model"], asked(states, "<value>"))
    chains.read()
    drawn = chains.take([i for i in range(len(states)) for _ in range(samples)]).write(
        limit=1, temperature=temperature, generator=session.rng
    )
    return [[token for word in drawn[i : i + samples] for token in word] for i in range(0, len(drawn), samples)]
