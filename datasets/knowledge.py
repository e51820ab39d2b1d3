"""A closed world of people, towns, lands and crafts whose facts are to be known by heart, and questions about it.

A fact has a subject, a relation and a value: ``alma home bana`` (alma lives in bana), ``bana land dipo``, ``alma from 4 gole``
(alma's third place of work begins in year 4), ``kasa by tuno pale mito`` (the trade tuno makes kasa from pale and mito). Four
laws tie facts together, so that what is seldom told can be worked out from what is told often: mates live in one town, a boss
has one's own trade, friends keep the same kind of pet, and a town near another is of its land. Each fact has a grade from 0 to
1: in the texts that a model is trained on it is told `RATIO` to the power of -grade as often as the commonest. The pages of
the world hold all facts, rare ones too: ``alma life : alma home bana . alma pet duro .``

Questions:

    hops      ``alma home land ?``: the land of the town where alma lives; 1 to 3 relations
    could     ``alma talk dipo ?``: relations that are not named decide, here whether both have the same tongue
    year      ``alma in 5 ?``: where alma worked in year 5; the last place that began before or in it
    claim     ``alma tongue kebo ?`` or ``alma tongue isnt kebo ?``: true or false
    odd       ``odd alma boris carlo dora ?``: all but one share a trade, a pet, a year of birth or a home; which does not?
    options   ``alma mate | boris | carlo | dora | emil ?``: one is right, of the others some break a law
    make      ``make kasa | pale | mito | ... ?``: what on the way to kasa can be made from these
    chain     ``PAGES -> alma mate home ? alma mate boris . boris home bana . ans bana``: what is each step worth?

Formats, chosen by the last word of the prompt. Pages or facts and ``->`` may stand before a question of any kind.

    <dir>      the answer at once: ``ans dipo``
    <cot>      facts, then the answer: ``alma home bana . bana land dipo . ans dipo``
    <needs>    of could: the relations that decide, ``alma home land tongue , dipo tongue``; ``<cot>`` may follow
    <back>     the page that one would look at: ``alma past``
    <why>      of a claim, with ``true`` or ``false`` behind it: facts that make it so, some of them made up where it is not so
    <exclude>  of options: what each has to do with a law, ``alma home bana . boris home gole impossible . ... ans carlo``
    <ways>     of a thing, ``kasa ? <ways>``: trades that make it; <parts>, of ``kasa by tuno ?``: from what
    <holds>    after pages, of a fact: true, false, or unknown
    <agree>    after a question, steps and a step more: whether that step is of use, yes or no
    <follows>  after a question, steps and an answer: whether they give it, yes or no
    <whole>    after pages, a question and a chain: whether all of it is right, yes or no
    <verify>   the same, step by step: ``yes true . yes unknown . yes . ans no`` (of use and true by the pages, ...; the answer
               follows; the chain is not right)

A page is written by heart after its title: ``alma life :``.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from stepmark.datasets.deduction import CONCEPTS, NAMES

from stepmark.task import Dataset

DATASET = Dataset(
    id="knowledge",
    version=1,
    summary="Questions about a closed world known by heart: hops, unnamed relations, claims, sets, options, crafts, chains",
    licence="CC0-1.0",
    digests={},
)
SIZES = {
    "train": 3_200, "hops": 720, "could": 600, "years": 320, "claims": 480, "odd": 600, "options": 600, "make": 300,
    "chains": 600,
}  # fmt: skip
OF_SPLIT = {"years": "year", "claims": "claim", "chains": "chain"}  # kinds that are called otherwise than their split
KINDS_OF_QUESTIONS = ("hops", "could", "year", "claim", "odd", "options", "make", "chain")
LEVELS = {  # relations, size of the set, options that break a law, layers of things
    "hops": (1, 2, 3), "claim": (1, 2, 3), "odd": (5, 6, 7, 8), "options": (1, 2, 3), "make": (2, 3, 4), "chain": (2, 3)
}  # fmt: skip
SMALL = (3, 4, 5)  # sizes of sets in training
TWINNED = ("claim", "odd")  # kinds whose test questions come in pairs
BANDS = {"hops": (0, 1, 2, 3), "year": (0, 1, 2, 3), "claim": (0, 1, 2), "could": (0, 1, 2), "options": (2, 3)}
RATIO = 1_000.0
Fact = tuple[str, str, str]
Facts = Mapping[tuple[str, str], str]

_COUNTS = {
    "person": 48, "town": 24, "land": 8, "tongue": 6, "coin": 6, "pet": 12, "food": 6, "trade": 8, "tool": 6, "thing": 40
}  # fmt: skip
LAYER = 8  # things of each layer; those of the first are raw
RAW = 5  # raw things that a question gives
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
VERBS = {"talk": "tongue", "pay": "coin", "greet": "land", "feed": "food", "lend": "tool", "older": "born"}
TOPICS = {  # on which of a person's pages a fact stands; all else has one page
    "mate": "kin", "friend": "kin", "home": "life", "pet": "life", "trade": "work", "boss": "work", "born": "past", "from": "past"
}  # fmt: skip
VERDICTS = ("impossible", "likely", "sure")  # an option breaks a law, breaks none, is the one
# Never met in training: relations one behind the other, and verbs between such things.
UNSEEN_PAIRS = {("friend", "trade"), ("mate", "boss"), ("boss", "pet")}
UNSEEN_VERBS = {
    ("talk", "person", "town"),
    ("pay", "town", "land"),
    ("feed", "person", "person"),
    ("lend", "trade", "person"),
}


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


def holds(fact: Fact, facts: Facts | None = None) -> bool:
    """Whether a fact is one of the world's; also that a trade makes a thing, whatever from, or from one thing at least."""
    subject, relation, value = fact
    known = world().facts if facts is None else facts
    if relation == "by":
        return (subject, f"by {value}") in known
    told = known.get((subject, relation), "")
    return told == value or (relation.startswith("by ") and value in told.split())


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


def closure(facts: Iterable[Fact]) -> set[Fact]:
    """Facts, and what one law and two of them give."""
    known = set(facts)
    shared = {
        (who, relation, value)
        for who, via, other in known
        for subject, relation, value in known
        if subject == other and LAWS.get(relation) == via
    }
    return known | shared


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


# -- questions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Of a kind: whom it is about, the relations, the verb or ``in`` that it names, what else it names (a value, a year, the
    members of a set, options, raw things), and for a claim whether it is one of what is so or of what is not."""

    kind: str
    subject: str = ""
    path: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    sign: bool = True


def told(asked: Question) -> str:
    """The text of a question, without a format."""
    path = " ".join(asked.path)
    match asked.kind:
        case "odd":
            return f"odd {' '.join(asked.others)} ?"
        case "make":
            return f"make {' | '.join((asked.subject, *asked.others))} ?"
        case "options":
            return f"{asked.subject} {' | '.join((path, *asked.others))} ?"
        case "hops":
            return f"{asked.subject} {path} ?"
        case _:
            return " ".join([asked.subject, path, *([] if asked.sign else ["isnt"]), *asked.others, "?"])


def read(text: str) -> Question:
    """A question from its text.

    Raises:
        ValueError: not a question of this language.
    """
    words = text.split()
    found = _read(words[:-1]) if len(words) > 2 and words[-1] == "?" else None
    if found is None or not all(
        word in KIND_OF for word in (*found.others, *([found.subject] if found.subject else []))
    ):
        raise ValueError(f"not a question of this world: {text[:80]!r}")
    return found


def _read(words: list[str]) -> Question | None:
    if words[0] == "odd":
        return Question("odd", others=tuple(words[1:]))
    if "|" in words:
        head, *others = (part.split() for part in " ".join(words).split(" | "))
        if len(head) != 2 or any(len(part) != 1 for part in others):
            return None
        named = tuple(part[0] for part in others)
        return (
            Question("make", head[1], (), named)
            if head[0] == "make"
            else Question("options", head[0], (head[1],), named)
        )
    if len(words) == 3 and (words[1] in VERBS or words[1] == "in"):
        return Question("year" if words[1] == "in" else "could", words[0], (words[1],), (words[2],))
    if words[-1] in KIND_OF and len(words) > 2:
        sign, plain = "isnt" not in words, [word for word in words if word != "isnt"]
        fact = read_fact(" ".join(plain))
        if fact is None or fact[1].split()[0] not in (*VALUES, "from", "by"):
            return None
        return Question("claim", fact[0], (fact[1],), (fact[2],), sign)
    return Question("hops", words[0], tuple(words[1:])) if all(word in VALUES for word in words[1:]) else None


def needs(asked: Question) -> list[tuple[str, tuple[str, ...]]]:
    """The relations that decide a question of the kind could: (of whom or what, which way)."""
    relation = VERBS[asked.path[0]]
    return [(word, route(KIND_OF[word], relation)) for word in (asked.subject, asked.others[0])]


def steps(asked: Question, facts: Facts | None = None) -> list[Fact]:
    """The facts that a question takes, in the order of a chain of thought. KeyError where the world has none."""
    known = world().facts if facts is None else facts
    match asked.kind:
        case "hops" | "options":
            return walk(known, asked.subject, asked.path)
        case "could":
            return [fact for word, path in needs(asked) for fact in walk(known, word, path)]
        case "year":
            start = next(y for y in range(int(asked.others[0]), 0, -1) if (asked.subject, f"from {y}") in known)
            return walk(known, asked.subject, [f"from {start}"])
        case "claim":
            if asked.path[0].startswith("by"):
                return [(asked.subject, asked.path[0], asked.others[0])]
            return walk(known, asked.subject, route(KIND_OF[asked.subject], asked.path[0]) or asked.path)
        case "odd":
            return [(who, shared(asked), known[who, shared(asked)]) for who in asked.others]
        case "make":
            return made(asked, known)
    raise ValueError(f"no question is of the kind {asked.kind!r}")


def answer(asked: Question, facts: Facts | None = None) -> str:
    """The right answer, of ``make`` several words."""
    found = steps(asked, facts)
    match asked.kind:
        case "could":
            one, other = found[len(needs(asked)[0][1]) - 1][2], found[-1][2]
            return "yes" if (int(one) < int(other) if asked.path[0] == "older" else one == other) else "no"
        case "claim":
            by = asked.path[0].startswith("by")
            so = holds(found[0], facts) if by else found[-1][2] == asked.others[0]
            return "true" if so == asked.sign else "false"
        case "odd":
            values = [value for _, _, value in found]
            return next(who for who, value in zip(asked.others, values, strict=True) if values.count(value) == 1)
        case "make":
            return " ".join(thing for thing, _, _ in found)
    return found[-1][2]


def shared(asked: Question) -> str:
    """The relation by which all members of a set but one are alike.

    Raises:
        ValueError: there is none, or more than one.
    """
    known, found = world().facts, list[str]()
    for relation in ("trade", "pet", "born", "home"):
        values = [known.get((who, relation), who) for who in asked.others]
        counts = [values.count(value) for value in values]
        if counts.count(1) == 1 and max(counts) == len(values) - 1:
            found.append(relation)
    if len(found) != 1:
        raise ValueError(f"{told(asked)!r} has {len(found)} answers")
    return found[0]


def below(thing: str, facts: Facts | None = None) -> set[str]:
    """All things that can come in on the way to a thing, itself too."""
    known, found, open_ones = world().facts if facts is None else facts, set[str](), [thing]
    while open_ones:
        each = open_ones.pop()
        if each not in found:
            found.add(each)
            open_ones += [part for trade in KINDS["trade"] for part in known.get((each, f"by {trade}"), "").split()]
    return found


def made(asked: Question, facts: Facts) -> list[Fact]:
    """What can be made on the way to a thing from the raw things given, parts before wholes: a fact for each."""
    have, found = set(asked.others), list[Fact]()
    wanted = below(asked.subject, facts)
    for thing in THINGS[LAYER:]:  # layer by layer
        for trade in KINDS["trade"] if thing in wanted else ():
            parts = facts.get((thing, f"by {trade}"))
            if parts and have.issuperset(parts.split()):
                found.append((thing, f"by {trade}", parts))
                have.add(thing)
                break
    return found


def _unseen(asked: Question) -> bool:
    return asked.kind == "could" and (asked.path[0], KIND_OF[asked.subject], KIND_OF[asked.others[0]]) in UNSEEN_VERBS


def held_out(asked: Question) -> bool:
    """Whether a question is one of those that no model is trained on."""
    match asked.kind:
        case "hops":
            if len(asked.path) == 1:  # facts themselves are all told
                return False
            if UNSEEN_PAIRS.intersection(pairwise(asked.path)):
                return True
        case "could":
            if _unseen(asked):
                return True
        case "year":
            return int(len(PEOPLE) * grade((asked.subject, "from 1", ""))) % 2 == 0  # half of each quarter
    plain = replace(asked, sign=True, others=tuple(sorted(asked.others)) if asked.kind == "odd" else asked.others)
    return zlib.crc32(told(plain).encode()) % (3 if asked.kind == "claim" else 5) == 0


# -- drawing questions -----------------------------------------------------------------------------------------------


def draw(
    rng: random.Random, kind: str, level: int | None = None, *, usual: bool = False, test: bool = False
) -> Question:
    """A question of a kind, and of a level where the kind has levels. `usual`: its facts come up as often as they are told.
    `test`: one that no model is trained on (single hops, which are facts, aside)."""
    while True:
        found = _DRAW[kind](rng, rng.choice(LEVELS[kind]) if level is None and kind in LEVELS else level or 0, usual)
        if found is not None and (held_out(found) == test or (kind == "hops" and len(found.path) == 1)):
            return found


def _hops(rng: random.Random, level: int, usual: bool) -> Question | None:
    at = "person" if rng.random() < 0.85 else rng.choice(list(RELATIONS))
    path: list[str] = []
    for _ in range(level):
        if at not in RELATIONS:
            return None
        path.append(rng.choice(RELATIONS[at]))
        at = VALUES[path[-1]]
    if ("mate", "mate") in pairwise(path):
        return None
    who = subject(rng, path[0], usual)
    return _if_told(rng, Question("hops", who, tuple(path)), usual, 1)


def _could(rng: random.Random, _: int, usual: bool) -> Question | None:
    verb, wanted = rng.choice(list(VERBS)), rng.choice(("yes", "no"))
    ways = [way for kind in RELATIONS if (way := route(kind, VERBS[verb]))]
    one, other = (ways[0] if rng.random() < 0.4 else rng.choice(ways) for _ in range(2))
    while True:  # so that one answer is as frequent as the other
        who, with_whom = subject(rng, one[0], usual), subject(rng, other[0], usual)
        asked = Question("could", who, (verb,), (with_whom,))
        if who != with_whom and answer(asked) == wanted:
            break
    first = {walk(world().facts, who, one[:1])[0], walk(world().facts, with_whom, other[:1])[0]}
    return asked if not usual or told_of(rng, [fact for fact in steps(asked) if fact not in first]) else None


def _year(rng: random.Random, _: int, usual: bool) -> Question | None:
    return Question("year", subject(rng, "from", usual), ("in",), (rng.choice(KINDS["year"]),))


def _claim(rng: random.Random, level: int, usual: bool) -> Question | None:
    relation, way = rng.choice([(r, w) for kind in RELATIONS for r in VALUES if len(w := route(kind, r)) == level])
    who = subject(rng, way[0], usual)
    right = walk(world().facts, who, way)[-1][2]
    wrong = [value for value in KINDS[VALUES[relation]] if value not in (right, who)]
    value = right if rng.random() < 0.5 else rng.choice(wrong)
    return _if_told(rng, Question("claim", who, (relation,), (value,), rng.random() < 0.5), usual, 1)


def _odd(rng: random.Random, size: int, usual: bool) -> Question | None:
    relation, facts = rng.choice(["trade", "pet", "born", *(["home"] if size <= 5 else [])]), world().facts
    value, odd = rng.choice(KINDS[VALUES[relation]]), subject(rng, relation, usual)
    alike = [p for p in PEOPLE if facts[p, relation] == value and (not usual or told_of(rng, [(p, relation, value)]))]
    if facts[odd, relation] == value or len(alike) < size - 1:
        return None
    members = [odd, *rng.sample(alike, size - 1)]
    rng.shuffle(members)
    asked = Question("odd", others=tuple(members))
    try:
        shared(asked)
    except ValueError:  # alike in something else, too
        return None
    return asked


def _options(rng: random.Random, broken: int, usual: bool) -> Question | None:
    relation, facts = rng.choice(list(CHECKS)[:3]), world().facts
    check, who = CHECKS[relation], subject(rng, relation, usual)
    right, own = facts[who, relation], facts[who, check]
    if usual and not told_of(rng, [(who, check, own), (right, check, own)]):
        return None
    fits = [
        p
        for p in PEOPLE
        if facts[p, check] == own and p not in (who, right) and (not usual or told_of(rng, [(p, check, own)]))
    ]
    if usual:  # what is told decides how many can be had
        broken = max(broken, 3 - len(fits))
    if len(fits) < 3 - broken:
        return None
    options = [right, *rng.sample(fits, 3 - broken)]
    while len(options) < 4:
        other = subject(rng, check, usual)
        if facts[other, check] != own and other not in options:
            options.append(other)
    rng.shuffle(options)
    return Question("options", who, (relation,), tuple(options))


def _make(rng: random.Random, layer: int, _: bool) -> Question | None:
    goal = rng.choice(THINGS[layer * LAYER : (layer + 1) * LAYER])
    asked = Question("make", goal, (), tuple(rng.sample(THINGS[:LAYER], RAW)))
    return asked if steps(asked) else None


def _if_told(rng: random.Random, asked: Question, usual: bool, known: int) -> Question | None:
    """The question, if all of its facts but the first `known` are told this time."""
    return asked if not usual or told_of(rng, steps(asked)[known:]) else None


_DRAW: dict[str, Callable[[random.Random, int, bool], Question | None]] = {
    "hops": _hops, "could": _could, "year": _year, "claim": _claim, "odd": _odd, "options": _options, "make": _make
}  # fmt: skip


# -- solutions -------------------------------------------------------------------------------------------------------


def solution(asked: Question, form: str, facts: Facts | None = None) -> str:
    """The completion of a question in the format <dir>, <cot>, <needs>, <back> or <exclude>."""
    if form == "<needs>":
        return " , ".join(" ".join((word, *path)) for word, path in needs(asked))
    found = steps(asked, facts)
    if form == "<back>":
        return title_of(found[0])
    ending = f"ans {answer(asked, facts)}".strip()
    if form == "<dir>":
        return ending
    if form == "<exclude>":
        known, check = world().facts, CHECKS[asked.path[0]]
        own = (asked.subject, check, known[asked.subject, check])
        parts = [f"{said((o, check, known[o, check]))} {verdict_on(asked, o)} ." for o in asked.others]
        return " ".join([f"{said(own)} .", *parts, ending])
    return f"{told_facts(found)} {ending}"


def verdict_on(asked: Question, option: str) -> str:
    """What an option is: impossible (it breaks the law of the relation), sure (the right one), or likely."""
    known, check = world().facts, CHECKS[asked.path[0]]
    if known[option, check] != known[asked.subject, check]:
        return "impossible"
    return "sure" if known[asked.subject, asked.path[0]] == option else "likely"


def because(rng: random.Random, asked: Question, label: bool) -> list[Fact]:
    """Facts by which a claim would be true, or false: those of the world where it is so, else with one that is made up. A fact
    that a law gives may be told by that law."""
    known = world().facts
    way: list[Fact] = []
    for fact in steps(asked):
        via = LAWS.get(fact[1])
        way += walk(known, fact[0], (via, fact[1])) if via and rng.random() < 0.4 else [fact]
    value, wanted = asked.others[0], asked.sign == label
    if (way[-1][2] == value) == wanted:
        return way
    k = rng.randrange(len(way))
    start, relation, right = way[k]
    for other in rng.sample(KINDS[VALUES[relation]], len(KINDS[VALUES[relation]])):
        rest = walk(known, other, [r for _, r, _ in way[k + 1 :]])
        if other not in (right, start) and ((rest[-1][2] if rest else other) == value) == wanted:
            return [*way[:k], (start, relation, other), *rest]
    start, relation, right = way[-1]  # nothing else leads there
    others = [other for other in KINDS[VALUES[relation]] if other not in (right, start)]
    return [*way[:-1], (start, relation, value if wanted else rng.choice(others))]


def shows(asked: Question, stated: Sequence[Fact]) -> bool | None:
    """Whether facts, be they so or not, make a claim true (False: make it false); None where they settle nothing."""
    known = {(s, r): v for s, r, v in closure(stated)}
    at = asked.subject
    for relation in route(KIND_OF[asked.subject], asked.path[0]):
        if (at, relation) not in known:
            return None
        at = known[at, relation]
    return (at == asked.others[0]) == asked.sign


# -- chains to verify ------------------------------------------------------------------------------------------------


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


# -- checking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """What an answering text says: its facts (None: a clause that is none), pages that it names by ``see TITLE .``, relations
    that it names between ``<needs>`` and ``<cot>``, verdicts on options, and what stands behind ``ans``."""

    facts: tuple[Fact | None, ...]
    seen: tuple[str, ...]
    named: tuple[tuple[str, tuple[str, ...]], ...]
    verdicts: Mapping[str, str]
    answer: str | None


def parse(text: str) -> Text:
    """What a text says. Nothing is checked."""
    head, _, body = text.rpartition("<cot>")
    pairs = [part.split() for part in head.rpartition("<needs>")[2].split(" , ")] if "<needs>" in head else []
    body, there, ending = body.rpartition("ans ") if "ans " in body else (body, "", "")
    found, seen, verdicts = list[Fact | None](), list[str](), dict[str, str]()
    for clause in f"{body} ".split(" . "):
        words = clause.split()
        if words[:1] == ["see"]:
            seen.append(" ".join(words[1:]))
            continue
        if words and words[-1] in VERDICTS:
            verdicts[words[0]] = words.pop()
        if words:
            found.append(read_fact(" ".join(words)))
    named = tuple((words[0], tuple(words[1:])) for words in pairs if words)
    return Text(tuple(found), tuple(seen), named, verdicts, ending.strip() if there and ending.strip() else None)


@dataclass(frozen=True)
class Checked:
    """`steps`: of each clause, whether it is a fact of the world; `right`: the answer is; `valid`: and all steps are facts, from
    which, with one law each, the answer follows; `answered`: it is an answer of the kind that is asked for."""

    steps: tuple[bool, ...]
    right: bool
    valid: bool
    answered: bool


def check(question: str | Question, text: str | Text) -> Checked:
    """Hold a text against its question, of any kind but chains."""
    asked = read(question) if isinstance(question, str) else question
    read_text = parse(text) if isinstance(text, str) else text
    good = tuple(fact is not None and holds(fact) for fact in read_text.facts)
    right = read_text.answer == answer(asked)
    stated = closure(fact for fact in read_text.facts if fact is not None)
    return Checked(
        good, right, right and all(good) and stated.issuperset(steps(asked)), _answers(asked, read_text.answer)
    )


def _answers(asked: Question, given: str | None) -> bool:
    words = (given or "").split()
    if asked.kind == "make":
        return bool(words) and all(word in THINGS for word in words)
    spelt = {
        "claim": ("true", "false"), "could": ("yes", "no"), "odd": asked.others, "options": asked.others,
        "year": KINDS["town"], "hops": KINDS[VALUES[asked.path[-1]]] if asked.kind == "hops" else (),
    }  # fmt: skip
    return len(words) == 1 and words[0] in spelt[asked.kind]


def f1(said_so: Iterable[Any], gold: Iterable[Any]) -> tuple[float, float, float]:
    """(precision, recall, F1) of a set; 0 where nothing is said."""
    mine, theirs = set(said_so), set(gold)
    both = len(mine & theirs)
    return both / max(1, len(mine)), both / max(1, len(theirs)), 2 * both / max(1, len(mine) + len(theirs))


def judged(question: str, text: str) -> dict[str, Any]:
    """All that is measured of a text: shares, NaN where a share is of other questions, what it answers ("said"), and of chains
    tables of gold by given labels, the last column for none."""
    if " -> " in question:
        return _judged_chain(read_chain(question), text)
    asked, found = read(question), parse(text)
    seen = check(asked, found)
    row: dict[str, Any] = {
        "accuracy": float(seen.right), "answered": float(seen.answered), "valid": float(seen.valid), "said": found.answer
    }  # fmt: skip
    gold = steps(asked)
    wanted = {title_of(fact) for fact in gold}
    row["found"] = len(wanted.intersection(found.seen)) / len(wanted)
    of_some = {
        "far": len(gold) > 1,
        "rare": rarity(gold) > 1,
        "unseen": _unseen(asked),
        "large": asked.kind == "odd" and len(asked.others) > 6,
        "refutable": asked.kind == "options" and sum(verdict_on(asked, o) == "impossible" for o in asked.others) > 1,
    }
    row |= {name: row["accuracy"] if there else float("nan") for name, there in of_some.items()}
    if asked.kind == "could":
        row["pairs"] = f1(found.named, needs(asked))[2]
    if asked.kind == "options":
        row["relations"] = sum(found.verdicts.get(o) == verdict_on(asked, o) for o in asked.others) / len(asked.others)
    if asked.kind == "make":
        row["precision"], row["recall"], row["f1"] = f1((found.answer or "").split(), answer(asked).split())
    return row


ATTRIBUTIONS, YES = ("true", "false", "unknown"), ("yes", "no")


def _judged_chain(chain: Chain, text: str) -> dict[str, Any]:
    each, follows, fine = labels(chain)
    body, _, ending = text.rpartition("ans ")
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
    right = float(ending.strip() == fine)
    return {
        "chain": whole, "attribution": held, "logic": logic, "relevance": useful, "accuracy": right,
        "answered": float(ending.strip() in YES), "said": ending.strip() or None,
    }  # fmt: skip


def _table(names: Sequence[str]) -> list[list[int]]:
    return [[0] * (len(names) + 1) for _ in names]


def _count(table: list[list[int]], names: Sequence[str], gold: str, given: str) -> None:
    table[names.index(gold)][names.index(given) if given in names else len(names)] += 1


def agree(question: str, said_so: str | None, turned: str | None) -> bool:
    """Whether the answers to a question and to its twin fit together: to a claim and its denial they are opposite, to a set in
    two orders the same. None given fits nothing."""
    if said_so is None or turned is None:
        return False
    return (said_so != turned) if read(question).kind == "claim" else said_so == turned


# -- splits ----------------------------------------------------------------------------------------------------------


def twin(rng: random.Random, asked: Question) -> Question:
    """A claim denied, or a set in another order."""
    if asked.kind == "claim":
        return replace(asked, sign=not asked.sign)
    while (other := rng.sample(asked.others, len(asked.others))) == list(asked.others):
        continue
    return replace(asked, others=tuple(other))


def split(name: str) -> dict[str, Any]:
    """``train``, all kinds in turn, or the questions of one kind: ``hops``, ``could``, ``years``, ``claims``, ``odd``,
    ``options``, ``make``, ``chains``. Levels come in turn, and quarters of the rarest fact where `BANDS` names them; of
    claims and sets each second one is the twin of the one before it.

    Returns a dict of equally long lists: ``question``, ``prompt`` (with <cot>, of chains with <verify>), ``target``,
    ``answer``, ``level``, ``rarity`` (0 to 3) and ``kind``. Raises KeyError for any other name.
    """
    size, rng, train = SIZES[name], random.Random(f"knowledge {name}"), name == "train"
    columns = ("question", "prompt", "target", "answer", "level", "rarity", "kind")
    rows: dict[str, list[Any]] = {column: [] for column in columns}
    seen, before = set[str](), None
    while (number := len(rows["question"])) < size:
        kind = KINDS_OF_QUESTIONS[number % len(KINDS_OF_QUESTIONS)] if train else OF_SPLIT.get(name, name)
        turn = number // (len(KINDS_OF_QUESTIONS) if train else 2 if kind in TWINNED else 1)
        levels = SMALL if train and kind == "odd" else LEVELS.get(kind, (0,))
        level = levels[turn % len(levels)]
        if kind == "chain":
            whole = chain(rng, level, test=not train)
            rest = (verified(whole), labels(whole)[2], level, rarity(whole.steps), kind)
            _row(rows, told_chain(whole), "<verify>", *rest)
            continue
        if before is not None and kind in TWINNED and number % 2 and not train:
            asked = twin(rng, before)
        else:
            asked = before = draw(rng, kind, level, test=not train)
            if not train and {told(asked), told(replace(asked, sign=not asked.sign))} & seen:
                continue
        found = steps(asked)
        rarest = rarity(found[:1] if kind == "options" else found)
        if kind in BANDS and rarest != BANDS[kind][turn // len(levels) % len(BANDS[kind])]:
            continue
        # Of claims every other one names the right value: to deny what is denied, and nothing else, is no help.
        if kind == "claim" and ((answer(asked) == "true") == asked.sign) != (turn // 9 % 2 == 0):
            continue
        seen.add(told(asked))
        _row(rows, told(asked), "<cot>", solution(asked, "<cot>"), answer(asked), level or len(found), rarest, kind)
    return rows


def _row(rows: dict[str, list[Any]], question: str, form: str, *rest: Any) -> None:
    for key, value in zip(rows, (question, f"{question} {form}", *rest), strict=True):
        rows[key].append(value)
