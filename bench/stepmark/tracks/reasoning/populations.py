"""Several texts of each question side by side: what the rung has room for, draws among them, judging, writing to the ends.

`owner` says of each text of some `Chains` to which question it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import Verifier
from stepmark.session import Session
from stepmark.tracks.reasoning.solving import CHAIN, STEP, judged, write_step

# Most chains of thought that are worked on side by side. Prompt and chain of one are 150 tokens at most, of 6 KB of keys and
# values each in the model of width 192, so that all of them are half a gigabyte, and another half while they are taken anew.
SIDE = 512


class Part:
    """A session as some questions of a batch see it: what may be spent is for these alone, all else is the same."""

    def __init__(self, session: Session, limit: float) -> None:
        self.networks, self.state = session.networks, session.state
        self.rng, self.device = session.rng, session.device
        self.limit, self._session, self._before = limit, session, session.spent

    @property
    def spent(self) -> float:
        """Rows that these questions have taken."""
        return self._session.spent - self._before


Solve = Callable[[Session, Mapping[str, Any], int], list[list[int]]]


def in_parts(session: Session, batch: Mapping[str, Any], rung: int, chains: int, solve: Solve) -> list[list[int]]:
    """What `solve` returns for the questions of a batch, which are worked on in parts of about equal size, as few as there
    may be where each question has so many chains side by side. A part may spend the rung for each of its questions."""
    questions = batch["question"]
    parts = max(1, -(-len(questions) * chains // SIDE))
    size = -(-len(questions) // parts)
    found: list[list[int]] = []
    for start in range(0, len(questions), size):
        some = questions[start : start + size]
        found += solve(Part(session, rung * len(some)), {"question": some}, rung)
    return found


def room(session: Session, sharing: int) -> int:
    """Tokens that each of so many questions, or texts, may still have, if all others leave theirs to them."""
    return int((session.limit - session.spent) // max(1, sharing))


def by_question(owner: Sequence[int], questions: int) -> list[list[int]]:
    """Numbers of the texts of each question, in their order."""
    found: list[list[int]] = [[] for _ in range(questions)]
    for i, question in enumerate(owner):
        found[question].append(i)
    return found


def going(chains: Chains, chosen: Sequence[int], longest: int = CHAIN) -> list[int]:
    """Those of the chosen texts that have not ended and are shorter than `longest` tokens without their prompts."""
    return [i for i in chosen if not chains.ended(i) and len(chains.texts[i]) - chains.starts[i] < longest]


def drawn(session: Session, weights: Tensor | Sequence[float], count: int, replacement: bool = False) -> list[int]:
    """`count` numbers drawn by weights that need not sum to 1, one after the other; none twice without replacement."""
    table = torch.as_tensor(weights, dtype=torch.float64, device=session.device).clamp_min(1e-12)
    return torch.multinomial(table, count, replacement, generator=session.rng).tolist()  # type: ignore[no-any-return]


def judged_once(verifier: Verifier, texts: Sequence[Sequence[int]]) -> list[float]:
    """As `judged`; texts that are the same are read once."""
    distinct = list(dict.fromkeys(tuple(text) for text in texts))
    found = dict(zip(distinct, judged(verifier, distinct), strict=True))
    return [found[tuple(text)] for text in texts]


def write_to_ends(
    session: Session, chains: Chains, owner: Sequence[int], temperature: float, longest: int = CHAIN
) -> None:
    """Write all texts on, step by step, to their ends or to `longest` tokens.

    Of each question only as many are written at a time as the rung has room for, `STEP` tokens each, at least one; the
    others, those further behind in the order, wait until these have ended. Where nothing is left, the rest stays as it is.
    """
    questions = max(owner, default=-1) + 1
    while True:
        waiting = [mine for mine in (going(chains, i, longest) for i in by_question(owner, questions)) if mine]
        fit = max(1, room(session, len(waiting)) // STEP)
        chosen = [i for mine in waiting for i in mine[:fit]]
        share = room(session, len(chosen))
        if not chosen or share < 1:
            return
        write_step(chains, chosen, session, temperature, min(STEP, share))


def texts_that_fit(
    session: Session,
    first: Chains,
    rung: int,
    longest: int,
    *,
    temperature: float,
    top_p: float = 1.0,
    most: int = 1_000,
    aside: int = 0,
) -> list[list[list[int]]]:
    """As many texts behind each prompt of `first` as the rung has room for, at least one and `most` at most, each of `longest`
    tokens at most. Another is begun where there is room for as many tokens as the longest of its prompt has. `aside`: rows
    that are left for each of them, to judge it."""
    first.read()  # the prompts are read once for all texts: with it comes the first token of each
    found: list[list[list[int]]] = [[] for _ in range(len(first))]
    left, going = [rung - 1] * len(first), list(range(len(first)))
    while going:
        chains = first.take(going)
        limits = [max(1, min(longest, left[i] + 1 - aside)) for i in going]
        chains.write(limit=limits, temperature=temperature, top_p=top_p, generator=session.rng)
        for k, i in enumerate(going):
            found[i].append(chains.written(k))
            left[i] -= len(found[i][-1]) - 1 + aside
        going = [i for i in going if len(found[i]) < most and left[i] >= max(map(len, found[i])) - 1 + aside]
    return found
