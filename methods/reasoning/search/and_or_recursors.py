"""And-Or recursors: alternatives and their parts, asked for recursively, filtered, and run as a Horn program (Tarau, 2023)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import decode, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.knowing import KINDS, Fact, beliefs, claimed, ended, question_of, told_facts
from stepmark.tracks.reasoning.populations import drawn
from stepmark.tracks.reasoning.solving import prompts

LIST, PARTS = 6, 4  # most words of a list of alternatives, and of parts
WIDEST = 3  # alternatives of a thing that are gone into, the first ones
TEMPERATURE = 0.2  # of lists
WORTH = 0.5  # belief from which on the oracle agrees
THING = LIST + WIDEST * (1 + PARTS + 2)  # most rows of a goal
WHOLE = 34  # most words of a list of all that can be made: 32 things, ans, the end


class Clause(NamedTuple):
    """A Horn clause: a thing by a trade, from its parts."""

    head: str
    trade: str
    body: tuple[str, ...]


@dataclass
class Program:
    """What was found out about one question: goals by depth, of which `waiting` are not expanded yet, clauses, rows left."""

    facts: tuple[str, ...]
    depths: dict[str, int]
    waiting: list[str]
    left: int
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

        OR      "kasa ? <ways>": alternatives, the trades by which kasa is made
        AND     "kasa by tuno ? <parts>": for each alternative its details, the parts that it takes
        oracle  every line is put to the model anew, "kasa by tuno ?", "kasa by tuno pale ?": true or false? What it does
                not believe is dropped; without a part there is no clause

    A list is one call at temperature .2. Parts that are no given facts become goals, down to depth 4; a goal is expanded
    once. The clauses kasa :- pale, mito and the things given as facts are a propositional Horn program, and its minimal model,
    less the facts, is the answer, told with a clause for each atom.

    Each question has its rung for itself. Its goals are expanded in the order of their depth while it has room for the longest,
    27 rows; two ways of two parts take 18. That is three goals at 64 and the whole tree at 512; claims begin at 256, where three
    depths fit.

    Its controls: `and_or_unfiltered` has no oracle; `and_or_shuffled` asks it, but deals its verdicts out at random, so that as
    many lines are dropped; `and_or_shallow` stops at depth 2. `and_or_lists` does not recur: it samples lists of all that can be
    made at temperature .7, as many as the rung has room for if they are long, and names what more than half of them do.

    Differs from the paper: prompts hold no summary of the steps from the root, as what makes a thing here hangs on nothing
    else. The paper descends depth first, and asks for a goal anew on another path; here it is asked for once, and breadth
    first, at its least depth. Its clauses are two, thing :- way and way :- parts, which are one here. Its code asks the oracle
    about alternatives, and about details only at the last depth, where any that it agrees with is a fact; here all lines
    are put to it, and facts are those given. Semantic similarity to facts comes down to that: words are equal or not. It has
    no model that does not hold its first goal; here what can be made on the way is asked for.

    What limits it here: the paper has no figures and no baselines, so that claims come from what it says. A thing has two ways,
    of two parts each. Raw things that are not given become goals too, and of their ways the model was never told anything.
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
    baselines = ("direct_answer", "chain_of_thought", "and_or_lists", "and_or_unfiltered", "and_or_shallow")
    claims = (
        Claim(
            "f1[and_or_recursors,256..1024] > f1[direct_answer,256..1024] "
            "and f1[and_or_recursors,256..1024] > f1[chain_of_thought,256..1024]",
            says="recursion with an oracle finds what can be made better than one list does, or one text",
            headline=True,
        ),
        Claim(
            "precision[and_or_recursors,256..1024] > precision[and_or_unfiltered,256..1024] "
            "and f1[and_or_recursors,256..1024] >= f1[and_or_unfiltered,256..1024]",
            says="advice of an oracle keeps out what is not so, and does not cost more than it brings",
            headline=True,
        ),
        Claim(
            "f1[and_or_recursors,256..1024] > f1[and_or_lists,256..1024]",
            says="and better than a vote of lists within the same rung",
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
    )
    oracle, depth, recur = "asked", 4, True
    variants = (
        Variant("and_or_unfiltered", says="no oracle", oracle="none"),
        Variant("and_or_shuffled", says="the verdicts of the oracle, dealt out at random", oracle="shuffled"),
        Variant("and_or_shallow", says="two levels of alternatives and parts", depth=2),
        Variant("and_or_lists", says="a vote of lists at once, no recursion", recur=False),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """What can be made on the way to each goal."""
        if not self.recur:
            first = Chains(session.networks["model"], prompts(batch, "<dir>"))
            count = max(1, rung // WHOLE)
            lists = first.take([i for i in range(len(first)) for _ in range(count)])
            lists.write(limit=WHOLE, temperature=0.7, generator=session.rng)
            every = [lists.written(k) for k in range(len(lists))]
            return [voted(every[k : k + count]) for k in range(0, len(every), count)]
        questions = [question_of(ids) for ids in batch["question"]]
        programs = [Program(q.others, {q.subject: 1}, [q.subject], rung) for q in questions]
        while goals := [(program, goal) for program in programs for goal in program.waiting[: program.left // THING]]:
            self.expand(session, goals)
        return [answered(program) for program in programs]

    def expand(self, session: Session, goals: Sequence[tuple[Program, str]]) -> None:
        """Clauses for some goals, and the goals that their bodies bring, behind those that wait."""
        every = asked(session, [(program, f"{goal} ? <ways>") for program, goal in goals], LIST)
        ways = [
            (program, goal, trade)
            for (program, goal), named in zip(goals, every, strict=True)
            for trade in listed(named, "trade")[:WIDEST]
        ]
        facts = [(program, [(goal, "by", trade)]) for program, goal, trade in ways]
        ways = list(compress(ways, self.agreed(session, facts)))
        every = asked(session, [(program, f"{goal} by {trade} ? <parts>") for program, goal, trade in ways], PARTS)
        lines = []
        for (program, goal, trade), named in zip(ways, every, strict=True):
            body = tuple(listed(named, "thing"))
            if len(body) == len(named) and goal not in body:  # a list with gaps would prove too much
                lines.append((program, Clause(goal, trade, body)))
        facts = [(program, [(c.head, f"by {c.trade}", part) for part in c.body]) for program, c in lines]
        for program, clause in compress(lines, self.agreed(session, facts)):
            program.clauses.append(clause)
            depth = program.depths[clause.head] + 1
            new = [part for part in clause.body if part not in program.facts and part not in program.depths]
            if depth <= self.depth:
                program.depths |= dict.fromkeys(new, depth)
                program.waiting += new
        for program, goal in goals:
            program.waiting.remove(goal)

    def agreed(self, session: Session, lines: Sequence[tuple[Program, Sequence[Fact]]]) -> list[bool]:
        """Of each line whether the oracle believes all of its facts, a row each."""
        if self.oracle == "none":
            return [True] * len(lines)
        for program, facts in lines:
            program.left -= len(facts)
        held = iter(beliefs(session, [claimed(fact) for _, facts in lines for fact in facts]))
        kept = [min(next(held) for _ in facts) > WORTH for _, facts in lines]
        if self.oracle == "shuffled" and kept:
            return [kept[k] for k in drawn(session, [1.0] * len(kept), len(kept))]
        return kept


def asked(session: Session, prompts: Sequence[tuple[Program, str]], most: int) -> list[list[str]]:
    """The lines that the model lists behind each prompt; each word is a row of its program."""
    chains = Chains(session.networks["model"], [encode(prompt) for _, prompt in prompts])
    chains.write(limit=most, temperature=TEMPERATURE, generator=session.rng)
    for (program, _), rows in zip(prompts, chains.rows, strict=True):
        program.left -= rows
    return [decode(chains.written(i)).split(" , ") for i in range(len(chains))]


def listed(words: Sequence[str], kind: str) -> list[str]:
    """Those of some words that are of a kind, each once."""
    return [word for word in dict.fromkeys(words) if word in KINDS[kind]]


def answered(program: Program) -> list[int]:
    """The minimal model of a program, less its facts, with a clause for each atom."""
    model = program.model()
    steps = told_facts([(c.head, f"by {c.trade}", " ".join(c.body)) for c in model])
    return ended(f"{steps} ans {' '.join(c.head for c in model)}")


def voted(texts: Sequence[Sequence[int]]) -> list[int]:
    """The things that more than half of some lists name."""
    named = Counter(word for ids in texts for word in listed(decode(ids).partition("ans")[2].split(), "thing"))
    return ended(f"ans {' '.join(word for word in KINDS['thing'] if 2 * named[word] > len(texts))}")
