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


def first_step(question: Sequence[int], seed: int | None = None) -> list[int]:
    """The step that a question asks for first, with its full stop; with a `seed`, wrongly worked in a way that it draws."""
    step = problems.read(decode(question)).steps[0]
    if seed is not None:
        step = problems.slip(step, random.Random(seed))
    return encode(f"{step.clause} .")


def right(question: Sequence[int], text: Sequence[int]) -> bool:
    """Whether a text ends in the right answer."""
    return problems.check(decode(question), decode(text)).right
