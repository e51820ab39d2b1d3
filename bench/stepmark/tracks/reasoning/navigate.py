"""What methods share on navigation: places of a walk, and a model asked for moves (<propose>) or a word (<value>).

The names are those of `moves`, for a search that works on either. What is read from a text is what the model says
there; that a place which was left is not entered again is kept by whoever asks, who leaves its edges out of the prompt.
Nothing here knows a way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from stepmark.backbones.reasoners import STOP, decode, encode
from stepmark.datasets import navigation
from stepmark.session import Session
from stepmark.tracks.reasoning.moves import called, clauses, values_behind
from stepmark.tracks.reasoning.solving import steps_of

MOVES = 6  # most moves of a walk, one more than any question here needs


@dataclass(frozen=True)
class Place:
    """A state: the question that is left, and how many moves may still be made. Its length is that number and one; 1 at
    the goal, where none is left to make."""

    question: navigation.Question
    left: int

    def __len__(self) -> int:
        return 1 if arrived(self) else self.left + 1


def start(question: Sequence[int]) -> tuple[Place, str]:
    """The place where a question begins, and its goal."""
    asked = navigation.read(decode(question))
    return Place(asked, MOVES), asked.goal


def arrived(state: Place) -> bool:
    """Whether a walk that says to be at this place is at its goal."""
    return state.question.start == state.question.goal


def ends(question: Sequence[int], text: Sequence[int]) -> bool:
    """Whether a text says to end at the goal of its question. Its moves are not checked."""
    return navigation.check(decode(question), decode(text)).ends


def longest(numbers: int) -> int:
    """Tokens of a move with its full stop, in a state of any length."""
    return 4


def behind(clause: Sequence[int], state: Place) -> Place | None:
    """The place to which a move says to lead from another; None where it is no whole move from there."""
    asked = state.question
    found = navigation.read_move(decode(clause)) if clause and clause[-1] == STOP else None
    if found is None or found[:2] != (asked.start, asked.sign) or found[2] == asked.start:
        return None
    return Place(navigation.after(asked, found[2]), state.left - 1)


def asked(states: Sequence[tuple[Place, str]], form: str) -> list[list[int]]:
    """Prompts that ask for a move from places, or for a word on them."""
    return [encode(f"{navigation.told(state.question)} {form}") for state, _ in states]


def proposed(
    session: Session, states: Sequence[tuple[Place, str]], times: Sequence[int], temperature: float
) -> tuple[list[list[tuple[list[int], Place]]], list[int]]:
    """As `moves.proposed`."""
    limits = [longest(len(state)) for state, _ in states]
    written, rows = clauses(session, asked(states, "<propose>"), times, limits, temperature)
    found = []
    for (state, _), different in zip(states, written, strict=True):
        places = [(clause, behind(clause, state)) for clause in different]
        found.append([(clause, place) for clause, place in places if place is not None])
    return found, rows


def words(session: Session, states: Sequence[tuple[Place, str]], samples: int, temperature: float) -> list[list[int]]:
    """As `moves.words`."""
    return called(session, asked(states, "<value>"), samples, temperature)


def stands(question: Sequence[int], text: Sequence[int]) -> tuple[Place, str] | None:
    """The place at which a text says to stand, and the goal; None where one of its clauses is no move from where it
    stands."""
    state, goal = start(question)
    for clause in steps_of(text):
        following = behind(clause, state)
        if following is None:
            return None
        state = following
    return state, goal


def values(session: Session, states: Sequence[tuple[Place, str]]) -> Tensor:
    """As `moves.values`."""
    return values_behind(session, asked(states, "<value>"))
