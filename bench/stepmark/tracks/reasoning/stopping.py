"""What methods share that end a thought: texts in the format <think>, sentence by sentence, each with an account of rows.

A thought ends with ``</think>``, behind which the answer stands: ``</think> ans 7``. Whoever ends one writes the terminator
and the cue ``ans`` himself; the row that reads both gives the first digit. A text is charged for what it costs alone, so that
all texts together never spend more than the rung, whichever of them goes on for long. The state of a token is that of the row
that read it: whoever looks at it before the text goes on reads a token that would have been read next, and pays nothing more
unless the text ends there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepmark.backbones.chains import Chains
from stepmark.backbones.reasoners import DIGITS, STOP, WORDS, Reasoner, encode
from stepmark.session import Session
from stepmark.tracks.reasoning.solving import answer_of, padded

END, SO, EQUALS, ANS = (WORDS.index(word) for word in ("</think>", "so", "=", "ans"))
CUE = [END, ANS]
ANSWER, MOST = 4, 300  # rows that an answer is kept; most tokens of a thought
TEMPERATURE = 0.6  # at which thoughts are sampled, of the papers; answers are the likeliest tokens
SIDE = 100  # texts that are written side by side in `prepare`

Adjust = Callable[[list[int], Tensor], Tensor]


class Thoughts:
    """One text in the format <think> for each question.

    Attributes:
        chains: the texts, the prompts in front.
        reserve: rows of those that a text may have that a thought leaves, for what comes behind it.
    """

    def __init__(
        self,
        model: Reasoner,
        questions: Sequence[Sequence[int]],
        rung: int,
        reserve: int = ANSWER,
        states: bool = False,
    ) -> None:
        """`states`: the final states of tokens can be looked at."""
        word = encode("<think>")
        self.chains = Chains(model, [[*question, *word] for question in questions], states)
        self.reserve, self._rung = reserve, rung
        self._settled: set[int] = set()

    @property
    def left(self) -> list[int]:
        """Rows that each text may still have."""
        return [self._rung - rows for rows in self.chains.rows]

    def written(self, i: int) -> list[int]:
        """What stands behind the prompt of text i."""
        return self.chains.written(i)

    def closed(self, i: int) -> bool:
        """Whether the thought of text i has ended, by itself or not."""
        return i in self._settled or self.chains.ended(i) or END in self.written(i)

    def thinking(self, most: int = MOST) -> list[int]:
        """The texts whose thought may go on: it has not ended, and there is room for a token more."""
        return [
            i
            for i, left in enumerate(self.left)
            if left > self.reserve and len(self.written(i)) < most and not self.closed(i)
        ]

    def paused(self, chosen: Sequence[int]) -> list[int]:
        """Those of the chosen texts whose thought stands at the end of a sentence."""
        return [i for i in chosen if self.chains.texts[i][-1] == STOP and not self.closed(i)]

    def write(
        self,
        chosen: Sequence[int],
        rng: torch.Generator,
        temperature: float = TEMPERATURE,
        most: int = MOST,
        limit: int = MOST,
        sentence: bool = True,
        adjust: Adjust | None = None,
    ) -> None:
        """Think on: to the end of the sentence (of the thought, where `sentence` is not set), for `limit` tokens, until
        the thought has `most`, or as long as the accounts allow."""
        left = self.left
        limits = [min(limit, most - len(self.written(i)), left[i] - self.reserve) for i in chosen]
        stop = (STOP, END) if sentence else (END,)
        self.chains.write(chosen, stop=stop, limit=limits, temperature=temperature, generator=rng, adjust=adjust)

    def ask(self, chosen: Sequence[int], back: int = 0) -> list[tuple[list[int], float]]:
        """What each chosen text would answer if its thought ended here, or `back` tokens before, and the log-probability of
        that: the likeliest tokens behind `CUE`, a row each. The texts stand as before."""
        ends = {i: len(self.chains.texts[i]) - back for i in chosen}
        behind = {i: self.chains.texts[i][end:] for i, end in ends.items()}
        for i, end in ends.items():
            self.chains.cut(i, end)
            self.chains.put(i, CUE)
        found = []
        for i, tokens in zip(chosen, self._answered(chosen), strict=True):
            found.append((tokens, sum(self.chains.logprobs[i][ends[i] + len(CUE) :])))
            self.chains.cut(i, ends[i])
            self.chains.put(i, behind[i])
        return found

    def settle(self, i: int, tokens: Sequence[int]) -> None:
        """End text i with an answer that is known: digits and the end of the sequence. Costs nothing."""
        self.chains.put(i, [*CUE, *tokens])
        self._settled.add(i)

    def answer(self, chosen: Sequence[int], cue: Sequence[int] = CUE) -> None:
        """End the thoughts of the chosen texts with `cue`, and write their answers."""
        for i in chosen:
            self.chains.put(i, cue)
        self._close(chosen)

    def finish(self, cue: Sequence[int] | None = CUE) -> list[list[int]]:
        """All texts, without their prompts: thoughts that have ended are answered; so are those that have not, behind
        `cue`, or they are left as they stand (None)."""
        waiting = [i for i in range(len(self.chains)) if i not in self._settled and not self.chains.ended(i)]
        if cue is not None:
            self.answer([i for i in waiting if END not in self.written(i)], cue)
        self._close([i for i in waiting if i not in self._settled and END in self.written(i)])
        return [self.written(i) for i in range(len(self.chains))]

    def _close(self, chosen: Sequence[int]) -> None:
        self._answered(chosen)
        self._settled |= set(chosen)

    def _answered(self, chosen: Sequence[int]) -> list[list[int]]:
        left = self.left
        return self.chains.write(chosen, limit=[min(ANSWER, left[i]) for i in chosen])


def stated(text: Sequence[int]) -> list[int] | None:
    """Digits of the number that the last sentence of a text ends with, ``= 1 2 .`` or ``so 1 2 .``; None where it ends
    otherwise, as a step that is checked again does: ``wait 3 + 4 = 7 yes .``"""
    if not text or text[-1] != STOP:
        return None
    start = len(text) - 1
    while start and text[start - 1] in DIGITS:
        start -= 1
    digits = list(text[start:-1])
    return digits if digits and start and text[start - 1] in (EQUALS, SO) else None


# -- learning, on the train split ------------------------------------------------------------------------------------


def asked(train: Mapping[str, Any], first: int, count: int) -> tuple[list[list[int]], list[str]]:
    """`count` questions of two steps and more of the train split, from row `first` on: token ids, and the answers."""
    rows = [i for i in range(first, min(len(train["level"]), first + 2 * count + 5)) if train["level"][i] > 1][:count]
    return [encode(train["question"][i]) for i in rows], [train["answer"][i] for i in rows]


def share_right(texts: Sequence[Sequence[int]], answers: Sequence[str]) -> float:
    """Share of the texts that end with the answer."""
    return sum(answer_of(text) == answer for text, answer in zip(texts, answers, strict=True)) / len(answers)


def sides(questions: Sequence[Any]) -> list[slice]:
    """The questions in parts that are worked on side by side."""
    return [slice(start, start + SIDE) for start in range(0, len(questions), SIDE)]


def enough(session: Session) -> int:
    """Rows for a thought in `prepare`: for any, with answers asked for after every sentence; at smoke for some tokens."""
    return session.scale(4 * MOST, 18)


def traces(session: Session, count: int) -> dict[str, Tensor]:
    """Whole thoughts about train questions, prompts and answers included: {"ids": int64 [N, T], padded; "starts", "lengths":
    int64 [N], where the thought begins and the text ends; "answers": int64 [N], the right ones}. For `session.once`."""
    questions, answers = asked(session.train, 0, count)
    texts, starts = [], []
    with torch.no_grad():
        for part in sides(questions):
            thoughts = Thoughts(session.networks["model"], questions[part], enough(session))
            thoughts.write(thoughts.thinking(), session.rng, sentence=False)
            thoughts.finish(None)
            texts += thoughts.chains.texts
            starts += thoughts.chains.starts
    return {
        "ids": padded(texts, session.device),
        "starts": torch.tensor(starts),
        "lengths": torch.tensor([len(text) for text in texts]),
        "answers": torch.tensor([int(answer.replace(" ", "")) for answer in answers]),
    }


def read_states(model: Reasoner, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Final states [T, D] of each text, a row each."""
    found: list[Tensor] = []
    with torch.no_grad():
        for part in sides(texts):
            states = model(padded(texts[part], model.device), states=True)
            found += [row[: len(text)] for row, text in zip(states, texts[part], strict=True)]
    return found


def eagerest(values: Sequence[float], right: Callable[[float], float], least: float) -> float:
    """The first of the values, from the one that ends thoughts soonest, with which a share of at least `least` is right; the
    last where none is."""
    return next((value for value in values if right(value) >= least), values[-1])
