"""Diver: candidate spans are verified by how well the input can be told from them (Lu, Wang and Zhang, 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from stepmark.backbones.lm import EOS, batches, encode, fit
from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import draw

# How likely a candidate is at least, as a share of the likeliest, how many there are and how long a span is at most.
GAMMA, CANDIDATES, SPAN = 0.1, 8, 4
ASK = "? let"  # the backward prompt: after a text, what was wished for?


def candidates(p: Tensor) -> list[int]:
    """Tokens with p [V] >= gamma max p, likeliest first."""
    likely, tokens = p.topk(CANDIDATES)
    return tokens[likely >= GAMMA * likely[0]].tolist()


def run_branches(decoder: Decoder, before: Sequence[int], branches: Sequence[Sequence[int]]) -> Tensor:
    """Hidden states [1, T, D] of the tokens `before`, which continue the text, and of branches after them, in one pass.

    The branches stand side by side behind the text: each sees the text and itself. `length` is not moved.
    """
    ids = [*before, *(token for branch in branches for token in branch)]
    start, trunk = decoder.length, decoder.length + len(before)
    sees = torch.ones(len(ids), start + len(ids), dtype=torch.bool, device=decoder.device).tril(start)
    positions, first = [*range(start, trunk)], len(before)
    for branch in branches:
        sees[first : first + len(branch), trunk : start + first] = False
        positions += range(trunk, trunk + len(branch))
        first += len(branch)
    at = torch.tensor(positions, device=decoder.device)
    return decoder.run(decoder.embed(ids), start, None, at, sees)


class Diver(Method):
    """Diver: where the model hesitates, short spans are tried, and what speaks for the input is preferred.

    At each step the candidates are V = {v: p(v) >= gamma max p}. With one it is written. With more, the step is a
    divergence: every candidate is continued greedily to a span s_v, until the model is sure of the next token again (one
    candidate) or for `SPAN` tokens, and the spans are scored by likelihood and pointwise mutual information with the
    input x, the gain in log-likelihood of x if the span is written:

        score(v) = log p(s_v | x, y) + log p(x | y, s_v) - log p(x | y)

    p(x | .) comes from a backward prompt, which asks for the input after the text, and of the input only the span that
    matters is asked for: here what is wished. The softmax of the scores is the new distribution of the first token; one
    is drawn (the best one at temperature 0), and its whole span is written. The spans of all candidates grow in the same
    passes, under a tree mask; so do the texts that the backward prompt follows. log p(x | y) is the same for all
    candidates and falls out of the softmax, so it is not computed.

    Differs from the paper: a model of this size cannot be prompted into telling the input, so a copy of the target was
    trained for seconds to do it, on beginnings of texts of the train split. Its passes count against the rung. The paper
    cuts spans where candidates diverge again; that a span ends where the model is sure is the reading followed here.
    """

    paper = Paper(
        id="diver",
        title="Diver: Large Language Model Decoding with Span-Level Mutual Information Verification",
        authors="Jinliang Lu, Chen Wang, Jiajun Zhang",
        year=2024,
        arxiv="2406.02120",
    )
    tasks = ("preference/colours",)
    baselines = ("wish_prompting", "linear_alignment")
    claims = (
        Claim(
            "compliance[diver,192] >= compliance[wish_prompting,192] + 0.1 "
            "and accuracy[diver,192] >= accuracy[wish_prompting,192] - 0.05",
            says="texts keep to the input in a tenth more of the events than those of plain decoding, and are as right",
        ),
        Claim(
            "compliance[diver,192] >= compliance[linear_alignment,192]",
            says="and at least as often as by contrasting the logits with and without the input",
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The backward model, a copy of the target."""
        return {"backward": session.clone("target")}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Teach the backward model what was wished for, from beginnings of texts."""
        count, steps = session.scale((4000, 120), (12, 2))
        texts = list(zip(session.train["prompt"], session.train["target"], strict=True))
        rows = []
        for prompt, text in islice(texts, 0, 2 * count, 2):  # every other prompt holds a wish
            words, wish = text.split(), prompt.partition(" let ")[2].split()[0]
            cut = int(torch.randint(1, len(words) + 1, (), generator=session.rng, device=session.device))
            rows.append((encode(" ".join([*words[:cut], ASK])), encode(wish)))
        stream = batches(rows, 1500, session.seed)
        fit(session.networks["backward"], session.progress, steps=steps, lr=1e-3, seed=session.seed, stream=stream)
        return {}

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            capacity = len(prompt) + room + CANDIDATES * (SPAN + 2)
            roles = (session.networks["target"], session.networks["backward"])
            target, backward = (Decoder(model, capacity) for model in roles)
            return self.decode(target, backward, prompt, room, rung, temperature, session.rng)

        return write_each(batch, write)

    @classmethod
    def decode(
        cls,
        target: Decoder,
        backward: Decoder,
        prompt: Sequence[int],
        room: int,
        budget: float,
        temperature: float,
        rng: torch.Generator,
    ) -> list[int]:
        """New token ids of one prompt in at most `budget` passes of both models."""
        wish = prompt[list(prompt).index(encode("let")[0]) + 1]
        written: list[int] = []
        p = target.forward(prompt, last=1)[0].softmax(-1)
        while True:
            first = candidates(p)
            left = budget - target.spent - backward.spent
            # A divergence takes a pass for each token of a span and one backwards; short of that the likeliest is written.
            if len(first) == 1 or left < SPAN + 1:
                written.append(first[0])
                if written[-1] == EOS or len(written) >= room or left < 1:
                    return written[:room]
                p = target.forward(written[-1:], last=1)[0].softmax(-1)
                continue
            spans, slots, likely, after = cls.grow(target, first, p)
            gains = cls.told(backward, written, spans, wish)
            scores = torch.tensor(likely, device=target.device) + gains
            u = float(torch.rand((), generator=rng, device=target.device))
            best = draw((scores / temperature).softmax(-1), u) if temperature > 0 else int(scores.argmax())
            written += spans[best]
            if written[-1] == EOS or len(written) >= room:
                return written[:room]
            target.cache.compact(target.length, slots[best])
            target.length += len(spans[best])
            p = after[best]

    @staticmethod
    def grow(
        target: Decoder, first: Sequence[int], p: Tensor
    ) -> tuple[list[list[int]], list[list[int]], list[float], list[Tensor]]:
        """A span for each candidate: its tokens, their slots, log p(span) and the distribution of what comes after."""
        start, used = target.length, target.length
        spans, slots = [[token] for token in first], [[] for _ in first]
        likely, after = [float(p[token].log()) for token in first], [p for _ in first]
        growing = list(range(len(first)))
        while growing:
            sees = torch.zeros(len(growing), used + len(growing), dtype=torch.bool, device=target.device)
            sees[:, :start] = True
            for row, branch in enumerate(growing):
                slots[branch].append(used + row)
                sees[row, slots[branch]] = True
            at = torch.full((len(growing),), start + len(slots[growing[0]]) - 1, device=target.device)
            ids = [spans[branch][-1] for branch in growing]
            found = target.logits(target.run(target.embed(ids), used, None, at, sees)).softmax(-1)
            used += len(growing)
            still = []
            for branch, row in zip(growing, found, strict=True):
                after[branch] = row
                if spans[branch][-1] != EOS and len(spans[branch]) < SPAN and len(candidates(row)) > 1:
                    spans[branch].append(int(row.argmax()))
                    likely[branch] += float(row.max().log())
                    still.append(branch)
            growing = still
        return spans, slots, likely, after

    @staticmethod
    def told(backward: Decoder, written: Sequence[int], spans: Sequence[Sequence[int]], wish: int) -> Tensor:
        """log p(x | y, span) of each span [N]; what was written since the last call is read in the same pass."""
        before, ask = written[backward.length :], encode(ASK)
        branches = [[*(token for token in span if token != EOS), *ask] for span in spans]
        hidden = run_branches(backward, before, branches)
        backward.length += len(before)
        ends = len(before) - 1 + torch.tensor([len(branch) for branch in branches]).cumsum(0)
        return backward.logits(hidden[:, ends.tolist()]).log_softmax(-1)[:, wish]
