"""Diver: candidate spans are verified by how well the input can be told from them (Lu, Wang and Zhang, 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.lm import EOS, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import draw
from stepmark.tracks.decoding.texts import nucleus

# How likely a candidate is at least, as a share of the likeliest, how many there are and how long a span is at most.
GAMMA, CANDIDATES, SPAN = 0.1, 8, 8
ASK = encode("?")  # the backward prompt: to what input does the text belong?
TOP_P = 0.8  # of the nucleus that `verify_whole` draws from, as `wish_prompting`


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
    divergence: every candidate is continued greedily to a span s_v, up to where its own candidates diverge again (or for
    `SPAN` tokens), and the spans are scored by likelihood and pointwise mutual information with the input x, the gain in
    log-likelihood of x if the span is written:

        score(v) = log p(s_v | x, y) + log p(x | y, s_v) - log p(x | y)

    p(x | .) is the same model's, after a backward prompt that asks for the input of a text; nothing is trained. The
    softmax of the scores is the new distribution of the first token; one is drawn (the best one at temperature 0), and
    its whole span is written. The spans of all candidates grow in the same passes, under a tree mask; so do the texts that
    the backward prompt follows. log p(x | y) is the same for all candidates and falls out of the softmax, so it is not
    computed. Backward passes count against the rung. A divergence may take nine passes, one for each token of the longest
    span and one backwards; where fewer are left, the text goes on by its likeliest candidates, and nothing is drawn.

    Its controls: `diver_likelihood` leaves the mutual information out, the same spans chosen by likelihood alone;
    `verify_whole` spends the rung on whole texts, drawn from the nucleus one after the other, and keeps the one of the
    greatest log p(x | text). The paper's baselines: `wish_prompting` (nucleus sampling), its greedy control, `beam_search`
    and `context_aware` decoding, all within the same rungs.

    Differs from the paper: a model of this size follows no written instruction, so the target of the task was trained in
    both directions beforehand, text after input and input after text; Diver is handed it as everybody else is. The whole
    input is asked for where the paper may pick spans of it. gamma = 0.1 and the longest span, 8 tokens, are chosen for these
    texts; so is the greatest number of candidates, 8, as many as there are colours.

    The claims compare whole texts, as the paper does: they stand at 192 forwards, where every arm ends what it writes. At 96
    most texts of Diver are cut, and all of those that take two forwards a token (context-aware decoding, linear alignment),
    after 48 words; prompting, beam search and whole texts verified have ended. A share of the events told so far then
    compares beginnings with whole texts, and beginnings follow a wish more often: there context-aware decoding is level with
    Diver.

    What limits it here: on average a text follows its input more than with any of the paper's baselines, by a good tenth
    against nucleus sampling, but against context-aware decoding by so little that three seeds do not tell. With whole texts
    verified it follows as much; contrasting logits at twice the strength (linear alignment) is far ahead. Likelihood and
    mutual information weigh the same in the score, and the colour that the hero likes is likelier than the one wished for.
    """

    paper = Paper(
        id="diver",
        title="Diver: Large Language Model Decoding with Span-Level Mutual Information Verification",
        authors="Jinliang Lu, Chen Wang, Jiajun Zhang",
        year=2024,
        arxiv="2406.02120",
    )
    tasks = ("preference/colours",)
    baselines = ("wish_prompting", "wish_greedy", "beam_search", "context_aware", "linear_alignment", "verify_whole")
    claims = (
        Claim(
            "compliance[diver,192] > compliance[wish_prompting,192] and compliance[diver,192] > compliance[wish_greedy,192] "
            "and compliance[diver,192] > compliance[beam_search,192] "
            "and compliance[diver,192] > compliance[context_aware,192] "
            "and accuracy[diver,192] >= accuracy[wish_prompting,192] - 0.05",
            says="whole texts keep to the input more than those of nucleus sampling, greedy decoding, beam search and "
            "context-aware decoding, within as many forwards, and are as right",
            headline=True,
        ),
        Claim(
            "compliance[diver,192] >= compliance[diver_likelihood,192] + 0.1 "
            "and compliance[diver,192] > compliance[verify_whole,192]",
            says="it is the mutual information that does it, and at spans rather than at whole texts",
        ),
        Claim(
            "compliance[diver,192] >= compliance[linear_alignment,192]",
            says="and at least as much as by contrasting the logits with and without the input, at twice the strength",
        ),
    )

    verify = "spans"  # "nothing": spans by likelihood alone, "whole": whole texts
    variants = (
        Variant(
            "diver_likelihood",
            says="the same spans chosen by their likelihood alone",
            verify="nothing",
            baselines=("wish_prompting",),
        ),
        Variant(
            "verify_whole",
            says="as many whole texts as the budget allows, the one kept that tells the input best",
            verify="whole",
            baselines=("wish_prompting",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""

        def write(prompt: list[int], room: int, temperature: float) -> list[int]:
            capacity = len(prompt) + room + CANDIDATES * (SPAN + len(prompt) + 2)
            target, backward = (Decoder(session.networks["target"], capacity) for _ in range(2))
            decode = self.decode_whole if self.verify == "whole" else self.decode
            return decode(target, backward, prompt, room, rung, temperature, session.rng)

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
        """New token ids of one prompt in at most `budget` passes, forward and backward."""
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
            scores = torch.tensor(likely, device=target.device)
            if cls.verify == "spans":
                scores = scores + cls.told(backward, written, spans, prompt[:-1])
            u = float(torch.rand((), generator=rng, device=target.device))
            best = draw((scores / temperature).softmax(-1), u) if temperature > 0 else int(scores.argmax())
            written += spans[best]
            if written[-1] == EOS or len(written) >= room:
                return written[:room]
            target.cache.compact(target.length, slots[best])
            target.length += len(spans[best])
            p = after[best]

    @classmethod
    def decode_whole(
        cls,
        target: Decoder,
        backward: Decoder,
        prompt: Sequence[int],
        room: int,
        budget: float,
        temperature: float,
        rng: torch.Generator,
    ) -> list[int]:
        """The text of several that tells the input best; another is begun where the budget allows one as long as the last.
        A text that ends at its first word takes no pass: there are at most as many texts as passes."""
        texts: list[list[int]] = []
        p = target.forward(prompt, last=1)[0]
        while not texts or (len(texts) < budget and target.spent + len(texts[-1]) + 1 <= budget):
            text, logits = list[int](), p
            target.rollback(len(prompt))
            while True:
                u = float(torch.rand((), generator=rng, device=target.device))
                text.append(draw(nucleus((logits / (temperature or 1.0)).softmax(-1), TOP_P), u))
                if text[-1] == EOS or len(text) >= room or target.spent + bool(texts) + 1 > budget:
                    break
                logits = target.forward(text[-1:])[0]
            texts.append(text)
        if len(texts) == 1 or target.spent + 1 > budget:
            return texts[0]
        return texts[int(cls.told(backward, [], texts, prompt[:-1]).argmax())]

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
                if spans[branch][-1] != EOS and len(spans[branch]) < SPAN and len(candidates(row)) == 1:
                    spans[branch].append(int(row.argmax()))
                    likely[branch] += float(row.max().log())
                    still.append(branch)
            growing = still
        return spans, slots, likely, after

    @staticmethod
    def told(backward: Decoder, written: Sequence[int], spans: Sequence[Sequence[int]], x: Sequence[int]) -> Tensor:
        """log p(x | y, span) of each span [N]; what was written since the last call is read in the same pass."""
        before = written[backward.length :]
        branches = [[*(token for token in span if token != EOS), *ASK, *x[:-1]] for span in spans]
        hidden = run_branches(backward, before, branches)
        backward.length += len(before)
        ends = len(before) + torch.tensor([len(branch) for branch in branches]).cumsum(0)
        asked = (ends[:, None] + torch.arange(-len(x), 0)).flatten().tolist()  # where each token of the input is told
        log_p = backward.logits(hidden[:, asked]).log_softmax(-1).unflatten(0, (len(spans), len(x)))
        return log_p.gather(2, torch.tensor(x, device=log_p.device).expand(len(spans), -1)[..., None]).sum((1, 2))
