"""Drafting and verifying: the loop, greedy verification, the acceptance rule of speculative sampling, prompt lookup."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.tracks.decoding.decoder import Decoder, KeyValueCache


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


Step = tuple[list[int], list[int]]


def steps_of(decode: Callable[[], Any], method: Any, spent: Callable[[], float]) -> tuple[list[int], list[Step]]:
    """Let a method decode one prompt and listen. Harness only.

    Returns: the new tokens, and what each step drafted and wrote; a step writes the kept part of its draft and one token
    more. Drafts are seen where `verify_greedy` or `verify_sampling` check them. Of several that are checked between two
    evaluations, the one that is kept furthest counts; an evaluation after which none is checked wrote one token. A tree
    is seen where one branch of it stays in the cache; its draft is that branch and then the tokens of other nodes. []
    where the steps do not add up to the text, as of methods that check by other means.

    Args:
        decode: runs the method on a batch of one. spent: evaluations so far.
    """
    steps: list[Step] = []
    trees: list[Step] = []  # without the token more
    times: list[float] = []
    grown: list[float] = []
    asked: dict[int, list[int]] = {}
    here, there = globals(), method.run.__globals__
    embed, compact = Decoder.embed, KeyValueCache.compact

    def listening(verify: Callable[..., list[int]]) -> Callable[..., list[int]]:
        def heard(draft: Sequence[int], *rest: Any) -> list[int]:
            new = verify(draft, *rest)
            if not times or spent() > times[-1]:
                steps.append((list(draft), new))
                times.append(spent())
            elif len(new) > len(steps[-1][1]):
                steps[-1] = list(draft), new
            return new

        return heard

    def embedding(decoder: Decoder, ids: Sequence[int]) -> Tensor:
        asked[id(decoder.cache)] = list(ids)
        return embed(decoder, ids)

    def compacting(cache: KeyValueCache, start: int, kept: Sequence[int]) -> None:
        nodes, stay = asked.get(id(cache), []), [slot - start for slot in kept]
        if not steps and stay[:1] == [0] and stay[-1] < len(nodes) and (not grown or spent() > grown[-1]):
            grown.append(spent())  # a draft model's own cache, which follows, is no step
            branch = [nodes[node] for node in stay[1:]]
            others = dict.fromkeys(nodes[node] for node in range(1, len(nodes)) if node not in stay)
            trees.append(([*branch, *others], branch))
        compact(cache, start, kept)

    before = [
        (names, key, value)
        for names in (here, there)
        for key, value in list(names.items())
        if value is verify_greedy or value is verify_sampling
    ]
    try:
        for names, key, value in before:
            names[key] = listening(value)
        Decoder.embed, KeyValueCache.compact = embedding, compacting  # type: ignore[method-assign]
        written: list[int] = list(decode()[0])
    finally:
        for names, key, value in before:
            names[key] = value
        Decoder.embed, KeyValueCache.compact = embed, compact  # type: ignore[method-assign]
    for found in (list(_branches(written, trees)), steps, list(_filled(written, steps, times))):
        if found and [token for _, new in found for token in new][: len(written)] == written:
            return written, found
    return written, []


def _branches(written: list[int], trees: Sequence[Step]) -> Iterable[Step]:
    """The steps of trees: after the token of the prompt's own forward, each branch and the target's token after it."""
    if trees:
        yield [], written[:1]
    at = 1
    for draft, branch in trees:
        yield draft, (branch + written[at + len(branch) : at + len(branch) + 1])[: len(written) - at]
        at += len(branch) + 1


def _filled(written: list[int], steps: Sequence[Step], times: Sequence[float]) -> Iterable[Step]:
    """The steps, and for each evaluation between two of them one that drafted nothing."""
    at, before = 0, 0.0
    for (draft, new), time in zip(steps, times, strict=True):
        for _ in range(round(time - before) - 1):
            yield [], written[at : at + 1]
            at += 1
        yield draft, new
        at, before = at + len(new), time
    yield from (([], [token]) for token in written[at:])


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


def prompt_lookup(tokens: Sequence[int], longest: int, length: int) -> list[int]:
    """Draft by lookup: what followed the most recent earlier occurrence of the longest n-gram that ends the text.

    Args:
        longest: greatest n tried, down to 1. length: tokens to draft at most.
    """
    end = len(tokens)
    for n in range(min(longest, end - 1), 0, -1):
        tail = tokens[end - n :]
        for i in range(end - n - 1, -1, -1):
            if tokens[i : i + n] == tail:
                return list(tokens[i + n : i + n + length])
    return []
