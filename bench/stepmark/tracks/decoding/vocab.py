"""Track decoding, tasks of another language: what does a tokenizer cost that knows only the letters of a text?

The target has not seen the language of the prompts, and its tokenizer splits every word in letters, so that a text takes
many forwards. A method may give a copy of the target (networks called `student` count as the target does) more tokens and
adapt it on the few texts of the train split. Inputs and outputs are those of the track, in the target's own tokens: what
is written in longer tokens is spelled out. The completion follows from the prompt, so that there is one right answer.

What methods share stands below: byte-pair encoding within words (`learn_merges`, `Tokens`), more rows for the
embeddings (`expanded`), adaptation on texts (`adapt`), and decoding with the longer tokens (`write_spelled`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stepmark.session import Session
from stepmark.task import Score, Task, harness_only, load_split
from stepmark.tracks.decoding import check as check
from stepmark.tracks.decoding import handles as handles
from stepmark.tracks.decoding import layers as layers
from stepmark.tracks.decoding import reference_call as reference_call
from stepmark.tracks.decoding.decoder import Decoder
from stepmark.tracks.decoding.speculation import speculate

TASKS = (
    Task(
        id="bilingual/stories",
        version=1,
        summary="Completions in a language of few texts that is spelled letter by letter, 4-layer target of another one",
        dataset="bilingual",
        backbones={"target": "lm_target"},
        reference="target",
        bounded=("target", "student"),
        unit="target forwards",
        rungs=(32, 72),
        metrics={"accuracy": "higher", "right_letters": "higher", "tokens": "higher"},
        n=48,
        batch=4,
        seeds=1,
        smoke_n=2,
        smoke_rungs=(8,),
        probe=1,
    ),
)

MAX_NEW_TOKENS = 72
NEW_TOKENS = 100  # as many as the paper of `vocab_expansion_lowres` adds by default
SENTENCES, STEPS, RATE = 8, 320, 2e-3  # texts of a step, steps and learning rate of the adaptation


# -- what the harness calls ---------------------------------------------------------------------------------------


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` distinct prompts of the test split."""
    from stepmark.backbones.lm import encode

    harness_only("the test split")
    prompts = load_split(task.dataset, "test")["prompt"]
    chosen = torch.randperm(len(prompts), generator=generator)[:n].tolist()
    found = {"prompt": [encode(prompts[i]) for i in chosen]}
    return found | {"max_new_tokens": [MAX_NEW_TOKENS] * n, "temperature": [0.0] * n}


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: list[list[int]],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all prompts, from the token ids alone.

    accuracy: share of outputs that are the completion, end included. right_letters: mean share of the completion's
    tokens that an output begins with. tokens: mean number of tokens of the target's vocabulary.
    """
    from stepmark.backbones.lm import EOS, decode, encode

    harness_only("scoring")
    data = load_split(task.dataset, "test")
    answers = dict(zip(data["prompt"], data["target"], strict=True))
    rows = []
    for prompt, ids in zip(batch["prompt"], outputs, strict=True):
        wanted = [*encode(answers[decode(list(prompt))]), EOS]
        same = next(
            (i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), min(len(ids), len(wanted))
        )
        rows.append((float(ids == wanted), same / len(wanted), float(len(ids))))
    values = np.array(rows)
    means = values[resample].mean(axis=1)
    return {
        name: Score(float(values[:, i].mean()), means[:, i].tolist())
        for i, name in enumerate(("accuracy", "right_letters", "tokens"))
    }


# -- tokens -------------------------------------------------------------------------------------------------------


def words_of(ids: Sequence[int]) -> list[tuple[int, ...]]:
    """A text in letters, cut into words: one of 0 to 4 begins a word, 5 to 9 go on with it, the rest stands alone."""
    from stepmark.backbones.lm import encode

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


# -- the model ----------------------------------------------------------------------------------------------------


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
    from stepmark.backbones.lm import EOS, encode

    data = session.train
    pairs = list(zip(data["prompt"], data["target"], strict=True))[: session.scale(len(data["prompt"]), 30)]
    return [[*encode(prompt), *encode(target), EOS] for prompt, target in pairs]


def adapt(session: Session, texts: Sequence[Sequence[int]]) -> None:
    """Continued pre-training of the student on whole texts, equally many in every tokenizer: cross-entropy of each token."""
    from stepmark.backbones.lm import batches, fit

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


def expand_and_adapt(session: Session, rows: Any) -> dict[str, Tensor]:
    """Learn `NEW_TOKENS` merges from the train split, fill their embeddings by `rows`, adapt; returns the merges.

    Args:
        rows: (tokens, old embeddings [V, D], texts in new tokens) -> the new embeddings [NEW_TOKENS, D].
    """
    weight = session.networks["student"].get_parameter("model.embed_tokens.weight")
    size = len(weight) - NEW_TOKENS
    letters = texts_of(session)
    tokens = Tokens(learn_merges(letters, NEW_TOKENS, size), size)
    texts = [tokens.encode(text) for text in letters]
    with torch.no_grad():
        weight[size:] = rows(tokens, weight[:size], texts)
    adapt(session, texts)
    return {"merges": torch.tensor(tokens.merges)}


def write_spelled(model: nn.Module, tokens: Tokens, batch: Mapping[str, Any], rung: int) -> list[list[int]]:
    """Plain greedy decoding in new tokens; the texts come back in letters."""
    outputs = []
    for prompt, room in zip(batch["prompt"], batch["max_new_tokens"], strict=True):
        ids = tokens.encode(prompt)
        decoder = Decoder(model, len(ids) + room)
        written = speculate(decoder, ids, room, rung, 0.0, lambda _, most: ([], None))
        outputs.append(tokens.spell(written)[:room])
    return outputs
