"""Lookahead decoding: n-grams from Jacobi trajectories, checked in the forward that makes them (Fu et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.method import Claim, Method, Paper
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import draw, verify_greedy

# W columns, n-grams of N tokens, at most G of them checked per forward: the paper's setting for its 7B model.
W, N, G = 15, 5, 15


class LookaheadDecoding(Method):
    """Lookahead decoding: every forward refines a window of future tokens and checks n-grams that the window left.

    Algorithm 2. With the last token of the text at position t, the window holds tokens w[r][i], r < N - 1, i < W, at
    positions t + r + i; row r is r Jacobi steps younger than row 0, and w[0][0] is the last token itself. One forward
    runs over [tokens not in the cache yet, window, n-grams]:

        lookahead branch: w[r][i] sees the text, w[0][0..i] and w[1..r][i]; the greedy answers to the last row are the
            row new[i] at t + N - 1 + i, and (w[0][i], .., w[N-2][i], new[i]) are W n-grams for the pool;
        verification branch: up to G n-grams of the pool that begin with the last token, each seeing the text and its
            own tokens. Greedy: the longest prefix that the target agrees with is kept (algorithm 3). Sampling: at each
            place the n-grams still agreeing are offered in turn; token x is kept with probability p(x), else p(x) := 0
            and p is normalised anew; when none is kept, a draw from what is left of p ends the step (algorithm 4).

    Kept tokens are followed by one of the target's own, so that a step yields 1 to N tokens. Then the oldest row is
    dropped and the window stands at the new last token. The cache keeps the kept tokens only.

    As in the official code the pool holds the G most recently seen n-grams per first token and is not filled from the
    prompt, trajectories are greedy at every temperature, end-of-sequence cells are replaced by tokens drawn from the
    text, and the window goes back by one row also where several tokens were kept. Differs from that code: the window
    is random at the start rather than filled row by row, and an n-gram kept whole is followed by a token of the
    target's own in sampling too, as in greedy decoding.
    """

    paper = Paper(
        id="lookahead_decoding",
        title="Break the Sequential Dependency of LLM Inference Using Lookahead Decoding",
        authors="Yichao Fu, Peter Bailis, Ion Stoica, Hao Zhang",
        year=2024,
        arxiv="2402.02057",
        code="hao-ai-lab/LookaheadDecoding",
    )
    tasks = (
        "greedy/sums",
        "greedy/words",
        "greedy/hops",
        "greedy/stories",
        "greedy/sums_deep",
        "greedy/words_deep",
        "greedy/stories_deep",
        "sampling/stories",
    )
    baselines = ("autoregressive", "jacobi", "prompt_lookup")
    claims = (
        Claim(
            "exact_match[lookahead_decoding,64] >= 1 and nfe[lookahead_decoding,64] <= 0.75 * nfe[autoregressive,64] "
            "and nfe[lookahead_decoding,64] < nfe[jacobi,64]",
            says="the output is greedy decoding's, in at most three quarters of the forwards and fewer than Jacobi's",
        ),
        Claim(
            "exact_match[lookahead_decoding,96] >= 1 and nfe[lookahead_decoding,96] <= 0.75 * nfe[autoregressive,96] "
            "and nfe[lookahead_decoding,96] < nfe[jacobi,96]",
            says="the same on stories with a refrain",
            task="greedy/stories",
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        return write_each(batch, lambda *asked: self.decode(session, *asked, rung))

    def decode(self, session: Session, prompt: list[int], room: int, temperature: float, rung: int) -> list[int]:
        """New token ids for one prompt in at most `rung` forwards."""
        size = (N - 1) * W - 1
        target = Decoder(session.networks["target"], len(prompt) + room + size + G * (N - 1))
        branches, offsets = (part.to(target.device) for part in self.layout())
        tokens, end = list(prompt), len(prompt) + room
        pool: dict[int, list[tuple[int, ...]]] = {}

        def uniforms(count: int) -> list[float]:
            return torch.rand(count, generator=session.rng, device=target.device).tolist()

        def drawn(count: int) -> list[int]:
            return [tokens[int(u * len(tokens))] for u in uniforms(count)]

        window = [drawn(W) for _ in range(N - 1)]
        while target.spent + 1 <= rung:
            window[0][0] = tokens[-1]
            ngrams = pool.get(tokens[-1], [])
            start, text = target.length, len(tokens)
            stop = text + size + len(ngrams) * (N - 1)
            mask = torch.ones(stop - start, stop, dtype=torch.bool, device=target.device).tril(start)
            mask[text - start :, text:] = branches[: stop - text, : stop - text]
            positions = torch.arange(start, stop, device=target.device)
            positions[text - start :] = text - 1 + offsets[: stop - text]
            ids = [*tokens[start:], *sum(window, [])[1:], *(token for ngram in ngrams for token in ngram)]
            logits = target.logits(target.run(target.embed(ids), start, None, positions, mask)[:, text - start - 1 :])
            own, last_row, answers = logits[:1], logits[size + 1 - W : size + 1], logits[size + 1 :]
            new = last_row.argmax(-1).tolist()

            if temperature == 0:
                kept, branch = self.verify_greedy(ngrams, own, answers)
            else:
                kept, branch = self.verify_sampling(ngrams, own / temperature, answers / temperature, uniforms(N * G))
            first = text + size + branch * (N - 1)
            target.cache.compact(text, range(first, first + len(kept) - 1))
            target.length = text + len(kept) - 1
            tokens += kept[: kept.index(target.eos) + 1] if target.eos in kept else kept
            if tokens[-1] == target.eos or len(tokens) >= end:
                break
            self.remember(pool, window, new)
            window = [*window[1:], [token if token != target.eos else drawn(1)[0] for token in new]]
        return tokens[len(prompt) : end]

    @staticmethod
    def layout() -> tuple[Tensor, Tensor]:
        """Window (less w[0][0]) and G n-grams: who sees whom, bool [S, S] (figure 2 (b)), and position less t, [S]."""
        rows, columns = (part.flatten() for part in torch.meshgrid(torch.arange(N - 1), torch.arange(W), indexing="ij"))
        window = (rows <= rows[:, None]) & ((columns == columns[:, None]) | (rows == 0) & (columns < columns[:, None]))
        ngrams = torch.block_diag(*[torch.ones(N - 1, N - 1).tril()] * G).bool()
        positions = torch.cat([(rows + columns)[1:], torch.arange(1, N).repeat(G)])
        return torch.block_diag(window[1:, 1:], ngrams), positions

    @staticmethod
    def remember(pool: dict[int, list[tuple[int, ...]]], window: Sequence[Sequence[int]], new: Sequence[int]) -> None:
        """Put the W n-grams of a step into the pool, the G most recent ones per first token being kept."""
        for first, *rest in zip(*window, new, strict=True):
            known = [ngram for ngram in pool.get(first, []) if ngram != tuple(rest)]
            pool[first] = [*known, tuple(rest)][-G:]

    @staticmethod
    def verify_greedy(ngrams: Sequence[Sequence[int]], own: Tensor, answers: Tensor) -> tuple[list[int], int]:
        """Longest kept prefix with the target's own token after it, and the n-gram it is of.

        own: logits [1, V] after the last token of the text; answers: [n (N - 1), V] after each token of n n-grams.
        """
        after, greedy = own.argmax(-1).tolist(), answers.argmax(-1).tolist()
        best = after, 0
        for branch, ngram in enumerate(ngrams):
            kept = verify_greedy(ngram, after + greedy[branch * (N - 1) :])
            if len(kept) > len(best[0]):
                best = kept, branch
        return best

    @staticmethod
    def verify_sampling(
        ngrams: Sequence[Sequence[int]], own: Tensor, answers: Tensor, u: list[float]
    ) -> tuple[list[int], int]:
        """As `verify_greedy`, but each token has the distribution softmax(logits). u: N G uniforms, used up."""
        kept: list[int] = []
        agreeing = list(range(len(ngrams)))
        p = own[0].double().softmax(-1)
        while agreeing and len(kept) < N - 1:
            for branch in agreeing:
                token = ngrams[branch][len(kept)]
                if u.pop() * float(p.sum()) < float(p[token]):
                    break
                p[token] = 0
            else:
                break
            agreeing = [b for b in agreeing if ngrams[b][len(kept)] == token]
            p = answers[branch * (N - 1) + len(kept)].double().softmax(-1)
            kept.append(token)
        return [*kept, draw(p, u.pop())], agreeing[0] if agreeing else 0
