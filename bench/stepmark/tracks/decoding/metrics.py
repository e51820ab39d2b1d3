"""How far a text agrees with plain decoding of the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Two logits closer than this count as tied: cached and uncached passes differ by rounding.
TIE = 1e-4


def agreement(network: nn.Module, prompt: Sequence[int], output: Sequence[int]) -> int:
    """How many leading tokens of `output` are those of plain greedy decoding.

    One forward over prompt and output, without a cache: token i is greedy if it has the greatest logit after all
    tokens before it, and by induction the prefix up to the first other token is the greedy continuation.
    """
    device = next(network.parameters()).device
    with torch.no_grad():
        logits = network(torch.tensor([[*prompt, *output[:-1]]], device=device)).logits[0, len(prompt) - 1 :].float()
    taken = logits.gather(1, torch.tensor(output, device=device)[:, None])[:, 0]
    wrong = (taken < logits.amax(1) - TIE).nonzero()
    return int(wrong[0]) if len(wrong) else len(output)


def token_deviation(network: nn.Module, prompt: Sequence[int], output: Sequence[int]) -> tuple[Tensor, float]:
    """How far the words of an output are from those its own distributions promise.

    Returns the sum over positions of onehot(token) - p, [V], and the sum over positions and words of p (1 - p). For
    tokens drawn from p the first is a martingale whose summed variance is the expectation of the second, wherever a
    budget or the end of the text stops it.
    """
    device = next(network.parameters()).device
    with torch.no_grad():
        logits = network(torch.tensor([[*prompt, *output[:-1]]], device=device)).logits[0, len(prompt) - 1 :]
    p = logits.double().softmax(-1)
    counted = torch.bincount(torch.tensor(output, device=device), minlength=p.shape[1])
    return (counted - p.sum(0)).cpu(), float((p * (1 - p)).sum())
