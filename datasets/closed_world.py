"""A closed world of people, towns, lands and crafts, all of it in 1108 facts, on pages.

A fact has a subject, a relation and a value: ``alma home bana`` (alma lives in bana), ``bana land dipo``, ``alma from 4 gole``
(alma's third place of work begins in year 4), ``kasa by tuno pale mito`` (the trade tuno makes kasa from pale and mito). Four
laws tie facts together, so that what is seldom told can be worked out from what is told often: mates live in one town, a boss
has one's own trade, friends keep the same kind of pet, and a town near another is of its land. Each fact has a grade from 0 to
1: in the texts that a model is trained on it is told `RATIO` to the power of -grade as often as the commonest. The pages of
the world hold all facts, rare ones too: ``alma life : alma home bana . alma pet duro .``

Datasets ask about it: `stepmark.datasets.knowledge`, `stepmark.datasets.fact_chains`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from stepmark.datasets.deduction import CONCEPTS, NAMES

RATIO = 1_000.0
Fact = tuple[str, str, str]
Facts = Mapping[tuple[str, str], str]

_COUNTS = {
    "person": 48, "town": 24, "land": 8, "tongue": 6, "coin": 6, "pet": 12, "food": 6, "trade": 8, "tool": 6, "thing": 40
}  # fmt: skip
LAYER = 8  # things of each layer; those of the first are raw
RELATIONS = {
    "person": ("mate", "boss", "friend", "home", "trade", "pet", "born"),
    "town": ("land", "near"),
    "land": ("tongue", "coin"),
    "pet": ("food",),
    "trade": ("tool",),
}
VALUES = {
    "mate": "person", "boss": "person", "friend": "person", "home": "town", "trade": "trade", "pet": "pet", "born": "year",
    "land": "land", "near": "town", "tongue": "tongue", "coin": "coin", "food": "food", "tool": "tool",
}  # fmt: skip
LAWS = {"home": "mate", "trade": "boss", "pet": "friend", "land": "near"}  # what is shared, and with whom
CHECKS = {via: relation for relation, via in LAWS.items()}
# The greatest grade of a relation's facts: what people have is told more often than whom they know.
SPANS = {
    "home": 0.8, "trade": 0.8, "pet": 0.8, "born": 0.8, "by": 0.4, "near": 0.4, "land": 0.2, "tongue": 0.1, "coin": 0.1,
    "food": 0.1, "tool": 0.1,
}  # fmt: skip
TOPICS = {  # on which of a person's pages a fact stands; all else has one page
    "mate": "kin", "friend": "kin", "home": "life", "pet": "life", "trade": "work", "boss": "work", "born": "past", "from": "past"
}  # fmt: skip


def _kinds() -> dict[str, tuple[str, ...]]:
    found, start = dict[str, tuple[str, ...]](), 0
    for kind, count in _COUNTS.items():
        found[kind] = CONCEPTS[start : start + count]
        start += count
    found["person"] = (*NAMES, "tom", "anna", "ben", "sue", "max", "lily", "sam", "rosa", *found["person"])
    return found | {"year": tuple("123456789")}


KINDS = _kinds()
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
PEOPLE, THINGS = KINDS["person"], KINDS["thing"]


class World(NamedTuple):
    """All facts, and the grade of each."""

    facts: dict[tuple[str, str], str]
    grades: dict[tuple[str, str], float]


@lru_cache(maxsize=1)
def world() -> World:
    """The one that all questions are about, the same on every call."""
    rng = random.Random("knowledge world")
    facts: dict[tuple[str, str], str] = {}
    people, towns = list(PEOPLE), list(KINDS["town"])
    rng.shuffle(people)
    for i, (one, other) in enumerate(zip(people[::2], people[1::2], strict=True)):
        facts[one, "mate"], facts[other, "mate"] = other, one
        facts[one, "home"] = facts[other, "home"] = towns[i % len(towns)]
    for relation in ("trade", "pet"):
        rng.shuffle(people)
        for i, who in enumerate(people):
            facts[who, relation] = KINDS[relation][i % len(KINDS[relation])]
        for who in people:
            alike = [o for o in people if o != who and facts[o, relation] == facts[who, relation]]
            facts[who, LAWS[relation]] = rng.choice(alike)
    for who in people:
        facts[who, "born"] = rng.choice(KINDS["year"])
        for start, town in zip([1, *sorted(rng.sample(range(2, 10), 2))], rng.sample(towns, 3), strict=True):
            facts[who, f"from {start}"] = town
    rng.shuffle(towns)
    for i, town in enumerate(towns):
        facts[town, "land"] = KINDS["land"][i % len(KINDS["land"])]
    for town in towns:
        facts[town, "near"] = rng.choice([o for o in towns if o != town and facts[o, "land"] == facts[town, "land"]])
    for owner, relation in (("land", "tongue"), ("land", "coin"), ("pet", "food"), ("trade", "tool")):
        values = list(KINDS[VALUES[relation]])
        rng.shuffle(values)
        for i, subject in enumerate(KINDS[owner]):
            facts[subject, relation] = values[i % len(values)]
    for i, thing in enumerate(THINGS[LAYER:], LAYER):
        below = THINGS[(i // LAYER - 1) * LAYER : i // LAYER * LAYER]
        for trade in rng.sample(KINDS["trade"], 2):
            facts[thing, f"by {trade}"] = " ".join(rng.sample(below, 2))
    return World(facts, _graded(rng, facts))


def _graded(rng: random.Random, facts: Facts) -> dict[tuple[str, str], float]:
    """Grades evenly spread over each relation; all that is told of one's places of work has one grade."""
    groups: dict[str, dict[Any, list[tuple[str, str]]]] = {}
    for subject, relation in facts:
        head = relation.split()[0]
        groups.setdefault(head, {}).setdefault(subject if head == "from" else (subject, relation), []).append(
            (subject, relation)
        )
    grades: dict[tuple[str, str], float] = {}
    for head, keys in groups.items():
        order = list(keys.values())
        rng.shuffle(order)
        for rank, alike in enumerate(order):
            grades.update(dict.fromkeys(alike, SPANS.get(head, 1.0) * (rank + 0.5) / len(order)))
    return grades


@lru_cache(maxsize=256)
def elsewhere(number: int) -> Facts:
    """Another world of the same words, in which nothing is as in this one and no law holds: what pages say of it has to be
    read there."""
    rng, facts = random.Random(f"knowledge elsewhere {number}"), dict(world().facts)
    for relation in VALUES:
        keys = [key for key in facts if key[1] == relation]
        values = [facts[key] for key in keys]
        rng.shuffle(values)
        facts.update(zip(keys, values, strict=True))
    others = dict(zip(PEOPLE, rng.sample(PEOPLE, len(PEOPLE)), strict=True))
    careers = [key for key in facts if key[1].startswith("from ")]
    for key in careers:
        del facts[key]
    return facts | {(others[who], relation): rng.choice(KINDS["town"]) for who, relation in careers}


# -- facts -----------------------------------------------------------------------------------------------------------


def said(fact: Fact) -> str:
    """A fact in words."""
    return " ".join(fact)


def read_fact(text: str) -> Fact | None:
    """A fact of its words; None where it is none."""
    words = text.split()
    if len(words) >= 4 and words[1] in ("from", "by"):
        return words[0], f"{words[1]} {words[2]}", " ".join(words[3:])
    return (words[0], words[1], words[2]) if len(words) == 3 else None


def grade(fact: Fact) -> float:
    """How rare a fact is, 0 to 1; of two facts with the same subject and relation it is the same."""
    relation = f"by {fact[2]}" if fact[1] == "by" else fact[1]
    return world().grades[fact[0], relation]


def rarity(facts: Iterable[Fact]) -> int:
    """The quarter, 0 to 3, of the rarest of these facts."""
    return max(int(4 * grade(fact)) for fact in facts)


def told_of(rng: random.Random, facts: Iterable[Fact]) -> bool:
    """Whether all of these facts are told this time: of each with the probability that belongs to its grade."""
    return all(rng.random() < RATIO ** -grade(fact) for fact in facts)


@lru_cache(maxsize=64)
def _subjects(relation: str) -> tuple[list[str], list[float]]:
    """Subjects of a relation, and their weights summed up."""
    found = {s: RATIO**-g for (s, r), g in world().grades.items() if r.split()[0] == relation}
    return list(found), list(accumulate(found.values()))


def subject(rng: random.Random, relation: str, usual: bool) -> str:
    """Somebody of whom the relation is told: `usual`, as often as it is; else anybody."""
    names, weights = _subjects(relation)
    return rng.choices(names, cum_weights=weights)[0] if usual else rng.choice(names)


@lru_cache(maxsize=256)
def route(kind: str, relation: str) -> tuple[str, ...]:
    """The relations that lead from something of a kind to what it has by a relation, itself or through its home, pet or trade;
    () where none do."""
    own = RELATIONS.get(kind, ())
    if relation in own:
        return (relation,)
    for step in ("home", "land", "pet", "trade"):
        found = route(VALUES[step], relation) if step in own else ()
        if found:
            return (step, *found)
    return ()


def walk(facts: Facts, start: str, path: Iterable[str]) -> list[Fact]:
    """The facts by which relations lead on from a start. KeyError where one has none."""
    found: list[Fact] = []
    for relation in path:
        found.append((start, relation, facts[start, relation]))
        start = found[-1][2]
    return found


# -- pages -----------------------------------------------------------------------------------------------------------


def title_of(fact: Fact) -> str:
    """The page on which a fact stands."""
    return f"{fact[0]} {TOPICS.get(fact[1].split()[0], 'about')}"


@lru_cache(maxsize=1)
def _keys() -> dict[str, list[tuple[str, str]]]:
    """What stands on each page: subjects and relations, years in their order."""
    found: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(world().facts, key=lambda key: (list(KIND_OF).index(key[0]), _order(key[1]))):
        found.setdefault(title_of((*key, "")), []).append(key)
    return found


def _order(relation: str) -> tuple[int, str]:
    return (list(VALUES).index(relation) if relation in VALUES else len(VALUES)), relation


def titles() -> list[str]:
    """Of all pages."""
    return list(_keys())


def page_facts(title: str, facts: Facts | None = None) -> list[Fact]:
    """The facts of a page. Of another world it has other years."""
    known = world().facts if facts is None else facts
    who, topic = title.split()
    if topic == "past":
        years = [f"from {year}" for year in KINDS["year"]]
        return [(who, r, known[who, r]) for r in ("born", *years) if (who, r) in known]
    return [(s, r, known[s, r]) for s, r in _keys()[title]]


def page(title: str, facts: Iterable[Fact] | None = None) -> str:
    """A page in words, with all of its facts or with these."""
    return f"{title} : {told_facts(page_facts(title) if facts is None else facts)}"


def told_facts(facts: Iterable[Fact]) -> str:
    """Facts, each with its full stop."""
    return " ".join(f"{said(fact)} ." for fact in facts)


def read_facts(text: str) -> list[Fact | None]:
    """The facts of a text or of pages, clause by clause; None for a clause that is none."""
    return [read_fact(clause.rpartition(" : ")[2]) for clause in f"{text} ".split(" . ") if clause.strip()]
