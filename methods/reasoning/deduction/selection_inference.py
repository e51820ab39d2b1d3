"""Selection-Inference: pick statements by their likelihood, infer one new fact, and again (Creswell et al., 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import decode, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.deducing import (
    LONGEST_PROOF,
    Question,
    Statement,
    about,
    follows,
    likeliest,
    question_of,
    read_statements,
    said,
    single,
    told_proof,
    verdicts,
    whole_proof,
)
from stepmark.tracks.reasoning.populations import drawn

ANSWER = 1  # row that is kept for the answer
NEW = 3  # words of a new fact


@dataclass
class Trace:
    """The reasoning about one question: facts inferred, steps as a proof tells them, rows left."""

    question: Question
    left: int
    inferred: list[Statement] = field(default_factory=list)
    steps: list[list[Statement]] = field(default_factory=list)
    ended: bool = False

    @property
    def facts(self) -> list[Statement]:
        """Those of the prompt and those inferred."""
        return [*self.question.facts, *self.inferred]

    @property
    def prompt(self) -> list[int]:
        """What the selection module reads."""
        return encode(about([*self.question.statements, *self.inferred], self.question.goal, "<select>"))

    @property
    def settled(self) -> bool:
        """Whether the last fact is about what is asked."""
        who, _, word = self.question.goal
        return bool(self.inferred) and self.inferred[-1][::2] == (who, word)


class SelectionInference(Method):
    """Selection-Inference (SI): two modules in turn, of which the second sees nothing but what the first has selected.

    Selection reads all statements, those inferred too, and the question. It does not write: every fact is scored by its
    log-likelihood behind the prompt and the greatest is taken; then every rule behind that fact. Inference reads the fact
    and the rule alone and writes one new fact, which joins the statements (algorithm 1). After the last step the likelier
    of true and false behind the steps is the answer. Nothing can be selected that is not there, and each fact hangs on
    its selection alone (the answer, read behind the question and all steps, does not).

    A step costs the row of the prompt, one for each fact and each rule, and three for the new fact. Steps go on until a
    new fact is about what is asked, nothing new comes, there are eight, or the rung has no room for one more: at 16 there is
    one at most, at 128 five, at 256 six. What is left then is left.

    Differs from the paper: no code is published. The paper's number of steps H is fixed for each task; here questions of
    one task need 1 to 5, so that a step that settles the question is the last. A fact is scored before a rule, and no rule
    in a fact's place, since the format <select> was trained so; the paper's modules are prompted with five examples. The
    answer is read behind the question and all steps, in the format <proof>; before any step, in the format <dir>.

    Its controls: `selection_inference_written` lets the model write what it selects, which may not be there;
    `selection_inference_random` takes any fact and rule that give something new.

    What limits it here: scoring every statement makes a step longer than a step of a proof, which a model writes in seven
    words. A fact that leads nowhere stays among the statements; the format <select> was trained with one such fact at most.
    """

    paper = Paper(
        id="selection_inference",
        title="Selection-Inference: Exploiting Large Language Models for Interpretable Logical Reasoning",
        authors="Antonia Creswell, Murray Shanahan, Irina Higgins",
        year=2022,
        arxiv="2205.09712",
    )
    tasks = ("deduce/chains", "deduce/dense", "deduce/deep")
    baselines = ("direct_answer", "chain_of_thought", "self_consistency", "selection_inference_random")
    claims = (
        Claim(
            "accuracy[selection_inference,128..512] - 0.5 > 2 * abs(accuracy[direct_answer,128..512] - 0.5) "
            "and steps[selection_inference,128..512] > steps[chain_of_thought,128..512] "
            "and accuracy[selection_inference,128..512] > accuracy[selection_inference_random,128..512]",
            says="more than twice as far above chance as an answer at once (the paper: more than 100 % better), with steps that "
            "are more often valid than those of a chain of thought, and better than behind steps that fit, taken at random",
            headline=True,
            setting="a coin is right half the time, so that what doubles is the distance from a coin",
        ),
        Claim(
            "valid[selection_inference,128..512] > valid[chain_of_thought,128..512] "
            "and valid[selection_inference,128..512] > valid[self_consistency,128..512]",
            says="its proofs are more often valid than those in one go, or of a vote of as many rows",
        ),
        Claim(
            "accuracy[selection_inference,128..512] > accuracy[chain_of_thought,128..512] "
            "and accuracy[selection_inference,128..512] > accuracy[self_consistency,128..512]",
            says="and so are its answers",
        ),
        Claim(
            "steps[selection_inference,128..512] > steps[selection_inference_written,128..512] "
            "and valid[selection_inference,128..512] > valid[selection_inference_random,128..512]",
            says="scoring statements selects better than writing them, and the scores better than chance",
        ),
        Claim(
            "valid[selection_inference,256..512] > valid[chain_of_thought,256..512] "
            "and valid[selection_inference,256..512] > valid[self_consistency,256..512]",
            says="the same with one step more than the model has seen",
            task="deduce/deep",
        ),
    )
    select = "scored"
    variants = (
        Variant(
            "selection_inference_written",
            says="the model writes what it selects",
            select="written",
            tasks=("deduce/chains",),
        ),
        Variant(
            "selection_inference_random",
            says="any fact and rule that give something new",
            select="random",
            tasks=("deduce/chains",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The steps of each question and its answer."""
        traces = [Trace(question_of(question), rung - ANSWER) for question in batch["question"]]
        for _ in range(LONGEST_PROOF):
            going = [trace for trace in traces if not trace.ended and trace.left >= self.cost(trace)]
            if not going:
                break
            self.infer(session, going, self.selected(session, going))
        said_so = verdicts(session, batch["question"], [told_proof(trace.steps) for trace in traces])
        return [whole_proof(trace.steps, verdict) for trace, verdict in zip(traces, said_so, strict=True)]

    def cost(self, trace: Trace) -> int:
        """Rows of a step."""
        selecting = {"scored": 1 + len(trace.facts) + len(trace.question.rules), "written": 6, "random": 0}
        return selecting[self.select] + NEW

    def selected(self, session: Session, going: Sequence[Trace]) -> list[list[Statement] | None]:
        """A fact and a rule of each question; None where what the model has written is something else."""
        if self.select == "random":
            found = list[list[Statement] | None]()
            for trace in going:
                fitting = [
                    [f, r]
                    for f in trace.facts
                    for r in trace.question.rules
                    if follows(f, r) not in (None, *trace.facts)
                ]
                found.append(fitting[drawn(session, [1.0] * len(fitting), 1)[0]] if fitting else None)
            return found
        chains = Chains(session.networks["model"], [trace.prompt for trace in going])
        if self.select == "written":
            written = [read_statements(decode(words)) for words in chains.write(limit=6)]
            return [pair if pair is not None and len(pair) == 2 else None for pair in written]
        chains, facts = likeliest(chains, [trace.facts for trace in going])
        _, rules = likeliest(chains, [trace.question.rules for trace in going])
        return [[fact, rule] for fact, rule in zip(facts, rules, strict=True)]

    def infer(self, session: Session, going: Sequence[Trace], chosen: Sequence[list[Statement] | None]) -> None:
        """Add what follows from each pair of fact and rule, and from nothing else."""
        pairs = [(trace, pair) for trace, pair in zip(going, chosen, strict=True) if pair is not None]
        asked = [encode(f"{said(fact)} {said(rule)} <infer>") for _, (fact, rule) in pairs]
        replies = Chains(session.networks["model"], asked).write(limit=NEW)
        for trace in going:
            trace.left -= self.cost(trace)
            trace.ended = True
        for (trace, (fact, rule)), reply in zip(pairs, replies, strict=True):
            new = single(decode(reply))
            if new is None or new in trace.facts:
                continue  # nothing joins the statements, so that all further steps would be this one
            if fact not in trace.inferred and [fact] not in trace.steps:
                trace.steps.append([fact])
            trace.steps.append([rule, new])
            trace.inferred.append(new)
            trace.ended = trace.settled
