"""PrOntoQA: is a chain of thought a proof, step by step, and what does a step astray do to it? (Saparov & He, 2022)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.deducing import (
    LONGEST_PROOF,
    Question,
    Statement,
    follows,
    proof,
    question_of,
    told_proof,
    verdicts,
    whole_proof,
)
from stepmark.tracks.reasoning.populations import drawn
from stepmark.tracks.reasoning.solving import LONGEST_TEXT, left, prompts

Step = tuple[Statement, ...]  # a fact of the prompt, or a rule and the new fact


class ProntoQA(Method):
    """PrOntoQA: greedy chains of thought over made-up rules, read back into logic and graded step by step (section 3.2).

    A step is valid where its fact or its rule stands in the prompt and its new fact follows from what was shown. A valid step
    is on the proof or *misleading*, off it. What the track records of a text:

        steps      share of its steps that are valid             straight   share of them on the proof
        misled     whether its first step off the proof is a valid one (no invalid step before)
        valid      whether all steps are valid and the last one settles the question: a detour that recovers is a proof
        detoured   misled and valid

    so that misled - detoured are the texts that a valid step leads astray for good, P(proof | misled) = detoured / misled and
    P(proof | not misled) = (valid - detoured) / (1 - misled). Grades go by
    the number of rules too (valid_depth1, valid_depth5) and by that of statements which lead nowhere (valid_dead2,
    valid_dead4). The method is the paper's subject, one greedy text; it spends what the text is long, at rung 16 two steps.

    Texts that go astray by themselves may be those of harder questions. `prontoqa_misled` therefore takes the proof up to the
    first fact that another rule fits as well, and puts the step by that rule behind; `prontoqa_led` puts the step of the
    proof there. The model goes on from it. Where no other rule fits on the whole way, neither puts anything.
    `prontoqa_random` takes any of all valid steps until one settles the question, and the model says true or false behind:
    valid throughout, and no plan.

    Differs from the paper: steps are written as rule and new fact, so that a hop that is skipped has no rule to name and is
    invalid; the paper counts such broadly valid steps apart. Where a being and its chain end in the asked word, so does the
    chain of another being, which is what closes the short cut that the paper's one distractor rule closes. Words mean nothing,
    as in its fictional worlds; worlds of true and of false facts and a fixed order of sentences there are none. Depths are 1 to
    5, where the paper has 1, 3 and 5. `prontoqa_misled`, `prontoqa_led` and `prontoqa_random` are not the paper's.

    What limits it here: the model was trained on such proofs, none of which makes a detour, where the paper's models were not
    trained on any and see eight examples. That it does not come back from one is therefore no surprise.
    """

    paper = Paper(
        id="prontoqa",
        title="Language Models Are Greedy Reasoners: A Systematic Formal Analysis of Chain-of-Thought",
        authors="Abulhair Saparov, He He",
        year=2022,
        arxiv="2210.01240",
        code="asaparov/prontoqa",
    )
    tasks = ("deduce/chains", "deduce/dense", "deduce/deep")
    baselines = ("direct_answer", "self_consistency", "selection_inference", "lambada", "prontoqa_random")
    claims = (
        Claim(
            "steps[prontoqa,64..512] >= 0.9 and misled[prontoqa,64..512] - detoured[prontoqa,64..512] "
            "> 0.5 * (1 - valid[prontoqa,64..512])",
            says="nine steps in ten are valid, and yet of the texts that are no proofs more than half leave the proof first by a "
            "step that is valid, and do not come back",
            headline=True,
        ),
        Claim(
            "valid_depth5[prontoqa,64..512] < valid_depth1[prontoqa,64..512]",
            says="proofs of five rules are right less often than proofs of one",
            headline=True,
            setting="the model was trained at each of these depths, where the paper's models were trained at none",
        ),
        Claim(
            "detoured[prontoqa,64..512] * (1 - misled[prontoqa,64..512]) "
            "< (valid[prontoqa,64..512] - detoured[prontoqa,64..512]) * misled[prontoqa,64..512]",
            says="a text that takes a valid step off the proof ends in a proof less often than one that takes none",
            setting="the model was trained on proofs without any detour",
        ),
        Claim(
            "valid_dead4[prontoqa,64..512] < valid_dead2[prontoqa,64..512]",
            says="the more valid steps are open, the fewer proofs are right",
        ),
        Claim(
            "valid[prontoqa_misled,64..512] < valid[prontoqa,64..512]",
            says="the step astray is the cause: put into texts of the same questions it costs proofs",
        ),
        Claim(
            "misled[prontoqa,64..512] - detoured[prontoqa,64..512] > 0.5 * (1 - valid[prontoqa,64..512])",
            says="the same among six and eight statements that lead nowhere",
            task="deduce/dense",
        ),
        Claim(
            "straight[prontoqa,64..512] > straight[prontoqa_random,64..512]",
            says="it plans better than whoever takes any valid step",
        ),
    )
    first = "own"
    variants = (
        Variant(
            "prontoqa_misled",
            says="where valid steps part, the one off the proof is put",
            first="off",
            tasks=("deduce/chains",),
        ),
        Variant(
            "prontoqa_led",
            says="where valid steps part, the one on the proof is put",
            first="on",
            tasks=("deduce/chains",),
        ),
        Variant(
            "prontoqa_random", says="any valid step at random, to the end", first="random", tasks=("deduce/chains",)
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """A text a question."""
        questions = [question_of(question) for question in batch["question"]]
        if self.first == "random":
            parts = [wandered(session, question) for question in questions]
            said_so = verdicts(session, batch["question"], [told_proof(steps) for steps in parts])
            return [whole_proof(steps, verdict) for steps, verdict in zip(parts, said_so, strict=True)]
        chains = Chains(session.networks["model"], prompts(batch, "<proof>"))
        if self.first != "own":
            for i, question in enumerate(questions):
                chains.put(i, encode(told_proof(opening(question, self.first == "on"))))
        chains.write(limit=min(left(session, batch), LONGEST_TEXT))
        return [chains.written(i) for i in range(len(chains))]


def opening(question: Question, on: bool) -> list[Step]:
    """The proof up to the first fact that a rule off it fits as well, and the step by one of the two; else nothing."""
    (_, fact), *rest = proof(question)
    steps: list[Step] = [(fact,)]
    for step in rest:
        for rule in question.rules:
            new = follows(fact, rule)
            if new is not None and new != step[1]:
                return [*steps, step if on else (rule, new)]
        steps.append(step)
        fact = step[1]
    return []


def wandered(session: Session, question: Question) -> list[Step]:
    """Valid steps at random, none of which says again what is known, until one is about what is asked or none is open."""
    steps: list[Step] = []
    known: list[Statement] = []
    for _ in range(2 * LONGEST_PROOF):
        open_ones: list[Step] = [(fact,) for fact in question.facts if fact not in known]
        for fact in known:
            found = [(rule, follows(fact, rule)) for rule in question.rules]
            open_ones += [(rule, new) for rule, new in found if new is not None and new not in known]
        if not open_ones:
            break
        step = open_ones[drawn(session, [1.0] * len(open_ones), 1)[0]]
        steps.append(step)
        known.append(step[-1])
        if step[-1][::2] == question.goal[::2]:
            break
    return steps
