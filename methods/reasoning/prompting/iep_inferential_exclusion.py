"""Inferential Exclusion Prompting: what each option would mean, and what contradicts goes (Tong et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import WORDS, decode, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.knowing import (
    CHECKS,
    KINDS,
    VERDICTS,
    Question,
    asked,
    ended,
    question_of,
    recalled,
    texts,
)
from stepmark.tracks.reasoning.populations import drawn
from stepmark.tracks.reasoning.solving import prompts

RECALL, WRITTEN = 7, 40  # most tokens of a chain of thought in front (a fact, the answer, the end), and of a whole text


class InferentialExclusion(Method):
    """Inferential Exclusion Prompting (IEP): a plan of possible answers, an inference from each, and elimination.

    Forward: the options are the plan. Backward, in one text of the format <exclude>, option by option: if carlo were alma's
    mate they would live in one town, so where does he live, and is that a contradiction, neutral or an entailment? The model
    gives each fact and after it the probabilities of the three relations,

        alma home bana . boris home gole impossible . carlo home bana sure . ...

    of which the likeliest goes into the text. Options that contradict are excluded; of the rest the one with the greatest
    probability of entailment is the answer, and where all are excluded the one with the least of contradiction.

    It costs two rows an option and one for whom the question is about, nine in all, whatever the rung.

    Its arms: `iep_written` lets the model write the whole text, its answer too, in 27 tokens: the elimination is its own, as
    in the paper's prompt; 16 tokens cut it. `iep_with_cot` puts the fact that the model recalls by chain of thought in front, as
    the paper combines the two, seven rows more. Controls: `iep_surest` excludes nothing and takes the option with the greatest
    probability of entailment; `iep_guess` excludes alike, then takes any option that is left; `iep_random` excludes as many
    options at random; `iep_likelihood` takes the likeliest option behind "alma mate", a row in all.

    Differs from the paper: no code is published, and this follows its description. But in `iep_written`, options are excluded
    by the probabilities of the relations, outside the model, and the text has its format whatever the model would write; the
    answer is one of the options, which of a chain of thought nobody makes sure. A format that the model was trained in stands
    for the few-shot prompt, and options, given by the task, for a list that the model makes. That the recalled fact stands
    before a question of options was in none of the model's examples.

    What limits it here: an option can contradict by one law alone; where one, of four, does, three are left. That an option
    entails is nothing but the fact that is asked for, once more: whoever knows it needs no exclusion.
    """

    paper = Paper(
        id="iep_inferential_exclusion",
        title="Eliminating Reasoning via Inferring with Planning: A New Framework to Guide LLMs' Non-linear Thinking",
        authors="Yongqi Tong, Yifan Wang, Dawei Li, Sizhe Wang, Zi Lin, Simeng Han, Jingbo Shang",
        year=2023,
        arxiv="2310.12342",
    )
    tasks = ("know/options",)
    baselines = ("chain_of_thought", "direct_answer", "short_vote", "iep_written", "iep_likelihood")
    claims = (
        Claim(
            "accuracy[iep_inferential_exclusion,*] > accuracy[chain_of_thought,*] "
            "and accuracy[iep_inferential_exclusion,*] > accuracy[direct_answer,*] "
            "and accuracy[iep_inferential_exclusion,*] > accuracy[short_vote,*]",
            says="more right answers by exclusion than by chain of thought, at once, or by a vote of chains within as many rows",
            headline=True,
        ),
        Claim(
            "accuracy[iep_written,32..128] > accuracy[chain_of_thought,32..128] "
            "and accuracy[iep_written,32..128] > accuracy[direct_answer,32..128]",
            says="also where the model writes the elimination and the answer itself, and there is room for all of it",
            headline=True,
        ),
        Claim(
            "accuracy[iep_inferential_exclusion,*] > accuracy[iep_random,*] "
            "and accuracy[iep_inferential_exclusion,*] > accuracy[iep_likelihood,*]",
            says="more right answers than by excluding as many at random, or by the likeliest option alone",
        ),
        Claim(
            "accuracy[iep_inferential_exclusion,*] > accuracy[iep_surest,*]",
            says="it is that options are excluded, not that of each the relation is told",
        ),
        Claim(
            "refutable[iep_inferential_exclusion,*] > refutable[chain_of_thought,*] "
            "and refutable[iep_inferential_exclusion,*] > refutable[iep_likelihood,*]",
            says="in particular where two or three options contradict what is known",
        ),
        Claim(
            "accuracy[iep_with_cot,*] >= accuracy[chain_of_thought,*] - 0.01 "
            "and accuracy[iep_with_cot,*] >= accuracy[iep_inferential_exclusion,*] - 0.01",
            says="both together are no worse than either",
        ),
        Claim(
            "accuracy[iep_inferential_exclusion,*] > accuracy[iep_guess,*]",
            says="and among the options that are left the relation tells which",
        ),
    )
    exclude, choose, recall = "inferred", "entailed", False
    variants = (
        Variant("iep_written", says="the model writes relations, elimination and answer", choose="written"),
        Variant("iep_with_cot", says="the recalled fact stands in front", recall=True),
        Variant("iep_surest", says="nothing is excluded, the surest option is taken", exclude="none"),
        Variant("iep_guess", says="any of the options that are left", choose="any"),
        Variant("iep_random", says="as many options are excluded, at random", exclude="any"),
        Variant("iep_likelihood", says="the likeliest option, nothing is inferred", choose="likeliest"),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """An option for each question, behind what was inferred of all."""
        questions, left = [question_of(ids) for ids in batch["question"]], [rung] * len(batch["question"])
        if self.choose == "written":
            return texts(session, prompts(batch, "<exclude>"), WRITTEN, left)
        if self.choose == "likeliest":
            return [ended(f"ans {option}") for option in likeliest(session, questions)]
        shown = facts_of(session, batch, left) if self.recall else [""] * len(questions)
        asks = [asked(question, "<exclude>", text) for question, text in zip(questions, shown, strict=True)]
        chains, found = inferred(session, questions, asks)
        answers = []
        for i, (question, chances) in enumerate(zip(questions, found, strict=True)):
            kept = self.kept(session, chances)
            if self.choose == "any" and kept:
                k = kept[drawn(session, [1.0] * len(kept), 1)[0]]
            elif kept:
                k = max(kept, key=lambda k: chances[k][2])
            else:
                k = min(range(len(chances)), key=lambda k: chances[k][0])
            answers.append(ended(f"{decode(chains.written(i))} ans {question.others[k]}"))
        return answers

    def kept(self, session: Session, chances: Sequence[Sequence[float]]) -> list[int]:
        """Numbers of the options that are not excluded."""
        kept = [k for k, own in enumerate(chances) if max(own) > own[0] or self.exclude == "none"]
        if self.exclude == "any":
            return sorted(drawn(session, [1.0] * len(chances), len(kept))) if kept else []
        return kept


def facts_of(session: Session, batch: Mapping[str, Any], left: list[int]) -> list[str]:
    """The facts that a chain of thought tells, without its answer."""
    return [decode(ids).partition("ans")[0].strip() for ids in texts(session, prompts(batch, "<cot>"), RECALL, left)]


def inferred(
    session: Session, questions: Sequence[Question], asks: Sequence[Sequence[int]]
) -> tuple[Chains, list[list[list[float]]]]:
    """Texts that tell of each option what it has to do with the question, and the probabilities of the three relations."""
    chains, every = Chains(session.networks["model"], asks), range(len(questions))
    words = [WORDS.index(word) for word in VERDICTS]  # contradiction, neutral, entailment
    found: list[list[list[float]]] = [[] for _ in every]
    checks = [CHECKS[question.path[0]] for question in questions]

    def told_of(named: Sequence[str]) -> None:
        for i in every:
            chains.put(i, encode(f"{named[i]} {checks[i]}"))
        chains.write(limit=1)

    told_of([question.subject for question in questions])
    for k in range(len(questions[0].others)):
        for i in every:
            chains.put(i, encode("."))
        told_of([question.others[k] for question in questions])
        chances = chains.read()[:, words].softmax(-1).tolist()
        for i, own in enumerate(chances):
            found[i].append(own)
            chains.put(i, encode(VERDICTS[own.index(max(own))]))
    for i in every:
        chains.put(i, encode("."))
    return chains, found


def likeliest(session: Session, questions: Sequence[Question]) -> list[str]:
    """The option that is likeliest behind the subject and the relation of each question: a row each."""
    table = recalled(session, [(q.subject, q.path[0]) for q in questions], KINDS["person"]).tolist()
    return [
        max(question.others, key=lambda option: own[KINDS["person"].index(option)])
        for question, own in zip(questions, table, strict=True)
    ]
