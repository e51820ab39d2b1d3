"""LAMBADA: depth-first backward chaining by four modules (Kazemi et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.deducing import (
    LONGEST_PROOF,
    SPELT,
    Ask,
    Choose,
    Question,
    Search,
    Statement,
    about,
    implications,
    question_of,
    said,
    side_by_side,
    single,
    verdicts,
    whole_proof,
)
from stepmark.tracks.reasoning.populations import drawn

GUESS = 1  # row that is kept for an answer at once


@dataclass(frozen=True)
class Proof:
    """What settles a goal: the steps from a fact on, and whether the goal is proved or disproved."""

    steps: tuple[tuple[Statement, ...], ...]
    proved: bool


class Lambada(Method):
    """LAMBADA: from the question back to the facts, depth first, each decision one call of a module (algorithms 1 and 2).

        settle(G, D):  Fact Check: does a fact prove or disprove G? Then that is it.
                       D = 0: unknown.
                       Rule Selection: for each rule whose end unifies with G
                           Goal Decomposition: what is to be shown instead, G'
                           settle(G', D - 1) is proved:
                               Sign Agreement of the rule and G: proved, else disproved
                       unknown

    Two modules take two steps, as in the paper. Fact Check selects the fact of greatest log-likelihood behind all statements
    and the goal, and then verifies it from the fact and the goal alone; it counts where the reply says that fact again and
    true or false. Rule Selection has the model say what each rule gives (format <infer>), once for all goals of a question,
    and takes the rules whose end is the goal's. Both of these, <goal> and <agree> read one or two statements; the choice
    of a fact reads all. Words are the likeliest. A goal that was asked before has the same end, one that is still being
    worked on is unknown, so that circles end. The proof that is returned is the way that was found, turned round. What is
    still unknown when the search or the rung ends is answered at once, in the format <dir>, for which a row is kept.

    D is 8. The rung ends the search; it makes it no wider. What the rules give costs three rows a rule, at once; a goal
    a row for each fact, one for the prompt and one for "unknown", or four for a fact; a rule that is tried three, a
    sign one. At 16 nothing fits, at 64 a proof by a rule or two, at 128 one by five, whichever branch comes first.

    Differs from the paper: no code is published. All rules here have one premise, so that a goal is decomposed into one, and
    shorter rules first, the paper's order, is the order of the prompt. That ends unify is seen word by word; the paper asks
    its model. Modules are formats that the model was trained in, not prompts with examples. The paper may answer unknown; no
    question of these tasks has that answer.

    Its control, `lambada_any_rules`, selects two rules at random.

    What limits it here: the chain of the other being ends in the same word, and backward nothing tells which of the two it
    is before the facts are reached. Half the time the search goes down the wrong one first. Statements that lead nowhere hang
    on the chains forward; backward none of them is met, and no goal on the way is one that a negated fact disproves. Statements
    have one form, so that what a rule gives is easily read.
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
            "and valid[lambada,128..512] > valid[chain_of_thought,128..512] "
            "and accuracy[lambada,128..512] > accuracy[lambada_any_rules,128..512]",
            says="more right answers than forward reasoning, step by step or in one go, and than by any rules, and more valid "
            "proofs than in one go",
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
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """A proof of each question, or an answer at once."""
        questions = [question_of(question) for question in batch["question"]]
        searches = [self.solve(session, question) for question in questions]
        proofs, _ = side_by_side(session, searches, [rung - GUESS] * len(questions))
        open_ones = [i for i, proof in enumerate(proofs) if proof is None]
        guesses = verdicts(session, [batch["question"][i] for i in open_ones], [""] * len(open_ones))
        guessed = dict(zip(open_ones, guesses, strict=True))
        return [
            whole_proof((), guessed[i]) if proof is None else whole_proof(proof.steps, str(proof.proved).lower())
            for i, proof in enumerate(proofs)
        ]

    def solve(self, session: Session, question: Question) -> Search[Proof | None]:
        """Settle the goal of a question, after what its rules give has been asked."""
        ends = (yield from implications(question)) if self.select == "asked" else []
        rules = Rules(question, ends, session)
        return (yield from self.settle(rules, question.goal, self.depth, {}))

    def settle(
        self, rules: Rules, goal: Statement, depth: int, seen: dict[Statement, Proof | None]
    ) -> Search[Proof | None]:
        """Proved, disproved or unknown (None), asked for once."""
        if goal not in seen:
            seen[goal] = None
            seen[goal] = yield from self.search(rules, goal, depth, seen)
        return seen[goal]

    def search(
        self, rules: Rules, goal: Statement, depth: int, seen: dict[Statement, Proof | None]
    ) -> Search[Proof | None]:
        """Algorithm 1."""
        question = rules.question
        fact = single((yield Choose(about(question.statements, goal, "<holds>"), tuple(question.facts))))
        assert fact is not None  # one of the facts
        reply = yield Ask(about([fact], goal, "<holds>"), 4, ("unknown", *SPELT))
        if reply in [f"{said(fact)} {verdict}" for verdict in SPELT]:
            return Proof(((fact,),), reply.endswith(SPELT[0]))
        if depth == 0:
            return None
        for rule in rules.selected(goal):
            below = single((yield Ask(f"{said(rule)} ? {said(goal)} <goal>", 3)))
            proof = None if below is None else (yield from self.settle(rules, below, depth - 1, seen))
            if proof is not None and proof.proved:
                agrees = (yield Ask(f"{said(rule)} ? {said(goal)} <agree>", 1)) == "yes"
                new = (goal[0], goal[1] == agrees, goal[2])
                return Proof((*proof.steps, (rule, new)), agrees)
        return None


@dataclass(frozen=True)
class Rules:
    """The rules of a question and what the model says that each gives; without that, any two are selected."""

    question: Question
    ends: Sequence[Statement | None]
    session: Session

    def selected(self, goal: Statement) -> list[Statement]:
        """Rule Selection."""
        rules = self.question.rules
        if self.ends:
            return [r for r, end in zip(rules, self.ends, strict=True) if end is not None and end[::2] == goal[::2]]
        return [rules[k] for k in drawn(self.session, [1.0] * len(rules), min(2, len(rules)))]
