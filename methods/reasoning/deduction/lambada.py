"""LAMBADA: depth-first backward chaining by four modules (Kazemi et al., 2022)."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.deducing import (
    LONGEST_PROOF,
    Ask,
    Question,
    Statement,
    about,
    listed,
    question_of,
    said,
    side_by_side,
    single,
    verdicts,
    whole_proof,
)
from stepmark.tracks.reasoning.populations import drawn

GUESS = 1  # row that is kept for an answer at once
LISTED = 13  # words of four rules and "done"


@dataclass(frozen=True)
class Proof:
    """What settles a goal: the steps from a fact on, and whether the goal is proved or disproved."""

    steps: tuple[tuple[Statement, ...], ...]
    proved: bool


Search = Generator[Ask, str, Proof | None]


class Lambada(Method):
    """LAMBADA: from the question back to the facts, depth first, each decision one call of a module (algorithms 1 and 2).

        settle(G, D):  Fact Check: does a fact prove or disprove G? Then that is it.
                       D = 0: unknown.
                       Rule Selection: for each rule whose end unifies with G
                           Goal Decomposition: what is to be shown instead, G'
                           settle(G', D - 1) is proved:
                               Sign Agreement of the rule and G: proved, else disproved
                       unknown

    A goal that was asked before has the same end, one that is still being worked on is unknown, so that circles end. The
    modules are the formats <holds>, <rules>, <goal> and <agree>, at the likeliest words. The first two read all
    statements, the others the rule and the goal alone. A fact or a rule that is not in the prompt counts as not named. The
    proof that is returned is the way that was found, turned round. What is still unknown when the search or the rung ends
    is answered at once, in the format <dir>, for which a row is kept.

    D is 8. The rung ends the search; it makes it no wider. A goal costs a row for "unknown", four words for a fact, three for
    a rule and one for the end of the list; a rule that is tried costs three, and a sign one. At 16 not even a proof by one rule
    fits, at 128 one by six rules does, whichever branch comes first.

    Differs from the paper: no code is published. All rules here have one premise, so that a goal is decomposed into one, and
    shorter rules first, the paper's order, is the order in which they are named. Rules are named in one call; the paper
    first asks for the end of each rule. Modules are formats that the model was trained in, not prompts with examples. The
    paper may answer unknown; no question of these tasks has that answer.

    Its controls: `lambada_any_rules` selects two rules at random, `lambada_exact_rules` those that unify, by a look at the
    prompt, a bound.

    What limits it here: the chain of the other being ends in the same word, and backward nothing tells which of the two it
    is before the facts are reached. Half the time the search goes down the wrong one first. Statements that lead nowhere hang
    on the chains forward; backward none of them is met, and no goal on the way is one that a negated fact disproves.
    """

    paper = Paper(
        id="lambada",
        title="LAMBADA: Backward Chaining for Automated Reasoning in Natural Language",
        authors="Mehran Kazemi, Najoung Kim, Deepti Bhatia, Xin Xu, Deepak Ramachandran",
        year=2022,
        arxiv="2212.13894",
    )
    tasks = ("deduce/chains", "deduce/dense", "deduce/deep")
    baselines = ("chain_of_thought", "selection_inference", "self_consistency", "lambada_any_rules")
    claims = (
        Claim(
            "accuracy[lambada,128..512] > accuracy[selection_inference,128..512] "
            "and accuracy[lambada,128..512] > accuracy[chain_of_thought,128..512] "
            "and valid[lambada,128..512] > valid[chain_of_thought,128..512]",
            says="more right answers than forward reasoning, step by step or in one go, and more valid proofs",
            headline=True,
        ),
        Claim(
            "accuracy[lambada,256..512] > accuracy[selection_inference,256..512] "
            "and accuracy[lambada,256..512] > accuracy[chain_of_thought,256..512] "
            "and valid[lambada,256..512] > valid[chain_of_thought,256..512]",
            says="in particular where proofs are deep",
            task="deduce/deep",
            headline=True,
            setting="six steps, of which the model has seen five",
        ),
        Claim(
            "accuracy[lambada,128..512] > accuracy[self_consistency,128..512] "
            "and valid[lambada,128..512] > valid[self_consistency,128..512]",
            says="and than a vote of proofs within as many rows",
        ),
        Claim(
            "nfe[lambada,128..512] < nfe[selection_inference,128..512]",
            says="with fewer rows of the model than forward chaining, which takes one for each statement that it scores",
        ),
        Claim(
            "valid[lambada,128..512] > valid[lambada_any_rules,128..512]",
            says="it is the selected rules that lead to proofs",
        ),
    )
    select, depth = "asked", LONGEST_PROOF
    variants = (
        Variant("lambada_any_rules", says="two rules at random are selected", select="any", tasks=("deduce/chains",)),
        Variant(
            "lambada_exact_rules",
            says="the rules that unify are selected: a bound",
            select="exact",
            tasks=("deduce/chains",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """A proof of each question, or an answer at once."""
        questions = [question_of(question) for question in batch["question"]]
        searches = [self.settle(session, question, question.goal, self.depth, {}) for question in questions]
        proofs, _ = side_by_side(session, searches, [rung - GUESS] * len(questions))
        open_ones = [i for i, proof in enumerate(proofs) if proof is None]
        guesses = verdicts(session, [batch["question"][i] for i in open_ones], [""] * len(open_ones))
        guessed = dict(zip(open_ones, guesses, strict=True))
        return [
            whole_proof((), guessed[i]) if proof is None else whole_proof(proof.steps, str(proof.proved).lower())
            for i, proof in enumerate(proofs)
        ]

    def settle(
        self, session: Session, question: Question, goal: Statement, depth: int, seen: dict[Statement, Proof | None]
    ) -> Search:
        """Proved, disproved or unknown (None), asked for once."""
        if goal not in seen:
            seen[goal] = None
            seen[goal] = yield from self.search(session, question, goal, depth, seen)
        return seen[goal]

    def search(
        self, session: Session, question: Question, goal: Statement, depth: int, seen: dict[Statement, Proof | None]
    ) -> Search:
        """Algorithm 1."""
        reply = yield Ask(about(question.statements, goal, "<holds>"), 4, ("unknown", "true", "false"))
        fact, _, verdict = reply.rpartition(" ")
        named = single(fact)
        if named is not None and named in question.facts and verdict in ("true", "false"):
            return Proof(((named,),), verdict == "true")
        if depth == 0:
            return None
        for rule in (yield from self.rules(session, question, goal)):
            below = single((yield Ask(f"{said(rule)} ? {said(goal)} <goal>", 3)))
            proof = None if below is None else (yield from self.settle(session, question, below, depth - 1, seen))
            if proof is not None and proof.proved:
                agrees = (yield Ask(f"{said(rule)} ? {said(goal)} <agree>", 1)) == "yes"
                new = (goal[0], goal[1] == agrees, goal[2])
                return Proof((*proof.steps, (rule, new)), agrees)
        return None

    def rules(self, session: Session, question: Question, goal: Statement) -> Generator[Ask, str, list[Statement]]:
        """Rule Selection."""
        if self.select == "asked":
            reply = yield Ask(about(question.statements, goal, "<rules>"), LISTED, ("done",))
            return listed(reply, question.rules)
        if self.select == "any":
            chosen = drawn(session, [1.0] * len(question.rules), min(2, len(question.rules)))
            return [question.rules[k] for k in chosen]
        return [rule for rule in question.rules if rule[2] == goal[2]]
