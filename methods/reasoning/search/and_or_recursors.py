"""And-Or recursors: alternatives and their parts, asked for recursively, filtered, and run as a Horn program (Tarau, 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import decode, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.knowing import KINDS, Fact, beliefs, claimed, ended, question_of, so, told_facts
from stepmark.tracks.reasoning.populations import drawn, room

SAMPLES = 2  # lists of alternatives of a thing
LIST, PARTS = 6, 4  # most words of a list of alternatives, and of parts
WIDEST = 3  # alternatives of a thing that are gone into, the first ones
WORTH = 0.5  # belief from which on the oracle agrees
THING = 1 + SAMPLES * (LIST - 1) + WIDEST * (1 + PARTS + 2)  # rows that a goal may take


class Clause(NamedTuple):
    """A Horn clause: a thing by a trade, from its parts."""

    head: str
    trade: str
    body: tuple[str, ...]


@dataclass
class Program:
    """What was found out about one question: goals by depth, of which `waiting` are not expanded yet, and clauses."""

    facts: tuple[str, ...]
    depths: dict[str, int]
    waiting: list[str]
    clauses: list[Clause] = field(default_factory=list)

    def model(self) -> list[Clause]:
        """The clauses that derive the atoms of the minimal model, each when its body has been derived (Dowling, Gallier 1984)."""
        known, found = set(self.facts), list[Clause]()
        while new := [c for c in self.clauses if c.head not in known and known.issuperset(c.body)]:
            found.append(new[0])
            known.add(new[0].head)
        return found


class AndOrRecursors(Method):
    """And-Or recursors: a recursive descent in the way of a Horn clause interpreter, in which the model supplies the clauses.

    For a goal, the thing that is asked for:

        OR      "kasa ? <ways>": alternatives, trades by which kasa is made, here two lists at temperature 1
        AND     "kasa by tuno ? <parts>": for each alternative its details, the parts that it takes
        oracle  every line is put to the model anew, "kasa by tuno ?", "kasa by tuno pale ?": true or false? What it does
                not believe is dropped; without a part there is no clause

    Parts that are no given facts become goals, down to depth 4; a goal is expanded once. The clauses kasa :- pale, mito and the
    things given as facts are a propositional Horn program, and its minimal model, less the facts, is the answer, told with a
    clause for each atom.

    Goals are expanded in the order of their depth while the batch has room for one more, 32 rows at most, about 20 mostly: one
    to three goals at 64, a whole tree at 512.

    Its controls: `and_or_unfiltered` has no oracle; `and_or_shuffled` asks it, but deals its verdicts out at random, so that as
    many lines are dropped; `and_or_shallow` stops at depth 2; `and_or_greedy` takes one list of alternatives, the likeliest
    words. `and_or_exact` looks the lines up, a bound on the filter.

    Differs from the paper: prompts hold no summary of the steps from the root, as what makes a thing here hangs on nothing
    else. The paper descends depth first; since a goal is asked once, breadth first finds the same clauses at the least depths.
    Its code accepts any leaf at the last depth that the oracle agrees with; here leaves are facts where they are given. Semantic
    similarity to facts comes down to that: words are equal or not.

    What limits it here: the paper has no figures, so that claims come from what it says. A thing has two ways, of two parts each.
    """

    paper = Paper(
        id="and_or_recursors",
        title="Full Automation of Goal-driven LLM Dialog Threads with And-Or Recursors and Refiner Oracles",
        authors="Paul Tarau",
        year=2023,
        arxiv="2306.14077",
        code="ptarau/recursors",
    )
    tasks = ("know/make",)
    baselines = ("know_direct", "know_cot", "and_or_unfiltered", "and_or_shuffled", "and_or_shallow")
    claims = (
        Claim(
            "f1[and_or_recursors,256..1024] > f1[know_direct,256..1024] "
            "and f1[and_or_recursors,256..1024] > f1[know_cot,256..1024]",
            says="recursion finds what can be made better than one list does, or one text",
            headline=True,
        ),
        Claim(
            "precision[and_or_recursors,256..1024] > precision[and_or_unfiltered,256..1024] "
            "and f1[and_or_recursors,256..1024] >= f1[and_or_unfiltered,256..1024]",
            says="advice of an oracle keeps out what is not so, and does not cost more than it brings",
            headline=True,
        ),
        Claim(
            "precision[and_or_recursors,256..1024] > precision[and_or_shuffled,256..1024] "
            "and f1[and_or_recursors,256..1024] > f1[and_or_shuffled,256..1024]",
            says="it is its advice, not that there is less",
        ),
        Claim(
            "recall[and_or_recursors,256..1024] > recall[and_or_shallow,256..1024]",
            says="deeper recursion finds more",
        ),
        Claim(
            "recall[and_or_recursors,256..1024] > recall[and_or_greedy,256..1024]",
            says="and so do several alternatives",
        ),
    )
    oracle, depth, temperature = "asked", 4, 1.0
    variants = (
        Variant("and_or_unfiltered", says="no oracle", oracle="none"),
        Variant("and_or_shuffled", says="the verdicts of the oracle, dealt out at random", oracle="shuffled"),
        Variant("and_or_shallow", says="two levels of alternatives and parts", depth=2),
        Variant("and_or_greedy", says="one list of alternatives, the likeliest words", temperature=0.0),
        Variant("and_or_exact", says="lines are looked up: a bound", oracle="exact"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """What can be made on the way to each goal."""
        questions = [question_of(ids) for ids in batch["question"]]
        programs = [Program(q.others, {q.subject: 1}, [q.subject]) for q in questions]
        while fit := room(session, 1) // THING:
            waiting = [(program, goal) for program in programs for goal in program.waiting]
            chosen = sorted(waiting, key=lambda each: each[0].depths[each[1]])[:fit]
            if not chosen:
                break
            self.expand(session, chosen)
        return [answered(program) for program in programs]

    def expand(self, session: Session, goals: Sequence[tuple[Program, str]]) -> None:
        """Clauses for some goals, and the goals that their bodies bring."""
        every = zip(goals, self.alternatives(session, goals), strict=True)
        ways = [(program, goal, trade) for (program, goal), trades in every for trade in trades]
        ways = list(compress(ways, self.agreed(session, [[(goal, "by", trade)] for _, goal, trade in ways])))
        chains = Chains(session.networks["model"], [encode(f"{goal} by {trade} ? <parts>") for _, goal, trade in ways])
        chains.write(limit=PARTS)
        lines = []
        for i, (program, goal, trade) in enumerate(ways):
            named = decode(chains.written(i)).split(" , ")
            body = tuple(listed(named, "thing"))
            if len(body) == len(named) and goal not in body:  # a list with gaps would prove too much
                lines.append((program, Clause(goal, trade, body)))
        facts = [[(clause.head, f"by {clause.trade}", part) for part in clause.body] for _, clause in lines]
        for program, clause in compress(lines, self.agreed(session, facts)):
            program.clauses.append(clause)
            depth = program.depths[clause.head] + 1
            new = [part for part in clause.body if part not in program.facts and part not in program.depths]
            if depth <= self.depth:
                program.depths |= dict.fromkeys(new, depth)
                program.waiting += new
        for program, goal in goals:
            program.waiting.remove(goal)

    def alternatives(self, session: Session, goals: Sequence[tuple[Program, str]]) -> list[list[str]]:
        """Trades by which each goal may be reached."""
        first = Chains(session.networks["model"], [encode(f"{goal} ? <ways>") for _, goal in goals])
        count = SAMPLES if self.temperature else 1
        chains = first.take([i for i in range(len(goals)) for _ in range(count)])
        chains.write(limit=LIST, temperature=self.temperature, generator=session.rng)
        texts = [decode(chains.written(k)) for k in range(len(chains))]
        every = [" , ".join(texts[k : k + count]).split(" , ") for k in range(0, len(texts), count)]
        return [listed(words, "trade")[:WIDEST] for words in every]

    def agreed(self, session: Session, lines: Sequence[Sequence[Fact]]) -> list[bool]:
        """Of each line whether the oracle believes all of its facts."""
        facts = [fact for line in lines for fact in line]
        if self.oracle == "none":
            return [True] * len(lines)
        if self.oracle == "exact":
            return [all(map(so, line)) for line in lines]
        held = dict(zip(facts, beliefs(session, [claimed(fact) for fact in facts]), strict=True))
        kept = [all(held[fact] > WORTH for fact in line) for line in lines]
        if self.oracle == "shuffled" and kept:
            return [kept[k] for k in drawn(session, [1.0] * len(kept), len(kept))]
        return kept


def listed(words: Sequence[str], kind: str) -> list[str]:
    """Those of some words that are of a kind, each once."""
    return [word for word in dict.fromkeys(words) if word in KINDS[kind]]


def answered(program: Program) -> list[int]:
    """The minimal model of a program, less its facts, with a clause for each atom."""
    model = program.model()
    steps = told_facts([(c.head, f"by {c.trade}", " ".join(c.body)) for c in model])
    return ended(f"{steps} ans {' '.join(c.head for c in model)}")
