"""What can be worked out exactly from a word problem: checks and steps that know the answer, of use as bounds and for analyses.

A method that asks one of them has to say so. The like on countdown stands in `moves`, on deduction in `deducing`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from stepmark.backbones.reasoners import decode, encode
from stepmark.datasets import problems


def sound(question: Sequence[int], text: Sequence[int], whole: bool) -> bool:
    """Whether all steps of a text are right and in their places; of a `whole` one the answer too."""
    seen = problems.check(decode(question), decode(text))
    return all(seen.steps) and (seen.right or not whole)


def opening(question: Sequence[int], count: int | None = 1, seed: int | None = None) -> list[int]:
    """The first `count` steps that a question asks for (None: all), with their full stops; with a `seed`, the last of them
    wrongly worked in a way that it draws."""
    steps = list(problems.read(decode(question)).steps[:count])
    if seed is not None:
        steps[-1] = problems.slip(steps[-1], random.Random(seed))
    return encode(" ".join(f"{step.clause} ." for step in steps))


def right(question: Sequence[int], text: Sequence[int]) -> bool:
    """Whether a text ends in the right answer."""
    return problems.check(decode(question), decode(text)).right
