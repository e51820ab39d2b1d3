"""Step-Back Prompting: a broader question is asked first, and what answers it is read beside the rest (Zheng et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepmark.backbones.reasoners import decode, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.knowing import (
    Question,
    asked,
    cited,
    opened,
    pages,
    question_of,
    retrieved,
    texts,
    told,
)
from stepmark.tracks.reasoning.populations import drawn
from stepmark.tracks.reasoning.solving import prompts

# Most tokens of a broader question, of a page by heart, and of an answer with its facts.
BROADER, PAGE, ANSWER = 3, 32, 32


class StepBackPrompting(Method):
    """Step-Back Prompting: abstraction, then reasoning that is grounded in it (sections 2 and 5).

        1. Abstraction: the format <back> turns the question into a broader one, "where did alma work in year 5" into
           "alma past", what there is to tell of alma's past.
        2. Retrieval: for each of the two questions the page that fits it best by BM25. The years of a question stand on no
           page, so that its words alone find pages in which the name stands more often.
        3. Reasoning: the pages stand before the question itself, which is answered in the format <cot>.

    All at the likeliest token. It costs the words of the broader question, three, and those of the answer; what a rung holds
    beyond is left. The pages that were read are named in the answer (`see TITLE .`), for the recall of retrieval.

    Its arms: `step_back_original` retrieves with the question alone, as many pages, the paper's retrieval-augmented baseline.
    `step_back_recited` has no store: the model answers the broader question itself, by heart, as the paper has it of principles.
    Controls: `step_back_any` takes any page of whom the question is about in the place of a step back; `step_back_wide`
    retrieves twice as many with the question alone, which are all four of a person's, and needs no step back.

    Differs from the paper: no code is published. A format that the model was trained in stands for the few-shot prompt, and a
    page's title for the broader question, in the same words each time; on years a step back without a fault is always the
    page of the past. One page is retrieved for a question. Of questions of several relations the broader one is about the
    first of them. A row is a row however long its prompt: what pages cost to read shows in NFE-equivalents.

    What limits it here: physics and chemistry, where a principle is asked for, have no task. A second relation's page cannot
    be found by the words of a question, broad or narrow.
    """

    paper = Paper(
        id="step_back_prompting",
        title="Take a Step Back: Evoking Reasoning via Abstraction in Large Language Models",
        authors="Huaixiu Steven Zheng, Swaroop Mishra, Xinyun Chen, Heng-Tze Cheng, Ed H. Chi, Quoc V Le, Denny Zhou",
        year=2023,
        arxiv="2310.06117",
    )
    tasks = ("know/years", "know/hops")
    baselines = ("chain_of_thought", "direct_answer", "short_vote", "step_back_original", "step_back_any")
    claims = (
        Claim(
            "accuracy[step_back_prompting,*] > accuracy[chain_of_thought,*] "
            "and accuracy[step_back_prompting,*] > accuracy[direct_answer,*] "
            "and accuracy[step_back_prompting,*] > accuracy[short_vote,*] "
            "and accuracy[step_back_prompting,*] > accuracy[step_back_original,*] "
            "and accuracy[step_back_prompting,*] > accuracy[step_back_any,*]",
            says="more right answers about years than by chain of thought, by a vote of chains, at once, with what the question "
            "alone finds, or with any page of the person",
            headline=True,
        ),
        Claim(
            "accuracy[step_back_prompting,32..128] > accuracy[chain_of_thought,32..128] "
            "and accuracy[step_back_prompting,32..128] > accuracy[step_back_original,32..128]",
            says="and about several relations",
            task="know/hops",
            headline=True,
            setting="pages hold one relation's facts each and are found by their words alone: a broader question leads to the "
            "first of them, as the question itself does; the paper's passages of MuSiQue tell of more",
        ),
        Claim(
            "found[step_back_prompting,*] > found[step_back_original,*]",
            says="it is the pages: more of those that are needed are found, among as many",
        ),
        Claim(
            "accuracy[step_back_prompting,*] >= accuracy[step_back_wide,*] - 0.02 "
            "and nfe_equivalent[step_back_prompting,*] < nfe_equivalent[step_back_wide,*]",
            says="what it reads is as good as all pages of the person, for less",
        ),
        Claim(
            "accuracy[step_back_recited,64..128] > accuracy[chain_of_thought,64..128]",
            says="without a store, what the model tells of the broader question helps it",
            setting="the paper asks the model for principles of physics and chemistry, here it tells facts",
        ),
    )
    back, each = "asked", 1  # where the broader question comes from ("": there is none), and pages for a question
    recited = False
    variants = (
        Variant("step_back_original", says="pages for the question alone, as many", back="", each=2),
        Variant(
            "step_back_wide",
            says="pages for the question alone, twice as many",
            back="",
            each=4,
            tasks=("know/years",),
        ),
        Variant(
            "step_back_recited",
            says="no store: the page of the broader question by heart",
            recited=True,
            tasks=("know/years",),
        ),
        Variant(
            "step_back_any",
            says="any page of whom the question is about in its place",
            back="any",
            tasks=("know/years",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The pages that were read and an answer, of each question."""
        questions, left = [question_of(ids) for ids in batch["question"]], [rung] * len(batch["question"])
        broader = self.broader(session, batch, questions, left)
        seen = [[] if self.recited else self.found(q, back) for q, back in zip(questions, broader, strict=True)]
        shown = by_heart(session, broader, left) if self.recited else [opened(titles) for titles in seen]
        asks = [asked(question, "<cot>", text) for question, text in zip(questions, shown, strict=True)]
        answers = texts(session, asks, ANSWER, left)
        return [[*encode(cited(titles)), *answer] for titles, answer in zip(seen, answers, strict=True)]

    def broader(
        self, session: Session, batch: Mapping[str, Any], questions: Sequence[Question], left: list[int]
    ) -> list[str]:
        """The broader question of each."""
        if self.back == "asked":
            return [decode(words) for words in texts(session, prompts(batch, "<back>"), BROADER, left)]
        if self.back == "any":
            own = [[title for title in pages() if title.split()[0] == question.subject] for question in questions]
            return [titles[drawn(session, [1.0] * len(titles), 1)[0]] for titles in own]
        return ["" for _ in questions]

    def found(self, question: Question, broader: str) -> list[str]:
        """Titles of the pages that fit the question and the broader one best, each once."""
        return list(dict.fromkeys([*retrieved(broader, self.each), *retrieved(told(question), self.each)]))


def by_heart(session: Session, broader: Sequence[str], left: list[int]) -> list[str]:
    """What the model tells of each broader question, as a page, for half of what is left."""
    room = [rows // 2 for rows in left]
    told_so = texts(session, [encode(f"{title} :") for title in broader], PAGE, room)
    left[:] = [rows - len(own) for rows, own in zip(left, told_so, strict=True)]
    return [f"{title} : {decode(own)}" for title, own in zip(broader, told_so, strict=True)]
