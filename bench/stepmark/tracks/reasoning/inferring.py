"""What methods share on analogies: the pairs of a question, and a rule that is carried out on one thing alone.

A rule is the token ids of its operations with their colon, as a model writes it; what it gives is what the model says.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepmark.backbones.reasoners import WORDS, decode, encode
from stepmark.datasets import analogies
from stepmark.datasets.analogies import Thing as Thing

COLON = WORDS.index(":")
RULE = 4  # tokens of a rule with its colon


def pairs_of(question: Sequence[int]) -> list[tuple[Thing, str]]:
    """The first of each pair of a question, and its second in words."""
    return [(one, " ".join(other)) for one, other in analogies.read(decode(question)).pairs]


def alone(thing: Thing, rule: Sequence[int]) -> list[int]:
    """A prompt behind which a rule is carried out on a thing, without pairs."""
    return [*encode(f"{analogies.told(analogies.Question((), thing))} <rules>"), *rule]


def longest(thing: Thing) -> int:
    """Tokens that carrying out takes at most: three states, the answer, their stops and the end."""
    return 4 * len(thing) + 9
