"""What methods share that write, judge and choose texts: prompts, shares of the budget, steps, votes, judgements.

Questions and texts are lists of token ids. A step is what stands between full stops; the answer, from ``ans`` to the end of
the sequence, is the last one. Nothing here knows an answer: all of it works on what a model has written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import DIGITS, EOS, PAD, STOP, Reasoner, Verifier, decode, encode
from stepmark.session import Session

CHAIN = 64  # most tokens of a chain of thought
STEP = 20  # and of one of its steps
LONGEST_TEXT = 300  # tokens that a model writes in one go, far more than a chain has
PROOFS = "deduce/"  # tasks whose steps are proofs; elsewhere they are chains of thought


def steps_form(task: str) -> str:
    """The word that asks for the answer of a task step by step."""
    return "<proof>" if task.startswith(PROOFS) else "<cot>"


def prompts(batch: Mapping[str, Any], form: str) -> list[list[int]]:
    """The questions, each with the word behind it that chooses a format."""
    word = encode(form)
    return [[*question, *word] for question in batch["question"]]


def left(session: Session, batch: Mapping[str, Any]) -> int:
    """Tokens that each question of the batch may still have, if all of them get as many."""
    return int((session.limit - session.spent) // len(batch["question"]))


def write_chains(session: Session, chains: Chains, share: int, temperature: float) -> None:
    """Write texts on to their ends, at most `share` tokens each."""
    chains.write(limit=share, temperature=temperature, generator=session.rng)


def write_step(
    chains: Chains, chosen: Sequence[int] | None, session: Session, temperature: float, most: int = STEP
) -> list[list[int]]:
    """One step more of the chosen texts: up to a full stop, the end of the sequence, or `most` tokens."""
    return chains.write(chosen, stop=(STOP,), limit=most, temperature=temperature, generator=session.rng)


def steps_of(text: Sequence[int]) -> list[list[int]]:
    """The steps of a text without its prompt, each with its full stop; the last one may lack it."""
    found: list[list[int]] = [[]]
    for token in text:
        found[-1].append(token)
        if token == STOP:
            found.append([])
    return [step for step in found if step]


def answer_of(text: Sequence[int]) -> str | None:
    """What stands behind the last ``ans`` of a text that has ended; None where it has not, or holds none."""
    words = decode(text)
    return words.rpartition("ans ")[2] if text and text[-1] == EOS and "ans " in words else None


def plurality(answers: Sequence[str | None], weights: Sequence[float] | None = None) -> int:
    """Number of the first text whose answer has the most votes, or the greatest sum of `weights`; texts without an answer
    have no vote. 0 where none has one."""
    votes: Counter[str] = Counter()
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        if answer is not None:
            votes[answer] += weight  # type: ignore[assignment]
    if not votes:
        return 0
    best = max(votes.values())
    chosen = next(answer for answer in answers if answer is not None and votes[answer] == best)
    return answers.index(chosen)


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 [B, T], padded on the right."""
    longest = max(map(len, texts))
    return torch.tensor([[*text, *[PAD] * (longest - len(text))] for text in texts], device=device)


def judged(verifier: Verifier, texts: Sequence[Sequence[int]]) -> list[float]:
    """Probability that all is well at the end of each text, prompt included, in one call of a verifier."""
    said = verifier(padded(texts, verifier.reader.device))
    return [float(row[len(text) - 1].sigmoid()) for row, text in zip(said, texts, strict=True)]


def self_judged(model: Reasoner, questions: Sequence[Sequence[int]], steps: Sequence[Sequence[int]]) -> Tensor:
    """Probabilities [B, 10] of the digits by which a model itself says what the last of some steps is worth, 0 to 9.

    One row of a call, as of one generated token, for each.
    """
    asked = [[*q, *encode("<verify>"), *s, *encode("<score>")] for q, s in zip(questions, steps, strict=True)]
    return Chains(model, asked).read()[:, DIGITS].softmax(-1)
