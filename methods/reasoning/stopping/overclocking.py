"""Overclocking: the model is made to believe that it is further along in its thought (Eisenstadt, Zimerman and Wolf, 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.reasoners import WORDS, Reasoner
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.reasoning.stopping import (
    ANSWER,
    CUE,
    END,
    MOST,
    Thoughts,
    asked,
    eagerest,
    enough,
    read_states,
    share_right,
    sides,
    traces,
)

TRACES, TUNED_ON = 400, 150  # train questions that the vector is fitted to, and its strength
HELD = 4_000  # the row of the train split from which on the strength is tuned, behind all that the vector is fitted to
RIDGE = 1e-6
STRENGTHS = (6.4, 3.2, 1.6, 0.8, 0.4, 0.2)  # thoughts by which it is told to be further along


def thinking_states(states: Sequence[Tensor], texts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
    """Of each text whose thought has ended, the states that its tokens are drawn from, ``</think>`` the last: those of the
    tokens one before."""
    return [
        state[start - 1 : text.index(END, start)]
        for state, text, start in zip(states, texts, starts, strict=True)
        if END in text[start:]
    ]


def progress_vector(states: Sequence[Tensor]) -> tuple[Tensor, float]:
    """(theta [D], R^2): least squares without a constant, theta h_j = j / N over the states [N, D] of each thought."""
    stacked = torch.cat(list(states)).double()
    target = torch.cat([torch.arange(1, len(each) + 1, dtype=torch.float64) / len(each) for each in states])
    target = target.to(stacked.device)
    gram = stacked.T @ stacked + RIDGE * torch.eye(stacked.shape[1], dtype=torch.float64, device=stacked.device)
    theta = torch.linalg.solve(gram, stacked.T @ target)
    rest = (target - stacked @ theta).square().sum() / (target - target.mean()).square().sum()
    return theta.float(), float(1 - rest)


def pushed(model: Reasoner, direction: Tensor) -> Tensor:
    """What a shift of the final state by `direction` [D] adds to the logits [V]."""
    return model.llama.lm_head.weight.float() @ direction  # type: ignore[no-any-return, operator]


def steered(
    session: Session, questions: Sequence[Sequence[int]], rung: int, added: Tensor | None, most: int = MOST
) -> list[list[int]]:
    """Texts in whose thoughts `added` [V] is added to all logits. `most`: tokens at which a thought is ended, and the answer
    asked for; where it is not set, nothing ends a thought but itself or the rung."""
    reserve = ANSWER if most < MOST else 0
    thoughts = Thoughts(session.networks["model"], questions, rung, reserve)
    adjust = None if added is None else lambda texts, logits: logits + added
    thoughts.write(thoughts.thinking(), session.rng, most=most, sentence=False, adjust=adjust)
    return thoughts.finish(CUE if reserve else None)


def tuned(session: Session, count: int, tried: int) -> dict[str, Tensor]:
    """{"theta": the vector [D], "r2", "delta": its strength, "length": tokens of a thought so steered, in the mean}."""
    seen = session.once(traces, session.scale(TRACES, 6))
    texts = [row[:length] for row, length in zip(seen["ids"].tolist(), seen["lengths"].tolist(), strict=True)]
    starts = seen["starts"].tolist()
    model = session.networks["model"]
    states = read_states(model, texts)
    ended = thinking_states(states, texts, starts)
    theta, r2 = progress_vector(ended) if ended else (states[0].new_zeros(states[0].shape[1]), 0.0)
    if not theta.any():  # at smoke no thought may have ended
        theta[0] = 1.0
    questions, answers = asked(session.train, HELD, count)
    written: dict[float, list[list[int]]] = {}

    def right(delta: float) -> float:
        added = pushed(model, delta * theta / theta.square().sum())
        written[delta] = [
            text for part in sides(questions) for text in steered(session, questions[part], enough(session), added)
        ]
        return share_right(written[delta], answers)

    with torch.no_grad():
        least = right(0.0)
        delta = eagerest(STRENGTHS[:tried], right, least)
    lengths = [text.index(END) if END in text else len(text) for text in written[delta]]
    return {
        "theta": theta,
        "r2": torch.tensor(r2),
        "delta": torch.tensor(delta),
        "length": torch.tensor(sum(lengths) / len(lengths)),
    }


class Overclocking(Method):
    """Overclocking: a direction of the hidden state that tells how much of the thought is done is pushed along.

    Of whole thoughts of N tokens, the state h_j from which the j-th is drawn is regressed on its place (the thinking
    progress vector, least squares without a constant):

        theta h_j = j / N

    While the model thinks, its state is shifted along this vector. It reads its progress greater by alpha times the square
    of the vector's length, and ends its thought sooner:

        h' = h + alpha theta
        theta h' = theta h + alpha |theta|^2

    N counts ``</think>``, so that the state that it is drawn from stands at 1. The vector is fitted to thoughts about 400
    train questions, sampled at temperature 0.6, as thoughts are with and without the shift; answers are the likeliest.
    Nothing ends a thought but itself or the rung, as in the paper's comparison under budgets. As in the official script
    the shift is made behind the last norm. There it adds one and the same vector to all logits, alpha times the
    embeddings times theta, and costs nothing.

    delta = alpha |theta|^2, how much further along the model is told to be, is the strength: of 6.4, 3.2, ... 0.2 thoughts
    the greatest with which no fewer answers to 150 other train questions are right than without it.

    Its controls: `full_thinking`, the same decoding unmodified; `random_steering`, a random vector of the same length;
    `terminator_bonus` adds to the logit of ``</think>`` what the shift adds to it beyond the mean word, and nothing to the
    others, so that no progress is needed to explain what it does; `underclocking` turns the shift round; `cut_thinking` ends
    every thought after as many tokens as the steered ones have in the mean, and asks for the answer. `chain_of_thought` is
    the same model asked for its steps without checking them again.

    Differs from the paper: the answer is left alone, where the official script shifts every token; alpha is tuned, where the
    script has 100 for states of 4096 numbers; the first token's state is that at the end of the prompt, where the script takes
    the one at its beginning. It decodes greedily; greedy thoughts of this model check nothing again, so that there is nothing
    to shorten. Thoughts are sampled without a nucleus. Shifts within the layers and the recurrent network that smooths the
    progress bar, with which nothing is controlled, are left out.

    What limits it here: the format checks again with a probability of each text's own, so that there is little progress to
    be known beyond whether the answer has been said. A step checked again stands late in a thought, so that a strong shift
    makes those likelier too.
    """

    paper = Paper(
        id="overclocking",
        title="Overclocking LLM Reasoning: Monitoring and Controlling Thinking Path Lengths in LLMs",
        authors="Roy Eisenstadt, Itamar Zimerman, Lior Wolf",
        year=2025,
        arxiv="2506.07240",
        code="royeisen/reasoning_loading_bar",
    )
    tasks = ("solve/problems",)
    baselines = (
        "full_thinking",
        "random_steering",
        "terminator_bonus",
        "underclocking",
        "cut_thinking",
        "chain_of_thought",
    )
    trainings = 3
    claims = (
        Claim(
            "accuracy[overclocking,32..64] > accuracy[full_thinking,32..64] "
            "and accuracy[overclocking,128..512] >= accuracy[full_thinking,128..512] - 0.01 "
            "and nfe[overclocking,64..512] <= 0.9 * nfe[full_thinking,64..512]",
            says="more answers are right within budgets that cut thoughts, no fewer within wider ones, but one in a hundred, "
            "and a tenth of the tokens is saved",
            headline=True,
        ),
        Claim(
            "nfe[overclocking,64..512] < nfe[random_steering,64..512] "
            "and nfe[underclocking,64..512] > nfe[full_thinking,64..512]",
            says="it is this direction: another of that length saves less, and turned round it prolongs the thought",
        ),
        Claim(
            "accuracy[overclocking,64..512] > accuracy[cut_thinking,64..512] "
            "and accuracy[overclocking,64..512] >= accuracy[chain_of_thought,64..512] - 0.01",
            says="more answers are right than where all thoughts are cut at that length, and no fewer than where steps are asked "
            "for unchecked",
        ),
        Claim(
            "accuracy[overclocking,*] >= accuracy[terminator_bonus,*] "
            "and nfe[overclocking,64..512] <= nfe[terminator_bonus,64..512]",
            says="it does more than raise the terminator",
        ),
    )
    vector, sign = "progress", 1.0
    variants = (
        Variant("underclocking", says="the shift turned round", sign=-1.0),
        Variant("random_steering", says="a random direction of the same length", vector="random"),
        Variant("terminator_bonus", says="of the shift, only what it adds to the terminator", vector="terminator"),
        Variant("cut_thinking", says="no shift: thoughts are cut at the mean length of steered ones", vector="none"),
    )

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Fit and tune the vector: {"added": what it adds to the logits [V], "length": tokens of a thought}."""
        found = session.once(tuned, session.scale(TUNED_ON, 3), session.scale(len(STRENGTHS), 1))
        theta = found["theta"]
        shift = self.sign * found["delta"] * theta / theta.square().sum()
        if self.vector == "random":
            drawn = torch.randn(len(theta), generator=session.rng, device=session.device)
            shift = drawn * shift.norm() / drawn.norm()
        with torch.no_grad():
            added = pushed(session.networks["model"], shift)
        if self.vector == "terminator":
            bonus = float(added[END] - added[: len(WORDS)].mean())  # what all words gain alike changes nothing
            added = torch.zeros_like(added).index_fill(0, torch.tensor([END], device=added.device), bonus)
        return {"added": added, "length": found["length"]}

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """Texts whose thoughts are steered, or cut."""
        if self.vector == "none":
            return steered(session, batch["question"], rung, None, max(1, int(session.state["length"].round())))
        return steered(session, batch["question"], rung, session.state["added"])
