"""Step guided reasoning: the model is asked what the next step needs, then for the step (Cao et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, STOP, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.sharing import share
from stepmark.tracks.reasoning.solving import STEP, prompts

NEXT, SOLVE = encode("<next>")[0], encode("<step>")[0]
GUIDANCE, STEPS = 3, 10  # most tokens of a guidance, most steps


class StepGuidedReasoning(Method):
    """Step guided reasoning: before each step the model says what it takes, and then writes that step only.

    A text is made in rounds, at most 10, at the likeliest token each:

        1. to the question and the steps so far the fixed question for guidance is put (<next>); the model replies with what
           the next small step needs, here the kind of the step, or that it is done;
        2. behind the reply it is asked for the step itself (<step>), up to a full stop and at most `STEP` tokens;
        3. the step is appended to the others. The guidance is forgotten.

    It is done when a step gives the answer. Each step takes two calls of the model one after the other, and two tokens more:
    the guidance, and the token that ends it.

    `step_guided_shuffled` gives each question the guidance of another one of the batch: it shows whether steps go by it. Step
    by step without a guidance is `chain_of_thought`, which writes the same steps in one call. A rung bounds the tokens of
    the batch and sets nothing else: a text that has ended leaves the rest.

    Differs from the paper, which has no public code: what is said here is a reading of its text. The two questions are words
    of a format that the model was trained in, <guided>, not instructions; the guidance is a word, not a paragraph. The
    answer is read from the last step; no further call asks for it.

    What limits it here: of each guided example the model has learnt one step, of a chain all of them, so that it has seen a
    sixth as many guided steps, and forgets more often which of them are done.
    """

    paper = Paper(
        id="step_guided_reasoning",
        title="Step Guided Reasoning: Improving Mathematical Reasoning using Guidance Generation and Step Reasoning",
        authors="Lang Cao, Yingtian Zou, Chao Peng, Renhong Chen, Wu Ning, Yitong Li",
        year=2024,
        arxiv="2410.19817",
    )
    tasks = ("solve/problems",)
    baselines = ("chain_of_thought", "self_consistency", "step_guided_shuffled")
    claims = (
        Claim(
            "accuracy[step_guided_reasoning,128..512] > accuracy[chain_of_thought,128..512] "
            "and deep[step_guided_reasoning,128..512] > deep[chain_of_thought,128..512]",
            says="more answers are right than with one chain, on the longest problems too (the paper: 36.3 for 27.1 % and "
            "47.4 for 36.5 % on average)",
            headline=True,
            setting="guidance is a word of a format of which the model has seen a sixth as many steps as of chains; the paper "
            "instructs a chat model",
        ),
        Claim(
            "accuracy[step_guided_reasoning,128..512] > accuracy[self_consistency,128..512]",
            says="also than with a vote of as many chains as the same tokens buy",
            setting="guidance is a word of a format of which the model has seen a sixth as many steps as of chains",
        ),
        Claim(
            "accuracy[step_guided_reasoning,128..512] > accuracy[step_guided_shuffled,128..512]",
            says="it is the guidance: with somebody else's fewer are right",
        ),
    )

    shuffled = False
    variants = (Variant("step_guided_shuffled", says="the guidance of another question", shuffled=True),)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The steps of each question, and its answer."""
        chains = Chains(session.networks["model"], prompts(batch, "<guided>"))
        for _ in range(STEPS):
            going = [i for i in range(len(chains)) if not chains.ended(i)]
            room = share(session, len(going))
            if not going or room < 1:
                break
            before = [len(chains.texts[i]) for i in going]
            for i in going:
                chains.put(i, [NEXT])
            said = chains.write(going, stop=(SOLVE,), limit=min(GUIDANCE, room))
            guided = [[*(t for t in reply if t not in (SOLVE, EOS)), SOLVE] for reply in said]
            if self.shuffled:
                order = torch.randperm(len(going), generator=session.rng, device=session.device).tolist()
                other = dict(zip(order, order[1:] + order[:1], strict=True))  # nobody keeps his own
                guided = [guided[other[k]] for k in range(len(going))]
            for i, start, reply in zip(going, before, guided, strict=True):
                if chains.texts[i][start + 1 :] != reply:
                    chains.cut(i, start + 1)
                    chains.put(i, reply)
            steps = chains.write(going, stop=(STOP,), limit=min(STEP, share(session, len(going))))
            for i, start, step in zip(going, before, steps, strict=True):
                chains.cut(i, start)
                chains.put(i, step)
        return [chains.written(i) or [EOS] for i in range(len(chains))]
