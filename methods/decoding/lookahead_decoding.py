"""Lookahead decoding: n-grams from Jacobi trajectories, checked in the forward that makes them (Fu et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import draw, verify_greedy


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
    prompt, trajectories are greedy at every temperature, and the window goes back by one row also where several tokens
    were kept. Differs from that code: the window is random at the start rather than filled row by row, so that n-grams
    reach the pool up to N - 2 forwards sooner; an n-gram kept whole is followed by a token of the target's own, where
    that code yields N - 1 tokens at most; end-of-sequence cells are replaced by tokens drawn from the text at every
    temperature, there in sampling alone.

    `lookahead_small` is the same with W = 5, N = 3, G = 5. The paper chooses the window by what a processor has to spare:
    the weights of a large model are read once for all positions of a forward, so that positions are nearly free on its
    GPUs, and it takes smaller windows where they are not.

    What limits it here: on one core of a CPU every position of a forward is paid for. The window of the paper's 7B model
    is 120 positions, so that forwards are saved on every task and time is lost on most, on sums above all, where about
    half of the forwards are saved and a forward takes several times as long. At small budgets the pool is still empty:
    the first 8 forwards on sums write about a tenth more than Jacobi decoding's, and on word problems less.
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
            "exact_match[lookahead_decoding,*] >= 1 and 1.5 * latency_ms[lookahead_decoding,*] / "
            "tokens[lookahead_decoding,*] <= latency_ms[autoregressive,*] / tokens[autoregressive,*]",
            says="greedy decoding's own text in two thirds of its time per token (the paper: 1.5 to 2.3 times as fast)",
            task="greedy/stories_deep",
            headline=True,
            setting="one CPU core pays for each of 120 positions; the paper's GPU reads its weights once for all of them",
        ),
        Claim(
            "exact_match[lookahead_decoding,*] >= 1 and 1.5 * latency_ms[lookahead_decoding,*] / "
            "tokens[lookahead_decoding,*] <= latency_ms[autoregressive,*] / tokens[autoregressive,*]",
            says="the same on sums, which hardly repeat themselves",
            task="greedy/sums_deep",
            setting="one CPU core pays for each of 120 positions; the paper's GPU reads its weights once for all of them",
        ),
        Claim(
            "exact_match[lookahead_small,*] >= 1 and latency_ms[lookahead_small,*] / tokens[lookahead_small,*] "
            "< latency_ms[autoregressive,*] / tokens[autoregressive,*]",
            says="with a window for processors that pay for every position: any time saved, on stories",
            task="greedy/stories_deep",
        ),
        Claim(
            "exact_match[lookahead_small,*] >= 1 and latency_ms[lookahead_small,*] / tokens[lookahead_small,*] "
            "< latency_ms[autoregressive,*] / tokens[autoregressive,*]",
            says="the same on sums",
            task="greedy/sums_deep",
        ),
        Claim(
            "exact_match[lookahead_decoding,*] >= 1 and tokens[lookahead_decoding,*] / nfe[lookahead_decoding,*] "
            ">= 1.33 * tokens[jacobi,*] / nfe[jacobi,*]",
            says="a third more tokens per forward than Jacobi decoding, on sums",
        ),
        Claim(
            "exact_match[lookahead_decoding,*] >= 1 and tokens[lookahead_decoding,*] / nfe[lookahead_decoding,*] "
            ">= 1.33 * tokens[jacobi,*] / nfe[jacobi,*]",
            says="the same on stories with a refrain",
            task="greedy/stories",
        ),
        Claim(
            "tokens[lookahead_decoding,*] / nfe[lookahead_decoding,*] > tokens[prompt_lookup,*] / nfe[prompt_lookup,*]",
            says="more tokens per forward than n-grams looked up in the text alone, on sums",
        ),
        Claim(
            "tokens[lookahead_decoding,*] / nfe[lookahead_decoding,*] > tokens[prompt_lookup,*] / nfe[prompt_lookup,*]",
            says="the same on stories with a refrain, where the text itself holds what comes back",
            task="greedy/stories",
        ),
    )

    # W columns, n-grams of N tokens, at most G of them checked per forward: the paper's setting for its 7B model.
    W, N, G = 15, 5, 15
    variants = (
        Variant(
            "lookahead_small",
            says="a window of 5 columns and trigrams: where every position of a forward is paid for",
            W=5,
            N=3,
            G=5,
            tasks=("greedy/sums", "greedy/stories", "greedy/sums_deep", "greedy/stories_deep"),
            baselines=("autoregressive",),
        ),
    )

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        return write_each(batch, lambda *asked: self.decode(session, *asked, rung))

    def decode(self, session: Session, prompt: list[int], room: int, temperature: float, rung: int) -> list[int]:
        """New token ids for one prompt in at most `rung` forwards."""
        size = (self.N - 1) * self.W - 1
        target = Decoder(session.networks["target"], len(prompt) + room + size + self.G * (self.N - 1))
        branches, offsets = (part.to(target.device) for part in self.layout())
        tokens, end = list(prompt), len(prompt) + room
        pool: dict[int, list[tuple[int, ...]]] = {}

        def uniforms(count: int) -> list[float]:
            return torch.rand(count, generator=session.rng, device=target.device).tolist()

        def drawn(count: int) -> list[int]:
            return [tokens[int(u * len(tokens))] for u in uniforms(count)]

        window = [drawn(self.W) for _ in range(self.N - 1)]
        while target.spent + 1 <= rung:
            window[0][0] = tokens[-1]
            ngrams = pool.get(tokens[-1], [])
            start, text = target.length, len(tokens)
            stop = text + size + len(ngrams) * (self.N - 1)
            mask = torch.ones(stop - start, stop, dtype=torch.bool, device=target.device).tril(start)
            mask[text - start :, text:] = branches[: stop - text, : stop - text]
            positions = torch.arange(start, stop, device=target.device)
            positions[text - start :] = text - 1 + offsets[: stop - text]
            ids = [*tokens[start:], *sum(window, [])[1:], *(token for ngram in ngrams for token in ngram)]
            logits = target.logits(target.run(target.embed(ids), start, None, positions, mask)[:, text - start - 1 :])
            own, last_row, answers = logits[:1], logits[size + 1 - self.W : size + 1], logits[size + 1 :]
            new = last_row.argmax(-1).tolist()

            if temperature == 0:
                kept, branch = self.verify_greedy(ngrams, own, answers)
            else:
                u = uniforms(self.N * self.G)
                kept, branch = self.verify_sampling(ngrams, own / temperature, answers / temperature, u)
            first = text + size + branch * (self.N - 1)
            target.cache.compact(text, range(first, first + len(kept) - 1))
            target.length = text + len(kept) - 1
            tokens += kept[: kept.index(target.eos) + 1] if target.eos in kept else kept
            if tokens[-1] == target.eos or len(tokens) >= end:
                break
            self.remember(pool, window, new)
            window = [*window[1:], [token if token != target.eos else drawn(1)[0] for token in new]]
        return tokens[len(prompt) : end]

    def layout(self) -> tuple[Tensor, Tensor]:
        """Window (less w[0][0]) and G n-grams: who sees whom, bool [S, S] (figure 2 (b)), and position less t, [S]."""
        grid = torch.meshgrid(torch.arange(self.N - 1), torch.arange(self.W), indexing="ij")
        rows, columns = (part.flatten() for part in grid)
        window = (rows <= rows[:, None]) & ((columns == columns[:, None]) | (rows == 0) & (columns < columns[:, None]))
        ngrams = torch.block_diag(*[torch.ones(self.N - 1, self.N - 1).tril()] * self.G).bool()
        positions = torch.cat([(rows + columns)[1:], torch.arange(1, self.N).repeat(self.G)])
        return torch.block_diag(window[1:, 1:], ngrams), positions

    def remember(
        self, pool: dict[int, list[tuple[int, ...]]], window: Sequence[Sequence[int]], new: Sequence[int]
    ) -> None:
        """Put the W n-grams of a step into the pool, the G most recent ones per first token being kept."""
        for first, *rest in zip(*window, new, strict=True):
            known = [ngram for ngram in pool.get(first, []) if ngram != tuple(rest)]
            pool[first] = [*known, tuple(rest)][-self.G :]

    def verify_greedy(self, ngrams: Sequence[Sequence[int]], own: Tensor, answers: Tensor) -> tuple[list[int], int]:
        """Longest kept prefix with the target's own token after it, and the n-gram it is of.

        own: logits [1, V] after the last token of the text; answers: [n (N - 1), V] after each token of n n-grams.
        """
        after, greedy = own.argmax(-1).tolist(), answers.argmax(-1).tolist()
        best = after, 0
        for branch, ngram in enumerate(ngrams):
            kept = verify_greedy(ngram, after + greedy[branch * (self.N - 1) :])
            if len(kept) > len(best[0]):
                best = kept, branch
        return best

    def verify_sampling(
        self, ngrams: Sequence[Sequence[int]], own: Tensor, answers: Tensor, u: list[float]
    ) -> tuple[list[int], int]:
        """As `verify_greedy`, but each token has the distribution softmax(logits). u: N G uniforms, used up."""
        kept: list[int] = []
        agreeing = list(range(len(ngrams)))
        p = own[0].double().softmax(-1)
        while agreeing and len(kept) < self.N - 1:
            for branch in agreeing:
                token = ngrams[branch][len(kept)]
                if u.pop() * float(p.sum()) < float(p[token]):
                    break
                p[token] = 0
            else:
                break
            agreeing = [b for b in agreeing if ngrams[b][len(kept)] == token]
            p = answers[branch * (self.N - 1) + len(kept)].double().softmax(-1)
            kept.append(token)
        return [*kept, draw(p, u.pop())], agreeing[0] if agreeing else 0
