"""Drafting and verifying: the loop, greedy verification, the acceptance rule of speculative sampling, plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stepmark.tracks.decoding.decoder import Decoder


def verify_greedy(draft: Sequence[int], greedy: Sequence[int]) -> list[int]:
    """Longest agreeing prefix of a draft, and the target's own token after it.

    `greedy` are the target's greedy tokens after the context, after draft[:1], ...: one more than the draft has.
    """
    kept = 0
    while kept < len(draft) and draft[kept] == greedy[kept]:
        kept += 1
    return [*draft[:kept], greedy[kept]]


def draw(p: Tensor, u: float) -> int:
    """The token whose cumulative probability first exceeds u in [0, 1); p [V] need not be normalised."""
    cumulative = p.double().cumsum(0)
    token = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    return token if token < len(p) else int(p.nonzero()[-1])


def verify_sampling(draft: Sequence[int], p: Tensor, q: Tensor, u: Sequence[float]) -> list[int]:
    """Speculative sampling: the tokens kept of a draft, and one more; each is distributed as the target's.

    Leviathan et al. 2023, algorithm 1: keep x with probability min(1, p(x)/q(x)); at the first rejection draw from
    norm(max(0, p - q)); after a fully kept draft draw from p.

    Args:
        p: target's distributions [len(draft) + 1, V]. q: the draft's [len(draft), V]. u: len(draft) + 1 uniforms.
    """
    if draft:
        index = torch.tensor(list(draft), device=p.device)[:, None]
        ratio = (p[:-1].gather(1, index) / q.gather(1, index))[:, 0].tolist()
    for i in range(len(draft)):
        if u[i] >= ratio[i]:
            residual = (p[i] - q[i]).clamp(min=0)
            return [*draft[:i], draw(residual if residual.any() else p[i], u[-1])]
    return [*draft, draw(p[-1], u[-1])]


# (all tokens so far, how many may be drafted) -> (draft, its distributions [len(draft), V], or None: q(x) = 1).
Propose = Callable[[list[int], int], tuple[list[int], "Tensor | None"]]


def speculate(
    target: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    budget: float,
    temperature: float,
    propose: Propose,
    rng: torch.Generator | None = None,
) -> list[int]:
    """Draft-and-verify decoding of one prompt; lossless for any `propose`.

    Args:
        budget: evaluations the target may spend on this prompt, including what `propose` spends on it.
        propose: (all tokens so far, how many it may draft at most) -> (draft, its distributions [len(draft), V], or
            None for a certain draft, q(x) = 1). With an empty draft the step is plain decoding.
        rng: needed above temperature 0.

    Returns: new token ids.
    """
    tokens = list(prompt)
    end = len(prompt) + max_new_tokens
    logits = target.forward(tokens, last=1)
    draft: list[int] = []
    q: Tensor | None = None
    while True:
        if temperature == 0:
            new = verify_greedy(draft, logits.argmax(-1).tolist())
        else:
            u = torch.rand(len(draft) + 1, generator=rng, device=target.device).tolist()
            p = (logits.double() / temperature).softmax(-1)
            if q is None:
                q = nn.functional.one_hot(torch.tensor(draft, device=p.device, dtype=torch.long), p.shape[1]).to(p)
            new = verify_sampling(draft, p, q.to(p), u)
        if target.eos in new:
            new = new[: new.index(target.eos) + 1]
        target.rollback(min(target.length, len(tokens) + len(new) - 1))
        tokens += new
        if tokens[-1] == target.eos or len(tokens) >= end or target.spent + 1 > budget + 1e-9:
            return tokens[len(prompt) : end]
        draft, q = propose(tokens, end - len(tokens) - 1)
        if target.spent + 1 > budget + 1e-9:
            return tokens[len(prompt) :]
        logits = target.forward([tokens[-1], *draft])


def write_plainly(
    target: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    budget: float,
    temperature: float,
    rng: torch.Generator | None = None,
) -> list[int]:
    """Plain decoding of one prompt: prefill, then one token per evaluation, as `speculate` without drafts."""
    return speculate(target, prompt, max_new_tokens, budget, temperature, lambda tokens, most: ([], None), rng)


def draft_while_sure(
    after: Callable[[list[int]], Tensor | None],
    most: int,
    eos: int,
    temperature: float,
    rng: torch.Generator,
    least: float = 0.0,
) -> tuple[list[int], Tensor | None]:
    """A draft written token after token by a cheaper model, greedily or by sampling, as `speculate` asks for one.

    It ends after `most` tokens, with the end-of-sequence token, after the first token of which the model is less sure
    than `least` (the greatest probability at temperature 1; the token stays in the draft, for it is paid for), or where
    `after` gives nothing because no budget is left.

    Args:
        after: draft so far -> logits [V] of its next token, or None.
    """
    draft: list[int] = []
    q: list[Tensor] = []
    while len(draft) < most and (found := after(draft)) is not None:
        logits = found.double()
        if temperature == 0:
            draft.append(int(logits.argmax()))
        else:
            q.append((logits / temperature).softmax(-1))
            draft.append(draw(q[-1], float(torch.rand((), generator=rng, device=found.device))))
        if draft[-1] == eos or (least > 0 and float(logits.softmax(-1).max()) < least):
            break
    return draft, torch.stack(q) if q else None
