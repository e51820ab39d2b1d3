"""ImplicitRelations: naming the relations that a question needs, apart from answering it (Katz, Geva and Berant, 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepmark.backbones.reasoners import decode, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.knowing import (
    VERBS,
    Question,
    asked,
    gold_needs,
    gold_steps,
    question_of,
    route,
    texts,
    told_facts,
)
from stepmark.tracks.reasoning.solving import prompts

NEEDS, ANSWER = 12, 36  # most tokens of the relations, and of an answer with its facts


class ImplicitRelations(Method):
    """ImplicitRelations: which concept-relation pairs does a question need, and where does answering it fail?

    "alma talk dipo ?" names neither homes nor tongues. Two things are asked apart:

        1. Inference of implicit relations: the model lists the pairs, here "alma home land tongue , dipo tongue" (<needs>), of
           whom or what, and by which way. `pairs` is the F1 of its list against the question's own.
        2. Question answering behind such a list, in the format <cot>: facts, then yes or no. Decoupled, the list is the
           model's own (the method), the question's own (`relations_gold`), or that with all facts told as well
           (`relations_gold_facts`); without any list it is `chain_of_thought`, and `direct_answer` has no facts either.

    What answers gain by gold relations is what was lacking in planning, what they gain by gold facts on top in knowing and
    retrieving them (section 5).

    Controls: `relations_usual` lists for each verb one way, that of people, whatever the question is about, the commonest;
    `relations_facts` tells the facts without a list.

    All at the likeliest token; what a rung holds beyond the end of a text is left.

    Differs from the paper: a trained format for few-shot prompts. A pair counts where concept and way are the question's to
    the word, as there is one wording; the paper aligns them by overlap and by similarity. The paper answers without steps,
    here facts are told on the way in all arms.

    What limits it here: six verbs, ten things that are had. Four combinations of a verb and kinds of things were in none of
    the model's examples (`unseen`).
    """

    paper = Paper(
        id="implicit_relations",
        title="Inferring Implicit Relations in Complex Questions with Language Models",
        authors="Uri Katz, Mor Geva, Jonathan Berant",
        year=2022,
        arxiv="2204.13778",
        code="katzurik/ImplicitRelations",
    )
    tasks = ("know/could",)
    baselines = ("direct_answer", "chain_of_thought", "relations_gold", "relations_gold_facts", "relations_usual")
    claims = (
        Claim(
            "pairs[implicit_relations,64..128] > 0.7 "
            "and accuracy[relations_gold_facts,64..128] - accuracy[relations_gold,64..128] "
            "> accuracy[relations_gold,64..128] - accuracy[chain_of_thought,64..128]",
            says="relations are mostly inferred, and answers lack facts more than they lack relations",
            headline=True,
        ),
        Claim(
            "accuracy[implicit_relations,64..128] >= accuracy[relations_gold,64..128] - 0.02",
            says="with relations of its own the model answers about as well as with those of the question",
        ),
        Claim(
            "pairs[implicit_relations,64..128] > pairs[relations_usual,64..128] + 0.05 "
            "and unseen[implicit_relations,64..128] > unseen[relations_usual,64..128]",
            says="it is the question that tells them, not its verb alone",
        ),
        Claim(
            "accuracy[relations_gold_facts,64..128] > accuracy[relations_facts,64..128]",
            says="facts alone are not all that is lacking",
        ),
    )
    relations, facts = "own", False
    variants = (
        Variant("relations_gold", says="the question's relations are told", relations="gold"),
        Variant("relations_gold_facts", says="its relations and its facts are told", relations="gold", facts=True),
        Variant("relations_facts", says="its facts are told, no relations", relations="", facts=True),
        Variant("relations_usual", says="for each verb the way of people", relations="usual"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """Relations and an answer for each question."""
        questions, left = [question_of(ids) for ids in batch["question"]], [rung] * len(batch["question"])
        named = [f"<needs> {text} <cot>" if text else "<cot>" for text in self.named(session, batch, questions, left)]
        shown = [told_facts(gold_steps(question)) if self.facts else "" for question in questions]
        asks = [asked(*each) for each in zip(questions, named, shown, strict=True)]
        answers = texts(session, asks, ANSWER, left)
        return [[*encode(text), *answer] for text, answer in zip(named, answers, strict=True)]

    def named(
        self, session: Session, batch: Mapping[str, Any], questions: Sequence[Question], left: list[int]
    ) -> list[str]:
        """The relations that are listed for each question."""
        if self.relations == "own":
            return [decode(words) for words in texts(session, prompts(batch, "<needs>"), NEEDS, left)]
        if self.relations == "usual":
            return [usual(question) for question in questions]
        return [gold_needs(question) if self.relations else "" for question in questions]


def usual(question: Question) -> str:
    """The way from people to what a verb is about, for both of whom or what a question is about."""
    way = " ".join(route("person", VERBS[question.path[0]]))
    return " , ".join(f"{word} {way}" for word in (question.subject, question.others[0]))
