"""Chains of thought to verify: pages, a question of several relations, steps and an answer, with at most one fault.

    ``PAGES -> alma mate home ? alma mate boris . boris home bana . ans bana``

Half of the chains are right. The others have one fault: a value that the pages contradict, a page that is not there, an answer
that does not follow, or a step that is of no use. What each step is worth follows from the text alone.

Formats, chosen by the last word of the prompt:

    <holds>    after pages, of a fact: true, false, or unknown
    <agree>    after a question, steps and a step more: whether that step is of use, yes or no
    <follows>  after a question, steps and an answer: whether they give it, yes or no
    <whole>    after pages, a question and a chain: whether all of it is right, yes or no
    <verify>   the same, step by step: ``yes true . yes unknown . yes . ans no`` (of use and true by the pages, ...; the answer
               follows; the chain is not right)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepmark.datasets.closed_world import (
    KINDS,
    PEOPLE,
    VALUES,
    Fact,
    Facts,
    page,
    page_facts,
    rarity,
    read_facts,
    title_of,
    titles,
    told_facts,
    walk,
    world,
)
from stepmark.datasets.knowledge import Question, draw, read, told

from stepmark.task import Dataset

DATASET = Dataset(
    id="fact_chains",
    version=1,
    summary="Chains of thought over pages, half of them with one fault, and what each of their steps is worth",
    licence="CC0-1.0",
    digests={
        "train": "2e2fea0e4f93ad776c5a985652af3c6889df947a39a4797cbe98e0b9701b87b6",
        "test": "642143e5471a06ebbdff1c421855722b22e88a2f30ac44a6376871f8e2ac98c6",
    },
)
ASKED = {"know/chains": "test"}  # task -> split
SIZES = {"train": 400, "test": 600}
LEVELS = (2, 3)  # relations of the question
ATTRIBUTIONS, YES = ("true", "false", "unknown"), ("yes", "no")
NONE = float("nan")


@dataclass(frozen=True)
class Chain:
    """Pages, a question of hops, steps and an answer, right or wrong."""

    pages: str
    asked: Question
    steps: tuple[Fact, ...]
    answer: str


def told_chain(chain: Chain) -> str:
    """The text of a chain with its pages."""
    return f"{chain.pages} -> {told(chain.asked)} {told_facts(chain.steps)} ans {chain.answer}"


def read_chain(text: str) -> Chain:
    """A chain from its text.

    Raises:
        ValueError: not a chain of facts about a question of hops.
    """
    pages, there, rest = text.partition(" -> ")
    question, _, body = rest.partition(" ? ")
    body, _, ending = body.rpartition("ans ")
    found = [fact for fact in read_facts(body) if fact is not None]
    if not there or not ending or len(found) != len(read_facts(body)):
        raise ValueError(f"not a chain: {text[:80]!r}")
    return Chain(pages, read(f"{question} ?"), tuple(found), ending.strip())


def labels(chain: Chain) -> tuple[list[tuple[str, str]], str, str]:
    """(of each step whether it is of use, yes or no, and what the pages say of it, true, false or unknown; whether the answer
    follows from the steps; whether all is well), exactly, from the text alone."""
    shown = {(f[0], f[1]): f[2] for f in read_facts(chain.pages) if f is not None}
    at, due, each = chain.asked.subject, list(chain.asked.path), list[tuple[str, str]]()
    for who, relation, value in chain.steps:
        useful = bool(due) and (who, relation) == (at, due[0])
        held = shown.get((who, relation))
        each.append(("yes" if useful else "no", "unknown" if held is None else "true" if held == value else "false"))
        if useful:
            at, due = value, due[1:]
    follows = not due and at == chain.answer
    fine = follows and all(label == ("yes", "true") for label in each)
    return each, "yes" if follows else "no", "yes" if fine else "no"


def chain(rng: random.Random, level: int, facts: Facts | None = None, test: bool = False) -> Chain:
    """A chain over a question of `level` relations, half of them right; the others have one fault: a value that the pages
    contradict, a page that is not there, an answer that does not follow, or a step that is of no use."""
    known = world().facts if facts is None else facts
    asked = draw(rng, "hops", level, test=test)
    way = walk(known, asked.subject, asked.path)
    shown, told_so = list(way), list(way)
    fault = rng.choice(("contradicted", "unsupported", "illogical", "aside")) if rng.random() < 0.5 else ""
    k = rng.randrange(len(way))
    who, relation, value = way[k]
    if fault == "contradicted":
        other = rng.choice([v for v in KINDS[VALUES[relation]] if v not in (value, who)])
        told_so = [*way[:k], (who, relation, other), *walk(known, other, asked.path[k + 1 :])]
        shown += told_so[k + 1 :]
    ending = told_so[-1][2]
    if fault == "illogical":
        ending = rng.choice([v for v in KINDS[VALUES[asked.path[-1]]] if v != ending])
    wanted = list(dict.fromkeys(title_of(fact) for fact in shown))
    if fault == "unsupported":
        wanted.remove(title_of(way[k]))
    wanted.append(rng.choice(titles()[: 4 * len(PEOPLE)]))
    wanted = rng.sample(list(dict.fromkeys(wanted)), len(set(wanted)))
    beside = [fact for title in wanted for fact in page_facts(title, known) if fact not in told_so]
    if fault == "aside":
        told_so.insert(rng.randrange(len(told_so) + 1), rng.choice(beside))
    return Chain(" ".join(page(title, page_facts(title, known)) for title in wanted), asked, tuple(told_so), ending)


def verified(chain: Chain) -> str:
    """The completion of a chain in the format <verify>."""
    each, follows, fine = labels(chain)
    return " ".join([*(f"{useful} {held} ." for useful, held in each), f"{follows} . ans {fine}"])


# -- judging ---------------------------------------------------------------------------------------------------------


def judged(question: str, text: str) -> dict[str, Any]:
    """What labels in the format <verify> are worth: tables of true by given ones, the last column for none, and the shares of
    steps rightly called supported, or contradicted; NaN where a chain has no such step."""
    each, follows, fine = labels(read_chain(question))
    body, _, ending = text.rpartition("ans ") if "ans " in text else (text, "", "")
    given = [part.split() for part in f"{body} ".split(" . ") if part.strip()]
    useful, held = _table(YES), _table(ATTRIBUTIONS)
    logic, whole = _table(YES), _table(YES)
    for k, (of_use, by_pages) in enumerate(each):
        words = given[k] if k < len(given) and len(given[k]) == 2 else ["", ""]
        _count(useful, YES, of_use, words[0])
        _count(held, ATTRIBUTIONS, by_pages, words[1])
    last = given[len(each)] if len(given) == len(each) + 1 else [""]
    _count(logic, YES, follows, " ".join(last))
    _count(whole, YES, fine, ending.strip())
    return {
        "chain": whole, "attribution": held, "logic": logic, "relevance": useful,
        "supported": held[0][0] / sum(held[0]) if sum(held[0]) else NONE,
        "contradicted": held[1][1] / sum(held[1]) if sum(held[1]) else NONE,
        "accuracy": float(ending.strip() == fine), "answered": float(ending.strip() in YES),
    }  # fmt: skip


def _table(names: Sequence[str]) -> list[list[int]]:
    return [[0] * (len(names) + 1) for _ in names]


def _count(table: list[list[int]], names: Sequence[str], gold: str, given: str) -> None:
    table[names.index(gold)][names.index(given) if given in names else len(names)] += 1


def split(name: str) -> dict[str, Any]:
    """Chains of ``train`` and ``test`` over questions of 2 and 3 relations in turn, of the test none that a model has seen.

    Returns a dict of equally long lists: ``question``, ``prompt`` (with <verify>), ``target``, ``answer``, ``level`` and
    ``rarity`` (0 to 3). Raises KeyError for any other name.
    """
    size, rng = SIZES[name], random.Random(f"fact chains {name}")
    rows: dict[str, list[Any]] = {
        column: [] for column in ("question", "prompt", "target", "answer", "level", "rarity")
    }
    for number in range(size):
        level = LEVELS[number % len(LEVELS)]
        made = chain(rng, level, test=name == "test")
        text, fine = told_chain(made), labels(made)[2]
        row = (text, f"{text} <verify>", verified(made), fine, level, rarity(made.steps))
        for column, value in zip(rows.values(), row, strict=True):
            column.append(value)
    return rows
