"""Training texts made while a model trains: parts of which some count as targets, harder as training goes on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from stepmark.backbones.reasoners import PAD, encode

Row = tuple[list[int], list[bool]]  # token ids, and which of them count as targets
Part = tuple[str, bool]
POOL = 192  # texts among which those of similar lengths are put together


def row(parts: Sequence[Part]) -> Row:
    """A text of parts, each with whether its tokens are targets."""
    ids, wanted = list[int](), list[bool]()
    for text, target in parts:
        own = encode(text)
        ids += own
        wanted += [target] * len(own)
    return ids, wanted


def stacked(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """(input ids, labels), both int64 [B, L]: labels are the next tokens, -100 where they are no targets."""
    longest = max(len(ids) for ids, _ in rows) - 1
    inputs, labels = torch.full((len(rows), longest), PAD), torch.full((len(rows), longest), -100)
    for number, (ids, wanted) in enumerate(rows):
        whole, counts = torch.tensor(ids), torch.tensor(wanted)
        inputs[number, : len(ids) - 1] = whole[:-1]
        labels[number, : len(ids) - 1] = torch.where(counts[1:], whole[1:], -100)
    return inputs, labels


def stream(
    draw: Callable[[random.Random, float], Row], steps: int, tokens: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of about `tokens` tokens, of similar lengths each, as `stacked` gives them.

    `draw` is told which share of `steps` batches has been given.
    """
    rng, given = random.Random(f"lessons {seed}"), 0
    while True:
        drawn = sorted((draw(rng, given / steps) for _ in range(POOL)), key=lambda each: len(each[0]))
        cut: list[list[Row]] = [[]]
        for each in drawn:
            if cut[-1] and len(each[0]) * (len(cut[-1]) + 1) > tokens:
                cut.append([])
            cut[-1].append(each)
        rng.shuffle(cut)
        for rows in cut:
            yield stacked(rows)
            given += 1
