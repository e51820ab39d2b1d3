"""Maieutic prompting: explanations of either answer, recursively, and what satisfies most of them (Jung et al., 2022)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import decode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.knowing import (
    SPELT,
    Fact,
    Question,
    asked,
    beliefs,
    both_ways,
    claimed,
    ended,
    question_of,
    read_facts,
    told_facts,
)

SAMPLES = 3  # explanations of either label for the question; for a fact there is one
TEMPERATURES = (1.0, 0.5)  # by depth
INTEGRAL = 0.45  # least difference of the beliefs in a fact and in its denial
EXPLANATION, FACTS = 17, 4  # most tokens and facts of an explanation, so that the least rung has room for a pair
PAIR = 2 * (EXPLANATION + 2 * FACTS + 1)  # most rows of an explanation of either label


@dataclass
class Tree:
    """What was found out about one question: of each fact the beliefs (p(true | E), p(true | not E)); of the question (under
    None) and of facts their explanations, facts as well, and whether each speaks for it or against it; `left`: rows."""

    claim: Question
    belief: tuple[float, float]
    left: int
    facts: dict[Fact, tuple[float, float]] = field(default_factory=dict)
    explained: dict[Fact | None, dict[tuple[Fact, ...], bool]] = field(default_factory=dict)

    def kept(self, parent: Fact | None) -> dict[tuple[Fact, ...], bool]:
        """Explanations of a statement of which every branch ends in an integral fact."""
        ends = self.grounded if parent is None else self.sure
        return {facts: way for facts, way in self.explained.get(parent, {}).items() if all(map(ends, facts))}

    def grounded(self, fact: Fact) -> bool:
        """Whether a fact is integral or has an explanation that is kept."""
        return self.sure(fact) or bool(self.kept(fact))

    def sure(self, fact: Fact) -> bool:
        """Whether a fact is integral."""
        return integral(self.facts[fact])


class MaieuticPrompting(Method):
    """Maieutic prompting: abduce explanations of either label, recursively, and infer by weighted MAX-SAT (sections 3, 4).

    A statement is integral if the model believes it and not its denial, or the reverse: |p(true | E) - p(true | not E)| >
    0.45. An integral question is answered so. Else

        1. explanations are sampled behind "true" and behind "false" (format <why>), 3 of each at temperature 1; those facts
           of them that are not integral get one more of each at .5 (depth 2);
        2. branches that do not end in integral facts are cut off;
        3. each fact E that is integral is a clause of weight |p - q| / (p + q) for E, or against it; each explanation a clause
           of weight 1, E and E' and ... -> Q or -> not Q; two facts of which one excludes the other, not both, a clause of weight
           1 each way;
        4. the assignment that violates least (exact, by elimination) has the answer. It is told with the explanation that
           speaks for it and is satisfied, the one with the greatest weight.

    Whether an explanation speaks for a statement or against it is what the model says of it behind these facts, a row for each.

    Two rows are spent for the question, one a word of an explanation, two a fact that is new, one an explanation. Each
    question has its rung for itself, and explanations come in pairs, of either label, while it has room for the longest: for one
    of these at 64, for four at 256, for nine at 512.

    Its controls: `maieutic_belief` asks for the question both ways and answers so, without a tree; `maieutic_majority` lets the
    explanations that are kept vote; `maieutic_coin` draws the beliefs in facts at random.

    Differs from the paper: an explanation is up to four facts, not one sentence, and each fact is a proposition, so that a clause
    has several premises; one that is not believed leaves its explanation without force, where the code puts its denial in its
    place and asks what that shows. The denial of a statement is written by the grammar, not by the model. The model stands for
    the RoBERTa of natural language inference, asked one way and with no neutral: each explanation speaks for its statement or
    against it, but, where the code compares all pairs, for no other. Contradictions between facts are seen by their form: one
    subject, one relation, two values. As in the paper the question is in the MAX-SAT; its code reads it off the satisfied
    nodes. Where nothing is kept of a tree it is answered as it is believed; the code says true. Constants are those of the
    code; a sample that is cut or no fact is dropped, not drawn anew, and one that comes again counts once. Of the baselines
    knowledge that is generated first is missing.

    What limits it here: facts are known or not known, more than they are misbelieved. What speaks for a fact is that fact
    again, or two of a law. A claim and its denial are asked with the same two rows, so that `maieutic_belief` tells them apart
    always, and so does each question that needs no tree.
    """

    paper = Paper(
        id="maieutic_prompting",
        title="Maieutic Prompting: Logically Consistent Reasoning with Recursive Explanations",
        authors="Jaehun Jung, Lianhui Qin, Sean Welleck, Faeze Brahman, Chandra Bhagavatula, Ronan Le Bras, Yejin Choi",
        year=2022,
        arxiv="2205.11822",
        code="jaehunjung1/Maieutic-Prompting",
    )
    tasks = ("know/claims",)
    baselines = ("direct_answer", "chain_of_thought", "short_vote", "maieutic_belief", "maieutic_majority")
    claims = (
        Claim(
            "accuracy[maieutic_prompting,*] > accuracy[direct_answer,*] "
            "and accuracy[maieutic_prompting,*] > accuracy[chain_of_thought,*] "
            "and accuracy[maieutic_prompting,*] > accuracy[short_vote,*]",
            says="more right answers than at once, by chain of thought, or by a vote of chains within as many rows",
            headline=True,
        ),
        Claim(
            "agree[maieutic_prompting,*] > agree[direct_answer,*] "
            "and agree[maieutic_prompting,*] > agree[chain_of_thought,*] "
            "and agree[maieutic_prompting,*] > agree[short_vote,*]",
            says="a claim and its denial are told apart more often",
            headline=True,
        ),
        Claim(
            "accuracy[maieutic_prompting,*] > accuracy[maieutic_belief,*]",
            says="trees give more than the two rows that ask for the claim and its denial",
        ),
        Claim(
            "accuracy[maieutic_prompting,128..512] > accuracy[maieutic_majority,128..512] "
            "and accuracy[maieutic_prompting,128..512] > accuracy[maieutic_coin,128..512]",
            says="it is the satisfiability of beliefs and relations, not the number of explanations",
        ),
        Claim(
            "far[maieutic_prompting,*] > far[short_vote,*] and rare[maieutic_prompting,*] > rare[short_vote,*]",
            says="in particular where a claim takes several facts, or a rare one",
        ),
    )
    infer, believe = "maxsat", "asked"
    variants = (
        Variant("maieutic_belief", says="the question asked both ways, no tree", infer="belief"),
        Variant("maieutic_majority", says="the explanations that are kept vote", infer="majority"),
        Variant("maieutic_coin", says="beliefs in facts at random", believe="any"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """A verdict on each claim, with the explanation that speaks for it."""
        claims = [question_of(ids) for ids in batch["question"]]
        held = both_ways(session, claims)
        trees = [Tree(claim, belief, rung - 2) for claim, belief in zip(claims, held, strict=True)]
        if self.infer != "belief":
            growing = [tree for tree in trees if not integral(tree.belief)]
            for _ in range(SAMPLES):
                self.grow(session, [(tree, None) for tree in growing], TEMPERATURES[0])
            self.grow(session, [(tree, fact) for tree in growing for fact in open_facts(tree)], TEMPERATURES[1])
        return [self.answered(tree) for tree in trees]

    def grow(self, session: Session, parents: Sequence[tuple[Tree, Fact | None]], temperature: float) -> None:
        """An explanation more of either label for each statement whose tree has room for it, those first that come first."""
        waiting = list(parents)
        while waiting:
            pairs, fitting, others = Counter[int](), list[tuple[Tree, Fact | None]](), list[tuple[Tree, Fact | None]]()
            for tree, parent in waiting:
                pairs[id(tree)] += 1
                (fitting if tree.left >= PAIR * pairs[id(tree)] else others).append((tree, parent))
            if not fitting:
                return
            self.explain(session, fitting, temperature)
            waiting = others  # a pair takes fewer rows, mostly: there may be room for another

    def explain(self, session: Session, parents: Sequence[tuple[Tree, Fact | None]], temperature: float) -> None:
        """An explanation more of either label for each statement, with what is believed of its facts and what it shows."""
        asks = [(tree, parent, label) for tree, parent in parents for label in SPELT]
        claims = [tree.claim if parent is None else claimed(parent) for tree, parent, _ in asks]
        prompts = [asked(claim, f"<why> {label}") for claim, (*_, label) in zip(claims, asks, strict=True)]
        chains = Chains(session.networks["model"], prompts)
        chains.write(limit=EXPLANATION, temperature=temperature, generator=session.rng)
        new: dict[tuple[int, Fact | None, tuple[Fact, ...]], tuple[Tree, Question]] = {}
        for i, (tree, parent, _) in enumerate(asks):
            tree.left -= chains.rows[i]
            stated = read_facts(decode(chains.written(i)))
            facts = tuple(fact for fact in stated if fact is not None)
            known = facts in tree.explained.get(parent, {})
            if chains.ended(i) and 0 < len(facts) == len(stated) <= FACTS and not known:
                new[id(tree), parent, facts] = tree, claims[i]
        unknown = {
            (key, fact): tree for (key, _, facts), (tree, _) in new.items() for fact in facts if fact not in tree.facts
        }
        found = self.believed(session, [fact for _, fact in unknown])
        for ((_, fact), tree), belief in zip(unknown.items(), found, strict=True):
            tree.facts[fact] = belief
            tree.left -= 2
        shown = [told_facts(facts) for *_, facts in new]
        ways = beliefs(session, [claim for _, claim in new.values()], shown)
        for (_, parent, facts), (tree, _), way in zip(new, new.values(), ways, strict=True):
            tree.explained.setdefault(parent, {})[facts] = way > 0.5
            tree.left -= 1

    def believed(self, session: Session, facts: Sequence[Fact]) -> list[tuple[float, float]]:
        """Beliefs in facts and in their denials."""
        if self.believe == "any":
            drawn = torch.rand(len(facts), 2, generator=session.rng, device=session.device).tolist()
            return [(p, q) for p, q in drawn]
        return both_ways(session, [claimed(fact) for fact in facts])

    def answered(self, tree: Tree) -> list[int]:
        """The verdict of a tree, with an explanation that speaks for it and is satisfied."""
        kept, verdict = tree.kept(None), tree.belief[0] >= tree.belief[1]
        values: dict[Fact | None, bool] = {}
        if self.infer == "majority":
            votes = sum(1 if way else -1 for way in kept.values())
            verdict = votes > 0 if votes else verdict
        elif kept:
            believed = {fact: p >= q for fact, (p, q) in tree.facts.items()}
            values = satisfied(clauses(tree), {None: verdict} | believed)
            verdict = values[None]
        fitting = [facts for facts, way in kept.items() if way == verdict and all(values.get(f, True) for f in facts)]
        best = max(fitting, key=lambda facts: sum(weight(tree.facts[f]) for f in facts), default=())
        return ended(f"{told_facts(best)} ans {SPELT[not verdict]}")


Literal = tuple[Fact | None, bool]  # a fact, or the question (None), that is so or is not
Table = tuple[
    list[Fact | None], NDArray[np.float64]
]  # names, and costs by whether each is as at the start (0) or turned (1)


def integral(belief: tuple[float, float]) -> bool:
    """Whether a statement and its denial are told apart."""
    return abs(belief[0] - belief[1]) > INTEGRAL


def weight(belief: tuple[float, float]) -> float:
    """(p - q) / (p + q)."""
    return (belief[0] - belief[1]) / max(1e-9, sum(belief))


def open_facts(tree: Tree) -> list[Fact]:
    """Facts of the question's explanations that are not integral."""
    facts = dict.fromkeys(fact for each in tree.explained.get(None, {}) for fact in each)
    return [fact for fact in facts if not tree.sure(fact)]


def clauses(tree: Tree) -> list[tuple[list[Literal], float]]:
    """The weighted clauses of what is kept of a tree."""
    parents: list[Fact | None] = [None, *dict.fromkeys(fact for facts in tree.kept(None) for fact in facts)]
    shown = [(parent, facts, way) for parent in parents for facts, way in tree.kept(parent).items()]
    found: list[tuple[list[Literal], float]] = [
        ([*((fact, False) for fact in facts), (parent, way)], 1.0) for parent, facts, way in shown
    ]
    used = dict.fromkeys(fact for _, facts, _ in shown for fact in facts)
    for fact in used:
        if tree.sure(fact):
            belief = weight(tree.facts[fact])
            found.append(([(fact, belief > 0)], abs(belief)))
    for one, other in combinations(used, 2):
        if one[:2] == other[:2]:
            found.append(([(one, False), (other, False)], 2.0))
    return found


def satisfied(
    found: Sequence[tuple[Sequence[Literal], float]], start: Mapping[Fact | None, bool]
) -> dict[Fact | None, bool]:
    """The assignment that violates clauses of the least weight; of equals that which is as `start`, in the question first.

    One name after another is eliminated (Dechter 1999): the clauses in which it stands give way to a table of the least that
    they cost, by what the others in them are. How long that takes hangs on how these are tied up, not on how much is violated,
    which is a lot where a model believes all it is told.
    """
    tables, place = list[Table](), {name: k for k, name in enumerate(start)}  # the order of axes
    for literals, cost in found:
        signs = dict(literals)
        if len(signs) == len(set(literals)):  # else nothing violates it
            scope = sorted(signs, key=place.__getitem__)
            table = np.zeros([2] * len(scope))
            table[tuple(int(start[name] == signs[name]) for name in scope)] = cost
            tables.append((scope, table))
    steps: list[tuple[Fact | None, list[Fact | None], NDArray[np.bool_]]] = []
    while left := {name for scope, _ in tables for name in scope}:
        tied = {name: set[Fact | None]().union(*(own for own, _ in tables if name in own)) for name in left}
        order = sorted(left - {None}, key=place.__getitem__)
        name = min(order, key=lambda name: len(tied[name]), default=None)  # the question last
        scope = sorted(tied[name], key=place.__getitem__)
        costs, axis = np.zeros([2] * len(scope)), scope.index(name)
        for own, table in tables:
            if name in own:
                costs = costs + table.reshape([2 if other in own else 1 for other in scope])
        scope.remove(name)
        steps.append((name, scope, np.asarray(costs.take(1, axis) < costs.take(0, axis) - 1e-9)))
        tables = [(own, table) for own, table in tables if name not in own] + [(scope, costs.min(axis))]
    turned: dict[Fact | None, int] = {}
    for name, scope, better in reversed(steps):
        turned[name] = int(better[tuple(turned[other] for other in scope)])
    return {name: value != bool(turned.get(name)) for name, value in start.items()}
