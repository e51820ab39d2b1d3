"""Step-Back Prompting: a broader question is asked first, and what answers it is read beside the rest (Zheng et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import decode, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.knowing import Question, asked, cited, opened, pages, question_of, retrieved, told
from stepmark.tracks.reasoning.populations import drawn
from stepmark.tracks.reasoning.solving import left, prompts

BROADER, PAGE, ANSWER = (
    3,
    32,
    32,
)  # most tokens of a broader question, of a page by heart, and of an answer with its facts


class StepBackPrompting(Method):
    """Step-Back Prompting: abstraction, then reasoning that is grounded in it (section 2).

        1. Abstraction: the format <back> turns the question into a broader one, "where did alma work in year 5" into
           "alma past", what there is to tell of alma's past.
        2. Retrieval: for each of the two questions the page that fits it best by BM25. The years of a question stand on no
           page, so that its words alone find pages in which the name stands more often (section 5).
        3. Reasoning: the pages stand before the question itself, which is answered in the format <cot>.

    All at the likeliest token. It costs the words of the broader question and those of the answer; what a rung holds beyond
    is left. The pages that were read are named in the answer (`see TITLE .`), for the recall of retrieval.

    Its arms: `step_back_original` retrieves with the question alone, as many pages; `step_back_wide` with the question alone,
    twice as many, which are all four of a person's. `step_back_recited` has no store: the model answers the broader question
    itself, by heart, as the paper has it of principles. Controls: `step_back_any` takes any page of whom the question is
    about in the place of a step back, `step_back_past` always the one of the past, which is what a step back without a fault
    comes to where all questions are about years.

    Differs from the paper: no code is published. A format that the model was trained in stands for the few-shot prompt, and a
    page's title for the broader question. One page is retrieved for a question. Of questions of several relations the
    broader one is about the first of them.

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
    baselines = ("know_direct", "know_cot", "know_vote", "step_back_original", "step_back_wide", "step_back_any")
    claims = (
        Claim(
            "accuracy[step_back_prompting,64..512] > accuracy[know_cot,64..512] "
            "and accuracy[step_back_prompting,64..512] > accuracy[know_direct,64..512] "
            "and accuracy[step_back_prompting,64..512] > accuracy[step_back_original,64..512]",
            says="more right answers about years than by chain of thought, at once, or with what the question alone finds",
            headline=True,
        ),
        Claim(
            "accuracy[step_back_prompting,64..512] > accuracy[know_cot,64..512] "
            "and accuracy[step_back_prompting,64..512] > accuracy[step_back_original,64..512]",
            says="and about several relations",
            task="know/hops",
            headline=True,
            setting="pages hold one relation's facts each and are found by their words alone: a broader question leads to the "
            "first of them, as the question itself does; the paper's passages of MuSiQue tell of more",
        ),
        Claim(
            "found[step_back_prompting,64..512] > found[step_back_original,64..512]",
            says="it is the pages: more of those that are needed are found, among as many",
        ),
        Claim(
            "accuracy[step_back_prompting,64..512] > accuracy[step_back_any,64..512]",
            says="and it is the step back, not any page of the person",
        ),
        Claim(
            "accuracy[step_back_recited,64..512] > accuracy[know_cot,64..512]",
            says="without a store, what the model tells of the broader question helps it",
            setting="the paper asks the model for principles of physics and chemistry, here it tells facts",
        ),
    )
    back, each = "asked", 1  # where the broader question comes from ("": there is none), and pages for a question
    recited = False
    variants = (
        Variant("step_back_original", says="pages for the question alone, as many", back="", each=2),
        Variant("step_back_wide", says="pages for the question alone, twice as many", back="", each=4),
        Variant("step_back_recited", says="no store: the page of the broader question by heart", recited=True),
        Variant("step_back_any", says="any page of whom the question is about in its place", back="any"),
        Variant("step_back_past", says="always the page of the past", back="past", tasks=("know/years",)),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The pages that were read and an answer, of each question."""
        questions = [question_of(ids) for ids in batch["question"]]
        broader = self.broader(session, batch, questions)
        seen = [[] if self.recited else self.found(q, back) for q, back in zip(questions, broader, strict=True)]
        shown = self.by_heart(session, batch, broader) if self.recited else [opened(titles) for titles in seen]
        asks = [asked(question, "<cot>", text) for question, text in zip(questions, shown, strict=True)]
        chains = Chains(session.networks["model"], asks)
        chains.write(limit=min(ANSWER, left(session, batch)))
        return [[*encode(cited(titles)), *chains.written(i)] for i, titles in enumerate(seen)]

    def broader(self, session: Session, batch: Mapping[str, Any], questions: Sequence[Question]) -> list[str]:
        """The broader question of each."""
        if self.back == "asked":
            chains = Chains(session.networks["model"], prompts(batch, "<back>"))
            chains.write(limit=BROADER)
            return [decode(chains.written(i)) for i in range(len(chains))]
        if self.back == "any":
            own = [[title for title in pages() if title.split()[0] == question.subject] for question in questions]
            return [titles[drawn(session, [1.0] * len(titles), 1)[0]] for titles in own]
        return [f"{question.subject} {self.back}" if self.back else "" for question in questions]

    def found(self, question: Question, broader: str) -> list[str]:
        """Titles of the pages that fit the question and the broader one best, each once."""
        return list(dict.fromkeys([*retrieved(broader, self.each), *retrieved(told(question), self.each)]))

    @staticmethod
    def by_heart(session: Session, batch: Mapping[str, Any], broader: Sequence[str]) -> list[str]:
        """What the model tells of each broader question, as a page."""
        chains = Chains(session.networks["model"], [encode(f"{title} :") for title in broader])
        chains.write(limit=min(PAGE, left(session, batch) // 2))
        return [f"{title} : {decode(chains.written(i))}" for i, title in enumerate(broader)]
