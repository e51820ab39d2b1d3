"""Maieutic prompting: explanations of either answer, recursively, and what satisfies most of them (Jung et al., 2022)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch

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
EXPLANATION, FACTS = 17, 4  # most tokens and facts of an explanation; longer ones are dropped
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
        4. the assignment that violates least (branch and bound, exact) has the answer. It is told with the explanation that
           speaks for it and is satisfied, the one with the greatest weight.

    Whether an explanation speaks for a statement or against it is what the model says of it behind these facts, a row for each.

    Two rows are spent for the question, one a word of an explanation, two a fact that is new, one an explanation. Each
    question has its rung for itself, and explanations come in pairs, of either label, while it has room for the longest: at 64
    there is mostly one pair, from 256 on the whole tree.

    Its controls: `maieutic_belief` asks for the question both ways and answers so, without a tree; `maieutic_majority` lets the
    explanations that are kept vote; `maieutic_coin` draws the beliefs in facts at random.

    Differs from the paper: an explanation is up to four facts, not one sentence, and each fact is a proposition, so that a clause
    has several premises; one that is not believed leaves its explanation without force, where the code puts its denial in its
    place and asks what that shows. The denial of a statement is written by the grammar, not by the model. The model stands for
    the RoBERTa of natural language inference, and contradictions between facts are seen by their form: one subject, one
    relation, two values. As in the paper the question is in the MAX-SAT; its code reads it off the satisfied nodes. Where
    nothing is kept of a tree it is answered as it is believed; the code says true. Constants are those of the code; a sample
    that is cut or no fact is dropped, not drawn anew.

    What limits it here: facts are known or not known, more than they are misbelieved. What speaks for a fact is that fact
    again, or two of a law.
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
            "and accuracy[maieutic_prompting,*] > accuracy[short_vote,*] "
            "and accuracy[maieutic_prompting,*] > accuracy[maieutic_belief,*]",
            says="more right answers than at once, by chain of thought, by a vote of chains within as many rows, or by asking "
            "both ways without a tree",
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
    """The assignment that violates clauses of the least weight; of equals the one that is met first, `start` before others.

    Whoever does better than `start` satisfies one of the clauses that it violates: one of its literals is turned, for good,
    or the clause is paid, and so on, while what has been paid is less than the best.
    """

    def broken(values: Mapping[Fact | None, bool]) -> list[int]:
        return [k for k, (literals, _) in enumerate(found) if all(values[name] != sign for name, sign in literals)]

    def cost(values: Mapping[Fact | None, bool]) -> float:
        return sum(found[k][1] for k in broken(values))

    best = dict(start)
    least = cost(best)

    def search(values: dict[Fact | None, bool], turned: frozenset[Fact | None], paid: frozenset[int]) -> None:
        nonlocal best, least
        if sum(found[k][1] for k in paid) >= least - 1e-9:
            return
        due = [k for k in broken(values) if k not in paid]
        if not due:
            best, least = values, cost(values)
            return
        k = min(due, key=lambda k: sum(name not in turned for name, _ in found[k][0]))
        search(values, turned, paid | {k})
        for name, sign in dict.fromkeys(found[k][0]):
            if name not in turned:
                search(values | {name: sign}, turned | {name}, paid)

    search(best, frozenset(), frozenset())
    return best
