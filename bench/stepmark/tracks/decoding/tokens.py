"""Track decoding, tasks of tokenisation: equal models that differ in how a text becomes tokens, hence in steps.

A batch is {"demonstrations": lists of lines, "text": a line up to its colon, "labels": four ways to end it}. Every second
item has no demonstrations. `run` returns {"log_likelihood": float [B, 4] in nats, of each whole line `line(text, label)`,
its end included, after the demonstrations that were read; "tokens": int64 [B, 4], how many tokens each line is}. The label
that makes its line likeliest is the answer. A rung is a number of tokens: as many may go through the model for an item, in
demonstrations, text and labels together, and the oldest demonstrations that do not fit are left out. An evaluation of a
model is one token.

Whatever the tokens, a line's likelihood is that of the text itself, markers included: bits over characters of the text
compare models of any vocabulary. Lines are drawn from a grammar whose entropy is known, and no model that has not seen
them can find them much likelier than it: outputs that claim so are rejected.

The parts that methods share stand below: schemes of tokenisation (`Scheme`, `learn_tokens`, `Tokens`), the model
(`LanguageModel`), its training (`learn`) and the reading of lines (`read`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.session import Session
from stepmark.task import BadOutput, Score, Task, harness_only, load_split
from stepmark.tracks.decoding.moe import CausalAttention, States

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TASKS = (
    Task(
        id="tokenisation/dialects",
        version=1,
        summary="Lines in four languages: their likelihood, and which of four labels ends them, without and with "
        "demonstrations",
        dataset="dialects",
        unit="tokens",
        rungs=(80, 160, 320),
        metrics={
            "bits_per_character": "lower",
            "tokens": "lower",
            "zero_shot": "higher",
            "few_shot": "higher",
            "sums": "higher",
        },
        n=256,
        batch=8,
        seeds=1,
        smoke_n=4,
        smoke_rungs=(160,),
        probe=2,
    ),
)

VOCABULARY = 1024  # rows of the embeddings of every model, whether its tokenizer uses all or not
BEGIN = VOCABULARY - 1  # stands before every document; no tokenizer makes it of a text
WIDTH, DEPTH = 64, 4
STEPS, ROWS, LENGTH, RATE = 800, 4, 256, 3e-3  # training steps, texts of a step, their tokens, learning rate
MARKER = "\ue000"  # stands before a capital that was made small; of Unicode's private use
SLACK = 20.0  # nats by which lines of a batch may be likelier than the grammar's: happens with probability e^-20


# -- what the harness calls ---------------------------------------------------------------------------------------


def line(text: str, label: str) -> str:
    """A text and its label as one line of a document."""
    return f"{text} {label}\n"


def inputs(task: Task, n: int, generator: torch.Generator, device: torch.device) -> dict[str, list[Any]]:
    """`n` questions of the test split, every second one without its demonstrations."""
    harness_only("the test split")
    data = load_split(task.dataset, "test")
    chosen = torch.randperm(len(data["text"]), generator=generator)[:n].tolist()
    found = {key: [data[key][i] for i in chosen] for key in ("demonstrations", "text", "labels")}
    return found | {"demonstrations": [lines if i % 2 else [] for i, lines in enumerate(found["demonstrations"])]}


def _answers(task: Task, texts: Sequence[str]) -> tuple[list[int], list[str]]:
    """Number of the right label, and the question, of each text of the test split."""
    data = load_split(task.dataset, "test")
    known = dict(zip(data["text"], zip(data["answer"], data["question"], strict=True), strict=True))
    return [known[text][0] for text in texts], [known[text][1] for text in texts]


def check(task: Task, batch: Mapping[str, Any], outputs: Any) -> None:
    """Finite log-likelihoods [B, 4] of at most 0, numbers of tokens [B, 4], and nothing too likely to be true.

    Of lines x drawn from p, every model q that has not seen them has E[q(x) / p(x)] <= 1, so that the product over a
    batch exceeds e^20 with probability e^-20 at most (Markov's inequality), however good the model is.
    """
    from stepmark.datasets.dialects import surprise

    shape = (len(batch["text"]), len(batch["labels"][0]))
    for name in ("log_likelihood", "tokens"):
        found = outputs.get(name) if isinstance(outputs, Mapping) else None
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            raise BadOutput(f"run must return a tensor {name} of shape {shape}")
    likely, tokens = outputs["log_likelihood"], outputs["tokens"]
    if not likely.is_floating_point() or not bool(torch.isfinite(likely).all()) or bool((likely > 0).any()):
        raise BadOutput("a log-likelihood is not finite, or above 0")
    if tokens.is_floating_point() or bool((tokens < 1).any()):
        raise BadOutput("a line has less than one token")
    right, _ = _answers(task, batch["text"])
    excess = 0.0
    for row, answer, lines in zip(likely.double().tolist(), right, batch["demonstrations"], strict=True):
        excess += row[answer] + surprise(told=bool(lines))
    if excess > SLACK:
        raise BadOutput(f"the lines are {excess:.0f} nats likelier than under the grammar that they are drawn from")


def score(
    task: Task,
    batch: Mapping[str, Any],
    outputs: Mapping[str, Tensor],
    networks: Mapping[str, nn.Module],
    resample: NDArray[np.int64],
) -> dict[str, Score]:
    """Metrics over all questions, from the likelihoods of the lines alone.

    bits_per_character: bits of the lines with their right labels over their characters, where nothing stands before.
    tokens: mean number of tokens of those lines, of all questions. zero_shot, few_shot: share of right answers without
    and with demonstrations. sums: share of right answers of calculations, either way.
    """
    harness_only("scoring")
    right, questions = _answers(task, batch["text"])
    likely, tokens = outputs["log_likelihood"].double().cpu().numpy(), outputs["tokens"].cpu().numpy()
    rows = np.arange(len(right))
    cold = np.array([not lines for lines in batch["demonstrations"]], dtype=float)
    sums = np.array([question == "sum" for question in questions], dtype=float)
    hit = (likely.argmax(1) == np.array(right)).astype(float)
    bits = -likely[rows, right] / math.log(2)
    characters = np.array(
        [len(line(t, labels[i])) for t, labels, i in zip(batch["text"], batch["labels"], right, strict=True)]
    )
    every = np.ones(len(right))
    return {
        "bits_per_character": _ratio(cold * bits, cold * characters, resample),
        "tokens": _ratio(tokens[rows, right].astype(float), every, resample),
        "zero_shot": _ratio(cold * hit, cold, resample),
        "few_shot": _ratio((1 - cold) * hit, 1 - cold, resample),
        "sums": _ratio(sums * hit, sums, resample),
    }


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64], resample: NDArray[np.int64]) -> Score:
    """Sum over sum, over all items and over each resample; 0 where a resample has no item of the kind."""
    parts = above[resample].sum(1) / np.maximum(below[resample].sum(1), 1e-12)
    return Score(float(above.sum() / max(below.sum(), 1e-12)), parts.tolist())


def handles(task: Task, device: torch.device) -> dict[str, Callable[..., Any]]:
    """None: everything costly here is a network."""
    return {}


def reference_call(task: Task, networks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> int:
    """Never called: the task has no network of its own."""
    raise ValueError(f"{task.id} has no reference network")


def layers(task: Task, role: str, network: nn.Module) -> list[nn.Module]:
    """The layers: a token through all of them is one evaluation."""
    return list(getattr(network, "layers", []))


# -- tokens -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """What becomes of a text before byte-pair encoding; nothing, by default.

    Attributes:
        capitals: a capital becomes a marker, a token of its own, and its small letter.
        digits: digits and the signs of arithmetic are tokens of their own.
        punctuation: so are punctuation marks and white space.
        characters: no byte-pair encoding: every character is a token.
    """

    capitals: bool = False
    digits: bool = False
    punctuation: bool = False
    characters: bool = False


def mark_capitals(text: str) -> str:
    """A marker and the small letter for each capital that the small letter gives back. Markers of the text double."""
    found = []
    for letter in text:
        small = letter.lower()
        capital = len(small) == 1 and small != letter and small.upper() == letter
        found.append(MARKER + small if capital else MARKER * 2 if letter == MARKER else letter)
    return "".join(found)


def restore_capitals(text: str) -> str:
    """What `mark_capitals` was given."""
    letters = iter(text)
    found = ((letter, next(letters, "") if letter == MARKER else "") for letter in letters)
    return "".join((marked if marked == MARKER else marked.upper()) if marked else letter for letter, marked in found)


def learn_tokens(scheme: Scheme, texts: Sequence[str]) -> Tokenizer:
    """A tokenizer of at most VOCABULARY - 1 tokens, learnt from texts: byte-pair encoding, or single characters.

    Byte-pair encoding is that of GPT-2, on the bytes of words with the space before them. Either way all 256 bytes are
    tokens, so that there is no text without tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if scheme.characters:
        known = [f"<0x{byte:02X}>" for byte in range(256)] + sorted(set("".join(texts)) - {MARKER})
        vocabulary = {token: i for i, token in enumerate(known[:BEGIN])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        return tokenizer
    tokenizer = Tokenizer(models.BPE())
    cuts: list[Any] = []
    if scheme.digits:
        cuts += [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split(Regex(r"[-+*/=<>]"), "isolated")]
    if scheme.punctuation:
        cuts.append(pre_tokenizers.Split(Regex(r"[\s\p{P}]"), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BEGIN,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[MARKER] if scheme.capitals else [],
    )
    if scheme.capitals:  # markers cut a text before it is encoded, so do it here too
        texts = [part for text in texts for part in mark_capitals(text).split(MARKER)]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Tokens:
    """A tokenizer with what stands before and after it: text -> ids -> the same text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.capitals = tokenizer.token_to_id(MARKER) is not None

    @classmethod
    def stored(cls, state: Tensor) -> Tokens:
        """From the bytes, uint8 [N], that `store` gave."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(state.cpu().numpy().tobytes().decode()))

    def store(self) -> Tensor:
        """The tokenizer as bytes, uint8 [N]."""
        return torch.frombuffer(bytearray(self.tokenizer.to_str().encode()), dtype=torch.uint8)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(mark_capitals(text) if self.capitals else text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return restore_capitals(text) if self.capitals else text


# -- the model ----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer of a GPT: h + attention(norm(h)), then h + feed-forward(norm(h))."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.before, self.attention = nn.LayerNorm(WIDTH), CausalAttention(WIDTH)
        self.between = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor, past_key_values: States | None = None) -> Tensor:
        """[T, D] -> [T, D], or [B, T, D] -> [B, T, D]. The states have the name that the harness weighs caches by."""
        rows = self.before(hidden).view(-1, *hidden.shape[-2:])
        hidden = hidden + self.attention(rows, past_key_values, self.number).view(hidden.shape)
        return hidden + self.down(F.gelu(self.up(self.between(hidden))))


class LanguageModel(nn.Module):
    """A decoder over VOCABULARY tokens: tied embeddings, DEPTH layers, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.embed.weight, std=WIDTH**-0.5)
        self.layers = nn.ModuleList(Layer(number) for number in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, states: States | None = None) -> Tensor:
        """Logits [.., T, V] of the tokens after each of `ids` [.., T], which follow what the states hold."""
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden, past_key_values=states)
        if states is not None:
            states.length += ids.shape[-1]
        return F.linear(self.norm(hidden), self.embed.weight)


def learn(session: Session, scheme: Scheme) -> dict[str, Tensor]:
    """Learn tokens from the train split, then the model `lm` on it: STEPS steps of equally many tokens in every scheme.

    Documents follow each other in one stream, each behind its BEGIN, and are read in the order of a shuffle as long as
    the steps last. Muon for the matrices, AdamW for the rest, cosine schedule. Returns the tokenizer as bytes.
    """
    from stepmark.backbones.lm import Muon

    documents = session.train["document"]
    documents = documents[: session.scale(len(documents), 40)]
    tokens = Tokens(learn_tokens(scheme, documents))
    length, steps = session.scale(LENGTH, 40), session.scale(STEPS, 2)
    ids = [i for text in documents for i in (BEGIN, *_lines(tokens, text))]
    windows = torch.tensor(ids[: len(ids) - (len(ids) - 1) % length]).unfold(0, length + 1, length)
    shuffle = torch.Generator().manual_seed(session.seed)
    model, queue = session.networks["lm"], torch.zeros(0, dtype=torch.long)
    matrices = [parameter for parameter in model.layers.parameters() if parameter.ndim == 2]  # type: ignore[union-attr]
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    optimisers = (Muon(matrices, lr=RATE), torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0))
    model.train()
    for step in session.progress(range(steps), "language model"):
        if len(queue) < ROWS:
            queue = torch.cat((queue, torch.randperm(len(windows), generator=shuffle)))
        rows, queue = windows[queue[:ROWS]].to(session.device), queue[ROWS:]
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 40) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    model.eval()
    return {"tokenizer": tokens.store()}


# -- reading ------------------------------------------------------------------------------------------------------


def _lines(tokens: Tokens, text: str) -> list[int]:
    """A document in tokens, line by line: no token reaches over the end of a line."""
    return [i for each in text.splitlines(keepends=True) for i in tokens.encode(each)]


def _log_likelihood(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """Sum of the log-probabilities of tokens `ids` [T] under logits [T, V], each row one before its token."""
    taken = torch.tensor(ids, device=logits.device)
    return logits.double().log_softmax(-1).gather(1, taken[:, None]).sum()


def read(session: Session, batch: Mapping[str, Any], rung: int) -> dict[str, Tensor]:
    """Log-likelihoods of every text with each of its labels, after as many demonstrations as the rung has room for.

    The nearest demonstrations are kept, whole or not at all. What the four lines have in common runs once; what follows
    runs for each label on the same keys and values. The last token of a line is only predicted, never run.

    Raises:
        ValueError: a text and its labels alone have more tokens than the rung.
    """
    model, tokens = session.networks["lm"], Tokens.stored(session.state["tokenizer"])
    found, counts = [], []
    for earlier, text, labels in zip(batch["demonstrations"], batch["text"], batch["labels"], strict=True):
        lines = [tokens.encode(line(text, label)) for label in labels]
        common = next(i for i, column in enumerate(zip(*lines, strict=False)) if len(set(column)) > 1)
        room = rung - 1 - common - sum(len(ids) - common - 1 for ids in lines)
        if room < 0:
            raise ValueError(f"a text with its labels has {rung - room} tokens, the rung allows {rung}")
        context: list[int] = []
        for each in reversed(earlier):
            ids = tokens.encode(each)
            if len(context) + len(ids) > room:
                break
            context = ids + context
        states = States()
        logits = model(torch.tensor([BEGIN, *context, *lines[0][:common]], device=session.device), states)
        shared = _log_likelihood(logits[len(context) : -1], lines[0][:common])
        likely = []
        for ids in (ids[common:] for ids in lines):
            after = logits[-1:]
            if len(ids) > 1:
                branch = States()
                branch.held, branch.length = dict(states.held), states.length
                after = torch.cat((after, model(torch.tensor(ids[:-1], device=session.device), branch)))
            likely.append(shared + _log_likelihood(after, ids))
        found.append(torch.stack(likely))
        counts.append([len(ids) for ids in lines])
    return {"log_likelihood": torch.stack(found), "tokens": torch.tensor(counts, device=session.device)}
