"""What a method drafted, step by step: the harness decodes a prompt once more, listens, and shows the drafts.

A method that drafts either has its drafts checked (`verify_greedy`, `verify_sampling`) or runs the target over a tree of
them and keeps one branch in the cache (`KeyValueCache.compact`). Both are listened to where they happen, so that a method
need not say anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from stepmark.tracks.decoding import speculation
from stepmark.tracks.decoding.decoder import Decoder, KeyValueCache

Step = tuple[list[int], list[int]]  # what a step drafted, and what it wrote: the kept part and one token more
Check = tuple[list[int], list[int], float]  # a step, and the evaluations spent when its draft was checked


def steps_of(decode: Callable[[], Any], method: Any, spent: Callable[[], float]) -> tuple[list[int], list[Step]]:
    """Let a method decode one prompt and listen. Harness only.

    Returns: the new tokens, and what each step drafted and wrote; [] where the steps do not add up to the text, as of
    methods that check by other means.

    Args:
        decode: runs the method on a batch of one. spent: evaluations so far.
    """
    with checked_drafts(method, spent) as checks, kept_branches(spent) as branches:
        written: list[int] = list(decode()[0])
    steps = steps_of_checks(written, checks) if checks else steps_of_branches(written, branches)
    return written, steps if [token for _, new in steps for token in new][: len(written)] == written else []


# -- drafts that are checked ----------------------------------------------------------------------------------------


@contextmanager
def checked_drafts(method: Any, spent: Callable[[], float]) -> Iterator[list[Check]]:
    """While inside, note the drafts that `verify_greedy` and `verify_sampling` check, for `speculate` or the method.

    Of several that are checked between two evaluations, the one that is kept furthest counts.
    """
    checks: list[Check] = []
    rules = speculation.verify_greedy, speculation.verify_sampling

    def listening(verify: Callable[..., list[int]]) -> Callable[..., list[int]]:
        def heard(draft: Sequence[int], *rest: Any) -> list[int]:
            new = verify(draft, *rest)
            now = spent()
            if not checks or now > checks[-1][2]:
                checks.append((list(draft), new, now))
            elif len(new) > len(checks[-1][1]):
                checks[-1] = list(draft), new, checks[-1][2]
            return new

        return heard

    before = [
        (names, key, value)
        for names in (vars(speculation), method.run.__globals__)
        for key, value in list(names.items())
        if any(value is rule for rule in rules)
    ]
    try:
        for names, key, value in before:
            names[key] = listening(value)
        yield checks
    finally:
        for names, key, value in before:
            names[key] = value


def steps_of_checks(written: list[int], checks: Sequence[Check]) -> list[Step]:
    """The checks as steps; an evaluation after which nothing was checked wrote one token, where they do not add up."""
    steps = [(draft, new) for draft, new, _ in checks]
    if [token for _, new in steps for token in new][: len(written)] == written:
        return steps
    filled: list[Step] = []
    at, before = 0, 0.0
    for draft, new, now in checks:
        for _ in range(round(now - before) - 1):
            filled.append(([], written[at : at + 1]))
            at += 1
        filled.append((draft, new))
        at, before = at + len(new), now
    return filled + [([], [token]) for token in written[at:]]


# -- trees of drafts ------------------------------------------------------------------------------------------------

Branch = tuple[list[int], list[int]]  # what a tree drafted (the kept branch first), and the branch


@contextmanager
def kept_branches(spent: Callable[[], float]) -> Iterator[list[Branch]]:
    """While inside, note the trees of which one branch stays in the cache: that branch, and the tokens of other nodes."""
    branches: list[Branch] = []
    times: list[float] = []
    asked: dict[int, list[int]] = {}
    embed, compact = Decoder.embed, KeyValueCache.compact

    def embedding(decoder: Decoder, ids: Sequence[int]) -> Tensor:
        asked[id(decoder.cache)] = list(ids)
        return embed(decoder, ids)

    def compacting(cache: KeyValueCache, start: int, kept: Sequence[int]) -> None:
        nodes, stay = asked.get(id(cache), []), [slot - start for slot in kept]
        # A draft model's own cache, which follows without a further evaluation, is no step.
        if stay[:1] == [0] and stay[-1] < len(nodes) and (not times or spent() > times[-1]):
            times.append(spent())
            branch = [nodes[node] for node in stay[1:]]
            others = dict.fromkeys(nodes[node] for node in range(1, len(nodes)) if node not in stay)
            branches.append(([*branch, *others], branch))
        compact(cache, start, kept)

    try:
        Decoder.embed, KeyValueCache.compact = embedding, compacting  # type: ignore[method-assign]
        yield branches
    finally:
        Decoder.embed, KeyValueCache.compact = embed, compact  # type: ignore[method-assign]


def steps_of_branches(written: list[int], branches: Sequence[Branch]) -> list[Step]:
    """After the token of the prompt's own forward, each branch and the target's token after it."""
    if not branches:
        return []
    steps: list[Step] = [([], written[:1])]
    at = 1
    for draft, branch in branches:
        steps.append((draft, (branch + written[at + len(branch) : at + len(branch) + 1])[: len(written) - at]))
        at += len(branch) + 1
    return steps
