"""Natural Program: every step is verified from the premises that it cites, and verified proofs vote (Ling et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import WORDS, decode, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.deducing import Question, Statement, question_of, read_statements, said, sound
from stepmark.tracks.reasoning.solving import CHAIN, answer_of, left, plurality, prompts, write_chains

TEMPERATURE = 0.7  # of proofs and of verdicts
TIMES = 3  # k', verdicts on each step
CHECKS = 10  # most rows that verifying a proof of `CHAIN` words takes
YES = WORDS.index("yes")
Test = tuple[str, bool]  # what a verifier reads, and whether "yes" speaks for the step


@dataclass(frozen=True)
class Sampled:
    """A proof that was written: its words, its answer, and what has to hold for it to be verified (None: it fails)."""

    ids: list[int]
    answer: str | None
    tests: tuple[Test, ...] | None


class NaturalProgram(Method):
    """Natural Program: proofs whose steps cite their premises, verified step by step, then a vote (section 4).

    k proofs are sampled. A step of a proof is a rule and what it makes of the fact before, so that it cites these two. The
    premises are those of the question: a step whose rule or first fact is not among them cites nothing, and fails. Every
    other step is verified with its premises and nothing else, in the format <follows>: a fact, a rule, what follows. The
    answer cites the last rule: it has to be about what is asked, and is verified in the format <agree>. k' = 3 verdicts are
    drawn on each step at temperature .7, and the majority counts. A proof is verified if all of its steps are.

    Unanimity-plurality voting: the proofs that are verified vote, and the first of them with the plurality's answer is
    returned; where there is none, all of them vote.

    The rung sets k: a proof more is begun while each question may still have `CHAIN` rows and those that verifying takes. That
    makes about two proofs at 128, six at 256 and fourteen at 512, where the paper has ten or more; at 16 and 64 there is
    one, and nothing to verify. A verdict costs the row that reads step and premises, however often it is drawn; steps that
    proofs of a question share are verified once. All steps of a proof are paid, also behind one that fails.

    Differs from the paper: its format numbers the premises and says "(by #2 #5)"; here a proof says its rule in words, the
    fact cited is the one before, and their numbers are looked up. What cannot be read fails; the code lets it pass. All
    proofs that have an answer are verified; the code takes those of the two answers with the most votes, which here are
    all there are, and only where their votes are close. It writes a verdict with its reasons, here a word.

    Its controls: `natural_program_whole` verifies a proof at once, question and all, in the format <whole> (the code's
    "naive"); `natural_program_lookup` looks the premises up and asks nothing; `natural_program_unnumbered` asks and looks
    nothing up; `natural_program_coin` tosses a coin for each proof; `natural_program_exact` checks all steps exactly, a bound.

    What limits it here: a proof that takes a wrong turn has to invent a rule to come back, and what is invented has no number.
    """

    paper = Paper(
        id="natural_program",
        title="Deductive Verification of Chain-of-Thought Reasoning",
        authors="Zhan Ling, Yunhao Fang, Xuanlin Li, Zhiao Huang, Mingu Lee, Roland Memisevic, Hao Su",
        year=2023,
        arxiv="2306.03872",
        code="lz1oceani/verify_cot",
    )
    tasks = ("deduce/chains", "deduce/dense", "deduce/deep")
    baselines = (
        "self_consistency",
        "chain_of_thought",
        "natural_program_whole",
        "natural_program_lookup",
        "natural_program_coin",
    )
    claims = (
        Claim(
            "valid[natural_program,256..512] > valid[self_consistency,256..512] "
            "and valid[natural_program,256..512] > valid[natural_program_lookup,256..512] "
            "and accuracy[natural_program,256..512] >= accuracy[self_consistency,256..512] - 0.01",
            says="proofs are more often valid than those of a vote within as many rows, and than where a parser looks the "
            "premises up and nothing is asked; answers are no less right",
            headline=True,
        ),
        Claim(
            "accuracy[natural_program,128..512] > accuracy[self_consistency,128..512] "
            "and accuracy[natural_program,128..512] > accuracy[chain_of_thought,128..512]",
            says="along with it, more answers are right",
        ),
        Claim(
            "valid[natural_program_unnumbered,256..512] > valid[natural_program_whole,256..512]",
            says="steps with their premises alone are verified more reliably than whole proofs; no parser helps either",
        ),
        Claim(
            "valid[natural_program,128..512] > valid[natural_program_coin,128..512]",
            says="the verdicts are no coin",
        ),
        Claim(
            "valid[natural_program,256..512] > valid[self_consistency,256..512] "
            "and accuracy[natural_program,256..512] >= accuracy[self_consistency,256..512] - 0.01",
            says="the same with one step more than the model has seen",
            task="deduce/deep",
        ),
    )
    verify, numbered = "steps", True
    variants = (
        Variant("natural_program_whole", says="a proof is verified at once", verify="whole", tasks=("deduce/chains",)),
        Variant(
            "natural_program_lookup",
            says="premises are looked up, nothing is asked",
            verify="lookup",
            tasks=("deduce/chains",),
        ),
        Variant(
            "natural_program_unnumbered", says="premises are not looked up", numbered=False, tasks=("deduce/chains",)
        ),
        Variant("natural_program_coin", says="a coin for each proof", verify="coin", tasks=("deduce/chains",)),
        Variant(
            "natural_program_exact",
            says="an exact check of all steps: a bound",
            verify="exact",
            tasks=("deduce/chains",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The first of the verified proofs with their plurality's answer."""
        questions = [question_of(question) for question in batch["question"]]
        first = Chains(session.networks["model"], prompts(batch, "<proof>"))
        first.read()  # the questions are read once for all proofs
        found: list[list[Sampled]] = [[] for _ in questions]
        passed: dict[tuple[int, str], bool] = {}  # what the model says of each test of a question
        pending = 0
        while not found[0] or left(session, batch) >= CHAIN + CHECKS * (pending + 1):
            chains = first.take(range(len(questions)))
            write_chains(session, chains, min(CHAIN, left(session, batch) + 1), TEMPERATURE)
            for i, question in enumerate(questions):
                found[i].append(self.sampled(question, chains.written(i)))
            pending += 1
            if len(found[0]) > 1:  # one proof alone is returned, whatever is said of it
                self.ask(session, found, passed)
                pending = 0
        chosen = []
        for i, proofs in enumerate(found):
            verified = [self.verified(session, questions[i], proof, i, passed) for proof in proofs]
            pool = [proof for proof, fine in zip(proofs, verified, strict=True) if fine] or proofs
            chosen.append(pool[plurality([proof.answer for proof in pool])].ids)
        return chosen

    def sampled(self, question: Question, ids: list[int]) -> Sampled:
        """A proof with what there is to verify."""
        answer = answer_of(ids)
        if answer is None or self.verify in ("coin", "exact"):
            return Sampled(ids, answer, ())
        if self.verify == "whole":
            context = " ".join(map(said, question.statements))
            return Sampled(ids, answer, ((f"{context} ? {said(question.goal)} <proof> {decode(ids)} <whole>", True),))
        tests = cited(question, decode(ids), self.numbered)
        return Sampled(ids, answer, () if tests is not None and self.verify == "lookup" else tests)

    def ask(self, session: Session, found: Sequence[Sequence[Sampled]], passed: dict[tuple[int, str], bool]) -> None:
        """Verify what has not been verified yet: a row for each, and `TIMES` verdicts drawn from it."""
        tests = [
            (i, prompt)
            for i, proofs in enumerate(found)
            for proof in proofs
            if proof.answer is not None
            for prompt, _ in proof.tests or ()
        ]
        new = [key for key in dict.fromkeys(tests) if key not in passed]
        if not new:
            return
        logits = Chains(session.networks["model"], [encode(prompt) for _, prompt in new]).read()
        drawn = torch.multinomial((logits / TEMPERATURE).softmax(-1), TIMES, replacement=True, generator=session.rng)
        yes = (2 * (drawn == YES).sum(-1) > TIMES).tolist()
        passed.update(zip(new, yes, strict=True))

    def verified(
        self, session: Session, question: Question, proof: Sampled, i: int, passed: Mapping[tuple[int, str], bool]
    ) -> bool:
        """Whether all of a proof has passed."""
        if proof.answer is None or proof.tests is None:
            return False
        if self.verify == "coin":
            return bool(torch.rand(1, generator=session.rng, device=session.device) < 0.5)
        if self.verify == "exact":
            return sound(question, decode(proof.ids))
        return all(passed.get((i, prompt), speaks) == speaks for prompt, speaks in proof.tests)


def cited(question: Question, text: str, numbered: bool = True) -> tuple[Test, ...] | None:
    """What has to hold for each step and for the answer of a proof, from their premises alone; None where a premise is not
    there, or a step cannot be read."""
    body, _, answer = text.rpartition("ans ")
    before: Statement | None = None  # the fact that stands before a step
    last: Statement | None = None  # the rule cited last
    tests = []
    for clause in body.split(" ."):
        if not clause.strip():
            continue
        step = read_statements(clause)
        if step is None or len(step) > 2 or (len(step) == 2 and before is None):
            return None
        if numbered and step[0] not in (question.facts if len(step) == 1 else question.rules):
            return None
        if len(step) == 2:
            assert before is not None
            last = step[0]
            tests.append((f"{said(before)} {said(last)} <follows> {said(step[1])}", True))
        before = step[-1]
    if before is None or (numbered and before[::2] != question.goal[::2]):
        return None
    if last is not None:
        tests.append((f"{said(last)} ? {said(question.goal)} <agree>", answer.strip() == "true"))
    return tuple(tests)
