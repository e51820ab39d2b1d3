"""What methods share that write and choose texts: prompts, shares of the budget, votes.

Questions and texts are lists of token ids; the answer stands from ``ans`` to the end of the sequence. Nothing here knows an
answer: all of it works on what a model has written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import EOS, decode, encode
from stepmark.session import Session

CHAIN = 64  # most tokens of a chain of thought
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
