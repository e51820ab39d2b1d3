"""mGPT: which tokens a multilingual language model should have (Shliazhko et al., TACL 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepmark.backbones.lm import Muon
from stepmark.method import Claim, Method, Paper, Variant
from stepmark.session import Session
from stepmark.tracks.decoding.attention import CausalAttention, States
from stepmark.tracks.decoding.tokens import line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 1024  # rows of the embeddings of every model, whether its tokenizer uses all or not
BEGIN = VOCABULARY - 1  # stands before every document; no tokenizer makes it of a text
WIDTH, DEPTH = 64, 4  # of every model
STEPS, ROWS, LENGTH, RATE = 800, 4, 256, 3e-3  # training steps, texts of a step, their tokens, learning rate
MARKER = "\ue000"  # stands before a capital that was made small; of Unicode's private use


class Mgpt(Method):
    """Plain byte-level byte-pair encoding over all languages, and zero- and few-shot answers by likelihood.

    The paper trains five equal small models that differ in their tokens alone and takes the strategy of the lowest
    perplexity for its large ones: the default, this one. Its perplexity is per character,
    exp(-1/|c| sum_i log p(x_i | x_<i)) with |c| characters, since the number of tokens hangs on the strategy; bits per
    character are its binary logarithm. A question is answered as in the paper's evaluation: each label completes the
    text, the completion with the lowest sum of token losses is the answer, and demonstrations stand before it, as many
    whole lines as the budget of tokens holds. What the lines have in common runs once, which changes no likelihood.

    The others, the variants here: `char_tokens`, where a token is a character of the train split (others fall back to the
    bytes of their UTF-8), so that the model spells every word and a budget of tokens holds few demonstrations.
    `case_tokens`, where a capital is a marker, a token of its own, and its small letter: a word has the same tokens wherever
    it stands, and the vocabulary has room for others, but the marker must be predicted and run, and it parts a capitalised
    word from the space before it. `arithmetic_tokens`, where besides digits and the signs of arithmetic are cut off before
    pairs are counted: a number is read and written in the places of its digits, as sums are worked out. `combined_tokens`,
    where punctuation marks and white space are cut off too: a word is the same at the start of a line and within it, and
    every space is a token to predict and run.

    Every strategy gets as many training steps of as many tokens, so that longer tokens see more text, as in the paper.

    Differs from the paper: four languages that are ciphers of one grammar for 61 natural ones; 1023 tokens for 100,000; a
    model of width 64 and 4 layers with dense attention and rotary positions; the scores of its cross-lingual tasks have
    no counterpart here but the labels. Its abstract boasts of a model on a par with XGLM in more languages, which no table
    of tiny models can show; the study of tokens is what can be repeated, and its result stands as the headline. Perplexity
    is that of single lines without demonstrations, the same at every budget. Answers are scored and nothing is claimed of
    them.

    What limits it here: two trainings of one strategy may differ by more than a hundredth of a bit per character, and the
    means of the four of byte-pair encoding by less, so that three trainings hardly tell which of these is best.
    """

    paper = Paper(
        id="mgpt",
        title="mGPT: Few-Shot Learners Go Multilingual",
        authors="Oleh Shliazhko, Alena Fenogenova, Maria Tikhonova, Vladislav Mikhailov, Anastasia Kozlova, "
        "Tatiana Shavrina",
        year=2022,
        arxiv="2204.07580",
        code="ai-forever/mgpt",
    )
    tasks = ("tokenisation/dialects",)
    baselines = ("char_tokens", "case_tokens", "arithmetic_tokens", "combined_tokens")
    trainings = 3
    claims = (
        Claim(
            "bits_per_character[mgpt,*] < min(bits_per_character[case_tokens,*], "
            "bits_per_character[arithmetic_tokens,*], bits_per_character[combined_tokens,*], "
            "bits_per_character[char_tokens,*])",
            says="the lowest perplexity of the five strategies, by which the paper chose its tokens",
            headline=True,
        ),
        Claim(
            "bits_per_character[mgpt,*] <= 1.02 * min(bits_per_character[case_tokens,*], "
            "bits_per_character[arithmetic_tokens,*], bits_per_character[combined_tokens,*])",
            says="no strategy with markers or single digits has a perplexity lower by more than a fiftieth of its bits",
        ),
        Claim(
            "bits_per_character[mgpt,*] <= 0.9 * bits_per_character[char_tokens,*] "
            "and nfe[mgpt,*] < nfe[char_tokens,*]",
            says="characters as tokens take more bits and more steps, for all that they see a smaller part of the texts",
        ),
    )

    capitals, digits, punctuation, characters = False, False, False, False  # as in `Scheme`
    variants = (
        Variant("char_tokens", says="character-level tokens: every character is one", characters=True, baselines=()),
        Variant(
            "case_tokens",
            says="byte-pair encoding of small letters, with a marker for capitals",
            capitals=True,
            baselines=(),
        ),
        Variant(
            "arithmetic_tokens",
            says="byte-pair encoding with a marker for capitals and single digits",
            capitals=True,
            digits=True,
            baselines=(),
        ),
        Variant(
            "combined_tokens",
            says="byte-pair encoding with a marker for capitals, single digits, punctuation and spaces",
            capitals=True,
            digits=True,
            punctuation=True,
            baselines=(),
        ),
    )

    def networks(self, session: Session) -> dict[str, nn.Module]:
        """The model, of one size whatever the tokens."""
        return {"lm": LanguageModel()}

    def prepare(self, session: Session) -> dict[str, Tensor]:
        """Learn the tokens, then the model on them."""
        return learn(session, Scheme(self.capitals, self.digits, self.punctuation, self.characters))

    def run(self, session: Session, batch: Mapping[str, Any], rung: int) -> dict[str, Tensor]:
        """Log-likelihoods of the lines and their numbers of tokens."""
        return read(session, batch, rung)


# -- tokens -----------------------------------------------------------------------------------------------------------


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


# -- the model --------------------------------------------------------------------------------------------------------


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
    documents = session.train["document"]
    documents = documents[: session.scale(len(documents), 40)]
    tokens = Tokens(learn_tokens(scheme, documents))
    length, steps = session.scale(LENGTH, 40), session.scale(STEPS, 2)
    ids = [i for text in documents for i in (BEGIN, *in_lines(tokens, text))]
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


# -- reading ----------------------------------------------------------------------------------------------------------


def in_lines(tokens: Tokens, text: str) -> list[int]:
    """A document in tokens, line by line: no token reaches over the end of a line."""
    return [i for each in text.splitlines(keepends=True) for i in tokens.encode(each)]


def log_likelihood(logits: Tensor, ids: Sequence[int]) -> Tensor:
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
        shared = log_likelihood(logits[len(context) : -1], lines[0][:common])
        likely = []
        for ids in (ids[common:] for ids in lines):
            after = logits[-1:]
            if len(ids) > 1:
                branch = States()
                branch.held, branch.length = dict(states.held), states.length
                after = torch.cat((after, model(torch.tensor(ids[:-1], device=session.device), branch)))
            likely.append(shared + log_likelihood(after, ids))
        found.append(torch.stack(likely))
        counts.append([len(ids) for ids in lines])
    return {"log_likelihood": torch.stack(found), "tokens": torch.tensor(counts, device=session.device)}
