"""Questions about the closed world of `stepmark.datasets.closed_world`, whose facts are to be known by heart.

    hops      ``alma home land ?``: the land of the town where alma lives; 1 to 3 relations
    could     ``alma talk dipo ?``: relations that are not named decide, here whether both have the same tongue
    year      ``alma in 5 ?``: where alma worked in year 5; the last place that began before or in it
    claim     ``alma tongue kebo ?`` or ``alma tongue isnt kebo ?``: true or false
    odd       ``odd alma boris carlo dora ?``: all but one share a trade, a pet, a year of birth or a home; which does not?
    options   ``alma mate | boris | carlo | dora | emil ?``: one is right, of the others some break a law
    make      ``make kasa | pale | mito | ... ?``: what on the way to kasa can be made from these

Formats, chosen by the last word of the prompt. Pages or facts and ``->`` may stand before a question of any kind.

    <dir>      the answer at once: ``ans dipo``
    <cot>      facts, then the answer: ``alma home bana . bana land dipo . ans dipo``
    <needs>    of could: the relations that decide, ``alma home land tongue , dipo tongue``; ``<cot>`` may follow
    <back>     the page that one would look at: ``alma past``
    <why>      of a claim, with ``true`` or ``false`` behind it: facts that make it so, some of them made up where it is not so
    <exclude>  of options: what each has to do with a law, ``alma home bana . boris home gole impossible . ... ans carlo``
    <ways>     of a thing, ``kasa ? <ways>``: trades that make it; <parts>, of ``kasa by tuno ?``: from what

A page is written by heart after its title: ``alma life :``.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from stepmark.datasets.closed_world import (
    CHECKS,
    KIND_OF,
    KINDS,
    LAWS,
    LAYER,
    PEOPLE,
    RELATIONS,
    THINGS,
    VALUES,
    Fact,
    Facts,
    grade,
    rarity,
    read_fact,
    route,
    said,
    subject,
    title_of,
    told_facts,
    told_of,
    walk,
    world,
)

from stepmark.task import Dataset

DATASET = Dataset(
    id="knowledge",
    version=1,
    summary="Questions about a closed world known by heart: hops, unnamed relations, claims, sets, options, crafts",
    licence="CC0-1.0",
    digests={
        "train": "1afbad40f0ac4f11c0f0d0fe7fcaa751afa21ecb39bc50a8e2e18ec6351a2646",
        "hops": "102568a73348b56f493406d371683dd5a83b0ec369cfd190b6cc8bdba6c0cb1c",
        "could": "8e66a2dffc9df3060d4409ab0a28d279e1aaf139374d9f3f8a5de374bdb39fd1",
        "years": "69374b87bbbaec435290f23227c818cdd5fa30a6aaf1d4dbf15308a89652890c",
        "claims": "6a7f39511850039d7c32640c734996ced96a272947459c325ababba7da98223b",
        "odd": "72bc5bc86f1110a464eca1df1e65b1240510891afd97c03434885ae5db8da6f4",
        "options": "4c2c0966a6da2de7484c35cbe5df6285c1d6ac58c74d09f75cc3521c488211ab",
        "make": "310159e7ed78db11143ed4584965fbe46897d1b1d0c50f3ab81a147c06d4f100",
    },
)
TOGETHER = {"know/claims": 2, "know/odd": 2}  # each second question is the twin of the one before it
SIZES = {
    "train": 2_800, "hops": 720, "could": 600, "years": 320, "claims": 480, "odd": 600, "options": 600, "make": 300
}  # fmt: skip
ASKED = {f"know/{name}": name for name in SIZES if name != "train"}  # task -> split
OF_SPLIT = {"years": "year", "claims": "claim"}  # kinds that are called otherwise than their split
KINDS_OF_QUESTIONS = ("hops", "could", "year", "claim", "odd", "options", "make")
LEVELS = {  # relations, size of the set, options that break a law, layers of things
    "hops": (1, 2, 3), "claim": (1, 2, 3), "odd": (5, 6, 7, 8), "options": (1, 2, 3), "make": (2, 3, 4)
}  # fmt: skip
TWINNED = ("claim", "odd")  # kinds whose test questions come in pairs
BANDS = {"hops": (0, 1, 2, 3), "year": (0, 1, 2, 3), "claim": (0, 1, 2), "could": (1, 2, 3), "options": (2, 3)}
SMALL, RAW = (3, 4, 5), 5  # sizes of sets in training, raw things that a question gives
VERBS = {"talk": "tongue", "pay": "coin", "greet": "land", "feed": "food", "lend": "tool", "older": "born"}
VERDICTS = ("impossible", "likely", "sure")  # an option breaks a law, breaks none, is the one
# Never met in training: relations one behind the other, and verbs between such things.
UNSEEN_PAIRS = {("friend", "trade"), ("mate", "boss"), ("boss", "pet")}
UNSEEN_VERBS = {
    ("talk", "person", "town"), ("pay", "town", "land"), ("feed", "person", "person"), ("lend", "trade", "person")
}  # fmt: skip


def holds(fact: Fact, facts: Facts | None = None) -> bool:
    """Whether a fact is one of the world's; also that a trade makes a thing, whatever from, or from one thing at least."""
    subject, relation, value = fact
    known = world().facts if facts is None else facts
    if relation == "by":
        return (subject, f"by {value}") in known
    told = known.get((subject, relation), "")
    return told == value or (relation.startswith("by ") and value in told.split())


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
    return asked.kind == "could" and (*asked.path, KIND_OF[asked.subject], KIND_OF[asked.others[0]]) in UNSEEN_VERBS


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
    """What a text is worth as an answer to a question, by metric; NaN where a metric is of other questions only. "said": what
    it answers."""
    asked, found = read(question), parse(text)
    seen, gold = check(asked, found), steps(asked)
    right, wanted = float(seen.right), {title_of(fact) for fact in gold}
    of_some = {
        "far": len(gold) > 1,
        "rare": rarity(gold) > 1,
        "unseen": _unseen(asked),
        "large": len(asked.others) > 6,
        "refutable": asked.kind == "options" and sum(verdict_on(asked, o) == "impossible" for o in asked.others) > 1,
    }
    row: dict[str, Any] = {
        "accuracy": right,
        "answered": float(seen.answered),
        "valid": float(seen.valid),
        "found": len(wanted.intersection(found.seen)) / len(wanted),
        "said": found.answer,
        **{name: right if there else float("nan") for name, there in of_some.items()},
    }
    if asked.kind == "could":
        row["pairs"] = f1(found.named, needs(asked))[2]
    if asked.kind == "options":
        row["relations"] = sum(found.verdicts.get(o) == verdict_on(asked, o) for o in asked.others) / len(asked.others)
    if asked.kind == "make":
        row["precision"], row["recall"], row["f1"] = f1((found.answer or "").split(), answer(asked).split())
    return row


def compared(questions: Sequence[str], rows: MutableSequence[dict[str, Any]]) -> None:
    """Add "agree" to rows of claims and sets: whether the answers to a question and to its twin fit together, to a claim and
    its denial opposite ones, to a set in two orders the same. What is no answer fits nothing; NaN where the twin is not there."""
    for i, (row, kind) in enumerate(zip(rows, [read(question).kind for question in questions], strict=True)):
        if kind in TWINNED:
            pair = [row, *rows[i ^ 1 : (i ^ 1) + 1]]
            fit = (pair[0]["said"] == pair[-1]["said"]) == (kind == "odd")
            row["agree"] = float(fit and all(each["answered"] for each in pair)) if len(pair) == 2 else float("nan")


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
    ``options``, ``make``. Levels come in turn, and quarters of the rarest fact where `BANDS` names them; of claims and sets
    each second one is the twin of the one before it.

    Returns a dict of equally long lists: ``question``, ``prompt`` (with <cot>), ``target``, ``answer``, ``level``, ``rarity``
    (0 to 3) and ``kind``. Raises KeyError for any other name.
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
        seen.add(text := told(asked))
        row = (text, f"{text} <cot>", solution(asked, "<cot>"), answer(asked), level or len(found), rarest, kind)
        for column, value in zip(rows.values(), row, strict=True):
            column.append(value)
    return rows
