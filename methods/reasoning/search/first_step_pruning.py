"""Early pruning by the first step: many first steps, a verifier, a vote of the best quarter (Liao et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.oracles import first_step
from stepmark.tracks.reasoning.populations import by_question, in_parts, judged_once, room, write_to_ends
from stepmark.tracks.reasoning.solving import CHAIN, STEP, answer_of, plurality, prompts, write_step


class FirstStepPruning(Method):
    """Of N first steps of a text the best judged quarter is written on, and the answers of these texts vote.

    The paper finds that the first step of a long text decides about its end: where it is wrong, a model that checks its
    own steps seldom recovers. Hence early pruning: N first steps are sampled, up to the first full stop, a process
    verifier scores them, and only the M = N / 4 best are completed; majority vote of M answers instead of N. At N = 64
    and M = 16, the paper's numbers, the cost is 64 first steps and 16 rests instead of 64 texts.

    The rung gives a first step for each `EACH` tokens, so that N = 64 at 1024 tokens, 16 at 256; below `CHAIN` tokens
    one text is written. Where what is left does not suffice for all M, the better judged are completed first.

    Its controls: `first_step_random` keeps any quarter, `first_step_worst` the worst. The vote over whole texts at as
    many or at twice the tokens is `self_consistency`. In the format <think>, whose texts check and mend their own steps,
    `first_step_thinking` prunes and `first_step_thinking_whole` completes all N, with the same N at the same rung, one
    for each 64 tokens, so that what pruning saves is spent less. For the paper's analysis, `first_step_given` and
    `first_step_spoilt` vote over texts of this format whose first step is put in from outside, right or with a wrong
    result: two oracles that read the question.

    Differs from the paper: a step ends at a full stop, not at a blank line, a word such as "wait", or 512 tokens. The
    verifier has learnt on texts in the format <cot>: it reads a first step as one of these, which it is in words, whatever
    the format. No code is published; that all N have one temperature, .7, and that ties of the verifier fall to those
    sampled first, is this file's reading.

    What limits it here: the first step is a quarter of a text in the format <cot> and a ninth in <think>, where it is
    a twentieth in the paper, so that less can be saved; many of N short first steps are the same.
    """

    paper = Paper(
        id="first_step_pruning",
        title="Lost at the Beginning of Reasoning",
        authors="Baohao Liao, Xinyi Chen, Sara Rajaee, Yuhui Xu, Christian Herold, Anders Søgaard, Maarten de Rijke, "
        "Christof Monz",
        year=2025,
        arxiv="2506.22058",
    )
    tasks = ("solve/problems", "solve/problems_deep")
    baselines = ("self_consistency", "best_of_n", "first_step_random")
    claims = (
        Claim(
            "accuracy[first_step_pruning,128] >= accuracy[self_consistency,256] - 0.01 "
            "and accuracy[first_step_pruning,256] >= accuracy[self_consistency,512] - 0.01 "
            "and accuracy[first_step_pruning,512] >= accuracy[self_consistency,1024] - 0.01",
            says="as accurate as a vote over about as many whole texts, for half of the tokens",
            headline=True,
            setting="the first step is a quarter of a text, not a twentieth: half is saved, not 70 %",
        ),
        Claim(
            "accuracy[first_step_thinking,512..1024] >= accuracy[first_step_thinking_whole,512..1024] - 0.01 "
            "and nfe[first_step_thinking,512..1024] <= 0.4 * nfe[first_step_thinking_whole,512..1024]",
            says="in texts that check themselves, the best quarter of N loses no accuracy and saves 60 % of the tokens",
            setting="8 and 16 first steps, not 64",
        ),
        Claim(
            "accuracy[first_step_pruning,128..1024] > accuracy[self_consistency,128..1024] "
            "and accuracy[first_step_pruning,128..1024] > accuracy[first_step_random,128..1024]",
            says="better than a vote over whole texts at as many tokens, and than any quarter of the first steps",
        ),
        Claim(
            "accuracy[first_step_spoilt,256..1024] <= accuracy[first_step_given,256..1024] - 0.4",
            says="texts that check themselves seldom recover from a wrong first step: 40 points lie between",
        ),
    )

    form, EACH, one_in, keep, first = "<cot>", 16, 4, "best", "sampled"
    temperature = 0.7
    variants = (
        Variant("first_step_random", says="any quarter of the first steps", keep="random"),
        Variant("first_step_worst", says="the worst judged quarter", keep="worst"),
        Variant("first_step_thinking", says="in texts that check themselves", form="<think>", EACH=64),
        Variant("first_step_thinking_whole", says="all of these texts completed", form="<think>", EACH=64, one_in=1),
        Variant(
            "first_step_given", says="a right first step is put in", form="<think>", EACH=64, one_in=1, first="right"
        ),
        Variant(
            "first_step_spoilt", says="a wrong first step is put in", form="<think>", EACH=64, one_in=1, first="wrong"
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question, of the answer that the kept ones give most often."""
        length = 1 if self.form == "<cot>" else 3  # of a text, against one in the format <cot>
        return in_parts(session, batch, rung, length * self.heads(rung), self.chosen)

    def heads(self, rung: int) -> int:
        """N."""
        return max(1, rung // self.EACH) if rung >= CHAIN else 1

    def chosen(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The texts of some questions, worked on side by side."""
        asked = prompts(batch, self.form)
        count, number = len(asked), self.heads(rung)
        owner = [question for question in range(count) for _ in range(number)]
        begun = Chains(session.networks["model"], asked)
        if self.first != "sampled":
            self.put_in(session, begun, batch)
        heads = begun.take(owner)
        if self.one_in > 1 and number > 1:
            write_step(heads, None, session, self.temperature, min(STEP, room(session, len(owner))))
            kept = self.best(session, batch, heads, by_question(owner, count), max(1, number // self.one_in))
            heads, owner = heads.take(kept), [owner[i] for i in kept]
        write_to_ends(session, heads, owner, self.temperature, CHAIN if self.form == "<cot>" else 300)
        found = []
        for mine in by_question(owner, count):
            texts = [heads.written(i) for i in mine]
            found.append(texts[plurality([answer_of(text) for text in texts])] or [EOS])
        return found

    def best(
        self,
        session: Session,
        batch: Mapping[str, Any],
        heads: Chains,
        groups: Sequence[Sequence[int]],
        number: int,
    ) -> list[int]:
        """Numbers of the first steps that are kept, the better ones of each question first."""
        if self.keep == "random":
            worth = torch.rand(len(heads), generator=session.rng, device=session.device).tolist()
        else:
            read = prompts(batch, "<cot>")
            texts = [[*read[q], *heads.written(i)] for q, mine in enumerate(groups) for i in mine]
            worth = judged_once(session.networks["process"], texts)
        sign = 1 if self.keep == "worst" else -1
        return [i for mine in groups for i in sorted(mine, key=lambda i: sign * worth[i])[:number]]

    def put_in(self, session: Session, begun: Chains, batch: Mapping[str, Any]) -> None:
        """The first step of each question, right or with a wrong result."""
        questions = batch["question"]
        seeds = torch.randint(2**31, (len(questions),), generator=session.rng, device=session.device).tolist()
        for i, (question, seed) in enumerate(zip(questions, seeds, strict=True)):
            begun.put(i, first_step(question, seed if self.first == "wrong" else None))
