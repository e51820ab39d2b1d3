"""Countdown and the Game of 24: reach a target from three or four numbers, each used once, by + - * and /.

A state is what is left and what is wanted: ``4 , 6 , 8 -> 2 4``. A move takes two numbers and leaves their result:
``4 + 6 = 1 0 left 8 , 1 0 .``. Numbers stay whole and between 0 and 99; no move takes a smaller number from a larger one the
wrong way round. A question is solved by moves after which only the target is left. There is no single answer, so that a
vote over answers means nothing here: moves are checked, and states can be judged.

Formats, chosen by the last word of the prompt:

    <cot>      all moves: ``4 + 8 = 1 2 left 6 , 1 2 . 1 2 / 6 = 2 left 2 .``, here for ``4 , 6 , 8 -> 2``
    <propose>  any move that is allowed, good or not
    <value>    how a state stands, in a word: sure (several in ten moves, or the target itself, lead on), likely (some do),
               impossible (none does)
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from stepmark.task import Dataset

DATASET = Dataset(
    id="countdown",
    version=1,
    summary="Countdown with three or four numbers, and the Game of 24, with exact checks and judgements of states",
    licence="CC0-1.0",
    digests={
        "train": "05eeae014d3c317607f8049c69755b6157f320d23e643b83feb2d7dff74197c1",
        "test": "8acc35f8ab736992ec1896234f62b85a699e3b17c8076a21ad7389cdeaa83087",
        "game24": "36d677430ec8508461b5448937eb2f16daaa4cd990e6eac469fda2b24fade30e",
    },
)
ASKED = {"solve/countdown": "test", "solve/game24": "game24"}  # task -> split
SIZES = {"train": 6_000, "test": 600, "game24": 120}
GREATEST, MOST = 13, 99  # number given, number on the way
TARGETS = range(10, 61)
VALUES = ("impossible", "likely", "sure")
State = tuple[int, ...]  # what is left, ascending
Move = tuple[int, str, int, int]  # left sign right = result


def spaced(number: int) -> str:
    """A number, a word for each digit."""
    return " ".join(str(number))


def moves(state: Sequence[int]) -> list[tuple[Move, State]]:
    """Every move that a state allows, and the state behind it; equal ones once."""
    found: dict[Move, State] = {}
    for i in range(len(state)):
        for j in range(i + 1, len(state)):
            small, big = sorted((state[i], state[j]))
            rest = [n for k, n in enumerate(state) if k not in (i, j)]
            results = [("+", small, big, small + big), ("-", big, small, big - small), ("*", small, big, small * big)]
            if small and big % small == 0:
                results.append(("/", big, small, big // small))
            for sign, left, right, result in results:
                if result <= MOST:
                    found[left, sign, right, result] = tuple(sorted((*rest, result)))
    return list(found.items())


@lru_cache(maxsize=200_000)
def solvable(state: State, target: int) -> bool:
    """Whether moves lead from a state (ascending) to the target alone."""
    if len(state) == 1:
        return state[0] == target
    return any(solvable(after, target) for _, after in moves(state))


@lru_cache(maxsize=200_000)
def value(state: State, target: int) -> str:
    """How a state stands, by the share of its moves that keep it solvable: none, less than three in ten, more."""
    if len(state) == 1:
        return "sure" if state[0] == target else "impossible"
    after = moves(state)
    share = sum(solvable(each, target) for _, each in after) / len(after)
    return "impossible" if share == 0 else "sure" if share >= 0.3 else "likely"


# -- texts ---------------------------------------------------------------------------------------------------------


def told(state: Sequence[int], target: int) -> str:
    """The state as a question."""
    return f"{' , '.join(spaced(n) for n in state)} -> {spaced(target)}"


def said(move: Move, after: State) -> str:
    """A move as a clause."""
    left, sign, right, result = move
    return f"{spaced(left)} {sign} {spaced(right)} = {spaced(result)} left {' , '.join(spaced(n) for n in after)} ."


def read(question: str) -> tuple[State, int]:
    """(numbers ascending, target) of a question or a state.

    Raises:
        ValueError: not a state.
    """
    numbers, there, target = question.partition(" -> ")
    if not there:
        raise ValueError(f"not a state: {question!r}")
    return tuple(sorted(_number(n) for n in numbers.split(" , "))), _number(target)


def read_move(clause: str) -> tuple[Move, State] | None:
    """A clause with or without its full stop; None where it is none. Nothing is checked."""
    head, there, left_over = clause.strip().removesuffix(".").strip().partition(" left ")
    process, equals, result = head.partition(" = ")
    words = process.split()
    signs = [i for i, word in enumerate(words) if word in "+-*/"]
    if not there or not equals or len(signs) != 1:
        return None
    try:
        left, right = (_number(" ".join(part)) for part in (words[: signs[0]], words[signs[0] + 1 :]))
        return (left, words[signs[0]], right, _number(result)), tuple(
            sorted(_number(n) for n in left_over.split(" , "))
        )
    except ValueError:
        return None


def left(text: str) -> State | None:
    """The state that the last move of a text says to leave; None where it is no move. Nothing is checked."""
    clauses = [clause for clause in text.split(" .") if clause.strip()]
    found = read_move(clauses[-1]) if clauses else None
    return found[1] if found is not None else None


def allowed(state: State, move: Move, after: State) -> bool:
    """Whether a move may be made in a state, is rightly worked, and leaves what is said."""
    return dict(moves(state)).get(move) == after


def check(question: str, text: str) -> tuple[tuple[bool, ...], bool]:
    """(of each move whether it is allowed where it stands, whether the target alone is left after allowed moves)."""
    state, target = read(question)
    good = list[bool]()
    for clause in text.split(" ."):
        if not clause.strip():
            continue
        found = read_move(clause)
        fine = found is not None and all(good) and allowed(state, *found)
        good.append(fine)
        if fine and found is not None:
            state = found[1]
    return tuple(good), bool(good) and all(good) and state == (target,)


def judged(question: str, text: str) -> dict[str, float]:
    """What a text is worth as an answer to a question, by metric."""
    last = left(text)
    return {
        "accuracy": float(check(question, text)[1]),
        "answered": float(last is not None and len(last) == 1),
    }


def _number(text: str) -> int:
    digits = text.replace(" ", "")
    if not digits.isdigit() or len(digits) > 4:
        raise ValueError(f"not a number: {text!r}")
    return int(digits)


# -- writing -------------------------------------------------------------------------------------------------------


def question(rng: random.Random, count: int) -> tuple[State, int]:
    """So many numbers from 1 to 13 in ascending order, and a target from 10 to 60 that they can reach."""
    while True:
        state = start = tuple(sorted(rng.randint(1, GREATEST) for _ in range(count)))
        while len(state) > 1:
            state = rng.choice(moves(state))[1]
        if state[0] in TARGETS:
            return start, state[0]


def solution(state: State, target: int, rng: random.Random) -> str:
    """A way to the target, drawn from those that there are, move by move.

    Raises:
        ValueError: there is none.
    """
    clauses = []
    while len(state) > 1:
        ways = [(move, after) for move, after in moves(state) if solvable(after, target)]
        if not ways:
            raise ValueError(f"{told(state, target)} cannot be reached")
        move, state = rng.choice(ways)
        clauses.append(said(move, state))
    return " ".join(clauses)


def somewhere(rng: random.Random, count: int) -> tuple[State, int]:
    """A state as a search meets it: a question after random moves, or with random numbers, so that many are impossible."""
    state, target = question(rng, count)
    for _ in range(rng.randint(0, count - 1)):
        state = rng.choice(moves(state))[1]
    return state, target


def split(name: str) -> dict[str, Any]:
    """Questions of ``train`` and ``test`` (three and four numbers in turn) or ``game24`` (four numbers, target 24).

    Sets of numbers are held out: none of ``test`` and ``game24`` is in ``train``. Returns a dict of equally long lists:
    ``question``, ``prompt`` (the question and ``<cot>``), ``target`` (a way), ``answer`` (the target) and ``level``
    (numbers). Raises KeyError for any other name.
    """
    size, rng = SIZES[name], random.Random(f"countdown {name}")
    rows: dict[str, list[Any]] = {"question": [], "prompt": [], "target": [], "answer": [], "level": []}
    seen = set()
    while len(rows["prompt"]) < size:
        count = 4 if name == "game24" else 3 + len(rows["prompt"]) % 2
        state, target = question(rng, count)
        if name == "game24":
            target = 24
        held_out = zlib.crc32(str(state).encode()) % 10 == 0
        if (
            held_out == (name == "train")
            or (name != "train" and (state, target) in seen)
            or not solvable(state, target)
        ):
            continue
        seen.add((state, target))
        rows["question"].append(told(state, target))
        rows["prompt"].append(f"{told(state, target)} <cot>")
        rows["target"].append(solution(state, target, rng))
        rows["answer"].append(spaced(target))
        rows["level"].append(count)
    return rows
