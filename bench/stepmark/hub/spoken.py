"""Between words of the reasoning track and tokens of a checkpoint.

Ids below `SIZE` are words, the others are the checkpoint's tokens, `SIZE` higher. A word that methods look for or put in has a
token of its own, and that token no other id: what a model may write has the same probabilities, only its ids are others. Two
words stand for several tokens each, with the sum of their probabilities: the end of a text for everything that begins a new
line, and the full stop for one that a new line follows.

A text is a question in words, the word of a format, and what is written. Read by the model it is a line that asks for the format,
worked examples, the question in English, and the tokens that are written; heard by a method it is words again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepmark.backbones.reasoners import EOS, SIZE, STOP, WORDS
from stepmark.datasets import deduction
from stepmark.hub import english
from stepmark.hub.choice import Made
from stepmark.hub.prompts import encode, going_on, tokenizer
from stepmark.hub.text_tasks import ends, vocabulary

NEVER = -1e4  # a logit of what is never written
LINE = ("\n", "Ċ", "<0x0A>")  # a new line, as tokenizers spell it
BEFORE = "\n7"  # what stands before a piece when its token is looked for
DIGITS = [str(digit) for digit in range(10)]


class Told(NamedTuple):
    """A text as the model reads it. `tokens`: all of it. `places`: of each id from the word of the format on, how many tokens
    there are up to its end; of a text without a format, of its last id alone. `first`: number of the first of these ids that
    something may be asked behind."""

    tokens: list[int]
    places: list[int]
    first: int


class Speech:
    """How a checkpoint's tokenizer speaks a language of the reasoning track.

    Attributes:
        size: tokens of the vocabulary. token: word -> its token. pieces: word -> its English.
    """

    def __init__(self, made: Made, language: str) -> None:
        """Raises:
        ValueError: a word that methods look for is no token of its own. One line that names the mend.
        """
        self.folder, self.language, self.size = made.parts["target"].folder, language, vocabulary(made)
        self.pieces = dict(english.PIECES[language])
        if "1" in self.pieces and [*self._tokens("1", "\n"), *self._tokens("2")] != self._tokens("12"):
            self._refuse("12", ", or --reasoning deduction, which has no numbers")
        if language == "deduction":
            self.pieces |= self._chosen(deduction.CONCEPTS, english.ADJECTIVES)
            self.pieces |= self._chosen(deduction.NAMES, english.NAMES)
        self.token: dict[int, int] = {}
        for word, piece in self.pieces.items():
            found = self._tokens(piece)
            if len(found) != 1:
                self._refuse(piece)
            self.token[WORDS.index(word)] = found[0]
        self._back = {piece.strip().lower(): word for word, piece in self.pieces.items() if word not in DIGITS}
        self._marks = {WORDS.index(word) for word in (*english.FORMS[language], *english.BETWEEN)}
        self._anchor = going_on(self.folder, BEFORE)
        self._classes(ends(made.parts["target"]))
        self.prompt = lru_cache(maxsize=4096)(self._prompt)
        self._worded = lru_cache(maxsize=1024)(lambda piece: self._tokens(piece) or going_on(self.folder, piece))
        self._opening = lru_cache(maxsize=32)(self._opened)

    def __deepcopy__(self, memo: Any) -> Speech:
        return self

    def _chosen(self, words: Sequence[str], told: Sequence[str]) -> dict[str, str]:
        """English for as many words, each one token."""
        fit = [piece for piece in (f" {each}" for each in dict.fromkeys(told)) if len(self._tokens(piece)) == 1]
        if len(fit) < len(words):
            raise ValueError(
                f"{self.folder}: of the words that --reasoning deduction tells, {len(fit)} are tokens of their own and "
                f"{len(words)} are needed; take a model of a larger vocabulary, or --reasoning problems"
            )
        return dict(zip(words, fit, strict=False))

    def _refuse(self, piece: str, mend: str = "") -> None:
        raise ValueError(
            f"{self.folder}: its tokenizer has no token of its own for each part of {piece.strip()!r}, which --reasoning "
            f"{self.language} asks for; take a model that has (Gemma, Qwen, Llama 2, Mistral){mend}"
        )

    def _tokens(self, piece: str, before: str = BEFORE) -> list[int]:
        """The tokens of a piece behind others; [] where they are not its own."""
        opening, whole = (going_on(self.folder, text) for text in (before, before + piece))
        return whole[len(opening) :] if whole[: len(opening)] == opening else []

    def _classes(self, stops: Sequence[int]) -> None:
        """Which tokens end a text, and which a step."""
        made = tokenizer(self.folder)
        spelled = made.convert_ids_to_tokens(list(range(min(len(made), self.size))))
        lines = [t for t, name in enumerate(spelled) if isinstance(name, str) and any(sign in name for sign in LINE)]
        stop = self.pieces["."]
        closing = [t for t in lines if spelled[t].replace("Ċ", "\n").replace("<0x0A>", "\n").rstrip("\n") == stop]
        ending = [t for t in {*lines, *stops} if t not in closing and t < self.size and t not in self.token.values()]
        if not ending:
            raise ValueError(
                f"{self.folder}: its tokenizer has no token of a new line, by which a text ends; take another"
            )
        self.token[EOS] = next((t for t in ending if spelled[t] in LINE), ending[0])
        self.together = {EOS: sorted(ending), STOP: [self.token[STOP], *closing]}

    # -- reading -----------------------------------------------------------------------------------------------------

    def told(self, ids: Sequence[int]) -> Told:
        """A text as the model reads it."""
        marks = [k for k, i in enumerate(ids) if i in self._marks]
        form = next((k for k in reversed(marks) if WORDS[ids[k]] in english.FORMS[self.language]), None)
        if form is None:  # no format, so that nobody expects anything behind it
            tokens = [t for i in ids for t in self._written(i, "")]
            return Told(tokens, [len(tokens)], len(ids) - 1)
        tokens = list(self.prompt(tuple(ids[: form + 1])))
        places, before = [len(tokens)], ""
        for i in ids[form + 1 :]:
            tokens += self._written(i, before)
            places.append(len(tokens))
            before = "" if i >= SIZE else self.pieces.get(WORDS[i]) or english.piece_of(WORDS[i])
        return Told(tokens, places[marks[-1] - form :], marks[-1])

    def _written(self, i: int, before: str) -> list[int]:
        """The tokens of an id behind a piece."""
        if i >= SIZE:
            return [i - SIZE]
        space = self._worded(" ") if WORDS[i] in DIGITS and english.spaced(before) else []
        return [*space, self.token[i]] if i in self.token else self._worded(english.piece_of(WORDS[i]))

    def _prompt(self, ids: tuple[int, ...]) -> list[int]:
        """The tokens that stand before what is written: the format asked for and shown, and the question."""
        form = WORDS[ids[-1]]
        asked = self.say(ids[:-1]) if any(i >= SIZE for i in ids) else " ".join(WORDS[i] for i in ids[:-1])
        return encode(self.folder, self._opening(form) + self._asked(asked, form))

    def _opened(self, form: str) -> str:
        """The line that asks for a format, and its worked examples."""
        parts = [english.FORMS[self.language][form].asks]
        for prompt, completion in english.shown(self.language, form):
            asked, _, rest = prompt.partition(form)
            written = english.spelt(f"{rest} {completion}", self.pieces)
            parts.append(self._asked(asked.strip(), form) + written)
        return "\n\n".join(parts) + "\n\n"

    def _asked(self, words: str, form: str) -> str:
        return english.question(self.language, words, self.pieces) + english.FORMS[self.language][form].cue

    # -- writing -----------------------------------------------------------------------------------------------------

    def heard(self, logits: Tensor) -> Tensor:
        """Logits [..., SIZE + size] of ids from those of tokens [..., size]."""
        found = torch.cat([logits.new_full((*logits.shape[:-1], SIZE), NEVER), logits], -1)
        words, tokens = zip(*((w, t) for w, t in self.token.items() if w not in self.together), strict=True)
        found[..., list(words)] = logits[..., list(tokens)]
        gone = list(tokens)
        for word, several in self.together.items():
            found[..., word] = logits[..., several].logsumexp(-1)
            gone += several
        found[..., [SIZE + token for token in gone]] = NEVER
        return found

    def say(self, ids: Sequence[int]) -> str:
        """A text in words, whatever its ids are."""
        parts, run = list[str](), list[int]()
        for i in [*ids, -1]:
            token = i - SIZE if i >= SIZE else self.token.get(i)
            if token is not None:
                run.append(token)
                continue
            parts.append(self._text_of(run) if run else "")
            run = []
            parts.append(f" {WORDS[i]} " if i >= 0 else "")
        return english.read_back(self.language, "".join(parts), self._back)

    def _text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens in the middle of another."""
        made = tokenizer(self.folder)
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        whole, before = (made.decode(ids, **options) for ids in ([*self._anchor, *tokens], self._anchor))
        return str(whole[len(before) :])
