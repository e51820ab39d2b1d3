"""How models of reasoning are examined before any method acts on them: greedy texts, and eight drawn ones of each question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from stepmark.backbones.reasoners import decode, encode


@torch.no_grad()
def texts_of(model: nn.Module, prompts: Sequence[str], limit: int) -> list[str]:
    """Greedy texts behind prompts."""
    from stepmark.backbones.chains import Chains

    chains = Chains(model, [encode(prompt) for prompt in prompts])  # type: ignore[arg-type]
    return [decode(own) for own in chains.write(limit=limit)]


@torch.no_grad()
def drawn(
    model: nn.Module,
    prompts: Sequence[str],
    limit: int,
    right: Callable[[int, str], bool],
    answer: Callable[[str], Any],
) -> dict[str, float]:
    """Eight texts behind each prompt at temperatures .7 and 1: shares that are right of one, of their plurality, of any."""
    from stepmark.backbones.chains import Chains

    found = dict[str, float]()
    for temperature in (0.7, 1.0):
        draw = torch.Generator().manual_seed(0)
        first = Chains(model, [encode(prompt) for prompt in prompts])  # type: ignore[arg-type]
        chains = first.take([i for i in range(len(prompts)) for _ in range(8)])
        texts = [decode(own) for own in chains.write(limit=limit, temperature=temperature, generator=draw)]
        marks = [[right(i, text) for text in texts[8 * i : 8 * i + 8]] for i in range(len(prompts))]
        votes = 0
        for i in range(len(prompts)):
            given = [answer(text) for text in texts[8 * i : 8 * i + 8]]
            counts = Counter(each for each in given if each is not None)
            votes += bool(counts) and marks[i][given.index(counts.most_common(1)[0][0])]
        name = f"{temperature:g}".lstrip("0")
        found[f"sampled_{name}"] = sum(map(sum, marks)) / (8 * len(prompts))
        found[f"vote_8_{name}"] = votes / len(prompts)
        found[f"pass_8_{name}"] = sum(map(any, marks)) / len(prompts)
    return found
