"""What tests of methods on knowledge share: a model that writes whole completions, questions, their marks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from stepmark.datasets import knowledge
from tests.rigs.reasoning import Scripted

Reply = Callable[[str], dict[str, float]]


def writer(reply: Reply) -> Scripted:
    """A model that writes, behind a prompt up to its last format (or ``TITLE :``), whole completions by their weights."""

    def says(text: str) -> dict[str, float]:
        words = text.split()
        ends = [k for k, word in enumerate(words) if word.startswith("<") or (word == ":" and "->" not in words)]
        if not ends:
            return {}
        own, found = words[ends[-1] + 1 :], dict[str, float]()
        for completion, weight in reply(" ".join(words[: ends[-1] + 1])).items():
            wanted = [*completion.split(), "<eos>"]
            if wanted[: len(own)] == own and len(own) < len(wanted):
                found[wanted[len(own)]] = found.get(wanted[len(own)], 0.0) + weight
        total = sum(found.values())
        return {word: weight / total for word, weight in found.items()} if total else {"<eos>": 1.0}

    return Scripted(says)


def some(kind: str, count: int, seed: int = 0, **how: Any) -> list[knowledge.Question]:
    """Questions of a kind that no model is trained on."""
    rng = random.Random(f"methods {kind} {seed}")
    return [knowledge.draw(rng, kind, test=True, **how) for _ in range(count)]


def told(questions: Sequence[knowledge.Question]) -> list[str]:
    """Their texts."""
    return [knowledge.told(question) for question in questions]


def judge(question: knowledge.Question, text: str) -> dict[str, Any]:
    """What the track measures of a text."""
    return knowledge.judged(knowledge.told(question), text)


def gold(prompt: str) -> str:
    """The right completion of a prompt about this world, without pages."""
    question, _, form = prompt.rpartition(" -> ")[2].rpartition(" ")
    return knowledge.solution(knowledge.read(question.partition(" <")[0]), form)
