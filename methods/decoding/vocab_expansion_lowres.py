"""Vocabulary expansion with averaged embeddings, on few texts (Yamaguchi, Villavicencio and Aletras 2024)."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones.lm import EOS, batches, encode, fit
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.decoder import Decoder, write_each
from stepmark.tracks.decoding.speculation import write_plainly

NEW_TOKENS = 100  # as many as the paper adds by default
SENTENCES, STEPS, RATE = 8, 320, 2e-3  # texts of a step, steps and learning rate of the adaptation
WINDOW, AUXILIARY = 5, 24  # of `focus_expansion`: reach of a co-occurrence in tokens, channels of auxiliary embeddings


class VocabExpansionLowres(Method):
    """100 tokens of the new language, each starting as the mean of the pieces that the old tokenizer makes of it.

    An auxiliary byte-pair tokenizer is learnt from the few texts of the language; its first 100 merges are appended to
    the vocabulary and to the merge rules of the old one (section 3 of the paper). The embedding of a new token is the
    average of the embeddings of the tokens that the old tokenizer splits it in ("Mean", the simplest of the paper's
    heuristics), as input and as output, which the target ties. Then causal language modelling goes on with the 2560
    texts of the train split, the head and the embeddings included. A text takes fewer tokens, so fewer forwards.

    Differs from the paper: all weights of the four layers are adapted, where the paper has low-rank updates of a large
    model, in one pass over the texts with Muon. Every word is in letters in the old tokenizer, as scripts are that
    it falls back to bytes for, and the language is a cipher of the model's own. Whether an answer is right, and how many
    letters of it, takes the place of the paper's tasks and of bits per character.

    Three controls, with the same tokens and adaptation unless they say otherwise. `source_vocabulary` adds no tokens: as many
    texts a step and as many steps, which take more tokens there, so more computation. `random_expansion` draws each channel
    of a new embedding from the normal distribution with the mean and the deviation that it has over the old ones.
    `focus_expansion` (FOCUS, Dobler and de Melo, EMNLP 2023) learns auxiliary embeddings of all tokens from the texts of the
    new language alone; a new token is the sum of those old tokens that the texts also have, weighted by the sparsemax of
    the cosine similarities of its auxiliary embedding to theirs. For fastText stands a factorisation of the positive
    pointwise mutual information of tokens within 5 places, which so few texts are enough for.
    """

    paper = Paper(
        id="vocab_expansion_lowres",
        title="Vocabulary Expansion for Low-resource Cross-lingual Transfer",
        authors="Atsuki Yamaguchi, Aline Villavicencio, Nikolaos Aletras",
        year=2024,
        arxiv="2406.11477",
        code="gucci-j/lowres-cve",
    )
    tasks = ("bilingual/stories",)
    baselines = ("source_vocabulary", "random_expansion", "focus_expansion")
    claims = (
        Claim(
            "nfe[vocab_expansion_lowres,72] <= 0.7 * nfe[source_vocabulary,72] "
            "and right_letters[vocab_expansion_lowres,72] >= right_letters[source_vocabulary,72] - 0.05 "
            "and right_letters[vocab_expansion_lowres,*] > right_letters[random_expansion,*]",
            says="fewer steps than with the source tokenizer at its quality, and averaged embeddings start better than "
            "random ones",
            headline=True,
        ),
        Claim(
            "nfe[vocab_expansion_lowres,72] <= 0.7 * nfe[source_vocabulary,72] "
            "and latency_ms[vocab_expansion_lowres,72] <= 0.7 * latency_ms[source_vocabulary,72]",
            says="at most 0.7 of the inference steps of the source tokenizer, and of their time",
        ),
        Claim(
            "right_letters[vocab_expansion_lowres,*] > right_letters[random_expansion,*]",
            says="better than with random initial embeddings",
        ),
        Claim(
            "right_letters[vocab_expansion_lowres,*] > right_letters[focus_expansion,*]",
            says="better than with initial embeddings from similarities of auxiliary ones",
            setting="both vocabularies share single letters alone, of which FOCUS cannot make a hundred different rows",
        ),
    )

    start = "mean"  # of new embeddings: "mean" of the old pieces, "random", "focus"; "": there are no new tokens
    variants = (
        Variant(
            "source_vocabulary",
            says="adaptation to the language without new tokens: the source tokenizer spells every word",
            start="",
            baselines=(),
        ),
        Variant(
            "random_expansion",
            says="new embeddings are drawn at random, the usual start of new tokens",
            start="random",
            baselines=("source_vocabulary",),
        ),
        Variant(
            "focus_expansion",
            says="new embeddings in the way of FOCUS: sparse sums of old ones, by similarity",
            start="focus",
            baselines=("source_vocabulary",),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The target, with more rows in its embeddings where there are new tokens."""
        student = session.clone("target")
        return {"student": expanded(student, NEW_TOKENS) if self.start else student}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Learn the tokens, fill their embeddings, adapt."""
        letters = texts_of(session)
        if not self.start:
            adapt(session, letters)
            return {"merges": torch.zeros(0, 2, dtype=torch.long)}
        weight = session.networks["student"].get_parameter("model.embed_tokens.weight")
        size = len(weight) - NEW_TOKENS
        tokens = Tokens(learn_merges(letters, NEW_TOKENS, size), size)
        texts = [tokens.encode(text) for text in letters]
        with torch.no_grad():
            weight[size:] = self.rows(session, tokens, weight[:size], texts)
        adapt(session, texts)
        return {"merges": torch.tensor(tokens.merges)}

    def rows(self, session: Session, tokens: Tokens, old: Tensor, texts: list[list[int]]) -> Tensor:
        """Embeddings [NEW_TOKENS, D] that the new tokens start with, from the old ones [V, D]."""
        if self.start == "random":
            noise = torch.randn(NEW_TOKENS, old.shape[1], generator=session.rng, device=session.device)
            return old.mean(0) + old.std(0) * noise
        if self.start == "focus":
            return focus_rows(tokens, old, texts)
        return torch.stack([old[list(letters)].mean(0) for letters in tokens.letters.values()])

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        student, merges = session.networks["student"], session.state["merges"].tolist()
        size = len(student.get_parameter("model.embed_tokens.weight")) - len(merges)
        return write_spelled(student, Tokens(merges, size), batch, rung)


# -- tokens -----------------------------------------------------------------------------------------------------------


def words_of(ids: Sequence[int]) -> list[tuple[int, ...]]:
    """A text in letters, cut into words: one of 0 to 4 begins a word, 5 to 9 go on with it, the rest stands alone."""
    first, later = set(encode("0 1 2 3 4")), set(encode("5 6 7 8 9"))
    words: list[tuple[int, ...]] = []
    for i in ids:
        if i in later and words and words[-1][0] in first:
            words[-1] += (i,)
        else:
            words.append((i,))
    return words


def _merged(word: Sequence[int], pair: tuple[int, int], token: int) -> tuple[int, ...]:
    """A word with `token` in place of every occurrence of a pair, from the left."""
    found: list[int] = []
    for i in word:
        if found and (found[-1], i) == pair:
            found[-1] = token
        else:
            found.append(i)
    return tuple(found)


def learn_merges(texts: Sequence[Sequence[int]], count: int, size: int) -> list[tuple[int, int]]:
    """Byte-pair encoding within words: `count` times the most frequent pair becomes a token (ties: the lowest ids).

    Args:
        size: tokens there are already; the new ones are size, size + 1, ...

    Raises:
        ValueError: the texts have not as many pairs.
    """
    counted = Counter(word for text in texts for word in words_of(text))
    merges: list[tuple[int, int]] = []
    while len(merges) < count:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, times in counted.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        if not pairs:
            raise ValueError(f"the texts give {len(merges)} new tokens, not {count}")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        again: Counter[tuple[int, ...]] = Counter()
        for word, times in counted.items():
            again[_merged(word, best, size + len(merges))] += times
        counted = again
        merges.append(best)
    return merges


class Tokens:
    """A tokenizer that has grown: the target's own `size` tokens and one for each merge."""

    def __init__(self, merges: Sequence[tuple[int, int]], size: int) -> None:
        self.size, self.merges = size, [(int(a), int(b)) for a, b in merges]
        self.letters: dict[int, tuple[int, ...]] = {}  # of the new tokens: what the target's tokenizer splits them in
        for number, (left, right) in enumerate(self.merges):
            self.letters[size + number] = self.letters.get(left, (left,)) + self.letters.get(right, (right,))

    def encode(self, ids: Sequence[int]) -> list[int]:
        """A text in letters as few tokens: in each word the merges apply in the order in which they were learnt."""
        found: list[int] = []
        for word in words_of(ids):
            for number, pair in enumerate(self.merges):
                if len(word) > 1:
                    word = _merged(word, pair, self.size + number)
            found += word
        return found

    def spell(self, ids: Sequence[int]) -> list[int]:
        """The text in letters again."""
        return [letter for i in ids for letter in self.letters.get(i, (i,))]


# -- the model --------------------------------------------------------------------------------------------------------


def expanded(model: nn.Module, more: int) -> nn.Module:
    """A Llama with tied embeddings and `more` rows in them, in place. The new rows are zero until someone fills them."""
    llama: Any = model
    old = llama.model.embed_tokens.weight
    weight = nn.Parameter(torch.cat((old.detach(), old.new_zeros(more, old.shape[1]))))
    llama.model.embed_tokens = nn.Embedding(*weight.shape, _weight=weight)
    llama.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    llama.lm_head.weight = weight
    llama.config.vocab_size = len(weight)
    llama.model.embed_tokens.weight = weight
    return model


def texts_of(session: Session) -> list[list[int]]:
    """The train split in letters: prompt and completion as one text."""
    data = session.train
    pairs = list(zip(data["prompt"], data["target"], strict=True))[: session.scale(len(data["prompt"]), 30)]
    return [[*encode(prompt), *encode(target), EOS] for prompt, target in pairs]


def adapt(session: Session, texts: Sequence[Sequence[int]]) -> None:
    """Continued pre-training of the student on whole texts, equally many in every tokenizer: cross-entropy of each token."""
    rows = [([*text[:1]], [*text[1:]]) for text in texts]
    room = session.scale(SENTENCES, 2) * max(map(len, texts))
    fit(
        session.networks["student"],
        session.progress,
        steps=session.scale(STEPS, 1),
        lr=RATE,
        seed=session.seed,
        stream=batches(rows, room, session.seed),
    )


def write_spelled(model: nn.Module, tokens: Tokens, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
    """Plain greedy decoding in new tokens; the texts come back in letters."""

    def write(prompt: list[int], room: int, temperature: float) -> list[int]:
        ids = tokens.encode(prompt)
        written = write_plainly(Decoder(model, len(ids) + room), ids, room, rung, temperature)
        return tokens.spell(written)[:room]

    return write_each(batch, write)


# -- embeddings by similarity -----------------------------------------------------------------------------------------


def focus_rows(tokens: Tokens, old: Tensor, texts: list[list[int]]) -> Tensor:
    """New embeddings [NEW_TOKENS, D] as sparse sums of the old ones [V, D] that the texts have, by similarity."""
    counts = cooccurrences(texts, tokens.size + NEW_TOKENS)
    auxiliary = F.normalize(embeddings_from(counts), dim=1)
    shared = counts[: tokens.size].sum(1).nonzero()[:, 0]
    weights = sparsemax(auxiliary[tokens.size :] @ auxiliary[shared].t())
    return weights.to(old) @ old[shared.to(old.device)]


def cooccurrences(texts: list[list[int]], size: int) -> Tensor:
    """How often two tokens stand at most `WINDOW` places apart: float64 [size, size], symmetric."""
    counts = torch.zeros(size * size, dtype=torch.float64)
    for text in texts:
        ids = torch.tensor(text)
        for gap in range(1, min(WINDOW, len(ids) - 1) + 1):
            counts += torch.bincount(ids[:-gap] * size + ids[gap:], minlength=size * size)
    square = counts.view(size, size)
    return square + square.t()


def embeddings_from(counts: Tensor) -> Tensor:
    """Embeddings [size, AUXILIARY] whose products approximate the positive pointwise mutual information."""
    total, each = counts.sum(), counts.sum(1, keepdim=True).clamp(min=1)
    information = (counts * total / (each * each.t())).clamp(min=1).log()
    left, strengths, _ = torch.linalg.svd(information)
    return left[:, :AUXILIARY] * strengths[:AUXILIARY].sqrt()


def sparsemax(scores: Tensor) -> Tensor:
    """The nearest point of the simplex to each row of scores [N, K] (Martins and Astudillo 2016, algorithm 1)."""
    ordered = scores.sort(dim=1, descending=True).values
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    above = ordered.cumsum(1) - 1
    support = (ordered * ranks > above).sum(1, keepdim=True)
    return (scores - above.gather(1, support - 1) / support).clamp(min=0)
