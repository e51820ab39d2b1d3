"""Superposed decoding: several drafts from the passes of one (Shen et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.lm import EOS, PAD, VOCABULARY, encode
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.speculation import draw
from stepmark.tracks.decoding.texts import nucleus

# The official setting: temperature, tokens looked at, weight of a context of 1 .. 5 tokens,
# and what a draft loses for which the n-grams know no way on.
TEMPERATURE, TOP, PENALTY = 0.06, 9, 200.0
WEIGHTS = (0.01, 0.04, 0.15, 0.18, 0.12)
TOP_P, COOLED = 0.9, 0.6  # of `nucleus_drafts`: mass and temperature, as in the official comparison

Tables = Mapping[str, Tensor]


def code(tokens: Sequence[int]) -> int:
    """A run of tokens as one number, the same for no two runs of one length."""
    number = 0
    for token in tokens:
        number = number * len(VOCABULARY) + token
    return number


def count_runs(texts: Iterable[Sequence[int]]) -> dict[str, Tensor]:
    """{"codes<n>", "counts<n>"}: how often each run of n tokens stands in the texts, n from 1 to 6, sorted by code."""
    rows = [torch.tensor(text) for text in texts]
    found = {}
    for n in range(1, len(WEIGHTS) + 2):
        powers = torch.tensor([len(VOCABULARY) ** k for k in range(n - 1, -1, -1)])
        codes = torch.cat([row.unfold(0, n, 1) @ powers for row in rows if len(row) >= n])
        found[f"codes{n}"], found[f"counts{n}"] = codes.unique(return_counts=True)
    return found


def times(tables: Tables, n: int, codes: Tensor) -> Tensor:
    """How often runs of n tokens were counted; any shape."""
    known = tables[f"codes{n}"]
    place = torch.searchsorted(known, codes).clamp(max=len(known) - 1)
    return tables[f"counts{n}"][place] * (known[place] == codes)


def ngram_probabilities(tables: Tables, text: Sequence[int], tokens: Tensor) -> Tensor:
    """Interpolated n-gram probability [M] of each of `tokens` [M] after a text: sum_n w_n count(c_n x) / count(c_n)."""
    total = torch.zeros(len(tokens), dtype=torch.double, device=tokens.device)
    for n, weight in enumerate(WEIGHTS, start=1):
        context = code(text[-n:])
        codes = context * len(VOCABULARY) + tokens
        seen = times(tables, n, codes.new_tensor([context]))
        if n <= len(text) and seen > 0:
            total += weight * times(tables, n + 1, codes) / seen
    return total


class SuperposedDecoding(Method):
    """Superposed decoding: the model reads a mixture of the drafts' last tokens, n-grams tell the drafts apart.

    The prompt's pass gives the k best first tokens, by the score below. Then, with drafts i of log-scores s_i:

        gamma = softmax(s)   weight of each draft
        e = sum_i gamma_i E[last token of draft i]   one input embedding, one pass, one shared cache (equations 3, 4)
        p = softmax(logits / tau), its 9 likeliest tokens, normalised
        s_i(x) = s_i + (1 - alpha) log p(x) + alpha log p_ngram(x | draft i)   (equation 6)

    and the k best of all (i, x) are the new drafts. p_ngram mixes contexts of one to five tokens, the draft's own
    (equation 5); a draft none of whose tokens the n-grams know goes on by p alone, 200 lower (equation 7). alpha = 0.54,
    tau = 0.06 and the weights are the official ones, for drafts of a prompt of 15 tokens. n-grams are counted on the
    train split. A draft that ends is put aside, and its place goes to the next best; in the end the k drafts of the
    best score per token are taken of those that go on and the k best that ended, as in the official code.

    Its controls: `nucleus_drafts` (Holtzman et al., ICLR 2020) shows what several drafts cost without superposition:
    the prompt is read once and gives the first token of every draft; then each draft takes a forward per token. Tokens
    are drawn at temperature 0.6 from the fewest likeliest ones that hold 0.9 of the distribution, as in the official
    comparison. A rung is shared out evenly, so that only at the last rung its drafts are whole. `superposed_alone`
    leaves the n-grams out (alpha = 0), `ngram_drafts` the model: the k likeliest texts of the n-grams alone, in no
    forward at all.

    Differs from the paper: the model has four layers and 150 words rather than 32 and 32,000, and n-grams are of texts
    of the task rather than of the web. The constants are taken over as they are, where the paper tuned them to its model:
    other alpha, tau and weights might serve this one better. Beam search, its third comparison, is left out. Several
    drafts of one prompt can also share a pass under a tree mask, whose
    positions are then paid for: positions and FLOPs are in the records.

    What limits it here: the best of three drafts is about as likely as the best of three nucleus samples, the others are
    not. About three drafts in ten hold an impossible word, where no nucleus sample does.
    """

    paper = Paper(
        id="superposed_decoding",
        title="Superposed Decoding: Multiple Generations from a Single Autoregressive Inference Pass",
        authors="Ethan Shen, Alan Fan, Sarah M. Pratt, Jae Sung Park, Matthew Wallingford, Sham M. Kakade, "
        "Ari Holtzman, Ranjay Krishna, Ali Farhadi, Aditya Kusupati",
        year=2024,
        arxiv="2405.18400",
        code="RAIVNLab/SuperposedDecoding",
    )
    tasks = ("drafts/stories",)
    baselines = ("nucleus_drafts", "superposed_alone", "ngram_drafts")
    claims = (
        Claim(
            "perplexity[superposed_decoding,28] <= 1.05 * perplexity[nucleus_drafts,28] "
            "and latency_ms[superposed_decoding,28] * 2.44 <= latency_ms[nucleus_drafts,28]",
            says="draft for draft as coherent as nucleus samples, and written at least 2.44 times as fast",
            headline=True,
        ),
        Claim(
            "best[superposed_decoding,28] <= 1.05 * best[nucleus_drafts,28] "
            "and nfe[superposed_decoding,28] <= 0.45 * nfe[nucleus_drafts,28]",
            says="the best of three drafts is as likely as the best of three samples in more than twice the forwards",
        ),
        Claim(
            "perplexity[superposed_decoding,*] < perplexity[superposed_alone,*] "
            "and perplexity[superposed_decoding,*] < perplexity[ngram_drafts,*]",
            says="it takes both: without the n-grams the drafts cannot be told apart, without the model they lose the thread",
        ),
    )

    drafted, alpha = "superposed", 0.54  # by whom; the share of the n-gram model
    variants = (
        Variant(
            "nucleus_drafts",
            says="drafts by nucleus sampling: each draft in passes of its own",
            drafted="nucleus",
            baselines=(),
        ),
        Variant(
            "superposed_alone",
            says="superposed drafts without the n-grams: all drafts go on by the same distribution",
            alpha=0.0,
            baselines=("nucleus_drafts",),
        ),
        Variant(
            "ngram_drafts",
            says="the likeliest drafts of the n-grams alone, without the model",
            drafted="ngrams",
            baselines=("nucleus_drafts",),
        ),
    )

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Count the runs of up to six tokens in the train split."""
        if self.drafted == "nucleus":
            return {}
        data = session.train
        texts = zip(data["prompt"], data["target"], strict=True)
        chosen = list(texts)[: session.scale(16_000, 200)]
        return count_runs([*encode(f"{prompt} {text}"), EOS] for prompt, text in chosen)

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """The drafts of each prompt, one after the other."""
        outputs = []
        for prompt, length, k in zip(batch["prompt"], batch["max_new_tokens"], batch["drafts"], strict=True):
            target = Decoder(session.networks["target"], len(prompt) + length)
            if self.drafted == "ngrams":
                drafts = ngram_drafts(session.state, prompt, min(length, rung), k)
            elif self.drafted == "superposed":
                drafts = self.decode(target, session.state, prompt, min(length, rung), k)
            else:
                drafts = sample_drafts(target, prompt, min(length, 1 + (rung - 1) // k), k, session.rng)
            outputs.append([token for draft in drafts for token in [*draft, *[PAD] * (length - len(draft))]])
        return outputs

    @classmethod
    def decode(cls, target: Decoder, tables: Tables, prompt: Sequence[int], length: int, k: int) -> list[list[int]]:
        """The k best drafts of at most `length` tokens, in as many forwards."""
        drafts: list[tuple[float, list[int]]] = [(0.0, [])]
        ended: list[tuple[float, list[int]]] = []
        logits = target.forward(prompt, last=1)[0]
        while True:
            p, tokens = (logits.double() / TEMPERATURE).softmax(-1).topk(TOP)
            log_p = (1 - cls.alpha) * (p / p.sum()).log()
            rows = []
            for score, draft in drafts:
                if cls.alpha == 0:
                    rows.append(score + log_p)
                    continue
                log_q = ngram_probabilities(tables, [*prompt, *draft], tokens).log()
                rows.append(score + (log_p + cls.alpha * log_q if log_q.isfinite().any() else log_p - PENALTY))
            best, places = torch.stack(rows).flatten().topk(min(2 * k, TOP * len(drafts)))
            grown = [
                (score, [*drafts[place // TOP][1], int(tokens[place % TOP])])
                for score, place in zip(best.tolist(), places.tolist(), strict=True)
            ]
            ended += [pair for pair in grown if pair[1][-1] == target.eos]
            drafts = [pair for pair in grown if pair[1][-1] != target.eos][:k]
            if target.spent >= length:
                drafts += sorted(ended, key=lambda pair: -pair[0])[:k]
                return [draft for _, draft in sorted(drafts, key=lambda pair: -pair[0] / len(pair[1]))[:k]]
            gamma = torch.tensor([score for score, _ in drafts], device=target.device).softmax(-1)
            mixed = gamma @ target.embed([draft[-1] for _, draft in drafts])[0]
            logits = target.logits(target.run(mixed[None, None], target.length))[0]
            target.length += 1


def ngram_drafts(tables: Tables, prompt: Sequence[int], length: int, k: int) -> list[list[int]]:
    """The k likeliest drafts of at most `length` tokens by the n-grams alone, found by a beam of k."""
    tokens = torch.arange(len(VOCABULARY), device=tables["codes1"].device)
    drafts: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(length):
        grown = [(score, draft) for score, draft in drafts if draft[-1:] == [EOS]]
        for score, draft in drafts:
            if draft[-1:] != [EOS]:
                best = (ngram_probabilities(tables, [*prompt, *draft], tokens) + 1e-12).log().topk(k)
                likely, chosen = best.values.tolist(), best.indices.tolist()
                grown += [(score + p, [*draft, token]) for p, token in zip(likely, chosen, strict=True)]
        drafts = sorted(grown, key=lambda pair: -pair[0])[:k]
    return [draft for _, draft in drafts]


def sample_drafts(target: Decoder, prompt: Sequence[int], length: int, k: int, rng: torch.Generator) -> list[list[int]]:
    """k drafts of at most `length` tokens by nucleus sampling, one after the other behind the prompt's own forward."""
    first, drafts = target.forward(prompt, last=1)[0], []
    for _ in range(k):
        target.rollback(len(prompt))
        logits, draft = first, []
        while True:
            u = float(torch.rand((), generator=rng, device=target.device))
            draft.append(draw(nucleus((logits / COOLED).softmax(-1), TOP_P), u))
            if draft[-1] == target.eos or len(draft) >= length:
                break
            logits = target.forward(draft[-1:])[0]
        drafts.append(draft)
    return drafts
