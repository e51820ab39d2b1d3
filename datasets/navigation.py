"""Navigation: the shortest way from one place to another over a small graph, whose edges stand in the prompt in any
order.

``tumo -> mabi zepa -> tumo zepa -> kivo ? zepa -> mabi``: edges, then where from and where to. Edges lead one way
(``->``) or both ways (``-``), all of a graph alike. A walk is a move for each edge, ``zepa -> tumo . tumo -> mabi .``,
and ends at the goal. Edges that lead nowhere hang on the way and on each other, some lead into it: where ways part,
nothing near tells which is right. Words are drawn anew for each question. A place that was left is not entered again:
the state behind a move is the question with its new start, without the edges at the place that was left.

Formats, chosen by the last word of the prompt:

    <cot>      all moves of a shortest way
    <propose>  any move that is allowed, good or not; ``none .`` where there is none
    <value>    how a state stands, in a word: sure (the goal is two moves off or nearer), likely (further), impossible
               (no way)
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from stepmark.datasets.deduction import CONCEPTS

from stepmark.task import Dataset

DATASET = Dataset(
    id="navigation",
    version=1,
    summary="Shortest ways of 1 to 5 edges over small graphs in the prompt, with exact checks of every move",
    licence="CC0-1.0",
    digests={
        "train": "0149e06674e54f407c2baf47fc300d5fd0621081c9bc35a934246f05ea972abf",
        "paths": "af53a81a999e26d3dceb317e0726f2c25e5fff97208fd5f49abe56b5c5d1b712",
    },
)
ASKED = {"navigate/paths": "paths"}  # task -> split
SIZES = {"train": 6_000, "paths": 400}
LENGTHS = {"train": (1, 2, 3, 4, 5), "paths": (1, 2, 3, 4, 5)}
DEAD = {"train": (0, 1, 2, 3, 4, 5, 6), "paths": (3, 6)}
VALUES = ("impossible", "likely", "sure")
NEAR = 2  # moves from a place that is sure
PLACES = frozenset(CONCEPTS)
Edge = tuple[str, str]


@dataclass(frozen=True)
class Question:
    """Edges in the order of the text, whether they lead one way only, where from and where to."""

    edges: tuple[Edge, ...]
    directed: bool
    start: str
    goal: str

    @property
    def sign(self) -> str:
        """What stands between two places."""
        return "->" if self.directed else "-"


def told(asked: Question) -> str:
    """The text of a question, without a format; of a state without edges its last part alone."""
    edges = "".join(f"{a} {asked.sign} {b} " for a, b in asked.edges)
    return f"{edges}? {asked.start} {asked.sign} {asked.goal}"


def read(text: str) -> Question:
    """A question from its text.

    Raises:
        ValueError: not a question of this language.
    """
    front, there, behind = f" {text}".partition(" ? ")
    words, ends = front.split(), behind.split()
    sign = ends[1] if len(ends) == 3 else ""
    fine = len(words) % 3 == 0 and all(word == sign for word in words[1::3])
    places = {*words[::3], *words[2::3], *ends[::2]}
    if not there or sign not in ("->", "-") or not fine or not places <= PLACES:
        raise ValueError(f"not a question of edges: {text[:80]!r}")
    return Question(tuple(zip(words[::3], words[2::3], strict=True)), sign == "->", ends[0], ends[2])


# -- solving and checking ------------------------------------------------------------------------------------------


def neighbours(asked: Question) -> list[str]:
    """Where an edge leads from the start, in the order of the text."""
    onward = [b for a, b in asked.edges if a == asked.start]
    return onward if asked.directed else [*onward, *(a for a, b in asked.edges if b == asked.start)]


def after(asked: Question, place: str) -> Question:
    """The state behind a move to a place: without the edges at the place that is left."""
    left = tuple(edge for edge in asked.edges if asked.start not in edge)
    return Question(left, asked.directed, place, asked.goal)


def distance(asked: Question) -> int | None:
    """Fewest moves from the start to the goal; None where there is no way."""
    steps: dict[str, list[str]] = {}
    for a, b in asked.edges:
        steps.setdefault(a, []).append(b)
        if not asked.directed:
            steps.setdefault(b, []).append(a)
    reached, found = [asked.start], {asked.start: 0}
    for place in reached:
        for other in steps.get(place, []):
            if other not in found:
                found[other] = found[place] + 1
                reached.append(other)
    return found.get(asked.goal)


def value(asked: Question) -> str:
    """How a state stands."""
    moves = distance(asked)
    return "impossible" if moves is None else "sure" if moves <= NEAR else "likely"


def read_move(clause: str) -> tuple[str, str, str] | None:
    """(place, sign, place) of a clause with or without its full stop; None where it is no move. Nothing is checked."""
    words = clause.strip().removesuffix(".").split()
    fine = len(words) == 3 and words[1] in ("->", "-") and {words[0], words[2]} <= PLACES
    return (words[0], words[1], words[2]) if fine else None


@dataclass(frozen=True)
class Checked:
    """Of each move of a text whether it goes along an edge from where the text stands; whether it says to end at the
    goal; whether it is a way there, and as short as any."""

    moves: tuple[bool, ...]
    ends: bool
    arrives: bool
    shortest: bool


def check(question: str | Question, text: str) -> Checked:
    """Hold a walk against its question. Behind a wrong move the text stands where that move says."""
    asked = read(question) if isinstance(question, str) else question
    at, good = asked.start, list[bool]()
    for clause in text.split(" ."):
        if not clause.strip():
            continue
        move = read_move(clause)
        here = Question(asked.edges, asked.directed, at, asked.goal)
        good.append(move is not None and move[:2] == (at, asked.sign) and move[2] in neighbours(here))
        at = move[2] if move is not None else ""
    ends = bool(good) and at == asked.goal
    arrives = ends and all(good)
    return Checked(tuple(good), ends, arrives, arrives and len(good) == distance(asked))


def judged(asked: str, text: str) -> dict[str, float]:
    """What a walk is worth as an answer to a question, by metric."""
    seen = check(asked, text)
    return {
        "accuracy": float(seen.arrives),
        "shortest": float(seen.shortest),
        "valid": float(bool(seen.moves) and all(seen.moves)),
        "answered": float(seen.ends),
    }


# -- writing -------------------------------------------------------------------------------------------------------


def question(rng: random.Random, length: int, dead: int, directed: bool) -> Question:
    """A question whose shortest way has so many edges, and so many edges beside them: three in five hang a new place on
    one that is not the goal, one in four leads from a new place to one that there is, the others join two that there
    are."""
    while True:
        places = rng.sample(CONCEPTS, length + 1)
        start, goal = places[0], places[-1]
        edges = list(pairwise(places))
        while len(edges) < length + dead:
            drawn, new = rng.random(), rng.choice(CONCEPTS)
            if drawn < 0.85:
                if new in places:
                    continue
                anchor = rng.choice([place for place in places if place != goal])
                edges.append((anchor, new) if drawn < 0.6 else (new, rng.choice(places)))
                places.append(new)
            else:
                a, b = rng.sample(places, 2)
                if (a, b) not in edges and (b, a) not in edges:
                    edges.append((a, b))
        rng.shuffle(edges)
        if not directed:
            edges = [edge if rng.random() < 0.5 else edge[::-1] for edge in edges]
        asked = Question(tuple(edges), directed, start, goal)
        if distance(asked) == length:
            return asked


def solution(asked: Question, rng: random.Random) -> str:
    """A shortest way, drawn from those that there are, move by move.

    Raises:
        ValueError: there is none.
    """
    moves, clauses = distance(asked), []
    if moves is None:
        raise ValueError(f"no way: {told(asked)[:80]!r}")
    for left in range(moves - 1, -1, -1):
        ways = [place for place in neighbours(asked) if distance(after(asked, place)) == left]
        place = rng.choice(ways)
        clauses.append(f"{asked.start} {asked.sign} {place} .")
        asked = after(asked, place)
    return " ".join(clauses)


def proposal(asked: Question, rng: random.Random) -> str:
    """Any move that is allowed."""
    open_ones = neighbours(asked)
    return f"{asked.start} {asked.sign} {rng.choice(open_ones)} ." if open_ones else "none ."


def somewhere(rng: random.Random, asked: Question) -> Question:
    """A state as a search meets it: a question after up to three random moves, none from the goal."""
    for _ in range(rng.randint(0, 3)):
        open_ones = neighbours(asked)
        if not open_ones or asked.start == asked.goal:
            break
        asked = after(asked, rng.choice(open_ones))
    return asked


def split(name: str) -> dict[str, Any]:
    """Questions of ``train`` or ``paths``, of 1 to 5 edges; graphs of either kind in turn.

    Returns a dict of equally long lists: ``question``, ``prompt`` (the question and ``<cot>``), ``target`` (a shortest
    way), ``answer`` (the goal), ``level`` (edges of the way) and ``dead`` (those beside it). Raises KeyError for any
    other name.
    """
    size, rng = SIZES[name], random.Random(f"navigation {name}")
    rows: dict[str, list[Any]] = {"question": [], "prompt": [], "target": [], "answer": [], "level": [], "dead": []}
    while len(rows["prompt"]) < size:
        number = len(rows["prompt"])
        length = LENGTHS[name][number // 2 % len(LENGTHS[name])]
        dead = DEAD[name][number // (2 * len(LENGTHS[name])) % len(DEAD[name])]
        asked = question(rng, length, dead, directed=number % 2 == 0)
        text = told(asked)
        if (zlib.crc32(text.encode()) % 10 == 0) == (name == "train"):
            continue
        rows["question"].append(text)
        rows["prompt"].append(f"{text} <cot>")
        rows["target"].append(solution(asked, rng))
        rows["answer"].append(asked.goal)
        rows["level"].append(length)
        rows["dead"].append(dead)
    return rows
