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
from stepmark.tracks.decoding.vocab import words_of

NEW_TOKENS = 100  # as many as the paper adds by default
SENTENCES, RATE = 8, 2e-3  # texts of a step and learning rate of the adaptation
WINDOW, AUXILIARY = 5, 24  # of `focus_expansion`: reach of a co-occurrence in tokens, channels of auxiliary embeddings


class VocabExpansionLowres(Method):
    """100 tokens of the new language, each starting as the mean of the pieces that the old tokenizer makes of it.

    An auxiliary byte-pair tokenizer is learnt from the few texts of the language; its first 100 merges are appended to
    the vocabulary and to the merge rules of the old one (section 3 of the paper). The embedding of a new token is the
    average of the embeddings of the tokens that the old tokenizer splits it in ("Mean", the simplest of the paper's
    heuristics), as input and as output, which the target ties. Then causal language modelling goes on in one pass over
    the texts of the rung, the head and the embeddings included. A text takes fewer tokens, so fewer forwards.

    Differs from the paper: all weights are adapted, two layers at the bottom and two at the top, where the paper has
    low-rank updates of those; Muon for the matrices; one pass in place of two; 640 and 1280 texts for 30,000; 100 tokens
    alone of the sizes that the paper tries (50 to 5000). The language's words consist of stems that the model knows; how
    much of a completion is right takes the place of the paper's tasks. "Merge" and "Align", its other two heuristics, are
    left out; that the simple start holds for every size of the vocabulary is not tested.

    What can be told at each rung: after 320 texts, 40 updates, no arm has learnt the language and hardly a completion is
    right, so that the number of steps is that of wrong texts, and the old tokens alone have the most right pieces; which
    new start is ahead shows there and at 640. After 1280 texts mean and random start alike have nearly all pieces right,
    and about three quarters and half of the completions.

    Four controls, with the same texts and steps, and the same tokens and adaptation unless they say otherwise.
    `source_vocabulary` adds no tokens: as many texts take more tokens there, so more computation. `random_expansion` draws
    each channel of a new embedding from the normal distribution with the mean and the deviation that it has over the old
    ones, as in the paper's code. `average_expansion`, the dumb one, starts all new tokens at the average of all old ones:
    what is gained against random embeddings by their size alone. `focus_expansion` (FOCUS, Dobler and de Melo, EMNLP 2023)
    learns auxiliary embeddings of all tokens from the texts of the new language alone; a new token is the sum of those old
    tokens that the texts also have, weighted by the sparsemax of the cosine similarities of its auxiliary embedding to
    theirs. For fastText stands a factorisation of the positive pointwise mutual information of tokens within 5 places, which
    so few texts are enough for.
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
    baselines = ("source_vocabulary", "random_expansion", "average_expansion", "focus_expansion")
    trainings = 3
    claims = (
        Claim(
            "nfe[vocab_expansion_lowres,640..1280] <= 0.7 * nfe[source_vocabulary,640..1280] "
            "and right_pieces[vocab_expansion_lowres,640..1280] >= right_pieces[source_vocabulary,640..1280] - 0.05 "
            "and right_pieces[vocab_expansion_lowres,640..1280] > right_pieces[random_expansion,640..1280] "
            "and right_pieces[vocab_expansion_lowres,640..1280] > right_pieces[focus_expansion,640..1280]",
            says="fewer steps than with the source tokenizer at its quality, and with 100 new tokens the simple start is better "
            "than a random one and than one that needs a model and data of its own",
            headline=True,
        ),
        Claim(
            "nfe[vocab_expansion_lowres,*] <= 0.7 * nfe[source_vocabulary,*] "
            "and right_pieces[vocab_expansion_lowres,*] >= right_pieces[source_vocabulary,*] - 0.05",
            says="the steps and the quality of it after 320 texts too",
            setting="40 updates are too few for any arm to learn the language: its texts are wrong, and so is their length",
        ),
        Claim(
            "nfe[vocab_expansion_lowres,640..1280] <= 0.7 * nfe[source_vocabulary,640..1280] "
            "and latency_ms[vocab_expansion_lowres,640..1280] <= 0.7 * latency_ms[source_vocabulary,640..1280]",
            says="at most 0.7 of the inference steps of the source tokenizer, and of their time",
        ),
        Claim(
            "right_pieces[vocab_expansion_lowres,*] > right_pieces[random_expansion,*]",
            says="better than with random initial embeddings",
        ),
        Claim(
            "right_pieces[vocab_expansion_lowres,*] > right_pieces[average_expansion,*]",
            says="it is the pieces that help, and not merely embeddings of moderate size",
        ),
        Claim(
            "right_pieces[vocab_expansion_lowres,*] > right_pieces[focus_expansion,*]",
            says="better than with initial embeddings from similarities of auxiliary ones",
        ),
    )

    start = "mean"  # of new embeddings: "mean" of their pieces, "random", "average" of all, "focus"; "": no new tokens
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
            "average_expansion",
            says="all new embeddings start at the average of the old ones",
            start="average",
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
        """A copy of the target for each rung, with more rows in its embeddings where there are new tokens."""
        students = {f"after_{rung}": session.clone("target") for rung in session.task.rungs}
        return {name: expanded(each, NEW_TOKENS) if self.start else each for name, each in students.items()}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """For each rung: learn the tokens from its texts, fill their embeddings, adapt."""
        found = {}
        for rung in session.task.rungs:
            student, pieces = session.networks[f"after_{rung}"], texts_of(session, rung)
            merges: list[tuple[int, int]] = []
            if self.start:
                weight = student.get_parameter("model.embed_tokens.weight")
                size = len(weight) - NEW_TOKENS
                merges = learn_merges(pieces, NEW_TOKENS, size)
                tokens = Tokens(merges, size)
                pieces = [tokens.encode(text) for text in pieces]
                with torch.no_grad():
                    weight[size:] = self.rows(session, tokens, weight[:size], pieces)
            adapt(session, student, pieces)
            found[f"merges_{rung}"] = torch.tensor(merges, dtype=torch.long).view(-1, 2)
        return found

    def rows(self, session: Session, tokens: Tokens, old: Tensor, texts: list[list[int]]) -> Tensor:
        """Embeddings [NEW_TOKENS, D] that the new tokens start with, from the old ones [V, D]."""
        if self.start == "random":
            noise = torch.randn(NEW_TOKENS, old.shape[1], generator=session.rng, device=session.device)
            return old.mean(0) + old.std(0) * noise
        if self.start == "average":
            return old.mean(0).repeat(NEW_TOKENS, 1)
        if self.start == "focus":
            return focus_rows(tokens, old, texts)
        return torch.stack([old[list(pieces)].mean(0) for pieces in tokens.pieces.values()])

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
        """New token ids per prompt."""
        student, merges = session.networks[f"after_{rung}"], session.state[f"merges_{rung}"].tolist()
        size = len(student.get_parameter("model.embed_tokens.weight")) - len(merges)
        return write_spelled(student, Tokens(merges, size), batch)


# -- tokens -----------------------------------------------------------------------------------------------------------


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
        self._words: dict[tuple[int, ...], tuple[int, ...]] = {}  # what has been encoded already
        self.pieces: dict[int, tuple[int, ...]] = {}  # of the new tokens: what the target's tokenizer splits them in
        for number, (left, right) in enumerate(self.merges):
            self.pieces[size + number] = self.pieces.get(left, (left,)) + self.pieces.get(right, (right,))

    def encode(self, ids: Sequence[int]) -> list[int]:
        """A text in pieces as few tokens: in each word the merges apply in the order in which they were learnt."""
        found: list[int] = []
        for word in words_of(ids):
            if word not in self._words:
                short = word
                for number, pair in enumerate(self.merges):
                    short = _merged(short, pair, self.size + number) if len(short) > 1 else short
                self._words[word] = short
            found += self._words[word]
        return found

    def spell(self, ids: Sequence[int]) -> list[int]:
        """The text in pieces again."""
        return [piece for i in ids for piece in self.pieces.get(i, (i,))]


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


def texts_of(session: Session, count: int) -> list[list[int]]:
    """The first texts of the train split in the target's own tokens: prompt and completion as one text."""
    data = session.train
    pairs = list(zip(data["prompt"], data["target"], strict=True))[: session.scale(count, 40)]
    return [[*encode(prompt), *encode(target), EOS] for prompt, target in pairs]


def adapt(session: Session, student: nn.Module, texts: Sequence[Sequence[int]]) -> None:
    """Continued pre-training on whole texts, in one pass over them in every tokenizer: cross-entropy of each token."""
    rows, most = [([*text[:1]], [*text[1:]]) for text in texts], session.scale(SENTENCES, 2)
    steps = session.scale(len(texts) // SENTENCES, 1)
    stream = batches(rows, most * max(map(len, texts)), session.seed)
    fit(
        student,
        session.progress,
        steps=steps,
        lr=RATE,
        seed=session.seed,
        warmup=min(40, steps // 4 + 1),
        stream=stream,
    )


def write_spelled(model: nn.Module, tokens: Tokens, batch: Mapping[str, Any]) -> list[list[int]]:
    """Plain greedy decoding in new tokens; the texts come back in the target's own."""

    def write(prompt: list[int], room: int, temperature: float) -> list[int]:
        ids = tokens.encode(prompt)
        written = write_plainly(Decoder(model, len(ids) + room), ids, room, room, temperature)
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
