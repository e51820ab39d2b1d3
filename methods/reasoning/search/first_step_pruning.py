"""Early pruning by the first step: many first steps, a verifier, a vote of the best quarter (Liao et al., 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.oracles import opening, sound
from stepmark.tracks.reasoning.populations import by_question, in_parts, judged_once, room, write_to_ends
from stepmark.tracks.reasoning.solving import CHAIN, LONGEST_TEXT, STEP, answer_of, plurality, prompts, write_step


class FirstStepPruning(Method):
    """Of N first steps of a text the best judged quarter is written on, and the answers of these texts vote.

    The paper finds that the first step of a long text decides about its end: where it is wrong, a model that checks its
    own steps seldom recovers. Hence early pruning: N first steps are sampled, up to the first full stop, a process
    verifier scores them, and only the M = N / 4 best are completed; majority vote of M answers instead of N. At N = 64
    and M = 16, the paper's numbers, the cost is 64 first steps and 16 rests instead of 64 texts.

    The rung gives a first step for each `EACH` tokens: N = 8 at 128, 16 at 256, 32 at 512; below `CHAIN` tokens one text is
    written. Where what is left does not suffice for all M, the better judged are completed first. Within twice the tokens
    `self_consistency` votes over about N whole texts.

    Its controls: `first_step_random` keeps any quarter; `first_step_exact` keeps those that are right, a bound. For the
    paper's analysis a text of the format <think>, which checks its own steps and mends them, goes on from steps that are
    put in from outside: `first_step_given` from a right first step, `first_step_spoilt` from one with a wrong result,
    `last_step_spoilt` from all steps of which the last has a wrong result. These read the question's solution.

    Differs from the paper: a step ends at a full stop, not at a blank line, a word such as "wait", or 512 tokens. No code
    is published; that all N have one temperature, .7, and that ties of the verifier fall to those sampled first, is this
    file's reading.

    What limits it here: the first step is a quarter of a text, where it is a twentieth in the paper, so that less can be
    saved, and N and M are half as many at most; many of N short first steps are the same. In the format <think> a wrong
    step that was trained on is always mended at once.
    """

    paper = Paper(
        id="first_step_pruning",
        title="Lost at the Beginning of Reasoning",
        authors="Baohao Liao, Xinyi Chen, Sara Rajaee, Yuhui Xu, Christian Herold, Anders Søgaard, Maarten de Rijke, "
        "Christof Monz",
        year=2025,
        arxiv="2506.22058",
    )
    tasks = ("solve/judged",)
    baselines = ("self_consistency", "particle_best_of_n", "first_step_random")
    claims = (
        Claim(
            "accuracy[first_step_pruning,128] >= accuracy[self_consistency,256] - 0.01 "
            "and accuracy[first_step_pruning,256] >= accuracy[self_consistency,512] - 0.01 "
            "and nfe[first_step_pruning,256] <= 0.6 * nfe[self_consistency,512]",
            says="as accurate as a vote over about as many whole texts, for half of the tokens (the paper: up to 70 % less)",
            headline=True,
            setting="8 and 16 first steps that are a quarter of a text, not 64 that are a twentieth",
        ),
        Claim(
            "accuracy[first_step_spoilt,128..512] <= accuracy[first_step_given,128..512] - 0.3 "
            "and accuracy[first_step_spoilt,128..512] < accuracy[last_step_spoilt,128..512]",
            says="texts that check themselves seldom recover from a wrong first step: 30 points lie between (the paper: up to "
            "40), and a wrong last step harms less",
            headline=True,
            setting="a model that was trained to mend a wrong step at once",
        ),
        Claim(
            "accuracy[first_step_pruning,128..512] > accuracy[self_consistency,128..512] "
            "and accuracy[first_step_pruning,128..512] > accuracy[first_step_random,128..512] "
            "and accuracy[first_step_pruning,128..512] > accuracy[particle_best_of_n,128..512]",
            says="better than a vote over whole texts at as many tokens, than any quarter of the first steps, and than the "
            "best of whole texts by the same verifier",
        ),
    )

    form, EACH, one_in, keep, put, temperature = "<cot>", 16, 4, "best", "", 0.7
    variants = (
        Variant("first_step_random", says="any quarter of the first steps", keep="random"),
        Variant(
            "first_step_exact", says="a quarter of which all are right, where there are so many: a bound", keep="exact"
        ),
        Variant(
            "first_step_given", says="a right first step is put in", form="<think>", EACH=1_000, one_in=1, put="right"
        ),
        Variant(
            "first_step_spoilt", says="a wrong first step is put in", form="<think>", EACH=1_000, one_in=1, put="wrong"
        ),
        Variant(
            "last_step_spoilt",
            says="all steps, the last one wrong",
            form="<think>",
            EACH=1_000,
            one_in=1,
            put="wrong last",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """One text a question, of the answer that the kept ones give most often."""
        return in_parts(session, batch, rung, self.heads(rung), self.chosen)

    def heads(self, rung: int) -> int:
        """N."""
        return max(1, rung // self.EACH) if rung >= CHAIN else 1

    def chosen(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The texts of some questions, worked on side by side."""
        asked = prompts(batch, self.form)
        count, number = len(asked), self.heads(rung)
        owner = [question for question in range(count) for _ in range(number)]
        begun = Chains(session.networks["model"], asked)
        if self.put:
            self.put_in(session, begun, batch)
        heads = begun.take(owner)
        if self.one_in > 1 and number > 1:
            write_step(heads, None, session, self.temperature, min(STEP, room(session, len(owner))))
            kept = self.best(session, batch, heads, by_question(owner, count), max(1, number // self.one_in))
            heads, owner = heads.take(kept), [owner[i] for i in kept]
        write_to_ends(session, heads, owner, self.temperature, CHAIN if self.form == "<cot>" else LONGEST_TEXT)
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
        elif self.keep == "exact":
            asked = batch["question"]
            worth = [float(sound(asked[q], heads.written(i), False)) for q, mine in enumerate(groups) for i in mine]
        else:
            worth = judged_once(session.networks["process"], heads.texts)
        return [i for mine in groups for i in sorted(mine, key=lambda i: -worth[i])[:number]]

    def put_in(self, session: Session, begun: Chains, batch: Mapping[str, Any]) -> None:
        """The first step of each question, or all of them, the last of these wrong or not."""
        questions, count = batch["question"], None if self.put == "wrong last" else 1
        seeds = torch.randint(2**31, (len(questions),), generator=session.rng, device=session.device).tolist()
        for i, (question, seed) in enumerate(zip(questions, seeds, strict=True)):
            begun.put(i, opening(question, count, None if self.put == "right" else seed))
