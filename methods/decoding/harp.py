"""HARP: a second, perturbed forward pass where the model hesitates (Storai and Hwang 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import draw


class HARP(Method):
    """HARP: think again, from a reframed prompt, where the next token is uncertain.

    After every forward pass the Shannon entropy H of softmax(l1) is taken (equation 1). With H <= theta the token comes
    from l1 as ever. Else the model hesitates: entries of the input embeddings of the whole text are dropped with
    probability delta (equation 2), a second pass over them gives l2, and the token comes from beta l1 + (1 - beta) l2
    (equation 3, algorithm 1). theta = 1 bit, delta = 0.2, beta = 0.5, and the entries that stay are not scaled up, as in
    the official code. At most one more pass a token; the rest of the network is left as it is.

    Its control `harp_always` takes the second pass at every word; `beam_search` is what the paper sets its time against. Here
    it has 4 beams, a length penalty of 1 and a cache, and its beams run in one pass; the official comparison has 3 beams of 5
    candidates each, a penalty of 1.2 and no cache on either side.

    The second pass runs over the whole text with a cache of its own, so that the clean keys and values stay clean. It
    counts as one forward, as the prefill does; its positions show in the FLOPs. A rung that is used up ends the text, whose last
    word then takes no second pass.

    The claims compare whole answers, as the paper does: they stand at the rungs at which plain decoding ends all of its texts.
    Below, a text with second passes is cut sooner than one without. Masks are drawn from one seed, for 192 texts.

    What limits it here: these models were trained without dropout and have 64 or 128 entries to a word, so that words
    with a fifth of them gone are words they never met; numbers and names cannot be told apart by context, as the words of
    ordinary text can. On word problems second passes cost right answers, on hops they hardly change how many there are.
    And where the target is sure, nothing happens: that of four layers does not hesitate once over sums, word problems and
    hops, so that nothing is claimed there.
    """

    paper = Paper(
        id="harp",
        title="HARP: Hesitation-Aware Reframing in Transformer Inference Pass",
        authors="Romain Storaï, Seung-won Hwang",
        year=2024,
        arxiv="2412.07282",
        code="romsto/HARP",
    )
    tasks = (
        "greedy/words_weak",
        "greedy/hops_weak",
        "greedy/words",
        "greedy/hops",
        "greedy/sums",
        "greedy/stories",
    )
    baselines = ("autoregressive", "beam_search", "harp_always")
    claims = (
        Claim(
            "accuracy[harp,64] > accuracy[autoregressive,64] "
            "and latency_ms[harp,64] <= 2 * latency_ms[autoregressive,64] "
            "and latency_ms[harp,64] <= 0.5 * latency_ms[beam_search,64]",
            says="more right answers than greedy decoding where the target is often wrong, in at most twice its time and half "
            "of beam search's",
            headline=True,
            setting="words of 64 entries, which a fifth fewer makes other words; the paper's have thousands of entries",
        ),
        Claim(
            "accuracy[harp,24..48] > accuracy[autoregressive,24..48]",
            says="more right answers on questions of several hops",
            task="greedy/hops_weak",
            setting="words of 64 entries, which a fifth fewer makes other words; the paper's have thousands of entries",
        ),
        Claim(
            "accuracy[harp,64] >= accuracy[harp_always,64] and latency_ms[harp,64] <= 0.75 * latency_ms[harp_always,64]",
            says="a second pass where the target hesitates is as good as one at every word, in three quarters of the time",
        ),
    )

    theta, delta, beta = 1.0, 0.2, 0.5
    variants = (
        Variant(
            "harp_always",
            says="a second pass at every word, however sure the target is",
            theta=-1.0,
            tasks=("greedy/words_weak", "greedy/hops_weak"),
            baselines=("autoregressive",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        return write_each(batch, lambda *asked: self.decode(session, *asked, rung))

    def decode(
        self, session: Session, prompt: Sequence[int], room: int, temperature: float, budget: float
    ) -> list[int]:
        """New token ids for one prompt in at most `budget` forwards."""
        model, tokens = session.networks["target"], list(prompt)
        target, reframed = (Decoder(model, len(prompt) + room) for _ in range(2))
        logits = target.forward(tokens, last=1)[0]
        while True:
            log_p = logits.log_softmax(-1)
            spent = target.spent + reframed.spent
            bits = -(log_p.exp() * log_p).sum() / math.log(2)
            if bits > self.theta and spent + 1 <= budget:
                embedded = reframed.embed(tokens)
                kept = torch.rand(embedded.shape, generator=session.rng, device=target.device) >= self.delta
                again = reframed.run(embedded * kept, 0)
                logits = self.beta * logits + (1 - self.beta) * reframed.logits(again[:, -1:])[0]
            if temperature == 0:
                tokens.append(int(logits.argmax()))
            else:
                u = float(torch.rand((), generator=session.rng, device=target.device))
                tokens.append(draw((logits / temperature).softmax(-1), u))
            done = tokens[-1] == target.eos or len(tokens) == len(prompt) + room
            if done or target.spent + reframed.spent + 1 > budget:
                return tokens[len(prompt) :]
            logits = target.forward(tokens[-1:])[0]
